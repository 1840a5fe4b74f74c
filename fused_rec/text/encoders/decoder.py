"""Decoders Llama, Mistral, Qwen2 and Qwen3 in Flax, as text encoders: token ids to hidden states.

Llama: Touvron et al. 2023, arXiv 2302.13971; Mistral: Jiang et al. 2023, 2310.06825; Qwen2: Yang et al. 2024,
2407.10671; Qwen3: Yang et al. 2025, 2505.09388. All use RMS pre-normalization, rotary positions, grouped-query
attention and a gated feed-forward layer; they differ in biases, windows and the normalization of queries and keys. The
head for next-token prediction is left out, since text vectors do not depend on it.

Dimensions: B texts, L tokens, D hidden size, G key heads, R query heads per key head, K numbers per head, N layers.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float32, Int32

from fused_rec.config import ComputeDtype
from fused_rec.text.encoders.config_fields import LARGEST, field, multiple, positive, require
from fused_rec.text.encoders.layers import Dense, Embedding, Rope, attend, read_rope, rms_norm, rotate

DECODER_NAMES = {
    "word": "embed_tokens",
    "layers/attention_norm": "layers.{}.input_layernorm",
    "layers/attention/query": "layers.{}.self_attn.q_proj",
    "layers/attention/key": "layers.{}.self_attn.k_proj",
    "layers/attention/value": "layers.{}.self_attn.v_proj",
    "layers/attention/output": "layers.{}.self_attn.o_proj",
    "layers/attention/query_norm": "layers.{}.self_attn.q_norm",
    "layers/attention/key_norm": "layers.{}.self_attn.k_norm",
    "layers/inner_norm": "layers.{}.post_attention_layernorm",
    "layers/gate": "layers.{}.mlp.gate_proj",
    "layers/up": "layers.{}.mlp.up_proj",
    "layers/down": "layers.{}.mlp.down_proj",
    "norm": "norm",
}
EVERYWHERE = LARGEST  # window of layers with full attention


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Architecture of a decoder, under the names of its config.json.

    Raises ValueError for invalid values.

    Attributes:
      windows: of each layer; a token attends to tokens less than this number of positions before it.
      qkv_bias: whether the projections to queries, keys and values have a bias.
      output_bias: whether the output projection of attention has a bias.
      inner_bias: whether the feed-forward layer has biases.
      head_norms: whether queries and keys are normalized.
      tied: whether the prediction head shares the token embeddings.
      causal: whether a token attends only to itself and earlier tokens.
      compute_dtype: the type of the factors of matrix products; no setting of config.json.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: Rope
    windows: tuple[int, ...]
    qkv_bias: bool = False
    output_bias: bool = False
    inner_bias: bool = False
    head_norms: bool = False
    tied: bool = False
    causal: bool = True
    compute_dtype: ComputeDtype = "float32"

    def __post_init__(self):
        sizes = (f.name for f in dataclasses.fields(self) if f.type is int)
        positive(self, *sizes)
        multiple(self, "num_attention_heads", of="num_key_value_heads")

    @property
    def max_tokens(self) -> int:
        """Returns the maximum number of tokens of a text."""
        return self.max_position_embeddings


def read_llama(stored: Mapping[str, Any]) -> DecoderConfig:
    """Reads a config.json of model_type llama; raises ValueError for unsupported settings."""
    bias = field(stored, "attention_bias", bool, False)
    inner = field(stored, "mlp_bias", bool, False)
    return _read(stored, _everywhere(stored), qkv_bias=bias, output_bias=bias, inner_bias=inner)


def read_mistral(stored: Mapping[str, Any]) -> DecoderConfig:
    """Reads a config.json of model_type mistral; raises ValueError for unsupported settings."""
    window = field({"sliding_window": 4096, **stored}, "sliding_window", int, EVERYWHERE)  # null: no window
    return _read(stored, (window,) * len(_everywhere(stored)))


def read_qwen2(stored: Mapping[str, Any]) -> DecoderConfig:
    """Reads a config.json of model_type qwen2; raises ValueError for unsupported settings."""
    return _read(stored, _qwen_windows(stored), qkv_bias=True)


def read_qwen3(stored: Mapping[str, Any]) -> DecoderConfig:
    """Reads a config.json of model_type qwen3; raises ValueError for unsupported settings."""
    bias = field(stored, "attention_bias", bool, False)
    head_dim = field(stored, "head_dim", int, 128)
    return _read(
        {**stored, "head_dim": head_dim}, _qwen_windows(stored), qkv_bias=bias, output_bias=bias, head_norms=True
    )


def layer_kinds(stored: Mapping[str, Any], layers: int) -> list[str] | None:
    """Reads the kind of each layer, sliding_attention or full_attention, from `layer_types`; None without that key."""
    kinds = stored.get("layer_types")
    if kinds is None:
        return None
    known = ("full_attention", "sliding_attention")
    if not isinstance(kinds, list) or len(kinds) < layers or any(kind not in known for kind in kinds):
        raise ValueError(f"layer_types is {kinds!r:.60}; it must name {' or '.join(known)} for each layer")
    return kinds[:layers]


def read_layers(stored: Mapping[str, Any]) -> int:
    """Reads the number of layers, before any are allocated."""
    layers = field(stored, "num_hidden_layers", int)
    if not 1 <= layers <= 1024:
        raise ValueError(f"num_hidden_layers is {layers}; it must be from 1 to 1,024")
    return layers


def rope_settings(stored: Mapping[str, Any]) -> Mapping[str, Any]:
    """Reads `rope_parameters` (transformers 5) or `rope_scaling` (before it).

    Args:
      stored: content of config.json.

    Returns:
      The content of the key.

    Raises:
      ValueError: both keys exist and differ, or the trained length outside of them differs.
    """
    new, old = (field(stored, name, dict, {}) for name in ("rope_parameters", "rope_scaling"))
    if new and old and new != old:
        raise ValueError(f"rope_parameters is {new!r:.60} and rope_scaling {old!r:.60}; remove one of them")
    ropes, name = new or old, "original_max_position_embeddings"
    if stored.get(name) is not None and ropes.get("rope_type", ropes.get("type")) in ("llama3", "yarn"):
        if ropes.get(name) != stored[name]:
            raise ValueError(
                f"{name} is {stored[name]!r:.60} outside of RoPE scaling, and within {ropes.get(name)!r:.60}"
            )
    return ropes


def _everywhere(stored: Mapping[str, Any]) -> tuple[int, ...]:
    layers = read_layers(stored)
    if layer_kinds(stored, layers) is not None:
        raise ValueError("layer_types is set, which this model_type does not know; supported is null")
    return (EVERYWHERE,) * layers


def _qwen_windows(stored: Mapping[str, Any]) -> tuple[int, ...]:
    layers = read_layers(stored)
    window = field(stored, "sliding_window", int, 4096) if field(stored, "use_sliding_window", bool, False) else None
    kinds = layer_kinds(stored, layers)
    if kinds is None:
        first = field(stored, "max_window_layers", int, 28)
        kinds = ["sliding_attention" if layer >= first else "full_attention" for layer in range(layers)]
    return tuple(window if window is not None and kind == "sliding_attention" else EVERYWHERE for kind in kinds)


def _read(stored: Mapping[str, Any], windows: tuple[int, ...], **more: Any) -> DecoderConfig:
    require(stored, hidden_act="silu")
    if min(windows) < 1:
        raise ValueError(f"sliding_window is {min(windows)}; it must be at least 1")
    sizes = {
        name: field(stored, name, int)
        for name in ("vocab_size", "hidden_size", "num_attention_heads", "intermediate_size", "max_position_embeddings")
    }
    heads = sizes["num_attention_heads"]
    if heads < 1:
        raise ValueError(f"num_attention_heads is {heads}; it must be at least 1")
    dims = field(stored, "head_dim", int, None)
    if dims is None:
        dims, rest = divmod(sizes["hidden_size"], heads)
        if rest:
            raise ValueError(f"hidden_size {sizes['hidden_size']} must be a multiple of num_attention_heads {heads}")
    causal = field(stored, "is_causal", bool, True)
    if not causal:  # the window then extends to both sides, as in the original
        windows = tuple(min(reach + 1, EVERYWHERE) for reach in windows)
    return DecoderConfig(
        **sizes,
        num_hidden_layers=len(windows),
        num_key_value_heads=field(stored, "num_key_value_heads", int, heads),
        head_dim=dims,
        rms_norm_eps=field(stored, "rms_norm_eps", float, 1e-6),
        rope=read_rope(
            rope_settings(stored), field(stored, "rope_theta", float, 10_000.0), dims, sizes["max_position_embeddings"]
        ),
        windows=windows,
        tied=field(stored, "tie_word_embeddings", bool, False),
        causal=causal,
        **more,
    )


class GroupedAttention(nn.Module):
    """Grouped-query attention: groups of query heads share a key and value head."""

    config: DecoderConfig

    @nn.compact
    def __call__(
        self, x: Float32[Array, "B L D"], window: Int32[Array, ""], mask: Bool[Array, "B L"]
    ) -> Float32[Array, "B L D"]:
        config, dims, groups = self.config, self.config.head_dim, self.config.num_key_value_heads
        batch, length, size = x.shape
        turns = jnp.array(config.rope.frequencies, jnp.float32)

        def heads(name: str, *shape: int) -> Float32[Array, "B L *H K"]:
            dense = Dense(int(np.prod(shape)) * dims, config.qkv_bias, config.compute_dtype, name=name)
            return dense(x).reshape(batch, length, *shape, dims)

        def turned(name: str, *shape: int) -> Float32[Array, "B L *H K"]:
            projected = heads(name, *shape)
            if config.head_norms:
                projected = rms_norm(config.rms_norm_eps, f"{name}_norm")(projected)
            return rotate(projected, turns, config.rope.scale)

        query = turned("query", groups, config.num_attention_heads // groups)
        mixed = attend(query, turned("key", groups), heads("value", groups), mask, window, config.causal)
        return Dense(size, config.output_bias, config.compute_dtype, name="output")(mixed.reshape(batch, length, -1))


class DecoderLayer(nn.Module):
    """Transformer block with pre-normalization and a gated feed-forward layer; a body for `nn.scan`."""

    config: DecoderConfig

    @nn.compact
    def __call__(
        self, x: Float32[Array, "B L D"], window: Int32[Array, ""], mask: Bool[Array, "B L"]
    ) -> tuple[Float32[Array, "B L D"], None]:
        config = self.config
        x = x + GroupedAttention(config, name="attention")(
            rms_norm(config.rms_norm_eps, "attention_norm")(x), window, mask
        )
        y = rms_norm(config.rms_norm_eps, "inner_norm")(x)
        settings = config.inner_bias, config.compute_dtype
        gate = Dense(config.intermediate_size, *settings, name="gate")(y)
        up = Dense(config.intermediate_size, *settings, name="up")(y)
        return x + Dense(config.hidden_size, *settings, name="down")(nn.silu(gate) * up), None


class Decoder(nn.Module):
    """Decoder: token ids and mask (False = padding, on either side) to the normalized hidden states of the last layer.

    Only distances between tokens matter, so padding does not change the results.
    """

    config: DecoderConfig

    @nn.compact
    def __call__(self, input_ids: Int32[Array, "B L"], mask: Bool[Array, "B L"]) -> Float32[Array, "B L D"]:
        config = self.config
        x = Embedding(config.vocab_size, config.hidden_size, name="word")(input_ids)
        layers = nn.scan(
            DecoderLayer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast),  # pyright: ignore[reportArgumentType]
            length=config.num_hidden_layers,
        )
        x = layers(config, name="layers")(x, jnp.array(config.windows, jnp.int32), mask)[0]
        return rms_norm(config.rms_norm_eps, "norm")(x)
