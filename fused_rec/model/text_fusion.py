"""Text as node input and as relation gates.

A node's text embedding enters the model in two ways: projected to the model's dimension as a part of its input
(`TextInput`, or `TextMLP` with model.text_projection = mlp), and as features of the gates that weight each relation in
each layer (`Gate`). Neither reads a hidden state, so propagation stays linear in the inputs
(`fused_rec.model.propagation`).
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

from fused_rec.config import ComputeDtype
from fused_rec.distributed.devices import AnyArray
from fused_rec.model.precision import matmul_f32

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
        return matmul_f32(jnp.asarray(text, self.compute_dtype), kernel.astype(self.compute_dtype))


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

    @nn.compact
    def __call__(self, text: Float32[AnyArray, "n D"], log_degree: Float32[AnyArray, "n"]) -> Float32[Array, "L n"]:
        level = jnp.exp(self.param("level", nn.initializers.zeros, (self.num_layers,)))
        if not self.by_node:
            return jnp.broadcast_to(level[:, None], (self.num_layers, len(text)))
        projected = nn.Dense(RANK, use_bias=False, name="view")(text)
        has_text = (jnp.abs(text).sum(-1) > 0).astype(text.dtype)
        features = jnp.concatenate([projected, has_text[:, None], log_degree[:, None]], axis=-1)
        node = nn.Dense(self.num_layers, use_bias=False, kernel_init=nn.initializers.zeros, name="weight")(features)
        return level[:, None] * 2 * jax.nn.sigmoid(node.T)
