"""The type of a training step's matrix products: as the config names it, or as a probe at the start finds it faster."""

import dataclasses
import functools
import logging
import time
import typing
from pathlib import Path

import jax
import jax.numpy as jnp

from fused_rec.config import ComputeDtype, Config
from fused_rec.distributed import processes
from fused_rec.graph.schema import ITEM
from fused_rec.model.cross_entropy import Targets, cross_entropy
from fused_rec.model.text_fusion import project
from fused_rec.rng import numbered_rng
from fused_rec.runs.run_dir import read_json_object, write_json
from fused_rec.training.train_step import GraphInputs

LOG = logging.getLogger(__name__)
CHOICE = "compute_type.json"  # of a run: what its probe measured, which a resumed run reads
GAIN = 0.9  # bfloat16 is taken where it needs less than this share of the time
MOST_ROWS, REPEATS = 1 << 15, 5


@dataclasses.dataclass(frozen=True)
class ComputeType:
    """The type that a step multiplies in.

    Attributes:
      dtype: the type.
      milliseconds: of the probed products in each type; empty without a probe.
    """

    dtype: ComputeDtype
    milliseconds: dict[str, float]


def choose_compute_type(config: Config, graph_inputs: GraphInputs, folder: Path | None = None) -> ComputeType:
    """Returns train.compute_dtype, or with `auto` what the machine multiplies faster by a clear margin.

    Args:
      config: of which train.compute_dtype, train.batch_size and model.dim count.
      graph_inputs: of which numbers of items and columns of text count.
      folder: of the run, where the first choice is kept and later ones are read; None: it is not kept.

    Returns:
      The type, the same in all processes.
    """
    named = config.train.compute_dtype
    if named != "auto":
        return ComputeType(named, {})
    file = folder and folder / CHOICE
    kept = processes.is_primary() and file is not None and file.exists()
    if processes.broadcast_json(kept):
        return ComputeType(**processes.broadcast_json(read_json_object(file) if file is not None and kept else None))
    text = graph_inputs.graph.text[ITEM].shape[1] if config.model.uses_text else 1
    items = min(graph_inputs.graph.count(ITEM), MOST_ROWS)
    seconds = _probe(items, text, config.model.dim, config.train.batch_size)
    seconds = processes.broadcast_json(seconds)
    dtype: ComputeDtype = "bfloat16" if seconds["bfloat16"] < GAIN * seconds["float32"] else "float32"
    choice = ComputeType(dtype, {name: round(1e3 * value, 2) for name, value in seconds.items()})
    LOG.info("train.compute_dtype is auto: %s, of products in %s milliseconds", choice.dtype, choice.milliseconds)
    if file is not None and processes.is_primary():
        write_json(file, dataclasses.asdict(choice))
    return choice


@functools.cache
def _probe(items: int, text: int, dim: int, users: int) -> dict[str, float]:
    """Measures the products of a step in each type, with their derivatives, in seconds: the least of several calls."""
    rng = numbered_rng(0, 0)
    rows, matrix, user = (
        jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((items, text), (text, dim), (users, dim))
    )
    targets = Targets(jnp.zeros((users, 1), jnp.int32), jnp.ones((users, 1)), jnp.zeros(items))

    @functools.partial(jax.jit, static_argnums=3)
    @functools.partial(jax.grad, argnums=(1, 2))
    def step(rows: jax.Array, matrix: jax.Array, user: jax.Array, dtype: ComputeDtype) -> jax.Array:
        catalogue = project(rows, matrix, dtype)
        return cross_entropy(1.0, user.astype(dtype), catalogue.astype(dtype), targets)

    found = {}
    for dtype in typing.get_args(ComputeDtype):
        seconds = []
        for _ in range(1 + REPEATS):  # the first call compiles
            began = time.perf_counter()
            jax.block_until_ready(step(rows, matrix, user, dtype))
            seconds.append(time.perf_counter() - began)
        found[dtype] = min(seconds[1:])
    return found
