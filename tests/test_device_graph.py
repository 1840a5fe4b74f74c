"""The graph as the model reads it: the host's text and edges, by type and relation, with static counts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import tiny

from fused_rec.graph.adjacency import build_adjacency
from fused_rec.graph.device_graph import device_graph
from fused_rec.graph.schema import INTERACTS, ITEM, USER


def test_it_has_what_the_host_has():
    host, graph = tiny.graph(), tiny.whole()
    assert (graph.node_types, graph.relations) == (host.node_types, host.relations)
    assert list(graph.text) == [USER, ITEM, "sector"]
    for node_type, count in host.node_types:
        assert (graph.count(node_type), graph.rows(node_type)) == (count, count)
        np.testing.assert_array_equal(graph.text[node_type], host.text_of(node_type))
    for relation, edges in host.edges.items():
        np.testing.assert_array_equal(graph.adjacencies[relation].weight, edges.weight)
        np.testing.assert_array_equal(graph.adjacencies[relation].senders, edges.senders)
    assert device_graph(host, "segment").adjacencies[INTERACTS].backend == "segment"


def test_it_passes_through_jit_with_static_counts():
    graph = tiny.whole()
    np.testing.assert_allclose(jax.jit(lambda g: g.text[ITEM].sum())(graph), graph.text[ITEM].sum(), rtol=1e-6)
    leaves, tree = jax.tree.flatten(graph)
    assert jax.tree.unflatten(tree, leaves).relations == graph.relations


def test_a_part_is_replaced():
    graph = tiny.whole()
    edges = tiny.graph().edges[INTERACTS]
    backward = build_adjacency(edges, graph.count(USER), graph.count(ITEM), "segment")
    other = graph.with_text({ITEM: np.ones((6, 2), np.float32)}).with_adjacencies({INTERACTS: backward})
    assert (other.text[ITEM].shape, other.text[USER].shape) == ((6, 2), graph.text[USER].shape)
    backends = {relation: adjacency.backend for relation, adjacency in other.adjacencies.items()}
    assert backends == {relation: a.backend for relation, a in graph.adjacencies.items()} | {INTERACTS: "segment"}


def test_ids_of_a_sample_are_those_of_the_whole_graph():
    graph = tiny.whole()
    assert graph.global_ids(USER, jnp.array([1, 4])).tolist() == [1, 4]
    assert graph.global_ids_of_all(ITEM, jnp.array([2])).tolist() == [2]
    sample = dataclasses.replace(
        graph, node_ids={USER: np.arange(7)[::-1].astype(np.int32), ITEM: np.full(6, 3, np.int32)}
    )
    assert sample.global_ids(USER, jnp.array([1, 4])).tolist() == [5, 2]
    assert sample.global_ids_of_all(ITEM, jnp.array([2])).tolist() == [3]
