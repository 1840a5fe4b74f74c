"""A part of the graph for one step: what reaches a batch within the rounds, with at most so many neighbours a node.

From the batch's nodes each relation is walked backwards, once a round. A node that is met hears all of its neighbours
in a relation, or, where they are more than the limit n, n of them drawn without replacement, their weights scaled by
degree / n. The mean of a drawn sum over draws is then the whole sum (Hamilton et al., 2017, arXiv 1706.02216, draw
alike but take means). All rounds of a step use the same draw, so that of what passes one node twice, in three rounds
or more, the mean is not exactly the whole.

All of it runs on the host and is a function of its arguments and the generator's state.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int64

from fused_rec.graph.adjacency import Adjacency, Degrees, build_adjacency
from fused_rec.graph.hetero import Edges, HeteroGraph, Relation


class Sample(NamedTuple):
    """Numbers are those of the whole graph, inside the types."""

    nodes: dict[str, np.ndarray]  # int64, ascending: who takes part
    edges: dict[Relation, Edges]  # of the relations walked, weights scaled; receivers in no order


class Capacity(NamedTuple):
    """How much a device has room for: rows of each node type, edges of each relation."""

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
    """Who and what `rounds` rounds need to tell the nodes `seeds`, by type, over the relations of `hears`.

    counts: nodes of each type in the whole graph. Nodes met in the last round are heard and hear nobody.
    """
    known = {node_type: np.zeros(count, bool) for node_type, count in counts.items()}
    fresh = {node_type: _new(known[node_type], [nodes]) for node_type, nodes in seeds.items()}
    found: dict[Relation, list[Edges]] = {relation: [] for relation in adjacencies}
    for _ in range(num_layers):
        met: dict[str, list[np.ndarray]] = {node_type: [] for node_type in counts}
        for relation, of_relation in adjacencies.items():
            if relation.target in fresh:
                edges = sample_in_edges(of_relation, fresh[relation.target], num_neighbors, rng)
                found[relation].append(edges)
                met[relation.source].append(edges.senders)
        fresh = {node_type: _new(known[node_type], nodes) for node_type, nodes in met.items()}
    return Sample(
        {node_type: np.flatnonzero(there) for node_type, there in known.items()},
        {relation: _concat_edges(parts) for relation, parts in found.items()},
    )


def _new(known: np.ndarray, nodes: Iterable[np.ndarray]) -> np.ndarray:
    """Those not known so far, ascending; they are from now on."""
    new = np.unique(np.concatenate([np.zeros(0, np.int64), *(some[~known[some]] for some in nodes)]))
    known[new] = True
    return new


def _concat_edges(parts: list[Edges]) -> Edges:
    empty = Edges(np.zeros(0, np.int32), np.zeros(0, np.int64), np.zeros(0, np.float32))
    return Edges(*map(np.concatenate, zip(empty, *parts, strict=True)))


def sample_in_edges(
    adjacencies: Adjacency, targets: Int64[np.ndarray, "t"], num_neighbors: int, rng: np.random.Generator
) -> Edges:
    """The edges into distinct targets, of more than `num_neighbors` into one so many at random, weights scaled up."""
    starts, senders, weight = map(np.asarray, (adjacencies.receiver_start, adjacencies.senders, adjacencies.weight))
    start = starts[targets].astype(np.int64)
    degree = starts[targets + 1] - start
    many = degree > num_neighbors
    few = degree[~many]
    before = np.cumsum(few) - few
    every = np.repeat(start[~many] - before, few) + np.arange(few.sum())
    some = start[many, None] + sample_distinct(degree[many], num_neighbors, rng)
    at = np.concatenate([every, some.ravel()])
    scale = np.concatenate([np.ones(len(every)), np.repeat(degree[many] / num_neighbors, num_neighbors)])
    receivers = np.concatenate([np.repeat(targets[~many], few), np.repeat(targets[many], num_neighbors)])
    return Edges(senders[at], receivers, (weight[at] * scale).astype(np.float32))


def sample_distinct(
    degree: Int64[np.ndarray, "m"], count: int, rng: np.random.Generator
) -> Int64[np.ndarray, "m count"]:
    """`count` distinct numbers below each degree, which is larger; each set of them is as likely as any other.

    Floyd's algorithm (Bentley and Floyd, 1987, Communications of the ACM 30(9)), a column a draw: what a row takes is
    compared with its earlier numbers alone, however many neighbours there are.
    """
    chosen = np.empty((count, len(degree)), np.int64)
    for number in range(count if len(degree) else 0):
        last = degree - count + number
        tried = rng.integers(0, last, endpoint=True)
        chosen[number] = np.where((chosen[:number] == tried).any(axis=0), last, tried)
    return chosen.T


def required_capacity(found: Sample, devices: int) -> Capacity:
    """The room that a sample takes, where devices share rows as `fused_rec.distributed.devices` says and edges by
    receiver.
    """
    return Capacity(
        {node_type: _largest(nodes, devices) for node_type, nodes in found.nodes.items()},
        {relation: _largest(edges.receivers, devices) for relation, edges in found.edges.items()},
    )


def _largest(nodes: np.ndarray, devices: int) -> int:
    return int(np.bincount(nodes % devices, minlength=devices).max())


def max_capacity(
    adjacencies: Mapping[Relation, Adjacency], counts: Mapping[str, int], num_neighbors: int, devices: int
) -> Capacity:
    """The room that no sample exceeds."""
    edges = {}
    for relation, of_relation in adjacencies.items():
        kept = np.minimum(np.diff(of_relation.receiver_start), num_neighbors)
        edges[relation] = int(np.bincount(np.arange(len(kept)) % devices, kept, devices).max())
    return Capacity({node_type: -(-count // devices) for node_type, count in counts.items()}, edges)


def bucketed_capacity(need: Capacity, usual: Capacity, bound: Capacity) -> Capacity:
    """Room for `need`: an eighth more than usual, or twice that and so on, and never more than the bound.

    All parts grow together: of each part's own steps every combination would be another program to compile.
    """
    factor = 1.125
    while True:
        capacity = Capacity(_grown(usual.nodes, bound.nodes, factor), _grown(usual.edges, bound.edges, factor))
        if _fits(need.nodes, capacity.nodes) and _fits(need.edges, capacity.edges):
            return capacity
        factor *= 2


def _grown(usual: Mapping[Any, int], bound: Mapping[Any, int], factor: float) -> dict[Any, int]:
    return {name: min(most, int(factor * usual[name]) + 8) for name, most in bound.items()}


def _fits(need: Mapping[Any, int], capacity: Mapping[Any, int]) -> bool:
    return all(count <= capacity[name] for name, count in need.items())


def build_subgraph(
    graph: HeteroGraph, adjacencies: Mapping[Relation, Adjacency], found: Sample, capacity: Capacity, devices: int
) -> tuple[HeteroGraph, dict[Relation, Adjacency], dict[str, np.ndarray]]:
    """The sample as a graph and adjacencies before they are divided, and where nodes stand in it, by type and number.

    A node goes to the device that has its id row, so there are `room.nodes` rows times `devices`; those that nobody
    takes have neither words nor edges. Relations that were not walked have no edges and keep their degrees. Where a
    node that takes no part would stand says nothing.
    """
    places, text, numbers = {}, [], []
    for node_type, nodes in found.nodes.items():
        rows = capacity.nodes[node_type] * devices
        places[node_type] = np.zeros(graph.count(node_type), np.int32)
        places[node_type][nodes] = _places(nodes, devices)
        text.append(_scattered(np.asarray(graph.text(node_type))[nodes], places[node_type][nodes], rows))
        numbers.append(_scattered(nodes.astype(np.int32), places[node_type][nodes], rows))
    sampled_adjacencies = {}
    no_edges = _concat_edges([])
    for relation, whole in adjacencies.items():
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
        sampled_adjacencies[relation] = dataclasses.replace(
            build_adjacency(part, n_sources, n_targets, whole.backend), degrees=degrees
        )
    nodes = {"text": np.concatenate(text), "number": np.concatenate(numbers)}
    nothing = dict.fromkeys(("edges", "senders", "receivers", "n_node", "n_edge"))  # the adjacencies tell
    types = tuple((node_type, capacity.nodes[node_type] * devices) for node_type, _ in graph.node_types)
    return (
        HeteroGraph(graph.graph._replace(nodes=nodes, **nothing), types, graph.relations),
        sampled_adjacencies,
        places,
    )


def _places(nodes: np.ndarray, devices: int) -> np.ndarray:
    """Node v stands on device v mod k, after those of lower number that do: at k times its place there plus v mod k."""
    device = nodes % devices
    order = np.argsort(device, kind="stable")
    start = np.searchsorted(device[order], np.arange(devices))
    places = np.empty(len(nodes), np.int32)
    places[order] = (np.arange(len(nodes)) - start[device[order]]) * devices + device[order]
    return places


def _scattered(values: np.ndarray, places: np.ndarray, rows: int) -> np.ndarray:
    out = np.zeros((rows, *values.shape[1:]), values.dtype)
    out[places] = values
    return out
