"""One training step as a pure function of (state, graph, batch)."""

from collections.abc import Mapping
from typing import Any, no_type_check

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float32, Int32, PRNGKeyArray, PyTree

from fused_rec.config import Config, TrainConfig
from fused_rec.data.batches import Batch
from fused_rec.graph.hetero import HeteroGraph, Relation
from fused_rec.graph.propagate import Adjacency
from fused_rec.model import losses
from fused_rec.model.fused import FusedRec

AXIS = "devices"


@no_type_check  # as of `Adjacency`
@flax.struct.dataclass
class TrainState:
    """All that a step changes. step: how many were taken."""

    step: Int32[Array, ""]
    params: PyTree[Float32[Array, "..."]]
    optimiser: PyTree


@no_type_check  # as of `Adjacency`
@flax.struct.dataclass
class Task:
    """What stays the same from step to step."""

    graph: HeteroGraph
    adjacencies: Mapping[Relation, Adjacency]
    present: Bool[Array, "I"]  # items there are while training


def optimiser(config: TrainConfig) -> optax.GradientTransformation:
    """AdamW (Loshchilov and Hutter, 2019) at a constant rate: early stopping takes the place of a schedule.

    Only matrices decay: to shrink the gates' and the readout's few factors would be to prefer some rounds.
    """

    def matrices(params: PyTree) -> PyTree:
        return jax.tree.map(lambda leaf: leaf.ndim > 1, params)

    return optax.adamw(config.learning_rate, weight_decay=config.weight_decay, mask=matrices)


def init(config: Config, task: Task) -> TrainState:
    """A fresh state, a function of config.train.seed."""
    key = jax.random.key(config.train.seed)
    params = FusedRec(config.model).init(key, task.graph, task.adjacencies)["params"]
    return TrainState(jnp.int32(0), params, optimiser(config.train).init(params))


def embed(
    config: Config, params: PyTree, task: Task, dropout: PRNGKeyArray | None = None
) -> tuple[Float32[Array, "U K"], Float32[Array, "I K"]]:
    """Vectors of all users and items, whose dot products are the scores. A key leaves out id rows, as in training."""
    out: Any = FusedRec(config.model).apply({"params": params}, task.graph, task.adjacencies, dropout)
    return out


def train_step(config: Config, state: TrainState, task: Task, batch: Batch) -> tuple[TrainState, Float32[Array, ""]]:
    """The next state and the batch's mean loss; each device of the mapped axis `AXIS` has a share of the batch.

    The only key is fold_in(seed, step): devices must drop the same id rows, and a resumed run the same again.
    """
    dropout = jax.random.fold_in(jax.random.key(config.train.seed + 1), state.step)
    # Each device differentiates for itself. Without this the replication check of shard_map would add up the
    # gradients on its own, the psum below would do it again, and one forgotten here would go unnoticed.
    params, task = jax.lax.pcast((state.params, task), AXIS, to="varying")

    def mean_loss(params: PyTree) -> Float32[Array, ""]:
        total, count = _loss(config, params, task, batch, dropout)
        count = jax.lax.psum(count, AXIS)
        return total / jnp.maximum(count, 1)  # this device's share; the psum below completes the mean

    loss, gradient = jax.value_and_grad(mean_loss)(params)
    loss, gradient = jax.lax.psum((loss, gradient), AXIS)
    updates, moments = optimiser(config.train).update(gradient, state.optimiser, state.params)
    return TrainState(state.step + 1, optax.apply_updates(state.params, updates), moments), loss


def _loss(config: Config, params: PyTree, task: Task, batch: Batch, dropout: PRNGKeyArray) -> losses.Sum:
    users, catalogue = embed(config, params, task, dropout)
    user, items, mask, negatives = map(jnp.asarray, batch)
    common = users[user], catalogue, items, mask
    temperature = config.train.temperature
    if config.train.loss == "softmax":
        return losses.softmax(*common, task.present, temperature)
    if config.train.loss == "sampled_softmax":
        shared = jax.lax.all_gather(negatives, AXIS).reshape(-1)
        return losses.sampled_softmax(*common, task.present, shared, temperature)
    return losses.bpr(*common, negatives, temperature)
