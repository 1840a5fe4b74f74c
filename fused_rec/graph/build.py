"""What training may see, as a graph: holdings, ties, nearest texts and attribute nodes."""

import logging
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float32, Float64, Int32

from fused_rec.config import GraphConfig
from fused_rec.data.dataset import Dataset, column
from fused_rec.data.io.arrow import known as known_values
from fused_rec.data.io.arrow import pc
from fused_rec.data.io.plain import is_single
from fused_rec.data.node_texts import NodeTexts
from fused_rec.data.splits import Observed
from fused_rec.graph.hetero import Edges, HeteroGraph, Relation, hetero_graph
from fused_rec.memory import require_memory

LOG = logging.getLogger(__name__)
BLOCK_SCORES = 2**25  # cosines held at a time, 128 MiB
LONG = 10**14  # multiplications: an hour of two CPU cores
MOST_RELATIONS = 64  # kinds of ties, and attributes: each is compiled as two relations of every round of every tower
MANY_VALUES = 1000  # of an attribute: so many nodes that no two items share are a mistake, and no small table
USER, ITEM = "user", "item"
NO_TEXT_DIM = 1  # width of the text vectors where nothing is said: dense layers need a column
INTERACTS = Relation(USER, "holds", ITEM)
INTERACTED_BY = Relation(ITEM, "held_by", USER)


def build(
    dataset: Dataset,
    observed: Observed,
    texts: NodeTexts,
    vectors: Float32[np.ndarray, "T D"],
    config: GraphConfig,
) -> HeteroGraph:
    """Every relation both ways; `vectors` are the encoded `texts.texts`.

    Raises:
      ValueError: as `check_relations`; vectors that do not match the texts; or a name that two attributes, ties or
        node types share.
    """
    check_relations(dataset.items, observed.ties, config)
    if len(vectors) != len(texts.texts):
        raise ValueError(f"{len(vectors)} vectors for {len(texts.texts)} texts; encode the texts of this very split")
    counts = {USER: dataset.n_users, ITEM: dataset.n_items}
    text = {
        USER: node_vectors(texts.user_rows, texts.user_texts, texts.user_weights, vectors, dataset.n_users),
        ITEM: node_vectors(texts.item_rows, texts.item_texts, texts.item_weights, vectors, dataset.n_items),
    }
    parts = [
        bidirectional_edges(INTERACTS, INTERACTED_BY, observed.user, observed.item, counts),
        social_relations(observed.ties, counts),
    ]
    for name in config.attributes:
        values, edges = attribute_edges(dataset.items, name)
        counts[name] = values
        text[name] = np.zeros((values, vectors.shape[1]), np.float32)
        pair = Relation(ITEM, f"in_{name}", name), Relation(name, f"{name}_of", ITEM)
        parts.append(bidirectional_edges(*pair, *edges, counts))
    for node_type in (USER, ITEM):
        if config.text_knn and text[node_type].any():
            relation = Relation(node_type, "similar_text", node_type)
            parts.append({relation: text_knn_edges(text[node_type], config.text_knn)})
    return hetero_graph(counts, _merge_relations(parts), np.concatenate(list(text.values())))


def check_relations(items: pa.Table, ties: pa.Table, config: GraphConfig) -> None:
    """Looks for columns that make more relations or nodes than a graph bears, before texts are encoded for it.

    An attribute most of whose values belong to one item each is logged as a warning.

    Raises:
      ValueError: more than `MOST_RELATIONS` attributes or kinds of ties; an attribute that is no column of the items,
        names nodes that there are already, is continuous, or has more than `MANY_VALUES` values of which no two items
        share one.
    """
    kinds = ties.column("kind").unique()
    if len(kinds) > MOST_RELATIONS:
        shown = ", ".join(map(repr, kinds.slice(0, 3).to_pylist()))
        raise ValueError(
            f"ties.kind has {len(kinds):,} distinct values ({shown}, ...); each becomes a relation with gates of its "
            f"own, compiled for every round, and a graph takes at most {MOST_RELATIONS}. Merge rare kinds into one, "
            "give all ties one kind, or set graph.social_edges to none"
        )
    if len(config.attributes) > MOST_RELATIONS:
        raise ValueError(
            f"graph.attributes names {len(config.attributes)} columns; each becomes two relations, and a graph takes "
            f"at most {MOST_RELATIONS} columns. Name those that say most"
        )
    for place, name in enumerate(config.attributes):
        if name in (USER, ITEM, *config.attributes[:place]):
            raise ValueError(f"graph.attributes names {name!r}, and there are nodes of that name already; take it out")
        values, (known, _) = attribute_edges(items, name)
        nodes = f"graph.attributes names {name!r}, whose {values:,} distinct values for {len(known):,} items"
        if values == len(known) > MANY_VALUES:
            raise ValueError(
                f"{nodes} would become {values:,} nodes that connect nothing; take it out, or give it as bands or "
                "groups that items share"
            )
        if values > max(len(known) / 2, 20):
            LOG.warning("%s become nodes of which most connect nothing; bands or groups would connect items", nodes)


def _merge_relations(parts: Iterable[Mapping[Relation, Edges]]) -> dict[Relation, Edges]:
    relations: dict[Relation, Edges] = {}
    for part in parts:
        for relation, edges in part.items():
            if relation in relations:
                raise ValueError(f"two relations are named {relation}; rename that kind of tie or that attribute")
            relations[relation] = edges
    return relations


class Whitening(NamedTuple):
    """What `whitening` found: x - centre, times matrix, has nearly equal variance in every direction."""

    center: Float64[np.ndarray, "D"]
    matrix: Float64[np.ndarray, "D D"]


def node_vectors(
    rows: Int32[np.ndarray, "K"],
    texts: Int32[np.ndarray, "K"],
    weights: Float32[np.ndarray, "K"],
    vectors: Float32[np.ndarray, "T D"],
    n_nodes: int,
) -> Float32[np.ndarray, "n_nodes D"]:
    """Each node's weighted mean of its texts' vectors, whitened over the nodes of the type that have words.

    Rows have unit length; a node without words stays zero, and so do all where fewer than two have any.
    """
    means, named = node_means(rows, texts, weights, vectors, n_nodes)
    return whitened(means, named, whitening(means[named]))[0]


def node_means(
    rows: Int32[np.ndarray, "K"],
    texts: Int32[np.ndarray, "K"],
    weights: Float32[np.ndarray, "K"],
    vectors: Float32[np.ndarray, "T D"],
    n_nodes: int,
) -> tuple[Float32[np.ndarray, "n_nodes D"], Bool[np.ndarray, "n_nodes"]]:
    """Each node's weighted mean of its texts' vectors, zero where it has none, and whether it has any."""
    # Imported here: scipy takes 0.2 s that `import fused_rec.graph` need not.
    from scipy import sparse

    mean = sparse.csr_matrix((weights, (rows, texts)), shape=(n_nodes, len(vectors)), dtype=np.float32) @ vectors
    named = np.zeros(n_nodes, bool)
    named[rows] = True
    return mean, named


def whitening(means: Float32[np.ndarray, "n D"]) -> Whitening | None:
    """How to whiten such vectors; None of fewer than two, which have no directions to tell apart.

    Sentence vectors crowd into a narrow cone (Ethayarajh, 2019): the mean is taken out and the principal
    directions are scaled towards equal variance, the smallest ones held back by the mean variance so that
    noise is not blown up. Turned back to the encoder's axes, so that the result does not depend on the signs that
    a linear algebra library gives the directions: a checkpoint meets the same vectors on another machine.
    """
    if len(means) < 2:
        return None
    # In float64 nodes of one and the same text come out at zero, not at the rounding of their mean blown up.
    centre = means.mean(0, dtype=np.float64)
    variance, directions = np.linalg.eigh(np.atleast_2d(np.cov(means - centre, rowvar=False, dtype=np.float64)))
    scale = 1 / np.sqrt(np.maximum(variance, 0) + variance.mean() + 1e-12)
    return Whitening(centre, directions * scale[None, :] @ directions.T)


def whitened(
    means: Float32[np.ndarray, "n D"], named: Bool[np.ndarray, "n"], by: Whitening | None
) -> tuple[Float32[np.ndarray, "n D"], Float32[np.ndarray, "n"]]:
    """Whitened rows of unit length, and their lengths before; zeros where a node is not named, all where `by` is None.

    `by` may come from other means: of the same nodes with earlier vectors.
    """
    out, lengths = np.zeros(means.shape, np.float32), np.zeros(len(means), np.float32)
    if by is not None:
        scaled = (means[named] - by.center) @ by.matrix
        length = np.linalg.norm(scaled, axis=1, keepdims=True)
        out[named] = scaled / np.maximum(length, 1e-12)
        lengths[named] = length[:, 0]
    return out, lengths


def bidirectional_edges(
    forward: Relation, backward: Relation, sources: np.ndarray, targets: np.ndarray, counts: Mapping[str, int]
) -> dict[Relation, Edges]:
    """A relation and its reverse, messages weighted 1 / sqrt(degree of source * degree of target) (LightGCN, eq. 3)."""
    from_degree = np.bincount(sources, minlength=counts[forward.source])
    to_degree = np.bincount(targets, minlength=counts[forward.target])
    weight = (1 / np.sqrt(from_degree[sources] * to_degree[targets])).astype(np.float32)
    return {forward: Edges(sources, targets, weight), backward: Edges(targets, sources, weight)}


def social_relations(ties: pa.Table, counts: Mapping[str, int]) -> dict[Relation, Edges]:
    """One relation a kind of tie; `source` hears `target`, and the reverse where not all ties are mutual."""
    kinds = np.asarray(ties.column("kind").to_pylist(), dtype=object)
    sources, targets = (column(ties, name).astype(np.int64) for name in ("source", "target"))
    parts = []
    for kind in sorted(set(kinds)):
        at = kinds == kind
        senders, receivers = targets[at], sources[at]
        pair = bidirectional_edges(
            Relation(USER, kind, USER), Relation(USER, f"{kind}_of", USER), senders, receivers, counts
        )
        mutual = np.array_equal(
            np.sort(senders * counts[USER] + receivers), np.sort(receivers * counts[USER] + senders)
        )
        parts.append(dict(list(pair.items())[:1]) if mutual else pair)
    return _merge_relations(parts)


def attribute_edges(items: pa.Table, name: str) -> tuple[int, tuple[np.ndarray, np.ndarray]]:
    """Number of distinct values of a categorical item column, and its (item, value) edges.

    An item has one edge to each distinct entry of a list, and none to null. Raises ValueError for a column that is not
    there, of numbers with fractions, or of a type without values that can be compared.
    """
    rows, encoded = _attribute(items, name)
    codes = encoded.indices.to_numpy(zero_copy_only=False)
    known = encoded.is_valid().to_numpy(zero_copy_only=False)
    edges = np.unique(np.stack([rows[known], codes[known].astype(np.int64)], axis=1), axis=0)
    return len(encoded.dictionary), (edges[:, 0], edges[:, 1])


def attribute_values(items: pa.Table, name: str) -> list[Any]:
    """The values whose nodes `attribute_edges` numbers, in that order; raises ValueError as it does."""
    return _attribute(items, name)[1].dictionary.to_pylist()


def _attribute(items: pa.Table, name: str) -> tuple[np.ndarray, pa.DictionaryArray]:
    """Each value, and the row of its item."""
    if name not in items.column_names:
        raise ValueError(f"graph.attributes names {name!r}; the items have {items.column_names}")
    values = known_values(items.column(name)).combine_chunks()
    rows = np.arange(len(values))
    if pa.types.is_list(values.type):
        rows, values = pc.list_parent_indices(values).to_numpy(), pc.list_flatten(values)
    kind = values.type.value_type if pa.types.is_dictionary(values.type) else values.type
    if pa.types.is_floating(kind) or (pa.types.is_decimal(kind) and kind.scale > 0):
        raise ValueError(f"graph.attributes names {name!r}, which is continuous; give it as bands in a column of words")
    if pa.types.is_null(kind):
        values = values.cast(pa.string())
    if not is_single(kind):
        raise ValueError(f"graph.attributes names {name!r}, which holds {kind} values; give it as words or integers")
    return rows, values.dictionary_encode()


def text_knn_edges(vectors: Float32[np.ndarray, "n D"], num_neighbors: int) -> Edges:
    """Each node hears the `num_neighbors` nodes of nearest words, weighted by their cosine over its sum.

    Only positive cosines count; nodes without words neither hear nor are heard. Time grows with the square of the
    nodes with words; where it takes long, that is logged first.

    Raises:
      InsufficientMemoryError: vectors, a block of cosines, or the edges do not fit.
    """
    named = np.flatnonzero(vectors.any(1))
    k = min(num_neighbors, len(named) - 1)
    instead = "lower graph.text_knn, or set it to 0 to go without"
    # Vectors; cosines with their negatives and order; the edges in parts and joined.
    need = 4 * len(named) * vectors.shape[1] + 24 * max(BLOCK_SCORES, len(named)) + 40 * len(named) * max(k, 0)
    if len(named) > 1:
        require_memory(need, f"graph.text_knn, {k} neighbours of each of {len(named):,} nodes", instead)
    if len(named) ** 2 * vectors.shape[1] > LONG:
        LOG.warning("graph.text_knn compares %s nodes with each other, which takes hours; %s", len(named), instead)
    words = vectors[named]
    block = max(1, BLOCK_SCORES // max(len(named), 1))
    senders, receivers, weights = [], [], []
    for start in range(0, len(named), block) if k > 0 else ():
        scores = words[start : start + block] @ words.T
        rows = np.arange(len(scores))
        scores[rows, start + rows] = -np.inf
        top = np.argpartition(-scores, k - 1, axis=1)[:, :k]
        cosine = np.maximum(np.take_along_axis(scores, top, 1), 0)
        share = cosine / np.maximum(cosine.sum(1, keepdims=True), 1e-12)
        row, rank = np.nonzero(share)
        senders.append(named[top[row, rank]])
        receivers.append(named[start + row])
        weights.append(share[row, rank])
    empty = [np.zeros(0, np.int64)]
    return Edges(*(np.concatenate(part or empty) for part in (senders, receivers, weights)))
