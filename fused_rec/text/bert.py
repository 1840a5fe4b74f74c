"""The BERT encoder (Devlin et al., 2019, arXiv 1810.04805) in Flax, in float32, from token ids to text vectors.

Dimensions: B texts, L tokens, D hidden size, H heads, K = D / H.
"""

import dataclasses
import functools
import typing
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Bool, Float32, Int32

Pooling = Literal["mean", "cls"]
Params = dict[str, Any]

ACTIVATIONS = {
    "gelu": functools.partial(nn.gelu, approximate=False),
    "gelu_new": functools.partial(nn.gelu, approximate=True),
    "relu": nn.relu,
}
# Where a published checkpoint keeps what the modules below call so; {} is the layer.
CHECKPOINT_NAMES = {
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
UNUSED_WEIGHTS = ("pooler.", "cls.", "embeddings.position_ids")

# Without this a GPU multiplies float32 in TF32 and a TPU in bfloat16, and vectors move by 1e-3.
PRECISION = jax.lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """The shape of a BERT encoder, under the names of its config.json. Raises ValueError on values that cannot be."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    type_vocab_size: int
    layer_norm_eps: float
    hidden_act: str

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if field.type is int and getattr(self, field.name) < 1:
                raise ValueError(f"{field.name} is {getattr(self, field.name)}; it must be at least 1")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} must be a multiple of num_attention_heads {self.num_attention_heads}"
            )
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act is {self.hidden_act!r}; supported are {', '.join(ACTIVATIONS)}")


class SelfAttention(nn.Module):
    """Multi-head attention of each token over its text. bias: 0 on tokens, a large negative number on padding."""

    config: BertConfig

    @nn.compact
    def __call__(self, x: Float32[Array, "B L D"], bias: Float32[Array, "B 1 1 L"]) -> Float32[Array, "B L D"]:
        heads = self.config.num_attention_heads
        batch, length, size = x.shape

        def project(name: str) -> Float32[Array, "B L H K"]:
            return _dense(size, name)(x).reshape(batch, length, heads, size // heads)

        query, key, value = project("query"), project("key"), project("value")
        scores = jnp.einsum("bqhk,bshk->bhqs", query * (size // heads) ** -0.5, key, precision=PRECISION) + bias
        # Dividing after the weighted sum, where there are K numbers a token instead of L.
        weights = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
        mixed = jnp.einsum("bhqs,bshk->bhqk", weights, value, precision=PRECISION)
        mixed = mixed / weights.sum(axis=-1, keepdims=True)
        return _dense(size, "output")(mixed.swapaxes(1, 2).reshape(batch, length, size))


class Layer(nn.Module):
    """One transformer block, normalised after each residual sum; a body for `nn.scan`, hence the second result."""

    config: BertConfig

    @nn.compact
    def __call__(
        self, x: Float32[Array, "B L D"], bias: Float32[Array, "B 1 1 L"]
    ) -> tuple[Float32[Array, "B L D"], None]:
        x = _layer_norm(self.config, "attention_norm")(x + SelfAttention(self.config, name="attention")(x, bias))
        inner = ACTIVATIONS[self.config.hidden_act](_dense(self.config.intermediate_size, "up")(x))
        return _layer_norm(self.config, "output_norm")(x + _dense(self.config.hidden_size, "down")(inner)), None


class BertEncoder(nn.Module):
    """Token ids and their mask (False = padding) to the last layer's hidden states.

    The layers are scanned over, their weights stacked on a first axis: XLA compiles one layer instead of all,
    in about a quarter of the time, and runs as fast.
    """

    config: BertConfig

    @nn.compact
    def __call__(self, input_ids: Int32[Array, "B L"], mask: Bool[Array, "B L"]) -> Float32[Array, "B L D"]:
        config = self.config
        embed = functools.partial(nn.Embed, features=config.hidden_size, dtype=jnp.float32)
        words = embed(config.vocab_size, name="word")(input_ids)
        positions = embed(config.max_position_embeddings, name="position")(jnp.arange(input_ids.shape[1])[None])
        segment = embed(config.type_vocab_size, name="segment")(jnp.zeros((1, 1), jnp.int32))
        x = _layer_norm(config, "norm")(words + positions + segment)
        bias = jnp.where(mask, 0.0, -1e9).astype(jnp.float32)[:, None, None, :]
        layers = nn.scan(
            Layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,  # pyright: ignore[reportArgumentType]
            length=config.num_hidden_layers,
        )
        return layers(config, name="layers")(x, bias)[0]


def pool(
    hidden: Float32[Array, "B L D"], mask: Bool[Array, "B L"], pooling: Pooling, normalize: bool
) -> Float32[Array, "B D"]:
    """One vector a text: the mean over its tokens or the first token's, divided by its length if `normalize`."""
    if pooling not in typing.get_args(Pooling):
        raise ValueError(f"pooling is {pooling!r}; supported are {', '.join(typing.get_args(Pooling))}")
    if pooling == "cls":
        vectors = hidden[:, 0]
    else:
        tokens = mask.astype(jnp.float32)
        sums = jnp.einsum("bld,bl->bd", hidden, tokens, precision=PRECISION)
        vectors = sums / jnp.maximum(tokens.sum(axis=1, keepdims=True), 1.0)
    if not normalize:
        return vectors
    return vectors / jnp.maximum(jnp.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


@functools.partial(jax.jit, static_argnames=("config", "pooling", "normalize"))
def encode(
    params: Params,
    input_ids: Int32[Array, "B L"],
    mask: Bool[Array, "B L"],
    config: BertConfig,
    pooling: Pooling,
    normalize: bool,
) -> Float32[Array, "B D"]:
    """Text vectors of a padded batch of token ids. Compiles once a shape."""
    hidden: Any = BertEncoder(config).apply({"params": params}, input_ids, mask)
    return pool(hidden, mask, pooling, normalize)


def convert_weights(weights: Mapping[str, np.ndarray], config: BertConfig) -> Params:
    """A published checkpoint's weights as the float32 parameters of `BertEncoder(config)`.

    Names may carry the prefix `bert.` and the old names of the layer norms (gamma, beta). The pooler, the
    pre-training heads and stored position ids are left out: no text vector depends on them. Raises ValueError
    that lists every missing, unexpected and misshapen weight.
    """
    named = {_current_name(name): value for name, value in weights.items()}
    named = {name: value for name, value in named.items() if not name.startswith(UNUSED_WEIGHTS)}
    sample = jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), bool)
    variables: Any = jax.eval_shape(BertEncoder(config).init, jax.random.key(0), *sample)
    expected: Any = flatten_dict(jax.tree.map(lambda leaf: leaf.shape, variables["params"]))

    problems: list[str] = []
    params = {}
    for path, shape in expected.items():
        *modules, leaf = path
        transposed = leaf == "kernel"  # a checkpoint's matrices are [out, in], Flax's are [in, out]
        stacked = path[0] == "layers"
        shape = shape[stacked:][::-1] if transposed else shape[stacked:]
        module = CHECKPOINT_NAMES["/".join(modules)]
        arrays = []
        for layer in range(config.num_hidden_layers if stacked else 1):
            name = module.format(layer) + (".bias" if leaf == "bias" else ".weight")
            array = named.pop(name, None)
            if array is None:
                problems.append(f"{name} is missing")
            elif array.shape != shape:
                problems.append(f"{name} has shape {array.shape}, config.json asks for {shape}")
            else:
                arrays.append(np.asarray(array.T if transposed else array, np.float32))
        if not problems:
            params[path] = np.stack(arrays) if stacked else arrays[0]
    problems += [f"{name} is no weight of this encoder" for name in named]
    if problems:
        raise ValueError(
            f"{len(problems)} weight(s) do not fit the config: {'; '.join(problems)}. "
            "Take the weights and config.json from the same revision of one model"
        )
    return unflatten_dict(params)


def _current_name(name: str) -> str:
    name = name.removeprefix("bert.")
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")


def _dense(features: int, name: str) -> nn.Dense:
    return nn.Dense(features, dtype=jnp.float32, precision=PRECISION, name=name)


def _layer_norm(config: BertConfig, name: str) -> nn.LayerNorm:
    return nn.LayerNorm(config.layer_norm_eps, dtype=jnp.float32, use_fast_variance=False, name=name)
