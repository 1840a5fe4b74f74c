"""What changes between two lists of recommendations of the same users.

V users, k ranks, I items. Items of both lists are numbered alike; -1 stands at empty ranks, which follow the others.
"""

import numpy as np
from jaxtyping import Bool, Float64, Int, Num

PERSISTENCE = 0.9  # of rank-biased overlap: the first ten ranks have 86 % of the weight


def _shared(before: Int[np.ndarray, "V k"], after: Int[np.ndarray, "V k"]) -> Bool[np.ndarray, "V k"]:
    """Tells which items of `before` are anywhere in `after`."""
    return ((before[:, :, None] == after[:, None, :]) & (before >= 0)[:, :, None]).any(2)


def overlap(before: Int[np.ndarray, "V k"], after: Int[np.ndarray, "V k"]) -> Float64[np.ndarray, "V"]:
    """Computes the share of each user's items that are in both lists, of the longer one; NaN where both are empty."""
    longer = np.maximum((before >= 0).sum(1), (after >= 0).sum(1))
    return np.where(longer > 0, _shared(before, after).sum(1) / np.maximum(longer, 1), np.nan)


def jaccard(before: Int[np.ndarray, "V k"], after: Int[np.ndarray, "V k"]) -> Float64[np.ndarray, "V"]:
    """Computes the share of items in both lists of those in either; NaN where both are empty."""
    common = _shared(before, after).sum(1)
    either = (before >= 0).sum(1) + (after >= 0).sum(1) - common
    return np.where(either > 0, common / np.maximum(either, 1), np.nan)


def rank_biased_overlap(
    before: Int[np.ndarray, "V k"], after: Int[np.ndarray, "V k"], persistence: float = PERSISTENCE
) -> Float64[np.ndarray, "V"]:
    """Computes rank-biased overlap, extrapolated (RBO_EXT of Webber, Moffat and Zobel, TOIS 28, 2010).

    A weighted mean of the overlaps of the first 1, 2, ... items, with falling weights: 1 for equal lists, 0 for
    disjoint ones, and higher where the first ranks agree. The overlap at depth k stands for all deeper ones.

    Args:
      before: items by rank.
      after: the same number of ranks.
      persistence: ratio of the weights of two successive depths, from 0 to 1, both excluded.

    Returns:
      The value of each user; NaN where both lists are empty.
    """
    k = before.shape[1]
    depths = np.arange(1, k + 1)
    agreement = np.stack([_shared(before[:, :d], after[:, :d]).sum(1) / d for d in depths], axis=1)
    weights = (1 - persistence) * persistence ** (depths - 1)
    found = agreement @ weights + agreement[:, -1] * persistence**k
    # A list with fewer than k items agrees in its empty ranks too: they are no disagreement.
    filled = np.maximum((before >= 0).sum(1), (after >= 0).sum(1))
    short = np.flatnonzero((filled > 0) & (filled < k))
    for user in short.tolist():
        own = slice(0, int(filled[user]))
        found[user] = rank_biased_overlap(before[[user], own], after[[user], own], persistence)[0]
    return np.where(filled > 0, found, np.nan)


def first_unchanged(before: Int[np.ndarray, "V k"], after: Int[np.ndarray, "V k"]) -> Float64[np.ndarray, "V"]:
    """Tells whose first item is the same (1 or 0); NaN where both lists are empty."""
    either = (before[:, 0] >= 0) | (after[:, 0] >= 0)
    return np.where(either, before[:, 0] == after[:, 0], np.nan)


def exposure(lists: Int[np.ndarray, "V k"], n_items: int) -> Float64[np.ndarray, "I"]:
    """Computes the share of the lists that each item is in."""
    return np.bincount(lists[lists >= 0], minlength=n_items) / max(len(lists), 1)


def rank_correlation(one: Num[np.ndarray, "V n"], other: Num[np.ndarray, "V n"]) -> Float64[np.ndarray, "V"]:
    """Computes Spearman's rank correlation of each row; equal values share their mean rank.

    Returns:
      The correlation of each row; NaN where a row has a single value.
    """
    from scipy.stats import rankdata  # a quarter of a second, which commands without correlations need not wait

    ranks = [rankdata(values.astype(np.float64), axis=1) for values in (one, other)]  # newer SciPy keeps the type
    a, b = (rank - rank.mean(1, keepdims=True) for rank in ranks)
    size = np.sqrt((a * a).sum(1) * (b * b).sum(1))
    return np.where(size > 0, (a * b).sum(1) / np.where(size > 0, size, 1), np.nan)
