"""One training step as a pure function of (state, graph, batch)."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, no_type_check

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float32, Int32, PRNGKeyArray, PyTree

from fused_rec.config import METRICS, Config, TrainConfig
from fused_rec.data.batches import Batch
from fused_rec.devices import AXIS, DIVIDED, AnyArray, by_axis
from fused_rec.graph.build import ITEM
from fused_rec.graph.hetero import HeteroGraph, Relation
from fused_rec.graph.propagate import Adjacency
from fused_rec.model import losses
from fused_rec.model.closed_form import Spectrum
from fused_rec.model.fused import FIRST_ROUND, ID_ROWS, Towers, Vectors, holders, joined, with_prior, with_spectrum

CONTRAST_TEMPERATURE = 0.15  # tau of XSimGCL (Yu et al., 2023, arXiv 2209.02544), as its authors set it


@no_type_check  # as of `Adjacency`
@flax.struct.dataclass
class TrainState:
    """All that a step changes, and the seed of its draws. step: how many were taken.

    The seed is data, not part of the program: runs that differ by it alone share one compilation. Id rows, and what
    the optimiser keeps of them, are divided over devices, each of which has the rest whole (`axes`).

    said: where the language model is trained too (fused_rec/train/joint.py), what of it the cached vectors of the
    texts come from; nothing on devices, which work with the vectors.
    """

    step: Int32[Array, ""]
    seed: Int32[Array, ""]
    params: PyTree[Float32[Array, "..."]]
    optimiser: PyTree
    said: PyTree = ()


@no_type_check  # as of `Adjacency`
@flax.struct.dataclass
class Task:
    """What a step hears besides its batch: the graph, its adjacencies and counts of items.

    The same from step to step, or a sample of its own for each (`fused_rec.train.neighbours`).
    """

    graph: HeteroGraph
    adjacencies: Mapping[Relation, Adjacency]
    present: Bool[AnyArray, "I"]  # of all items, those that somebody holds; others are no alternatives while training
    popularity: Float32[AnyArray, "_"]  # holders of each item of the graph, older holdings counting less
    spectrum: Spectrum | None = None  # for what is ranked, where model.spectrum asks for it; no step hears it


def optimiser(config: TrainConfig) -> optax.GradientTransformation:
    """AdamW (Loshchilov and Hutter, 2019) at a constant rate: early stopping takes the place of a schedule.

    Only matrices decay: to shrink the gates' and the readout's few factors would be to prefer some rounds.
    """

    def matrices(params: PyTree) -> PyTree:
        return jax.tree.map(lambda leaf: leaf.ndim > 1, params)

    return optax.adamw(config.learning_rate, weight_decay=config.weight_decay, mask=matrices)


def init(config: Config, task: Task) -> TrainState:
    """A fresh state, whole and on the host: a function of config.train.seed."""
    return jax.device_get(_init(config, task))


@functools.partial(jax.jit, static_argnums=0)
def _init(config: Config, task: Task) -> TrainState:
    key = jax.random.key(config.train.seed)
    params = Towers(config.model).init(key, task.graph, task.adjacencies)["params"]
    return TrainState(jnp.int32(0), jnp.int32(config.train.seed), params, optimiser(config.train).init(params))


def axes(tree: PyTree) -> PyTree:
    """Of a state, its parameters or their gradient: `DIVIDED` where devices share a leaf's rows, None elsewhere."""

    def axis(path: tuple, _: Any) -> int | None:
        return DIVIDED if any(str(getattr(key, "key", "")).startswith(ID_ROWS) for key in path) else None

    return jax.tree_util.tree_map_with_path(axis, tree)


def program(config: Config) -> Config:
    """The config with the same values for whatever the compiled step does not depend on."""
    same = {"seed": 0, "metric": METRICS[0], "max_steps": 1, "eval_every": 1, "patience": 1, "refit": False}
    train = dataclasses.replace(config.train, **same, neighbours=0, wandb="")
    return Config(model=config.model, train=train)


def embed(config: Config, params: PyTree, task: Task) -> Vectors:
    """Vectors of all users and items, whose dot products are the scores: logits times the temperature, and EASE's part.

    Raises:
      ValueError: the config asks for a spectrum that the task does not have.
    """
    towers: Any = Towers(config.model).apply({"params": params}, task.graph, task.adjacencies)
    vectors = joined(towers, task.graph.whole(ITEM, holders(task.adjacencies)))
    if config.model.spectrum:
        if task.spectrum is None:
            raise ValueError(f"model.spectrum is {config.model.spectrum} and the task has none; make it by `prepare`")
        vectors = with_spectrum(vectors, task.spectrum, task.graph, task.adjacencies, config.model.spectrum)
    return _with_popularity(config, task, vectors)


def _with_popularity(config: Config, task: Task, vectors: Vectors) -> Vectors:
    if not config.model.popularity:
        return vectors
    # In units of the logits: 1 with mute towers is each item's share of the holdings, of counts plus one.
    weight = config.model.popularity * config.train.temperature
    return with_prior(vectors, weight * jnp.log1p(task.popularity))


def train_step(
    config: Config,
    state: TrainState,
    task: Task,
    batch: Batch,
    rule: optax.GradientTransformation | None = None,
    heard: Callable[[PyTree, Task], Task] | None = None,
) -> tuple[TrainState, Float32[Array, ""]]:
    """The next state and the batch's mean loss; each device of `AXIS` has a share of the batch and of the rows.

    The only key is fold_in(seed, step): what is left out must not depend on the number of devices, and a resumed run
    must leave out the same again.

    rule: how parameters move; None: `optimiser`. heard: of parameters and task, the task that the model is given,
    where parameters make words; None: the task as it is.
    """
    rule = rule or optimiser(config.train)
    dropout = jax.random.fold_in(jax.random.key(state.seed + 1), state.step)
    # Each device differentiates for itself. Without this the replication check of shard_map would add up the
    # gradients on its own, the psum below would do it again, and one forgotten here would go unnoticed.
    own = functools.partial(jax.lax.pcast, axis_name=AXIS, to="varying")
    divided = axes(state.params)
    params = _joined(divided, jax.tree.map(own, _whole(divided, state.params)), state.params)
    task = dataclasses.replace(task, present=own(task.present), popularity=own(task.popularity))

    def mean_loss(params: PyTree) -> Float32[Array, ""]:
        weighted = _losses(config, params, heard(params, task) if heard else task, batch, dropout)
        # Each device's share of the means; the psum below completes them.
        shares = [weight * total / jnp.maximum(jax.lax.psum(count, AXIS), 1) for weight, (total, count) in weighted]
        return jnp.stack(shares).sum()

    loss, gradient = jax.value_and_grad(mean_loss)(params)
    # The rows' gradient is complete: their way to every device leads back as a sum over devices.
    loss, whole = jax.lax.psum((loss, _whole(divided, gradient)), AXIS)
    gradient = _joined(divided, whole, gradient)
    updates, moments = rule.update(gradient, state.optimiser, state.params)
    return TrainState(state.step + 1, state.seed, optax.apply_updates(state.params, updates), moments), loss


def _whole(divided: PyTree, tree: PyTree) -> PyTree:
    """The leaves that every device has whole, and None for the others."""
    return by_axis(lambda axis, x: x if axis is None else None, divided, tree)


def _joined(divided: PyTree, whole: PyTree, tree: PyTree) -> PyTree:
    """`tree` with the leaves of `whole` where there are any."""
    return by_axis(lambda axis, x, y: x if axis is None else y, divided, whole, tree)


def _losses(
    config: Config, params: PyTree, task: Task, batch: Batch, dropout: PRNGKeyArray
) -> list[tuple[float, losses.Sum]]:
    """(weight, loss): every tower's own loss, added up under the count of one, and the first one's contrast if any."""
    towers: Any
    seen: Any
    towers, seen = Towers(config.model, config.train.compute).apply(
        {"params": _of_nodes(task.graph, params)}, task.graph, task.adjacencies, dropout, mutable=["intermediates"]
    )
    sums = [_tower_loss(config, _with_popularity(config, task, vectors), task, batch) for vectors in towers]
    weighted = [(1.0, (jnp.stack([total for total, _ in sums]).sum(), sums[0][1]))]
    if config.train.contrast:
        [first_round] = seen["intermediates"]["main"][FIRST_ROUND]
        weighted += [(config.train.contrast, part) for part in _contrasts(towers[0], first_round, batch)]
    return weighted


def _of_nodes(graph: HeteroGraph, params: PyTree) -> PyTree:
    """The parameters with the id rows of the graph's nodes: of a sample, this device's some of its rows."""
    if not graph.sampled:
        return params

    def rows(path: tuple, leaf: Array) -> Array:
        name = str(path[-1].key)
        if not name.startswith(ID_ROWS):
            return leaf
        node_type = name.removeprefix(ID_ROWS)
        return leaf[graph.numbers(node_type, jnp.arange(graph.rows(node_type))) // graph.shards.count]

    return jax.tree_util.tree_map_with_path(rows, params)


def _contrasts(vectors: Vectors, first_round: Vectors, batch: Batch) -> list[losses.Sum]:
    """InfoNCE of the whole batch's users, and of one held item of each of them, over all devices.

    The published batch is of pairs; one of each user's pairs makes ours as large for both, and B^2 cosines enough.
    """
    user, items, mask, _ = map(jnp.asarray, batch)
    there = mask[:, 0]
    sums = []
    for one, other, nodes in zip(vectors, first_round, (user, items[:, 0]), strict=True):
        everyone = jax.lax.all_gather(jnp.where(there > 0, nodes, -1), AXIS).reshape(-1)
        sums.append(losses.info_nce(one, other, nodes, there, everyone, CONTRAST_TEMPERATURE))
    return sums


def _tower_loss(config: Config, vectors: Vectors, task: Task, batch: Batch) -> losses.Sum:
    users, catalogue = (x.astype(config.train.compute) for x in vectors)
    user, items, mask, negatives = map(jnp.asarray, batch)
    common = users[user], catalogue, items, mask
    present, temperature = jnp.asarray(task.present), config.train.temperature
    if config.train.loss == "softmax":
        return losses.softmax(*common, present, temperature)
    if config.train.loss == "sampled_softmax":
        shared = jax.lax.all_gather(negatives, AXIS).reshape(-1)
        return losses.sampled_softmax(*common, present, shared, temperature)
    return losses.bpr(*common, negatives, temperature)
