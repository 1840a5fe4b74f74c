"""Registry of encoder families by the `model_type` of config.json: config readers, modules and weight conversion."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Bool, Float32, Int32

from fused_rec.text.encoders import bert, decoder, modernbert
from fused_rec.text.encoders.bert import BertConfig, BertEncoder
from fused_rec.text.encoders.decoder import Decoder, DecoderConfig
from fused_rec.text.encoders.layers import Params
from fused_rec.text.encoders.modernbert import ModernBert, ModernBertConfig
from fused_rec.text.encoders.packed import LANES, attends, pool_packed
from fused_rec.text.encoders.packed_decoder import hidden_states, packs_decoder
from fused_rec.text.encoders.pooling import Pooling, pool

EncoderConfig = BertConfig | DecoderConfig | ModernBertConfig
ENCODERS: dict[type, type[nn.Module]] = {
    BertConfig: BertEncoder,
    DecoderConfig: Decoder,
    ModernBertConfig: ModernBert,
}
STORED_DTYPES = ("float32", "bfloat16", "float16")  # supported dtypes of weights, which are kept
ALIGNMENT = 64  # bytes; on a CPU, JAX then uses these arrays without a copy
SLAB = 1 << 24  # bytes of a weight that are read at a time


@dataclasses.dataclass(frozen=True)
class Family:
    """Family of encoders with a common config format, module and checkpoint layout.

    Attributes:
      read: parses the content of config.json.
      names: checkpoint names by module path; {} is the layer.
      prefix: prefix of those names in checkpoints of larger models.
      unused: prefixes of weights that no text vector depends on, such as heads of other tasks.
      pooling: default pooling.
    """

    read: Callable[[Mapping[str, Any]], EncoderConfig]
    names: Mapping[str, str]
    prefix: str
    unused: tuple[str, ...]
    pooling: Pooling = "mean"


_BERT_HEADS = ("pooler.", "cls.", "lm_head.", "embeddings.position_ids")


def _decoder(read: Callable[[Mapping[str, Any]], EncoderConfig]) -> Family:
    """Builds the family of a decoder-only model."""
    return Family(read, decoder.DECODER_NAMES, "model.", ("lm_head.",), "lasttoken")


FAMILIES = {
    "bert": Family(bert.read_bert, bert.BERT_NAMES, "bert.", _BERT_HEADS),
    "distilbert": Family(bert.read_distilbert, bert.DISTILBERT_NAMES, "distilbert.", ("vocab_",)),
    "llama": _decoder(decoder.read_llama),
    "mistral": _decoder(decoder.read_mistral),
    "modernbert": Family(modernbert.read_modernbert, modernbert.MODERNBERT_NAMES, "model.", ("head.", "decoder.")),
    "mpnet": Family(bert.read_mpnet, bert.MPNET_NAMES, "mpnet.", _BERT_HEADS),
    "qwen2": _decoder(decoder.read_qwen2),
    "qwen3": _decoder(decoder.read_qwen3),
    "roberta": Family(bert.read_roberta, bert.BERT_NAMES, "roberta.", _BERT_HEADS),
    "xlm-roberta": Family(bert.read_roberta, bert.BERT_NAMES, "roberta.", _BERT_HEADS),
}


@runtime_checkable
class Weight(Protocol):
    """Array, or array on disk whose rows are read by indexing."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype: ...

    def __getitem__(self, rows: slice, /) -> np.ndarray: ...


def family(stored: Mapping[str, Any]) -> Family:
    """Looks up the family of a model.

    Args:
      stored: content of config.json.

    Returns:
      The family of its `model_type`.

    Raises:
      ValueError: the type is not supported; lists those that are.
    """
    kind = stored.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ValueError(f"model_type is {kind!r:.60}; supported are {', '.join(FAMILIES)}")
    return FAMILIES[kind]


def encoder(config: EncoderConfig) -> nn.Module:
    """Builds the module that maps token ids [B, L] and their mask [B, L] to hidden states [B, L, D]."""
    return ENCODERS[type(config)](config)  # pyright: ignore[reportCallIssue]


@functools.partial(jax.jit, static_argnames=("config", "pooling", "normalize"))
def apply_encoder(
    params: Params,
    input_ids: Int32[Array, "B L"],
    mask: Bool[Array, "B L"],
    config: EncoderConfig,
    pooling: Pooling,
    normalize: bool,
) -> Float32[Array, "B D"]:
    """Encodes a padded batch of token ids; compiled once per shape.

    Args:
      params: parameters of `encoder(config)`.
      input_ids: token ids, padded.
      mask: False for padding.
      config: config of the encoder.
      pooling: how token states become one vector.
      normalize: divides vectors by their L2 norm.

    Returns:
      One vector per text.
    """
    hidden: Any = encoder(config).apply({"params": params}, input_ids, mask)
    return pool(hidden, mask, pooling, normalize)


@functools.partial(jax.jit, static_argnames=("config", "pooling", "normalize"))
def apply_packed(
    params: Params,
    input_ids: Int32[Array, "N"],
    starts: Int32[Array, "S_plus_1"],
    config: EncoderConfig,
    pooling: Pooling,
    normalize: bool,
) -> Float32[Array, "S D"]:
    """Encodes texts that lie one after the other, where `packs` says so; compiled once per shape.

    Args:
      params: parameters of `encoder(config)`.
      input_ids: token ids of all texts, and padding after the last.
      starts: the first token of each text and the end of the last.
      config: config of the encoder.
      pooling: how token states become one vector.
      normalize: divides vectors by their L2 norm.

    Returns:
      One vector per text.
    """
    if isinstance(config, DecoderConfig):
        return pool_packed(hidden_states(params, input_ids, starts, config), starts, pooling, normalize)
    mask = jnp.arange(len(input_ids)) < starts[-1]
    hidden: Any = encoder(config).apply({"params": params}, input_ids[None], mask[None], starts)
    return pool_packed(hidden[0], starts, pooling, normalize)


def packs(config: EncoderConfig) -> bool:
    """Returns whether `apply_packed` encodes with this config on this machine."""
    if isinstance(config, DecoderConfig):
        return packs_decoder(config)
    of_family = isinstance(config, BertConfig) and not config.distance_buckets
    return (
        of_family and not config.intermediate_size % LANES and attends(config.num_attention_heads, config.hidden_size)
    )


def flops(config: EncoderConfig, lengths: Int32[np.ndarray, "T"]) -> Float32[np.ndarray, "T"]:
    """Counts the floating-point operations of encoding texts, without padding, norms and activations.

    Two per matrix entry and token, and four per pair of tokens, layer and attention dimension; windows and causal masks
    are not subtracted.

    Args:
      config: config of the encoder.
      lengths: tokens of each of T texts.

    Returns:
      Operations of each text.
    """
    shapes = _shapes(config)
    matrices = sum(math.prod(shape) for path, shape in shapes.items() if path[-1] == "kernel")
    width = config.num_attention_heads * (
        config.head_dim if isinstance(config, DecoderConfig) else config.hidden_size // config.num_attention_heads
    )
    tokens = lengths.astype(np.float32)
    return 2 * matrices * tokens + 4 * config.num_hidden_layers * width * tokens**2


def convert_weights(weights: Mapping[str, Weight], config: EncoderConfig, family: Family) -> Params:
    """Converts the weights of a checkpoint to parameters of `encoder(config)`, in their stored dtypes.

    Weights are copied some rows at a time, so that weights on disk are not in memory twice. Names may have the family's
    prefix and the old names of layer norms (gamma, beta). Where input and output embeddings are tied and only the
    output head is stored, it is used for both. Stacked layers of different dtypes become float32.

    Args:
      weights: weights by name.
      config: config of the encoder.
      family: family of the model.

    Returns:
      The parameters as nested dictionaries of NumPy arrays.

    Raises:
      ValueError: lists all weights that are missing, unexpected, or of another shape or an unsupported dtype.
    """
    named: dict[str, Weight] = {}
    for name, weight in weights.items():
        current = _current_name(name, family.prefix)
        if not current.startswith(family.unused) and not current.endswith("rotary_emb.inv_freq"):
            named[current] = weight
    if isinstance(config, DecoderConfig) and config.tied and "lm_head.weight" in weights:
        named.setdefault("embed_tokens.weight", weights["lm_head.weight"])
    problems: list[str] = []
    chosen: dict[tuple[str, ...], list[Weight]] = {}
    for path, shape in _shapes(config).items():
        stacked = path[0] == "layers"
        shape = shape[stacked:]
        shape = shape[::-1] if path[-1] == "kernel" else shape  # checkpoints store [out, in], Flax [in, out]
        chosen[path] = []
        for name in _stored_names(path, config, family):
            weight = named.pop(name, None)
            if weight is None:
                problems.append(f"{name} is missing")
            elif tuple(weight.shape) != shape:
                problems.append(f"{name} has shape {tuple(weight.shape)}, config.json asks for {shape}")
            elif weight.dtype.name not in STORED_DTYPES:
                problems.append(f"{name} is of {weight.dtype.name}; supported are {', '.join(STORED_DTYPES)}")
            else:
                chosen[path].append(weight)
    problems += [f"{name} is no weight of this encoder" for name in named]
    if problems:
        raise ValueError(
            f"{len(problems)} weight(s) do not fit the config: {'; '.join(problems)}. "
            "Take the weights and config.json from the same revision of one model"
        )
    return unflatten_dict({path: _stacked(path, layers) for path, layers in chosen.items()})


def _stacked(path: tuple[str, ...], layers: list[Weight]) -> np.ndarray:
    """Transposes and stacks the weights of one parameter."""
    dtype = layers[0].dtype if len({layer.dtype.name for layer in layers}) == 1 else np.dtype(np.float32)
    shape = layers[0].shape[::-1] if path[-1] == "kernel" else layers[0].shape
    stack = _aligned((len(layers), *shape), dtype)
    for target, layer in zip(stack, layers, strict=True):
        target = target.T if path[-1] == "kernel" else target
        rows = max(1, SLAB * layer.shape[0] // (math.prod(layer.shape) * layer.dtype.itemsize))
        for start in range(0, layer.shape[0], rows):
            target[start : start + rows] = layer[start : start + rows]
    return stack if path[0] == "layers" else stack[0]


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Allocates an array at an address that is a multiple of `ALIGNMENT`."""
    size = math.prod(shape) * dtype.itemsize
    buffer = np.empty(size + ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % ALIGNMENT
    return buffer[start : start + size].view(dtype).reshape(shape)


@functools.lru_cache(maxsize=16)
def _shapes(config: EncoderConfig) -> dict[tuple[str, ...], tuple[int, ...]]:
    """Returns the shapes of the encoder's parameters by path."""
    sample = jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), bool)
    variables: Any = jax.eval_shape(encoder(config).init, jax.random.key(0), *sample)
    shapes: Any = flatten_dict(jax.tree.map(lambda leaf: leaf.shape, variables["params"]))
    return shapes


def _stored_names(path: tuple[str, ...], config: EncoderConfig, family: Family) -> list[str]:
    """Returns the checkpoint names of a parameter, one per layer for stacked layers."""
    *modules, leaf = path
    module = family.names["/".join(modules)]
    suffix = ".bias" if leaf == "bias" else ".weight"
    if path[0] != "layers":
        return [module + suffix]
    first = int(isinstance(config, ModernBertConfig))  # layer 0 of ModernBERT is a separate module
    return [module.format(layer) + suffix for layer in range(first, config.num_hidden_layers)]


def _current_name(name: str, prefix: str) -> str:
    """Removes the prefix and renames old layer norms."""
    name = name.removeprefix(prefix)
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
