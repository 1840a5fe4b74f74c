"""Your own tables -> Dataset: a folder of files, or tables in memory.

The folder holds `interactions` and, where you have them, `items`, `users`, `ties` and `reviews`, each one file, Parquet
(`items.parquet`, `.pq`) or text with a header (`items.csv`, `.tsv`, `.txt`, each also `.gz`), or a folder of such files
(`items.parquet/part-0.parquet`, ...), which are one table. `folder` says which names are tables: whatever is named
after one, or has the ending of a table format, is read or refused by name.

Texts are UTF-8, or UTF-16 by its mark; cells are divided by comma, semicolon, tab or pipe, found from the header. The
settings `delimiter` and `encoding` name others (`dialect`). A row of text may take 256 MiB.

Columns, those in brackets optional:

  interactions  user_id, item_id [timestamp, value, text, part]   text: the user's own words about the item;
                                                                  part: train, valid or test of a published split
  items         item_id [name, text, ...]                         further columns are attributes: numbers where
  users         user_id [name, text, ...]                         every value is one (below), text otherwise
  ties          source_id, target_id [kind, timestamp, item_id]   directed; kind is "tie" unless given; item_id: the
                                                                  item of the act in which the tie was seen
  reviews       user_id, item_id, text [timestamp]                more words about a pair, or about one that is no
                                                                  interaction

`value` is kept and no model uses it, except that rows below `data.min_value`, where that is set, are no interactions:
they count for nothing but the ids in them, and their texts stay as reviews. Rows without a value stay interactions.

Ids are text: "007" is not "7", and blanks around one are a fault. Times are unix seconds or ISO 8601, in UTC unless
they name a zone (`times`). Missing is, in every column of every format: null, NaN, an empty and a blank text, in quotes
or not; NA is a word. Missing elements of lists are left out; a list without elements says that there are none, and one
of missing elements alone is missing. Without `users` or `items` the ids come from `interactions`, in order of first
appearance. Items without interactions are new products, users without them new customers.

An attribute in CSV is a number where every value, written back, gives the same text, zeros at the end of decimals
apart: 0x1A, 1E5, 007, +5, 1_000, 1,000 and integers of more than 64 bits are text, and make their column text. Which
column such a value turned to text is noted, with its row. Parquet and frames may have the types that `plain` lists. An
attribute may be a list of values.

What is checked, and what a repair makes of each fault, stands in `checks` (one table) and `validate` (between
tables). Reports count rows with the header as row 1; blank lines and line breaks inside quotes are not counted.
Rows of a folder are counted over all its parts, with one header, and the report adds the part and the row in it.
"""

import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from fused_rec.config import DataConfig
from fused_rec.data.dataset import DataError, Dataset, Problem
from fused_rec.data.io.arrow import replace
from fused_rec.data.io.files import join_parts, read_cells, read_parquet
from fused_rec.data.io.folder import find_tables, is_parquet, list_parts
from fused_rec.data.io.numbers import typed as typed_from_text
from fused_rec.data.io.plain import plain_table
from fused_rec.data.io.times import periods_as_times
from fused_rec.data.io.validate import Tables, assemble

# table -> its required and its optional columns; None: further columns are attributes.
COLUMNS: dict[str, tuple[tuple[str, ...], tuple[str, ...] | None]] = {
    "interactions": (("user_id", "item_id"), ("timestamp", "value", "text", "split")),
    "items": (("item_id",), None),
    "users": (("user_id",), None),
    "ties": (("source_id", "target_id"), ("kind", "timestamp", "item_id")),
    "reviews": (("user_id", "item_id", "text"), ("timestamp",)),
}

_NONE = pa.table({"user_id": pa.array([], pa.string()), "item_id": pa.array([], pa.string())})
_INDEX = re.compile("__index_level_[0-9]+__")  # what pandas calls an index without a name


def read_tables(
    path: str | os.PathLike[str],
    *,
    name: str = "tables",
    repair: bool = False,
    min_value: int | float | None = None,
    delimiter: str = "",
    encoding: str = "",
) -> Dataset:
    """The dataset in folder `path`, checked.

    repair: mends what can be mended, counts each repair in `Dataset.repairs`, and changes nothing else.
    min_value: what `value` must reach for a row to be an interaction, as in `fused_rec.config.DataConfig`.
    delimiter, encoding: of text files, as in `DataConfig`; how a file is read is noted where it is not as expected.

    Raises DataError with every problem found in any of the files, and ValueError for settings out of their bounds.
    """
    DataConfig(delimiter=delimiter, encoding=encoding)
    folder = Path(path).expanduser()
    tables: dict[str, pa.Table] = {}
    files: dict[str, str] = {}
    parts: dict[str, Mapping[str, int]] = {}
    notes: dict[str, int] = {}
    found, problems = find_tables(folder, tuple(COLUMNS))
    if "interactions" not in found and not any(fault.file.startswith("interactions") for fault in problems):
        there = sorted(file.name for file in folder.iterdir()) if folder.is_dir() else "no such folder"
        message = f"{folder} holds no interactions.csv or interactions.parquet (there: {there})"
        problems.append(Problem("interactions", None, message, "add one of them, or name the folder that has it"))
    for table, file in found.items():
        try:
            files[table] = file.name
            read, typed, counts = _read(table, file, notes, delimiter, encoding)
            parts[file.name] = counts
            tables[table] = select(read, table, file.name, notes, typed=typed)
        except DataError as error:
            problems += error.problems
    if problems:
        tables.setdefault("interactions", _NONE)
    try:
        return assemble(
            name,
            Tables(**tables),
            repair=repair,
            min_value=min_value,
            notes=notes,
            problems=problems,
            files=files,
        )
    except DataError as error:
        raise DataError([_located(problem, parts.get(problem.file, {})) for problem in error.problems]) from error


def dataset_from_tables(
    interactions: Any,
    *,
    items: Any = None,
    users: Any = None,
    ties: Any = None,
    reviews: Any = None,
    name: str = "tables",
    repair: bool = False,
    min_value: int | float | None = None,
) -> Dataset:
    """The dataset of tables in memory, with the columns and the checks of files.

    Each is a pandas or polars frame, an Arrow table, whatever else hands over Arrow data (`__arrow_c_stream__`), or a
    dictionary of columns. A pandas index that has no name is no column. Reports count rows as those of a file, whose
    header is row 1.

    repair: mends what can be mended, counts each repair in `Dataset.repairs`, and changes nothing else.
    min_value: what `value` must reach for a row to be an interaction, as in `fused_rec.config.DataConfig`.
    Raises DataError with every problem found in any of the tables, and TypeError for what is no table.
    """
    given = {"interactions": interactions, "items": items, "users": users, "ties": ties, "reviews": reviews}
    tables: dict[str, pa.Table] = {}
    notes: dict[str, int] = {}
    problems: list[Problem] = []
    for table, frame in given.items():
        try:
            if frame is not None:
                tables[table] = select(_arrow(frame, table), table, table, notes, typed=True)
        except DataError as error:
            problems += error.problems
    tables.setdefault("interactions", _NONE)
    return assemble(name, Tables(**tables), repair=repair, min_value=min_value, notes=notes, problems=problems)


def _arrow(frame: Any, name: str) -> pa.Table:
    """The columns of whatever hands over Arrow data, plain where they can be."""
    if isinstance(frame, Mapping):
        frame = dict(frame)
    elif not isinstance(frame, pa.Table) and not hasattr(frame, "__arrow_c_stream__"):
        raise TypeError(f"{name} is a {type(frame).__name__}; give a data frame, an Arrow table or a dict of columns")
    try:
        table = pa.table(frame)
        if not isinstance(frame, Mapping | pa.Table):
            table = table.drop_columns([index for index in table.column_names if _INDEX.fullmatch(index)])
        return plain_table(periods_as_times(table))
    except (pa.ArrowException, OverflowError, TypeError, ValueError) as error:
        raise DataError(_unreadable(frame, name) or [_fault(name, "", error)]) from error


def _unreadable(frame: Any, name: str) -> list[Problem]:
    """The columns of a dictionary or data frame that Arrow cannot take."""
    problems = []
    columns = list(frame) if isinstance(frame, Mapping) else list(getattr(frame, "columns", ()))
    for column in columns:
        try:
            plain_table(pa.table({column: frame[column]} if isinstance(frame, Mapping) else frame[[column]]))
        except (pa.ArrowException, OverflowError, TypeError, ValueError) as error:
            problems.append(_fault(name, f"column {column} ", error))
    return problems


def _fault(name: str, what: str, error: Exception) -> Problem:
    remedy = "give columns of one length, each of one type"
    return Problem(name, None, f"{what}cannot be made an Arrow table: {error}", remedy)


def _located(problem: Problem, parts: Mapping[str, int]) -> Problem:
    """The problem, with the part that its row is in. parts: how many rows each has, by name, in their order."""
    if problem.row is None:
        return problem
    row = problem.row
    for name, count in parts.items():
        if row <= count + 1:
            return dataclasses.replace(problem, message=f"{problem.message} (row {row} of {name})")
        row -= count
    return problem


def _read(
    table: str, path: Path, notes: dict[str, int], delimiter: str, encoding: str
) -> tuple[pa.Table, bool, dict[str, int]]:
    """The table as its file or folder holds it, whether its columns have types, and the rows of each part of a folder.

    notes: gets how its texts are written where that is not as expected, counted by files.
    """
    required, optional = COLUMNS[table]

    def cells(file: Path) -> pa.Table:
        read, note = read_cells(file, required, optional or ("name", "text"), delimiter, encoding)
        if note:
            note = note.replace(file.name, path.name, 1)
            notes[note] = notes.get(note, 0) + 1
        return read

    if not path.is_dir():
        return (read_parquet(path), True, {}) if is_parquet(path) else (cells(path), False, {})
    parts = list_parts(path)
    typed = is_parquet(parts[0].file)
    rows, counts = join_parts(path, parts, read_parquet if typed else cells)
    return rows, typed, counts


def select(table: pa.Table, name: str, file: str, notes: dict[str, int], *, typed: bool) -> pa.Table:
    """The columns of the format. typed: attributes have types already, and are not to be read from text.

    notes: gets the columns that are not read, and those of codes that are read as text. Raises DataError where a column
    is missing or there twice.
    """
    required, optional = COLUMNS[name]
    there = table.column_names
    faults = [f"column {column} is missing (there: {', '.join(there)})" for column in required if column not in there]
    faults += [
        f"column {column} is there {there.count(column)} times" for column in set(there) if there.count(column) > 1
    ]
    if faults:
        raise DataError([Problem(file, None, fault, "name the columns as the format does") for fault in faults])
    if optional is not None:
        unread = [column for column in there if column not in required + optional]
        notes.update({f"{name}: column {column!r}, which the format does not have, not read": 1 for column in unread})
        return table.drop_columns(unread)
    if not typed:
        for column in [column for column in there if column not in (*required, "name", "text")]:
            read, odd = typed_from_text(table[column])
            table = replace(table, column, read)
            if odd is not None:
                value = str(read[odd].as_py())[:60]
                because = f"because of {value!r} in row {odd + 2}, which is not a plain number"
                notes[f"{file}: {column} read as text {because}"] = 1
    return table
