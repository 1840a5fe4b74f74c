"""Rankings on disk: written part by part, taken up again where they were left, one file at the end and its audit log.

OUT                   the rankings, .parquet or .csv, there only when whole
OUT.audit.json        what made them, when, and what the rules excluded; written after OUT
OUT.parts/            while it is not over: begun.json, what is being made, and 000000.parquet, ... whole parts
"""

import contextlib
import datetime
import functools
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from fused_rec.data.io.arrow import pc, replace
from fused_rec.data.io.csv_safety import escape_csv
from fused_rec.distributed.signals import Stopped
from fused_rec.evaluation.filters import Rule, parse
from fused_rec.evaluation.suitability import sum_counts
from fused_rec.runs.run_dir import LOCK, lock_run_dir, versions, write_json
from fused_rec.serving.recommender import SCHEMA
from fused_rec.storage import fill_file, write_file

LOG = logging.getLogger(__name__)
BEGUN, AUDIT = "begun.json", "audit.json"
ACCOUNT = b"account"  # of a part, in the metadata of its file


def read_rules(file: str | os.PathLike[str]) -> tuple[tuple[Rule, ...], str]:
    """The rules of a file and its SHA-256. Raises ValueError naming the file where they must not be used."""
    content = Path(file).read_bytes()
    try:
        return parse(content.decode("utf-8-sig")), hashlib.sha256(content).hexdigest()
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def write_rankings(
    out: Path,
    inputs: Mapping[str, Any],
    n_parts: int,
    parts: Callable[[int], Iterator[tuple[pa.Table, Mapping[str, Any]]]],
    command: str,
) -> dict[str, Any]:
    """Writes all parts to `out`, those that are on disk from an earlier run taken as they are; returns the audit log.

    At any moment a process may be killed: what is at `out` is whole, and the same call goes on.

    Args:
      out: a name that ends in .parquet or .csv.
      inputs: what decides the rankings, hashes and settings, as JSON; parts of other rankings are never mixed in.
      n_parts: how many there are, 1 or more.
      parts: from a number on, each part's rows of `SCHEMA` and its `suitability.exclusion_counts`.
      command: for the log.

    Raises:
      ValueError: parts of other rankings lie beside `out`, or a part is damaged.
      BusyError: another process is writing them.
      SaveError: the disk is full, or cannot be written; what was written before stays.
    """
    if out.suffix not in WRITERS:
        raise ValueError(f"the file is {out.name}; its name must end in one of {', '.join(WRITERS)}")
    folder = out.with_name(f"{out.name}.parts")
    with lock_run_dir(folder):
        started_at = _claim(folder, inputs)
        done = _count_done(folder, n_parts)
        if done:
            LOG.info("%d of %d parts are in %s already", done, n_parts, folder)
        try:
            for number, (table, account) in enumerate(parts(done) if done < n_parts else (), start=done):
                _write_part(_name(folder, number), table, account)
        except Stopped as stopped:
            stopped.add_note(f"{_count_done(folder, n_parts)} of {n_parts} parts are kept in {folder}")
            raise
        files = [_name(folder, number) for number in range(n_parts)]
        log = out.with_name(f"{out.name}.{AUDIT}")
        log.unlink(missing_ok=True)  # it would tell of the file that is now replaced
        sha256 = _assemble(files, out)
        audit = {
            "file": out.name,
            "sha256": sha256,
            "started_at": started_at,
            "finished": _now(),
            "command": command,
            "inputs": dict(inputs),
            "account": functools.reduce(sum_counts, map(_account, files)),
            "versions": versions(),
        }
        write_json(folder / AUDIT, audit)
        (folder / AUDIT).replace(log)  # so that nothing half written is left beside the file
        for file in (*files, folder / BEGUN, *folder.glob(".*.parquet.*"), *folder.glob(".*.json.*")):
            file.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # another process took it
        folder.rmdir()
    return audit


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _name(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.parquet"


def _count_done(folder: Path, n_parts: int) -> int:
    return next((number for number in range(n_parts) if not _name(folder, number).exists()), n_parts)


def _claim(folder: Path, inputs: Mapping[str, Any]) -> str:
    """When these rankings were begun. Raises ValueError where the folder holds others."""
    file = folder / BEGUN
    if not file.exists():
        if foreign := sorted({there.name for there in folder.iterdir() if there.name[0] != "."} - {LOCK}):
            raise ValueError(f"{folder} holds {foreign[0]} and no {BEGUN}; move it away, or name another file")
        started_at = _now()
        write_json(file, {"started_at": started_at, "inputs": dict(inputs)})
        return started_at
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        started_at, there = found["started_at"], found["inputs"]
        changed = [name for name in inputs.keys() | there.keys() if inputs.get(name) != there.get(name)]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file} is damaged ({error}); remove {folder} to begin anew") from error
    if changed:
        name = min(changed)
        raise ValueError(
            f"{folder} holds parts of other rankings: {name} was {there.get(name)!r} and is {inputs.get(name)!r}; "
            "remove the folder to begin anew, or name another file"
        )
    return started_at


def _write_part(file: Path, table: pa.Table, account: Mapping[str, Any]) -> None:
    sink = pa.BufferOutputStream()
    with_counts = table.replace_schema_metadata({ACCOUNT: json.dumps(account)})
    pyarrow.parquet.write_table(with_counts, sink, write_page_checksum=True)
    write_file(file, sink.getvalue().to_pybytes())


def _account(file: Path) -> dict[str, Any]:
    return json.loads(pyarrow.parquet.read_schema(file).metadata[ACCOUNT])


def _read_part(file: Path) -> pa.Table:
    try:
        with pyarrow.parquet.ParquetFile(file, page_checksum_verification=True) as part:
            return part.read().replace_schema_metadata(None)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{file} is damaged ({error}); remove it, and the same command makes it again") from error


def _assemble(files: list[Path], out: Path) -> str:
    """Writes `out`, a part in memory at a time, and returns its SHA-256."""

    def fill(partial: Path) -> str:
        WRITERS[out.suffix](map(_read_part, files), partial)
        with partial.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()

    return fill_file(out, fill, kept=lambda: f"All parts are in {files[0].parent}.")


def write_parquet(tables: Iterable[pa.Table], file: Path) -> None:
    """The tables as Parquet, each a row group or more."""
    with pyarrow.parquet.ParquetWriter(file, SCHEMA) as writer:
        for table in tables:
            writer.write_table(table)


def write_csv(tables: Iterable[pa.Table], file: Path) -> None:
    """The tables as one CSV, its ids made harmless."""
    with pyarrow.csv.CSVWriter(file, SCHEMA) as writer:
        for table in tables:
            for name in ("user_id", "item_id"):
                coded = pc.dictionary_encode(table[name]).combine_chunks()  # an id is spelt once, not once a row
                cells = pa.array(map(escape_csv, coded.dictionary.to_pylist()), pa.string())
                table = replace(table, name, cells.take(coded.indices))
            writer.write_table(table)


WRITERS: dict[str, Callable[[Iterable[pa.Table], Path], None]] = {".csv": write_csv, ".parquet": write_parquet}
