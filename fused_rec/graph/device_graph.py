"""The graph as the model reads it: text embeddings by node type and the adjacency of each relation.

It is a pytree of NumPy arrays on the host or of JAX arrays inside a program, and one of three things:

- the whole graph, from `device_graph`;
- a sampled subgraph (`fused_rec.graph.sampling`), whose counts are numbers of rows, including rows padded with node 0;
- the part of one of several devices (`fused_rec.training.sharding.shard_graph_inputs`): a share of the rows of every
  type and the edges into them, or from its users (`Relation.by_sender`). Its counts remain those of all nodes.

The counts are static, so a new node type or relation adds data, not branches.
"""

import dataclasses
from collections.abc import Mapping
from typing import no_type_check

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32

from fused_rec.distributed.devices import AnyArray, Shards
from fused_rec.graph.adjacency import Adjacency, Backend, DegreeScale, build_adjacencies
from fused_rec.graph.hetero import HostGraph
from fused_rec.graph.schema import Relation


@no_type_check  # as of `Adjacency`
@flax.struct.dataclass
class DeviceGraph:
    """Text embeddings and adjacencies of a graph, of a sample of it, or of one device's share.

    Attributes:
      text: by node type, float32 [rows, D], text embeddings, zero for a node without text.
      adjacencies: edges by relation.
      node_types: (name, number of nodes) of each type, in order.
      relations: (relation, number of edges in the whole graph) of each relation, in order.
      node_ids: of a sampled subgraph, by node type: int32 [rows], IDs of its nodes in the whole graph; else None.
      shards: how many devices share the rows.
      textless: the types of which no node has text, for which no product with text is computed.
    """

    text: Mapping[str, Float32[AnyArray, "_ D"]]
    adjacencies: Mapping[Relation, Adjacency]
    node_types: tuple[tuple[str, int], ...] = flax.struct.field(pytree_node=False)
    relations: tuple[tuple[Relation, int], ...] = flax.struct.field(pytree_node=False)
    node_ids: Mapping[str, Int32[AnyArray, "_"]] | None = None
    shards: Shards = flax.struct.field(pytree_node=False, default=Shards())
    textless: tuple[str, ...] = flax.struct.field(pytree_node=False, default=())

    def count(self, node_type: str) -> int:
        """Returns the number of nodes of the type, over all devices."""
        return dict(self.node_types)[node_type]

    def rows(self, node_type: str) -> int:
        """Returns the number of rows of the type on one device, including padding."""
        return self.shards.rows(self.count(node_type))

    def sums_own_rows(self, relation: Relation) -> bool:
        """Returns whether each device sums its own source rows into all targets: a part of the whole sum."""
        return self.shards.count > 1 and relation.by_sender

    def all_gather(self, node_type: str, x: Array) -> Array:
        """Gathers [rows, ...] of all devices to [nodes of the type, ...] on every device."""
        return self.shards.all_gather(x)[: self.count(node_type)]

    def global_ids(self, node_type: str, rows: Int32[AnyArray, "m"]) -> Int32[Array, "m"]:
        """Maps rows of this device to node IDs in the whole graph, local to the type."""
        if self.node_ids is None:
            return self.shards.global_ids(rows)
        return jnp.asarray(self.node_ids[node_type])[rows]

    def global_ids_of_all(self, node_type: str, nodes: Int32[AnyArray, "m"]) -> Int32[Array, "m"]:
        """Maps nodes numbered over all devices, such as senders of items, to node IDs in the whole graph."""
        if self.node_ids is None:
            return jnp.asarray(nodes)
        return self.all_gather(node_type, jnp.asarray(self.node_ids[node_type]))[nodes]

    def with_text(self, text: Mapping[str, Float32[AnyArray, "_ D"]]) -> "DeviceGraph":
        """Returns this graph with other text embeddings of the types given."""
        textless = tuple(node_type for node_type in self.textless if node_type not in text)
        return dataclasses.replace(self, text={**self.text, **text}, textless=textless)

    def with_adjacencies(self, adjacencies: Mapping[Relation, Adjacency]) -> "DeviceGraph":
        """Returns this graph with other adjacencies of the relations given."""
        return dataclasses.replace(self, adjacencies={**self.adjacencies, **adjacencies})


def device_graph(
    graph: HostGraph, backend: Backend | None = None, scales: Mapping[Relation, DegreeScale] | None = None
) -> DeviceGraph:
    """Builds the whole graph for one device, of NumPy arrays.

    Args:
      graph: the graph with its edges.
      backend: implementation of the sparse sum; None: `default_backend()`.
      scales: what standardizes the degrees of each relation; None, or no entry: its degrees in this graph.

    Returns:
      Text embeddings, which share memory with the graph's, and adjacencies.
    """
    text = {node_type: graph.text_of(node_type) for node_type, _ in graph.node_types}
    textless = tuple(node_type for node_type, rows in text.items() if not rows.any())
    adjacencies = build_adjacencies(graph, backend, scales)
    return DeviceGraph(text, adjacencies, graph.node_types, graph.relations, textless=textless)
