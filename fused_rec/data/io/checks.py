"""Checks of one table, column by column.

Missing values are already null (`arrow.known`). Each check takes a table and its `Report`, adds the faulty
rows to the report and returns the repaired table, so that all checks run and one report lists all faults.
"""

import dataclasses
import re
from collections.abc import Callable

import numpy as np
import pyarrow as pa
from jaxtyping import Bool

from fused_rec.data.dataset import Problem
from fused_rec.data.io.arrow import as_ids, by_code, flags, is_blank, one_chunk, pc, read_texts, replace, trimmed
from fused_rec.data.io.plain import is_plain, is_single
from fused_rec.data.io.times import REMEDY, read_times

SPLIT_NAMES = ("train", "valid", "test")
EXAMPLES = 5  # rows listed of one kind of fault
SHOWN = 60  # characters shown of a value
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?|[+-]?(nan|inf|infinity)", re.IGNORECASE)
ROW = "row in the file"  # column of a table under check
_THOUSANDS = r"[+-]?\d{1,3}([,.' \u00a0\u202f\u2019]\d{3})+([,.]\d+)?"


@dataclasses.dataclass(frozen=True)
class Finding:
    """Faults of one kind in one table.

    Attributes:
      kind: name of the kind of fault.
      table: name of the table.
      count: number of faulty rows.
      examples: the first of them as (row, message); a fault of a whole column has one example without a row.
      remedy: what to do about it.
      repaired: what a repair does, None where it cannot be repaired.
    """

    kind: str
    table: str
    count: int
    examples: tuple[tuple[int | None, str], ...]
    remedy: str
    repaired: str | None

    def problems(self, file: str) -> list[Problem]:
        """Lists the examples as problems of `file`, and one more with the total where not all rows are listed."""
        repairable = self.repaired is not None
        shown = [Problem(file, row, message, self.remedy, repairable=repairable) for row, message in self.examples]
        if self.count > len(shown):
            total = f"{self.kind}: {self.count:,} rows in all, the first {len(shown)} listed"
            shown.append(Problem(file, None, total, self.remedy, self.count - len(shown), repairable))
        return shown


@dataclasses.dataclass(frozen=True)
class Report:
    """Collector of the findings and notes of one table; reports of several tables may share both collections."""

    table: str
    findings: list[Finding]
    notes: dict[str, int]

    def add(
        self,
        kind: str,
        rows: pa.Table,
        bad: Bool[np.ndarray, "R"],
        message: Callable[[int], str],
        remedy: str,
        repaired: str | None = None,
    ) -> None:
        """Adds a finding, unless no row is faulty.

        Args:
          kind: name of the kind of fault.
          rows: R rows with column ROW, their row in the file.
          bad: which rows are faulty.
          message: describes the fault of the r-th row.
          remedy: what to do about it.
          repaired: what a repair does, None where it cannot be repaired.
        """
        if bad.any():
            first = np.flatnonzero(bad)[:EXAMPLES].tolist()
            examples = tuple((rows[ROW][r].as_py(), message(r)) for r in first)
            self.findings.append(Finding(kind, self.table, int(bad.sum()), examples, remedy, repaired))

    def column(self, message: str, remedy: str, repaired: str | None = None) -> None:
        """Adds a fault of a whole column."""
        self.findings.append(Finding("column", self.table, 1, ((None, message),), remedy, repaired))

    def note(self, what: str, count: int) -> None:
        """Adds a note on what is no fault, unless `count` is 0."""
        if count:
            self.notes[f"{self.table}: {what}"] = count


def check_ids(table: pa.Table, report: Report, *names: str) -> pa.Table:
    """Checks id columns.

    Args:
      table: a table as read.
      report: gets the faults.
      *names: the id columns.

    Returns:
      The table with column ROW (the header is row 1), ids as string dictionaries, without rows that lack an id.
    """
    reserved = ROW in table.column_names
    table = table.drop_columns([ROW] if reserved else [])
    table = table.append_column(ROW, pa.array(np.arange(2, len(table) + 2, dtype=np.uint32)))
    found = f"a column is called {ROW!r}, a name that is reserved"
    report.add("reserved name", table, np.full(len(table), reserved), lambda r: found, "give it another name")
    table = _readable(table, report, names)
    keep = np.ones(len(table), bool)
    for name in names:
        ids = _ids(table, name, report)
        empty = _are_empty(ids)
        if _is_id(table[name].type) or table[name].null_count == len(table):
            report.add("empty id", table, empty, lambda r, n=name: f"{n} is empty", "give it an id or remove the row")
        table = replace(table, name, ids)
        keep &= ~empty
    return table if keep.all() else table.filter(pa.array(keep))


def _are_empty(ids: pa.ChunkedArray) -> Bool[np.ndarray, "R"]:
    """Returns which ids (type `ID`) are null or blank, by the dictionary: a table has fewer ids than rows."""
    encoded = one_chunk(ids)
    return by_code(encoded, is_blank(encoded.dictionary), np.True_)


def _readable(table: pa.Table, report: Report, names: tuple[str, ...]) -> pa.Table:
    """Drops columns, except `names`, whose type cannot be read."""
    for field in [field for field in table.schema if field.name not in names and not _is_readable(field.type)]:
        found = f"{field.name} holds {field.type} values"
        if (report.table, field.name) == ("interactions", "value"):  # where required, `check_values` reports it
            report.note(f"{found}, not read", len(table))
        else:
            attribute = report.table in ("users", "items") and field.name not in ("text", "name")
            remedy = "write it as text, numbers, dates or lists of these, or leave the column out"
            report.column(found, remedy, f"column {field.name} of {field.type} left out" if attribute else None)
        table = table.drop_columns([field.name])
    return table


def _is_readable(kind: pa.DataType) -> bool:
    """Returns whether a type is plain or a dictionary of plain values."""
    return is_plain(kind.value_type if pa.types.is_dictionary(kind) else kind)


def _ids(table: pa.Table, name: str, report: Report) -> pa.ChunkedArray:
    """Reads an id column as type `ID`, stripped; all null, with a fault, where its type cannot be an id."""
    given = table[name]
    if not _is_id(given.type):
        remedy = "write ids as text or integers"
        found = f"{name} holds {given.type} values such as"
        report.add("id type", table, flags(pc.is_valid(given)), lambda r: f"{found} {_shown(given, r)}", remedy)
        none = pa.chunked_array([pa.nulls(len(table), pa.string())])
    ids, padded = trimmed(as_ids(given if _is_id(given.type) else none))
    report.add(
        "blanks around an id",
        table,
        padded,
        lambda r: f"{name} {given[r].as_py()!r} has blanks around it, and would differ from {ids[r].as_py()!r}",
        "write ids without blanks around them",
        f"blanks around {name} removed",
    )
    return ids


def check_times(table: pa.Table, report: Report) -> pa.Table:
    """Reads `timestamp` as int64 unix seconds, null where missing; drops the column where no row has a time."""
    if "timestamp" not in table.column_names:
        return table
    given = table["timestamp"]
    if not _may_be_time(given.type):
        report.column(f"timestamp holds {given.type} values", "give unix seconds or ISO 8601, or leave the column out")
        return table.drop_columns(["timestamp"])
    times = read_times(given, zero=report.table in ("ties", "reviews"))
    bad = times.faults != 0
    # Where most times are invalid, the column has another meaning; clearing it would hide that.
    repaired = "bad times left empty" if times.good.sum() >= bad.sum() else None
    report.add("bad time", table, bad, lambda r: f"timestamp {_shown(given, r)!r} {times.says(r)}", REMEDY, repaired)
    if not times.good.any():
        return table.drop_columns(["timestamp"])
    return replace(table, "timestamp", pa.array(times.seconds, mask=~times.good))


def check_texts(table: pa.Table, report: Report) -> pa.Table:
    """Reads `text` and `name` as strings, null where missing."""
    for name in [column for column in ("text", "name") if column in table.column_names]:
        table = replace(table, name, _strings(table, name, report))
    return table


def check_values(table: pa.Table, report: Report, least: int | float | None = None) -> pa.Table:
    """Reads `value` as floats, null where it is missing or not finite as float32.

    Args:
      table: the interactions.
      report: gets the faults and notes.
      least: minimum value of an interaction, `data.min_value`. Only with a minimum is an unreadable value a fault;
        without, it is cleared and noted.

    Returns:
      The table with `value` as float64 (float32 where given as that), so that `least` is compared before rounding.
    """
    if "value" not in table.column_names:
        if least is not None:
            remedy = "add numbers, or leave data.min_value out"
            report.column(f"there is no column value that can be read, and data.min_value is {least}", remedy)
        return table
    given = table["value"]
    remedy = "give finite numbers, with a point for decimals and nothing between thousands, or leave the cell empty"
    if not (_is_number(given.type) or _is_text(given.type) or pa.types.is_null(given.type)):
        if least is None:
            report.note(f"value holds {given.type} values, not read", len(table))
        else:
            report.column(f"value holds {given.type} values", remedy)
        return replace(table, "value", pa.nulls(len(table), pa.float32()))
    numbers, readable = _as_numbers(given)
    with np.errstate(over="ignore"):  # a number too large for float32 turns infinite, and is reported as that
        infinite = readable & np.isinf(numbers.astype(np.float32))
    faults = (
        ("unreadable value", flags(pc.is_valid(given)) & ~readable, lambda r: f"is not a number{_why(given, r)}"),
        ("value not finite", infinite, lambda r: "is not a finite 32-bit number"),
    )
    for kind, bad, why in faults:
        if least is not None:
            report.add(kind, table, bad, lambda r, w=why: f"value {_shown(given, r)!r} {w(r)}", remedy)
        elif bad.any():
            row = int(np.flatnonzero(bad)[0])
            first = f"the first in row {table[ROW][row]}: {_shown(given, row)!r} {why(row)}"
            report.note(f"{kind} left empty, {first}", int(bad.sum()))
    kind = np.float32 if pa.types.is_float32(given.type) else np.float64
    return replace(table, "value", pa.array(numbers.astype(kind), mask=~readable | infinite | np.isnan(numbers)))


def _why(column: pa.ChunkedArray, row: int) -> str:
    """Explains the number formats of spreadsheets that are not read as numbers."""
    text = str(column[row].as_py()).strip()
    if re.fullmatch(r"[+-]?\d{1,3},\d{3}", text):
        return " (a thousands separator or a decimal comma is in it)"
    if re.fullmatch(_THOUSANDS, text):
        return " (a thousands separator is in it)"
    return " (a decimal comma is in it)" if re.fullmatch(r"[+-]?\d*,\d+", text) else ""


def check_splits(table: pa.Table, report: Report) -> pa.Table:
    """Reads `split` as strings and checks their values."""
    if "split" not in table.column_names:
        return table
    names = _strings(table, "split", report)
    unknown = ~flags(pc.is_in(names, value_set=pa.array(SPLIT_NAMES)))
    report.add("unknown split", table, unknown, lambda r: f"split is {names[r].as_py()!r}", f"use one of {SPLIT_NAMES}")
    return replace(table, "split", names)


def check_kinds(table: pa.Table, report: Report) -> pa.Table:
    """Reads `kind` as strings, null where missing."""
    if "kind" not in table.column_names:
        return table
    table = replace(table, "kind", _strings(table, "kind", report))
    _note_padded(table, "kind", report)
    return table


def _note_padded(table: pa.Table, name: str, report: Report) -> None:
    """Notes values that differ from others only by blanks around them."""
    column = table[name]
    if not _is_text(column.type):
        return
    values = pc.unique(column.cast(pa.string()))
    bare = pc.utf8_trim_whitespace(values)
    twins = values.filter(pc.and_(pc.not_equal(bare, values), pc.is_in(bare, value_set=values)))
    if len(twins):
        rows = int(flags(pc.is_in(column.cast(pa.string()), value_set=twins)).sum())
        found = (
            f"values of {name} that differ from others only by blanks around them, such as {twins[0].as_py()[:SHOWN]!r}"
        )
        report.note(f"{found}, kept apart", rows)


def check_acts(table: pa.Table, report: Report) -> pa.Table:
    """Reads `item_id` of ties as string dictionaries, null where missing; drops the column where all are."""
    if "item_id" not in table.column_names:
        return table
    ids = _ids(table, "item_id", report)
    return table.drop_columns(["item_id"]) if ids.null_count == len(ids) else replace(table, "item_id", ids)


def check_attributes(table: pa.Table, report: Report) -> pa.Table:
    """Checks attributes; infinite values of floating-point columns are faults and become null."""
    for name in [name for name in table.column_names if name not in ("text", "name", "user_id", "item_id", ROW)]:
        _note_padded(table, name, report)
    for name in [field.name for field in table.schema if pa.types.is_floating(field.type)]:
        numbers = table[name]
        bad = flags(pc.is_inf(numbers))
        report.add(
            "value not finite",
            table,
            bad,
            lambda r, n=name, v=numbers: f"{n} is {v[r].as_py()}",
            "leave the cell empty where there is no value",
            f"infinite {name} left empty",
        )
        if bad.any():
            table = replace(table, name, pc.if_else(pa.array(bad), pa.scalar(None, numbers.type), numbers))
    return table


def _strings(table: pa.Table, name: str, report: Report) -> pa.ChunkedArray:
    """Reads a column as strings; all null, with a fault, where its type has no text form."""
    given = table[name]
    if _is_text(given.type) or is_single(given.type):
        return given.cast(pa.string())
    report.column(f"{name} holds {given.type} values", "write it as text or numbers")
    return pa.chunked_array([pa.nulls(len(table), pa.string())])


def _shown(column: pa.ChunkedArray, row: int) -> str:
    """Formats a value for a message."""
    try:
        text = str(column[row])
        return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
    except (pa.ArrowException, ValueError, OverflowError):  # times out of range of Python's datetime
        return f"out of range of {column.type}"


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind.value_type if pa.types.is_dictionary(kind) else kind)


def _is_id(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    whole = pa.types.is_decimal(kind) and kind.scale == 0  # integer ids of databases without an integer type
    return _is_text(kind) or pa.types.is_integer(kind) or pa.types.is_null(kind) or whole


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_decimal(kind)


def _may_be_time(kind: pa.DataType) -> bool:
    dates = pa.types.is_date(kind) or pa.types.is_timestamp(kind)
    return dates or _is_text(kind) or _is_number(kind) or pa.types.is_null(kind)


def _as_numbers(column: pa.ChunkedArray) -> tuple[np.ndarray, Bool[np.ndarray, "R"]]:
    """Converts a column to float64 (0 where missing) and a mask of the rows that are numbers."""
    if not _is_number(column.type):
        column = read_texts(column.cast(pa.string()), (_as_floats,), _as_float, pa.float64())
    numbers = column.cast(pa.float64(), safe=False)
    return np.asarray(pc.fill_null(numbers, 0.0)), flags(pc.is_valid(numbers))


def _as_floats(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return column.cast(pa.float64())


def _as_float(value: str) -> float | None:
    text = value.strip()
    return float(text) if _NUMBER.fullmatch(text) else None  # float() also takes 1_0 and other digits
