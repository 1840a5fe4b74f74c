"""Parser of times to unix seconds, with the same rules for all tables.

Accepted: unix seconds, as numbers or as text; dates and times of ISO 8601 (calendar, week and ordinal dates, basic and
extended, with a fraction and a zone), in UTC without a zone; date, timestamp and decimal columns. Seven or eight digits
that form a date between 1900 and 2100 are a date, in text and in numbers: 20241201 is 1 December 2024.

Refused, because a wrong guess could put a row on the wrong side of a temporal split: months or weeks without a day,
columns of years, months or day numbers, and times in 1970 in a column of much later ones.
"""

import datetime
import decimal
import enum
import json
import re
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Int8, Int64

from fused_rec.data.io.arrow import flags, known, pc, read_texts, replace

EARLIEST = 0  # 1970-01-01, inclusive, in unix seconds
LATEST = 4_102_444_800  # 2100-01-01, exclusive
REMEDY = "give unix seconds or ISO 8601 such as 2024-05-31T09:30:00Z, from 1970 to 2099"
DAY, YEAR = 86_400, 365 * 86_400  # seconds; the first day and the first year
MODERN = 631_152_000  # 1990-01-01: in a column with a later median, times in 1970 are faults
DAY_NUMBERS = 7_305, 73_050  # from 1990 in days since 1970 to 2099 in days since 1900 (spreadsheets)
EXACT = 2**24  # integers up to here are exact as 32-bit floats
MOST = 2**62  # larger numbers are no times in any unit


class Fault(enum.IntEnum):
    """Reason why a value is refused as a time."""

    NONE = 0
    UNREADABLE = enum.auto()
    BEFORE = enum.auto()
    AFTER = enum.auto()
    NO_DATE = enum.auto()
    NO_SEPARATOR = enum.auto()
    DAY_FIRST = enum.auto()
    SHORT_YEAR = enum.auto()
    HOUR = enum.auto()
    YEAR = enum.auto()
    MONTH = enum.auto()
    WEEK = enum.auto()
    DAY_NUMBER = enum.auto()
    AMID = enum.auto()
    ROUNDED = enum.auto()


_SAYS = {
    Fault.UNREADABLE: "is not a time",
    Fault.BEFORE: "is before 1970",
    Fault.AFTER: "is after 2100",
    Fault.NO_DATE: "has eight digits, as a date has, and is none from 1900 to 2100 (write the year first: 20241201)",
    Fault.DAY_FIRST: "can be a date with the day or the month first (write 2024-12-01)",
    Fault.SHORT_YEAR: "can be a date with two digits of its year (write 2024-12-01)",
    Fault.NO_SEPARATOR: "is a date and a time without a T between them (write 20241201T093000)",
    Fault.HOUR: "can be a date and an hour, or unix seconds (write 2024-12-01T09 if it is the former)",
    Fault.YEAR: "is a year without a day (write 2024-12-01)",
    Fault.MONTH: "is a month without a day (write 2024-12-01)",
    Fault.WEEK: "is a week without a day (write 2024-W48-7)",
    Fault.DAY_NUMBER: "is a day number, of a spreadsheet or since 1970 (write it as a date: 2024-12-01)",
    Fault.AMID: "is in 1970, in a column of much later times (correct it, or leave it empty where it is not known)",
    Fault.ROUNDED: "is of 32-bit floats, which round times to minutes (store 64-bit integers or timestamps)",
}


class Times(NamedTuple):
    """Times of a column of R rows.

    Attributes:
      seconds: int64 [R], unix seconds rounded down; 0 for missing values.
      good: bool [R], which rows have a valid time.
      faults: int8 [R], `Fault` of the other rows; NONE for missing values.
      kind: Arrow type of the column.
    """

    seconds: Int64[np.ndarray, "R"]
    good: Bool[np.ndarray, "R"]
    faults: Int8[np.ndarray, "R"]
    kind: pa.DataType

    def says(self, row: int) -> str:
        """Describes the fault of a row, with a specific remedy if there is one."""
        fault, seconds = Fault(int(self.faults[row])), int(self.seconds[row])
        units = {"milliseconds": 10**3, "microseconds": 10**6, "nanoseconds": 10**9}
        fits = [unit for unit, a_second in units.items() if seconds // a_second < LATEST]
        if fault is Fault.AFTER and fits:
            return f"{_SAYS[fault]} ({fits[0]}? divide them by {units[fits[0]]})"
        if fault is Fault.UNREADABLE and not _holds_times(self.kind):
            return f"{_SAYS[fault]} ({self.kind} values are none)"
        return _SAYS[fault]


def _holds_times(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    types = pa.types
    known_kinds = (types.is_string, types.is_large_string, types.is_integer, types.is_floating, types.is_decimal)
    return any(is_kind(kind) for is_kind in (*known_kinds, types.is_date, types.is_timestamp))


class _Parsed(NamedTuple):
    """Each value parsed on its own. number: it is a number that is no date; digits: it is a date in digits."""

    seconds: Int64[np.ndarray, "R"]
    readable: Bool[np.ndarray, "R"]
    number: Bool[np.ndarray, "R"]
    digits: Bool[np.ndarray, "R"]
    faults: Int8[np.ndarray, "R"]


def read_times(column: pa.ChunkedArray, *, zero: bool = False) -> Times:
    """Parses and checks the times of a column of any type.

    Args:
      column: R rows.
      zero: accept 0 ("from the start") beside later times, as for ties and reviews.

    Returns:
      The times and the faults.
    """
    parsed = _parse(column)
    seconds, faults = parsed.seconds, parsed.faults
    faults[parsed.readable & (seconds < EARLIEST)] = Fault.BEFORE
    late = parsed.readable & (seconds >= LATEST)
    faults[late] = np.where(parsed.number & _is_stamp(seconds), Fault.NO_SEPARATOR, Fault.AFTER)[late]
    good = parsed.readable & (faults == Fault.NONE)
    numbers = good & parsed.number
    kinds = _kinds(seconds)
    if (kinds[numbers] != Fault.NONE).all():
        faults[numbers] = kinds[numbers]
        good &= ~numbers
    later = bool((good & parsed.digits).any()) or (good.any() and np.median(seconds[good]) >= MODERN)
    if later:
        amid = good & (seconds < np.where(parsed.number, YEAR, DAY)) & ~(zero & (seconds == 0))
        faults[amid] = Fault.AMID
        good &= ~amid
    return Times(seconds, good, faults, column.type)


def parse_times(column: pa.ChunkedArray) -> tuple[Int64[np.ndarray, "R"], Bool[np.ndarray, "R"]]:
    """Parses the times of a column, each value on its own; `read_times` also checks ranges and compares values.

    Args:
      column: R rows.

    Returns:
      seconds: int64 [R], unix seconds rounded down; 0 for missing values.
      readable: bool [R], which rows were parsed; False for missing values.
    """
    parsed = _parse(column)
    return parsed.seconds, parsed.readable


def _parse(column: pa.ChunkedArray) -> _Parsed:
    column = known(column)
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    there, kind = flags(column.is_valid()), column.type
    faults = np.zeros(len(column), np.int8)
    is_number = np.zeros(len(column), bool)
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        column = pc.utf8_trim_whitespace(column)
        is_number = flags(pc.match_substring_regex(column, _NUMBER))
        seconds, readable = np.zeros(len(column), np.int64), np.zeros(len(column), bool)
        zoned = there & ~is_number & flags(pc.match_substring_regex(column, _ZONED))
        for rows, casts, read_one in (
            (is_number, (_as_integers, _as_cut), _read_number),
            (zoned, (_as_zoned, _as_extended_zoned), _read_iso),
            (there & ~is_number & ~zoned, (_as_local, _as_extended_local), _read_iso),
        ):
            read = read_texts(column.filter(pa.array(rows)), casts, read_one, pa.int64())
            seconds[rows], readable[rows] = _taken(read)
        faults[flags(pc.match_substring_regex(column, r"\A[0-9]{4}-[0-9]{2}\z"))] = Fault.MONTH
        faults[flags(pc.match_substring_regex(column, r"\A[0-9]{4}-?W[0-9]{2}\z"))] = Fault.WEEK
    elif pa.types.is_date(kind) or pa.types.is_timestamp(kind):
        seconds, readable = _taken(_seconds(column))
    else:
        seconds, readable = _taken(_whole(column))
        is_number = readable.copy()
        if pa.types.is_float32(kind) or pa.types.is_float16(kind):
            faults[readable & (np.abs(seconds) > EXACT)] = Fault.ROUNDED
    day, is_digits = _dates(seconds)
    is_digits &= is_number
    seconds = np.where(is_digits, day, seconds)
    no_date = is_number & ~is_digits & (seconds >= 10**7) & (seconds < 10**8)
    faults[no_date & (faults == Fault.NONE)] = Fault.NO_DATE
    faults[there & ~readable & (faults == Fault.NONE)] = Fault.UNREADABLE
    return _Parsed(seconds, readable, is_number & ~is_digits, is_digits, faults)


def _taken(column: pa.ChunkedArray) -> tuple[Int64[np.ndarray, "R"], Bool[np.ndarray, "R"]]:
    return np.asarray(pc.fill_null(column, 0)).astype(np.int64), flags(column.is_valid())


def _dates(numbers: Int64[np.ndarray, "R"]) -> tuple[Int64[np.ndarray, "R"], Bool[np.ndarray, "R"]]:
    """Returns the unix seconds of numbers that form a date between 1900 and 2100 (20241201, 2024336), and which do."""
    calendar = (numbers >= 19_000_101) & (numbers <= 21_001_231)
    ordinal = (numbers >= 1_900_001) & (numbers <= 2_100_366)
    year = np.where(calendar, numbers // 10_000, np.where(ordinal, numbers // 1000, 1970))
    month = np.where(calendar, numbers // 100 % 100, 1)
    day = np.where(calendar, numbers % 100, np.where(ordinal, numbers % 1000, 1))
    fits = (month >= 1) & (month <= 12) & (day >= 1)
    start = ((year - 1970) * 12 + np.where(fits, month, 1) - 1).astype("datetime64[M]")
    date = start.astype("datetime64[D]") + (np.where(fits, day, 1) - 1).astype("timedelta64[D]")
    fits &= np.where(
        ordinal, date.astype("datetime64[Y]").astype(np.int64) + 1970 == year, date.astype(start.dtype) == start
    )
    return date.astype(np.int64) * DAY, fits & (calendar | ordinal)


def _is_stamp(numbers: Int64[np.ndarray, "R"]) -> Bool[np.ndarray, "R"]:
    """Returns which numbers form a date and a time, 202412010930 or 20241201093000."""
    long = numbers >= 10**13
    date, time = (
        np.where(long, numbers // 10**6, numbers // 10**4),
        np.where(long, numbers % 10**6, numbers % 10**4 * 100),
    )
    eight = (date >= 19_000_101) & _dates(date)[1]
    return eight & (time // 10_000 < 24) & (time // 100 % 100 < 60) & (time % 100 < 60)


def _kinds(numbers: Int64[np.ndarray, "R"]) -> Int8[np.ndarray, "R"]:
    """Returns as `Fault` what each number may be other than unix seconds; NONE if nothing."""
    rest, last = numbers // 100, numbers % 100
    is_month = (last >= 1) & (last <= 12)
    year_last = (numbers % 10**4 >= 1900) & (numbers % 10**4 <= 2100)
    kinds = {
        Fault.YEAR: (numbers >= 1900) & (numbers <= 2100),
        Fault.MONTH: (numbers >= 190_001) & (numbers <= 210_012) & is_month,
        Fault.DAY_NUMBER: (numbers >= DAY_NUMBERS[0]) & (numbers <= DAY_NUMBERS[1]),
        Fault.SHORT_YEAR: (numbers >= 10**5) & (numbers < 10**6) & _are_days(numbers // 100 % 100, last),
        Fault.DAY_FIRST: (numbers < 10**7) & year_last & _are_days(numbers // 10**4 % 100, numbers // 10**6),
        Fault.HOUR: (rest >= 19_000_101) & _dates(rest)[1] & (last < 24),
    }
    return np.select(list(kinds.values()), [np.int8(fault) for fault in kinds], np.int8(Fault.NONE))


def _are_days(month: np.ndarray, day: np.ndarray) -> Bool[np.ndarray, "R"]:
    return (month >= 1) & (month <= 12) & (day >= 1) & (day <= 31)


def _seconds(times: pa.ChunkedArray) -> pa.ChunkedArray:
    """Converts dates and timestamps to whole seconds, rounded down. Arrow keeps zoned times in UTC."""
    if pa.types.is_date32(times.type):
        return pc.multiply(times.cast(pa.int32()).cast(pa.int64()), DAY)
    unit = "ms" if pa.types.is_date64(times.type) else times.type.unit
    numbers, there = _taken(times.cast(pa.int64()))
    return pa.chunked_array([pa.array(numbers // {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}[unit], mask=~there)])


def _whole(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Rounds numbers down to int64; null for values that are no number or too large."""
    types, kind = pa.types, column.type
    if types.is_uint64(kind):
        column = pc.if_else(pc.less(column, pa.scalar(MOST, kind)), column, pa.scalar(None, kind))
    if types.is_integer(kind):
        return column.cast(pa.int64())
    if types.is_floating(kind):
        numbers = np.asarray(pc.fill_null(column.cast(pa.float64()), np.nan))
        lost = ~(np.abs(numbers) < MOST)  # of NaN too
        return pa.chunked_array([pa.array(np.floor(np.where(lost, 0, numbers)).astype(np.int64), mask=lost)])
    if types.is_decimal(kind):
        whole = [None if value is None else _floor(value) for value in column.to_pylist()]
        return pa.chunked_array([pa.array(whole, pa.int64())])
    return pa.chunked_array([pa.nulls(len(column), pa.int64())])


def _floor(value: decimal.Decimal) -> int | None:
    return int(value.to_integral_value(decimal.ROUND_FLOOR)) if abs(value) < MOST else None


# --- text. Arrow parses most columns at once; other values are parsed one by one.

_NUMBER = (
    r"\A[+-]?(0|[1-9][0-9]*)(\.[0-9]*)?([eE][+-]?[0-9]{1,2})?\z"  # int() also takes 1_0 and other digits, Arrow 0x10
)
_ZONED = r"[Tt ][0-9:.,]+ ?([Zz]|[-+\x{2212}][0-9:]+)\z"
_ISO = re.compile(
    r"(?P<year>[0-9]{4})"
    r"(?:-(?P<month>[0-9]{2})-(?P<day>[0-9]{2})|(?P<month_>[0-9]{2})(?P<day_>[0-9]{2})"
    r"|-?W(?P<week>[0-9]{2})-?(?P<weekday>[1-7])|-?(?P<ordinal>[0-9]{3}))"
    r"(?:[Tt ](?P<hour>[0-9]{2})(?:(?P<colon>:?)(?P<minute>[0-9]{2})(?:(?P=colon)(?P<second>[0-9]{2}))?)?"
    r"(?:[.,](?P<fraction>[0-9]{1,30}))?"
    r"(?: ?(?:(?P<utc>[Zz])|(?P<sign>[-+\u2212])(?P<zone_hour>[0-9]{2})(?::?(?P<zone_minute>[0-9]{2}))?))?)?"
)


def _as_integers(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return column.cast(pa.int64())


def _as_cut(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Removes the decimals of non-negative numbers: 1733011200.0, as columns with missing values are often written."""
    return pc.replace_substring_regex(column, r"\A([0-9]+)\.[0-9]*\z", r"\1").cast(pa.int64())


def _read_number(value: str) -> int | None:
    return _floor(decimal.Decimal(value))


def _as_local(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return _seconds(column.cast(pa.timestamp("us")))


def _as_zoned(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return _seconds(column.cast(pa.timestamp("us", tz="UTC")))


def _as_extended_local(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return _as_local(_extended(column))


def _as_extended_zoned(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return _as_zoned(_extended(column))


def _extended(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Rewrites times in basic form or with long fractions so that Arrow can parse them; others stay unchanged."""
    basic = r"\A([0-9]{4})([0-9]{2})([0-9]{2})[Tt ]([0-9]{2})([0-9]{2})([0-9]{2})"
    column = pc.replace_substring_regex(column, basic, r"\1-\2-\3T\4:\5:\6")
    return pc.replace_substring_regex(column, r"(:[0-9]{2}:[0-9]{2})[.,]([0-9]{1,6})[0-9]*", r"\1.\2")


def _read_iso(value: str) -> int | None:
    """Parses a date, or a date and a time, of ISO 8601 to unix seconds."""
    found = _ISO.fullmatch(value)
    if found is None:
        return None
    year = int(found["year"])
    try:
        if found["week"]:
            date = datetime.date.fromisocalendar(year, int(found["week"]), int(found["weekday"]))
        elif found["ordinal"]:
            date = datetime.date(year, 1, 1) + datetime.timedelta(int(found["ordinal"]) - 1)
            if date.year != year:
                return None
        else:
            date = datetime.date(year, int(found["month"] or found["month_"]), int(found["day"] or found["day_"]))
    except (ValueError, OverflowError):  # no such day
        return None
    hour, minute, second, zone_hour, zone_minute = (
        int(found[part] or 0) for part in ("hour", "minute", "second", "zone_hour", "zone_minute")
    )
    fraction = found["fraction"] or "0"
    unit = 1 if found["second"] else 60 if found["minute"] else 3600  # a fraction belongs to the smallest unit given
    since = hour * 3600 + minute * 60 + second
    leap = second == 60 and minute == 59
    if minute > 59 or (second > 59 and not leap) or zone_hour > 23 or zone_minute > 59:
        return None
    if hour > 24 or (hour == 24 and (since > DAY or int(fraction))):
        return None
    zone = (zone_hour * 3600 + zone_minute * 60) * (1 if found["sign"] == "+" else -1)
    since += int(fraction) * unit // 10 ** len(fraction)
    return (date.toordinal() - datetime.date(1970, 1, 1).toordinal()) * DAY + since - zone


# --- pandas periods: integers since 1970 in their own unit


def periods_as_times(table: pa.Table) -> pa.Table:
    """Converts columns of pandas periods of a day or less to timestamps of their starts; longer ones stay unchanged."""
    for field in table.schema:
        if (unit := _period_of(field)) is None:
            continue
        column = table[field.name]
        if isinstance(field.type, pa.BaseExtensionType):
            column = pa.chunked_array([chunk.storage for chunk in column.chunks], field.type.storage_type)
        try:
            factor, kind = _PERIODS[unit]
            read = pc.multiply_checked(column.cast(pa.int64()), factor).cast(pa.timestamp(kind))
            table = replace(table, field.name, read)
        except (KeyError, pa.ArrowException):  # the checks refuse the column by its type
            continue
    return table


# Frequency of periods -> factor, Arrow unit. Capitals: older pandas.
_PERIODS = {
    **{"D": (DAY, "s"), "h": (3600, "s"), "H": (3600, "s"), "min": (60, "s"), "T": (60, "s"), "s": (1, "s")},
    **{
        "S": (1, "s"),
        "ms": (1, "ms"),
        "L": (1, "ms"),
        "us": (1, "us"),
        "U": (1, "us"),
        "ns": (1, "ns"),
        "N": (1, "ns"),
    },
}


def _period_of(field: pa.Field) -> str | None:
    """Returns the unit of a column of pandas periods, from its Arrow extension or metadata; None for other columns."""
    if isinstance(field.type, pa.BaseExtensionType):
        return str(getattr(field.type, "freq", "")) if field.type.extension_name == "pandas.period" else None
    named = field.metadata or {}
    if named.get(b"ARROW:extension:name") != b"pandas.period":
        return None
    try:
        return str(json.loads(named.get(b"ARROW:extension:metadata", b""))["freq"])
    except (ValueError, TypeError, KeyError, RecursionError):
        return ""
