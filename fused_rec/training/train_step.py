"""One training step, a pure function of (state, graph inputs, batch), and the state it changes."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, no_type_check

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Float32, Int32, PRNGKeyArray, PyTree

from fused_rec import kernels
from fused_rec.config import METRICS, Config, ModelConfig, TrainConfig
from fused_rec.data.batches import Batch
from fused_rec.distributed.devices import AXIS, SHARDED, AnyArray, Shards, all_gather, map_with_axes
from fused_rec.graph.device_graph import DeviceGraph
from fused_rec.graph.schema import ITEM, USER
from fused_rec.model import losses
from fused_rec.model.late_fusion import (
    GRAPH_BRANCH,
    MODEL,
    TEXT_BRANCH,
    Component,
    LateFusion,
    components,
    concat_components,
)
from fused_rec.model.model import (
    ALIGNED_TEXT,
    FIRST_LAYER,
    ID_EMBEDDING,
    RECONSTRUCTED,
    FusedModel,
    Reconstruction,
    Vectors,
    append_popularity_bias,
    concat_branches,
    item_degree,
)
from fused_rec.model.review_dropout import DeviceReviews, drop_reviews
from fused_rec.training import lazy_adam
from fused_rec.training.lazy_adam import B1, B2, EPSILON

Metrics = dict[str, Float32[Array, ""]]
LossParts = tuple[Float32[Array, ""], Metrics]  # a loss, and the parts that it is the sum of
# Parameter keys of the branches of `FusedModel`: the first one, and the text branch beside it. Flax draws initial
# values by parameter path, so other keys would be another initialization, and change every result.
BRANCHES = ("main", "words")
ALIGNMENT_TEMPERATURE = 0.2  # of RLMRec-Con (Ren et al., WWW 2024, arXiv 2310.15950) on Amazon and Yelp
RECONSTRUCTION_TEMPERATURE = 0.5  # of RLMRec-Gen, by the same authors, on Amazon and Steam
LARGE_LEAF = 2**20  # numbers of a parameter whose moments are not copied
CONTRAST_TEMPERATURE = 0.15  # tau of XSimGCL (Yu et al., 2023, arXiv 2209.02544), as its authors set it


@no_type_check  # as of `Adjacency`
@flax.struct.dataclass
class TrainState:
    """The training state. ID embeddings and their optimizer moments are sharded over devices (`sharding_axes`).

    Attributes:
      step: int32, the number of steps taken.
      seed: int32, train.seed; an array, so that runs which differ only by seed share one compilation.
      params: parameters of `FusedModel`, and of the text encoder if it is trained.
      opt_state: the state of the optimizer.
      encoder_snapshot: with a trained text encoder, the encoder parameters that the cached text embeddings come from
        (fused_rec/training/finetune.py); empty on devices, which use the embeddings.
    """

    step: Int32[Array, ""]
    seed: Int32[Array, ""]
    params: PyTree[Float32[Array, "..."]]
    opt_state: PyTree
    encoder_snapshot: PyTree = ()


@no_type_check  # as of `Adjacency`
@flax.struct.dataclass
class GraphInputs:
    """The inputs of a step besides its batch: the graph and item statistics.

    The same in every step, or a sampled subgraph per step (`fused_rec.training.neighbor_sampling`).

    Attributes:
      graph: text embeddings and adjacencies.
      trained_items: bool, of all items those with training interactions; others are excluded from the softmax.
      popularity: float32, interactions of each item of the graph, discounted by model.popularity_half_life.
      fusion: weights and closed-form components of the ranking score, once they are selected (late fusion); no step
        reads them.
      reviews: of training steps with review dropout; None: nodes keep all their texts in every step.
    """

    graph: DeviceGraph
    trained_items: Bool[AnyArray, "I"]
    popularity: Float32[AnyArray, "_"]
    fusion: LateFusion | None = None
    reviews: DeviceReviews | None = None


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """Builds AdamW (Loshchilov and Hutter, 2019) with a constant learning rate; early stopping replaces a schedule.

    Weight decay applies to matrices only: decay of the gates' levels and of the layer weights would favor some layers.

    Args:
      config: of which learning_rate and weight_decay count.

    Returns:
      The gradient transformation.
    """

    def matrices(params: PyTree) -> PyTree:
        return jax.tree.map(lambda leaf: leaf.ndim > 1, params)

    decay, rate = optax.add_decayed_weights(config.weight_decay, matrices), config.learning_rate
    return optax.chain(_scale_by_adam(), decay, optax.scale_by_learning_rate(rate))


def _scale_by_adam(b1: float = B1, b2: float = B2, eps: float = EPSILON) -> optax.GradientTransformation:
    """As `optax.scale_by_adam`, without a copy of large moments on a CPU (`fused_rec.kernels.in_place`)."""

    def stored(moment: Array) -> Array:
        return kernels.in_place(moment) if moment.size >= LARGE_LEAF else moment

    def update(updates: PyTree, state: Any, params: PyTree = None) -> tuple[PyTree, optax.ScaleByAdamState]:
        del params
        mu = jax.tree.map(stored, optax.tree.update_moment(updates, state.mu, b1, 1))
        nu = jax.tree.map(stored, optax.tree.update_moment_per_elem_norm(updates, state.nu, b2, 2))
        count = optax.safe_increment(state.count)
        hats = optax.tree.bias_correction(mu, b1, count), optax.tree.bias_correction(nu, b2, count)
        updates = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), *hats)
        return updates, optax.ScaleByAdamState(count=count, mu=mu, nu=nu)

    return optax.GradientTransformation(optax.scale_by_adam(b1, b2, eps).init, update)


def init(config: Config, graph_inputs: GraphInputs) -> TrainState:
    """Initializes a state.

    Args:
      config: settings of the model and of training; train.seed decides the initial values.
      graph_inputs: of the whole graph.

    Returns:
      The state at step 0, unsharded, on the host.
    """
    return jax.device_get(_init(config.model, config.train.lazy_adam, np.int32(config.train.seed), graph_inputs))


def init_shapes(config: Config, graph_inputs: GraphInputs) -> TrainState:
    """Returns the shapes and types of `init` without a compilation: a tree of `jax.ShapeDtypeStruct`."""
    return jax.eval_shape(
        functools.partial(_init, config.model, config.train.lazy_adam), np.int32(config.train.seed), graph_inputs
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _init(config: ModelConfig, lazy: bool, seed: Int32[Array, ""], graph_inputs: GraphInputs) -> TrainState:
    params = FusedModel(config).init(jax.random.key(seed), graph_inputs.graph)["params"]
    opt_state: PyTree = make_optimizer(TrainConfig()).init(params)  # the same for all settings
    if lazy:
        opt_state = lazy_adam.start(opt_state, params, ID_EMBEDDING)
    return TrainState(jnp.int32(0), seed, params, opt_state)


def sharding_axes(tree: PyTree) -> PyTree:
    """Returns how each leaf is divided over devices.

    Args:
      tree: a state, parameters or a gradient.

    Returns:
      The tree with `SHARDED` for ID embeddings and their moments, and None for replicated leaves.
    """

    def axis(path: tuple, _: Any) -> int | None:
        return SHARDED if any(str(getattr(key, "key", "")).startswith(ID_EMBEDDING) for key in path) else None

    return jax.tree_util.tree_map_with_path(axis, tree)


def compile_key(config: Config) -> Config:
    """Returns the config with every setting that the compiled step does not depend on set to a fixed value."""
    same = {"seed": 0, "metric": METRICS[0], "max_steps": 1, "eval_every": 1, "patience": 1, "refit": "none"}
    train = dataclasses.replace(config.train, **same, num_neighbors=int(config.train.lazy_adam), wandb="")
    return Config(model=config.model, train=train)


def embed_nodes(config: Config, params: PyTree, graph_inputs: GraphInputs) -> Vectors:
    """Computes the embeddings that items are ranked by.

    Args:
      config: settings of the model, and train.temperature.
      params: parameters of `FusedModel`.
      graph_inputs: of the whole graph.

    Returns:
      User embeddings [U, D] and item embeddings [I, D], float32. Their dot products are the sum of late fusion, and
      without one temperature * logit.
    """
    return concat_components(score_components(config, params, graph_inputs))


def score_components(config: Config, params: PyTree, graph_inputs: GraphInputs) -> list[Component]:
    """Computes the components of the score, of which there is one without late fusion.

    Args:
      config: settings of the model, and train.temperature.
      params: parameters of `FusedModel`.
      graph_inputs: of the whole graph.

    Returns:
      The components; `embed_nodes` concatenates them.
    """
    return components_of(trained_vectors(config, params, graph_inputs), graph_inputs)


def components_of(trained: Mapping[str, Vectors], graph_inputs: GraphInputs) -> list[Component]:
    """Computes the same from `trained_vectors`."""
    if graph_inputs.fusion is None:
        users, items = trained[MODEL]
        return [Component(MODEL, jnp.ones(len(users)), users, items)]
    return components(graph_inputs.fusion, trained, graph_inputs.graph)


def trained_vectors(config: Config, params: PyTree, graph_inputs: GraphInputs) -> dict[str, Vectors]:
    """Computes the vectors of the trained components of a score.

    Args:
      config: settings of the model, and train.temperature.
      params: parameters of `FusedModel`.
      graph_inputs: of the whole graph.

    Returns:
      `MODEL`: dot products are temperature * logit; and where there are two branches each of them, `GRAPH_BRANCH` and
      `TEXT_BRANCH`. All of them include the popularity bias.
    """
    graph = graph_inputs.graph
    own: Any = FusedModel(config.model).apply({"params": params}, graph)
    branches = [(graph.all_gather(USER, users), graph.all_gather(ITEM, items)) for users, items in own]
    whole = concat_branches(branches, graph.all_gather(ITEM, item_degree(graph)))
    found = {MODEL: whole}
    if len(branches) > 1:
        found |= dict(zip((GRAPH_BRANCH, TEXT_BRANCH), branches, strict=True))
    return {name: _append_popularity(config, graph_inputs, vectors) for name, vectors in found.items()}


def _append_popularity(config: Config, graph_inputs: GraphInputs, vectors: Vectors) -> Vectors:
    """Appends the popularity bias, scaled by the temperature as scores are."""
    if not config.model.popularity_weight:
        return vectors
    # In units of logits: with weight 1 and all other scores equal, the softmax is proportional to 1 + interactions.
    weight = config.model.popularity_weight * config.train.temperature
    return append_popularity_bias(vectors, weight * jnp.log1p(graph_inputs.popularity))


def train_step(
    config: Config, state: TrainState, graph_inputs: GraphInputs, batch: Batch
) -> tuple[TrainState, Metrics]:
    """Takes one optimizer step; runs on each device of `AXIS` with its share of the batch and of the node rows.

    Args:
      config: settings of the model and of training.
      state: parameters, optimizer state, step and seed.
      graph_inputs: the graph, whole or sampled.
      batch: users with positives, and negatives.

    Returns:
      The next state, and the metrics of `optimize`.
    """
    graph, optimizer = graph_inputs.graph, make_optimizer(config.train)

    def loss_fn(params: PyTree, graph_inputs: GraphInputs, dropout: PRNGKeyArray) -> LossParts:
        own = params if config.train.lazy_adam else _params_of_nodes(graph, params)
        return batch_loss(config, own, graph_inputs, batch, dropout)

    if not config.train.lazy_adam:
        return optimize(state, graph_inputs, loss_fn, optimizer)
    reached = lazy_adam.caught_up(config.train, _reached_rows(graph, state))
    dense = dataclasses.replace(reached, opt_state=reached.opt_state.adam)
    after, metrics = optimize(dense, graph_inputs, loss_fn, optimizer)
    after = dataclasses.replace(after, opt_state=reached.opt_state._replace(adam=after.opt_state))
    return _with_reached_rows(graph, state, after), metrics


def _reached_rows(graph: DeviceGraph, state: TrainState) -> TrainState:
    """The state with only the ID rows of a sampled subgraph's nodes, which padding repeats."""

    def rows(name: str, whole: lazy_adam.Rows) -> lazy_adam.Rows:
        places, _ = _id_rows(graph, name)
        return jax.tree.map(lambda leaf: leaf[places], whole)

    return lazy_adam.map_rows(rows, state)


def _with_reached_rows(graph: DeviceGraph, state: TrainState, after: TrainState) -> TrainState:
    """The state after a step that changed the rows of `_reached_rows`; all other rows are as in `state`."""

    def rows(name: str, new: lazy_adam.Rows, whole: lazy_adam.Rows) -> lazy_adam.Rows:
        places, is_padding = _id_rows(graph, name)
        places = jnp.where(is_padding, len(whole.step), places)
        new = new._replace(step=jnp.full_like(new.step, after.opt_state.adam[0].count))
        return jax.tree.map(lambda leaf, part: leaf.at[places].set(part, mode="drop"), whole, new)

    return lazy_adam.map_rows(rows, after, state)


def _id_rows(graph: DeviceGraph, name: str) -> tuple[Int32[Array, "n"], Bool[Array, "n"]]:
    """Where a sampled subgraph's nodes have their ID rows on this device, and which rows are padding: repeated nodes.

    The nodes of a device ascend, and padding is node 0.
    """
    node_type = name.removeprefix(ID_EMBEDDING)
    nodes = graph.global_ids(node_type, jnp.arange(graph.rows(node_type)))
    places = nodes // graph.shards.count
    return places, jnp.concatenate([jnp.zeros(1, bool), nodes[1:] == 0])


def optimize(
    state: TrainState,
    graph_inputs: GraphInputs,
    loss_fn: Callable[[PyTree, GraphInputs, PRNGKeyArray], LossParts],
    optimizer: optax.GradientTransformation,
) -> tuple[TrainState, Metrics]:
    """Updates the parameters by the gradient of a loss; runs on each device of `AXIS`.

    The only random key is fold_in(seed, step): dropout must not depend on the number of devices, and a resumed run must
    repeat it.

    Args:
      state: parameters, optimizer state, step and seed.
      graph_inputs: the graph, whole or sampled.
      loss_fn: of parameters, graph inputs and a random key: this device's share of the loss and of its parts.
      optimizer: of the parameters.

    Returns:
      The next state, and float32 scalars of the whole batch before the update: `loss`, its parts, and `gradient_norm`,
      the L2 norm of the gradient of all parameters.
    """
    dropout = jax.random.fold_in(jax.random.key(state.seed + 1), state.step)
    # Each device differentiates its own loss. Without this, JAX would sum the gradients of replicated values on its
    # own, and the psum below would sum them again.
    per_device = functools.partial(jax.lax.pcast, axis_name=AXIS, to="varying")
    divided = sharding_axes(state.params)
    params = _merge_leaves(divided, jax.tree.map(per_device, _replicated_leaves(divided, state.params)), state.params)
    graph_inputs = dataclasses.replace(
        graph_inputs,
        trained_items=per_device(graph_inputs.trained_items),
        popularity=per_device(graph_inputs.popularity),
    )
    loss, gradient = jax.value_and_grad(loss_fn, has_aux=True)(params, graph_inputs, dropout)
    # Gradients of sharded rows are complete: the transpose of their all-gather is a sum over devices.
    (total, parts), whole = jax.lax.psum((loss, _replicated_leaves(divided, gradient)), AXIS)
    gradient = _merge_leaves(divided, whole, gradient)
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    metrics = {"loss": total, **parts, "gradient_norm": _global_norm(divided, gradient)}
    return TrainState(state.step + 1, state.seed, optax.apply_updates(state.params, updates), opt_state), metrics


def _global_norm(divided: PyTree, gradient: PyTree) -> Float32[Array, ""]:
    """The L2 norm of a gradient whose sharded leaves are divided over devices."""
    replicated = jax.tree.leaves(_replicated_leaves(divided, gradient))
    sharded = jax.tree.leaves(map_with_axes(lambda axis, x: None if axis is None else x, divided, gradient))
    squares = sum(jnp.square(leaf).sum() for leaf in replicated)
    if sharded:
        squares += jax.lax.psum(sum(jnp.square(leaf).sum() for leaf in sharded), AXIS)
    return jnp.sqrt(squares)


def _replicated_leaves(divided: PyTree, tree: PyTree) -> PyTree:
    """The replicated leaves, and None for sharded ones."""
    return map_with_axes(lambda axis, x: x if axis is None else None, divided, tree)


def _merge_leaves(divided: PyTree, whole: PyTree, tree: PyTree) -> PyTree:
    """`tree` with replicated leaves taken from `whole`."""
    return map_with_axes(lambda axis, x, y: x if axis is None else y, divided, whole, tree)


def batch_loss(
    config: Config, params: PyTree, graph_inputs: GraphInputs, batch: Batch, dropout: PRNGKeyArray
) -> LossParts:
    """Computes this device's share of a batch's mean loss: the sum of all branches' losses, and contrastive losses.

    Args:
      config: settings of the model and of training.
      params: parameters of `FusedModel`, of a sampled graph only its nodes' ID embeddings.
      graph_inputs: the graph, whole or sampled.
      batch: this device's share of the batch.
      dropout: random key.

    Returns:
      The loss, and the parts that it is the sum of: `loss/graph_branch`, `loss/text_branch` or both, by variant; with
      train.contrastive_weight `loss/contrastive_user` and `loss/contrastive_item`, weighted, of the first branch; with
      model.text_alignment `loss/alignment_user` and `loss/alignment_item` alike; with model.text_reconstruction
      `loss/reconstruction`, weighted. The sum over devices completes the means.
    """
    branches: Any
    intermediates: Any
    graph = graph_inputs.graph
    if graph_inputs.reviews is not None:
        graph = drop_reviews(graph_inputs.reviews, graph, config.model.edge_dropout, dropout)
    only = jnp.asarray(batch.users) if reads_batch_users_only(config, graph.shards.count) else None
    branches, intermediates = FusedModel(config.model, config.train.dtype).apply(
        {"params": params},
        graph,
        dropout,
        only,
        mutable=["intermediates"],
    )
    if only is None:  # rows of users stay on their devices, but for those of the batch
        dtype = config.train.dtype
        branches_of_batch = [
            (graph.shards.take(users.astype(dtype), jnp.asarray(batch.users)), items) for users, items in branches
        ]
    else:
        branches_of_batch = branches
    sums = [_branch_loss(config, vectors, graph_inputs, batch) for vectors in branches_of_batch]
    names = (GRAPH_BRANCH, TEXT_BRANCH)[0 if config.model.uses_ids else 1 :][: len(sums)]
    parts = {f"loss/{name}": _mean(*own) for name, own in zip(names, sums, strict=True)}
    shares = [_mean(jnp.stack([total for total, _ in sums]).sum(), sums[0][1])]
    for name, view, weight, temperature in (
        ("contrastive", FIRST_LAYER, config.train.contrastive_weight, CONTRAST_TEMPERATURE),
        ("alignment", ALIGNED_TEXT, config.model.text_alignment, ALIGNMENT_TEMPERATURE),
    ):
        if weight:
            [other] = intermediates["intermediates"]["main"][view]
            views = branches[0], other
            found = _contrastive_losses(graph.shards, views, batch, temperature, skip_zeros=view == ALIGNED_TEXT)
            for node_type, (total, count) in zip((USER, ITEM), found, strict=True):
                shares.append(_mean(weight * total, count))
                parts[f"loss/{name}_{node_type}"] = shares[-1]
    if config.model.text_reconstruction:
        [(users, items)] = intermediates["intermediates"]["main"][RECONSTRUCTED]
        total, count = _reconstruction_loss(graph, users, items, batch)
        shares.append(_mean(config.model.text_reconstruction * total, count))
        parts["loss/reconstruction"] = shares[-1]
    return jnp.stack(shares).sum(), parts


def reads_batch_users_only(config: Config, devices: int) -> bool:
    """Returns whether a step needs the final embeddings of no other users than those of the batch.

    Args:
      config: settings of the model and of training.
      devices: the number of devices; only one has all users of a batch.
    """
    model = config.model
    others = config.train.contrastive_weight or model.text_alignment or model.text_reconstruction
    return devices == 1 and not others


def _mean(total: Float32[Array, ""], count: Float32[Array, ""]) -> Float32[Array, ""]:
    """This device's share of a mean over the counts of all devices."""
    return total / jnp.maximum(jax.lax.psum(count, AXIS), 1)


def _params_of_nodes(graph: DeviceGraph, params: PyTree) -> PyTree:
    """The parameters with only the ID embeddings of a sampled subgraph's nodes."""
    if graph.node_ids is None:
        return params

    def rows(path: tuple, leaf: Array) -> Array:
        name = str(path[-1].key)
        return leaf[_id_rows(graph, name)[0]] if name.startswith(ID_EMBEDDING) else leaf

    return jax.tree_util.tree_map_with_path(rows, params)


def _contrastive_losses(
    shards: Shards, views: tuple[Vectors, Vectors], batch: Batch, temperature: float, skip_zeros: bool
) -> list[losses.Sum]:
    """InfoNCE of the batch's users, and of one positive of each, against those of all devices.

    XSimGCL's batch is of user-item pairs; one pair per user gives the same size for both and B^2 cosines. With
    `skip_zeros`, a node whose second view is zero, having no text, counts 0; to the others it is a cosine of 0.
    """
    user, items, mask, _ = map(jnp.asarray, batch)
    valid = mask[:, 0]
    sums = []
    for *both, nodes in zip(*views, (user, items[:, 0]), strict=True):
        one, other = (shards.take(view, nodes) for view in both)
        counted = valid * jnp.any(other != 0, axis=1) if skip_zeros else valid
        everyone = _of_all_devices(jnp.where(valid > 0, nodes, -1), other)
        sums.append(losses.info_nce(one, other, nodes, counted, everyone, temperature))
    return sums


def _of_all_devices(nodes: Int32[Array, "B"], view: Float32[Array, "B K"]) -> losses.Candidates:
    """Gathers nodes and their view from all devices."""
    gathered = all_gather(nodes, 0), all_gather(view, 0)
    return losses.Candidates(*(part.reshape(-1, *part.shape[2:]) for part in gathered))


def _reconstruction_loss(graph: DeviceGraph, users: Reconstruction, items: Reconstruction, batch: Batch) -> losses.Sum:
    """InfoNCE between predicted and real text features of the batch's masked nodes: users, and one positive of each.

    Users and items are in one denominator. Nodes without text are left out.
    """
    user, positives, mask, _ = map(jnp.asarray, batch)
    item = positives[:, 0]
    take = graph.shards.take
    predicted, text, masked = (
        jnp.concatenate([take(of_users.astype(jnp.float32), user), take(of_items.astype(jnp.float32), item)])
        for of_users, of_items in zip(users, items, strict=True)
    )
    nodes = jnp.concatenate([user, graph.count(USER) + item])
    counted = jnp.tile(mask[:, 0], 2) * masked * jnp.any(text != 0, axis=1)
    everyone = _of_all_devices(jnp.where(counted > 0, nodes, -1), text)
    return losses.info_nce(predicted, text, nodes, counted, everyone, RECONSTRUCTION_TEMPERATURE)


def _branch_loss(
    config: Config,
    vectors: tuple[Float[Array, "B _"], Float[Array, "I _"]],
    graph_inputs: GraphInputs,
    batch: Batch,
) -> losses.Sum:
    """The configured ranking loss of one branch, of the batch's users and all items."""
    graph, (_, items, mask, negatives) = graph_inputs.graph, map(jnp.asarray, batch)
    users = vectors[0].astype(config.train.dtype)
    catalogue = graph.all_gather(ITEM, vectors[1]).astype(config.train.dtype)
    # Logits include the popularity bias.
    bias = config.model.popularity_weight * jnp.log1p(jnp.asarray(graph_inputs.popularity))
    common, temperature = (users, catalogue, items, mask), config.train.temperature
    if config.train.loss == "bpr":
        return losses.bpr(*common, bias, negatives, temperature)
    trained_items = jnp.asarray(graph_inputs.trained_items)  # of all items, where the graph may be a sample of them
    if config.train.loss == "softmax":
        return losses.softmax(*common, jnp.where(trained_items, bias, -jnp.inf), temperature)
    shared = losses.Negatives(all_gather(negatives, 0).reshape(-1), trained_items.sum())
    return losses.sampled_softmax(*common, bias, shared, temperature)
