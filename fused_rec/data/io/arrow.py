"""Functions of Arrow columns: missing values, ids as dictionaries, row lookup, text joins, masks."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
from jaxtyping import Bool, Int32

pc: Any = pyarrow.compute  # its functions are generated at import, so type checkers do not see them

ID = pa.dictionary(pa.int32(), pa.string())
BLOCK = 2**22  # rows looked up at a time


def known(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Replaces missing values by null: NaN, empty and blank texts.

    Missing elements are removed from lists. An empty list stays a value; a list of only missing elements becomes null.

    Args:
      column: of a plain type (`fused_rec.data.io.plain`) or a dictionary of texts; other types stay unchanged.

    Returns:
      The column, of the same type.
    """
    kind = column.type
    if pa.types.is_dictionary(kind):
        if not _is_text(kind.value_type):
            return column
        encoded = column.unify_dictionaries().combine_chunks()
        absent = missing(encoded.dictionary)
        if not absent.any():
            return column
        filled = pc.fill_null(encoded.indices, 0) if len(encoded.dictionary) else encoded.indices
        mask = pa.array(flags(encoded.indices.is_null()) | absent[np.asarray(filled)])
        indices = pc.if_else(mask, pa.scalar(None, encoded.indices.type), encoded.indices)
        return pa.chunked_array([pa.DictionaryArray.from_arrays(indices, encoded.dictionary)])
    if pa.types.is_list(kind):
        if not any(missing(chunk.flatten()).any() for chunk in column.chunks):
            return column
        rows = [None if row is None else _without_gaps(row) for row in column.to_pylist()]
        return pa.chunked_array([pa.array(rows, kind)])
    absent = missing(column) if pa.types.is_floating(kind) or _is_text(kind) else np.zeros(0, bool)
    if not flags(column.is_valid())[: len(absent)][absent].any():
        return column
    return pc.if_else(pa.array(absent), pa.scalar(None, kind), column)


def missing(values: pa.Array | pa.ChunkedArray) -> Bool[np.ndarray, "R"]:
    """Returns which values are missing: null, NaN, empty and blank texts."""
    absent = flags(values.is_null())
    if pa.types.is_floating(values.type):
        absent |= flags(pc.is_nan(values))
    elif _is_text(values.type):
        absent |= is_blank(values)
    return absent


def is_blank(texts: pa.Array | pa.ChunkedArray) -> Bool[np.ndarray, "R"]:
    """Returns which texts are empty or only white space; False for null."""
    blank = flags(pc.equal(pc.binary_length(texts), 0))
    maybe = np.flatnonzero(
        flags(pc.utf8_is_space(pc.utf8_slice_codeunits(texts, 0, 1)))
    )  # first character only, as texts are long
    blank[maybe] = flags(pc.utf8_is_space(texts.take(pa.array(maybe))))
    return blank


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _without_gaps(row: list[Any]) -> list[Any] | None:
    """Removes missing elements of a list; None where all are missing."""
    present = [
        element
        for element in row
        if element is not None and element == element and not (isinstance(element, str) and not element.strip())
    ]
    return present if present or not row else None


def as_ids(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Converts text or integer ids to one chunk of type `ID`, its dictionary in order of first appearance."""
    if pa.types.is_null(column.type):
        column = column.cast(pa.string())
    if pa.types.is_dictionary(column.type):
        encoded = one_chunk(column.unify_dictionaries())
    else:
        encoded = one_chunk(pc.dictionary_encode(column))
    strings = encoded.dictionary.cast(pa.string())
    return pa.chunked_array([pa.DictionaryArray.from_arrays(encoded.indices.cast(pa.int32()), strings)])


def trimmed(ids: pa.ChunkedArray) -> tuple[pa.ChunkedArray, Bool[np.ndarray, "R"]]:
    """Strips ids (type `ID`), and returns which had blanks around them; blank ids stay unchanged."""
    encoded = one_chunk(ids)
    bare = pc.utf8_trim_whitespace(encoded.dictionary)
    padded = pc.and_(pc.not_equal(bare, encoded.dictionary), pc.not_equal(bare, ""))
    if not pc.any(padded).as_py():
        return ids, np.zeros(len(ids), bool)
    merged = pc.if_else(padded, bare, encoded.dictionary).dictionary_encode()
    chunk = pa.DictionaryArray.from_arrays(merged.indices.take(encoded.indices), merged.dictionary)
    return pa.chunked_array([chunk]), flags(padded.take(encoded.indices))


def distinct(ids: pa.ChunkedArray) -> pa.Array:
    """Returns the distinct ids as strings, in order of first appearance."""
    return pc.unique(ids).cast(pa.string())


def locate(ids: pa.ChunkedArray, catalogue: pa.ChunkedArray) -> Int32[np.ndarray, "R"]:
    """Looks up ids in a catalogue.

    Args:
      ids: R ids of type `ID`.
      catalogue: distinct ids as strings.

    Returns:
      Row of each id in the catalogue; -1 for unknown ids and null.
    """
    encoded = one_chunk(ids)
    rows = pc.fill_null(pc.index_in(encoded.dictionary, value_set=catalogue.combine_chunks()), -1).to_numpy()
    if not encoded.null_count and np.array_equal(rows, np.arange(len(rows))):
        return encoded.indices.to_numpy()  # the catalogue is of these rows: the same memory
    return by_code(encoded, rows, np.int32(-1))


def one_chunk(column: pa.ChunkedArray) -> Any:
    """Returns the column as one array, without a copy where it has one chunk."""
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def by_code(encoded: pa.DictionaryArray, values: np.ndarray, absent: np.generic) -> np.ndarray:
    """Looks up the value of each row's dictionary entry.

    Args:
      encoded: R rows.
      values: one for each entry of the dictionary.
      absent: the value of null.

    Returns:
      R values, of the type of `values`.
    """
    entries = np.append(values, absent).astype(values.dtype)
    codes = pc.fill_null(encoded.indices, len(values)).to_numpy()
    found = np.empty(len(codes), values.dtype)
    for start in range(0, len(codes), BLOCK):  # NumPy takes indices of 64 bits, and converts all others
        found[start : start + BLOCK] = entries[codes[start : start + BLOCK]]
    return found


def read_texts(
    column: pa.ChunkedArray,
    casts: Sequence[Callable[[pa.ChunkedArray], pa.ChunkedArray]],
    read: Callable[[str], int | float | None],
    kind: pa.DataType,
) -> pa.ChunkedArray:
    """Parses texts to numbers with the first cast that accepts all of them, or else by halves, recursively.

    Thus a few unusual values among millions cost a few casts only.

    Args:
      column: texts.
      casts: casts to try, which raise ArrowInvalid.
      read: parses one text, for halves of 256 or fewer; None where it is no number.
      kind: type of the result.

    Returns:
      The numbers, null where a text is none.
    """
    for cast in casts:
        try:
            return cast(column)
        except pa.ArrowInvalid:
            continue
    if len(column) > 256:
        halves = column.slice(0, len(column) // 2), column.slice(len(column) // 2)
        return pa.chunked_array([c for half in halves for c in read_texts(half, casts, read, kind).chunks], kind)
    values = [None if value is None else read(value) for value in column.to_pylist()]
    return pa.chunked_array([pa.array(values, kind)])


def flags(condition: pa.Array | pa.ChunkedArray) -> Bool[np.ndarray, "R"]:
    """Converts an Arrow condition to a NumPy mask; null becomes False."""
    return np.array(pc.fill_null(condition, False))


def replace(table: pa.Table, name: str, column: pa.Array | pa.ChunkedArray) -> pa.Table:
    """Replaces one column of a table."""
    return table.set_column(table.column_names.index(name), name, column)


def join_texts(*columns: pa.ChunkedArray) -> pa.ChunkedArray:
    """Joins the texts of each row as sentences ("first. second"), without missing ones; null where all are missing."""
    columns = tuple(map(known, columns))
    # Arrow 26 drops rows in which it skips every column; an empty first column keeps them.
    joined = pc.binary_join_element_wise("", *columns, ". ", null_handling="skip")
    text = pc.utf8_slice_codeunits(joined, 2)
    return pc.if_else(pc.equal(text, ""), pa.scalar(None, pa.string()), text)
