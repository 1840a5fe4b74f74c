"""Packed batches: texts that lie one after the other in one row of tokens, without padding, on a CPU.

The kernels attend within each text and compute what lies between products; none has a derivative. A batch has one shape
whatever the lengths of its texts, so that one program is compiled.

Dimensions: N tokens, S texts, D hidden size, F features.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Float32, Int32

from fused_rec import kernels
from fused_rec.config import ComputeDtype
from fused_rec.text.encoders.config_fields import LARGEST
from fused_rec.text.encoders.layers import ACTIVATIONS, narrowed, product, widened
from fused_rec.text.encoders.pooling import Pooling, normalized

WIDTHS = (32, 64, 96, 128)  # of a head, that the kernel is compiled for
LANES = 16  # rows of the kernels are multiples of it
TILE = 32  # both sides of a matrix that is multiplied in tiles are multiples of it


class PackedDense(nn.Module):
    """Linear layer with float32 sums, and an activation; parameters as of `Dense`.

    Attributes:
      features: F, output dimension, a multiple of 16.
      compute_dtype: the type of the factors of the product.
      activation: a name in `ACTIVATIONS`; None for none.
    """

    features: int
    compute_dtype: ComputeDtype
    activation: str | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "N D"]) -> Float[Array, "N {self.features}"]:
        shape, gelu, narrow = (x.shape[1], self.features), self.activation == "gelu", self.compute_dtype == "bfloat16"
        kernel: Any = self.param("kernel", nn.initializers.lecun_normal(), shape)
        bias: Any = self.param("bias", nn.initializers.zeros, (self.features,))
        kernel, bias = jnp.asarray(kernel), widened(jnp.asarray(bias))
        # The product after a GELU reads it in its type.
        result = jax.ShapeDtypeStruct((len(x), self.features), jnp.bfloat16 if gelu and narrow else jnp.float32)
        # Without an activation XLA's product is as fast.
        if gelu and narrow and kernels.has_tiles() and not any(size % TILE for size in shape):
            y = jax.ffi.ffi_call(kernels.UP_GELU, result)(x, narrowed(kernel), bias)
        elif gelu:
            in_place = {} if narrow else {0: 0}
            call = jax.ffi.ffi_call(kernels.BIAS_GELU, result, input_output_aliases=in_place)
            y = call(product(x, kernel, self.compute_dtype), bias)
        else:
            y = product(x, kernel, self.compute_dtype) + bias[None]
        return y if gelu or self.activation is None else ACTIVATIONS[self.activation](y)


class AddNorm(nn.Module):
    """Layer normalization of a sum, with the two-pass variance; parameters as of `layer_norm`.

    Attributes:
      epsilon: is added to the variance.
    """

    epsilon: float

    @nn.compact
    def __call__(self, x: Float32[Array, "N D"], added: Float32[Array, "N D"]) -> Float32[Array, "N D"]:
        scale: Any = self.param("scale", nn.initializers.ones, (x.shape[1],))
        bias: Any = self.param("bias", nn.initializers.zeros, (x.shape[1],))
        result = jax.ShapeDtypeStruct(x.shape, jnp.float32)
        call = jax.ffi.ffi_call(kernels.ADD_NORM, result, input_output_aliases={1: 0})
        scale, bias = widened(jnp.asarray(scale)), widened(jnp.asarray(bias))
        return call(x, added, scale, bias, epsilon=np.float32(self.epsilon))


class Reach(NamedTuple):
    """What a token attends to, and how queries and keys are rotated.

    Attributes:
      window: int32 scalar; a token attends to tokens less than `window` positions away.
      turns: float32 [N, K], the cosines, then the sines of the angles of each token's rotary position; or empty.
      causal: whether a token attends only to itself and earlier tokens.
      narrow: whether factors are rounded to bfloat16, which takes tile registers (`kernels.has_tiles`).
    """

    window: Int32[Array, ""]
    turns: Float32[Array, "..."]
    causal: bool
    narrow: bool


def packed_attention(
    query: Float32[Array, "N D"],
    key: Float32[Array, "N G"],
    value: Float32[Array, "N G"],
    starts: Int32[Array, "S_plus_1"],
    heads: int,
    reach: Reach | None = None,
    result: jax.ShapeDtypeStruct | None = None,
) -> Float[Array, "..."]:
    """Computes softmax attention of each token over its text, in the kernel; there is no derivative.

    Args:
      query: float32 [N, D], the heads one after the other.
      key: float32 [N, G], of as many heads or fewer, each for as many heads of queries.
      value: float32 [N, G].
      starts: int32 [S + 1], the first token of each text and the end of the last; the tokens after it are padding.
      heads: number of heads of queries.
      reach: what a token attends to; None for all of its text, without rotation.
      result: float32 or bfloat16 [N, D], or bfloat16 [P, N, D], P parts that add up; None for float32.

    Returns:
      The weighted means of values, as `result` says; zeros for padding.
    """
    result = result or jax.ShapeDtypeStruct(query.shape, jnp.float32)
    window, turns, causal, narrow = reach or Reach(jnp.int32(LARGEST), jnp.zeros((0, 0)), False, False)
    call = jax.ffi.ffi_call(kernels.ATTENTION, result)
    return call(query, key, value, starts, window, turns, heads=heads, causal=causal, narrow=narrow)


def attends(heads: int, size: int) -> bool:
    """Returns whether the kernel is installed and knows heads of this width, on one device."""
    return size // heads in WIDTHS and kernels.usable() and jax.local_device_count() == 1


def pool_packed(
    hidden: Float32[Array, "N D"], starts: Int32[Array, "S_plus_1"], pooling: Pooling, normalize: bool
) -> Float32[Array, "S D"]:
    """Pools hidden states over the tokens of each text.

    Args:
      hidden: float32 [N, D], hidden states.
      starts: int32 [S + 1], as of `packed_attention`.
      pooling: mean over tokens, first token or last token.
      normalize: divides vectors by their L2 norm.

    Returns:
      float32 [S, D]; 0 for a text without tokens.
    """
    length = jnp.diff(starts)[:, None]
    if pooling == "mean":
        tokens, no_scale = jnp.arange(len(hidden), dtype=jnp.int32), jnp.zeros(0)
        shape = jax.ShapeDtypeStruct((len(length), hidden.shape[1]), jnp.float32)
        call = jax.ffi.ffi_call(kernels.NEIGHBOR_SUM, shape)
        sums = call(starts, tokens, jnp.ones(len(hidden)), no_scale, hidden)
        vectors = sums / jnp.maximum(length, 1)
    else:
        place = starts[:-1] if pooling == "cls" else starts[1:] - 1
        vectors = jnp.where(length > 0, hidden[jnp.clip(place, 0, len(hidden) - 1)], 0.0)
    return normalized(vectors) if normalize else vectors
