"""The only `jax.pmap`: one program over all devices, the state without a device axis."""

import functools
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float32, PyTree

from fused_rec.config import Config
from fused_rec.data.batches import Batch
from fused_rec.train.step import AXIS, Task, TrainState, train_step

Step = Callable[[TrainState, Task, Batch], tuple[TrainState, Float32[Array, ""]]]


def parallel_step(config: Config) -> Step:
    """`train_step` mapped over the local devices: state and task replicated, the batch split by its first axis.

    The state that goes in is given up (donated) to the state that comes out.
    """
    mapped = jax.pmap(
        functools.partial(train_step, config),
        axis_name=AXIS,
        in_axes=(None, None, 0),
        out_axes=(None, None),
        donate_argnums=(0,),
    )

    def step(state: TrainState, task: Task, batch: Batch) -> tuple[TrainState, Float32[Array, ""]]:
        return mapped(state, task, split_batch(batch))

    return step


def split_batch(batch: Batch) -> Batch:
    """Adds the device axis: [B, ...] to [devices, B / devices, ...], the last users padded with an empty mask."""
    devices = jax.local_device_count()
    padding = -len(batch.users) % devices
    return Batch(*(_pad(part, padding).reshape(devices, -1, *part.shape[1:]) for part in batch))


def _pad(part: np.ndarray, rows: int) -> np.ndarray:
    return np.pad(part, [(0, rows)] + [(0, 0)] * (part.ndim - 1))


def replicate(tree: PyTree) -> PyTree:
    """Places a copy on every local device, before the first step, which would compile twice otherwise."""
    mesh = Mesh(np.array(jax.local_devices()), (AXIS,))
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))
