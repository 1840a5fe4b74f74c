"""Hidden states of a text's tokens to the text's one vector.

Dimensions: B texts, L tokens, D hidden size.
"""

import typing
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32

from fused_rec.text.encoders.layers import PRECISION

Pooling = Literal["mean", "cls", "lasttoken"]  # as sentence-transformers calls them


def pool(
    hidden: Float32[Array, "B L D"], mask: Bool[Array, "B L"], pooling: Pooling, normalize: bool
) -> Float32[Array, "B D"]:
    """One vector a text: the mean over its tokens, its first token's or its last's, divided by its length if asked.

    Padding may stand on either side. A text without tokens, which a decoder's tokenizer makes of the empty string, has
    the vector 0. Raises ValueError on another pooling.
    """
    if pooling not in typing.get_args(Pooling):
        raise ValueError(f"pooling is {pooling!r}; supported are {', '.join(typing.get_args(Pooling))}")
    tokens = mask.astype(jnp.float32)
    if pooling == "mean":
        sums = jnp.einsum("bld,bl->bd", hidden, tokens, precision=PRECISION)
        vectors = sums / jnp.maximum(tokens.sum(axis=1, keepdims=True), 1.0)
    else:
        place = mask.argmax(1) if pooling == "cls" else mask.shape[1] - 1 - mask[:, ::-1].argmax(1)
        vectors = jnp.take_along_axis(hidden, place[:, None, None], axis=1)[:, 0]
        vectors = jnp.where(mask.any(1, keepdims=True), vectors, 0.0)
    if not normalize:
        return vectors
    return vectors / jnp.maximum(jnp.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)
