"""AdamW that leaves alone the ID rows that a sampled step does not reach: what dense AdamW gives, no table copied."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fused_rec.config import Config, ModelConfig, TrainConfig
from fused_rec.data.batches import batch, user_items
from fused_rec.data.splits import split
from fused_rec.data.synthetic import make_synthetic
from fused_rec.graph.build import bidirectional_edges
from fused_rec.graph.device_graph import device_graph
from fused_rec.graph.hetero import hetero_graph
from fused_rec.graph.schema import INTERACTED_BY, INTERACTS, ITEM, NO_TEXT_DIM, USER
from fused_rec.training import trainer
from fused_rec.training.checkpoint import Checkpoints
from fused_rec.training.inputs import prepare
from fused_rec.training.lazy_adam import B1, B2, EPSILON, Rows, catch_up
from fused_rec.training.neighbor_sampling import neighbor_sampler
from fused_rec.training.sharding import gather_state, parallel_train_step, settle, shard_batch, shard_state
from fused_rec.training.train_step import GraphInputs, TrainState, init

USERS, ITEMS, STEPS = 600, 100, 12


@functools.cache
def market() -> GraphInputs:
    rng = np.random.default_rng(0)
    user, item = np.divmod(np.unique(rng.integers(0, USERS * ITEMS, 1_500)), ITEMS)
    counts = {USER: USERS, ITEM: ITEMS}
    relations = bidirectional_edges(INTERACTS, INTERACTED_BY, user, item, counts)
    graph = hetero_graph(counts, relations, np.zeros((USERS + ITEMS, NO_TEXT_DIM), np.float32))
    return GraphInputs(device_graph(graph), np.ones(ITEMS, bool), np.bincount(item, minlength=ITEMS).astype(np.float32))


@functools.cache
def batches():
    graph = market().graph
    edges = graph.adjacencies[INTERACTED_BY]
    held = user_items(np.asarray(edges.receivers), np.asarray(edges.senders), USERS, np.ones(ITEMS, bool))
    shape = {"seed": 0, "batch_size": 4, "positives_per_user": 1, "num_negatives": 1}
    return [batch(held, step, **shape) for step in range(STEPS)]


def config_of(lazy_adam: bool) -> Config:
    train = TrainConfig(
        loss="bpr",
        temperature=1.0,
        num_neighbors=2,
        learning_rate=0.02,
        weight_decay=2.0,
        lazy_adam=lazy_adam,
        batch_size=4,
        positives_per_user=1,
    )
    return Config(
        model=ModelConfig(variant="graph", dim=4, num_layers=2, edge_dropout=0.2, id_init_std=1.0), train=train
    )


def trained(config: Config, devices: int, stop: int = STEPS) -> tuple[list[float], TrainState, TrainState]:
    """Losses, the sharded state after the steps, and the first one; halfway through it goes to the host and back."""
    whole = init(config, market())
    state, step = shard_state(whole, devices), parallel_train_step(config, devices)
    sample = neighbor_sampler(config, market(), batches()[:3], devices)
    losses = []
    for number, users in enumerate(batches()[:STEPS]):
        if number == stop:
            state = shard_state(gather_state(state, whole, devices), devices)
        state, metrics = step(state, *sample(number, users))
        losses.append(float(metrics["loss"]))
    return losses, state, whole


@pytest.mark.parametrize("devices", [1, 2])
def test_it_is_dense_adamw(devices):
    """Moments of all rows, too; most rows are behind before they are settled."""
    losses, state, whole = trained(config_of(lazy_adam=True), devices)
    steps = gather_state(state, whole, devices).opt_state.steps["main"]["id_user"]
    assert (steps == STEPS).sum() < USERS / 4 and (steps > 0).sum() > USERS / 3
    expected, dense, first = trained(config_of(lazy_adam=False), devices)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    state = gather_state(settle(config_of(lazy_adam=True).train, state, devices), whole, devices)
    dense = gather_state(dense, first, devices)
    assert all((rows == STEPS).all() for rows in state.opt_state.steps["main"].values())
    moments = [(part.opt_state.adam if part is state else part.opt_state)[0] for part in (state, dense)]
    for one, other in ((state.params, dense.params), (moments[0].mu, moments[1].mu), (moments[0].nu, moments[1].nu)):
        for (path, lazy), same in zip(jax.tree.leaves_with_path(one), jax.tree.leaves(other), strict=True):
            np.testing.assert_allclose(lazy, same, rtol=2e-5, atol=1e-6, err_msg=jax.tree_util.keystr(path))


def test_a_resumed_run_is_the_same_to_the_last_bit():
    """A state between two evaluations is saved with rows that are behind."""
    straight, resumed = (trained(config_of(lazy_adam=True), 1, stop)[1] for stop in (STEPS, 5))
    jax.tree.map(np.testing.assert_array_equal, straight, resumed)


def test_a_training_evaluates_and_saves_rows_that_are_up_to_date(tmp_path, monkeypatch):
    """The trainer settles them before each evaluation."""
    config, evaluated = config_of(lazy_adam=True), []
    train = dataclasses.replace(config.train, max_steps=6, eval_every=3)
    config = dataclasses.replace(config, train=train)
    dataset = make_synthetic(0, 100, 40)
    prepared = prepare(config, dataset, split(dataset, config.split))
    monkeypatch.setattr(trainer, "sharded_scorer", lambda config, inputs, params: evaluated.append(gathered(params)))
    monkeypatch.setattr(trainer, "evaluate_mean", lambda *_: {train.metric: float(len(evaluated))})

    def gathered(params):
        return gather_state(params, init(config, prepared.graph_inputs).params)

    trainer.fit(config, prepared, tmp_path)
    assert len(evaluated) == 2
    for step, params in zip((3, 6), evaluated, strict=True):
        state, _ = Checkpoints(tmp_path / "checkpoints").restore(step, like=init(config, prepared.graph_inputs))
        for rows in state.opt_state.steps["main"].values():
            np.testing.assert_array_equal(rows, step)
        jax.tree.map(np.testing.assert_array_equal, params, state.params)


@pytest.mark.parametrize("square", [1e-3, 1e-13])
@pytest.mark.parametrize(("last", "skipped"), [(0, 0), (3, 0), (1, 1), (4, 3), (7, 500), (2_000, 40), (20_000, 9_000)])
def test_skipped_steps_by_hand(last, skipped, square):
    """In 64 bits, one step after the other; the epsilon matters where the second moment is small."""
    config = TrainConfig(learning_rate=0.01, weight_decay=0.5)
    embedding, mean, second = 0.7, 0.3 * square**0.5, square
    table, *moments = (jnp.full((1, 1), x, jnp.float32) for x in (embedding, mean, second))
    rows = Rows(table, moments[0], moments[1], jnp.full(1, last, jnp.int32))
    for step in range(last + 1, last + skipped + 1):
        mean, second = B1 * mean, B2 * second
        direction = mean / (1 - B1**step) / ((second / (1 - B2**step)) ** 0.5 + EPSILON)
        embedding -= 0.01 * (direction + 0.5 * embedding)
    found = catch_up(config, rows, jnp.int32(last + skipped))
    assert found.step.tolist() == [last + skipped]
    np.testing.assert_allclose(
        [float(part[0, 0]) for part in found[:3]], [embedding, mean, second], rtol=2e-5, atol=1e-30
    )


def test_no_table_is_copied():
    """A step writes its rows into the tables that it is given."""
    config = config_of(lazy_adam=True)
    wide = dataclasses.replace(config, model=dataclasses.replace(config.model, dim=64))
    state = shard_state(init(wide, market()), 1)
    part, users = neighbor_sampler(wide, market(), batches()[:3], 1)(0, batches()[0])
    program = parallel_train_step(wide, 1).compiled(state, part).lower(state, part, shard_batch(users, 1)).compile()
    table = f"f32[{USERS},64]"
    written = [line for line in program.as_text().splitlines() if f"= {table}" in line and "copy(" in line]
    assert table in program.as_text() and not written


def test_what_it_needs():
    with pytest.raises(ValueError, match="train.lazy_adam is True; it must be False where train.num_neighbors is 0"):
        TrainConfig(lazy_adam=True)
    with pytest.raises(ValueError, match="False where train.learning_rate"):
        TrainConfig(loss="bpr", num_neighbors=2, lazy_adam=True, learning_rate=0.1, weight_decay=1.0)
