"""Steps over sampled neighbours: the full step where nothing is left out, the same on any devices, few programs."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from fused_rec.config import Config, Loss, ModelConfig, TextConfig, TrainConfig, Variant
from fused_rec.data.batches import Batch, batch, user_items
from fused_rec.graph.build import bidirectional_edges
from fused_rec.graph.device_graph import device_graph
from fused_rec.graph.hetero import hetero_graph
from fused_rec.graph.schema import INTERACTED_BY, INTERACTS, ITEM, NO_TEXT_DIM, USER
from fused_rec.model.model import item_degree
from fused_rec.training import neighbor_sampling, sharding
from fused_rec.training import train_step as step_module
from fused_rec.training.neighbor_sampling import neighbor_sampler
from fused_rec.training.sharding import gather_state, parallel_train_step, shard_graph_inputs, shard_state
from fused_rec.training.train_step import GraphInputs, init, train_step

PRESENT = np.array([True] * 5 + [False])
HOLDINGS = INTERACTS, INTERACTED_BY
HELD = user_items(tiny.HOLDER, tiny.HELD, tiny.COUNTS["user"], PRESENT)


DRAWS: dict[str, Any] = {"edge_dropout": 0.2, "id_embedding_dropout": 0.3, "embedding_noise": 0.1}


def config_of(
    variant: Variant = "fused", loss: Loss = "sampled_softmax", num_neighbors: int = 100, **model: Any
) -> Config:
    return Config(
        model=ModelConfig(**{"variant": variant, "dim": 3, "num_layers": 2, "id_init_std": 1.0, **DRAWS, **model}),
        train=TrainConfig(
            loss=loss,
            batch_size=2,
            positives_per_user=2,
            num_negatives=2,
            temperature=1.0,
            contrastive_weight=0.5,
            num_neighbors=num_neighbors,
        ),
    )


@functools.cache
def task_of(whole: bool = True) -> GraphInputs:
    """The tiny market; without `whole` its holdings and nearest texts alone, which take less time to compile."""
    graph = tiny.whole()
    if not whole:
        few = {r: edges for r, edges in tiny.relations(tiny.words()).items() if r in (*HOLDINGS, tiny.SIMILAR)}
        counts = {name: tiny.COUNTS[name] for name in (USER, ITEM)}
        graph = device_graph(hetero_graph(counts, few, tiny.words()[:13]))
    return GraphInputs(graph, PRESENT, np.asarray(item_degree(graph)))


def batch_of(step: int) -> Batch:
    return batch(HELD, step, seed=0, batch_size=2, positives_per_user=2, num_negatives=2)


PILOTS = [batch_of(step) for step in range(3)]


@pytest.fixture
def descent(monkeypatch):
    """Plain descent at rate 1, so that what a step changes is the gradient."""
    monkeypatch.setattr(step_module, "make_optimizer", lambda config: optax.sgd(1.0))
    forget_programs()
    yield
    forget_programs()


def forget_programs() -> None:
    """Those of steps and first states, which have an optimiser in them."""
    sharding._mapped_step.cache_clear()
    step_module._init.clear_cache()  # pyright: ignore[reportAttributeAccessIssue]


def slope(config, task, graph_inputs, users, devices):
    """(loss, gradient) of the third step from the first state of a task."""
    whole = jax.tree.map(np.asarray, init(config, task))
    whole = dataclasses.replace(whole, step=jnp.int32(3))
    state, metrics = parallel_train_step(config, devices)(shard_state(whole, devices), graph_inputs, users)
    after = gather_state(state, whole, devices).params
    return float(metrics["loss"]), jax.tree.map(lambda before, now: before - now, whole.params, after)


def same_slope(one, other):
    assert one[0] == pytest.approx(other[0], rel=1e-5)
    leaves = jax.tree.leaves_with_path(one[1]), jax.tree.leaves(other[1])
    assert max(np.abs(leaf).max() for _, leaf in leaves[0]) > 0.01
    for (path, mine), theirs in zip(*leaves, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-5, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize(
    ("variant", "loss", "devices", "whole"),
    [
        ("fused", "sampled_softmax", (1, 4), True),
        ("fused", "bpr", (2,), False),
        ("graph", "sampled_softmax", (1,), True),
        ("text", "sampled_softmax", (1,), True),
    ],
)
def test_with_all_neighbors_it_is_the_full_step(variant, loss, devices, whole, descent):
    """Loss and gradient of each branch, with dropout, noise and contrast, whichever devices share the sample."""
    config, task = config_of(variant, loss), task_of(whole)
    full = slope(config, task, shard_graph_inputs(task, 1), batch_of(3), 1)
    for count in devices:
        part, users = neighbor_sampler(config, task, PILOTS, count)(3, batch_of(3))
        assert part.graph.node_ids is not None
        same_slope(slope(config, task, part, users, count), full)


@pytest.mark.parametrize("count", [1, 2])
def test_users_that_start_as_their_items_bring_all_of_them(count, descent):
    config = config_of("text", num_layers=1, text_projection="mlp", text_propagation="both_ways")
    full = slope(config, task_of(), shard_graph_inputs(task_of(), 1), batch_of(3), 1)
    part, users = neighbor_sampler(config, task_of(), PILOTS, count)(3, batch_of(3))
    same_slope(slope(config, task_of(), part, users, count), full)


def test_rows_that_no_user_takes_change_nothing(descent, monkeypatch):
    """A room far larger than the sample, which leaves out neighbours."""
    config, task = config_of(num_neighbors=1), task_of(whole=False)
    monkeypatch.setattr(neighbor_sampling, "bucketed_capacity", lambda need, usual, bound: need)
    close = neighbor_sampler(config, task, PILOTS, 1)(3, batch_of(3))
    monkeypatch.setattr(
        neighbor_sampling,
        "bucketed_capacity",
        lambda need, usual, bound: type(need)(*({name: n + 9 for name, n in part.items()} for part in need)),
    )
    wide = neighbor_sampler(config, task, PILOTS, 1)(3, batch_of(3))
    assert wide[0].graph.node_types != close[0].graph.node_types
    same_slope(slope(config, task, *wide, 1), slope(config, task, *close, 1))


# --- draws ---------------------------------------------------------------------------------------------------------

USERS, ITEMS = 300, 200


@functools.cache
def market() -> tuple[GraphInputs, list[Batch]]:
    """Three thousand random holdings, and the first batches of them."""
    rng = np.random.default_rng(0)
    user, item = np.divmod(np.unique(rng.integers(0, USERS * ITEMS, 3_000)), ITEMS)
    counts = {USER: USERS, ITEM: ITEMS}
    graph = hetero_graph(
        counts,
        bidirectional_edges(INTERACTS, INTERACTED_BY, user, item, counts),
        np.zeros((500, NO_TEXT_DIM), np.float32),
    )
    held = user_items(user.astype(np.int32), item.astype(np.int32), USERS, np.ones(ITEMS, bool))
    batches = [batch(held, step, seed=0, batch_size=8, positives_per_user=2, num_negatives=2) for step in range(30)]
    return GraphInputs(device_graph(graph), np.ones(ITEMS, bool), np.bincount(item).astype(np.float32)), batches


PLAIN = config_of("graph", "bpr", num_neighbors=2, embedding_noise=0.0)
PLAIN = dataclasses.replace(PLAIN, train=dataclasses.replace(PLAIN.train, contrastive_weight=0.0))


def of_seed(seed: int) -> Config:
    return dataclasses.replace(PLAIN, train=dataclasses.replace(PLAIN.train, seed=seed))


def drawn_edges(config, step, devices=1) -> set[tuple]:
    """(sender, receiver) of the interactions sampled in a step, by their numbers in the market."""
    graph_inputs, batches = market()
    part, users = neighbor_sampler(config, graph_inputs, batches[:3], devices)(step, batches[step])
    node_ids: Any = part.graph.node_ids
    adjacency, (of_users, of_items) = part.graph.adjacencies[INTERACTS], (np.asarray(node_ids[t]) for t in (USER, ITEM))
    found = set()
    for device in range(devices):
        real = np.asarray(adjacency.weight[device]) != 0
        senders, receivers = (np.asarray(part[device])[real] for part in (adjacency.senders, adjacency.receivers))
        received = of_items[receivers % devices, receivers // devices]
        found |= set(zip(of_users[device][senders].tolist(), received.tolist(), strict=True))
    assert of_users[users.users % devices, users.users // devices].tolist() == batches[step].users.tolist()
    for mine, whole in ((users.items, batches[step].items), (users.negatives, batches[step].negatives)):
        np.testing.assert_array_equal(of_items[mine % devices, mine // devices], whole)
    return found


def test_a_draw_follows_seed_and_step_on_any_number_of_devices():
    alone = drawn_edges(PLAIN, 4)
    assert drawn_edges(PLAIN, 4) == drawn_edges(PLAIN, 4, devices=3) == alone
    graph_inputs, batches = market()
    again = neighbor_sampler(PLAIN, graph_inputs, batches[:3], 1)
    again(0, batches[0])  # what was drawn before plays no part
    one, other = (
        jax.tree.leaves(of(4, batches[4])) for of in (again, neighbor_sampler(PLAIN, graph_inputs, batches[:3], 1))
    )
    jax.tree.map(np.testing.assert_array_equal, one, other)
    assert len({frozenset(drawn_edges(of_seed(seed), 4)) for seed in range(3)}) == 3


def test_only_a_part_takes_part():
    graph_inputs, batches = market()
    part, _ = neighbor_sampler(PLAIN, graph_inputs, batches[:3], 1)(0, batches[0])
    assert part.graph.count(USER) < USERS and part.graph.count(ITEM) < ITEMS
    assert len(part.graph.adjacencies[INTERACTS].weight[0]) < len(graph_inputs.graph.adjacencies[INTERACTS].weight) / 4


def test_steps_share_a_compiled_program(monkeypatch):
    traces = []

    def counted(*arguments):
        traces.append(1)
        return train_step(*arguments)

    monkeypatch.setattr(sharding, "train_step", counted)
    sharding._mapped_step.cache_clear()
    graph_inputs, batches = market()
    for seed in (0, 1):
        config = of_seed(seed)
        step, of_step = parallel_train_step(config, 1), neighbor_sampler(config, graph_inputs, batches[:3], 1)
        state = shard_state(init(config, graph_inputs), 1)
        for number, users in enumerate(batches):
            state, metrics = step(state, *of_step(number, users))
        assert np.isfinite(metrics["loss"])
    sharding._mapped_step.cache_clear()
    assert len(traces) == 1


def test_who_has_no_neighbors_is_there_all_the_same():
    """User 6 and item 5 have neither words nor edges."""
    alone = Batch(np.array([6], np.int32), *(np.full((1, 1), x) for x in (np.int32(5), np.float32(1), np.int32(5))))
    config, task = config_of(num_neighbors=1), task_of(whole=False)
    part, users = neighbor_sampler(config, task, [alone], 1)(0, alone)
    state, metrics = parallel_train_step(config, 1)(shard_state(init(config, task), 1), part, users)
    assert np.isfinite(metrics["loss"]) and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))


def test_what_cannot_be_sampled_is_refused():
    with pytest.raises(
        ValueError, match=r"train.loss is 'softmax'; it must be sampled_softmax or bpr where train.num_neigh"
    ):
        TrainConfig(num_neighbors=5)
    with pytest.raises(ValueError, match="it must be frozen where train.num_neighbors is above 0"):
        Config(text=TextConfig(finetune="full"), train=config_of().train)
    with pytest.raises(ValueError, match="train.num_neighbors is -1; it must be 0 or more"):
        TrainConfig(loss="bpr", num_neighbors=-1)
    with pytest.raises(ValueError, match="train.num_neighbors is 0 and there are 3 probe batches"):
        neighbor_sampler(config_of(num_neighbors=0), task_of(), PILOTS)
    with pytest.raises(ValueError, match="there are 0 probe batches; both must be at least 1"):
        neighbor_sampler(config_of(), task_of(), [])
