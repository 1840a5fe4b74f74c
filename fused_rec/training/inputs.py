"""Inputs of training and serving, from a config: tables, split, leak audit, text embeddings and the graph."""

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

import jax
import numpy as np
import pyarrow as pa

from fused_rec.baselines.neighbors import NotApplicableError, item_counts
from fused_rec.config import Config, GraphConfig, ModelConfig, TextConfig
from fused_rec.data import controls
from fused_rec.data.attributes import describe
from fused_rec.data.dataset import Dataset, period
from fused_rec.data.leakage import audit
from fused_rec.data.node_texts import NodeTexts, ReviewTexts, node_texts
from fused_rec.data.sources import registry
from fused_rec.data.splits import Observed, Split, observe, observe_all, split
from fused_rec.graph.adjacency import DegreeScale
from fused_rec.graph.build import build, check_relations
from fused_rec.graph.device_graph import device_graph
from fused_rec.graph.hetero import HostGraph
from fused_rec.graph.schema import ITEM, NO_TEXT_DIM, USER, Relation
from fused_rec.model.model import active_relations
from fused_rec.text.cache import open_cache
from fused_rec.text.features import FittedFeatures, TextFeatures, apply_features, encode_features, without_tfidf
from fused_rec.text.tfidf import apply_tfidf
from fused_rec.training import finetune
from fused_rec.training.fitted import Fitted, node_ids, trained_parameters
from fused_rec.training.train_step import GraphInputs, TrainState, init, init_shapes
from fused_rec.training.warm_start import Initial

LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelInputs:
    """A dataset, and the graph of what a model may use of it: everything, unless it is split (`Prepared`)."""

    history: ClassVar[str] = "all"
    dataset: Dataset
    observed: Observed  # interactions, texts and ties that the model uses; ties as in the graph
    text: TextFeatures  # by the pretrained encoder
    graph_inputs: GraphInputs
    encoder_data: finetune.EncoderData | None = None  # if the text encoder is trained
    unknown: Mapping[str, int] = dataclasses.field(default_factory=dict)  # counts of what the model cannot use

    def used_interactions(self) -> pa.Table:
        """Returns the rows of `dataset.interactions` that the model uses."""
        return self.dataset.interactions

    def served(self) -> dict[str, Any]:
        """Describes what a ranking uses: which history, its first and last date, numbers of users, items and rows."""
        counts = self.dataset.n_users, self.dataset.n_items, len(self.observed.user)
        names = "customers", "products", "interactions", "reviews", "social edges"
        used = dict(zip(names, (*counts, len(self.observed.reviews), len(self.observed.ties)), strict=True))
        dates = period(self.used_interactions())
        return {"history": self.history, **used, "period": dates, "unknown": dict(self.unknown)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepared(ModelInputs):
    """The same of a split dataset, of which some splits are observed: inputs of training and evaluation."""

    history: ClassVar[str] = "train"
    split: Split
    splits: tuple[str, ...]  # the observed splits
    initial: Initial | None = None  # what a warm start starts from

    def used_interactions(self) -> pa.Table:
        """Returns the rows of the observed splits."""
        return self.dataset.interactions.take(np.concatenate([getattr(self.split, name) for name in self.splits]))


AnyInputs = TypeVar("AnyInputs", bound=ModelInputs)


def read(config: Config) -> tuple[Dataset, Split]:
    """Reads the tables and splits them.

    Args:
      config: settings of data, split, text and model.

    Returns:
      The dataset and its split.

    Raises:
      CacheError: texts will be encoded and the cache of their embeddings cannot be made; before anything is read.
      DataError, NoFolderError, ValueError: as `read_dataset`.
    """
    if config.encodes_text:
        open_cache(config.text.cache)
    dataset = read_dataset(config)
    return dataset, split(dataset, config.split)


def read_dataset(config: Config) -> Dataset:
    """Reads the tables, with texts from attributes where text.attributes names any; logs repairs and notes.

    Args:
      config: of which the sections data and text count.

    Returns:
      The dataset.

    Raises:
      DataError: the tables have faults; one report lists them.
      NoFolderError: data.path is not a folder.
      ValueError: text.attributes names something that is not an attribute of users or items.
    """
    dataset = describe(registry.load(config.data), config.text.attributes)
    for repair, count in dataset.repairs.items():
        LOG.info("repaired: %s: %d", repair, count)
    for note, count in dataset.notes.items():
        LOG.info("note: %s: %d", note, count)
    LOG.info(
        "%s: %d users, %d items, %d interactions, %d reviews, %d ties",
        *(dataset.name, dataset.n_users, dataset.n_items),
        *(table.num_rows for table in (dataset.interactions, dataset.reviews, dataset.ties)),
    )
    return dataset


def require_method_inputs(config: Config, dataset: Dataset, data_split: Split) -> None:
    """Checks, before any computation, that the tables have what a published method (model.method) reads.

    Args:
      config: all settings.
      dataset: the tables.
      data_split: their split.

    Raises:
      NotApplicableError: the training split has no texts or no social edges, and the method reads them.
    """
    method, observed = config.model.method, observe(dataset, data_split)
    if method and config.model.reads_text and not node_texts(dataset, observed).texts:
        lacks = "texts", "give a column text of items or users, or the table reviews"
    elif method and config.graph.social_edges != "none" and not observed.ties.num_rows:
        lacks = "social edges", "give the table ties"
    else:
        return
    raise NotApplicableError(
        f"{method} reads {lacks[0]}, and the training split of {dataset.name} has none; {lacks[1]}, or choose another "
        "model.method"
    )


def prepare(
    config: Config,
    dataset: Dataset,
    data_split: Split,
    splits: tuple[str, ...] = ("train",),
    initial: Initial | None = None,
) -> Prepared:
    """Removes held-out rows, audits the rest for leaks, encodes its texts and builds the graph inputs.

    Controls (text.features, graph.social_edges) are applied after the audit, which would refuse their made-up data.

    Args:
      config: all settings.
      dataset: the tables.
      data_split: their split.
      splits: the observed splits.
      initial: what a warm start starts from; what the earlier run fitted is applied, and not fitted anew.

    Returns:
      Everything that training and evaluation need.

    Raises:
      InsufficientMemoryError: text embeddings do not fit in memory.
      LeakError: text or ties leak held-out rows.
      ValueError: columns that make no graph (`fused_rec.graph.build.check_relations`).
    """
    observed = observe(dataset, data_split, splits)
    ties = observed.ties if config.graph.social_edges != "none" else observed.ties.slice(0, 0)
    check_relations(dataset.items, ties, config.graph)
    texts = node_texts(dataset, observed)
    checked = audit(dataset, data_split, observed, texts, splits)
    LOG.info("leak audit passed: %s", ", ".join(f"{count} {what}" for what, count in checked.items()))
    observed = dataclasses.replace(observed, ties=social_edges(config.graph, observed.ties, config.train.seed))
    text = text_features(config, texts) if initial is None else _applied_text(config, texts, initial.fitted.text)
    scales = None if initial is None else initial.fitted.scales
    graph = build(dataset, observed, {name: nodes.rows for name, nodes in text.node_rows().items()}, config.graph)
    encoder_data = None if config.text.finetune == "frozen" else finetune.encoder_data(config.text, text)
    return Prepared(
        dataset=dataset,
        split=data_split,
        observed=observed,
        splits=splits,
        text=text,
        graph_inputs=make_graph_inputs(config.model, dataset, observed, graph, scales),
        encoder_data=encoder_data,
        initial=initial,
    )


def serving_inputs(config: Config, dataset: Dataset, fitted: Fitted) -> ModelInputs:
    """Prepares everything that tables have for a trained model, by what its training fitted.

    Args:
      config: all settings of the run.
      dataset: the tables, those of the training or others.
      fitted: of the training.

    Returns:
      The inputs. `unknown` counts ties of kinds that the model does not know, and users and items of whom there is
      neither text nor any edge that it reads.

    Raises:
      InsufficientMemoryError: text embeddings do not fit in memory.
      ValueError: columns that make no graph (`fused_rec.graph.build.check_relations`), or no texts for a trained text
        encoder.
    """
    observed = observe_all(dataset)
    texts = node_texts(dataset, observed)
    ties, unknown = _known_ties(social_edges(config.graph, observed.ties, config.train.seed), fitted)
    observed = dataclasses.replace(observed, ties=ties)
    check_relations(dataset.items, ties, config.graph)
    text = _applied_text(config, texts, fitted.text)
    rows = {name: nodes.rows for name, nodes in text.node_rows().items()}
    graph = build(dataset, observed, rows, config.graph, fitted.scales)
    inputs = ModelInputs(
        dataset=dataset,
        observed=observed,
        text=text,
        graph_inputs=make_graph_inputs(config.model, dataset, observed, graph, fitted.scales),
        encoder_data=None if config.text.finetune == "frozen" else finetune.encoder_data(config.text, text),
    )
    return dataclasses.replace(inputs, unknown=unknown | unreached(config.model, inputs))


def _known_ties(ties: pa.Table, fitted: Fitted) -> tuple[pa.Table, dict[str, int]]:
    """Splits off the ties of kinds that a training did not have, and counts them."""
    is_known = np.array([kind in fitted.tie_kinds for kind in ties.column("kind").to_pylist()], bool)
    if is_known.all():
        return ties, {}
    first = ties.column("kind")[int(np.argmin(is_known))].as_py()
    what = f"ties of kinds that the training did not have, not used (the first: {first!r})"
    return ties.filter(pa.array(is_known)), {what: int((~is_known).sum())}


def unreached(config: ModelConfig, inputs: ModelInputs) -> dict[str, int]:
    """Counts the users and the items without text and edges that the model reads; logs the first of each."""
    found: dict[str, int] = {}
    graph = inputs.graph_inputs.graph
    for node_type, what in ((USER, "customers"), (ITEM, "products")):
        reached = np.asarray(graph.text[node_type]).any(1)
        for relation in active_relations(config, graph):
            if relation.target == node_type:
                reached = reached | (np.asarray(graph.adjacencies[relation].degrees.in_degree) > 0)
        if not reached.all():
            first = node_ids(inputs.dataset, node_type)[int(np.argmin(reached))].as_py()
            what = f"{what} without {'text and edges' if config.uses_text else 'edges'}, ranked by popularity alone"
            LOG.warning("the first of the %s: %r", what, first)  # the counts stand in cards, which name no customer
            found[what] = int((~reached).sum())
    return found


def make_graph_inputs(
    config: ModelConfig,
    dataset: Dataset,
    observed: Observed,
    graph: HostGraph,
    scales: Mapping[Relation, DegreeScale] | None = None,
) -> GraphInputs:
    """Adds to a graph what else the model reads: trained items and popularity.

    Args:
      config: settings of popularity.
      dataset: for the numbers of users and items.
      observed: the observed interactions.
      graph: the graph of them.
      scales: what standardizes degrees, as of `device_graph`.

    Returns:
      The inputs, on the host.
    """
    popularity = item_counts(observed.item, observed.age, config.popularity_half_life, dataset.n_items)
    return GraphInputs(device_graph(graph, scales=scales), trained_item_mask(dataset, observed), popularity)


def init_state(config: Config, prepared: ModelInputs) -> TrainState:
    """Initializes a training state, including the text encoder's parameters if it is trained.

    Args:
      config: all settings; train.seed decides the initial values.
      prepared: the graph inputs and encoder data.

    Returns:
      The state at step 0, unsharded, on the host. Of a warm start it has the earlier run's parameters; nodes and
      relations that the earlier run did not train keep their random values.
    """
    state = init(config, prepared.graph_inputs)
    if prepared.encoder_data is not None:
        state = finetune.init_state(config, prepared.encoder_data, state)
    if not isinstance(prepared, Prepared) or (initial := prepared.initial) is None:
        return state
    params = trained_parameters(initial.params, state.params, initial.fitted, prepared.dataset, keep_new=True)
    encoder_snapshot = state.encoder_snapshot if prepared.encoder_data is None else params[finetune.ENCODER]
    return dataclasses.replace(state, params=params, encoder_snapshot=encoder_snapshot)


def state_like(config: Config, prepared: ModelInputs) -> TrainState:
    """Makes a state like those of `init_state`, to be filled from a checkpoint: nothing is drawn or compiled for it.

    Args:
      config: all settings.
      prepared: the graph inputs and encoder data.

    Returns:
      A state of the same structure, shapes and types with the seed of the config; other values do not count.
    """
    if prepared.encoder_data is not None:
        return init_state(config, prepared)
    shapes = init_shapes(config, prepared.graph_inputs)
    state = jax.tree.map(lambda leaf: np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape), shapes)
    return dataclasses.replace(state, seed=np.array(config.train.seed, np.int32))


def with_finetuned_text(config: Config, prepared: AnyInputs, state: TrainState) -> AnyInputs:
    """Replaces text embeddings by those of the fine-tuned encoder; embeddings are cached on disk.

    Args:
      config: all settings.
      prepared: with text embeddings of any encoder state.
      state: unsharded.

    Returns:
      `prepared` with other text embeddings; itself if the encoder is frozen.
    """
    if prepared.encoder_data is None:
        return prepared
    trained = state.params[finetune.ENCODER]
    found = finetune.encode_all_texts(config, prepared.encoder_data, prepared.graph_inputs, trained, keep=True)
    return dataclasses.replace(prepared, graph_inputs=found.graph_inputs)


def with_pretrained_text(prepared: AnyInputs) -> AnyInputs:
    """Replaces text embeddings by those of the pretrained encoder, which baselines use; inverts `with_finetuned_text`.

    Args:
      prepared: with text embeddings of any encoder state.

    Returns:
      `prepared` with other text embeddings; itself if the encoder is frozen.
    """
    if prepared.encoder_data is None:
        return prepared
    graph_inputs, _ = finetune.with_text_features(prepared.graph_inputs, prepared.text)
    return dataclasses.replace(prepared, graph_inputs=graph_inputs)


def social_edges(config: GraphConfig, ties: pa.Table, seed: int) -> pa.Table:
    """Returns the ties of the graph: the observed ones, a degree-preserving rewiring of them, or none.

    Args:
      config: of which social_edges counts.
      ties: the observed ties.
      seed: seed of the rewiring.
    """
    if config.social_edges == "none":
        return ties.slice(0, 0)
    if config.social_edges == "observed":
        return ties
    rewired = controls.rewire(ties, seed)
    observed, sampled = (set(zip(*table.to_pydict().values(), strict=True)) for table in (ties, rewired))
    LOG.info("ties rewired: %d of %d coincide with observed ones by chance", len(observed & sampled), len(observed))
    return rewired


def text_features(config: Config, texts: NodeTexts) -> TextFeatures:
    """Returns the text features; of the variant graph, and where there are no texts, one column of zeros.

    Args:
      config: settings of text and model; train.seed is the seed of the controls.
      texts: texts and their links to nodes.

    Raises:
      InsufficientMemoryError: text features do not fit in memory.
      ValueError: the text encoder is to be trained, and there are no texts.
    """
    _require_texts(config.text, texts)
    if not config.model.reads_text or not texts.texts:
        return without_tfidf(texts, np.zeros((len(texts.texts), NO_TEXT_DIM), np.float32))
    return encode_features(config.text, texts, config.train.seed)


def _applied_text(config: Config, texts: NodeTexts, fitted: FittedFeatures) -> TextFeatures:
    """Returns the text features by what was fitted on other texts; raises as `text_features`."""
    _require_texts(config.text, texts)
    if texts.texts and fitted.lm_width != NO_TEXT_DIM:
        return apply_features(config.text, texts, fitted, config.train.seed)
    lm = np.zeros((len(texts.texts), fitted.lm_width), np.float32)
    return TextFeatures(texts, lm, apply_tfidf(fitted.tfidf, texts.texts), fitted)


def _require_texts(config: TextConfig, texts: NodeTexts) -> None:
    if not texts.texts and config.finetune != "frozen":
        raise ValueError(f"text.finetune is {config.finetune!r}, and these tables have no texts; it must be frozen")


def dropped_reviews(config: Config, texts: NodeTexts) -> ReviewTexts | None:
    """Returns the reviews that model.review_dropout applies to in training steps.

    Args:
      config: settings of model, text and training.
      texts: texts and their links to nodes.

    Returns:
      The reviews of observed interactions; None where there are none, or where steps keep all texts: without edge
      dropout or text inputs, with sampled neighbors, with a trained text encoder, and for controls of the text.
    """
    model, reviews = config.model, texts.reviews
    applies = model.review_dropout and model.edge_dropout > 0 and model.uses_text
    if not applies or config.train.num_neighbors or config.text.finetune != "frozen":
        return None
    return reviews if reviews is not None and len(reviews.text) else None


def trained_item_mask(dataset: Dataset, observed: Observed) -> np.ndarray:
    """Marks the items with observed interactions, bool [I].

    Others are excluded from the softmax denominator; ranking them below the positives would leak the split.

    Args:
      dataset: for the number of items.
      observed: the observed interactions.
    """
    mask = np.zeros(dataset.n_items, bool)
    mask[observed.item] = True
    return mask
