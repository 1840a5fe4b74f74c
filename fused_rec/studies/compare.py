"""Comparison of variants and baselines over seeds: a run for each variant and seed, and a report.

out/
  runs/VARIANT/SEED/   as written by `fused_rec.training.trainer.run_training`; baselines: seed 0, no checkpoints; of a
                       pair A+B only what `fused_rec.studies.late_pairs` writes
  runs-tuned-N/        the same with settings selected by N trials
  sweeps/VARIANT/      tuning trials of the variant, if requested
  compare.json         all numbers; compare.md, compare.csv, compare.tex: their table
  compare.png, slices.png
"""

import contextlib
import dataclasses
import importlib
import importlib.util
import itertools
import logging
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fused_rec.baselines.neighbors import NotApplicableError
from fused_rec.baselines.registry import BASELINES
from fused_rec.config import SLICE_METRICS, Config, measured_alone, to_dict
from fused_rec.data.dataset import Dataset, contents, digest
from fused_rec.data.node_texts import node_texts
from fused_rec.data.splits import Split, observe
from fused_rec.distributed.devices import computes
from fused_rec.evaluation import plots, result_tables, significance
from fused_rec.memory import InsufficientMemoryError
from fused_rec.runs import run_dir
from fused_rec.runs.run_dir import lock_run_dir
from fused_rec.storage import write_figure, write_file
from fused_rec.studies.late_pairs import fuse_runs
from fused_rec.studies.variants import REFERENCE, VARIANTS, variant
from fused_rec.training import trainer
from fused_rec.training.inputs import read

LOG = logging.getLogger(__name__)
PAIR = "+"  # between two variants whose scores are added
BASELINE_SEED = 0
KEPT = ("test", "valid", "slices", "seconds", "parameters")  # keys of a run's results in the report
REPORT = "compare.json"


class MissingExtraError(Exception):
    """Error for a baseline whose library is not installed; the message names the extra."""


@dataclasses.dataclass
class _Outcomes:
    """Results, failures and skipped names so far.

    Attributes:
      task: name of the dataset.
      out: folder of the comparison.
      left: number of runs to do.
      trials: tuning trials of each learned variant.
      skipped: reason for each skipped name.
      rows: results of the finished runs.
      failures: variant, seed and message of the failed runs.
    """

    task: str
    out: Path
    left: int
    trials: int
    skipped: dict[str, str]
    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    failures: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def folder(self, name: str, seed: int) -> Path:
        return runs_folder(self.out, self.trials) / name / str(seed)

    @contextlib.contextmanager
    def run(self, name: str, seed: int) -> Iterator[Path]:
        """Yields the run's folder, logs the result or failure of the block, and catches failures."""
        folder = self.folder(name, seed)
        self.left -= 1
        with self.caught(name, seed):
            yield folder
            results = run_dir.read_results(folder)
            self.rows.append({"task": self.task, "variant": name, "seed": seed} | {key: results[key] for key in KEPT})
            shown = results["test"]["ndcg@10"], results["seconds"], self.left
            LOG.info("%s, seed %d: ndcg@10 %.4f, %.1f s; %d runs left", name, seed, *shown)

    @contextlib.contextmanager
    def caught(self, name: str, seed: int | None) -> Iterator[None]:
        try:
            yield
        except (NotApplicableError, MissingExtraError, InsufficientMemoryError) as error:
            if any(row["variant"] == name for row in self.rows):  # memory sufficed for another of its seeds
                self._failed(name, seed, error)
                return
            self.skipped[name] = str(error)
            LOG.info("%s is left out: %s", name, error)
        except BrokenPipeError:  # the reader of the output is gone; all further runs would fail too
            raise
        except Exception as error:  # other runs continue; a requested stop is no Exception
            self._failed(name, seed, error)

    def _failed(self, name: str, seed: int | None, error: Exception) -> None:
        self.failures.append({"variant": name, "seed": seed, "message": f"{type(error).__name__}: {error}"})
        LOG.error("%s, %s failed: %s", name, "tuning" if seed is None else f"seed {seed}", error)
        LOG.debug("raised here:", exc_info=True)


@computes
def compare_variants(
    config: Config, names: Sequence[str], seeds: Sequence[int], out: str | Path, *, trials: int = 0, command: str = ""
) -> dict[str, Any]:
    """Runs or resumes missing runs, compares all, and writes the report.

    A failed run does not stop the others; the report lists it in "failures" and in all tables.

    Args:
      config: the base config; with train.refit "all" nothing is trained after the test metrics are measured.
      names: of `VARIANTS`, trained once per seed; of `BASELINES`, evaluated once; and A+B, the late fusion of two of
        these variants (`fused_rec.studies.late_pairs`). Names that do not apply to the tables are reported and skipped.
        The reference is "fused", or else the first name.
      seeds: values of train.seed.
      out: folder of runs and report.
      trials: tuning trials of each learned variant on validation; 0 keeps the settings.
      command: command line, kept with the results.

    Returns:
      The content of `compare.json`.

    Raises:
      ValueError: a name is unknown, no name applies, there is no seed, or `out` holds runs of another config.
      TablesChangedError: `out` holds runs of other tables.
      DataError, LeakError: the input is invalid.
      BusyError: another process works in `out`.
      SaveError: the report could not be written.
    """
    check_names(names)
    config = measured_alone(config)
    if trials:
        importlib.import_module("fused_rec.studies.tune")  # fails early if Optuna is missing
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds is {list(seeds)}; give one or more, each once")
    with lock_run_dir(Path(out)):
        return _compare_variants(config, names, seeds, Path(out), trials, command)


def _compare_variants(
    config: Config, names: Sequence[str], seeds: Sequence[int], out: Path, trials: int, command: str
) -> dict[str, Any]:
    dataset, data_split = read(config)
    kept, skipped = applicable(config, [name for name in names if PAIR not in name], dataset, data_split)
    pairs = [name for name in names if PAIR in name and set(name.split(PAIR)) <= set(kept)]
    skipped |= {name: "one of its variants is left out" for name in names if PAIR in name and name not in pairs}
    kept = [name for name in names if name in kept or name in pairs]
    learned = {name: variant(config, name) for name in kept if name in VARIANTS}
    untrained = {name: variant(config, name) for name in kept if name in BASELINES}
    left = (len(learned) + len(pairs)) * len(seeds) + len(untrained)
    outcomes = _Outcomes(f"{dataset.name}, {data_split.kind} split", out, left, trials, skipped)
    tables = digest(dataset), contents(dataset)
    for name, of_baseline in untrained.items():
        _check_folder(outcomes.folder(name, BASELINE_SEED), of_baseline, tables)
    for name, of_variant in learned.items():
        for seed in seeds:  # tuned settings are unknown here
            _check_folder(outcomes.folder(name, seed), None if trials else _seeded(of_variant, seed), tables)

    # Baselines first: they are fast, and report faults of the input before training.
    for name, of_baseline in untrained.items():
        with outcomes.run(name, BASELINE_SEED) as folder:
            try:
                _run(of_baseline, tables, folder)
            except ImportError as error:
                raise MissingExtraError(str(error)) from error
    configs = {}
    for name, of_variant in learned.items():
        if trials:
            tuned = None
            with outcomes.caught(name, None):
                tuned = _tuned(of_variant, outcomes.out / "sweeps" / name, trials)
            if tuned is None:
                outcomes.left -= len(seeds)
                continue
            of_variant = tuned
        configs[name] = to_dict(of_variant)
        for seed in seeds:
            with outcomes.run(name, seed) as folder:
                _run(_seeded(of_variant, seed), tables, folder)
    for name in pairs:
        for seed in seeds:
            with outcomes.run(name, seed) as folder:
                first, second = (outcomes.folder(part, seed) for part in name.split(PAIR))
                if not (folder / run_dir.RESULTS).exists():
                    fuse_runs(first, second, folder)

    if not (names := [name for name in kept if name not in outcomes.skipped]):
        raise ValueError(f"nothing is left to compare: {outcomes.skipped}")
    made = _report(names, outcomes)
    made |= {"config": to_dict(config), "configs": configs, "seeds": list(seeds), "trials": trials}
    made |= {"versions": run_dir.versions(), "hardware": hardware(), "command": command}
    _write(made, outcomes.out)
    return made


def check_names(names: Sequence[str]) -> None:
    """Checks names of variants and baselines.

    Args:
      names: the names.

    Raises:
      ValueError: there is no name, a repeated one, or one that is neither in `VARIANTS` nor in `BASELINES` nor a pair
        of other names.
    """
    trained = [name for name in names if name in VARIANTS]
    known = [*VARIANTS, *BASELINES, *(f"{one}{PAIR}{other}" for one, other in itertools.permutations(trained, 2))]
    wrong = sorted({name for name in names if name not in known or names.count(name) > 1})
    if wrong or not names:
        raise ValueError(
            f"variants is {list(names)}, of which {wrong}; it must be one or more of {[*VARIANTS, *BASELINES]}, "
            f"each once, or A{PAIR}B for two of these variants that are given too"
        )


def applicable(
    config: Config, names: Sequence[str], dataset: Dataset, data_split: Split
) -> tuple[list[str], dict[str, str]]:
    """Selects the names that apply to these tables.

    Args:
      config: the base config.
      names: of variants and baselines.
      dataset: tables.
      data_split: split of the tables.

    Returns:
      The applicable names in their order, and the reason for each skipped one.

    Raises:
      ValueError: no name applies.
    """
    observed = observe(dataset, data_split)
    there = {"text": bool(node_texts(dataset, observed).texts), "ties": observed.ties.num_rows > 0}
    kept: list[str] = []
    skipped: dict[str, str] = {}
    configs: dict[Config, str] = {}
    for name in names:
        needs = (VARIANTS | BASELINES)[name].needs
        absent = [what for what in needs if not there[what]]
        if absent:
            skipped[name] = f"{dataset.name} has no {' and no '.join(absent)}"
        elif "text" in needs and not config.model.uses_text:
            skipped[name] = "the config uses no text"
        elif (settings := _unnamed(variant(config, name), name)) in configs:
            skipped[name] = f"its settings are those of {configs[settings]}"
        else:
            configs[settings] = name
            kept.append(name)
            continue
        LOG.info("%s is left out: %s", name, skipped[name])
    if not kept:
        raise ValueError(f"nothing is left to compare: {skipped}")
    return kept, skipped


def hardware() -> dict[str, Any]:
    """Describes the machine and its devices, on which run times depend."""
    devices = jax.local_devices()
    return {
        "machine": platform.machine(),
        "system": platform.system(),
        "cpus": os.cpu_count(),
        "devices": f"{len(devices)} {devices[0].device_kind}",
    }


def _unnamed(config: Config, name: str) -> Config:
    """Returns the settings of a variant without its name, which tell whether two are the same; a baseline keeps it."""
    method = name if name in BASELINES else ""
    return dataclasses.replace(config, model=dataclasses.replace(config.model, method=method))


def runs_folder(out: Path, trials: int) -> Path:
    """Returns the folder of the runs in a comparison with this number of tuning trials."""
    return out / (f"runs-tuned-{trials}" if trials else "runs")


def run_values(runs: Path, seeds: Mapping[str, Sequence[int]]) -> dict[str, dict[str, np.ndarray]]:
    """Reads test metrics per user of finished runs.

    Args:
      runs: of `runs_folder`.
      seeds: finished seeds of each variant.

    Returns:
      Float32 [S, V] by variant and metric of `SLICE_METRICS`, without metrics that are NaN for all users.

    Raises:
      FileNotFoundError, ValueError: a file is missing or damaged, or the runs measured different users.
    """
    values, users = {}, None
    for name, of_variant in seeds.items():
        folders = [runs / name / str(seed) for seed in of_variant]
        measured = [run_dir.read_users(folder / run_dir.TEST_METRICS_PER_USER) for folder in folders]
        users = measured[0].users if users is None else users
        if not all(np.array_equal(users, per_user.users) for per_user in measured):
            raise ValueError(f"the runs of {name} measured other users than those before it; choose another out")
        by_metric = {metric: np.stack([per_user.metrics[metric] for per_user in measured]) for metric in SLICE_METRICS}
        # A user with all items except the held-out ones has no negatives; this may be all users.
        values[name] = {metric: runs for metric, runs in by_metric.items() if not np.isnan(runs).all()}
    return values


def complete_names(report: Mapping[str, Any]) -> list[str]:
    """Returns the variants and baselines of a report of which no run failed, in its order."""
    failed = {failure["variant"] for failure in report["failures"]}
    return [name for name in dict.fromkeys(row["variant"] for row in report["rows"]) if name not in failed]


def is_single(name: str) -> bool:
    """Whether a variant or baseline is a method to compare fusion with: no fusion, and not made from fused."""
    if name in BASELINES:
        return True
    return name != REFERENCE and PAIR not in name and not (VARIANTS[name].ablation or VARIANTS[name].control)


def best_name(report: Mapping[str, Any], names: Sequence[str], split: str, metric: str) -> str:
    """Returns the one of some variants and baselines of a report with the best mean over seeds.

    Args:
      report: of `compare_variants`.
      names: one or more of `complete_names`.
      split: "valid" or "test".
      metric: of the mean.
    """

    def of(name: str) -> float:
        return float(np.mean([row[split][metric] for row in report["rows"] if row["variant"] == name]))

    return max(names, key=of)


def _tuned(config: Config, folder: Path, trials: int) -> Config:
    from fused_rec.studies.tune import tune  # needs Optuna, an extra

    return tune(config, folder, trials)


def _run(config: Config, tables: tuple[str, Mapping[str, Any]], folder: Path) -> None:
    """Trains, or measures a baseline, unless the folder has the finished run."""
    if (folder / run_dir.RESULTS).exists():
        run_dir.finished_results(config, *tables, folder)
    else:
        trainer.run_training(config, folder)


def _seeded(config: Config, seed: int) -> Config:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, seed=seed))


def _check_folder(folder: Path, config: Config | None, tables: tuple[str, Mapping[str, Any]]) -> None:
    if (folder / run_dir.RUN).exists():
        run_dir.check_tables(tables[0], folder, tables[1])
        if config is not None:
            run_dir.check_config(config, folder)


def _report(names: list[str], outcomes: _Outcomes) -> dict[str, Any]:
    order = {name: place for place, name in enumerate(names)}
    rows = sorted(outcomes.rows, key=lambda row: order[row["variant"]])
    failed = {failure["variant"] for failure in outcomes.failures}
    measured = {name: [row["seed"] for row in rows if row["variant"] == name] for name in names if name not in failed}
    values = run_values(runs_folder(outcomes.out, outcomes.trials), measured)
    reference = REFERENCE if REFERENCE in names else names[0]
    return {
        "task": outcomes.task,
        "reference": reference,
        "summary": significance.summarize(names, rows, outcomes.failures, values),
        "differences": significance.differences(values, reference) if reference in values else [],
        "failures": outcomes.failures,
        "skipped": outcomes.skipped,
        "rows": rows,
    }


def _write(report: dict[str, Any], out: Path) -> None:
    run_dir.write_json(out / REPORT, report)
    for suffix, text in (("md", result_tables.markdown), ("csv", result_tables.csv_text), ("tex", result_tables.latex)):
        write_file(out / f"compare.{suffix}", text(report, SLICE_METRICS).encode())
    if importlib.util.find_spec("matplotlib") is None:
        LOG.warning('compare.png and slices.png need Matplotlib: pip install -e ".[plots]", then the same again')
        return
    if not any(entry["metrics"] for entry in report["summary"]):
        return
    controls = [name for name, described in VARIANTS.items() if described.control]
    failed = {failure["variant"] for failure in report["failures"]}
    shown = [entry["variant"] for entry in report["summary"] if entry["variant"] not in {*controls, *failed}]
    write_figure(out / "compare.png", plots.by_variant(report["summary"], SLICE_METRICS[0], report["task"], controls))
    write_figure(out / "slices.png", plots.by_slice(report["rows"], SLICE_METRICS[0], report["task"], shown))
