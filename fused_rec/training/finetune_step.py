"""One training step with the text encoder among the parameters: which texts it encodes, and how they enter.

A step samples some texts of its batch's users and items, encodes them with gradient, and moves the rows of their nodes
by the change against the cache (`fused_rec.training.finetune`); everything else in those rows, and all other rows, is
cached.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, no_type_check

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int32, Int64, PRNGKeyArray, PyTree

from fused_rec.config import Config, TextConfig
from fused_rec.data.batches import Batch
from fused_rec.data.node_texts import ITEM, USER, NodeTextLinks
from fused_rec.distributed.devices import AXIS, AnyArray, all_gather, local_indices, select_devices
from fused_rec.model.losses import unit
from fused_rec.rng import Stream, numpy_rng
from fused_rec.text.encoders.lora import with_adapters
from fused_rec.text.encoders.registry import apply_encoder
from fused_rec.training import finetune
from fused_rec.training.finetune import EncoderData, TextCache
from fused_rec.training.sharding import ParallelStep
from fused_rec.training.train_step import (
    GraphInputs,
    LossParts,
    Metrics,
    TrainState,
    batch_loss,
    compile_key,
    optimize,
)


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


def parallel_finetune_step(config: Config, encoder_data: EncoderData, devices: int | None = None) -> ParallelStep:
    """Builds the parallel `finetune_step`.

    Args:
      config: all settings.
      encoder_data: with the pretrained encoder.
      devices: the number of devices; None: all.

    Returns:
      A function of (sharded state, sharded graph inputs, unsharded batch, text batch of `make_text_batch`, frozen parts
      of `frozen_parts`).
    """
    model = encoder_data.model
    static = finetune_compile_key(config), (model.config, model.pooling, model.normalize)
    return ParallelStep(finetune_step, static, (text_batch_axes(), None), devices)


def frozen_parts(config: Config, encoder_data: EncoderData) -> tuple[PyTree, dict[str, Float32[np.ndarray, "H D"]]]:
    """Returns what a fine-tuning step reads and never changes.

    Args:
      config: of which text.finetune counts.
      encoder_data: with the pretrained encoder and whitening.

    Returns:
      The pretrained weights, empty with full fine-tuning; and by node type the matrix [H, D] that maps a change of a
      text's embedding to the change of a node's whitened mean.
    """
    features = encoder_data.features
    width = features.lm.shape[1]
    shape = width, width + features.tfidf.vectors.shape[1]
    matrices = {
        node_type: np.zeros(shape, np.float32)
        if by is None
        else (by.matrix[:width] / features.fitted.scales.lm).astype(np.float32)
        for node_type, by in features.fitted.whitening.items()
    }
    return {} if config.text.finetune == "full" else encoder_data.model.params, matrices


def finetune_compile_key(config: Config) -> Config:
    """Returns `compile_key` with the text settings that the fine-tuning step depends on."""
    text = TextConfig(finetune=config.text.finetune, finetune_learning_rate=config.text.finetune_learning_rate)
    return dataclasses.replace(compile_key(config), text=text)


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
) -> tuple[TrainState, Metrics]:
    """Takes one optimizer step with the text encoder among the parameters.

    Args:
      config: all settings.
      encoder: (config, pooling, normalize) of the text encoder.
      state: with `ENCODER` among its params.
      graph_inputs: with text embeddings of the cache.
      batch: this device's share of the batch.
      text_batch: this device's share of the texts.
      fixed: of `frozen_parts`.

    Returns:
      The next state, and the metrics of `optimize`.
    """
    pretrained, matrices = fixed
    training: Any = config.text.finetune

    def loss_fn(params: PyTree, graph_inputs: GraphInputs, dropout: PRNGKeyArray) -> LossParts:
        weights = with_adapters(training, pretrained, params[finetune.ENCODER])
        changes = _vector_changes(encoder, weights, text_batch)
        moved = update_node_text(graph_inputs, text_batch, changes, matrices)
        return batch_loss(config, params, moved, batch, dropout)

    return optimize(state, graph_inputs, loss_fn, finetune.optimizer(config))


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
    return all_gather(change, 0).reshape(-1, change.shape[-1])


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
