"""Text as node input and as relation gates.

A node's text embedding enters the model in two ways: projected to the model's dimension as a part of its input
(`TextInput`, or `TextMLP` with model.text_projection = mlp), and as features of the gates that weight each relation in
each layer (`Gate`). Neither reads a hidden state, so propagation stays linear in the inputs
(`fused_rec.model.propagation`).
"""

from collections.abc import Mapping
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32

from fused_rec.config import ComputeDtype
from fused_rec.distributed.devices import AnyArray
from fused_rec.model.precision import product_in

RANK = 16  # width of the projection of a text embedding that the gates read


class TextInput(nn.Module):
    """Linear projection of text embeddings to the model's dimension, without a bias: [n, D] to float32 [n, K].

    The kernel starts orthogonal. With `dim` equal to the text's width the projection preserves cosines, so text
    similarity is available before the first step. At the start rows are as long as ID embeddings of standard deviation
    `scale`.

    Attributes:
      dim: K, the dimension of the output.
      scale: the standard deviation of an output entry at the start, for text embeddings of unit length.
      compute_dtype: the type of both factors of the product; sums are float32.
    """

    dim: int
    scale: float
    compute_dtype: ComputeDtype = "float32"

    @nn.compact
    def __call__(self, text: Float32[AnyArray, "n D"]) -> Float32[Array, "n K"]:
        start = nn.initializers.orthogonal(self.scale * max(text.shape[1], self.dim) ** 0.5)
        kernel = self.param("kernel", start, (text.shape[1], self.dim))
        return project(text, kernel, self.compute_dtype)


class TextMLP(nn.Module):
    """Two-layer projection of text embeddings (AlphaRec: Sheng et al., ICLR 2025, arXiv 2407.05441).

    [n, D] to float32 [n, K]: W_2 leaky_relu(W_1 t + b_1) + b_2, with D / 2 hidden units. A row without text stays zero,
    as nothing is known of its node.

    Attributes:
      dim: K, the dimension of the output.
      compute_dtype: the type of inputs and outputs of both layers; parameters are float32.
    """

    dim: int
    compute_dtype: ComputeDtype = "float32"

    @nn.compact
    def __call__(self, text: Float32[AnyArray, "n D"]) -> Float32[Array, "n K"]:
        hidden = nn.Dense(max(text.shape[1] // 2, 1), dtype=self.compute_dtype, name="hidden")(text)
        out = nn.Dense(self.dim, dtype=self.compute_dtype, name="output")(nn.leaky_relu(hidden))
        return out.astype(jnp.float32) * jnp.any(text != 0, axis=1, keepdims=True)


class TextPrediction(nn.Module):
    """Two-layer prediction of text features from final embeddings (RLMRec-Gen: Ren et al., 2024, arXiv 2310.15950).

    [n, K] to float32 [n, D]: W_2 leaky_relu(W_1 z + b_1) + b_2, with (K + D) / 2 hidden units.

    Attributes:
      width: D, of the text features.
      compute_dtype: the type of inputs and outputs of both layers; parameters are float32.
    """

    width: int
    compute_dtype: ComputeDtype = "float32"

    @nn.compact
    def __call__(self, embeddings: Float32[AnyArray, "n K"]) -> Float32[Array, "n D"]:
        units = (embeddings.shape[1] + self.width) // 2
        hidden = nn.Dense(units, dtype=self.compute_dtype, name="hidden")(embeddings)
        out = nn.Dense(self.width, dtype=self.compute_dtype, name="output")(nn.leaky_relu(hidden))
        return out.astype(jnp.float32)


class Matrix(nn.Module):
    """A matrix of parameters, named `kernel` as in `nn.Dense`.

    Attributes:
      shape: its shape.
      start: its initializer.
    """

    shape: tuple[int, int]
    start: nn.initializers.Initializer

    @nn.compact
    def __call__(self) -> Float32[Array, "m n"]:
        return self.param("kernel", self.start, self.shape)


class GateWeights(NamedTuple):
    """Parameters of a `Gate` of L layers: logits are [text, has text, log degree] times [by_text; other].

    Attributes:
      level: float32 [L], the factor of each layer.
      by_text: float32 [D, L], of text embeddings, of rank 16 at most; None: no gate by node.
      other: float32 [2, L], of the indicator of text and of the log degree; None likewise.
    """

    level: Float32[Array, "L"]
    by_text: Float32[Array, "D L"] | None
    other: Float32[Array, "2 L"] | None


class Gate(nn.Module):
    """Gates of one relation, one factor a layer and target node: exp(b_l) * 2 sigmoid(w_l . features), float32 [L, n].

    The features are a projection of the node's text embedding (`RANK` columns), an indicator of whether it has text,
    and its log degree in the relation, standardized over the nodes of the type. b and w start at 0, so every gate
    starts at 1.

    Attributes:
      num_layers: L, the number of layers.
      by_node: False: only the factor exp(b_l) of the layer remains.
    """

    num_layers: int
    by_node: bool

    def __call__(self, text: Float32[AnyArray, "n D"], log_degree: Float32[AnyArray, "n"]) -> Float32[Array, "L n"]:
        weights = self.weights(text.shape[1])
        logits = None if weights.by_text is None else project(text, weights.by_text)
        return gate_values(weights, logits, jnp.abs(text).sum(axis=1) > 0, log_degree)

    @nn.compact
    def weights(self, width: int) -> GateWeights:
        """Returns the parameters for text embeddings of `width` columns.

        The product of both matrices comes first: L columns to multiply text embeddings by, in place of `RANK`.
        """
        level = jnp.exp(self.param("level", nn.initializers.zeros, (self.num_layers,)))
        if not self.by_node:
            return GateWeights(level, None, None)
        view = Matrix((width, RANK), nn.initializers.lecun_normal(), name="view")()
        weight = Matrix((RANK + 2, self.num_layers), nn.initializers.zeros, name="weight")()
        return GateWeights(level, jnp.matmul(view, weight[:RANK]), weight[RANK:])


def gate_values(
    weights: GateWeights,
    logits: Float32[Array, "n L"] | None,
    has_text: Bool[Array, "n"],
    log_degree: Float32[AnyArray, "n"],
) -> Float32[Array, "L n"]:
    """Computes the values of a `Gate`.

    Args:
      weights: its parameters.
      logits: float32 [n, L], text embeddings times `weights.by_text`; None: text embeddings are not read.
      has_text: bool [n], nodes with text; not read without `logits`.
      log_degree: float32 [n], standardized log degrees.

    Returns:
      float32 [L, n].
    """
    if weights.other is None:
        return jnp.broadcast_to(weights.level[:, None], (len(weights.level), len(log_degree)))
    total = weights.other[1][:, None] * jnp.asarray(log_degree)[None, :]
    if logits is not None:
        total = total + logits.T + weights.other[0][:, None] * has_text[None, :]
    return weights.level[:, None] * 2 * jax.nn.sigmoid(total)


def products(
    text: Float32[AnyArray, "n D"], matrices: Mapping[str, Float32[Array, "D _"]], compute_dtype: ComputeDtype
) -> dict[str, Float32[Array, "n _"]]:
    """Multiplies text embeddings by several matrices at once: the embeddings are read once.

    Args:
      text: float32 [n, D].
      matrices: float32 [D, K] by name, of any K.
      compute_dtype: as in `project`.

    Returns:
      float32 [n, K] by name.
    """
    if not matrices:
        return {}
    whole = project(text, jnp.concatenate(list(matrices.values()), axis=1), compute_dtype)
    borders = np.cumsum([matrix.shape[1] for matrix in matrices.values()])[:-1]
    return dict(zip(matrices, jnp.split(whole, borders, axis=1), strict=True))


def project(
    text: Float32[AnyArray, "n D"], matrix: Float32[Array, "D K"], compute_dtype: ComputeDtype = "float32"
) -> Float32[Array, "n K"]:
    """Multiplies text embeddings by a matrix.

    Args:
      text: float32 [n, D].
      matrix: float32 [D, K].
      compute_dtype: the type of both factors; sums are float32.

    Returns:
      float32 [n, K].
    """
    return product_in(compute_dtype, jnp.asarray(text), matrix)
