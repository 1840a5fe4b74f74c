"""Columns of every type that Arrow, pandas, polars and DuckDB write: read alike, or refused by name."""

import datetime
import decimal
import re
import tempfile
import uuid
from pathlib import Path

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq
import pytest

from fused_rec.config import DataConfig
from fused_rec.data.attributes import describe
from fused_rec.data.dataset import DataError, Dataset, digest
from fused_rec.data.io.plain import plain, plain_table
from fused_rec.data.io.tables import dataset_from_tables, read_tables
from fused_rec.data.io.writers import save_dataset
from fused_rec.data.sources.registry import load
from fused_rec.evaluation.suitability import groups_of
from fused_rec.graph.build import attribute_edges

HELD = {"user_id": ["u", "u", "v"], "item_id": ["i", "j", "k"]}
WORDS, LISTS, PAIRS = ["a", None, "b"], [["a", "b"], None, ["b"]], [["a", "b"], None, ["b", "c"]]
DAY = datetime.datetime(1970, 1, 1)
ID = uuid.UUID(int=7)


def enums(index: pa.DataType, words: pa.DataType) -> pa.Array:
    return pa.DictionaryArray.from_arrays(pa.array([0, None, 1], index), pa.array(["a", "b"], words))


def enums_with_null() -> pa.Array:
    return pa.DictionaryArray.from_arrays(pa.array([0, 1, 1]), pa.array(["a", None]))


def decimals(kind: pa.DataType) -> pa.Array:
    return pa.array([decimal.Decimal("1.50"), None, decimal.Decimal("2.25")], kind)


READ = {
    **{str(kind): (pa.array(WORDS, kind), WORDS) for kind in (pa.string(), pa.large_string(), pa.string_view())},
    **{
        f"{index} to {words}": (enums(index, words), WORDS)
        for index in (pa.int8(), pa.uint8(), pa.int64(), pa.uint64())
        for words in (pa.string(), pa.large_string(), pa.string_view())
    },
    "dictionary of integers": (pa.array([3, None, 4]).dictionary_encode(), [3, None, 4]),
    "dictionary with null": (enums_with_null(), ["a", None, None]),
    "runs": (pyarrow.compute.run_end_encode(pa.array(["a", "a", None])), ["a", "a", None]),  # pyright: ignore
    **{
        str(kind): (pa.array(LISTS, kind), LISTS)
        for kind in (
            *(pa.list_(pa.string_view()), pa.large_list(pa.large_string()), pa.list_view(pa.string_view())),
            *(pa.large_list_view(pa.string()), pa.list_(pa.dictionary(pa.int8(), pa.string()))),
        )
    },
    "fixed lists": (pa.array([["a", "b"], None, ["b", "c"]], pa.list_(pa.string_view(), 2)), PAIRS),
    "lists without entries": (pa.array([[], None, []]), [[], None, []]),
    "half floats": (pa.array([1.5, None, 2], pa.float16()), [1.5, None, 2]),
    "decimal128": (decimals(pa.decimal128(10, 2)), [decimal.Decimal("1.50"), None, decimal.Decimal("2.25")]),
    "decimal256": (decimals(pa.decimal256(60, 2)), [decimal.Decimal("1.50"), None, decimal.Decimal("2.25")]),
    "uint64": (pa.array([2**64 - 1, None, 0], pa.uint64()), [2**64 - 1, None, 0]),
    "uuid": (pa.array([ID.bytes, None, ID.bytes], pa.uuid()), [str(ID), None, str(ID)]),
    "json": (pa.array(["{}", None, "[]"], pa.json_()), ["{}", None, "[]"]),
    "bool8": (pa.ExtensionArray.from_storage(pa.bool8(), pa.array([1, None, 0], pa.int8())), [True, None, False]),
    "null": (pa.nulls(3), [None, None, None]),
    "time of day": (pa.array([1, None, 2], pa.time32("s")), [datetime.time(0, 0, 1), None, datetime.time(0, 0, 2)]),
    "date64": (pa.array([datetime.date(2020, 1, 2), None, None], pa.date64()), [datetime.date(2020, 1, 2), None, None]),
    "seconds": (pa.array([0, None, 0], pa.timestamp("s")), [DAY, None, DAY]),
    "Categorical": (pl.Series(WORDS, dtype=pl.Categorical), WORDS),
    "Enum": (pl.Series(WORDS, dtype=pl.Enum(["b", "a"])), WORDS),
    "List(Enum)": (pl.Series(LISTS, dtype=pl.List(pl.Enum(["b", "a"]))), LISTS),
    "Array": (pl.Series([["a", "b"], None, ["b", "c"]], dtype=pl.Array(pl.String, 2)), PAIRS),
    "Null": (pl.Series([None, None, None]), [None, None, None]),
    "Int64": (pd.Series([1, None, 3], dtype="Int64"), [1, None, 3]),
    "boolean": (pd.Series([True, None, False], dtype="boolean"), [True, None, False]),
    "category": (pd.Series(WORDS, dtype="category"), WORDS),
    "lists of objects": (pd.Series(LISTS), LISTS),
    "ArrowDtype": (pd.Series(WORDS, dtype=pd.ArrowDtype(pa.string())), WORDS),
}  # fmt: skip

REFUSED = {
    "struct": (pa.array([{"a": "x"}, None, {}], pa.struct([("a", pa.string_view())])), "struct<a: string_view>"),
    "map": (pa.array([[("a", 1)], None, []], pa.map_(pa.string(), pa.int64())), "map<string, int64>"),
    "lists of lists": (pa.array([[["a"]], None, []]), "list<item: list<item: string>>"),
    "lists of structs": (pa.array([[{"a": 1}], None, []]), "list<item: struct<a: int64>>"),
    "bytes": (pa.array([b"a", None, b"b"]), "binary"),
    "views of bytes": (pa.array([b"a", None, b"b"], pa.binary_view()), "binary_view"),
    "duration": (pa.array([1, None, 2], pa.duration("s")), "duration[s]"),
    "interval": (pa.array([(1, 2, 3), None, (0, 0, 0)], pa.month_day_nano_interval()), "month_day_nano_interval"),
    "Struct": (pl.Series([{"a": "x"}, None, {"a": "y"}]), "struct<a: string_view>"),
    "Binary": (pl.Series([b"a", None, b"b"]), "binary_view"),
    "Duration": (pl.Series([datetime.timedelta(1), None, None]), "duration[us]"),
    "period": (pd.Series(pd.period_range("2020-01", periods=3, freq="M")), "extension<pandas.period<ArrowPeriodType>>"),
    "interval of pandas": (pd.Series(pd.interval_range(0, 3)), "extension<pandas.interval<ArrowIntervalType>>"),
}  # fmt: skip


def frame(name: str, column, **others):
    if isinstance(column, pl.Series):
        return pl.DataFrame({**others, name: column})
    return (
        pd.DataFrame({**others, name: column}) if isinstance(column, pd.Series) else pa.table({**others, name: column})
    )


def items(column) -> object:
    return frame("at", column, item_id=["i", "j", "k"])


def from_parquet(table, repair: bool = False) -> Dataset | None:
    """The same items read from a file; None where the library cannot write one."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "items.parquet"
        try:
            if isinstance(table, pa.Table):
                pq.write_table(table, file)
            elif isinstance(table, pl.DataFrame):
                table.write_parquet(file)
            else:
                table.to_parquet(file)
        except pa.ArrowNotImplementedError:
            return None
        pq.write_table(pa.table(HELD), Path(folder) / "interactions.parquet")
        return read_tables(folder, repair=repair)


@pytest.mark.parametrize("name", READ)
def test_values_are_read_whatever_their_type(name):
    column, values = READ[name]
    dataset = dataset_from_tables(HELD, items=items(column))
    assert dataset.items["at"].to_pylist() == values
    if again := from_parquet(items(column)):
        assert digest(again) == digest(dataset)


@pytest.mark.parametrize("name", READ)
def test_what_is_read_comes_back_from_what_is_written(name, tmp_path):
    dataset = dataset_from_tables(HELD, items=items(READ[name][0]))
    for layout in ("tables", "huggingface"):
        assert save_dataset(dataset, tmp_path / layout, layout) == {}
        assert digest(load(DataConfig(layout, str(tmp_path / layout)))) == digest(dataset), layout
    save_dataset(dataset, tmp_path / "recbole", "recbole")
    assert load(DataConfig("recbole", str(tmp_path / "recbole"))).n_items == 3


@pytest.mark.parametrize("name", READ)
def test_what_is_read_can_be_used_or_is_refused_in_words(name):
    dataset = dataset_from_tables(HELD, items=items(READ[name][0]))
    for call in (
        lambda: attribute_edges(dataset.items, "at"),
        lambda: groups_of(dataset.items, "at", np.arange(3)),
        lambda: describe(dataset, ["at"]),
    ):
        try:
            call()
        except ValueError as error:
            assert "continuous" in str(error) or "groups need a column with one text or number per user" in str(error)


@pytest.mark.parametrize("name", REFUSED)
def test_other_types_are_refused_by_name_and_a_repair_leaves_them_out(name):
    column, kind = REFUSED[name]
    with pytest.raises(DataError) as error:
        dataset_from_tables(HELD, items=items(column))
    assert [str(problem) for problem in error.value.problems] == [
        f"items: at holds {kind} values. write it as text, numbers, dates or lists of these, or leave the column out."
    ]
    mended = dataset_from_tables(HELD, items=items(column), repair=True)
    assert mended.items.column_names == ["item_id"]
    assert mended.repairs == {f"items: column at of {kind} left out": 1}
    try:  # in a file the type may have another name
        assert from_parquet(items(column)) is None
    except DataError as error:
        assert re.fullmatch(r"items.parquet: at holds \S.* values\. write it as text, .*", str(error.problems[0]))
    assert (again := from_parquet(items(column), True)) is None or again.items.column_names == ["item_id"]


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("column", ["user_id", "timestamp", "text", "split"])
def test_other_types_in_columns_of_the_format_are_refused_by_name(name, column):
    given, kind = REFUSED[name]
    with pytest.raises(DataError) as error:
        dataset_from_tables(frame(column, given, **{n: v for n, v in HELD.items() if n != column}), repair=True)
    assert f"{column} holds {kind} values" in str(error.value)


@pytest.mark.parametrize("name", ["uuid", "Categorical", "Enum", "uint64 to string_view", "string_view", "Int64"])
def test_ids_of_any_type_that_is_text_or_whole(name):
    column, values = READ[name]
    first = column.iloc[:1] if isinstance(column, pd.Series) else column[:1]
    users = dataset_from_tables(frame("user_id", first, item_id=["i"])).users
    assert users["user_id"].to_pylist() == [str(values[0])]


def test_whole_decimals_are_ids_and_values_and_times():
    """Databases without integers (Oracle's NUMBER) come as such."""
    whole = pa.array([decimal.Decimal(n) for n in (12, 100, 12)], pa.decimal128(38, 0))
    held = pa.table({"user_id": whole, "item_id": ["i", "i", "j"], "timestamp": whole, "value": whole})
    dataset = dataset_from_tables(held)
    assert dataset.users["user_id"].to_pylist() == ["12", "100"]
    assert dataset.interactions["timestamp"].to_pylist() == [12, 100, 12]
    assert dataset.interactions["value"].to_pylist() == [12.0, 100.0, 12.0]
    fractions = held.set_column(0, "user_id", whole.cast(pa.decimal128(38, 2)))
    with pytest.raises(DataError, match=r"row 2: user_id holds decimal128\(38, 2\) values such as 12.00. write ids as"):
        dataset_from_tables(fractions)


def test_one_id_in_two_places_of_a_dictionary_is_one():
    twice = pa.DictionaryArray.from_arrays(pa.array([0, 1], pa.int8()), pa.array(["u", "u"]))
    dataset = dataset_from_tables(pa.table({"user_id": twice, "item_id": ["i", "j"]}))
    assert dataset.users["user_id"].to_pylist() == ["u"]


def test_a_number_of_a_type_that_no_user_here_knows_is_refused():
    """pandas writes periods so; where it is not imported, Arrow reads the integers that count them."""
    field = pa.field("at", pa.int64(), metadata={"ARROW:extension:name": "elsewhere.period"})
    table = pa.table(
        [pa.array(["i", "j", "k"]), pa.array([600, 601, 602])], pa.schema([pa.field("item_id", pa.string()), field])
    )
    with pytest.raises(DataError, match=r"at holds extension<arrow.opaque\[.*type_name=elsewhere.period"):
        dataset_from_tables(HELD, items=table)
    words = pa.field("at", pa.string(), metadata={"ARROW:extension:name": "google:sqlType:json"})
    assert plain_table(pa.table([pa.array(["x"])], pa.schema([words]))).schema == pa.schema([("at", pa.string())])


def test_columns_that_arrow_cannot_take_are_named():
    mixed = pd.DataFrame({"item_id": ["i", "j", "k"], "at": [1, "a", None], "b": [1j, 2, 3], "fine": [1, 2, 3]})
    for given in (mixed, dict(mixed)):
        with pytest.raises(DataError) as error:
            dataset_from_tables(HELD, items=given)
        found = [str(problem) for problem in error.value.problems]
        assert [text.split(" cannot")[0] for text in found] == ["items: column at", "items: column b"]


def test_text_of_more_than_a_chunk_may_hold(tmp_path):
    """2.5 GiB of zeros that take no room: 64-bit offsets become those of several chunks."""
    import mmap

    with open(tmp_path / "text", "wb+") as file:
        file.truncate(5 << 29)
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as held:
            offsets = pa.py_buffer(np.array([0, 5, 5 << 29, (5 << 29)], np.int64).tobytes())
            column = pa.LargeStringArray.from_buffers(3, offsets, pa.py_buffer(held))
            short = pa.chunked_array([column.slice(0, 1), column.slice(2, 1)])
            assert plain(short).to_pylist() == ["\0" * 5, ""] and plain(short).type == pa.string()
            del column, short


def test_what_lies_under_a_null_is_no_difference(tmp_path):
    """A repair empties NaN; a file has nothing there."""
    dataset = dataset_from_tables(
        HELD, items={"item_id": ["i", "j", "k"], "p": pa.array([1.5, float("nan"), None])}, repair=True
    )
    save_dataset(dataset, tmp_path / "saved")
    assert digest(read_tables(tmp_path / "saved")) == digest(dataset)
