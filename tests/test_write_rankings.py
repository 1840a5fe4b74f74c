"""Rankings of all customers on disk: whole or absent, taken up again after any kill, with a log of what made them."""

import errno
import hashlib
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import preloaded
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from market import write_tables

from fused_rec.config import Config, DataConfig, ModelConfig, TrainConfig
from fused_rec.data.synthetic import make_synthetic
from fused_rec.distributed.signals import Stopped, handle_signals
from fused_rec.evaluation.filters import parse
from fused_rec.runs.run_dir import BusyError, lock_run_dir
from fused_rec.serving import write_rankings as exporting
from fused_rec.serving.recommender import SCHEMA, candidate_filter
from fused_rec.serving.write_rankings import read_rules, write_rankings
from fused_rec.storage import SaveError
from fused_rec.training.trainer import run_training

PARTS = 4
MADE_OF = {"model": "m", "k": 2}


def drawn(first: int) -> Iterator[tuple[pa.Table, dict]]:
    """Four parts of two customers each, two products a customer."""
    for part in range(first, PARTS):
        users = [f"u{2 * part + n}" for n in (0, 0, 1, 1)]
        scores = np.random.default_rng(part).random(4, np.float32)
        table = pa.Table.from_arrays(
            [
                pa.array(users),
                pa.array([1, 2, 1, 2], pa.int32()),
                pa.array(["a", "=b", "a", "c"]),
                pa.array(scores),
            ],
            schema=SCHEMA,
        )
        yield table, {"users": 2, "rules": {"risk": {"excluded_only_by_rule": part}}}


def written(out: Path) -> dict:
    """What `export` returns for the four parts."""
    return write_rankings(out, MADE_OF, PARTS, drawn, "a command")


def test_names_are_written_and_harmless(tmp_path):
    def named(first: int) -> Iterator[tuple[pa.Table, dict]]:
        for table, counts in drawn(first):
            yield table.append_column("name", pa.array(["=SUM(1)", None, "a fund", "'quoted'"])), counts

    for suffix, names in ((".parquet", ["=SUM(1)", None]), (".csv", ["'=SUM(1)", ""])):
        out = tmp_path / f"ranked{suffix}"
        write_rankings(out, MADE_OF, PARTS, named, "a command")
        read = pq.read_table if suffix == ".parquet" else pyarrow.csv.read_csv
        table = read(out)
        assert table.column_names == [*SCHEMA.names, "name"] and len(table) == 4 * PARTS
        assert table["name"].to_pylist()[:2] == names


@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
def test_the_file_and_its_log(tmp_path, suffix):
    out = tmp_path / f"ranked{suffix}"
    reported = written(out)
    whole = pa.concat_tables(table for table, _ in drawn(0))
    if suffix == ".parquet":
        assert pq.read_table(out).equals(whole)
        assert pq.ParquetFile(out).num_row_groups == PARTS
    else:
        read = pyarrow.csv.read_csv(out)
        assert read["item_id"].to_pylist() == [{"=b": "'=b"}.get(i, i) for i in whole["item_id"].to_pylist()]
        assert read["user_id"].to_pylist() == whole["user_id"].to_pylist()
        assert np.float32(read["score"]).tolist() == whole["score"].to_pylist()
    assert sorted(path.name for path in tmp_path.iterdir()) == [out.name, f"{out.name}.audit.json"]
    assert json.loads((tmp_path / f"{out.name}.audit.json").read_text()) == reported
    assert reported["exclusions"] == {"users": 8, "rules": {"risk": {"excluded_only_by_rule": 6}}}
    assert reported["sha256"] == hashlib.sha256(out.read_bytes()).hexdigest()
    assert (reported["inputs"], reported["command"], reported["file"]) == (MADE_OF, "a command", out.name)
    assert reported["started_at"] <= reported["finished"] and reported["finished"].endswith("+00:00")
    assert {"jax", "numpy", "python"} <= set(reported["versions"])


CHILD = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
import test_write_rankings
real, calls = os.fsync, 0
def killing(descriptor):
    global calls
    calls += 1
    if calls == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    real(descriptor)
os.fsync = killing
test_write_rankings.written(Path(sys.argv[1]))
"""


# Each file comes onto the disk under another name before it gets its own: begun.json, four parts, the file, its log.
@pytest.mark.parametrize(
    ("syncs", "parts", "there"), [(1, 0, False), (4, 2, False), (PARTS + 2, PARTS, False), (PARTS + 3, PARTS, True)]
)
def test_a_kill_in_the_middle_of_any_file_loses_no_more_than_it(tmp_path, syncs, parts, there):
    out = tmp_path / "ranked.parquet"
    child = preloaded.run("-c", CHILD, str(out), str(syncs), str(Path(__file__).parent))
    assert child.returncode == -signal.SIGKILL, child.stderr
    assert len(list((tmp_path / "ranked.parquet.parts").glob("0*.parquet"))) == parts
    assert out.exists() == there and not (tmp_path / "ranked.parquet.audit.json").exists()

    began = []

    def counted(first: int) -> Iterator[tuple[pa.Table, dict]]:
        began.append(first)
        return drawn(first)

    reported = write_rankings(out, MADE_OF, PARTS, counted, "again")
    assert began == ([parts] if parts < PARTS else [])
    undisturbed = written(tmp_path / "undisturbed.parquet")
    assert out.read_bytes() == (tmp_path / "undisturbed.parquet").read_bytes()
    assert reported["exclusions"] == undisturbed["exclusions"] and reported["sha256"] == undisturbed["sha256"]
    assert len(list(tmp_path.iterdir())) == 4  # nothing is left of the parts


def test_a_request_to_stop_tells_what_is_kept(tmp_path):
    def asked(first: int) -> Iterator[tuple[pa.Table, dict]]:
        for number, part in enumerate(drawn(first), start=first):
            if number == 2:
                signal.raise_signal(signal.SIGTERM)
            yield part

    out = tmp_path / "ranked.parquet"
    with pytest.raises(Stopped) as stopped, handle_signals():
        write_rankings(out, MADE_OF, PARTS, asked, "")
    assert stopped.value.__notes__ == [f"2 of 4 parts are kept in {out}.parts"]
    assert not out.exists()


def test_parts_of_other_rankings_are_never_mixed_in(tmp_path):
    out = tmp_path / "ranked.parquet"

    def failing(first: int) -> Iterator[tuple[pa.Table, dict]]:
        yield next(drawn(first))
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        write_rankings(out, MADE_OF, PARTS, failing, "")
    with pytest.raises(ValueError, match="parts of other rankings: model was 'm' and is 'n'; remove the folder"):
        write_rankings(out, MADE_OF | {"model": "n"}, PARTS, drawn, "")
    with lock_run_dir(tmp_path / "ranked.parquet.parts"), pytest.raises(BusyError):
        written(out)
    part = tmp_path / "ranked.parquet.parts" / "000000.parquet"
    content = part.read_bytes()
    part.write_bytes(content[:30] + bytes([content[30] ^ 1]) + content[31:])
    with pytest.raises((ValueError, SaveError), match="000000.parquet is damaged"):
        written(out)
    assert not out.exists()
    part.unlink()
    written(out)
    assert pq.read_table(out).num_rows == 16

    (tmp_path / "other.parquet.parts").mkdir()
    (tmp_path / "other.parquet.parts" / "000000.parquet").write_bytes(b"mine")
    with pytest.raises(ValueError, match="holds 000000.parquet and no begun.json; move it away"):
        written(tmp_path / "other.parquet")
    with pytest.raises(ValueError, match=r"ranked.txt; its name must end in one of .csv, .parquet"):
        written(tmp_path / "ranked.txt")


def test_a_full_disk_leaves_parts_and_the_earlier_file(tmp_path, monkeypatch):
    out = tmp_path / "ranked.parquet"
    written(out)
    before = out.read_bytes()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch, pytest.raises(SaveError, match="MB are free"):
        patch.setitem(exporting.WRITERS, ".parquet", full)
        written(out)
    assert out.read_bytes() == before
    written(out)
    assert out.read_bytes() == before


def test_a_rules_file_that_must_not_be_used_is_named(tmp_path):
    file = tmp_path / "rules.json"
    file.write_bytes(b'\xef\xbb\xbf{"rules": [{"name": "mine", "refuse": "held"}]}')
    rules, sha256 = read_rules(file)
    assert rules[0].name == "mine" and sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    for content in (b"\xff\xfe", b"[]"):
        file.write_bytes(content)
        with pytest.raises(ValueError, match="rules.json: "):
            read_rules(file)


# --- the command


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The workdir of a short run on a small market of one's own tables."""
    folder = tmp_path_factory.mktemp("market")
    config = Config(
        data=DataConfig(name="tables", path=str(write_tables(folder / "tables"))),
        model=ModelConfig(variant="graph", dim=8, num_layers=1),
        train=TrainConfig(batch_size=32, max_steps=4, eval_every=4),
    )
    run_training(config, folder / "run")
    return folder / "run"


DRIVER = """
import runpy, sys
from fused_rec.serving import write_rankings, recommender
recommender.CHUNK_USERS = 16  # 80 customers are five parts
kill_at, calls, real = int(sys.argv.pop(1)), 0, write_rankings._write_part
def killing(*arguments):
    global calls
    calls += 1
    if calls == kill_at:
        import os, signal
        os.kill(os.getpid(), signal.SIGKILL)
    real(*arguments)
write_rankings._write_part = killing
sys.argv[0] = "recommend"
runpy.run_module("experiments.recommend", run_name="__main__", alter_sys=True)
"""


def recommend(finished: Path, out: Path, *flags: str, kill_at: int = 0) -> subprocess.CompletedProcess:
    asked = f"--workdir={finished}", f"--out={out}", "--k=3", *flags
    return preloaded.run("-c", DRIVER, str(kill_at), *asked)


def test_the_command_under_rules_killed_and_taken_up_again(finished, tmp_path):
    rules = tmp_path / "rules.json"
    rules.write_text(
        json.dumps(
            {
                "rules": [
                    {"name": "risk", "require": ["item.risk_band", "at_most", "user.risk_tolerance"]},
                    {"name": "no notes", "require": ["item.category", "none_of", ["structured note"]]},
                ]
            }
        )
    )
    killed = recommend(finished, tmp_path / "ranked.parquet", f"--rules={rules}", kill_at=3)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert len(list((tmp_path / "ranked.parquet.parts").glob("0*.parquet"))) == 2

    again = recommend(finished, tmp_path / "ranked.parquet", f"--rules={rules}")
    assert again.returncode == 0, again.stderr
    assert "2 of 5 parts are in" in again.stderr
    undisturbed = recommend(finished, tmp_path / "undisturbed.parquet", f"--rules={rules}")
    assert undisturbed.returncode == 0, undisturbed.stderr
    assert (tmp_path / "ranked.parquet").read_bytes() == (tmp_path / "undisturbed.parquet").read_bytes()

    tables = Path(finished.parent, "tables")
    users = {row["user_id"]: row for row in pyarrow.csv.read_csv(tables / "users.csv").to_pylist()}
    items = {row["item_id"]: row for row in pyarrow.csv.read_csv(tables / "items.csv").to_pylist()}
    held = pyarrow.csv.read_csv(tables / "interactions.csv").to_pylist()
    holds = {(row["user_id"], row["item_id"]) for row in held}

    def refuses(user: dict, item: dict) -> list[str]:
        found = {
            "risk": item["risk_band"] > user["risk_tolerance"],
            "no notes": item["category"] == "structured note",
            "held": (user["user_id"], item["item_id"]) in holds,
        }
        return [name for name, refused in found.items() if refused]

    rows = pq.read_table(tmp_path / "ranked.parquet").to_pylist()
    assert all(not refuses(users[row["user_id"]], items[row["item_id"]]) for row in rows)
    fitting = {name: sum(not refuses(user, item) for item in items.values()) for name, user in users.items()}
    assert len(rows) == sum(min(3, count) for count in fitting.values())
    assert list(dict.fromkeys(row["user_id"] for row in rows)) == [name for name in users if fitting[name]]

    reported = json.loads((tmp_path / "ranked.parquet.audit.json").read_text())
    pairs = [refuses(user, item) for user in users.values() for item in items.values()]
    for name in ("risk", "no notes", "held"):
        assert reported["exclusions"]["rules"][name]["excluded"] == sum(name in refused for refused in pairs)
        assert reported["exclusions"]["rules"][name]["excluded_only_by_rule"] == pairs.count([name])
    assert reported["inputs"]["rules"] == hashlib.sha256(rules.read_bytes()).hexdigest()
    assert reported["inputs"]["tables"] == json.loads((finished / "run.json").read_text())["tables"]
    assert len(reported["inputs"]["model"]) == 64 and "--rules" in reported["command"]
    assert f"rule risk: excludes {reported['exclusions']['rules']['risk']['excluded']} pairs" in again.stdout


def test_what_is_held_is_refused_unless_asked_for():
    market = make_synthetic(0, n_users=20, n_items=20)
    mine = parse('{"rules": [{"name": "mine", "refuse": "held"}]}')
    assert candidate_filter(market).names == ("held",)
    assert candidate_filter(market, include_seen=True).names == ()
    assert candidate_filter(market, mine).names == ("mine",)
    with pytest.raises(ValueError, match="rule 'mine' refuses seen items, and include_seen includes them"):
        candidate_filter(market, mine, include_seen=True)
