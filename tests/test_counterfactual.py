"""Counterfactual sets are the smallest that an enumeration of all sets finds, and are recomputed."""

import itertools

import numpy as np
import pytest
import tiny
from test_decomposition import MARKET
from test_faithfulness import given, opened  # noqa: F401

from fused_rec.config import Config, ModelConfig
from fused_rec.explanation import counterfactual as subject
from fused_rec.explanation.catalogs import open_catalog
from fused_rec.explanation.counterfactual import CounterfactualSet, counterfactual_sets, without_sources
from fused_rec.explanation.leave_one_out import leave_one_out
from fused_rec.explanation.own_reviews import own_reviews
from fused_rec.explanation.reasons import set_record, set_sentence
from fused_rec.explanation.sources import Source, sources
from fused_rec.training.train_step import GraphInputs, init


@pytest.fixture(scope="module")
def left_out(opened):  # noqa: F811
    config, prepared, params, *_ = opened
    reviews = own_reviews(config, prepared)
    return leave_one_out(config, params, prepared.observed, prepared.graph_inputs, reviews)


def ranked(opened, user: int, gone=()):  # noqa: F811
    """Items that the user has no interaction with, best first, without some sources."""
    config, prepared, params, *_ = opened
    inputs, reviews = prepared.graph_inputs, own_reviews(config, prepared)
    if gone:
        inputs = without_sources(config, prepared.observed, inputs, user, gone, reviews)
    scores = given(config, params, inputs, user).copy()
    scores[prepared.observed.item[prepared.observed.user == user]] = -np.inf
    return np.argsort(-scores, kind="stable").tolist()


def eligible(prepared, user: int) -> np.ndarray:
    return ~np.isin(np.arange(prepared.dataset.n_items), prepared.observed.item[prepared.observed.user == user])


def smallest(opened, own, user: int, item: int, k: int) -> int:  # noqa: F811
    """The size of the smallest set that takes the item out of the top k, or into it, by trying all of up to two."""
    inside = item in ranked(opened, user)[:k]

    def moves(size: int) -> bool:
        return any((item in ranked(opened, user, gone)[:k]) != inside for gone in itertools.combinations(own, size))

    return next((size for size in (1, 2) if moves(size)), 3)


@pytest.mark.parametrize(
    ("user", "place", "k"), [(0, 0, 1), (3, 1, 2), (5, 2, 3), (11, 0, 3), (0, 2, 2), (3, 1, 1), (5, 4, 4), (11, 1, 1)]
)
def test_sets_are_the_smallest_of_all(opened, left_out, user, place, k):  # noqa: F811
    _, prepared, *_ = opened
    before = ranked(opened, user)
    item = before[place]
    [found] = counterfactual_sets(left_out, prepared, user, [item], k, eligible(prepared, user))
    own = sources(left_out.graph, left_out.reverse, user, left_out.reviews)
    size = smallest(opened, own, user, item, k)
    if found is None:
        assert size == 3 and place >= k and (user, place) != (3, 1)
        return
    assert found.rank == place + 1
    assert len(found.sources) == size if size < 3 else len(found.sources) > 2
    assert found.smallest == (len(found.sources) <= subject.LARGEST_SET + 1)
    after = ranked(opened, user, found.sources)
    assert found.rank_after == after.index(item) + 1
    assert (found.rank <= k) != (found.rank_after <= k)
    assert item == (found.leaving if place < k else found.entering)
    if place < k:
        assert found.entering == next(other for other in after[:k] if other not in before[:k])
    else:
        assert found.leaving == [other for other in before[:k] if other not in after[:k]][-1]


def test_items_of_a_list_share_scores(opened, left_out, monkeypatch):  # noqa: F811
    """Each item has the set that it has alone, and scores without a set are computed once."""
    _, prepared, *_ = opened
    user, k = 3, 2
    items, asked = ranked(opened, user)[:3], eligible(prepared, user)
    alone = [counterfactual_sets(left_out, prepared, user, [item], k, asked)[0] for item in items]
    leads, computed = subject._Leads(left_out, prepared, user, items, k, asked), []
    scores = leads.without.scores
    monkeypatch.setattr(
        leads.without, "scores", lambda sets, items: computed.extend(map(tuple, sets.tolist())) or scores(sets, items)
    )
    assert [subject._SetSearch(leads, place).search() for place in range(len(items))] == alone
    assert len(computed) == len(set(computed)) == len(leads.known)


def test_beyond_three_the_search_is_greedy_and_says_so(opened, left_out, monkeypatch):  # noqa: F811
    _, prepared, *_ = opened
    monkeypatch.setattr(subject, "MOST_SETS", 0)
    before = ranked(opened, 0)
    [found] = counterfactual_sets(left_out, prepared, 0, [before[0]], 2, eligible(prepared, 0))
    assert found is not None and found.smallest == (len(found.sources) == 1)
    assert before[0] not in ranked(opened, 0, found.sources)[:2]
    for source in found.sources:  # each is needed
        assert before[0] in ranked(opened, 0, [other for other in found.sources if other != source])[:2]
    monkeypatch.setattr(subject, "LARGEST_SET", 0)
    assert counterfactual_sets(left_out, prepared, 0, [before[0]], 24, eligible(prepared, 0)) == [None]


def test_a_user_of_whom_nothing_is_left_is_scored_by_popularity():
    popularity = np.array([2, 5, 1, 4, 3, 0], np.float32)
    inputs = GraphInputs(tiny.whole(), np.ones(6, bool), popularity)
    config = Config(model=ModelConfig(dim=3, num_layers=2, popularity_weight=0.0))
    params = init(config, inputs).params
    found = [subject._scores(config, params, inputs, user) for user in (0, 6)]
    assert len(np.unique(found[0])) > 1 and not np.array_equal(found[0], popularity)
    np.testing.assert_array_equal(found[1], popularity)


def test_a_set_in_words():
    gone = [Source("interaction", 0, ()), Source("tie:referral", 1, ()), Source("interaction", 1, ())]
    leaves = CounterfactualSet(tuple(gone), True, 1, 2, 3, 0)
    assert set_sentence(MARKET, leaves) == (
        "You see this because of Cash, i1 and 1 customer tied to you (referral); without them it would be Gold."
    )
    assert set_sentence(MARKET, leaves._replace(sources=(gone[0],))) == (
        "You see this because of Cash; without that it would be Gold."
    )
    enters = leaves._replace(rank=5, rank_after=1, entering=0, leaving=3)
    assert set_sentence(MARKET, enters) == (
        "Without Cash, i1 and 1 customer tied to you (referral) you would see this in place of Gold."
    )
    written = leaves._replace(sources=(Source("review", 3, ()), gone[0], gone[1]))
    assert set_sentence(MARKET, written, open_catalog("fr")) == (
        "Vous voyez ceci en raison des éléments suivants\u00a0: Cash, ce que vous avez écrit sur Gold et 1 client lié "
        "à vous (referral)\u202f; sans eux, ce serait Gold."
    )
    assert set_record(MARKET, written)["sources"][0] == {"kind": "review", "item_id": "i3"}
    alike = tuple(Source("similar_text", row, ()) for row in (0, 2))
    assert set_sentence(MARKET, CounterfactualSet(alike, False, 1, 2, -1, 0)) == (
        "You see this because of 2 customers with much the same text; without them it would not be listed."
    )
