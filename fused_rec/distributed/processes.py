"""Runs of several processes, each with its own devices: initialization and collectives on the host.

All processes read the same tables and make the same decisions; what only one can know (files of the workdir, a stop
request) is broadcast. The first process writes files.
"""

import json
import re
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Bool, Float, Int, PyTree

START_SECONDS = 300  # how long the first processes wait for the last
HEARTBEAT_SECONDS = 20  # without a sign of life a process counts as dead, and the others stop
SHUTDOWN_SECONDS = 15  # how long an ending process waits for the others to end
_STATUS = re.compile("(ABORTED|CANCELLED|DEADLINE_EXCEEDED|INTERNAL|UNAVAILABLE|UNKNOWN): ")


def connect(coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None) -> None:
    """Connects this process to the others; must be called before JAX is used.

    Args:
      coordinator: host and port of the first process.
      num_processes: number of processes.
      process_id: index of this process, from 0. If all three are None, JAX asks the cluster: SLURM, Open MPI,
        Kubernetes (GKE), Cloud TPU.

    Raises:
      ValueError: only some arguments are given, or one is out of bounds.
      RuntimeError: not all processes connected within `START_SECONDS`, or no cluster answers.
    """
    given = coordinator, num_processes, process_id
    if any(part is None for part in given) and any(part is not None for part in given):
        raise ValueError(
            f"coordinator is {coordinator!r}, processes {num_processes!r} and process {process_id!r}; give all "
            f"three, or none "
            "where the cluster tells them"
        )
    if num_processes is not None and process_id is not None and not 0 <= process_id < num_processes:
        raise ValueError(f"process is {process_id}; it must be from 0 to {num_processes - 1}, one less than processes")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # it takes SIGTERM for itself
    jax.distributed.initialize(
        coordinator,
        num_processes,
        process_id,
        initialization_timeout=START_SECONDS,
        heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        shutdown_timeout_seconds=SHUTDOWN_SECONDS,
    )


def is_single_process() -> bool:
    """Returns whether this is the run's only process."""
    return jax.process_count() == 1


def is_collective_failure(error: Exception) -> bool:
    """Returns whether an error means that other processes of the run have ended or cannot be reached.

    A failed collective raises a RuntimeError, or, if it fails at dispatch, a ValueError that begins with its status.
    """
    broken = isinstance(error, RuntimeError) or _STATUS.match(str(error)) is not None
    return broken and not is_single_process()


def is_primary() -> bool:
    """Returns whether this is the process that writes files."""
    return jax.process_index() == 0


def broadcast_arrays(tree: PyTree) -> PyTree:
    """Broadcasts the first process's arrays.

    Args:
      tree: arrays with the same shapes and dtypes in all processes.

    Returns:
      The first process's tree, as NumPy arrays.
    """
    if is_single_process():
        return tree
    return jax.tree.map(np.asarray, multihost_utils.broadcast_one_to_all(tree))


def broadcast_json(value: Any) -> Any:
    """Broadcasts the first process's JSON value."""
    if is_single_process():
        return value
    written = np.frombuffer(json.dumps(value).encode(), np.uint8)
    length = int(broadcast_arrays(np.int32(len(written))))
    sent = np.resize(written, length) if is_primary() else np.zeros(length, np.uint8)
    return json.loads(broadcast_arrays(sent).tobytes())


def any_process(flag: bool) -> bool:
    """Returns whether the flag is set in any process."""
    return flag if is_single_process() else bool(multihost_utils.process_allgather(np.array(flag)).any())


def any_process_elementwise(flags: Bool[np.ndarray, "n"]) -> Bool[np.ndarray, "n"]:
    """Returns the elementwise or of the flags of all processes, [n] in each."""
    return flags if is_single_process() else multihost_utils.process_allgather(flags).any(0)


def local_shard(rows: Int[np.ndarray, "n"]) -> Int[np.ndarray, "m"]:
    """Returns this process's share of rows that are the same in all processes."""
    return rows[jax.process_index() :: jax.process_count()]


def gather_shards(rows: Int[np.ndarray, "n"], done: Float[np.ndarray, "m D"]) -> Float[np.ndarray, "n D"]:
    """Gathers the results of all processes for their `local_shard`.

    Args:
      rows: int [n], the same rows in all processes.
      done: [m, D], results of this process's shard.

    Returns:
      [n, D], in the order of the rows.
    """
    if is_single_process():
        return done
    count = jax.process_count()
    padded = np.pad(done, ((0, -(-len(rows) // count) - len(done)), (0, 0)))
    return multihost_utils.process_allgather(padded).swapaxes(0, 1).reshape(-1, done.shape[1])[: len(rows)]


def check_equal_across_processes(what: str, value: str) -> None:
    """Checks that a value is the same in all processes.

    Args:
      what: name of the value, for the message.
      value: the value.

    Raises:
      ValueError: this process's value differs from the first one's.
    """
    if value != (first := broadcast_json(value)):
        raise ValueError(
            f"{what} is {value} in process {jax.process_index()} and {first} in process 0; start all processes of a "
            "run with the same command, on the same tables"
        )
