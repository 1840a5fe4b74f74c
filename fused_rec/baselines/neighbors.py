"""Baselines without gradient training: popularity, neighbors, social averages, text vectors, and ALS.

Each function takes `Interactions` and returns a scorer: user indices (B,) to scores of all items, float32 (B, I), as
`fused_rec.evaluation.ranking` takes them. The host prepares with SciPy; scorers are `jax.tree_util.Partial`s of their
arrays. A user without the inputs of a method (history, social edges or text) gets equal scores. Items that a method
cannot score, for most those without interactions, get the user's lowest score. Settings have no defaults: validation
chooses them. All raise ValueError for indices outside 0..n-1 and for settings outside their bounds. Item-item
regressions and graph filters are in `fused_rec.baselines.linear`.
"""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float, Float32, Int, Int32

from fused_rec.memory import require_memory

ITERATIONS = 15  # of ALS
SIMILARITIES = 1 << 24  # similarities sorted at once, about 64 bytes each


class NotApplicableError(ValueError):
    """Error for a baseline that does not apply: the tables lack its input, or are too large to index.

    If memory does not suffice, it is `fused_rec.memory.InsufficientMemoryError`.
    """


class Interactions(NamedTuple):
    """Inputs of the baselines, for U users and I items.

    Attributes:
      user: int [E], users of the interactions.
      item: int [E], their items; a repeated pair counts once.
      n_users: U.
      n_items: I.
      user_text: float32 [U, D], unit text vectors; zero rows for users without text.
      item_text: float32 [I, D], unit text vectors; zero rows for items without text.
      source: int [F], users with a social edge.
      target: int [F], the users it leads to; a repeated edge counts once.
      age: float32 [E], days from each interaction to the newest one.
      item_terms: sparse float [I, V], TF-IDF rows over all terms, of unit length; zero rows for items without text.
    """

    user: Int[np.ndarray, "E"]
    item: Int[np.ndarray, "E"]
    n_users: int
    n_items: int
    user_text: Float32[np.ndarray, "U D"] | None = None
    item_text: Float32[np.ndarray, "I D"] | None = None
    source: Int[np.ndarray, "F"] | None = None
    target: Int[np.ndarray, "F"] | None = None
    age: Float32[np.ndarray, "E"] | None = None
    item_terms: scipy.sparse.csr_matrix | None = None

    def history(self) -> scipy.sparse.csr_array:
        """Returns the interaction matrix, float32 [U, I] of 0 and 1."""
        return _pairs(self.user, self.item, self.n_users, self.n_items, "user", "item")

    def ties(self, asked_by: str) -> scipy.sparse.csr_array:
        """Returns the social adjacency, float32 [U, U] of 0 and 1, rows = sources.

        Args:
          asked_by: name of the baseline, for the message.

        Returns:
          The sparse matrix.

        Raises:
          NotApplicableError: there are no social edges.
        """
        if self.source is None or self.target is None or not len(self.source):
            raise NotApplicableError(
                f"{asked_by} needs social edges, and there are none; leave it out for these tables"
            )
        return _pairs(self.source, self.target, self.n_users, self.n_users, "source", "target")

    def require_item_text(self, asked_by: str) -> Float32[np.ndarray, "I D"]:
        """Returns `item_text`.

        Args:
          asked_by: name of the baseline, for the message.

        Returns:
          float32 [I, D].

        Raises:
          NotApplicableError: no item has text.
        """
        if self.item_text is None or not self.item_text.any():
            raise NotApplicableError(
                f"{asked_by} needs text of items, and there is none; leave it out for these tables, or for a variant "
                "that reads no text"
            )
        return self.item_text


# Settings of `item_knn` and `user_knn` that are tried on validation.
NEIGHBOR_GRID = tuple({"num_neighbors": n, "shrink": s} for n in (20, 100, 500) for s in (0.0, 10.0))


def popularity(interactions: Interactions, *, half_life: float = 0) -> Partial:
    """Recommends the items with most users (TopPop of Cremonesi et al., RecSys 2010): score = number of users.

    Args:
      interactions: the inputs.
      half_life: days after which the weight of an interaction halves; 0 = no decay, a repeated pair counts once.

    Returns:
      The scorer.
    """
    if not half_life:
        return Partial(same_for_all, jnp.asarray(interactions.history().sum(0), jnp.float32).reshape(-1))
    age = np.zeros(len(interactions.item)) if interactions.age is None else interactions.age
    return Partial(same_for_all, jnp.asarray(item_counts(interactions.item, age, half_life, interactions.n_items)))


def item_counts(
    item: Int[np.ndarray, "E"], age: Float[np.ndarray, "E"], half_life: float, n_items: int
) -> Float32[np.ndarray, "I"]:
    """Counts the interactions of each item, with exponential decay.

    Decayed counts are rescaled to the sum E, so that log(1 + count) depends on the proportions of the items and not on
    the age of the tables.

    Args:
      item: int [E], items of the interactions.
      age: float [E], age of each interaction in days.
      half_life: days after which the weight of an interaction halves; 0 = no decay.
      n_items: I.

    Returns:
      float32 [I].
    """
    weight = None
    if half_life and len(item):
        age = np.asarray(age, np.float64)
        weight = np.exp2((age.min() - age) / half_life)  # the newest weighs 1, so the sum is at least that
        weight *= len(item) / weight.sum()
    return np.bincount(item, weight, minlength=n_items).astype(np.float32)


def item_knn(interactions: Interactions, *, num_neighbors: int, shrink: float) -> Partial:
    """Item-based collaborative filtering (Deshpande and Karypis, ACM TOIS 2004).

    Score of item j: sum of sim(i, j) over the user's items i that have j among their `num_neighbors` most similar, with
    sim(i, j) = (users of both) / (sqrt(users of i x users of j) + shrink), the cosine for shrink = 0.

    Args:
      interactions: the inputs.
      num_neighbors: neighbors per item, 1 or more.
      shrink: shrinkage of similarities with few common users, 0 or more.

    Returns:
      The scorer.
    """
    similar = nearest_items(interactions, num_neighbors, shrink)
    return Partial(sum_sparse_rows, entries(interactions.history()), entries(similar), _zeros(interactions.n_items))


def nearest_items(interactions: Interactions, num_neighbors: int, shrink: float) -> scipy.sparse.csr_array:
    """Computes the similarities of `item_knn`.

    Args:
      interactions: the inputs.
      num_neighbors: neighbors per item, 1 or more.
      shrink: shrinkage of similarities with few common users, 0 or more.

    Returns:
      float32 [I, I]: row i has those of the neighbors of item i, and zeros.
    """
    return _nearest("item_knn", interactions.history().T.tocsr(), num_neighbors, shrink)


def user_knn(interactions: Interactions, *, num_neighbors: int, shrink: float) -> Partial:
    """User-based collaborative filtering (Sarwar et al., EC 2000, with cosine).

    Score of item j: sum of sim(u, v) over those of u's `num_neighbors` most similar users v who have j, with sim as in
    `item_knn`, users in the place of items.

    Args:
      interactions: the inputs.
      num_neighbors: neighbors per user, 1 or more.
      shrink: shrinkage of similarities with few common items, 0 or more.

    Returns:
      The scorer.
    """
    history = interactions.history()
    similar = _nearest("user_knn", history, num_neighbors, shrink)
    return Partial(sum_sparse_rows, entries(similar), entries(history), _zeros(interactions.n_items))


def friends_mean(interactions: Interactions) -> Partial:
    """Recommends the items of a user's friends: score = share of the friends with the item.

    Friends of u are the targets of the social edges from u. This is the social average of Ma et al. (WSDM 2011), of
    histories instead of latent factors.

    Args:
      interactions: the inputs.

    Returns:
      The scorer.

    Raises:
      NotApplicableError: there are no social edges.
    """
    history, ties = interactions.history(), interactions.ties("friends_mean")
    degree = np.diff(ties.indptr)
    ties.data /= np.repeat(degree, degree)
    return Partial(sum_sparse_rows, entries(ties), entries(history), _zeros(interactions.n_items))


def text_mean(interactions: Interactions, *, own: float) -> Partial:
    """Recommends items whose frozen text vectors are close to those of the user's items.

    Score: cosine of the item's text vector and m / |m| + own * (the user's text vector), where m is the mean of the
    text vectors of the user's items (the centroid profile of content-based recommenders, Lops et al., 2011). Items need
    no interactions, only text.

    Args:
      interactions: the inputs.
      own: weight of the user's own text, 0 or more.

    Returns:
      The scorer.

    Raises:
      NotApplicableError: no item has text.
    """
    if not own >= 0:
        raise ValueError(f"own is {own}; it must be 0 or more")
    history, words = interactions.history(), interactions.require_item_text("text_mean")
    users = _unit(history @ words)
    if interactions.user_text is not None:
        users = _unit(users + np.float32(own) * interactions.user_text)
    return rank_unscorable_last(Partial(dot, jnp.asarray(users), jnp.asarray(_unit(words))), np.abs(words).sum(1) > 0)


def text_gcn(interactions: Interactions, *, num_layers: int, user_mean: bool) -> Partial:
    """Propagates frozen text vectors over the interactions (TextGCN; Chernov et al., 2025, arXiv 2510.12461).

    H_0 stacks users and items: an item starts as its text vector, a user as the mean of the text vectors of their items
    or as zero. With A the adjacency of both, d its row sums and S = diag(d)^-1/2 A diag(d)^-1/2,
    Z = (H_0 + S H_0 + ... + S^L H_0) / (L + 1), and scores are cosines of Z (the layers and their mean are those of
    LightGCN).

    The paper starts users at the mean; zero is an additional setting. Text vectors are those of the model, whitened,
    where the paper has vectors of titles from text-embedding-3-large.

    Args:
      interactions: the inputs.
      num_layers: L, 1 or more.
      user_mean: users start as the mean of their items' vectors, not as zero.

    Returns:
      The scorer.

    Raises:
      NotApplicableError: no item has text.
    """
    if num_layers < 1:
        raise ValueError(f"num_layers is {num_layers}; it must be at least 1")
    history, items = interactions.history(), interactions.require_item_text("text_gcn")
    of_user, of_item = (np.maximum(history.sum(axis), 1).astype(np.float32) for axis in (1, 0))
    user, item = history.nonzero()
    normal = scipy.sparse.csr_array((1 / np.sqrt(of_user[user] * of_item[item]), (user, item)), shape=history.shape)
    users = (history @ items) / of_user[:, None] * np.float32(user_mean)
    sum_of_users, sum_of_items = users.copy(), items.copy()
    for _ in range(num_layers):
        users, items = normal @ items, normal.T @ users
        sum_of_users += users
        sum_of_items += items
    scorer = Partial(dot, jnp.asarray(_unit(sum_of_users)), jnp.asarray(_unit(sum_of_items)))
    return rank_unscorable_last(scorer, np.abs(sum_of_items).sum(1) > 0)


def als(interactions: Interactions, *, factors: int, regularization: float, alpha: float, seed: int) -> Partial:
    """Weighted matrix factorization (Hu, Koren and Volinsky, ICDM 2008) by alternating least squares, with `implicit`.

    Minimizes sum c (p - x y)^2 + regularization * (|x|^2 + |y|^2) over all cells in 15 rounds of conjugate gradients
    (Takacs et al., RecSys 2011); p is 1 with confidence c = alpha for an observed pair and 0 with c = 1 otherwise, so
    alpha is 1 + the paper's. The same seed gives the same factors for any number of threads.

    Args:
      interactions: the inputs.
      factors: dimension of the factors, 1 or more.
      regularization: L2 penalty.
      alpha: confidence of observed pairs.
      seed: of the initial factors.

    Returns:
      The scorer.

    Raises:
      ImportError: `implicit` is not installed.
      InsufficientMemoryError: the factors do not fit.
    """
    for name, value, least in (("factors", factors, 1), ("regularization", regularization, 0), ("alpha", alpha, 1)):
        if not value >= least:
            raise ValueError(f"{name} is {value}; it must be at least {least}")
    try:
        from implicit.cpu.als import AlternatingLeastSquares
        from threadpoolctl import threadpool_limits
    except ImportError as error:
        raise ImportError("als needs the library implicit: pip install -e '.[als]'") from error
    need = 8 * factors * (interactions.n_users + interactions.n_items)  # float32, and the device's copy
    require_memory(need, f"als, with {factors} factors of each user and item", "raise data.k_core, or leave als out")
    history = interactions.history()
    # The library has its own threads; with BLAS threads it is ten times slower, and warns.
    with threadpool_limits(1, "blas"):
        model = AlternatingLeastSquares(
            factors, regularization=regularization, alpha=alpha, iterations=ITERATIONS, random_state=seed
        )
        model.fit(scipy.sparse.csr_matrix(history), show_progress=False)
    factorised = Partial(dot, jnp.asarray(model.user_factors), jnp.asarray(model.item_factors))
    return rank_unscorable_last(factorised, has_interactions(history))


def has_interactions(history) -> Bool[np.ndarray, "I"]:
    """Returns which items have interactions."""
    return np.bincount(history.indices, minlength=history.shape[1]) > 0


def rank_unscorable_last(scorer: Partial, known: Bool[np.ndarray, "I"]) -> Partial:
    """Wraps a scorer so that unscorable items get each user's lowest score.

    Args:
      scorer: the scorer.
      known: bool [I], which items its formula can score.

    Returns:
      The new scorer.
    """
    return scorer if known.all() else Partial(rank_unknown_last, scorer, jnp.asarray(known))


def rank_unknown_last(scorer: Partial, known: Bool[Array, "I"], users: Int32[Array, "B"]) -> Float32[Array, "B I"]:
    """Scores as `scorer`, and items that are not known with the lowest score (`rank_unscorable_last`)."""
    scores = scorer(users)
    return jnp.where(known[None, :], scores, scores.min(1, keepdims=True))


def _unit(rows: Float32[np.ndarray, "n D"]) -> Float32[np.ndarray, "n D"]:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), np.float32(1e-12))


def _pairs(row, column, n_rows: int, n_columns: int, row_name: str, column_name: str) -> scipy.sparse.csr_array:
    for name, ids, n in ((row_name, row, n_rows), (column_name, column, n_columns)):
        if len(ids) and not (0 <= ids.min() and ids.max() < n):
            raise ValueError(f"{name} ids span {ids.min()}..{ids.max()}; they must lie in 0..{n - 1}")
    ones = np.ones(len(row), np.float32)
    pairs = scipy.sparse.coo_array((ones, (row, column)), shape=(n_rows, n_columns)).tocsr()
    pairs.data[:] = 1  # repeated pairs were added up
    return pairs


def _nearest(name: str, vectors: scipy.sparse.csr_array, num_neighbors: int, shrink: float) -> scipy.sparse.csr_array:
    """Finds the most similar other rows of each row, ties by lower index; rows without overlap are no neighbors."""
    if num_neighbors < 1:
        raise ValueError(f"num_neighbors is {num_neighbors}; it must be at least 1")
    if shrink < 0:
        raise ValueError(f"shrink is {shrink}; it must be 0 or more")
    norms = np.sqrt(np.diff(vectors.indptr))
    transposed = vectors.T.tocsr()
    n = len(norms)
    # Upper bound of the similarities of a row: one per other entry of each of its columns.
    most = np.minimum(abs(vectors) @ np.diff(transposed.indptr).astype(np.float64), n)
    kept = int(np.minimum(most, num_neighbors).sum())
    what = f"{name} with up to {num_neighbors} neighbors of each of {n:,} {'items' if name == 'item_knn' else 'users'}"
    block = int(min(most.sum(), SIMILARITIES))
    require_memory(24 * kept + 64 * block, what, f"raise data.k_core, or leave {name} out")
    blocks = []
    for rows in _row_blocks(most):
        common = (vectors[rows] @ transposed).tocoo()
        row, column = common.coords
        value = common.data / (norms[row + rows.start] * norms[column] + shrink)
        other = row + rows.start != column
        row, column, value = row[other], column[other], value[other]
        order = np.lexsort((column, -value, row))
        row, column, value = row[order], column[order], value[order]
        rank = np.arange(len(row)) - np.searchsorted(row, row)
        near = rank < num_neighbors
        shape = (rows.stop - rows.start, n)
        blocks.append(scipy.sparse.csr_array((value[near], (row[near], column[near])), shape=shape))
    return scipy.sparse.csr_array(scipy.sparse.vstack(blocks))


def _row_blocks(most: Float[np.ndarray, "n"]) -> Iterator[slice]:
    """Yields blocks of up to 1,024 rows with at most `SIMILARITIES` entries together, but at least one row."""
    total, start = np.concatenate([[0], np.cumsum(most)]), 0
    while start < len(most):
        stop = int(np.searchsorted(total, total[start] + SIMILARITIES, side="right")) - 1
        stop = min(max(stop, start + 1), start + 1024, len(most))
        yield slice(start, stop)
        start = stop


CHUNK = 128  # entries of a row added in one step
MOST_ENTRIES = 2**31 - 1 - CHUNK  # maximum entries of a matrix on the device, indexed by int32


class Entries(NamedTuple):
    """Sparse matrix in compressed rows on the device: row r has entries indptr[r] to indptr[r + 1] - 1.

    Attributes:
      indptr: int32 [rows + 1].
      columns: int32 [E].
      values: float32 [E].
    """

    indptr: Int32[Array, "rows"]
    columns: Int32[Array, "E"]
    values: Float32[Array, "E"]


def entries(matrix: scipy.sparse.csr_array) -> Entries:
    """Copies a sparse matrix to the device.

    Args:
      matrix: the matrix.

    Returns:
      Its entries.

    Raises:
      NotApplicableError: it has more than `MOST_ENTRIES` entries, which int32 cannot index.
    """
    if matrix.nnz > MOST_ENTRIES:
        raise NotApplicableError(
            f"a sparse matrix of {matrix.nnz:,} entries is needed, and a device indexes at most "
            f"{MOST_ENTRIES:,}; raise data.k_core, or leave this baseline out"
        )
    # A zero past the end, for reads beyond a row or of an empty matrix.
    columns, values = np.append(matrix.indices, 0), np.append(matrix.data, 0)
    return Entries(*map(jnp.asarray, (matrix.indptr.astype(np.int32), columns.astype(np.int32), np.float32(values))))


def _zeros(n_items: int) -> Float32[Array, "I"]:
    return jnp.asarray(np.zeros(n_items, np.float32))


def same_for_all(scores: Float32[Array, "I"], users: Int32[Array, "B"]) -> Float32[Array, "B I"]:
    """Returns the same scores for each user."""
    return jnp.broadcast_to(scores[None, :], (users.shape[0], scores.shape[0]))


def dot(users: Float32[Array, "U K"], items: Float32[Array, "I K"], batch: Int32[Array, "B"]) -> Float32[Array, "B I"]:
    """Computes inner products of rows of `users` with all rows of `items`."""
    return users[batch] @ items.T


def sum_sparse_rows(
    left: Entries, right: Entries, zeros: Float32[Array, "I"], users: Int32[Array, "B"]
) -> Float32[Array, "B I"]:
    """Computes left[users] @ right in time proportional to the entries used; row lengths differ too much to pad."""

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
