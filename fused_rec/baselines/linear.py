"""Item-item baselines in closed form: EASE, EASE with a text prior, and graph filters.

Arguments, scorers and errors as in `fused_rec.baselines.neighbors`. X is the interaction matrix, float32 U x I of 0 and
1. Each baseline inverts, or computes eigenvectors of, a matrix of side min(U, I); a graph filter above side `EXACT`
approximately. Its scorer holds I x I numbers, or U x I if U < I; low-rank forms are in `fused_rec.baselines.factors`.
Insufficient memory raises an error before the computation (`fused_rec.memory`, docs/SCALE.md).
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse
from jax.tree_util import Partial
from jaxtyping import Array, Float, Float32, Int32

from fused_rec.baselines.neighbors import Entries, Interactions, entries, has_interactions, rank_unscorable_last
from fused_rec.memory import require_memory

EXACT = 4096  # above it, eigenvectors of a Gram matrix take minutes, subspace iteration seconds
# Rows of a matrix that LAPACK factorises as a whole. OpenBLAS 0.3.30 (SciPy 1.17) with 2 threads crashes on 46,300, of
# 8.6 GB with 20 GB to spare; 20,000 rows work. The cause is likely its packing buffer, of fixed size, and not memory.
WHOLE = 16_384
BLOCK = 1 << 24  # elements of a dense block computed at once from sparse matrices
OVERSAMPLES = 64  # additional directions of a subspace iteration
LESS = (
    "raise data.k_core, use another baseline (item_knn keeps only nearest neighbors), or use a machine with more memory"
)


def ease(interactions: Interactions, *, l2: float) -> Partial:
    """Embarrassingly shallow autoencoder (Steck, WWW 2019): the item-item regression X B with a zero diagonal.

    With P = (X'X + l2 I)^-1, B = I - P diag(1 / diag P) (the paper's closed form); `text_ease` with l2_text = 0.

    Args:
      interactions: the inputs.
      l2: ridge penalty, above 0.

    Returns:
      The scorer.

    Raises:
      InsufficientMemoryError: the matrices do not fit.
    """
    _require_room("ease", interactions, words=False)
    nothing = np.zeros((interactions.n_items, 0), np.float32)
    return _regression(interactions.history(), l2, 0.0, nothing, nothing.T, has_interactions(interactions.history()))


def text_ease(interactions: Interactions, *, l2: float, l2_text: float, l2_words: float) -> Partial:
    """EASE with weights regularized towards those computed from item text alone (L3AE; Moon et al., CIKM 2025).

    The text weights S are EASE on the text vectors T (I x D), with dimensions in the place of users. With
    N = (T'T + l2_words I)^-1, Woodbury's identity turns the I x I inverse into one of D x D:
    S = T N T' diag(1 / d) off its zero diagonal, where d = 1 - diag(T N T').

    Then minimize |X - X B|^2 + l2 |B|^2 + l2_text |B - S|^2 over B with a zero diagonal. A Lagrange multiplier m_j for
    each B_jj makes the gradient (X'X + l I) B - X'X - l2_text S + diag(m) = 0, with l = l2 + l2_text. With
    P = (X'X + l I)^-1 and P X'X = I - l P,
    B = I + l2_text P S - P diag(l + m).
    The diagonal of S is arbitrary, as m absorbs it, so W = T N T' diag(1 / d) replaces S. B_jj = 0 gives
    l + m_j = n_j = (1 + l2_text (P W)_jj) / P_jj.

    With fewer users than items, the U x U inverse M = (X X' + l I)^-1 gives the same scores:
    P = (I - X'M X) / l and X P = M X, so X B = X + l2_text (M X) W - (M X) diag(n).

    An item j without interactions has P_jj = 1 / l and P_ij = 0, so B_ij = l2_text (P S)_ij: its score is computed from
    its text weights with the user's items and with items that co-occur with them.

    Args:
      interactions: the inputs.
      l2: ridge penalty, above 0.
      l2_text: penalty of the distance to the text weights, 0 or more.
      l2_words: ridge penalty of the text weights, above 0.

    Returns:
      The scorer.

    Raises:
      InsufficientMemoryError: the matrices do not fit.
      NotApplicableError: no item has text.
    """
    if not l2_text >= 0:
        raise ValueError(f"l2_text is {l2_text}; it must be 0 or more")
    if not l2_words > 0:
        raise ValueError(f"l2_words is {l2_words}; it must be above 0")
    words = interactions.require_item_text("text_ease")
    _require_room("text_ease", interactions, words=True)
    history = interactions.history()
    wide = words.astype(np.float64)
    smooth = np.linalg.solve(wide.T @ wide + l2_words * np.eye(wide.shape[1]), wide.T)  # N T'
    d = 1 - (wide.T * smooth).sum(0)
    known = has_interactions(history) | (words.any(1) & (l2_text > 0))
    return _regression(history, l2, l2_text, words, (smooth / d).astype(np.float32), known)


def gf_cf(interactions: Interactions, *, rank: int, alpha: float) -> Partial:
    """Graph filters (GF-CF; Shen et al., CIKM 2021): a linear filter plus alpha times an ideal low-pass filter.

    With R = Du^-1/2 X Di^-1/2, Du and Di the degrees of users and items, and V the right singular vectors of the `rank`
    largest singular values of R (or of all nonzero ones, if fewer), scores = X (R'R + alpha Di^-1/2 V V' Di^1/2).

    Args:
      interactions: the inputs.
      rank: number of singular vectors of the low-pass filter.
      alpha: weight of the low-pass filter.

    Returns:
      The scorer.

    Raises:
      InsufficientMemoryError: the matrices do not fit.
    """
    if rank < 1:
        raise ValueError(f"rank is {rank}; it must be at least 1")
    if not alpha >= 0:
        raise ValueError(f"alpha is {alpha}; it must be 0 or more")
    # float32, and its device copy
    require_memory(8 * min(interactions.n_users, interactions.n_items) * interactions.n_items, "gf_cf", LESS)
    if min(interactions.n_users, interactions.n_items) > EXACT:
        _require_subspace("gf_cf", interactions, rank, LESS)
    history, (normal, of_item) = interactions.history(), normalized(interactions)
    low_pass = _right_singular(normal, rank)
    left, right = (alpha / of_item)[:, None] * low_pass, (low_pass * of_item[:, None]).T
    rows: Any  # SciPy's annotations take a slice of rows for None
    rows, linear = (history, normal.T) if interactions.n_users < interactions.n_items else (normal.T.tocsr(), None)
    dense = np.empty((rows.shape[0], interactions.n_items), np.float32)
    for block in _blocks(*dense.shape):  # a whole float64 matrix would need more than twice the memory
        if linear is None:
            dense[block] = (rows[block] @ normal).toarray() + left[block] @ right
        else:
            dense[block] = ((rows[block] @ linear) @ normal).toarray() + (rows[block] @ left) @ right
    return _scorer(history, dense, has_interactions(history))


def normalized(interactions: Interactions) -> tuple[scipy.sparse.csr_array, Float[np.ndarray, "I"]]:
    """Computes R = Du^-1/2 X Di^-1/2, Du and Di the degrees of users and items (those of 0 count as 1).

    Args:
      interactions: the training interactions X.

    Returns:
      R, float64 [U, I], and the square roots of the items' degrees, float64 [I].
    """
    history = interactions.history()
    of_user, of_item = (np.sqrt(np.maximum(history.sum(axis), 1), dtype=np.float64) for axis in (1, 0))
    user, item = history.nonzero()
    return scipy.sparse.csr_array((1 / (of_user[user] * of_item[item]), (user, item)), shape=history.shape), of_item


def _blocks(n_rows: int, n_columns: int) -> Iterator[slice]:
    """Yields blocks of rows with about `BLOCK` elements each."""
    step = max(1, BLOCK // max(n_columns, 1))
    return (slice(start, start + step) for start in range(0, n_rows, step))


def _require_room(name: str, seen: Interactions, words: bool) -> None:
    """Raises InsufficientMemoryError if `_regression`, with two of its largest matrices at a time, does not fit."""
    n_users, n_items = seen.n_users, seen.n_items
    n = min(n_users, n_items)
    inverse = 4 * n_users**2 if n_users < n_items else 0  # in addition to scores; weights reuse its memory
    need = max(8 * n * n_items, inverse + (8 if words else 4) * n * n_items)
    if words and seen.item_text is not None:
        need += 24 * seen.item_text.size  # in float64: text, its product with an inverse, and one more of its size
    require_memory(need, f"{name} of {n:,} x {n_items:,} {'scores' if inverse else 'weights'}", LESS)


def _require_subspace(name: str, seen: Interactions, rank: int, remedy: str) -> None:
    """Raises InsufficientMemoryError if three copies of the directions of users and items in float64 do not fit."""
    columns = rank + OVERSAMPLES
    need = 24 * columns * (seen.n_users + seen.n_items)
    require_memory(need, f"{name}, with {columns} directions of {seen.n_users + seen.n_items:,} nodes", remedy)


def subspace_iteration(
    matrix, rank: int, iterations: int
) -> tuple[Float32[np.ndarray, "k"], Float32[np.ndarray, "I k"]]:
    """Computes the largest singular values and right singular vectors by subspace iteration (Halko et al., 2011).

    In float32, in which it takes half the time: the vectors are orthonormal within 1e-5, and the last of them are
    approximate anyway.
    """
    from sklearn.utils.extmath import randomized_svd  # imported here, as in `fused_rec.text.tfidf`

    matrix = matrix.astype(np.float32)
    decompose: Any = randomized_svd  # its annotations lack the number of iterations and the result
    _, singular, right = decompose(
        matrix, rank, n_oversamples=OVERSAMPLES, n_iter=iterations, power_iteration_normalizer="LU", random_state=0
    )
    return singular, right.T


def exact_singular_vectors(matrix, rank: int) -> tuple[Float[np.ndarray, "k"], Float[np.ndarray, "I k"]]:
    """Computes the largest singular values, descending, and right singular vectors from the smaller Gram matrix."""
    import scipy.linalg  # not at the top: --help would take a fifth longer

    n_rows, n_columns = matrix.shape
    gram = (matrix @ matrix.T if n_rows < n_columns else matrix.T @ matrix).toarray()
    squared, vectors = scipy.linalg.eigh(gram, subset_by_index=(max(len(gram) - rank, 0), len(gram) - 1))
    kept = squared[::-1] > 1e-10 * squared[-1]
    values, vectors = np.sqrt(squared[::-1][kept]), vectors[:, ::-1][:, kept]
    return values, (matrix.T @ vectors / values if n_rows < n_columns else vectors)


def _right_singular(matrix, rank: int) -> Float[np.ndarray, "I k"]:
    """Computes right singular vectors, up to side `EXACT` exactly from the smaller Gram matrix.

    Each connected component of the history has a singular value 1, and Lanczos methods (`svds`) miss repeated values:
    of Last.fm's 10 they found 3. Above `EXACT`, it uses subspace iteration, whose block is wide enough for these.
    """
    if min(matrix.shape) > EXACT:
        singular, vectors = subspace_iteration(matrix, rank, iterations=20)
        return vectors[:, singular > 1e-5]
    return exact_singular_vectors(matrix, rank)[1]


def _regression(history, l2: float, l2_text: float, left, right, known) -> Partial:
    """Computes the scorer of X B of `text_ease`, with W = `left` (I x D) @ `right` (D x I)."""
    if not l2 > 0:
        raise ValueError(f"l2 is {l2}; it must be above 0")
    ridge = l2 + l2_text  # the docstring's l
    own = (left * right.T).sum(1)  # diag W
    if history.shape[0] < history.shape[1]:
        inverse = _regularized_inverse(history, ridge)
        scores, of_items = np.empty(history.shape, np.float32), history.T.tocsr()
        for block in _blocks(*of_items.shape):
            scores[:, block] = (of_items[block] @ inverse).T  # M X, M being symmetric
        towards = (inverse @ (history @ left)) @ right if l2_text else None  # M X W
        del inverse
        p = 1 - np.asarray(history.multiply(scores).sum(0)).reshape(-1)  # l diag P
        if towards is not None:
            pw = own - np.asarray(history.multiply(towards).sum(0)).reshape(-1)  # l diag(P W)
            ridge = ridge + l2_text * pw
        scores *= -(ridge / p)[None, :].astype(np.float32)
        scores = _drawn(scores, towards, l2_text)
        del towards
        rows, columns = history.nonzero()
        scores[rows, columns] += 1
        return _scorer(history, scores, known)
    weights = _regularized_inverse(history.T.tocsr(), ridge)
    towards = (weights @ left) @ right if l2_text else None  # P W
    pull = 1.0 if towards is None else 1 + l2_text * np.diag(towards)
    weights *= -(pull / np.diag(weights))[None, :].astype(np.float32)
    weights = _drawn(weights, towards, l2_text)
    del towards
    np.fill_diagonal(weights, 0)
    return _scorer(history, weights, known)


def _drawn(
    dense: Float32[np.ndarray, "n I"], towards: Float32[np.ndarray, "n I"] | None, l2_text: float
) -> Float32[np.ndarray, "n I"]:
    """Adds l2_text times `towards` to `dense` in place."""
    if towards is not None:
        towards *= np.float32(l2_text)
        dense += towards
    return dense


def _regularized_inverse(rows: Any, l2: float) -> Float32[np.ndarray, "n n"]:
    """Computes (rows @ rows' + l2 I)^-1 of a sparse matrix, in the memory of one dense matrix."""
    n, columns = rows.shape[0], rows.T.tocsr()
    matrix = np.empty((n, n), np.float32, order="F")
    for block in _blocks(n, n):  # a whole sparse product may need three times the memory of the matrix
        (rows[block] @ columns).toarray(out=matrix.T[block])  # symmetric
    norm = matrix.sum(0).max()  # bounds the largest eigenvalue: no entry is negative
    matrix[np.diag_indices_from(matrix)] += np.float32(l2)
    if not _invert(matrix) or l2 < 1e-5 * norm:  # a condition number of 1e5 leaves float32 two digits
        raise ValueError(f"l2 is {l2}, too small for an inverse in float32; it must be at least {1e-5 * norm:.2g}")
    return matrix.T  # equal by symmetry, in row order, which the device takes without a copy


def _invert(matrix: Float32[np.ndarray, "n n"]) -> bool:
    """Inverts a symmetric matrix in place; returns False, with undefined content, if it is not positive definite.

    Above `WHOLE` rows it uses the inverses of a block A and of its Schur complement S = C - B' A^-1 B: with W = A^-1 B,
    [[A, B], [B', C]] has the inverse [[A^-1 + W S^-1 W', -W S^-1], [-S^-1 W', S^-1]].
    """
    n, half = len(matrix), len(matrix) // 2
    if n <= WHOLE:
        return _invert_whole(matrix)
    a, b, c = matrix[:half, :half], matrix[:half, half:], matrix[half:, half:]
    if not _invert(a):
        return False
    w = a @ b
    for rows in _blocks(*c.shape):
        c[rows] -= b[:, rows].T @ w
    if not _invert(c):
        return False
    np.matmul(w, c, out=b)
    for rows in _blocks(*a.shape):
        a[rows] += b[rows] @ w.T
    np.negative(b, out=b)
    matrix[half:, :half] = b.T
    return True


def _invert_whole(matrix: Float32[np.ndarray, "n n"]) -> bool:
    import scipy.linalg

    potrf, potri = scipy.linalg.get_lapack_funcs(("potrf", "potri"), dtype=np.float32)
    # Cholesky in place: half the work and a third of the memory of a general inverse.
    factor, failed = potrf(matrix, lower=1, overwrite_a=1)
    if failed:
        return False
    inverse, _ = potri(factor, lower=1, overwrite_c=1)
    for i in range(len(inverse)):  # LAPACK fills one triangle
        inverse[i, i + 1 :] = inverse[i + 1 :, i]
    if not np.shares_memory(inverse, matrix):  # LAPACK copied a block of a larger matrix
        matrix[:] = inverse
    return True


def _scorer(history, dense: Float32[np.ndarray, "n I"], known) -> Partial:
    """Returns the scorer of a U x I score matrix if U < I, else of I x I item-item weights."""
    n_users, n_items = history.shape
    on_device = jax.device_put(dense)  # jnp.asarray would copy once more
    if n_users < n_items:
        return rank_unscorable_last(Partial(rows_of, on_device), known)
    zeros = jnp.zeros(n_items, jnp.float32)
    return rank_unscorable_last(Partial(sum_dense_rows, entries(history), on_device, zeros), known)


def rows_of(scores: Float32[Array, "U I"], users: Int32[Array, "B"]) -> Float32[Array, "B I"]:
    """Looks up rows of scores."""
    return scores[users]


def sum_dense_rows(
    left: Entries, right: Float32[Array, "I I"], zeros: Float32[Array, "I"], users: Int32[Array, "B"]
) -> Float32[Array, "B I"]:
    """Computes left[users] @ right, `right` being dense."""

    def of_user(user):
        def add_row(entry, scores):
            return scores + left.values[entry] * right[left.columns[entry]]

        return jax.lax.fori_loop(left.indptr[user], left.indptr[user + 1], add_row, zeros)

    return jax.lax.map(of_user, users)
