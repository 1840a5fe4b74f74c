"""From tables to relations, on a market that can be drawn."""

import dataclasses

import numpy as np
import pyarrow as pa
import pytest

from fused_rec.config import GraphConfig
from fused_rec.data.dataset import Dataset, empty_reviews, empty_ties
from fused_rec.data.io.tables import dataset_from_tables
from fused_rec.data.splits import Observed
from fused_rec.graph.build import (
    attribute_edges,
    build,
    check_relations,
    social_relations,
    text_knn_edges,
)
from fused_rec.graph.schema import INTERACTED_BY, INTERACTS, Relation

#   users   0     1     2     3        0 holds 0 1, 1 holds 1, 2 holds 1 2, 3 holds nothing; nobody holds 3 and 4
#           | \   |   / |              0 and 1 are friends of each other; 2 follows 0 and 3 (their target)
#   items   0   - 1 -   2   3   4      sectors: 0 bank, 1 energy, 2 null, 3 bank, 4 null
#
# items held by      1, 3, 1, 0, 0 users; users hold 2, 1, 2, 0 items
USER = np.array([0, 2, 0, 1, 2], np.int32)
ITEM = np.array([1, 2, 0, 1, 1], np.int32)
TIES = pa.table(
    {
        "source": pa.array([0, 2, 1, 2], pa.int32()),
        "target": pa.array([1, 0, 0, 3], pa.int32()),
        "kind": ["friend", "follow", "friend", "follow"],
    }
)
FOUR = {"user": 4, "item": 5}


def dataset(**changes) -> Dataset:
    market = Dataset(
        name="drawn",
        users=pa.table({"user_id": list("abcd")}),
        items=pa.table({"item_id": list("vwxyz"), "sector": ["bank", "energy", None, "bank", None]}),
        interactions=pa.table({"user": USER, "item": ITEM}),
        reviews=empty_reviews(),
        ties=TIES,
    )
    return dataclasses.replace(market, **changes)


def observed(ties: pa.Table = TIES) -> Observed:
    return Observed(USER, ITEM, empty_reviews(), ties, np.zeros(len(USER), np.float32))


NO_TEXT = {"user": np.zeros((4, 4), np.float32), "item": np.zeros((5, 4), np.float32)}


def rows(edges):
    """{(sender, receiver): weight}."""
    pairs = zip(np.asarray(edges.senders).tolist(), np.asarray(edges.receivers).tolist(), strict=True)
    return dict(zip(pairs, np.asarray(edges.weight).tolist(), strict=True))


def approx(expected):
    return pytest.approx(expected, rel=1e-6)


def test_holdings_by_hand():
    graph = build(dataset(), observed(), NO_TEXT, GraphConfig())
    assert graph.node_types == (("user", 4), ("item", 5))
    # 1 / sqrt(degree of user * degree of item)
    assert rows(graph.edges[INTERACTS]) == approx(
        {(0, 0): 2**-0.5, (0, 1): 6**-0.5, (1, 1): 3**-0.5, (2, 1): 6**-0.5, (2, 2): 2**-0.5}
    )
    assert rows(graph.edges[INTERACTED_BY]) == approx(
        {pair[::-1]: w for pair, w in rows(graph.edges[INTERACTS]).items()}
    )


def test_ties_by_hand():
    relations = social_relations(TIES, FOUR)
    # Friends are mutual, so one relation is enough; follows has one relation for each direction.
    assert [str(relation) for relation in relations] == ["user-follow-user", "user-follow_of-user", "user-friend-user"]
    assert rows(relations[Relation("user", "friend", "user")]) == {(0, 1): 1, (1, 0): 1}
    assert rows(relations[Relation("user", "follow", "user")]) == approx({(0, 2): 2**-0.5, (3, 2): 2**-0.5})
    assert rows(relations[Relation("user", "follow_of", "user")]) == approx({(2, 0): 2**-0.5, (2, 3): 2**-0.5})


def test_one_way_among_mutual_ties_gives_both_relations():
    ties = pa.concat_tables([TIES, pa.table({"source": [3], "target": [1], "kind": ["friend"]}, schema=TIES.schema)])
    names = [relation.name for relation in social_relations(ties, FOUR)]
    assert names == ["follow", "follow_of", "friend", "friend_of"]


def test_no_ties_no_relation():
    assert social_relations(empty_ties(), FOUR) == {}
    graph = build(dataset(ties=empty_ties()), observed(empty_ties()), NO_TEXT, GraphConfig())
    assert [relation for relation, _ in graph.relations] == [INTERACTS, INTERACTED_BY]


def test_attributes_by_hand():
    graph = build(dataset(), observed(), NO_TEXT, GraphConfig(attributes=("sector",)))
    assert graph.node_types[2:] == (("sector", 2),)  # 0 bank, 1 energy
    # Two items are banks, one is energy; the nulls of items 2 and 4 are no sector.
    assert rows(graph.edges[Relation("item", "in_sector", "sector")]) == approx(
        {(0, 0): 2**-0.5, (3, 0): 2**-0.5, (1, 1): 1}
    )
    assert rows(graph.edges[Relation("sector", "sector_of", "item")]) == approx(
        {(0, 0): 2**-0.5, (0, 3): 2**-0.5, (1, 1): 1}
    )


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (pa.chunked_array([["b", "a"], [None, "b"]]), (2, [(0, 0), (1, 1), (3, 0)])),
        (pa.array([3, 3, None, 7]), (2, [(0, 0), (1, 0), (3, 1)])),
        (pa.array([None] * 4, pa.string()), (0, [])),
        (pa.array(["b", None, "a", "b"]).dictionary_encode(), (2, [(0, 0), (2, 1), (3, 0)])),
        (pa.nulls(4), (0, [])),
        (pa.chunked_array([[["b", "a", "b"], None], [[], ["c", None, "a"]]]), (3, [(0, 0), (0, 1), (3, 1), (3, 2)])),
        (pa.array([[7, 7], [8], [], None]), (2, [(0, 0), (1, 1)])),
    ],
    ids=["chunks", "numbers", "all null", "encoded", "nothing", "lists", "lists of numbers"],
)
def test_attribute_edges(values, expected):
    count, (items, codes) = attribute_edges(pa.table({"x": values}), "x")
    assert (count, list(zip(items.tolist(), codes.tolist(), strict=True))) == expected


def test_a_column_without_values_makes_no_nodes():
    items = dataset().items.append_column("issuer", pa.array([None] * 5, pa.string()))
    graph = build(dataset(items=items), observed(), NO_TEXT, GraphConfig(attributes=("issuer", "sector")))
    assert graph.node_types[2:] == (("issuer", 0), ("sector", 2))
    assert dict(graph.relations)[Relation("issuer", "issuer_of", "item")] == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attributes": ("colour",)}, r"graph.attributes names 'colour'; the items have \['item_id', 'sector'\]"),
        (
            {"attributes": ("sector", "sector")},
            "graph.attributes names 'sector', which is already a node type",
        ),
        ({"attributes": ("user",)}, "graph.attributes names 'user', which is already a node type"),
    ],
)
def test_attributes_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        build(dataset(), observed(), NO_TEXT, GraphConfig(**changes))


def test_names_that_collide_are_refused():
    ties = pa.table({"source": [0, 1], "target": [1, 2], "kind": ["follow", "follow_of"]}, schema=TIES.schema)
    with pytest.raises(ValueError, match="two relations are named user-follow_of-user; rename that kind of tie"):
        social_relations(ties, FOUR)


def test_text_of_other_nodes_is_refused():
    with pytest.raises(ValueError, match="text has 10 rows for 9 nodes"):
        build(dataset(), observed(), NO_TEXT | {"user": np.zeros((5, 4), np.float32)}, GraphConfig())


# --- words ---------------------------------------------------------------------------------------------------------


def test_nearest_texts_by_hand():
    #                 0       1         2        3 (no words)  4
    words = np.array([[1, 0], [0.8, 0.6], [0, 1], [0, 0], [-1, 0]], np.float32)
    # Cosines: 0-1 .8, 1-2 .6, 0-2 and 2-4 0, 0-4 -1, 1-4 -.8; only positive ones count.
    assert rows(text_knn_edges(words, 1)) == approx({(1, 0): 1, (0, 1): 1, (1, 2): 1})
    assert rows(text_knn_edges(words, 2)) == approx({(1, 0): 1, (0, 1): 0.8 / 1.4, (2, 1): 0.6 / 1.4, (1, 2): 1})
    assert rows(text_knn_edges(words, 50)) == rows(text_knn_edges(words, 2))


@pytest.mark.parametrize(
    "words", [np.zeros((3, 2)), np.eye(3)[:, :2], np.array([[1, 0]])], ids=["none", "apart", "one"]
)
def test_nearest_texts_of_no_user(words):
    edges = text_knn_edges(words.astype(np.float32), 2)
    assert [len(part) for part in edges] == [0, 0, 0]


def test_nearest_texts_in_blocks(monkeypatch):
    words = np.random.default_rng(0).normal(size=(30, 4)).astype(np.float32)
    words[5] = 0
    words /= np.maximum(np.linalg.norm(words, axis=1, keepdims=True), 1e-9)
    whole = rows(text_knn_edges(words, 3))
    monkeypatch.setattr("fused_rec.graph.build.BLOCK_SCORES", 7 * len(words))
    assert rows(text_knn_edges(words, 3)) == approx(whole)
    for node in range(30):
        cosine = words @ words[node]
        cosine[[node, 5]] = -1
        best = np.argsort(-cosine)[:3] if node != 5 else []
        assert {sender for sender, receiver in whole if receiver == node} == set(best)
        assert sum(w for (_, receiver), w in whole.items() if receiver == node) == pytest.approx(float(len(best) > 0))


# --- the law -------------------------------------------------------------------------------------------------------


def test_permuting_the_users_permutes_the_graph():
    """User u becomes user at[u]; items keep their places."""
    rng = np.random.default_rng(0)
    at = np.array([2, 0, 3, 1])
    text = {name: rng.normal(size=(count, 3)).astype(np.float32) for name, count in FOUR.items()}
    text = {name: rows / np.linalg.norm(rows, axis=1, keepdims=True) for name, rows in text.items()}
    config = GraphConfig(attributes=("sector",), text_knn=2)

    before = build(dataset(), observed(), text, config)
    moved = TIES.set_column(0, "source", pa.array(at[TIES["source"]], pa.int32()))
    moved = moved.set_column(1, "target", pa.array(at[TIES["target"]], pa.int32()))
    seen = Observed(at[USER].astype(np.int32), ITEM, empty_reviews(), moved, np.zeros(len(USER), np.float32))
    after = build(dataset(ties=moved), seen, text | {"user": text["user"][np.argsort(at)]}, config)

    np.testing.assert_allclose(after.text_of("user")[at], before.text_of("user"), atol=1e-5)
    np.testing.assert_allclose(after.text_of("item"), before.text_of("item"), atol=1e-6)
    assert [relation for relation, _ in after.relations] == [relation for relation, _ in before.relations]
    for relation, _ in before.relations:
        source = at if relation.source == "user" else np.arange(5)
        target = at if relation.target == "user" else np.arange(5)
        expected = {(source[s], target[r]): weight for (s, r), weight in rows(before.edges[relation]).items()}
        assert rows(after.edges[relation]) == pytest.approx(expected, rel=1e-4), relation


def test_too_many_kinds_of_ties_are_refused():
    kinds = [f"kind {number}" for number in range(65)]
    ties = pa.table({"source": [0] * 65, "target": [1] * 65, "kind": kinds})
    check_relations(dataset().items, ties.slice(1), GraphConfig())
    refused = r"ties.kind has 65 distinct values \('kind 0', 'kind 1', 'kind 2', ...\).* takes at most 64. Merge"
    with pytest.raises(ValueError, match=refused):
        build(dataset(ties=ties), observed(ties), NO_TEXT, GraphConfig())


def test_attributes_that_connect_nothing_are_refused_or_logged(caplog):
    def check(values):
        check_relations(pa.table({"isin": values}), TIES, GraphConfig(attributes=("isin",)))

    with pytest.raises(ValueError, match="'isin', whose 1,001 distinct values for 1,001 items would .* no items"):
        check([f"x{number}" for number in range(1001)] + [None])
    with pytest.raises(ValueError, match="1,001 distinct values"):
        check(list(range(1001)))
    assert not caplog.records
    check([f"x{number}" for number in range(1000)])  # at the bound
    check([f"x{number % 700}" for number in range(1001)])
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
    assert "700 distinct values for 1,001 items become nodes of which most connect no items" in caplog.text
    caplog.clear()
    check([f"x{number % 500}" for number in range(1001)])
    assert not caplog.records


def test_continuous_attributes_are_refused():
    for values in (pa.array([0.5, 1.5]), pa.array([1, 2]).cast(pa.decimal128(30, 2))):
        with pytest.raises(ValueError, match="'price', which is continuous"):
            check_relations(pa.table({"price": values}), TIES, GraphConfig(attributes=("price",)))


def test_too_many_attributes_are_refused():
    names = tuple(f"a{number}" for number in range(65))
    with pytest.raises(ValueError, match="names 65 columns"):
        check_relations(pa.table({name: ["x"] for name in names}), TIES, GraphConfig(attributes=names))


@pytest.mark.parametrize("encoded", [False, True])
def test_missing_values_are_no_nodes(encoded):
    values = pa.array(["a", "", " ", None, "b", "a"])
    table = pa.table({"item_id": list("uvwxyz"), "x": values.dictionary_encode() if encoded else values})
    for items in (
        table,
        dataset_from_tables({"user_id": list("uvwxyz"), "item_id": list("uvwxyz")}, items=table).items,
    ):
        _, (rows, codes) = attribute_edges(items, "x")
        assert rows.tolist() == [0, 4, 5] and codes[0] == codes[2] != codes[1]


def test_large_integers_are_nodes_of_their_own():
    """As 64-bit floats these would be one."""
    count, (rows, codes) = attribute_edges(pa.table({"x": [2**53, 2**53 + 1, None]}), "x")
    assert (count, rows.tolist(), codes.tolist()) == (2, [0, 1], [0, 1])
