"""The language model trained along with the graph: which texts a step encodes, and where all others come from.

A node's words are the weighted mean of its texts' vectors, whitened and of length 1 (`fused_rec.graph.build`). A step
draws some texts of its batch's users and items, encodes them with gradient, and corrects the rows of the nodes that
they belong to by how far they have moved; everything else in those rows, and all other rows, comes from vectors cached
at the last evaluation. Whitening, text neighbours and TF-IDF directions stay those of the published model.

A state's params have one more entry, `ENCODER`: adapters, or all weights where all are trained. The published weights
are in no state and in no checkpoint.
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
from fused_rec.graph.build import ITEM, USER, Whitening, node_means, whitened, whitening
from fused_rec.model.losses import unit
from fused_rec.text.encode import encode_texts, token_ids
from fused_rec.text.encoders.lora import init_trainable, with_adapters
from fused_rec.text.encoders.registry import apply_encoder
from fused_rec.text.pretrained import PretrainedModel, open_model
from fused_rec.text.tfidf import rms_norm
from fused_rec.training.sharding import compile_key, graph_inputs_axes, shard_batch, tree_of_structure
from fused_rec.training.train_step import GraphInputs, TrainState, make_optimizer, sharding_axes, train_step

ENCODER = "encoder"
SAMPLE_STREAM = 5  # third number of the seed; batches draw with 0 and 1, controls with 2 to 4
# a step's texts are of one of so many classes of length, so that little is padding: one program a class
LENGTH_BUCKETS = 3
LENGTH_MULTIPLE = 8  # tokens of a class are a multiple of it
DECAY = 0.01  # of the language model's matrices, decoupled: what BERT was trained and is tuned with


@dataclasses.dataclass(frozen=True, eq=False)
class EncoderData:
    """The texts of a graph, ready to be encoded anew.

    vectors: float32 [T, H], by the published model. tfidf: float32 [T, L], the TF-IDF directions as nodes have them;
    scale: what divides the language model's vectors beside them. whitening: by node type, None where too few speak.
    tokens: of each text. bucket_length: padded tokens of each class of lengths; bucket_of_text: the class of each text.
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
        """The type's (node, text, weight), ascending by node."""
        side = {USER: "user", ITEM: "item"}[node_type]
        return NodeTextLinks(*(getattr(self.texts, f"{side}_{name}") for name in ("rows", "texts", "weights")))

    @functools.cached_property
    def order_by_text(self) -> dict[str, np.ndarray]:
        """By node type, the order of its links in which texts ascend."""
        return {node_type: np.argsort(self.texts_of(node_type).texts, kind="stable") for node_type in self.whitening}


class NodeTextLinks(NamedTuple):
    """Which nodes have which texts, and with what weight."""

    nodes: Int32[np.ndarray, "K"]
    texts: Int32[np.ndarray, "K"]
    weights: Float32[np.ndarray, "K"]


class TextCache(NamedTuple):
    """All texts, and the words of all nodes, by one state of the language model.

    encoder_params: that state. graph_inputs: with these words. norms: of each node's whitened mean before it was
    divided by it, by node type. vectors: of the texts.
    """

    encoder_data: EncoderData
    encoder_params: PyTree
    graph_inputs: GraphInputs
    norms: Mapping[str, Float32[np.ndarray, "n"]]
    vectors: Float32[np.ndarray, "T H"]


@no_type_check  # as of `Adjacency`
@flax.struct.dataclass
class NodeUpdates:
    """The rows of one node type that a step's texts change. M and K are filled up with nodes of -1 and weights of 0."""

    nodes: Int32[AnyArray, "M"]
    norms: Float32[AnyArray, "M"]
    texts: Int32[AnyArray, "K"]  # places among the step's texts
    places: Int32[AnyArray, "K"]  # places among `nodes`
    weights: Float32[AnyArray, "K"]


@no_type_check  # as of `Adjacency`
@flax.struct.dataclass
class TextBatch:
    """The texts that a step encodes: S of them on P devices, in chunks of one size; those that fill up change nothing.

    cached_vectors: their vectors in the cache.
    """

    ids: Int32[AnyArray, "P chunks C L"]
    mask: Bool[AnyArray, "P chunks C L"]
    cached_vectors: Float32[AnyArray, "P chunks C H"]
    node_updates: Mapping[str, NodeUpdates]


def encoder_data(
    config: TextConfig, texts: NodeTexts, vectors: Float32[np.ndarray, "T D"], counts: Mapping[str, int]
) -> EncoderData:
    """What training along needs.

    vectors: of the texts, as nodes have them: the language model's first, TF-IDF directions beside them, if any.
    counts: nodes by type. Raises ValueError where there are no texts, and as `embed` does.
    """
    if not texts.texts:
        raise ValueError(f"text.finetune is {config.finetune!r}, and these tables have no texts; it must be frozen")
    model = open_model(config.model, offline=config.offline)
    own = _embed(config, texts.texts, model, config.cache)
    tokens = token_ids(texts.texts, model, max_tokens=config.max_tokens)
    count = np.array([len(ids) for ids in tokens])
    bounds = np.quantile(count, np.arange(1, LENGTH_BUCKETS + 1) / LENGTH_BUCKETS, method="inverted_cdf")
    length = np.unique(-(-bounds.astype(np.int64) // LENGTH_MULTIPLE) * LENGTH_MULTIPLE).clip(
        max=config.max_tokens or model.max_tokens
    )
    data = EncoderData(
        model,
        texts,
        vectors=own,
        tfidf=vectors[:, own.shape[1] :],
        scale=np.float32(rms_norm(own)) if vectors.shape[1] > own.shape[1] else np.float32(1),
        whitening={USER: None, ITEM: None},
        tokens=tokens,
        bucket_length=length,
        bucket_of_text=np.searchsorted(length, count),
    )
    found = {}
    for node_type in data.whitening:
        means, named = node_means(*data.texts_of(node_type), vectors, counts[node_type])
        found[node_type] = whitening(means[named])
    return dataclasses.replace(data, whitening=found)


def init_state(config: Config, encoder_data: EncoderData, state: TrainState) -> TrainState:
    """A fresh state of the model with the language model's part in it, whole and on the host."""
    encoder = init_trainable(_training(config), encoder_data.model.params, config.text.lora_rank, config.train.seed)
    params = {**state.params, ENCODER: encoder}
    opt_state = jax.device_get(jax.jit(_optimizer(config).init)(params))
    return dataclasses.replace(state, params=params, opt_state=opt_state, encoder_snapshot=encoder)


def _training(config: Config) -> Any:
    return config.text.finetune


def _optimizer(config: Config) -> optax.GradientTransformation:
    """The optimiser of the model as it is, and AdamW at a rate of its own for the language model."""

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
    """All texts encoded by the language model as it is trained so far, and the task with these words.

    The published model's vectors where nothing has been trained yet. task: whole, with any words. keep: on disk too,
    beside the published model's vectors and as private (fused_rec/text/cache.py), for whoever asks again.
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
    """The task with words of these vectors, and by node type the lengths of whitened means (`TextCache.norms`)."""
    beside = np.concatenate([vectors / encoder_data.scale, encoder_data.tfidf], axis=1)
    rows, lengths = {}, {}
    for node_type, by in encoder_data.whitening.items():
        means, named = node_means(*encoder_data.texts_of(node_type), beside, graph_inputs.graph.count(node_type))
        rows[node_type], lengths[node_type] = whitened(means, named, by)
    text = [
        rows.get(node_type, np.asarray(graph_inputs.graph.text(node_type)))
        for node_type, _ in graph_inputs.graph.node_types
    ]
    return dataclasses.replace(graph_inputs, graph=graph_inputs.graph.with_text(np.concatenate(text))), lengths


def _embed(
    config: TextConfig, texts: list[str], model: PretrainedModel, cache: str | Path | None
) -> Float32[np.ndarray, "T H"]:
    return encode_texts(texts, model, cache=cache, batch_tokens=config.batch_tokens, max_tokens=config.max_tokens)


def _digest(published: str, trained: PyTree) -> str:
    """What vectors of the trained language model depend on, beside the texts."""
    digest = hashlib.sha256(published.encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(trained):
        digest.update(jax.tree_util.keystr(path).encode() + str(leaf.shape).encode() + np.asarray(leaf).tobytes())
    return digest.hexdigest()


# --- the texts of a step -------------------------------------------------------------------------------------------


def sample_texts(config: Config, encoder_data: EncoderData, batch: Batch, step: int) -> Int64[np.ndarray, "_"]:
    """Up to text.finetune_texts_per_step distinct texts, ascending, of the batch's users and of the items they are
    asked for.

    A function of (train.seed, step, batch): one text drawn evenly decides the class of lengths, and of the batch's
    texts of that class as many as may be are drawn without replacement. Any text is as likely as any other of its
    class; the expected gradient is that of all the batch's texts times the share drawn, a factor that AdamW takes out.
    """
    rng = np.random.default_rng((config.train.seed, step, SAMPLE_STREAM))
    asked = _batch_nodes(batch).items()
    needed = np.unique(
        np.concatenate([_texts_of(encoder_data.texts_of(node_type), nodes) for node_type, nodes in asked])
    )
    if not len(needed):
        return needed.astype(np.int64)
    among = needed[encoder_data.bucket_of_text[needed] == encoder_data.bucket_of_text[rng.choice(needed)]]
    return np.sort(rng.choice(among, min(config.text.finetune_texts_per_step, len(among)), replace=False)).astype(
        np.int64
    )


def _batch_nodes(batch: Batch) -> dict[str, np.ndarray]:
    return {USER: np.unique(batch.users[batch.mask.any(axis=1)]), ITEM: np.unique(batch.items[batch.mask > 0])}


def make_text_batch(config: Config, cache: TextCache, batch: Batch, step: int, devices: int | None = None) -> TextBatch:
    """The `sample_texts` texts, padded to one length, divided into chunks and over devices."""
    encoder_data, wanted = cache.encoder_data, config.text.finetune_texts_per_step
    drawn = sample_texts(config, encoder_data, batch, step)
    kind = encoder_data.bucket_of_text[drawn[0]] if len(drawn) else 0
    length = int(encoder_data.bucket_length[kind])
    count = len(select_devices(devices))
    share = -(-wanted // count)
    rows = min(share, max(1, config.text.batch_tokens // length))
    shape = (count, -(-share // rows), rows)
    # A text without a token has no mean; one that fills up repeats any other, and no node has it.
    filled = np.resize(drawn if len(drawn) else np.argmin(encoder_data.bucket_of_text), np.prod(shape))
    ids, mask = np.zeros((len(filled), length), np.int32), np.zeros((len(filled), length), bool)
    for row, text in enumerate(filled):
        ids[row, : len(encoder_data.tokens[text])] = encoder_data.tokens[text]
        mask[row, : len(encoder_data.tokens[text])] = True
    ids, mask, before = (
        part.reshape(*shape, -1)[local_indices(devices)] for part in (ids, mask, cache.vectors[filled])
    )
    of_types = {node_type: _node_updates(cache, node_type, drawn, wanted) for node_type in (USER, ITEM)}
    return TextBatch(ids, mask, before, of_types)


def _texts_of(links: NodeTextLinks, nodes: np.ndarray) -> np.ndarray:
    """The texts of some nodes, which ascend."""
    start, end = (np.searchsorted(links.nodes, nodes, side) for side in ("left", "right"))
    return links.texts[_ranges(start, end)]


def _ranges(start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """start[0], ..., end[0] - 1, start[1], ..."""
    count = end - start
    return np.repeat(start - np.cumsum(count) + count, count) + np.arange(count.sum())


def _node_updates(cache: TextCache, node_type: str, drawn: np.ndarray, capacity: int) -> NodeUpdates:
    """room: M and K are so many or, where that is too few, twice, four times as many: few shapes, few programs."""
    links, order = cache.encoder_data.texts_of(node_type), cache.encoder_data.order_by_text[node_type]
    ordered = links.texts[order]
    start, end = (np.searchsorted(ordered, drawn, side) for side in ("left", "right"))
    at = order[_ranges(start, end)]
    nodes, place = np.unique(links.nodes[at], return_inverse=True)
    while capacity < len(at):
        capacity *= 2
    more, fewer = (0, capacity - len(at)), (0, capacity - len(nodes))
    return NodeUpdates(
        np.pad(nodes, fewer, constant_values=-1),
        np.pad(cache.norms[node_type][nodes], fewer),
        np.pad(np.repeat(np.arange(len(drawn)), end - start).astype(np.int32), more),
        np.pad(place.astype(np.int32), more),
        np.pad(links.weights[at], more),
    )


# --- the step ------------------------------------------------------------------------------------------------------


def parallel_finetune_step(config: Config, encoder_data: EncoderData, devices: int | None = None) -> Any:
    """(state, task, batch, said) to (state, loss), over devices as `parallel_train_step`; said: of
    `make_text_batch`.
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
    """The published weights, none where all are trained, and by node type what takes a text's change to its nodes'."""
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
    """As `compile_key`, with what the joint step depends on besides."""
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
    step = mapped_finetune_step(config, encoder, devices, jax.tree.structure(state), jax.tree.structure(graph_inputs))
    return step(state, graph_inputs, shard_batch(batch, devices), text_batch, fixed)


@functools.lru_cache(maxsize=8)
def mapped_finetune_step(
    config: Config, encoder: tuple, devices: int | None, states: Hashable, tasks: Hashable
) -> PmappedFn:
    """The compiled program behind `parallel_finetune_step`, of a batch and texts that are split already."""
    state, graph_inputs = sharding_axes(tree_of_structure(states)), graph_inputs_axes(tree_of_structure(tasks))
    step = functools.partial(finetune_step, config, encoder)
    return pmap_over_devices(
        step, devices, in_axes=(state, graph_inputs, 0, text_batch_axes(), None), out_axes=(state, None), donate=(0,)
    )


def text_batch_axes() -> TextBatch:
    """Where each part of `TextBatch` has its devices; None: every device has it whole."""
    whole: Any = None
    divided: Any = 0
    return TextBatch(divided, divided, divided, whole)


def finetune_step(
    config: Config,
    encoder: tuple,
    state: TrainState,
    graph_inputs: GraphInputs,
    batch: Batch,
    text_batch: TextBatch,
    fixed: PyTree,
) -> tuple[TrainState, Float32[Array, ""]]:
    """`train_step` with the language model among the parameters.

    encoder: (config, pooling, normalize) of the language model. fixed: of `frozen_parts`.
    """
    published, matrices = fixed

    def text_update_fn(params: PyTree, graph_inputs: GraphInputs) -> GraphInputs:
        weights = with_adapters(_training(config), published, params[ENCODER])
        return update_node_text(graph_inputs, text_batch, _vector_changes(encoder, weights, text_batch), matrices)

    return train_step(config, state, graph_inputs, batch, _optimizer(config), text_update_fn)


def _vector_changes(encoder: tuple, weights: PyTree, text_batch: TextBatch) -> Float32[Array, "S H"]:
    """How far each of the step's texts has moved from its cached vector, on every device.

    Chunk by chunk, and again on the way back: what a chunk computes is never kept for two of them.
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
    """The task with the rows of this device corrected by the change of a step's texts.

    The whitened mean of a node was its row times its length; it moves by what its texts do, each by its weight.
    """
    graph = graph_inputs.graph
    nodes: Any = graph.graph.nodes
    text = jnp.asarray(nodes["text"])
    device = jax.lax.axis_index(AXIS)
    for node_type, rows in text_batch.node_updates.items():
        each = rows.weights[:, None] * (change @ matrices[node_type])[rows.texts]
        moved = jax.ops.segment_sum(each, rows.places, len(rows.nodes))
        mine = (rows.nodes >= 0) & (rows.nodes % graph.shards.count == device)
        row = jnp.where(mine, graph.node_slice(node_type).start + rows.nodes // graph.shards.count, len(text))
        before = text.at[row].get(mode="fill", fill_value=0) * rows.norms[:, None]
        text = text.at[row].set(unit(before + moved), mode="drop")
    return dataclasses.replace(graph_inputs, graph=graph.with_text(text))
