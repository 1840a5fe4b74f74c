"""Pooling of token hidden states to one vector per text.

Dimensions: B texts, L tokens, D hidden size.
"""

import typing
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32

from fused_rec.text.encoders.layers import PRECISION

Pooling = Literal["mean", "cls", "lasttoken"]  # names of sentence-transformers


def pool(
    hidden: Float32[Array, "B L D"], mask: Bool[Array, "B L"], pooling: Pooling, normalize: bool
) -> Float32[Array, "B D"]:
    """Pools hidden states over tokens.

    Args:
      hidden: hidden states of B texts.
      mask: False for padding, which may be on either side.
      pooling: mean over tokens, first token or last token.
      normalize: divides vectors by their L2 norm.

    Returns:
      One vector per text; 0 for a text without tokens (the empty string of a decoder).

    Raises:
      ValueError: the pooling is not supported.
    """
    if pooling not in typing.get_args(Pooling):
        raise ValueError(f"pooling is {pooling!r}; supported are {', '.join(typing.get_args(Pooling))}")
    tokens = mask.astype(jnp.float32)
    if pooling == "mean":
        sums = jnp.einsum("bld,bl->bd", hidden, tokens, precision=PRECISION)
        vectors = sums / jnp.maximum(tokens.sum(axis=1, keepdims=True), 1.0)
    else:
        position = mask.argmax(1) if pooling == "cls" else mask.shape[1] - 1 - mask[:, ::-1].argmax(1)
        vectors = jnp.take_along_axis(hidden, position[:, None, None], axis=1)[:, 0]
        vectors = jnp.where(mask.any(1, keepdims=True), vectors, 0.0)
    return normalized(vectors) if normalize else vectors


def normalized(vectors: Float32[Array, "B D"]) -> Float32[Array, "B D"]:
    """Divides vectors by their L2 norm; a zero vector stays zero."""
    return vectors / jnp.maximum(jnp.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)
