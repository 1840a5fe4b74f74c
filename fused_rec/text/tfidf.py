"""Words counted: TF-IDF directions beside the language model's, for names and terms that it cannot tell apart."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Float64

from fused_rec.memory import require_memory

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix


OVERSAMPLES = 10  # directions beyond those asked for, as scikit-learn takes them


class TfidfModel(NamedTuple):
    """Vectors of T texts, and the V terms they are sums over: vectors = weights @ directions, but for rounding."""

    vectors: Float32[np.ndarray, "T D"]
    weights: "csr_matrix"  # [T, V]: TF-IDF, rows of length 1
    directions: Float64[np.ndarray, "V D"]
    terms: Mapping[str, int]  # a term's row of `directions`
    pattern: re.Pattern[str]  # of a term, in small letters

    def occurrences(self, text: str) -> Iterator[tuple[int, int, int]]:
        """(start, end, row of the term) of each term, in characters of the text as it is written."""
        small = text.lower()
        # A capital may have two small letters (U+0130), so places in the one are not those in the other.
        places = [place for place, letter in enumerate(text) for _ in letter.lower()]
        for found in self.pattern.finditer(small):
            if (row := self.terms.get(found[0])) is not None:
                yield places[found.start()], places[found.end() - 1] + 1, row


def tfidf_vectors(texts: Sequence[str], dims: int) -> Float32[np.ndarray, "T D"]:
    """Latent semantic analysis (Deerwester et al., 1990): the first directions of the texts' TF-IDF matrix.

    Terms of one text alone, and those of more than half of the texts, tell nothing of likeness and are left out; a list
    of stop words would leave out terms of the trade (call, bill, interest). D is `dims`, fewer where there are fewer
    texts or terms, and 0 where the texts do not share at least two terms.
    """
    found = fit_tfidf(texts, dims)
    return np.zeros((len(texts), 0), np.float32) if found is None else found.vectors


def fit_tfidf(texts: Sequence[str], dims: int) -> TfidfModel | None:
    """What `tfidf_vectors` are made of; None where these have no columns.

    Raises:
      InsufficientMemoryError: the directions do not fit.
    """
    # Imported here: scikit-learn takes a second that `import fused_rec.training` need not.
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer

    if not dims or len(texts) < 4:  # of fewer, no term can be in two texts and in at most half of them
        return None
    counts = TfidfVectorizer(sublinear_tf=True, min_df=2, max_df=0.5)
    try:
        weights = counts.fit_transform(texts)
    except ValueError as error:  # how scikit-learn tells that no term is left
        if "vocabulary" not in str(error) and "no terms remain" not in str(error).lower():
            raise
        return None
    if weights.shape[1] < 2:  # which scikit-learn does not decompose
        return None
    # In float64, of random projections onto both sides, three copies.
    need = 24 * (min(dims, *weights.shape) + OVERSAMPLES) * sum(weights.shape)
    what = f"text.tfidf_dim, {dims} directions of {weights.shape[0]:,} texts and {weights.shape[1]:,} terms"
    require_memory(need, what, "lower text.tfidf_dim, or set it to 0 to go without")
    # All of the directions where they are few: of two that weigh the same, either could be the one left out.
    first: Any = TruncatedSVD(min(dims, *weights.shape), random_state=0)
    vectors = first.fit_transform(weights).astype(np.float32)
    return TfidfModel(
        vectors, weights, np.asarray(first.components_).T, counts.vocabulary_, re.compile(counts.token_pattern)
    )


def concat_normalized(*views: Float32[np.ndarray, "T _"]) -> Float32[np.ndarray, "T D"]:
    """The columns of several views of the same texts, each view scaled to spread by 1 about its mean.

    A view without columns is left out; one of equal rows, which has no spread, stays as it is.
    """
    return np.concatenate([view / rms_norm(view) for view in views if view.shape[1]], axis=1)


def rms_norm(view: Float32[np.ndarray, "T D"]) -> float:
    """What `concat_normalized` divides a view by: the root mean square of its rows' distances from their mean.

    1 for a view of equal rows.
    """
    found = np.sqrt(np.square(view - view.mean(0)).sum(1).mean())
    size = np.sqrt(np.square(view).sum(1).mean())
    # Of equal rows nothing but the rounding of their mean would be scaled up.
    return float(found) if found > 1e-6 * size else 1.0
