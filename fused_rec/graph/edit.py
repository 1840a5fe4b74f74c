"""Changes of the edges of a graph on the host, with weights and degrees as if it had been built so.

Where edges are removed, arrays keep their shapes, padded as those of `fused_rec.graph.adjacency.Adjacency`, so that a
program compiled for the graph runs on the edited one too.

What standardizes the degrees stays: it was fitted in training, as the parameters were that read them.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Int

from fused_rec.graph.adjacency import Adjacency, build_adjacency, degrees_of, share_reverses
from fused_rec.graph.build import bidirectional_edges
from fused_rec.graph.device_graph import DeviceGraph
from fused_rec.graph.order import order_edges
from fused_rec.graph.schema import INTERACTED_BY, INTERACTS, SIMILAR_TEXT, Relation


def find_edge(adjacency: Adjacency, sender: int, receiver: int) -> int:
    """Returns the index of an edge in the order by receiver.

    Raises:
      ValueError: there is no such edge.
    """
    start, end = np.asarray(adjacency.receiver_start[receiver : receiver + 2]).tolist()
    edge = start + int(np.searchsorted(adjacency.senders[start:end], sender))
    if edge == end or adjacency.senders[edge] != sender:
        raise ValueError(f"no edge runs from {sender} to {receiver}; name an edge of the graph")
    return edge


def drop_interaction(graph: DeviceGraph, user: int, item: int) -> DeviceGraph:
    """Removes one interaction in both directions.

    Args:
      graph: the whole graph, on the host.
      user: user row.
      item: item row.

    Returns:
      The graph without it.

    Raises:
      ValueError: the graph does not have the interaction.
    """
    forward, backward = graph.adjacencies[INTERACTS], graph.adjacencies[INTERACTED_BY]
    return drop_edges(
        graph, {INTERACTS: [find_edge(forward, user, item)], INTERACTED_BY: [find_edge(backward, item, user)]}
    )


def replace_interactions(graph: DeviceGraph, user: Int[np.ndarray, "E"], item: Int[np.ndarray, "E"]) -> DeviceGraph:
    """Builds the two relations of interactions anew; all other relations and the text features stay.

    Args:
      graph: the whole graph, on the host.
      user: user row of each interaction; pairs are distinct.
      item: item row of each interaction.

    Returns:
      The graph with these interactions, degrees standardized as before.
    """
    counts = dict(graph.node_types)
    made = {}
    for relation, edges in bidirectional_edges(INTERACTS, INTERACTED_BY, user, item, counts).items():
        old, sides = graph.adjacencies[relation], (counts[relation.source], counts[relation.target])
        made[relation] = build_adjacency(order_edges(edges, *sides), *sides, old.backend, old.scale)
    relations = tuple((relation, len(user) if relation in made else count) for relation, count in graph.relations)
    return dataclasses.replace(graph, relations=relations).with_adjacencies(share_reverses(made))


def drop_edges(graph: DeviceGraph, edges: Mapping[Relation, Sequence[int]]) -> DeviceGraph:
    """Removes edges and derives weights and degrees from those that are left.

    Weights of text-kNN edges are normalized to 1 again, without a neighbor in place of the one removed; other weights
    are 1 / sqrt(d_u d_v). The numbers of edges in `graph.relations` stay those of the whole graph.

    Args:
      graph: the whole graph, on the host.
      edges: by relation, indices of edges in the order by receiver; the reverse edges are named too, or stay.

    Returns:
      The graph without them.
    """
    return graph.with_adjacencies(
        {
            relation: _drop(graph.adjacencies[relation], gone, relation.name == SIMILAR_TEXT)
            for relation, gone in edges.items()
        }
    )


def _drop(full: Adjacency, gone: Sequence[int], shares: bool) -> Adjacency:
    """Removes edges from an adjacency; `shares`: weights are shares of their receiver's sum."""
    n_sources, n_targets = len(full.sender_start) - 1, len(full.receiver_start) - 1
    receivers = full.receivers
    keep = receivers < n_targets
    keep[list(gone)] = False
    senders, receivers, order = full.senders[keep], receivers[keep], full.by_sender
    out_degree, in_degree = np.bincount(senders, minlength=n_sources), np.bincount(receivers, minlength=n_targets)
    if shares:
        left = full.weight[keep]
        weight = left / np.bincount(receivers, left, minlength=n_targets)[receivers]
    else:
        weight = 1 / np.sqrt(out_degree[senders] * in_degree[receivers])
    fill = (0, len(keep) - len(senders))
    number = np.cumsum(keep) - 1
    by_sender = np.concatenate([number[order[keep[order]]], np.arange(len(senders), len(keep))]).astype(np.int32)
    receivers = np.pad(receivers, fill, constant_values=n_targets)
    weight = np.pad(weight.astype(np.float32), fill)
    return Adjacency(
        np.pad(senders, fill, constant_values=n_sources),
        weight,
        np.concatenate([[0], np.cumsum(in_degree)]).astype(np.int32),
        by_sender,
        receivers[by_sender],
        weight[by_sender],
        np.concatenate([[0], np.cumsum(out_degree)]).astype(np.int32),
        degrees_of(in_degree, out_degree, full.scale),
        full.backend,
        full.scale,
    )
