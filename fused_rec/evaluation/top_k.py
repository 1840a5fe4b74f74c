"""The k best eligible items of each user, equal scores in a random order.

I items; B users per batch, k ranks.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int32

from fused_rec import kernels
from fused_rec.distributed.devices import AnyArray

MAX_K = 20  # the usual largest cutoff


class TieBreak(NamedTuple):
    """Random order of items with equal scores: first by column, then by row, in the orders of these arrays.

    `lax.top_k` alone would prefer low item rows, which often follow popularity or time, and a constant scorer would
    rank better than chance. Item i is in row i // C and column i % C. The items of a column are far apart, and the
    order of the columns is random.
    """

    columns: Int32[AnyArray, "C"]
    rows: Int32[AnyArray, "R"]

    def items(self, n_items: int) -> Int32[np.ndarray, "I"]:
        """Returns all items in this order."""
        columns, rows = np.asarray(self.columns), np.asarray(self.rows)
        ordered = (columns[:, None] + len(columns) * rows).ravel()
        return ordered[ordered < n_items]

    def places(self, n_items: int) -> Int32[Array, "I"]:
        """Returns each item's position in this order, with gaps; traceable."""
        row, column = jnp.divmod(jnp.arange(n_items, dtype=jnp.int32), len(self.columns))
        return jnp.argsort(self.columns)[column] * len(self.rows) + jnp.argsort(self.rows)[row]


def random_order(n_items: int, seed: int) -> TieBreak:
    """Draws an order of equal scores.

    Args:
      n_items: I.
      seed: random seed.
    """
    rng = np.random.default_rng(seed)
    n_rows = max(1, math.isqrt(n_items // MAX_K))  # balances the search for MAX_K columns and for MAX_K items in them
    columns, rows = rng.permutation(-(-n_items // n_rows)), rng.permutation(n_rows)
    return TieBreak(columns.astype(np.int32), rows.astype(np.int32))


def top_k_filtered(
    scores: Float32[Array, "B I"], eligible: Bool[Array, "B I"], order: TieBreak, k: int
) -> tuple[Int32[Array, "B k"], Float32[Array, "B k"], Bool[Array, "B"]]:
    """Selects the k best eligible items of each user; traceable.

    Args:
      scores: scores of all items.
      eligible: candidates.
      order: of equal scores.
      k: number of items.

    Returns:
      Items (-1 if fewer), their scores (-inf if fewer), and whether all scores of a row are finite; if they are not,
      the row's items and scores are undefined.
    """
    if not kernels.usable():
        return *_top_k_filtered(scores, eligible, order, k), jnp.isfinite(scores).all(1)
    lists = jax.ShapeDtypeStruct((len(scores), k), jnp.int32)
    results = (lists, lists.update(dtype=jnp.float32), jax.ShapeDtypeStruct((len(scores),), bool))
    items, top, finite = jax.ffi.ffi_call(kernels.BEST, results)(scores, eligible, order.places(scores.shape[1]))
    return items, top, finite


def _top_k_filtered(
    scores: Float32[Array, "B I"], eligible: Bool[Array, "B I"], order: TieBreak, k: int
) -> tuple[Int32[Array, "B k"], Float32[Array, "B k"]]:
    """Selects the k columns of `order` with the largest maxima, which contain the k best items, then those items."""
    n_columns, n_rows = len(order.columns), len(order.rows)
    scores = jnp.where(scores == 0, 0.0, scores)  # top_k puts -0.0 below 0.0
    masked = jnp.where(eligible, scores, -jnp.inf)
    masked = jnp.pad(masked, ((0, 0), (0, n_rows * n_columns - scores.shape[1])), constant_values=-jnp.inf)
    maxima = masked.reshape(-1, n_rows, n_columns).max(1)[:, order.columns]
    _, positions = jax.lax.top_k(maxima, min(k, n_columns))
    columns = order.columns[jnp.sort(positions, axis=1)]  # sorted, so that equal scores follow the column order
    candidates = (columns[:, :, None] + n_columns * order.rows[None, None, :]).reshape(len(scores), -1)
    top, positions = jax.lax.top_k(jnp.take_along_axis(masked, candidates, axis=1), min(k, candidates.shape[1]))
    items = jnp.where(top == -jnp.inf, -1, jnp.take_along_axis(candidates, positions, axis=1))
    short = ((0, 0), (0, k - items.shape[1]))
    return jnp.pad(items, short, constant_values=-1), jnp.pad(top, short, constant_values=-jnp.inf)
