"""The typed graph, from a drawing to one `jraph.GraphsTuple` and back."""

import dataclasses
from typing import Any

import jraph
import numpy as np
import pytest

from fused_rec.graph.hetero import hetero_graph
from fused_rec.graph.schema import Edges, Relation

#   users   0   1   2          holds:  0 -> 1 (.5), 2 -> 1 (.25), 1 -> 0 (1)
#             x   /            trusts: 1 -> 0 (2): from user 1 to user 0
#   items   0   1              nobody wrote a post, and there is none
#
# All nodes in one row: users 0 1 2, items 3 4, posts none, tags 5.
COUNTS = {"user": 3, "item": 2, "post": 0, "tag": 1}
HOLDS = Relation("user", "holds", "item")
TRUSTS = Relation("user", "trusts", "user")
WROTE = Relation("user", "wrote", "post")


def edges(*rows):
    sender, receiver, weight = zip(*rows, strict=True) if rows else ((), (), ())
    return Edges(np.array(sender, int), np.array(receiver, int), np.array(weight, np.float32))


RELATIONS = {
    HOLDS: edges((0, 1, 0.5), (2, 1, 0.25), (1, 0, 1)),
    WROTE: edges(),
    TRUSTS: edges((1, 0, 2)),
}
TEXT = np.arange(12, dtype=np.float32).reshape(6, 2)


def drawn() -> Any:
    return hetero_graph(COUNTS, RELATIONS, TEXT)


def test_the_drawing_as_one_graph():
    graph = drawn().to_jraph()
    # Inside a relation by (receiver, sender); items start at 3.
    assert graph.senders.tolist() == [1, 0, 2, 1]
    assert graph.receivers.tolist() == [3, 4, 4, 0]
    assert graph.edges["weight"].tolist() == [1, 0.5, 0.25, 2]
    assert graph.nodes["text"].tolist() == TEXT.tolist()
    assert [part.dtype.name for part in (graph.senders, graph.receivers, graph.n_node)] == ["int32"] * 3
    assert (graph.n_node.tolist(), graph.n_edge.tolist()) == ([6], [4])
    assert graph.globals is None
    assert isinstance(graph, jraph.GraphsTuple)


def test_jraph_takes_it():
    """Its counts agree, so that jraph's own batching and padding keep every node and edge."""
    graph = drawn().to_jraph()
    both: Any = jraph.batch([graph, graph])
    assert both.senders.tolist() == [1, 0, 2, 1, 7, 6, 8, 7]
    assert [np.asarray(part.receivers).tolist() for part in jraph.unbatch(both)] == [graph.receivers.tolist()] * 2
    padded: Any = jraph.pad_with_graphs(graph, n_node=10, n_edge=8)
    assert np.asarray(jraph.get_node_padding_mask(padded)).tolist() == [True] * 6 + [False] * 4
    unpadded: Any = jraph.unpad_with_graphs(padded)
    np.testing.assert_array_equal(unpadded.nodes["text"], TEXT)


def test_types_and_relations_are_slices():
    graph = drawn()
    assert [graph.node_slice(name) for name in COUNTS] == [slice(0, 3), slice(3, 5), slice(5, 5), slice(5, 6)]
    assert [graph.count(name) for name in COUNTS] == [3, 2, 0, 1]
    assert graph.text_of("item").tolist() == [[6, 7], [8, 9]]
    assert graph.text_of("post").shape == (0, 2)
    assert graph.relations == ((HOLDS, 3), (WROTE, 0), (TRUSTS, 1))
    assert str(HOLDS) == "user-holds-item"


def test_a_name_that_is_not_there():
    with pytest.raises(KeyError, match=r"'shop' is not among \['user', 'item', 'post', 'tag'\]"):
        drawn().node_slice("shop")
    with pytest.raises(KeyError, match=r"Relation\(source='tag'"):
        drawn().edges[Relation("tag", "of", "item")]


@pytest.mark.parametrize("relation", RELATIONS, ids=str)
def test_edges_come_back(relation):
    back = drawn().edges[relation]
    rows = sorted(zip(*(np.asarray(part).tolist() for part in back), strict=True))
    assert rows == sorted(zip(*(part.tolist() for part in RELATIONS[relation]), strict=True))
    assert np.all(np.diff(back.receivers) >= 0)


def test_any_market_comes_back():
    rng = np.random.default_rng(0)
    for _ in range(5):
        counts = {"user": int(rng.integers(1, 6)), "item": int(rng.integers(1, 6))}
        relations = {}
        for name, source, target in [("a", "user", "item"), ("b", "item", "user"), ("c", "item", "item")]:
            pair = np.argwhere(rng.random((counts[source], counts[target])) < 0.4)
            pair = pair[rng.permutation(len(pair))]
            weight = rng.normal(size=len(pair)).astype(np.float32)
            relations[Relation(source, name, target)] = Edges(pair[:, 0], pair[:, 1], weight)
        graph = hetero_graph(counts, relations, np.zeros((sum(counts.values()), 1), np.float32))
        for relation, given in relations.items():
            back = graph.edges[relation]
            places = np.asarray(back.receivers) * counts[relation.source] + np.asarray(back.senders)
            assert np.all(np.diff(places) > 0)
            assert {*zip(*map(tuple, map(np.asarray, back)), strict=True)} == {*zip(*map(tuple, given), strict=True)}


def test_a_graph_without_relations_or_words():
    graph: Any = hetero_graph({"user": 2}, {}, np.zeros((2, 3), np.float32))
    assert (graph.to_jraph().n_edge.tolist(), graph.to_jraph().senders.shape, graph.relations) == ([0], (0,), ())


def test_it_cannot_be_written():
    graph, text = drawn(), TEXT.copy()
    for array in (graph.text, *graph.edges[HOLDS], hetero_graph(COUNTS, RELATIONS, text).text_of("user")):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0
    text[0] = 0  # the caller's own array stays as it was
    with pytest.raises(dataclasses.FrozenInstanceError):
        graph.text = text


BAD = {
    "sender too large": (
        {HOLDS: edges((0, 0, 1), (3, 1, 1))},
        r"user-holds-item: sender 3 of edge 1; user ids are 0 to 2",
    ),
    "sender negative": ({HOLDS: edges((-1, 0, 1))}, r"user-holds-item: sender -1 of edge 0; user ids are 0 to 2"),
    "receiver too large": ({HOLDS: edges((2, 2, 1))}, r"user-holds-item: receiver 2 of edge 0; item ids are 0 to 1"),
    "an empty type": ({WROTE: edges((0, 0, 1))}, r"user-wrote-post: receiver 0 of edge 0; there are no post nodes"),
    "unknown type": (
        {Relation("user", "in", "shop"): edges((0, 0, 1))},
        r"user-in-shop: 'shop' is not a node type; it must be one of \['user', 'item', 'post', 'tag'\]",
    ),
    "weight": ({HOLDS: edges((0, 0, 1), (1, 1, np.nan))}, r"user-holds-item: weight nan of edge 1 is not finite"),
    "infinite": ({HOLDS: edges((0, 0, -np.inf))}, r"user-holds-item: weight -inf of edge 0 is not finite"),
    "twice": (
        {HOLDS: edges((0, 1, 1), (2, 1, 1), (0, 1, 2))},
        r"user-holds-item: an edge is repeated; merge repeated edges",
    ),
    "lengths": (
        {HOLDS: Edges(np.array([0, 1]), np.array([0, 1]), np.ones(1, np.float32))},
        r"user-holds-item: \[2, 2, 1\] senders, receivers, weights; they must agree",
    ),
}


@pytest.mark.parametrize(("relations", "message"), BAD.values(), ids=BAD)
def test_bad_edges(relations, message):
    with pytest.raises(ValueError, match=message):
        hetero_graph(COUNTS, {TRUSTS: RELATIONS[TRUSTS], **relations}, TEXT)


def test_bad_texts():
    with pytest.raises(ValueError, match="text has 5 rows for 6 nodes; give one row per node, zeros"):
        hetero_graph(COUNTS, RELATIONS, TEXT[:5])
    broken = TEXT.copy()
    broken[4, 1] = np.inf
    with pytest.raises(ValueError, match="text embedding of node 4 is not finite; encode it again"):
        hetero_graph(COUNTS, RELATIONS, broken)
