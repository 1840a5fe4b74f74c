"""What a process of the benchmark is asked and answers, ours and a peer's alike: the standard library and NumPy.

The harness writes one job as JSON to standard input and reads one JSON object, the last line of standard output:

    job     task; arrays: an .npz file; started: the clock (s since the epoch) when the process was started;
            repeats, warmup: calls; threads; result: an .npy file to write; and the settings of the task
    answer  seconds: of each measured call; compile_s: the first call beyond the median of the measured ones; load_s:
            from the arrays on disk to what the first call needs, without imports; first_s: from the start of the
            process to the end of the first call; peak_mb: resident memory at its highest, MiB; versions

A script offers tasks, each the modules to import beforehand and a function of (job, arrays) that prepares and returns
the function that is called. It is called with its number, returns when the work is done, and what its first call
returns is kept for the harness to check.

A job with `jobs`, a list of jobs, is answered by `answers`, one for each or its `error`, all in one process; and by
`device`, what the process computed on.
"""

import contextlib
import gc
import importlib
import importlib.metadata
import json
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Job = dict[str, Any]
Arrays = Mapping[str, np.ndarray]
Task = tuple[Sequence[str], Callable[[Job, Arrays], Callable[[int], Any]]]

# In the job's arrays. U users, I items, E training pairs ascending by (user, item), S batches of B pairs.
ARRAYS = {
    "shape": "int64 [2]: U, I",
    "user": "int32 [E], and `item`: the training pairs",
    "test_user": "int32 [T], and `test_item`: the held-out pairs",
    "rows": "float32 [U + I, K]: first embeddings (task step) or final vectors (rank, measure), users before items",
    "batch_user": "int32 [S, B], and `batch_item`, `batch_other`: who holds what, and does not hold what",
}


def answer(
    tasks: Mapping[str, Task], packages: Sequence[str], device: Callable[[Job], dict[str, Any]] | None = None
) -> None:
    """Reads the job, does it and writes the answer.

    What libraries print goes to standard error, so that the answer stays readable.

    Args:
      tasks: the tasks by name.
      packages: those whose versions are told.
      device: describes what the process computes on, for a job with `jobs`.
    """
    job = json.load(sys.stdin)
    end_first()
    with contextlib.redirect_stdout(sys.stderr):
        if "jobs" in job:
            answers = [_attempted(tasks, {**job, **one}) for one in job["jobs"]]
            answer = {"answers": answers, "device": device(job) if device else {}}
        else:
            answer = measured(tasks[job["task"]], job)
    versions = {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages}
    print(json.dumps({**answer, "peak_mb": peak_mb(), "versions": versions}), flush=True)


def end_first() -> None:
    """Has Linux end this process before any other where memory ends: the harness goes on, and reports it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")


def _attempted(tasks: Mapping[str, Task], job: Job) -> dict[str, Any]:
    """Answers one of several jobs, or says what failed: the others are done all the same."""
    try:
        return measured(tasks[job["task"]], job)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
    finally:
        gc.collect()  # the memory of the device is for the next job


def measured(graph_inputs: Task, job: Job) -> dict[str, Any]:
    """Prepares the task and calls it 1 + warmup + repeats times."""
    modules, prepare = graph_inputs
    for module in modules:
        importlib.import_module(module)
    began = time.perf_counter()
    with np.load(job["arrays"], allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}
    once = prepare(job, arrays)
    del arrays  # a side keeps what it needs
    load_s = time.perf_counter() - began
    seconds, first_s = [], 0.0
    for number in range(1 + job["warmup"] + job["repeats"]):
        began = time.perf_counter()
        result = once(number)
        seconds.append(time.perf_counter() - began)
        if number == 0:
            first_s = time.time() - job["started"]
            np.save(job["result"], np.asarray(result), allow_pickle=False)
    kept = seconds[1 + job["warmup"] :]
    return {
        "seconds": kept,
        "compile_s": max(0.0, seconds[0] - statistics.median(kept)),
        "load_s": load_s,
        "first_s": first_s,
    }


def learning(job: Job, advance: Callable[[], None], vectors: Callable[[], np.ndarray]) -> Callable[[int], float]:
    """Trains for job["segment"] seconds in each call, and keeps the vectors with the time since the process started.

    Args:
      job: of which `snapshots` is the path of the files, without number and suffix.
      advance: takes one step.
      vectors: users' and items' vectors, whose inner products are scores.
    """

    def call(number: int) -> float:
        end = time.perf_counter() + job["segment"]
        while time.perf_counter() < end:
            advance()
        np.savez(f"{job['snapshots']}_{number}.npz", rows=vectors(), seconds=time.time() - job["started"])
        return 0.0

    return call


def triples(job: Job, arrays: Arrays) -> Callable[[], tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Samples job["pairs"] training pairs and for each an item that its user does not hold, anew in each call."""
    n_items, rng = int(arrays["shape"][1]), np.random.default_rng(0)
    user, item = (arrays[name].astype(np.int64) for name in ("user", "item"))
    keys = user * n_items + item

    def call():
        place = rng.integers(0, len(user), job["pairs"])
        return user[place], item[place], not_held(user[place], keys, n_items, rng)

    return call


def not_held(user: np.ndarray, keys: np.ndarray, n_items: int, rng: np.random.Generator) -> np.ndarray:
    """Samples for each user an item that is not theirs.

    Args:
      user: int64 rows, of any shape.
      keys: user * n_items + item of all training pairs, ascending.
      n_items: I.
      rng: the random generator.

    Returns:
      Item rows; a user who holds half the catalogue is left with a held one once in a million draws.
    """
    other = rng.integers(0, n_items, user.shape)
    for _ in range(20):
        key = user * n_items + other
        held = keys[np.minimum(np.searchsorted(keys, key), len(keys) - 1)] == key
        other[held] = rng.integers(0, n_items, held.sum())
    return other


def peak_mb() -> float:
    """The highest resident memory of this process, MiB.

    On Linux as the kernel keeps it of this program: what getrusage tells may be that of the process that started it.
    """
    status = Path("/proc/self/status")
    if status.exists():
        return int(re.findall(r"VmHWM:\s+(\d+) kB", status.read_text(encoding="ascii"))[0]) / 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # bytes on macOS
