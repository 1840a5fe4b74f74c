"""Text features without reviews are those of tables without them, with the transforms that were fitted before."""

import dataclasses

import numpy as np
import pyarrow as pa
import pytest
from test_faithfulness import opened  # noqa: F401

from fused_rec.config import Config, ModelConfig, TextConfig
from fused_rec.data.dataset import Dataset
from fused_rec.data.node_texts import node_texts
from fused_rec.explanation.own_reviews import own_reviews
from fused_rec.graph.schema import ITEM, USER
from fused_rec.text.features import apply_features
from fused_rec.training.inputs import ModelInputs


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
    without = dataclasses.replace(prepared.text, texts=dataclasses.replace(prepared.text.texts, reviews=None))
    assert own_reviews(config, dataclasses.replace(prepared, text=without)) is None
    assert isinstance(prepared.dataset, Dataset)
