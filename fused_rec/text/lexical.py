"""Words counted: TF-IDF directions beside the language model's, for names and terms that it cannot tell apart."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32


def lexical_vectors(texts: Sequence[str], dims: int) -> Float32[np.ndarray, "T D"]:
    """Latent semantic analysis (Deerwester et al., 1990): the first directions of the texts' TF-IDF matrix.

    Terms of one text alone, and those of more than half of the texts, tell nothing of likeness and are left out; a list
    of stop words would leave out terms of the trade (call, bill, interest). D is `dims`, fewer where there are fewer
    texts or terms, and 0 where the texts do not share at least two terms.
    """
    # Imported here: scikit-learn takes a second that `import fused_rec.train` need not.
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer

    if not dims or len(texts) < 4:  # of fewer, no term can be in two texts and in at most half of them
        return np.zeros((len(texts), 0), np.float32)
    counts = TfidfVectorizer(sublinear_tf=True, min_df=2, max_df=0.5)
    try:
        weights = counts.fit_transform(texts)
    except ValueError as error:  # how scikit-learn tells that no term is left
        if "vocabulary" not in str(error) and "no terms remain" not in str(error).lower():
            raise
        return np.zeros((len(texts), 0), np.float32)
    if weights.shape[1] < 2:  # which scikit-learn does not decompose
        return np.zeros((len(texts), 0), np.float32)
    # All of the directions where they are few: of two that weigh the same, either could be the one left out.
    return TruncatedSVD(min(dims, *weights.shape), random_state=0).fit_transform(weights).astype(np.float32)


def side_by_side(*views: Float32[np.ndarray, "T _"]) -> Float32[np.ndarray, "T D"]:
    """The columns of several views of the same texts, each view scaled to spread by 1 about its mean.

    A view without columns is left out; one of equal rows, which has no spread, stays as it is.
    """
    return np.concatenate([view / spread(view) for view in views if view.shape[1]], axis=1)


def spread(view: Float32[np.ndarray, "T D"]) -> np.float32:
    """Root of the mean squared distance of the rows from their mean; 1 where they are equal."""
    found = np.sqrt(np.square(view - view.mean(0)).sum(1).mean())
    size = np.sqrt(np.square(view).sum(1).mean())
    # Of equal rows nothing but the rounding of their mean would be scaled up.
    return found if found > 1e-6 * size else np.float32(1)
