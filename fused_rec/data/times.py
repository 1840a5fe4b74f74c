"""Times as users write them -> unix seconds."""

import datetime

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Int64

from fused_rec.data.arrow import pc, read_texts

EARLIEST = 0  # 1970-01-01, inclusive, in unix seconds
LATEST = 4_102_444_800  # 2100-01-01, exclusive


def parse_times(column: pa.ChunkedArray) -> tuple[Int64[np.ndarray, "R"], Bool[np.ndarray, "R"]]:
    """Unix seconds (fractions cut off, 0 where there are none) and which rows could be read as a time.

    Numbers are unix seconds. Text is a number or ISO 8601; without a zone it is UTC. A null is not read.
    """
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        column = read_texts(column, (_as_integers, _as_local, _as_zoned), _read_one, pa.int64())
    elif pa.types.is_date(column.type) or pa.types.is_timestamp(column.type):
        column = _seconds(column)
    elif pa.types.is_floating(column.type) or pa.types.is_decimal(column.type):
        column = _whole(column.cast(pa.float64()))
    if pa.types.is_null(column.type) or not pa.types.is_integer(column.type):
        return np.zeros(len(column), np.int64), np.zeros(len(column), bool)
    readable = np.asarray(column.is_valid())
    return np.asarray(pc.fill_null(column, 0)).astype(np.int64), readable


def _as_integers(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return column.cast(pa.int64())


def _as_local(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return _seconds(column.cast(pa.timestamp("us")))


def _as_zoned(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return _seconds(column.cast(pa.timestamp("us", tz="UTC")))


def _seconds(times: pa.ChunkedArray) -> pa.ChunkedArray:
    # Arrow keeps zoned times in UTC; dropping the zone leaves the instant as it is.
    return times.cast(pa.timestamp("s"), safe=False).cast(pa.int64())


def _read_one(value: str) -> int | None:
    for read in (float, _read_iso):
        try:
            seconds = int(read(value.strip()) // 1)
            return seconds if abs(seconds) < 2**62 else None
        except (ValueError, OverflowError):  # int() of NaN and of infinity
            continue
    return None


def _read_iso(value: str) -> float:
    time = datetime.datetime.fromisoformat(value)
    return (time if time.tzinfo else time.replace(tzinfo=datetime.UTC)).timestamp()


def _whole(column: pa.ChunkedArray) -> pa.ChunkedArray:
    numbers = np.asarray(pc.fill_null(column, np.nan)).astype(np.float64)
    lost = ~np.isfinite(numbers) | (np.abs(numbers) > 2**62)
    return pa.chunked_array([pa.array(np.floor(np.where(lost, 0, numbers)).astype(np.int64), mask=lost)])
