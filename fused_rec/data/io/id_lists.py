"""Files of ids: one id a line, or a table of text or Parquet with a column of ids."""

import re
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

from fused_rec.data.dataset import DataError, Problem
from fused_rec.data.io.arrow import as_ids, pc
from fused_rec.data.io.checks import EXAMPLES
from fused_rec.data.io.files import read_cells, read_lines, read_parquet
from fused_rec.data.io.folder import is_parquet


def read_ids(file: Path, column: str, known: pa.ChunkedArray, remedy: str) -> list[str]:
    """Reads ids from a file.

    Args:
      file: Parquet or text, plain or .gz, with a column of that name, or text with one id a line and no header.
      column: name of the column.
      known: the ids that there are.
      remedy: what to do about an unknown id.

    Returns:
      The distinct ids, in order of first appearance.

    Raises:
      DataError: the file cannot be read, has no id, or has an empty or unknown one; names its row.
    """
    ids, first_row = _ids(file, column)
    if not len(ids):
        raise DataError([Problem(file.name, None, f"it has no {column}", f"write one {column} a line")])
    rows = pc.index_in(ids, value_set=known.combine_chunks()).is_null().to_numpy(zero_copy_only=False).nonzero()[0]
    problems = [
        Problem(
            file.name,
            int(row) + first_row,
            f"{column} {ids[int(row)].as_py()!r} is unknown" if ids[int(row)].is_valid else f"{column} is empty",
            remedy,
        )
        for row in rows[:EXAMPLES]
    ]
    if len(rows) > EXAMPLES:
        message = f"{len(rows):,} rows with an empty or unknown {column} in all"
        problems.append(Problem(file.name, None, message, remedy, len(rows) - EXAMPLES))
    if problems:
        raise DataError(problems)
    return pc.unique(ids).to_pylist()


def _ids(file: Path, column: str) -> tuple[pa.Array, int]:
    """Returns the ids of all rows, and the number of the first row."""
    if is_parquet(file):
        table = read_parquet(file)
        if table.column_names.count(column) != 1:
            found = f"column {column} is missing (there: {', '.join(table.column_names)})"
            raise DataError([Problem(file.name, None, found, "name the column so")])
    else:
        lines = read_lines(file)
        header = next(lines, "").removeprefix("\ufeff")
        if column not in _cells(header):
            return _stripped([header, *lines]), 1
        table, _ = read_cells(file, (column,), ())
    return _stripped(as_ids(table[column]).cast(pa.string()).to_pylist()), 2


def _cells(line: str) -> Sequence[str]:
    return [cell.strip(' "') for cell in re.split("[,;\t|]", line.rstrip("\r\n"))]


def _stripped(ids: Sequence[str | None]) -> pa.Array:
    while ids and not (ids[-1] or "").strip():  # empty lines at the end are no rows
        ids = ids[:-1]
    return pa.array([(text or "").strip() or None for text in ids], pa.string())
