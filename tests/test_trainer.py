"""The whole path in real processes: from tables on disk to results, stopped and taken up again."""

import hashlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import preloaded
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
import yaml
from market import differences, write_tables
from webpage import Page

from fused_rec.config import (
    METRICS,
    Config,
    DataConfig,
    SplitConfig,
    TextConfig,
    TrainConfig,
    from_dict,
    to_dict,
)
from fused_rec.distributed import signals
from fused_rec.explanation.counterfactual import counterfactual_effect, without_interaction
from fused_rec.explanation.decomposition import decompose, scores
from fused_rec.graph.schema import INTERACTED_BY, INTERACTS
from fused_rec.runs.loggers import read_curves
from fused_rec.runs.run_dir import TablesChangedError
from fused_rec.serving.recommender import candidate_filter, load, load_measured, model_digest, rank_chunks, user_rows
from fused_rec.serving.write_rankings import read_rules
from fused_rec.training import batch_sources, trainer
from fused_rec.training.checkpoint import RECORD, CheckpointError, Checkpoints
from fused_rec.training.evaluate import evaluate_mean, scorer
from fused_rec.training.inputs import prepare, read
from fused_rec.training.trainer import (
    NonFiniteLossError,
    run_training,
)

SETTINGS = {
    # What users have, all-MiniLM-L6-v2, is trained and explained with in tests/test_tour.py.
    "text.model": str(Path(__file__).parent / "golden" / "tiny_bert"),
    "train.batch_size": 32,
    "train.max_steps": 20,
    "train.eval_every": 5,
    "train.patience": 100,
    "train.learning_rate": 0.02,
    "train.temperature": 0.15,
    "model.dim": 8,
    "model.num_layers": 1,
}
CONFIG = "experiments/configs/tables.py"


@pytest.fixture(scope="module")
def tables(tmp_path_factory) -> Path:
    return write_tables(tmp_path_factory.mktemp("tables"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """One text cache for all runs, so that the encoder is paid once."""
    return tmp_path_factory.mktemp("cache")


def small(tables: Path, cache: Path, **changes: object) -> Config:
    values = to_dict(Config(data=DataConfig(name="tables", path=str(tables)), text=TextConfig(cache=str(cache))))
    for setting, value in (SETTINGS | {name.replace("__", "."): value for name, value in changes.items()}).items():
        section, name = setting.split(".")
        values[section][name] = value
    return from_dict(values)


def train_command(tables: Path, cache: Path, workdir: Path) -> list[str]:
    settings = SETTINGS | {"data.path": tables, "text.cache": cache, "train.refit": "valid"}
    return [
        "experiments.train",
        f"--config={CONFIG}",
        f"--workdir={workdir}",
        *(f"--config.{name}={value}" for name, value in settings.items()),
    ]


@pytest.fixture(scope="module")
def finished(tables: Path, cache: Path, tmp_path_factory) -> Path:
    """The workdir of a run that nothing stopped."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    done = preloaded.run(*train_command(tables, cache, workdir))
    assert done.returncode == 0, done.stderr
    assert "results.json" in done.stdout
    return workdir


def test_results_hold_what_is_promised(finished):
    results = json.loads((finished / "results.json").read_text())
    assert results["dataset"] == "tables"
    assert (results["split"], results["variant"], results["seed"]) == ("random", "fused", 0)
    assert results["seconds"] > 0
    assert results["config"]["model"]["dim"] == 8
    assert {"jax", "python", "transformers"} <= set(results["versions"])
    for part in ("valid", "test"):
        assert set(METRICS) <= set(results[part])
        assert all(0 <= results[part][name] <= 1 for name in METRICS)
    assert results["best_step"] % SETTINGS["train.eval_every"] == 0
    curve = [json.loads(line) for line in (finished / "select" / "curves.jsonl").read_text().splitlines()]
    assert [line["step"] for line in curve] == [5, 10, 15, 20]
    best = max(curve, key=lambda line: line["valid/ndcg@10"])
    assert results["best_step"] == best["step"]
    # The curve is of the model alone; the selection orders its equal scores by popularity.
    assert results["late_fusion"]["single"]["model"] == pytest.approx(best["valid/ndcg@10"], abs=1e-3)
    assert (results["phase"], results["temperature"]) == ("select", 0.15)


def test_a_run_killed_again_and_again_ends_as_if_never_stopped(tables, cache, tmp_path, finished):
    """A signal soon after a checkpoint, three times; the same command then finishes, bit for bit as undisturbed."""
    workdir = tmp_path / "run"
    begun = train_command(tables, cache, workdir)
    resumed = ""
    for signum, milestone in (
        (signal.SIGTERM, "select/checkpoints/5"),
        (signal.SIGKILL, "select/checkpoints/15"),
        (signal.SIGKILL, "refit/checkpoints/5"),
    ):
        process = preloaded.start(*begun)
        deadline = time.monotonic() + 300
        while process.poll() is None and time.monotonic() < deadline and not (workdir / milestone).exists():
            time.sleep(0.005)
        process.send_signal(signum)
        _, stderr = process.communicate()
        assert (workdir / milestone).exists(), stderr
        assert not (workdir / "results.json").exists(), "the run was over before it could be killed"
        assert resumed in stderr
        resumed = "resumes from the checkpoint"
        if signum == signal.SIGTERM:
            assert process.returncode == 143
            assert "stopped by SIGTERM; step " in stderr and "is saved in" in stderr and "Traceback" not in stderr
            assert f"To go on, give the same command again:\n  python -m experiments.train --config={CONFIG}" in stderr
    again = preloaded.run(*begun)
    assert again.returncode == 0, again.stderr
    assert resumed in again.stderr
    assert differences(workdir, finished) == []


@pytest.fixture(scope="module")
def undisturbed(tables, cache, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    run_training(small(tables, cache, model__variant="graph", train__refit="valid"), workdir)
    return workdir


def ask_to_stop(patch: pytest.MonkeyPatch, name: str, call: int) -> None:
    """A real SIGTERM as the loop calls one of its functions for the call-th time."""
    owner = batch_sources if name == "batch" else trainer
    real, calls = getattr(owner, name), itertools.count(1)

    def asking(*arguments, **settings):
        if next(calls) == call:
            signal.raise_signal(signal.SIGTERM)
        return real(*arguments, **settings)

    patch.setattr(owner, name, asking)


def check_stops(config: Config, workdir: Path, stops: Sequence[tuple[str, int, dict[str, int] | None]]) -> None:
    """Stops a run at each of these calls in turn, and takes it up again to the end."""
    for name, call, kept in stops:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(signals.Stopped) as stopped, signals.handle_signals():
            ask_to_stop(patch, name, call)
            run_training(config, workdir)
        newest = {found.parent.name: Checkpoints(found).last_good() for found in workdir.glob("*/checkpoints")}
        assert kept is None or newest == kept, (name, call)
        if kept and name in ("batch", "evaluate_mean"):  # of a phase
            [note] = stopped.value.__notes__
            assert f"step {list(newest.values())[-1]} of " in note and list(newest)[-1] in note
        assert not list(workdir.rglob(".*")) and not (workdir / "run.lock").exists()
    run_training(config, workdir)


def test_a_run_asked_to_stop_ends_as_if_never_stopped(tables, cache, tmp_path, undisturbed):
    """Within a step, whatever it was at, with all of it saved; the same call goes on from there."""
    stops = (
        ("prepare", 1, {}),
        ("batch", 1, {"select": 1}),  # in the first step, which compiles
        ("evaluate_mean", 1, {"select": 5}),
        ("evaluate_mean", 1, {"select": 5}),  # in the same one
        ("batch", 2, {"select": 7}),  # between two evaluations
        ("batch", 1, {"select": 8}),  # in the first step after a stop
        ("batch", 2, {"select": 10}),  # before an evaluation
        ("evaluate_mean", 3, {"select": 20}),  # in the last one
        ("batch", 3, {"select": 20, "refit": 3}),  # in the second phase
        ("evaluate_users", 1, None),  # in the test part's measurement
        ("write_json", 1, None),  # before the results are written
    )
    check_stops(small(tables, cache, model__variant="graph", train__refit="valid"), tmp_path / "run", stops)
    assert differences(tmp_path / "run", undisturbed) == []


def test_the_training_on_all_rows_is_resumed(tables, cache, tmp_path):
    config = small(tables, cache, model__variant="graph", train__refit="all")
    run_training(config, tmp_path / "straight")
    best = json.loads((tmp_path / "straight" / "results.json").read_text())["best_step"]
    stops = (
        ("prepare", 2, {"select": 20}),  # before the last phase
        ("batch", 3, {"select": 20, "refit_all": 3}),  # in it
        ("write_json", 1, {"select": 20, "refit_all": best}),  # before the results are written
    )
    check_stops(config, tmp_path / "run", stops)
    assert differences(tmp_path / "run", tmp_path / "straight") == []
    assert (tmp_path / "run" / "fitted.npz").read_bytes() == (tmp_path / "straight" / "fitted.npz").read_bytes()


def test_a_damaged_best_state_is_reported_at_once(tables, cache, tmp_path, undisturbed):
    """Neither does training go on for nothing, nor does another state take its place when it is asked for."""
    workdir = tmp_path / "run"
    shutil.copytree(undisturbed, workdir)
    best = json.loads((workdir / "results.json").read_text())["best_step"]
    for phase in ("select", "refit"):
        record = workdir / phase / "checkpoints" / str(best) / RECORD
        record.write_text(record.read_text().replace("1", "2", 1))
    for part in ("valid", "test"):
        with pytest.raises(CheckpointError, match=f"checkpoints/{best} is damaged"):
            load_measured(workdir, part)
    with pytest.raises(CheckpointError, match=f"checkpoints/{best} is damaged"):
        load(workdir)
    (workdir / "results.json").unlink()
    shutil.rmtree(workdir / "refit")
    config = small(tables, cache, model__variant="graph", train__refit="valid")
    if best < 20:
        with pytest.raises(CheckpointError, match=f"{best} is damaged.*remove the folder of the checkpoints"):
            run_training(config, workdir)
        shutil.rmtree(workdir / "select" / "checkpoints")
    run_training(config, workdir)
    assert differences(workdir, undisturbed) == []


def check_reasons(folder: Path, ranked: pa.Table) -> None:
    """The parts of each row sum to the score that is in the file, and the reasons are in words."""
    rows = [json.loads(line) for line in (folder / "reasons.jsonl").read_text().splitlines()]
    for row, explained in zip(ranked.to_pylist(), rows, strict=True):
        assert (row["user_id"], row["item_id"]) == (explained["user_id"], explained["item_id"])
        assert explained["score"] == pytest.approx(row["score"], rel=1e-4)
        assert sum(part["value"] for part in explained["parts"]) == pytest.approx(row["score"], rel=1e-4)
        assert {"interaction", "own_text", "popularity"} <= {part["kind"] for part in explained["parts"]}
        assert all(reason.keys() == {"code", "text"} for reason in explained["reasons"])
        # No reason names another customer.
        assert not any("C0" in reason["text"].replace(row["user_id"], "") for reason in explained["reasons"])


def test_recommend_writes_and_explains_what_is_not_held(tables, finished, tmp_path):
    held = pyarrow.csv.read_csv(tables / "interactions.csv").to_pylist()
    holds = {(row["user_id"], row["item_id"]) for row in held}
    out = tmp_path / "ranked.parquet"
    asked = f"--workdir={finished}", "--users=C0001,C0002", "--k=4", f"--out={out}", "--explain"
    done = preloaded.run("experiments.recommend", *asked)
    assert done.returncode == 0, done.stderr
    ranked = pyarrow.parquet.read_table(out)
    assert ranked.column_names == ["user_id", "rank", "item_id", "score", "name"]
    rows = ranked.to_pylist()
    assert [(row["user_id"], row["rank"]) for row in rows] == [(u, r) for u in ("C0001", "C0002") for r in (1, 2, 3, 4)]
    assert not holds & {(row["user_id"], row["item_id"]) for row in rows}
    for user in ("C0001", "C0002"):
        scores = [row["score"] for row in rows if row["user_id"] == user]
        assert scores == sorted(scores, reverse=True)
    check_reasons(tmp_path, ranked)

    asked = f"--workdir={finished}", "--users=C0001,nobody", f"--out={tmp_path}/all.csv"
    done = preloaded.run("experiments.recommend", *asked)
    assert done.returncode != 0
    assert "'nobody'" in done.stderr


def test_recommend_reads_ids_from_files_and_filters_items(finished, tables, tmp_path):
    items = pyarrow.csv.read_csv(tables / "items.csv").to_pylist()
    named, band = ({row["item_id"]: row[column] for row in items} for column in ("name", "risk_band"))
    (tmp_path / "users.csv").write_text("user_id,since\nC0002,1\nC0001,2\n")
    (tmp_path / "items.txt").write_text("\n".join(sorted(named)[:20]) + "\n")
    out = tmp_path / "ranked.csv"
    asked = [f"--workdir={finished}", f"--users_file={tmp_path}/users.csv", f"--items_file={tmp_path}/items.txt"]

    def ended(*more: str) -> subprocess.CompletedProcess:
        return preloaded.run("experiments.recommend", *asked, f"--out={out}", *more)

    done = ended("--where=risk_band <= 3", "--k=30", "--include_seen", "--names", "--explain")
    assert done.returncode == 0, done.stderr
    ranked = pyarrow.csv.read_csv(out)
    assert ranked.column_names == ["user_id", "rank", "item_id", "score", "name"], "these customers have no names"
    expected = [item for item in sorted(named)[:20] if band[item] <= 3]
    for user in ("C0002", "C0001"):
        of_user = [row for row in ranked.to_pylist() if row["user_id"] == user]
        assert sorted(row["item_id"] for row in of_user) == expected
        assert all(row["name"] == named[row["item_id"]] for row in of_user)
    inputs = json.loads((tmp_path / "ranked.csv.audit.json").read_text())["inputs"]
    assert inputs["where"] == "risk_band <= 3" and len(inputs["candidates"]) == 64 and inputs["names"] is True
    check_reasons(tmp_path, ranked)
    held = pyarrow.csv.read_csv(tables / "interactions.csv").to_pylist()
    assert {(row["user_id"], row["item_id"]) for row in held} & {
        (row["user_id"], row["item_id"]) for row in ranked.to_pylist()
    }

    (tmp_path / "users.csv").write_text("C0002\nnobody\n")
    done = ended()
    assert done.returncode == 1 and "Traceback" not in done.stderr
    remedy = "correct it, or serve tables that have this user_id: --tables=DIR"
    assert f"users.csv, row 2: user_id 'nobody' is unknown. {remedy}" in done.stderr


def test_evaluate_repeats_the_results_and_shows_baselines(finished):
    asked = f"--workdir={finished}", "--split=test", "--baselines=popularity"
    done = preloaded.run("experiments.evaluate", *asked)
    assert done.returncode == 0, done.stderr
    results = json.loads((finished / "results.json").read_text())
    line = next(line for line in done.stdout.splitlines() if line.startswith("fused"))
    assert line.split()[1:] == [f"{results['test'][name]:.4f}" for name in ("recall@10", "ndcg@10", "auc")]
    assert any(line.startswith("popularity") for line in done.stdout.splitlines())


def test_a_run_has_a_model_card(finished):
    results = json.loads((finished / "results.json").read_text())
    card = (finished / "README.md").read_text()
    _, matter, below = card.split("---\n", 2)
    [entry] = yaml.safe_load(matter)["model-index"]
    for result in entry["results"]:
        part = {"validation": "valid", "test": "test"}[result["dataset"]["split"]]
        assert {metric["type"]: metric["value"] for metric in result["metrics"]}.items() <= results[part].items()
    folder = finished / re.findall("checkpoint is in `(.*?)`", below)[0]
    assert folder == finished / "refit" / "checkpoints" / str(results["best_step"])
    digests = {json.loads((finished / "run.json").read_text())["tables"], model_digest(finished)}
    assert set(re.findall("`([0-9a-f]{64})`", below)) == digests
    assert hashlib.sha256((folder / "manifest.sha256").read_bytes()).hexdigest() in digests
    assert "| customers | 80 |" in below and "refitted on training and validation" in below


def test_the_card_of_a_finished_run_takes_new_statements(tables, cache, tmp_path, undisturbed):
    workdir = tmp_path / "run"
    shutil.copytree(undisturbed, workdir)
    before = json.loads((workdir / "results.json").read_text())
    config = small(tables, cache, model__variant="graph", train__refit="valid", card__owner="Risk")
    results = run_training(config, workdir)
    assert "| Owner | Risk |" in (workdir / "README.md").read_text()
    assert results["config"]["card"]["owner"] == "Risk" and before["config"]["card"]["owner"] == ""
    # It is not trained again: even the time at which it was finished is the same.
    kept = {name: value for name, value in results.items() if name != "config"}
    assert kept == {name: value for name, value in before.items() if name != "config"}
    assert differences(workdir, undisturbed) == ["results.json, config"]
    assert load(workdir)[0].card.owner == "Risk"


def test_a_page_about_a_run(tmp_path, finished):
    """A real run's page has its numbers, its customers and its products, and recommends as `recommend` does."""
    rules = tmp_path / "rules.json"
    rules.write_text('{"rules": [{"name": "calm", "require": ["item.risk_band", "at_most", 4]}]}')
    out = tmp_path / "page.html"
    asked = ["--users=C0001,C0002", "--k=3", f"--rules={rules}", "--groups=age_band", "--baselines=popularity"]
    done = preloaded.run("experiments.report", f"--workdir={finished}", f"--out={out}", *asked)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"page: {out}"
    page = Page(out.read_text(encoding="utf-8"))
    assert page.faults == []
    results, shown = json.loads((finished / "results.json").read_text()), " ".join(page.texts)
    for part in ("valid", "test"):
        assert f"{results[part]['ndcg@10']:.3f}" in page.texts
    # Among the evaluations, which are of the model alone.
    assert f"{results['late_fusion']['single']['model']:.4f}" in shown
    assert model_digest(finished) in page.texts
    assert "popularity" in page.texts and "calm" in page.texts
    assert "NDCG@10 under the rules by age_band, validation split" in page.texts
    assert sum("it falls from rank 1" in text or "it stays at rank 1" in text for text in page.texts) == 2

    config, prepared, state = load(finished)
    may = candidate_filter(prepared.dataset, read_rules(rules)[0])
    rows = user_rows(prepared.dataset, ["C0001", "C0002"])
    [part] = rank_chunks(scorer(config, prepared, state), prepared.dataset, may, rows, 3)
    names = dict(zip(*(prepared.dataset.items.column(name).to_pylist() for name in ("item_id", "name")), strict=True))
    expected = [names[item] for item in part.table.column("item_id").to_pylist()]
    assert page.inside("h4", "bdi") == expected


def test_every_variant_trains(tables, cache, tmp_path, undisturbed):
    trained = run_training(small(tables, cache, model__variant="text", train__max_steps=10), tmp_path)
    for variant, results in (("text", trained), ("graph", json.loads((undisturbed / "results.json").read_text()))):
        assert results["variant"] == variant
        assert results["test"]["auc"] > 0.5


def test_a_split_by_time_needs_ties_with_times(tables, cache, tmp_path):
    with pytest.raises(ValueError, match="ties have no timestamp"):
        run_training(small(tables, cache, split__kind="time"), tmp_path)


def test_a_diverged_run_names_the_step_and_the_checkpoint(tables, cache, tmp_path):
    with pytest.raises(NonFiniteLossError, match="loss of step 2 is nan; there is no checkpoint yet"):
        run_training(small(tables, cache, model__variant="graph", train__learning_rate=1e38), tmp_path)


def test_load_wants_a_finished_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="finish the run there"):
        load(tmp_path)


@pytest.mark.skipif("FUSED_REC_DATA" not in os.environ, reason="set FUSED_REC_DATA to the public datasets")
@pytest.mark.parametrize(
    ("name", "split", "core"),
    [("lastfm_sociallgn", "predefined", 1), ("amazon", "per_user", 1), ("stocknet", "time", 5)],
)
def test_real_tables_train(tmp_path, name, split, core):
    """From raw files; without words, whose encoding takes minutes."""
    config = Config(
        data=DataConfig(name=name, k_core=core),
        split=SplitConfig(kind=split),
        train=TrainConfig(max_steps=20, eval_every=20, batch_size=256, positives_per_user=16, learning_rate=0.05),
    )
    values = to_dict(config)
    values["model"] |= {"variant": "graph", "dim": 8, "num_layers": 2}
    results = run_training(from_dict(values), tmp_path)
    assert results["test"]["auc"] > 0.5


def test_bad_input_is_one_report_before_any_work(tables, cache, tmp_path):
    """A fault of the tables ends the command with the file, the row and the remedy, and no traceback."""
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "interactions.csv").write_text(
        "user_id,item_id,timestamp\nA,X,1700000000\nA,Y,soon\n,X,1700000001\nB,X,1700000002\n"
    )
    done = preloaded.run(*train_command(bad, cache, tmp_path / "run"))
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "interactions.csv, row 3" in done.stderr
    assert "interactions.csv, row 4" in done.stderr
    assert not (tmp_path / "run").exists()  # free for the command that mends it


def test_evaluating_the_validation_part_of_a_refitted_run_shows_what_chose_it(finished):
    """The refitted model has learned from that part; the one that chose the step has not."""
    config, prepared, state = load_measured(finished, "valid")
    assert config.train.refit == "valid"
    results = json.loads((finished / "results.json").read_text())
    assert evaluate_mean(prepared, scorer(config, prepared, state), "valid") == pytest.approx(
        results["valid"], abs=1e-12
    )


def test_changed_tables_are_refused(tables, cache, tmp_path):
    """The same pairs in another order number users and items anew, and a checkpoint's rows would be others'."""
    folder = tmp_path / "tables"
    folder.mkdir()
    lines = (tables / "interactions.csv").read_text().splitlines(keepends=True)
    (folder / "interactions.csv").write_text("".join(lines))
    run_training(small(folder, cache, model__variant="graph", train__max_steps=5), tmp_path / "run")
    load(tmp_path / "run")
    (folder / "interactions.csv").write_text("".join([lines[0], *lines[:0:-1]]))
    reported = (
        r"the tables have changed .* \(users has its 80 rows with changed columns \(other values: user_id\); items has"
    )
    with pytest.raises(TablesChangedError, match=reported):
        load(tmp_path / "run")


def test_a_mistyped_setting_is_named(tmp_path):
    asked = "--config=experiments/configs/synthetic.py", "--config.model.dimm=8", f"--workdir={tmp_path}"
    done = preloaded.run("experiments.train", *asked)
    assert done.returncode == 1
    assert "dimm" in done.stderr and "Traceback" not in done.stderr


def test_without_an_interaction_is_computed_anew(finished):
    """As a model of the same parameters whose tables never had the holding would say."""
    config, prepared, state = load(finished)
    user, item = int(prepared.observed.user[0]), int(prepared.observed.item[0])
    changed = without_interaction(config, prepared, user, item)
    before, after = (
        [part.graph.adjacencies[relation].receiver_start[-1] for relation in (INTERACTS, INTERACTED_BY)]
        for part in (prepared.graph_inputs, changed)
    )
    assert after == [count - 1 for count in before]
    assert changed.popularity[item] == prepared.graph_inputs.popularity[item] - 1
    assert (np.delete(changed.popularity, item) == np.delete(prepared.graph_inputs.popularity, item)).all()
    received = changed.graph.adjacencies[INTERACTED_BY]
    senders, receivers, weight = (x[: after[1]] for x in (received.senders, received.receivers, received.weight))
    assert not ((receivers == user) & (senders == item)).any()
    others, own = np.bincount(senders)[senders], np.bincount(receivers)[receivers]
    np.testing.assert_allclose(weight, 1 / np.sqrt(others * own), rtol=1e-6)

    eligible = np.ones(prepared.dataset.n_items, bool)
    ranked = np.argsort(-scores(decompose(config, state.params, prepared.graph_inputs), user), kind="stable")
    best = int(ranked[ranked != item][0])
    change = counterfactual_effect(config, state.params, prepared, user, best, item, eligible)
    assert change.rank == 1
    assert change.score == pytest.approx(
        scores(decompose(config, state.params, prepared.graph_inputs), user)[best], rel=1e-5
    )
    assert change.score_after == pytest.approx(scores(decompose(config, state.params, changed), user)[best], rel=1e-5)
    assert change.score_after != change.score
    with pytest.raises(ValueError, match="has no training interaction with item"):
        own = prepared.observed.item[prepared.observed.user == user]
        without_interaction(config, prepared, user, int(np.setdiff1d(np.arange(prepared.dataset.n_items), own)[0]))


class StopHereError(Exception):
    """What a watcher of the evaluations raises in the test below."""


def test_a_run_over_sampled_neighbors_resumes_bit_for_bit(tables, cache, tmp_path):
    """Stopped at an evaluation and taken up from the checkpoint before it."""
    changes = {"train__loss": "sampled_softmax", "train__num_neighbors": 2, "model__variant": "graph"}
    config = small(tables, cache, train__num_negatives=2, model__edge_dropout=0.2, **changes)
    prepared = prepare(config, *read(config))
    straight, through = trainer.fit(config, prepared, tmp_path / "straight")

    def stop(step, value):
        if step == 15:
            raise StopHereError

    with pytest.raises(StopHereError):
        trainer.fit(config, prepared, tmp_path / "resumed", on_evaluation=stop)
    assert Checkpoints(tmp_path / "resumed" / "checkpoints").last_good() == 10
    resumed, progress = trainer.fit(config, prepared, tmp_path / "resumed")
    assert progress.best_step == through.best_step > 0
    jax.tree.map(np.testing.assert_array_equal, resumed, straight)


THREE = ["select", "select_0.1", "select_0.3"]


@pytest.mark.parametrize(("seed", "folders"), [(0, ["select", "select_0.3"]), (1, THREE), (2, THREE)])
def test_the_temperature_is_chosen_on_validation(seed, folders, tables, cache, tmp_path):
    """A run per temperature, .1 where .15 is better than .3; the best one is what a run with it alone is."""
    changes = {"model__variant": "graph", "model__late_fusion": True, "train__seed": seed}
    results = run_training(small(tables, cache, train__temperature=0.0, **changes), tmp_path / "chosen")
    assert sorted(path.name for path in (tmp_path / "chosen").glob("select*")) == folders
    best = {name: max(line["valid/ndcg@10"] for line in read_curves(tmp_path / "chosen" / name)) for name in folders}
    assert results["phase"] == max(folders, key=lambda name: best[name])
    assert ("select_0.1" in folders) == (best["select"] > best["select_0.3"])
    assert results["temperature"] == {"select": 0.15, "select_0.1": 0.1, "select_0.3": 0.3}[results["phase"]]
    given = small(tables, cache, train__temperature=results["temperature"], **changes)
    alone = run_training(given, tmp_path / "alone")
    assert (alone["valid"], alone["test"]) == (results["valid"], results["test"])
    config, prepared, state = load_measured(tmp_path / "chosen", "test")
    assert config.train.temperature == results["temperature"]
    assert evaluate_mean(prepared, scorer(config, prepared, state), "test") == results["test"]
