"""From a config to all that training and serving need: tables, split, audit, texts, graph."""

import dataclasses
import logging

import numpy as np
import pyarrow as pa

from fused_rec import hosts
from fused_rec.config import Config
from fused_rec.data import controls, readers
from fused_rec.data.attributes import describe
from fused_rec.data.audit import audit
from fused_rec.data.dataset import Dataset
from fused_rec.data.node_texts import NodeTexts, node_texts
from fused_rec.data.splits import Observed, Split, observe, split
from fused_rec.graph.build import WORDLESS, build, check_relations
from fused_rec.graph.propagate import adjacencies
from fused_rec.memory import require_memory
from fused_rec.model.baselines import Seen, counted
from fused_rec.model.closed_form import spectrum
from fused_rec.text.cache import open_cache
from fused_rec.text.embed import embed
from fused_rec.text.lexical import lexical_vectors, side_by_side
from fused_rec.text.pretrained import open_model
from fused_rec.train import joint
from fused_rec.train.step import Task, TrainState, init

LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Prepared:
    """One dataset, split, and what `parts` of it may be seen, as a graph; ties are those of the graph."""

    dataset: Dataset
    split: Split
    observed: Observed
    task: Task
    words: joint.Words | None = None  # where the language model is trained too


def read(config: Config) -> tuple[Dataset, Split]:
    """The tables as `read_dataset` gives them, and their split.

    Raises as `read_dataset` does, and CacheError, before anything is read, where words will be encoded and the cache
    of their vectors cannot be made.
    """
    if config.model.variant != "graph" and config.text.control != "random":
        open_cache(config.text.cache)
    dataset = read_dataset(config)
    return dataset, split(dataset, config.split)


def read_dataset(config: Config) -> Dataset:
    """The tables, described by their attributes where the config asks for it.

    Raises DataError with one report where the tables must not be used, NoFolderError where they are not there, and
    ValueError where text.attributes names what is no attribute of users or items.
    """
    dataset = describe(readers.load(config.data), config.text.attributes)
    for repair, count in dataset.repairs.items():
        LOG.info("repaired: %s: %d", repair, count)
    for note, count in dataset.notes.items():
        LOG.info("note: %s: %d", note, count)
    LOG.info(
        "%s: %d customers, %d products, %d interactions, %d reviews, %d ties",
        *(dataset.name, dataset.n_users, dataset.n_items),
        *(table.num_rows for table in (dataset.interactions, dataset.reviews, dataset.ties)),
    )
    return dataset


def prepare(config: Config, dataset: Dataset, parts_of: Split, parts: tuple[str, ...] = ("train",)) -> Prepared:
    """Takes away what the split holds out, proves it gone, encodes the words left and builds the graph.

    Controls (text.control, graph.ties) come after the proof, which would refuse what they make up.

    Raises:
      InsufficientMemoryError: the vectors of the texts, or the closed form, do not fit.
      LeakError: text or ties tell of held-out rows.
      ValueError: columns make no graph (`fused_rec.graph.build.check_relations`).
    """
    observed = observe(dataset, parts_of, parts)
    ties = observed.ties if config.graph.ties != "none" else observed.ties.slice(0, 0)
    check_relations(dataset.items, ties, config.graph)
    texts = node_texts(dataset, observed)
    checked = audit(dataset, parts_of, observed, texts, parts)
    LOG.info("leak audit passed: %s", ", ".join(f"{count} {what}" for what, count in checked.items()))
    observed = dataclasses.replace(observed, ties=seen_ties(config, observed.ties))
    texts, vectors = encode(config, texts)
    graph = build(dataset, observed, texts, vectors, config.graph)
    words = None
    if config.text.train != "frozen":
        words = joint.words(config.text, texts, vectors, dict(graph.node_types))
    popularity = counted(observed.item, observed.age, config.model.half_life, dataset.n_items)
    task = Task(graph, adjacencies(graph), present(dataset, observed), popularity)
    if config.model.spectrum:
        LOG.info("closed form: %d directions of the holdings, minutes where these are many", config.model.spectrum_rank)
        seen = Seen(observed.user, observed.item, dataset.n_users, dataset.n_items)
        found = spectrum(seen, rank=config.model.spectrum_rank, l2=config.model.spectrum_l2)
        # One process's: of another machine's rows, which may be turned, the products with these would be wrong.
        task = dataclasses.replace(task, spectrum=hosts.from_first(found))
    return Prepared(dataset, parts_of, observed, task, words)


def fresh(config: Config, prepared: Prepared) -> TrainState:
    """A state before the first step, whole and on the host: a function of train.seed."""
    state = init(config, prepared.task)
    return state if prepared.words is None else joint.begin(config, prepared.words, state)


def spoken(config: Config, prepared: Prepared, state: TrainState) -> Prepared:
    """The same with the words of the language model as a whole state has it; itself where that is not trained."""
    if prepared.words is None:
        return prepared
    trained = state.params[joint.ENCODER]
    found = joint.cached(config, prepared.words, prepared.task, trained, keep=True)
    return dataclasses.replace(prepared, task=found.task)


def published(prepared: Prepared) -> Prepared:
    """The inverse of `spoken`: with the words of the published language model, which baselines are given."""
    if prepared.words is None:
        return prepared
    return dataclasses.replace(prepared, task=joint.told(prepared.words, prepared.task, prepared.words.vectors)[0])


def seen_ties(config: Config, ties: pa.Table) -> pa.Table:
    """The ties that the graph gets: these, others of the same degrees, or none."""
    if config.graph.ties == "none":
        return ties.slice(0, 0)
    if config.graph.ties == "true":
        return ties
    rewired = controls.rewire(ties, config.train.seed)
    true, drawn = (set(zip(*table.to_pydict().values(), strict=True)) for table in (ties, rewired))
    LOG.info("ties rewired: %d of %d are true ones by chance", len(true & drawn), len(true))
    return rewired


def encode(config: Config, texts: NodeTexts) -> tuple[NodeTexts, np.ndarray]:
    """The words of each node and float32 [T, D] vectors of the distinct texts, true ones or those of a control.

    A variant without words needs no language model.
    """
    if config.model.variant == "graph" or not texts.texts:
        return texts, np.zeros((len(texts.texts), WORDLESS), np.float32)
    model = open_model(config.text.model, offline=config.text.offline, prompt=config.text.prompt)
    _require_room(texts, model.config.hidden_size + config.text.lexical)
    lexical = lexical_vectors(texts.texts, config.text.lexical)
    if config.text.control == "random":
        return controls.random_texts(texts, model.config.hidden_size + lexical.shape[1], config.train.seed)
    vectors = embed(
        texts.texts,
        model,
        cache=config.text.cache,
        batch_tokens=config.text.batch_tokens,
        max_tokens=config.text.max_tokens,
    )
    if lexical.shape[1]:
        vectors = side_by_side(vectors, lexical)
    return controls.shuffle_texts(texts, config.train.seed) if config.text.control == "shuffled" else texts, vectors


def _require_room(texts: NodeTexts, width: int) -> None:
    """Raises InsufficientMemoryError where the words of all nodes do not fit, before the first is encoded.

    The vectors of the texts in parts and joined; of the nodes of one type means and, in float64, what whitens them.
    """
    n_nodes = max((int(rows.max()) + 1 for rows in (texts.user_rows, texts.item_rows) if len(rows)), default=0)
    what = f"{width} columns of words for {len(texts.texts):,} texts and {n_nodes:,} nodes"
    instead = "raise data.core, lower text.lexical, take a smaller text.model, or set model.variant to graph"
    require_memory(8 * len(texts.texts) * width + 24 * n_nodes * width, what, instead)


def present(dataset: Dataset, observed: Observed) -> np.ndarray:
    """bool [I]: items that somebody holds; to learn that nobody wants the others would be to learn from the future."""
    there = np.zeros(dataset.n_items, bool)
    there[observed.item] = True
    return there
