"""Files of rows -> Arrow tables, with a `DataError` that says where a file is broken."""

import csv
import gzip
from collections.abc import Iterator, Mapping
from pathlib import Path

import pyarrow as pa

from fused_rec.data.arrow import ID
from fused_rec.data.checks import EXAMPLES
from fused_rec.data.dataset import DataError, Problem

# Columns with far fewer values than rows: read as dictionaries, which takes a fraction of the memory.
_CODED = ("user_id", "item_id", "source_id", "target_id", "kind", "part")


def read_parquet(file: Path) -> pa.Table:
    """A Parquet file. Raises DataError where it is corrupt, cut short or holds text that is not UTF-8."""
    import pyarrow.parquet as pq  # here and below: formats are imported where they are read, to start quickly

    try:
        with pq.ParquetFile(file, page_checksum_verification=True) as parquet:
            table = parquet.read()
        table.validate(full=True)  # Parquet does not promise that its text is UTF-8
        return table
    except (pa.ArrowException, OSError) as error:
        raise DataError([_fault(file, error, "write it again; it is cut short, corrupt or no Parquet file")]) from error


def read_delimited(
    file: Path,
    delimiter: str = "\t",
    *,
    names: tuple[str, ...] = (),
    encoding: str = "utf8",
    quoted: bool = False,
) -> pa.Table:
    """A text file of rows, plain or .gz, every cell a string (ids as dictionaries of strings), an empty one null.

    names: the columns of a file without a header. quoted: "..." protects delimiters and line breaks.
    Raises DataError for rows of another width, bytes that are not `encoding`, and a file cut short.
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
                column_types={name: ID if name in _CODED else pa.string() for name in columns},
                null_values=[""],
                strings_can_be_null=True,
                quoted_strings_can_be_null=False,
            ),
        )
    except (pa.ArrowException, OSError, EOFError, UnicodeDecodeError, csv.Error) as error:
        faults = list(_not_utf8(file)) if encoding == "utf8" else []
        raise DataError(faults or [_fault(file, error, "write it again or download it again")]) from error
    if count > len(torn):
        torn.append(Problem(file.name, None, f"{count:,} rows of another width in all", "write them again"))
    if quoted:
        torn += _unclosed(file)
    if torn:
        raise DataError(torn)
    return table


def read_json_lines(file: Path, schema: Mapping[str, pa.DataType]) -> pa.Table:
    """The named fields of a file of JSON objects, one a line, plain or .gz. Raises DataError where it is corrupt."""
    import pyarrow.json as pajson

    options = pajson.ParseOptions(explicit_schema=pa.schema(list(schema.items())), unexpected_field_behavior="ignore")
    try:
        return pajson.read_json(file, pajson.ReadOptions(use_threads=False, block_size=1 << 24), options)
    except (pa.ArrowException, OSError) as error:
        raise DataError([_fault(file, error, "download it again; it is cut short or not JSON lines")]) from error


def read_lines(file: Path) -> Iterator[str]:
    """The lines of a UTF-8 text file. Raises DataError where it is missing or not UTF-8."""
    try:
        with open(file, encoding="utf-8") as lines:
            yield from lines
    except (OSError, UnicodeDecodeError) as error:
        raise DataError([_fault(file, error, "download it again")]) from error


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
        yield Problem(file.name, None, f"{count:,} lines are not UTF-8", remedy)


def _fault(file: Path, error: Exception, remedy: str) -> Problem:
    if not file.is_file():
        there = sorted(other.name for other in file.parent.iterdir()) if file.parent.is_dir() else "no such folder"
        return Problem(file.name, None, f"no such file in {file.parent} (there: {there})", "add it or name its folder")
    return Problem(file.name, None, f"cannot be read: {str(error) or type(error).__name__}", remedy)
