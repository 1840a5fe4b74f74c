"""Packed batches: texts that lie one after the other in one row of tokens, without padding, on a CPU.

The kernel attends within each text. A batch has one shape whatever the lengths of its texts, so that one program is
compiled.

Dimensions: N tokens, S texts, D hidden size.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32

from fused_rec import kernels
from fused_rec.text.encoders.pooling import Pooling, normalized

WIDTHS = (32, 64, 96, 128)  # of a head, that the kernel is compiled for


def packed_attention(
    query: Float32[Array, "N D"],
    key: Float32[Array, "N D"],
    value: Float32[Array, "N D"],
    starts: Int32[Array, "S_plus_1"],
    heads: int,
) -> Float32[Array, "N D"]:
    """Computes softmax attention of each token over its text, in the kernel; there is no derivative.

    Args:
      query: float32 [N, D], the heads one after the other.
      key: float32 [N, D].
      value: float32 [N, D].
      starts: int32 [S + 1], the first token of each text and the end of the last; the tokens after it are padding.
      heads: number of heads.

    Returns:
      float32 [N, D]; zeros for padding.
    """
    call = jax.ffi.ffi_call(kernels.ATTENTION, jax.ShapeDtypeStruct(query.shape, jnp.float32))
    return call(query, key, value, starts, heads=heads)


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
