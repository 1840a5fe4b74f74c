"""The encoder families by the `model_type` of a published config.json: what reads it, what computes, what loads."""

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
from fused_rec.text.encoders.pooling import Pooling, pool

EncoderConfig = BertConfig | DecoderConfig | ModernBertConfig
ENCODERS: dict[type, type[nn.Module]] = {
    BertConfig: BertEncoder,
    DecoderConfig: Decoder,
    ModernBertConfig: ModernBert,
}
KEPT = ("float32", "bfloat16", "float16")  # dtypes in which weights stay as they are stored
ALIGNMENT = 64  # bytes; on a CPU, JAX then computes with these very arrays instead of a copy
SLAB = 1 << 24  # bytes of a weight that are read at once


@dataclasses.dataclass(frozen=True)
class Family:
    """Encoders that are read and computed in one way.

    read: config.json's content to a config. names: where a checkpoint keeps what a module calls so, {} the layer.
    prefix: before those names where the checkpoint holds more than the encoder. unused: how names of weights begin that
    no text vector depends on, heads of other tasks or numbers that the config tells. pooling: where the folder names
    none.
    """

    read: Callable[[Mapping[str, Any]], EncoderConfig]
    names: Mapping[str, str]
    prefix: str
    unused: tuple[str, ...]
    pooling: Pooling = "mean"


_BERT_HEADS = ("pooler.", "cls.", "lm_head.", "embeddings.position_ids")


def _decoder(read: Callable[[Mapping[str, Any]], EncoderConfig]) -> Family:
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
    """An array, or what reads the rows of one when they are asked for."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype: ...

    def __getitem__(self, rows: slice, /) -> np.ndarray: ...


def family(stored: Mapping[str, Any]) -> Family:
    """The family of a config.json. Raises ValueError that lists those supported."""
    kind = stored.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ValueError(f"model_type is {kind!r:.60}; supported are {', '.join(FAMILIES)}")
    return FAMILIES[kind]


def encoder(config: EncoderConfig) -> nn.Module:
    """The module that maps token ids [B, L] and their mask [B, L] to hidden states [B, L, D]."""
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
    """Text vectors of a padded batch of token ids. Compiles once a shape."""
    hidden: Any = encoder(config).apply({"params": params}, input_ids, mask)
    return pool(hidden, mask, pooling, normalize)


def flops(config: EncoderConfig, lengths: Int32[np.ndarray, "T"]) -> Float32[np.ndarray, "T"]:
    """Floating-point operations that texts of so many tokens ask for, padding and norms not counted.

    Two for each entry of a matrix and token, and four for each pair of tokens, layer and number of a head; windows and
    causality are not taken off.
    """
    shapes = _shapes(config)
    matrices = sum(math.prod(shape) for path, shape in shapes.items() if path[-1] == "kernel")
    width = config.num_attention_heads * (
        config.head_dim if isinstance(config, DecoderConfig) else config.hidden_size // config.num_attention_heads
    )
    tokens = lengths.astype(np.float32)
    return 2 * matrices * tokens + 4 * config.num_hidden_layers * width * tokens**2


def convert_weights(weights: Mapping[str, Weight], config: EncoderConfig, family: Family) -> Params:
    """A published checkpoint's weights as the parameters of `encoder(config)`, in the dtypes they are stored in.

    Some rows are asked for at a time, so that weights which are read when asked for are never there twice. Names may
    carry the family's prefix and the old names of layer norms (gamma, beta). A head that is tied to the words stands
    for them where only it was stored. A stack of layers of unlike dtypes becomes float32. Raises ValueError that lists
    every missing, unexpected, misshapen and otherwise typed weight.
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
        shape = shape[::-1] if path[-1] == "kernel" else shape  # a checkpoint's matrices are [out, in], ours [in, out]
        chosen[path] = []
        for name in _stored_names(path, config, family):
            weight = named.pop(name, None)
            if weight is None:
                problems.append(f"{name} is missing")
            elif tuple(weight.shape) != shape:
                problems.append(f"{name} has shape {tuple(weight.shape)}, config.json asks for {shape}")
            elif weight.dtype.name not in KEPT:
                problems.append(f"{name} is of {weight.dtype.name}; supported are {', '.join(KEPT)}")
            else:
                chosen[path].append(weight)
    problems += [f"{name} is no weight of this encoder" for name in named]
    if problems:
        raise ValueError(
            f"{len(problems)} weight(s) do not fit the config: {'; '.join(problems)}. "
            "Take the weights and config.json from the same revision of one model"
        )
    return unflatten_dict({path: _joined(path, parts) for path, parts in chosen.items()})


def _joined(path: tuple[str, ...], parts: list[Weight]) -> np.ndarray:
    """The weights of one parameter, turned and stacked as it asks for."""
    dtype = parts[0].dtype if len({part.dtype.name for part in parts}) == 1 else np.dtype(np.float32)
    shape = parts[0].shape[::-1] if path[-1] == "kernel" else parts[0].shape
    whole = _aligned((len(parts), *shape), dtype)
    for target, part in zip(whole, parts, strict=True):
        target = target.T if path[-1] == "kernel" else target
        rows = max(1, SLAB * part.shape[0] // (math.prod(part.shape) * part.dtype.itemsize))
        for start in range(0, part.shape[0], rows):
            target[start : start + rows] = part[start : start + rows]
    return whole if path[0] == "layers" else whole[0]


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    size = math.prod(shape) * dtype.itemsize
    buffer = np.empty(size + ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % ALIGNMENT
    return buffer[start : start + size].view(dtype).reshape(shape)


@functools.lru_cache(maxsize=16)
def _shapes(config: EncoderConfig) -> dict[tuple[str, ...], tuple[int, ...]]:
    sample = jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), bool)
    variables: Any = jax.eval_shape(encoder(config).init, jax.random.key(0), *sample)
    shapes: Any = flatten_dict(jax.tree.map(lambda leaf: leaf.shape, variables["params"]))
    return shapes


def _stored_names(path: tuple[str, ...], config: EncoderConfig, family: Family) -> list[str]:
    *modules, leaf = path
    module = family.names["/".join(modules)]
    suffix = ".bias" if leaf == "bias" else ".weight"
    if path[0] != "layers":
        return [module + suffix]
    first = int(isinstance(config, ModernBertConfig))  # whose layer 0 is a module of its own
    return [module.format(layer) + suffix for layer in range(first, config.num_hidden_layers)]


def _current_name(name: str, prefix: str) -> str:
    name = name.removeprefix(prefix)
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
