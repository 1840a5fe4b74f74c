"""Weights & Biases gets the curves and results of a run, and goes on with it; the real library, offline."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import fused_rec as fr
from fused_rec.runs.loggers import metric_writer
from fused_rec.training.trainer import run_training

pytest.importorskip("wandb", reason="the extra wandb is not installed")

BLOCK = 32_768  # of the log format of LevelDB, in which an offline run is kept
SETTINGS = {
    "model": {"dim": 8, "num_layers": 1, "variant": "graph"},
    "train": {"batch_size": 32, "max_steps": 4, "eval_every": 2, "wandb": "market"},
}


def ran(code: str, workdir: Path) -> subprocess.CompletedProcess:
    """Python in a process of its own, offline; `workdir` is a name there."""
    environment = os.environ | {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB__SERVICE_WAIT": "300"}
    environment |= {"JAX_NUM_CPU_DEVICES": "1"}
    before = f"from pathlib import Path\nimport fused_rec as fr\nworkdir = Path({str(workdir)!r})\n"
    done = subprocess.run([sys.executable, "-c", before + code], env=environment, capture_output=True, text=True)
    return done


def records(file: Path) -> list:
    """What an offline run keeps, record by record."""
    from wandb.proto.wandb_internal_pb2 import Record  # pyright: ignore[reportAttributeAccessIssue]

    content, at, found, parts = file.read_bytes(), 7, [], []
    assert content[:4] == b":W&B"
    while at + 7 <= len(content):
        if BLOCK - at % BLOCK < 7:  # no room for a header: the block is filled up
            at += BLOCK - at % BLOCK
            continue
        size, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        parts.append(content[at + 7 : at + 7 + size])
        at += 7 + size
        if kind in (1, 4):  # a whole record, or the last part of one
            found.append(Record.FromString(b"".join(parts)))
            parts = []
    return found


def kept(workdir: Path) -> tuple[list[str], list[dict], dict, dict]:
    """Ids of all sessions in their order, rows of history, the summary, and the settings of the first session."""
    ids, rows, summary, config = [], [], {}, {}
    for file in sorted((workdir / "wandb").glob("offline-run-*/*.wandb"), key=lambda file: file.stat().st_mtime_ns):
        for record in records(file):
            if record.HasField("run") and record.run.run_id:
                ids.append(record.run.run_id)
                config = config or {item.key: json.loads(item.value_json) for item in record.run.config.update}
            elif record.HasField("history"):
                row = {
                    item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item
                }
                rows.append({name: value for name, value in row.items() if not name.startswith("_")})
            elif record.HasField("summary"):
                for item in record.summary.update:
                    summary[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
    return ids, rows, summary, config


def test_a_run_sends_curves_results_and_settings(tmp_path):
    code = f"""
from fused_rec.data.synthetic import make_synthetic
fr.train(fr.configure(**{SETTINGS!r}), workdir, make_synthetic(0, 60, 30))
"""
    done = ran(code, tmp_path / "run")
    assert done.returncode == 0, done.stderr
    ids, rows, summary, config = kept(tmp_path / "run")
    assert set(ids) == {json.loads((tmp_path / "run" / "wandb.json").read_text())["id"]}
    lines = [json.loads(line) for line in (tmp_path / "run" / "select" / "curves.jsonl").read_text().splitlines()]
    assert len(lines) == 2
    expected = [{f"select/{name}": value for name, value in line.items() if value is not None} for line in lines]
    assert [{name: row.get(name) for name in line} for row, line in zip(rows, expected, strict=True)] == expected
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert summary["test/ndcg@10"] == results["test"]["ndcg@10"] and summary["best_step"] == results["best_step"]
    assert config["model"]["dim"] == 8 and config["train"]["wandb"] == "market"
    assert "path" not in config["data"] and "cache" not in config["text"]


def test_a_resumed_run_goes_on_with_the_same_one(tmp_path):
    code = f"""
from fused_rec.runs.loggers import CurveLogger, metric_writer
workdir.mkdir(exist_ok=True)
with metric_writer(fr.configure(**{SETTINGS!r}), workdir) as shown, CurveLogger(workdir / "select", shown) as curves:
    curves.rewind(FIRST)
    for step in (FIRST + 5, FIRST + 10):
        curves.write(step, {{"loss": 100.0 - step}})
    if not FIRST:
        raise SystemExit("killed after the checkpoint of step 5")
"""
    assert "killed" in ran(code.replace("FIRST", "0"), tmp_path / "run").stderr
    (tmp_path / "run").rename(tmp_path / "moved")
    done = ran(code.replace("FIRST", "5"), tmp_path / "moved")
    assert done.returncode == 0, done.stderr
    ids, rows, _, _ = kept(tmp_path / "moved")
    assert len(ids) >= 2 and len(set(ids)) == 1
    assert [(row["select/step"], row["select/loss"]) for row in rows] == [(5, 95), (10, 90), (10, 90), (15, 85)]


def test_without_a_project_nothing_is_sent(tmp_path):
    with metric_writer(fr.Config(), tmp_path) as shown:
        assert shown is None
    assert os.listdir(tmp_path) == []


def test_without_the_library_nothing_is_begun(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match=r"train.wandb needs the library wandb: pip install -e '.\[wandb\]'"):
        run_training(fr.configure(**SETTINGS), tmp_path / "run")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("damage", ["", "[]", '{"id": 3}', '{"id": "a/b"}'])
def test_a_damaged_id_is_named(tmp_path, damage):
    (tmp_path / "wandb.json").write_text(damage)
    with (
        pytest.raises(ValueError, match="wandb.json is damaged"),
        metric_writer(fr.configure(train={"wandb": "market"}), tmp_path),
    ):
        pass


def test_a_project_w_and_b_would_refuse_is_refused():
    with pytest.raises(ValueError, match="train.wandb is 'a/b'; it must be a project name of at most 128 char"):
        fr.configure(train={"wandb": "a/b"})
