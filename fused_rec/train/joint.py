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
from fused_rec.devices import AXIS, AnyArray, Mapped, over_devices, places, put, used
from fused_rec.graph.build import ITEM, USER, Whitening, node_means, whitened, whitening
from fused_rec.model.losses import unit
from fused_rec.text.embed import embed, token_ids
from fused_rec.text.families import encode
from fused_rec.text.lexical import spread
from fused_rec.text.lora import adapted, start
from fused_rec.text.pretrained import PretrainedModel, open_model
from fused_rec.train.parallel import program, shape_of, split_batch, task_axes
from fused_rec.train.step import Task, TrainState, axes, optimiser, train_step

ENCODER = "encoder"
DRAW = 5  # third number of the seed; batches draw with 0 and 1, controls with 2 to 4
LENGTHS = 3  # a step's texts are of one of so many classes of length, so that little is padding: one program a class
ROUND = 8  # tokens of a class are a multiple of it
DECAY = 0.01  # of the language model's matrices, decoupled: what BERT was trained and is tuned with


@dataclasses.dataclass(frozen=True, eq=False)
class Words:
    """The texts of a graph, ready to be encoded anew.

    vectors: float32 [T, H], by the published model. rest: float32 [T, L], the TF-IDF directions as nodes have them;
    scale: what divides the language model's vectors beside them. whitening: by node type, None where too few speak.
    tokens: of each text. length: padded tokens of each class of lengths; of_length: the class of each text.
    """

    model: PretrainedModel
    texts: NodeTexts
    vectors: Float32[np.ndarray, "T H"]
    rest: Float32[np.ndarray, "T L"]
    scale: np.float32
    whitening: Mapping[str, Whitening | None]
    tokens: list[Int32[np.ndarray, "_"]]
    length: Int64[np.ndarray, "C"]
    of_length: Int64[np.ndarray, "T"]

    def of(self, node_type: str) -> "Links":
        """The type's (node, text, weight), ascending by node."""
        side = {USER: "user", ITEM: "item"}[node_type]
        return Links(*(getattr(self.texts, f"{side}_{name}") for name in ("rows", "texts", "weights")))

    @functools.cached_property
    def by_text(self) -> dict[str, np.ndarray]:
        """By node type, the order of its links in which texts ascend."""
        return {node_type: np.argsort(self.of(node_type).texts, kind="stable") for node_type in self.whitening}


class Links(NamedTuple):
    """Which nodes have which texts, and with what weight."""

    nodes: Int32[np.ndarray, "K"]
    texts: Int32[np.ndarray, "K"]
    weights: Float32[np.ndarray, "K"]


class Cached(NamedTuple):
    """All texts, and the words of all nodes, by one state of the language model.

    trained: that state. task: with these words. lengths: of each node's whitened mean before it was divided by it, by
    node type. vectors: of the texts.
    """

    words: Words
    trained: PyTree
    task: Task
    lengths: Mapping[str, Float32[np.ndarray, "n"]]
    vectors: Float32[np.ndarray, "T H"]


@no_type_check  # as of `Adjacency`
@flax.struct.dataclass
class Corrections:
    """The rows of one node type that a step's texts change. M and K are filled up with nodes of -1 and weights of 0."""

    nodes: Int32[AnyArray, "M"]
    lengths: Float32[AnyArray, "M"]
    texts: Int32[AnyArray, "K"]  # places among the step's texts
    places: Int32[AnyArray, "K"]  # places among `nodes`
    weights: Float32[AnyArray, "K"]


@no_type_check  # as of `Adjacency`
@flax.struct.dataclass
class Said:
    """The texts that a step encodes: S of them on P devices, in chunks of one size; those that fill up change nothing.

    before: their vectors in the cache.
    """

    ids: Int32[AnyArray, "P chunks C L"]
    mask: Bool[AnyArray, "P chunks C L"]
    before: Float32[AnyArray, "P chunks C H"]
    corrections: Mapping[str, Corrections]


def words(
    config: TextConfig, texts: NodeTexts, vectors: Float32[np.ndarray, "T D"], counts: Mapping[str, int]
) -> Words:
    """What training along needs.

    vectors: of the texts, as nodes have them: the language model's first, TF-IDF directions beside them, if any.
    counts: nodes by type. Raises ValueError where there are no texts, and as `embed` does.
    """
    if not texts.texts:
        raise ValueError(f"text.train is {config.train!r}, and these tables have no texts; it must be frozen")
    model = open_model(config.model, offline=config.offline)
    own = _embed(config, texts.texts, model, config.cache)
    tokens = token_ids(texts.texts, model, max_tokens=config.max_tokens)
    count = np.array([len(ids) for ids in tokens])
    bounds = np.quantile(count, np.arange(1, LENGTHS + 1) / LENGTHS, method="inverted_cdf")
    length = np.unique(-(-bounds.astype(np.int64) // ROUND) * ROUND).clip(max=config.max_tokens or model.max_tokens)
    joined = Words(
        model,
        texts,
        vectors=own,
        rest=vectors[:, own.shape[1] :],
        scale=np.float32(spread(own)) if vectors.shape[1] > own.shape[1] else np.float32(1),
        whitening={USER: None, ITEM: None},
        tokens=tokens,
        length=length,
        of_length=np.searchsorted(length, count),
    )
    found = {}
    for node_type in joined.whitening:
        means, named = node_means(*joined.of(node_type), vectors, counts[node_type])
        found[node_type] = whitening(means[named])
    return dataclasses.replace(joined, whitening=found)


def begin(config: Config, words: Words, state: TrainState) -> TrainState:
    """A fresh state of the model with the language model's part in it, whole and on the host."""
    encoder = start(_training(config), words.model.params, config.text.rank, config.train.seed)
    params = {**state.params, ENCODER: encoder}
    moments = jax.device_get(jax.jit(_rule(config).init)(params))
    return dataclasses.replace(state, params=params, optimiser=moments, said=encoder)


def _training(config: Config) -> Any:
    return config.text.train


def _rule(config: Config) -> optax.GradientTransformation:
    """The optimiser of the model as it is, and AdamW at a rate of its own for the language model."""

    def matrices(params: PyTree) -> PyTree:
        return jax.tree.map(lambda leaf: leaf.ndim > 1, params)

    def labels(params: PyTree) -> PyTree:
        return {name: jax.tree.map(lambda _, own=name == ENCODER: own, part) for name, part in params.items()}

    encoder = optax.adamw(config.text.learning_rate, weight_decay=DECAY, mask=matrices)
    return optax.partition({True: encoder, False: optimiser(config.train)}, labels)


# --- all texts at once ---------------------------------------------------------------------------------------------


def cached(config: Config, words: Words, task: Task, trained: PyTree, *, keep: bool = False) -> Cached:
    """All texts encoded by the language model as it is trained so far, and the task with these words.

    The published model's vectors where nothing has been trained yet. task: whole, with any words. keep: on disk too,
    beside the published model's vectors and as private (fused_rec/text/cache.py), for whoever asks again.
    """
    trained = jax.device_get(trained)
    params = jax.device_get(adapted(_training(config), words.model.params, trained))
    vectors = words.vectors
    if not jax.tree.all(jax.tree.map(np.array_equal, params, words.model.params)):
        model = dataclasses.replace(words.model, params=params, digest=_digest(words.model.digest, trained))
        vectors = _embed(config.text, words.texts.texts, model, config.text.cache if keep else None)
    return Cached(words, trained, *told(words, task, vectors), vectors)


def told(
    words: Words, task: Task, vectors: Float32[np.ndarray, "T H"]
) -> tuple[Task, dict[str, Float32[np.ndarray, "n"]]]:
    """The task with words of these vectors, and by node type the lengths of whitened means (`Cached.lengths`)."""
    beside = np.concatenate([vectors / words.scale, words.rest], axis=1)
    rows, lengths = {}, {}
    for node_type, by in words.whitening.items():
        means, named = node_means(*words.of(node_type), beside, task.graph.count(node_type))
        rows[node_type], lengths[node_type] = whitened(means, named, by)
    text = [rows.get(node_type, np.asarray(task.graph.text(node_type))) for node_type, _ in task.graph.node_types]
    return dataclasses.replace(task, graph=task.graph.saying(np.concatenate(text))), lengths


def _embed(
    config: TextConfig, texts: list[str], model: PretrainedModel, cache: str | Path | None
) -> Float32[np.ndarray, "T H"]:
    return embed(texts, model, cache=cache, batch_tokens=config.batch_tokens, max_tokens=config.max_tokens)


def _digest(published: str, trained: PyTree) -> str:
    """What vectors of the trained language model depend on, beside the texts."""
    digest = hashlib.sha256(published.encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(trained):
        digest.update(jax.tree_util.keystr(path).encode() + str(leaf.shape).encode() + np.asarray(leaf).tobytes())
    return digest.hexdigest()


# --- the texts of a step -------------------------------------------------------------------------------------------


def chosen(config: Config, words: Words, batch: Batch, step: int) -> Int64[np.ndarray, "_"]:
    """Up to text.texts_per_step distinct texts, ascending, of the batch's users and of the items they are asked for.

    A function of (train.seed, step, batch): one text drawn evenly decides the class of lengths, and of the batch's
    texts of that class as many as may be are drawn without replacement. Any text is as likely as any other of its
    class; the expected gradient is that of all the batch's texts times the share drawn, a factor that AdamW takes out.
    """
    rng = np.random.default_rng((config.train.seed, step, DRAW))
    asked = _asked(batch).items()
    needed = np.unique(np.concatenate([_texts_of(words.of(node_type), nodes) for node_type, nodes in asked]))
    if not len(needed):
        return needed.astype(np.int64)
    among = needed[words.of_length[needed] == words.of_length[rng.choice(needed)]]
    return np.sort(rng.choice(among, min(config.text.texts_per_step, len(among)), replace=False)).astype(np.int64)


def _asked(batch: Batch) -> dict[str, np.ndarray]:
    return {USER: np.unique(batch.users[batch.mask.any(axis=1)]), ITEM: np.unique(batch.items[batch.mask > 0])}


def draw(config: Config, cache: Cached, batch: Batch, step: int, devices: int | None = None) -> Said:
    """The `chosen` texts, padded to one length, divided into chunks and over devices."""
    words, wanted = cache.words, config.text.texts_per_step
    drawn = chosen(config, words, batch, step)
    kind = words.of_length[drawn[0]] if len(drawn) else 0
    length = int(words.length[kind])
    count = len(used(devices))
    share = -(-wanted // count)
    rows = min(share, max(1, config.text.batch_tokens // length))
    shape = (count, -(-share // rows), rows)
    # A text without a token has no mean; one that fills up repeats any other, and no node has it.
    filled = np.resize(drawn if len(drawn) else np.argmin(words.of_length), np.prod(shape))
    ids, mask = np.zeros((len(filled), length), np.int32), np.zeros((len(filled), length), bool)
    for row, text in enumerate(filled):
        ids[row, : len(words.tokens[text])] = words.tokens[text]
        mask[row, : len(words.tokens[text])] = True
    ids, mask, before = (part.reshape(*shape, -1)[places(devices)] for part in (ids, mask, cache.vectors[filled]))
    of_types = {node_type: _corrections(cache, node_type, drawn, wanted) for node_type in (USER, ITEM)}
    return Said(ids, mask, before, of_types)


def _texts_of(links: Links, nodes: np.ndarray) -> np.ndarray:
    """The texts of some nodes, which ascend."""
    start, end = (np.searchsorted(links.nodes, nodes, side) for side in ("left", "right"))
    return links.texts[_ranges(start, end)]


def _ranges(start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """start[0], ..., end[0] - 1, start[1], ..."""
    count = end - start
    return np.repeat(start - np.cumsum(count) + count, count) + np.arange(count.sum())


def _corrections(cache: Cached, node_type: str, drawn: np.ndarray, room: int) -> Corrections:
    """room: M and K are so many or, where that is too few, twice, four times as many: few shapes, few programs."""
    links, order = cache.words.of(node_type), cache.words.by_text[node_type]
    ordered = links.texts[order]
    start, end = (np.searchsorted(ordered, drawn, side) for side in ("left", "right"))
    at = order[_ranges(start, end)]
    nodes, place = np.unique(links.nodes[at], return_inverse=True)
    while room < len(at):
        room *= 2
    more, fewer = (0, room - len(at)), (0, room - len(nodes))
    return Corrections(
        np.pad(nodes, fewer, constant_values=-1),
        np.pad(cache.lengths[node_type][nodes], fewer),
        np.pad(np.repeat(np.arange(len(drawn)), end - start).astype(np.int32), more),
        np.pad(place.astype(np.int32), more),
        np.pad(links.weights[at], more),
    )


# --- the step ------------------------------------------------------------------------------------------------------


def parallel_joint_step(config: Config, words: Words, devices: int | None = None) -> Any:
    """(state, task, batch, said) to (state, loss), over devices as `parallel_step`; said: of `draw`."""
    model = words.model
    encoder = model.config, model.pooling, model.normalize
    return functools.partial(_step, joint_program(config), encoder, devices, put(fixed(config, words), None, devices))


def fixed(config: Config, words: Words) -> tuple[PyTree, dict[str, Float32[np.ndarray, "H D"]]]:
    """The published weights, none where all are trained, and by node type what takes a text's change to its nodes'."""
    width = words.vectors.shape[1]
    shape = width, width + words.rest.shape[1]
    matrices = {
        node_type: np.zeros(shape, np.float32) if by is None else (by.matrix[:width] / words.scale).astype(np.float32)
        for node_type, by in words.whitening.items()
    }
    return {} if config.text.train == "full" else words.model.params, matrices


def joint_program(config: Config) -> Config:
    """As `program`, with what the joint step depends on besides."""
    text = TextConfig(train=config.text.train, learning_rate=config.text.learning_rate)
    return dataclasses.replace(program(config), text=text)


def _step(
    config: Config,
    encoder: tuple,
    devices: int | None,
    fixed: PyTree,
    state: TrainState,
    task: Task,
    batch: Batch,
    said: Said,
) -> tuple[TrainState, Float32[Array, ""]]:
    step = mapped_joint_step(config, encoder, devices, jax.tree.structure(state), jax.tree.structure(task))
    return step(state, task, split_batch(batch, devices), said, fixed)


@functools.lru_cache(maxsize=8)
def mapped_joint_step(config: Config, encoder: tuple, devices: int | None, states: Hashable, tasks: Hashable) -> Mapped:
    """The compiled program behind `parallel_joint_step`, of a batch and texts that are split already."""
    state, task = axes(shape_of(states)), task_axes(shape_of(tasks))
    step = functools.partial(joint_step, config, encoder)
    return over_devices(step, devices, in_axes=(state, task, 0, said_axes(), None), out_axes=(state, None), donate=(0,))


def said_axes() -> Said:
    """Where each part of `Said` has its devices; None: every device has it whole."""
    whole: Any = None
    divided: Any = 0
    return Said(divided, divided, divided, whole)


def joint_step(
    config: Config, encoder: tuple, state: TrainState, task: Task, batch: Batch, said: Said, fixed: PyTree
) -> tuple[TrainState, Float32[Array, ""]]:
    """`train_step` with the language model among the parameters.

    encoder: (config, pooling, normalize) of the language model. fixed: of `fixed`.
    """
    published, matrices = fixed

    def heard(params: PyTree, task: Task) -> Task:
        weights = adapted(_training(config), published, params[ENCODER])
        return corrected(task, said, _change(encoder, weights, said), matrices)

    return train_step(config, state, task, batch, _rule(config), heard)


def _change(encoder: tuple, weights: PyTree, said: Said) -> Float32[Array, "S H"]:
    """How far each of the step's texts has moved from its cached vector, on every device.

    Chunk by chunk, and again on the way back: what a chunk computes is never kept for two of them.
    """

    @jax.checkpoint
    def moved(weights: PyTree, chunk: tuple) -> Array:
        ids, mask, before = chunk
        return encode(weights, ids, mask, *encoder) - before

    chunks = jnp.asarray(said.ids), jnp.asarray(said.mask), jnp.asarray(said.before)
    change = jax.lax.map(functools.partial(moved, weights), chunks)
    return jax.lax.all_gather(change, AXIS).reshape(-1, change.shape[-1])


def corrected(
    task: Task, said: Said, change: Float32[AnyArray, "S H"], matrices: Mapping[str, Float32[AnyArray, "H D"]]
) -> Task:
    """The task with the rows of this device corrected by the change of a step's texts.

    The whitened mean of a node was its row times its length; it moves by what its texts do, each by its weight.
    """
    graph = task.graph
    nodes: Any = graph.graph.nodes
    text = jnp.asarray(nodes["text"])
    device = jax.lax.axis_index(AXIS)
    for node_type, rows in said.corrections.items():
        each = rows.weights[:, None] * (change @ matrices[node_type])[rows.texts]
        moved = jax.ops.segment_sum(each, rows.places, len(rows.nodes))
        mine = (rows.nodes >= 0) & (rows.nodes % graph.shards.count == device)
        row = jnp.where(mine, graph.node_slice(node_type).start + rows.nodes // graph.shards.count, len(text))
        before = text.at[row].get(mode="fill", fill_value=0) * rows.lengths[:, None]
        text = text.at[row].set(unit(before + moved), mode="drop")
    return dataclasses.replace(task, graph=graph.saying(text))
