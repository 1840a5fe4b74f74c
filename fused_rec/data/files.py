"""Files of rows -> Arrow tables, with a `DataError` that says where a file is broken."""

import codecs
import csv
import gzip
import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Int64

from fused_rec.data.arrow import ID, flags, pc
from fused_rec.data.checks import EXAMPLES
from fused_rec.data.dataset import DataError, Problem
from fused_rec.data.plain import plain_table
from fused_rec.data.times import periods_as_times

# Columns with far fewer values than rows: read as dictionaries, which takes a fraction of the memory.
_CODED = ("user_id", "item_id", "source_id", "target_id", "kind", "part")
# A .gz file that unpacks to more than both was made to fill the memory: text packs to a third or a tenth.
PACKED, UNPACKED = 100, 1 << 28  # times its size; bytes
# A Parquet file can claim any number of rows in a few bytes; what a table is for takes more than one bit of each.
ROWS_A_BYTE, ROWS = 8, 1 << 20
JSON_ROWS = 65_536  # of JSON lines, held as Python's objects at a time


def read_parquet(file: Path) -> pa.Table:
    """A Parquet file, its columns plain where they can be (`fused_rec.data.plain`).

    Raises DataError where it is corrupt, cut short, holds text that is not UTF-8 or is a bomb.
    """
    import pyarrow.parquet as pq  # here and below: formats are imported where they are read, to start quickly

    try:
        with pq.ParquetFile(file, page_checksum_verification=True) as parquet:
            rows = parquet.metadata.num_rows
            if rows > max(ROWS, ROWS_A_BYTE * file.stat().st_size):
                raise OSError(f"it claims {rows:,} rows in {file.stat().st_size:,} bytes")
            table = parquet.read()
        table.validate(full=True)  # Parquet does not promise that its text is UTF-8
        return plain_table(periods_as_times(table))
    except pa.ArrowNotImplementedError as error:
        raise DataError([_fault(file, error, "write that column with another type")]) from error
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        raise DataError([_fault(file, error, "write it again; it is cut short, corrupt or no Parquet file")]) from error


def read_delimited(
    file: Path,
    delimiter: str = "\t",
    *,
    names: tuple[str, ...] = (),
    needed: tuple[str, ...] = (),
    encoding: str = "utf8",
    quoted: bool = False,
) -> pa.Table:
    """A text file of rows, plain or .gz, every cell a string (ids as dictionaries of strings), an empty one null.

    names: the columns of a file without a header. needed: those that a header must name, each once. quoted: "..."
    protects delimiters and line breaks. Raises DataError for other columns, rows of another width, bytes that are not
    `encoding`, a file cut short and a .gz file that is a bomb.
    """
    import pyarrow.csv as pacsv

    torn: list[Problem] = []
    count = 0

    def note(row: pacsv.InvalidRow) -> str:
        nonlocal count
        count += 1
        if len(torn) < EXAMPLES:
            found = f"{row.actual_columns} cells where {row.expected_columns} are due: {row.text[:60]!r}"
            torn.append(Problem(file.name, row.number, found, "write the row again, cells with delimiters in quotes"))
        return "skip"

    try:
        _check_bytes(file, encoding)
        columns = names or _header(file, delimiter, encoding, quoted)
        table = pacsv.read_csv(
            file,
            # A single thread numbers the torn rows; 5 million rows take it about 3 seconds.
            pacsv.ReadOptions(use_threads=False, column_names=names or None, encoding=encoding),
            pacsv.ParseOptions(
                delimiter=delimiter,
                quote_char='"' if quoted else False,
                newlines_in_values=quoted,
                invalid_row_handler=note,
            ),
            pacsv.ConvertOptions(
                column_types={name: ID if name in _CODED else pa.string() for name in (*columns, *needed)},
                null_values=[""],
                strings_can_be_null=True,
                quoted_strings_can_be_null=False,
            ),
        )
    except (pa.ArrowException, OSError, EOFError, zlib.error, UnicodeDecodeError, csv.Error) as error:
        faults = list(_not_utf8(file)) if encoding == "utf8" else []
        raise DataError(faults or [_fault(file, error, "write it again or download it again")]) from error
    if count > len(torn):
        torn.append(
            Problem(file.name, None, f"{count:,} rows of another width in all", "write them again", count - len(torn))
        )
    if quoted:
        torn += _unclosed(file)
    if torn:
        raise DataError(torn)
    there = table.column_names
    if wrong := [name for name in needed if there.count(name) != 1]:
        faults = [f"column {name} is there {there.count(name)} times (there: {', '.join(there)})" for name in wrong]
        raise DataError([Problem(file.name, None, fault, "write the header as its publisher does") for fault in faults])
    return table


def integers(rows: pa.Table, name: str, file: Path, *, header: bool = True) -> Int64[np.ndarray, "R"]:
    """A column of `read_delimited` as integers. Raises DataError with the rows that hold anything else, or nothing."""
    words = rows[name].cast(pa.string())
    bad = np.flatnonzero(~flags(pc.match_substring_regex(words, r"\A-?[0-9]{1,18}\z")))  # 18 digits fit into 64 bits
    remedy = "give an integer of up to 18 digits"
    problems = [
        Problem(file.name, int(row) + 1 + header, f"{name} {_shown(words[row].as_py())} is no integer", remedy)
        for row in bad[:EXAMPLES]
    ]
    if len(bad) > EXAMPLES:
        total = f"{len(bad):,} rows in all have no integer as {name}"
        problems.append(Problem(file.name, None, total, remedy, len(bad) - EXAMPLES))
    if problems:
        raise DataError(problems)
    return np.asarray(words.cast(pa.int64()))


def read_json_lines(file: Path, schema: Mapping[str, pa.DataType]) -> pa.Table:
    """The named fields of a file of JSON objects, one a line, plain or .gz; null where an object has none.

    Raises DataError where it is corrupt, and for lines that are no JSON object or hold a field of another type.
    Arrow's own reader takes 40 % of the time, but a line `null` ends its process.
    """
    problems: list[Problem] = []
    tables = [pa.table({name: pa.array([], kind) for name, kind in schema.items()})]
    numbers: list[int] = []
    columns: dict[str, list[Any]] = {name: [] for name in schema}

    def flush() -> None:
        arrays = {name: _typed(columns[name], kind, numbers, name, file, problems) for name, kind in schema.items()}
        tables.append(pa.table(arrays))
        for held in (numbers, *columns.values()):
            held.clear()

    try:
        _check_bytes(file)
        with gzip.open(file) if file.suffix == ".gz" else open(file, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    record = json.loads(line.decode())
                    if not isinstance(record, dict):
                        raise ValueError("it is another value")
                except (ValueError, RecursionError) as error:
                    remedy = "give one JSON object a line, in UTF-8"
                    problems.append(Problem(file.name, number, f"is no JSON object: {error}", remedy))
                    if len(problems) > EXAMPLES:
                        raise DataError(problems) from error
                    continue
                numbers.append(number)
                for name, values in columns.items():
                    values.append(record.get(name))
                if len(numbers) == JSON_ROWS:
                    flush()
        flush()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError([_fault(file, error, "download it again; it is cut short or corrupt")]) from error
    if problems:
        raise DataError(problems)
    return pa.concat_tables(tables)


def _typed(
    values: list[Any], kind: pa.DataType, numbers: list[int], name: str, file: Path, problems: list[Problem]
) -> pa.Array:
    """The values as Arrow has them; notes the first line that holds another type, and gives nulls then."""
    wrong = (pa.ArrowException, OverflowError, ValueError, TypeError)  # of lone surrogates, among others
    try:
        return pa.array(values, kind)
    except wrong:
        for number, value in zip(numbers, values, strict=True):
            try:
                pa.array([value], kind)
            except wrong:
                problems.append(Problem(file.name, number, f"{name} is {_shown(value)}", f"give it as {kind}"))
                break
        return pa.nulls(len(values), kind)


def read_lines(file: Path) -> Iterator[str]:
    """The lines of a UTF-8 text file. Raises DataError where it is missing or not UTF-8."""
    try:
        with open(file, encoding="utf-8") as lines:
            yield from lines
    except (OSError, UnicodeDecodeError) as error:
        raise DataError([_fault(file, error, "download it again")]) from error


def _check_bytes(file: Path, encoding: str = "") -> None:
    """Raises OSError where a .gz file is a bomb, and UnicodeDecodeError where a file that should be is not UTF-8.

    Arrow reads on after a row that is of another width and not UTF-8 as well, and tells nobody.
    """
    packed = file.suffix == ".gz"
    held, limit = 0, max(UNPACKED, PACKED * file.stat().st_size)
    decoder = codecs.getincrementaldecoder("utf-8")()
    with gzip.open(file) if packed else open(file, "rb") as source:
        while chunk := source.read(1 << 20):
            held += len(chunk)
            if packed and held > limit:
                raise OSError(f"it unpacks to more than {limit:,} bytes, {PACKED} times its size or more")
            if encoding == "utf8":
                decoder.decode(chunk)
        decoder.decode(b"", final=True)


def _shown(value: Any) -> str:
    return repr(value) if len(repr(value)) <= 60 else f"{repr(value)[:60]}..."


def _header(file: Path, delimiter: str, encoding: str, quoted: bool) -> tuple[str, ...]:
    opened = gzip.open if file.suffix == ".gz" else open
    with opened(file, "rt", encoding="utf-8-sig" if encoding == "utf8" else encoding, newline="") as lines:
        style = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
        return tuple(next(csv.reader(lines, delimiter=delimiter, quoting=style), ()))


def _unclosed(file: Path) -> Iterator[Problem]:
    """A quote that the file ends in, which Arrow takes for closed: the file is cut short, or rows were swallowed."""
    with open(file, "rb") as source:
        if sum(chunk.count(b'"') for chunk in iter(lambda: source.read(1 << 20), b"")) % 2 == 0:
            return
    with open(file, encoding="utf-8-sig", newline="") as lines:
        row = 1
        try:
            for _ in csv.reader(lines, strict=True):
                row += 1
        except csv.Error as error:
            yield Problem(file.name, row, f"a quote is not closed as it should be ({error})", "write the file again")


def _not_utf8(file: Path) -> Iterator[Problem]:
    remedy = "save the file as UTF-8"
    count = 0
    if file.is_file() and file.suffix != ".gz":
        with open(file, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    line.decode("utf-8")
                except UnicodeDecodeError as error:
                    count += 1
                    around = line[max(0, error.start - 20) : error.start + 20]
                    if count <= EXAMPLES:
                        yield Problem(file.name, number, f"not UTF-8: {around!r}", remedy)
    if count > EXAMPLES:
        yield Problem(file.name, None, f"{count:,} lines are not UTF-8", remedy, count - EXAMPLES)


def _fault(file: Path, error: Exception, remedy: str) -> Problem:
    if not file.is_file():
        there = sorted(other.name for other in file.parent.iterdir()) if file.parent.is_dir() else "no such folder"
        return Problem(file.name, None, f"no such file in {file.parent} (there: {there})", "add it or name its folder")
    return Problem(file.name, None, f"cannot be read: {str(error) or type(error).__name__}", remedy)
