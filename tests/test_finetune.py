"""The language model trained along: the same rows as if all were encoded, true gradients, any number of devices."""

import dataclasses
import itertools
import json
import signal
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, PartitionSpec
from market import differences, write_tables

import fused_rec as fr
from fused_rec.config import Config, from_dict
from fused_rec.data.batches import Batch, batch, user_items
from fused_rec.data.dataset import empty_reviews
from fused_rec.data.splits import split
from fused_rec.data.synthetic import make_synthetic
from fused_rec.distributed import signals
from fused_rec.distributed.devices import AXIS, pmap_over_devices
from fused_rec.graph.schema import ITEM, USER
from fused_rec.serving.recommender import load, load_measured
from fused_rec.studies.variants import VARIANTS, variant
from fused_rec.text import encode as embed_module
from fused_rec.training import batch_sources, finetune, finetune_step, sharding, trainer
from fused_rec.training.checkpoint import RECORD, Checkpoints
from fused_rec.training.evaluate import evaluate_mean, scorer
from fused_rec.training.inputs import init_state, prepare, with_finetuned_text, with_pretrained_text
from fused_rec.training.sharding import (
    gather_state,
    graph_inputs_axes,
    shard_batch,
    shard_graph_inputs,
    shard_state,
)
from fused_rec.training.train_step import sharding_axes

TINY = str(Path(__file__).parent / "golden" / "tiny_bert")
USERS = 12  # of a batch


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


def config_of(cache: Path, train: str = "lora", **text) -> Config:
    """Small, smooth and without dropout, so that differences of a loss are differences of words."""
    return from_dict(
        {
            "text": {"model": TINY, "cache": str(cache), "finetune": train, "lora_rank": 2, "max_tokens": 12} | text,
            "graph": {"text_knn": 0},
            "model": {"dim": 3, "num_layers": 1, "id_embedding_dropout": 0.0, "id_init_std": 1.0},
            "train": {"batch_size": USERS, "positives_per_user": 2, "num_negatives": 2, "temperature": 1.0},
        }
    )


@pytest.fixture(scope="module")
def market():
    return make_synthetic(0, n_users=30, n_items=20)


@pytest.fixture(scope="module")
def prepared(cache, market):
    config = config_of(cache)
    return prepare(config, market, split(market, config.split))


def batch_of(prepared, step: int) -> Batch:
    observed = prepared.observed
    held = user_items(
        observed.user, observed.item, prepared.dataset.n_users, np.asarray(prepared.graph_inputs.trained_items)
    )
    return batch(held, step, seed=0, batch_size=USERS, positives_per_user=2, num_negatives=2)


def moved(state, by: float = 0.05):
    """The state after its adapters have taken a seeded step."""
    rng = np.random.default_rng(0)
    encoder = jax.tree.map(
        lambda leaf: leaf + by * rng.standard_normal(leaf.shape).astype(np.float32), state.params[finetune.ENCODER]
    )
    return dataclasses.replace(state, params=state.params | {finetune.ENCODER: encoder}, encoder_snapshot=())


def text_of(graph_inputs) -> np.ndarray:
    graph = graph_inputs.graph
    return np.concatenate([np.asarray(graph.text[node_type]) for node_type, _ in graph.node_types], axis=-2)


def taken(config, prepared, state, cache, steps: int, devices: int = 1):
    """Losses of some steps and the parameters after them."""
    step = finetune_step.parallel_finetune_step(config, prepared.encoder_data, devices)
    fixed = finetune_step.frozen_parts(config, prepared.encoder_data)
    there, graph_inputs, losses = shard_state(state, devices), shard_graph_inputs(cache.graph_inputs, devices), []
    for number in range(steps):
        users = batch_of(prepared, number)
        text_batch = finetune_step.make_text_batch(config, cache, users, number, devices)
        there, metrics = step(there, graph_inputs, users, text_batch, fixed)
        losses.append(float(metrics["loss"]))
    return np.array(losses), gather_state(there, state, devices).params


@pytest.fixture
def descent(monkeypatch):
    """Plain descent: Adam divides a gradient by its size, and hides one that is twice too large."""
    monkeypatch.setattr(finetune, "optimizer", lambda config: optax.sgd(config.train.learning_rate))
    sharding._mapped_step.cache_clear()
    yield
    sharding._mapped_step.cache_clear()


def begin(config, prepared):
    """A state for `descent`, its adapters on their way."""
    state = moved(init_state(config, prepared))
    return dataclasses.replace(state, opt_state=finetune.optimizer(config).init(state.params))


# --- words ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("train", ["lora", "full"])
def test_it_starts_at_the_frozen_model(cache, market, train):
    """The same rows of words, bit for bit, and the same weights of the model; only the language model's are more."""
    config = config_of(cache, train)
    frozen = config_of(cache, "frozen")
    along, alone = (prepare(of, market, split(market, of.split)) for of in (config, frozen))
    np.testing.assert_array_equal(text_of(along.graph_inputs), text_of(alone.graph_inputs))
    state, without = init_state(config, along), init_state(frozen, alone)
    np.testing.assert_array_equal(
        text_of(with_finetuned_text(config, along, state).graph_inputs), text_of(alone.graph_inputs)
    )
    assert with_finetuned_text(frozen, alone, without) is alone and with_pretrained_text(alone) is alone
    other = with_finetuned_text(config, along, moved(state)) if train == "lora" else along
    np.testing.assert_array_equal(text_of(with_pretrained_text(other).graph_inputs), text_of(alone.graph_inputs))
    assert set(state.params) - set(without.params) == {finetune.ENCODER}
    for name, branch in without.params.items():
        jax.tree.map(np.testing.assert_array_equal, branch, state.params[name])


def test_corrected_rows_are_those_of_encoding_everything(cache, prepared):
    """A step that draws all of its batch's texts, on one device and on four; other rows keep their bits."""
    config = config_of(cache, finetune_texts_per_step=400)
    start = init_state(config, prepared)
    before = finetune.encode_all_texts(config, prepared.encoder_data, prepared.graph_inputs, start.encoder_snapshot)
    after = finetune.encode_all_texts(
        config, prepared.encoder_data, prepared.graph_inputs, moved(start).params[finetune.ENCODER]
    )
    assert np.abs(text_of(after.graph_inputs) - text_of(before.graph_inputs)).max() > 0.1
    users = batch_of(prepared, 0)
    own = {USER: set(users.users.tolist()), ITEM: set(users.items[users.mask > 0].tolist())}
    for devices in (1, 4):
        text_batch = finetune_step.make_text_batch(config, before, users, 0, devices)
        change = np.zeros((np.prod(text_batch.mask.shape[:3]), after.vectors.shape[1]), np.float32)
        texts = finetune_step.sample_texts(config, prepared.encoder_data, users, 0)
        change[: len(texts)] = after.vectors[texts] - before.vectors[texts]
        touched = {t: rows.nodes[rows.nodes >= 0] for t, rows in text_batch.node_updates.items()}
        _, matrices = finetune_step.frozen_parts(config, prepared.encoder_data)
        graph_inputs = shard_graph_inputs(before.graph_inputs, devices)

        def rows(graph_inputs, text_batch, change, matrices):
            return finetune_step.update_node_text(graph_inputs, text_batch, change, matrices).graph.text

        axes_of = graph_inputs_axes(graph_inputs), finetune_step.text_batch_axes(), None, None
        found = pmap_over_devices(rows, devices, in_axes=axes_of, out_axes=1)(
            graph_inputs, text_batch, change, matrices
        )
        for node_type, wanted in ((USER, own[USER]), (ITEM, own[ITEM])):
            count = before.graph_inputs.graph.count(node_type)
            rows_there = np.asarray(found[node_type])
            whole = rows_there.reshape(-1, rows_there.shape[-1])[:count]
            one, other = (np.asarray(c.graph_inputs.graph.text[node_type]) for c in (before, after))
            np.testing.assert_allclose(whole[list(wanted)], other[list(wanted)], atol=2e-5)
            others = np.setdiff1d(np.arange(count), touched[node_type])
            np.testing.assert_array_equal(whole[others], one[others])


@pytest.fixture(scope="module")
def short(cache, market):
    """With all texts in one class of lengths: a step has one shape, and may draw all that there are."""
    config = config_of(cache, max_tokens=8)
    found: Any = prepare(config, market, split(market, config.split))
    assert len(found.encoder_data.bucket_length) == 1
    return found


def test_the_gradient_is_that_of_encoding_everything(cache, short, descent, monkeypatch):
    """Along a drawn direction, against the difference of losses of graphs whose texts are all encoded anew."""
    config = config_of(cache, finetune_texts_per_step=400, max_tokens=8)
    users, items = (short.graph_inputs.graph.count(node_type) for node_type in (USER, ITEM))
    # Every item is a positive here, so every item has to be trained.
    inputs = dataclasses.replace(short.graph_inputs, trained_items=np.ones(items, bool))
    short = dataclasses.replace(short, graph_inputs=inputs)
    everyone = Batch(
        np.arange(users, dtype=np.int32),
        np.tile(np.arange(items, dtype=np.int32), (users, 1)),
        np.ones((users, items), np.float32),
        np.zeros((users, 2), np.int32),
    )
    assert len(finetune_step.sample_texts(config, short.encoder_data, everyone, 0)) == len(short.encoder_data.tokens)
    monkeypatch.setitem(globals(), "batch_of", lambda prepared, step: everyone)
    state = begin(config, short)
    there = finetune.encode_all_texts(config, short.encoder_data, short.graph_inputs, state.params[finetune.ENCODER])
    _, after = taken(config, short, state, there, 1)
    before, rate = state.params[finetune.ENCODER], config.train.learning_rate
    slope = jax.tree.map(lambda a, b: (a - b) / rate, before, after[finetune.ENCODER])
    rng = np.random.default_rng(1)
    way = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), slope)
    expected = sum(np.vdot(a, b) for a, b in zip(jax.tree.leaves(slope), jax.tree.leaves(way), strict=True))
    losses = []
    for by in (3e-3, -3e-3):
        encoder = jax.tree.map(lambda leaf, of, by=by: leaf + np.float32(by) * of, before, way)
        tried = dataclasses.replace(state, params=state.params | {finetune.ENCODER: encoder})
        encoded = finetune.encode_all_texts(config, short.encoder_data, short.graph_inputs, encoder)
        losses.append(taken(config, short, tried, encoded, 1)[0][0])
    assert abs(losses[0] - losses[1]) > 1e-3
    assert (losses[0] - losses[1]) / 6e-3 == pytest.approx(expected, rel=0.05)


def test_any_number_of_devices_and_any_chunk_give_the_same(cache, short, descent):
    """Ten texts a step: four devices have unlike numbers of them; a chunk is of one text or of all."""
    config = config_of(cache, finetune_texts_per_step=10, max_tokens=8)
    state = begin(config, short)
    start = finetune.encode_all_texts(config, short.encoder_data, short.graph_inputs, state.params[finetune.ENCODER])
    losses, params = taken(config, short, state, start, 8)
    for part in (finetune.ENCODER, "main", "words"):
        change = jax.tree.map(lambda a, b: np.abs(a - b).max(), params[part], state.params[part])
        assert max(jax.tree.leaves(change)) > 1e-5, part
    for settings, devices in ((config, 4), (sized(config, 10, 8), 1)):
        others = taken(settings, short, state, start, 8, devices)
        np.testing.assert_allclose(others[0], losses, rtol=1e-5)
        for (path, one), other in zip(jax.tree.leaves_with_path(params), jax.tree.leaves(others[1]), strict=True):
            np.testing.assert_allclose(other, one, rtol=1e-4, atol=1e-6, err_msg=jax.tree_util.keystr(path))


def test_what_comes_out_is_the_same_on_every_device(cache, market):
    """Traced under shard_map, which refuses an output that may differ between devices: a sum that was forgotten."""
    config = config_of(cache)
    whole: Any = prepare(config, market, split(market, config.split))
    adjacency = {r: dataclasses.replace(a, backend="segment") for r, a in whole.graph_inputs.graph.adjacencies.items()}
    state = dataclasses.replace(init_state(config, whole), encoder_snapshot=())
    start = finetune.encode_all_texts(
        config, whole.encoder_data, whole.graph_inputs, init_state(config, whole).encoder_snapshot
    )
    users = batch_of(whole, 0)
    graph_inputs = shard_graph_inputs(
        dataclasses.replace(start.graph_inputs, graph=start.graph_inputs.graph.with_adjacencies(adjacency))
    )
    arguments = (
        *(shard_state(state), graph_inputs, shard_batch(users), finetune_step.make_text_batch(config, start, users, 0)),
        finetune_step.frozen_parts(config, whole.encoder_data),
    )
    at = sharding_axes(state), graph_inputs_axes(graph_inputs), 0, finetune_step.text_batch_axes(), None
    # jax 0.12 has no rule of this check for the polynomial inside of erf, and so of GELU.
    language_model = dataclasses.replace(whole.encoder_data.model.config, hidden_act="relu")
    encoder = language_model, whole.encoder_data.model.pooling, whole.encoder_data.model.normalize

    def each(function, axes, tree):
        def of(axis, part):
            return part if axis is None else jax.tree.map(lambda x: function(x, axis), part)

        return jax.tree.map(of, axes, tree, is_leaf=lambda axis: axis is None)

    def step(*arguments):
        after, metrics = finetune_step.finetune_step(config, encoder, *each(jnp.squeeze, at, arguments))
        return each(jnp.expand_dims, at[0], after), metrics

    def specs(axes):
        def of(axis):
            return PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, AXIS)

        return jax.tree.map(of, axes, is_leaf=lambda axis: axis is None)

    mesh = Mesh(np.array(jax.devices()), (AXIS,))
    out_specs = specs(at[0]), PartitionSpec()
    mapped = jax.shard_map(step, mesh=mesh, in_specs=specs(at), out_specs=out_specs, check_vma=True)
    after, metrics = jax.eval_shape(mapped, *arguments)
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, arguments[0])
    assert {value.shape for value in metrics.values()} == {()}


# --- the draw ------------------------------------------------------------------------------------------------------


def test_a_draw_is_of_the_batchs_texts_bounded_distinct_and_repeatable(cache, prepared):
    config = config_of(cache, finetune_texts_per_step=5)
    words, start = (
        prepared.encoder_data,
        finetune.encode_all_texts(
            config, prepared.encoder_data, prepared.graph_inputs, init_state(config, prepared).encoder_snapshot
        ),
    )
    shapes, seen = set(), set()
    for step in range(30):
        users = batch_of(prepared, step)
        text_batch, again = (finetune_step.make_text_batch(config, start, users, step) for _ in range(2))
        jax.tree.map(np.testing.assert_array_equal, text_batch, again)
        texts = finetune_step.sample_texts(config, words, users, step)
        assert 0 < len(texts) == len(set(texts.tolist())) <= 5
        for row, text in enumerate(texts):
            there = text_batch.mask.reshape(-1, text_batch.mask.shape[-1])[row]
            assert text_batch.ids.reshape(-1, len(there))[row, there].tolist() == words.tokens[text].tolist()
        assert len(set(words.bucket_of_text[texts].tolist())) == 1  # of one class, so that its length fits all
        nodes = {USER: users.users[users.mask.any(1)], ITEM: users.items[users.mask > 0]}
        allowed = np.concatenate(
            [words.texts_of(t).texts[np.isin(words.texts_of(t).nodes, of_batch)] for t, of_batch in nodes.items()]
        )
        assert set(texts.tolist()) <= set(allowed.tolist())
        for node_type, rows in text_batch.node_updates.items():
            links = words.texts_of(node_type)
            linked = np.isin(links.texts, texts)
            real = rows.weights > 0
            found = zip(rows.nodes[rows.places[real]], texts[rows.texts[real]], rows.weights[real], strict=True)
            expected = zip(links.nodes[linked], links.texts[linked], links.weights[linked], strict=True)
            assert sorted(found) == sorted(expected)
        shapes.add(jax.tree.structure(text_batch).unflatten(map(np.shape, jax.tree.leaves(text_batch))).ids)
        seen |= set(texts.tolist())
    assert len(shapes) <= finetune.LENGTH_BUCKETS
    assert len(seen) > 30


def test_a_batch_without_words_changes_no_row(cache, prepared):
    config = config_of(cache, finetune_texts_per_step=5)
    start = finetune.encode_all_texts(
        config, prepared.encoder_data, prepared.graph_inputs, init_state(config, prepared).encoder_snapshot
    )
    no_user = batch_of(prepared, 0)._replace(mask=np.zeros((USERS, 2), np.float32))
    text_batch = finetune_step.make_text_batch(config, start, no_user, 0)
    assert text_batch.mask.any(-1).all()  # each of what fills up has a token, or its mean would have no derivative
    for rows in text_batch.node_updates.values():
        assert (rows.nodes == -1).all() and not rows.weights.any()


def sized(config: Config, texts_per_step: int, batch_tokens: int) -> Config:
    """With so many tokens at once, also fewer than a config may ask for."""
    text = dataclasses.replace(config.text, finetune_texts_per_step=texts_per_step)
    object.__setattr__(text, "batch_tokens", batch_tokens)
    return dataclasses.replace(config, text=text)


def test_what_a_step_keeps_does_not_grow_with_its_texts(cache, short):
    """Eight times as many texts, one at a time, add less than a tenth of what they add all at once."""
    state, users = init_state(config_of(cache, max_tokens=8), short), batch_of(short, 0)
    start = finetune.encode_all_texts(
        config_of(cache, max_tokens=8), short.encoder_data, short.graph_inputs, state.encoder_snapshot
    )
    there, graph_inputs = (
        shard_state(dataclasses.replace(state, encoder_snapshot=()), 1),
        shard_graph_inputs(start.graph_inputs, 1),
    )
    need = []
    for texts, tokens in ((8, 8), (64, 8), (64, 64 * 8)):
        config = sized(config_of(cache, max_tokens=8), texts, tokens)
        text_batch = finetune_step.make_text_batch(config, start, users, 0, 1)
        step = finetune_step.parallel_finetune_step(config, short.encoder_data, 1).compiled(there, graph_inputs)
        fixed = finetune_step.frozen_parts(config, short.encoder_data)
        program = step.lower(there, graph_inputs, shard_batch(users, 1), text_batch, fixed).compile()
        need.append(program.memory_analysis().temp_size_in_bytes)
    few, many, at_once = need
    assert 10 * (many - few) < at_once - few


# --- whole runs ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tables(tmp_path_factory) -> Path:
    return write_tables(tmp_path_factory.mktemp("tables"), n_users=40, n_items=20)


def run_of(tables: Path, cache: Path) -> Config:
    config = config_of(cache, finetune_texts_per_step=8)
    train = dataclasses.replace(
        config.train, max_steps=10, eval_every=4, patience=100, refit="valid", learning_rate=0.02
    )
    data = dataclasses.replace(config.data, name="tables", path=str(tables))
    return dataclasses.replace(config, data=data, train=train)


@pytest.fixture(scope="module")
def finished(tables, cache, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("finished") / "run"
    trainer.run_training(run_of(tables, cache), workdir)
    return workdir


def ask_to_stop(patch: pytest.MonkeyPatch, owner: object, name: str, call: int) -> None:
    """A real SIGTERM as the loop calls one of its functions for the call-th time."""
    real, calls = getattr(owner, name), itertools.count(1)

    def asking(*arguments, **settings):
        if next(calls) == call:
            signal.raise_signal(signal.SIGTERM)
        return real(*arguments, **settings)

    patch.setattr(owner, name, asking)


def test_a_run_asked_to_stop_ends_as_if_never_stopped(tables, cache, tmp_path, finished):
    config = run_of(tables, cache)
    for owner, name, call, kept in (
        (batch_sources, "batch", 3, {"select": 3}),  # before anything was encoded anew
        (batch_sources, "batch", 4, {"select": 7}),  # between two evaluations
        (finetune, "encode_all_texts", 2, {"select": 8}),
        (batch_sources, "batch", 9, {"select": 10, "refit": 7}),  # in the second phase
    ):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(signals.Stopped), signals.handle_signals():
            ask_to_stop(patch, owner, name, call)
            trainer.run_training(config, tmp_path / "run")
        folders = (tmp_path / "run").glob("*/checkpoints")
        assert {folder.parent.name: Checkpoints(folder).last_good() for folder in folders} == kept
    trainer.run_training(config, tmp_path / "run")
    assert differences(tmp_path / "run", finished) == []


def test_checkpoints_hold_adapters_apart_and_no_published_weight(finished):
    step = json.loads((finished / "results.json").read_text())["best_step"]
    leaves = json.loads((finished / "select" / "checkpoints" / str(step) / RECORD).read_text())["leaves"]
    of_encoder = {name for name in leaves if "encoder" in name.split("/") or name.startswith("said/")}
    assert {name.split("/")[-1] for name in of_encoder} == {"down", "up"}
    assert any(name.startswith("params/encoder/") for name in leaves)
    assert max(np.prod(leaves[name]["shape"]) for name in of_encoder) < 32 * 32


@pytest.mark.parametrize("part", ["valid", "test"])
def test_a_loaded_run_ranks_as_it_was_measured(finished, part):
    config, prepared, state = load_measured(finished, part)
    results = json.loads((finished / "results.json").read_text())
    measured = evaluate_mean(prepared, scorer(config, prepared, state), part)
    assert {name: measured[name] for name in results[part]} == results[part]
    assert fr.load(finished).recommend(["C0001"], 4).num_rows == 4


def test_a_loaded_run_encodes_its_texts_once(finished, monkeypatch):
    load(finished)
    reached: list[str] = []
    nothing = np.zeros(0, np.int32), ()
    monkeypatch.setattr(embed_module, "_encode_all", lambda texts, *_: reached.extend(texts) or nothing)
    load(finished)
    assert reached == []


# --- settings ------------------------------------------------------------------------------------------------------


def test_what_makes_no_sense_is_refused(cache):
    with pytest.raises(ValueError, match=r"text\.finetune is 'lora'; it must be frozen where model\.variant is graph"):
        from_dict({"text": {"finetune": "lora"}, "model": {"variant": "graph"}})
    with pytest.raises(ValueError, match=r"text\.finetune is 'full'; it must be frozen where text\.features is random"):
        from_dict({"text": {"finetune": "full", "features": "random"}})
    isolated = make_synthetic(0, n_users=30, n_items=20)
    tables = {name: getattr(isolated, name).drop_columns("text") for name in ("users", "items")}
    isolated = dataclasses.replace(isolated, **tables, reviews=empty_reviews())
    config = config_of(cache)
    with pytest.raises(
        ValueError, match=r"text\.finetune is 'lora', and these tables have no texts; it must be frozen"
    ):
        prepare(config, isolated, split(isolated, config.split))


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_of_a_joint_config_is_a_config(cache, name):
    config = variant(config_of(cache), name)
    frozen = config.model.variant == "graph" or name in ("random_text", "sampled", "alpharec")
    assert config.text.finetune == ("frozen" if frozen else "lora")


def test_the_variant_lora():
    assert variant(Config(), "lora").text == dataclasses.replace(Config().text, finetune="lora")
    assert VARIANTS["lora"].needs == ("text",)
