"""The training step: the same on any number of devices, compiled once, and it learns."""

import dataclasses
import functools
import logging
import os
import re
import subprocess
import sys
import typing
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from jax.sharding import Mesh, PartitionSpec

from fused_rec import kernels
from fused_rec.config import (
    ComputeDtype,
    Config,
    DataConfig,
    GraphConfig,
    Loss,
    ModelConfig,
    SplitConfig,
    TextConfig,
    TrainConfig,
    Variant,
)
from fused_rec.data.batches import Batch, batch, steps_per_epoch, user_items
from fused_rec.distributed.devices import AXIS, pmap_over_devices
from fused_rec.graph.adjacency import Backend, shard_adjacency
from fused_rec.graph.build import bidirectional_edges
from fused_rec.graph.device_graph import device_graph
from fused_rec.graph.hetero import hetero_graph
from fused_rec.graph.schema import INTERACTED_BY, INTERACTS, ITEM, NO_TEXT_DIM, USER
from fused_rec.model.model import Branch, item_degree
from fused_rec.training import footprint, sharding
from fused_rec.training import train_step as step_module
from fused_rec.training.sharding import (
    gather_state,
    graph_inputs_axes,
    parallel_train_step,
    shard_batch,
    shard_graph_inputs,
    shard_state,
)
from fused_rec.training.train_step import (
    GraphInputs,
    TrainState,
    compile_key,
    embed_nodes,
    init,
    make_optimizer,
    sharding_axes,
    train_step,
)

# Six users hold something: batches of five, then of one; five go to two or four devices only with padding.
BATCH_USERS = 5
PRESENT = np.array([True] * 5 + [False])  # item 5 is held by nobody and does not exist while training
HELD = user_items(tiny.HOLDER, tiny.HELD, tiny.COUNTS["user"], PRESENT)


def config_of(variant: Variant = "fused", loss: Loss = "softmax", **train) -> Config:
    return Config(
        model=ModelConfig(
            variant=variant,
            dim=3,
            num_layers=1,
            edge_dropout=0.2,
            id_embedding_dropout=0.2,
            id_init_std=1.0,
        ),
        train=TrainConfig(loss=loss, batch_size=BATCH_USERS, positives_per_user=2, num_negatives=2, **train),
    )


def of_model(config: Config, **model) -> Config:
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **model))


def of_training(config: Config, **train) -> Config:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **train))


def task_of(backend: Backend | None = None) -> GraphInputs:
    """The tiny market with its holdings and nearest texts alone: more relations take only more time to compile."""
    counts = {name: tiny.COUNTS[name] for name in (USER, ITEM)}
    relations = {
        r: edges for r, edges in tiny.relations(tiny.words()).items() if r in (INTERACTS, INTERACTED_BY, tiny.SIMILAR)
    }
    graph = hetero_graph(counts, relations, tiny.words()[:13])
    whole = device_graph(graph, backend)
    return GraphInputs(whole, jnp.asarray(PRESENT), item_degree(whole))


def batch_of(step: int) -> Batch:
    return batch(HELD, step, seed=0, batch_size=BATCH_USERS, positives_per_user=2, num_negatives=2)


def start(config) -> TrainState:
    """What `init` returns, for the optimizer that a test may have put in the place of AdamW."""
    state = jax.tree.map(jnp.asarray, init(config, task_of()))
    return dataclasses.replace(state, opt_state=step_module.make_optimizer(config.train).init(state.params))


def trained(step, config, devices, steps):
    """Losses of all steps and the last parameters."""
    graph_inputs, state, whole = (
        shard_graph_inputs(task_of(), devices),
        shard_state(start(config), devices),
        start(config),
    )
    losses = []
    for number in range(steps):
        state, metrics = step(state, graph_inputs, batch_of(number))
        losses.append(metrics["loss"])
    assert int(state.step) == steps
    return np.array(losses), gather_state(state, whole, devices).params


def test_the_batches_are_uneven():
    assert steps_per_epoch(HELD, BATCH_USERS) == 2
    assert [int(batch_of(step).mask.any(axis=1).sum()) for step in range(4)] == [5, 1, 5, 1]


# --- bfloat16 ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", typing.get_args(Loss))
def test_a_step_in_bfloat16_is_nearly_the_same_and_keeps_float32(loss):
    """Its gradient, read off one step of descent, points where that of float32 does, within bfloat16's 8 bits."""
    moved = {}
    for compute in typing.get_args(ComputeDtype):
        config = of_model(config_of("fused", loss, temperature=1.0, compute_dtype=compute), edge_dropout=0.0)
        before, graph_inputs = start(config), shard_graph_inputs(task_of(), 1)
        state, metrics = parallel_train_step(config, 1)(shard_state(before, 1), graph_inputs, batch_of(0))
        after = gather_state(state, start(config), 1)
        assert {leaf.dtype for leaf in jax.tree.leaves((after.params, after.opt_state))} <= {
            np.dtype(np.float32),
            np.dtype(np.int32),
        }
        means = [leaf.mu for leaf in after.opt_state if hasattr(leaf, "mu")]
        moved[compute] = float(metrics["loss"]), jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(means)])
    (value, slope), (narrow_value, narrow_slope) = (moved[compute] for compute in typing.get_args(ComputeDtype))
    assert narrow_value != value
    assert narrow_value == pytest.approx(value, rel=0.01)
    cosine = slope @ narrow_slope / jnp.linalg.norm(slope) / jnp.linalg.norm(narrow_slope)
    assert cosine > 0.999


def test_what_is_ranked_is_float32_however_a_step_computes():
    config = config_of(compute_dtype="bfloat16")
    text = jax.jit(embed_nodes, static_argnums=0).lower(config, start(config).params, task_of()).as_text()
    assert "bf16" not in text
    step = parallel_train_step(config, 1).compiled(shard_state(start(config), 1), shard_graph_inputs(task_of(), 1))
    batch_there = shard_batch(batch_of(0), 1)
    assert "bf16" in step.lower(shard_state(start(config), 1), shard_graph_inputs(task_of(), 1), batch_there).as_text()


# --- devices -------------------------------------------------------------------------------------------------------

# A variant changes the vectors and a loss what is done with them, so each is paired once.
PAIRS = [("fused", loss) for loss in typing.get_args(Loss)] + [("graph", "softmax"), ("text", "softmax")]


@pytest.mark.parametrize(("variant", "loss"), PAIRS)
def test_any_number_of_devices_gives_the_same(variant, loss, monkeypatch):
    """Plain gradient descent: Adam divides a gradient by its size, and hides one that is twice too large.

    Long vectors and soft scores keep the descent smooth, so that rounding does not grow from step to step.
    """
    monkeypatch.setattr(step_module, "make_optimizer", lambda config: optax.sgd(config.learning_rate))
    sharding._mapped_step.cache_clear()  # of programs with another optimiser
    config = config_of(variant, loss, learning_rate=0.02, temperature=1.0)
    results = []
    for devices in (1, 2, 4) if jax.device_count() == 4 else (1, jax.device_count()):
        results.append(trained(parallel_train_step(config, devices), config, devices, 50))
    alone, params = results[0]
    sharding._mapped_step.cache_clear()
    for name, branch in params.items():  # none stayed where it was
        moved = jax.tree.map(lambda after, before: np.abs(after - before).max(), branch, start(config).params[name])
        assert max(jax.tree.leaves(moved)) > 0.01, name
    for losses, others in results[1:]:
        np.testing.assert_allclose(losses, alone, rtol=1e-5)
        for (path, one), other in zip(jax.tree.leaves_with_path(params), jax.tree.leaves(others), strict=True):
            np.testing.assert_allclose(other, one, rtol=1e-5, atol=1e-6, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("devices", [1, 2])
def test_the_norm_is_of_the_gradient_of_all_parameters(devices, monkeypatch):
    """A step of descent at rate 1 moves the parameters by it; shared rows count once, divided rows on their device."""
    monkeypatch.setattr(step_module, "make_optimizer", lambda config: optax.sgd(1.0))
    sharding._mapped_step.cache_clear()
    config = config_of(temperature=1.0)
    before, graph_inputs = start(config), shard_graph_inputs(task_of(), devices)
    state, metrics = parallel_train_step(config, devices)(shard_state(before, devices), graph_inputs, batch_of(0))
    sharding._mapped_step.cache_clear()
    moved = jax.tree.map(np.subtract, gather_state(state, start(config), devices).params, start(config).params)
    norm = np.sqrt(sum(np.square(leaf).sum() for leaf in jax.tree.leaves(moved)))
    assert metrics["gradient_norm"] == pytest.approx(norm, rel=1e-4)


def step_program(users: int, devices: int, learned: bool):
    """The compiled step over 16 items, and its estimate; no size but the number of users is as large.

    Either LightGCN's, or that of a graph with learned gates and layer weights and items with text.
    """
    items, config = 16, of_model(config_of("fused" if learned else "graph", "bpr"), dim=64, num_layers=3)
    config = of_model(config, edge_dropout=0.0, id_embedding_dropout=0.0)
    if not learned:
        config = of_model(config, layer_combination="mean", relation_gates=False)
    counts = {USER: users, ITEM: items}
    pairs = np.repeat(np.arange(users), 2), np.arange(2 * users) % items
    relations = bidirectional_edges(INTERACTS, INTERACTED_BY, *pairs, counts)
    text = np.zeros((users + items, 2 if learned else NO_TEXT_DIM), np.float32)
    text[users:] = float(learned)
    whole = device_graph(hetero_graph(counts, relations, text))
    graph_inputs = GraphInputs(whole, np.ones(items, bool), np.ones(items, np.float32))
    given = shard_state(init(config, graph_inputs), devices), shard_graph_inputs(graph_inputs, devices)
    step = parallel_train_step(config, devices).compiled(*given)
    estimate = footprint.state_bytes(config, whole, devices) + footprint.backward_bytes(config, whole, devices)
    estimate += footprint.EDGE * 4 * users // devices
    return step.lower(*given, shard_batch(batch_of(0), devices)).compile(), estimate


def bytes_of_user(devices: int, learned: bool):
    """Bytes of a user on each device, of the compiled step and by the estimate; and the larger one of two steps."""
    built = [step_program(users, devices, learned) for users in (1_004, 2_012)]
    programs, estimates = zip(*built, strict=True)
    analyses = [program.memory_analysis() for program in programs]
    sizes = [found.argument_size_in_bytes + found.temp_size_in_bytes for found in analyses]
    return (sizes[1] - sizes[0]) / 1_008, (estimates[1] - estimates[0]) / 1_008, programs[1]


def test_users_stay_on_their_devices():
    """The bytes of a user on each device fall as one over the devices, and no array has a row for each user."""
    of_user = []
    for devices in (1, 2, 4):
        found, estimate, program = bytes_of_user(devices, learned=False)
        of_user.append(found)
        assert estimate == pytest.approx(found, rel=0.2)
        rows = re.findall(r"f32\[(\d+),64\]", program.as_text())
        assert max(map(int, rows)) == 2_012 // devices
    assert of_user[2] == pytest.approx(of_user[1] / 2, rel=0.05)
    assert of_user[0] < 4 * of_user[2]  # one device sums into the batch's users only in the last layer


def test_the_estimate_is_the_memory_of_learned_layers():
    found, estimate, _ = bytes_of_user(1, learned=True)
    assert estimate == pytest.approx(found, rel=0.2)


def test_so_do_eight():
    """As many as a host may have, and more than four of which a child process is made."""
    test = f"{__file__}::test_any_number_of_devices_gives_the_same"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "fused", test]
    done = subprocess.run(
        command, env=os.environ | {"JAX_NUM_CPU_DEVICES": "8"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{sum(variant == 'fused' for variant, _ in PAIRS)} passed" in done.stdout


def check_replication(config):
    """Traces the step under shard_map, which refuses an output that may differ between devices.

    There a divided array keeps its axis of devices, of length one, on the device.
    """
    # jaxlib's CSR product has no rule for the check
    whole, graph_inputs = start(config), shard_graph_inputs(task_of("segment"))
    arguments = shard_state(whole), graph_inputs, shard_batch(batch_of(0))
    at = sharding_axes(whole), graph_inputs_axes(graph_inputs), 0

    def step(*arguments):
        state, metrics = train_step(config, *each(lambda axis, x: jnp.squeeze(x, axis), at, arguments))
        return each(jnp.expand_dims, at[0], state, swap=True), metrics

    def each(function, axes, tree, swap=False):
        def leaf(axis, x):
            return x if axis is None else function(x, axis) if swap else function(axis, x)

        return jax.tree.map(
            lambda axis, part: jax.tree.map(functools.partial(leaf, axis), part),
            axes,
            tree,
            is_leaf=lambda axis: axis is None,
        )

    def specs(axes):
        return jax.tree.map(
            lambda axis: PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, AXIS),
            axes,
            is_leaf=lambda axis: axis is None,
        )

    mesh = Mesh(np.array(jax.devices()), (AXIS,))
    out_specs = specs(at[0]), PartitionSpec()
    mapped = jax.shard_map(step, mesh=mesh, in_specs=specs(at), out_specs=out_specs, check_vma=True)
    return arguments[0], jax.eval_shape(mapped, *arguments)


@pytest.mark.parametrize(("variant", "loss"), PAIRS)
def test_what_comes_out_is_the_same_on_every_device(variant, loss):
    before, (after, metrics) = check_replication(config_of(variant, loss))
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, before)
    assert {"loss", "gradient_norm"} <= metrics.keys() and {value.shape for value in metrics.values()} == {()}


@pytest.mark.parametrize("forgotten", ["loss", "gradient", "both"])
def test_a_forgotten_sum_over_devices_is_noticed(forgotten, monkeypatch):
    psum = jax.lax.psum

    def forgetful(x, axis):
        if not isinstance(x, tuple):
            return psum(x, axis)  # the count
        loss, gradient = x
        return (
            loss if forgotten in ("loss", "both") else psum(loss, axis),
            gradient if forgotten in ("gradient", "both") else psum(gradient, axis),
        )

    monkeypatch.setattr(jax.lax, "psum", forgetful)
    with pytest.raises(ValueError, match=r"out_specs|varying|replicat"):
        check_replication(config_of())


def test_split_batch_by_hand():
    whole = Batch(
        users=np.array([7, 8, 9], np.int32),
        items=np.array([[1, 2], [3, 4], [5, 6]], np.int32),
        mask=np.array([[1, 1], [1, 0], [1, 1]], np.float32),
        negatives=np.array([[1], [2], [3]], np.int32),
    )
    two = shard_batch(whole, 2)
    assert two.users.tolist() == [[7, 8], [9, 0]]
    assert two.items.tolist() == [[[1, 2], [3, 4]], [[5, 6], [0, 0]]]
    assert two.mask.tolist() == [[[1, 1], [1, 0]], [[1, 1], [0, 0]]]
    assert two.negatives.tolist() == [[[1], [2]], [[3], [-1]]]  # -1: none of the negatives that devices share
    assert shard_batch(whole._replace(negatives=whole.negatives[:, :0]), 2).negatives.shape == (2, 2, 0)
    for part, same in zip(shard_batch(whole, 3), whole, strict=True):
        np.testing.assert_array_equal(part[:, 0], same)
    assert shard_batch(whole, 4).users.tolist() == [[7], [8], [9], [0]]


@pytest.mark.parametrize("absent", range(6))
def test_arguments_keep_their_axes_beside_absent_ones(absent):
    """Also where arguments without leaves are as many as the leaves that another one has beyond one."""

    def shapes(_, rows, whole):
        return rows.users[None] + whole, rows.mask

    axes, batch_there = ((None,) * absent, 0, None), shard_batch(batch_of(0), 2)
    mapped = pmap_over_devices(shapes, 2, in_axes=axes, out_axes=(0, 0))
    found, mask = mapped((None,) * absent, batch_there, jnp.int32(1))
    assert found.shape == (2, 1, 3) and mask.shape == batch_there.mask.shape
    np.testing.assert_array_equal(found[:, 0], batch_there.users + 1)


@pytest.mark.parametrize("devices", [None, 1, 2, 4])
def test_devices_share_id_rows_and_have_the_rest_whole(devices):
    whole, count = start(LEARNING), len(jax.devices()[:devices])
    state = shard_state(whole, devices)
    for (path, leaf), original in zip(jax.tree.leaves_with_path(state), jax.tree.leaves(whole), strict=True):
        if "id_" in jax.tree_util.keystr(path):
            assert leaf.shape == (count, -(-len(original) // count), *original.shape[1:])
            for row in range(len(original)):
                np.testing.assert_array_equal(leaf[row % count, row // count], original[row])
            assert [len(shard.data) for shard in leaf.addressable_shards] == [1] * count
        else:
            assert leaf.sharding.is_fully_replicated
            np.testing.assert_array_equal(leaf, original)
        assert leaf.sharding.device_set == set(jax.devices()[:devices])
    jax.tree.map(np.testing.assert_array_equal, gather_state(state, whole, devices), whole)


@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize("by_sender", [False, True])
def test_devices_share_the_edges(count, by_sender):
    """Together they have every edge once, each where its receiver's or its sender's row is."""
    for relation, adjacency in task_of().graph.adjacencies.items():
        found, degrees = [], adjacency.degrees
        shards = shard_adjacency(adjacency, count, None, by_sender)
        for device, own in enumerate(shards):
            real = own.weight != 0
            assert len(real) == len(shards[0].weight)
            senders, receivers = own.senders[real], own.receivers[real]
            if by_sender:
                senders = senders * count + device
            else:
                receivers = receivers * count + device
            found += zip(senders.tolist(), receivers.tolist(), own.weight[real].tolist(), strict=True)
            log_out = degrees.log_out_degree[device::count] if by_sender else degrees.log_out_degree
            for whole, part in ((degrees.in_degree[device::count], own.degrees.in_degree), (log_out, own.degrees[2])):
                np.testing.assert_array_equal(part[: len(whole)], whole)
                assert not part[len(whole) :].any()
            assert (np.diff(own.receivers) >= 0).all()
            assert (np.diff(own.senders[own.by_sender]) >= 0).all()
            assert own.receiver_start[-1] == own.sender_start[-1] == real.sum()
            assert own.receivers[~real].tolist() == [len(own.receiver_start) - 1] * (~real).sum()
        edges = zip(adjacency.senders.tolist(), adjacency.receivers.tolist(), adjacency.weight.tolist(), strict=True)
        assert sorted(found) == sorted(edges), relation


# --- learning ------------------------------------------------------------------------------------------------------


LEARNING = config_of(learning_rate=0.05)


@pytest.fixture(scope="module")
def learner():
    """A step over all devices after its first call, and a list as long as the number of its traces."""
    traces = []
    sharding._mapped_step.cache_clear()  # of steps whose traces nobody counts

    def counted(*arguments):
        traces.append(1)
        return train_step(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fused_rec.training.sharding.train_step", counted)
        step = parallel_train_step(LEARNING)
        trained(step, LEARNING, None, 1)
    return step, traces


def test_it_compiles_once(learner, caplog):
    step, traces = learner
    with jax.log_compiles(), caplog.at_level(logging.WARNING, "jax"):
        trained(step, LEARNING, None, 5)
        messages = [record.getMessage() for record in caplog.records]
        jax.jit(lambda x: x + 1)(1)  # proof that a compilation would have been seen
        assert len(caplog.records) > len(messages)
        caplog.clear()
    assert len(traces) == 1
    assert not [message for message in messages if message.startswith("Finished XLA compilation")]


def test_it_learns_and_repeats_itself(learner):
    step, _ = learner
    losses, params = trained(step, LEARNING, None, 50)
    assert np.isfinite(losses).all()
    # Even steps see five users, odd steps one; each kind gets better.
    assert losses[40::2].mean() < 0.8 * losses[:10:2].mean()
    assert losses[41::2].mean() < 0.8 * losses[1:11:2].mean()

    again, same = trained(step, LEARNING, None, 50)
    np.testing.assert_array_equal(again, losses)
    jax.tree.map(np.testing.assert_array_equal, same, params)


def test_one_step_lowers_the_loss_of_its_batch(learner):
    """Seen again at step 0, so that dropout leaves out the same rows."""
    step, _ = learner
    graph_inputs, state = shard_graph_inputs(task_of()), shard_state(start(LEARNING))
    state, before = step(state, graph_inputs, batch_of(0))
    state, after = step(dataclasses.replace(state, step=shard_state(jnp.int32(0))), graph_inputs, batch_of(0))
    assert float(after["loss"]) < float(before["loss"])


def test_dropout_follows_the_step(learner):
    """The same state and batch at another step lose other id rows."""
    step, _ = learner
    losses = []
    for number in (0, 1, 2):
        state = dataclasses.replace(start(LEARNING), step=jnp.int32(number))
        graph_inputs, state = shard_graph_inputs(task_of()), shard_state(state)
        losses.append(float(step(state, graph_inputs, batch_of(0))[1]["loss"]))
    assert len(set(losses)) == 3


def test_the_state_that_goes_in_is_given_up(learner):
    step, _ = learner
    graph_inputs, state = shard_graph_inputs(task_of()), shard_state(start(LEARNING))
    step(state, graph_inputs, batch_of(0))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(graph_inputs))


def test_a_start_is_a_function_of_the_seed():
    graph_inputs = task_of()
    state = jax.eval_shape(functools.partial(init, LEARNING), graph_inputs)
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, start(LEARNING))
    one, same, other = (
        jax.tree.leaves(jax.jit(init, static_argnums=0)(config_of("text", seed=seed), graph_inputs))
        for seed in (0, 0, 1)
    )
    for mine, again in zip(one, same, strict=True):
        np.testing.assert_array_equal(mine, again)
    assert any(not np.array_equal(mine, theirs) for mine, theirs in zip(one, other, strict=True))


def test_only_matrices_decay():
    params = {"matrix": jnp.ones((2, 2)), "vector": jnp.ones(2)}
    adamw = make_optimizer(TrainConfig(learning_rate=0.5, weight_decay=0.1))
    no_slope = jax.tree.map(jnp.zeros_like, params)
    updates: Any = adamw.update(no_slope, adamw.init(params), params)[0]
    assert updates["vector"].tolist() == [0, 0]
    np.testing.assert_allclose(updates["matrix"], np.full((2, 2), -0.05), rtol=1e-6)  # -rate * decay * 1


def test_large_moments_are_those_of_adamw(monkeypatch):
    config = TrainConfig(learning_rate=0.1, weight_decay=0.01)
    rng, shape = np.random.default_rng(0), (512, 1024)
    params, gradient = (jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(2))
    usual = optax.adamw(config.learning_rate, weight_decay=config.weight_decay)
    results = []
    for own, large in ((usual, 0), (make_optimizer(config), 2**40), (make_optimizer(config), 1)):
        monkeypatch.setattr(step_module, "LARGE_LEAF", large)

        def update(params, state, gradient, own=own):
            updates, state = own.update(jnp.sin(gradient), state, params)
            return optax.apply_updates(params, updates), state

        step = jax.jit(update, donate_argnums=(0, 1))
        after, state = jnp.copy(params), own.init(params)
        for _ in range(3):
            after, state = step(after, state, gradient)
        results.append((after, *jax.tree.leaves(state)))
    for found in results[1:]:
        for one, same in zip(found, results[0], strict=True):
            np.testing.assert_allclose(one, same, rtol=1e-6)


@pytest.mark.skipif(not kernels.usable(), reason="no kernel was compiled here")
def test_embed_leaves_nothing_out():
    config = config_of()
    graph_inputs, params = task_of(), start(config).params
    vectors = jax.jit(embed_nodes, static_argnums=0)
    for one, same, count in zip(
        vectors(config, params, graph_inputs), vectors(config, params, graph_inputs), (7, 6), strict=True
    ):
        assert one.shape == (count, 3 + 3 + 1)  # two branches and the popularity
        np.testing.assert_array_equal(one, same)


def test_no_step_receives_late_fusion():
    graph_inputs = task_of()
    losses = []
    for given in (graph_inputs, dataclasses.replace(graph_inputs, fusion=tiny.late_fusion())):
        step = parallel_train_step(config_of(), 1)
        state, metrics = step(shard_state(start(config_of()), 1), shard_graph_inputs(given, 1), batch_of(0))
        losses.append((float(metrics["loss"]), jax.device_get(state.params)))
    jax.tree.map(np.testing.assert_array_equal, *losses)


# --- seeds ---------------------------------------------------------------------------------------------------------


OTHER = of_training(LEARNING, seed=1)
SAME_PROGRAM = [
    of_training(LEARNING, seed=1, max_steps=7, eval_every=3, patience=9, refit="valid"),
    dataclasses.replace(
        LEARNING,
        data=DataConfig(name="lastfm", seed=2),
        split=SplitConfig(kind="time"),
        text=TextConfig(features="shuffled", tfidf_dim=0),
        graph=GraphConfig(social_edges="rewired"),
    ),
]


@pytest.mark.parametrize("config", SAME_PROGRAM, ids=["training", "other sections"])
def test_what_a_step_does_not_depend_on_makes_no_other_program(config):
    assert config != LEARNING
    assert compile_key(config) == compile_key(LEARNING)


@pytest.mark.parametrize(
    "config",
    [
        of_model(LEARNING, variant="text"),
        of_model(LEARNING, dim=4),
        of_model(LEARNING, popularity_weight=1.0),
        of_training(LEARNING, loss="bpr"),
        of_training(LEARNING, temperature=1.0),
        of_training(LEARNING, learning_rate=0.1),
        of_training(LEARNING, weight_decay=0.0),
        of_training(LEARNING, compute_dtype="bfloat16"),
    ],
)
def test_what_a_step_depends_on_makes_another_program(config):
    kept = compile_key(config)
    assert kept != compile_key(LEARNING)
    assert kept.model == config.model
    for name in ("loss", "temperature", "learning_rate", "weight_decay"):
        assert getattr(kept.train, name) == getattr(config.train, name)


def test_two_seeds_share_one_compilation(learner, caplog):
    step, traces = learner
    with jax.log_compiles(), caplog.at_level(logging.WARNING, "jax"):
        trained(step, OTHER, None, 5)
        messages = [record.getMessage() for record in caplog.records]
    assert len(traces) == 1
    assert not [message for message in messages if message.startswith("Finished XLA compilation")]


def test_one_program_initializes_every_seed_and_setting_of_training(learner, caplog):
    first = start(LEARNING)
    with jax.log_compiles(), caplog.at_level(logging.WARNING, "jax"):
        same = start(of_training(LEARNING, loss="bpr", learning_rate=0.5, weight_decay=0.0, temperature=1.0))
        other = start(OTHER)
        messages = [record.getMessage() for record in caplog.records]
    assert not [message for message in messages if message.startswith("Finished XLA compilation")]
    jax.tree.map(np.testing.assert_array_equal, same, first)
    assert (first.seed, other.seed) == (0, 1)
    assert not np.array_equal(first.params["main"]["id_item"], other.params["main"]["id_item"])


def test_another_seed_is_another_run_and_the_same_each_time(learner):
    """Whichever seed the program was compiled for."""
    step, _ = learner
    losses, params = trained(step, LEARNING, None, 6)
    others, other_params = trained(step, OTHER, None, 6)
    assert (losses != others).all()
    assert not np.array_equal(params["main"]["id_item"], other_params["main"]["id_item"])
    sharding._mapped_step.cache_clear()
    again, same = trained(parallel_train_step(OTHER), OTHER, None, 6)
    sharding._mapped_step.cache_clear()
    np.testing.assert_array_equal(again, others)
    jax.tree.map(np.testing.assert_array_equal, same, other_params)


def test_dropout_follows_the_seed(learner):
    """The same state and batch with another seed lose other id rows; the seed stays with the state."""
    step, _ = learner
    losses = []
    for seed in (0, 1, 2, 0):
        state = dataclasses.replace(start(LEARNING), seed=jnp.int32(seed))
        graph_inputs, state = shard_graph_inputs(task_of()), shard_state(state)
        state, metrics = step(state, graph_inputs, batch_of(0))
        assert int(state.seed) == seed
        losses.append(float(metrics["loss"]))
    assert len(set(losses)) == 3
    assert losses[3] == losses[0]


# --- two branches and how popular an item is ----------------------------------------------------------------------


COUNT = np.array([3, 2, 2, 2, 3, 0])  # holders of each item


def test_popularity_alone_is_how_often_each_item_is_held():
    """Branches of zeros score zero. One is added to each count, so that items without users have a logarithm."""
    config = of_model(config_of(temperature=0.4), popularity_weight=1.0)
    graph_inputs, params = task_of(), jax.tree.map(jnp.zeros_like, start(config).params)
    for weight, odds in ((1.0, COUNT + 1), (0.5, np.sqrt(COUNT + 1)), (2.0, (COUNT + 1) ** 2), (0.0, np.ones(6))):
        config = of_model(config, popularity_weight=weight)
        users, items = jax.jit(embed_nodes, static_argnums=0)(config, params, graph_inputs)
        shares = jax.nn.softmax(users @ items.T / 0.4, axis=1)
        np.testing.assert_allclose(shares, np.tile(odds / odds.sum(), (7, 1)), rtol=1e-5)


def test_without_popularity_the_branches_alone_score():
    config = of_model(config_of(), popularity_weight=0.0)
    params, graph_inputs = start(config).params, task_of()
    users, items = jax.jit(embed_nodes, static_argnums=0)(config, params, graph_inputs)
    assert (users.shape, items.shape) == ((7, 6), (6, 6))
    more_users, more_items = jax.jit(embed_nodes, static_argnums=0)(
        of_model(config, popularity_weight=2.0), params, graph_inputs
    )
    more = more_users @ more_items.T - users @ items.T
    expected = 2 * config.train.temperature * np.log1p(COUNT)
    np.testing.assert_allclose(more, np.tile(expected, (7, 1)), atol=1e-5)


def branch_loss(vectors, config, drawn: Batch) -> float:
    """Softmax over the items that somebody holds; a user's mean over positives, weighed by the root of their number."""
    users, items = map(np.asarray, vectors)
    logits = users @ items.T / config.train.temperature + config.model.popularity_weight * np.log1p(COUNT)
    logits[:, 5] = -np.inf
    of_softmax = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    total = weights = 0.0
    for user, held, mask in zip(drawn.users, drawn.items, drawn.mask, strict=True):
        count = int(mask.sum())
        if count:
            total += np.sqrt(count) * -np.mean([of_softmax[user, item] for item in held[:count]])
            weights += np.sqrt(count)
    return total / weights


TWO = of_model(config_of(), id_embedding_dropout=0.0, edge_dropout=0.0)


@pytest.fixture(scope="module")
def two_branches():
    return parallel_train_step(TWO, 2)


def one_step(step, params):
    state = dataclasses.replace(start(TWO), params=jax.tree.map(jnp.array, params))
    divided, metrics = step(shard_state(state, 2), shard_graph_inputs(task_of(), 2), batch_of(0))
    return gather_state(divided, state, 2).params, jax.device_get(metrics)


def test_the_loss_is_the_sum_of_the_branches_own(two_branches):
    params, graph_inputs = start(TWO).params, task_of()
    assert set(params) == {"main", "words"}
    own = []
    for name, variant in (("main", "fused"), ("words", "text")):
        branch: Any = Branch(dataclasses.replace(TWO.model, variant=variant))
        vectors = jax.jit(branch.apply)({"params": params[name]}, graph_inputs.graph)
        own.append(branch_loss(vectors, TWO, batch_of(0)))
    assert abs(own[0] - own[1]) > 0.01
    metrics = one_step(two_branches, params)[1]
    expected = {"loss": sum(own), "loss/graph_branch": own[0], "loss/text_branch": own[1]}
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("variant", "branches"),
    [("graph", {"graph_branch"}), ("text", {"text_branch"}), ("fused", {"graph_branch", "text_branch"})],
)
def test_losses_are_named_by_their_branch(variant, branches):
    config = config_of(variant)
    step, graph_inputs = parallel_train_step(config, 1), shard_graph_inputs(task_of(), 1)
    metrics = jax.eval_shape(lambda state: step(state, graph_inputs, batch_of(0))[1], shard_state(start(config), 1))
    assert metrics.keys() == {"loss", "gradient_norm", *(f"loss/{name}" for name in branches)}


def test_a_branch_learns_from_its_own_loss_alone(two_branches):
    """Whatever the other branch; both learn."""
    one, other = start(TWO).params, start(of_training(TWO, seed=1)).params
    both, _ = one_step(two_branches, one)
    mixed, _ = one_step(two_branches, {"main": other["main"], "words": one["words"]})
    jax.tree.map(np.testing.assert_array_equal, mixed["words"], both["words"])
    mixed, _ = one_step(two_branches, {"main": one["main"], "words": other["words"]})
    jax.tree.map(np.testing.assert_array_equal, mixed["main"], both["main"])
    for branch, name in (("main", "id_user"), ("words", "text_item")):
        before, after = (jax.tree.leaves(params[branch][name])[0] for params in (one, both))
        assert np.abs(after - before).max() > 1e-3


def test_large_moments_are_not_copied(monkeypatch):
    # The last test of the file: it clears the compiled steps that others share.
    plain = {"relation_gates": False, "layer_combination": "mean", "popularity_weight": 0.0}  # as LightGCN has it
    config = of_model(config_of("graph", "bpr"), dim=2048, edge_dropout=0.0, id_embedding_dropout=0.0, **plain)
    state, graph_inputs = shard_state(init(config, task_of()), 1), shard_graph_inputs(task_of(), 1)
    need = []
    for large in (2**40, 1):
        monkeypatch.setattr(step_module, "LARGE_LEAF", large)
        sharding._mapped_step.cache_clear()
        program = parallel_train_step(config, 1).compiled(state, graph_inputs)
        lowered = program.lower(state, graph_inputs, sharding.shard_batch(batch_of(0), 1))
        need.append(lowered.compile().memory_analysis().temp_size_in_bytes)
    sharding._mapped_step.cache_clear()
    assert need[1] < need[0]
