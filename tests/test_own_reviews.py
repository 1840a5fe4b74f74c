"""Text features without reviews are those of tables without them, with the transforms that were fitted before."""

import dataclasses

import jax
import numpy as np
import pyarrow as pa
import pytest
from test_faithfulness import opened  # noqa: F401

from fused_rec.config import Config, ModelConfig, TextConfig
from fused_rec.data.controls import shuffle_texts
from fused_rec.data.node_texts import node_texts
from fused_rec.explanation.counterfactual import without_sources
from fused_rec.explanation.decomposition import INTERACTION, REVIEW
from fused_rec.explanation.leave_one_out import effects, leave_one_out
from fused_rec.explanation.own_reviews import own_reviews
from fused_rec.explanation.removed_texts import RemovedTexts
from fused_rec.explanation.sources import sources, sources_by_relation
from fused_rec.graph.schema import ITEM, USER
from fused_rec.model.late_fusion import ClosedForm, LateFusion
from fused_rec.text.features import apply_features
from fused_rec.training.inputs import ModelInputs
from fused_rec.training.train_step import embed_nodes, init


def anew(config: Config, inputs: ModelInputs, gone: np.ndarray) -> dict[str, np.ndarray]:
    """Features of all nodes without some reviews."""
    observed = dataclasses.replace(inputs.observed, reviews=inputs.observed.reviews.filter(pa.array(~gone)))
    texts = node_texts(inputs.dataset, observed)
    found = apply_features(config.text, texts, inputs.text.fitted, 0)
    return {side: nodes.rows for side, nodes in found.node_rows().items()}


def of_pair(inputs: ModelInputs, user: int, items: list[int]) -> np.ndarray:
    reviews = inputs.observed.reviews
    of = {name: reviews.column(name).to_numpy() for name in (USER, ITEM)}
    return (of[USER] == user) & np.isin(of[ITEM], items)


@pytest.mark.parametrize("described", [(), (USER,), (ITEM,), (USER, ITEM)])
def test_features_are_those_of_tables_without_the_reviews(opened, described):  # noqa: F811
    config, prepared, *_ = opened
    tables = {side: getattr(prepared.dataset, side + "s") for side in (USER, ITEM)}
    for side, table in tables.items():
        table = table.drop_columns([name for name in ("text",) if name in table.column_names])
        if side in described:
            table = table.append_column("text", pa.array([f" {side} number {n} " for n in range(len(table))]))
        tables[side] = table
    dataset = dataclasses.replace(prepared.dataset, users=tables[USER], items=tables[ITEM])
    texts = node_texts(dataset, prepared.observed)
    features = apply_features(config.text, texts, prepared.text.fitted, 0)
    inputs = dataclasses.replace(prepared, dataset=dataset, text=features)
    reviews = own_reviews(config, inputs)
    assert reviews is not None
    before = {side: nodes.rows for side, nodes in features.node_rows().items()}
    for user in np.unique(reviews.reviews.user)[:3].tolist():
        items = reviews.of_user(user).items.tolist()
        for some in (items[:1], items):
            found = reviews.edited(before, user, some)
            expected = anew(config, inputs, of_pair(inputs, user, some))
            for side in (USER, ITEM):
                np.testing.assert_allclose(found[side], expected[side], atol=1e-5)
            assert np.abs(found[USER][user] - before[USER][user]).max() > 1e-2


def test_where_reviews_cannot_be_removed(opened):  # noqa: F811
    config, prepared, *_ = opened
    both_ways = ModelConfig(variant="text", text_propagation="both_ways")
    assert own_reviews(config, prepared) is not None
    assert own_reviews(dataclasses.replace(config, model=both_ways), prepared) is None
    trained = dataclasses.replace(config, text=TextConfig(finetune="lora"))
    assert own_reviews(trained, prepared) is None
    control = dataclasses.replace(prepared.text, texts=shuffle_texts(prepared.text.texts, 0))
    assert own_reviews(config, dataclasses.replace(prepared, text=control)) is None
    unwritten = dataclasses.replace(prepared.observed, reviews=prepared.observed.reviews.slice(0, 0))
    without = dataclasses.replace(prepared.text, texts=node_texts(prepared.dataset, unwritten))
    assert own_reviews(config, dataclasses.replace(prepared, text=without)) is None


def test_where_no_text_is_read(opened):  # noqa: F811
    """Sources that nothing reads would only multiply the sets that are tested."""
    config, prepared, *_ = opened
    config = dataclasses.replace(config, model=ModelConfig(variant="graph"))
    assert own_reviews(config, prepared) is None
    nothing, rows = np.zeros((24, 0), np.float32), np.zeros((24, prepared.text.lm.shape[1]), np.float32)
    by_text = LateFusion({}, (ClosedForm(np.array(1, np.float32), nothing, rows, "user_text", "text"),))
    graph_inputs = dataclasses.replace(prepared.graph_inputs, fusion=by_text)
    assert own_reviews(config, dataclasses.replace(prepared, graph_inputs=graph_inputs)) is not None


def test_reviews_of_products_that_a_user_does_not_hold(opened):  # noqa: F811
    """Text of user and item all the same; later interactions (`Run.update`) leave it so."""
    config, prepared, params, *_ = opened
    observed, user = prepared.observed, 3
    item = min(set(range(prepared.dataset.n_items)) - set(observed.item[observed.user == user].tolist()))
    row = {USER: user, ITEM: item, "text": "dear, and nobody answers", "timestamp": 0}
    columns = {name: [row[name]] for name in observed.reviews.column_names}
    written = pa.concat_tables([observed.reviews, pa.table(columns, observed.reviews.schema)])
    observed = dataclasses.replace(observed, reviews=written)
    features = apply_features(config.text, node_texts(prepared.dataset, observed), prepared.text.fitted, 0)
    inputs = dataclasses.replace(prepared, observed=observed, text=features)
    reviews = own_reviews(config, inputs)
    assert reviews is not None and item in reviews.of_user(user).items
    before = {side: nodes.rows for side, nodes in features.node_rows().items()}
    found, expected = reviews.edited(before, user, [item]), anew(config, inputs, of_pair(inputs, user, [item]))
    for side in (USER, ITEM):
        np.testing.assert_allclose(found[side], expected[side], atol=1e-5)

    graph = prepared.graph_inputs.graph.with_text(prepared.graph_inputs.graph.text | before)
    graph_inputs = dataclasses.replace(prepared.graph_inputs, graph=graph)
    model = leave_one_out(config, params, observed, graph_inputs, reviews)
    named = sources(graph, model.reverse, user, reviews)
    place = [(source.kind, source.row) for source in named].index((REVIEW, item))
    left = without_sources(config, observed, graph_inputs, user, [named[place]], reviews)
    users, items = jax.jit(embed_nodes, static_argnums=0)(config, params, left)
    of = effects(model, user, range(prepared.dataset.n_items))
    np.testing.assert_allclose(of.score - of.value[place], np.asarray(users[user] @ items.T), atol=1e-5)
    assert np.abs(of.value[place]).max() > 1e-3


def test_sets_without_a_review_keep_the_text(opened):  # noqa: F811
    """To the last bit: what a score does not read has no effect."""
    config, prepared, params, *_ = opened
    config = dataclasses.replace(config, model=ModelConfig(variant="text", dim=6))
    params = init(config, prepared.graph_inputs).params
    reviews, graph = own_reviews(config, prepared), prepared.graph_inputs.graph
    assert reviews is not None
    model = leave_one_out(config, params, prepared.observed, prepared.graph_inputs, reviews)
    for user in np.unique(reviews.reviews.user).tolist():
        own = np.asarray(graph.text[USER])[user]
        kinds = [source.kind for source in sources(graph, model.reverse, user, reviews)]
        removed = RemovedTexts(reviews, user, own, sources_by_relation(graph, model.reverse, user, reviews))
        texts = removed.of_sets(np.array([[0, number + 1] for number in range(len(kinds))]))
        assert texts is not None
        assert (texts.user == own).all(1).tolist() == [kind != REVIEW for kind in kinds]
    found = effects(model, 3, range(prepared.dataset.n_items))
    is_read = np.isin(found.kind, [INTERACTION, REVIEW])
    assert not is_read.all() and not found.value[~is_read].any() and found.value[is_read].any(1).all()
