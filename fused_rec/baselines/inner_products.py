"""Vectors of users and items whose inner products are a baseline's scores, so that it can be exported."""

from typing import Any, NamedTuple

import numpy as np
import scipy.sparse
from jax.tree_util import Partial
from jaxtyping import Float32

from fused_rec.baselines.linear import rows_of, sum_dense_rows
from fused_rec.baselines.neighbors import Entries, dot, rank_unknown_last, same_for_all, sum_sparse_rows
from fused_rec.memory import require_memory

MAX_WIDTH = 4096  # numbers of a vector
BLOCK = 1 << 24  # scores computed at once


class Vectors(NamedTuple):
    """Vectors of all users and items, on the host."""

    users: Float32[np.ndarray, "U D"]
    items: Float32[np.ndarray, "I D"]


def baseline_vectors(name: str, scorer: Partial, n_users: int) -> Vectors:
    """Writes the scores of a baseline as inner products.

    Factors are vectors as they are. Sums over items (item-item weights) give vectors of I numbers, and sums over users
    (similar users, friends) vectors of U numbers. Where items that the baseline cannot score get a user's lowest score,
    one more column holds it.

    Args:
      name: of the baseline, for messages.
      scorer: made by `fused_rec.baselines.registry.BASELINES`.
      n_users: U.

    Returns:
      The vectors.

    Raises:
      ValueError: they would have more than `MAX_WIDTH` numbers.
      InsufficientMemoryError: they do not fit in memory.
    """
    if scorer.func is rank_unknown_last:
        inner, known = scorer.args
        users, items = baseline_vectors(name, inner, n_users)
        known = np.asarray(known, np.float32)[:, None]
        return Vectors(_beside(users, _lowest(users, items)), _beside(items * known, 1 - known))
    left, right = _product(scorer, n_users)
    width = right.shape[0]
    if width > MAX_WIDTH:
        raise ValueError(
            f"{name} needs vectors of {width:,} numbers for these tables; at most {MAX_WIDTH:,} are exported: rank "
            "with `fused-rec recommend`, or export a method with factors, such as als, text_mean or lightgcn"
        )
    what = f"{name}, with {left.shape[0] + right.shape[1]:,} vectors of {width:,} numbers"
    require_memory(8 * width * (left.shape[0] + right.shape[1]), what, "export a method with factors, such as als")
    users, items = (part.toarray() if scipy.sparse.issparse(part) else part for part in (left, right.T))
    return Vectors(np.asarray(users, np.float32), np.ascontiguousarray(items, np.float32))


def _product(scorer: Partial, n_users: int) -> tuple[Any, Any]:
    """Returns two matrices, sparse or dense, U x D and D x I, whose product is the matrix of scores."""
    if scorer.func is dot:
        users, items = map(np.asarray, scorer.args)
        return users, items.T
    if scorer.func is same_for_all:
        return np.ones((n_users, 1), np.float32), np.asarray(scorer.args[0])[None, :]
    if scorer.func is rows_of:
        return scipy.sparse.eye_array(n_users, format="csr"), np.asarray(scorer.args[0])
    if scorer.func not in (sum_sparse_rows, sum_dense_rows):
        raise TypeError(f"{scorer.func} is no scorer of a baseline")
    left, right, zeros = scorer.args
    if scorer.func is sum_dense_rows:
        return _sparse(left, len(zeros)), np.asarray(right)
    return _sparse(left, len(right.indptr) - 1), _sparse(right, len(zeros))


def _sparse(entries: Entries, n_columns: int) -> scipy.sparse.csr_array:
    """The matrix of `entries`, without the zero past its end."""
    indptr, columns, values = map(np.asarray, entries)
    return scipy.sparse.csr_array((values[:-1], columns[:-1], indptr), shape=(len(indptr) - 1, n_columns))


def _lowest(users: Float32[np.ndarray, "U D"], items: Float32[np.ndarray, "I D"]) -> Float32[np.ndarray, "U 1"]:
    step = max(1, BLOCK // max(len(items), 1))
    found = [(users[first : first + step] @ items.T).min(1) for first in range(0, len(users), step)]
    return np.concatenate(found)[:, None]


def _beside(rows: Float32[np.ndarray, "n D"], column: Float32[np.ndarray, "n 1"]) -> Float32[np.ndarray, "n _"]:
    return np.concatenate([rows, column], axis=1)
