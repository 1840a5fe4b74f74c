"""Batches of users with items they hold: a function of (seed, step) alone, so that a resumed run needs no cursor."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int32, Int64


class Batch(NamedTuple):
    """B users with up to P held items each, drawn without replacement; a last, short batch is padded by mask."""

    users: Int32[np.ndarray, "B"]
    items: Int32[np.ndarray, "B P"]
    mask: Float32[np.ndarray, "B P"]  # 1 = a real pair
    negatives: Int32[np.ndarray, "B M"]  # uniform over the items that the user does not hold


class Holdings(NamedTuple):
    """The training pairs by user: user u holds items[start[u] : start[u + 1]], ascending."""

    start: Int64[np.ndarray, "U_plus_1"]
    items: Int32[np.ndarray, "E"]
    pairs: Int64[np.ndarray, "E"]  # user * n_items + item, ascending
    active: Int32[np.ndarray, "_"]  # users that hold anything
    present: Int32[np.ndarray, "_"]  # items there are while training, from which negatives are drawn
    n_items: int


def holdings(
    user: Int32[np.ndarray, "E"], item: Int32[np.ndarray, "E"], n_users: int, present: Bool[np.ndarray, "I"]
) -> Holdings:
    """Sorts distinct (user, item) pairs by user. Raises ValueError where there is no pair."""
    n_items = len(present)
    order = np.lexsort((item, user))
    start = np.searchsorted(user[order], np.arange(n_users + 1)).astype(np.int64)
    active = np.flatnonzero(np.diff(start)).astype(np.int32)
    if not len(active):
        raise ValueError("no user holds an item in the training part; there is nothing to learn from")
    pairs = user[order].astype(np.int64) * n_items + item[order]
    return Holdings(
        start, item[order].astype(np.int32), pairs, active, np.flatnonzero(present).astype(np.int32), n_items
    )


def steps_per_epoch(held: Holdings, batch_users: int) -> int:
    """Batches that it takes to see every user with an item once."""
    return -(-len(held.active) // batch_users)


def batch(held: Holdings, step: int, *, seed: int, batch_users: int, positives: int, negatives: int) -> Batch:
    """The batch of one step. An epoch is a seeded permutation of the users that hold anything."""
    epoch, within = divmod(step, steps_per_epoch(held, batch_users))
    order = np.random.default_rng((seed, epoch, 0)).permutation(held.active)
    chosen = order[within * batch_users : (within + 1) * batch_users]
    rng = np.random.default_rng((seed, step, 1))

    users = np.zeros(batch_users, np.int32)
    users[: len(chosen)] = chosen
    items = np.zeros((batch_users, positives), np.int32)
    mask = np.zeros((batch_users, positives), np.float32)
    count = np.diff(held.start)[chosen]
    row = np.repeat(np.arange(len(chosen)), count)
    at = np.repeat(held.start[chosen] - np.cumsum(count) + count, count) + np.arange(count.sum())
    shuffled = np.lexsort((rng.random(len(row)), row))
    rank = np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count)
    keep = rank < positives
    items[row[keep], rank[keep]] = held.items[at[shuffled[keep]]]
    mask[row[keep], rank[keep]] = 1
    return Batch(users, items, mask, _negatives(held, users, negatives, rng))


def _negatives(held: Holdings, users: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    drawn = rng.choice(held.present, (len(users), count))
    # Ten redraws: a user who holds half the catalogue is left with a held item once in a thousand draws.
    for _ in range(10):
        keys = users[:, None].astype(np.int64) * held.n_items + drawn
        found = held.pairs[np.minimum(np.searchsorted(held.pairs, keys), len(held.pairs) - 1)] == keys
        if not found.any():
            break
        drawn[found] = rng.choice(held.present, found.sum())
    return drawn
