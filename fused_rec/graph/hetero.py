"""The heterogeneous graph: node types and relations in one `jraph.GraphsTuple`.

Nodes are concatenated by type in the order of `node_types`, edges by relation in the order of `relations`; within a
relation edges ascend by (receiver, sender). The counts are static, so a type or a relation is a slice known at trace
time, and a new relation adds data, not branches.
"""

from collections.abc import Mapping
from typing import Any

import flax.struct
import jax.numpy as jnp
import jraph
import numpy as np
from jaxtyping import Array, Float32, Int32

from fused_rec.distributed.devices import AnyArray, Shards
from fused_rec.graph.schema import Edges, Relation


@flax.struct.dataclass
class HeteroGraph:
    """A heterogeneous graph, a pytree of NumPy arrays on the host or of JAX arrays inside a program.

    With several `shards` it is the part of one device (`fused_rec.training.sharding.shard_graph_inputs`): a share of
    the rows of every type, and no edges, which are in the adjacencies. The counts remain those of all nodes.

    A sampled subgraph (`fused_rec.graph.sampling`) has graph.nodes["number"] too, int32 [N]: the IDs of its nodes in
    the whole graph, local to their types. Its counts are numbers of rows, including rows padded with node 0, and it
    has no edges either.

    Attributes:
      graph: nodes["text"] float32 [N, D], text embeddings, zero for a node without text; edges["weight"] float32 [E];
        senders, receivers, n_node and n_edge as in `jraph.GraphsTuple`.
      node_types: (name, number of nodes) of each type, in order.
      relations: (relation, number of edges) of each relation, in order.
      shards: how many devices share the rows.
    """

    graph: jraph.GraphsTuple
    node_types: tuple[tuple[str, int], ...] = flax.struct.field(pytree_node=False)
    relations: tuple[tuple[Relation, int], ...] = flax.struct.field(pytree_node=False)
    shards: Shards = flax.struct.field(pytree_node=False, default=Shards())

    def node_slice(self, node_type: str) -> slice:
        """Returns the slice of the type's rows.

        Raises:
          KeyError: no such type; names the types there are.
        """
        return _slice(tuple((name, self.shards.rows(count)) for name, count in self.node_types), node_type)

    def count(self, node_type: str) -> int:
        """Returns the number of nodes of the type, over all devices."""
        return dict(self.node_types)[node_type]

    def rows(self, node_type: str) -> int:
        """Returns the number of rows of the type on one device, including padding."""
        return self.shards.rows(self.count(node_type))

    def all_gather(self, node_type: str, x: Array) -> Array:
        """Gathers [rows, ...] of all devices to [nodes of the type, ...] on every device."""
        return self.shards.all_gather(x)[: self.count(node_type)]

    @property
    def sampled(self) -> bool:
        """Whether this is a sampled subgraph."""
        nodes: Any = self.graph.nodes
        return "number" in nodes

    def global_ids(self, node_type: str, rows: Int32[AnyArray, "m"]) -> Int32[Array, "m"]:
        """Maps rows of this device to node IDs in the whole graph, local to the type."""
        return self._number(node_type)[rows] if self.sampled else self.shards.global_ids(rows)

    def global_ids_of_all(self, node_type: str, nodes: Int32[AnyArray, "m"]) -> Int32[Array, "m"]:
        """Maps nodes numbered over all devices, such as senders, to node IDs in the whole graph."""
        return self.all_gather(node_type, self._number(node_type))[nodes] if self.sampled else jnp.asarray(nodes)

    def _number(self, node_type: str) -> Int32[Array, "rows"]:
        """IDs of a sampled subgraph's rows in the whole graph."""
        nodes: Any = self.graph.nodes
        return jnp.asarray(nodes["number"][self.node_slice(node_type)])

    def text(self, node_type: str) -> Float32[AnyArray, "rows D"]:
        """Returns the text embeddings of one node type, [rows, D]."""
        nodes: Any = self.graph.nodes  # any pytree or None in jraph's types
        return nodes["text"][self.node_slice(node_type)]

    def with_text(self, text: Float32[AnyArray, "rows D"]) -> "HeteroGraph":
        """Returns this graph with other text embeddings, of all types in their order."""
        return self.replace(graph=self.graph._replace(nodes={"text": text}))  # pyright: ignore[reportAttributeAccessIssue]

    def edges(self, relation: Relation) -> Edges:
        """Returns one relation's edges, senders and receivers local to their types."""
        at = _slice(self.relations, relation)
        graph: Any = self.graph
        return Edges(
            graph.senders[at] - self.node_slice(relation.source).start,
            graph.receivers[at] - self.node_slice(relation.target).start,
            graph.edges["weight"][at],
        )


def _slice(counts: tuple, key: object) -> slice:
    """The slice of `key` among concatenated blocks of these lengths."""
    start = 0
    for name, count in counts:
        if name == key:
            return slice(start, start + count)
        start += count
    raise KeyError(f"{key!r} is not among {[name for name, _ in counts]}")


def hetero_graph(
    node_types: Mapping[str, int], relations: Mapping[Relation, Edges], text: Float32[np.ndarray, "N D"]
) -> HeteroGraph:
    """Builds one validated graph, edges sorted by (receiver, sender) within each relation.

    JAX clamps node IDs out of range and drops them from segment sums silently, so everything is checked here.

    Args:
      node_types: number of nodes by type.
      relations: edges by relation, in any order.
      text: float32 [N, D], text embeddings of all nodes in the order of `node_types`, zeros for nodes without text.

    Returns:
      The graph, on the host.

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
    if len(text) != total:
        raise ValueError(
            f"text has {len(text)} rows for {total} nodes; give one row per node, zeros for a node without text"
        )
    if not np.isfinite(text).all():
        row = int(np.flatnonzero(~np.isfinite(text).all(1))[0])
        raise ValueError(f"text embedding of node {row} is not finite; encode it again")
    start = dict(zip(node_types, np.cumsum([0, *node_types.values()]), strict=False))
    senders, receivers, weights, counts = [], [], [], []
    for relation, edges in relations.items():
        _check(relation, edges, node_types)
        order = _order(relation, edges, node_types)
        senders.append(edges.senders[order] + start[relation.source])
        receivers.append(edges.receivers[order] + start[relation.target])
        weights.append(edges.weight[order])
        counts.append((relation, len(order)))
    empty = [np.zeros(0)]
    parts: dict[str, Any] = {
        "nodes": {"text": np.asarray(text, np.float32)},
        "edges": {"weight": np.concatenate(weights or empty).astype(np.float32)},
        "senders": np.concatenate(senders or empty).astype(np.int32),
        "receivers": np.concatenate(receivers or empty).astype(np.int32),
        "n_node": np.array([total], np.int32),
        "n_edge": np.array([sum(count for _, count in counts)], np.int32),
    }
    return HeteroGraph(jraph.GraphsTuple(globals=None, **parts), tuple(node_types.items()), tuple(counts))


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
        bad = np.flatnonzero((ids < 0) | (ids >= bound))
        if len(bad):
            allowed = f"{node_type} ids are 0 to {bound - 1}" if bound else f"there are no {node_type} nodes"
            raise ValueError(f"{relation}: {role} {ids[bad[0]]} of edge {bad[0]}; {allowed}")
    bad = np.flatnonzero(~np.isfinite(edges.weight))
    if len(bad):
        raise ValueError(f"{relation}: weight {edges.weight[bad[0]]} of edge {bad[0]} is not finite")


def _order(relation: Relation, edges: Edges, node_types: Mapping[str, int]) -> np.ndarray:
    """The permutation that sorts edges by (receiver, sender); one int64 key sorts faster than two."""
    keys = edges.receivers.astype(np.int64) * node_types[relation.source] + edges.senders
    order = np.argsort(keys)
    if not np.diff(keys[order]).all():
        raise ValueError(f"{relation}: an edge is repeated; merge repeated edges before building the graph")
    return order
