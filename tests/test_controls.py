"""Controls keep what a control must keep, degrees and who has words, and nothing of what it must not."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pretrained import model_of_width

from fused_rec.config import SplitConfig, from_dict
from fused_rec.data.controls import random_texts, rewire, shuffle_texts
from fused_rec.data.node_texts import ITEM, USER, NodeTextLinks, NodeTexts, node_texts
from fused_rec.data.splits import observe, split
from fused_rec.data.synthetic import make_synthetic
from fused_rec.graph.schema import Relation
from fused_rec.text import features
from fused_rec.training import inputs as preparing


def ties_table(pairs: list[tuple[int, int]], kinds: list[str] | None = None) -> pa.Table:
    source, target = (pa.array([pair[end] for pair in pairs], pa.int32()) for end in (0, 1))
    return pa.table({"source": source, "target": target, "kind": pa.array(kinds or ["f"] * len(pairs), pa.string())})


def rows(ties: pa.Table) -> list[tuple[int, int, str]]:
    return list(zip(*(ties.column(name).to_pylist() for name in ("source", "target", "kind")), strict=True))


def degrees(ties: list[tuple[int, int, str]], end: int) -> dict[tuple[int, str], int]:
    count = {}
    for tie in ties:
        count[tie[end], tie[2]] = count.get((tie[end], tie[2]), 0) + 1
    return count


def mutual(ties: list[tuple[int, int, str]]) -> list[tuple[int, int, str]]:
    there = set(ties)
    return [(a, b, kind) for a, b, kind in ties if (b, a, kind) in there]


TIES = st.lists(
    st.tuples(st.integers(0, 14), st.integers(0, 14), st.sampled_from("fg")).filter(lambda tie: tie[0] != tie[1]),
    unique=True,
    max_size=60,
)


@settings(max_examples=150, deadline=None)
@given(TIES, st.integers(0, 9), st.booleans())
def test_rewiring_keeps_every_degree(drawn, seed, both_ways):
    if both_ways:
        drawn = [*dict.fromkeys(tie for a, b, kind in drawn for tie in ((a, b, kind), (b, a, kind)))]
    before = ties_table([tie[:2] for tie in drawn], [tie[2] for tie in drawn])
    table = rewire(before, seed)
    after = rows(table)
    assert table.schema == before.schema
    assert len(set(after)) == len(after) == len(drawn)
    assert all(source != target for source, target, _ in after)
    for of in (list, mutual):  # of all ties, and of the mutual ones alone
        for end in (0, 1):
            assert degrees(of(after), end) == degrees(of(drawn), end)
    assert rows(rewire(before, seed)) == after


def random_ties(n_users: int, n_ties: int, *, both_ways: bool) -> list[tuple[int, int]]:
    rng = np.random.default_rng(0)
    pairs = {(int(a), int(b)) for a, b in rng.integers(n_users, size=(n_ties, 2)) if a != b}
    return sorted(pairs | {(b, a) for a, b in pairs} if both_ways else pairs)


@pytest.mark.parametrize("both_ways", [False, True])
def test_rewiring_leaves_true_ties_only_by_chance(both_ways):
    """Of 2,000 users' 8,000 ties a graph of the same degrees shares about ties * degree / users of them: 4 or 8."""
    true = random_ties(2000, 8000, both_ways=both_ways)
    drawn = [set(rows(rewire(ties_table(true), seed))) for seed in range(3)]
    kept = [len(ties & {(*pair, "f") for pair in true}) / len(true) for ties in drawn]
    expected = len(true) / 2000**2
    assert max(kept) < 3 * expected
    assert min(kept) >= 0
    # and two seeds agree as little
    assert len(drawn[0] & drawn[1]) / len(true) < 3 * expected


def test_two_ties_swap_their_ends():
    """0 -> 1 and 2 -> 3 have two graphs of the same degrees, and both come up; the star has only itself."""
    ends = {tuple(sorted(row[:2] for row in rows(rewire(ties_table([(0, 1), (2, 3)]), seed)))) for seed in range(20)}
    assert ends == {((0, 1), (2, 3)), ((0, 3), (2, 1))}
    star = ties_table([(0, 1), (0, 2), (0, 3)])
    assert sorted(rows(rewire(star, 0))) == sorted(rows(star))
    assert rows(rewire(ties_table([]), 0)) == []


def test_a_one_way_tie_never_closes_a_mutual_one():
    """1 -> 2 with 3 -> 0 could become 1 -> 0, which 0 -> 1 answers; the swap is passed over."""
    before = ties_table([(0, 1), (3, 0), (1, 2)])
    for seed in range(20):
        assert mutual(rows(rewire(before, seed))) == []


def test_one_way_and_mutual_ties_keep_out_of_each_others_way():
    """0 -> 2 and 3 -> 1 could become 0 -> 1, which is there as half of a mutual tie; the swap is passed over."""
    before = ties_table([(0, 1), (1, 0), (0, 2), (3, 1)])
    assert all(sorted(rows(rewire(before, seed))) == sorted(rows(before)) for seed in range(20))


def test_mutual_ties_have_no_direction():
    """Two mutual ties among four users have three graphs of the same degrees."""
    before = ties_table([(0, 1), (1, 0), (2, 3), (3, 2)])
    drawn = {tuple(sorted(row[:2] for row in rows(rewire(before, seed)) if row[0] < row[1])) for seed in range(30)}
    assert drawn == {((0, 1), (2, 3)), ((0, 2), (1, 3)), ((0, 3), (1, 2))}


def finetuned() -> NodeTexts:
    """Users 1, 2, 5 and 7 have words, user 5 two texts; items 0 and 3 too; text 2 is a user's and an item's."""
    f32, i32 = np.float32, np.int32
    users = np.array([1, 2, 5, 5, 7], i32), np.array([0, 1, 1, 2, 3], i32), np.array([1, 1, 0.25, 0.75, 1], f32)
    items = np.array([0, 3, 3], i32), np.array([2, 0, 4], i32), np.array([1, 0.5, 0.5], f32)
    return NodeTexts(["a", "b", "c", "d", "e"], {USER: NodeTextLinks(*users, 9), ITEM: NodeTextLinks(*items, 4)})


def texts_given(texts: NodeTexts, node: str) -> dict[int, list[tuple[int, float]]]:
    out: dict[int, list[tuple[int, float]]] = {}
    links = texts.links[node]
    assert links.n_nodes == {USER: 9, ITEM: 4}[node]
    for row, text, weight in zip(links.nodes.tolist(), links.texts.tolist(), links.weights.tolist(), strict=True):
        out.setdefault(row, []).append((text, weight))
    return out


@pytest.mark.parametrize("node", ["user", "item"])
def test_shuffled_words_are_the_same_words_in_other_mouths(node):
    before = texts_given(finetuned(), node)
    seen = set()
    for seed in range(20):
        texts = shuffle_texts(finetuned(), seed)
        after = texts_given(texts, node)
        assert texts.texts == finetuned().texts
        assert after.keys() == before.keys()
        assert sorted(after.values()) == sorted(before.values())
        assert all(after[row] != before[row] for row in before)
        assert list(after) == sorted(after)
        seen.add(str(after))
        assert texts_given(shuffle_texts(finetuned(), seed), node) == after
    assert len(seen) == {"user": 6, "item": 1}[node]  # the cycles through four nodes, and through two


def test_random_words_are_unit_vectors_of_their_own():
    texts, vectors = random_texts(finetuned(), 384, 0)
    assert texts_given(texts, "user") == {row: [(place, 1)] for place, row in enumerate((1, 2, 5, 7))}
    assert texts_given(texts, "item") == {0: [(4, 1)], 3: [(5, 1)]}
    assert len(texts.texts) == len(vectors) == 6
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    cosines = vectors @ vectors.T - np.eye(6)
    assert np.abs(cosines).max() < 5 / np.sqrt(384)
    np.testing.assert_array_equal(vectors, random_texts(finetuned(), 384, 0)[1])
    assert np.abs(vectors - random_texts(finetuned(), 384, 1)[1]).min(1).max() > 1e-4


# --- where they are applied


@pytest.fixture
def market(monkeypatch):
    """A small market, its split, and an encoder that says how often it was asked; words are told by length."""
    dataset = make_synthetic(0, n_users=60, n_items=25)

    def embed(texts, model, **_):
        return np.stack([np.random.default_rng(len(text)).standard_normal(6) for text in texts]).astype(np.float32)

    monkeypatch.setattr(features, "open_model", lambda name, **_: model_of_width(6))
    monkeypatch.setattr(features, "encode_texts", embed)
    return dataset, split(dataset, SplitConfig())


def prepared(market, *, text="real", ties="observed", seed=0, **model):
    settings = {"text": {"features": text}, "graph": {"social_edges": ties, "text_knn": 2}, "train": {"seed": seed}}
    config = from_dict({**settings, "model": model})
    return preparing.prepare(config, *market)


def test_controls_come_after_the_audit(market, monkeypatch):
    """The audit sees the true ties and texts; made-up ones it would refuse, as they are rows of no table."""
    dataset, data_split = market
    audited = []

    def spy(*arguments):
        audited.append(arguments)
        return real(*arguments)

    real = preparing.audit
    monkeypatch.setattr(preparing, "audit", spy)
    true = observe(dataset, data_split)
    done = prepared(market, text="shuffled", ties="rewired")
    [(_, _, seen, texts, _)] = audited
    assert seen.ties.equals(true.ties)
    assert texts.texts == node_texts(dataset, true).texts
    assert rows(done.observed.ties) != rows(true.ties)
    with pytest.raises(ValueError, match="tie"):
        real(dataset, data_split, done.observed, texts, ("train",))


def tie_edges(done) -> set[tuple[int, int]]:
    return {row[:2] for row in rows(done.observed.ties)}


def test_the_graph_is_built_of_rewired_ties(market):
    true, drawn, again, other = (
        prepared(market, **change) for change in ({}, *({"ties": "rewired", "seed": seed} for seed in (1, 1, 2)))
    )
    kind = true.observed.ties.column("kind")[0].as_py()
    relation = Relation("user", kind, "user")
    assert dict(drawn.graph_inputs.graph.relations)[relation] == dict(true.graph_inputs.graph.relations)[relation]
    edges = drawn.graph_inputs.graph.adjacencies[relation]  # messages go from the target of a tie to its source
    received = zip(np.asarray(edges.receivers).tolist(), np.asarray(edges.senders).tolist(), strict=True)
    assert set(received) == tie_edges(drawn)
    assert tie_edges(again) == tie_edges(drawn) != tie_edges(other)
    assert len(tie_edges(drawn) & tie_edges(true)) < len(tie_edges(true)) / 2


def test_the_graph_is_built_without_ties(market):
    relations = dict(prepared(market, ties="none").graph_inputs.graph.relations)
    assert {relation.name for relation in relations} == {"holds", "held_by", "similar_text"}
    assert {relation.name for relation in dict(prepared(market).graph_inputs.graph.relations)} > {
        "similar_text",
        "held_by",
    }


@pytest.mark.parametrize("node", ["user", "item"])
def test_the_graph_has_shuffled_words_and_nearest_texts_of_them(market, node):
    true, shuffled, again, other = (
        prepared(market, **change) for change in ({}, *({"text": "shuffled", "seed": seed} for seed in (1, 1, 2)))
    )
    before, after = (np.asarray(done.graph_inputs.graph.text[node]) for done in (true, shuffled))

    def in_order(vectors):
        return vectors[np.lexsort(vectors.round(4).T)]

    np.testing.assert_allclose(in_order(before), in_order(after), atol=1e-4)
    assert not np.allclose(before, after, atol=1e-3)
    np.testing.assert_array_equal(after, again.graph_inputs.graph.text[node])
    assert not np.allclose(after, other.graph_inputs.graph.text[node], atol=1e-3)
    nearest = shuffled.graph_inputs.graph.adjacencies[Relation(node, "similar_text", node)]
    first = np.asarray(nearest.senders)[: int(nearest.receiver_start[1])]
    cosines = after @ after[0]
    cosines[0] = -1
    assert set(first.tolist()) == set(np.argsort(-cosines)[:2].tolist())


def test_random_words_need_the_encoder_for_its_width_only(market, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("encoded")

    true = prepared(market)
    monkeypatch.setattr(features, "encode_texts", refuse)
    drawn = prepared(market, text="random")
    for node in ("user", "item"):
        before, after = (np.asarray(done.graph_inputs.graph.text[node]) for done in (true, drawn))
        assert before.shape == after.shape
        np.testing.assert_array_equal(before.any(1), after.any(1))
    again, other = (prepared(market, text="random", seed=seed).graph_inputs.graph.text["item"] for seed in (0, 1))
    np.testing.assert_array_equal(again, after)
    assert not np.allclose(other, after)


def test_a_variant_without_words_has_none_to_shuffle(market):
    for control in ("real", "shuffled", "random"):
        assert not np.asarray(prepared(market, text=control, variant="graph").graph_inputs.graph.text["user"]).any()
