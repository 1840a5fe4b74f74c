"""The fast path computes what the plain jraph model computes, for every variant and setting that changes the model."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny

from fused_rec.config import Config, ModelConfig
from fused_rec.graph.device_graph import device_graph
from fused_rec.graph.hetero import HostGraph
from fused_rec.model import reference
from fused_rec.model.model import FusedModel, concat_branches, item_degree
from fused_rec.studies import variants

BASE = ModelConfig(dim=3, num_layers=2)
COMBINATIONS = [("learned", True), ("learned", False), ("mean", False), ("mean_without_input", False)]


def trained(config: ModelConfig, graph: HostGraph) -> dict:
    """Parameters as after some training: none is exactly 0 or 1."""
    params = FusedModel(config).init(jax.random.key(0), device_graph(graph))["params"]
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(0)
    return jax.tree.unflatten(tree, [leaf + rng.normal(size=leaf.shape).astype(np.float32) / 3 for leaf in leaves])


def assert_equal(config: ModelConfig, graph: HostGraph) -> None:
    params, whole = trained(config, graph), device_graph(graph)
    branches = FusedModel(config).apply({"params": params}, whole)
    fast = concat_branches(branches, item_degree(whole))  # pyright: ignore[reportArgumentType]
    assert np.abs(np.asarray(fast[0])).max() > 0.1
    for ours, plain in zip(fast, reference.embeddings(config, params, graph), strict=True):
        np.testing.assert_allclose(ours, plain, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("combination", "gates"), COMBINATIONS)
@pytest.mark.parametrize("variant", ["fused", "graph", "text"])
def test_the_fast_path_equals_the_jraph_model(variant, combination, gates):
    for score in ("cosine", "dot"):
        change = {"variant": variant, "layer_combination": combination, "relation_gates": gates, "score": score}
        assert_equal(dataclasses.replace(BASE, **change), tiny.graph())


@pytest.mark.parametrize("projection", ["linear", "mlp"])
@pytest.mark.parametrize("propagation", ["to_users", "both_ways"])
@pytest.mark.parametrize("variant", ["fused", "text"])
def test_every_projection_and_propagation_of_text(variant, propagation, projection):
    change = {"variant": variant, "text_projection": projection, "text_propagation": propagation}
    assert_equal(dataclasses.replace(BASE, **change), tiny.graph())


@pytest.mark.parametrize("name", ["alpharec", "rlmrec_con", "rlmrec_gen"])
def test_published_models_with_text(name):
    config = variants.variant(Config(), name).model
    assert_equal(dataclasses.replace(config, dim=3), tiny.graph())


@pytest.mark.parametrize("num_layers", [0, 1, 3])
def test_any_number_of_layers(num_layers):
    assert_equal(dataclasses.replace(BASE, num_layers=num_layers), tiny.graph())


@pytest.mark.parametrize("variant", ["fused", "graph"])
def test_users_without_embeddings_or_text_of_their_own(variant):
    change = {"variant": variant, "user_id_embedding": False, "user_text_input": False}
    assert_equal(dataclasses.replace(BASE, **change), tiny.graph())
