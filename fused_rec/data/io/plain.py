"""Conversion of columns from Arrow, pandas, polars, DuckDB and Spark to the few types that the package reads.

Plain types are text, booleans, integers, floats (32 and 64 bits), decimals, dates, timestamps, times of day, null, and
lists of these. Encodings of them are converted with the same values: views and large offsets, dictionaries
(categories, enums) and runs, all list layouts, half floats, small decimals, UUIDs, JSON and bool8. Structs, maps,
unions, bytes, durations, intervals, lists of lists and numbers of unknown meaning (extensions such as pandas periods)
stay unchanged; the checks refuse them by name.
"""

import uuid
from collections.abc import Callable, Iterator

import numpy as np
import pyarrow as pa

from fused_rec.data.io.arrow import pc

PIECE = 1 << 20  # rows decoded at a time: Arrow's text has 32-bit offsets, which end at 2 GiB a chunk
_EXTENSION = b"ARROW:extension:name"  # metadata of an unregistered extension type, whose column has the storage type


def plain_table(table: pa.Table) -> pa.Table:
    """Converts all columns to plain types where possible, and drops metadata, which depends on the writer."""
    columns = []
    for place, field in enumerate(table.schema):
        column = table.column(place)
        name = (field.metadata or {}).get(_EXTENSION)
        columns.append(_unknown(column, name.decode()) if name and _is_number(field.type) else plain(column))
    return pa.Table.from_arrays(columns, [str(name) for name in table.column_names])


def plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Converts a column to a plain type with the same values; unchanged if its type has none."""
    kind, types = column.type, pa.types
    if isinstance(kind, pa.BaseExtensionType):
        return _of_extension(column, kind)
    if types.is_run_end_encoded(kind):
        return plain(pc.run_end_decode(column))
    if types.is_dictionary(kind):
        return _decoded(column) if is_plain(_plain_type(kind.value_type)) else column
    if _is_list(kind):
        return _of_lists(column) if is_single(_plain_type(kind.value_type)) else column
    target = _plain_type(kind)
    return column if target == kind else _cast(column, target)


def is_single(kind: pa.DataType) -> bool:
    """Returns whether the type is plain and no list."""
    types = pa.types
    tests = (types.is_string, types.is_boolean, types.is_integer, types.is_float32, types.is_float64)
    others = (types.is_decimal, types.is_date, types.is_timestamp, types.is_time, types.is_null)
    return any(test(kind) for test in (*tests, *others))


def is_plain(kind: pa.DataType) -> bool:
    """Returns whether the type is plain: one value per row, or a list of values."""
    return is_single(kind) or (pa.types.is_list(kind) and is_single(kind.value_type))


def _plain_type(kind: pa.DataType) -> pa.DataType:
    return plain(pa.chunked_array([], kind)).type if _is_nested(kind) else _of_value(kind)


def _is_nested(kind: pa.DataType) -> bool:
    encoded = pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind) or _is_list(kind)
    return encoded or isinstance(kind, pa.BaseExtensionType)


def _of_value(kind: pa.DataType) -> pa.DataType:
    types = pa.types
    if types.is_large_string(kind) or types.is_string_view(kind):
        return pa.string()
    if types.is_float16(kind):
        return pa.float32()
    if types.is_decimal(kind) and kind.bit_width < 128:  # few of Arrow's functions take these
        return pa.decimal128(kind.precision, kind.scale)
    if types.is_date64(kind):  # this and the next two as Parquet converts them
        return pa.date32()
    if types.is_timestamp(kind) and kind.unit == "s":
        return pa.timestamp("ms", kind.tz)
    if kind == pa.time32("s"):
        return pa.time32("ms")
    return kind


def _is_list(kind: pa.DataType) -> bool:
    types = pa.types
    plain_lists = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    return plain_lists or types.is_list_view(kind) or types.is_large_list_view(kind)


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)


def _of_extension(column: pa.ChunkedArray, kind: pa.BaseExtensionType) -> pa.ChunkedArray:
    stored = pa.chunked_array([chunk.storage for chunk in column.chunks], kind.storage_type)
    if kind.extension_name == "arrow.uuid":
        return _decoded(pc.dictionary_encode(stored), lambda value: str(uuid.UUID(bytes=value)))
    if kind.extension_name == "arrow.bool8":
        return stored.cast(pa.bool_())
    if _is_number(kind.storage_type):  # a number whose meaning only the extension defines
        return column
    read = plain(stored)
    return read if is_plain(read.type) else column


def _unknown(column: pa.ChunkedArray, name: str) -> pa.ChunkedArray:
    kind = pa.opaque(column.type, name, "unknown")
    return pa.chunked_array([pa.ExtensionArray.from_storage(kind, chunk) for chunk in column.chunks], kind)


def _decoded(column: pa.ChunkedArray, spell: Callable[[bytes], str] | None = None) -> pa.ChunkedArray:
    """Returns the values of a dictionary column; `spell` converts values without a plain type to text."""
    chunks = []
    kind = pa.string() if spell else _plain_type(column.type.value_type)
    for chunk in column.chunks:
        if spell:
            values = pa.array([None if value is None else spell(value) for value in chunk.dictionary.to_pylist()], kind)
        else:
            values = _array(chunk.dictionary)
        chunks += [values.take(piece) for piece in _pieces(chunk.indices)]
    return pa.chunked_array(chunks, kind)


def _of_lists(column: pa.ChunkedArray) -> pa.ChunkedArray:
    kind = pa.list_(_plain_type(column.type.value_type))
    chunks = []
    for chunk in column.chunks:
        lengths = np.asarray(pc.fill_null(pc.list_value_length(chunk), 0))
        offsets = pa.array(np.append(0, np.cumsum(lengths, dtype=np.int64)), pa.int32())
        values = _array(pc.list_flatten(chunk))
        chunks.append(pa.ListArray.from_arrays(offsets, values, type=kind, mask=chunk.is_null()))
    return pa.chunked_array(chunks, kind)


def _array(values: pa.Array) -> pa.Array:
    return plain(pa.chunked_array([values])).combine_chunks()


def _cast(column: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray:
    try:
        return column.cast(kind)
    except pa.ArrowInvalid:  # a chunk of more than 2 GiB
        pieces = (piece for chunk in column.chunks for piece in _pieces(chunk))
        return pa.chunked_array([piece.take(pa.array(np.arange(len(piece)))).cast(kind) for piece in pieces], kind)


def _pieces(array: pa.Array) -> Iterator[pa.Array]:
    for start in range(0, max(len(array), 1), PIECE):
        yield array.slice(start, PIECE)
