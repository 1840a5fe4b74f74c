"""The regret table of comparisons whose runs are made up, and of one that a real command left."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import preloaded
import pytest

from fused_rec.config import SLICE_METRICS
from fused_rec.evaluation.ranking import UserMetrics
from fused_rec.evaluation.significance import paired_bootstrap
from fused_rec.runs.run_dir import write_json, write_users
from fused_rec.studies.compare import is_single
from fused_rec.studies.regret import markdown, regret, write_regret

USERS = np.arange(50, dtype=np.int32)
# mean on test and on validation
MEANS = {
    "fused": (0.5, 0.5),
    "text": (0.4, 0.3),
    "lightgcn": (0.2, 0.6),
    "no_gates": (0.9, 0.9),  # an ablation
    "shuffled_text": (0.9, 0.9),  # a control
    "ease": (0.45, 0.2),
}


def compared(folder: Path, task: str = "market, random split", trials: int = 0, **failed: str) -> Path:
    """A finished comparison with two seeds of each variant, whose values by user differ."""
    rng, rows = np.random.default_rng(0), []
    for name, (test, valid) in MEANS.items():
        for seed in (0,) if name == "ease" else (0, 1):
            values = rng.normal(test, 0.02, len(USERS)).astype(np.float32)
            run = folder / (f"runs-tuned-{trials}" if trials else "runs") / name / str(seed)
            run.mkdir(parents=True)
            metrics: dict[str, np.ndarray] = dict.fromkeys(SLICE_METRICS, values)
            write_users(run / "test_metrics_per_user.npz", UserMetrics(USERS, metrics, {}))
            results = {"test": {"ndcg@10": float(values.mean())}, "valid": {"ndcg@10": valid}}
            rows.append({"variant": name, "seed": seed} | results)
    failures = [{"variant": name, "seed": 0, "message": why} for name, why in failed.items()]
    write_json(folder / "compare.json", {"task": task, "trials": trials, "rows": rows, "failures": failures})
    return folder


def values_of(folder: Path, name: str) -> np.ndarray:
    files = sorted(folder.glob(f"runs*/{name}/*/test_metrics_per_user.npz"))
    return np.stack([np.load(file)["ndcg@10"] for file in files])


def test_the_best_by_test_and_by_validation_are_single_methods(tmp_path):
    first, second = compared(tmp_path / "a"), compared(tmp_path / "b", "shop, time split", trials=3, ease="no memory")
    report = regret([first, second])
    opponents = [(row["test"]["variant"], row["valid"]["variant"]) for row in report["rows"]]
    assert opponents == [("ease", "lightgcn"), ("text", "lightgcn")]  # ease failed in the second
    for row, folder in zip(report["rows"], (first, second), strict=True):
        fused = values_of(folder, "fused")
        assert (row["mean"], row["seeds"]) == (pytest.approx(fused.mean()), 2)
        for on in ("test", "valid"):
            expected = paired_bootstrap(fused, values_of(folder, row[on]["variant"]))
            assert {name: row[on][name] for name in vars(expected)} == vars(expected)
            assert row[on]["relative"] == pytest.approx(row["mean"] / row[on]["mean"] - 1, abs=1e-5)
    assert report["mean"]["test"] == pytest.approx(np.mean([row["test"]["relative"] for row in report["rows"]]))
    assert report["rows"][1]["trials"] == 3


def test_the_files_hold_the_same_numbers(tmp_path):
    folders = [compared(tmp_path / name) for name in "ab"]
    report = regret(folders)
    (tmp_path / "out").mkdir()
    write_regret(report, tmp_path / "out")
    text = (tmp_path / "out" / "regret.md").read_text()
    assert text == markdown(report)
    assert text.splitlines()[-1] == f"| mean of 2 |  |  |  |  | {100 * report['mean']['test']:+.1f} % |  | " + (
        f"{100 * report['mean']['valid']:+.1f} % |"
    )
    assert f"market, random split ({folders[1]})" in text  # two of one task are told apart
    rows = list(csv.DictReader((tmp_path / "out" / "regret.csv").read_text().splitlines()))
    assert [float(row["best by test: relative_low"]) for row in rows] == [
        row["test"]["relative_low"] for row in report["rows"]
    ]


def test_the_figure_has_an_interval_per_task_and_opponent(tmp_path):
    pytest.importorskip("matplotlib", reason="figures need the extra: pip install -e '.[plots]'")
    report = regret([compared(tmp_path / name, name) for name in "ab"])
    from fused_rec.evaluation import plots

    [axes] = plots.by_task(report["rows"], "ndcg@10").axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a\nease / lightgcn", "b\nease / lightgcn"]
    low, high = np.asarray(axes.lines[0].get_xdata())
    assert (low, high) == pytest.approx([100 * report["rows"][0]["test"][f"relative_{end}"] for end in ("low", "high")])
    (tmp_path / "out").mkdir()
    write_regret(report, tmp_path / "out")
    assert (tmp_path / "out" / "regret.png").read_bytes().startswith(b"\x89PNG")


def test_what_a_single_method_is():
    assert all(map(is_single, ("text", "graph", "lightgcn", "popularity")))
    assert not any(
        map(is_single, ("fused", "no_late_fusion", "sampled", "lora", "random_text", "rewired_social_edges"))
    )


def test_comparisons_that_cannot_be_used_say_why(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no compare\.json; finish the comparison there"):
        regret([tmp_path])
    with pytest.raises(ValueError, match="it must have fused and a single method"):
        regret([compared(tmp_path / "failed", fused="no memory")])
    damaged = compared(tmp_path / "damaged")
    for content in ("{", "[]", "{}", json.dumps({"task": "x", "trials": 0, "rows": [3], "failures": []})):
        (damaged / "compare.json").write_text(content)
        with pytest.raises(ValueError, match=r"compare\.json is damaged \(.*run the same comparison again"):
            regret([damaged])


def test_the_command_prints_the_table_and_refuses_wrong_folders(tmp_path):
    folder, out = compared(tmp_path / "a"), f"--out={tmp_path}/out"

    for given, message in (
        (f"{folder},{folder}", "each once"),
        (f"{tmp_path}/nowhere", "there is no such folder"),
    ):
        done = preloaded.run("experiments.regret", out, f"--compared={given}", JAX_NUM_CPU_DEVICES="1")
        assert done.returncode == 1 and message in done.stderr and not (tmp_path / "out").exists()
    command = [sys.executable, "-m", "experiments.regret", out, f"--compared={folder}"]
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "regret.md").read_text() in done.stdout and "regret.csv" in done.stdout
