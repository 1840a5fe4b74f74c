"""The heterogeneous graph on the host: node types, relations with their edges, and the text embeddings of all nodes.

Nodes are numbered within their type. Text embeddings are concatenated by type in the order of `node_types`; within a
relation edges ascend by (receiver, sender). The model reads a `fused_rec.graph.device_graph.DeviceGraph`, made of this.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jraph
import numpy as np
from jaxtyping import Float32

from fused_rec.distributed.devices import return_large
from fused_rec.graph.order import order_edges
from fused_rec.graph.schema import Edges, Relation

LARGE_GRAPH = 2**22  # edges of a relation


@dataclasses.dataclass(frozen=True)
class HostGraph:
    """A validated heterogeneous graph of read-only NumPy arrays; see `hetero_graph`.

    Attributes:
      node_types: (name, number of nodes) of each type, in order.
      edges: edges by relation, in order: int32 senders and receivers, local to their types, and float32 weights.
      text: float32 [N, D], text embeddings, zero for a node without text.
    """

    node_types: tuple[tuple[str, int], ...]
    edges: Mapping[Relation, Edges]
    text: Float32[np.ndarray, "N D"]

    @property
    def relations(self) -> tuple[tuple[Relation, int], ...]:
        """(relation, number of edges) of each relation, in order."""
        return tuple((relation, len(edges.senders)) for relation, edges in self.edges.items())

    def node_slice(self, node_type: str) -> slice:
        """Returns the slice of the type's nodes among the nodes of all types.

        Raises:
          KeyError: no such type; names the types there are.
        """
        start = 0
        for name, count in self.node_types:
            if name == node_type:
                return slice(start, start + count)
            start += count
        raise KeyError(f"{node_type!r} is not among {[name for name, _ in self.node_types]}")

    def count(self, node_type: str) -> int:
        """Returns the number of nodes of the type."""
        return dict(self.node_types)[node_type]

    def text_of(self, node_type: str) -> Float32[np.ndarray, "_ D"]:
        """Returns the text embeddings of one node type, float32 [n, D]."""
        return self.text[self.node_slice(node_type)]

    def to_jraph(self) -> jraph.GraphsTuple:
        """Returns the graph for jraph, nodes numbered over all types and edges concatenated in order of the relations.

        Returns:
          nodes["text"] float32 [N, D], edges["weight"] float32 [E], senders, receivers, n_node and n_edge int32.
        """
        start = {node_type: self.node_slice(node_type).start for node_type, _ in self.node_types}
        senders = [edges.senders + start[relation.source] for relation, edges in self.edges.items()]
        receivers = [edges.receivers + start[relation.target] for relation, edges in self.edges.items()]
        weights = [edges.weight for edges in self.edges.values()]
        empty = [np.zeros(0)]
        parts: dict[str, Any] = {
            "nodes": {"text": self.text},
            "edges": {"weight": np.concatenate(weights or empty).astype(np.float32)},
            "senders": np.concatenate(senders or empty).astype(np.int32),
            "receivers": np.concatenate(receivers or empty).astype(np.int32),
            "n_node": np.array([len(self.text)], np.int32),
            "n_edge": np.array([sum(map(len, weights))], np.int32),
        }
        return jraph.GraphsTuple(globals=None, **parts)


def hetero_graph(
    node_types: Mapping[str, int], relations: Mapping[Relation, Edges], text: Float32[np.ndarray, "N D"]
) -> HostGraph:
    """Builds one validated graph, edges sorted by (receiver, sender) within each relation.

    JAX clamps node IDs out of range and drops them from segment sums silently, so everything is checked here.

    Args:
      node_types: number of nodes by type.
      relations: edges by relation, in any order.
      text: float32 [N, D], text embeddings of all nodes in the order of `node_types`, zeros for nodes without text.

    Returns:
      The graph.

    Raises:
      ValueError: an unknown node type, a node ID out of range, a weight or a text embedding that is not finite, a
        repeated edge, lengths that differ, or more nodes or edges than int32 can number; names the relation, the value
        and the bound.
    """
    total, longest = sum(node_types.values()), max((len(e.senders) for e in relations.values()), default=0)
    if max(total, longest) >= 2**31:
        raise ValueError(
            f"the graph has {total:,} nodes and up to {longest:,} edges in a relation; both are numbered by int32, "
            "below 2,147,483,648: raise data.k_core"
        )
    if longest > LARGE_GRAPH:
        return_large()
    if len(text) != total:
        raise ValueError(
            f"text has {len(text)} rows for {total} nodes; give one row per node, zeros for a node without text"
        )
    if not np.isfinite(text).all():
        row = int(np.flatnonzero(~np.isfinite(text).all(1))[0])
        raise ValueError(f"text embedding of node {row} is not finite; encode it again")
    found = {}
    for relation, edges in relations.items():
        _check(relation, edges, node_types)
        ordered = order_edges(edges, node_types[relation.source], node_types[relation.target])
        if _repeats(ordered):
            raise ValueError(f"{relation}: an edge is repeated; merge repeated edges before building the graph")
        found[relation] = Edges(*map(_read_only, ordered))
    return HostGraph(tuple(node_types.items()), found, _read_only(np.asarray(text, np.float32)))


def _read_only(array: np.ndarray) -> np.ndarray:
    """The same memory, which cannot be written by way of this array."""
    view = array.view()
    view.flags.writeable = False
    return view


def _check(relation: Relation, edges: Edges, node_types: Mapping[str, int]) -> None:
    """Raises ValueError for edges that do not fit the node types or have weights that are not finite."""
    if not len(edges.senders) == len(edges.receivers) == len(edges.weight):
        raise ValueError(f"{relation}: {[len(part) for part in edges]} senders, receivers, weights; they must agree")
    for role, ids, node_type in (
        ("sender", edges.senders, relation.source),
        ("receiver", edges.receivers, relation.target),
    ):
        if node_type not in node_types:
            raise ValueError(f"{relation}: {node_type!r} is not a node type; it must be one of {list(node_types)}")
        bound = node_types[node_type]
        if len(ids) and (ids.min() < 0 or ids.max() >= bound):
            bad = np.flatnonzero((ids < 0) | (ids >= bound))
            allowed = f"{node_type} ids are 0 to {bound - 1}" if bound else f"there are no {node_type} nodes"
            raise ValueError(f"{relation}: {role} {ids[bad[0]]} of edge {bad[0]}; {allowed}")
    bad = np.flatnonzero(~np.isfinite(edges.weight))
    if len(bad):
        raise ValueError(f"{relation}: weight {edges.weight[bad[0]]} of edge {bad[0]} is not finite")


def _repeats(ordered: Edges) -> bool:
    """Whether an edge occurs twice in edges sorted by (receiver, sender)."""
    same = (nodes[1:] == nodes[:-1] for nodes in (ordered.senders, ordered.receivers))
    return bool(np.logical_and(*same).any())
