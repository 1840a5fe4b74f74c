"""Training batches of users with their items: a function of (seed, step), so resuming needs no iterator state."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int32, Int64

from fused_rec.rng import Stream, numpy_rng


class Batch(NamedTuple):
    """B users with P sampled positive items each and M sampled negatives; the last batch of an epoch is padded."""

    users: Int32[np.ndarray, "B"]
    items: Int32[np.ndarray, "B P"]  # positives, sampled without replacement
    mask: Float32[np.ndarray, "B P"]  # 1 = a pair, 0 = padding
    negatives: Int32[np.ndarray, "B M"]  # uniform over the items without an interaction with the user


class UserItems(NamedTuple):
    """Training pairs in CSR form: the items of user u are items[start[u] : start[u + 1]], ascending."""

    start: Int64[np.ndarray, "U_plus_1"]
    items: Int32[np.ndarray, "E"]
    pairs: Int64[np.ndarray, "E"]  # user * n_items + item, ascending
    active: Int32[np.ndarray, "_"]  # users with at least one item
    trained_items: Int32[np.ndarray, "_"]  # items present in training, from which negatives are sampled
    n_items: int


def user_items(
    user: Int32[np.ndarray, "E"], item: Int32[np.ndarray, "E"], n_users: int, trained_items: Bool[np.ndarray, "I"]
) -> UserItems:
    """Groups distinct (user, item) pairs by user.

    Args:
      user: user index of each of E distinct pairs.
      item: item index of each pair.
      n_users: number of users U.
      trained_items: which items are present in training; negatives are sampled from these.

    Returns:
      The pairs in CSR form.

    Raises:
      ValueError: there is no pair.
    """
    n_items = len(trained_items)
    pairs = user.astype(np.int64)
    pairs *= n_items
    pairs += item
    if not (pairs[1:] > pairs[:-1]).all():
        order = np.argsort(pairs)
        pairs, item, user = pairs[order], item[order], user[order]
    start = np.searchsorted(user, np.arange(n_users + 1)).astype(np.int64)
    active = np.flatnonzero(np.diff(start)).astype(np.int32)
    if not len(active):
        raise ValueError("the training split has no interactions; use more data or other split fractions")
    trained = np.flatnonzero(trained_items).astype(np.int32)
    return UserItems(start, item.astype(np.int32, copy=False), pairs, active, trained, n_items)


def steps_per_epoch(user_items_of: UserItems, batch_size: int) -> int:
    """Returns the number of batches of `batch_size` users that contain every active user once."""
    return -(-len(user_items_of.active) // batch_size)


def batch(
    user_items_of: UserItems, step: int, *, seed: int, batch_size: int, positives_per_user: int, num_negatives: int
) -> Batch:
    """Samples the batch of one step. An epoch is a seeded permutation of the active users.

    Args:
      user_items_of: training pairs by user.
      step: global step, from 0.
      seed: seed of permutation and sampling.
      batch_size: users B.
      positives_per_user: positives P; users with fewer items are padded by `mask`.
      num_negatives: negatives M.

    Returns:
      The batch, equal for equal arguments.
    """
    epoch, within = divmod(step, steps_per_epoch(user_items_of, batch_size))
    order = numpy_rng(seed, epoch, Stream.BATCH_ORDER).permutation(user_items_of.active)
    chosen = order[within * batch_size : (within + 1) * batch_size]
    rng = numpy_rng(seed, step, Stream.BATCH_SAMPLES)

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


def _negatives(user_items_of: UserItems, users: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Samples items and resamples those that are positives of their user."""
    pairs = user_items_of.pairs
    sampled = rng.choice(user_items_of.trained_items, (len(users), count))
    # Ten times: for a user with half of all items, one sample in a thousand then still is a positive.
    for _ in range(10):
        keys = users[:, None].astype(np.int64) * user_items_of.n_items + sampled
        positive = pairs[np.minimum(np.searchsorted(pairs, keys), len(pairs) - 1)] == keys
        if not positive.any():
            break
        sampled[positive] = rng.choice(user_items_of.trained_items, positive.sum())
    return sampled
