"""The training step: the same on any number of devices, compiled once, and it learns."""

import dataclasses
import functools
import logging
import typing
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from jax.sharding import Mesh, PartitionSpec
from tiny import quick_compilation  # noqa: F401

from fused_rec.config import Config, Loss, ModelConfig, TrainConfig, Variant
from fused_rec.data.batches import Batch, batch, holdings, steps_per_epoch
from fused_rec.graph.build import HELD_BY, HOLDS, ITEM, USER
from fused_rec.graph.hetero import hetero_graph
from fused_rec.graph.propagate import Backend, adjacencies
from fused_rec.train import step as step_module
from fused_rec.train.parallel import parallel_step, replicate, split_batch
from fused_rec.train.step import AXIS, Task, TrainState, embed, init, optimiser, train_step

# Six users hold something: batches of five, then of one; five go to two or four devices only with padding.
BATCH_USERS = 5
PRESENT = np.array([True] * 5 + [False])  # item 5 is held by nobody and does not exist while training
HELD = holdings(tiny.HOLDER, tiny.HELD, tiny.COUNTS["user"], PRESENT)


def config_of(variant: Variant = "fused", loss: Loss = "softmax", **train) -> Config:
    return Config(
        model=ModelConfig(
            variant=variant, dim=3, rounds=1, affinity=True, holding_dropout=0.2, id_dropout=0.2, id_scale=1.0
        ),
        train=TrainConfig(loss=loss, batch_users=BATCH_USERS, positives=2, negatives=2, **train),
    )


def task_of(backend: Backend = "csr") -> Task:
    """The tiny market with its holdings and nearest texts alone: more relations take only more time to compile."""
    counts = {name: tiny.COUNTS[name] for name in (USER, ITEM)}
    relations = {r: edges for r, edges in tiny.relations(tiny.words()).items() if r in (HOLDS, HELD_BY, tiny.SIMILAR)}
    graph = hetero_graph(counts, relations, tiny.words()[:13])
    return Task(graph, adjacencies(graph, backend), jnp.asarray(PRESENT))


def batch_of(step: int) -> Batch:
    return batch(HELD, step, seed=0, batch_users=BATCH_USERS, positives=2, negatives=2)


@functools.cache
def _params(variant, seed):
    return jax.device_get(jax.jit(init, static_argnums=0)(config_of(variant, seed=seed), task_of()).params)


def start(config) -> TrainState:
    """What `init` returns, compiled once for all losses and optimisers."""
    params = jax.tree.map(jnp.asarray, _params(config.model.variant, config.train.seed))
    return TrainState(jnp.int32(0), params, step_module.optimiser(config.train).init(params))


def trained(step, config, devices, steps):
    """Losses of all steps and the last parameters."""
    task, state = (replicate(tree, devices) for tree in (task_of(), start(config)))
    losses = []
    for number in range(steps):
        state, loss = step(state, task, batch_of(number))
        losses.append(loss)
    assert int(state.step) == steps
    return np.array(losses), jax.device_get(state.params)


def test_the_batches_are_uneven():
    assert steps_per_epoch(HELD, BATCH_USERS) == 2
    assert [int(batch_of(step).mask.any(axis=1).sum()) for step in range(4)] == [5, 1, 5, 1]


# --- devices -------------------------------------------------------------------------------------------------------

# A variant changes the vectors and a loss what is done with them, so each is paired once.
PAIRS = [("fused", loss) for loss in typing.get_args(Loss)] + [("graph", "softmax"), ("text", "softmax")]


@pytest.mark.parametrize(("variant", "loss"), PAIRS)
def test_any_number_of_devices_gives_the_same(variant, loss, monkeypatch):
    """Plain gradient descent: Adam divides a gradient by its size, and hides one that is twice too large.

    Long vectors and soft scores keep the descent smooth, so that rounding does not grow from step to step.
    """
    monkeypatch.setattr(step_module, "optimiser", lambda config: optax.sgd(config.learning_rate))
    config = config_of(variant, loss, learning_rate=0.02, temperature=1.0)
    results = []
    for devices in (1, 2, 4):
        results.append(trained(parallel_step(config, devices), config, devices, 50))
    alone, params = results[0]
    assert np.abs(params["mix"] - _params(variant, 0)["mix"]).max() > 0.003
    for losses, others in results[1:]:
        np.testing.assert_allclose(losses, alone, rtol=1e-5)
        for (path, one), other in zip(jax.tree.leaves_with_path(params), jax.tree.leaves(others), strict=True):
            np.testing.assert_allclose(other, one, rtol=1e-5, atol=1e-6, err_msg=jax.tree_util.keystr(path))


def check_replication(config):
    """Traces the step under shard_map, which refuses an output that may differ between devices."""
    mapped = jax.shard_map(
        functools.partial(train_step, config),
        mesh=Mesh(np.array(jax.devices()), (AXIS,)),
        in_specs=(PartitionSpec(), PartitionSpec(), PartitionSpec(AXIS)),
        out_specs=PartitionSpec(),
        check_vma=True,
    )
    task = task_of("segment")  # jaxlib's CSR product has no rule for the check
    state = jax.eval_shape(functools.partial(init, config), task)
    users = Batch(*(part.reshape(-1, *part.shape[2:]) for part in split_batch(batch_of(0), 4)))
    return state, jax.eval_shape(mapped, state, task, users)


@pytest.mark.parametrize(("variant", "loss"), PAIRS)
def test_what_comes_out_is_the_same_on_every_device(variant, loss):
    before, (after, value) = check_replication(config_of(variant, loss))
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, before)
    assert value.shape == ()


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
    two = split_batch(whole, 2)
    assert two.users.tolist() == [[7, 8], [9, 0]]
    assert two.items.tolist() == [[[1, 2], [3, 4]], [[5, 6], [0, 0]]]
    assert two.mask.tolist() == [[[1, 1], [1, 0]], [[1, 1], [0, 0]]]
    assert two.negatives.tolist() == [[[1], [2]], [[3], [-1]]]  # -1: none of the negatives that devices share
    for part, same in zip(split_batch(whole, 3), whole, strict=True):
        np.testing.assert_array_equal(part[:, 0], same)
    assert split_batch(whole, 4).users.tolist() == [[7], [8], [9], [0]]


def test_replicate_puts_a_whole_copy_on_each_device():
    for devices in (None, 1, 2):
        array = replicate({"x": np.arange(3)}, devices)["x"]
        assert array.sharding.is_fully_replicated
        assert array.sharding.device_set == set(jax.local_devices()[:devices])


# --- learning ------------------------------------------------------------------------------------------------------


LEARNING = config_of(learning_rate=0.05)


@pytest.fixture(scope="module")
def learner():
    """A step over all devices after its first call, and a list as long as the number of its traces."""
    traces = []

    def counted(*arguments):
        traces.append(1)
        return train_step(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fused_rec.train.parallel.train_step", counted)
        step = parallel_step(LEARNING)
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
    task, state = (replicate(tree) for tree in (task_of(), start(LEARNING)))
    state, before = step(state, task, batch_of(0))
    state, after = step(dataclasses.replace(state, step=replicate(jnp.int32(0))), task, batch_of(0))
    assert float(after) < float(before)


def test_dropout_follows_the_step(learner):
    """The same state and batch at another step lose other id rows."""
    step, _ = learner
    losses = []
    for number in (0, 1, 2):
        state = dataclasses.replace(start(LEARNING), step=jnp.int32(number))
        task, state = (replicate(tree) for tree in (task_of(), state))
        losses.append(float(step(state, task, batch_of(0))[1]))
    assert len(set(losses)) == 3


def test_the_state_that_goes_in_is_given_up(learner):
    step, _ = learner
    task, state = (replicate(tree) for tree in (task_of(), start(LEARNING)))
    step(state, task, batch_of(0))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(task))


def test_a_start_is_a_function_of_the_seed():
    task = task_of()
    state = jax.eval_shape(functools.partial(init, LEARNING), task)
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, start(LEARNING))
    one, same, other = (
        jax.tree.leaves(jax.jit(init, static_argnums=0)(config_of("text", seed=seed), task)) for seed in (0, 0, 1)
    )
    for mine, again in zip(one, same, strict=True):
        np.testing.assert_array_equal(mine, again)
    assert any(not np.array_equal(mine, theirs) for mine, theirs in zip(one, other, strict=True))


def test_only_matrices_decay():
    params = {"matrix": jnp.ones((2, 2)), "vector": jnp.ones(2)}
    adamw = optimiser(TrainConfig(learning_rate=0.5, weight_decay=0.1))
    no_slope = jax.tree.map(jnp.zeros_like, params)
    updates: Any = adamw.update(no_slope, adamw.init(params), params)[0]
    assert updates["vector"].tolist() == [0, 0]
    np.testing.assert_allclose(updates["matrix"], np.full((2, 2), -0.05), rtol=1e-6)  # -rate * decay * 1


def test_embed_leaves_nothing_out():
    config = config_of()
    task, params = task_of(), start(config).params
    vectors = jax.jit(embed, static_argnums=0)
    for one, same, count in zip(vectors(config, params, task), vectors(config, params, task), (7, 6), strict=True):
        assert one.shape == (count, 3)
        np.testing.assert_array_equal(one, same)
