"""Studies in real processes: complete, resumed, killed, with failures; and what is left out of them."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import preloaded
import pytest
from market import write_tables

from experiments.configs.tables import get_config
from fused_rec.baselines.registry import BASELINES
from fused_rec.config import Config, DataConfig, GraphConfig, ModelConfig, from_dict
from fused_rec.evaluation.significance import paired_bootstrap
from fused_rec.runs.run_dir import BusyError, lock_run_dir, read_users
from fused_rec.studies import compare as module
from fused_rec.studies.compare import applicable, check_names, compare_variants
from fused_rec.studies.variants import VARIANTS, variant
from fused_rec.training import baseline_runs
from fused_rec.training.inputs import read

# No words, so that no language model is opened: "fused" is a graph without them.
SETTINGS = {
    "model.variant": "graph",
    "model.dim": 4,
    "model.num_layers": 1,
    "train.batch_size": 32,
    "train.temperature": 0.15,
    "train.max_steps": 4,
    "train.eval_every": 2,
}
# Four, as tests/conftest.py has them, take longer to compile for.
ONE_DEVICE = {"JAX_NUM_CPU_DEVICES": "1"}
RUNS = [("fused", 0), ("fused", 1), ("no_social_edges", 0), ("no_social_edges", 1), ("popularity", 0)]


@pytest.fixture(scope="module")
def tables(tmp_path_factory) -> Path:
    return write_tables(tmp_path_factory.mktemp("tables"))


def small(tables: Path) -> Config:
    """What `command` runs."""
    values = get_config().to_dict()
    for name, value in {**SETTINGS, "data.path": str(tables)}.items():
        section, setting = name.split(".")
        values[section][setting] = value
    return from_dict(values)


def command(tables: Path, out: Path, *flags: str) -> list[str]:
    settings = [f"--config.{name}={value}" for name, value in SETTINGS.items()]
    start = ["experiments.compare", "--config=experiments/configs/tables.py", f"--out={out}"]
    return [*start, f"--config.data.path={tables}", *settings, *flags]


def run(tables: Path, out: Path, *flags: str) -> subprocess.CompletedProcess:
    return preloaded.run(*command(tables, out, *flags), **ONE_DEVICE)


WHOLE = ("--variants=fused,no_social_edges,popularity", "--num_seeds=2")


@pytest.fixture(scope="module")
def compared(tables, tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    """The folder of a study that nothing stopped, and what it printed."""
    out = tmp_path_factory.mktemp("compared") / "out"
    done = run(tables, out, *WHOLE)
    assert done.returncode == 0, done.stderr
    return out, done


def rows_of(out: Path) -> list[dict]:
    """Rows without times, in one order: another study of the same folder may have written them in its own."""
    rows = json.loads((out / "compare.json").read_text())["rows"]
    rows.sort(key=lambda row: (row["variant"], row["seed"]))
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def test_the_report_is_what_the_runs_left(compared):
    out, done = compared
    report = json.loads((out / "compare.json").read_text())
    assert [(row["variant"], row["seed"]) for row in report["rows"]] == RUNS
    assert (report["task"], report["reference"], report["failures"]) == ("tables, random split", "fused", [])
    assert "experiments.compare --config=" in report["command"]
    values = {}
    for row in report["rows"]:
        folder = out / "runs" / row["variant"] / str(row["seed"])
        results = json.loads((folder / "results.json").read_text())
        assert all(row[name] == results[name] for name in ("test", "valid", "slices", "seconds", "parameters"))
        users = read_users(folder / "test_metrics_per_user.npz")
        assert np.nanmean(users.metrics["recall@20"], dtype=np.float64) == pytest.approx(row["test"]["recall@20"])
        for kind in ("user_interactions", "user_social_degree"):
            parts = row["slices"][kind].values()
            assert sum(part["users"] for part in parts) == len(users.users)
            total = sum(part["users"] * part["ndcg@10"] for part in parts)
            assert total / len(users.users) == pytest.approx(row["test"]["ndcg@10"])
        assert {"items", "users", "ndcg@10", "recall@10"} <= set(row["slices"]["item_interactions"]["20+"])
        values.setdefault(row["variant"], []).append(users.metrics["ndcg@10"])
    assert report["rows"][0]["parameters"] > 4 * 30  # a row of 4 for each of 30 products, and more
    found = [row for row in report["differences"] if (row["variant"], row["metric"]) == ("no_social_edges", "ndcg@10")]
    expected = paired_bootstrap(np.stack(values["fused"]), np.stack(values["no_social_edges"]))
    assert [(row["difference"], row["low"], row["p"]) for row in found] == [
        (expected.difference, expected.low, expected.p)
    ]
    for name in ("md", "csv", "tex"):
        assert "no" in (out / f"compare.{name}").read_text()
    assert (out / "compare.md").read_text().strip() in done.stdout
    assert "no_social_edges, seed 1: ndcg@10" in done.stderr
    assert "0 runs left" in done.stderr


def test_figures_are_drawn_where_they_can_be(compared):
    pytest.importorskip("matplotlib", reason="figures need the extra: pip install -e '.[plots]'")
    for name in ("compare.png", "slices.png"):
        assert (compared[0] / name).read_bytes().startswith(b"\x89PNG")


def test_a_finished_study_trains_nothing_again(tables, compared):
    out, _ = compared
    before = {file: file.stat().st_mtime_ns for file in (out / "runs").rglob("*")}
    rows = rows_of(out)
    report = compare_variants(small(tables), ["no_social_edges", "popularity", "fused"], [0, 1], out)
    assert {file: file.stat().st_mtime_ns for file in (out / "runs").rglob("*")} == before
    assert report["reference"] == "fused"
    assert rows_of(out) == rows


def test_a_finished_study_of_other_tables_is_refused(tables, compared, tmp_path):
    """Also where nothing is left to be trained, and by the tables of the same runs elsewhere where they moved."""
    out = shutil.copytree(compared[0], tmp_path / "out")
    moved = shutil.copytree(tables, tmp_path / "moved")
    done = run(moved, out, *WHOLE)
    assert done.returncode == 0, done.stderr
    for folder in out.glob("runs/*/*"):
        assert json.loads((folder / "run.json").read_text())["config"]["data"]["path"] in (str(moved), str(tables))
    ties = (moved / "ties.csv").read_text().splitlines(keepends=True)
    (moved / "ties.csv").write_text("".join(ties[:-1]))
    done = run(moved, out, *WHOLE)
    assert done.returncode == 3 and "ties had" in done.stderr and "Traceback" not in done.stderr


def test_another_config_is_refused_before_any_work(tables, compared):
    out, _ = compared
    other = variant(small(tables), "no_social_edges")
    with pytest.raises(ValueError, match=r"graph\.social_edges is 'observed' there and 'none' here"):
        compare_variants(other, ["fused", "popularity"], [5, 1], out)
    assert not (out / "runs" / "fused" / "5").exists()


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_study_ends_as_if_never_stopped(tables, compared, tmp_path, signum):
    """A signal when the second run has its first checkpoint; the same command then gives the same rows."""
    out = tmp_path / "out"
    process = preloaded.start(*command(tables, out, *WHOLE), **ONE_DEVICE)
    milestone = out / "runs" / "fused" / "1" / "select" / "checkpoints" / "2"
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline and not milestone.exists():
        time.sleep(0.005)
    process.send_signal(signum)
    _, stderr = process.communicate()
    assert milestone.exists() and not (out / "compare.json").exists()
    if signum == signal.SIGTERM:  # which is no failure of that run, and no other one is begun
        assert process.returncode == 143
        assert "give the same command again" in stderr and "failed" not in stderr and "Traceback" not in stderr
        assert not (out / "runs" / "no_social_edges").exists()
    kept = (out / "runs" / "fused" / "0" / "results.json").stat().st_mtime_ns
    report = run(tables, out, *WHOLE)
    assert report.returncode == 0, report.stderr
    assert rows_of(out) == rows_of(compared[0])
    assert (out / "runs" / "fused" / "0" / "results.json").stat().st_mtime_ns == kept


def test_a_folder_is_one_study_at_a_time(tables, compared):
    out, _ = compared
    before = (out / "compare.json").read_bytes()
    with lock_run_dir(out), pytest.raises(BusyError, match=f"{out} is in use by process {os.getpid()}"):
        compare_variants(small(tables), ["popularity"], [0], out)
    assert (out / "compare.json").read_bytes() == before


def test_a_failing_run_is_reported_and_takes_no_other_down(tables, tmp_path):
    flags = ("--config.train.learning_rate=1e38", "--variants=fused,popularity", "--num_seeds=1")
    done = run(tables, tmp_path, *flags)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    report = json.loads((tmp_path / "compare.json").read_text())
    [failure] = report["failures"]
    assert (failure["variant"], failure["seed"]) == ("fused", 0)
    assert failure["message"].startswith("NonFiniteLossError: the loss of step")
    assert [row["variant"] for row in report["rows"]] == ["popularity"]
    assert report["differences"] == []
    for name in ("md", "csv", "tex"):
        assert "NonFiniteLossError: the loss of step" in (tmp_path / f"compare.{name}").read_text()
    assert "| fused | 0 | failed |" in done.stdout


def test_a_baseline_whose_library_is_missing_is_left_out(tables, compared, tmp_path, monkeypatch):
    def without_library(name: str, *_: object) -> dict:
        raise ImportError(f"{name} needs the library implicit")

    shutil.copytree(compared[0], tmp_path / "out")
    monkeypatch.setattr(baseline_runs, "choose_settings", without_library)
    report = compare_variants(small(tables), ["popularity", "als"], [0], tmp_path / "out")
    assert report["skipped"] == {"als": "als needs the library implicit"}
    assert (report["failures"], report["reference"]) == ([], "popularity")
    assert [entry["variant"] for entry in report["summary"]] == ["popularity"]


def test_tuned_settings_are_those_trained(tables, tmp_path, monkeypatch):
    asked, trained = [], []

    def tuned(config: Config, folder: Path, trials: int) -> Config:
        asked.append((folder.relative_to(tmp_path).as_posix(), trials))
        if config.graph.social_edges == "none":
            raise ValueError("no trial was completed")
        return dataclasses.replace(config, train=dataclasses.replace(config.train, temperature=0.5))

    def train(config: Config, workdir: Path) -> None:
        trained.append((config.train.temperature, config.train.seed, workdir.relative_to(tmp_path).as_posix()))
        raise ArithmeticError("enough")

    monkeypatch.setattr(module, "_tuned", tuned)
    monkeypatch.setattr(module.trainer, "run_training", train)
    report = compare_variants(small(tables), ["fused", "no_social_edges"], [3, 4], tmp_path, trials=7)
    assert asked == [("sweeps/fused", 7), ("sweeps/no_social_edges", 7)]
    assert trained == [(0.5, 3, "runs-tuned-7/fused/3"), (0.5, 4, "runs-tuned-7/fused/4")]
    assert report["configs"]["fused"]["train"]["temperature"] == 0.5
    assert report["failures"] == [
        {"variant": "fused", "seed": 3, "message": "ArithmeticError: enough"},
        {"variant": "fused", "seed": 4, "message": "ArithmeticError: enough"},
        {"variant": "no_social_edges", "seed": None, "message": "ValueError: no trial was completed"},
    ]
    assert "Failed: no_social_edges, tuning: ValueError" in (tmp_path / "compare.md").read_text()


def test_what_says_nothing_on_these_tables_is_left_out(tables, tmp_path):
    (tmp_path / "interactions.csv").write_bytes((tables / "interactions.csv").read_bytes())
    config = Config(data=DataConfig(name="tables", path=str(tmp_path)), graph=GraphConfig(text_knn=0))
    kept, skipped = applicable(config, [*VARIANTS, "popularity"], *read(config))
    assert {"fused", "no_gates", "popularity"} <= set(kept)
    assert skipped["rewired_social_edges"] == skipped["no_social_edges"] == "tables has no ties"
    assert skipped["shuffled_text"] == skipped["random_text"] == skipped["text"] == "tables has no text"
    config = Config(data=DataConfig(name="tables", path=str(tables)), graph=GraphConfig(text_knn=0))
    kept, skipped = applicable(config, list(VARIANTS), *read(config))
    assert skipped["no_text_knn"] == "its settings are those of fused"
    assert {"rewired_social_edges", "shuffled_text", "text", "graph"} <= set(kept)
    no_text = dataclasses.replace(config, model=dataclasses.replace(config.model, variant="graph"))
    _, skipped = applicable(no_text, list(VARIANTS), *read(no_text))
    assert skipped["shuffled_text"] == skipped["random_text"] == "the config uses no text"
    with pytest.raises(ValueError, match="nothing is left to compare"):
        applicable(small(tmp_path), ["text"], *read(small(tmp_path)))


def test_unknown_names_are_reported_with_those_known(tables, tmp_path):
    done = run(tables, tmp_path / "out", "--variants=fused,fuzed")
    assert done.returncode != 0
    assert "fuzed" in done.stderr and "no_social_edges" in done.stderr and "popularity" in done.stderr
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="each once"):
        check_names(["fused", "fused"])


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_changes_settings_that_are_there(name):
    whole = Config(model=ModelConfig(late_fusion=True))  # of all parts: an ablation takes one away
    assert (variant(whole, name) == whole) == (name == "fused")
    assert name not in BASELINES


def test_an_unknown_variant_names_those_known():
    with pytest.raises(ValueError, match="variant is 'fuzed'; it must be one of fused, graph"):
        variant(Config(), "fuzed")
