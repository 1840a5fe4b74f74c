"""The typed graph: several kinds of nodes and relations over one `jraph.GraphsTuple`.

Nodes of all types stand one after the other in the order of `node_types`, edges of all relations in the order
of `relations`; inside a relation edges ascend by (receiver, sender). The counts are static, so a type or a
relation is a slice known at trace time, and a new relation adds data, not branches.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.struct
import jax.numpy as jnp
import jraph
import numpy as np
from jaxtyping import Array, Float32, Int32

from fused_rec.distributed.devices import AnyArray, Shards


class Relation(NamedTuple):
    """Messages flow from nodes of type `source` to nodes of type `target`."""

    source: str
    name: str
    target: str

    def __str__(self) -> str:
        return f"{self.source}-{self.name}-{self.target}"


class Edges(NamedTuple):
    """One relation's edges, numbered inside their node types. weight: the fixed factor of a message."""

    senders: np.ndarray  # int [E], rows of the source type
    receivers: np.ndarray  # int [E], rows of the target type
    weight: np.ndarray  # float [E]


@flax.struct.dataclass
class HeteroGraph:
    """graph.nodes["text"]: float32 [N, D]; graph.edges["weight"]: float32 [E]; the rest of the legend in `GraphsTuple`.

    A node without words has a zero text row. The arrays are NumPy's, on the host; devices get what they work on.

    Where `shards` are several this is what one device has (`fused_rec.training.sharding.shard_graph_inputs`): of every
    type its share of the rows, and no edges, which stand in its adjacencies. The counts remain those of all nodes.

    A sample of a larger graph (`fused_rec.graph.sampling`) has graph.nodes["number"] too, int32 [N]: the numbers of its
    nodes there, inside their types. It counts rows, of which some are filled up with node 0, and has no edges either.
    """

    graph: jraph.GraphsTuple
    node_types: tuple[tuple[str, int], ...] = flax.struct.field(pytree_node=False)
    relations: tuple[tuple[Relation, int], ...] = flax.struct.field(pytree_node=False)
    shards: Shards = flax.struct.field(pytree_node=False, default=Shards())

    def node_slice(self, node_type: str) -> slice:
        """Where the type's nodes stand. Raises KeyError naming the types there are."""
        return _slice(tuple((name, self.shards.rows(count)) for name, count in self.node_types), node_type)

    def count(self, node_type: str) -> int:
        """Number of nodes of the type, on all devices."""
        return dict(self.node_types)[node_type]

    def rows(self, node_type: str) -> int:
        """Number of rows that a device has of the type."""
        return self.shards.rows(self.count(node_type))

    def all_gather(self, node_type: str, x: Array) -> Array:
        """[rows, ...] to one row a node of the type, on every device."""
        return self.shards.all_gather(x)[: self.count(node_type)]

    @property
    def sampled(self) -> bool:
        """Whether the nodes are some of a larger graph's."""
        nodes: Any = self.graph.nodes
        return "number" in nodes

    def global_ids(self, node_type: str, rows: Int32[AnyArray, "m"]) -> Int32[Array, "m"]:
        """The numbers, in the whole graph and inside their type, of some of this device's rows."""
        return self._number(node_type)[rows] if self.sampled else self.shards.global_ids(rows)

    def global_ids_of_all(self, node_type: str, nodes: Int32[AnyArray, "m"]) -> Int32[Array, "m"]:
        """The same of nodes that are counted over all devices, as senders are."""
        return self.all_gather(node_type, self._number(node_type))[nodes] if self.sampled else jnp.asarray(nodes)

    def _number(self, node_type: str) -> Int32[Array, "rows"]:
        nodes: Any = self.graph.nodes
        return jnp.asarray(nodes["number"][self.node_slice(node_type)])

    def text(self, node_type: str) -> Float32[AnyArray, "rows D"]:
        """Text vectors of one node type."""
        nodes: Any = self.graph.nodes  # to jraph any tree, or none
        return nodes["text"][self.node_slice(node_type)]

    def with_text(self, text: Float32[AnyArray, "rows D"]) -> "HeteroGraph":
        """The same nodes and edges with these text vectors, of all types in their order."""
        return self.replace(graph=self.graph._replace(nodes={"text": text}))  # pyright: ignore[reportAttributeAccessIssue]

    def edges(self, relation: Relation) -> Edges:
        """One relation's edges with senders and receivers numbered inside their types."""
        at = _slice(self.relations, relation)
        graph: Any = self.graph
        return Edges(
            graph.senders[at] - self.node_slice(relation.source).start,
            graph.receivers[at] - self.node_slice(relation.target).start,
            graph.edges["weight"][at],
        )


def _slice(counts: tuple, key: object) -> slice:
    start = 0
    for name, count in counts:
        if name == key:
            return slice(start, start + count)
        start += count
    raise KeyError(f"{key!r} is not among {[name for name, _ in counts]}")


def hetero_graph(
    node_types: Mapping[str, int], relations: Mapping[Relation, Edges], text: Float32[np.ndarray, "N D"]
) -> HeteroGraph:
    """Joins the relations into one validated graph, edges sorted by (receiver, sender) inside each relation.

    JAX clamps ids out of range and drops them from segment sums without a word, so everything is checked here.

    Raises:
      ValueError: a node type that is not counted, an id outside its node type, a weight or a text vector that is not
        finite, a repeated edge, lengths that differ, or more nodes or edges than int32 numbers; names the relation, the
        value and the bound.
    """
    total, longest = sum(node_types.values()), max((len(e.senders) for e in relations.values()), default=0)
    if max(total, longest) >= 2**31:
        raise ValueError(
            f"the graph has {total:,} nodes and up to {longest:,} edges a relation; both are numbered by int32, below "
            "2,147,483,648: raise data.k_core"
        )
    if len(text) != total:
        raise ValueError(
            f"text has {len(text)} rows for {total} nodes; give one row a node, zeros where it has no words"
        )
    if not np.isfinite(text).all():
        row = int(np.flatnonzero(~np.isfinite(text).all(1))[0])
        raise ValueError(f"text vector of node {row} is not finite; encode it again")
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
    if not len(edges.senders) == len(edges.receivers) == len(edges.weight):
        raise ValueError(f"{relation}: {[len(part) for part in edges]} senders, receivers, weights; they must agree")
    for role, ids, node_type in (
        ("sender", edges.senders, relation.source),
        ("receiver", edges.receivers, relation.target),
    ):
        if node_type not in node_types:
            raise ValueError(f"{relation}: {node_type!r} is no node type; it must be one of {list(node_types)}")
        bound = node_types[node_type]
        bad = np.flatnonzero((ids < 0) | (ids >= bound))
        if len(bad):
            known = f"{node_type} ids are 0 to {bound - 1}" if bound else f"there are no {node_type} nodes"
            raise ValueError(f"{relation}: {role} {ids[bad[0]]} of edge {bad[0]}; {known}")
    bad = np.flatnonzero(~np.isfinite(edges.weight))
    if len(bad):
        raise ValueError(f"{relation}: weight {edges.weight[bad[0]]} of edge {bad[0]} is not finite")


def _order(relation: Relation, edges: Edges, node_types: Mapping[str, int]) -> np.ndarray:
    """Where the edges stand that ascend by (receiver, sender). One number an edge sorts sooner than two."""
    keys = edges.receivers.astype(np.int64) * node_types[relation.source] + edges.senders
    order = np.argsort(keys)
    if not np.diff(keys[order]).all():
        raise ValueError(
            f"{relation}: the same edge stands in it twice; merge repeated edges before building the graph"
        )
    return order
