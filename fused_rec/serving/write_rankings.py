"""Resumable writer of rankings: written in parts, joined to one file with an audit log.

OUT                   the rankings, .parquet or .csv; exists only when complete
OUT.audit.json        inputs, times, and numbers of excluded items; written after OUT
OUT.parts/            while incomplete: begun.json with the inputs, and the parts 000000.parquet, ...
"""

import contextlib
import datetime
import functools
import hashlib
import itertools
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
from fused_rec.storage import fill_file, write_file

LOG = logging.getLogger(__name__)
BEGUN, AUDIT = "begun.json", "audit.json"
Rules = str | os.PathLike[str] | Mapping[str, Any] | Sequence[Mapping[str, Any]]
EXCLUSIONS = b"exclusions"  # metadata key of a part's file


def read_rules(given: Rules) -> tuple[tuple[Rule, ...], str]:
    """Reads suitability rules.

    Args:
      given: a JSON file, its content as a dictionary, or the list of rules in it.

    Returns:
      The rules and the SHA-256 of the file, or of the content as JSON.

    Raises:
      ValueError: the rules are invalid; names the file.
    """
    if not isinstance(given, str | os.PathLike):
        try:
            text = json.dumps(given if isinstance(given, Mapping) else {"rules": list(given)})
        except TypeError as error:
            raise ValueError(f"the rules cannot be written as JSON ({error}); use texts, numbers and lists") from error
        return parse(text), hashlib.sha256(text.encode()).hexdigest()
    file, content = given, Path(given).read_bytes()
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
    """Writes all parts to `out`, and reuses those that an earlier call left on disk.

    A process may be killed at any time: `out` is complete or missing, and the same call resumes.

    Args:
      out: a name that ends in .parquet or .csv.
      inputs: hashes and settings that determine the rankings, as JSON; parts of other rankings are refused.
      n_parts: number of parts, 1 or more.
      parts: yields, from a given part on, the rows and `suitability.exclusion_counts` of each part.
      command: for the audit log.

    Returns:
      The audit log.

    Raises:
      ValueError: parts of other rankings exist beside `out`, or a part is damaged.
      BusyError: another process writes them.
      SaveError: the disk is full or cannot be written; what was written before stays.
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
            for number, (table, exclusions) in enumerate(parts(done) if done < n_parts else (), start=done):
                _write_part(_name(folder, number), table, exclusions)
        except Stopped as stopped:
            stopped.add_note(f"{_count_done(folder, n_parts)} of {n_parts} parts are kept in {folder}")
            raise
        files = [_name(folder, number) for number in range(n_parts)]
        log = out.with_name(f"{out.name}.{AUDIT}")
        log.unlink(missing_ok=True)  # it describes the file that is now replaced
        audit = {
            "file": out.name,
            "sha256": _assemble(files, out),
            "started_at": started_at,
            "finished": _now(),
            "command": command,
            "inputs": dict(inputs),
            "exclusions": functools.reduce(sum_counts, map(_exclusions, files)),
            "versions": versions(),
        }
        write_json(folder / AUDIT, audit)
        (folder / AUDIT).replace(log)  # atomic
        for file in (*files, folder / BEGUN, *folder.glob(".*.parquet.*"), *folder.glob(".*.json.*")):
            file.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # another process uses it
        folder.rmdir()
    return audit


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _name(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.parquet"


def _count_done(folder: Path, n_parts: int) -> int:
    return next((number for number in range(n_parts) if not _name(folder, number).exists()), n_parts)


def _claim(folder: Path, inputs: Mapping[str, Any]) -> str:
    """Returns when these rankings were started; raises ValueError if the folder holds others."""
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
        raise ValueError(f"{file} is damaged ({error}); remove {folder} to start again") from error
    if changed:
        name = min(changed)
        raise ValueError(
            f"{folder} holds parts of other rankings: {name} was {there.get(name)!r} and is {inputs.get(name)!r}; "
            "remove the folder to start again, or name another file"
        )
    return started_at


def _write_part(file: Path, table: pa.Table, exclusions: Mapping[str, Any]) -> None:
    sink = pa.BufferOutputStream()
    with_counts = table.replace_schema_metadata({EXCLUSIONS: json.dumps(exclusions)})
    pyarrow.parquet.write_table(with_counts, sink, write_page_checksum=True)
    write_file(file, sink.getvalue().to_pybytes())


def _exclusions(file: Path) -> dict[str, Any]:
    return json.loads(pyarrow.parquet.read_schema(file).metadata[EXCLUSIONS])


def _read_part(file: Path) -> pa.Table:
    try:
        with pyarrow.parquet.ParquetFile(file, page_checksum_verification=True) as part:
            return part.read().replace_schema_metadata(None)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{file} is damaged ({error}); remove it, and the same command writes it again") from error


def _assemble(files: list[Path], out: Path) -> str:
    """Writes `out` with one part in memory at a time, and returns its SHA-256."""

    def fill(partial: Path) -> str:
        WRITERS[out.suffix](map(_read_part, files), partial)
        with partial.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()

    return fill_file(out, fill, kept=lambda: f"All parts are in {files[0].parent}.")


def write_parquet(tables: Iterable[pa.Table], file: Path) -> None:
    """Writes tables as one Parquet file, with at least a row group per table.

    Args:
      tables: one or more tables of one schema.
      file: the file.
    """
    schema, tables = _with_schema(tables)
    with pyarrow.parquet.ParquetWriter(file, schema) as writer:
        for table in tables:
            writer.write_table(table)


def write_csv(tables: Iterable[pa.Table], file: Path) -> None:
    """Writes tables as one CSV file, with ids and names escaped by `escape_csv`.

    Args:
      tables: one or more tables of one schema.
      file: the file.
    """
    schema, tables = _with_schema(tables)
    with pyarrow.csv.CSVWriter(file, schema) as writer:
        for table in tables:
            for name in [field.name for field in schema if pa.types.is_string(field.type)]:
                coded = pc.dictionary_encode(table[name]).combine_chunks()  # escape each distinct id once
                cells = pa.array(map(escape_csv, coded.dictionary.to_pylist()), pa.string())
                table = replace(table, name, cells.take(coded.indices))
            writer.write_table(table)


def _with_schema(tables: Iterable[pa.Table]) -> tuple[pa.Schema, Iterator[pa.Table]]:
    first, *rest = itertools.tee(tables)
    tables = iter(tables)
    first = next(tables)
    return first.schema, itertools.chain([first], tables)


WRITERS: dict[str, Callable[[Iterable[pa.Table], Path], None]] = {".csv": write_csv, ".parquet": write_parquet}
