"""Regret: fused against the best single method of finished comparisons, a row per task. Nothing is trained.

A single method is a baseline, a published model or a variant with one of the inputs; ablations of fused and controls
are none (`fused_rec.studies.compare.is_single`). Each task has two opponents:

- test: the best by test mean. No one can choose it in advance, so the relative difference understates fused.
- valid: the best by validation mean, which a user could have chosen.
"""

import dataclasses
import importlib.util
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fused_rec.evaluation import plots
from fused_rec.evaluation.result_tables import csv_table, in_markdown, markdown_table, relative_text
from fused_rec.evaluation.significance import paired_bootstrap
from fused_rec.runs import run_dir
from fused_rec.storage import write_figure, write_file
from fused_rec.studies.compare import REPORT, best_name, complete_names, is_single, run_values, runs_folder
from fused_rec.studies.variants import REFERENCE

LOG = logging.getLogger(__name__)
CHOSEN_ON = ("test", "valid")


def regret(folders: Sequence[Path], metric: str = "ndcg@10") -> dict[str, Any]:
    """Compares fused with the best single method of each comparison.

    Args:
      folders: of `fused_rec.studies.compare`, each finished and of another task.
      metric: of the choice on either split, and of the comparison.

    Returns:
      "metric"; "rows", by task: "task", "trials", "seeds", "mean" of fused, and for "test" and "valid" the "variant",
      its "mean", and the fields of the `Difference` of fused to it (`paired_bootstrap` over users and seeds); and
      "mean", for "test" and "valid" the mean relative difference over tasks.

    Raises:
      FileNotFoundError, ValueError: a comparison is missing, damaged, or without fused or a single method.
    """
    rows = [_row(folder, metric) for folder in folders]
    repeated = {row["task"] for row in rows if sum(row["task"] == other["task"] for other in rows) > 1}
    for row, folder in zip(rows, folders, strict=True):
        if row["task"] in repeated:
            row["task"] += f" ({folder})"
    means = {on: float(np.mean([row[on]["relative"] for row in rows])) for on in CHOSEN_ON}
    return {"metric": metric, "rows": rows, "mean": means}


def _row(folder: Path, metric: str) -> dict[str, Any]:
    remedy = "run the same comparison again, which reuses its finished runs"
    if not (folder / REPORT).exists():
        raise FileNotFoundError(f"{folder} holds no {REPORT}; finish the comparison there with `fused-rec compare`")
    report = run_dir.read_json_object(folder / REPORT, remedy)
    try:
        task, trials, complete = str(report["task"]), int(report["trials"]), complete_names(report)
        single = [name for name in complete if is_single(name)]
        if REFERENCE not in complete or not single:
            raise ValueError(f"{folder} has finished runs of {complete}; it must have {REFERENCE} and a single method")
        chosen = {on: best_name(report, single, on, metric) for on in CHOSEN_ON}
        seeds = {
            name: [int(row["seed"]) for row in report["rows"] if row["variant"] == name]
            for name in (REFERENCE, *dict.fromkeys(chosen.values()))
        }
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folder / REPORT} is damaged (at {error}); {remedy}") from error
    values = {name: found[metric] for name, found in run_values(runs_folder(folder, trials), seeds).items()}
    of_task = {"task": task, "trials": trials, "seeds": len(seeds[REFERENCE]), "mean": _mean(values[REFERENCE])}
    for on, name in chosen.items():
        tested = dataclasses.asdict(paired_bootstrap(values[REFERENCE], values[name]))
        of_task[on] = {"variant": name, "mean": _mean(values[name])} | tested
    return of_task


def _mean(values: np.ndarray) -> float:
    return float(np.nanmean(values, dtype=np.float64))


def write_regret(report: Mapping[str, Any], out: Path) -> None:
    """Writes regret.md, regret.csv and, where Matplotlib is installed, regret.png.

    Args:
      report: of `regret`.
      out: an existing folder.

    Raises:
      SaveError: a file cannot be written.
    """
    write_file(out / "regret.md", markdown(report).encode())
    write_file(out / "regret.csv", csv_table(_csv_rows(report)).encode())
    if importlib.util.find_spec("matplotlib") is None:
        LOG.warning('regret.png needs Matplotlib: pip install -e ".[plots]", then the same again')
        return
    write_figure(out / "regret.png", plots.by_task(report["rows"], report["metric"]))


def markdown(report: Mapping[str, Any]) -> str:
    """Formats a report of `regret` as a Markdown table, the mean over tasks last."""
    cells = [["task", "seeds", "trials", f"fused {report['metric']}", "best by test", "fused vs. it"]]
    cells[0] += ["chosen by validation", "fused vs. it"]
    for row in report["rows"]:
        own = [in_markdown(row["task"]), str(row["seeds"]), str(row["trials"]), f"{row['mean']:.4f}"]
        for on in CHOSEN_ON:
            own += [f"{row[on]['mean']:.4f} ({in_markdown(row[on]['variant'])})", relative_text(row[on])]
        cells.append(own)
    test, valid = (f"{100 * report['mean'][on]:+.1f} %" for on in CHOSEN_ON)
    cells.append([f"mean of {len(report['rows'])}", "", "", "", "", test, "", valid])
    return markdown_table(cells)


def _csv_rows(report: Mapping[str, Any]) -> list[list[Any]]:
    fields = ("variant", "mean", "difference", "low", "high", "relative", "relative_low", "relative_high", "p")
    header = ["task", "metric", "seeds", "trials", "fused mean"]
    rows: list[list[Any]] = [[*header, *(f"best by {on}: {name}" for on in CHOSEN_ON for name in fields)]]
    for row in report["rows"]:
        own = [row["task"], report["metric"], row["seeds"], row["trials"], row["mean"]]
        rows.append([*own, *(row[on][name] for on in CHOSEN_ON for name in fields)])
    return rows
