"""The words of nodes and their weights, by hand."""

import numpy as np
import pyarrow as pa

from fused_rec.data.dataset import Dataset, empty_reviews, empty_ties
from fused_rec.data.node_texts import USER, NodeTexts, node_texts
from fused_rec.data.splits import Observed


def reviews(rows: list[tuple[int, int, str | None]]) -> pa.Table:
    user, item, text = zip(*rows, strict=True)
    return pa.table(
        {"user": pa.array(user, pa.int32()), "item": pa.array(item, pa.int32()), "text": pa.array(text, pa.string())}
    )


def words(users: list[str | None] | None, items: list[str | None] | None, texts_given: pa.Table) -> NodeTexts:
    """Three users and three items, described or, where None, from tables without the column."""

    def nodes(texts: list[str | None] | None) -> pa.Table:
        ids = pa.table({"id": ["0", "1", "2"]})
        return ids if texts is None else ids.append_column("text", pa.array(texts, pa.string()))

    pairs = np.zeros(1, np.int32)
    data = Dataset("tiny", nodes(users), nodes(items), pa.table({}), texts_given, empty_ties())
    return node_texts(data, Observed(pairs, pairs, texts_given, empty_ties(), np.zeros(len(pairs), np.float32)))


def by_node(texts: NodeTexts, node_type: str) -> dict[int, dict[str, float]]:
    nodes: dict[int, dict[str, float]] = {}
    links = texts.links[node_type]
    for row, text, weight in zip(links.nodes.tolist(), links.texts.tolist(), links.weights.tolist(), strict=True):
        assert texts.texts[text] not in nodes.setdefault(row, {})
        nodes[row][texts.texts[text]] = weight
    return nodes


def test_description_has_half_and_reviews_share_half():
    texts_given = reviews([(0, 0, " good "), (0, 1, "good"), (0, 2, "bad"), (1, 2, "bad"), (0, 2, "so so")])
    texts = words(["saver", None, "  "], ["fund", "\t", None], texts_given)
    assert texts.texts == ["saver", "fund", "good", "bad", "so so"]
    assert by_node(texts, "user") == {0: {"saver": 0.5, "good": 0.25, "bad": 0.125, "so so": 0.125}, 1: {"bad": 1}}
    third = float(np.float32(1 / 3))
    assert by_node(texts, "item") == {
        0: {"fund": 0.5, "good": 0.5},
        1: {"good": 1},
        2: {"bad": 2 * third, "so so": third},
    }
    users = texts.links[USER]
    assert users.nodes.tolist() == [0, 0, 0, 0, 1]
    assert (users.nodes.dtype, users.weights.dtype, users.n_nodes) == (np.int32, np.float32, 3)


def test_blank_reviews_are_nobodys_words():
    texts = words(["saver", None, None], None, reviews([(0, 0, None), (0, 1, " \n"), (1, 1, "")]))
    assert texts.texts == ["saver"]
    assert by_node(texts, "user") == {0: {"saver": 1}}
    assert by_node(texts, "item") == {}


def test_a_review_that_repeats_the_description_adds_to_it():
    texts = words(["same", None, None], None, reviews([(0, 0, "same"), (0, 1, "other")]))
    assert by_node(texts, "user") == {0: {"same": 0.75, "other": 0.25}}


def test_without_any_words():
    texts = words(None, None, empty_reviews())
    assert texts.texts == []
    assert [(len(links.nodes), len(links.weights), links.n_nodes) for links in texts.links.values()] == [(0, 0, 3)] * 2


def test_weights_sum_to_one_and_keep_first_appearance_order():
    rng = np.random.default_rng(0)
    texts_given = reviews([(int(u), int(i), f"text {t}") for u, i, t in rng.integers(0, 3, (500, 3))])
    texts = words([None, "text 1", "zebra"], ["apple", None, "text 1"], texts_given)
    assert texts.texts[:3] == ["text 1", "zebra", "apple"]
    for links in texts.links.values():
        np.testing.assert_allclose(np.bincount(links.nodes, links.weights), 1, atol=1e-6)
        assert (np.diff(links.nodes) >= 0).all()
