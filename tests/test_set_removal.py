"""Scores without sets of sources equal those of the graph without them."""

import dataclasses

import jax
import numpy as np
import pytest
from test_faithfulness import opened  # noqa: F401
from test_leave_one_out import CONFIGS, OBSERVED, TOLERANCE, compiled, disturbed, market, subject

from fused_rec.explanation import set_removal
from fused_rec.explanation.counterfactual import without_sources
from fused_rec.explanation.leave_one_out import SetScores, leave_one_out
from fused_rec.explanation.own_reviews import own_reviews
from fused_rec.explanation.sources import sources
from fused_rec.graph.schema import USER
from fused_rec.model.late_fusion import ClosedForm, LateFusion
from fused_rec.training.train_step import GraphInputs


def drawn_sets(count: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Some sets of each of a few sizes, and all sources."""
    sizes = sorted({size for size in (1, 2, 3, count - 1, count) if 0 < size <= count})
    return [np.stack([np.sort(rng.permutation(count)[:size]) for _ in range(3)]) for size in sizes]


def largest_error(config, params, model, graph_inputs, users) -> float:
    """The largest difference from recomputation, as a share of the largest score."""
    before = np.asarray(
        np.matmul(*(x if n == 0 else x.T for n, x in enumerate(compiled()(config, params, graph_inputs))))
    )
    worst = 0.0
    for user in users:
        named, given = sources(graph_inputs.graph, model.reverse, user, model.reviews), SetScores(model, user)
        for sets in drawn_sets(len(named), np.random.default_rng(user)):
            found = given.scores(sets, np.arange(before.shape[1]))
            for gone, scores in zip(sets, found, strict=True):
                removed = [named[n] for n in gone]
                left = without_sources(config, model.observed, graph_inputs, user, removed, model.reviews)
                vectors = compiled()(config, params, left)
                after = np.asarray(vectors[0][user] @ vectors[1].T)
                worst = max(worst, float(np.abs(after - scores).max() / np.abs(before).max()))
    return worst


@pytest.mark.parametrize("name", CONFIGS)
def test_scores_without_sets_are_those_of_recomputation(name):
    assert largest_error(*subject(name), (0, 3, 6)) < TOLERANCE


def test_sets_in_a_market_with_attributes(opened, monkeypatch):  # noqa: F811
    config, prepared, params, *_ = opened
    reviews = own_reviews(config, prepared)
    model = leave_one_out(config, params, prepared.observed, prepared.graph_inputs, reviews)
    monkeypatch.setattr(set_removal, "CHUNK", 1000)  # columns and sets a few at a time
    monkeypatch.setattr("fused_rec.explanation.leave_one_out.SET_CHUNK", 1000)
    assert largest_error(config, params, model, prepared.graph_inputs, (0, 3)) < TOLERANCE


def test_reviews_are_text_of_components_too(opened):  # noqa: F811
    config, prepared, params, *_ = opened
    rows = np.random.default_rng(0).normal(size=(24, prepared.graph_inputs.graph.text[USER].shape[1]))
    nothing = np.zeros((24, 0), np.float32)
    by_text = ClosedForm(np.array(0.5, np.float32), nothing, rows.astype(np.float32), "user_text", "text")
    trained = {name: np.array(weight, np.float32) for name, weight in (("model", 1.0), ("text_branch", 0.5))}
    graph_inputs = dataclasses.replace(prepared.graph_inputs, fusion=LateFusion(trained, (by_text,)))
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, late_fusion=True))
    model = leave_one_out(config, params, prepared.observed, graph_inputs, own_reviews(config, prepared))
    assert largest_error(config, params, model, graph_inputs, (3,)) < TOLERANCE


def test_without_no_source_the_score_is_whole():
    config, graph_inputs = CONFIGS["fused"], GraphInputs(market(), np.arange(6) < 5, np.ones(6, np.float32))
    model = leave_one_out(config, disturbed(config, graph_inputs), OBSERVED, graph_inputs)
    users, items = jax.device_get(compiled()(config, model.params, graph_inputs))
    found = SetScores(model, 0).scores(np.zeros((2, 0), np.int64), [1, 4])
    np.testing.assert_allclose(found, np.tile(users[0] @ items[[1, 4]].T, (2, 1)), rtol=1e-5)
