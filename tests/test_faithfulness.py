"""What is taken away to test an explanation is really gone, and the curves are those of the scores that are left."""

import dataclasses
import functools
from pathlib import Path

import jax
import numpy as np
import pyarrow as pa
import pytest

from fused_rec.baselines.neighbors import item_counts
from fused_rec.config import Config, GraphConfig, ModelConfig, TextConfig
from fused_rec.data.splits import split
from fused_rec.data.synthetic import make_synthetic
from fused_rec.explanation import faithfulness as subject
from fused_rec.explanation.counterfactual import without_interaction, without_sources
from fused_rec.explanation.decomposition import INTERACTION, SIMILAR_USERS, contributions, decompose
from fused_rec.explanation.explained_model import explained_model
from fused_rec.explanation.faithfulness import SHARES, Curves, area, attributions, curves, summary
from fused_rec.explanation.leave_one_out import SetScores
from fused_rec.explanation.sources import SIMILAR, Source, reverse_relations
from fused_rec.explanation.sources import sources as sources_of
from fused_rec.graph.build import build
from fused_rec.graph.device_graph import device_graph
from fused_rec.graph.schema import INTERACTED_BY, INTERACTS
from fused_rec.rng import numbered_rng
from fused_rec.training.inputs import prepare
from fused_rec.training.train_step import GraphInputs, embed_nodes, init

TINY = str(Path(__file__).parent / "golden" / "tiny_bert")
CONFIG = Config(
    model=ModelConfig(dim=6, num_layers=2, popularity_half_life=90.0),
    text=TextConfig(model=TINY, tfidf_dim=0),
    graph=GraphConfig(attributes=("sector",), text_knn=3),
)


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """(config, prepared, params, text features of nodes) of a model with parameters as after some training."""
    text = dataclasses.replace(CONFIG.text, cache=str(tmp_path_factory.mktemp("cache")))
    config = dataclasses.replace(CONFIG, text=text)
    market = make_synthetic(0, n_users=40, n_items=24)
    prepared = prepare(config, market, split(market, config.split))
    leaves, tree = jax.tree.flatten(init(config, prepared.graph_inputs).params)
    rng = np.random.default_rng(0)
    params = jax.tree.unflatten(tree, [x + rng.normal(size=x.shape).astype(np.float32) / 3 for x in leaves])
    return config, prepared, params, {name: nodes.rows for name, nodes in prepared.text.node_rows().items()}


def given(config, params, graph_inputs, user) -> np.ndarray:
    users, items = jax.jit(embed_nodes, static_argnums=0)(config, params, graph_inputs)
    return np.asarray(users[user] @ items.T)


def sources(graph_inputs, user) -> list[Source]:
    return sources_of(graph_inputs.graph, reverse_relations(graph_inputs.graph), user)


def a_user(prepared) -> int:
    """A user with interactions, social edges both ways and text neighbors."""
    ties = prepared.observed.ties
    source, target = (set(ties.column(name).to_pylist()) for name in ("source", "target"))
    user_sources = set(prepared.graph_inputs.graph.adjacencies[SIMILAR].receivers.tolist())
    return next(user for user in sorted(source & target & user_sources & set(prepared.observed.user.tolist())))


def test_sources_are_those_of_the_parts(opened):
    config, prepared, params, *_ = opened
    decomposition = decompose(config, params, prepared.graph_inputs)
    for user in range(prepared.dataset.n_users):
        split_up = contributions(decomposition, user, [0])
        named = {(kind, row) for kind, row in zip(split_up.kind, split_up.source.tolist(), strict=True) if row >= 0}
        user_sources = sources(prepared.graph_inputs, user)
        assert {(source.kind, source.row) for source in user_sources} == named
        assert len(user_sources) == len(named)
        for source in user_sources:
            for relation, edge in source.edges:
                adjacency = prepared.graph_inputs.graph.adjacencies[relation]
                assert {int(adjacency.senders[edge]), int(adjacency.receivers[edge])} >= (
                    {user} if relation in (INTERACTED_BY, INTERACTS) else {user, source.row}
                )


def test_without_one_holding_as_computed_anew(opened):
    config, prepared, params, *_ = opened
    user = a_user(prepared)
    for source in sources(prepared.graph_inputs, user):
        if source.kind == INTERACTION:
            found = given(
                config, params, without_sources(config, prepared.observed, prepared.graph_inputs, user, [source]), user
            )
            expected = given(config, params, without_interaction(config, prepared, user, source.row), user)
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
            assert np.abs(found - given(config, params, prepared.graph_inputs, user)).max() > 1e-4


def test_without_holdings_and_ties_as_built_anew(opened):
    """All that a user holds and whom they are tied to, taken out of the tables before the graph is built."""
    config, prepared, params, text = opened
    user, observed = a_user(prepared), prepared.observed
    gone = [source for source in sources(prepared.graph_inputs, user) if source.kind != SIMILAR_USERS]
    assert {source.kind for source in gone} == {INTERACTION, "tie:referral", "tie:referral_of"}
    kept = observed.user != user
    tied = (observed.ties.column("source").to_numpy() == user) | (observed.ties.column("target").to_numpy() == user)
    less = dataclasses.replace(
        observed,
        **{name: getattr(observed, name)[kept] for name in ("user", "item", "age")},
        ties=observed.ties.filter(pa.array(~tied)),
    )
    graph = build(prepared.dataset, less, text, config.graph)
    popularity = item_counts(less.item, less.age, config.model.popularity_half_life, prepared.dataset.n_items)
    scales = {relation: a.scale for relation, a in prepared.graph_inputs.graph.adjacencies.items()}
    anew = GraphInputs(device_graph(graph, scales=scales), prepared.graph_inputs.trained_items, popularity)
    graph_inputs = without_sources(config, observed, prepared.graph_inputs, user, gone)
    for other in (user, (user + 1) % prepared.dataset.n_users):
        expected = given(config, params, anew, other)
        np.testing.assert_allclose(given(config, params, graph_inputs, other), expected, rtol=1e-5, atol=1e-6)


def test_who_is_left_of_those_with_similar_words_is_active_more(opened):
    config, prepared, *_ = opened
    user, full = a_user(prepared), prepared.graph_inputs.graph.adjacencies[SIMILAR]
    like = [source for source in sources(prepared.graph_inputs, user) if source.kind == SIMILAR_USERS]
    assert len(like) == 3
    left = without_sources(config, prepared.observed, prepared.graph_inputs, user, like[:1]).graph.adjacencies[SIMILAR]
    before, after = (slice(*adjacency.receiver_start[user : user + 2].tolist()) for adjacency in (full, left))
    assert left.senders[after].tolist() == full.senders[before].tolist()[1:]
    expected = full.weight[before][1:] / full.weight[before][1:].sum()
    np.testing.assert_allclose(left.weight[after], expected, rtol=1e-6)
    np.testing.assert_allclose(np.delete(left.weight[:-1], np.r_[after]), np.delete(full.weight, np.r_[before]), 1e-6)


def test_mutual_ties_are_their_own_way_back(opened):
    config, prepared, _, text = opened
    one = prepared.observed.ties
    there = np.stack([one.column("source").to_numpy(), one.column("target").to_numpy()], 1)
    pairs = np.unique(np.concatenate([there, there[:, ::-1]]), axis=0).astype(np.int32)
    kinds = pa.array(["friend"] * len(pairs))
    ties = pa.table({"source": pairs[:, 0], "target": pairs[:, 1], "kind": kinds})
    graph = build(prepared.dataset, dataclasses.replace(prepared.observed, ties=ties), text, config.graph)
    graph_inputs = dataclasses.replace(prepared.graph_inputs, graph=device_graph(graph))
    user = int(pairs[0, 0])
    friends = [source for source in sources(graph_inputs, user) if source.kind == "tie:friend"]
    for friend in friends:
        [(user_sources, edge), (reverse, back)] = friend.edges
        assert user_sources == reverse
        adjacency = graph_inputs.graph.adjacencies[user_sources]
        assert (adjacency.senders[edge], adjacency.receivers[edge]) == (friend.row, user)
        assert (adjacency.senders[back], adjacency.receivers[back]) == (user, friend.row)


def test_gradients_are_differences(opened):
    config, prepared, params, *_ = opened
    user, item, graph_inputs = a_user(prepared), 5, prepared.graph_inputs
    user_sources = sources(graph_inputs, user)
    model = explained_model(config, params, prepared, with_reviews=False)
    found = attributions(model, SetScores(model.leave_one_out, user), item, np.random.default_rng(0))
    for number in range(0, len(user_sources), 3):
        scored = []
        for factor in (0.9, 1.1):
            changed = {}
            for relation, edge in user_sources[number].edges:
                weight = np.array((changed.get(relation) or graph_inputs.graph.adjacencies[relation]).weight)
                weight[edge] *= factor
                changed[relation] = dataclasses.replace(graph_inputs.graph.adjacencies[relation], weight=weight)
            there = dataclasses.replace(graph_inputs, graph=graph_inputs.graph.with_adjacencies(changed))
            scored.append(given(config, params, there, user)[item])
        assert found["gradient"][number] == pytest.approx((scored[1] - scored[0]) / 0.2, rel=0.02, abs=1e-5)


def test_orders_by_their_definitions(opened, monkeypatch):
    """Two-ended effects, Shapley values and integrals of gradients add up to recomputed scores."""
    config, prepared, params, *_ = opened
    user, item, graph_inputs = a_user(prepared), 5, prepared.graph_inputs
    user_sources, model = sources(graph_inputs, user), explained_model(config, params, prepared, with_reviews=False)
    without = SetScores(model.leave_one_out, user)
    everything = range(len(user_sources))

    def score(*left: int) -> float:
        gone = [source for place, source in enumerate(user_sources) if place not in left]
        return float(
            given(config, params, without_sources(config, prepared.observed, graph_inputs, user, gone), user)[item]
        )

    monkeypatch.setattr(subject, "POINTS", 24)
    found = attributions(model, without, item, np.random.default_rng(0))
    place = 2
    both = score(*everything) - score(*set(everything) - {place}) + score(place) - score()
    assert found["two_ended"][place] == pytest.approx(both / 2, rel=1e-4, abs=1e-6)
    assert found["shapley"].sum() == pytest.approx(score(*everything) - score(), rel=1e-4)
    # Gradients along the path add up to the score minus the score of edges without weight.
    weights = {r: np.array(a.weight) for r, a in graph_inputs.graph.adjacencies.items()}
    for relation, edge in (edge for source in user_sources for edge in source.edges):
        weights[relation][edge] = 0
    adjacencies = {r: dataclasses.replace(a, weight=weights[r]) for r, a in graph_inputs.graph.adjacencies.items()}
    empty = dataclasses.replace(graph_inputs, graph=graph_inputs.graph.with_adjacencies(adjacencies))
    rise = given(config, params, graph_inputs, user)[item] - given(config, params, empty, user)[item]
    assert found["integrated"].sum() == pytest.approx(rise, rel=0.01)


def test_shapley_values_are_means_over_permutations():
    """Of a game of three: each adds 1, and the first two together 6 more."""

    class Game(SetScores):
        def __init__(self):
            self.rows = np.arange(3)

        def scores(self, sets: np.ndarray, items) -> np.ndarray:
            left = [{0, 1, 2} - set(gone) for gone in sets.tolist()]
            return np.array([[len(one) + 6.0 * (one >= {0, 1})] for one in left])

    found = subject.shapley(Game(), 0, np.random.default_rng(0), permutations=4000)
    assert found == pytest.approx([4, 4, 1], abs=0.15)
    assert found.sum() == pytest.approx(9)


def test_attention_is_the_part_without_its_direction(opened):
    """After one round a message is the sender's own input: its part is attention x length x cosine."""
    config, prepared, *_ = opened
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, num_layers=1, variant="graph"))
    params = init(config, prepared.graph_inputs).params
    user, item = a_user(prepared), 5
    user_sources, model = (
        sources(prepared.graph_inputs, user),
        explained_model(config, params, prepared, with_reviews=False),
    )
    found = attributions(model, SetScores(model.leave_one_out, user), item, np.random.default_rng(0))
    [branch] = model.decomposition.branches
    for source, part, weight in zip(user_sources, found["parts"], found["attention"], strict=True):
        relation = source.edges[0][0]
        if relation in branch.weights.edge:
            said, wanted = branch.ids[0][relation.source][source.row], branch.items[item]
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
    model, user_sources = (
        explained_model(config, params, prepared, with_reviews=False),
        sources(prepared.graph_inputs, user),
    )
    found = curves(model, user, item, draw(), seed=5)
    assert found is not None
    order = attributions(model, SetScores(model.leave_one_out, user), item, numbered_rng(5, user))
    order["random"] = draw().random(len(user_sources))

    def score(gone) -> float:
        graph_inputs = without_sources(config, prepared.observed, prepared.graph_inputs, user, gone)
        return float(given(config, params, graph_inputs, user)[item])

    everything, nothing = score([]), score(user_sources)
    assert found.rise == pytest.approx(everything - nothing, rel=1e-5)
    for name, values in order.items():
        first = [user_sources[n] for n in np.argsort(-values)[: round(0.4 * len(user_sources))]]
        rest = [source for source in user_sources if source not in first]
        assert found.deletion[name][[0, -1]].tolist() == pytest.approx([1, 0])
        assert found.insertion[name][[0, -1]].tolist() == pytest.approx([0, 1])
        assert found.deletion[name][2] == pytest.approx((score(first) - nothing) / found.rise, rel=1e-4, abs=1e-5)
        assert found.insertion[name][2] == pytest.approx((score(rest) - nothing) / found.rise, rel=1e-4, abs=1e-5)
    monkeypatch.setattr(subject, "LEAST_RISE", 1e6)
    assert curves(model, user, item, draw()) is None


def test_a_summary_by_hand():
    down, up = 1 - SHARES, SHARES
    assert area(down) == pytest.approx(0.5)
    assert area(np.array([1.0, 0.0, 0.0])) == pytest.approx(0.25)
    step = np.array([1.0, *[0.0] * 5])

    def one(own: np.ndarray) -> Curves:
        return Curves(0.1, {name: own if name == "leave_one_out" else down for name in subject.ORDERS},
                      dict.fromkeys(subject.ORDERS, up))  # fmt: skip

    report = summary([one(step), one(step)])
    assert report["deletion"]["leave_one_out"]["area"] == pytest.approx(0.1)
    assert report["deletion"]["random"]["difference"] == pytest.approx({"mean": -0.4, "low": -0.4, "high": -0.4})
    assert report["insertion"]["random"]["difference"] == pytest.approx({"mean": 0, "low": 0, "high": 0})
    assert report["insertion"]["attention"]["curve"] == pytest.approx(up.tolist())
    mixed = summary([one(step), one(down)])["deletion"]["leave_one_out"]
    assert (mixed["low"], mixed["area"], mixed["high"]) == pytest.approx((0.1, 0.3, 0.5))
    with pytest.raises(ValueError, match="ask for others"):
        summary([])
