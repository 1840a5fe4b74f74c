"""TF-IDF text features: they separate names and terms that the language model's vectors do not.

Dimensions: T texts, V terms, D directions.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Float64

from fused_rec.memory import require_memory

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix


OVERSAMPLES = 10  # extra directions of the randomized SVD, scikit-learn's default


class TfidfModel(NamedTuple):
    """Latent semantic analysis of T texts over V terms: vectors = weights @ directions, up to rounding."""

    vectors: Float32[np.ndarray, "T D"]
    weights: "csr_matrix"  # [T, V]: TF-IDF, rows with L2 norm 1
    directions: Float64[np.ndarray, "V D"]
    terms: Mapping[str, int]  # row of `directions` by term
    pattern: re.Pattern[str]  # matches a term in lower-case text

    def occurrences(self, text: str) -> Iterator[tuple[int, int, int]]:
        """Yields (start, end, row of the term) of each term of a text, in characters of the text."""
        lower = text.lower()
        # A capital may become two characters in lower case (U+0130), which shifts positions.
        positions = [position for position, letter in enumerate(text) for _ in letter.lower()]
        for found in self.pattern.finditer(lower):
            if (row := self.terms.get(found[0])) is not None:
                yield positions[found.start()], positions[found.end() - 1] + 1, row


def tfidf_vectors(texts: Sequence[str], dims: int) -> Float32[np.ndarray, "T D"]:
    """Computes latent semantic analysis features: truncated SVD of the TF-IDF matrix (Deerwester et al., 1990).

    Terms of only one text, or of more than half of the texts, carry no similarity and are excluded. A stop-word list is
    not used, since it would exclude terms of finance (call, bill, interest).

    Args:
      texts: T texts.
      dims: number of directions.

    Returns:
      Vectors with D = `dims` columns; fewer where there are fewer texts or terms, 0 where the texts share fewer than
      two terms.

    Raises:
      InsufficientMemoryError: the directions would not fit into memory.
    """
    found = fit_tfidf(texts, dims)
    return np.zeros((len(texts), 0), np.float32) if found is None else found.vectors


def fit_tfidf(texts: Sequence[str], dims: int) -> TfidfModel | None:
    """Fits the model behind `tfidf_vectors`.

    Args:
      texts: T texts.
      dims: number of directions.

    Returns:
      Vectors, weights and directions; None where D would be 0.

    Raises:
      InsufficientMemoryError: the directions would not fit into memory.
    """
    # Imported here: scikit-learn would add a second to `import fused_rec.training`.
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer

    if not dims or len(texts) < 4:  # with fewer, no term is in two texts and in at most half of them
        return None
    counts = TfidfVectorizer(sublinear_tf=True, min_df=2, max_df=0.5)
    try:
        weights = counts.fit_transform(texts)
    except ValueError as error:  # scikit-learn's error where no term is left
        if "vocabulary" not in str(error) and "no terms remain" not in str(error).lower():
            raise
        return None
    if weights.shape[1] < 2:  # scikit-learn cannot decompose it
        return None
    # Random projections of both sides in float64, three copies.
    need = 24 * (min(dims, *weights.shape) + OVERSAMPLES) * sum(weights.shape)
    what = f"text.tfidf_dim, {dims} directions of {weights.shape[0]:,} texts and {weights.shape[1]:,} terms"
    require_memory(need, what, "lower text.tfidf_dim, or set it to 0 to go without")
    # All directions where they are few: of two with equal singular values, either could be the one excluded.
    first: Any = TruncatedSVD(min(dims, *weights.shape), random_state=0)
    vectors = first.fit_transform(weights).astype(np.float32)
    return TfidfModel(
        vectors, weights, np.asarray(first.components_).T, counts.vocabulary_, re.compile(counts.token_pattern)
    )


def concat_normalized(*views: Float32[np.ndarray, "T _"]) -> Float32[np.ndarray, "T D"]:
    """Concatenates several feature matrices of the same texts, each divided by its `rms_norm`.

    Args:
      *views: matrices with a row per text; those without columns are skipped.

    Returns:
      The columns of all views; D is their total number.
    """
    return np.concatenate([view / rms_norm(view) for view in views if view.shape[1]], axis=1)


def rms_norm(view: Float32[np.ndarray, "T D"]) -> float:
    """Computes the root mean square distance of rows from their mean.

    Args:
      view: features of T texts.

    Returns:
      The distance; 1 where all rows are equal.
    """
    found = np.sqrt(np.square(view - view.mean(0)).sum(1).mean())
    size = np.sqrt(np.square(view).sum(1).mean())
    # Where all rows are equal, only the rounding of their mean would be scaled up.
    return float(found) if found > 1e-6 * size else 1.0
