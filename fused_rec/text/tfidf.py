"""TF-IDF text features: they separate names and terms that the language model's vectors do not.

Dimensions: T texts, V terms, D directions.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Float64

from fused_rec.memory import require_memory

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix


TERM = re.compile(r"(?u)\b\w\w+\b")  # in lower-case text: words of two letters or more
OVERSAMPLES = 10  # extra directions of the randomized SVD, scikit-learn's default


class TfidfModel(NamedTuple):
    """What latent semantic analysis (`fit_tfidf`) fits: V terms and D directions."""

    terms: Mapping[str, int]  # row of `directions` by term
    directions: Float64[np.ndarray, "V D"]
    idf: Float64[np.ndarray, "V"]  # inverse document frequencies

    def occurrences(self, text: str) -> Iterator[tuple[int, int, int]]:
        """Yields (start, end, row of the term) of each term of a text, in characters of the text."""
        lower = text.lower()
        # A capital may become two characters in lower case (U+0130), which shifts positions.
        positions = [position for position, letter in enumerate(text) for _ in letter.lower()]
        for found in TERM.finditer(lower):
            if (row := self.terms.get(found[0])) is not None:
                yield positions[found.start()], positions[found.end() - 1] + 1, row


class TfidfVectors(NamedTuple):
    """T texts in a `TfidfModel`: vectors = weights @ directions, up to rounding."""

    vectors: Float32[np.ndarray, "T D"]
    weights: "csr_matrix"  # [T, V]: TF-IDF, rows with L2 norm 1


def fit_tfidf(texts: Sequence[str], dims: int) -> tuple[TfidfModel, TfidfVectors]:
    """Fits latent semantic analysis: truncated SVD of the TF-IDF matrix (Deerwester et al., 1990).

    Terms of only one text, or of more than half of the texts, carry no similarity and are excluded. A stop-word list is
    not used, since it would exclude terms of finance (call, bill, interest).

    Args:
      texts: T texts.
      dims: number of directions.

    Returns:
      The model, and the vectors of `texts` with D = `dims` columns; fewer where there are fewer texts or terms, 0 where
      the texts share fewer than two terms.

    Raises:
      InsufficientMemoryError: the directions would not fit into memory.
    """
    weights, terms, idf = _term_weights(texts) if dims else _no_terms(len(texts))
    if weights.shape[1] < 2:  # scikit-learn cannot decompose it
        model = TfidfModel({}, np.zeros((0, 0)), np.zeros(0))
        return model, apply_tfidf(model, texts)
    # Imported here: scikit-learn would add a second to `import fused_rec.training`.
    from sklearn.decomposition import TruncatedSVD

    # Random projections of both sides in float64, three copies.
    need = 24 * (min(dims, *weights.shape) + OVERSAMPLES) * sum(weights.shape)
    what = f"text.tfidf_dim, {dims} directions of {weights.shape[0]:,} texts and {weights.shape[1]:,} terms"
    require_memory(need, what, "lower text.tfidf_dim, or set it to 0 to go without")
    # All directions where they are few: of two with equal singular values, either could be the one excluded.
    first: Any = TruncatedSVD(min(dims, *weights.shape), random_state=0)
    vectors = first.fit_transform(weights).astype(np.float32)
    return TfidfModel(terms, np.asarray(first.components_).T, idf), TfidfVectors(vectors, weights)


def apply_tfidf(model: TfidfModel, texts: Sequence[str]) -> TfidfVectors:
    """Computes the vectors of any texts in a fitted model: a text gets the same vector whatever other texts there are.

    Args:
      model: of `fit_tfidf`.
      texts: T texts; terms that the model does not have are left out.

    Returns:
      The vectors, zero for a text without a term of the model; those of the fitted texts up to rounding.
    """
    from scipy.sparse import csr_matrix

    rows, columns, values = [], [], []
    for row, text in enumerate(texts if model.terms else ()):
        counts = Counter(model.terms[term] for term in TERM.findall(text.lower()) if term in model.terms)
        found = np.fromiter(counts, np.int64, len(counts))
        weight = (1 + np.log(np.fromiter(counts.values(), np.float64, len(counts)))) * model.idf[found]
        rows.append(np.full(len(found), row))
        columns.append(found)
        values.append(weight / max(np.linalg.norm(weight), 1e-300))
    shape = len(texts), len(model.idf)
    none = [np.zeros(0, np.int64)]
    at = np.concatenate(rows or none), np.concatenate(columns or none)
    weights = csr_matrix((np.concatenate(values or [np.zeros(0)]), at), shape=shape)
    return TfidfVectors((weights @ model.directions).astype(np.float32), weights)


def _term_weights(texts: Sequence[str]) -> tuple[Any, Mapping[str, int], Float64[np.ndarray, "V"]]:
    """Computes the TF-IDF matrix [T, V] of texts, the column of each term, and the terms' inverse frequencies."""
    if len(texts) < 4:  # no term is in two texts and in at most half of them
        return _no_terms(len(texts))
    from sklearn.feature_extraction.text import TfidfVectorizer

    counts = TfidfVectorizer(sublinear_tf=True, min_df=2, max_df=0.5, token_pattern=TERM.pattern)
    try:
        return counts.fit_transform(texts), counts.vocabulary_, counts.idf_
    except ValueError as error:  # scikit-learn's error where no term is left
        if "vocabulary" not in str(error) and "no terms remain" not in str(error).lower():
            raise
        return _no_terms(len(texts))


def _no_terms(n_texts: int) -> tuple[Any, Mapping[str, int], Float64[np.ndarray, "V"]]:
    """Returns the TF-IDF matrix of texts that share no term, [T, 0]."""
    from scipy.sparse import csr_matrix

    return csr_matrix((n_texts, 0)), {}, np.zeros(0)
