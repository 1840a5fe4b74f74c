"""Regularized ZCA whitening of the text features of nodes: fitted on the nodes of a type, then applied to any rows."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Float64


class Whitening(NamedTuple):
    """A whitening transform: (x - center) @ matrix has nearly equal variance in every direction."""

    center: Float64[np.ndarray, "D"]
    matrix: Float64[np.ndarray, "D D"]


def fit_whitening(means: Float32[np.ndarray, "n D"]) -> Whitening | None:
    """Fits a regularized ZCA whitening.

    Sentence embeddings lie in a narrow cone (Ethayarajh, 2019): the mean is subtracted and principal directions are
    scaled to 1 / sqrt(variance + mean variance), so that directions of small variance are not amplified to noise. The
    result is rotated back to the encoder's axes: it does not depend on the signs that a linear algebra library gives
    the eigenvectors, and a checkpoint finds the same embeddings on another machine.

    Args:
      means: float32 [n, D], unwhitened embeddings of the nodes with text.

    Returns:
      The transform; None for fewer than two rows.
    """
    if len(means) < 2:
        return None
    # In float64 nodes of one identical text become zero instead of amplified rounding errors.
    center = means.mean(0, dtype=np.float64)
    variance, directions = np.linalg.eigh(np.atleast_2d(np.cov(means - center, rowvar=False, dtype=np.float64)))
    scale = 1 / np.sqrt(np.maximum(variance, 0) + variance.mean() + 1e-12)
    return Whitening(center, directions * scale[None, :] @ directions.T)


def apply_whitening(
    whitening: Whitening | None, means: Float32[np.ndarray, "n D"], has_text: Bool[np.ndarray, "n"]
) -> tuple[Float32[np.ndarray, "n D"], Float32[np.ndarray, "n"]]:
    """Whitens rows and normalizes them to unit length.

    Args:
      whitening: a transform, possibly fitted on other rows; None: all rows become zero.
      means: float32 [n, D], unwhitened embeddings.
      has_text: bool [n], which nodes have text.

    Returns:
      float32 [n, D], rows of unit length or zero; and float32 [n], their norms before the normalization.
    """
    out, norms = np.zeros(means.shape, np.float32), np.zeros(len(means), np.float32)
    if whitening is not None:
        scaled = (means[has_text] - whitening.center) @ whitening.matrix
        norm = np.linalg.norm(scaled, axis=1, keepdims=True)
        out[has_text] = scaled / np.maximum(norm, 1e-12)
        norms[has_text] = norm[:, 0]
    return out, norms
