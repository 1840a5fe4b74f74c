"""Sampled neighbours: who is met, how fairly they are drawn, and how they stand on the devices."""

from itertools import combinations
from typing import Any

import numpy as np
import pytest
import tiny

from fused_rec.graph.adjacency import build_adjacencies, shard_adjacency
from fused_rec.graph.build import bidirectional_edges
from fused_rec.graph.hetero import hetero_graph
from fused_rec.graph.sampling import (
    Capacity,
    Sample,
    bucketed_capacity,
    build_subgraph,
    max_capacity,
    required_capacity,
    sample,
    sample_distinct,
    sample_in_edges,
)
from fused_rec.graph.schema import INTERACTED_BY, INTERACTS, ITEM, USER, Edges

GRAPH = tiny.whole()
ADJACENCIES = GRAPH.adjacencies


def sampled(seeds, num_layers=2, num_neighbors=100, adjacencies=ADJACENCIES, counts=tiny.COUNTS, seed=0) -> Sample:
    arrays = {node_type: np.array(nodes) for node_type, nodes in seeds.items()}
    rng = np.random.default_rng(seed)
    return sample(adjacencies, counts, arrays, num_layers=num_layers, num_neighbors=num_neighbors, rng=rng)


def pairs(edges: Edges) -> set[tuple[int, int]]:
    found = list(zip(edges.senders.tolist(), edges.receivers.tolist(), strict=True))
    assert len(set(found)) == len(found)
    return set(found)


# --- who is met ----------------------------------------------------------------------------------------------------

# Users 0 - 3 and items 0 - 3 in a chain, u0 i0 u1 i1 u2 i2; user 3 and item 3 are held by and hold nobody.
CHAIN = {USER: 4, ITEM: 4}
CHAIN_ADJACENCIES = build_adjacencies(
    hetero_graph(
        CHAIN,
        bidirectional_edges(INTERACTS, INTERACTED_BY, np.array([0, 1, 1, 2, 2]), np.array([0, 0, 1, 1, 2]), CHAIN),
        np.zeros((8, 1), np.float32),
    )
)


@pytest.mark.parametrize(
    ("num_layers", "users", "items", "held_by", "holds"),
    [
        (0, [0, 3], [], set(), set()),
        (1, [0, 3], [0], {(0, 0)}, set()),
        # (sender, receiver): item 0 sends to user 0 and receives from users 0 and 1, who receive nothing any more.
        (2, [0, 1, 3], [0], {(0, 0)}, {(0, 0), (1, 0)}),
        (3, [0, 1, 3], [0, 1], {(0, 0), (0, 1), (1, 1)}, {(0, 0), (1, 0)}),
    ],
)
def test_rounds_walk_so_many_edges_back(num_layers, users, items, held_by, holds):
    found = sampled({USER: [3, 0, 0]}, num_layers, adjacencies=CHAIN_ADJACENCIES, counts=CHAIN)
    assert (found.nodes[USER].tolist(), found.nodes[ITEM].tolist()) == (users, items)
    assert (pairs(found.edges[INTERACTED_BY]), pairs(found.edges[INTERACTS])) == (held_by, holds)


def test_with_room_for_all_neighbors_the_edges_are_those_of_the_graph():
    found = sampled({USER: np.arange(7), ITEM: np.arange(6), "sector": [0, 1]}, num_layers=1, num_neighbors=5)
    for relation, adjacencies in ADJACENCIES.items():
        edges = found.edges[relation]
        order = np.lexsort((edges.senders, edges.receivers))
        for mine, whole in zip(edges, (adjacencies.senders, adjacencies.receivers, adjacencies.weight), strict=True):
            np.testing.assert_array_equal(mine[order], whole)


def test_the_draw_follows_the_generator():
    def edges(seed):
        return sampled({USER: np.arange(7)}, 3, 1, seed=seed).edges[INTERACTED_BY].senders.tolist()

    assert edges(0) == edges(0)
    assert len({tuple(edges(seed)) for seed in range(20)}) > 5


# --- fair draws ----------------------------------------------------------------------------------------------------


def test_every_set_is_as_likely():
    """6,000 draws of 2 of 4: 1,000 a set, with a deviation of 29."""
    found = np.sort(sample_distinct(np.full(6_000, 4), 2, np.random.default_rng(0)), axis=1)
    counts = [int((found == some).all(axis=1).sum()) for some in combinations(range(4), 2)]
    assert sum(counts) == 6_000
    assert all(abs(count - 1_000) < 4 * 29 for count in counts)


def test_draws_are_distinct_and_below_each_degree():
    degree = np.random.default_rng(0).integers(8, 40, 500)
    found = np.sort(sample_distinct(degree, 7, np.random.default_rng(1)), axis=1)
    assert found.min() == 0 and (found[:, -1] < degree).all() and (np.diff(found) > 0).all()
    assert sample_distinct(np.zeros(0, np.int64), 7, np.random.default_rng(0)).shape == (0, 7)


@pytest.mark.parametrize("num_neighbors", [1, 2])
def test_the_mean_of_drawn_sums_is_the_whole_sum(num_neighbors):
    adjacencies, x = ADJACENCIES[INTERACTED_BY], np.random.default_rng(0).normal(size=tiny.COUNTS[ITEM])
    whole = np.bincount(adjacencies.receivers, adjacencies.weight * x[adjacencies.senders], 7)
    sums = np.empty((4_000, 7))
    for number, rng in enumerate(np.random.default_rng(1).spawn(len(sums))):
        edges = sample_in_edges(adjacencies, np.arange(7), num_neighbors, rng)
        sums[number] = np.bincount(edges.receivers, edges.weight * x[edges.senders], 7)
    error = sums.std(axis=0) / np.sqrt(len(sums))
    assert (error > 0).any()
    np.testing.assert_array_less(np.abs(sums.mean(axis=0) - whole), 4 * error + 1e-6)
    assert np.bincount(edges.receivers, minlength=7).max() == num_neighbors


# --- how they stand ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("devices", [1, 2, 3])
def test_what_is_placed_is_the_sample(devices):
    """With rows to spare: each node where its id row is, each edge between its nodes, degrees of the whole graph."""
    found = sampled({USER: [0, 5], ITEM: [5]}, num_neighbors=2)
    need = required_capacity(found, devices)
    room = Capacity({t: n + 3 for t, n in need.nodes.items()}, {r: n + 5 for r, n in need.edges.items()})
    graph, places = build_subgraph(GRAPH, found, room, devices)
    numbers: Any = graph.node_ids
    for node_type, nodes in found.nodes.items():
        at = places[node_type][nodes]
        assert graph.count(node_type) == room.nodes[node_type] * devices
        assert (at % devices).tolist() == (nodes % devices).tolist()
        np.testing.assert_array_equal(numbers[node_type][at], nodes)
        np.testing.assert_array_equal(graph.text[node_type][at], GRAPH.text[node_type][nodes])
        assert np.abs(graph.text[node_type]).sum() == np.abs(GRAPH.text[node_type][nodes]).sum()
    for relation, whole in ADJACENCIES.items():
        edges, seen = found.edges[relation], set()
        own = shard_adjacency(graph.adjacencies[relation], devices, room.edges[relation], relation.by_sender)
        for device, part in enumerate(own):
            assert len(part.senders) == room.edges[relation]
            real = part.weight != 0
            senders, receivers = part.senders[real], part.receivers[real]
            if relation.by_sender:
                senders = senders * devices + device
            else:
                receivers = receivers * devices + device
            senders, receivers = numbers[relation.source][senders], numbers[relation.target][receivers]
            seen |= set(zip(senders.tolist(), receivers.tolist(), part.weight[real].tolist(), strict=True))
            assert (np.diff(part.senders[part.by_sender]) >= 0).all()
        assert seen == set(zip(*(part.tolist() for part in edges), strict=True))
        sources, targets = found.nodes[relation.source], found.nodes[relation.target]
        degrees = graph.adjacencies[relation].degrees
        for name, nodes, at in (("in_degree", targets, relation.target), ("log_out_degree", sources, relation.source)):
            own = getattr(degrees, name)
            np.testing.assert_array_equal(own[places[at][nodes]], getattr(whole.degrees, name)[nodes])


def test_no_sample_is_larger_than_the_bound():
    bound = max_capacity(ADJACENCIES, tiny.COUNTS, 2, 2)
    assert bound.nodes == {USER: 4, ITEM: 3, "sector": 1}
    # The users of each device hold six items; users 0 to 3 keep two of theirs, users 4 and 5 one.
    assert (bound.edges[INTERACTS], bound.edges[INTERACTED_BY]) == (6, 5)
    # One item of each user and one user of each item are less than the users of a device hold.
    assert max_capacity(ADJACENCIES, tiny.COUNTS, 1, 2).edges[INTERACTS] == 5
    for seed in range(5):
        need = required_capacity(sampled({USER: np.arange(7), ITEM: np.arange(6)}, 3, 2, seed=seed), 2)
        assert all(need.nodes[t] <= n for t, n in bound.nodes.items())
        assert all(need.edges[r] <= n for r, n in bound.edges.items())


def test_room_grows_in_few_steps_and_together():
    def of(users, edges):
        return Capacity({USER: users}, {INTERACTS: edges})

    usual, bound = of(80, 160), of(150, 10_000)
    assert bucketed_capacity(of(1, 1), usual, bound) == of(98, 188)
    assert bucketed_capacity(of(98, 188), usual, bound) == of(98, 188)
    assert bucketed_capacity(of(99, 1), usual, bound) == bucketed_capacity(of(1, 189), usual, bound) == of(150, 368)
    assert bucketed_capacity(of(150, 10_000), usual, bound) == of(150, 10_000)
