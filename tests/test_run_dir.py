"""One process a folder, whole files or none: with real locks, real processes and disks that are really full."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import preloaded
import pytest

from fused_rec.config import (
    NEUTRAL,
    CardConfig,
    Config,
    DataConfig,
    TextConfig,
    TrainConfig,
    differing,
    from_dict,
    to_dict,
)
from fused_rec.evaluation.ranking import UserMetrics
from fused_rec.runs import run_dir
from fused_rec.runs.loggers import CurveLogger
from fused_rec.runs.run_dir import (
    LOCK,
    BusyError,
    TablesChangedError,
    init_run_dir,
    lock_run_dir,
    read_run,
    write_json,
    write_users,
)
from fused_rec.storage import SaveError, persist, write_file
from fused_rec.training.checkpoint import Checkpoints

HOLDER = """
import sys, time
from pathlib import Path
from fused_rec.runs.run_dir import lock_run_dir
with lock_run_dir(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds tmp_path/run."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_process_is_refused_and_reported_by_whom_until_the_first_is_gone(holder, tmp_path):
    folder = tmp_path / "run"
    said = rf"{folder} is in use by process {holder.pid} on \S+ since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d\S+; wait for it"
    with pytest.raises(BusyError, match=said), lock_run_dir(folder):
        pytest.fail("went on")
    asked = "--config=experiments/configs/synthetic.py", f"--workdir={folder}"
    done = preloaded.run("experiments.train", *asked)
    assert done.returncode == 1
    assert f"BusyError: {folder} is in use by process {holder.pid}" in done.stderr and "Traceback" not in done.stderr
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (folder / LOCK).exists()
    with lock_run_dir(folder):
        assert json.loads((folder / LOCK).read_text())["pid"] == os.getpid()
    assert list(folder.iterdir()) == []


def test_a_folder_is_held_once_and_left_as_it_was(tmp_path):
    with lock_run_dir(tmp_path), lock_run_dir(tmp_path / "run"):
        (tmp_path / "run" / "kept").touch()
        with pytest.raises(BusyError, match=f"process {os.getpid()} on"), lock_run_dir(tmp_path):
            pytest.fail("went on")
        assert (tmp_path / LOCK).exists()  # the one who was refused has not removed it
    assert os.listdir(tmp_path) == ["run"] and os.listdir(tmp_path / "run") == ["kept"]
    with lock_run_dir(tmp_path / "unused"):
        pass
    assert not (tmp_path / "unused").exists()


def test_a_lock_that_its_last_holder_removed_is_no_lock(tmp_path, monkeypatch):
    """Opened before it was removed and locked after: the next process would make a file of its own, and lock that."""
    real, removed = fcntl.flock, []

    def flock(stream, operation):
        if not removed:
            removed.append((tmp_path / LOCK).unlink())
        return real(stream, operation)

    monkeypatch.setattr(run_dir.fcntl, "flock", flock)
    with lock_run_dir(tmp_path):
        with pytest.raises(BusyError), lock_run_dir(tmp_path):
            pytest.fail("went on")


def test_of_many_processes_at_once_one_holds(tmp_path):
    """Each takes the lock 50 times and proves that nobody else has it meanwhile."""
    code = """
import os, sys, time
from pathlib import Path
from fused_rec.runs.run_dir import BusyError, lock_run_dir
folder, held = Path(sys.argv[1]), 0
while held < 50:
    try:
        with lock_run_dir(folder / "run"):
            os.close(os.open(folder / "alone", os.O_CREAT | os.O_EXCL))
            os.unlink(folder / "alone")
            held += 1
    except BusyError:
        time.sleep(0.001)
"""
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    assert [process.communicate()[1] for process in processes] == [""] * 3
    assert [process.returncode for process in processes] == [0] * 3


def test_what_fails_once_is_tried_again_and_seen(tmp_path, caplog):
    outcomes = iter([OSError("first"), "written"])

    def attempt() -> str:
        outcome = next(outcomes)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    assert persist(attempt, tmp_path / "x") == "written"
    assert "could not be written, and is tried once more: first" in caplog.text


def fill(folder: Path, left: int = 0) -> Path:
    free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_bsize
    (folder / "filler").write_bytes(bytes(max(free - left, 0)))
    return folder / "filler"


def state(step: int) -> dict:
    drawn = np.random.default_rng(step)
    return {name: drawn.normal(size=20_000).astype(np.float32) for name in ("one", "two", "three")}


def test_a_full_disk_ends_a_save_with_its_reason_and_harms_nothing(full_disk, caplog):
    folder = full_disk / "checkpoints"
    checkpoints = Checkpoints(folder)
    checkpoints.save(1, state(1), {}, best=True)
    filler = fill(full_disk, left=100_000)
    said = (
        rf"{folder}/2 could not be written: .*No space left on device.*; 0\.1 MB are free in {folder}\. The last good "
    )
    with pytest.raises(
        SaveError, match=said + "checkpoint is step 1. Once it can be written, the same command goes on."
    ):
        checkpoints.save(2, state(2), {}, best=False)
    assert os.listdir(folder) == ["1"]
    assert "tried once more" in caplog.text
    filler.unlink()
    checkpoints.save(2, state(2), {}, best=False)  # a later save is not skipped
    assert checkpoints.steps() == [1, 2] and checkpoints.last_good() == 2
    np.testing.assert_array_equal(checkpoints.restore(2, state(0))[0]["three"], state(2)["three"])


def test_a_full_disk_leaves_results_as_they_were(full_disk):
    file, users = full_disk / "results.json", full_disk / "test_metrics_per_user.npz"
    per_user = UserMetrics(np.arange(9, dtype=np.int32), {"ndcg@10": np.zeros(9, np.float32)}, {})
    write_json(file, {"a": 1})
    before = file.read_bytes()
    with CurveLogger(full_disk / "run") as curves:
        curves.write(1, {"loss": 1.0})
        fill(full_disk)
        for write in (
            lambda: write_json(file, {"a": ["x" * 9999]}),
            lambda: write_users(users, per_user),
            lambda: init_run_dir(Config(), "digest", full_disk / "run"),
        ):
            with pytest.raises(SaveError, match=r"could not be written: .*No space left.*; 0\.0 MB are free"):
                write()
        with pytest.raises(SaveError, match=r"curves\.jsonl could not be written: .*No space left"):
            curves.write(2, {f"value {number}": 1.0 for number in range(999)})
        with pytest.raises(SaveError, match=r"curves\.jsonl could not be written"):
            curves.rewind(1)
        filler = full_disk / "filler"
        filler.unlink()
    assert file.read_bytes() == before
    assert sorted(path.name for path in full_disk.rglob("*") if path.is_file() and "event" not in path.name) == [
        "curves.jsonl",
        "results.json",
    ]
    with CurveLogger(full_disk / "run") as curves:
        curves.rewind(1)
        curves.write(2, {"loss": 0.5})
    lines = (full_disk / "run" / "curves.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]


def test_files_that_cannot_grow_end_a_save(tmp_path):
    """Here it is Orbax that fails in the middle; in a process of its own, for its threads say so where they like."""
    code = """
import resource, sys
from pathlib import Path
import numpy as np
from fused_rec.training.checkpoint import Checkpoints
from fused_rec.storage import SaveError, write_file
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
checkpoints, big = Checkpoints(Path(sys.argv[1], "run")), Path(sys.argv[1], "big")
small, large = {"x": np.arange(9)}, {"x": np.random.default_rng(0).normal(size=99_999)}
checkpoints.save(1, small, {}, best=True)
for attempt in (lambda: checkpoints.save(2, large, {}, best=False), lambda: write_file(big, bytes(200_000))):
    try:
        attempt()
    except SaveError as error:
        print(error)
checkpoints.save(2, small, {}, best=False)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first.startswith(f"{tmp_path}/run/2 could not be written: ") and "File too large" in first
    assert "The last good checkpoint is step 1." in first
    assert second.startswith(f"{tmp_path}/big could not be written: ") and "File too large" in second
    assert os.listdir(tmp_path) == ["run"] and sorted(os.listdir(tmp_path / "run")) == ["1", "2"]


def test_a_read_only_folder_is_named():
    with tempfile.TemporaryDirectory() as name:
        folder, user = Path(name), os.geteuid()
        folder.chmod(0o555)
        if user == 0:
            os.seteuid(65534)
        try:
            with pytest.raises(SaveError, match=f"{folder}/results.json could not be written: .*Permission denied"):
                write_file(folder / "results.json", b"{}")
            with pytest.raises(PermissionError, match=str(folder)), lock_run_dir(folder):
                pytest.fail("went on")
        finally:
            os.seteuid(user)
            folder.chmod(0o755)


def test_a_workdir_is_one_config_only(tmp_path):
    tables = "digest"
    init_run_dir(Config(), tables, tmp_path)
    init_run_dir(Config(), tables, tmp_path)
    with pytest.raises(ValueError, match=r"train\.seed is 0 there and 1 here"):
        init_run_dir(Config(train=TrainConfig(seed=1)), tables, tmp_path)
    with pytest.raises(TablesChangedError, match="the tables have changed"):
        init_run_dir(Config(), "another", tmp_path)


def test_a_workdir_keeps_where_its_tables_are_now(tmp_path):
    """Settings that change no result are no other config; the last ones given are those by which a run is opened."""
    tables = "digest"
    init_run_dir(Config(), tables, tmp_path)
    moved = Config(
        data=DataConfig(path="elsewhere"),
        text=TextConfig(cache="other", offline=False, batch_tokens=512),
        train=TrainConfig(wandb="project"),
        card=CardConfig(owner="Risk", purpose="Trials", license="mit"),
    )
    assert {tuple(name.split(".")) for name in differing(moved, to_dict(Config()))} == set(NEUTRAL)
    init_run_dir(moved, tables, tmp_path)
    assert from_dict(read_run(tmp_path)["config"]) == moved
