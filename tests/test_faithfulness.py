"""What is taken away to test an explanation is really gone, and the curves are those of the scores that are left."""

import dataclasses
import functools
from pathlib import Path

import jax
import numpy as np
import pyarrow as pa
import pytest
from tiny import quick_compilation  # noqa: F401

from fused_rec.config import Config, GraphConfig, ModelConfig, TextConfig
from fused_rec.data.splits import split
from fused_rec.data.synthetic import make_market
from fused_rec.explain import faithfulness as subject
from fused_rec.explain.faithfulness import (
    SHARES,
    SIMILAR,
    Curves,
    area,
    attributions,
    curves,
    sources,
    summary,
    without,
)
from fused_rec.explain.ledger import HOLDING, LIKE_MINDED, ledger, parts
from fused_rec.explain.without import without_holding
from fused_rec.graph.build import HELD_BY, HOLDS, build
from fused_rec.graph.propagate import adjacencies
from fused_rec.model.baselines import counted
from fused_rec.train import prepare as preparing
from fused_rec.train.prepare import prepare
from fused_rec.train.step import Task, embed, init

TINY = str(Path(__file__).parent / "golden" / "tiny_bert")
CONFIG = Config(
    model=ModelConfig(dim=6, rounds=2, affinity=True, half_life=90.0),
    text=TextConfig(model=TINY, lexical=0),
    graph=GraphConfig(attributes=("sector",), similar_text=3),
)


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """(config, prepared, params, texts, vectors) of a model with parameters as after some training."""
    text = dataclasses.replace(CONFIG.text, cache=str(tmp_path_factory.mktemp("cache")))
    config = dataclasses.replace(CONFIG, text=text)
    market = make_market(0, n_users=40, n_items=24)
    prepared = prepare(config, market, split(market, config.split))
    leaves, tree = jax.tree.flatten(init(config, prepared.task).params)
    rng = np.random.default_rng(0)
    params = jax.tree.unflatten(tree, [x + rng.normal(size=x.shape).astype(np.float32) / 3 for x in leaves])
    texts = preparing.node_texts(prepared.dataset, prepared.observed)
    return config, prepared, params, *preparing.encode(config, texts)


def given(config, params, task, user) -> np.ndarray:
    users, items = jax.jit(embed, static_argnums=0)(config, params, task)
    return np.asarray(users[user] @ items.T)


def a_user(prepared) -> int:
    """One who holds, is tied both ways and hears others of similar words."""
    ties = prepared.observed.ties
    source, target = (set(ties.column(name).to_pylist()) for name in ("source", "target"))
    heard = set(prepared.task.adjacencies[SIMILAR].receivers.tolist())
    return next(user for user in sorted(source & target & heard & set(prepared.observed.user.tolist())))


def test_sources_are_those_of_the_parts(opened):
    config, prepared, params, *_ = opened
    book = ledger(config, params, prepared.task)
    for user in range(prepared.dataset.n_users):
        split_up = parts(book, user, [0])
        named = {(kind, row) for kind, row in zip(split_up.kind, split_up.source.tolist(), strict=True) if row >= 0}
        heard = sources(prepared.task, user)
        assert {(source.kind, source.row) for source in heard} == named
        assert len(heard) == len(named)
        for source in heard:
            for relation, edge in source.edges:
                hears = prepared.task.adjacencies[relation]
                assert {int(hears.senders[edge]), int(hears.receivers[edge])} >= (
                    {user} if relation in (HELD_BY, HOLDS) else {user, source.row}
                )


def test_without_one_holding_as_computed_anew(opened):
    config, prepared, params, *_ = opened
    user = a_user(prepared)
    for source in sources(prepared.task, user):
        if source.kind == HOLDING:
            found = given(config, params, without(config, prepared.observed, prepared.task, user, [source]), user)
            expected = given(config, params, without_holding(config, prepared, user, source.row), user)
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
            assert np.abs(found - given(config, params, prepared.task, user)).max() > 1e-4


def test_without_holdings_and_ties_as_built_anew(opened):
    """All that a user holds and whom they are tied to, taken out of the tables before the graph is built."""
    config, prepared, params, texts, vectors = opened
    user, observed = a_user(prepared), prepared.observed
    gone = [source for source in sources(prepared.task, user) if source.kind != LIKE_MINDED]
    assert {source.kind for source in gone} == {HOLDING, "tie:referral", "tie:referral_of"}
    kept = observed.user != user
    tied = (observed.ties.column("source").to_numpy() == user) | (observed.ties.column("target").to_numpy() == user)
    less = dataclasses.replace(
        observed,
        **{name: getattr(observed, name)[kept] for name in ("user", "item", "age")},
        ties=observed.ties.filter(pa.array(~tied)),
    )
    graph = build(prepared.dataset, less, texts, vectors, config.graph)
    popularity = counted(less.item, less.age, config.model.half_life, prepared.dataset.n_items)
    anew = Task(graph, adjacencies(graph), prepared.task.present, popularity)
    task = without(config, observed, prepared.task, user, gone)
    for other in (user, (user + 1) % prepared.dataset.n_users):
        expected = given(config, params, anew, other)
        np.testing.assert_allclose(given(config, params, task, other), expected, rtol=1e-5, atol=1e-6)


def test_who_is_left_of_those_with_similar_words_is_heard_more(opened):
    config, prepared, *_ = opened
    user, full = a_user(prepared), prepared.task.adjacencies[SIMILAR]
    like = [source for source in sources(prepared.task, user) if source.kind == LIKE_MINDED]
    assert len(like) == 3
    left = without(config, prepared.observed, prepared.task, user, like[:1]).adjacencies[SIMILAR]
    before, after = (slice(*hears.receiver_start[user : user + 2].tolist()) for hears in (full, left))
    assert left.senders[after].tolist() == full.senders[before].tolist()[1:]
    expected = full.weight[before][1:] / full.weight[before][1:].sum()
    np.testing.assert_allclose(left.weight[after], expected, rtol=1e-6)
    np.testing.assert_allclose(np.delete(left.weight[:-1], np.r_[after]), np.delete(full.weight, np.r_[before]), 1e-6)


def test_mutual_ties_are_their_own_way_back(opened):
    config, prepared, _, texts, vectors = opened
    one = prepared.observed.ties
    there = np.stack([one.column("source").to_numpy(), one.column("target").to_numpy()], 1)
    pairs = np.unique(np.concatenate([there, there[:, ::-1]]), axis=0).astype(np.int32)
    kinds = pa.array(["friend"] * len(pairs))
    ties = pa.table({"source": pairs[:, 0], "target": pairs[:, 1], "kind": kinds})
    graph = build(prepared.dataset, dataclasses.replace(prepared.observed, ties=ties), texts, vectors, config.graph)
    task = dataclasses.replace(prepared.task, graph=graph, adjacencies=adjacencies(graph))
    user = int(pairs[0, 0])
    friends = [source for source in sources(task, user) if source.kind == "tie:friend"]
    for friend in friends:
        [(heard, edge), (told, back)] = friend.edges
        assert heard == told
        hears = task.adjacencies[heard]
        assert (hears.senders[edge], hears.receivers[edge]) == (friend.row, user)
        assert (hears.senders[back], hears.receivers[back]) == (user, friend.row)


def test_gradients_are_differences(opened):
    config, prepared, params, *_ = opened
    user, item, task = a_user(prepared), 5, prepared.task
    heard, book = sources(task, user), ledger(config, params, task)
    found = attributions(config, params, task, book, user, item, heard)
    for number in range(0, len(heard), 3):
        scored = []
        for factor in (0.9, 1.1):
            changed = {}
            for relation, edge in heard[number].edges:
                weight = np.array((changed.get(relation) or task.adjacencies[relation]).weight)
                weight[edge] *= factor
                changed[relation] = dataclasses.replace(task.adjacencies[relation], weight=weight)
            there = dataclasses.replace(task, adjacencies={**task.adjacencies, **changed})
            scored.append(given(config, params, there, user)[item])
        assert found["gradient"][number] == pytest.approx((scored[1] - scored[0]) / 0.2, rel=0.02, abs=1e-5)


def test_attention_is_the_part_without_its_direction(opened):
    """After one round a message is the sender's own input: its part is attention x length x cosine."""
    config, prepared, *_ = opened
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, rounds=1, variant="graph"))
    params = init(config, prepared.task).params
    user, item = a_user(prepared), 5
    heard, book = sources(prepared.task, user), ledger(config, params, prepared.task)
    found = attributions(config, params, prepared.task, book, user, item, heard)
    [tower] = book.towers
    for source, part, weight in zip(heard, found["parts"], found["attention"], strict=True):
        relation = source.edges[0][0]
        if relation in tower.coefficients.edge:
            said, wanted = tower.ids[0][relation.source][source.row], tower.items[item]
            assert weight > 0
            assert part == pytest.approx(weight * (said @ wanted) / np.linalg.norm(wanted), rel=1e-4, abs=1e-7)
        else:
            assert (relation, part, weight) == (SIMILAR, 0, 0)


def test_curves_are_scores_without_the_first(opened, monkeypatch):
    config, prepared, params, *_ = opened
    monkeypatch.setattr(subject, "LEAST_RISE", -np.inf)
    user, item = a_user(prepared), 5
    monkeypatch.setattr(subject, "LEAST_SOURCES", 1)
    draw = functools.partial(np.random.default_rng, 3)
    book, heard = ledger(config, params, prepared.task), sources(prepared.task, user)
    found = curves(config, params, prepared, book, user, item, draw())
    assert found is not None
    order = attributions(config, params, prepared.task, book, user, item, heard)
    order["random"] = draw().random(len(heard))

    def score(gone) -> float:
        task = without(config, prepared.observed, prepared.task, user, gone)
        return float(given(config, params, task, user)[item])

    everything, nothing = score([]), score(heard)
    assert found.rise == pytest.approx(everything - nothing, rel=1e-5)
    for name, values in order.items():
        first = [heard[n] for n in np.argsort(-values)[: round(0.4 * len(heard))]]
        rest = [source for source in heard if source not in first]
        assert found.deletion[name][[0, -1]].tolist() == pytest.approx([1, 0])
        assert found.insertion[name][[0, -1]].tolist() == pytest.approx([0, 1])
        assert found.deletion[name][2] == pytest.approx((score(first) - nothing) / found.rise, rel=1e-4, abs=1e-5)
        assert found.insertion[name][2] == pytest.approx((score(rest) - nothing) / found.rise, rel=1e-4, abs=1e-5)
    monkeypatch.setattr(subject, "LEAST_RISE", 1e6)
    assert curves(config, params, prepared, book, user, item, draw()) is None


def test_a_summary_by_hand():
    down, up = 1 - SHARES, SHARES
    assert area(down) == pytest.approx(0.5)
    assert area(np.array([1.0, 0.0, 0.0])) == pytest.approx(0.25)
    step = np.array([1.0, *[0.0] * 5])

    def one(own: np.ndarray) -> Curves:
        return Curves(0.1, {name: own if name == "parts" else down for name in subject.ORDERS},
                      dict.fromkeys(subject.ORDERS, up))  # fmt: skip

    report = summary([one(step), one(step)])
    assert report["deletion"]["parts"]["area"] == pytest.approx(0.1)
    assert report["deletion"]["random"]["difference"] == pytest.approx({"mean": -0.4, "low": -0.4, "high": -0.4})
    assert report["insertion"]["random"]["difference"] == pytest.approx({"mean": 0, "low": 0, "high": 0})
    assert report["insertion"]["attention"]["curve"] == pytest.approx(up.tolist())
    mixed = summary([one(step), one(down)])["deletion"]["parts"]
    assert (mixed["low"], mixed["area"], mixed["high"]) == pytest.approx((0.1, 0.3, 0.5))
    with pytest.raises(ValueError, match="ask for others"):
        summary([])
