"""Files and folders are written whole or not at all: real processes, real signals, and a disk that is really full."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import preloaded
import pytest

from fused_rec.data.dataset import Dataset, digest
from fused_rec.data.io.tables import dataset_from_tables, read_tables
from fused_rec.data.io.writers import LAYOUTS, save_dataset
from fused_rec.storage import SaveError, check_new, fill_file, fill_folder, scratch, write_file

ROOT = Path(__file__).parents[1]
GONE = 2**22 + 1  # above what Linux gives as a process id


def market() -> Dataset:
    """Large enough that each layout takes a while to be written."""
    rng, n = np.random.default_rng(0), 60_000
    names = [f"item {number}: {rng.integers(2**62)}" for number in range(n)]
    pairs = {"user_id": [f"u{k % 9000}" for k in range(n)], "item_id": names, "timestamp": list(range(n))}
    said = {"user_id": pairs["user_id"], "item_id": names, "text": [f"so {name}, {name}" for name in names]}
    ties = {"source_id": [f"u{k}" for k in range(1, 9000)], "target_id": ["u0"] * 8999}
    return dataset_from_tables(pairs, reviews=said, ties=ties)


@pytest.fixture(scope="module")
def tables(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("storage") / "market"
    save_dataset(market(), folder)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture(scope="module")
def undisturbed(tables, tmp_path_factory) -> Path:
    """A folder with the tables in every layout, under its name."""
    folder = tmp_path_factory.mktemp("undisturbed")
    for layout in LAYOUTS:
        save_dataset(read_tables(tables), folder / layout / "out", layout)
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_conversion_that_was_stopped_half_way_is_made_by_the_same_command(
    tables, undisturbed, tmp_path, layout, signum
):
    out = tmp_path / "out"
    command = ["experiments.convert", f"--path={tables}", f"--to={layout}", f"--out={out}"]
    process = preloaded.start(*command)
    partial = tmp_path / f".out.{process.pid}.partial"
    while not (partial.is_dir() and any(file.is_file() for file in partial.rglob("*"))):
        assert process.poll() is None, process.communicate()
        time.sleep(0.0005)
    process.send_signal(signum)
    process.communicate()
    assert process.returncode != 0
    assert not out.exists()
    assert partial.exists() == (signum == signal.SIGKILL)
    again = preloaded.run(*command)
    assert again.stderr == "" and again.returncode == 0
    assert os.listdir(tmp_path) == ["out"]
    assert contents(out) == contents(undisturbed / layout / "out")


def test_a_leftover_is_no_table(tables, tmp_path):
    save_dataset(market(), tmp_path / "own")
    (tmp_path / "own" / f".items.parquet.{GONE}.partial").write_bytes(b"PAR1")
    (tmp_path / "own" / f".x.{GONE}.partial").mkdir()
    assert digest(read_tables(tmp_path / "own")) == digest(market())


def test_only_leftovers_of_processes_that_are_gone_are_removed(tmp_path):
    for name in (f".x.{GONE}.partial", ".x.1.partial", f".xy.{GONE}.partial", ".x.old.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "some").write_bytes(b"part")
    write_file(tmp_path / "x", b"whole")
    assert sorted(os.listdir(tmp_path)) == [".x.1.partial", ".x.old.partial", f".xy.{GONE}.partial", "x"]
    with scratch(tmp_path / "xy") as folder:
        assert folder.is_dir() and f".xy.{GONE}.partial" not in os.listdir(tmp_path)
    assert not folder.exists()


def test_what_fails_otherwise_is_passed_on_and_leaves_nothing(tmp_path):
    def fill(partial: Path) -> None:
        (partial / "some").write_text("part") if partial.is_dir() else partial.write_text("part")
        raise ValueError("not of the disk")

    (tmp_path / "file").write_text("before")
    for placed in (fill_file, fill_folder):
        with pytest.raises(ValueError, match="not of the disk"):
            placed(tmp_path / ("file" if placed is fill_file else "folder"), fill)
    assert os.listdir(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "before"


def test_a_folder_is_new_or_empty(tmp_path):
    (tmp_path / "empty").mkdir()
    fill_folder(tmp_path / "empty", lambda partial: (partial / "a").write_text("a"))
    fill_folder(tmp_path / "new" / "one", lambda partial: (partial / "a").write_text("a"))
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    assert contents(tmp_path / "empty") == contents(tmp_path / "new" / "one") == {"a": b"a"}
    for name, said in (("empty", "holds files already"), ("file", "is a file"), ("dangling", "is a file")):
        with pytest.raises(FileExistsError, match=said):
            check_new(tmp_path / name)
    with pytest.raises(FileExistsError, match="holds files already|a mount point"):
        check_new(Path("/proc"))


LIMITED = """
import resource, sys
from pathlib import Path
from fused_rec.data.io.tables import read_tables
from fused_rec.data.io.writers import save_dataset
dataset = read_tables(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
for layout in sys.argv[3:]:
    try:
        save_dataset(dataset, sys.argv[2], layout)
    except OSError as error:
        print(type(error).__name__, error)
"""


def test_files_that_cannot_grow_end_a_conversion(tables, tmp_path):
    command = [sys.executable, "-c", LIMITED, str(tables), str(tmp_path / "out"), *LAYOUTS]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    reported = done.stdout.splitlines()
    assert len(reported) == len(LAYOUTS), done
    for line in reported:
        assert line.startswith(f"SaveError {tmp_path}/out could not be written: ")
        assert "File too large" in line and "the same command goes on" in line
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_full_disk_names_path_need_and_free_space(full_disk, layout):
    folder = full_disk / "out"
    with pytest.raises(SaveError) as error:
        save_dataset(market(), folder, layout)
    said = str(error.value)
    assert said.startswith(f"{folder} could not be written: ") and "No space left on device" in said
    need, free = (float(said.split(mark)[0].rsplit(" ", 1)[1]) for mark in (" MB are needed", " MB are free"))
    assert need > 1 and free > 1.5 and f"free in {full_disk}" in said
    assert os.listdir(full_disk) == []
    with pytest.raises(SaveError, match=r"No space left.*; at least 5\.0 MB are needed; 2\.1 MB are free"):
        write_file(full_disk / "x", bytes(5_000_000))


def test_of_a_folder_what_its_file_needs_is_reported(full_disk):
    def fill(partial: Path) -> None:
        write_file(partial / "small", bytes(1_000_000))
        write_file(partial / "large", bytes(3_000_000))

    said = (
        rf"{full_disk}/out could not be written: \[Errno 28\] No space left.*; at least 4\.0 MB are needed; 2\.1 MB are"
    )
    with pytest.raises(SaveError, match=said):
        fill_folder(full_disk / "out", fill)
    assert os.listdir(full_disk) == []


def test_a_file_is_as_it_was_after_a_failed_write(full_disk):
    write_file(full_disk / "x", b"before")
    with pytest.raises(SaveError):
        fill_file(full_disk / "x", lambda partial: partial.write_bytes(bytes(5_000_000)))
    assert (full_disk / "x").read_bytes() == b"before" and os.listdir(full_disk) == ["x"]
