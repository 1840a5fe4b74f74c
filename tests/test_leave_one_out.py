"""Effects of all sources at once equal those of one recomputation a source."""

import dataclasses
import functools
import os
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import test_decomposition
import tiny
from test_faithfulness import CONFIG, opened  # noqa: F401

from fused_rec.baselines.neighbors import item_counts
from fused_rec.config import Config, ModelConfig
from fused_rec.data.dataset import empty_reviews, empty_ties
from fused_rec.data.splits import Observed
from fused_rec.explanation.counterfactual import without_sources
from fused_rec.explanation.decomposition import REVIEW
from fused_rec.explanation.explained_model import ExplainedModel, contributions_and_effects, explained_model
from fused_rec.explanation.faithfulness import by_gradient
from fused_rec.explanation.leave_one_out import LeaveOneOut, SetScores, closed_slopes, effects, leave_one_out
from fused_rec.explanation.own_reviews import OwnReviews, own_reviews
from fused_rec.explanation.sources import sources
from fused_rec.graph.build import bidirectional_edges, text_knn_edges
from fused_rec.graph.device_graph import DeviceGraph, device_graph
from fused_rec.graph.hetero import hetero_graph
from fused_rec.graph.schema import USER, Relation
from fused_rec.training.inputs import prepare, read
from fused_rec.training.train_step import GraphInputs, embed_nodes, init

OBSERVED = Observed(
    user=tiny.HOLDER, item=tiny.HELD, age=np.arange(12, dtype=np.float32), reviews=empty_reviews(), ties=empty_ties()
)
CONFIGS = {
    name: test_decomposition.CONFIGS[name] for name in ("fused", "lightgcn", "text", "alpharec", "dot", "late_fusion")
}
DECAY = ModelConfig(dim=3, num_layers=3, id_init_std=1.0, popularity_half_life=3.0, late_fusion=True)
CONFIGS["decay"] = dataclasses.replace(CONFIGS["fused"], model=DECAY)
TOLERANCE = 2e-6  # of the largest score; a recomputation in float32 has an error of 1e-7 a sum


@functools.cache
def market() -> DeviceGraph:
    """`tiny.whole` with normalized ties: one-way ones with their reverse, mutual ones, and users of similar text."""
    ties = np.array([1, 2, 0, 5]), np.array([0, 0, 4, 6])  # the only edge of user 6
    friends = np.array([0, 1, 1, 3, 0, 4]), np.array([1, 0, 3, 1, 4, 0])
    one_way = bidirectional_edges(tiny.TRUSTS, Relation(USER, "trusts_of", USER), *ties, tiny.COUNTS)
    friend = Relation(USER, "friend", USER)
    mutual = bidirectional_edges(friend, Relation(USER, "back", USER), *friends, tiny.COUNTS)[friend]
    similar = {Relation(USER, "similar_text", USER): text_knn_edges(tiny.words()[:7], 3)}
    return device_graph(
        hetero_graph(tiny.COUNTS, tiny.relations(tiny.words()) | one_way | {friend: mutual} | similar, tiny.words())
    )


def disturbed(config: Config, graph_inputs: GraphInputs):
    """Parameters as after some training."""
    leaves, tree = jax.tree.flatten(init(config, graph_inputs).params)
    rng = np.random.default_rng(0)
    return jax.tree.unflatten(tree, [x + rng.normal(size=x.shape).astype(np.float32) / 3 for x in leaves])


@functools.cache
def compiled():
    return jax.jit(embed_nodes, static_argnums=0)


def recomputed(config: Config, params, observed, graph_inputs, user: int, source, reviews) -> np.ndarray:
    """Scores of all items without a source."""
    left = without_sources(config, observed, graph_inputs, user, [source], reviews)
    users, items = compiled()(config, params, left)
    return np.asarray(users[user] @ items.T)


def largest_error(config: Config, params, model: LeaveOneOut, graph_inputs: GraphInputs, users, most: int) -> float:
    """The largest difference from recomputation for up to `most` sources a user, as a share of the largest score."""
    given_users, given_items = compiled()(config, params, graph_inputs)
    every, worst = np.asarray(given_users @ given_items.T), 0.0
    for user in users:
        found = effects(model, user, range(every.shape[1]))
        named = sources(graph_inputs.graph, model.reverse, user, model.reviews)
        assert list(zip(found.kind, found.source.tolist(), strict=True)) == [(s.kind, s.row) for s in named]
        for place in np.random.default_rng(user).permutation(len(named))[:most].tolist():
            after = recomputed(config, params, model.observed, graph_inputs, user, named[place], model.reviews)
            worst = max(worst, float(np.abs(every[user] - after - found.value[place]).max() / np.abs(every).max()))
    return worst


def subject(name: str):
    """The config of this name, parameters, `leave_one_out` of them, and graph inputs."""
    config = CONFIGS[name]
    fusion = tiny.late_fusion() if config.model.late_fusion else None
    popularity = test_decomposition.graph_inputs().popularity
    if config.model.popularity_half_life:
        popularity = item_counts(tiny.HELD, OBSERVED.age, config.model.popularity_half_life, 6)
    graph_inputs = GraphInputs(market(), np.arange(6) < 5, popularity, fusion)
    params = disturbed(config, graph_inputs)
    model = leave_one_out(config, params, OBSERVED, graph_inputs)
    return config, params, model, graph_inputs


@pytest.mark.parametrize("name", CONFIGS)
def test_effects_are_those_of_recomputation(name):
    assert largest_error(*subject(name), range(7), 20) < TOLERANCE


def test_effects_in_a_market_with_attributes(opened):  # noqa: F811
    config, prepared, params, *_ = opened
    reviews = own_reviews(config, prepared)
    model = leave_one_out(config, params, prepared.observed, prepared.graph_inputs, reviews)
    assert largest_error(config, params, model, prepared.graph_inputs, (0, 3, 11), 9) < TOLERANCE
    found = effects(model, 3, [4, 7])
    is_review = np.array(found.kind) == REVIEW
    assert is_review.any() and np.abs(found.value[is_review]).min() > 1e-4


def test_a_few_at_a_time_as_all_at_once(monkeypatch):
    config, graph_inputs = CONFIGS["fused"], GraphInputs(market(), np.arange(6) < 5, np.ones(6, np.float32))
    model = leave_one_out(config, disturbed(config, graph_inputs), OBSERVED, graph_inputs)
    whole = effects(model, 0, [5, 3])
    monkeypatch.setattr("fused_rec.explanation.leave_one_out.CHUNK", 1)
    np.testing.assert_allclose(effects(model, 0, [5, 3]).value, whole.value, atol=1e-6)


def test_a_source_that_no_part_reads_has_no_effect():
    config, graph_inputs = CONFIGS["lightgcn"], GraphInputs(market(), np.arange(6) < 5, np.ones(6, np.float32))
    found = effects(leave_one_out(config, disturbed(config, graph_inputs), OBSERVED, graph_inputs), 0, [1, 5])
    is_read = np.array([kind != "similar_text" for kind in found.kind])
    assert np.abs(found.value[is_read]).max() > 0.01
    assert not is_read.all() and not found.value[~is_read].any()


@functools.cache
def score_gradient(name: str):
    """The derivative of one score by the weights of all edges, compiled once for all users and items of a subject."""
    config, params, _, graph_inputs = subject(name)
    params, graph = jax.device_put(params), graph_inputs.graph

    def score(weights, user, item):
        changed = {r: adjacency.with_weight(weights[r]) for r, adjacency in graph.adjacencies.items()}
        given = dataclasses.replace(graph_inputs, graph=graph.with_adjacencies(changed))
        users, items = embed_nodes(config, params, given)
        return users[user] @ items[item]

    return jax.jit(jax.grad(score))


@pytest.mark.parametrize("factor", [0.4, 1.0])
@pytest.mark.parametrize("name", ["fused", "dot", "late_fusion", "decay"])
def test_gradients_are_those_of_the_whole_score(name, factor):
    """By a factor on the edges of each source, closed-form components included, where all sources have one factor."""
    config, params, model, graph_inputs = subject(name)
    params = jax.device_put(params)
    explained = ExplainedModel(config, params, SimpleNamespace(graph_inputs=graph_inputs), None, model)  # pyright: ignore
    graph, compared = graph_inputs.graph, 0
    own = {relation: np.array(adjacency.weight) for relation, adjacency in graph.adjacencies.items()}
    for user in range(7):
        named, weights = sources(graph, model.reverse, user), {relation: w.copy() for relation, w in own.items()}
        for source in named:
            for relation, edge in source.edges:
                weights[relation][edge] = factor * own[relation][edge]

        item = (2, 4)[user % 2]  # the second is new: the launch prior has a score of it
        slope = score_gradient(name)(weights, user, item)
        expected = [sum(float(slope[r][e]) * float(own[r][e]) for r, e in source.edges) for source in named]
        found = by_gradient(explained, user, item, named, factor)
        found += closed_slopes(SetScores(model, user), item) / factor
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=2e-5)
        compared += len(named)
    assert compared > 30


def test_effects_beside_contributions(opened, monkeypatch):  # noqa: F811
    config, prepared, params, *_ = opened
    model = explained_model(config, params, prepared)
    found = effects(model.leave_one_out, 3, [4, 7])
    monkeypatch.delattr(OwnReviews, "of_user")  # effects of reviews have no contribution beside them: not computed
    contributed, effect = contributions_and_effects(model, 3, [4, 7])
    assert np.isnan(effect[contributed.source < 0]).all()
    for kind, source, value in zip(found.kind, found.source, found.value, strict=True):
        if kind == REVIEW:  # part of the texts of the user and of the item
            continue
        at = np.array([own == kind for own in contributed.kind]) & (contributed.source == source)
        assert effect[at].tolist() == [value.tolist()]


@pytest.mark.skipif("FUSED_REC_DATA" not in os.environ, reason="FUSED_REC_DATA names no folder of real data")
def test_effects_on_amazon(tmp_path):
    config = dataclasses.replace(
        CONFIG,
        data=dataclasses.replace(CONFIG.data, name="amazon"),
        text=dataclasses.replace(CONFIG.text, cache=str(tmp_path)),
        graph=dataclasses.replace(CONFIG.graph, attributes=()),
    )
    prepared = prepare(config, *read(config))
    params = disturbed(config, prepared.graph_inputs)
    reviews = own_reviews(config, prepared)
    model = leave_one_out(config, params, prepared.observed, prepared.graph_inputs, reviews)
    assert largest_error(config, params, model, prepared.graph_inputs, (0, 100, 1000), 6) < TOLERANCE
