"""The published baselines among the variants, against their definitions worked out densely in NumPy."""

import dataclasses
import typing
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from fused_rec.baselines.registry import BASELINES
from fused_rec.config import Baseline, Config, ModelConfig, TrainConfig, TrainedMethod, Variant
from fused_rec.data.batches import Batch, batch, user_items
from fused_rec.graph.device_graph import device_graph
from fused_rec.graph.hetero import hetero_graph
from fused_rec.graph.schema import INTERACTED_BY, INTERACTS, ITEM, USER
from fused_rec.model.model import FIRST_LAYER, RECONSTRUCTED, FusedModel, item_degree
from fused_rec.studies.variants import VARIANTS, variant
from fused_rec.training import train_step as step_module
from fused_rec.training.evaluate import sharded_scorer
from fused_rec.training.sharding import gather_state, parallel_train_step, shard_graph_inputs, shard_state
from fused_rec.training.train_step import GraphInputs, embed_nodes, init

OWN = typing.get_args(Variant)  # variants of this package's model
PRESENT = np.array([True] * 5 + [False])  # item 5 is held by nobody
HELD = user_items(tiny.HOLDER, tiny.HELD, tiny.COUNTS[USER], PRESENT)
USERS, ITEMS = tiny.COUNTS[USER], tiny.COUNTS[ITEM]


def config_of(name: str, **train) -> Config:
    """A variant of a config whose own settings are all others, small and with long rows."""
    others = Config(
        model=ModelConfig(popularity_weight=0.7, user_id_embedding=False, edge_dropout=0.3, id_embedding_dropout=0.3),
        train=TrainConfig(batch_size=5, positives_per_user=2),
    )
    config = variant(others, name)
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, dim=3, id_init_std=1.0),
        train=dataclasses.replace(config.train, **train),
    )


def task_of(name: str) -> GraphInputs:
    """The tiny market as the variant's graph settings leave it."""
    received = {INTERACTS, INTERACTED_BY} | ({tiny.TRUSTS} if name == "social_lightgcn" else set())
    relations = {relation: edges for relation, edges in tiny.relations(tiny.words()).items() if relation in received}
    graph = hetero_graph({USER: USERS, ITEM: ITEMS}, relations, tiny.words()[:13])
    return GraphInputs(device_graph(graph), jnp.asarray(PRESENT), item_degree(device_graph(graph)))


def rows_of(params) -> np.ndarray:
    """Id rows of users, then of items; those of user 6, who has no neighbors, and of items nobody holds are zero."""
    users = params["main"]["id_user"] * (np.arange(USERS) < 6)[:, None]
    return np.concatenate([users, params["main"]["id_item"] * PRESENT[:, None]])


def matrix(ties: bool = False) -> np.ndarray:
    """D^-1/2 A D^-1/2 of the interactions, and the social edges, receivers by senders."""
    held = np.zeros((USERS, ITEMS))
    held[tiny.HOLDER, tiny.HELD] = 1
    degree = np.maximum(held.sum(1, keepdims=True), 1) * np.maximum(held.sum(0, keepdims=True), 1)
    received = np.zeros((USERS, USERS))
    if ties:  # as drawn in tiny.relations: 1 -> 0 and 2 -> 0 at a half, 0 -> 4 at one
        received[[0, 0, 4], [1, 2, 0]] = 0.5, 0.5, 1
    return np.block([[received, held / np.sqrt(degree)], [(held / np.sqrt(degree)).T, np.zeros((ITEMS, ITEMS))]])


def rounds_of(params, ties: bool = False) -> list[np.ndarray]:
    return [np.linalg.matrix_power(matrix(ties), level) @ rows_of(params) for level in range(4)]


# --- scores --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bpr_mf", "lightgcn", "social_lightgcn", "xsimgcl"])
def test_scores_are_those_of_the_publication(name):
    config, graph_inputs = config_of(name), task_of(name)
    params = init(config, graph_inputs).params
    assert set(params["main"]) == {"id_user", "id_item"}  # nothing else is learned
    h = rounds_of(params, ties=name == "social_lightgcn")
    expected = {
        "bpr_mf": h[0],
        "lightgcn": sum(h) / 4,
        "social_lightgcn": sum(h) / 4,
        "xsimgcl": sum(h[1:]) / 3,  # inputs are no part of it, and noise only of training
    }[name]
    users, items = embed_nodes(config, params, graph_inputs)
    np.testing.assert_allclose(users @ items.T, expected[:USERS] @ expected[USERS:].T, rtol=1e-5, atol=1e-5)


def test_alpharec_is_that_of_the_publication():
    """MLP of item text and of each user's mean item text, propagated twice, mean of all layers, cosines."""
    config, graph_inputs = config_of("alpharec"), task_of("alpharec")
    params = moved(init(config, graph_inputs).params)
    assert set(params["main"]) == {"text_item"}  # no IDs, no gates, one MLP for users and items
    inputs = item_and_mean_text()
    hidden, output = (params["main"]["text_item"][name] for name in ("hidden", "output"))
    assert hidden["kernel"].shape == (tiny.WIDTH, tiny.WIDTH // 2) and output["kernel"].shape == (tiny.WIDTH // 2, 3)
    h = inputs @ hidden["kernel"] + hidden["bias"]
    h = np.where(h > 0, h, 0.01 * h) @ output["kernel"] + output["bias"]
    h *= inputs.any(1, keepdims=True)  # user 6 and item 5, of which nothing is known, stay zero
    out = h + matrix() @ h + matrix() @ matrix() @ h
    out /= np.maximum(np.linalg.norm(out, axis=1, keepdims=True), 1e-6)
    users, items = embed_nodes(config, params, graph_inputs)
    np.testing.assert_allclose(users @ items.T, out[:USERS] @ out[USERS:].T, rtol=1e-5, atol=1e-5)
    assert np.abs(users[6]).max() == np.abs(items[5]).max() == 0


def test_rlmrec_scores_as_lightgcn_does():
    config, graph_inputs = config_of("rlmrec_con"), task_of("rlmrec_con")
    params = init(config, graph_inputs).params
    assert set(params["main"]) == {"id_user", "id_item", "alignment"}
    h = np.mean(rounds_of(params), axis=0)
    users, items = embed_nodes(config, params, graph_inputs)
    np.testing.assert_allclose(users @ items.T, h[:USERS] @ h[USERS:].T, rtol=1e-5, atol=1e-5)


def test_the_alignment_by_hand():
    """Cosines of final embeddings and projected text over each user and item of the batch, at temperature .2."""
    config = config_of("rlmrec_con")
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, edge_dropout=0.0, text_alignment=0.5))
    params = init(config, task_of("rlmrec_con")).params
    h = np.mean(rounds_of(params), axis=0)
    layers = params["main"]["alignment"]
    text = item_and_mean_text() @ layers["hidden"]["kernel"] + layers["hidden"]["bias"]
    text = np.where(text > 0, text, 0.01 * text) @ layers["output"]["kernel"] + layers["output"]["bias"]
    users, items = batch_of(0).users, batch_of(0).items[:, 0]
    sets = np.unique(users), np.unique(USERS + items)
    alignment = sum(cosine_contrast(h, text, nodes, 0.2) for nodes in sets)
    for devices in (1, 2):
        [found] = steps(config, devices, 1, "rlmrec_con")[0]
        parts = found["loss/alignment_user"] + found["loss/alignment_item"]
        assert parts == pytest.approx(0.5 * alignment, rel=1e-5)
        assert found["loss/graph_branch"] + parts == pytest.approx(found["loss"], rel=1e-6)


def test_nodes_without_text_are_not_aligned():
    """Without any text there is nothing to align with, and the loss is that of LightGCN."""
    config, graph_inputs = config_of("rlmrec_con"), task_of("rlmrec_con")
    blank = {ITEM: np.zeros_like(graph_inputs.graph.text[ITEM])}
    graph_inputs = dataclasses.replace(graph_inputs, graph=graph_inputs.graph.with_text(blank))
    whole = init(config, graph_inputs)
    _, found = parallel_train_step(config, 1)(shard_state(whole, 1), shard_graph_inputs(graph_inputs, 1), batch_of(0))
    assert found["loss/alignment_user"] == found["loss/alignment_item"] == 0
    assert found["loss"] == found["loss/graph_branch"]


def test_rlmrec_gen_scores_as_lightgcn_with_two_layers_does():
    config, graph_inputs = config_of("rlmrec_gen"), task_of("rlmrec_gen")
    params = moved(init(config, graph_inputs).params)
    assert set(params["main"]) == {"id_user", "id_item", "mask_row", "reconstruction"}
    h = np.mean(rounds_of(params)[:3], axis=0)
    users, items = embed_nodes(config, params, graph_inputs)
    np.testing.assert_allclose(users @ items.T, h[:USERS] @ h[USERS:].T, rtol=1e-5, atol=1e-5)


def reconstructing(**changes) -> Config:
    config = config_of("rlmrec_gen")
    model = {"edge_dropout": 0.0, "id_embedding_dropout": 0.5, "text_reconstruction": 0.7} | changes
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **model))


def test_the_reconstruction_by_hand():
    """Text predicted from masked nodes of the batch, users and items in one softmax, at temperature .5."""
    config, graph_inputs = reconstructing(), task_of("rlmrec_gen")
    whole = init(config, graph_inputs)
    whole = dataclasses.replace(whole, params=moved(whole.params))
    main = whole.params["main"]
    key = jax.random.fold_in(jax.random.key(config.train.seed + 1), 0)
    sown: Any
    _, sown = FusedModel(config.model).apply(
        {"params": whole.params}, graph_inputs.graph, key, mutable=["intermediates"]
    )
    [both] = sown["intermediates"]["main"][RECONSTRUCTED]
    masked = np.concatenate([part.masked for part in both])
    assert 3 < masked.sum() < len(masked) - 3
    known = (rows_of(whole.params) != 0).any(1)
    rows = np.where(masked[:, None], main["mask_row"], rows_of(whole.params)) * known[:, None]
    h = (rows + matrix() @ rows + matrix() @ matrix() @ rows) / 3
    hidden, output = main["reconstruction"]["hidden"], main["reconstruction"]["output"]
    assert hidden["kernel"].shape == (3, (3 + tiny.WIDTH) // 2) and output["kernel"].shape[1] == tiny.WIDTH
    predicted = h @ hidden["kernel"] + hidden["bias"]
    predicted = np.where(predicted > 0, predicted, 0.01 * predicted) @ output["kernel"] + output["bias"]
    np.testing.assert_allclose(np.concatenate([part.predicted for part in both]), predicted, rtol=1e-4, atol=1e-5)
    nodes = np.unique(np.concatenate([batch_of(0).users, USERS + batch_of(0).items[:, 0]]))
    nodes = nodes[masked[nodes]]
    assert (nodes < USERS).any() and (nodes >= USERS).any()
    expected = 0.7 * cosine_contrast(predicted, item_and_mean_text(), nodes, 0.5)
    for devices in (1, 2):
        step = parallel_train_step(config, devices)
        _, found = step(shard_state(whole, devices), shard_graph_inputs(graph_inputs, devices), batch_of(0))
        assert found["loss/reconstruction"] == pytest.approx(expected, rel=1e-4)
        assert float(found["loss/graph_branch"] + found["loss/reconstruction"]) == pytest.approx(float(found["loss"]))


def test_the_mask_row_is_learned():
    _, params = steps(reconstructing(), 1, 3, "rlmrec_gen")
    assert np.abs(params["main"]["mask_row"]).max() > 1e-4


def test_without_text_nothing_is_reconstructed():
    """Nor where no node of the batch is masked: the loss and its derivative are finite."""
    for config, width in ((reconstructing(), 0.0), (reconstructing(id_embedding_dropout=1e-6), 1.0)):
        graph_inputs = task_of("rlmrec_gen")
        text = {ITEM: graph_inputs.graph.text[ITEM] * np.float32(width)}
        graph_inputs = dataclasses.replace(graph_inputs, graph=graph_inputs.graph.with_text(text))
        whole = init(config, graph_inputs)
        step = parallel_train_step(config, 1)
        _, found = step(shard_state(whole, 1), shard_graph_inputs(graph_inputs, 1), batch_of(0))
        assert found["loss/reconstruction"] == 0 and np.isfinite(found["gradient_norm"])


def item_and_mean_text() -> np.ndarray:
    """The mean text of each user's items, then the text of each item."""
    text, held = tiny.words()[USERS : USERS + ITEMS], np.zeros((USERS, ITEMS))
    held[tiny.HOLDER, tiny.HELD] = 1
    return np.concatenate([held @ text / np.maximum(held.sum(1, keepdims=True), 1), text])


def moved(params):
    """Parameters as after some training: none is exactly 0."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: leaf + rng.normal(size=leaf.shape).astype(np.float32) / 3, params)


def test_alpharec_learns_the_same_on_any_number_of_devices():
    config = config_of("alpharec", learning_rate=0.05)
    alone, others = (np.array([step["loss"] for step in steps(config, n, 60, "alpharec")[0]]) for n in (1, 2))
    assert alone[-10:].mean() < 0.9 * alone[:10].mean()
    np.testing.assert_allclose(others, alone, rtol=1e-4)


def test_alpharec_reads_the_text_of_a_users_items_and_none_of_their_own():
    config, graph_inputs = config_of("alpharec"), task_of("alpharec")
    params = moved(init(config, graph_inputs).params)
    users, items = embed_nodes(config, params, graph_inputs)
    text = dict(graph_inputs.graph.text)
    own = dataclasses.replace(graph_inputs, graph=graph_inputs.graph.with_text({USER: text[USER][::-1].copy()}))
    for one, other in zip((users, items), embed_nodes(config, params, own), strict=True):
        np.testing.assert_array_equal(one, other)
    changed = text[ITEM].copy()
    changed[3] *= -1  # held by users 1 and 3, and two layers from all items but 5
    other_users, other_items = embed_nodes(
        config, params, dataclasses.replace(graph_inputs, graph=graph_inputs.graph.with_text({ITEM: changed}))
    )
    assert (np.abs(other_users - users).max(1) > 1e-4)[[1, 3]].all()
    assert (np.abs(other_items - items).max(1) > 1e-4)[[0, 2, 3, 4]].all()


def test_noise_is_of_training():
    """Where a step gives its key, the first round is .2 from what it is without; the first round is what is sown."""
    config, graph_inputs = config_of("xsimgcl"), task_of("xsimgcl")
    params = init(config, graph_inputs).params
    _, seen = FusedModel(config.model).apply(
        {"params": params}, graph_inputs.graph, jax.random.key(0), mutable=["intermediates"]
    )
    [first_round] = seen["intermediates"]["main"][FIRST_LAYER]
    distance = np.linalg.norm(np.concatenate(first_round) - rounds_of(params)[1], axis=1)
    received = matrix().any(axis=1)
    np.testing.assert_allclose(distance, 0.2 * received, rtol=1e-4, atol=1e-6)


def test_only_social_lightgcn_keeps_ties():
    kept = {name: config_of(name).graph for name in ("bpr_mf", "lightgcn", "xsimgcl", "social_lightgcn")}
    assert [graph.social_edges for graph in kept.values()] == ["none", "none", "none", "observed"]
    assert {(graph.text_knn, graph.attributes) for graph in kept.values()} == {(0, ())}


def test_a_user_of_whom_nothing_is_known_gets_what_is_popular():
    config, graph_inputs = config_of("lightgcn"), task_of("lightgcn")
    state = init(config, graph_inputs)
    scores = np.asarray(
        sharded_scorer(config, shard_graph_inputs(graph_inputs), shard_state(state.params))(jnp.array([0, 6]))
    )
    users, items = embed_nodes(config, state.params, graph_inputs)
    np.testing.assert_allclose(scores[0], users[0] @ items.T, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(scores[1], graph_inputs.popularity)  # user 6 has neither items nor neighbors
    assert len(set(graph_inputs.popularity.tolist())) > 1


# --- the step with contrast ----------------------------------------------------------------------------------------


def batch_of(number: int) -> Batch:
    return batch(HELD, number, seed=0, batch_size=5, positives_per_user=2, num_negatives=2)


def steps(config: Config, devices: int, count: int, name: str = "xsimgcl"):
    graph_inputs = task_of(name)
    whole = init(config, graph_inputs)
    graph_inputs, state = shard_graph_inputs(graph_inputs, devices), shard_state(whole, devices)
    step, losses = parallel_train_step(config, devices), []
    for number in range(count):
        state, metrics = step(state, graph_inputs, batch_of(number))
        losses.append(jax.device_get(metrics))
    return losses, gather_state(state, whole, devices).params


def cosine_contrast(one: np.ndarray, other: np.ndarray, nodes: np.ndarray, temperature: float = 0.15) -> float:
    one, other = (x[nodes] / np.linalg.norm(x[nodes], axis=1, keepdims=True) for x in (one, other))
    scores = np.exp(one @ other.T / temperature)
    return float(np.mean(-np.log(np.diag(scores) / scores.sum(1))))


def test_the_contrast_by_hand():
    """Each user and each item of the batch once, though items repeat and the last place is padding on 2 devices."""
    config = config_of("xsimgcl", contrastive_weight=0.5)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, embedding_noise=0.0))
    h = rounds_of(init(config, task_of("xsimgcl")).params)
    out = np.mean(h[1:], axis=0)
    users, items = batch_of(0).users, batch_of(0).items[:, 0]
    assert len(set(items.tolist())) < len(items) == len(set(users.tolist()))
    contrast = sum(cosine_contrast(out, h[1], np.unique(nodes)) for nodes in (users, USERS + items))
    for devices in (1, 2):
        [with_it] = steps(config, devices, 1)[0]
        plain = dataclasses.replace(config, train=dataclasses.replace(config.train, contrastive_weight=0.0))
        [without] = steps(plain, devices, 1)[0]
        assert with_it["loss"] - without["loss"] == pytest.approx(0.5 * contrast, rel=1e-5)
        parts = with_it["loss/contrastive_user"] + with_it["loss/contrastive_item"]
        assert parts == pytest.approx(0.5 * contrast, rel=1e-5)
        assert with_it["loss/graph_branch"] + parts == pytest.approx(with_it["loss"], rel=1e-6)
        assert without.keys() == {"loss", "loss/graph_branch", "gradient_norm"}


@pytest.fixture
def descent(monkeypatch):
    """Plain gradient descent, in the program of first states too."""
    monkeypatch.setattr(step_module, "make_optimizer", lambda config: optax.sgd(config.learning_rate))
    step_module._init.clear_cache()  # pyright: ignore[reportAttributeAccessIssue]
    yield
    step_module._init.clear_cache()  # pyright: ignore[reportAttributeAccessIssue]


def test_any_number_of_devices_gives_the_same_with_noise_and_contrast(descent):
    """Adam would hide a gradient that is twice too large."""
    config = config_of("xsimgcl", contrastive_weight=0.5, learning_rate=0.02)
    start = init(config, task_of("xsimgcl")).params
    (alone, params), (losses, others) = (steps(config, devices, 20) for devices in (1, 2))
    assert np.abs(params["main"]["id_user"] - start["main"]["id_user"]).max() > 0.003
    for one, other in zip(alone, losses, strict=True):
        assert other.keys() == one.keys()
        for name, value in one.items():
            assert float(other[name]) == pytest.approx(float(value), rel=1e-5), name
    for one, other in zip(jax.tree.leaves(params), jax.tree.leaves(others), strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-5, atol=1e-6)


# --- settings that cannot be ---------------------------------------------------------------------------------------


def test_settings_that_contradict_each_other_are_refused():
    with pytest.raises(
        ValueError, match=r"model\.layer_combination is 'mean'; it must be learned where model\.relation_gates is True"
    ):
        ModelConfig(layer_combination="mean")
    with pytest.raises(
        ValueError,
        match=r"model\.layer_combination is 'mean_without_input'; it must be learned or mean where model\.num_layers",
    ):
        ModelConfig(layer_combination="mean_without_input", relation_gates=False, num_layers=0)
    with pytest.raises(
        ValueError, match=r"train\.contrastive_weight is 0\.1; it must be 0 where model\.num_layers is 0"
    ):
        Config(model=ModelConfig(num_layers=0), train=TrainConfig(contrastive_weight=0.1))


@pytest.mark.parametrize("name", ["bpr_mf", "lightgcn", "xsimgcl", "alpharec", "rlmrec_con", "rlmrec_gen"])
def test_published_models_take_nothing_of_the_config_they_are_compared_with(name):
    plain = variant(Config(), name)
    noisy = dataclasses.replace(
        Config(),
        model=ModelConfig(
            popularity_weight=1.0,
            popularity_half_life=90.0,
            embedding_noise=0.3,
            dim=256,
            id_embedding_dropout=0.4,
            score="cosine",
            text_projection="mlp",
            text_propagation="both_ways",
            text_alignment=0.3,
            text_reconstruction=0.3,
        ),
        train=dataclasses.replace(Config().train, contrastive_weight=0.5, temperature=0.05, learning_rate=0.5),
    )
    beside = variant(noisy, name)
    assert beside.train == plain.train
    assert dataclasses.replace(beside.model, popularity_half_life=0.0) == plain.model  # of no use without popularity


def test_the_published_methods_have_one_list_of_names():
    own = [name for name, of in VARIANTS.items() if not of.ablation and not of.control and name not in OWN]
    assert sorted(typing.get_args(TrainedMethod)) == sorted(own)
    assert typing.get_args(Baseline) == tuple(BASELINES)
    for name in (*own, *BASELINES):
        found = variant(Config(), name)
        assert (found.model.method, variant(found, "no_gates").model.method) == (name, "")
        needs = (VARIANTS | BASELINES)[name].needs  # as `require_method_inputs` reads them from the settings
        assert ("text" in needs) == found.model.reads_text
        assert ("ties" in needs) == (found.graph.social_edges != "none")
