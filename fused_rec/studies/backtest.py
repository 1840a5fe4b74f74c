"""Rolling evaluation: train on all rows until a time, rank the interactions of the next period, go on to its end.

Three ways to keep a model up to date, on the same tables and the same questions:

- retrain: trained from nothing on all rows until the time;
- warm: trained on them from the parameters of the warm model before it (`fused_rec.training.warm_start`);
- stale: the first model, never trained again, which serves the newer tables.

A training chooses its steps on the newest share `split.valid` of its rows, and is then repeated on all of them. The
split of `fused_rec.data.splits` needs test rows too: the newest `UNREAD` of the rows, which nobody reads here.

out/
  run.json               config, and digest of the tables
  until_TIME/tables/     the tables as they were at that time, in unix seconds
  until_TIME/SEED/retrain/, warm/        runs; retrain.npz, warm.npz, stale.npz: metrics per user of the next period
  until_TIME/popularity.npz              those of a ranking by popularity
  backtest.json          all numbers; backtest.md, backtest.csv: their tables
  backtest.png
"""

import dataclasses
import datetime
import importlib.util
import itertools
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from fused_rec.baselines.neighbors import Interactions, popularity
from fused_rec.config import Config, DataConfig, SplitConfig, to_dict
from fused_rec.data.dataset import Dataset, column, contents, digest
from fused_rec.data.io.arrow import pc
from fused_rec.data.io.writers import save_dataset
from fused_rec.data.periods import period_ends, until
from fused_rec.data.sources import registry
from fused_rec.data.splits import observe_all
from fused_rec.distributed.devices import computes
from fused_rec.evaluation import plots
from fused_rec.evaluation.item_sets import item_sets
from fused_rec.evaluation.ranking import RankingSpec, Scorer, evaluate
from fused_rec.evaluation.result_tables import csv_table, interval_text, markdown_table, relative_text
from fused_rec.evaluation.significance import holm, mean_intervals, paired_bootstraps
from fused_rec.runs import run_dir
from fused_rec.runs.run_dir import lock_run_dir
from fused_rec.serving import recommender
from fused_rec.storage import write_figure, write_file
from fused_rec.studies.compare import hardware
from fused_rec.training.evaluate import scorer
from fused_rec.training.trainer import run_training

LOG = logging.getLogger(__name__)
RETRAIN, WARM, STALE, POPULARITY = "retrain", "warm", "stale", "popularity"
STRATEGIES = (RETRAIN, WARM, STALE)
SHOWN = ("ndcg@10", "recall@10")
UNREAD = 0.01  # share of the rows in the test split of each training


@dataclasses.dataclass(frozen=True)
class Backtest:
    """What a rolling evaluation runs.

    Attributes:
      periods: number of periods that are ranked, with equal numbers of interactions.
      first: share of the interactions that the first model is trained on.
      seeds: values of train.seed.
    """

    periods: int = 5
    first: float = 0.5
    seeds: tuple[int, ...] = (0,)

    def __post_init__(self):
        for name, sound, bound in (
            ("periods", self.periods >= 2, "at least 2: in the first one there is one model"),
            ("first", 0 < self.first < 1, "between 0 and 1"),
            ("seeds", bool(self.seeds) and len(set(self.seeds)) == len(self.seeds), "one or more, each once"),
        ):
            if not sound:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be {bound}")


@dataclasses.dataclass(frozen=True)
class _Period:
    """One period: what is known at its start, and what is ranked.

    Attributes:
      folder: of its tables, runs and metrics.
      begin, end: unix seconds; interactions at `begin` are known, those at `end` are ranked.
      known: the tables as they were at the begin.
      user, item: of the interactions that are ranked, rows of `known`; -1 for a user without any row before.
      new_items: number of these interactions with items that had none before.
    """

    folder: Path
    begin: int
    end: int
    known: Dataset
    user: np.ndarray
    item: np.ndarray
    new_items: int


@computes
def backtest(config: Config, plan: Backtest, out: str | Path, *, command: str = "") -> dict[str, Any]:
    """Runs or resumes the trainings and evaluations of all periods, and writes the report.

    Args:
      config: the base config; its data section names the tables, and of its split section valid counts.
      plan: periods and seeds.
      out: folder of the runs and the report.
      command: command line, kept with the results.

    Returns:
      The content of `backtest.json`.

    Raises:
      ValueError: a row has no timestamp, a period would be empty, or `out` holds a backtest of another config.
      TablesChangedError, DataError, BusyError, SaveError: as `fused_rec.training.trainer.run_training`.
    """
    out = Path(out)
    with lock_run_dir(out):
        dataset = registry.load(config.data)
        ends = period_ends(dataset, plan.first, plan.periods)
        run_dir.init_run_dir(config, digest(dataset), out, contents(dataset))
        rows: list[dict[str, Any]] = []
        for number, (begin, end) in enumerate(itertools.pairwise(ends), 1):
            LOG.info("period %d of %d: %s", number, plan.periods, _label(begin, end))
            period = _period(dataset, begin, end, out)
            before = out / f"until_{ends[number - 2]}" if number > 1 else None
            rows.append(_run_period(config, plan, period, before, out / f"until_{ends[0]}"))
        report = {"task": f"{dataset.name}, {plan.periods} periods", "periods": [_shown(row) for row in rows]}
        report |= {"pooled": _pooled(rows), "plan": dataclasses.asdict(plan), "config": to_dict(config)}
        report |= {"versions": run_dir.versions(), "hardware": hardware(), "command": command}
        _write(report, out)
    return report


def _period(dataset: Dataset, begin: int, end: int, out: Path) -> _Period:
    """Cuts the tables at the begin of a period, writes them, and collects the interactions to rank."""
    known, folder = until(dataset, begin), out / f"until_{begin}"
    if not (folder / "tables").exists():
        save_dataset(known, folder / "tables")
    times = column(dataset.interactions, "timestamp")
    asked = dataset.interactions.filter(pa.array((times > begin) & (times <= end)))
    ids = dataset.users["user_id"].take(asked["user"])
    rows = pc.index_in(ids.combine_chunks(), value_set=known.users["user_id"].combine_chunks())
    user, item = pc.fill_null(rows, -1).to_numpy(zero_copy_only=False).astype(np.int32), column(asked, "item")
    is_new = np.bincount(column(known.interactions, "item"), minlength=known.n_items)[item] == 0
    return _Period(folder, begin, end, known, user, item, int(is_new[user >= 0].sum()))


def _run_period(config: Config, plan: Backtest, period: _Period, before: Path | None, first: Path) -> dict[str, Any]:
    """Trains and evaluates all strategies on one period.

    Args:
      config: the base config.
      plan: periods and seeds.
      period: the period.
      before: folder of the period before it; None: it is the first one, in which all strategies have one model.
      first: folder of the first period.

    Returns:
      What `_shown` and `_pooled` take: the period, the metrics per user by strategy, and the trainings.
    """
    values: dict[str, list[dict[str, np.ndarray]]] = {name: [] for name in (*STRATEGIES, POPULARITY)}
    trainings: list[dict[str, Any]] = []
    for seed in plan.seeds:
        own = period.folder / str(seed)
        of_period = _training_config(config, period.folder / "tables", seed)
        runs = {RETRAIN: own / RETRAIN}
        trainings.append(_trained(of_period, runs[RETRAIN], None) | {"strategy": RETRAIN, "seed": seed})
        if before is not None:
            source = before / str(seed) / (WARM if before != first else RETRAIN)
            runs |= {WARM: own / WARM, STALE: first / str(seed) / RETRAIN}
            trainings.append(_trained(of_period, runs[WARM], source) | {"strategy": WARM, "seed": seed})
        for name, workdir in runs.items():
            values[name].append(_measured(period, workdir, own / f"{name}.npz", newer=name == STALE))
    if not (file := period.folder / f"{POPULARITY}.npz").exists():
        known = observe_all(period.known)
        counted = Interactions(known.user, known.item, period.known.n_users, period.known.n_items, age=known.age)
        _evaluate(period, popularity(counted, half_life=config.model.popularity_half_life), file)
    measured = run_dir.read_users(file)
    values[POPULARITY].append(dict(measured.metrics))
    ids = period.known.users["user_id"].take(measured.users).to_pylist()
    return {"period": period, "users": ids, "values": values, "trainings": trainings}


def _training_config(config: Config, tables: Path, seed: int) -> Config:
    """The config of a training on tables of one period."""
    return dataclasses.replace(
        config,
        data=DataConfig("tables", str(tables.resolve()), repair=True),  # they were checked when they were read
        split=SplitConfig("time", test=UNREAD, valid=config.split.valid),
        train=dataclasses.replace(config.train, refit="all", seed=seed),
    )


def _trained(config: Config, workdir: Path, source: Path | None) -> dict[str, Any]:
    results = run_training(config, workdir, source)
    return {"steps": results["best_step"], "seconds": results["seconds"]}


def _measured(period: _Period, workdir: Path, file: Path, *, newer: bool) -> dict[str, np.ndarray]:
    """Returns the metrics per user of a run on the period after its tables, or after newer ones; kept in a file."""
    if not file.exists():
        loaded = recommender.load(workdir, dataset=period.known if newer else None)
        _evaluate(period, scorer(*loaded), file)
    return dict(run_dir.read_users(file).metrics)


def _evaluate(period: _Period, score: Scorer, file: Path) -> None:
    """Ranks all items for the users of a period who are known at its begin, without the items that they have."""
    known = period.known
    seen = item_sets(column(known.interactions, "user"), column(known.interactions, "item"), known.n_users)
    asked = period.user >= 0
    truth = item_sets(period.user[asked], period.item[asked], known.n_users)
    run_dir.write_users(file, evaluate(score, RankingSpec(seen, known.n_items), truth))


def _shown(row: Mapping[str, Any]) -> dict[str, Any]:
    """Summarizes one period for the report."""
    period: _Period = row["period"]
    found: dict[str, Any] = {}
    for name, of_seeds in row["values"].items():
        if of_seeds:
            found[name] = {metric: _interval(np.stack([values[metric] for values in of_seeds])) for metric in SHOWN}
    asked = period.user >= 0
    return {
        "begin": period.begin,
        "end": period.end,
        "known_interactions": period.known.interactions.num_rows,
        "users": len(row["users"]),
        "interactions": int(asked.sum()),
        "new_items": period.new_items,
        "interactions_of_new_users": int((~asked).sum()),
        "metrics": found,
        "trainings": row["trainings"],
    }


def _interval(values: np.ndarray) -> dict[str, float]:
    ((mean, low, high),) = mean_intervals([values])
    return {"mean": mean, "low": low, "high": high}


def _pooled(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Compares strategies over all periods but the first, in which they have one model.

    A user counts once, by the mean over the periods in which they are ranked: their periods are not independent.

    Args:
      rows: of `_run_period`.

    Returns:
      By strategy: mean with its interval, difference to retrain, mean steps and sum of seconds over the periods.
    """
    later = rows[1:]
    ids = sorted({name for row in later for name in row["users"]})
    place = {name: number for number, name in enumerate(ids)}
    users = np.array([place[name] for row in later for name in row["users"]])
    count = np.bincount(users)
    found: dict[str, Any] = {}
    for strategy in (*STRATEGIES, POPULARITY):
        runs = range(len(later[0]["values"][strategy]))
        by_metric = {}
        for metric in SHOWN:
            of_runs = [np.concatenate([row["values"][strategy][run][metric] for row in later]) for run in runs]
            by_metric[metric] = np.stack([np.bincount(users, weights=values) / count for values in of_runs])
        trainings = [one for row in later for one in row["trainings"] if one["strategy"] == strategy]
        found[strategy] = {"values": by_metric, "users": len(ids)} | _cost(trainings, len(runs))
    for metric in SHOWN:
        reference = found[RETRAIN]["values"][metric]
        others = [name for name in found if name != RETRAIN]
        tests = paired_bootstraps([(found[name]["values"][metric], reference) for name in others])
        for name, test, p in zip(others, tests, holm([test.p for test in tests]), strict=True):
            found[name].setdefault("to_retrain", {})[metric] = dataclasses.asdict(test) | {"p_holm": p}
    for of_strategy in found.values():
        of_strategy |= {metric: _interval(values) for metric, values in of_strategy.pop("values").items()}
    return found


def _cost(trainings: Sequence[Mapping[str, Any]], n_seeds: int) -> dict[str, float | None]:
    if not trainings:
        return {"steps": None, "seconds": None}
    steps = float(np.mean([one["steps"] for one in trainings]))
    return {"steps": steps, "seconds": sum(one["seconds"] for one in trainings) / n_seeds}


def _label(begin: int, end: int) -> str:
    """The dates of a period, in UTC."""
    return " to ".join(datetime.datetime.fromtimestamp(at, datetime.UTC).date().isoformat() for at in (begin, end))


def _write(report: dict[str, Any], out: Path) -> None:
    run_dir.write_json(out / "backtest.json", report)
    write_file(out / "backtest.md", _markdown(report).encode())
    write_file(out / "backtest.csv", csv_table(_csv_rows(report)).encode())
    if importlib.util.find_spec("matplotlib") is None:
        LOG.warning('backtest.png needs Matplotlib: pip install -e ".[plots]", then the same again')
        return
    write_figure(out / "backtest.png", plots.by_period(report["periods"], SHOWN[0], report["task"]))


def _markdown(report: Mapping[str, Any]) -> str:
    names = (*STRATEGIES, POPULARITY)
    cells = [["next period", "known", "ranked", "users", "of new items", "of new users"]]
    for period in report["periods"]:
        amounts = [period[name] for name in ("known_interactions", "interactions", "users")]
        amounts += [period["new_items"], period["interactions_of_new_users"]]
        cells.append([_label(period["begin"], period["end"]), *(f"{amount:,}" for amount in amounts)])
    parts = ["interactions\n", markdown_table(cells)]
    for metric in SHOWN:
        cells = [["next period", *names]]
        for period in report["periods"]:
            found = [period["metrics"].get(name, {}).get(metric) for name in names]
            row = [interval_text(one) if one else "= retrain" for one in found]
            cells.append([_label(period["begin"], period["end"]), *row])
        parts += [f"{metric}\n", markdown_table(cells)]
    cells = [["periods 2 and later", *(f"{metric} | vs. retrain" for metric in SHOWN), "steps", "seconds"]]
    for name, pooled in report["pooled"].items():
        row = []
        for metric in SHOWN:
            test = pooled.get("to_retrain", {}).get(metric)
            row += [interval_text(pooled[metric]), f"{relative_text(test)}, p {test['p_holm']:.2g}" if test else ""]
        cost = ["–" if value is None else f"{value:,.0f}" for value in (pooled["steps"], pooled["seconds"])]
        cells.append([name, *row, *cost])
    header = [cell for text in cells[0] for cell in text.split(" | ")]
    return "\n".join([*parts, "a user counts once\n", markdown_table([header, *cells[1:]])])


def _csv_rows(report: Mapping[str, Any]) -> list[list[Any]]:
    """One row per period, metric and strategy, with the means over seeds of steps and seconds."""
    rows: list[list[Any]] = [
        ["begin", "end", "metric", "strategy", "users", "interactions", "mean", "low", "high", "steps", "seconds"]
    ]
    for period in report["periods"]:
        for name, metrics in period["metrics"].items():
            own = [one for one in period["trainings"] if one["strategy"] == name]
            cost = [float(np.mean([one[of] for one in own])) if own else None for of in ("steps", "seconds")]
            for metric, found in metrics.items():
                amounts = [period["users"], period["interactions"], found["mean"], found["low"], found["high"]]
                rows.append([period["begin"], period["end"], metric, name, *amounts, *cost])
    return rows
