"""ModernBERT encoder (Warner et al., 2024, arXiv 2412.13663) in Flax: token ids to hidden states.

It uses pre-normalization, rotary positions and gated feed-forward layers. Some layers have full attention, the others
attention in a window around each token, with a rotary base of their own.

Dimensions: B texts, L tokens, D hidden size, H heads, K = D / H, N layers.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float32, Int32

from fused_rec.config import ComputeDtype
from fused_rec.text.encoders.config_fields import field, multiple, one_of, positive
from fused_rec.text.encoders.decoder import EVERYWHERE, layer_kinds, read_layers
from fused_rec.text.encoders.layers import (
    ACTIVATIONS,
    Dense,
    Embedding,
    Rope,
    attend,
    layer_norm,
    read_rope,
    rotate,
)

MODERNBERT_NAMES = {
    "word": "embeddings.tok_embeddings",
    "norm": "embeddings.norm",
    **{
        f"{where}/{ours}": f"layers.{layer}.{theirs}"
        for where, layer in (("first", "0"), ("layers", "{}"))
        for ours, theirs in (
            ("attention_norm", "attn_norm"),
            ("attention/query_key_value", "attn.Wqkv"),
            ("attention/output", "attn.Wo"),
            ("inner_norm", "mlp_norm"),
            ("up", "mlp.Wi"),
            ("down", "mlp.Wo"),
        )
    },
    "last_norm": "final_norm",
}
SUPPORTED_ACTIVATIONS = ("gelu", "gelu_new", "relu", "silu")
THETAS = {"full_attention": ("global_rope_theta", 160_000.0), "sliding_attention": ("local_rope_theta", 10_000.0)}


@dataclasses.dataclass(frozen=True)
class ModernBertConfig:
    """Architecture of a ModernBERT, under the names of its config.json.

    Raises ValueError for invalid values.

    Attributes:
      window: in sliding layers, a token attends to tokens less than `window` positions away on either side.
      is_sliding: of each layer, whether its attention is limited to the window.
      rope: rotary positions of layers with full attention.
      sliding_rope: rotary positions of sliding layers.
      compute_dtype: the type of the factors of matrix products; no setting of config.json.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    norm_eps: float
    hidden_activation: str
    window: int
    is_sliding: tuple[bool, ...]
    rope: Rope
    sliding_rope: Rope
    attention_bias: bool = False
    mlp_bias: bool = False
    norm_bias: bool = False
    compute_dtype: ComputeDtype = "float32"

    def __post_init__(self):
        positive(self, *(f.name for f in dataclasses.fields(self) if f.type is int))
        multiple(self, "hidden_size", of="num_attention_heads")
        one_of("hidden_activation", self.hidden_activation, SUPPORTED_ACTIVATIONS)

    @property
    def max_tokens(self) -> int:
        """Returns the maximum number of tokens of a text."""
        return self.max_position_embeddings


def read_modernbert(stored: Mapping[str, Any]) -> ModernBertConfig:
    """Reads a config.json of model_type modernbert; raises ValueError for unsupported settings."""
    layers = read_layers(stored)
    kinds = layer_kinds(stored, layers)
    if kinds is None:
        every = field(stored, "global_attn_every_n_layers", int, 3)
        if every < 1:
            raise ValueError(f"global_attn_every_n_layers is {every}; it must be at least 1")
        kinds = ["sliding_attention" if layer % every else "full_attention" for layer in range(layers)]
    names = ("vocab_size", "hidden_size", "num_attention_heads", "intermediate_size", "max_position_embeddings")
    sizes = {name: field(stored, name, int) for name in names}
    heads, window = sizes["num_attention_heads"], field(stored, "local_attention", int, 128)
    if heads < 1 or window < 0:
        raise ValueError(f"num_attention_heads is {heads} and local_attention {window}; at least 1 and 0 are due")
    side = field(stored, "sliding_window", int, window // 2)
    if side != window // 2:
        raise ValueError(f"sliding_window is {side} and local_attention {window}, of which it must be the half")
    ropes = field(stored, "rope_parameters", dict, {})
    rope, near_rope = (
        read_rope(
            field(ropes, kind, dict, {}),
            field(stored, name, float, default),
            sizes["hidden_size"] // heads,
            sizes["max_position_embeddings"],
        )
        for kind, (name, default) in THETAS.items()
    )
    if unknown := set(ropes) - set(THETAS):
        raise ValueError(f"rope_parameters has {sorted(unknown)}; supported are {', '.join(THETAS)}")
    if stored.get("rope_scaling"):
        raise ValueError(f"rope_scaling is {stored['rope_scaling']!r:.60}; supported is null")
    return ModernBertConfig(
        **sizes,
        num_hidden_layers=layers,
        norm_eps=field(stored, "norm_eps", float, 1e-5),
        hidden_activation=field(stored, "hidden_activation", str, "gelu"),
        window=window // 2 + 1,
        is_sliding=tuple(kind == "sliding_attention" for kind in kinds),
        rope=rope,
        sliding_rope=near_rope,
        **{name: field(stored, name, bool, False) for name in ("attention_bias", "mlp_bias", "norm_bias")},
    )


class WindowedAttention(nn.Module):
    """Attention of each token over its text, or over a window of it where `is_sliding`."""

    config: ModernBertConfig

    @nn.compact
    def __call__(
        self, x: Float32[Array, "B L D"], is_sliding: Bool[Array, ""], mask: Bool[Array, "B L"]
    ) -> Float32[Array, "B L D"]:
        config, heads = self.config, self.config.num_attention_heads
        batch, length, size = x.shape
        settings = config.attention_bias, config.compute_dtype
        stacked = Dense(3 * size, *settings, name="query_key_value")(x)
        query, key, value = jnp.moveaxis(stacked.reshape(batch, length, 3, heads, size // heads), 2, 0)
        turns = jnp.where(is_sliding, jnp.array(config.sliding_rope.frequencies), jnp.array(config.rope.frequencies))
        scale = jnp.where(is_sliding, config.sliding_rope.scale, config.rope.scale)
        query, key = rotate(query, turns, scale), rotate(key, turns, scale)
        reach = jnp.where(is_sliding, jnp.int32(config.window), jnp.int32(EVERYWHERE))
        mixed = attend(query[:, :, :, None], key, value, mask, reach, causal=False)
        return Dense(size, *settings, name="output")(mixed.reshape(batch, length, size))


class ModernBertLayer(nn.Module):
    """Transformer block with pre-normalization (the first block has none before attention) and a gated feed-forward."""

    config: ModernBertConfig
    first: bool = False

    @nn.compact
    def __call__(
        self, x: Float32[Array, "B L D"], is_sliding: Bool[Array, ""], mask: Bool[Array, "B L"]
    ) -> tuple[Float32[Array, "B L D"], None]:
        config = self.config
        y = x if self.first else layer_norm(config.norm_eps, "attention_norm", config.norm_bias)(x)
        x = x + WindowedAttention(config, name="attention")(y, is_sliding, mask)
        y = layer_norm(config.norm_eps, "inner_norm", config.norm_bias)(x)
        settings = config.mlp_bias, config.compute_dtype
        inner, gate = jnp.split(Dense(2 * config.intermediate_size, *settings, name="up")(y), 2, axis=-1)
        gated = ACTIVATIONS[config.hidden_activation](inner) * gate
        return x + Dense(config.hidden_size, *settings, name="down")(gated), None


class ModernBert(nn.Module):
    """Encoder: token ids and mask (False = padding, on either side) to the normalized hidden states of the last layer.

    Only distances between tokens matter, so padding does not change the results.
    """

    config: ModernBertConfig

    @nn.compact
    def __call__(self, input_ids: Int32[Array, "B L"], mask: Bool[Array, "B L"]) -> Float32[Array, "B L D"]:
        config = self.config
        x = Embedding(config.vocab_size, config.hidden_size, name="word")(input_ids)
        x = layer_norm(config.norm_eps, "norm", config.norm_bias)(x)
        near = jnp.array(config.is_sliding)
        x = ModernBertLayer(config, first=True, name="first")(x, near[0], mask)[0]
        if config.num_hidden_layers > 1:
            layers = nn.scan(
                ModernBertLayer,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=(0, nn.broadcast),  # pyright: ignore[reportArgumentType]
                length=config.num_hidden_layers - 1,
            )
            x = layers(config, name="layers")(x, near[1:], mask)[0]
        return layer_norm(config.norm_eps, "last_norm", config.norm_bias)(x)
