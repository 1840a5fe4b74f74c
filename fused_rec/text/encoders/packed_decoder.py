"""`Decoder` over texts that lie one after the other, with the same parameters, on a CPU; there is no derivative.

Kernels attend, normalize and gate. Where the processor has tile registers (AMX) they multiply too: a float32 factor is
then the sum of three of bfloat16, which keeps float32's precision. Elsewhere XLA multiplies.

Dimensions: N tokens, S texts, D hidden size, F features, K numbers per head, P parts of a factor, Y layers.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32

from fused_rec import kernels
from fused_rec.text.encoders.decoder import DecoderConfig
from fused_rec.text.encoders.layers import Params, product, widened
from fused_rec.text.encoders.packed import LANES, TILE, Reach, attends, packed_attention


def packs_decoder(config: DecoderConfig) -> bool:
    """Returns whether `hidden_states` has the kernels for a model of these sizes."""
    sizes = config.hidden_size, config.intermediate_size
    return not any(size % LANES for size in sizes) and attends(1, config.head_dim)


def hidden_states(
    params: Params, input_ids: Int32[Array, "N"], starts: Int32[Array, "S_plus_1"], config: DecoderConfig
) -> Float32[Array, "N D"]:
    """Computes the normalized hidden states of the last layer.

    Args:
      params: parameters of `Decoder(config)`.
      input_ids: token ids of all texts, and padding after the last.
      starts: the first token of each text and the end of the last.
      config: config of the decoder.

    Returns:
      float32 [N, D]; values at padding are undefined.
    """
    count = len(input_ids)
    input_ids = jnp.pad(input_ids, (0, -count % TILE))
    layers, turns = params["layers"], _turns(len(input_ids), starts, config)

    def step(carry: tuple[Array, Array], at: tuple[Array, Array]) -> tuple[tuple[Array, Array], None]:
        (x, added), (layer, _) = carry, at
        x, y = _add_norm(x, added, layers["attention_norm"], layer, config)
        mixed = _attention(y, layers["attention"], at, starts, turns, config)
        x, y = _add_norm(x, mixed, layers["inner_norm"], layer, config)
        return (x, _dense(_gated(y, layers, layer, config), layers["down"], layer, config)), None

    x = widened(jnp.asarray(params["word"]["embedding"])[input_ids])
    places = jnp.arange(config.num_hidden_layers, dtype=jnp.int32)
    (x, added), _ = jax.lax.scan(step, (x, jnp.zeros_like(x)), (places, jnp.array(config.windows, jnp.int32)))
    result = jax.ShapeDtypeStruct(x.shape, jnp.float32)
    return _normalized(x, added, widened(jnp.asarray(params["norm"]["scale"])), config.rms_norm_eps, result)[1][:count]


def _parts(config: DecoderConfig) -> int:
    """Returns of how many parts in bfloat16 a factor consists that tile registers multiply; 0 where XLA multiplies."""
    heads = config.num_attention_heads, config.num_key_value_heads
    sizes = config.hidden_size, config.intermediate_size, *(count * config.head_dim for count in heads)
    if not kernels.has_tiles() or any(size % TILE for size in sizes):
        return 0
    return 3 if config.compute_dtype == "float32" else 1


def _factor(rows: int, size: int, config: DecoderConfig) -> jax.ShapeDtypeStruct:
    """Returns the shape and type in which products read a matrix."""
    if parts := _parts(config):
        return jax.ShapeDtypeStruct((parts, rows, size), jnp.bfloat16)
    return jax.ShapeDtypeStruct((rows, size), config.compute_dtype)


def _of_layer(weights: Any, layer: Int32[Array, ""]) -> Float32[Array, "..."]:
    """Returns the weights of a layer, of those of all layers."""
    return widened(jax.lax.dynamic_index_in_dim(jnp.asarray(weights), layer, keepdims=False))


def _turns(count: int, starts: Int32[Array, "S_plus_1"], config: DecoderConfig) -> Float32[Array, "N K"]:
    """Returns the cosines, then the sines of the angles by which pairs of numbers are rotated at each token."""
    tokens = jnp.arange(count, dtype=jnp.int32)
    place = tokens - starts[jnp.searchsorted(starts, tokens, side="right") - 1]
    frequencies = jnp.array(config.rope.frequencies, jnp.float32)
    angles = place.astype(jnp.float32)[:, None] * frequencies[None]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=1) * config.rope.scale


def _normalized(
    x: Float32[Array, "N D"],
    added: Float32[Array, "..."],
    scale: Float32[Array, "D"],
    epsilon: float,
    result: jax.ShapeDtypeStruct,
) -> tuple[Float32[Array, "N D"], Float[Array, "..."]]:
    """Returns x + added, and its RMS normalization in the type of the result; nothing is added where that is empty."""
    results = jax.ShapeDtypeStruct(x.shape, jnp.float32), result
    call = jax.ffi.ffi_call(kernels.ADD_RMS_NORM, results, input_output_aliases={0: 0})
    total, y = call(x, added, scale, epsilon=np.float32(epsilon))
    return total, y


def _add_norm(
    x: Float32[Array, "N D"],
    added: Float32[Array, "N D"],
    weights: Params,
    layer: Int32[Array, ""],
    config: DecoderConfig,
) -> tuple[Float32[Array, "N D"], Float[Array, "..."]]:
    """Returns x + added, and its normalization as a factor."""
    scale = _of_layer(weights["scale"], layer)
    return _normalized(x, added, scale, config.rms_norm_eps, _factor(x.shape[0], x.shape[1], config))


def _kernel_and_bias(weights: Params, layer: Int32[Array, ""]) -> tuple[Array, Float32[Array, "..."], Int32[Array, ""]]:
    """Returns stacked kernels as the tile kernels take them, the bias of the layer, and where its kernel lies."""
    stacked = jnp.asarray(weights["kernel"])
    bias = _of_layer(weights["bias"], layer) if "bias" in weights else jnp.zeros(0)
    if stacked.dtype == jnp.float16:
        return _of_layer(stacked, layer)[None], bias, jnp.int32(0)
    return stacked, bias, layer


def _dense(
    x: Float[Array, "..."], weights: Params, layer: Int32[Array, ""], config: DecoderConfig
) -> Float32[Array, "N F"]:
    """Multiplies a factor by the kernel of a layer and adds its bias, if there is one."""
    if not _parts(config):
        kernel = jax.lax.dynamic_index_in_dim(jnp.asarray(weights["kernel"]), layer, keepdims=False)
        y = product(x, kernel, config.compute_dtype)
        return y + _of_layer(weights["bias"], layer)[None] if "bias" in weights else y
    kernel, bias, place = _kernel_and_bias(weights, layer)
    result = jax.ShapeDtypeStruct((x.shape[1], kernel.shape[2]), jnp.float32)
    return jax.ffi.ffi_call(kernels.DENSE, result)(x, kernel, bias, place)


def _gated(
    x: Float[Array, "..."], layers: Params, layer: Int32[Array, ""], config: DecoderConfig
) -> Float[Array, "..."]:
    """Computes SwiGLU (Shazeer, 2020, arXiv 2002.05202), silu(x gate) * (x up), as a factor."""
    result = _factor(x.shape[-2], config.intermediate_size, config)
    if not _parts(config):
        gate, up = (_dense(x, layers[name], layer, config) for name in ("gate", "up"))
        return jax.ffi.ffi_call(kernels.GATE_UP, result)(gate, up)
    (gate, gate_bias, place), (up, up_bias, _) = (_kernel_and_bias(layers[name], layer) for name in ("gate", "up"))
    return jax.ffi.ffi_call(kernels.GATED, result)(x, gate, gate_bias, up, up_bias, place)


def _attention(
    x: Float[Array, "..."],
    weights: Params,
    at: tuple[Int32[Array, ""], Int32[Array, ""]],
    starts: Int32[Array, "S_plus_1"],
    turns: Float32[Array, "N K"],
    config: DecoderConfig,
) -> Float32[Array, "N D"]:
    """Computes grouped-query attention; `at` is the layer and its window."""
    layer, window = at

    def heads(name: str) -> Float32[Array, "N F"]:
        y = _dense(x, weights[name], layer, config)
        if not config.head_norms or name == "value":
            return y
        scale, rows = _of_layer(weights[f"{name}_norm"]["scale"], layer), y.reshape(-1, config.head_dim)
        result = jax.ShapeDtypeStruct(rows.shape, jnp.float32)
        return _normalized(rows, jnp.zeros(0), scale, config.rms_norm_eps, result)[1].reshape(y.shape)

    query, key, value = (heads(name) for name in ("query", "key", "value"))
    reach = Reach(window, turns, config.causal, _parts(config) == 1)
    result = _factor(query.shape[0], query.shape[1], config)
    mixed = packed_attention(query, key, value, starts, config.num_attention_heads, reach, result)
    return _dense(mixed, weights["output"], layer, config)
