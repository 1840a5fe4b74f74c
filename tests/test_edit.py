"""A graph without an edge is the graph that serving would build without it."""

import jax
import numpy as np
import pytest
import tiny

from fused_rec.graph.adjacency import Adjacency, DegreeScale, build_adjacency
from fused_rec.graph.build import bidirectional_edges
from fused_rec.graph.device_graph import device_graph
from fused_rec.graph.edit import drop_edges, drop_interaction, find_edge, replace_interactions
from fused_rec.graph.hetero import hetero_graph
from fused_rec.graph.schema import INTERACTED_BY, INTERACTS, Edges


def assert_rebuilt(edited: Adjacency, rebuilt: Adjacency) -> None:
    """Bit for bit the same edges, weights and degrees, and padding as `Adjacency` describes it."""
    count, whole = len(rebuilt.senders), len(edited.senders)
    n_sources, n_targets = len(rebuilt.sender_start) - 1, len(rebuilt.receiver_start) - 1
    assert edited.receivers[count:].tolist() == [n_targets] * (whole - count)
    assert edited.senders[count:].tolist() == [n_sources] * (whole - count)
    assert edited.by_sender[count:].tolist() == list(range(count, whole))
    assert not edited.weight[count:].any()
    for name in ("senders", "receivers", "weight", "by_sender", "receivers_by_sender"):
        part, expected = getattr(edited, name)[:count], getattr(rebuilt, name)
        assert part.dtype == expected.dtype
        np.testing.assert_array_equal(part, expected, err_msg=name)
    same = "receiver_start", "sender_start", "degrees"
    jax.tree.map(np.testing.assert_array_equal, *([getattr(one, name) for name in same] for one in (edited, rebuilt)))
    assert edited.backend == rebuilt.backend


def pair_of(place: int) -> tuple[int, int]:
    return int(tiny.HOLDER[place]), int(tiny.HELD[place])


def without(gone: np.ndarray):
    """The market built without some interactions, at their places in `tiny.HOLDER`."""
    kept = ~np.isin(np.arange(len(tiny.HOLDER)), gone)
    edges = bidirectional_edges(INTERACTS, INTERACTED_BY, tiny.HOLDER[kept], tiny.HELD[kept], tiny.COUNTS)
    found = hetero_graph(tiny.COUNTS, tiny.relations(tiny.words()) | edges, tiny.words()).edges
    scale = {r: adjacency.scale for r, adjacency in tiny.whole().adjacencies.items()}
    return {r: build_adjacency(found[r], tiny.COUNTS[r.source], tiny.COUNTS[r.target], scale=scale[r]) for r in edges}


@pytest.mark.parametrize("gone", range(len(tiny.HOLDER)))
def test_without_an_interaction_as_built_anew(gone):
    edited, whole = drop_interaction(tiny.whole(), *pair_of(gone)), tiny.whole()
    for relation, rebuilt in without(np.array([gone])).items():
        assert_rebuilt(edited.adjacencies[relation], rebuilt)
    shapes = ([x.shape for x in jax.tree.leaves(graph)] for graph in (edited, whole))
    assert next(shapes) == next(shapes)
    assert jax.tree.structure(edited) == jax.tree.structure(whole)  # one compiled program for both


def test_other_interactions_as_built_anew():
    """One is gone, two are new, and all are in another order; the scale stays that of the graph before."""
    user, item = np.append(tiny.HOLDER[:0:-1], [6, 6]), np.append(tiny.HELD[:0:-1], [5, 0])
    edges = bidirectional_edges(INTERACTS, INTERACTED_BY, user, item, tiny.COUNTS)
    scales = {relation: DegreeScale(0.7, 0.3, 0.9) for relation in edges}
    expected = device_graph(
        hetero_graph(tiny.COUNTS, tiny.relations(tiny.words()) | edges, tiny.words()), scales=scales
    )
    edited = replace_interactions(device_graph(tiny.graph(), scales=scales), user, item)
    jax.tree.map(np.testing.assert_array_equal, edited, expected)
    assert jax.tree.structure(edited) == jax.tree.structure(expected) and edited.relations == expected.relations


def test_degrees_stay_standardized_as_by_another_graph():
    scale = DegreeScale(0.7, 0.3, 0.9)
    scales = dict.fromkeys((INTERACTS, INTERACTED_BY), scale)
    edited = drop_interaction(device_graph(tiny.graph(), scales=scales), *pair_of(0))
    for relation, rebuilt in without(np.array([0])).items():
        found = edited.adjacencies[relation]
        in_degree, out_degree = np.diff(rebuilt.receiver_start), np.diff(rebuilt.sender_start)
        np.testing.assert_array_equal(found.degrees.in_degree, in_degree)
        np.testing.assert_allclose(found.degrees.log_in_degree, (np.log1p(in_degree) - 0.7) / 0.3, rtol=1e-4)
        np.testing.assert_allclose(found.degrees.log_out_degree, np.log1p(out_degree) - 0.9, rtol=1e-5)
        assert found.scale == scale


def test_one_after_the_other_is_both_at_once():
    graph = tiny.whole()
    for place in (0, 9, 4):
        graph = drop_interaction(graph, *pair_of(place))
    for relation, rebuilt in without(np.array([0, 4, 9])).items():
        assert_rebuilt(graph.adjacencies[relation], rebuilt)


def test_shares_of_text_neighbors_sum_to_one_again():
    whole, edges = tiny.whole(), tiny.graph().edges[tiny.SIMILAR]
    edited = drop_edges(whole, {tiny.SIMILAR: [0]}).adjacencies[tiny.SIMILAR]
    senders, receivers, weight = (part[1:] for part in edges)
    total = np.bincount(receivers, weight, 6)
    rebuilt = build_adjacency(
        Edges(senders, receivers, weight / total[receivers]), 6, 6, scale=whole.adjacencies[tiny.SIMILAR].scale
    )
    assert_rebuilt(edited, rebuilt)
    assert total[edges.receivers[0]] < 1  # its other neighbors had less before


def test_an_edge_that_is_not_there():
    adjacency = tiny.whole().adjacencies[INTERACTS]
    senders, receivers, _ = (part.tolist() for part in tiny.graph().edges[INTERACTS])
    assert [find_edge(adjacency, *pair) for pair in zip(senders, receivers, strict=True)] == list(range(12))
    for sender, receiver in ((6, 0), (1, 1), (0, 5)):
        with pytest.raises(ValueError, match=f"no edge runs from {sender} to {receiver}; name an edge of the graph"):
            find_edge(adjacency, sender, receiver)
    with pytest.raises(ValueError, match="no edge runs from 6 to 5"):
        drop_interaction(tiny.whole(), 6, 5)
