"""When fusion pays: comparisons at limited training histories and shares of new items.

A point is a history length and a share of new items: the base config with `split.history` and `split.new_item_share`.
Each is a comparison (`fused_rec.studies.compare`) on the same validation and test splits.

out/
  history_1_new_0/   the comparison of a point, with its runs
  density.json       all numbers; density.md, density.csv: their tables
  density.png
"""

import dataclasses
import importlib.util
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fused_rec.baselines.registry import BASELINES
from fused_rec.config import SLICE_METRICS, Config, to_dict
from fused_rec.distributed.devices import computes
from fused_rec.evaluation import plots
from fused_rec.evaluation.result_tables import csv_table, in_markdown, interval_text, markdown_table, relative_text
from fused_rec.runs import run_dir
from fused_rec.runs.run_dir import lock_run_dir
from fused_rec.storage import write_figure, write_file
from fused_rec.studies.compare import (
    applicable,
    best_name,
    compare_variants,
    complete_names,
    hardware,
    is_single,
)
from fused_rec.studies.variants import BRANCHES, REQUIRED, VARIANTS
from fused_rec.training.inputs import read

LOG = logging.getLogger(__name__)
SHOWN = ("ndcg@10", "recall@10")  # of SLICE_METRICS, a table each
CHOICES = {"branch": "the better of text and graph", "single": "the best single method"}


@dataclasses.dataclass(frozen=True)
class Density:
    """What a density study runs: every history length with every share of new items.

    Attributes:
      histories: most training interactions of a user (`split.history`), 0 = all.
      new_items: shares of items without training interactions (`split.new_item_share`).
      variants: of `VARIANTS`, among them `REQUIRED`.
      baselines: of `BASELINES`.
      seeds: values of train.seed.
    """

    histories: tuple[int, ...] = (1, 2, 3, 5, 10, 0)
    new_items: tuple[float, ...] = (0.0,)
    variants: tuple[str, ...] = REQUIRED
    baselines: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0,)

    def __post_init__(self):
        for name, sound, bound in (
            ("histories", all(history >= 0 for history in self.histories), "one or more numbers, 0 = all"),
            ("new_items", all(0 <= share < 1 for share in self.new_items), "one or more shares in [0, 1)"),
            ("variants", set(REQUIRED) <= set(self.variants) <= set(VARIANTS), f"{REQUIRED} and any of {[*VARIANTS]}"),
            ("baselines", set(self.baselines) <= set(BASELINES), f"any of {[*BASELINES]}"),
            ("seeds", True, "one or more numbers"),
        ):
            given = getattr(self, name)
            if not sound or len(set(given)) < len(given) or not (given or name == "baselines"):
                raise ValueError(f"{name} is {list(given)}; it must be {bound}, each once")

    @property
    def points(self) -> list[tuple[int, float]]:
        """History length and share of new items of each comparison, sparse ones first: they are fast."""
        lengths = sorted(self.histories, key=lambda history: history or float("inf"))
        return [(history, share) for share in sorted(self.new_items) for history in lengths]


@computes
def measure_density(config: Config, density: Density, out: str | Path, *, command: str = "") -> dict[str, Any]:
    """Runs or resumes the comparison of each point, and writes the report.

    A user's other training interactions are dropped as `fused_rec.data.splits.split` does: no model sees them, and
    their items are not ranked, since the user has them. `train.refit` is "none" at all points, also with all
    interactions: a refit would add the validation split to the training history.

    Args:
      config: the base config; its split.history and split.new_item_share are replaced.
      density: the points, variants, baselines and seeds.
      out: folder of the comparisons and the report.
      command: command line, kept with the results.

    Returns:
      The content of `density.json`.

    Raises:
      ValueError: the tables have no text, or `out` holds runs of another config.
      TablesChangedError, DataError, LeakError, BusyError, SaveError: as `compare_variants`.
    """
    out = Path(out)
    with lock_run_dir(out):
        _, skipped = applicable(_at(config, 0, 0.0), density.variants, *read(_at(config, 0, 0.0)))
        if absent := [f"{name}: {skipped[name]}" for name in REQUIRED if name in skipped]:
            raise ValueError(f"text, graph and fused cannot be told apart ({'; '.join(absent)}); give tables with text")
        points = []
        for place, (history, share) in enumerate(density.points, 1):
            what = f"history {_length(history)}, new items {share:.0%}"
            LOG.info("point %d of %d: %s", place, len(density.points), what)
            compared = compare_variants(
                _at(config, history, share),
                [*density.variants, *density.baselines],
                density.seeds,
                out / f"history_{_length(history)}_new_{share:g}",
                command=command,
            )
            points.append({"history": history, "new_items": share} | _point(compared, config.train.metric))
        report = {"task": compared["task"], "points": points, "seeds": list(density.seeds), "config": to_dict(config)}
        report |= {"versions": run_dir.versions(), "hardware": hardware(), "command": command}
        _write(report, out)
    return report


def _at(config: Config, history: int, share: float) -> Config:
    split = dataclasses.replace(config.split, history=history, new_item_share=share)
    return dataclasses.replace(config, split=split, train=dataclasses.replace(config.train, refit="none"))


def _length(history: int) -> str:
    return str(history) if history else "all"


def _point(compared: Mapping[str, Any], metric: str) -> dict[str, Any]:
    """Takes the results of a comparison, and what validation chooses of its single methods."""
    complete = complete_names(compared)
    groups = {
        "branch": [name for name in complete if name in BRANCHES],
        "baseline": [name for name in complete if name in BASELINES],
        "single": [name for name in complete if is_single(name)],
    }
    chosen = {group: best_name(compared, names, "valid", metric) if names else None for group, names in groups.items()}
    return {"chosen": chosen} | {key: compared[key] for key in ("summary", "differences", "failures", "skipped")}


def gain(point: Mapping[str, Any], choice: str, metric: str) -> Mapping[str, Any] | None:
    """Returns the tested difference of fused to what validation chose at a point, None where a run of either failed.

    Args:
      point: of a report.
      choice: "branch", "baseline" or "single".
      metric: of `SLICE_METRICS`.
    """
    found = (
        row for row in point["differences"] if (row["variant"], row["metric"]) == (point["chosen"][choice], metric)
    )
    return next(found, None)


def _summary(point: Mapping[str, Any], name: str | None, metric: str) -> Mapping[str, Any] | None:
    metrics = next((entry["metrics"] for entry in point["summary"] if entry["variant"] == name), {})
    return metrics.get(metric)


def _write(report: dict[str, Any], out: Path) -> None:
    run_dir.write_json(out / "density.json", report)
    write_file(out / "density.md", _markdown(report).encode())
    write_file(out / "density.csv", csv_table(_csv_rows(report)).encode())
    if importlib.util.find_spec("matplotlib") is None:
        LOG.warning('density.png needs Matplotlib: pip install -e ".[plots]", then the same again')
        return
    write_figure(out / "density.png", plots.by_density(_panels(report["points"], SHOWN[0]), SHOWN[0], report["task"]))


def _learned(report: Mapping[str, Any]) -> list[str]:
    """Returns the variants of a report, without baselines, in its order."""
    names = dict.fromkeys(entry["variant"] for point in report["points"] for entry in point["summary"])
    return [name for name in names if name not in BASELINES]


def _markdown(report: Mapping[str, Any]) -> str:
    names = _learned(report)
    gains = [f"fused vs. {what}" for what in CHOICES.values()]
    parts = []
    for metric in SHOWN:
        cells = [["history", "new items", *map(in_markdown, names), "best baseline", *gains]]
        for point in report["points"]:
            baseline = point["chosen"]["baseline"]
            means = [_summary(point, name, metric) for name in (*names, baseline)]
            row = [interval_text(found) if found else "–" for found in means]
            row[-1] += f" ({in_markdown(baseline)})" if baseline else ""
            for choice in CHOICES:
                found, name = gain(point, choice, metric), point["chosen"][choice]
                row.append(f"{relative_text(found)} ({in_markdown(name)})" if found and name else "–")
            cells.append([_length(point["history"]), f"{point['new_items']:.0%}", *row])
        parts.append(f"{metric}\n\n{markdown_table(cells)}")
    failures = [
        f"Failed: history {_length(point['history'])}, new items {point['new_items']:.0%}, {failure['variant']}: "
        f"{in_markdown(failure['message'])}\n"
        for point in report["points"]
        for failure in point["failures"]
    ]
    return "\n".join([*parts, *failures])


def _csv_rows(report: Mapping[str, Any]) -> list[list[Any]]:
    """One row per point, metric and variant, with the difference of fused to it."""
    moments, tests = ("mean", "sd", "low", "high"), ("relative", "relative_low", "relative_high", "p_holm")
    header = ["history", "new_items", "metric", "variant", "chosen_as", "seeds", *moments]
    rows: list[list[Any]] = [[*header, *(f"fused vs. row: {name}" for name in tests)]]
    for point in report["points"]:
        tested = {(row["variant"], row["metric"]): row for row in point["differences"]}
        for metric in SLICE_METRICS:
            for entry in point["summary"]:
                name, found = entry["variant"], entry["metrics"].get(metric, {})
                chosen = " ".join(choice for choice, chosen in point["chosen"].items() if chosen == name)
                row = [_length(point["history"]), point["new_items"], metric, name, chosen, entry["seeds"]]
                row += [found.get(moment) for moment in moments]
                rows.append(row + [tested.get((name, metric), {}).get(test) for test in tests])
    return rows


def _panels(points: Sequence[Mapping[str, Any]], metric: str) -> list[dict[str, Any]]:
    """Arranges points for the figure: by share of new items, means and gains by history length."""
    panels = []
    for share in dict.fromkeys(point["new_items"] for point in points):
        own = [point for point in points if point["new_items"] == share]
        names = _learned({"points": own})
        means = {name: [_summary(point, name, metric) for point in own] for name in names}
        means["best baseline"] = [_summary(point, point["chosen"]["baseline"], metric) for point in own]
        gains = {what: [gain(point, choice, metric) for point in own] for choice, what in CHOICES.items()}
        lengths = [_length(point["history"]) for point in own]
        panels.append({"new_items": share, "histories": lengths, "means": means, "gains": gains})
    return panels
