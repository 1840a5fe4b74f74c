"""Sharding of states, graph inputs and batches over devices, and the parallel train step and embedding."""

import dataclasses
import functools
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from fused_rec.config import Config, TrainConfig
from fused_rec.data.batches import Batch
from fused_rec.distributed import processes
from fused_rec.distributed.devices import (
    SHARDED,
    PmappedFn,
    Shards,
    device_put,
    local_indices,
    map_with_axes,
    pmap_over_devices,
    select_devices,
    shard_rows,
)
from fused_rec.graph.adjacency import Adjacency, shard_adjacency
from fused_rec.graph.device_graph import DeviceGraph
from fused_rec.graph.schema import Relation
from fused_rec.model.late_fusion import concat_components
from fused_rec.model.model import Vectors
from fused_rec.model.review_dropout import DeviceReviews
from fused_rec.training import lazy_adam
from fused_rec.training.train_step import (
    GraphInputs,
    Metrics,
    TrainState,
    compile_key,
    components_of,
    embed_nodes,
    sharding_axes,
    train_step,
    trained_vectors,
)

Embed = Callable[[PyTree, GraphInputs], Vectors]


@dataclasses.dataclass(frozen=True)
class ParallelStep:
    """A step on several devices, compiled once per structure of its arguments; equal steps share compiled programs.

    Attributes:
      step: a function of (*static, state, graph inputs, batch, *others) on one device's shares that returns (state,
        metrics).
      static: its first arguments, hashable.
      other_axes: device axes of its arguments after the batch; None: replicated.
      devices: the number of devices; None: all devices of all processes.
    """

    step: Callable[..., tuple[TrainState, Metrics]]
    static: tuple[Hashable, ...]
    other_axes: tuple = ()
    devices: int | None = None

    def __call__(
        self, state: TrainState, graph_inputs: GraphInputs, batch: Batch, *others: PyTree
    ) -> tuple[TrainState, Metrics]:
        """Takes a step from a sharded state, whose buffers are donated.

        Args:
          state: sharded.
          graph_inputs: sharded.
          batch: unsharded, on the host.
          others: sharded as `other_axes`.

        Returns:
          The next state, sharded, and the metrics, replicated.
        """
        return self.compiled(state, graph_inputs)(state, graph_inputs, shard_batch(batch, self.devices), *others)

    def compiled(self, state: TrainState, graph_inputs: GraphInputs) -> PmappedFn:
        """Returns the compiled program for such a state and graph inputs, of sharded arguments."""
        return _mapped_step(self, jax.tree.structure(state), jax.tree.structure(graph_inputs))


@functools.lru_cache(maxsize=8)
def _mapped_step(parallel: ParallelStep, states: Hashable, tasks: Hashable) -> PmappedFn:
    state, graph_inputs = sharding_axes(tree_of_structure(states)), graph_inputs_axes(tree_of_structure(tasks))
    return pmap_over_devices(
        functools.partial(parallel.step, *parallel.static),
        parallel.devices,
        in_axes=(state, graph_inputs, SHARDED, *parallel.other_axes),
        out_axes=(state, None),
        donate=(0,),
    )


def parallel_train_step(config: Config, devices: int | None = None) -> ParallelStep:
    """Builds the parallel `train_step`.

    Args:
      config: settings of the model and of training.
      devices: the number of devices; None: all devices of all processes.

    Returns:
      A function of (sharded state, sharded graph inputs, unsharded batch).
    """
    return ParallelStep(train_step, (compile_key(config),), devices=devices)


def parallel_embed_nodes(config: Config, devices: int | None = None) -> Embed:
    """Builds the parallel `embed_nodes`.

    Args:
      config: settings of the model and of training.
      devices: the number of devices; None: all devices of all processes.

    Returns:
      A function of (sharded parameters, sharded graph inputs) that returns the embeddings of all users and items,
      replicated on every device.
    """
    return functools.partial(_embed_nodes, compile_key(config), _all_or(devices))


def parallel_trained_vectors(
    config: Config, devices: int | None = None
) -> Callable[[PyTree, GraphInputs], dict[str, Vectors]]:
    """Builds the parallel `trained_vectors`.

    Args:
      config: settings of the model and of training.
      devices: the number of devices; None: all devices of all processes.

    Returns:
      A function of (sharded parameters, sharded graph inputs) that returns the vectors, replicated on every device.
    """
    return functools.partial(_embed, trained_vectors, compile_key(config), _all_or(devices))


def _embed_nodes(config: Config, devices: int | None, params: PyTree, graph_inputs: GraphInputs) -> Vectors:
    """`embed_nodes`; with late fusion from `trained_vectors`, whose program other weights and components share."""
    if graph_inputs.fusion is None:
        return _embed(embed_nodes, config, devices, params, graph_inputs)
    trained = _embed(trained_vectors, config, devices, params, dataclasses.replace(graph_inputs, fusion=None))
    return _mapped_fusion(devices, jax.tree.structure(graph_inputs))(trained, graph_inputs)


@functools.lru_cache(maxsize=8)
def _mapped_fusion(devices: int | None, tasks: Hashable) -> PmappedFn:
    def fused(trained: dict[str, Vectors], graph_inputs: GraphInputs) -> Vectors:
        return concat_components(components_of(trained, graph_inputs))

    in_axes = None, graph_inputs_axes(tree_of_structure(tasks))
    return pmap_over_devices(fused, devices, in_axes=in_axes, out_axes=None)


def trained_on_one_device(config: Config, params: PyTree, graph_inputs: GraphInputs) -> dict[str, Vectors]:
    """Computes `trained_vectors`; arguments as of `embed_on_one_device`."""
    placed = shard_state(params, 1, own=False), shard_graph_inputs(dataclasses.replace(graph_inputs, fusion=None), 1)
    return parallel_trained_vectors(config, 1)(*placed)


def embed_on_one_device(config: Config, params: PyTree, graph_inputs: GraphInputs) -> Vectors:
    """Computes the embeddings of all users and items; with the program of `parallel_embed_nodes` for one device.

    Args:
      config: settings of the model and of training.
      params: parameters, unsharded.
      graph_inputs: of the whole graph, unsharded.

    Returns:
      User and item embeddings, on the first device.
    """
    return parallel_embed_nodes(config, 1)(shard_state(params, 1, own=False), shard_graph_inputs(graph_inputs, 1))


def _all_or(devices: int | None) -> int | None:
    """None where these are all devices: one key of a compiled program."""
    return None if devices == len(select_devices(None)) else devices


def _embed(function: Callable, config: Config, devices: int | None, params: PyTree, graph_inputs: GraphInputs) -> Any:
    structures = jax.tree.structure(params), jax.tree.structure(graph_inputs)
    return _mapped_embed(function, config, devices, *structures)(params, graph_inputs)


@functools.lru_cache(maxsize=8)
def _mapped_embed(
    function: Callable, config: Config, devices: int | None, params: Hashable, tasks: Hashable
) -> PmappedFn:
    in_axes = sharding_axes(tree_of_structure(params)), graph_inputs_axes(tree_of_structure(tasks))
    return pmap_over_devices(functools.partial(function, config), devices, in_axes=in_axes, out_axes=None)


def settle(config: TrainConfig, state: TrainState, devices: int | None = None) -> TrainState:
    """Brings the ID rows of a sharded state up to date (train.lazy_adam); its buffers are donated.

    Args:
      config: of the optimizer.
      state: sharded.
      devices: the number of devices; None: all.

    Returns:
      The state that dense AdamW would have.
    """
    same = TrainConfig(learning_rate=config.learning_rate, weight_decay=config.weight_decay)
    return _mapped_settle(same, devices, jax.tree.structure(state))(state)


@functools.lru_cache(maxsize=8)
def _mapped_settle(config: TrainConfig, devices: int | None, states: Hashable) -> PmappedFn:
    axes = sharding_axes(tree_of_structure(states))
    function = functools.partial(lazy_adam.caught_up, config)
    return pmap_over_devices(function, devices, in_axes=(axes,), out_axes=axes, donate=(0,))


def tree_of_structure(structure: Any) -> PyTree:
    """Returns a tree of that structure with integers as leaves, for functions of the paths."""
    return jax.tree.unflatten(structure, range(structure.num_leaves))


def graph_inputs_axes(graph_inputs: GraphInputs) -> GraphInputs:
    """Returns the device axis of each array of sharded graph inputs; None: replicated."""
    absent: Any = None
    reviews = graph_inputs.reviews
    if reviews is not None:
        links, norms = jax.tree.map(lambda _: SHARDED, (reviews.links, reviews.norms))
        reviews = DeviceReviews(absent, absent, absent, absent, links, norms)
    return GraphInputs(jax.tree.map(lambda _: SHARDED, graph_inputs.graph), absent, absent, absent, reviews)


def shard_graph_inputs(
    graph_inputs: GraphInputs, devices: int | None = None, capacity: Mapping[Relation, int] | None = None
) -> GraphInputs:
    """Shards text embeddings by node and edges by receiver or sender; the rest is replicated.

    Edges from users to other nodes go to the device of the user (`Relation.by_sender`), whose rows then stay on their
    device. Item statistics and vectors of reviews are replicated.

    Args:
      graph_inputs: unsharded, on the host.
      devices: the number of devices; None: all.
      capacity: the number of edges per device that each relation is padded to, so that inputs of different sizes share
        one shape; None: the largest number on any device.

    Returns:
      Graph inputs on the devices.
    """
    shared = dataclasses.replace(graph_inputs, graph=_shard_graph(graph_inputs.graph, devices, capacity or {}))
    if (reviews := graph_inputs.reviews) is not None:
        links = {name: _shard_adjacency(adjacency, devices) for name, adjacency in reviews.links.items()}
        norms = {name: shard_rows(np.asarray(rows), devices) for name, rows in reviews.norms.items()}
        shared = dataclasses.replace(shared, reviews=dataclasses.replace(reviews, links=links, norms=norms))
    return device_put(shared, graph_inputs_axes(shared), devices)


def _shard_graph(graph: DeviceGraph, devices: int | None, capacity: Mapping[Relation, int]) -> DeviceGraph:
    """This process's part of text embeddings, node IDs and adjacencies, [devices, ...] each."""
    count = len(select_devices(devices))
    adjacencies = {
        relation: _shard_adjacency(adjacency, devices, capacity.get(relation), relation.by_sender)
        for relation, adjacency in graph.adjacencies.items()
    }
    text, node_ids = jax.tree.map(lambda rows: shard_rows(np.asarray(rows), devices), (graph.text, graph.node_ids))
    return dataclasses.replace(graph, text=text, adjacencies=adjacencies, node_ids=node_ids, shards=Shards(count))


def _shard_adjacency(
    adjacency: Adjacency, devices: int | None, capacity: int | None = None, by_sender: bool = False
) -> Adjacency:
    """This process's part of an adjacency, [devices, ...] each."""
    parts = shard_adjacency(adjacency, len(select_devices(devices)), capacity, by_sender)
    own = [parts[place] for place in local_indices(devices)]
    # One device reads the arrays in place.
    return jax.tree.map(lambda *of_devices: of_devices[0][None] if len(own) == 1 else np.stack(of_devices), *own)


def shard_state(state: PyTree, devices: int | None = None, *, own: bool = True) -> PyTree:
    """Shards ID embeddings and their moments by row and replicates the other leaves.

    Args:
      state: an unsharded state, or its parameters.
      devices: the number of devices; None: all.
      own: copy what a CPU device could read in place, for steps, which donate it.

    Returns:
      The same tree on the devices.
    """
    axes = sharding_axes(state)

    def part(axis: int | None, leaf: Any) -> np.ndarray:
        return np.asarray(leaf) if axis is None else shard_rows(np.asarray(leaf), devices)

    return device_put(map_with_axes(part, axes, state), axes, devices, own=own)


def gather_state(state: PyTree, like: PyTree, devices: int | None = None) -> PyTree:
    """Gathers a sharded state in every process, the inverse of `shard_state`.

    Args:
      state: a sharded state, or its parameters.
      like: the unsharded tree, of arrays or shapes.
      devices: the number of devices; None: all.

    Returns:
      The unsharded tree, of NumPy arrays.
    """
    places_of, structure = jax.tree.flatten(sharding_axes(state), is_leaf=lambda axis: axis is None)
    leaves, shapes = jax.tree.leaves(state), jax.tree.leaves(like)
    sharded = [leaf for axis, leaf in zip(places_of, leaves, strict=True) if axis is not None]
    # One process has all rows, and no device needs to have them.
    on_host = processes.is_single_process() or not sharded
    gathered = iter(map(_on_host, sharded) if on_host else _gather(devices)(sharded))
    whole = [
        leaf if axis is None else next(gathered)[: len(shape)]
        for axis, leaf, shape in zip(places_of, leaves, shapes, strict=True)
    ]
    return jax.device_get(jax.tree.unflatten(structure, whole))


def _on_host(leaf: jax.Array) -> np.ndarray:
    """Copies rows [devices, rows, ...] of this process's devices to [rows * devices, ...], in their global order."""
    count, rows, *others = leaf.shape
    whole = np.empty((count * rows, *others), leaf.dtype)
    for shard in leaf.addressable_shards:
        whole[shard.index[0].start or 0 :: count] = np.asarray(shard.data)[0]
    return whole


@functools.lru_cache(maxsize=8)
def _gather(devices: int | None) -> Callable:
    shards = Shards(len(select_devices(devices)))
    return pmap_over_devices(
        functools.partial(jax.tree.map, shards.all_gather), devices, in_axes=(SHARDED,), out_axes=None
    )


def shard_batch(batch: Batch, devices: int | None = None) -> Batch:
    """Divides a batch over devices: [B, ...] to this process's part of [devices, B / devices, ...].

    Padded users have a mask of 0 and negatives of -1, so that shared negatives do not depend on the number of devices.

    Args:
      batch: of the whole step.
      devices: the number of devices; None: all.

    Returns:
      The part of this process's devices, on the host.
    """
    count = len(select_devices(devices))
    rows = -len(batch.users) % count
    padded = Batch(
        users=_pad(batch.users, rows),
        items=_pad(batch.items, rows),
        mask=_pad(batch.mask, rows),
        negatives=_pad(batch.negatives, rows, fill=-1),
    )
    return Batch(*(part.reshape(count, len(part) // count, *part.shape[1:])[local_indices(devices)] for part in padded))


def _pad(part: np.ndarray, rows: int, fill: int = 0) -> np.ndarray:
    return np.pad(part, [(0, rows)] + [(0, 0)] * (part.ndim - 1), constant_values=fill)
