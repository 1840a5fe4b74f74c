"""Metrics by slices of users or of held-out items."""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Int32

from fused_rec.config import SLICE_METRICS
from fused_rec.evaluation.item_sets import UserItemSets, item_sets
from fused_rec.evaluation.ranking import RankingSpec, Scorer, UserMetrics, as_argument, evaluate, mean

ITEM_METRICS = (*SLICE_METRICS, "recall@20")
BANDS = (0, 1, 5, 20)  # first interaction count of each band

Slices = dict[str, dict[str, int | float]]
"""By slice: numbers of held-out items (item slices only) and of users, and means of metrics."""


def bands(counts: Int[np.ndarray, "N"]) -> dict[str, Bool[np.ndarray, "N"]]:
    """Groups by number of interactions: 0, 1 to 4, 5 to 19, and 20 or more; a mask for each name."""
    ends = (*BANDS[1:], np.iinfo(np.int64).max)
    names = ("0", *(f"{low}-{high - 1}" for low, high in zip(BANDS[1:], BANDS[2:], strict=False)), f"{BANDS[-1]}+")
    return {name: (counts >= low) & (counts < high) for name, low, high in zip(names, BANDS, ends, strict=True)}


def user_slices(
    per_user: UserMetrics, members: Mapping[str, Bool[np.ndarray, "U"]], names: Sequence[str] = SLICE_METRICS
) -> Slices:
    """Averages metrics over the evaluated users of each slice; empty slices are omitted.

    Args:
      per_user: metrics of the evaluated users.
      members: users of each slice.
      names: of the metrics.
    """
    found = {}
    for name, mask in members.items():
        rows = mask[per_user.users]
        if rows.any():
            metrics = {metric: per_user.metrics[metric][rows] for metric in names}
            found[name] = {"users": int(rows.sum())} | mean(UserMetrics(per_user.users[rows], metrics, {}))
    return found


def item_slices(
    scorer: Scorer, members: Mapping[str, Bool[np.ndarray, "I"]], spec: RankingSpec, truth: UserItemSets
) -> Slices:
    """Evaluates with only the held-out items of a slice as relevant; empty slices are omitted.

    Rankings do not change: a held-out item outside the slice remains a candidate. Means are over the users with a
    held-out item in the slice.

    Args:
      scorer: see `ranking.Scorer`.
      members: items of each slice.
      spec: what may be recommended, without a filter.
      truth: held-out items.

    Returns:
      Means by slice.
    """
    assert not spec.filter.names  # its tests are of users, not of rows of slices
    held_out = np.zeros(spec.n_items, bool)
    held_out[truth.items] = True
    held_out &= spec.candidate_mask()
    members = {name: mask for name, mask in members.items() if (mask & held_out).any()}
    # User u of slice s is row s * U + u, so that one compiled pass evaluates all slices.
    n_users, n_slices, seen = truth.n_users, len(members), spec.seen
    counted = np.stack([mask[truth.items] for mask in members.values()])
    row, pair = np.nonzero(counted)
    row_of_seen = np.repeat(np.arange(n_slices), len(seen.items)) * n_users + np.tile(seen.users, n_slices)
    of_slices = evaluate(
        jax.tree_util.Partial(_of_user, as_argument(scorer), jnp.int32(n_users)),
        dataclasses.replace(spec, seen=item_sets(row_of_seen, np.tile(seen.items, n_slices), n_slices * n_users)),
        item_sets(row * n_users + truth.users[pair], truth.items[pair], n_slices * n_users),
        ks=(10, 20),
    )
    slice_of = np.arange(n_slices * n_users) // n_users
    found = user_slices(of_slices, {name: slice_of == place for place, name in enumerate(members)}, ITEM_METRICS)
    return {name: {"items": int((members[name] & held_out).sum())} | values for name, values in found.items()}


def _of_user(scorer: jax.tree_util.Partial, n_users: Int32[Array, ""], rows: Int32[Array, "B"]) -> Float[Array, "B I"]:
    return scorer(rows % n_users)
