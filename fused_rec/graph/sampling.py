"""Neighbor sampling: the subgraph that a batch's nodes depend on within the model's layers.

From the batch's nodes each relation is walked backwards once per layer. A node that is reached keeps all in-edges of a
relation, or, where they are more than the fanout n, n of them sampled without replacement, weights scaled by
degree / n. The expectation of a sampled sum is then the full sum (Hamilton et al., 2017, arXiv 1706.02216, sample alike
but average). All layers of a step share one sample, so for paths that pass one node twice, in three layers or more,
the expectation is not exact.

Everything runs on the host and is a function of the arguments and the generator's state.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int64

from fused_rec.graph.adjacency import Adjacency, Degrees, build_adjacency
from fused_rec.graph.device_graph import DeviceGraph
from fused_rec.graph.schema import Edges, Relation


class Sample(NamedTuple):
    """A sampled subgraph, in node IDs of the whole graph, local to the types."""

    nodes: dict[str, np.ndarray]  # int64, ascending: sampled nodes by type
    edges: dict[Relation, Edges]  # sampled edges of the relations walked, weights scaled; receivers in no order


class Capacity(NamedTuple):
    """Sizes of the arrays of one device: rows of each node type and edges of each relation."""

    nodes: dict[str, int]
    edges: dict[Relation, int]


def sample(
    adjacencies: Mapping[Relation, Adjacency],
    counts: Mapping[str, int],
    seeds: Mapping[str, np.ndarray],
    *,
    num_layers: int,
    num_neighbors: int,
    rng: np.random.Generator,
) -> Sample:
    """Samples the nodes and edges that embeddings of the seed nodes depend on.

    Args:
      adjacencies: relations to walk, of the whole graph.
      counts: the number of nodes of each type in the whole graph.
      seeds: node IDs by type.
      num_layers: how many layers to walk back; nodes first reached in the last one have no in-edges.
      num_neighbors: the fanout, the largest number of in-edges of a node and relation.
      rng: the random generator.

    Returns:
      Sampled nodes, seeds included, and edges.
    """
    reached = {node_type: np.zeros(count, bool) for node_type, count in counts.items()}
    frontier = {node_type: _mark_new(reached[node_type], [nodes]) for node_type, nodes in seeds.items()}
    found: dict[Relation, list[Edges]] = {relation: [] for relation in adjacencies}
    for _ in range(num_layers):
        senders: dict[str, list[np.ndarray]] = {node_type: [] for node_type in counts}
        for relation, adjacency in adjacencies.items():
            if relation.target in frontier:
                edges = sample_in_edges(adjacency, frontier[relation.target], num_neighbors, rng)
                found[relation].append(edges)
                senders[relation.source].append(edges.senders)
        frontier = {node_type: _mark_new(reached[node_type], nodes) for node_type, nodes in senders.items()}
    return Sample(
        {node_type: np.flatnonzero(mask) for node_type, mask in reached.items()},
        {relation: _concat_edges(parts) for relation, parts in found.items()},
    )


def _mark_new(reached: np.ndarray, nodes: Iterable[np.ndarray]) -> np.ndarray:
    """The nodes not reached before, ascending; marks them as reached."""
    new = np.unique(np.concatenate([np.zeros(0, np.int64), *(some[~reached[some]] for some in nodes)]))
    reached[new] = True
    return new


def _concat_edges(parts: list[Edges]) -> Edges:
    """Joins blocks of edges of one relation."""
    empty = Edges(np.zeros(0, np.int32), np.zeros(0, np.int64), np.zeros(0, np.float32))
    return Edges(*map(np.concatenate, zip(empty, *parts, strict=True)))


def sample_in_edges(
    adjacencies: Adjacency, targets: Int64[np.ndarray, "t"], num_neighbors: int, rng: np.random.Generator
) -> Edges:
    """Samples up to `num_neighbors` in-edges of each target without replacement, weights scaled by degree / sampled.

    Args:
      adjacencies: one relation of the whole graph.
      targets: int64 [t], distinct target nodes.
      num_neighbors: the largest number of edges per target.
      rng: the random generator.

    Returns:
      The edges, receivers in no order.
    """
    starts, senders, weight = map(np.asarray, (adjacencies.receiver_start, adjacencies.senders, adjacencies.weight))
    start = starts[targets].astype(np.int64)
    degree = starts[targets + 1] - start
    many = degree > num_neighbors
    few = degree[~many]
    before = np.cumsum(few) - few
    all_edges = np.repeat(start[~many] - before, few) + np.arange(few.sum())
    sampled = start[many, None] + sample_distinct(degree[many], num_neighbors, rng)
    at = np.concatenate([all_edges, sampled.ravel()])
    scale = np.concatenate([np.ones(len(all_edges)), np.repeat(degree[many] / num_neighbors, num_neighbors)])
    receivers = np.concatenate([np.repeat(targets[~many], few), np.repeat(targets[many], num_neighbors)])
    return Edges(senders[at], receivers, (weight[at] * scale).astype(np.float32))


def sample_distinct(
    degree: Int64[np.ndarray, "m"], count: int, rng: np.random.Generator
) -> Int64[np.ndarray, "m count"]:
    """Samples `count` distinct numbers below each degree, uniformly over sets.

    Floyd's algorithm (Bentley and Floyd, 1987, Communications of the ACM 30(9)), vectorized over rows: time grows with
    `count` squared, not with the degrees.

    Args:
      degree: int64 [m], exclusive upper bounds, each larger than `count`.
      count: how many numbers per row.
      rng: the random generator.

    Returns:
      int64 [m, count].
    """
    chosen = np.empty((count, len(degree)), np.int64)
    for number in range(count if len(degree) else 0):
        last = degree - count + number
        candidate = rng.integers(0, last, endpoint=True)
        chosen[number] = np.where((chosen[:number] == candidate).any(axis=0), last, candidate)
    return chosen.T


def required_capacity(found: Sample, devices: int) -> Capacity:
    """Computes the capacity that a sample needs.

    Args:
      found: the sample.
      devices: how many devices share its nodes (v mod devices) and its edges (by receiver, or `Relation.by_sender`).

    Returns:
      The largest number of rows and edges on any device.
    """
    return Capacity(
        {node_type: _largest(nodes, devices) for node_type, nodes in found.nodes.items()},
        {
            relation: _largest(edges.senders if relation.by_sender else edges.receivers, devices)
            for relation, edges in found.edges.items()
        },
    )


def _largest(nodes: np.ndarray, devices: int) -> int:
    """The largest number of nodes on any device."""
    return int(np.bincount(nodes % devices, minlength=devices).max())


def max_capacity(
    adjacencies: Mapping[Relation, Adjacency], counts: Mapping[str, int], num_neighbors: int, devices: int
) -> Capacity:
    """Computes a capacity that no sample exceeds.

    Args:
      adjacencies: relations of the whole graph.
      counts: the number of nodes of each type in the whole graph.
      num_neighbors: the fanout.
      devices: how many devices share nodes and edges.

    Returns:
      Upper bounds of rows and edges on any device.
    """
    edges = {}
    for relation, adjacency in adjacencies.items():
        kept = np.minimum(np.diff(adjacency.receiver_start), num_neighbors)
        own = np.diff(adjacency.sender_start) if relation.by_sender else kept
        edges[relation] = min(int(kept.sum()), int(np.bincount(np.arange(len(own)) % devices, own, devices).max()))
    return Capacity({node_type: -(-count // devices) for node_type, count in counts.items()}, edges)


def bucketed_capacity(need: Capacity, usual: Capacity, bound: Capacity) -> Capacity:
    """Rounds a needed capacity up to one of few sizes: 9/8 of the usual one times a power of 2, at most the bound.

    All entries grow by one factor: with a factor for each entry every combination would be a program to compile.

    Args:
      need: the capacity that a sample needs, within `bound`.
      usual: a typical capacity, such as the largest of some probe batches.
      bound: a capacity that no sample exceeds.

    Returns:
      The capacity to pad the sample to.
    """
    factor = 1.125
    while True:
        capacity = Capacity(_grown(usual.nodes, bound.nodes, factor), _grown(usual.edges, bound.edges, factor))
        if _fits(need.nodes, capacity.nodes) and _fits(need.edges, capacity.edges):
            return capacity
        factor *= 2


def _grown(usual: Mapping[Any, int], bound: Mapping[Any, int], factor: float) -> dict[Any, int]:
    """Usual sizes times the factor, plus 8, at most the bound."""
    return {name: min(most, int(factor * usual[name]) + 8) for name, most in bound.items()}


def _fits(need: Mapping[Any, int], capacity: Mapping[Any, int]) -> bool:
    """Whether each size is within the capacity."""
    return all(count <= capacity[name] for name, count in need.items())


def build_subgraph(
    graph: DeviceGraph, found: Sample, capacity: Capacity, devices: int
) -> tuple[DeviceGraph, dict[str, np.ndarray]]:
    """Builds the graph of a sample, before it is sharded.

    A node goes to the device that has its ID embedding, so each type has `capacity.nodes` rows per device; padded rows
    have neither text nor edges. Relations that were not walked have no edges and keep their degrees.

    Args:
      graph: the whole graph.
      found: the sample.
      capacity: rows per device and type.
      devices: the number of devices.

    Returns:
      The subgraph; and by type the row of each node of the whole graph, int32, which has no meaning for a node that
      was not sampled.
    """
    places, text, node_ids, adjacencies = {}, {}, {}, {}
    for node_type, nodes in found.nodes.items():
        rows = capacity.nodes[node_type] * devices
        places[node_type] = np.zeros(graph.count(node_type), np.int32)
        places[node_type][nodes] = _places(nodes, devices)
        text[node_type] = _scattered(np.asarray(graph.text[node_type])[nodes], places[node_type][nodes], rows)
        node_ids[node_type] = _scattered(nodes.astype(np.int32), places[node_type][nodes], rows)
    no_edges = _concat_edges([])
    for relation, whole in graph.adjacencies.items():
        ends = relation.source, relation.target
        at_source, at_target = (places[node_type] for node_type in ends)
        n_sources, n_targets = (capacity.nodes[node_type] * devices for node_type in ends)
        edges = found.edges.get(relation, no_edges)
        receivers = at_target[edges.receivers]
        order = np.argsort(receivers, kind="stable")
        part = Edges(at_source[edges.senders][order], receivers[order], edges.weight[order])
        sources, targets = (found.nodes[node_type] for node_type in ends)
        in_degree, log_in_degree, log_out_degree = map(np.asarray, whole.degrees)
        degrees = Degrees(
            _scattered(in_degree[targets], at_target[targets], n_targets),
            _scattered(log_in_degree[targets], at_target[targets], n_targets),
            _scattered(log_out_degree[sources], at_source[sources], n_sources),
        )
        adjacencies[relation] = dataclasses.replace(
            build_adjacency(part, n_sources, n_targets, whole.backend), degrees=degrees
        )
    node_types = tuple((node_type, capacity.nodes[node_type] * devices) for node_type, _ in graph.node_types)
    return DeviceGraph(text, adjacencies, node_types, graph.relations, node_ids, textless=graph.textless), places


def _places(nodes: np.ndarray, devices: int) -> np.ndarray:
    """Rows of nodes: the i-th node of device d = v mod k has row i k + d."""
    device = nodes % devices
    order = np.argsort(device, kind="stable")
    start = np.searchsorted(device[order], np.arange(devices))
    places = np.empty(len(nodes), np.int32)
    places[order] = (np.arange(len(nodes)) - start[device[order]]) * devices + device[order]
    return places


def _scattered(values: np.ndarray, places: np.ndarray, rows: int) -> np.ndarray:
    """Zeros [rows, ...] with `values` at `places`."""
    out = np.zeros((rows, *values.shape[1:]), values.dtype)
    out[places] = values
    return out
