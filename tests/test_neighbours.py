"""Steps over sampled neighbours: the full step where nothing is left out, the same on any devices, few programs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from tiny import quick_compilation  # noqa: F401

from fused_rec.config import Config, ModelConfig, TrainConfig
from fused_rec.data.batches import Batch, batch, holdings
from fused_rec.graph.build import HELD_BY, HOLDS, ITEM, USER, both_ways
from fused_rec.graph.hetero import hetero_graph
from fused_rec.graph.propagate import adjacencies
from fused_rec.model.fused import holders
from fused_rec.train import parallel
from fused_rec.train import step as step_module
from fused_rec.train.neighbours import sampler
from fused_rec.train.parallel import divide_state, divide_task, parallel_step, whole_state
from fused_rec.train.step import Task, init

PRESENT = np.array([True] * 5 + [False])
HELD = holdings(tiny.HOLDER, tiny.HELD, tiny.COUNTS["user"], PRESENT)


def config_of(variant="fused", loss="sampled_softmax", neighbours=100, **model) -> Config:
    return Config(
        model=ModelConfig(
            **{"variant": variant, "dim": 3, "rounds": 2, "affinity": True, "id_scale": 1.0}
            | {"holding_dropout": 0.2, "id_dropout": 0.3, "noise": 0.1}
            | model
        ),
        train=TrainConfig(
            loss=loss, batch_users=2, positives=2, negatives=2, temperature=1.0, contrast=0.5, neighbours=neighbours
        ),
    )


@functools.cache
def task_of() -> Task:
    hears = adjacencies(tiny.graph())
    return Task(tiny.graph(), hears, PRESENT, np.asarray(holders(hears)))


def batch_of(step: int) -> Batch:
    return batch(HELD, step, seed=0, batch_users=2, positives=2, negatives=2)


PILOTS = [batch_of(step) for step in range(3)]


@pytest.fixture
def descent(monkeypatch):
    """Plain descent at rate 1, so that what a step changes is the gradient."""
    monkeypatch.setattr(step_module, "optimiser", lambda config: optax.sgd(1.0))
    parallel._mapped_step.cache_clear()
    yield
    parallel._mapped_step.cache_clear()


def slope(config, task, users, devices):
    """(loss, gradient) of the third step."""
    whole = jax.tree.map(np.asarray, init(config, task_of()))
    whole = dataclasses.replace(whole, step=jnp.int32(3))
    state, loss = parallel_step(config, devices)(divide_state(whole, devices), task, users)
    after = whole_state(state, whole, devices).params
    return float(loss), jax.tree.map(lambda before, now: before - now, whole.params, after)


def same_slope(one, other):
    assert one[0] == pytest.approx(other[0], rel=1e-5)
    leaves = jax.tree.leaves_with_path(one[1]), jax.tree.leaves(other[1])
    assert max(np.abs(leaf).max() for _, leaf in leaves[0]) > 0.01
    for (path, mine), theirs in zip(*leaves, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-5, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize(
    ("variant", "loss", "devices"),
    [
        ("fused", "sampled_softmax", (1, 4)),
        ("fused", "bpr", (2,)),
        ("graph", "sampled_softmax", (1,)),
        ("text", "sampled_softmax", (1,)),
    ],
)
def test_with_all_neighbours_it_is_the_full_step(variant, loss, devices, descent):
    """Loss and gradient of each tower, with dropout, noise and contrast, whichever devices share the sample."""
    config = config_of(variant, loss)
    full = slope(config, divide_task(task_of(), 1), batch_of(3), 1)
    for count in devices:
        part, users = sampler(config, task_of(), PILOTS, count)(3, batch_of(3))
        assert part.graph.sampled
        same_slope(slope(config, part, users, count), full)
