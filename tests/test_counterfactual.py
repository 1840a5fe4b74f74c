"""Counterfactual sets are the smallest that an enumeration of all sets finds, and are recomputed."""

import itertools

import numpy as np
import pytest
from test_decomposition import MARKET
from test_faithfulness import given, opened  # noqa: F401
from tiny import quick_compilation  # noqa: F401

from fused_rec.explanation import counterfactual as subject
from fused_rec.explanation.counterfactual import CounterfactualSet, counterfactual_set, without_sources
from fused_rec.explanation.leave_one_out import leave_one_out
from fused_rec.explanation.reasons import set_sentence
from fused_rec.explanation.sources import Source, sources


@pytest.fixture(scope="module")
def left_out(opened):  # noqa: F811
    config, prepared, params, *_ = opened
    return leave_one_out(config, params, prepared.observed, prepared.graph_inputs)


def ranked(opened, user: int, gone=()):  # noqa: F811
    """Items that the user has no interaction with, best first, without some sources."""
    config, prepared, params, *_ = opened
    inputs = without_sources(config, prepared.observed, prepared.graph_inputs, user, gone) if gone else None
    scores = given(config, params, inputs or prepared.graph_inputs, user).copy()
    scores[prepared.observed.item[prepared.observed.user == user]] = -np.inf
    return np.argsort(-scores, kind="stable").tolist()


def eligible(prepared, user: int) -> np.ndarray:
    return ~np.isin(np.arange(prepared.dataset.n_items), prepared.observed.item[prepared.observed.user == user])


@pytest.mark.parametrize(("user", "place", "k"), [(0, 0, 1), (3, 1, 2), (5, 2, 3), (11, 0, 3)])
def test_sets_are_the_smallest_of_all(opened, left_out, user, place, k):  # noqa: F811
    _, prepared, *_ = opened
    before = ranked(opened, user)
    item = before[place]
    found = counterfactual_set(left_out, prepared, user, item, k, eligible(prepared, user))
    own = sources(left_out.graph, left_out.reverse, user)

    def leaves(size: int) -> bool:
        return any(item not in ranked(opened, user, gone)[:k] for gone in itertools.combinations(own, size))

    smallest = next((size for size in (1, 2) if leaves(size)), 3)
    assert found is not None and found.rank == place + 1
    assert len(found.sources) == smallest if smallest < 3 else len(found.sources) > 2
    assert found.smallest == (len(found.sources) <= subject.LARGEST_SET)
    after = ranked(opened, user, found.sources)
    assert found.rank_after == after.index(item) + 1 > k
    assert found.entering == next(other for other in after[:k] if other not in before[:k])


def test_beyond_three_the_search_is_greedy_and_says_so(opened, left_out, monkeypatch):  # noqa: F811
    _, prepared, *_ = opened
    monkeypatch.setattr(subject, "MOST_GRAPHS", 0)
    before = ranked(opened, 0)
    found = counterfactual_set(left_out, prepared, 0, before[0], 2, eligible(prepared, 0))
    assert found is not None and not found.smallest
    assert before[0] not in ranked(opened, 0, found.sources)[:2]
    for source in found.sources:  # each is needed
        assert before[0] in ranked(opened, 0, [other for other in found.sources if other != source])[:2]
    monkeypatch.setattr(subject, "LARGEST_SET", 0)
    assert counterfactual_set(left_out, prepared, 0, before[0], 24, eligible(prepared, 0)) is None
    assert counterfactual_set(left_out, prepared, 0, before[5], 3, eligible(prepared, 0)) is None  # not in the top 3


def test_a_set_in_words():
    gone = [Source("interaction", 0, ()), Source("tie:referral", 1, ()), Source("interaction", 1, ())]
    assert set_sentence(MARKET, CounterfactualSet(tuple(gone), True, 1, 2, 3)) == (
        "Without Cash, i1 and 1 customer tied to this one (referral) it would be Gold."
    )
    alike = tuple(Source("similar_text", row, ()) for row in (0, 2))
    assert set_sentence(MARKET, CounterfactualSet(alike, False, 1, 2, -1)) == (
        "Without 2 customers with much the same text it would not be listed."
    )
