"""Late fusion of two finished runs: a weighted sum of their standardized scores, with one weight chosen on validation.

The rival of a model that reads both inputs: each method is trained alone, and their scores are added afterwards.
"""

import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from fused_rec.evaluation.ranking import mean
from fused_rec.model.late_fusion import Vectors, inverse_deviation
from fused_rec.runs import run_dir
from fused_rec.serving.recommender import load_measured
from fused_rec.training.evaluate import (
    evaluate_mean,
    evaluate_slices,
    evaluate_users,
    scores_of,
    user_item_vectors,
)
from fused_rec.training.inputs import Prepared

WEIGHTS = tuple(np.linspace(0, 1, 11).round(1).tolist())  # of the first run; the second has the rest


def fuse_runs(first: Path, second: Path, out: Path) -> None:
    """Chooses the weight of two runs by train.metric on validation, and evaluates their sum on the test split once.

    score(u, i) = w s_1(u, i) / sigma_1(u) + (1 - w) s_2(u, i) / sigma_2(u), sigma_m(u) being the standard deviation of
    run m's scores over all items. The sum has no choice but w: at its ends it is one of the runs.

    Args:
      first: folder of a finished run.
      second: folder of another finished run of the same tables, split and seed.
      out: folder of the result, in which `results.json` and the test metrics per user are written as those of a run.

    Raises:
      FileNotFoundError: a run is not finished.
      TablesChangedError: the tables are not those of the runs.
      BusyError: another process works in `out`.
      InsufficientMemoryError: the vectors do not fit in memory.
    """
    began, folders = time.monotonic(), (first, second)
    found = [run_dir.read_results(folder) for folder in folders]
    prepared, vectors = _standardized(folders, "valid")
    metric = found[0]["config"]["train"]["metric"]
    valid = [evaluate_mean(prepared, _scorer(prepared, vectors, weight), "valid") for weight in WEIGHTS]
    best = int(np.argmax([of_weight[metric] for of_weight in valid]))
    if found[0]["config"]["train"]["refit"] == "valid":
        prepared, vectors = _standardized(folders, "test")
    score = _scorer(prepared, vectors, WEIGHTS[best])
    per_user = evaluate_users(prepared, score, "test")
    results = {
        **{name: found[0][name] for name in ("dataset", "split", "seed")},
        "weights": [WEIGHTS[best], 1 - WEIGHTS[best]],
        "valid": valid[best],
        "test": mean(per_user),
        "slices": evaluate_slices(prepared, score, per_user),
        "seconds": round(sum(of_run["seconds"] for of_run in found) + time.monotonic() - began, 1),
        "parameters": sum(of_run["parameters"] for of_run in found),
        "versions": run_dir.versions(),
        "finished": run_dir.now(),
    }
    with run_dir.lock_run_dir(out):
        run_dir.write_users(out / run_dir.TEST_METRICS_PER_USER, per_user)
        run_dir.write_json(out / run_dir.RESULTS, results)


def _standardized(folders: tuple[Path, ...], model: str) -> tuple[Prepared, list[Vectors]]:
    """Returns the inputs of the last run, and of each run vectors whose scores have standard deviation 1 or 0."""
    found = []
    for folder in folders:
        config, prepared, state = load_measured(folder, model)
        users, items = map(jnp.asarray, user_item_vectors(config, prepared, state))
        found.append((users * inverse_deviation(users, items)[:, None], items))
    return prepared, found


def _scorer(prepared: Prepared, vectors: list[Vectors], weight: float) -> Partial:
    (users, items), (other_users, other_items) = vectors
    joined = jnp.concatenate([weight * users, (1 - weight) * other_users], axis=1)
    return Partial(scores_of, joined, jnp.concatenate([items, other_items], axis=1), prepared.graph_inputs.popularity)
