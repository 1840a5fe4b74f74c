"""Recommenders without training, for every table of results: popularity, neighbours, friends, EASE.

Each takes interactions as U x I pairs (a repeated pair counts once) and returns a scorer: user ids (B,) to
scores of the whole catalogue, float32 (B, I), as `fused_rec.evaluate.ranking` takes them. The host prepares
with SciPy; scorers are `jax.tree_util.Partial`s of their arrays. A user without history (or friends) gets
equal scores. Settings have no defaults: validation chooses them. All raise ValueError for ids outside
0..n-1 and for settings outside their bounds.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
import scipy.sparse
from jax.tree_util import Partial
from jaxtyping import Array, Float32, Int, Int32


def popularity(user: Int[np.ndarray, "E"], item: Int[np.ndarray, "E"], n_users: int, n_items: int) -> Partial:
    """Every user gets the items most users have (TopPop of Cremonesi et al., RecSys 2010): score = the item's users."""
    return Partial(_same_for_all, jnp.asarray(_history(user, item, n_users, n_items).sum(0), jnp.float32).reshape(-1))


def item_knn(
    user: Int[np.ndarray, "E"],
    item: Int[np.ndarray, "E"],
    n_users: int,
    n_items: int,
    *,
    neighbours: int,
    shrink: float,
) -> Partial:
    """Items like those the user has (Deshpande and Karypis, ACM TOIS 2004).

    Score of item j: sum of sim(i, j) over the user's items i that have j among their `neighbours` most similar;
    sim(i, j) = (users of both) / (sqrt(users of i x users of j) + shrink), the cosine where shrink is 0.
    """
    history = _history(user, item, n_users, n_items)
    return Partial(
        _sum_sparse_rows, _entries(history), _entries(_nearest(history.T.tocsr(), neighbours, shrink)), _zeros(n_items)
    )


def user_knn(
    user: Int[np.ndarray, "E"],
    item: Int[np.ndarray, "E"],
    n_users: int,
    n_items: int,
    *,
    neighbours: int,
    shrink: float,
) -> Partial:
    """Items of users like this one (Sarwar et al., EC 2000, with cosine).

    Score of item j: sum of sim(u, v) over those of u's `neighbours` most similar users v who have j, with the
    sim of `item_knn`, items for users.
    """
    history = _history(user, item, n_users, n_items)
    return Partial(
        _sum_sparse_rows, _entries(_nearest(history, neighbours, shrink)), _entries(history), _zeros(n_items)
    )


def friends_mean(
    user: Int[np.ndarray, "E"],
    item: Int[np.ndarray, "E"],
    source: Int[np.ndarray, "F"],
    target: Int[np.ndarray, "F"],
    n_users: int,
    n_items: int,
) -> Partial:
    """Items of the user's friends: score = share of the users u is tied to (u = `source`) who have the item.

    The averaging over ties of Ma et al. (WSDM 2011), of histories instead of learned factors.
    """
    history = _history(user, item, n_users, n_items)
    ties = _pairs(source, target, n_users, n_users, "source", "target")
    degree = np.diff(ties.indptr)
    ties.data /= np.repeat(degree, degree)
    return Partial(_sum_sparse_rows, _entries(ties), _entries(history), _zeros(n_items))


def ease(user: Int[np.ndarray, "E"], item: Int[np.ndarray, "E"], n_users: int, n_items: int, *, l2: float) -> Partial:
    """Embarrassingly shallow autoencoder (Steck, WWW 2019): the item-item regression X B with a zero diagonal.

    With P = (X'X + l2 I)^-1, B = I - P diag(1 / diag P) (the paper's closed form). Where users are fewer than items,
    Woodbury's identity gives the same scores from a U x U inverse M = (X X' + l2 I)^-1:
    P = (I - X'M X) / l2, so with d = l2 diag P = 1 - diag(X'M X) and X X'M = I - l2 M,
    X B = X - (I - X X'M) X diag(1 / d) = X - l2 M X diag(1 / d).

    One float32 inverse of min(U, I) squared numbers; the scorer holds I x I, or U x I where U < I.
    """
    if not l2 > 0:
        raise ValueError(f"l2 is {l2}; it must be above 0")
    history = _history(user, item, n_users, n_items)
    if n_users < n_items:
        smooth = (history.T @ _regularised_inverse(history @ history.T, l2)).T  # M X, M being symmetric
        d = 1 - np.asarray(history.multiply(smooth).sum(0)).reshape(-1)
        smooth *= (-l2 / d)[None, :].astype(np.float32)
        rows, columns = history.nonzero()
        smooth[rows, columns] += 1
        return Partial(_rows_of, jnp.asarray(smooth))
    weights = _regularised_inverse((history.T @ history).tocsr(), l2)
    weights /= -np.diag(weights)[None, :]
    np.fill_diagonal(weights, 0)
    return Partial(_sum_dense_rows, _entries(history), jnp.asarray(weights), _zeros(n_items))


def _pairs(row, column, n_rows: int, n_columns: int, row_name: str, column_name: str) -> scipy.sparse.csr_array:
    for name, ids, n in ((row_name, row, n_rows), (column_name, column, n_columns)):
        if len(ids) and not (0 <= ids.min() and ids.max() < n):
            raise ValueError(f"{name} ids span {ids.min()}..{ids.max()}; they must lie in 0..{n - 1}")
    ones = np.ones(len(row), np.float32)
    pairs = scipy.sparse.coo_array((ones, (row, column)), shape=(n_rows, n_columns)).tocsr()
    pairs.data[:] = 1  # repeated pairs were added up
    return pairs


def _history(user, item, n_users: int, n_items: int) -> scipy.sparse.csr_array:
    return _pairs(user, item, n_users, n_items, "user", "item")


def _nearest(vectors: scipy.sparse.csr_array, neighbours: int, shrink: float) -> scipy.sparse.csr_array:
    """Each row's most similar other rows, ties by lower row; rows without anything in common are no neighbours."""
    if neighbours < 1:
        raise ValueError(f"neighbours is {neighbours}; it must be at least 1")
    if shrink < 0:
        raise ValueError(f"shrink is {shrink}; it must be 0 or more")
    norms = np.sqrt(np.diff(vectors.indptr))
    transposed = vectors.T.tocsr()
    blocks = []
    n = len(norms)
    for start in range(0, n, 1024):  # 1,024 rows of similarities at a time
        common = (vectors[start : start + 1024] @ transposed).tocoo()
        row, column = common.coords
        value = common.data / (norms[row + start] * norms[column] + shrink)
        other = row + start != column
        row, column, value = row[other], column[other], value[other]
        order = np.lexsort((column, -value, row))
        row, column, value = row[order], column[order], value[order]
        rank = np.arange(len(row)) - np.searchsorted(row, row)
        near = rank < neighbours
        shape = (min(1024, n - start), n)
        blocks.append(scipy.sparse.csr_array((value[near], (row[near], column[near])), shape=shape))
    return scipy.sparse.csr_array(scipy.sparse.vstack(blocks))


def _regularised_inverse(gram: scipy.sparse.csr_array, l2: float) -> Float32[np.ndarray, "n n"]:
    matrix = gram.toarray(order="F")
    norm = matrix.sum(0).max()  # bounds the largest eigenvalue: no entry is negative
    matrix[np.diag_indices_from(matrix)] += np.float32(l2)
    potrf, potri = scipy.linalg.get_lapack_funcs(("potrf", "potri"), dtype=np.float32)
    # Cholesky in place: half the work and a third of the memory of a general inverse.
    factor, failed = potrf(matrix, lower=1, overwrite_a=1)
    if failed or l2 < 1e-5 * norm:  # a condition number of 1e5 leaves float32 two digits
        raise ValueError(f"l2 is {l2}, too small for an inverse in float32; it must be at least {1e-5 * norm:.2g}")
    inverse, _ = potri(factor, lower=1, overwrite_c=1)
    for i in range(len(inverse)):  # LAPACK fills one triangle
        inverse[i, i + 1 :] = inverse[i + 1 :, i]
    return inverse


CHUNK = 128  # entries of a row added in one step


class _Entries(NamedTuple):
    """A sparse matrix in compressed rows, on the device: row r has entries indptr[r] to indptr[r + 1] - 1."""

    indptr: Int32[Array, "rows"]
    columns: Int32[Array, "E"]
    values: Float32[Array, "E"]


def _entries(matrix: scipy.sparse.csr_array) -> _Entries:
    # One zero past the end, for what reads beyond a row (or an empty matrix) to find.
    columns, values = np.append(matrix.indices, 0), np.append(matrix.data, 0)
    return _Entries(
        jnp.asarray(matrix.indptr, jnp.int32), jnp.asarray(columns, jnp.int32), jnp.asarray(values, jnp.float32)
    )


def _zeros(n_items: int) -> Float32[Array, "I"]:
    return jnp.zeros(n_items, jnp.float32)


def _same_for_all(scores: Float32[Array, "I"], users: Int32[Array, "B"]) -> Float32[Array, "B I"]:
    return jnp.broadcast_to(scores[None, :], (users.shape[0], scores.shape[0]))


def _rows_of(scores: Float32[Array, "U I"], users: Int32[Array, "B"]) -> Float32[Array, "B I"]:
    return scores[users]


def _sum_sparse_rows(
    left: _Entries, right: _Entries, zeros: Float32[Array, "I"], users: Int32[Array, "B"]
) -> Float32[Array, "B I"]:
    """left[users] @ right, in time of the entries it touches: rows differ too much in length to pad them."""

    def of_user(user):
        def add_row(entry, scores):
            row, weight = left.columns[entry], left.values[entry]
            begin, end = right.indptr[row], right.indptr[row + 1]

            def add_chunk(chunk, scores):
                slots = begin + chunk * CHUNK + jnp.arange(CHUNK)
                slots = jnp.where(slots < end, slots, right.columns.shape[0] - 1)
                return scores.at[right.columns[slots]].add(weight * right.values[slots])

            return jax.lax.fori_loop(0, (end - begin + CHUNK - 1) // CHUNK, add_chunk, scores)

        return jax.lax.fori_loop(left.indptr[user], left.indptr[user + 1], add_row, zeros)

    return jax.lax.map(of_user, users)


def _sum_dense_rows(
    left: _Entries, right: Float32[Array, "I I"], zeros: Float32[Array, "I"], users: Int32[Array, "B"]
) -> Float32[Array, "B I"]:
    def of_user(user):
        def add_row(entry, scores):
            return scores + left.values[entry] * right[left.columns[entry]]

        return jax.lax.fori_loop(left.indptr[user], left.indptr[user + 1], add_row, zeros)

    return jax.lax.map(of_user, users)
