"""Readers of Parquet, delimited text and JSON lines -> Arrow tables; `DataError` names the faulty rows of a file."""

import codecs
import csv
import dataclasses
import io
import itertools
import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Int64

from fused_rec.data.dataset import DataError, Problem
from fused_rec.data.io.arrow import ID, flags, one_chunk, pc
from fused_rec.data.io.checks import EXAMPLES
from fused_rec.data.io.dialect import UTF8, Dialect, find_dialect, open_bytes, open_text
from fused_rec.data.io.folder import Part, name_in
from fused_rec.data.io.plain import plain_table
from fused_rec.data.io.times import periods_as_times

# Columns with far fewer distinct values than rows: read as dictionaries, at a fraction of the memory.
_CODED = ("user_id", "item_id", "source_id", "target_id", "kind", "split")
# A .gz file that unpacks to more than both is refused as a bomb: text compresses to a third or a tenth.
PACKED, UNPACKED = 100, 1 << 28  # times its size; bytes
# A Parquet file can declare any number of rows in a few bytes; useful rows take more than one bit each.
ROWS_A_BYTE, ROWS = 8, 1 << 20
ROW_BYTES = 1 << 28  # bound of a row of text; one block of this size is in memory at a time
BLOCKS = (1 << 20, 1 << 24, ROW_BYTES)
_SAVE = "save the file as UTF-8"
INTEGER_DIGITS = 20  # digits of 64-bit integers
JSON_ROWS = 65_536  # JSON lines in memory as Python objects at a time


def only_file(path: Path, pattern: str) -> Path:
    """Finds the one file of a folder that matches a pattern.

    Args:
      path: the folder.
      pattern: as of `Path.glob`.

    Returns:
      The file.

    Raises:
      DataError: no file or several files match.
    """
    found = sorted(file for file in path.glob(pattern) if file.is_file())
    if len(found) != 1:
        names = sorted(file.name for file in (found or path.iterdir()))
        message = f"{len(found)} files match {pattern} in {path}, which must be one (there: {names})"
        raise DataError([Problem(pattern, None, message, "name a folder that holds one dataset")])
    return found[0]


def read_parquet(file: Path) -> pa.Table:
    """Reads a Parquet file.

    Args:
      file: the file.

    Returns:
      The table, with plain types where possible (`fused_rec.data.io.plain`).

    Raises:
      DataError: the file is corrupt, truncated, has text that is not UTF-8, or declares too many rows for its size.
    """
    import pyarrow.parquet as pq  # imported here and below where needed, for a fast start

    try:
        with pq.ParquetFile(file, page_checksum_verification=True) as parquet:
            rows = parquet.metadata.num_rows
            if rows > max(ROWS, ROWS_A_BYTE * file.stat().st_size):
                raise OSError(f"it claims {rows:,} rows in {file.stat().st_size:,} bytes")
            return _read_columns(parquet)
    except pa.ArrowNotImplementedError as error:
        raise DataError([_fault(file, error, "write that column with another type")]) from error
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        raise DataError([_fault(file, error, "write it again; it is cut short, corrupt or no Parquet file")]) from error


def _read_columns(parquet: Any) -> pa.Table:
    """Reads all columns of an open Parquet file; those of ids one after the other, as dictionaries.

    The values of ids, of which there are many in a table, are thus in memory one column at a time.
    """
    names = parquet.schema_arrow.names
    ids = [name for name in names if name in _CODED and name.endswith("_id")]
    if not ids or len(set(names)) < len(names) or any("." in name for name in names):
        return _plain(parquet.read())
    columns: dict[str, pa.ChunkedArray] = {}
    for name in ids:
        column = _plain(parquet.read([name]))[name]
        if pa.types.is_integer(column.type) or pa.types.is_string(column.type):
            column = pa.chunked_array([one_chunk(pc.dictionary_encode(column))])
        columns[name] = column
        del column
        pa.default_memory_pool().release_unused()
    if rest := [name for name in names if name not in ids]:
        others = _plain(parquet.read(rest))
        columns |= {name: others[name] for name in rest}
    return pa.table({name: columns[name] for name in names})


def _plain(table: pa.Table) -> pa.Table:
    """Validates a table as read and converts its columns to plain types where possible."""
    table.validate(full=True)  # Parquet does not promise that its text is UTF-8
    return plain_table(periods_as_times(table))


def read_delimited(
    file: Path,
    delimiter: str = "\t",
    *,
    names: tuple[str, ...] = (),
    needed: tuple[str, ...] = (),
    encoding: str = UTF8,
    quoted: bool = False,
    skip: int = 0,
) -> pa.Table:
    """Reads a delimited text file, plain or .gz.

    Args:
      file: the file.
      delimiter: one character.
      names: column names of a file without header; empty = the first line is the header.
      needed: columns that the header must have, each once.
      encoding: as Python names it.
      quoted: whether "..." protects delimiters and line breaks.
      skip: lines before the header, which counts as row 1.

    Returns:
      The table with all cells as strings (ids as dictionaries of strings), empty ones null.

    Raises:
      DataError: columns are missing, rows have another width or more than `ROW_BYTES`, bytes are not `encoding`, the
        file is truncated, or a .gz file is a bomb.
    """
    dialect = Dialect(delimiter, encoding, skip)
    try:
        size = _check_bytes(file, encoding)
        columns = names or _header(file, dialect, quoted)
        kinds = {name: ID if name in _CODED else pa.string() for name in (*columns, *needed)}
        table, faulty = _rows(file, dialect, names, kinds, quoted, size)
    except (pa.ArrowException, OSError, EOFError, zlib.error, UnicodeError, csv.Error, MemoryError) as error:
        faults = list(_undecodable(file, encoding)) if isinstance(error, UnicodeDecodeError | pa.ArrowException) else []
        raise DataError(faults or [_fault(file, error, "write it again or download it again")]) from error
    if quoted:
        faulty += _unclosed(file, dialect)
    if faulty:
        raise DataError(faulty)
    found = table.column_names
    if wrong := [name for name in needed if found.count(name) != 1]:
        faults = [f"column {name} occurs {found.count(name)} times (there: {', '.join(found)})" for name in wrong]
        raise DataError([Problem(file.name, None, fault, "write the header as its publisher does") for fault in faults])
    return table


def _rows(
    file: Path, dialect: Dialect, names: tuple[str, ...], kinds: Mapping[str, pa.DataType], quoted: bool, size: int
) -> tuple[pa.Table, list[Problem]]:
    """Reads the rows, and returns the faults of those of another width; `size` is the unpacked size in bytes.

    Arrow reads blocks and accepts no row longer than one; blocks grow as needed up to `ROW_BYTES`.
    """
    import pyarrow.csv as pacsv

    for block in BLOCKS:
        faulty: list[Problem] = []
        count = itertools.count(1)

        def note(row: pacsv.InvalidRow, faulty: list[Problem] = faulty, count: Iterator[int] = count) -> str:
            if next(count) <= EXAMPLES:
                found = f"{row.actual_columns} cells instead of {row.expected_columns}: {row.text[:60]!r}"
                number = row.number and row.number - dialect.skip
                faulty.append(Problem(file.name, number, found, "write the row again, cells with delimiters in quotes"))
            return "skip"

        try:
            table = pacsv.read_csv(
                pa.input_stream(file, compression="gzip" if file.suffix.lower() == ".gz" else None),
                # A single thread numbers the faulty rows; 5 million rows take about 3 seconds.
                pacsv.ReadOptions(
                    use_threads=False,
                    column_names=names or None,
                    encoding=dialect.encoding,
                    skip_rows=dialect.skip,
                    block_size=min(block, max(2 * size, 1024)),  # UTF-16 may grow by half as UTF-8
                ),
                pacsv.ParseOptions(
                    delimiter=dialect.delimiter,
                    quote_char='"' if quoted else False,
                    newlines_in_values=quoted,
                    invalid_row_handler=note,
                ),
                pacsv.ConvertOptions(
                    column_types=kinds, null_values=[""], strings_can_be_null=True, quoted_strings_can_be_null=False
                ),
            )
        except pa.ArrowInvalid as error:
            if "straddl" not in str(error):
                raise
            continue
        if (total := next(count) - 1) > len(faulty):
            rest = total - len(faulty)
            faulty.append(Problem(file.name, None, f"{total:,} rows of another width in all", "write them again", rest))
        return table, faulty
    faults = list(_unclosed(file, dialect)) if quoted else []
    message = f"a row takes more than {ROW_BYTES:,} bytes"
    remedy = "shorten its texts, write the table as Parquet, or close the quote that swallows the rows after it"
    raise DataError(faults or [Problem(file.name, None, message, remedy)])


def read_cells(
    file: Path, required: tuple[str, ...], known: tuple[str, ...], delimiter: str = "", encoding: str = ""
) -> tuple[pa.Table, str]:
    """Reads a text file of a user table in the dialect that `find_dialect` detects.

    Args:
      file: the file, plain or .gz.
      required: columns that the table must have.
      known: further columns of its format.
      delimiter: tried first; empty = detected.
      encoding: of files that are not UTF-8 and have no byte order mark; empty = UTF-8.

    Returns:
      The table with all cells as strings, and a note on its dialect, empty where it is the expected one.

    Raises:
      DataError: as in `read_delimited`; or a column has numbers with decimal commas, which would be read as text.
    """
    try:
        dialect = find_dialect(file, required, known, delimiter, encoding)
        table = read_delimited(file, dialect.delimiter, encoding=dialect.encoding, quoted=True, skip=dialect.skip)
    except (OSError, EOFError, zlib.error, UnicodeError) as error:  # such as UTF-16 without byte order mark
        raise DataError([_fault(file, error, "write it again")]) from error
    except DataError as error:
        raise DataError(_with_encodings(error.problems)) from error
    if dialect.delimiter != ",":
        columns = [
            name for name in dict.fromkeys(table.column_names) if name not in (*required, *known, "name", "text")
        ]
        if faults := [fault for name in columns for fault in _decimal_commas(table, name, file.name)]:
            raise DataError(faults)
    points = [
        note for name in table.column_names if name not in (*required, "name", "text") for note in _points(table, name)
    ]
    notes = [dialect.note(file.name), *(points if dialect.delimiter != "," else [])]
    return table, "; ".join(filter(None, notes))


def _with_encodings(problems: Sequence[Problem]) -> list[Problem]:
    """Adds the setting `data.encoding` to the remedy of encoding faults."""
    remedy = f"{_SAVE}, or name its encoding: data.encoding=cp1252 is that of Windows in Western Europe"
    return [dataclasses.replace(problem, remedy=remedy) if problem.remedy == _SAVE else problem for problem in problems]


def _decimal_commas(table: pa.Table, name: str, file: str) -> Iterator[Problem]:
    """Reports a column in which all cells are numbers, some with a comma, by its first cell with one."""
    if table.column_names.count(name) > 1:
        return
    cells = table[name].cast(pa.string())
    number = pc.match_substring_regex(cells, r"\A\s*[+-]?[0-9]+([. '\x{a0}\x{202f}][0-9]{3})*(,[0-9]+)?\s*\z")
    comma = flags(pc.match_substring(cells, ","))
    if comma.any() and pc.all(number).as_py():
        row = int(np.flatnonzero(comma)[0])
        message = f"{name} {_shown(cells[row].as_py())} has a decimal comma ({int(comma.sum()):,} rows in all)"
        yield Problem(file, row + 2, message, "write numbers with a decimal point, as 1234.5")


def _points(table: pa.Table, name: str) -> Iterator[str]:
    """Notes how a column is read whose numbers are ambiguous, all with a point before three digits: 1.234 or 1234."""
    cells = table[name].cast(pa.string()) if table.column_names.count(name) == 1 else pa.chunked_array([], pa.string())
    point = flags(pc.match_substring(cells, "."))
    if point.any():
        ambiguous = r"\A\s*[+-]?([0-9]+|[1-9][0-9]{0,2}\.[0-9]{3})\s*\z"  # 0.125 and 1234.125 are not
        if pc.all(pc.match_substring_regex(cells, ambiguous)).as_py():
            row = int(np.flatnonzero(point)[0])
            yield (
                f"{name} {_shown(cells[row].as_py())} in row {row + 2} is read with a decimal point; if points divide "
                "thousands, write numbers without them"
            )


def join_parts(table: Path, parts: Sequence[Part], read: Callable[[Path], pa.Table]) -> tuple[pa.Table, dict[str, int]]:
    """Reads the files of a folder as one table.

    Args:
      table: the folder.
      parts: its files in order; the columns of `column=value` subfolders are text.
      read: reads one file.

    Returns:
      The concatenated table, and the number of rows of each file by name.

    Raises:
      DataError: a file cannot be read, has other columns than the first, or has a type for which no common type keeps
        all values.
    """
    problems: list[Problem] = []
    tables: dict[str, pa.Table] = {}
    kinds: dict[str, pa.DataType] = {}
    first = name_in(table, parts[0].file)
    remedy = "give all parts the same columns and types, each column once"
    for part in parts:
        name = name_in(table, part.file)
        try:
            rows = read(part.file)
            for column, value in part.values.items():
                rows = rows.append_column(column, pa.array([value] * len(rows), pa.string()))
        except DataError as error:
            problems += [dataclasses.replace(problem, file=name) for problem in error.problems]
            continue
        if fault := _unlike(rows, kinds, first):
            problems.append(Problem(name, None, fault, remedy))
            continue
        for field in rows.schema:
            kinds[field.name] = _common(kinds.get(field.name, pa.null()), _kind(field.type)) or pa.null()
        tables[name] = rows.select(list(kinds))
    schemas = [rows.schema for rows in tables.values()]
    if any(schema != schemas[0] for schema in schemas):  # dictionaries differ in the width of their indices
        for name, rows in tables.items():
            cast = {column: _cast(rows, column, kind, name, problems) for column, kind in kinds.items()}
            tables[name] = pa.table(cast)
    if problems:
        raise DataError(problems)
    return pa.concat_tables(tables.values()), {name: len(rows) for name, rows in tables.items()}


def _unlike(rows: pa.Table, kinds: Mapping[str, pa.DataType], first: str) -> str:
    """Explains why a file cannot be appended to those before it, of these types; empty where it can."""
    names = rows.column_names
    if twice := [name for name in names if names.count(name) > 1]:
        return f"has column {twice[0]} twice (there: {', '.join(names)})"
    if kinds and set(names) != set(kinds):
        return f"has the columns {', '.join(names)}, and not {', '.join(kinds)} as {first}"
    for name in kinds:
        own = _kind(rows.schema.field(name).type)
        if _common(kinds[name], own) is None:
            return f"holds {own} values as {name}, and the parts before it {kinds[name]} values"
    return ""


def _common(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    """Finds the type that keeps values of both types unchanged, None where there is none.

    A 32-bit float is written with few digits (0.1), and is another number as a 64-bit float.
    """
    types = pa.types
    if one == other or types.is_null(other):
        return one
    if types.is_null(one):
        return other
    if types.is_list(one) and types.is_list(other):
        inner = _common(one.value_type, other.value_type)
        return inner and pa.list_(inner)
    kinds = (one, other)
    if any(map(types.is_float32, kinds)) or (any(map(types.is_decimal, kinds)) and any(map(types.is_floating, kinds))):
        return None
    if types.is_decimal(one) != types.is_decimal(other):
        one, other = kinds if types.is_decimal(one) else (other, one)
        whole = max(one.precision - one.scale, INTEGER_DIGITS)
        fits = types.is_integer(other) and whole + one.scale <= pa.decimal128(38).precision
        return pa.decimal128(whole + one.scale, one.scale) if fits else None
    try:
        schemas = [pa.schema([("", kind)]) for kind in kinds]
        return pa.unify_schemas(schemas, promote_options="permissive").field(0).type
    except pa.ArrowException:
        return None


def _cast(rows: pa.Table, column: str, kind: pa.DataType, name: str, problems: list[Problem]) -> pa.ChunkedArray:
    """Casts a column to the common type; nulls, with a problem, where that would change a value."""
    try:
        return rows[column].cast(kind)
    except pa.ArrowException as error:
        message = f"{column} holds {_kind(rows[column].type)} values that do not fit into {kind}, which all parts need"
        remedy = "write the column with one type in all parts, codes and ids as text"
        problems.append(Problem(name, None, f"{message}: {error}", remedy))
        return pa.chunked_array([pa.nulls(len(rows), kind)])


def _kind(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def integers(rows: pa.Table, name: str, file: Path, *, header: bool = True) -> Int64[np.ndarray, "R"]:
    """Converts a column of `read_delimited` to integers.

    Args:
      rows: R rows.
      name: name of the column.
      file: its file, for messages.
      header: whether the file has a header, for row numbers.

    Returns:
      The integers.

    Raises:
      DataError: cells are missing or no integers of up to 18 digits.
    """
    cells = rows[name].cast(pa.string())
    bad = np.flatnonzero(~flags(pc.match_substring_regex(cells, r"\A-?[0-9]{1,18}\z")))  # 18 digits fit into 64 bits
    remedy = "give an integer of up to 18 digits"
    problems = [
        Problem(file.name, int(row) + 1 + header, f"{name} {_shown(cells[row].as_py())} is no integer", remedy)
        for row in bad[:EXAMPLES]
    ]
    if len(bad) > EXAMPLES:
        total = f"{len(bad):,} rows in all have no integer as {name}"
        problems.append(Problem(file.name, None, total, remedy, len(bad) - EXAMPLES))
    if problems:
        raise DataError(problems)
    return np.asarray(cells.cast(pa.int64()))


def read_json_lines(file: Path, schema: Mapping[str, pa.DataType]) -> pa.Table:
    """Reads fields of JSON lines, plain or .gz. Arrow's reader takes 40 % of the time, but crashes on a line `null`.

    Args:
      file: one JSON object per line, UTF-8.
      schema: type by field.

    Returns:
      The fields as columns, null where an object lacks one.

    Raises:
      DataError: the file is corrupt, a line is no JSON object, or a field has another type.
    """
    problems: list[Problem] = []
    tables = [pa.table({name: pa.array([], kind) for name, kind in schema.items()})]
    numbers: list[int] = []
    columns: dict[str, list[Any]] = {name: [] for name in schema}

    def flush() -> None:
        arrays = {name: _typed(columns[name], kind, numbers, name, file, problems) for name, kind in schema.items()}
        tables.append(pa.table(arrays))
        for buffer in (numbers, *columns.values()):
            buffer.clear()

    try:
        _check_bytes(file)
        with open_bytes(file) as lines:
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
    """Converts values to Arrow; nulls, with a problem for the first line of another type, where that fails."""
    wrong = (pa.ArrowException, OverflowError, ValueError, TypeError)  # lone surrogates, among others
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
    """Reads the lines of a UTF-8 text file, plain or .gz.

    Args:
      file: the file.

    Yields:
      Its lines, with line ends.

    Raises:
      DataError: it is missing, truncated, not UTF-8 or a .gz bomb.
    """
    try:
        _check_bytes(file)
        with open_bytes(file) as source, io.TextIOWrapper(source, "utf-8") as lines:
            yield from lines
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise DataError([_fault(file, error, "download it again")]) from error


def plain_or_gz(file: Path) -> Path:
    """Returns the file itself where it exists, else the one with .gz after its name."""
    return file if file.is_file() else file.with_name(f"{file.name}.gz")


def _check_bytes(file: Path, encoding: str = "") -> int:
    """Counts unpacked bytes; raises OSError for a .gz bomb, UnicodeDecodeError for another encoding.

    Arrow does not report invalid UTF-8 in rows of another width, so bytes are checked here.
    """
    packed = file.suffix.lower() == ".gz"
    size, limit = 0, max(UNPACKED, PACKED * file.stat().st_size)
    decoder = codecs.getincrementaldecoder(encoding)() if encoding else None
    with open_bytes(file) as source:
        while chunk := source.read(1 << 20):
            size += len(chunk)
            if packed and size > limit:
                raise OSError(f"it unpacks to more than {limit:,} bytes, {PACKED} times its size or more")
            if decoder:
                decoder.decode(chunk)
        if decoder:
            decoder.decode(b"", final=True)
    return size


def _shown(value: Any) -> str:
    return repr(value) if len(repr(value)) <= 60 else f"{repr(value)[:60]}..."


def _header(file: Path, dialect: Dialect, quoted: bool) -> tuple[str, ...]:
    with open_text(file, dialect) as lines:
        style = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
        rows = csv.reader(lines, delimiter=dialect.delimiter, quoting=style)
        return tuple(next(filter(None, rows), ()))  # Arrow skips empty lines as well


def _unclosed(file: Path, dialect: Dialect) -> Iterator[Problem]:
    """Reports a quote still open at the end of the file, which Arrow accepts: rows are missing or in one cell."""
    with open_bytes(file) as source:
        if sum(chunk.count(b'"') for chunk in iter(lambda: source.read(1 << 20), b"")) % 2 == 0:
            return
    with open_text(file, dialect) as lines:
        row = 1
        try:
            for _ in csv.reader(lines, delimiter=dialect.delimiter, strict=True):
                row += 1
        except csv.Error as error:
            yield Problem(file.name, row, f"a quote is not closed as it should be ({error})", "write the file again")


def _undecodable(file: Path, encoding: str) -> Iterator[Problem]:
    """Reports lines that are not `encoding`; none for UTF-16 and UTF-32, whose lines cannot be split undecoded."""
    shown = "UTF-8" if encoding == UTF8 else encoding
    count = 0
    if not file.is_file() or encoding.startswith(("utf-16", "utf-32")):
        return
    try:
        with open_bytes(file) as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    line.decode(encoding)
                except UnicodeDecodeError as error:
                    count += 1
                    around = line[max(0, error.start - 20) : error.start + 20]
                    if count <= EXAMPLES:
                        yield Problem(file.name, number, f"not {shown}: {around!r}", _SAVE)
    except (OSError, EOFError, zlib.error):  # a broken .gz, reported elsewhere
        return
    if count > EXAMPLES:
        yield Problem(file.name, None, f"{count:,} lines are not {shown}", _SAVE, count - EXAMPLES)


def _fault(file: Path, error: Exception, remedy: str) -> Problem:
    if file.is_symlink() and not file.exists():
        return Problem(
            file.name, None, f"is a link to {file.readlink()}, which does not exist", "mount or copy its target"
        )
    if not file.is_file():
        names = sorted(other.name for other in file.parent.iterdir()) if file.parent.is_dir() else "no such folder"
        return Problem(file.name, None, f"no such file in {file.parent} (there: {names})", "add it or name its folder")
    return Problem(file.name, None, f"cannot be read: {str(error) or type(error).__name__}", remedy)
