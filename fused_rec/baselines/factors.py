"""Closed-form recommenders as bilinear forms: score(u, i) = <sum over the user's items j of source_j, target_i>.

In this form a recommender is a component of the fused score (`fused_rec.model.late_fusion`): it needs rows of users and
items in place of an I x I matrix, its scores are inner products, and they split exactly over the user's items.

A zero diagonal cannot be expressed by rank R: an item the user has interacted with gets another score than from the
full method. Rankings exclude these items.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import scipy.sparse
from jaxtyping import Float, Float32

from fused_rec.baselines.linear import EXACT, OVERSAMPLES, exact_singular_vectors, normalized, subspace_iteration
from fused_rec.baselines.neighbors import (
    NEIGHBOR_GRID,
    Interactions,
    NotApplicableError,
    item_counts,
    nearest_items,
)
from fused_rec.memory import require_memory
from fused_rec.rng import Stream, numpy_rng

MIN_ONE_MINUS_NORM = 1e-4  # of 1: rows in float32 then still give weights three digits
WORK = 1.5e11  # operations of one orthogonalization of subspace iteration, (U + I) R^2
MAX_RANK, MIN_RANK = 2048, 64
FRIENDS_RANK = 256  # of a sum over friends: on Epinions 128, 256 and 512 rank alike


# Where user vectors come from: sums over the user's items (and friends), the user's text features, or nothing (one
# number for all users).
UserSource = Literal["items", "text", "constant"]


class Factors(NamedTuple):
    """Rows of a bilinear form.

    Attributes:
      source: float32 [I, S], summed over the user's items.
      target: float32 [I, R], of the scored item.
      text_columns: how many of the first columns are made of text features; the others are of interactions.
      friends: float32 [U, F], summed over users with a social edge to the user, and divided by the square root of their
        number: the last columns of the user vector, beside those of `source`; None: no such columns.
    """

    source: Float32[np.ndarray, "I S"]
    target: Float32[np.ndarray, "I R"]
    text_columns: int = 0
    friends: Float32[np.ndarray, "U F"] | None = None


class SingularVectors(NamedTuple):
    """The largest singular values of the interaction matrix X, and their right singular vectors V.

    Attributes:
      values: float64 [R], descending, above 0.
      right: float64 [I, R], orthonormal columns.
    """

    values: Float[np.ndarray, "R"]
    right: Float[np.ndarray, "I R"]


def default_rank(n_users: int, n_items: int) -> int:
    """Chooses a rank by the work that subspace iteration takes.

    Args:
      n_users: U.
      n_items: I.

    Returns:
      min(U, I), at most `MAX_RANK` and such that (U + I) R^2 is at most `WORK`, but at least `MIN_RANK`.
    """
    return min(n_users, n_items, _affordable_columns(n_users + n_items))


def _affordable_columns(nodes: int) -> int:
    """Columns R of rows of all nodes with nodes R^2 at most `WORK`, within `MIN_RANK` and `MAX_RANK`."""
    return max(MIN_RANK, min(MAX_RANK, int((WORK / max(nodes, 1)) ** 0.5)))


def require_singular_vectors(n_users: int, n_items: int, rank: int | None = None) -> None:
    """Checks, before training, that singular vectors fit in memory.

    Args:
      n_users: U.
      n_items: I.
      rank: R; None: `default_rank`.

    Raises:
      InsufficientMemoryError: three copies in float64 do not fit.
    """
    columns, nodes = (rank or default_rank(n_users, n_items)) + OVERSAMPLES, n_users + n_items
    remedy = "raise data.k_core, or set model.late_fusion to False"
    require_memory(24 * columns * nodes, f"{columns} singular vectors of {nodes:,} nodes", remedy)


def singular_vectors(interactions: Interactions, rank: int) -> SingularVectors:
    """Computes the largest singular values and right singular vectors of X.

    From the smaller Gram matrix where U or I is at most `EXACT`, else by subspace iteration, whose last directions are
    approximate. Deterministic on one machine with one number of threads.

    Args:
      interactions: the training interactions X.
      rank: R, at most min(U, I) are computed; zero singular values are left out.

    Returns:
      The values and vectors, float64.

    Raises:
      InsufficientMemoryError: they do not fit in memory.
    """
    return _largest(interactions, interactions.history().astype(np.float64), rank)


def _largest(interactions: Interactions, matrix: Any, rank: int) -> SingularVectors:
    """The largest singular values and right singular vectors of X, or of its normalization."""
    rank = min(rank, interactions.n_users, interactions.n_items)
    require_singular_vectors(interactions.n_users, interactions.n_items, rank)
    if min(interactions.n_users, interactions.n_items) <= EXACT:
        values, right = exact_singular_vectors(matrix, rank)
    else:
        values, right = subspace_iteration(matrix, rank, iterations=4)
    kept = values > 1e-6 * max(values.max(initial=0), 1e-300)
    return SingularVectors(values[kept].astype(np.float64), right[:, kept].astype(np.float64))


def ease_factors(singular: SingularVectors, *, l2: float) -> Factors:
    """Computes EASE (Steck, 2019, arXiv 1905.03375) on R singular directions.

    With X = U diag(s) V' and f = s^2 / (s^2 + l2), EASE's P = (X'X + l2 I)^-1 is (I - V diag(f) V') / l2, so with
    S = V diag(f)^1/2 its weights off the diagonal are B_ji = <S_j, S_i> / (1 - |S_i|^2): exactly with all directions.

    Args:
      singular: of the training interactions.
      l2: the ridge penalty, above 0.

    Returns:
      The factors: source S_j and target S_i / (1 - |S_i|^2).

    Raises:
      NotApplicableError: l2 is so small that 1 - |S_i|^2 of an item has too few digits in float32.
    """
    rows = singular.right * np.sqrt(singular.values**2 / (singular.values**2 + l2))
    one_minus_norm = 1 - (rows * rows).sum(1)
    if one_minus_norm.min() < MIN_ONE_MINUS_NORM:
        raise NotApplicableError(
            f"l2 is {l2}: 1 - |S_i|^2 is {one_minus_norm.min():.2g} for an item, and must be at least "
            f"{MIN_ONE_MINUS_NORM}; raise it"
        )
    return Factors(rows.astype(np.float32), (rows / one_minus_norm[:, None]).astype(np.float32))


class TextDirections(NamedTuple):
    """Text features T in the basis Q of eigenvectors of T'T, in which a ridge inverse of T'T is a division.

    Attributes:
      rows: float32 [I, D], T Q, without the eigenvectors of eigenvalue 0.
      values: float64 [D], the eigenvalues.
      of_singular: float32 [R, D], V'T Q, with the singular vectors V.
    """

    rows: Float32[np.ndarray, "I D"]
    values: Float[np.ndarray, "D"]
    of_singular: Float32[np.ndarray, "R D"]


def text_directions(singular: SingularVectors, item_text: Float32[np.ndarray, "I C"]) -> TextDirections:
    """Computes what `text_ease_factors` needs of text features with any penalties.

    Args:
      singular: of the training interactions.
      item_text: text features T, unit rows or zero.
    """
    import scipy.linalg  # not at the top: --help would take a fifth longer

    wide = item_text.astype(np.float64)
    values, vectors = scipy.linalg.eigh(wide.T @ wide)
    kept = values > 1e-10 * max(values.max(initial=0), 1e-300)
    rows = item_text @ vectors[:, kept].astype(np.float32)
    return TextDirections(rows, values[kept], singular.right.astype(np.float32).T @ rows)


def text_ease_factors(
    singular: SingularVectors, text: TextDirections, *, l2: float, l2_text: float, l2_words: float
) -> Factors:
    """Computes EASE with text regularization (`fused_rec.baselines.linear.text_ease`) on R singular directions.

    In the notation there, with l = l2 + l2_text, P = (I - V diag(f) V') / l and W = T R', the score of an item that
    the user has not interacted with is x'B_i = l2_text (x'P T) R_i + x' V diag(f) V_i n_i / l. Text features are in
    the basis of `TextDirections`, which changes no inner product.

    Args:
      singular: of the training interactions.
      text: of the text features.
      l2: the ridge penalty.
      l2_text: penalty of the distance from the weights S that text gives.
      l2_words: ridge penalty of S.

    Returns:
      The factors, of D + R columns.
    """
    smooth = text.rows / (text.values + l2_words).astype(np.float32)  # T N of `text_ease`
    right_text = smooth / (1 - np.einsum("id,id->i", text.rows, smooth))[:, None]
    ridge = l2 + l2_text
    shrinkage = singular.values**2 / (singular.values**2 + ridge)
    p_diagonal = (1 - np.square(singular.right) @ shrinkage) / ridge
    filtered = singular.right.astype(np.float32) * shrinkage.astype(np.float32)
    p_text = (text.rows - filtered @ text.of_singular) / np.float32(ridge)  # P T
    multiplier = (1 + l2_text * np.einsum("id,id->i", p_text, right_text)) / p_diagonal  # n
    return Factors(
        np.concatenate([np.float32(l2_text) * p_text, filtered], axis=1),
        np.concatenate([right_text, (singular.right * (multiplier / ridge)[:, None]).astype(np.float32)], axis=1),
        text_columns=text.rows.shape[1],
    )


def gf_cf_factors(
    singular: SingularVectors, sqrt_degree: Float[np.ndarray, "I"], *, rank: int, alpha: float
) -> Factors:
    """Computes graph filters (`fused_rec.baselines.linear.gf_cf`) on the singular directions of R = Du^-1/2 X Di^-1/2.

    With R'R = V diag(s^2) V' and V_k the first k columns of V, the scores are
    X (V diag(s^2) V' + alpha Di^-1/2 V_k V_k' Di^1/2): exactly with all directions.

    Args:
      singular: of R.
      sqrt_degree: diagonal of Di^1/2.
      rank: k, of the low-pass filter.
      alpha: its weight.

    Returns:
      The factors, of R + k columns.
    """
    low_pass = singular.right[:, :rank]
    source = singular.right * singular.values**2, alpha * low_pass / sqrt_degree[:, None]
    target = singular.right, low_pass * sqrt_degree[:, None]
    joined = [np.concatenate(columns, axis=1).astype(np.float32) for columns in (source, target)]
    return Factors(source=joined[0], target=joined[1])


def text_mean_factors(item_text: Float32[np.ndarray, "I D"]) -> Factors:
    """Returns the content-based recommender: the user's mean item text against the item's.

    Args:
      item_text: unit rows, zero for items without text.
    """
    return Factors(item_text, item_text, item_text.shape[1])


def item_knn_factors(interactions: Interactions, *, num_neighbors: int, shrink: float) -> Factors:
    """Computes `fused_rec.baselines.neighbors.item_knn`: source rows are unit vectors, target rows similarities.

    Singular directions would need as many columns: similarities that end at the nearest neighbors have no low rank.

    Args:
      interactions: X.
      num_neighbors: neighbors per item, 1 or more.
      shrink: shrinkage of similarities with few common users, 0 or more.

    Returns:
      The factors, of I columns.

    Raises:
      InsufficientMemoryError: the columns of items and users do not fit in memory.
    """
    users, items = interactions.n_users, interactions.n_items
    what = f"item_knn as a component of late fusion, with a column for each of {items:,} items"
    remedy = "train on these tables with a higher data.k_core, or with model.late_fusion set to False"
    require_memory(4 * items * (users + 2 * items), what, remedy)
    similar = nearest_items(interactions, num_neighbors, shrink)
    return Factors(np.eye(items, dtype=np.float32), similar.T.toarray().astype(np.float32))


def term_rows(item_terms: Any, columns: int) -> Float32[np.ndarray, "I R"]:
    """Computes dense rows whose inner products are those of TF-IDF rows over all terms, or have them as expectation.

    The half of the columns is for the terms of the largest sums of squares, one each. All other terms share the other
    half with random signs (count sketch: Charikar et al., 2002; feature hashing: Weinberger et al., 2009, arXiv
    0902.2206). Singular directions would lose rare terms, which are few in each text and tell most: see docs/MODEL.md.

    Args:
      item_terms: sparse float [I, V], unit rows or zero.
      columns: R; with V at most R every term has a column, and inner products are exact.

    Returns:
      float32 [I, min(R, V)].
    """
    n_terms = item_terms.shape[1]
    columns = min(columns, n_terms)
    own = columns if columns == n_terms else columns // 2
    order = np.argsort(-np.asarray(item_terms.power(2).sum(0)).ravel(), kind="stable")
    place, sign = np.arange(n_terms), np.ones(n_terms)
    place[own:] = own + (place[own:] - own) % max(columns - own, 1)
    sign[own:] = numpy_rng(0, 0, Stream.TERM_SIGNS).choice([-1, 1], n_terms - own)
    sketch = scipy.sparse.csr_matrix((sign, (order, place)), (n_terms, columns))
    return (item_terms @ sketch).toarray().astype(np.float32)


def social_ease_factors(interactions: Interactions, singular: SingularVectors, *, l2: float, weight: float) -> Factors:
    """Adds the items of a user's friends to EASE.

    With R = Du^-1/2 X Di^-1/4, Du and Di the degrees of users and items, X on at most `FRIENDS_RANK` singular
    directions, score(u, .) = EASE(u, .) + weight d_u^-1/2 sum of R_f over the d_u friends f of u. The exponents were
    chosen on validation of Epinions. The sum is not standardized before it is added: EASE counts the more, the more
    items the user has, and the friends the more, the more friends.

    Args:
      interactions: X.
      singular: of X.
      l2: the ridge penalty of EASE, above 0.
      weight: of the friends.

    Returns:
      The factors, with rows of friends.

    Raises:
      NotApplicableError: l2 is too small, as for `ease_factors`.
    """
    own = ease_factors(singular, l2=l2)
    right, history = singular.right[:, :FRIENDS_RANK].astype(np.float32), interactions.history()
    of_user, of_item = (np.maximum(history.sum(axis), 1).astype(np.float32)[:, None] for axis in (1, 0))
    target = np.concatenate([own.target, right / of_item**0.25], axis=1)
    return Factors(own.source, target, friends=np.float32(weight) * (history @ right) / np.sqrt(of_user))


def friends_mean_factors(interactions: Interactions, singular: SingularVectors) -> Factors:
    """Returns the items of a user's friends, all counted alike, on the singular directions: X V V' summed over friends.

    Args:
      interactions: X.
      singular: of X.
    """
    right = singular.right.astype(np.float32)
    return Factors(np.zeros((len(right), 0), np.float32), right, friends=interactions.history() @ right)


@dataclasses.dataclass(frozen=True)
class ClosedFormRecommender:
    """A closed-form recommender that can be a component of the fused score.

    Attributes:
      make: called with `Evidence` and one of the settings.
      grid: settings among which validation chooses.
      user_source: where the user vectors come from.
      needs: what the tables must have: "item_text", "item_terms", "user_text", "ties", "times".
      few_items: whether it is chosen only where the tables have few items (`Evidence.few_items`). Tables that grow keep
        it.
    """

    make: Callable[..., Factors]
    grid: tuple[dict[str, Any], ...]
    user_source: UserSource = "items"
    needs: tuple[str, ...] = ()
    few_items: bool = False


class Evidence:
    """Interactions with what several components read of them, which is computed once, when first needed.

    Attributes:
      interactions: the training interactions, with text features and terms of items.
    """

    def __init__(self, interactions: Interactions):
        self.interactions = interactions

    @functools.cached_property
    def singular(self) -> SingularVectors:
        """The largest singular vectors, as many as `default_rank` says."""
        return singular_vectors(self.interactions, default_rank(self.interactions.n_users, self.interactions.n_items))

    @functools.cached_property
    def normalized(self) -> tuple[SingularVectors, Float[np.ndarray, "I"]]:
        """The same of R = Du^-1/2 X Di^-1/2, and the square roots of the items' degrees."""
        matrix, sqrt_degree = normalized(self.interactions)
        rank = default_rank(self.interactions.n_users, self.interactions.n_items)
        return _largest(self.interactions, matrix, rank), sqrt_degree

    @functools.cached_property
    def term_rows(self) -> Float32[np.ndarray, "I R"]:
        """Rows of items over all terms (`term_rows`), of as many columns as `default_rank` would have directions."""
        data, terms = self.interactions, cast("Any", self.interactions.item_terms)  # there are some: `has`
        columns = min(_affordable_columns(data.n_users + data.n_items), terms.shape[1])
        remedy = "raise data.k_core, or set text.tfidf_dim to 0"
        require_memory(12 * data.n_items * columns, f"{columns:,} columns of terms of {data.n_items:,} items", remedy)
        return term_rows(terms, columns)

    @functools.cached_property
    def text_directions(self) -> TextDirections:
        """Of the text features of items."""
        return text_directions(self.singular, self.interactions.require_item_text("text_ease"))

    @functools.cached_property
    def term_directions(self) -> TextDirections:
        """Of `term_rows`."""
        return text_directions(self.singular, self.term_rows)

    @property
    def few_items(self) -> bool:
        """Whether there are at most as many items as `default_rank` would have directions."""
        data = self.interactions
        return data.n_items <= _affordable_columns(data.n_users + data.n_items)

    def has(self, what: str) -> bool:
        """Returns whether the tables have item_text, item_terms, user_text, ties or times."""
        data = self.interactions
        if what == "item_terms":
            return data.item_terms is not None and data.item_terms.nnz > 0
        if what == "ties":
            return data.source is not None and len(data.source) > 0
        if what == "times":
            return data.age is not None and len(data.age) > 0 and bool(np.ptp(data.age) > 0)
        text = data.item_text if what == "item_text" else data.user_text
        return text is not None and bool(text.any())


def _popularity(evidence: Evidence, *, half_life: float) -> Factors:
    data = evidence.interactions
    age = np.zeros(len(data.item)) if data.age is None else data.age
    counts = item_counts(data.item, age, half_life, data.n_items)
    return Factors(np.zeros((data.n_items, 0), np.float32), np.log1p(counts)[:, None])


def _user_text(evidence: Evidence) -> Factors:
    text = evidence.interactions.require_item_text("user_text")
    return Factors(np.zeros((len(text), 0), np.float32), text, text.shape[1])


def _term_ease(evidence: Evidence, **penalties: float) -> Factors:
    return text_ease_factors(evidence.singular, evidence.term_directions, **penalties)


# To add a component: its factors, the settings to try, and what it needs.
COMPONENTS: dict[str, ClosedFormRecommender] = {
    "popularity": ClosedFormRecommender(_popularity, ({"half_life": 0.0},), user_source="constant"),
    "recent_popularity": ClosedFormRecommender(
        _popularity,
        tuple({"half_life": days} for days in (365.0, 180.0, 90.0, 30.0)),
        user_source="constant",
        needs=("times",),
    ),
    "ease": ClosedFormRecommender(
        lambda evidence, l2: ease_factors(evidence.singular, l2=l2),
        tuple({"l2": l2} for l2 in (10.0, 30.0, 100.0, 300.0, 1000.0)),
    ),
    "gf_cf": ClosedFormRecommender(
        lambda evidence, **settings: gf_cf_factors(*evidence.normalized, **settings),
        tuple({"rank": k, "alpha": a} for k in (16, 128) for a in (0.1, 0.3, 1.0, 3.0)),
    ),
    "item_knn": ClosedFormRecommender(
        lambda evidence, **settings: item_knn_factors(evidence.interactions, **settings),
        NEIGHBOR_GRID,
        few_items=True,
    ),
    "text_mean": ClosedFormRecommender(
        lambda evidence: text_mean_factors(evidence.interactions.item_text), ({},), needs=("item_text",)
    ),
    "tfidf_mean": ClosedFormRecommender(
        lambda evidence: text_mean_factors(evidence.term_rows), ({},), needs=("item_terms",)
    ),
    "user_text": ClosedFormRecommender(_user_text, ({},), user_source="text", needs=("item_text", "user_text")),
    "text_ease": ClosedFormRecommender(
        lambda evidence, **penalties: text_ease_factors(evidence.singular, evidence.text_directions, **penalties),
        tuple(
            {"l2": l2, "l2_text": t, "l2_words": w}
            for l2 in (30.0, 300.0)
            for t, w in ((100.0, 30.0), (300.0, 10.0), (300.0, 100.0), (1000.0, 300.0))
        ),
        needs=("item_text",),
    ),
    "term_ease": ClosedFormRecommender(
        _term_ease,
        tuple({"l2": 30.0, "l2_text": t, "l2_words": w} for t, w in ((300.0, 10.0), (300.0, 3.0), (1000.0, 3.0))),
        needs=("item_terms",),
    ),
    "friends_mean": ClosedFormRecommender(
        lambda evidence: friends_mean_factors(evidence.interactions, evidence.singular), ({},), needs=("ties",)
    ),
    "social_ease": ClosedFormRecommender(
        lambda evidence, **settings: social_ease_factors(evidence.interactions, evidence.singular, **settings),
        tuple({"l2": l2, "weight": w} for l2 in (100.0, 300.0, 1000.0) for w in (0.5, 2.0)),
        needs=("ties",),
    ),
}
