"""BERT encoder (Devlin et al., 2019, arXiv 1810.04805) and related models in Flax: token ids to hidden states.

RoBERTa (arXiv 1907.11692), XLM-R (1911.02116), DistilBERT (1910.01108) and MPNet (2004.09297) differ in the first
position, in segment embeddings, and in relative position biases; all apply post-layer normalization.

Dimensions: B texts, L tokens, D hidden size, H heads, K = D / H.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float32, Int32

from fused_rec.config import ComputeDtype
from fused_rec.text.encoders.config_fields import field, multiple, one_of, positive, require
from fused_rec.text.encoders.layers import ACTIVATIONS, PRECISION, Dense, Embedding, layer_norm
from fused_rec.text.encoders.packed import AddNorm, PackedDense, packed_attention

SUPPORTED_ACTIVATIONS = ("gelu", "gelu_new", "relu")
# Names in published checkpoints by names of the modules below; {} is the layer.
BERT_NAMES = {
    "word": "embeddings.word_embeddings",
    "position": "embeddings.position_embeddings",
    "segment": "embeddings.token_type_embeddings",
    "norm": "embeddings.LayerNorm",
    "layers/attention/query": "encoder.layer.{}.attention.self.query",
    "layers/attention/key": "encoder.layer.{}.attention.self.key",
    "layers/attention/value": "encoder.layer.{}.attention.self.value",
    "layers/attention/output": "encoder.layer.{}.attention.output.dense",
    "layers/attention_norm": "encoder.layer.{}.attention.output.LayerNorm",
    "layers/up": "encoder.layer.{}.intermediate.dense",
    "layers/down": "encoder.layer.{}.output.dense",
    "layers/output_norm": "encoder.layer.{}.output.LayerNorm",
}
DISTILBERT_NAMES = {
    "word": "embeddings.word_embeddings",
    "position": "embeddings.position_embeddings",
    "norm": "embeddings.LayerNorm",
    "layers/attention/query": "transformer.layer.{}.attention.q_lin",
    "layers/attention/key": "transformer.layer.{}.attention.k_lin",
    "layers/attention/value": "transformer.layer.{}.attention.v_lin",
    "layers/attention/output": "transformer.layer.{}.attention.out_lin",
    "layers/attention_norm": "transformer.layer.{}.sa_layer_norm",
    "layers/up": "transformer.layer.{}.ffn.lin1",
    "layers/down": "transformer.layer.{}.ffn.lin2",
    "layers/output_norm": "transformer.layer.{}.output_layer_norm",
}
MPNET_NAMES = BERT_NAMES | {
    "distance": "encoder.relative_attention_bias",
    "layers/attention/query": "encoder.layer.{}.attention.attn.q",
    "layers/attention/key": "encoder.layer.{}.attention.attn.k",
    "layers/attention/value": "encoder.layer.{}.attention.attn.v",
    "layers/attention/output": "encoder.layer.{}.attention.attn.o",
    "layers/attention_norm": "encoder.layer.{}.attention.LayerNorm",
}
MPNET_BUCKETS = 32
MPNET_FARTHEST = 128


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """Architecture of a BERT-like encoder, under the names of its config.json.

    Raises ValueError for invalid values.

    Attributes:
      type_vocab_size: number of segment embeddings; 0 for none.
      padding_token: id, if positions start after it, as in RoBERTa; None if they start at 0.
      distance_buckets: number of relative position buckets (MPNet); 0 for none.
      compute_dtype: the type of the factors of matrix products; no setting of config.json.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    type_vocab_size: int
    layer_norm_eps: float
    hidden_act: str
    padding_token: int | None = None
    distance_buckets: int = 0
    compute_dtype: ComputeDtype = "float32"

    def __post_init__(self):
        sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        positive(self, *sizes, "max_position_embeddings")
        multiple(self, "hidden_size", of="num_attention_heads")
        one_of("hidden_act", self.hidden_act, SUPPORTED_ACTIVATIONS)
        if self.type_vocab_size < 0:
            raise ValueError(f"type_vocab_size is {self.type_vocab_size}; it must be 0 or more")
        if self.padding_token is not None and not 0 <= self.padding_token < self.vocab_size:
            raise ValueError(f"pad_token_id is {self.padding_token}; it must be from 0 to {self.vocab_size - 1}")

    @property
    def max_tokens(self) -> int:
        """Returns the maximum number of tokens of a text."""
        first = 0 if self.padding_token is None else self.padding_token + 1
        return self.max_position_embeddings - first


def read_bert(stored: Mapping[str, Any]) -> BertConfig:
    """Reads a config.json of model_type bert; raises ValueError for unsupported settings."""
    return _read(stored, type_vocab_size=_segments(stored))


def read_roberta(stored: Mapping[str, Any]) -> BertConfig:
    """Reads a config.json of model_type roberta or xlm-roberta; raises ValueError for unsupported settings."""
    return _read(stored, type_vocab_size=_segments(stored), padding_token=field(stored, "pad_token_id", int, 1))


def read_distilbert(stored: Mapping[str, Any]) -> BertConfig:
    """Reads a config.json of model_type distilbert; raises ValueError for unsupported settings."""
    names = {
        "hidden_size": "dim",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "intermediate_size": "hidden_dim",
        "hidden_act": "activation",
    }
    return _read({**stored, **{ours: stored.get(name) for ours, name in names.items()}, "layer_norm_eps": 1e-12})


def read_mpnet(stored: Mapping[str, Any]) -> BertConfig:
    """Reads a config.json of model_type mpnet; raises ValueError for unsupported settings."""
    require(stored, relative_attention_num_buckets=MPNET_BUCKETS)
    return _read(stored, padding_token=1, distance_buckets=MPNET_BUCKETS)  # independent of pad_token_id


def _read(stored: Mapping[str, Any], *, type_vocab_size: int = 0, **more: Any) -> BertConfig:
    require(stored, position_embedding_type="absolute", is_decoder=False)
    given = {f.name: f.type for f in dataclasses.fields(BertConfig) if f.default is dataclasses.MISSING}
    del given["type_vocab_size"]
    values = {name: field(stored, name, kind) for name, kind in given.items() if isinstance(kind, type)}
    return BertConfig(**values, type_vocab_size=type_vocab_size, **more)


def _segments(stored: Mapping[str, Any]) -> int:
    count = field(stored, "type_vocab_size", int)
    if count < 1:
        raise ValueError(f"type_vocab_size is {count}; it must be at least 1")
    return count


class SelfAttention(nn.Module):
    """Multi-head attention over the tokens of a text; the bias is 0 for tokens and very negative for padding."""

    config: BertConfig

    @nn.compact
    def __call__(self, x: Float32[Array, "B L D"], bias: Float32[Array, "B #H #L L"]) -> Float32[Array, "B L D"]:
        heads, dtype = self.config.num_attention_heads, self.config.compute_dtype
        batch, length, size = x.shape
        query, key, value = (Dense(size, compute_dtype=dtype, name=name)(x) for name in ("query", "key", "value"))
        query, key, value = (part.reshape(batch, length, heads, size // heads) for part in (query, key, value))
        scores = jnp.einsum("bqhk,bshk->bhqs", query * (size // heads) ** -0.5, key, precision=PRECISION) + bias
        # Normalizes after the weighted sum: K numbers per token instead of L.
        weights = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
        mixed = jnp.einsum("bhqs,bshk->bhqk", weights, value, precision=PRECISION)
        mixed = mixed / weights.sum(axis=-1, keepdims=True)
        mixed = mixed.swapaxes(1, 2).reshape(batch, length, size)
        return Dense(size, compute_dtype=dtype, name="output")(mixed)


class Layer(nn.Module):
    """Transformer block with post-layer normalization; the second result is for `nn.scan`."""

    config: BertConfig

    @nn.compact
    def __call__(
        self, x: Float32[Array, "B L D"], bias: Float32[Array, "B #H #L L"]
    ) -> tuple[Float32[Array, "B L D"], None]:
        config, dtype = self.config, self.config.compute_dtype
        attended = SelfAttention(config, name="attention")(x, bias)
        x = layer_norm(config.layer_norm_eps, "attention_norm")(x + attended)
        inner = Dense(config.intermediate_size, compute_dtype=dtype, name="up")(x)
        outer = Dense(config.hidden_size, compute_dtype=dtype, name="down")(ACTIVATIONS[config.hidden_act](inner))
        return layer_norm(config.layer_norm_eps, "output_norm")(x + outer), None


class PackedSelfAttention(nn.Module):
    """`SelfAttention` over texts that lie one after the other."""

    config: BertConfig

    @nn.compact
    def __call__(self, x: Float32[Array, "N D"], starts: Int32[Array, "S_plus_1"]) -> Float32[Array, "N D"]:
        size, dtype = x.shape[1], self.config.compute_dtype
        query, key, value = (PackedDense(size, dtype, name=name)(x) for name in ("query", "key", "value"))
        mixed = packed_attention(query, key, value, starts, self.config.num_attention_heads)
        return PackedDense(size, dtype, name="output")(mixed)


class PackedLayer(nn.Module):
    """`Layer` over texts that lie one after the other, with the same parameters."""

    config: BertConfig

    @nn.compact
    def __call__(
        self, x: Float32[Array, "N D"], starts: Int32[Array, "S_plus_1"]
    ) -> tuple[Float32[Array, "N D"], None]:
        config, dtype = self.config, self.config.compute_dtype
        attended = PackedSelfAttention(config, name="attention")(x, starts)
        x = AddNorm(config.layer_norm_eps, name="attention_norm")(x, attended)
        inner = PackedDense(config.intermediate_size, dtype, config.hidden_act, name="up")(x)
        outer = PackedDense(config.hidden_size, dtype, name="down")(inner)
        return AddNorm(config.layer_norm_eps, name="output_norm")(x, outer), None


class BertEncoder(nn.Module):
    """Encoder: token ids and mask (False = padding, on either side) to the hidden states of the last layer.

    With `starts` all texts lie one after the other in one row, without padding between them. Positions count only the
    tokens of a text, so padding does not change them. The layers are scanned, with weights stacked on a leading axis:
    XLA compiles one layer instead of all, in about a quarter of the time, and runs equally fast.
    """

    config: BertConfig

    @nn.compact
    def __call__(
        self, input_ids: Int32[Array, "B L"], mask: Bool[Array, "B L"], starts: Int32[Array, "S_plus_1"] | None = None
    ) -> Float32[Array, "B L D"]:
        config = self.config
        x = Embedding(config.vocab_size, config.hidden_size, name="word")(input_ids)
        x = x + Embedding(config.max_position_embeddings, config.hidden_size, name="position")(
            _positions(input_ids, mask, config.padding_token, starts)
        )
        if config.type_vocab_size:
            segment = Embedding(config.type_vocab_size, config.hidden_size, name="segment")
            x = x + segment(jnp.zeros((1, 1), jnp.int32))
        x = layer_norm(config.layer_norm_eps, "norm")(x)
        bias = jnp.where(mask, 0.0, -1e9).astype(jnp.float32)[:, None, None, :]
        if config.distance_buckets:
            near = Embedding(config.distance_buckets, config.num_attention_heads, name="distance")
            bias = bias + jnp.moveaxis(near(jnp.asarray(_distance_buckets(x.shape[1]))), 2, 0)[None]
        layers = nn.scan(
            Layer if starts is None else PackedLayer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,  # pyright: ignore[reportArgumentType]
            length=config.num_hidden_layers,
        )
        if starts is None:
            return layers(config, name="layers")(x, bias)[0]
        return layers(config, name="layers")(x[0], starts)[0][None]


def _positions(
    input_ids: Int32[Array, "B L"],
    mask: Bool[Array, "B L"],
    padding_token: int | None,
    starts: Int32[Array, "S_plus_1"] | None,
) -> Int32[Array, "B L"]:
    """Returns the position of each token, from 0, or from `padding_token` + 1 where padding gets `padding_token`."""
    # A text may contain the padding token.
    counted = mask if padding_token is None else mask & (input_ids != padding_token)
    place = jnp.cumsum(counted, axis=1, dtype=jnp.int32)
    if starts is not None:
        before = jnp.concatenate([jnp.zeros((1, 1), jnp.int32), place], axis=1)[:, starts]
        place = place - before[:, jnp.searchsorted(starts, jnp.arange(place.shape[1]), side="right") - 1]
    if padding_token is None:
        return jnp.maximum(place - 1, 0)
    return jnp.where(counted, place, 0) + padding_token


def _distance_buckets(length: int) -> Int32[np.ndarray, "L L"]:
    """Returns the MPNet bucket of each distance of query and key: 8 exact ones per side, then 8 of growing width."""
    side, exact = MPNET_BUCKETS // 2, MPNET_BUCKETS // 4
    far = np.arange(length, dtype=np.float32)
    # In float32 and in this order, as in training: at 16, 32 and 64 the last digit determines the bucket.
    steps = np.log(np.maximum(far, exact) / np.float32(exact)) / np.float32(np.log(MPNET_FARTHEST / exact))
    wide = np.minimum(exact + (steps * np.float32(side - exact)).astype(np.int32), side - 1)
    classes = np.where(far < exact, far.astype(np.int32), wide)
    after = np.arange(length)[None] - np.arange(length)[:, None]
    return (classes[abs(after)] + side * (after > 0)).astype(np.int32)
