"""Edges of a relation in both orders, by hand and of every relation of a graph."""

import jax
import numpy as np
import pytest
import tiny

from fused_rec.graph.adjacency import build_adjacencies, build_adjacency, default_backend, shard_adjacency
from fused_rec.graph.schema import INTERACTED_BY, INTERACTS, Edges

#   sources 0   1   2   3      weights: 0 -> 0 is 2, 1 -> 0 is 3, 1 -> 2 is -1
#           | / |              source 2 and 3 send to nobody, target 1 has no source
#   targets 0   2   1
HAND = Edges(np.array([0, 1, 1]), np.array([0, 0, 2]), np.array([2, 3, -1], np.float32))


def test_both_orders_by_hand():
    adjacency = build_adjacency(HAND, 4, 3)
    assert adjacency.receiver_start.tolist() == [0, 2, 2, 3]
    assert adjacency.sender_start.tolist() == [0, 1, 3, 3, 3]
    assert adjacency.by_sender.tolist() == [0, 1, 2]
    assert adjacency.receivers_by_sender.tolist() == [0, 0, 2]
    assert adjacency.backend == default_backend() != "segment"  # these tests run on a CPU
    # 1 -> 0 and 0 -> 1: by sender the second comes first
    assert build_adjacency(
        Edges(np.array([1, 0]), np.array([0, 1]), np.ones(2, np.float32)), 2, 2
    ).receivers_by_sender.tolist() == [1, 0]


def test_unsorted_edges_are_refused():
    with pytest.raises(ValueError, match=r"edges must ascend by receiver; take them from HostGraph\.edges"):
        build_adjacency(Edges(np.array([0, 1]), np.array([1, 0]), np.ones(2, np.float32)), 2, 2)


def test_every_relation_of_a_graph():
    graph = tiny.graph()
    for relation, adjacency in build_adjacencies(graph, "segment").items():
        assert (len(adjacency.sender_start), len(adjacency.receiver_start), adjacency.backend) == (
            tiny.COUNTS[relation.source] + 1,
            tiny.COUNTS[relation.target] + 1,
            "segment",
        )
        np.testing.assert_array_equal(adjacency.weight, graph.edges[relation].weight)


def test_reverse_relations_share_memory():
    """Edges of both directions cost 12 bytes each: sender, weight and place in the order by sender."""
    adjacencies = build_adjacencies(tiny.graph())
    one, other = adjacencies[INTERACTS], adjacencies[INTERACTED_BY]
    for by_sender, by_receiver in ((one, other), (other, one)):
        assert by_sender.receivers_by_sender is by_receiver.senders
        assert by_sender.weight_by_sender is by_receiver.weight
        assert by_sender.sender_start is by_receiver.receiver_start


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("backend", sorted({default_backend(), "segment"}))
def test_receivers_follow_from_the_row_starts(shards, backend):
    """Also of padded edges, which come after the last row; on the host and in a program."""
    for relation, whole in build_adjacencies(tiny.graph(), backend).items():
        for part in shard_adjacency(whole, shards):
            rows = len(part.receiver_start) - 1
            found = np.repeat(np.arange(rows), np.diff(part.receiver_start))
            expected = np.append(found, np.full(len(part.senders) - len(found), rows))
            np.testing.assert_array_equal(part.receivers, expected, str(relation))
            np.testing.assert_array_equal(jax.jit(lambda a: a.receivers)(part), expected, str(relation))
            np.testing.assert_array_equal(part.weight_by_sender, part.weight[part.by_sender], str(relation))


def test_other_weights_are_sorted_by_sender_too():
    adjacency = build_adjacency(HAND, 4, 3)
    other = adjacency.with_weight(np.array([5, 6, 7], np.float32))
    assert other.weight.tolist() == [5, 6, 7]
    assert np.asarray(other.weight_by_sender).tolist() == [[5, 6, 7][place] for place in adjacency.by_sender]
