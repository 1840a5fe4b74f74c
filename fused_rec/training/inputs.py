"""From a config to all that training and serving need: tables, split, audit, texts, graph."""

import dataclasses
import logging

import numpy as np
import pyarrow as pa

from fused_rec.baselines.linear import low_rank_ease
from fused_rec.baselines.neighbors import Interactions, item_counts
from fused_rec.config import Config
from fused_rec.data import controls
from fused_rec.data.attributes import describe
from fused_rec.data.dataset import Dataset
from fused_rec.data.leakage import audit
from fused_rec.data.node_texts import NodeTexts, node_texts
from fused_rec.data.sources import registry
from fused_rec.data.splits import Observed, Split, observe, split
from fused_rec.distributed import processes
from fused_rec.graph.adjacency import build_adjacencies
from fused_rec.graph.build import NO_TEXT_DIM, build, check_relations
from fused_rec.memory import require_memory
from fused_rec.text.cache import open_cache
from fused_rec.text.encode import encode_texts
from fused_rec.text.pretrained import open_model
from fused_rec.text.tfidf import concat_normalized, tfidf_vectors
from fused_rec.training import finetune
from fused_rec.training.train_step import GraphInputs, TrainState, init

LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Prepared:
    """One dataset, split, and what `parts` of it may be seen, as a graph; ties are those of the graph."""

    dataset: Dataset
    split: Split
    observed: Observed
    graph_inputs: GraphInputs
    encoder_data: finetune.EncoderData | None = None  # where the language model is trained too


def read(config: Config) -> tuple[Dataset, Split]:
    """The tables as `read_dataset` gives them, and their split.

    Raises as `read_dataset` does, and CacheError, before anything is read, where words will be encoded and the cache
    of their vectors cannot be made.
    """
    if config.model.variant != "graph" and config.text.features != "random":
        open_cache(config.text.cache)
    dataset = read_dataset(config)
    return dataset, split(dataset, config.split)


def read_dataset(config: Config) -> Dataset:
    """The tables, described by their attributes where the config asks for it.

    Raises DataError with one report where the tables must not be used, NoFolderError where they are not there, and
    ValueError where text.attributes names what is no attribute of users or items.
    """
    dataset = describe(registry.load(config.data), config.text.attributes)
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


def prepare(config: Config, dataset: Dataset, data_split: Split, splits: tuple[str, ...] = ("train",)) -> Prepared:
    """Takes away what the split holds out, proves it gone, encodes the words left and builds the graph.

    Controls (text.features, graph.social_edges) come after the proof, which would refuse what they make up.

    Raises:
      InsufficientMemoryError: the vectors of the texts, or the closed form, do not fit.
      LeakError: text or ties tell of held-out rows.
      ValueError: columns make no graph (`fused_rec.graph.build.check_relations`).
    """
    observed = observe(dataset, data_split, splits)
    ties = observed.ties if config.graph.social_edges != "none" else observed.ties.slice(0, 0)
    check_relations(dataset.items, ties, config.graph)
    texts = node_texts(dataset, observed)
    checked = audit(dataset, data_split, observed, texts, splits)
    LOG.info("leak audit passed: %s", ", ".join(f"{count} {what}" for what, count in checked.items()))
    observed = dataclasses.replace(observed, ties=social_edges(config, observed.ties))
    texts, vectors = encode_node_texts(config, texts)
    graph = build(dataset, observed, texts, vectors, config.graph)
    encoder_data = None
    if config.text.finetune != "frozen":
        encoder_data = finetune.encoder_data(config.text, texts, vectors, dict(graph.node_types))
    popularity = item_counts(observed.item, observed.age, config.model.popularity_half_life, dataset.n_items)
    graph_inputs = GraphInputs(graph, build_adjacencies(graph), trained_item_mask(dataset, observed), popularity)
    if config.model.ease_weight:
        LOG.info("closed form: %d directions of the holdings, minutes where these are many", config.model.ease_rank)
        interactions = Interactions(observed.user, observed.item, dataset.n_users, dataset.n_items)
        found = low_rank_ease(interactions, rank=config.model.ease_rank, l2=config.model.ease_l2)
        # One process's: of another machine's rows, which may be turned, the products with these would be wrong.
        graph_inputs = dataclasses.replace(graph_inputs, ease=processes.broadcast_arrays(found))
    return Prepared(dataset, data_split, observed, graph_inputs, encoder_data)


def init_state(config: Config, prepared: Prepared) -> TrainState:
    """A state before the first step, whole and on the host: a function of train.seed."""
    state = init(config, prepared.graph_inputs)
    return state if prepared.encoder_data is None else finetune.init_state(config, prepared.encoder_data, state)


def with_finetuned_text(config: Config, prepared: Prepared, state: TrainState) -> Prepared:
    """The same with the words of the language model as a whole state has it; itself where that is not trained."""
    if prepared.encoder_data is None:
        return prepared
    trained = state.params[finetune.ENCODER]
    found = finetune.encode_all_texts(config, prepared.encoder_data, prepared.graph_inputs, trained, keep=True)
    return dataclasses.replace(prepared, graph_inputs=found.graph_inputs)


def with_pretrained_text(prepared: Prepared) -> Prepared:
    """The inverse of `with_finetuned_text`: with the words of the published language model, which baselines are
    given.
    """
    if prepared.encoder_data is None:
        return prepared
    return dataclasses.replace(
        prepared,
        graph_inputs=finetune.with_text_embeddings(
            prepared.encoder_data, prepared.graph_inputs, prepared.encoder_data.vectors
        )[0],
    )


def social_edges(config: Config, ties: pa.Table) -> pa.Table:
    """The ties that the graph gets: these, others of the same degrees, or none."""
    if config.graph.social_edges == "none":
        return ties.slice(0, 0)
    if config.graph.social_edges == "observed":
        return ties
    rewired = controls.rewire(ties, config.train.seed)
    true, drawn = (set(zip(*table.to_pydict().values(), strict=True)) for table in (ties, rewired))
    LOG.info("ties rewired: %d of %d are true ones by chance", len(true & drawn), len(true))
    return rewired


def encode_node_texts(config: Config, texts: NodeTexts) -> tuple[NodeTexts, np.ndarray]:
    """The words of each node and float32 [T, D] vectors of the distinct texts, true ones or those of a control.

    A variant without words needs no language model.
    """
    if config.model.variant == "graph" or not texts.texts:
        return texts, np.zeros((len(texts.texts), NO_TEXT_DIM), np.float32)
    model = open_model(config.text.model, offline=config.text.offline, prompt=config.text.prompt)
    _require_room(texts, model.config.hidden_size + config.text.tfidf_dim)
    lexical = tfidf_vectors(texts.texts, config.text.tfidf_dim)
    if config.text.features == "random":
        return controls.random_texts(texts, model.config.hidden_size + lexical.shape[1], config.train.seed)
    vectors = encode_texts(
        texts.texts,
        model,
        cache=config.text.cache,
        batch_tokens=config.text.batch_tokens,
        max_tokens=config.text.max_tokens,
    )
    if lexical.shape[1]:
        vectors = concat_normalized(vectors, lexical)
    return controls.shuffle_texts(texts, config.train.seed) if config.text.features == "shuffled" else texts, vectors


def _require_room(texts: NodeTexts, width: int) -> None:
    """Raises InsufficientMemoryError where the words of all nodes do not fit, before the first is encoded.

    The vectors of the texts in parts and joined; of the nodes of one type means and, in float64, what whitens them.
    """
    n_nodes = max((int(rows.max()) + 1 for rows in (texts.user_rows, texts.item_rows) if len(rows)), default=0)
    what = f"{width} columns of words for {len(texts.texts):,} texts and {n_nodes:,} nodes"
    instead = "raise data.k_core, lower text.tfidf_dim, take a smaller text.model, or set model.variant to graph"
    require_memory(8 * len(texts.texts) * width + 24 * n_nodes * width, what, instead)


def trained_item_mask(dataset: Dataset, observed: Observed) -> np.ndarray:
    """bool [I]: items that somebody holds; to learn that nobody wants the others would be to learn from the future."""
    there = np.zeros(dataset.n_items, bool)
    there[observed.item] = True
    return there
