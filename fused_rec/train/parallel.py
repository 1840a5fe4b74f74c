"""The only `jax.pmap`: one program over all devices, the state without a device axis."""

import functools
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float32, PyTree

from fused_rec.config import Config
from fused_rec.data.batches import Batch
from fused_rec.train.step import AXIS, Task, TrainState, program, train_step

Step = Callable[[TrainState, Task, Batch], tuple[TrainState, Float32[Array, ""]]]


def parallel_step(config: Config, devices: int | None = None) -> Step:
    """`train_step` over the first `devices` local devices (None: all): state and task replicated, the batch split.

    The state that goes in is given up (donated) to the state that comes out.
    """
    return _mapped_step(program(config), devices)


@functools.lru_cache(maxsize=8)
def _mapped_step(config: Config, devices: int | None) -> Step:
    chosen = jax.local_devices()[:devices]
    mapped = jax.pmap(
        functools.partial(train_step, config),
        axis_name=AXIS,
        devices=chosen,
        in_axes=(None, None, 0),
        out_axes=(None, None),
        donate_argnums=(0,),
    )

    def step(state: TrainState, task: Task, batch: Batch) -> tuple[TrainState, Float32[Array, ""]]:
        return mapped(state, task, split_batch(batch, len(chosen)))

    return step


def split_batch(batch: Batch, devices: int) -> Batch:
    """Adds the device axis: [B, ...] to [devices, B / devices, ...]; users added to fill up have an empty mask.

    Their negatives are -1, so that those a device shares with others do not depend on the number of devices.
    """
    rows = -len(batch.users) % devices
    padded = Batch(
        users=_pad(batch.users, rows),
        items=_pad(batch.items, rows),
        mask=_pad(batch.mask, rows),
        negatives=_pad(batch.negatives, rows, fill=-1),
    )
    return Batch(*(part.reshape(devices, -1, *part.shape[1:]) for part in padded))


def _pad(part: np.ndarray, rows: int, fill: int = 0) -> np.ndarray:
    return np.pad(part, [(0, rows)] + [(0, 0)] * (part.ndim - 1), constant_values=fill)


def replicate(tree: PyTree, devices: int | None = None) -> PyTree:
    """Places a copy on the devices of `parallel_step`, before the first step, which would compile twice otherwise."""
    mesh = Mesh(np.array(jax.local_devices()[:devices]), (AXIS,))
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))
