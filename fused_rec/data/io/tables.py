"""User tables -> Dataset: from a folder of files, or from tables in memory.

The folder contains `interactions` and optionally `items`, `users`, `ties`, `reviews`. Each table is one file, Parquet
(`items.parquet`, `.pq`) or text with a header (`items.csv`, `.tsv`, `.txt`, each also `.gz`), or a folder of such files
(`items.parquet/part-0.parquet`, ...). `folder` defines which names are tables; other files that look like tables are
errors.

Text files are UTF-8, or UTF-16 with a byte order mark. Cells are separated by comma, semicolon, tab or pipe, detected
from the header. The settings `delimiter` and `encoding` select others (`dialect`). A row may take 256 MiB.

Columns, optional ones in brackets:

  interactions  user_id, item_id [timestamp, value, text, split]  text: the user's text about the item;
                                                                  split: train, valid or test of a predefined split
  items         item_id [name, text, ...]                         further columns are attributes: numbers where
  users         user_id [name, text, ...]                         every value is one (below), text otherwise
  ties          source_id, target_id [kind, timestamp, item_id]   directed social edges; kind defaults to "tie";
                                                                  item_id: item of the act in which an edge was observed
  reviews       user_id, item_id, text [timestamp]                more texts, also about pairs without interaction

`value` is stored and not used by the model; with `data.min_value`, rows below it are no interactions: their ids and
texts are kept (texts as reviews). Rows without a value stay interactions.

Ids are text: "007" is not "7", and blanks around an id are a fault. Times are unix seconds or ISO 8601, in UTC unless
they have a zone (`times`). In every column of every format, null, NaN, empty and blank texts (quoted or not) are
missing; NA is text. Missing elements are removed from lists; an empty list is a value, a list of only missing elements
is missing. Without `users` or `items`, ids come from `interactions` in order of first appearance. Items and users
without interactions are kept as new (cold-start) items and users.

A CSV attribute is a number where every value, formatted again, gives the same text up to trailing zeros of decimals:
0x1A, 1E5, 007, +5, 1_000, 1,000 and integers above 64 bits are text, and make their column text; the first such value
is noted with its row. Parquet files and data frames may have the types listed in `plain`. An attribute may be a list.

`checks` (one table) and `validate` (between tables) define the faults and their repairs. Reports count the header as
row 1 and do not count blank lines or line breaks inside quotes. Rows of a folder are counted over all its files, with
one header; reports add the file and the row in it.
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
from fused_rec.data.io.validate import ReaderLog, Tables, append_interactions, assemble

# Required and optional columns by table; None: further columns are attributes.
COLUMNS: dict[str, tuple[tuple[str, ...], tuple[str, ...] | None]] = {
    "interactions": (("user_id", "item_id"), ("timestamp", "value", "text", "split")),
    "items": (("item_id",), None),
    "users": (("user_id",), None),
    "ties": (("source_id", "target_id"), ("kind", "timestamp", "item_id")),
    "reviews": (("user_id", "item_id", "text"), ("timestamp",)),
}

_IDS = pa.schema({"user_id": pa.string(), "item_id": pa.string()})
_INDEX = re.compile("__index_level_[0-9]+__")  # pandas' name of an unnamed index


def read_tables(
    path: str | os.PathLike[str],
    *,
    name: str = "tables",
    repair: bool = False,
    min_value: int | float | None = None,
    delimiter: str = "",
    encoding: str = "",
) -> Dataset:
    """Reads and checks the tables of a folder.

    Args:
      path: folder with at least `interactions`.
      name: name of the dataset.
      repair: repairs what can be repaired and counts repairs in `Dataset.repairs`; nothing else changes.
      min_value: minimum `value` of an interaction, as in `fused_rec.config.DataConfig`; None = all rows.
      delimiter: of text files, as in `DataConfig`; empty = detected.
      encoding: of text files, as in `DataConfig`; empty = UTF-8. Other than the expected format is noted.

    Returns:
      The dataset.

    Raises:
      DataError: lists all faults of all files.
      ValueError: a setting is out of bounds.
    """
    DataConfig(delimiter=delimiter, encoding=encoding)
    folder = Path(path).expanduser()
    tables: dict[str, pa.Table] = {}
    files: dict[str, str] = {}
    parts: dict[str, Mapping[str, int]] = {}
    notes: dict[str, int] = {}
    found, problems = find_tables(folder, tuple(COLUMNS))
    if "interactions" not in found and not any(fault.file.startswith("interactions") for fault in problems):
        found_names = sorted(file.name for file in folder.iterdir()) if folder.is_dir() else "no such folder"
        message = f"{folder} has no interactions.csv or interactions.parquet (there: {found_names})"
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
        tables.setdefault("interactions", _IDS.empty_table())
    try:
        log = ReaderLog(notes, problems, files)
        return assemble(name, Tables(**tables), repair=repair, min_value=min_value, log=log)
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
    """Checks tables in memory, with the same columns and checks as files.

    A table is a pandas or polars data frame, an Arrow table, any object with Arrow data (`__arrow_c_stream__`), or a
    dictionary of columns. An unnamed pandas index is not a column. Reports count rows as in a file, from row 2.

    Args:
      interactions: the interactions.
      items: the items; None = the items of the interactions.
      users: the users; None = the users of the interactions.
      ties: the social edges, or None.
      reviews: the reviews, or None.
      name: name of the dataset.
      repair: repairs what can be repaired and counts repairs in `Dataset.repairs`; nothing else changes.
      min_value: minimum `value` of an interaction, as in `fused_rec.config.DataConfig`; None = all rows.

    Returns:
      The dataset.

    Raises:
      DataError: lists all faults of all tables.
      TypeError: an argument is no table.

    Example:
      held = {"user_id": ["ann", "bob", "bob"], "item_id": ["fund", "fund", "bond"]}
      dataset = fr.dataset_from_tables(held, ties={"source_id": ["bob"], "target_id": ["ann"]})
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
    tables.setdefault("interactions", _IDS.empty_table())
    log = ReaderLog(notes, problems)
    return assemble(name, Tables(**tables), repair=repair, min_value=min_value, log=log)


def with_interactions(dataset: Dataset, interactions: Any, min_value: int | float | None = None) -> Dataset:
    """Appends interactions of known users and items to a dataset.

    Args:
      dataset: the tables.
      interactions: a table, as of `dataset_from_tables`, without texts.
      min_value: as of `dataset_from_tables`.

    Returns:
      Tables with other interactions. Of rows with the same pair, old ones among them, the earliest is kept.

    Raises:
      DataError: lists all faults, unknown ids, texts and columns that the format does not have among them.
      TypeError: `interactions` is no table.
    """
    given, (required, optional) = _arrow(interactions, "interactions"), COLUMNS["interactions"]
    columns = (*required, *(optional or ()))
    remedy = f"leave it out, or name it as one of {', '.join(columns)}"
    faults = [f"column {name!r} would not be read" for name in given.column_names if name not in columns]
    if faults:
        raise DataError([Problem("interactions", None, fault, remedy) for fault in faults])
    table = select(given, "interactions", "interactions", {}, typed=True)
    return append_interactions(dataset, table, min_value)


def _arrow(frame: Any, name: str) -> pa.Table:
    """Converts an object with Arrow data to an Arrow table, with plain types where possible."""
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
    """Finds the columns of a dictionary or data frame that Arrow cannot convert."""
    problems = []
    columns = list(frame) if isinstance(frame, Mapping) else list(getattr(frame, "columns", ()))
    for column in columns:
        try:
            plain_table(pa.table({column: frame[column]} if isinstance(frame, Mapping) else frame[[column]]))
        except (pa.ArrowException, OverflowError, TypeError, ValueError) as error:
            problems.append(_fault(name, f"column {column} ", error))
    return problems


def _fault(name: str, what: str, error: Exception) -> Problem:
    """Describes a table or column that Arrow cannot convert."""
    remedy = "give columns of one length, each of one type"
    return Problem(name, None, f"{what}cannot be made an Arrow table: {error}", remedy)


def _located(problem: Problem, parts: Mapping[str, int]) -> Problem:
    """Adds the file and row of a table in several files; `parts` has the number of rows by file, in order."""
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
    """Reads a file or folder: the table, whether its columns are typed, and the number of rows by file of a folder.

    `notes` gets the format of text files where it is not the expected one, with the number of files.
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
    """Selects the columns of the format and converts numeric text attributes.

    Args:
      table: a table as read.
      name: its name, a key of `COLUMNS`.
      file: name of its file, for messages.
      notes: gets the columns that are not read, and the attributes kept as text because of a value.
      typed: whether attributes have types already; otherwise they are parsed from text.

    Returns:
      The table with the columns of the format.

    Raises:
      DataError: a required column is missing, or a column occurs twice.
    """
    required, optional = COLUMNS[name]
    names = table.column_names
    faults = [f"column {column} is missing (there: {', '.join(names)})" for column in required if column not in names]
    faults += [
        f"column {column} occurs {names.count(column)} times" for column in set(names) if names.count(column) > 1
    ]
    if faults:
        raise DataError([Problem(file, None, fault, "name the columns as the format does") for fault in faults])
    if optional is not None:
        unread = [column for column in names if column not in required + optional]
        notes.update({f"{name}: column {column!r}, which the format does not have, not read": 1 for column in unread})
        return table.drop_columns(unread)
    if not typed:
        for column in [column for column in names if column not in (*required, "name", "text")]:
            read, odd = typed_from_text(table[column])
            table = replace(table, column, read)
            if odd is not None:
                value = str(read[odd].as_py())[:60]
                because = f"because of {value!r} in row {odd + 2}, which is not a plain number"
                notes[f"{file}: {column} read as text {because}"] = 1
    return table
