"""What can be wrong inside one table, column by column.

Each check takes a table and its `Report`, notes there the rows at fault, and hands back the table as a repair
would leave it, so that every check runs and one report names every fault.
"""

import dataclasses
import re
from collections.abc import Callable

import numpy as np
import pyarrow as pa
from jaxtyping import Bool

from fused_rec.data.arrow import ID, as_ids, flags, pc, read_texts, replace
from fused_rec.data.dataset import Problem
from fused_rec.data.times import EARLIEST, LATEST, parse_times

PARTS = ("train", "valid", "test")
EXAMPLES = 5  # rows shown of one kind of fault
ROW = "row in the file"  # column of a table under check


@dataclasses.dataclass(frozen=True)
class Finding:
    """One kind of fault in one table: examples are (row, message), mended is what a repair does, if it can."""

    kind: str
    table: str
    count: int
    examples: tuple[tuple[int, str], ...]
    remedy: str
    mended: str | None

    def problems(self, file: str) -> list[Problem]:
        """The examples, and one problem more that states the total where there are more rows than examples."""
        shown = [Problem(file, row, message, self.remedy) for row, message in self.examples]
        if self.count > len(shown):
            total = f"{self.kind}: {self.count:,} rows in all, the first {len(shown)} listed"
            shown.append(Problem(file, None, total, self.remedy))
        return shown


@dataclasses.dataclass(frozen=True)
class Report:
    """Collects the findings of one table; several reports may share one list."""

    table: str
    findings: list[Finding]

    def add(
        self,
        kind: str,
        rows: pa.Table,
        bad: Bool[np.ndarray, "R"],
        message: Callable[[int], str],
        remedy: str,
        mended: str | None = None,
    ) -> None:
        """Notes the rows at fault; message(r) describes the r-th of `rows`, whose ROW is its place in the file."""
        if bad.any():
            first = np.flatnonzero(bad)[:EXAMPLES].tolist()
            examples = tuple((rows[ROW][r].as_py(), message(r)) for r in first)
            self.findings.append(Finding(kind, self.table, int(bad.sum()), examples, remedy, mended))


def check_ids(table: pa.Table, report: Report, *names: str) -> pa.Table:
    """The table with ROW (the header is row 1), ids as string dictionaries, and rows without an id left out."""
    taken = ROW in table.column_names
    table = table.drop_columns([ROW] if taken else [])
    table = table.append_column(ROW, pa.array(np.arange(2, len(table) + 2)))
    found = f"a column is called {ROW!r}, as reports call the place of a row"
    report.add("taken name", table, np.full(len(table), taken), lambda r: found, "give it another name")
    keep = np.ones(len(table), bool)
    for name in names:
        given = table[name]
        if _is_id(given.type):
            ids = as_ids(given)
            empty = flags(pc.is_null(ids)) | flags(_is_blank(ids.cast(pa.string())))
            report.add("empty id", table, empty, lambda r, n=name: f"{n} is empty", "give it an id or remove the row")
        else:
            ids = pa.chunked_array([pa.nulls(len(table), ID)])
            empty = np.ones(len(table), bool)
            found = f"{name} holds {given.type} values such as {{}}"
            remedy = "write ids as text or integers"
            report.add("id type", table, empty, lambda r, f=found, g=given: f.format(_shown(g, r)), remedy)
        table = replace(table, name, ids)
        keep &= ~empty
    return table if keep.all() else table.filter(pa.array(keep))


def check_times(table: pa.Table, report: Report) -> pa.Table:
    """`timestamp` as int64 unix seconds, null where there is none; no such column where no row has a time."""
    if "timestamp" not in table.column_names:
        return table
    given = table["timestamp"]
    seconds, readable = parse_times(given)
    good = readable & (seconds >= EARLIEST) & (seconds < LATEST)
    bad = flags(pc.is_valid(given)) & ~good

    def message(r: int) -> str:
        value = f"timestamp {_shown(given, r)!r}"
        if not readable[r]:
            return f"{value} is not a time"
        if seconds[r] < EARLIEST:
            return f"{value} is before 1970"
        milliseconds = seconds[r] // 1000 < LATEST
        return f"{value} is after 2100" + (" (milliseconds? divide them by 1000)" if milliseconds else "")

    # Where most times are bad the column means something else, and emptying it would only hide that.
    mended = "bad times left empty" if good.sum() >= bad.sum() else None
    remedy = "give unix seconds or ISO 8601 such as 2024-05-31T09:30:00Z, from 1970 to 2099"
    report.add("bad time", table, bad, message, remedy, mended)
    if not good.any():
        return table.drop_columns(["timestamp"])
    return replace(table, "timestamp", pa.array(seconds, mask=~good))


def check_texts(table: pa.Table, report: Report) -> pa.Table:
    """`text` and `name` as strings, null where they say nothing."""
    for name in [column for column in ("text", "name") if column in table.column_names]:
        texts = _strings(table, name, report)
        blank = flags(_is_blank(texts))
        report.add(
            "empty text",
            table,
            blank,
            lambda r, n=name, t=texts: f"{n} is {t[r].as_py()!r}",
            "leave the cell empty (null) where there is no text",
            f"empty {name} made null",
        )
        if blank.any():
            texts = pc.if_else(pa.array(blank), pa.scalar(None, pa.string()), texts)
        table = replace(table, name, texts)
    return table


def check_values(table: pa.Table, report: Report) -> pa.Table:
    """`value` as float32, null where there is none."""
    if "value" not in table.column_names:
        return table
    given = table["value"]
    if not (pa.types.is_floating(given.type) or pa.types.is_integer(given.type)):
        given = _strings(table, "value", report)
    numbers, readable = _as_numbers(given)
    remedy = "give finite numbers, with a point for decimals, or leave the cell empty"
    unreadable = flags(pc.is_valid(given)) & ~readable
    report.add(
        "unreadable value",
        table,
        unreadable,
        lambda r: f"value {_shown(given, r)!r} is not a number{_comma(_shown(given, r))}",
        remedy,
    )
    with np.errstate(over="ignore"):  # a number too large for float32 turns infinite, and is reported as that
        values = numbers.astype(np.float32)
    infinite = readable & ~np.isfinite(values)
    report.add(
        "value not finite",
        table,
        infinite,
        lambda r: f"value {_shown(given, r)!r} is not a finite 32-bit number",
        remedy,
        "NaN or infinite value left empty",
    )
    return replace(table, "value", pa.array(values, mask=~readable | infinite))


def check_parts(table: pa.Table, report: Report) -> pa.Table:
    """`part` as strings."""
    if "part" not in table.column_names:
        return table
    parts = _strings(table, "part", report)
    unknown = ~flags(pc.is_in(parts, value_set=pa.array(PARTS)))
    report.add("unknown part", table, unknown, lambda r: f"part is {parts[r].as_py()!r}", f"use one of {PARTS}")
    return replace(table, "part", parts)


def check_kinds(table: pa.Table, report: Report) -> pa.Table:
    """`kind` as strings, null where there is none."""
    if "kind" not in table.column_names:
        return table
    return replace(table, "kind", _strings(table, "kind", report))


def check_acts(table: pa.Table, report: Report) -> pa.Table:
    """`item_id` of ties as string dictionaries, null where a tie was seen in no act; no such column where none was."""
    if "item_id" not in table.column_names:
        return table
    given = table["item_id"]
    if _is_id(given.type):
        return replace(table, "item_id", as_ids(given))
    if not pa.types.is_null(given.type):
        found = f"item_id holds {given.type} values"
        report.add("id type", table, flags(pc.is_valid(given)), lambda r: found, "write ids as text or integers")
    return table.drop_columns(["item_id"])


def check_attributes(table: pa.Table, report: Report) -> pa.Table:
    """Floating-point attributes with null in place of NaN and infinity."""
    for name in [field.name for field in table.schema if pa.types.is_floating(field.type)]:
        numbers = table[name]
        bad = ~flags(pc.is_finite(numbers)) & flags(pc.is_valid(numbers))
        report.add(
            "value not finite",
            table,
            bad,
            lambda r, n=name, v=numbers: f"{n} is {v[r].as_py()}",
            "leave the cell empty where there is no value",
            f"NaN or infinite {name} left empty",
        )
        if bad.any():
            table = replace(table, name, pc.if_else(pa.array(bad), pa.scalar(None, numbers.type), numbers))
    return table


def _strings(table: pa.Table, name: str, report: Report) -> pa.ChunkedArray:
    """A column as strings; all null, and told, where its type has no text form."""
    given = table[name]
    try:
        return given.cast(pa.string())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        found = f"{name} holds {given.type} values"
        report.add("column type", table, np.ones(len(table), bool), lambda r: found, "write it as text or numbers")
        return pa.chunked_array([pa.nulls(len(table), pa.string())])


def _shown(column: pa.ChunkedArray, row: int) -> str:
    try:
        return str(column[row])
    except (pa.ArrowException, ValueError, OverflowError):  # times that Python's calendar does not reach
        return f"out of range of {column.type}"


def _is_id(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    types = pa.types
    return types.is_string(kind) or types.is_large_string(kind) or types.is_integer(kind)


def _is_blank(texts: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.or_(pc.equal(pc.binary_length(texts), 0), pc.utf8_is_space(texts))


def _comma(value: str) -> str:
    return " (a decimal comma?)" if re.fullmatch(r"\s*[+-]?[0-9]*,[0-9]+\s*", value) else ""


def _as_numbers(column: pa.ChunkedArray) -> tuple[np.ndarray, Bool[np.ndarray, "R"]]:
    """Float64 values (0 where there is none) and which rows could be read as a number."""
    if not (pa.types.is_floating(column.type) or pa.types.is_integer(column.type)):
        column = read_texts(column, (_as_floats,), _as_float, pa.float64())
    numbers = column.cast(pa.float64(), safe=False)
    return np.asarray(pc.fill_null(numbers, 0.0)), flags(pc.is_valid(numbers))


def _as_floats(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return column.cast(pa.float64())


def _as_float(value: str) -> float | None:
    try:
        return float(value)
    except ValueError:
        return None
