"""Rolling evaluation: periods, what each model may know, the report against its runs, and resuming."""

import csv
import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from market import write_tables

import fused_rec as fr
from fused_rec.data.dataset import column, contents, digest
from fused_rec.data.io.tables import read_tables
from fused_rec.data.io.writers import save_dataset
from fused_rec.data.periods import period_ends, until
from fused_rec.data.synthetic import make_synthetic
from fused_rec.evaluation.significance import paired_bootstrap
from fused_rec.runs.run_dir import BusyError, lock_run_dir, read_run, read_users
from fused_rec.serving.recommender import model_digest
from fused_rec.studies import backtest as studied
from fused_rec.studies.backtest import RETRAIN, STALE, WARM, Backtest, backtest

PLAN = Backtest(periods=3, first=0.6)


@pytest.fixture(scope="module")
def market() -> fr.Dataset:
    return make_synthetic(0, 80, 30)


@pytest.fixture(scope="module")
def config(market, tmp_path_factory) -> fr.Config:
    folder = tmp_path_factory.mktemp("tables") / "tables"
    save_dataset(market, folder)
    # Random text vectors: no language model is opened.
    return fr.configure(
        data={"name": "tables", "path": str(folder), "repair": True},
        text={"features": "random"},
        model={"dim": 4, "num_layers": 1, "late_fusion": False},
        train={"max_steps": 4, "eval_every": 2, "batch_size": 32, "positives_per_user": 8},
    )


class StopError(Exception):
    """In place of a signal."""


@pytest.fixture(scope="module")
def measured(config, tmp_path_factory) -> tuple[Path, dict]:
    """A study that was stopped before the first warm start, and taken up again."""
    out = tmp_path_factory.mktemp("backtest") / "out"
    run = studied.run_training

    def stops(config, workdir, init_from):
        if init_from is not None:
            raise StopError
        return run(config, workdir, init_from)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(studied, "run_training", stops)
        with pytest.raises(StopError):
            backtest(config, PLAN, out)
    finished = {file: file.stat().st_mtime_ns for file in out.rglob("results.json")}
    assert len(finished) == 2 and not (out / "backtest.json").exists()
    report = backtest(config, PLAN, out)
    assert {file: file.stat().st_mtime_ns for file in finished} == finished
    return out, report


# --- tables at a time ------------------------------------------------------------------------------------------------


def test_periods_have_equal_numbers_of_interactions(market):
    ends = period_ends(market, 0.6, 4)
    times = column(market.interactions, "timestamp")
    counts = [
        int((times <= ends[0]).sum()),
        *(int(((times > a) & (times <= b)).sum()) for a, b in itertools.pairwise(ends)),
    ]
    assert sum(counts) == len(times) and counts[0] == pytest.approx(0.6 * len(times), abs=5)
    assert max(counts[1:]) - min(counts[1:]) <= 6
    with pytest.raises(ValueError, match="make no 4 periods"):
        same = market.interactions.set_column(
            market.interactions.column_names.index("timestamp"), "timestamp", pa.array([7] * len(times))
        )
        period_ends(dataclasses.replace(market, interactions=same), 0.6, 4)
    with pytest.raises(ValueError, match="interactions have no timestamp"):
        bare = market.interactions.drop_columns(["timestamp"])
        period_ends(dataclasses.replace(market, interactions=bare), 0.6, 4)


def test_tables_at_a_time_have_no_later_row_and_no_user_of_later_rows_alone(market):
    end = period_ends(market, 0.3, 2)[0]
    known = until(market, end)
    for name in ("interactions", "reviews", "ties"):
        assert 0 < getattr(known, name).num_rows < getattr(market, name).num_rows
        assert int(column(getattr(known, name), "timestamp").max()) <= end
    assert known.n_items == market.n_items and known.n_users < market.n_users
    ids = [one.users["user_id"] for one in (known, market)]
    kept = pa.array(column(market.interactions, "timestamp") <= end)
    assert ids[0].take(known.interactions["user"]).equals(ids[1].take(market.interactions.filter(kept)["user"]))
    kept = pa.array(column(market.ties, "timestamp") <= end)
    for side in ("source", "target"):
        assert ids[0].take(known.ties[side]).equals(ids[1].take(market.ties.filter(kept)[side]))


def test_a_row_after_the_time_changes_nothing_before(market):
    """Models are functions of config and tables, and these tables are the same, bit for bit."""
    end = period_ends(market, 0.6, 2)[0]

    def with_row(table: pa.Table, **values) -> pa.Table:
        row = {name: table[name][:1].to_pylist() for name in table.column_names}
        return pa.concat_tables([table, pa.table(row | values, schema=table.schema)])

    later = {"timestamp": [end + 1]}
    bought = set(zip(*(column(market.interactions, name).tolist() for name in ("user", "item")), strict=True))
    user, item = next((u, i) for u in range(80) for i in range(30) if (u, i) not in bought)
    users = with_row(market.users, user_id=["one who came later"])
    changed = dataclasses.replace(
        market,
        users=users,
        interactions=with_row(with_row(market.interactions, user=[user], item=[item], **later), user=[80], **later),
        reviews=with_row(market.reviews, text=["a later word"], **later),
        ties=with_row(market.ties, target=[80], **later),
    )
    assert digest(until(changed, end)) == digest(until(market, end))
    assert digest(until(changed, end + 1)) != digest(until(market, end + 1))


def test_rows_without_a_time_are_refused(market):
    bare = dataclasses.replace(market, ties=market.ties.drop_columns(["timestamp"]))
    with pytest.raises(ValueError, match="ties have no timestamp, so that they belong to no period"):
        until(bare, 0)


# --- the study -------------------------------------------------------------------------------------------------------


def test_each_model_has_the_tables_of_its_time_and_the_start_of_its_strategy(measured, market):
    out, report = measured
    ends = period_ends(market, PLAN.first, PLAN.periods)
    assert [(period["begin"], period["end"]) for period in report["periods"]] == list(itertools.pairwise(ends))
    workdirs = [out / f"until_{end}" / "0" for end in ends[:-1]]
    for end, workdir in zip(ends, workdirs, strict=False):
        tables = read_tables(workdir.parent / "tables", repair=True)
        assert contents(tables) == contents(until(market, end))
        run = read_run(workdir / RETRAIN)
        assert "init_from" not in run and (run["config"]["train"]["refit"], run["config"]["split"]["kind"]) == (
            "all",
            "time",
        )
    assert not (workdirs[0] / WARM).exists()
    for source, own in ((workdirs[0] / RETRAIN, workdirs[1]), (workdirs[1] / WARM, workdirs[2])):
        started = read_run(own / WARM)["init_from"]
        assert started["workdir"] == str(source.resolve())
        assert started["phase"] == "refit_all" and started["model"] == model_digest(source)


def test_metrics_are_those_of_ranking_the_next_period(measured, market):
    """The stale model of the second period, ranked by hand."""
    out, report = measured
    period = report["periods"][1]
    begin, end = period["begin"], period["end"]
    known = until(market, begin)
    run = fr.load(out / f"until_{report['periods'][0]['begin']}" / "0" / RETRAIN, dataset=known)
    names = market.users["user_id"].to_pylist()
    asked: dict[str, set[str]] = {}
    of_new = 0
    for row in market.interactions.to_pylist():
        if begin < row["timestamp"] <= end:
            name, item = names[row["user"]], market.items["item_id"][row["item"]].as_py()
            if name in known.users["user_id"].to_pylist():
                asked.setdefault(name, set()).add(item)
            else:
                of_new += 1
    assert (period["users"], period["interactions_of_new_users"]) == (len(asked), of_new)
    assert period["interactions"] == sum(map(len, asked.values()))
    ranked = run.recommend(list(asked), k=10).to_pylist()
    hits = {name: sum(row["item_id"] in asked[name] for row in ranked if row["user_id"] == name) for name in asked}
    recall = np.mean([hits[name] / len(asked[name]) for name in asked])
    assert period["metrics"][STALE]["recall@10"]["mean"] == pytest.approx(recall, abs=1e-6)
    found = read_users(out / f"until_{begin}" / "0" / f"{STALE}.npz")
    assert [known.users["user_id"][row].as_py() for row in found.users.tolist()] == sorted(
        asked, key=known.users["user_id"].to_pylist().index
    )


def test_pooled_differences_are_of_users_over_the_later_periods(measured, market):
    out, report = measured
    of_user: dict[str, dict[str, list[float]]] = {}
    for period in report["periods"][1:]:
        folder, users = out / f"until_{period['begin']}", until(market, period["begin"]).users["user_id"].to_pylist()
        for name in (RETRAIN, WARM):
            found = read_users(folder / "0" / f"{name}.npz")
            for user, value in zip(found.users.tolist(), found.metrics["ndcg@10"].tolist(), strict=True):
                of_user.setdefault(users[user], {}).setdefault(name, []).append(value)
    values = {name: np.array([[np.mean(of_user[user][name]) for user in sorted(of_user)]]) for name in (RETRAIN, WARM)}
    expected = paired_bootstrap(values[WARM], values[RETRAIN])
    pooled = report["pooled"][WARM]
    assert pooled["users"] == len(of_user)
    assert pooled["ndcg@10"]["mean"] == pytest.approx(values[WARM].mean(), abs=1e-6)
    assert pooled["to_retrain"]["ndcg@10"]["difference"] == pytest.approx(expected.difference, abs=1e-6)
    assert pooled["to_retrain"]["ndcg@10"]["low"] == pytest.approx(expected.low, abs=1e-5)
    trained = [one for period in report["periods"][1:] for one in period["trainings"] if one["strategy"] == WARM]
    assert pooled["seconds"] == pytest.approx(sum(one["seconds"] for one in trained))
    assert report["pooled"][STALE]["seconds"] is None


def test_the_report_is_written_as_tables_and_figure(measured):
    out, report = measured
    assert json.loads((out / "backtest.json").read_text())["pooled"] == report["pooled"]
    text = (out / "backtest.md").read_text()
    assert text.count("= retrain") == 4  # two metrics, two strategies: one model in the first period
    assert "| periods 2 and later | ndcg@10 | vs. retrain | recall@10 | vs. retrain | steps | seconds |" in text
    with (out / "backtest.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * (2 + 4 + 4)
    assert float(rows[0]["mean"]) == report["periods"][0]["metrics"][RETRAIN]["ndcg@10"]["mean"]
    assert (out / "backtest.png").exists()


def test_the_same_call_trains_nothing_and_other_tables_or_settings_are_refused(measured, config, market, monkeypatch):
    out, report = measured
    again = backtest(config, PLAN, out)
    assert (again["periods"], again["pooled"]) == (report["periods"], report["pooled"])
    monkeypatch.setattr(studied, "run_training", lambda *_: pytest.fail("trained"))
    with pytest.raises(ValueError, match="model.dim is 4 there and 8 here"):
        backtest(fr.configure(config, model={"dim": 8}), PLAN, out)
    with lock_run_dir(out), pytest.raises(BusyError, match="in use"):
        backtest(config, PLAN, out)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"periods": 1}, "periods is 1; it must be at least 2"),
        ({"first": 1.0}, "first is 1.0; it must be between 0 and 1"),
        ({"seeds": (1, 1)}, "seeds is"),
    ],
)
def test_unfit_plans_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        Backtest(**given)


def test_tables_without_times_are_refused_before_any_work(tmp_path):
    folder = write_tables(tmp_path / "tables")
    bare = read_tables(folder)
    assert "timestamp" not in bare.ties.column_names
    config = fr.configure(data={"name": "tables", "path": str(folder)})
    with pytest.raises(ValueError, match="ties have no timestamp"):
        backtest(config, PLAN, tmp_path / "out")
