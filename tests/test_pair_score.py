"""A pair's score with other texts equals that of the whole graph with these texts, and so does its derivative."""

import jax
import numpy as np
import pytest
import test_decomposition
import tiny
from test_leave_one_out import CONFIGS, disturbed, market

from fused_rec.explanation import token_attribution
from fused_rec.explanation.pair_score import PairScorer
from fused_rec.graph.schema import ITEM, USER
from fused_rec.training.train_step import GraphInputs, embed_nodes

LOCAL = [name for name, config in CONFIGS.items() if config.model.local_text]


def test_where_users_start_as_their_items_texts_are_not_local():
    assert set(CONFIGS) - set(LOCAL) == {"alpharec"}


@pytest.mark.parametrize("name", LOCAL)
def test_scores_with_other_texts_are_those_of_the_graph(name):
    config = CONFIGS[name]
    fusion = tiny.late_fusion() if config.model.late_fusion else None
    graph_inputs = GraphInputs(market(), np.arange(6) < 5, test_decomposition.graph_inputs().popularity, fusion)
    params = disturbed(config, graph_inputs)
    scorer = PairScorer(config, params, graph_inputs)
    users, items = jax.jit(embed_nodes, static_argnums=0)(config, params, graph_inputs)
    rng = np.random.default_rng(0)
    for user, item in ((0, 0), (3, 1), (4, 4), (6, 2)):
        own = np.stack([np.asarray(graph_inputs.graph.text[side])[row] for side, row in ((USER, user), (ITEM, item))])
        drawn = rng.normal(size=(2, *own.shape))
        text = np.stack([own, *(drawn / np.linalg.norm(drawn, axis=2, keepdims=True))]).astype(np.float32)
        text[1, 1] = own[1]  # one text alone is another
        given = float(users[user] @ items[item])
        scores, slopes = scorer.scores_and_slopes(scorer.pair(user, item, given), text)
        rows = np.array([user, item], np.int32)
        expected = [token_attribution._score(config, params, graph_inputs, rows, one) for one in text]
        scale = max(abs(float(value)) for value, _ in expected)
        np.testing.assert_allclose(scores, [value for value, _ in expected], atol=3e-5 * scale)
        for found, (_, reference) in zip(slopes, expected, strict=True):
            np.testing.assert_allclose(found, reference, atol=1e-4 * max(1, np.abs(reference).max()))
