"""Construction of the graph from observed data: interactions, social edges, text-kNN edges and attribute nodes.

Also the text embeddings of nodes: weighted means of the embeddings of their texts, whitened per node type.
"""

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
from fused_rec.graph.hetero import HostGraph, hetero_graph
from fused_rec.graph.schema import INTERACTED_BY, INTERACTS, ITEM, SIMILAR_TEXT, USER, Edges, Relation
from fused_rec.memory import require_memory

LOG = logging.getLogger(__name__)
BLOCK_SCORES = 2**25  # cosines in memory at a time, 128 MiB
LONG = 10**14  # multiplications: an hour on two CPU cores
MOST_RELATIONS = 64  # kinds of ties, or attributes: each compiles to two relations in every layer of every branch
MANY_VALUES = 1000  # above this, an attribute whose values are all distinct is refused as a mistake


def build(
    dataset: Dataset,
    observed: Observed,
    texts: NodeTexts,
    vectors: Float32[np.ndarray, "T D"],
    config: GraphConfig,
) -> HostGraph:
    """Builds the heterogeneous graph of observed data, every relation in both directions.

    Relations: interactions, one or two for each kind of tie, two for each attribute, and text-kNN among users and among
    items.

    Args:
      dataset: the tables, for the numbers of nodes and the items' attributes.
      observed: the interactions and ties that the model may see.
      texts: which texts belong to which nodes.
      vectors: float32 [T, D], embeddings of `texts.texts`.
      config: the graph's settings.

    Returns:
      The graph, with whitened text embeddings of width D.

    Raises:
      ValueError: as `check_relations`; vectors that do not match the texts; or two relations of the same name.
    """
    check_relations(dataset.items, observed.ties, config)
    if len(vectors) != len(texts.texts):
        raise ValueError(f"{len(vectors)} vectors for {len(texts.texts)} texts; encode the texts of this split")
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
            relation = Relation(node_type, SIMILAR_TEXT, node_type)
            parts.append({relation: text_knn_edges(text[node_type], config.text_knn)})
    return hetero_graph(counts, _merge_relations(parts), np.concatenate(list(text.values())))


def check_relations(items: pa.Table, ties: pa.Table, config: GraphConfig) -> None:
    """Checks, before texts are encoded, that the columns make no excessive number of relations or nodes.

    Logs a warning for an attribute with more than 20 values and more than one for every two items.

    Args:
      items: the items, with the attributes as columns.
      ties: the ties, with a column `kind`.
      config: the graph's settings.

    Raises:
      ValueError: more than `MOST_RELATIONS` attributes or kinds of ties; or an attribute that is not a column of the
        items, has the name of another node type, is continuous, or has more than `MANY_VALUES` values, all distinct.
    """
    kinds = ties.column("kind").unique()
    if len(kinds) > MOST_RELATIONS:
        shown = ", ".join(map(repr, kinds.slice(0, 3).to_pylist()))
        raise ValueError(
            f"ties.kind has {len(kinds):,} distinct values ({shown}, ...); each becomes a relation with its own "
            f"gates, compiled for every layer, and a graph takes at most {MOST_RELATIONS}. Merge rare kinds into one, "
            "give all ties one kind, or set graph.social_edges to none"
        )
    if len(config.attributes) > MOST_RELATIONS:
        raise ValueError(
            f"graph.attributes names {len(config.attributes)} columns; each becomes two relations, and a graph takes "
            f"at most {MOST_RELATIONS} columns. Name the most informative ones"
        )
    for index, name in enumerate(config.attributes):
        if name in (USER, ITEM, *config.attributes[:index]):
            raise ValueError(f"graph.attributes names {name!r}, which is already a node type; take it out")
        values, (known, _) = attribute_edges(items, name)
        nodes = f"graph.attributes names {name!r}, whose {values:,} distinct values for {len(known):,} items"
        if values == len(known) > MANY_VALUES:
            raise ValueError(
                f"{nodes} would become {values:,} nodes that connect no items; take it out, or give it as bands or "
                "groups that items share"
            )
        if values > max(len(known) / 2, 20):
            LOG.warning("%s become nodes of which most connect no items; bands or groups would connect them", nodes)


def _merge_relations(parts: Iterable[Mapping[Relation, Edges]]) -> dict[Relation, Edges]:
    """Joins mappings of relations; raises ValueError for a repeated name."""
    relations: dict[Relation, Edges] = {}
    for part in parts:
        for relation, edges in part.items():
            if relation in relations:
                raise ValueError(f"two relations are named {relation}; rename that kind of tie or that attribute")
            relations[relation] = edges
    return relations


class Whitening(NamedTuple):
    """A whitening transform: (x - center) @ matrix has nearly equal variance in every direction."""

    center: Float64[np.ndarray, "D"]
    matrix: Float64[np.ndarray, "D D"]


def node_vectors(
    rows: Int32[np.ndarray, "K"],
    texts: Int32[np.ndarray, "K"],
    weights: Float32[np.ndarray, "K"],
    vectors: Float32[np.ndarray, "T D"],
    n_nodes: int,
) -> Float32[np.ndarray, "n_nodes D"]:
    """Computes text embeddings of the nodes of one type: weighted means of their texts' embeddings, whitened.

    Args:
      rows: int32 [K], the node of each link between a node and a text.
      texts: int32 [K], the text of each link, an index into `vectors`.
      weights: float32 [K], the weight of each link; a node's sum to 1.
      vectors: float32 [T, D], embeddings of the texts.
      n_nodes: the number of nodes of the type.

    Returns:
      float32 [n_nodes, D], rows of unit length; zero for a node without text, and for all nodes where fewer than two
      have text.
    """
    means, has_text = node_means(rows, texts, weights, vectors, n_nodes)
    return whitened(means, has_text, whitening(means[has_text]))[0]


def node_means(
    rows: Int32[np.ndarray, "K"],
    texts: Int32[np.ndarray, "K"],
    weights: Float32[np.ndarray, "K"],
    vectors: Float32[np.ndarray, "T D"],
    n_nodes: int,
) -> tuple[Float32[np.ndarray, "n_nodes D"], Bool[np.ndarray, "n_nodes"]]:
    """Averages the embeddings of each node's texts.

    Args:
      rows: int32 [K], the node of each link between a node and a text.
      texts: int32 [K], the text of each link, an index into `vectors`.
      weights: float32 [K], the weight of each link; a node's sum to 1.
      vectors: float32 [T, D], embeddings of the texts.
      n_nodes: the number of nodes of the type.

    Returns:
      float32 [n_nodes, D], weighted means, zero for a node without text; and bool [n_nodes], whether a node has text.
    """
    # Imported here: importing scipy takes 0.2 s, which `import fused_rec.graph` should not.
    from scipy import sparse

    mean = sparse.csr_matrix((weights, (rows, texts)), shape=(n_nodes, len(vectors)), dtype=np.float32) @ vectors
    has_text = np.zeros(n_nodes, bool)
    has_text[rows] = True
    return mean, has_text


def whitening(means: Float32[np.ndarray, "n D"]) -> Whitening | None:
    """Fits a regularized ZCA whitening.

    Sentence embeddings lie in a narrow cone (Ethayarajh, 2019): the mean is subtracted and principal directions are
    scaled to 1 / sqrt(variance + mean variance), so that directions of small variance are not amplified to noise. The
    result is rotated back to the encoder's axes: it does not depend on the signs that a linear algebra library gives
    the eigenvectors, and a checkpoint finds the same embeddings on another machine.

    Args:
      means: float32 [n, D], unwhitened embeddings of the nodes with text.

    Returns:
      The transform; None for fewer than two rows.
    """
    if len(means) < 2:
        return None
    # In float64 nodes of one identical text become zero instead of amplified rounding errors.
    center = means.mean(0, dtype=np.float64)
    variance, directions = np.linalg.eigh(np.atleast_2d(np.cov(means - center, rowvar=False, dtype=np.float64)))
    scale = 1 / np.sqrt(np.maximum(variance, 0) + variance.mean() + 1e-12)
    return Whitening(center, directions * scale[None, :] @ directions.T)


def whitened(
    means: Float32[np.ndarray, "n D"], named: Bool[np.ndarray, "n"], by: Whitening | None
) -> tuple[Float32[np.ndarray, "n D"], Float32[np.ndarray, "n"]]:
    """Whitens rows and normalizes them to unit length.

    Args:
      means: float32 [n, D], unwhitened embeddings.
      named: bool [n], which nodes have text.
      by: a transform, possibly fitted on other embeddings of these nodes; None: all rows become zero.

    Returns:
      float32 [n, D], rows of unit length or zero; and float32 [n], their norms before the normalization.
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
    """Builds a relation and its reverse with symmetric normalization, 1 / sqrt(d_source d_target) (LightGCN, eq. 3).

    Args:
      forward: the relation from sources to targets.
      backward: its reverse.
      sources: int [E], nodes of the forward relation's source type.
      targets: int [E], nodes of its target type.
      counts: the number of nodes by type.

    Returns:
      Edges of both relations, in the order given.
    """
    from_degree = np.bincount(sources, minlength=counts[forward.source])
    to_degree = np.bincount(targets, minlength=counts[forward.target])
    weight = (1 / np.sqrt(from_degree[sources] * to_degree[targets])).astype(np.float32)
    return {forward: Edges(sources, targets, weight), backward: Edges(targets, sources, weight)}


def social_relations(ties: pa.Table, counts: Mapping[str, int]) -> dict[Relation, Edges]:
    """Builds social edges: per kind of tie a relation from `target` to `source`, and its reverse unless all are mutual.

    Args:
      ties: a table with columns source, target (user indices) and kind.
      counts: the number of nodes by type.

    Returns:
      Edges by relation.
    """
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
    """Reads the edges between items and the values of a categorical column.

    Args:
      items: the items.
      name: a column of single values or of lists; null has no edge.

    Returns:
      The number of distinct values, and the edges as arrays of items and of value indices, int64 [E] each.

    Raises:
      ValueError: no such column, or one of fractional numbers or of a type whose values cannot be compared.
    """
    rows, encoded = _attribute(items, name)
    codes = encoded.indices.to_numpy(zero_copy_only=False)
    known = encoded.is_valid().to_numpy(zero_copy_only=False)
    edges = np.unique(np.stack([rows[known], codes[known].astype(np.int64)], axis=1), axis=0)
    return len(encoded.dictionary), (edges[:, 0], edges[:, 1])


def attribute_values(items: pa.Table, name: str) -> list[Any]:
    """Returns the distinct values of a categorical column in the order of their nodes in `attribute_edges`.

    Args:
      items: the items.
      name: the column.

    Raises:
      ValueError: as `attribute_edges`.
    """
    return _attribute(items, name)[1].dictionary.to_pylist()


def _attribute(items: pa.Table, name: str) -> tuple[np.ndarray, pa.DictionaryArray]:
    """The item row of each value, and the dictionary-encoded values."""
    if name not in items.column_names:
        raise ValueError(f"graph.attributes names {name!r}; the items have {items.column_names}")
    values = known_values(items.column(name)).combine_chunks()
    rows = np.arange(len(values))
    if pa.types.is_list(values.type):
        rows, values = pc.list_parent_indices(values).to_numpy(), pc.list_flatten(values)
    kind = values.type.value_type if pa.types.is_dictionary(values.type) else values.type
    if pa.types.is_floating(kind) or (pa.types.is_decimal(kind) and kind.scale > 0):
        raise ValueError(f"graph.attributes names {name!r}, which is continuous; give it as bands in a column of text")
    if pa.types.is_null(kind):
        values = values.cast(pa.string())
    if not is_single(kind):
        raise ValueError(f"graph.attributes names {name!r}, which holds {kind} values; give it as text or integers")
    return rows, values.dictionary_encode()


def text_knn_edges(vectors: Float32[np.ndarray, "n D"], num_neighbors: int) -> Edges:
    """Finds the k nearest neighbors of each node by cosine similarity of text embeddings.

    Edges run from a neighbor to the node, weighted by the cosine over the sum of the node's cosines; neighbors with
    cosines of 0 or less are dropped, and nodes without text have no edges. Exact search in time quadratic in the
    number of nodes with text; a warning is logged where it takes hours.

    Args:
      vectors: float32 [n, D], rows of unit length, zero for a node without text.
      num_neighbors: k, at least 1.

    Returns:
      Edges of the relation.

    Raises:
      InsufficientMemoryError: embeddings, a block of cosines, or the edges do not fit in memory.
    """
    with_text = np.flatnonzero(vectors.any(1))
    k = min(num_neighbors, len(with_text) - 1)
    instead = "lower graph.text_knn, or set it to 0 to go without"
    # Embeddings; cosines with their negatives and order; edges in blocks and joined.
    need = (
        4 * len(with_text) * vectors.shape[1] + 24 * max(BLOCK_SCORES, len(with_text)) + 40 * len(with_text) * max(k, 0)
    )
    if len(with_text) > 1:
        require_memory(need, f"graph.text_knn, {k} neighbors of each of {len(with_text):,} nodes", instead)
    if len(with_text) ** 2 * vectors.shape[1] > LONG:
        LOG.warning("graph.text_knn compares %s nodes with each other, which takes hours; %s", len(with_text), instead)
    embeddings = vectors[with_text]
    block = max(1, BLOCK_SCORES // max(len(with_text), 1))
    senders, receivers, weights = [], [], []
    for start in range(0, len(with_text), block) if k > 0 else ():
        scores = embeddings[start : start + block] @ embeddings.T
        rows = np.arange(len(scores))
        scores[rows, start + rows] = -np.inf
        top = np.argpartition(-scores, k - 1, axis=1)[:, :k]
        cosine = np.maximum(np.take_along_axis(scores, top, 1), 0)
        share = cosine / np.maximum(cosine.sum(1, keepdims=True), 1e-12)
        row, rank = np.nonzero(share)
        senders.append(with_text[top[row, rank]])
        receivers.append(with_text[start + row])
        weights.append(share[row, rank])
    empty = [np.zeros(0, np.int64)]
    return Edges(*(np.concatenate(part or empty) for part in (senders, receivers, weights)))
