"""A peer of the benchmark's protocol without any package but NumPy: LightGCN's loss and rankings over dense matrices.

The script that `tests/test_benchmark.py` measures us against; its loss is that of the published equations.
"""

import os
import signal
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments" / "competitors"))

from protocol import answer  # pyright: ignore[reportMissingImports]


def step(job, arrays):
    """The loss alone: nothing is learned here."""
    n_users, n_items = arrays["shape"]
    held = np.zeros((n_users, n_items))
    held[arrays["user"], arrays["item"]] = 1
    degrees = held.sum(1, keepdims=True) * held.sum(0, keepdims=True)
    weight = held / np.sqrt(np.maximum(degrees, 1))

    def call(number):
        users, items = np.split(arrays["rows"].astype(float), [n_users])
        sums = [users, items]
        for _ in range(job["num_layers"]):
            users, items = weight @ items, weight.T @ users
            sums = [sums[0] + users, sums[1] + items]
        users, items = (part / (job["num_layers"] + 1) for part in sums)
        user, item, other = (arrays[f"batch_{name}"][number] for name in ("user", "item", "other"))
        margin = (users[user] * (items[item] - items[other])).sum(1)
        return np.log1p(np.exp(-margin)).mean()

    return call


def rank(job, arrays):
    """Sorts every row of scores."""
    users, items = np.split(arrays["rows"], [arrays["shape"][0]])

    def call(number):
        print("a library may print what it likes")
        scores = users @ items.T
        scores[arrays["user"], arrays["item"]] = -np.inf
        return np.argsort(-scores, axis=1, kind="stable")[:, : job["k"]]

    return call


def fails(job, arrays):
    """As a package does that does not take the data."""
    raise RuntimeError("it does not take the data")


def is_killed(job, arrays):
    """As the system does with the process that it has end first where memory ends."""
    assert Path("/proc/self/oom_score_adj").read_text() == "1000\n"
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    tasks = {"step": ((), step), "rank": (("numpy",), rank), "fails": ((), fails), "is_killed": ((), is_killed)}
    answer(tasks, ("numpy",))
