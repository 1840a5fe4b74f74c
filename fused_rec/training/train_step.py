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

from fused_rec.baselines.linear import LowRankEase
from fused_rec.config import METRICS, Config, TrainConfig
from fused_rec.data.batches import Batch
from fused_rec.distributed.devices import AXIS, SHARDED, AnyArray, map_with_axes
from fused_rec.graph.adjacency import Adjacency
from fused_rec.graph.build import ITEM
from fused_rec.graph.hetero import HeteroGraph, Relation
from fused_rec.model import losses
from fused_rec.model.model import (
    FIRST_LAYER,
    ID_EMBEDDING,
    FusedModel,
    Vectors,
    append_ease,
    append_popularity_bias,
    concat_branches,
    item_degree,
)

CONTRAST_TEMPERATURE = 0.15  # tau of XSimGCL (Yu et al., 2023, arXiv 2209.02544), as its authors set it


@no_type_check  # as of `Adjacency`
@flax.struct.dataclass
class TrainState:
    """All that a step changes, and the seed of its draws. step: how many were taken.

    The seed is data, not part of the program: runs that differ by it alone share one compilation. Id rows, and what
    the optimiser keeps of them, are divided over devices, each of which has the rest whole (`sharding_axes`).

    encoder_snapshot: where the language model is trained too (fused_rec/training/finetune.py), what of it the cached
    vectors of the texts come from; nothing on devices, which work with the vectors.
    """

    step: Int32[Array, ""]
    seed: Int32[Array, ""]
    params: PyTree[Float32[Array, "..."]]
    opt_state: PyTree
    encoder_snapshot: PyTree = ()


@no_type_check  # as of `Adjacency`
@flax.struct.dataclass
class GraphInputs:
    """What a step hears besides its batch: the graph, its adjacencies and counts of items.

    The same from step to step, or a sample of its own for each (`fused_rec.training.neighbor_sampling`).
    """

    graph: HeteroGraph
    adjacencies: Mapping[Relation, Adjacency]
    # of all items, those that somebody holds; others are no alternatives while training
    trained_items: Bool[AnyArray, "I"]
    popularity: Float32[AnyArray, "_"]  # holders of each item of the graph, older holdings counting less
    ease: LowRankEase | None = None  # for what is ranked, where model.ease_weight asks for it; no step hears it


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """AdamW (Loshchilov and Hutter, 2019) at a constant rate: early stopping takes the place of a schedule.

    Only matrices decay: to shrink the gates' and the readout's few factors would be to prefer some rounds.
    """

    def matrices(params: PyTree) -> PyTree:
        return jax.tree.map(lambda leaf: leaf.ndim > 1, params)

    return optax.adamw(config.learning_rate, weight_decay=config.weight_decay, mask=matrices)


def init(config: Config, graph_inputs: GraphInputs) -> TrainState:
    """A fresh state, whole and on the host: a function of config.train.seed."""
    return jax.device_get(_init(config, graph_inputs))


@functools.partial(jax.jit, static_argnums=0)
def _init(config: Config, graph_inputs: GraphInputs) -> TrainState:
    key = jax.random.key(config.train.seed)
    params = FusedModel(config.model).init(key, graph_inputs.graph, graph_inputs.adjacencies)["params"]
    return TrainState(jnp.int32(0), jnp.int32(config.train.seed), params, make_optimizer(config.train).init(params))


def sharding_axes(tree: PyTree) -> PyTree:
    """Of a state, its parameters or their gradient: `SHARDED` where devices share a leaf's rows, None elsewhere."""

    def axis(path: tuple, _: Any) -> int | None:
        return SHARDED if any(str(getattr(key, "key", "")).startswith(ID_EMBEDDING) for key in path) else None

    return jax.tree_util.tree_map_with_path(axis, tree)


def compile_key(config: Config) -> Config:
    """The config with the same values for whatever the compiled step does not depend on."""
    same = {"seed": 0, "metric": METRICS[0], "max_steps": 1, "eval_every": 1, "patience": 1, "refit": False}
    train = dataclasses.replace(config.train, **same, num_neighbors=0, wandb="")
    return Config(model=config.model, train=train)


def embed_nodes(config: Config, params: PyTree, graph_inputs: GraphInputs) -> Vectors:
    """Vectors of all users and items, whose dot products are the scores: logits times the temperature, and EASE's part.

    Raises:
      ValueError: the config asks for a spectrum that the task does not have.
    """
    branches: Any = FusedModel(config.model).apply({"params": params}, graph_inputs.graph, graph_inputs.adjacencies)
    vectors = concat_branches(branches, graph_inputs.graph.all_gather(ITEM, item_degree(graph_inputs.adjacencies)))
    if config.model.ease_weight:
        if graph_inputs.ease is None:
            raise ValueError(
                f"model.ease_weight is {config.model.ease_weight} and the task has none; make it by `prepare`"
            )
        vectors = append_ease(
            vectors, graph_inputs.ease, graph_inputs.graph, graph_inputs.adjacencies, config.model.ease_weight
        )
    return _append_popularity(config, graph_inputs, vectors)


def _append_popularity(config: Config, graph_inputs: GraphInputs, vectors: Vectors) -> Vectors:
    if not config.model.popularity_weight:
        return vectors
    # In units of the logits: 1 with mute towers is each item's share of the holdings, of counts plus one.
    weight = config.model.popularity_weight * config.train.temperature
    return append_popularity_bias(vectors, weight * jnp.log1p(graph_inputs.popularity))


def train_step(
    config: Config,
    state: TrainState,
    graph_inputs: GraphInputs,
    batch: Batch,
    tx: optax.GradientTransformation | None = None,
    text_update_fn: Callable[[PyTree, GraphInputs], GraphInputs] | None = None,
) -> tuple[TrainState, Float32[Array, ""]]:
    """The next state and the batch's mean loss; each device of `AXIS` has a share of the batch and of the rows.

    The only key is fold_in(seed, step): what is left out must not depend on the number of devices, and a resumed run
    must leave out the same again.

    tx: how parameters move; None: `make_optimizer`. text_update_fn: of parameters and task, the task that the model is
    given, where parameters make words; None: the task as it is.
    """
    tx = tx or make_optimizer(config.train)
    dropout = jax.random.fold_in(jax.random.key(state.seed + 1), state.step)
    # Each device differentiates for itself. Without this the replication check of shard_map would add up the
    # gradients on its own, the psum below would do it again, and one forgotten here would go unnoticed.
    own = functools.partial(jax.lax.pcast, axis_name=AXIS, to="varying")
    divided = sharding_axes(state.params)
    params = _merge_leaves(divided, jax.tree.map(own, _replicated_leaves(divided, state.params)), state.params)
    graph_inputs = dataclasses.replace(
        graph_inputs, trained_items=own(graph_inputs.trained_items), popularity=own(graph_inputs.popularity)
    )

    def mean_loss(params: PyTree) -> Float32[Array, ""]:
        weighted = _losses(
            config, params, text_update_fn(params, graph_inputs) if text_update_fn else graph_inputs, batch, dropout
        )
        # Each device's share of the means; the psum below completes them.
        shares = [weight * total / jnp.maximum(jax.lax.psum(count, AXIS), 1) for weight, (total, count) in weighted]
        return jnp.stack(shares).sum()

    loss, gradient = jax.value_and_grad(mean_loss)(params)
    # The rows' gradient is complete: their way to every device leads back as a sum over devices.
    loss, whole = jax.lax.psum((loss, _replicated_leaves(divided, gradient)), AXIS)
    gradient = _merge_leaves(divided, whole, gradient)
    updates, opt_state = tx.update(gradient, state.opt_state, state.params)
    return TrainState(state.step + 1, state.seed, optax.apply_updates(state.params, updates), opt_state), loss


def _replicated_leaves(divided: PyTree, tree: PyTree) -> PyTree:
    """The leaves that every device has whole, and None for the others."""
    return map_with_axes(lambda axis, x: x if axis is None else None, divided, tree)


def _merge_leaves(divided: PyTree, whole: PyTree, tree: PyTree) -> PyTree:
    """`tree` with the leaves of `all_gather` where there are any."""
    return map_with_axes(lambda axis, x, y: x if axis is None else y, divided, whole, tree)


def _losses(
    config: Config, params: PyTree, graph_inputs: GraphInputs, batch: Batch, dropout: PRNGKeyArray
) -> list[tuple[float, losses.Sum]]:
    """(weight, loss): every tower's own loss, added up under the count of one, and the first one's contrast if any."""
    branches: Any
    intermediates: Any
    branches, intermediates = FusedModel(config.model, config.train.compute_dtype).apply(
        {"params": _params_of_nodes(graph_inputs.graph, params)},
        graph_inputs.graph,
        graph_inputs.adjacencies,
        dropout,
        mutable=["intermediates"],
    )
    sums = [
        _branch_loss(config, _append_popularity(config, graph_inputs, vectors), graph_inputs, batch)
        for vectors in branches
    ]
    weighted = [(1.0, (jnp.stack([total for total, _ in sums]).sum(), sums[0][1]))]
    if config.train.contrastive_weight:
        [first_layer] = intermediates["intermediates"]["main"][FIRST_LAYER]
        weighted += [
            (config.train.contrastive_weight, part) for part in _contrastive_losses(branches[0], first_layer, batch)
        ]
    return weighted


def _params_of_nodes(graph: HeteroGraph, params: PyTree) -> PyTree:
    """The parameters with the id rows of the graph's nodes: of a sample, this device's some of its rows."""
    if not graph.sampled:
        return params

    def rows(path: tuple, leaf: Array) -> Array:
        name = str(path[-1].key)
        if not name.startswith(ID_EMBEDDING):
            return leaf
        node_type = name.removeprefix(ID_EMBEDDING)
        return leaf[graph.global_ids(node_type, jnp.arange(graph.rows(node_type))) // graph.shards.count]

    return jax.tree_util.tree_map_with_path(rows, params)


def _contrastive_losses(vectors: Vectors, first_layer: Vectors, batch: Batch) -> list[losses.Sum]:
    """InfoNCE of the whole batch's users, and of one held item of each of them, over all devices.

    The published batch is of pairs; one of each user's pairs makes ours as large for both, and B^2 cosines enough.
    """
    user, items, mask, _ = map(jnp.asarray, batch)
    there = mask[:, 0]
    sums = []
    for one, other, nodes in zip(vectors, first_layer, (user, items[:, 0]), strict=True):
        everyone = jax.lax.all_gather(jnp.where(there > 0, nodes, -1), AXIS).reshape(-1)
        sums.append(losses.info_nce(one, other, nodes, there, everyone, CONTRAST_TEMPERATURE))
    return sums


def _branch_loss(config: Config, vectors: Vectors, graph_inputs: GraphInputs, batch: Batch) -> losses.Sum:
    users, catalogue = (x.astype(config.train.compute_dtype) for x in vectors)
    user, items, mask, negatives = map(jnp.asarray, batch)
    common = users[user], catalogue, items, mask
    present, temperature = jnp.asarray(graph_inputs.trained_items), config.train.temperature
    if config.train.loss == "softmax":
        return losses.softmax(*common, present, temperature)
    if config.train.loss == "sampled_softmax":
        shared = jax.lax.all_gather(negatives, AXIS).reshape(-1)
        return losses.sampled_softmax(*common, present, shared, temperature)
    return losses.bpr(*common, negatives, temperature)
