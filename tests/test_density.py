"""Density studies in real processes: complete, interrupted and resumed, and what is refused before any work."""

import csv
import json
import signal
import time
from pathlib import Path

import numpy as np
import preloaded
import pytest
from market import write_tables

from experiments.configs.tables import get_config
from fused_rec.config import from_dict
from fused_rec.data.splits import split
from fused_rec.evaluation.significance import paired_bootstrap
from fused_rec.runs.run_dir import BusyError, lock_run_dir, read_users
from fused_rec.studies.density import Density, gain, measure_density
from fused_rec.training.inputs import read

# Random text vectors: no language model is opened.
SETTINGS = {
    "text.features": "random",
    "model.dim": 4,
    "model.num_layers": 1,
    "model.late_fusion": False,
    "train.batch_size": 32,
    "train.temperature": 0.15,
    "train.max_steps": 4,
    "train.eval_every": 2,
}
FLAGS = ("--history=all,2", "--baselines=popularity,item_knn", "--num_seeds=1")
POINTS = [(2, 0.0), (0, 0.0)]
FOLDERS = ["history_2_new_0", "history_all_new_0"]
NAMES = ["text", "graph", "fused", "popularity", "item_knn"]


@pytest.fixture(scope="module")
def tables(tmp_path_factory) -> Path:
    return write_tables(tmp_path_factory.mktemp("tables"))


def small(tables: Path, **changes):
    values = get_config().to_dict()
    for name, value in {**SETTINGS, "data.path": str(tables), **changes}.items():
        section, setting = name.split(".")
        values[section][setting] = value
    return from_dict(values)


def start(tables: Path, out: Path, *flags: str) -> preloaded.Process:
    settings = [f"--config.{name}={value}" for name, value in SETTINGS.items()]
    command = ["experiments.density", "--config=experiments/configs/tables.py", f"--out={out}"]
    return preloaded.start(*command, f"--config.data.path={tables}", *settings, *flags, JAX_NUM_CPU_DEVICES="1")


@pytest.fixture(scope="module")
def measured(tables, tmp_path_factory) -> tuple[Path, str, str]:
    """The folder of a study that was interrupted in its second point and resumed, and what the last process printed."""
    out = tmp_path_factory.mktemp("measured") / "out"
    process = start(tables, out, *FLAGS)
    milestone = out / FOLDERS[1] / "runs" / "graph" / "0" / "run.json"
    deadline = time.monotonic() + 240
    while process.poll() is None and time.monotonic() < deadline and not milestone.exists():
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate()
    assert process.returncode == 143 and "give the same command again" in stderr, stderr
    assert milestone.exists() and not (out / "density.json").exists()
    finished = {file: file.stat().st_mtime_ns for file in out.rglob("results.json")}
    assert len(finished) >= len(NAMES)
    process = start(tables, out, *FLAGS)
    stdout, stderr = process.communicate()
    assert process.returncode == 0, stderr
    assert {file: file.stat().st_mtime_ns for file in finished} == finished
    return out, stdout, stderr


def test_every_point_is_a_comparison_on_the_same_held_out_rows(measured, tables):
    out, _, stderr = measured
    report = json.loads((out / "density.json").read_text())
    assert [(point["history"], point["new_items"]) for point in report["points"]] == POINTS
    assert "point 1 of 2: history 2, new items 0%" in stderr and "point 2 of 2: history all, new items 0%" in stderr
    users = None
    for (history, share), folder in zip(POINTS, FOLDERS, strict=True):
        run = json.loads((out / folder / "runs" / "fused" / "0" / "run.json").read_text())["config"]
        assert (run["split"]["history"], run["split"]["new_item_share"], run["train"]["refit"]) == (
            history,
            share,
            "none",
        )
        found = read_users(out / folder / "runs" / "fused" / "0" / "test_metrics_per_user.npz").users
        users = found if users is None else users
        assert np.array_equal(found, users)
        dropped = len(split(read(small(tables))[0], from_dict(run).split).dropped)
        assert (dropped > 0) == ((history, share) != (0, 0.0))


def test_validation_chooses_and_gains_are_those_of_the_runs(measured):
    out, _, _ = measured
    groups = {"branch": NAMES[:2], "baseline": NAMES[3:], "single": [*NAMES[:2], *NAMES[3:]]}
    for point, folder in zip(json.loads((out / "density.json").read_text())["points"], FOLDERS, strict=True):
        runs = {name: out / folder / "runs" / name / "0" for name in NAMES}
        valid = {name: json.loads((run / "results.json").read_text())["valid"]["ndcg@10"] for name, run in runs.items()}
        for choice, names in groups.items():
            assert point["chosen"][choice] == max(names, key=valid.__getitem__)
        assert {entry["variant"] for entry in point["summary"]} == set(NAMES)
        per_user = {
            name: read_users(run / "test_metrics_per_user.npz").metrics["ndcg@10"] for name, run in runs.items()
        }
        expected = paired_bootstrap(per_user["fused"][None], per_user[point["chosen"]["branch"]][None])
        found = gain(point, "branch", "ndcg@10")
        assert found is not None
        assert (found["relative"], found["relative_low"]) == pytest.approx((expected.relative, expected.relative_low))


def test_the_tables_have_every_point(measured):
    out, stdout, _ = measured
    text = (out / "density.md").read_text()
    assert text.strip() in stdout and "| 2 | 0% |" in text and "| all | 0% |" in text
    assert text.startswith(
        "ndcg@10\n\n| history | new items | text | graph | fused | best baseline | fused vs. the better"
    )
    assert "\nrecall@10\n\n| history" in text and "Failed" not in text
    rows = list(csv.DictReader((out / "density.csv").read_text().splitlines()))
    assert len(rows) == len(POINTS) * 3 * len(NAMES)
    report = json.loads((out / "density.json").read_text())
    for row in rows:
        if row["metric"] != "ndcg@10":
            continue
        place = POINTS.index((0 if row["history"] == "all" else int(row["history"]), float(row["new_items"])))
        point = report["points"][place]
        [entry] = [entry for entry in point["summary"] if entry["variant"] == row["variant"]]
        assert float(row["mean"]) == entry["metrics"]["ndcg@10"]["mean"]
        assert ("branch" in row["chosen_as"].split()) == (row["variant"] == point["chosen"]["branch"])
        assert (row["fused vs. row: relative"] == "") == (row["variant"] == "fused")


def test_the_figure_is_drawn_where_it_can_be(measured):
    pytest.importorskip("matplotlib", reason="figures need the extra: pip install -e '.[plots]'")
    assert (measured[0] / "density.png").read_bytes().startswith(b"\x89PNG")


def test_a_folder_is_one_study_at_a_time_and_of_one_config(measured, tables):
    out, _, _ = measured
    density = Density((2,), baselines=("popularity",))
    with lock_run_dir(out), pytest.raises(BusyError, match="is in use by process"):
        measure_density(small(tables), density, out)
    with pytest.raises(ValueError, match=r"model\.dim is 4 there and 8 here"):
        measure_density(small(tables, **{"model.dim": 8}), density, out)


def test_points_are_every_length_with_every_share_sparse_ones_first():
    expected = [(history, share) for share in (0.0, 0.1) for history in (1, 5, 0)]
    assert Density((0, 5, 1), (0.1, 0.0)).points == expected


def test_a_failed_run_leaves_its_means_and_gains_out(tables, tmp_path):
    density = Density((2,), (0.2,), baselines=("popularity",))
    report = measure_density(small(tables, **{"train.learning_rate": 1e38}), density, tmp_path)
    [point] = report["points"]
    run = json.loads((tmp_path / "history_2_new_0.2" / "runs" / "fused" / "0" / "run.json").read_text())["config"]
    assert (run["split"]["history"], run["split"]["new_item_share"], run["train"]["refit"]) == (2, 0.2, "none")
    assert {failure["variant"] for failure in point["failures"]} == {"text", "graph", "fused"}
    assert point["chosen"] == {"branch": None, "baseline": "popularity", "single": "popularity"}
    text = (tmp_path / "density.md").read_text()
    assert "Failed: history 2, new items 20%, fused: NonFiniteLossError" in text
    assert "| 2 | 20% | – | – | – | 0." in text and text.count("| – | – |\n") == 2


def test_tables_without_text_are_refused_before_any_run(tables, tmp_path):
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "interactions.csv").write_bytes((tables / "interactions.csv").read_bytes())
    with pytest.raises(ValueError, match="text, graph and fused cannot be told apart .*tables has no text"):
        measure_density(small(tmp_path / "tables"), Density((1,)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--history=0", "--history has '0'; it must be a number above 0, or all"),
        ("--history=1,1", "histories is [1, 1]; it must be one or more numbers, 0 = all, each once"),
        ("--new_items=half", "--new_items has 'half'; it must be a share in [0, 1)"),
        ("--new_items=1", "new_items is [1.0]; it must be one or more shares in [0, 1), each once"),
        ("--variants=text,fused", "variants is ['text', 'fused']; it must be ('text', 'graph', 'fused') and any of"),
        ("--baselines=eese", "baselines is ['eese']; it must be any of ['popularity'"),
    ],
)
def test_wrong_flags_are_refused(tables, tmp_path, flag, message):
    asked = "--config=experiments/configs/tables.py", f"--config.data.path={tables}", f"--out={tmp_path}/out", flag
    done = preloaded.run("experiments.density", *asked, JAX_NUM_CPU_DEVICES="1")
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
