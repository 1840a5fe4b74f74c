"""Review dropout: text embeddings recomputed by hand, on any number of devices, and what it leaves as it is."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pyarrow as pa
import pytest
import tiny
from test_train_step import BATCH_USERS, batch_of

from fused_rec.config import Config, ModelConfig, TextConfig, TrainConfig
from fused_rec.data.controls import random_texts, shuffle_texts
from fused_rec.data.dataset import Dataset, empty_reviews, empty_ties
from fused_rec.data.node_texts import ITEM, USER, NodeTexts, node_texts
from fused_rec.data.splits import Observed, Split
from fused_rec.distributed.devices import select_devices
from fused_rec.graph.adjacency import Backend
from fused_rec.graph.device_graph import DeviceGraph, device_graph
from fused_rec.graph.hetero import hetero_graph
from fused_rec.graph.schema import INTERACTED_BY, INTERACTS
from fused_rec.model.model import LINEAR, Branch, edge_keep_mask, item_degree
from fused_rec.model.review_dropout import device_reviews, drop_reviews
from fused_rec.text.features import TextFeatures, without_tfidf
from fused_rec.text.whitening import apply_whitening
from fused_rec.training import footprint, sharding
from fused_rec.training import train_step as step_module
from fused_rec.training.batch_sources import batch_source
from fused_rec.training.inputs import Prepared, dropped_reviews
from fused_rec.training.sharding import gather_state, parallel_train_step, shard_batch, shard_graph_inputs, shard_state
from fused_rec.training.train_step import GraphInputs, TrainState, init

SHARE = 0.4
PRESENT = np.array([True] * 5 + [False])
PAIRS = [
    *((0, 0, "a"), (0, 0, "b"), (0, 1, "c"), (1, 0, "d"), (1, 3, "a"), (2, 4, "a"), (3, 2, "e"), (3, 3, "f")),
    *((4, 0, "g"), (5, 4, "h"), (5, 0, "i"), (2, 2, " "), (6, 5, "j")),
]  # (5, 0) and (6, 5) are no interactions; "a" and "d" are also descriptions; users 4 and 5 have one interaction each
INTERACTIONS = set(zip(tiny.HOLDER.tolist(), tiny.HELD.tolist(), strict=True))
DESCRIPTIONS = {USER: ["u", None, "a", None, None, None, None], ITEM: [None, "d", None, None, "v", None]}


def dataset(reviewed: bool = True) -> Dataset:
    nodes = {
        name: pa.table({f"{name}_id": [str(n) for n in range(len(texts))], "text": pa.array(texts, pa.string())})
        for name, texts in DESCRIPTIONS.items()
    }
    user, item, text = zip(*PAIRS, strict=True)
    columns = {"user": pa.array(user, pa.int32()), "item": pa.array(item, pa.int32()), "text": pa.array(text)}
    interactions = pa.table({"user": tiny.HOLDER, "item": tiny.HELD})
    reviews = pa.table(columns) if reviewed else empty_reviews()
    return Dataset("tiny", nodes[USER], nodes[ITEM], interactions, reviews, empty_ties())


def observed(data: Dataset) -> Observed:
    return Observed(tiny.HOLDER, tiny.HELD, data.reviews, empty_ties(), np.zeros(len(tiny.HOLDER), np.float32))


def texts_of(reviewed: bool = True) -> NodeTexts:
    data = dataset(reviewed)
    return node_texts(data, observed(data))


def features_of(texts: NodeTexts) -> TextFeatures:
    """A narrow cone, as sentence embeddings are."""
    drawn = np.random.default_rng(0).normal(size=(len(texts.texts), tiny.WIDTH)).astype(np.float32)
    return without_tfidf(texts, drawn + 3)


def inputs_of(reviewed: bool = True, backend: Backend | None = None) -> GraphInputs:
    texts = texts_of(reviewed)
    features = features_of(texts)
    counts = {name: tiny.COUNTS[name] for name in (USER, ITEM)}
    relations = {r: e for r, e in tiny.relations(tiny.words()).items() if r in (INTERACTS, INTERACTED_BY)}
    rows = np.concatenate([features.node_rows()[name].rows for name in counts])
    graph = device_graph(hetero_graph(counts, relations, rows), backend)
    reviews = texts.reviews
    assert reviews is not None
    found = device_reviews(features, reviews, backend) if reviewed else None
    return GraphInputs(graph, jnp.asarray(PRESENT), item_degree(graph), reviews=found)


def reduced(graph_inputs: GraphInputs, share: float, key: jax.Array) -> DeviceGraph:
    assert graph_inputs.reviews is not None
    return drop_reviews(graph_inputs.reviews, graph_inputs.graph, share, key)


def config_of(variant: Any = "fused", **model) -> Config:
    settings = {"dim": 3, "num_layers": 1, "edge_dropout": SHARE, "id_embedding_dropout": 0.0, "id_init_std": 1.0}
    return Config(
        model=ModelConfig(variant=variant, **settings | model),
        train=TrainConfig(batch_size=BATCH_USERS, positives_per_user=2, num_negatives=2, temperature=1.0),
    )


# --- rows by hand --------------------------------------------------------------------------------------------------


def kept_pairs(key: jax.Array) -> set[tuple[int, int]]:
    kept = np.asarray(edge_keep_mask(key, SHARE, tiny.HOLDER, tiny.HELD)) > 0
    return set(zip(tiny.HOLDER[kept].tolist(), tiny.HELD[kept].tolist(), strict=True))


def rows_by_hand(kept: set[tuple[int, int]]) -> dict[str, np.ndarray]:
    """Whitens means over descriptions and reviews without those of the interactions that are not kept."""
    texts = texts_of()
    features = features_of(texts)
    vector = dict(zip(texts.texts, features.vectors(), strict=True))
    found = {}
    for column, (name, descriptions) in enumerate(DESCRIPTIONS.items()):
        means = np.zeros((len(descriptions), tiny.WIDTH))
        has_text = np.zeros(len(descriptions), bool)
        for node, description in enumerate(descriptions):
            own = [(pair[:2], pair[2]) for pair in PAIRS if pair[column] == node and pair[2].strip()]
            share = 1 / len(own) / (1 if description is None else 2) if own else 0
            weighted = [(share, vector[t]) for pair, t in own if pair in kept or pair not in INTERACTIONS]
            if description is not None:
                weighted.append((0.5 if own else 1, vector[description]))
            if weighted:
                means[node] = np.average([v for _, v in weighted], axis=0, weights=[w for w, _ in weighted])
                has_text[node] = True
        found[name] = apply_whitening(features.fitted.whitening[name], means.astype(np.float32), has_text)[0]
    return found


@pytest.mark.parametrize("backend", ["csr", "segment"])
def test_rows_are_those_of_the_remaining_texts(backend):
    graph_inputs = inputs_of(backend=backend)
    emptied, changed = [], []
    for seed in range(12):
        key = jax.random.key(seed)
        graph = reduced(graph_inputs, SHARE, key)
        for name, expected in rows_by_hand(kept_pairs(key)).items():
            before, after = np.asarray(graph_inputs.graph.text[name]), np.asarray(graph.text[name])
            np.testing.assert_allclose(after, expected, atol=2e-6)
            emptied += [(name, n) for n in np.flatnonzero(before.any(1) & ~after.any(1)).tolist()]
            changed += [(name, n) for n in np.flatnonzero(np.abs(before - after).max(1) > 1e-3).tolist()]
    assert {(USER, 4), (ITEM, 2), (ITEM, 3)} <= set(emptied)  # whose only texts are reviews
    assert {(USER, 0), (ITEM, 0)} <= set(changed)
    # Described only, or reviewed without an interaction, or neither.
    assert not {(ITEM, 1), (USER, 6), (ITEM, 5)} & set(emptied)


def test_all_reviews_and_none():
    """A share of 0 drops nothing, one of nearly 1 everything."""
    graph_inputs = inputs_of()
    for share, kept in ((0.0, INTERACTIONS), (0.999999, set())):
        graph = reduced(graph_inputs, share, jax.random.key(0))
        for name, expected in rows_by_hand(kept).items():
            np.testing.assert_allclose(graph.text[name], expected, atol=2e-6)


@pytest.mark.parametrize("seed", range(3))
def test_reviews_leave_with_the_edges_of_the_messages(seed):
    """The edges whose weight the model sets to zero are those whose reviews leave."""
    graph_inputs, key = inputs_of(), jax.random.key(seed)
    branch: Any = Branch(config_of().model)
    params = branch.init(jax.random.key(0), graph_inputs.graph)["params"]
    _, sown = branch.apply({"params": params}, graph_inputs.graph, key, mutable=["intermediates"])
    [(_, _, weights)] = sown["intermediates"][LINEAR]
    for relation, ends in ((INTERACTS, ("senders", "receivers")), (INTERACTED_BY, ("receivers", "senders"))):
        adjacency = graph_inputs.graph.adjacencies[relation]
        at = np.asarray(weights.edge[relation]) > 0
        user, item = (np.asarray(getattr(adjacency, end))[at].tolist() for end in ends)
        assert set(zip(user, item, strict=True)) == kept_pairs(key)
    assert 0 < len(kept_pairs(key)) < len(tiny.HELD)


def test_reviews_by_hand():
    reviews = texts_of().reviews
    assert reviews is not None
    found = [(u, i, texts_of().texts[t]) for u, i, t in zip(*map(np.ndarray.tolist, reviews[:3]), strict=True)]
    assert found == PAIRS[:10]  # the others are blank or of no interaction
    user, item = (reviews.weights[name].tolist() for name in (USER, ITEM))
    np.testing.assert_allclose(user, [1 / 6] * 3 + [0.5] * 3 + [0.5, 0.5, 1, 0.5])  # users 0 and 2 have descriptions
    np.testing.assert_allclose(item, [1 / 5] * 2 + [0.5, 1 / 5, 0.5, 1 / 4, 1, 0.5, 1 / 5, 1 / 4])


# --- steps ---------------------------------------------------------------------------------------------------------


def take_steps(config: Config, graph_inputs: GraphInputs, devices: int, count: int):
    """Losses of all steps, and the last parameters."""
    params = init(config, graph_inputs).params
    optimizer = step_module.make_optimizer(config.train)
    whole = TrainState(jnp.int32(0), jnp.int32(0), params, optimizer.init(params))
    sharded, state, losses = shard_graph_inputs(graph_inputs, devices), shard_state(whole, devices), []
    step = parallel_train_step(config, devices)
    for number in range(count):
        state, metrics = step(state, sharded, batch_of(number))
        losses.append(float(metrics["loss"]))
    return losses, gather_state(state, whole, devices).params


@pytest.mark.parametrize("variant", ["fused", "text"])
def test_a_step_reads_the_reduced_text_everywhere(variant):
    """Inputs, gates and both branches: as if the graph had that text."""
    config, graph_inputs = config_of(variant), inputs_of()
    key = jax.random.fold_in(jax.random.key(config.train.seed + 1), 0)
    given = dataclasses.replace(graph_inputs, graph=jax.device_get(reduced(graph_inputs, SHARE, key)), reviews=None)
    (alone,), params = take_steps(config, graph_inputs, 1, 1)
    (same,), same_params = take_steps(config, given, 1, 1)
    (without,), _ = take_steps(config, dataclasses.replace(graph_inputs, reviews=None), 1, 1)
    assert alone == pytest.approx(same, rel=1e-6)
    assert abs(alone - without) > 1e-3
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), params, same_params)


@pytest.mark.parametrize("variant", ["fused", "text"])
def test_any_number_of_devices_gives_the_same(variant, monkeypatch):
    """Plain gradient descent: Adam would hide a gradient that is twice too large."""
    monkeypatch.setattr(step_module, "make_optimizer", lambda config: optax.sgd(0.02))
    sharding._mapped_step.cache_clear()  # of programs with another optimizer
    devices = 4 if jax.device_count() == 4 else jax.device_count()
    (alone, params), (losses, others) = (take_steps(config_of(variant), inputs_of(), n, 20) for n in (1, devices))
    sharding._mapped_step.cache_clear()
    np.testing.assert_allclose(losses, alone, rtol=1e-5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), others, params)


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_a_step_without_reviews_is_the_program_without_the_setting(compute):
    lowered = []
    for setting in (True, False):
        config = config_of(review_dropout=setting)
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, compute_dtype=compute))
        whole = dataclasses.replace(inputs_of(), reviews=None)
        graph_inputs, state = shard_graph_inputs(whole, 1), shard_state(init(config, whole), 1)
        program = parallel_train_step(config, 1).compiled(state, graph_inputs)
        lowered.append(program.lower(state, graph_inputs, shard_batch(batch_of(0), 1)).as_text())
    assert lowered[0] == lowered[1]


# --- where it applies ----------------------------------------------------------------------------------------------


def test_it_applies_to_reviews_of_trained_interactions():
    config, texts = config_of(), texts_of()
    assert dropped_reviews(config, texts) is texts.reviews
    assert dropped_reviews(config_of("text"), texts) is texts.reviews
    kept = [config_of("graph"), config_of(review_dropout=False), config_of(edge_dropout=0.0)]
    kept.append(dataclasses.replace(config, text=TextConfig(finetune="lora")))
    kept.append(dataclasses.replace(config, train=TrainConfig(loss="sampled_softmax", num_neighbors=2)))
    for other in kept:
        assert dropped_reviews(other, texts) is None
    for control in (shuffle_texts(texts, 0), random_texts(texts, 4, 0)[0], texts_of(reviewed=False)):
        assert dropped_reviews(config, control) is None


def prepared_of() -> Prepared:
    data, graph_inputs = dataset(), dataclasses.replace(inputs_of(), reviews=None)
    rows = np.arange(len(tiny.HELD))
    split = Split("random", rows, rows[:0], rows[:0])
    return Prepared(
        dataset=data,
        split=split,
        observed=observed(data),
        splits=("train",),
        text=features_of(texts_of()),
        graph_inputs=graph_inputs,
    )


def test_validation_has_all_texts():
    prepared = prepared_of()
    for config, dropped in ((config_of(), True), (config_of(review_dropout=False), False)):
        source = batch_source(config, prepared, (), lambda seed, step: batch_of(step))
        graph_inputs, _ = source.step_inputs(0)
        assert (graph_inputs.reviews is not None) == dropped
        given = source.validation_inputs()
        assert given.reviews is None
        for name in (USER, ITEM):
            own = np.asarray(shard_graph_inputs(prepared.graph_inputs).graph.text[name])
            np.testing.assert_array_equal(given.graph.text[name], own)


def test_the_footprint_counts_it(monkeypatch):
    graph_inputs, needs = inputs_of(), []
    reviews = graph_inputs.reviews
    assert reviews is not None
    stored = sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(reviews))
    run = sum(3 * rows.nbytes for rows in graph_inputs.graph.text.values())
    estimate = footprint.review_bytes(graph_inputs.graph, len(reviews.user), 1)
    assert stored + run == pytest.approx(estimate, rel=0.1)
    monkeypatch.setattr(footprint, "require_device_memory", lambda need, what, remedy: needs.append(need))
    for count in (0, len(reviews.user)):
        footprint.require_step(config_of(), graph_inputs, None, count)
    devices = len(select_devices(None))
    assert needs[1] - needs[0] == footprint.review_bytes(graph_inputs.graph, len(reviews.user), devices)
