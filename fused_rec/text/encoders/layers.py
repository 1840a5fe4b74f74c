"""Layers shared by the encoder families: dense layers with float32 products, norms, rotary positions, attention.

Weights may be float32, bfloat16 or float16. Sums are float32, and so are products, unless the config of an encoder has
another compute_dtype.
Dimensions: B texts, L tokens, G key heads, R query heads per key head, K numbers per head, P = K / 2 rotary pairs.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, BFloat16, Bool, Float, Float32, Int32, Shaped

from fused_rec.config import ComputeDtype
from fused_rec.text.encoders.config_fields import field, one_of

Params = dict[str, Any]

# Otherwise GPUs multiply float32 in TF32 and TPUs in bfloat16, with errors of 1e-3 in the vectors.
PRECISION = jax.lax.Precision.HIGHEST
QUERY_BLOCK = 1024  # queries per block: L x L scores of a long text would not fit into memory
ACTIVATIONS = {
    "gelu": functools.partial(nn.gelu, approximate=False),
    "gelu_new": functools.partial(nn.gelu, approximate=True),
    "relu": nn.relu,
    "silu": nn.silu,
}
ROPES = ("default", "linear", "llama3", "yarn")
ROPE_SETTINGS = frozenset(
    ("rope_type", "type", "rope_theta", "partial_rotary_factor", "factor", "original_max_position_embeddings")
    + ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")
    + ("low_freq_factor", "high_freq_factor", "finetuned")  # the last in early yarn files
)


def as_bits(params: Params) -> Params:
    """Reinterprets bfloat16 matrices and tables as their bits, uint16.

    XLA for CPUs cannot slice bfloat16: it would widen all stacked layers before it computes the first. For NumPy arrays
    the results are views; inside a jitted function they would be copies.

    Args:
      params: parameters of an encoder.

    Returns:
      The parameters; arrays of other dtypes are unchanged.
    """

    def bits(path: tuple[Any, ...], leaf: Any) -> Any:
        narrow = leaf.dtype == jnp.bfloat16 and path[-1].key in ("kernel", "embedding")
        return leaf.view(np.uint16) if narrow else leaf

    return jax.tree_util.tree_map_with_path(bits, params)


def widened(weight: Shaped[Array, "*W"]) -> Float32[Array, "*W"]:
    """Converts a weight to float32, from bfloat16 also from its bits, which are the upper half of a float32."""
    if weight.dtype != jnp.uint16:
        return weight.astype(jnp.float32)
    return jax.lax.bitcast_convert_type(weight.astype(jnp.uint32) << 16, jnp.float32)


def narrowed(weight: Shaped[Array, "*W"]) -> BFloat16[Array, "*W"]:
    """Converts a weight to bfloat16, also from the bits of one."""
    if weight.dtype != jnp.uint16:
        return weight.astype(jnp.bfloat16)
    return jax.lax.bitcast_convert_type(weight, jnp.bfloat16)


def product(
    x: Float[Array, "*B D"], kernel: Shaped[Array, "D F"], compute_dtype: ComputeDtype
) -> Float32[Array, "*B F"]:
    """Multiplies factors of this type, with float32 sums."""
    if compute_dtype == "float32":
        return jnp.dot(x, widened(kernel), precision=PRECISION)
    return jnp.dot(x.astype(jnp.bfloat16), narrowed(kernel), preferred_element_type=jnp.float32)


class Dense(nn.Module):
    """Linear layer with float32 sums.

    Attributes:
      features: output dimension.
      use_bias: whether it adds a bias.
      compute_dtype: the type of the factors of the product.
    """

    features: int
    use_bias: bool = True
    compute_dtype: ComputeDtype = "float32"

    @nn.compact
    def __call__(self, x: Float32[Array, "*B D"]) -> Float32[Array, "*B {self.features}"]:
        kernel: Any = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], self.features))
        x = product(x, jnp.asarray(kernel), self.compute_dtype)
        if not self.use_bias:
            return x
        bias: Any = self.param("bias", nn.initializers.zeros, (self.features,))
        return x + widened(jnp.asarray(bias)).reshape(*[1] * (x.ndim - 1), -1)


def layer_norm(epsilon: float, name: str, use_bias: bool = True) -> nn.LayerNorm:
    """Creates a layer normalization with the two-pass variance."""
    return nn.LayerNorm(epsilon, dtype=jnp.float32, use_bias=use_bias, use_fast_variance=False, name=name)


def rms_norm(epsilon: float, name: str) -> nn.RMSNorm:
    """Creates an RMS normalization (Zhang and Sennrich, 2019, arXiv 1910.07467)."""
    return nn.RMSNorm(epsilon, dtype=jnp.float32, name=name)


class Embedding(nn.Module):
    """Embedding table with float32 output; only the looked-up rows of a half-precision table are widened.

    Attributes:
      rows: number of rows.
      features: embedding dimension.
    """

    rows: int
    features: int

    @nn.compact
    def __call__(self, ids: Int32[Array, "*B"]) -> Float32[Array, "*B {self.features}"]:
        table: Any = self.param("embedding", nn.initializers.normal(0.02), (self.rows, self.features))
        return widened(jnp.asarray(table)[ids])


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position embedding (Su et al., 2021, arXiv 2104.09864).

    Attributes:
      frequencies: radians per token of each of the P pairs of a head.
      scale: factor of the rotated queries and keys, for yarn.
    """

    frequencies: tuple[float, ...]
    scale: float = 1.0


def read_rope(stored: Mapping[str, Any], theta: float, dims: int, max_positions: int) -> Rope:
    """Reads the rotary position embedding of a config.json.

    Types: linear (Chen et al. 2023, arXiv 2306.15595), llama3 (Grattafiori et al. 2024, arXiv 2407.21783) and yarn
    (Peng et al. 2023, arXiv 2309.00071).

    Args:
      stored: content of `rope_parameters` (transformers 5) or `rope_scaling` (before it).
      theta: base, unless `stored` has one.
      dims: K, numbers per head.
      max_positions: maximum number of positions in config.json.

    Returns:
      The frequencies and the scale.

    Raises:
      ValueError: the type is not supported, or a value is invalid.
    """
    kind = stored.get("rope_type") or stored.get("type") or "default"
    one_of("the RoPE scaling type", kind, ROPES)
    theta = field(stored, "rope_theta", float, theta)
    if not theta > 1:
        raise ValueError(f"rope_theta is {theta}; it must be above 1")
    if not 2 <= dims <= 4096 or dims % 2:
        raise ValueError(f"a head has {dims} numbers; they must be even, for rotary positions turn pairs, and to 4,096")
    if any(isinstance(value, dict) for value in stored.values()):
        raise ValueError("rope_parameters differ by layer; supported is one set for all, except in modernbert")
    if unknown := sorted(set(stored) - ROPE_SETTINGS):
        raise ValueError(f"RoPE scaling sets {', '.join(unknown)[:100]}, unknown here, which may change vectors")
    if field(stored, "partial_rotary_factor", float, 1.0) != 1:
        raise ValueError(f"partial_rotary_factor is {stored['partial_rotary_factor']}; supported is 1")
    # In float32, as in training: at position 10,000 the last digit of a frequency is 1e-3 radians.
    turns = np.float32(1) / np.float32(theta) ** (np.arange(0, dims, 2, dtype=np.float32) / np.float32(dims))
    scale = 1.0
    if kind != "default":
        factor = field(stored, "factor", float)
        if not factor >= 1:
            raise ValueError(f"the factor of RoPE scaling is {factor}; it must be at least 1")
        if kind == "linear":
            turns = turns / np.float32(factor)
        else:
            trained = field(stored, "original_max_position_embeddings", int, max_positions)
            if trained < 1:
                raise ValueError(f"original_max_position_embeddings is {trained}; it must be at least 1")
            if kind == "llama3":
                turns = _llama3(stored, turns, factor, trained)
            else:
                turns, scale = _yarn(stored, turns, factor, trained, theta)
    return Rope(tuple(turns.astype(np.float32).tolist()), float(scale))


def _llama3(
    stored: Mapping[str, Any], turns: Float32[np.ndarray, "P"], factor: float, trained: int
) -> Float[np.ndarray, "P"]:
    """Divides frequencies of long wavelengths by the factor, keeps those of short ones, and interpolates between."""
    low, high = (field(stored, name, float) for name in ("low_freq_factor", "high_freq_factor"))
    if not (low >= 1e-6 and high - low >= 1e-6):
        raise ValueError(f"low_freq_factor is {low} and high_freq_factor {high}; they must be above 0 and ascend")
    waves = trained * turns / (2 * math.pi)  # turns in the trained length
    kept = np.clip((waves - low) / (high - low), 0, 1)
    return (1 - kept) * turns / factor + kept * turns


def _yarn(
    stored: Mapping[str, Any], turns: Float32[np.ndarray, "P"], factor: float, trained: int, theta: float
) -> tuple[Float[np.ndarray, "P"], float]:
    """Keeps the frequencies of pairs with many turns in the trained length, stretches slow ones; linear in between."""
    dims = 2 * len(turns)

    def pair(rotations: float) -> float:
        """The pair, as a real number, that turns so often over the trained length."""
        if not 1e-6 <= rotations <= 1e6:
            raise ValueError(f"beta_fast or beta_slow is {rotations}; it must be from 1e-6 to 1e6")
        return dims * math.log(trained / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    first, last = pair(field(stored, "beta_fast", float, 32.0)), pair(field(stored, "beta_slow", float, 1.0))
    if field(stored, "truncate", bool, True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dims - 1)
    stretched = np.clip((np.arange(len(turns)) - first) / ((last - first) or 0.001), 0, 1)
    scale = field(stored, "attention_factor", float, None)
    if scale is None:
        several, all_dims = (field(stored, name, float, 0.0) for name in ("mscale", "mscale_all_dim"))
        both = several > 0 and all_dims > 0
        scale = _yarn_scale(factor, several) / _yarn_scale(factor, all_dims) if both else _yarn_scale(factor, 1.0)
    return turns / factor * stretched + turns * (1 - stretched), scale


def _yarn_scale(factor: float, weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1.0


def rotate(
    x: Float32[Array, "B L *H K"], frequencies: Float32[Array, "P"], scale: float | Float32[Array, ""]
) -> Float32[Array, "B L *H K"]:
    """Rotates the pair of numbers i and i + K/2 of each head by frequency times position.

    Args:
      x: float32 [B, L, *H, K], queries or keys.
      frequencies: float32 [P], radians per token.
      scale: factor of the result.

    Returns:
      The rotated array, float32 [B, L, *H, K].
    """
    angles = jnp.arange(x.shape[1], dtype=jnp.float32)[:, None] * frequencies[None]
    angles = angles.reshape(1, x.shape[1], *[1] * (x.ndim - 3), len(frequencies))
    cos, sin = jnp.cos(angles) * scale, jnp.sin(angles) * scale
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def attend(
    query: Float32[Array, "B L G R K"],
    key: Float32[Array, "B L G K"],
    value: Float32[Array, "B L G K"],
    mask: Bool[Array, "B L"],
    window: Int32[Array, ""],
    causal: bool,
) -> Float32[Array, "B L G R K"]:
    """Computes softmax attention within a window; queries of long texts are processed in blocks.

    Args:
      query: float32 [B, L, G, R, K].
      key: float32 [B, L, G, K].
      value: float32 [B, L, G, K].
      mask: bool [B, L], False = padding.
      window: int32 scalar; a token attends to tokens less than `window` positions away.
      causal: whether a token attends only to itself and earlier tokens.

    Returns:
      float32 [B, L, G, R, K]; values at padding are undefined.
    """
    length = query.shape[1]
    places = jnp.arange(length)

    def mix(block: Float32[Array, "B Q G R K"], at: Int32[Array, "Q"]) -> Float32[Array, "B Q G R K"]:
        behind = at[:, None] - places[None]
        seen = (abs(behind) < window) & (behind >= 0) if causal else abs(behind) < window
        seen = seen[None, None, None] & mask[:, None, None, None]
        scores = jnp.einsum("bqgrk,bsgk->bgrqs", block * block.shape[-1] ** -0.5, key, precision=PRECISION)
        scores = jnp.where(seen, scores, -1e9)
        weights = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
        mixed = jnp.einsum("bgrqs,bsgk->bgrqk", weights, value, precision=PRECISION)
        return jnp.moveaxis(mixed / weights.sum(axis=-1, keepdims=True), 3, 1)

    if length <= QUERY_BLOCK:
        return mix(query, places)
    blocks = -(-length // QUERY_BLOCK)
    spare = blocks * QUERY_BLOCK - length
    padded = jnp.pad(query, [(0, 0), (0, spare), (0, 0), (0, 0), (0, 0)])
    padded = jnp.moveaxis(padded.reshape(query.shape[0], blocks, QUERY_BLOCK, *query.shape[2:]), 1, 0)
    at = jnp.arange(blocks * QUERY_BLOCK).reshape(blocks, QUERY_BLOCK)
    mixed = jnp.moveaxis(jax.lax.map(lambda block: mix(*block), (padded, at)), 0, 1)
    return mixed.reshape(query.shape[0], -1, *query.shape[2:])[:, :length]
