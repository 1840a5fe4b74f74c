"""Metrics by slices of users or of held-out items."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Int32

from fused_rec.evaluation.ranking import (
    Scorer,
    UserItemSets,
    UserMetrics,
    as_argument,
    evaluate,
    item_sets,
    mean,
)

METRICS = ("ndcg@10", "recall@10", "auc")
BANDS = (0, 1, 5, 20)  # first interaction count of each band

Slices = dict[str, dict[str, int | float]]
"""By slice: numbers of held-out items (item slices only) and of users, and the mean of each of `METRICS`."""


def bands(counts: Int[np.ndarray, "N"]) -> dict[str, Bool[np.ndarray, "N"]]:
    """Groups by number of interactions: 0, 1 to 4, 5 to 19, and 20 or more; a mask for each name."""
    ends = (*BANDS[1:], np.iinfo(np.int64).max)
    names = ("0", *(f"{low}-{high - 1}" for low, high in zip(BANDS[1:], BANDS[2:], strict=False)), f"{BANDS[-1]}+")
    return {name: (counts >= low) & (counts < high) for name, low, high in zip(names, BANDS, ends, strict=True)}


def user_slices(per_user: UserMetrics, members: Mapping[str, Bool[np.ndarray, "U"]]) -> Slices:
    """Averages metrics over the evaluated users of each slice; empty slices are omitted.

    Args:
      per_user: metrics of the evaluated users.
      members: users of each slice.
    """
    found = {}
    for name, mask in members.items():
        rows = mask[per_user.users]
        if rows.any():
            metrics = {metric: per_user.metrics[metric][rows] for metric in METRICS}
            found[name] = {"users": int(rows.sum())} | mean(UserMetrics(per_user.users[rows], metrics, {}))
    return found


def item_slices(
    scorer: Scorer,
    members: Mapping[str, Bool[np.ndarray, "I"]],
    *,
    truth: UserItemSets,
    seen: UserItemSets,
    n_items: int,
    candidates: Int[np.ndarray, "C"] | None = None,
) -> Slices:
    """Evaluates with only the held-out items of a slice as relevant; empty slices are omitted.

    Rankings do not change: a held-out item outside the slice remains a candidate. Means are over the users with a
    held-out item in the slice.

    Args:
      scorer: see `ranking.Scorer`.
      members: items of each slice.
      truth: held-out items.
      seen: items that are never recommended to the user.
      n_items: I.
      candidates: items that may be recommended; None = all.

    Returns:
      Means by slice.
    """
    held_out = np.zeros(n_items, bool)
    held_out[truth.items] = True
    if candidates is not None:
        held_out &= np.isin(np.arange(n_items), candidates)
    members = {name: mask for name, mask in members.items() if (mask & held_out).any()}
    # User u of slice s is row s * U + u, so that one compiled pass evaluates all slices.
    n_users, n_slices = truth.n_users, len(members)
    user, item = truth.users, truth.items
    counted = np.stack([mask[item] for mask in members.values()])
    row, pair = np.nonzero(counted)
    of_slices = evaluate(
        jax.tree_util.Partial(_of_user, as_argument(scorer), jnp.int32(n_users)),
        truth=item_sets(row * n_users + user[pair], item[pair], n_slices * n_users),
        seen=item_sets(
            np.repeat(np.arange(n_slices), len(seen.items)) * n_users + np.tile(seen.users, n_slices),
            np.tile(seen.items, n_slices),
            n_slices * n_users,
        ),
        n_items=n_items,
        item_counts=np.zeros(n_items, np.int64),  # novelty is not asked for
        ks=(10,),
        candidates=candidates,
    )
    slice_of = np.arange(n_slices * n_users) // n_users
    measured = user_slices(of_slices, {name: slice_of == place for place, name in enumerate(members)})
    return {name: {"items": int((members[name] & held_out).sum())} | values for name, values in measured.items()}


def _of_user(scorer: jax.tree_util.Partial, n_users: Int32[Array, ""], rows: Int32[Array, "B"]) -> Float[Array, "B I"]:
    return scorer(rows % n_users)
