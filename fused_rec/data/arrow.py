"""Arrow columns: ids as dictionaries, texts joined, masks, places in a catalogue."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
from jaxtyping import Bool, Int32

pc: Any = pyarrow.compute  # its functions are made when it is imported, where no type checker sees them

ID = pa.dictionary(pa.int32(), pa.string())


def as_ids(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Text or integer ids as one chunk of type `ID`, its dictionary in order of first appearance."""
    if pa.types.is_null(column.type):
        column = column.cast(pa.string())
    if pa.types.is_dictionary(column.type):
        encoded = column.unify_dictionaries().combine_chunks()
    else:
        encoded = pc.dictionary_encode(column).combine_chunks()
    strings = encoded.dictionary.cast(pa.string())
    return pa.chunked_array([pa.DictionaryArray.from_arrays(encoded.indices.cast(pa.int32()), strings)])


def trimmed(ids: pa.ChunkedArray) -> tuple[pa.ChunkedArray, Bool[np.ndarray, "R"]]:
    """The ids (type `ID`) without blanks around them, and which had some; blanks alone stay as they are."""
    encoded = ids.combine_chunks()
    bare = pc.utf8_trim_whitespace(encoded.dictionary)
    padded = pc.and_(pc.not_equal(bare, encoded.dictionary), pc.not_equal(bare, ""))
    if not pc.any(padded).as_py():
        return ids, np.zeros(len(ids), bool)
    merged = pc.if_else(padded, bare, encoded.dictionary).dictionary_encode()
    chunk = pa.DictionaryArray.from_arrays(merged.indices.take(encoded.indices), merged.dictionary)
    return pa.chunked_array([chunk]), flags(padded.take(encoded.indices))


def distinct(ids: pa.ChunkedArray) -> pa.Array:
    """The ids as strings, each once, in order of first appearance."""
    return pc.unique(ids).cast(pa.string())


def locate(ids: pa.ChunkedArray, catalogue: pa.ChunkedArray) -> Int32[np.ndarray, "R"]:
    """The row at which each id (type `ID`) stands in a catalogue of strings; -1 for others and for null."""
    encoded = ids.combine_chunks()
    places = pc.fill_null(pc.index_in(encoded.dictionary, value_set=catalogue.combine_chunks()), -1).to_numpy()
    return np.append(places, np.int32(-1))[pc.fill_null(encoded.indices, -1).to_numpy()]


def read_texts(
    column: pa.ChunkedArray,
    casts: Sequence[Callable[[pa.ChunkedArray], pa.ChunkedArray]],
    read: Callable[[str], int | float | None],
    kind: pa.DataType,
) -> pa.ChunkedArray:
    """Texts as numbers of type `kind`: by the first cast that takes them all, or else half by half.

    So a few odd values among millions cost a few casts; the last 256 or fewer go through `read` one by one.
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
    """An Arrow condition as a NumPy mask; null counts as False."""
    return np.asarray(pc.fill_null(condition, False))


def replace(table: pa.Table, name: str, column: pa.Array | pa.ChunkedArray) -> pa.Table:
    """The table with one column exchanged."""
    return table.set_column(table.column_names.index(name), name, column)


def join_texts(*columns: pa.ChunkedArray) -> pa.ChunkedArray:
    """The texts of each row as sentences ("first. second"), nulls left out; null where all are."""
    # Arrow 26 loses the rows in which it skips every column; an empty first one keeps them.
    joined = pc.binary_join_element_wise("", *columns, ". ", null_handling="skip")
    text = pc.utf8_slice_codeunits(joined, 2)
    return pc.if_else(pc.equal(text, ""), pa.scalar(None, pa.string()), text)
