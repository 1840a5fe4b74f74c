"""Plays a bank's year on generated tables with commands alone, and checks and measures what they write.

    python tests/stress/year.py --out=runs/year
    python tests/stress/year.py --quick

The year is the second of the synthetic market's three, in which customers join and products launch all the time. The
tables of a day hold what happened until then; a customer or product is listed a week before its first row.

- A model is trained on the tables of 1 January.
- On the first of each month after that, three models rank all products for all customers: `retrain` is trained from
  nothing on the tables of the day, `warm` on the same tables from the warm model before (--init_from), and `stale` is
  the model of January, which serves the tables of the day.
- Every few days the warm model of the month serves the tables of the day.
- One warm training is ended by SIGKILL and resumed, and compared bit for bit with an undisturbed one.

NDCG@10 and recall@10 are of the lists in the files that `recommend` wrote, on what the listed customers bought next:
until the next month, or until the next day of serving. Seconds are CPU seconds of a command. Prints tables, writes
year.json, year.md and, with Matplotlib, year.png to the folder. Exits with 1 where a check failed: a list with a
product that the customer has or that is not listed, a customer neither served nor counted, an audit file of other
tables, new customers or products in no list.
"""

import argparse
import dataclasses
import datetime
import importlib.util
import itertools
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

sys.path.insert(0, str(Path(__file__).parents[1]))
from market import differences

from fused_rec.data.dataset import digest
from fused_rec.data.io.arrow import pc
from fused_rec.data.io.tables import read_tables
from fused_rec.data.io.writers import named
from fused_rec.data.synthetic import make_synthetic
from fused_rec.evaluation import plots
from fused_rec.evaluation.result_tables import interval_text, markdown_table, relative_text
from fused_rec.evaluation.significance import mean_intervals, paired_bootstrap
from fused_rec.storage import write_figure

ROOT = Path(__file__).parents[2]
YEAR, K, DAY = 2022, 10, 86_400
NOTICE = 7 * DAY  # from being listed to the first row
KILLED = 2  # place of the month whose warm training is ended by SIGKILL
RETRAIN, WARM, STALE = "retrain", "warm", "stale"
TODAY, FIRST_OF_MONTH = "tables of the day", "tables of the first of the month"
ENDS = {"users": ("user_id", "source_id", "target_id"), "items": ("item_id",)}
METRICS = ("ndcg@10", "recall@10")
# Beside the defaults of --config=tables. One temperature in place of those that validation chooses from saves time.
SETTINGS = ("split.kind=time", "model.dim=64", "train.temperature=0.15")
Lists = Mapping[str, Sequence[str]]  # items by user, best first


@dataclasses.dataclass(frozen=True)
class Market:
    """All that will happen: tables by name, and the unix seconds at which their users and items are listed."""

    tables: Mapping[str, pa.Table]
    listed: Mapping[str, np.ndarray]

    def ids(self, name: str, day: int) -> set[str]:
        """The users or items listed on a day."""
        return set(self.tables[name][ENDS[name][0]].filter(pa.array(self.listed[name] < day)).to_pylist())

    def write(self, day: int, folder: Path) -> Path:
        """Writes the tables of a day as CSV, and returns the folder."""
        folder.mkdir(parents=True)
        for name, table in self.tables.items():
            known = self.listed[name] < day if name in ENDS else table["timestamp"].to_numpy() < day
            pyarrow.csv.write_csv(table.filter(pa.array(known)), folder / f"{name}.csv")
        return folder

    def bought(self, begin: int, end: int) -> dict[str, set[str]]:
        """The items of each user with interactions in [begin, end)."""
        times = self.tables["interactions"]["timestamp"].to_numpy()
        rows = self.tables["interactions"].filter(pa.array((begin <= times) & (times < end)))
        return _by_user(rows["user_id"].to_pylist(), rows["item_id"].to_pylist())


def make_market(seed: int, n_users: int, n_items: int) -> Market:
    """Generates the market and finds when its users and items are listed."""
    tables = named(make_synthetic(seed, n_users, n_items))
    listed = {}
    for name, ends in ENDS.items():
        ids = tables[name][ends[0]].combine_chunks()
        first = np.full(len(ids), np.iinfo(np.int64).max)
        for table in [table for table in tables.values() if "timestamp" in table.column_names]:
            for end in set(ends) & set(table.column_names):
                np.minimum.at(first, pc.index_in(table[end], value_set=ids).to_numpy(), table["timestamp"].to_numpy())
        listed[name] = first - NOTICE
    return Market(tables, listed)


def _by_user(users: Sequence[str], items: Sequence[str]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for user, item in zip(users, items, strict=True):
        found.setdefault(user, set()).add(item)
    return found


class Bank:
    """Runs the commands in a folder and checks what they write.

    Attributes:
      market: what happens.
      out: the folder.
      faults: what the checks found.
      seconds: CPU seconds of each call on all its cores, by command; other work on the machine adds none.
    """

    def __init__(self, market: Market, out: Path):
        self.market, self.out = market, out
        self.faults: list[str] = []
        self.seconds: dict[str, list[float]] = {"train": [], "recommend": []}

    def tables(self, day: int) -> Path:
        """Writes the tables of a day once, and returns their folder."""
        folder = self.out / "tables" / _date(day)
        return folder if folder.exists() else self.market.write(day, folder)

    def train(self, name: str, day: int, source: str | None = None, *, killed: bool = False) -> dict[str, Any]:
        """Trains a model on the tables of a day.

        Args:
          name: of the run.
          day: unix seconds.
          source: name of the run to start from; None: train from nothing.
          killed: end the training by SIGKILL once a checkpoint after step 0 is there, and resume it.

        Returns:
          Steps and CPU seconds.
        """
        command = ["train", "--config=tables", *(f"--config.{setting}" for setting in SETTINGS)]
        command += [f"--config.data.path={self.tables(day)}", f"--config.text.cache={self.out / 'cache'}"]
        command += [f"--workdir={self.out / name}"]
        command += [f"--init_from={self.out / source}"] if source else []
        if killed:
            process = _begin(command)
            while process.poll() is None and not any(self.out.glob(f"{name}/*/checkpoints/[1-9]*")):
                time.sleep(0.001)
            process.kill()
            process.communicate()
            if process.returncode == 0:
                self.faults.append(f"{name} ended before it was killed")
        seconds = self._call(command)
        results = json.loads((self.out / name / "results.json").read_text())
        return {"steps": results["best_step"], "seconds": seconds}

    def recommend(self, name: str, day: int, strategy: str = WARM) -> dict[str, list[str]]:
        """Ranks the listed products for all listed customers with a run, and checks the file."""
        tables, file = self.tables(day), self.out / "lists" / _date(day) / f"{strategy}.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        command = ["recommend", f"--workdir={self.out / name}", f"--tables={tables}", f"--k={K}", f"--out={file}"]
        self._call(command)
        lists: dict[str, list[str]] = {}
        for row in (
            pyarrow.parquet.read_table(file).sort_by([("user_id", "ascending"), ("rank", "ascending")]).to_pylist()
        ):
            lists.setdefault(row["user_id"], []).append(row["item_id"])
        audit = json.loads(file.with_name(f"{file.name}.audit.json").read_text())
        self.faults += [f"{file.relative_to(self.out)}: {fault}" for fault in self._check(lists, audit, tables, day)]
        return lists

    def _check(self, lists: Lists, audit: Mapping[str, Any], tables: Path, day: int) -> list[str]:
        faults = []
        users, items = (self.market.ids(name, day) for name in ENDS)
        has = self.market.bought(0, day)
        for user, ranked in lists.items():
            faults += [f"{user} has {item}" for item in ranked if item in has.get(user, ())]
            faults += [f"{item} is not listed" for item in ranked if item not in items]
        without = audit["exclusions"]["users_without_recommendations"]
        if set(lists) - users or len(lists) + without != len(users):
            faults.append(f"{len(lists)} customers have a list and {without} are counted without, of {len(users)}")
        if audit["inputs"]["tables"] != digest(read_tables(tables)):
            faults.append("the audit file names other tables")
        return faults

    def _call(self, command: Sequence[str]) -> float:
        began = _cpu_seconds()
        process = _begin(command)
        _, stderr = process.communicate()
        if process.returncode:
            raise SystemExit(f"{' '.join(command)} ended with status {process.returncode}:\n{stderr.decode()}")
        self.seconds[command[0]].append(_cpu_seconds() - began)
        return self.seconds[command[0]][-1]


def _begin(command: Sequence[str]) -> subprocess.Popen:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", f"experiments.{command[0]}", *command[1:]]
    return subprocess.Popen(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


def _cpu_seconds() -> float:
    """CPU seconds of all commands that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def measure(lists: Lists, bought: Mapping[str, set[str]]) -> dict[str, dict[str, float]]:
    """NDCG@10 and recall@10 by user; a user without a list has 0 (formulas: fused_rec/evaluation/metrics.py)."""
    found: dict[str, dict[str, float]] = {metric: {} for metric in METRICS}
    for user, truth in bought.items():
        hits = [rank for rank, item in enumerate(lists.get(user, ())[:K], 1) if item in truth]
        ideal = sum(1 / math.log2(rank + 1) for rank in range(1, min(len(truth), K) + 1))
        found["ndcg@10"][user] = sum(1 / math.log2(rank + 1) for rank in hits) / ideal
        found["recall@10"][user] = len(hits) / len(truth)
    return found


def play(bank: Bank, months: int, every: int) -> list[dict[str, Any]]:
    """Plays the year month by month.

    Args:
      bank: runs the commands.
      months: number of months.
      every: days from one serving to the next.

    Returns:
      For each month: dates, counts, trainings, metrics by user of the strategies, and those of the daily serving.
    """
    starts = [_seconds(datetime.datetime(YEAR + m // 12, m % 12 + 1, 1)) for m in range(months + 1)]
    rows, january, before = [], "", ""
    for place, (begin, end) in enumerate(itertools.pairwise(starts)):
        date = _date(begin)
        runs, trainings = {RETRAIN: f"runs/{date}/{RETRAIN}"}, []
        trainings.append(bank.train(runs[RETRAIN], begin) | {"strategy": RETRAIN})
        if place:
            runs |= {WARM: f"runs/{date}/{WARM}", STALE: january}
            trainings.append(bank.train(runs[WARM], begin, before) | {"strategy": WARM})
        if place == KILLED:
            bank.train(f"{runs[WARM]}_killed", begin, before, killed=True)
            found = differences(bank.out / f"{runs[WARM]}_killed", bank.out / runs[WARM])
            bank.faults += [f"{date}, killed and resumed: {fault}" for fault in found]
        january, before = january or runs[RETRAIN], runs.get(WARM, runs[RETRAIN])
        lists = {name: bank.recommend(run, begin, name) for name, run in runs.items()}
        served = lists.get(WARM, lists[RETRAIN])
        row = _counts(bank.market, begin, end, starts[0]) | {"trainings": trainings, "killed": place == KILLED}
        asked = _of_listed(bank.market, begin, end)
        row["values"] = {name: measure(of_run, asked) for name, of_run in lists.items()}
        row["daily"] = _serve_daily(bank, before, served, (begin, end), every)
        rows.append(row)
        means = {name: f"{np.mean(list(values[METRICS[0]].values())):.4f}" for name, values in row["values"].items()}
        print(f"{date}: {METRICS[0]} {means}, {len(bank.faults)} faults", flush=True)
    return rows


def _serve_daily(
    bank: Bank, run: str, of_first: Lists, month: tuple[int, int], every: int
) -> list[dict[str, dict[str, dict[str, float]]]]:
    """Serves the tables of later days of a month; returns metrics by user of their lists and of the month's first."""
    found = []
    days = list(range(month[0] + every * DAY, month[1] - DAY, every * DAY))
    for day, until in itertools.pairwise([*days, month[1]]):
        asked = _of_listed(bank.market, day, until)
        lists = bank.recommend(run, day)
        found.append({TODAY: measure(lists, asked), FIRST_OF_MONTH: measure(of_first, asked)})
        found[-1]["served"] = {"users": len(lists), "cold": len(set(lists) - set(bank.market.bought(0, day)))}
    return found


def _of_listed(market: Market, begin: int, end: int) -> dict[str, set[str]]:
    listed = market.ids("users", begin)
    return {user: items for user, items in market.bought(begin, end).items() if user in listed}


def _counts(market: Market, begin: int, end: int, january: int) -> dict[str, Any]:
    users, items = (market.ids(name, begin) for name in ENDS)
    asked = _of_listed(market, begin, end)
    new = {name: of_day - market.ids(name, january) for name, of_day in (("users", users), ("items", items))}
    return {
        "begin": begin,
        "end": end,
        "known_interactions": int((market.tables["interactions"]["timestamp"].to_numpy() < begin).sum()),
        "users": len(users),
        "items": len(items),
        "new_users": len(new["users"]),
        "new_items": len(new["items"]),
        "asked": len(asked),
        "interactions": sum(map(len, asked.values())),
        "interactions_with_new_items": sum(len(of_user & new["items"]) for of_user in asked.values()),
    }


def pooled(parts: Sequence[Mapping[str, Mapping[str, Mapping[str, float]]]], reference: str) -> dict[str, Any]:
    """Pools metrics by user: a user counts once, by the mean over the parts in which they bought.

    Args:
      parts: metrics by name, metric and user.
      reference: name that the others are compared with.

    Returns:
      By name and metric: mean with 95 % interval, and the paired difference to the reference.
    """
    names = [name for name in parts[0] if name != "served"]
    found: dict[str, Any] = {name: {} for name in names}
    for metric in METRICS:
        means = {}
        for name in names:
            by_user: dict[str, list[float]] = {}
            for part in parts:
                for user, value in part[name][metric].items():
                    by_user.setdefault(user, []).append(value)
            means[name] = np.array([[np.mean(by_user[user]) for user in sorted(by_user)]])
        for name in names:
            found[name][metric] = _interval(means[name])
            if name != reference:
                test = dataclasses.asdict(paired_bootstrap(means[name], means[reference]))
                found[name][metric] |= {"difference": test}
    return found


def _interval(values: np.ndarray) -> dict[str, Any]:
    return dict(zip(("mean", "low", "high"), *mean_intervals([values]), strict=True)) | {"users": values.shape[1]}


def summarize(rows: Sequence[Mapping[str, Any]], bank: Bank, asked: argparse.Namespace) -> dict[str, Any]:
    """Returns the content of year.json."""
    periods = []
    for row in rows:
        values = row["values"].items()
        metrics = {
            name: {metric: _interval(np.array([list(of[metric].values())])) for metric in METRICS}
            for name, of in values
        }
        periods.append({name: row[name] for name in row if name not in ("values", "daily")} | {"metrics": metrics})
    later, daily = rows[1:], [part for row in rows for part in row["daily"]]
    trainings = [one for row in later for one in row["trainings"]]
    cost = {
        name: {what: float(np.mean([one[what] for one in trainings if one["strategy"] == name])) for what in of}
        for name in (RETRAIN, WARM)
        for of in [("steps", "seconds")]
    }
    return {
        "plan": {name: value for name, value in vars(asked).items() if name != "out"},
        "periods": periods,
        "strategies": pooled([row["values"] for row in later], RETRAIN),
        "daily": pooled(daily, FIRST_OF_MONTH) if daily else {},
        "cold_lists": sum(part["served"]["cold"] for part in daily),
        "cost": cost,
        "seconds": {name: {"calls": len(of), "median": float(np.median(of))} for name, of in bank.seconds.items()},
        "faults": bank.faults,
    }


def markdown(report: Mapping[str, Any]) -> str:
    """Formats the tables of a report."""
    cells = [["month", "customers", "new", "products", "new", "purchases", "of new products", RETRAIN, WARM, STALE]]
    for period in report["periods"]:
        counts = ("users", "new_users", "items", "new_items", "interactions", "interactions_with_new_items")
        means = [period["metrics"].get(name, {}).get("ndcg@10") for name in (RETRAIN, WARM, STALE)]
        numbers = [f"{one['mean']:.4f}" if one else "" for one in means]
        cells.append([_date(period["begin"])[:7], *(f"{period[name]:,}" for name in counts), *numbers])
    parts = ["NDCG@10 of each month\n", markdown_table(cells)]
    cells = [["months after the first", "NDCG@10", "vs. retrain", "recall@10", "vs. retrain", "steps", "CPU seconds"]]
    for name, found in report["strategies"].items():
        cost = report["cost"].get(name)
        numbers = [f"{cost['steps']:.0f}", f"{cost['seconds']:.0f}"] if cost else ["–", "–"]
        cells.append([name, *_compared(found), *numbers])
    parts.append(markdown_table(cells))
    if report["daily"]:
        cells = [["lists from the", "NDCG@10", "difference", "recall@10", "difference"]]
        cells += [[name, *_compared(found)] for name, found in report["daily"].items()]
        parts.append(markdown_table(cells))
    return "\n".join(parts)


def _compared(found: Mapping[str, Any]) -> list[str]:
    cells = []
    for metric in METRICS:
        test = found[metric].get("difference")
        cells += [interval_text(found[metric]), relative_text(test) if test else ""]
    return cells


def _seconds(at: datetime.datetime) -> int:
    return int(at.replace(tzinfo=datetime.UTC).timestamp())


def _date(day: int) -> str:
    return datetime.datetime.fromtimestamp(day, datetime.UTC).date().isoformat()


def check_new(bank: Bank, january: int) -> None:
    """Notes as faults where no new customer has a list, or no list has a new product."""
    seen = {"users": set(), "items": set()}
    for file in sorted(bank.out.glob("lists/*/*.parquet")):
        table = pyarrow.parquet.read_table(file, columns=["user_id", "item_id"])
        for name, column in (("users", "user_id"), ("items", "item_id")):
            seen[name] |= set(table[column].unique().to_pylist())
    for name, what in (("users", "customer"), ("items", "product")):
        new = seen[name] - bank.market.ids(name, january)
        print(f"{len(new)} new {what}s are in lists")
        if not new:
            bank.faults.append(f"no new {what} is in a list")


def main() -> None:
    """Plays the year, prints and writes its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--customers", type=int, default=2500)
    parser.add_argument("--products", type=int, default=400)
    parser.add_argument("--months", type=int, default=12)
    parser.add_argument("--every", type=int, default=10, help="days from one serving to the next")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="new folder; a temporary one by default")
    parser.add_argument("--quick", action="store_true", help="three months of a smaller market")
    asked = parser.parse_args()
    if asked.quick:
        asked.customers, asked.products, asked.months, asked.every = 1200, 300, 3, 15
    if asked.months < 2:
        parser.error(f"--months is {asked.months}; it must be at least 2: in the first month there is one model")
    with tempfile.TemporaryDirectory() as temporary:
        out = (asked.out or Path(temporary, "year")).resolve()
        out.mkdir(parents=True)
        bank = Bank(make_market(asked.seed, asked.customers, asked.products), out)
        rows = play(bank, asked.months, asked.every)
        check_new(bank, rows[0]["begin"])
        report = summarize(rows, bank, asked)
        (out / "year.json").write_text(json.dumps(report, indent=1))
        (out / "year.md").write_text(markdown(report))
        if importlib.util.find_spec("matplotlib"):
            write_figure(
                out / "year.png",
                plots.by_period(report["periods"], METRICS[0], "a year of a generated bank, CPU seconds"),
            )
    print(f"\n{markdown(report)}")
    print(f"{report['cold_lists']} lists of later days are of customers who have bought nothing yet")
    print(f"CPU seconds of commands: {report['seconds']}")
    print(f"{len(bank.faults)} faults")
    for fault in bank.faults:
        print(fault)
    sys.exit(bool(bank.faults))


if __name__ == "__main__":
    main()
