"""Every file that may be a table is read or refused by name, and a folder of parts is one table."""

import decimal
import gzip
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest

from fused_rec.data.dataset import DataError, Dataset
from fused_rec.data.io.tables import read_tables

HELD = "user_id,item_id\na,x\nb,y\n"
ITEMS = "item_id,text\nx,bond\ny,equity\n"
ROWS = pa.table({"item_id": ["x", "y"], "text": ["bond", "equity"]})


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "interactions.csv").write_text(HELD)
    return tmp_path


def refused(folder: Path) -> str:
    with pytest.raises(DataError) as error:
        read_tables(folder)
    return str(error.value)


def texts(dataset: Dataset) -> list[str | None]:
    return dataset.items["text"].to_pylist() if "text" in dataset.items.column_names else []


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("items.csv", ITEMS.encode()),
        ("items.CSV", ITEMS.encode()),
        ("ITEMS.csv", ITEMS.encode()),
        ("Items.Tsv", ITEMS.replace(",", "\t").encode()),
        ("items.txt", ITEMS.replace(",", "|").encode()),
        ("items.csv.gz", gzip.compress(ITEMS.encode())),
        ("ITEMS.CSV.GZ", gzip.compress(ITEMS.encode())),
        ("items.tsv.gz", gzip.compress(ITEMS[:15].encode()) + gzip.compress(ITEMS[15:].encode())),
    ],
    ids=lambda value: value if isinstance(value, str) else "",  # gzip writes the time: workers would differ
)
def test_names_in_any_case_and_packed_files_are_read(folder, name, content):
    (folder / name).write_bytes(content)
    assert texts(read_tables(folder)) == ["bond", "equity"]


@pytest.mark.parametrize("name", ["items.parquet", "items.PARQUET", "Items.pq"])
def test_parquet_in_any_case(folder, name):
    pq.write_table(ROWS, folder / name)
    assert texts(read_tables(folder)) == ["bond", "equity"]


@pytest.mark.parametrize(
    "name",
    [
        *("items", "items.json", "items.jsonl", "items.ndjson", "items.xlsx", "items.XLSX", "items.ods", "items.xls"),
        *("items.feather", "items.arrow", "items.orc", "items.avro", "items.zip", "items.csv.zip", "items.csv.zst"),
        *("items.csv.bz2", "items.json.gz", "items.parquet.gz", "items.2024.csv", "items.snappy.parquet", "items.db"),
        *("item.csv", "item.json", "items_2024.txt", "items (1).csv", "items-old.json", "holdings.csv", "x.Parquet"),
        *("prices.xlsx", "prices.csv.bak", "items.xml", "items.csv.old", "a.b.jsonl", "items2.txt"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name_with_a_remedy(folder, name):
    (folder / name).write_text(ITEMS)
    report = refused(folder)
    assert report.startswith(f"1 fault in the input:\n  {name}: is no ")
    assert "or take it out." in report
    if name.startswith("items."):
        assert "export it as CSV or Parquet (items.csv, items.parquet)" in report


@pytest.mark.parametrize(
    "name",
    [
        *("README.md", "results.json", "notes.txt", ".DS_Store", ".items.csv.swp", "~$items.xlsx", "items.csv~"),
        *("#items.csv#", ".~lock.items.csv#", "items.md", "reviews.html", "ties.png", "archive.zip", "itemsets.json"),
        *("user_guide.txt", "run.py", "_SUCCESS", "usersettings.json"),
    ],
)
def test_what_is_clearly_no_table_is_no_fault(folder, name):
    (folder / name).write_text(ITEMS)
    assert read_tables(folder).repairs == {}


def test_two_files_of_one_table_are_refused_naming_both(folder):
    (folder / "items.csv").write_text(ITEMS)
    (folder / "ITEMS.TSV").write_text(ITEMS)
    assert "items: both ITEMS.TSV and items.csv are there. keep one of them." in refused(folder)
    (folder / "items.parquet").mkdir()
    assert "items: ITEMS.TSV and items.csv and items.parquet are there." in refused(folder)


def test_only_a_spreadsheet_of_the_interactions(tmp_path):
    (tmp_path / "interactions.xlsx").write_text("")
    report = refused(tmp_path)
    assert "1 fault in the input" in report and "interactions.xlsx: is no file of a form that is read" in report


def test_links(folder):
    (folder / "elsewhere").mkdir()
    (folder / "elsewhere" / "i").write_text(ITEMS)
    (folder / "items.csv").symlink_to(folder / "elsewhere" / "i")
    assert texts(read_tables(folder)) == ["bond", "equity"]
    (folder / "elsewhere" / "i").unlink()
    assert f"items.csv: is a link to {folder}/elsewhere/i, which does not exist" in refused(folder)
    (folder / "items.csv").unlink()
    (folder / "users.xlsx").symlink_to(folder / "nowhere")
    assert "users.xlsx: is no file of a form that is read" in refused(folder)


def test_a_pipe_is_refused_and_not_waited_for(folder):
    os.mkfifo(folder / "items.csv")
    assert "items.csv: is no file" in refused(folder)
    (folder / "items.csv").unlink()
    os.mkfifo(folder / "items.parquet")
    assert "items.parquet: is no file" in refused(folder)


# --- folders of parts


def spark(folder: Path, name: str = "items.parquet") -> Path:
    """As Spark lays them out, with what it leaves beside the parts."""
    made = folder / name
    made.mkdir()
    pq.write_table(ROWS[:1], made / "part-00000-c4f1.c000.snappy.parquet")
    pq.write_table(ROWS[1:], made / "part-00001-c4f1.c000.snappy.parquet")
    for left in ("_SUCCESS", "._SUCCESS.crc", ".part-00000-c4f1.c000.snappy.parquet.crc", "_metadata", "README.md"):
        (made / left).write_bytes(b"left")
    return made


@pytest.mark.parametrize("name", ["items.parquet", "items", "Items.PARQUET", "items.csv"])
def test_a_folder_of_parquet_parts_is_one_table(folder, name):
    spark(folder, name)
    dataset = read_tables(folder)
    assert texts(dataset) == ["bond", "equity"] and dataset.repairs == {}


def test_a_folder_of_csv_parts_is_one_table_in_the_order_of_their_numbers(folder):
    (folder / "items.csv").mkdir()
    for part in range(12):
        rows = pa.table({"item_id": [f"{part}"], "price": [part], "text": ["x"]})
        pacsv.write_csv(rows.select(["text", "item_id", "price"] if part else rows.column_names), folder / "x")
        (folder / "items.csv" / f"part.{part}.csv.gz").write_bytes(gzip.compress((folder / "x").read_bytes()))
    (folder / "interactions.csv").write_text("user_id,item_id\na,1\n")
    items = read_tables(folder).items
    assert items["item_id"].to_pylist() == [str(part) for part in range(12)]
    assert items["price"].to_pylist() == list(range(12))


def test_columns_in_the_names_of_folders_are_read(folder):
    for name, row in (("sector=oil%20and gas/year=2024", 0), ("sector=__HIVE_DEFAULT_PARTITION__/year=2023", 1)):
        (folder / "items.parquet" / name).mkdir(parents=True)
        pq.write_table(ROWS[row : row + 1], folder / "items.parquet" / name / "part-0.parquet")
    assert read_tables(folder).items.to_pydict() == {
        "item_id": ["y", "x"],
        "text": ["equity", "bond"],
        "sector": [None, "oil and gas"],
        "year": ["2023", "2024"],
    }
    pq.write_table(ROWS[:1], folder / "items.parquet" / "sector=oil%20and gas" / "part-9.parquet")
    assert "lie in folders of different columns" in refused(folder)


def part(folder: Path, rows: dict, name: str = "part-00009.parquet") -> str:
    """The report where one more part lies in the folder."""
    made = spark(folder)
    pq.write_table(pa.table(rows), made / name)
    return refused(folder)


def test_parts_of_another_schema_are_named(folder):
    report = part(folder, {"item_id": [7], "text": ["fund"]})
    assert (
        "items.parquet/part-00009.parquet: holds int64 values as item_id, and the parts before it string values. "
        "give all parts the same columns" in report
    )


def of_parts(folder: Path, *columns: pa.Array) -> Path:
    """Items of one row a part, which has this column `code`."""
    made = folder / "items.parquet"
    made.mkdir()
    for number, column in enumerate(columns):
        pq.write_table(pa.table({"item_id": ["xy"[number]], "code": column}), made / f"{number}.parquet")
    return folder


BIG = 2**53 + 1  # the first integer that a 64-bit float rounds


@pytest.mark.parametrize(
    ("columns", "at_fault"),
    [
        ([pa.array([BIG]), pa.array([1.5])], 0),
        ([pa.array([[BIG]]), pa.array([[1.5]])], 0),
        ([pa.array([-1]), pa.array([2**63], pa.uint64())], 1),
        ([pa.array([0.1], pa.float32()), pa.array([0.1])], 1),
        ([pa.array([BIG]), pa.array([0.1], pa.float32())], 1),
        ([pa.array([decimal.Decimal("12345678901234567890.5")]), pa.array([1.5])], 1),
        ([pa.array([1], pa.timestamp("ns")), pa.array([2**62], pa.timestamp("us"))], 1),
        ([pa.array([None]), pa.array(["a"]), pa.array([1])][1:], 1),
    ],
)
def test_parts_whose_values_no_type_holds_unchanged_are_refused_by_name(folder, columns, at_fault):
    report = refused(of_parts(folder, *columns))
    assert f"items.parquet/{at_fault}.parquet: " in report
    assert "code" in report


@pytest.mark.parametrize(
    ("columns", "values"),
    [
        ([pa.array([BIG - 1]), pa.array([1.5])], [float(BIG - 1), 1.5]),
        ([pa.array([BIG]), pa.array([decimal.Decimal("1.5")])], [decimal.Decimal(BIG), decimal.Decimal("1.5")]),
        ([pa.array([0.1], pa.float32()), pa.nulls(1)], [pytest.approx(0.1), None]),
        ([pa.array([[]], pa.list_(pa.null())), pa.array([["a"]])], [[], ["a"]]),
    ],
)
def test_parts_of_types_that_one_holds_unchanged_are_joined(folder, columns, values):
    assert read_tables(of_parts(folder, *columns)).items["code"].to_pylist()[:2] == values


def test_a_fault_in_a_part_names_the_part_and_its_row(folder):
    made = folder / "items"
    made.mkdir()
    (made / "0.csv").write_text("item_id,text\nx,bond\n")
    (made / "1.csv").write_text("item_id,text\ny,equity\nx,fund\n")
    assert "items, row 4: item_id 'x' is already in row 2 (row 3 of items/1.csv)." in refused(folder)


def test_parts_of_other_columns_are_named(folder):
    report = part(folder, {"item_id": ["z"]})
    assert "items.parquet/part-00009.parquet: has the columns item_id, and not item_id, text as" in report


def test_numbers_and_categories_may_differ_in_width_from_part_to_part(folder):
    made = folder / "items.parquet"
    made.mkdir()
    for number, (price, kind) in enumerate(
        [(pa.array([1], pa.int32()), pa.int8()), (pa.array([2.5]), pa.int16()), (pa.nulls(1), pa.int32())]
    ):
        sector = pa.array(["oil"]).cast(pa.dictionary(kind, pa.string()))
        pq.write_table(pa.table({"item_id": [f"{number}"], "price": price, "sector": sector}), made / f"{number}.pq")
    (folder / "interactions.csv").write_text("user_id,item_id\na,1\n")
    assert read_tables(folder).items.to_pydict() == {
        "item_id": ["0", "1", "2"],
        "price": [1.0, 2.5, None],
        "sector": ["oil"] * 3,
    }


@pytest.mark.parametrize(
    ("made", "said"),
    [
        ({}, "items.parquet: is a folder without parts"),
        ({"_SUCCESS": b""}, "items.parquet: is a folder without parts"),
        ({"part-0.parquet": b""}, "items.parquet/part-0.parquet: cannot be read"),
        ({"part-0.csv": b""}, "items.parquet/part-0.csv: cannot be read: Empty CSV file"),
        ({"part-0.csv": b"x,bond\n"}, "column item_id is missing"),
        ({"part-0.orc": b"x"}, "items.parquet/part-0.orc: is no part that can be read"),
        ({"part-00000": b"x"}, "items.parquet/part-00000: is no part that can be read"),
        (
            {"a.csv": ITEMS.encode(), "b.parquet": b"x"},
            "items.parquet: parts of two formats: items.parquet/a.csv and ",
        ),
        ({"more/part-0.csv": ITEMS.encode()}, "items.parquet/more: is a folder among the parts"),
        ({"a=1/a=2/part-0.csv": ITEMS.encode()}, "items.parquet/a=1/a=2: is a folder among the parts"),
        (
            {"text=1/part-0.csv": ITEMS.encode()},
            "items.parquet/text=1/part-0.csv: has column text twice (there: ",
        ),
        ({"a=%ff/part-0.csv": ITEMS.encode()}, "items.parquet/a=%ff: its name is not UTF-8"),
        ({"_temporary/0/x.parquet": b"x"}, "items.parquet/_temporary: the job that wrote the table has not ended"),
        ({"_delta_log/0.json": b"x", "a.parquet": b"x"}, "items.parquet/_delta_log: this is a table of Delta Lake"),
    ],
)
def test_folders_that_are_no_table(folder, made, said):
    (folder / "items.parquet").mkdir()
    for name, content in made.items():
        (folder / "items.parquet" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "items.parquet" / name).write_bytes(content)
    assert said in refused(folder)


def test_other_folders(folder):
    for name in ("items", "runs", "items_photos", "interactions.d"):
        (folder / name).mkdir()
        (folder / name / "1.png").write_bytes(b"")
    (folder / "runs" / "items.csv").write_text("")
    read_tables(folder)
    (folder / "items_photos" / "list.csv").write_text("")
    assert "items_photos: is no table of the format and would not be read" in refused(folder)
    (folder / "items_photos" / "list.csv").unlink()
    (folder / "items" / "train-00000-of-00001.parquet").write_bytes(b"")
    assert "is a shard as Hugging Face lays them out. read the folder with data.name=huggingface" in refused(folder)
