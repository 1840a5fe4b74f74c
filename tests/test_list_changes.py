"""Changes of lists, by hand and against a second way of computing them."""

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from scipy.stats import spearmanr

from fused_rec.evaluation.list_changes import (
    exposure,
    first_unchanged,
    jaccard,
    overlap,
    rank_biased_overlap,
    rank_correlation,
)


def lists(*rows: Sequence[int]) -> np.ndarray:
    return np.array(rows)


def test_overlap_and_jaccard_by_hand():
    before, after = (
        lists([1, 2, 3], [1, 2, 3], [1, 2, -1], [-1, -1, -1]),
        lists([3, 2, 1], [1, 7, 8], [1, 2, 3], [-1] * 3),
    )
    assert overlap(before, after).tolist()[:3] == [1, pytest.approx(1 / 3), pytest.approx(2 / 3)]
    assert jaccard(before, after).tolist()[:3] == [1, pytest.approx(1 / 5), pytest.approx(2 / 3)]
    assert np.isnan(overlap(before, after)[3]) and np.isnan(jaccard(before, after)[3])


def test_first_items():
    found = first_unchanged(lists([1, 2], [1, 2], [1, -1], [-1, -1]), lists([1, 3], [2, 1], [-1, -1], [-1, -1]))
    assert found.tolist()[:3] == [1, 0, 0] and np.isnan(found[3])


def test_rank_biased_overlap_by_hand():
    one = lists([1, 2, 3])
    assert rank_biased_overlap(one, one)[0] == pytest.approx(1)
    assert rank_biased_overlap(one, lists([4, 5, 6]))[0] == 0
    # Overlaps of the first 1, 2 and 3 items: 1, 1/2, 1.
    assert rank_biased_overlap(one, lists([1, 3, 2]), 0.9)[0] == pytest.approx(0.1 * (1 + 0.45 + 0.81) + 0.729)


def test_rank_biased_overlap_gives_the_first_ranks_more_weight():
    one = np.arange(10)[None]
    swapped = [one.copy() for _ in range(9)]
    for rank, row in enumerate(swapped):
        row[0, [rank, rank + 1]] = row[0, [rank + 1, rank]]
    values = [rank_biased_overlap(one, row)[0] for row in swapped]
    assert values == sorted(values) and values[0] < values[-1] < 1


def test_a_short_list_is_compared_as_far_as_it_goes():
    before, after = lists([1, 2, -1, -1]), lists([2, 1, -1, -1])
    assert rank_biased_overlap(before, after)[0] == pytest.approx(rank_biased_overlap(before[:, :2], after[:, :2])[0])
    assert rank_biased_overlap(before, before)[0] == pytest.approx(1)
    assert np.isnan(rank_biased_overlap(lists([-1, -1]), lists([-1, -1]))[0])


def test_exposure_counts_lists():
    assert exposure(lists([0, 2], [2, -1]), 4).tolist() == [0.5, 0, 1, 0]


def test_rank_correlation_is_spearmans():
    rng = np.random.default_rng(0)
    one, other = rng.integers(0, 5, (4, 9)), rng.random((4, 9))
    expected = [float(np.asarray(spearmanr(a, b))[0]) for a, b in zip(one, other, strict=True)]
    np.testing.assert_allclose(rank_correlation(one, other), expected, atol=1e-12)
    assert np.isnan(rank_correlation(np.ones((1, 3)), other[:1, :3])[0])


@pytest.mark.parametrize("measure", [overlap, jaccard, rank_biased_overlap])
def test_measures_are_symmetric_and_between_0_and_1(measure):
    pairs = list(itertools.permutations(range(4), 3))
    before = lists(*(one for one, _ in itertools.product(pairs, pairs)))
    after = lists(*(other for _, other in itertools.product(pairs, pairs)))
    found = measure(before, after)
    np.testing.assert_allclose(found, measure(after, before))
    assert (found >= 0).all() and (found <= 1 + 1e-12).all() and found.max() == pytest.approx(1)
