"""Fine-tuning of the text encoder with the graph model: which texts a step encodes, and how cached embeddings enter.

A node's text embedding is the weighted mean of its texts' embeddings, whitened and of unit length
(`fused_rec.graph.build`). A step samples some texts of its batch's users and items, encodes them with gradient, and
moves the rows of their nodes by the change against the cache; everything else in those rows, and all other rows, comes
from embeddings cached at the last evaluation. Whitening, text-kNN edges and TF-IDF stay those of the pretrained model.

A state's params have one more entry, `ENCODER`: LoRA adapters, or all weights with full fine-tuning. With adapters the
pretrained weights are in no state and no checkpoint.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, no_type_check

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float32, Int32, Int64, PyTree

from fused_rec.config import Config, TextConfig
from fused_rec.data.batches import Batch
from fused_rec.data.node_texts import NodeTexts
from fused_rec.distributed.devices import (
    AXIS,
    AnyArray,
    PmappedFn,
    device_put,
    local_indices,
    pmap_over_devices,
    select_devices,
)
from fused_rec.graph.build import Whitening, node_means, whitened, whitening
from fused_rec.graph.schema import ITEM, USER
from fused_rec.model.losses import unit
from fused_rec.rng import Stream, numpy_rng
from fused_rec.text.encode import encode_texts, token_ids
from fused_rec.text.encoders.lora import init_trainable, with_adapters
from fused_rec.text.encoders.registry import apply_encoder
from fused_rec.text.pretrained import PretrainedModel, open_model
from fused_rec.text.tfidf import rms_norm
from fused_rec.training.sharding import compile_key, graph_inputs_axes, shard_batch, tree_of_structure
from fused_rec.training.train_step import GraphInputs, TrainState, make_optimizer, sharding_axes, train_step

ENCODER = "encoder"
LENGTH_BUCKETS = 3  # a step's texts are from one length bucket, so that padding is small; one program per bucket
LENGTH_MULTIPLE = 8  # padded lengths are multiples of it
DECAY = 0.01  # decoupled weight decay of the encoder's matrices, as in the training of BERT


@dataclasses.dataclass(frozen=True, eq=False)
class EncoderData:
    """The texts of a graph and the pretrained encoder, ready for encoding.

    Attributes:
      model: the pretrained encoder.
      texts: texts and their links to nodes.
      vectors: float32 [T, H], embeddings by the pretrained encoder.
      tfidf: float32 [T, L], the TF-IDF columns of the nodes' embeddings.
      scale: divisor of the encoder's embeddings where TF-IDF columns are appended, else 1.
      whitening: the transform of each node type, None where fewer than two nodes have text.
      tokens: token IDs of each text.
      bucket_length: int64 [C], the padded length of each bucket, in tokens.
      bucket_of_text: int64 [T], the bucket of each text.
    """

    model: PretrainedModel
    texts: NodeTexts
    vectors: Float32[np.ndarray, "T H"]
    tfidf: Float32[np.ndarray, "T L"]
    scale: np.float32
    whitening: Mapping[str, Whitening | None]
    tokens: list[Int32[np.ndarray, "_"]]
    bucket_length: Int64[np.ndarray, "C"]
    bucket_of_text: Int64[np.ndarray, "T"]

    def texts_of(self, node_type: str) -> "NodeTextLinks":
        """Returns the links of one node type, ascending by node."""
        side = {USER: "user", ITEM: "item"}[node_type]
        return NodeTextLinks(*(getattr(self.texts, f"{side}_{name}") for name in ("rows", "texts", "weights")))

    @functools.cached_property
    def order_by_text(self) -> dict[str, np.ndarray]:
        """The permutation of each node type's links that sorts them by text."""
        return {node_type: np.argsort(self.texts_of(node_type).texts, kind="stable") for node_type in self.whitening}


class NodeTextLinks(NamedTuple):
    """Weighted links between the nodes of one type and their texts."""

    nodes: Int32[np.ndarray, "K"]
    texts: Int32[np.ndarray, "K"]
    weights: Float32[np.ndarray, "K"]


class TextCache(NamedTuple):
    """Embeddings of all texts and nodes by one state of the encoder.

    Attributes:
      encoder_data: texts and pretrained encoder.
      encoder_params: that state, adapters or all weights.
      graph_inputs: with these text embeddings.
      norms: norm of each node's whitened mean before normalization, by node type.
      vectors: float32 [T, H], embeddings of the texts.
    """

    encoder_data: EncoderData
    encoder_params: PyTree
    graph_inputs: GraphInputs
    norms: Mapping[str, Float32[np.ndarray, "n"]]
    vectors: Float32[np.ndarray, "T H"]


@no_type_check  # as of `Adjacency`
@flax.struct.dataclass
class NodeUpdates:
    """The rows of one node type that a step's texts change; padded with nodes of -1 and weights of 0."""

    nodes: Int32[AnyArray, "M"]
    norms: Float32[AnyArray, "M"]
    texts: Int32[AnyArray, "K"]  # indices into the step's texts
    places: Int32[AnyArray, "K"]  # indices into `nodes`
    weights: Float32[AnyArray, "K"]


@no_type_check  # as of `Adjacency`
@flax.struct.dataclass
class TextBatch:
    """The texts that a step encodes, on P devices in chunks of C; padding changes no node.

    Attributes:
      ids: token IDs.
      mask: True for tokens, False for padding.
      cached_vectors: the texts' embeddings in the cache.
      node_updates: the rows to change, by node type.
    """

    ids: Int32[AnyArray, "P chunks C L"]
    mask: Bool[AnyArray, "P chunks C L"]
    cached_vectors: Float32[AnyArray, "P chunks C H"]
    node_updates: Mapping[str, NodeUpdates]


def encoder_data(
    config: TextConfig, texts: NodeTexts, vectors: Float32[np.ndarray, "T D"], counts: Mapping[str, int]
) -> EncoderData:
    """Prepares texts and encoder for fine-tuning: tokens, length buckets, whitening.

    Args:
      config: settings of the text encoder.
      texts: texts and their links to nodes.
      vectors: float32 [T, D], the texts' embeddings: the encoder's, then TF-IDF columns, if any.
      counts: the number of nodes by type.

    Returns:
      The data, on the host.

    Raises:
      ValueError: there are no texts, or as `fused_rec.text.encode.encode_texts`.
    """
    if not texts.texts:
        raise ValueError(f"text.finetune is {config.finetune!r}, and these tables have no texts; it must be frozen")
    model = open_model(config.model, offline=config.offline)
    pretrained = _embed(config, texts.texts, model, config.cache)
    tokens = token_ids(texts.texts, model, max_tokens=config.max_tokens)
    count = np.array([len(ids) for ids in tokens])
    bounds = np.quantile(count, np.arange(1, LENGTH_BUCKETS + 1) / LENGTH_BUCKETS, method="inverted_cdf")
    length = np.unique(-(-bounds.astype(np.int64) // LENGTH_MULTIPLE) * LENGTH_MULTIPLE).clip(
        max=config.max_tokens or model.max_tokens
    )
    data = EncoderData(
        model,
        texts,
        vectors=pretrained,
        tfidf=vectors[:, pretrained.shape[1] :],
        scale=np.float32(rms_norm(pretrained)) if vectors.shape[1] > pretrained.shape[1] else np.float32(1),
        whitening={USER: None, ITEM: None},
        tokens=tokens,
        bucket_length=length,
        bucket_of_text=np.searchsorted(length, count),
    )
    found = {}
    for node_type in data.whitening:
        means, has_text = node_means(*data.texts_of(node_type), vectors, counts[node_type])
        found[node_type] = whitening(means[has_text])
    return dataclasses.replace(data, whitening=found)


def init_state(config: Config, encoder_data: EncoderData, state: TrainState) -> TrainState:
    """Adds the encoder's trainable parameters to an initial state.

    Args:
      config: all settings; train.seed decides the initial adapters.
      encoder_data: with the pretrained encoder.
      state: an initial state of the graph model, on the host.

    Returns:
      The state with `ENCODER` among its params, unsharded, on the host.
    """
    encoder = init_trainable(_training(config), encoder_data.model.params, config.text.lora_rank, config.train.seed)
    params = {**state.params, ENCODER: encoder}
    opt_state = jax.device_get(jax.jit(_optimizer(config).init)(params))
    return dataclasses.replace(state, params=params, opt_state=opt_state, encoder_snapshot=encoder)


def _training(config: Config) -> Any:
    """How the encoder is trained: text.finetune."""
    return config.text.finetune


def _optimizer(config: Config) -> optax.GradientTransformation:
    """The graph model's optimizer, and AdamW with its own learning rate for the encoder."""

    def matrices(params: PyTree) -> PyTree:
        return jax.tree.map(lambda leaf: leaf.ndim > 1, params)

    def labels(params: PyTree) -> PyTree:
        return {name: jax.tree.map(lambda _, own=name == ENCODER: own, part) for name, part in params.items()}

    encoder = optax.adamw(config.text.finetune_learning_rate, weight_decay=DECAY, mask=matrices)
    return optax.partition({True: encoder, False: make_optimizer(config.train)}, labels)


# --- all texts at once ---------------------------------------------------------------------------------------------


def encode_all_texts(
    config: Config, encoder_data: EncoderData, graph_inputs: GraphInputs, encoder_params: PyTree, *, keep: bool = False
) -> TextCache:
    """Encodes all texts by the current encoder and updates the text embeddings of all nodes.

    Before the first update the pretrained embeddings are reused.

    Args:
      config: all settings.
      encoder_data: texts and pretrained encoder.
      graph_inputs: of the whole graph, with any text embeddings.
      encoder_params: adapters or all weights.
      keep: write the embeddings to the cache on disk too (fused_rec/text/cache.py).

    Returns:
      Embeddings of texts and nodes.
    """
    encoder_params = jax.device_get(encoder_params)
    params = jax.device_get(with_adapters(_training(config), encoder_data.model.params, encoder_params))
    vectors = encoder_data.vectors
    if not jax.tree.all(jax.tree.map(np.array_equal, params, encoder_data.model.params)):
        model = dataclasses.replace(
            encoder_data.model, params=params, digest=_digest(encoder_data.model.digest, encoder_params)
        )
        vectors = _embed(config.text, encoder_data.texts.texts, model, config.text.cache if keep else None)
    return TextCache(encoder_data, encoder_params, *with_text_embeddings(encoder_data, graph_inputs, vectors), vectors)


def with_text_embeddings(
    encoder_data: EncoderData, graph_inputs: GraphInputs, vectors: Float32[np.ndarray, "T H"]
) -> tuple[GraphInputs, dict[str, Float32[np.ndarray, "n"]]]:
    """Replaces the text embeddings of all nodes by those of other embeddings of the texts.

    Args:
      encoder_data: links, TF-IDF columns and whitening.
      graph_inputs: of the whole graph, with any text embeddings.
      vectors: float32 [T, H], the encoder's embeddings of the texts.

    Returns:
      The graph inputs, and the norms of whitened means by node type (`TextCache.norms`).
    """
    joined = np.concatenate([vectors / encoder_data.scale, encoder_data.tfidf], axis=1)
    rows, lengths = {}, {}
    for node_type, by in encoder_data.whitening.items():
        means, has_text = node_means(*encoder_data.texts_of(node_type), joined, graph_inputs.graph.count(node_type))
        rows[node_type], lengths[node_type] = whitened(means, has_text, by)
    return dataclasses.replace(graph_inputs, graph=graph_inputs.graph.with_text(rows)), lengths


def _embed(
    config: TextConfig, texts: list[str], model: PretrainedModel, cache: str | Path | None
) -> Float32[np.ndarray, "T H"]:
    """`encode_texts` with the settings of the config."""
    return encode_texts(texts, model, cache=cache, batch_tokens=config.batch_tokens, max_tokens=config.max_tokens)


def _digest(pretrained: str, trained: PyTree) -> str:
    """A digest of the fine-tuned encoder, for the keys of the cache."""
    digest = hashlib.sha256(pretrained.encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(trained):
        digest.update(jax.tree_util.keystr(path).encode() + str(leaf.shape).encode() + np.asarray(leaf).tobytes())
    return digest.hexdigest()


# --- the texts of a step -------------------------------------------------------------------------------------------


def sample_texts(config: Config, encoder_data: EncoderData, batch: Batch, step: int) -> Int64[np.ndarray, "_"]:
    """Samples texts of the batch's users and positives, from one length bucket.

    A text sampled uniformly selects the bucket; then texts of that bucket are sampled without replacement, uniformly.
    The expected gradient is that of all the batch's texts times the share sampled, and AdamW is invariant to a factor.

    Args:
      config: of which text.finetune_texts_per_step and train.seed count.
      encoder_data: links and buckets.
      batch: users and positives.
      step: the number of steps taken.

    Returns:
      int64, up to text.finetune_texts_per_step distinct texts, ascending; a function of (train.seed, step, batch).
    """
    rng = numpy_rng(config.train.seed, step, Stream.FINETUNE_TEXTS)
    nodes_by_type = _batch_nodes(batch).items()
    candidates = np.unique(
        np.concatenate([_texts_of(encoder_data.texts_of(node_type), nodes) for node_type, nodes in nodes_by_type])
    )
    if not len(candidates):
        return candidates.astype(np.int64)
    in_bucket = candidates[
        encoder_data.bucket_of_text[candidates] == encoder_data.bucket_of_text[rng.choice(candidates)]
    ]
    return np.sort(
        rng.choice(in_bucket, min(config.text.finetune_texts_per_step, len(in_bucket)), replace=False)
    ).astype(np.int64)


def _batch_nodes(batch: Batch) -> dict[str, np.ndarray]:
    """The batch's users and positives, distinct and ascending."""
    return {USER: np.unique(batch.users[batch.mask.any(axis=1)]), ITEM: np.unique(batch.items[batch.mask > 0])}


def make_text_batch(config: Config, cache: TextCache, batch: Batch, step: int, devices: int | None = None) -> TextBatch:
    """Samples the texts of a step and arranges them for the devices.

    Args:
      config: all settings.
      cache: the current embeddings.
      batch: users and positives.
      step: the number of steps taken.
      devices: the number of devices; None: all.

    Returns:
      The texts of `sample_texts`, padded to the bucket's length, in chunks of up to text.batch_tokens tokens; the
      part of this process's devices.
    """
    encoder_data, num_texts = cache.encoder_data, config.text.finetune_texts_per_step
    sampled = sample_texts(config, encoder_data, batch, step)
    bucket = encoder_data.bucket_of_text[sampled[0]] if len(sampled) else 0
    length = int(encoder_data.bucket_length[bucket])
    count = len(select_devices(devices))
    share = -(-num_texts // count)
    rows = min(share, max(1, config.text.batch_tokens // length))
    shape = (count, -(-share // rows), rows)
    # Padding repeats texts, since one without tokens would have no mean; no node update refers to it.
    filled = np.resize(sampled if len(sampled) else np.argmin(encoder_data.bucket_of_text), np.prod(shape))
    ids, mask = np.zeros((len(filled), length), np.int32), np.zeros((len(filled), length), bool)
    for row, text in enumerate(filled):
        ids[row, : len(encoder_data.tokens[text])] = encoder_data.tokens[text]
        mask[row, : len(encoder_data.tokens[text])] = True
    ids, mask, before = (
        part.reshape(*shape, -1)[local_indices(devices)] for part in (ids, mask, cache.vectors[filled])
    )
    of_types = {node_type: _node_updates(cache, node_type, sampled, num_texts) for node_type in (USER, ITEM)}
    return TextBatch(ids, mask, before, of_types)


def _texts_of(links: NodeTextLinks, nodes: np.ndarray) -> np.ndarray:
    """The texts of some nodes, given ascending."""
    start, end = (np.searchsorted(links.nodes, nodes, side) for side in ("left", "right"))
    return links.texts[_ranges(start, end)]


def _ranges(start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Concatenated ranges: start[0], ..., end[0] - 1, start[1], ..."""
    count = end - start
    return np.repeat(start - np.cumsum(count) + count, count) + np.arange(count.sum())


def _node_updates(cache: TextCache, node_type: str, sampled: np.ndarray, capacity: int) -> NodeUpdates:
    """The updates of one node type, padded to `capacity` times a power of 2, so that few programs are compiled."""
    links, order = cache.encoder_data.texts_of(node_type), cache.encoder_data.order_by_text[node_type]
    ordered = links.texts[order]
    start, end = (np.searchsorted(ordered, sampled, side) for side in ("left", "right"))
    at = order[_ranges(start, end)]
    nodes, place = np.unique(links.nodes[at], return_inverse=True)
    while capacity < len(at):
        capacity *= 2
    more, fewer = (0, capacity - len(at)), (0, capacity - len(nodes))
    return NodeUpdates(
        np.pad(nodes, fewer, constant_values=-1),
        np.pad(cache.norms[node_type][nodes], fewer),
        np.pad(np.repeat(np.arange(len(sampled)), end - start).astype(np.int32), more),
        np.pad(place.astype(np.int32), more),
        np.pad(links.weights[at], more),
    )


# --- the step ------------------------------------------------------------------------------------------------------


def parallel_finetune_step(config: Config, encoder_data: EncoderData, devices: int | None = None) -> Any:
    """Builds the parallel fine-tuning step.

    Args:
      config: all settings.
      encoder_data: with the pretrained encoder.
      devices: the number of devices; None: all.

    Returns:
      A function of (state, graph inputs, batch, text batch), sharded as for `parallel_train_step`, the last one of
      `make_text_batch`, that returns (state, loss).
    """
    model = encoder_data.model
    encoder = model.config, model.pooling, model.normalize
    return functools.partial(
        _step,
        finetune_compile_key(config),
        encoder,
        devices,
        device_put(frozen_parts(config, encoder_data), None, devices),
    )


def frozen_parts(config: Config, encoder_data: EncoderData) -> tuple[PyTree, dict[str, Float32[np.ndarray, "H D"]]]:
    """Returns what a fine-tuning step reads and never changes.

    Args:
      config: of which text.finetune counts.
      encoder_data: with the pretrained encoder and whitening.

    Returns:
      The pretrained weights, empty with full fine-tuning; and by node type the matrix [H, D] that maps a change of a
      text's embedding to the change of a node's whitened mean.
    """
    width = encoder_data.vectors.shape[1]
    shape = width, width + encoder_data.tfidf.shape[1]
    matrices = {
        node_type: np.zeros(shape, np.float32)
        if by is None
        else (by.matrix[:width] / encoder_data.scale).astype(np.float32)
        for node_type, by in encoder_data.whitening.items()
    }
    return {} if config.text.finetune == "full" else encoder_data.model.params, matrices


def finetune_compile_key(config: Config) -> Config:
    """Returns `compile_key` with the text settings that the fine-tuning step depends on."""
    text = TextConfig(finetune=config.text.finetune, finetune_learning_rate=config.text.finetune_learning_rate)
    return dataclasses.replace(compile_key(config), text=text)


def _step(
    config: Config,
    encoder: tuple,
    devices: int | None,
    fixed: PyTree,
    state: TrainState,
    graph_inputs: GraphInputs,
    batch: Batch,
    text_batch: TextBatch,
) -> tuple[TrainState, Float32[Array, ""]]:
    """Shards the batch and runs the compiled step."""
    step = mapped_finetune_step(config, encoder, devices, jax.tree.structure(state), jax.tree.structure(graph_inputs))
    return step(state, graph_inputs, shard_batch(batch, devices), text_batch, fixed)


@functools.lru_cache(maxsize=8)
def mapped_finetune_step(
    config: Config, encoder: tuple, devices: int | None, states: Hashable, tasks: Hashable
) -> PmappedFn:
    """Builds the compiled program of `parallel_finetune_step`, for sharded arguments.

    Args:
      config: of `finetune_compile_key`.
      encoder: (config, pooling, normalize) of the text encoder.
      devices: the number of devices; None: all.
      states: tree structure of the state.
      tasks: tree structure of the graph inputs.

    Returns:
      A function of (state, graph inputs, batch, text batch, frozen parts).
    """
    state, graph_inputs = sharding_axes(tree_of_structure(states)), graph_inputs_axes(tree_of_structure(tasks))
    step = functools.partial(finetune_step, config, encoder)
    return pmap_over_devices(
        step, devices, in_axes=(state, graph_inputs, 0, text_batch_axes(), None), out_axes=(state, None), donate=(0,)
    )


def text_batch_axes() -> TextBatch:
    """Returns the device axis of each field of `TextBatch`; None: replicated."""
    replicated: Any = None
    sharded: Any = 0
    return TextBatch(sharded, sharded, sharded, replicated)


def finetune_step(
    config: Config,
    encoder: tuple,
    state: TrainState,
    graph_inputs: GraphInputs,
    batch: Batch,
    text_batch: TextBatch,
    fixed: PyTree,
) -> tuple[TrainState, Float32[Array, ""]]:
    """Takes one `train_step` with the text encoder among the parameters.

    Args:
      config: all settings.
      encoder: (config, pooling, normalize) of the text encoder.
      state: with `ENCODER` among its params.
      graph_inputs: with text embeddings of the cache.
      batch: this device's share of the batch.
      text_batch: this device's share of the texts.
      fixed: of `frozen_parts`.

    Returns:
      The next state and the mean loss.
    """
    pretrained, matrices = fixed

    def text_update_fn(params: PyTree, graph_inputs: GraphInputs) -> GraphInputs:
        weights = with_adapters(_training(config), pretrained, params[ENCODER])
        return update_node_text(graph_inputs, text_batch, _vector_changes(encoder, weights, text_batch), matrices)

    return train_step(config, state, graph_inputs, batch, _optimizer(config), text_update_fn)


def _vector_changes(encoder: tuple, weights: PyTree, text_batch: TextBatch) -> Float32[Array, "S H"]:
    """The step's texts' embeddings less the cached ones, gathered on every device.

    Runs chunk by chunk with rematerialization: activations of one chunk only are in memory.
    """

    @jax.checkpoint
    def moved(weights: PyTree, chunk: tuple) -> Array:
        ids, mask, before = chunk
        return apply_encoder(weights, ids, mask, *encoder) - before

    chunks = jnp.asarray(text_batch.ids), jnp.asarray(text_batch.mask), jnp.asarray(text_batch.cached_vectors)
    change = jax.lax.map(functools.partial(moved, weights), chunks)
    return jax.lax.all_gather(change, AXIS).reshape(-1, change.shape[-1])


def update_node_text(
    graph_inputs: GraphInputs,
    text_batch: TextBatch,
    change: Float32[AnyArray, "S H"],
    matrices: Mapping[str, Float32[AnyArray, "H D"]],
) -> GraphInputs:
    """Moves the text embeddings of this device's nodes by the change of a step's texts, then normalizes them.

    A node's whitened mean is its row times its norm; it changes by the weighted changes of its texts.

    Args:
      graph_inputs: with text embeddings of the cache; this device's rows.
      text_batch: the rows to change.
      change: float32 [S, H], change of each text's embedding.
      matrices: by node type, [H, D], of `frozen_parts`.

    Returns:
      The graph inputs with other text embeddings, differentiable in `change`.
    """
    graph, text = graph_inputs.graph, {}
    device = jax.lax.axis_index(AXIS)
    for node_type, rows in text_batch.node_updates.items():
        each = rows.weights[:, None] * (change @ matrices[node_type])[rows.texts]
        moved = jax.ops.segment_sum(each, rows.places, len(rows.nodes))
        is_local = (rows.nodes >= 0) & (rows.nodes % graph.shards.count == device)
        own = jnp.asarray(graph.text[node_type])
        row = jnp.where(is_local, rows.nodes // graph.shards.count, len(own))
        before = own.at[row].get(mode="fill", fill_value=0) * rows.norms[:, None]
        text[node_type] = own.at[row].set(unit(before + moved), mode="drop")
    return dataclasses.replace(graph_inputs, graph=graph.with_text(text))
