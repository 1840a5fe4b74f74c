"""Sets of items per user, on the host in CSR form and padded for a batch on the devices.

U users, I items, E pairs; M batches of B users.
"""

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Int32, Int64

from fused_rec.distributed.devices import AnyArray, local_indices, select_devices


@dataclasses.dataclass(frozen=True)
class UserItemSets:
    """Set of items per user in CSR form: user u has `items[indptr[u]:indptr[u + 1]]`, ascending."""

    indptr: Int64[np.ndarray, "rows"]  # rows = U + 1
    items: Int32[np.ndarray, "E"]

    @property
    def n_users(self) -> int:
        return len(self.indptr) - 1

    @property
    def sizes(self) -> Int64[np.ndarray, "U"]:
        return np.diff(self.indptr)

    @property
    def users(self) -> Int64[np.ndarray, "E"]:
        """User row of each entry of `items`."""
        return np.repeat(np.arange(self.n_users), self.sizes)


def item_sets(user: Int[np.ndarray, "E"], item: Int[np.ndarray, "E"], n_users: int) -> UserItemSets:
    """Groups (user, item) pairs by user; a repeated pair counts once.

    Args:
      user: user row of each pair.
      item: item row of each pair.
      n_users: U.

    Returns:
      The item sets of all users.

    Raises:
      ValueError: a user outside 0..n_users-1 or a negative item.
    """
    if len(user) and not (0 <= user.min() and user.max() < n_users):
        raise ValueError(f"users span {user.min()}..{user.max()}; they must lie in 0..{n_users - 1}")
    if len(item) and item.min() < 0:
        raise ValueError(f"item {item.min()} is negative; items are rows from 0")
    order = np.lexsort((item, user))
    user, item = user[order], item[order]
    new = np.ones(len(user), bool)
    new[1:] = (user[1:] != user[:-1]) | (item[1:] != item[:-1])
    sizes = np.bincount(user[new], minlength=n_users)
    return UserItemSets(np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64), item[new].astype(np.int32))


class PaddedSets(NamedTuple):
    """Item sets of a batch, padded to the same shape for all batches: row b has `items[starts[b]:starts[b + 1]]`."""

    starts: Int32[AnyArray, "ends"]  # ends = B + 1
    rows: Int32[AnyArray, "F"]  # row of each item; B = padding
    items: Int32[AnyArray, "F"]

    def mask(self, n_items: int) -> Bool[Array, "B I"]:
        """Converts the sets to a dense mask."""
        n_rows = self.starts.shape[0] - 1
        return jnp.zeros((n_rows, n_items), bool).at[self.rows, self.items].set(True, mode="drop")


def contained(
    sets: UserItemSets, users: Int[np.ndarray, "V"], items: Int[np.ndarray, "V k"]
) -> Bool[np.ndarray, "V k"]:
    """Returns whether items are in the sets of their users.

    Args:
      sets: item sets of all users.
      users: user row of each list.
      items: item rows.
    """
    sizes, width = sets.sizes[users], 1 + max(int(items.max(initial=0)), int(sets.items.max(initial=0)))
    row = np.repeat(np.arange(len(users)), sizes)
    first = np.concatenate([[0], np.cumsum(sizes)])[:-1]
    keys = row * width + sets.items[np.repeat(sets.indptr[users] - first, sizes) + np.arange(len(row))]  # ascend
    wanted = np.arange(len(users))[:, None] * width + items
    return np.append(keys, -1)[np.searchsorted(keys, wanted)] == wanted


def padded_batches(
    sets: tuple[UserItemSets, ...], batches: Int32[np.ndarray, "M B"], devices: int | None
) -> Iterator[tuple[PaddedSets, ...]]:
    """Yields the item sets of each batch, each device's own along the leading axis.

    Args:
      sets: item sets of all users.
      batches: users of each batch; device d has the users d, d + devices, d + 2 * devices, ... of it.
      devices: number of devices, None = all.

    Yields:
      The sets of this process's devices, `starts` [devices, rows] and the rest [devices, F]. All have one F, a power of
      two, so that splits and chunks of users share compilations.
    """
    count = len(select_devices(devices))
    most = [of_users.sizes[batches].reshape(len(batches), -1, count).sum(1).max() for of_users in sets]
    width = 1 << max(0, int(max(most)) - 1).bit_length()
    for users in batches:
        yield tuple(_padded(of_users, users, width, devices) for of_users in sets)


def _padded(sets: UserItemSets, users: Int32[np.ndarray, "B"], width: int, devices: int | None) -> PaddedSets:
    """The sets of one batch."""
    count, stacked = len(select_devices(devices)), []
    for place in local_indices(devices):
        own = users[place::count]
        sizes = sets.indptr[own + 1] - sets.indptr[own]
        starts = np.concatenate([[0], np.cumsum(sizes)])
        rows, items = np.full(width, len(own), np.int32), np.zeros(width, np.int32)
        rows[: starts[-1]] = np.repeat(np.arange(len(own)), sizes)
        items[: starts[-1]] = sets.items[np.repeat(sets.indptr[own] - starts[:-1], sizes) + np.arange(starts[-1])]
        stacked.append((starts.astype(np.int32), rows, items))
    return PaddedSets(*map(np.stack, zip(*stacked, strict=True)))


def check_sets(users: Int[np.ndarray, "V"], n_items: int, **sets: UserItemSets | tuple[UserItemSets, ...]) -> None:
    """Checks that sets have only items of the catalogue and a row for every user.

    Args:
      users: user rows to rank.
      n_items: I.
      **sets: item sets, or tuples of them, by the name that an error gives.

    Raises:
      ValueError: names the set, the item or users, and the bound.
    """
    for name, given in sets.items():
        for of_users in given if isinstance(given, tuple) else (given,):
            if len(of_users.items) and of_users.items.max() >= n_items:
                raise ValueError(f"{name} holds item {of_users.items.max()}; items must lie in 0..{n_items - 1}")
            if len(users) and not (0 <= users.min() and users.max() < of_users.n_users):
                span = f"{users.min()}..{users.max()}"
                raise ValueError(f"users span {span}; they must lie in 0..{of_users.n_users - 1}, those of {name}")


def check_disjoint(truth: UserItemSets, seen: UserItemSets, n_items: int) -> None:
    """Checks that no held-out pair is seen.

    Args:
      truth: held-out items.
      seen: items that are never recommended to the user.
      n_items: I.

    Raises:
      ValueError: names the first pair that is in both.
    """
    held_out, known = (sets.users * n_items + sets.items for sets in (truth, seen))  # both ascend
    at = np.searchsorted(known, held_out)
    both = held_out[np.append(known, -1)[at] == held_out]
    if len(both):
        user, item = divmod(int(both[0]), n_items)
        raise ValueError(
            f"{len(both)} held-out pairs are seen as well, first user {user} with item {item}; a seen item is never "
            "recommended, so remove it from `truth` or `seen`"
        )
