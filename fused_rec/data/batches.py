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


class UserItems(NamedTuple):
    """The training pairs by user: user u holds items[start[u] : start[u + 1]], ascending."""

    start: Int64[np.ndarray, "U_plus_1"]
    items: Int32[np.ndarray, "E"]
    pairs: Int64[np.ndarray, "E"]  # user * n_items + item, ascending
    active: Int32[np.ndarray, "_"]  # users that hold anything
    trained_items: Int32[np.ndarray, "_"]  # items there are while training, from which negatives are drawn
    n_items: int


def user_items(
    user: Int32[np.ndarray, "E"], item: Int32[np.ndarray, "E"], n_users: int, trained_items: Bool[np.ndarray, "I"]
) -> UserItems:
    """Sorts distinct (user, item) pairs by user. Raises ValueError where there is no pair."""
    n_items = len(trained_items)
    order = np.lexsort((item, user))
    start = np.searchsorted(user[order], np.arange(n_users + 1)).astype(np.int64)
    active = np.flatnonzero(np.diff(start)).astype(np.int32)
    if not len(active):
        raise ValueError("no user holds an item in the training part; there is nothing to learn from")
    pairs = user[order].astype(np.int64) * n_items + item[order]
    return UserItems(
        start, item[order].astype(np.int32), pairs, active, np.flatnonzero(trained_items).astype(np.int32), n_items
    )


def steps_per_epoch(held: UserItems, batch_size: int) -> int:
    """Batches that it takes to see every user with an item once."""
    return -(-len(held.active) // batch_size)


def batch(
    user_items_of: UserItems, step: int, *, seed: int, batch_size: int, positives_per_user: int, num_negatives: int
) -> Batch:
    """The batch of one step. An epoch is a seeded permutation of the users that hold anything."""
    epoch, within = divmod(step, steps_per_epoch(user_items_of, batch_size))
    order = np.random.default_rng((seed, epoch, 0)).permutation(user_items_of.active)
    chosen = order[within * batch_size : (within + 1) * batch_size]
    rng = np.random.default_rng((seed, step, 1))

    users = np.zeros(batch_size, np.int32)
    users[: len(chosen)] = chosen
    items = np.zeros((batch_size, positives_per_user), np.int32)
    mask = np.zeros((batch_size, positives_per_user), np.float32)
    count = np.diff(user_items_of.start)[chosen]
    row = np.repeat(np.arange(len(chosen)), count)
    at = np.repeat(user_items_of.start[chosen] - np.cumsum(count) + count, count) + np.arange(count.sum())
    shuffled = np.lexsort((rng.random(len(row)), row))
    rank = np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count)
    keep = rank < positives_per_user
    items[row[keep], rank[keep]] = user_items_of.items[at[shuffled[keep]]]
    mask[row[keep], rank[keep]] = 1
    return Batch(users, items, mask, _negatives(user_items_of, users, num_negatives, rng))


def _negatives(held: UserItems, users: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    drawn = rng.choice(held.trained_items, (len(users), count))
    # Ten redraws: a user who holds half the catalogue is left with a held item once in a thousand draws.
    for _ in range(10):
        keys = users[:, None].astype(np.int64) * held.n_items + drawn
        found = held.pairs[np.minimum(np.searchsorted(held.pairs, keys), len(held.pairs) - 1)] == keys
        if not found.any():
            break
        drawn[found] = rng.choice(held.trained_items, found.sum())
    return drawn
