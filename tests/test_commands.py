"""What commands say and how they end, in real processes: names that cannot serve, tables that changed, no reader."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import preloaded
import pyarrow.csv
import pytest
from market import write_tables

CONFIG = "--config=experiments/configs/tables.py"
SMALL = (
    *("--config.model.variant=graph", "--config.model.dim=4", "--config.model.num_layers=1"),
    *("--config.train.max_steps=2", "--config.train.eval_every=2", "--config.train.batch_size=32"),
    "--config.train.temperature=0.15",
)
COMMANDS = (
    "backtest",
    "compare",
    "convert",
    "demo",
    "density",
    "diff",
    "doctor",
    "encode",
    "evaluate",
    "export",
    "faithfulness",
    "recommend",
    "regret",
)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with tables in `tables` and a run that was finished on them in `run`."""
    folder = tmp_path_factory.mktemp("commands")
    write_tables(folder / "tables")
    done = ended("train", CONFIG, *SMALL, f"--config.data.path={folder}/tables", f"--workdir={folder}/run")
    assert done.returncode == 0, done.stderr
    return folder


def environment(**changes: str | None) -> dict[str, str]:
    found = os.environ | {"JAX_NUM_CPU_DEVICES": "1"} | changes
    return {name: value for name, value in found.items() if value is not None}


def ended(module: str, *flags: str) -> subprocess.CompletedProcess:
    """The command when it is over, from a process that has its libraries."""
    return preloaded.run(f"experiments.{module}", *flags, JAX_NUM_CPU_DEVICES="1")


def started(module: str, *flags: str, **changes: str | None) -> subprocess.CompletedProcess:
    """The command, started by Python with these changes of its environment, when it is over."""
    command = [sys.executable, "-m", f"experiments.{module}", *flags]
    return subprocess.run(command, env=environment(**changes), capture_output=True, text=True, check=False, timeout=300)


@pytest.fixture
def copied(place, tmp_path) -> Path:
    """The same in a folder of its own: the run still names the tables in `place`."""
    shutil.copytree(place / "run", tmp_path / "run")
    shutil.copytree(place / "tables", tmp_path / "tables")
    return tmp_path


def again(place: Path, copied: Path, tables: Path) -> subprocess.CompletedProcess:
    return ended("train", CONFIG, *SMALL, f"--config.data.path={tables}", f"--workdir={copied}/run")


# --- a finished run and its tables -----------------------------------------------------------------------------------


def test_a_finished_run_says_when_it_was_and_shows_its_results(place):
    results = json.loads((place / "run" / "results.json").read_text())
    done = again(place, place, place / "tables")
    assert done.returncode == 0, done.stderr
    assert f"finished: {results['finished']}" in done.stdout and f"{results['test']['ndcg@10']:.4f}" in done.stdout
    assert f"{place}/run was finished at {results['finished']} with the same tables" in done.stderr


def test_a_finished_run_of_other_tables_is_not_shown(place, copied):
    file = copied / "tables" / "interactions.csv"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:-2]))
    done = again(place, copied, copied / "tables")
    assert done.returncode == 3 and "ndcg@10" not in done.stdout
    rows = len(lines) - 1
    assert f"interactions had {rows} rows and has {rows - 2}" in done.stderr and "Traceback" not in done.stderr
    file.write_text("".join(lines))
    items = pyarrow.csv.read_csv(copied / "tables" / "items.csv")
    renamed = items.set_column(items.column_names.index("name"), "name", [["A"] * items.num_rows])
    pyarrow.csv.write_csv(renamed, copied / "tables" / "items.csv")
    done = again(place, copied, copied / "tables")
    assert done.returncode == 3
    assert f"items has its {items.num_rows} rows with changed columns (other values: name)" in done.stderr


def test_a_finished_run_whose_tables_cannot_be_read_is_not_shown(place, copied):
    done = again(place, copied, copied / "none")
    assert done.returncode == 4 and "ndcg@10" not in done.stdout
    assert "its tables cannot be read now" in done.stderr and f"{copied}/none, which is no folder" in done.stderr
    assert "(data.path is set by --config.data.path=DIR)" in done.stderr
    (copied / "tables" / "interactions.csv").write_text("user_id\nA\n")
    done = again(place, copied, copied / "tables")
    assert done.returncode == 4 and "column item_id is missing" in done.stderr


def test_tables_that_moved_are_found_again(place, copied):
    """By --data_path for one command, and for good by training again, which keeps where they are now."""
    run, moved = json.loads((copied / "run" / "run.json").read_text()), copied / "moved"
    run["config"]["data"]["path"] = str(copied / "tables")
    (copied / "run" / "run.json").write_text(json.dumps(run))
    (copied / "tables").rename(moved)
    asked = ("recommend", f"--workdir={copied}/run", "--users=C0001", f"--out={copied}/ranked.csv")
    done = ended(*asked)
    assert done.returncode == 1 and "(data.path is set by --data_path=DIR)" in done.stderr
    assert "--config" not in done.stderr, "the command has no such flag"
    assert ended(*asked, f"--data_path={moved}").returncode == 0
    (moved / "ties.csv").rename(copied / "ties.csv")
    done = ended(*asked, f"--data_path={moved}")
    assert done.returncode == 3 and "ties had" in done.stderr
    (copied / "ties.csv").rename(moved / "ties.csv")
    done = again(place, copied, moved)
    assert done.returncode == 0, done.stderr
    assert json.loads((copied / "run" / "run.json").read_text())["config"]["data"]["path"] == str(moved)
    assert ended(*asked).returncode == 0


@pytest.mark.parametrize(
    "command",
    [("evaluate",), ("report", "--num_users=1", "--k=1"), ("export", "--out={}/exported")],
    ids=lambda command: command[0],
)
def test_every_command_on_a_run_takes_the_place_of_its_tables(place, copied, command):
    (copied / "run" / "run.json").write_text(
        (copied / "run" / "run.json").read_text().replace(f"{place}/tables", f"{place}/gone")
    )
    flags = [flag.format(copied) for flag in command[1:]]
    done = started(command[0], f"--workdir={copied}/run", f"--data_path={copied}/tables", *flags)
    assert done.returncode == 0, done.stderr


# --- flags -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (("train",), "--workdir is missing"),
        (("train", "--config=none.py", "--workdir={}/new"), "--config cannot be read: "),
        (("train", CONFIG, "--workdir={}/new", "--config.model.dimm=3"), "--config has no such setting: dimm"),
        (("train", CONFIG, "--workdir={}/new", "--config.model.dim=x"), "flag --config.model.dim=x: "),
        (("train", CONFIG, "--workdir="), "flag --workdir=: it is empty"),
        (("train", CONFIG, "--workdir={}/tables/ties.csv"), "this is a file, and a folder is due"),
        (("train", CONFIG, "--workdir={}/new", "stray"), "unknown argument 'stray'; every setting is a flag"),
        (("recommend", "--workdir={}/run"), "--out is missing"),
        (("recommend", "--workdir={}/none", "--out={}/r.csv"), "there is no such folder"),
        (("recommend", "--workdir={}/run", "--out={}/none/r.csv"), "{}/none, which is no folder; make it first"),
        (("recommend", "--workdir={}/run", "--out={}/r.csv", "--users="), "--users is empty"),
        (("recommend", "--workdir={}/run", "--out={}/r.csv", "--rules={}"), "this is a folder, and a file is due"),
        (("recommend", "--workdir={}/run", "--out={}/r\udcff.csv"), "the name is not valid UTF-8"),
        (("recommend", "--workdir={}/run", f"--out={{}}/{'x' * 250}.csv"), "has 254 bytes; give one of 200 at most"),
        (("export", "--workdir={}/run", "--out={}/tables/ties.csv/new"), "ties.csv is a file, and a folder is due"),
        (("faithfulness", "--workdir={}/run", "--out={}/none/f.json"), "which is no folder; make it first"),
        (("encode", "--input={}/none", "--out={}/v.safetensors"), "there is no such file"),
        (("compare", CONFIG, "--out="), "flag --out=: it is empty"),
        (("convert", "--to=tables", "--out={}/new", "--path={}/none"), "there is no such folder"),
    ],
    ids=lambda value: " ".join(value)[:60].encode("ascii", "replace").decode() if isinstance(value, tuple) else "",
)
def test_a_flag_that_cannot_serve_is_refused_in_a_line(place, command, said):
    done = ended(*(part.replace("{}", str(place)) for part in command))
    assert done.returncode == 1 and done.stdout == ""
    assert said.replace("{}", str(place)) in done.stderr.splitlines()[-1], done.stderr
    assert len(done.stderr.splitlines()) <= 2
    assert not (place / "new").exists() and not (place / "r.csv").exists()


def test_help_is_no_fault():
    done = started("recommend", "--help")
    assert done.returncode == 0 and "--data_path" in done.stdout and done.stderr == ""


# --- output that nobody reads, and requests to stop ------------------------------------------------------------------


def test_a_command_that_was_started_without_an_output(place, tmp_path):
    command = [sys.executable, "-m", "experiments.recommend", f"--workdir={place}/run", f"--out={tmp_path}/r.csv"]
    script = ["sh", "-c", 'exec "$@" >&-', "sh", *command]
    done = subprocess.run(script, env=environment(), stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 0 and "Traceback" not in done.stderr
    assert pyarrow.csv.read_csv(tmp_path / "r.csv").num_rows > 80


@pytest.mark.parametrize("also_errors", [False, True])
def test_a_closed_pipe_ends_a_command_quietly(place, tmp_path, also_errors):
    command = [sys.executable, "-m", "fused_rec.cli", "recommend", f"--workdir={place}/run", f"--out={tmp_path}/r.csv"]
    reader, writer = os.pipe()
    os.close(reader)
    errors = writer if also_errors else subprocess.PIPE
    done = subprocess.run(command, env=environment(), stdout=writer, stderr=errors, text=True, check=False)
    os.close(writer)
    assert done.returncode == 141
    if not also_errors:
        assert "Traceback" not in done.stderr and "Broken" not in done.stderr
        assert pyarrow.csv.read_csv(tmp_path / "r.csv").num_rows > 80
    assert not list(tmp_path.glob(".*"))


# Flags that a command accepts, so that it goes on to its imports: {run} is a finished run, {new} a new file or folder.
ACCEPTED = {
    **dict.fromkeys(("evaluate", "report", "serve"), ["--workdir={run}"]),
    **dict.fromkeys(("recommend", "export", "faithfulness"), ["--workdir={run}", "--out={new}"]),
    **dict.fromkeys(("compare", "density", "backtest", "tune"), ["--config=tables", "--out={new}"]),
    "train": ["--config=tables", "--workdir={new}"],
    "regret": ["--compared={run}", "--out={new}"],
    "diff": ["--before={run}", "--after={run}", "--out={new}"],
    "encode": ["--input={run}/run.json", "--out={new}.safetensors"],
    "convert": ["--data=synthetic", "--to=tables", "--out={new}"],
    "demo": ["--workdir={new}"],
    "doctor": [],
}


@pytest.mark.parametrize("name", [*COMMANDS, "of the console script"])
def test_ctrl_c_while_libraries_are_imported(place, tmp_path, name):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job's child would ignore it
    try:
        script = ["fused_rec.cli", "recommend"] if name not in COMMANDS else [f"experiments.{name}"]
        flags = ACCEPTED[name if name in COMMANDS else "recommend"]
        given = [flag.format(run=place / "run", new=tmp_path / "new") for flag in flags]
        command = [sys.executable, "-m", *script, *given]
        process = subprocess.Popen(
            command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
    finally:
        signal.signal(signal.SIGINT, before)
    deadline, ignored = time.monotonic() + 60, 1 << (signal.SIGINT - 1)
    while time.monotonic() < deadline and not _caught(process.pid) & ignored:
        time.sleep(0.005)
    time.sleep(0.2)  # Python's own handler comes first, and the package's a moment later
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "", "")


def _caught(pid: int) -> int:
    """The signals that a process has handlers for, as bits."""
    if not Path("/proc/self/status").exists():
        pytest.skip("this system has no /proc")
    [line] = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigCgt")]
    return int(line.split()[1], 16)


# --- surroundings ----------------------------------------------------------------------------------------------------


NO_USER_NAME = """
import pwd
def nobody(uid): raise KeyError(f"getpwuid(): uid not found: {uid}")
pwd.getpwuid = nobody
"""


@pytest.fixture
def homeless(tmp_path) -> dict[str, str | None]:
    """The environment of a user whom the system does not know, as in a container."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(NO_USER_NAME)
    return {"HOME": None, "PYTHONPATH": f"{tmp_path / 'site'}:{Path(__file__).parents[1]}"}


def test_without_a_home_directory_the_cache_has_to_be_named(place, tmp_path, homeless):
    (tmp_path / "texts.txt").write_text("hello\n")
    asked = (f"--input={tmp_path}/texts.txt", f"--out={tmp_path}/v.safetensors")
    done = started("encode", *asked, **homeless)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "the home directory is not known" in done.stderr and "--cache=DIR" in done.stderr
    fused = (CONFIG, *SMALL, "--config.model.variant=fused", f"--config.data.path={place}/tables")
    done = started("train", *fused, f"--workdir={tmp_path}/run", **homeless)
    assert done.returncode == 1 and "--config.text.cache=DIR" in done.stderr and "customers" not in done.stderr
    asked = ("recommend", f"--workdir={place}/run", "--users=C0001", f"--out={tmp_path}/ranked.csv")
    done = started(*asked, **homeless)  # a run without words needs none
    assert done.returncode == 0, done.stderr


def test_a_cache_that_cannot_be_made_is_reported_before_the_tables_are_read(place, tmp_path):
    (tmp_path / "file").write_text("")
    fused = (CONFIG, *SMALL, "--config.model.variant=fused", f"--config.data.path={place}/tables")
    done = ended("train", *fused, f"--workdir={tmp_path}/run", f"--config.text.cache={tmp_path}/file")
    assert done.returncode == 1 and "text vectors cannot be kept" in done.stderr and "customers" not in done.stderr
    assert "--config.text.cache=DIR" in done.stderr and "Traceback" not in done.stderr


def test_64_bit_types_of_jax_change_nothing(place, tmp_path):
    asked = (CONFIG, *SMALL, f"--config.data.path={place}/tables", f"--workdir={tmp_path}/run")
    done = started("train", *asked, JAX_ENABLE_X64="1")
    assert done.returncode == 0, done.stderr
    one, two = (json.loads((folder / "run" / "results.json").read_text()) for folder in (tmp_path, place))
    assert (one["valid"], one["test"]) == (two["valid"], two["test"])


@pytest.mark.parametrize("command", ["train", "recommend", "encode"])
def test_a_platform_that_is_not_there_is_named(place, tmp_path, command):
    asked = {
        "train": (CONFIG, f"--config.data.path={place}/tables", f"--workdir={tmp_path}/run"),
        "recommend": (f"--workdir={place}/run", f"--out={tmp_path}/r.csv"),
        "encode": (f"--input={place}/tables/items.csv", f"--out={tmp_path}/v.safetensors"),
    }[command]
    done = started(command, *asked, JAX_PLATFORMS="nonsense")
    assert done.returncode == 1 and "JAX_PLATFORMS is 'nonsense'; unset it" in done.stderr
    assert "Traceback" not in done.stderr and "customers" not in done.stderr


def test_the_doctor_ends_without_a_traceback_where_nothing_is_sound(place, homeless):
    done = started("doctor", **homeless, JAX_PLATFORMS="nonsense", FUSED_REC_DATA="/none")
    assert done.returncode == 1 and "Traceback" not in done.stdout + done.stderr
    failed = [line[6:21].strip() for line in done.stdout.splitlines() if line.startswith("FAIL")]
    assert failed == ["devices", "data", "cache"]
