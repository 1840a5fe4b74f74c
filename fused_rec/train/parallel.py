"""States, tasks and batches on their way to all devices and back."""

import dataclasses
import functools
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float32, PyTree

from fused_rec.config import Config
from fused_rec.data.batches import Batch
from fused_rec.devices import DIVIDED, AnyArray, Mapped, Shards, by_axis, by_rows, over_devices, places, put, used
from fused_rec.graph.hetero import HeteroGraph, Relation
from fused_rec.graph.propagate import divide
from fused_rec.model.fused import Vectors
from fused_rec.train.step import Task, TrainState, axes, embed, program, train_step

Step = Callable[[TrainState, Task, Batch], tuple[TrainState, Float32[Array, ""]]]
Embed = Callable[[PyTree, Task], Vectors]


def parallel_step(config: Config, devices: int | None = None) -> Step:
    """`train_step` over the first `devices` (None: all, of every process): a divided state and task, a whole batch.

    The state that goes in is given up (donated) to the state that comes out.
    """
    return functools.partial(_step, program(config), devices)


def parallel_embed(config: Config, devices: int | None = None) -> Embed:
    """`embed` over the same devices: of divided parameters and task, the vectors of all nodes on every device."""
    return functools.partial(_embed, program(config), devices)


def _step(
    config: Config, devices: int | None, state: TrainState, task: Task, batch: Batch
) -> tuple[TrainState, Float32[Array, ""]]:
    return mapped_step(config, devices, state, task)(state, task, split_batch(batch, devices))


def mapped_step(config: Config, devices: int | None, state: TrainState, task: Task) -> Mapped:
    """The compiled program behind `parallel_step`, of a batch that is split already."""
    return _mapped_step(program(config), devices, jax.tree.structure(state), jax.tree.structure(task))


@functools.lru_cache(maxsize=8)
def _mapped_step(config: Config, devices: int | None, states: Hashable, tasks: Hashable) -> Mapped:
    state, task = axes(shape_of(states)), task_axes(shape_of(tasks))
    step = functools.partial(train_step, config)
    return over_devices(step, devices, in_axes=(state, task, DIVIDED), out_axes=(state, None), donate=(0,))


def _embed(config: Config, devices: int | None, params: PyTree, task: Task) -> Vectors:
    return _mapped_embed(config, devices, jax.tree.structure(params), jax.tree.structure(task))(params, task)


@functools.lru_cache(maxsize=8)
def _mapped_embed(config: Config, devices: int | None, params: Hashable, tasks: Hashable) -> Mapped:
    in_axes = axes(shape_of(params)), task_axes(shape_of(tasks))
    return over_devices(functools.partial(embed, config), devices, in_axes=in_axes, out_axes=None)


def shape_of(structure: Any) -> PyTree:
    """A tree of that structure, for what is asked of the paths alone."""
    return jax.tree.unflatten(structure, range(structure.num_leaves))


def task_axes(task: Task) -> Task:
    """Where each array of a divided task has its devices; None: every device has it whole."""
    absent: Any = None
    graph, adjacencies = jax.tree.map(lambda _: DIVIDED, (task.graph, task.adjacencies))
    return Task(graph, adjacencies, absent, absent, absent)


def divide_task(task: Task, devices: int | None = None, room: Mapping[Relation, int] | None = None) -> Task:
    """Gives each device its rows of the texts and the edges into them; counts of items go to all.

    room: how many edges each device gets, filled up, so that tasks of unlike size have one shape; None: no more than
    it takes.
    """
    count, room = len(used(devices)), room or {}
    divided = {r: divide(adjacency, count, room.get(r)) for r, adjacency in task.adjacencies.items()}
    adjacencies = {
        relation: jax.tree.map(lambda *of_devices: np.stack(of_devices), *(parts[place] for place in places(devices)))
        for relation, parts in divided.items()
    }
    shared = Task(_divide_nodes(task.graph, devices), adjacencies, task.present, task.popularity, task.spectrum)
    return put(shared, task_axes(shared), devices)


def _divide_nodes(graph: HeteroGraph, devices: int | None) -> HeteroGraph:
    def part(of_nodes: AnyArray) -> np.ndarray:
        of_types = [np.asarray(of_nodes[graph.node_slice(node_type)]) for node_type, _ in graph.node_types]
        return np.concatenate([by_rows(rows, devices) for rows in of_types], axis=1)

    nothing = dict.fromkeys(("edges", "senders", "receivers", "n_node", "n_edge"))  # the adjacencies tell
    bare = graph.graph._replace(nodes=jax.tree.map(part, graph.graph.nodes), **nothing)
    return dataclasses.replace(graph, graph=bare, shards=Shards(len(used(devices))))


def divide_state(state: PyTree, devices: int | None = None) -> PyTree:
    """Gives each device its id rows and the rest whole: of a state, or of its parameters, as `init` makes them."""
    divided = axes(state)

    def part(axis: int | None, leaf: AnyArray) -> np.ndarray:
        return np.asarray(leaf) if axis is None else by_rows(np.asarray(leaf), devices)

    return put(by_axis(part, divided, state), divided, devices)


def whole_state(state: PyTree, like: PyTree, devices: int | None = None) -> PyTree:
    """The inverse of `divide_state` in every process, as NumPy arrays. like: arrays or shapes of the whole."""
    places_of, structure = jax.tree.flatten(axes(state), is_leaf=lambda axis: axis is None)
    leaves, shapes = jax.tree.leaves(state), jax.tree.leaves(like)
    divided = [leaf for axis, leaf in zip(places_of, leaves, strict=True) if axis is not None]
    gathered = iter(_gather(devices)(divided) if divided else ())
    whole = [
        leaf if axis is None else next(gathered)[: len(shape)]
        for axis, leaf, shape in zip(places_of, leaves, shapes, strict=True)
    ]
    return jax.device_get(jax.tree.unflatten(structure, whole))


@functools.lru_cache(maxsize=8)
def _gather(devices: int | None) -> Callable:
    shards = Shards(len(used(devices)))
    return over_devices(functools.partial(jax.tree.map, shards.whole), devices, in_axes=(DIVIDED,), out_axes=None)


def split_batch(batch: Batch, devices: int | None = None) -> Batch:
    """Adds the device axis: [B, ...] to this process's part of [devices, B / devices, ...].

    Users added to fill up have an empty mask, and negatives of -1, so that those a device shares with others do not
    depend on the number of devices.
    """
    count = len(used(devices))
    rows = -len(batch.users) % count
    padded = Batch(
        users=_pad(batch.users, rows),
        items=_pad(batch.items, rows),
        mask=_pad(batch.mask, rows),
        negatives=_pad(batch.negatives, rows, fill=-1),
    )
    return Batch(*(part.reshape(count, -1, *part.shape[1:])[places(devices)] for part in padded))


def _pad(part: np.ndarray, rows: int, fill: int = 0) -> np.ndarray:
    return np.pad(part, [(0, rows)] + [(0, 0)] * (part.ndim - 1), constant_values=fill)
