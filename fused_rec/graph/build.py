"""Construction of the graph from observed data: interactions, social edges, text-kNN edges and attribute nodes."""

import logging
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float32

from fused_rec.config import GraphConfig
from fused_rec.data.dataset import Dataset, column
from fused_rec.data.io.arrow import known as known_values
from fused_rec.data.io.arrow import pc
from fused_rec.data.io.plain import is_single
from fused_rec.data.splits import Observed
from fused_rec.graph.hetero import HostGraph, hetero_graph
from fused_rec.graph.schema import INTERACTED_BY, INTERACTS, ITEM, SIMILAR_TEXT, USER, Edges, Relation
from fused_rec.memory import require_memory

LOG = logging.getLogger(__name__)
BLOCK_SCORES = 2**25  # cosines in memory at a time, 128 MiB
BLOCK_EDGES = 2**20  # edges whose degrees are in memory at a time
LONG = 10**14  # multiplications: an hour on two CPU cores
MOST_RELATIONS = 64  # kinds of ties, or attributes: each compiles to two relations in every layer of every branch
MANY_VALUES = 1000  # above this, an attribute whose values are all distinct is refused as a mistake


def build(
    dataset: Dataset,
    observed: Observed,
    text: Mapping[str, Float32[np.ndarray, "_ D"]],
    config: GraphConfig,
    known: Collection[Relation] | None = None,
) -> HostGraph:
    """Builds the heterogeneous graph of observed data, every relation in both directions.

    Relations: interactions, one or two for each kind of tie, two for each attribute, and text-kNN among users and among
    items.

    Args:
      dataset: the tables, for the numbers of nodes and the items' attributes.
      observed: the interactions and ties that the model may see.
      text: text embeddings of users and items, float32 [n, D], by node type.
      config: the graph's settings.
      known: relations of the graph that the model was trained on, the only ones that it can read; None: all.

    Returns:
      The graph, with text embeddings of width D.

    Raises:
      ValueError: as `check_relations`; or two relations of the same name.
    """
    check_relations(dataset.items, observed.ties, config)
    counts = {USER: dataset.n_users, ITEM: dataset.n_items}
    text = {node_type: text[node_type] for node_type in counts}
    parts = [
        bidirectional_edges(INTERACTS, INTERACTED_BY, observed.user, observed.item, counts),
        social_relations(observed.ties, counts, known),
    ]
    for name in config.attributes:
        values, edges = attribute_edges(dataset.items, name)
        counts[name] = values
        text[name] = np.zeros((values, text[ITEM].shape[1]), np.float32)
        pair = Relation(ITEM, f"in_{name}", name), Relation(name, f"{name}_of", ITEM)
        parts.append(bidirectional_edges(*pair, *edges, counts))
    for node_type in (USER, ITEM):
        if config.text_knn and text[node_type].any():
            relation = Relation(node_type, SIMILAR_TEXT, node_type)
            parts.append({relation: text_knn_edges(text[node_type], config.text_knn)})
    relations = _merge_relations(parts)
    if known is not None:
        relations = {relation: edges for relation, edges in relations.items() if relation in known}
    return hetero_graph(counts, relations, np.concatenate(list(text.values())))


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
    weight = np.empty(len(sources), np.float32)
    for start in range(0, len(sources), BLOCK_EDGES):
        part = slice(start, start + BLOCK_EDGES)
        weight[part] = 1 / np.sqrt(from_degree[sources[part]] * to_degree[targets[part]])
    return {forward: Edges(sources, targets, weight), backward: Edges(targets, sources, weight)}


def social_relations(
    ties: pa.Table, counts: Mapping[str, int], known: Collection[Relation] | None = None
) -> dict[Relation, Edges]:
    """Builds social edges: per kind of tie a relation from `target` to `source`, and its reverse unless all are mutual.

    Args:
      ties: a table with columns source, target (user indices) and kind.
      counts: the number of nodes by type.
      known: as in `build`; a kind has a reverse if it is among them.

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
        if known is None:
            mutual = np.array_equal(
                np.sort(senders * counts[USER] + receivers), np.sort(receivers * counts[USER] + senders)
            )
        else:
            mutual = list(pair)[1] not in known
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
