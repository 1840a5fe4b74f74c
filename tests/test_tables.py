"""A user's own tables: what is read, what is refused and how it is told, what a repair changes, CSV = Parquet."""

import datetime
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fused_rec.data.arrow import join_texts
from fused_rec.data.dataset import DataError, Dataset
from fused_rec.data.tables import read_tables
from fused_rec.data.times import parse_times

SOUND = {
    "interactions": "user_id,item_id,timestamp,value\nu1,i1,100,1.5\nu2,i1,200,\nu1,i2,,2\n",
    "items": "item_id,name,text,sector,price\ni1,One,First fund,tech,1.5\ni2,Two,,,2\ni3,Three,New fund,oil,\n",
    "users": "user_id,age,postcode\nu1,30,01234\nu2,40,98765\n",
    "ties": "source_id,target_id,kind\nu1,u2,refers\nu2,u1,\n",
}


def write(folder: Path, **tables: str) -> Path:
    for name, text in tables.items():
        (folder / f"{name}.csv").write_bytes(text.encode())
    return folder


def told(folder: Path, **arguments) -> str:
    with pytest.raises(DataError) as error:
        read_tables(folder, **arguments)
    return str(error.value)


def same(left: Dataset, right: Dataset) -> None:
    for name in ("users", "items", "interactions", "reviews", "ties"):
        ours, theirs = getattr(left, name), getattr(right, name)
        assert ours.schema == theirs.schema, name
        assert ours.to_pylist() == theirs.to_pylist(), name
    assert left.repairs == right.repairs


def test_sound_tables_are_read_as_they_are(tmp_path):
    dataset = read_tables(write(tmp_path, **SOUND), name="mine")

    assert dataset.name == "mine" and dataset.repairs == {}
    assert dataset.users.to_pydict() == {"user_id": ["u1", "u2"], "age": [30, 40], "postcode": ["01234", "98765"]}
    assert dataset.items.to_pydict() == {
        "item_id": ["i1", "i2", "i3"],  # i3 has no interaction: a new product
        "name": ["One", "Two", "Three"],
        "text": ["First fund", None, "New fund"],
        "sector": ["tech", None, "oil"],
        "price": [1.5, 2.0, None],
    }
    assert dataset.interactions.to_pydict() == {
        "user": [0, 1, 0],
        "item": [0, 0, 1],
        "timestamp": [100, 200, None],
        "value": [1.5, None, 2.0],
    }
    assert [str(t) for t in dataset.interactions.schema.types] == ["int32", "int32", "int64", "float"]
    assert dataset.ties.to_pydict() == {"source": [0, 1], "target": [1, 0], "kind": ["refers", "tie"]}
    assert dataset.reviews.num_rows == 0


def test_without_users_and_items_ids_come_in_order_of_first_appearance(tmp_path):
    rows = "user_id,item_id,text,part\nŻółw,007,a new product,train\nNA,7,,valid\nŻółw,7,good,test\n"
    dataset = read_tables(write(tmp_path, interactions=rows))

    assert dataset.users.to_pydict() == {"user_id": ["Żółw", "NA"]}
    assert dataset.items.to_pydict() == {"item_id": ["007", "7"]}
    assert dataset.interactions["part"].to_pylist() == ["train", "valid", "test"]
    assert dataset.reviews.to_pydict() == {"user": [0, 0], "item": [0, 1], "text": ["a new product", "good"]}


@pytest.mark.parametrize(
    ("written", "seconds"),
    [
        (["100", "200"], [100, 200]),
        (["1970-01-02", "1970-01-01 00:00:05"], [86400, 5]),
        (["1970-01-01T01:00:00+01:00", "1970-01-01T00:00:09Z"], [0, 9]),
        (["100.9", "1970-01-02", "1970-01-01T01:00:30.25+01:00", " 7 "], [100, 86400, 30, 7]),
        (["100", None, "soon", "nan", ""], [100, None, None, None, None]),
        ([100.9, None, float("nan"), float("inf")], [100, None, None, None]),
        ([datetime.date(1970, 1, 2), None], [86400, None]),
        ([datetime.datetime(1970, 1, 2, tzinfo=datetime.UTC)], [86400]),
        ([datetime.datetime(1970, 1, 2, 0, 0, 0, 999999)], [86400]),
        ([True], [None]),
        ([None], [None]),
    ],
)
def test_times(written, seconds):
    read, readable = parse_times(pa.chunked_array([pa.array(written)]))
    assert [int(s) if r else None for s, r in zip(read, readable, strict=True)] == seconds


def test_an_odd_time_among_many_does_not_change_the_others():
    written = [str(n) for n in range(1500)]
    written[700:703] = ["1970-01-02", "soon", "9.5"]
    read, readable = parse_times(pa.chunked_array([written[:1000], written[1000:]]))
    assert read.tolist() == [*range(700), 86400, 0, 9, *range(703, 1500)]
    assert np.flatnonzero(~readable).tolist() == [701]


def test_every_fault_of_every_file_is_told_at_once(tmp_path):
    write(
        tmp_path,
        interactions="user_id,item_id,timestamp,value,text,part\n"
        "u1,i1,1400000000,nan,fine,train\n"  # row 2
        'u1,i1,1300000000,1," ",train\n'  # repeats row 2, says nothing
        ",i1,1400000000,inf,,train\n"
        "u9,i9,1400000000,,,dev\n"
        "u2,i1,1400000000000,1,,test\n"
        "u3,i1,-5,one,,test\n"
        "u3,i2,soon,1e300,,test\n"
        "u3,i3,1400000000,1,,test\n"
        "u3,i4,1400000000,1,,test\n",
        items='item_id,name\ni1,One\ni2,""\ni1,Again\ni3,\ni4,\n',
        users="user_id,score\nu1,1.5\nu2,inf\nu3,2\nu4,3\n",
        ties="source_id,target_id\nu1,u2\nu1,u1\nu1,u2\nu1,nobody\n",
    )
    report = told(tmp_path)

    for line in (
        "interactions.csv, row 2: value 'nan' is not a finite 32-bit number.",
        "interactions.csv, row 2: the pair ('u1', 'i1') is also in row 3. keep one row for each pair.",
        "interactions.csv, row 3: text is ' '. leave the cell empty (null) where there is no text.",
        "interactions.csv, row 4: user_id is empty. give it an id or remove the row.",
        "interactions.csv, row 5: user_id 'u9' is not in users.csv. add it to users.csv or remove the row.",
        "interactions.csv, row 5: item_id 'i9' is not in items.csv.",
        "interactions.csv, row 5: part is 'dev'. use one of ('train', 'valid', 'test').",
        "interactions.csv, row 6: timestamp '1400000000000' is after 2100 (milliseconds? divide them by 1000).",
        "interactions.csv, row 7: timestamp '-5' is before 1970.",
        "interactions.csv, row 7: value 'one' is not a number.",
        "interactions.csv, row 8: timestamp 'soon' is not a time. give unix seconds or ISO 8601",
        "interactions.csv, row 8: value '1e300' is not a finite 32-bit number.",
        "items.csv, row 3: name is ''.",
        "items.csv, row 4: item_id 'i1' is already in row 2. keep one row for each id.",
        "users.csv, row 3: score is inf.",
        "users.csv, row 5: user 'u4' has no interaction.",
        "ties.csv, row 3: the tie from 'u1' to 'u1' joins a user to itself.",
        "ties.csv, row 4: the tie from 'u1' to 'u2' is there already.",
        "ties.csv, row 5: the tie from 'u1' to 'nobody' names an unknown user.",
    ):
        assert line in report, line
    assert report.startswith("19 problem(s)")
    # What cannot be mended is refused even where a repair is asked for, and it alone is told.
    assert told(tmp_path, repair=True).startswith("4 problem(s)")


def test_a_repair_mends_counts_and_changes_nothing_else(tmp_path):
    write(
        tmp_path,
        interactions="user_id,item_id,timestamp,value,text\n"
        "u1,i1,1400000000,1,later\n"
        "u1,i1,1300000000,2,first\n"
        "u1,i1,,3,undated\n"
        'u1,i2,1400000000,NaN,""\n'
        "u2,i2,9999999999,4,\n"
        "u9,i9,1400000000,5,\n",
        items="item_id,sector\ni1,tech\ni2,oil\n",
        users="user_id\nu1\nu2\nu3\n",
        ties="source_id,target_id,kind,timestamp\nu1,u2,a,500\nu1,u2,a,400\nu1,u2,b,600\nu2,u2,a,1\nu1,x,a,1\n",
    )
    dataset = read_tables(tmp_path, repair=True)

    assert dataset.users.to_pydict() == {"user_id": ["u1", "u2", "u3", "u9"]}
    assert dataset.items.to_pydict() == {"item_id": ["i1", "i2", "i9"], "sector": ["tech", "oil", None]}
    assert dataset.interactions.to_pydict() == {
        "user": [0, 0, 1, 3],
        "item": [0, 1, 1, 2],
        "timestamp": [1300000000, 1400000000, None, 1400000000],
        "value": [2.0, None, 4.0, 5.0],
    }
    assert dataset.reviews.to_pydict() == {
        "user": [0, 0, 0],
        "item": [0, 0, 0],
        "text": ["later", "first", "undated"],
        "timestamp": [1400000000, 1300000000, None],
    }
    assert dataset.ties.to_pydict() == {
        "source": [0, 0],
        "target": [1, 1],
        "kind": ["a", "b"],
        "timestamp": [400, 600],
    }
    assert dataset.repairs == {
        "interactions: bad times left empty": 1,
        "interactions: NaN or infinite value left empty": 1,
        "interactions: empty text made null": 1,
        "interactions: rows with an unknown user_id, which was added without attributes": 1,
        "interactions: rows with an unknown item_id, which was added without attributes": 1,
        "users: users without an interaction kept as new users": 1,
        "interactions: rows that repeat a pair merged into its earliest": 2,
        "ties: ties to unknown users dropped": 1,
        "ties: ties to oneself dropped": 1,
        "ties: repeated ties dropped": 1,
    }


def test_a_repair_of_sound_tables_changes_nothing(tmp_path):
    write(tmp_path, **SOUND)
    same(read_tables(tmp_path, repair=True), read_tables(tmp_path))


def test_a_column_of_mostly_bad_times_is_not_emptied(tmp_path):
    write(tmp_path, interactions="user_id,item_id,timestamp\nu,a,1400000000000\nu,b,1400000000001\nu,c,5\n")
    assert "milliseconds?" in told(tmp_path, repair=True)


def test_examples_are_capped_and_the_total_is_said(tmp_path):
    rows = "".join(f"u,i{n},bad\n" for n in range(12)) + "".join(f"u,j{n},5\n" for n in range(12))
    report = told(write(tmp_path, interactions="user_id,item_id,timestamp\n" + rows))
    assert report.count("is not a time") == 5
    assert "interactions.csv: bad time: 12 rows in all, the first 5 listed." in report


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"items": "item_id\ni\n"}, "holds no interactions.csv or interactions.parquet (there: ['items.csv'])"),
        ({"interactions": "user,item_id\nu,i\n"}, "column user_id is missing (there: user, item_id)"),
        ({"interactions": "user;item_id\nu;i\n"}, "column user_id is missing (there: user, item_id)"),
        ({"interactions": "user_id:item_id\nu:i\n"}, "row 1: its header 'user_id:item_id' is one cell"),
        ({"interactions": "user_id,item_id,item_id\nu,i,i\n"}, "column item_id is there 2 times"),
        ({"interactions": "user_id,item_id\n"}, "there is no usable interaction"),
        ({"interactions": ""}, "interactions.csv: cannot be read: Empty CSV file"),
        ({"interactions": "user_id,item_id\nu,i\nv"}, "row 3: 1 cells where 2 are due: 'v'"),
        ({"interactions": 'user_id,item_id\nu,i\nv,"never closed\nw,i\n'}, "row 3: a quote is not closed"),
    ],
)
def test_files_of_the_wrong_form(tmp_path, tables, message):
    assert message in told(write(tmp_path, **tables))


def test_a_fault_in_one_file_does_not_hide_those_of_the_others(tmp_path):
    write(tmp_path, interactions="user_id\nu\n", items="item_id\ni\ni\n", users="user_id\nu\n", ties="source_id\nu\n")
    report = told(tmp_path)
    assert "3 problem(s)" in report  # and not that every user is without an interaction
    assert "interactions.csv: column item_id is missing" in report
    assert "items.csv, row 3: item_id 'i' is already in row 2" in report
    assert "ties.csv: column target_id is missing" in report


def test_text_that_is_not_utf8(tmp_path):
    (tmp_path / "interactions.csv").write_bytes("user_id,item_id\nu,i\nJosé,i\n".encode("latin-1"))
    assert "interactions.csv, row 3: not UTF-8: b'Jos\\xe9,i\\n'. save the file as UTF-8, or name its" in told(tmp_path)
    (tmp_path / "interactions.csv").write_bytes("user_id,item_id\nJosé,i\n".encode("utf-8-sig"))
    assert read_tables(tmp_path).users["user_id"].to_pylist() == ["José"]


def test_both_forms_of_a_table(tmp_path):
    write(tmp_path, interactions="user_id,item_id\nu,i\n")
    pq.write_table(pa.table({"user_id": ["u"], "item_id": ["i"]}), tmp_path / "interactions.parquet")
    assert "both interactions.csv and interactions.parquet are there. keep one of them" in told(tmp_path)


def test_broken_parquet(tmp_path):
    file = tmp_path / "interactions.parquet"
    pq.write_table(pa.table({"user_id": ["u"] * 999, "item_id": [str(n) for n in range(999)]}), file)
    whole = file.read_bytes()
    for content in (whole[: len(whole) // 2], b"user_id,item_id\nu,i\n", b""):
        file.write_bytes(content)
        assert "interactions.parquet: cannot be read" in told(tmp_path)
    pq.write_table(
        pa.table({"user_id": ["abcd"], "item_id": ["i"]}), file, write_page_checksum=True, compression="none"
    )
    file.write_bytes(file.read_bytes().replace(b"abcd", b"abce", 1))
    assert "cannot be read: could not verify page integrity, CRC checksum verification failed" in told(tmp_path)
    bad = pa.array([b"\xff"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"user_id": bad, "item_id": ["i"]}), file)
    assert "Invalid UTF8" in told(tmp_path)


def test_ids_in_parquet_may_be_integers_or_categories_but_not_floats(tmp_path):
    file = tmp_path / "interactions.parquet"
    pq.write_table(pa.table({"user_id": [7, 8], "item_id": pa.array(["a", "b"]).dictionary_encode()}), file)
    assert read_tables(tmp_path).users["user_id"].to_pylist() == ["7", "8"]
    pq.write_table(pa.table({"user_id": [7.0, None], "item_id": ["a", "b"]}), file)
    assert "row 2: user_id holds double values such as 7.0. write ids as text or integers" in told(tmp_path)


def test_a_column_outside_the_format_is_named(tmp_path):
    dataset = read_tables(write(tmp_path, interactions="user_id,item_id,rating\nu,i,5\n"))
    assert dataset.repairs == {"interactions: column 'rating', which the format does not have, not read": 1}


def test_joined_texts():
    first, second = pa.chunked_array([["a", None, None]]), pa.chunked_array([["b", "b", None]])
    assert join_texts(first, second).to_pylist() == ["a. b", "b", None]


WORDS = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=6)
IDS = WORDS.filter(lambda word: word.strip())
TEXTS = st.one_of(st.none(), WORDS.filter(lambda word: not word.isspace()))


@st.composite
def markets(draw) -> dict[str, pa.Table]:
    users = draw(st.lists(IDS, min_size=1, max_size=5, unique=True))
    items = draw(st.lists(IDS, min_size=1, max_size=5, unique=True))
    pairs = draw(st.lists(st.tuples(st.sampled_from(users), st.sampled_from(items)), min_size=1, max_size=9))

    def column(values):
        return draw(st.lists(values, min_size=len(pairs), max_size=len(pairs)))

    events = {
        "user_id": [user for user, _ in pairs],
        "item_id": [item for _, item in pairs],
        "timestamp": pa.array(column(st.one_of(st.none(), st.integers(-9, 4_200_000_000))), pa.int64()),
        "value": pa.array(column(st.one_of(st.none(), st.floats(width=32))), pa.float32()),
        "text": pa.array(column(TEXTS), pa.string()),
    }
    names = pa.array(draw(st.lists(TEXTS, min_size=len(items), max_size=len(items))), pa.string())
    return {"interactions": pa.table(events), "items": pa.table({"item_id": items, "name": names})}


@settings(max_examples=40, deadline=None)
@given(markets())
def test_csv_and_parquet_give_the_same_dataset(tables):
    with tempfile.TemporaryDirectory() as folder:
        read = []
        for form, written in (("csv", pacsv.write_csv), ("parquet", pq.write_table)):
            (Path(folder) / form).mkdir()
            for name, table in tables.items():
                written(table, Path(folder) / form / f"{name}.{form}")
            try:
                read.append(read_tables(Path(folder) / form, repair=True))
            except DataError as error:  # times that are mostly out of range
                read.append([(problem.row, problem.message.split("'")[0]) for problem in error.problems])
    if isinstance(read[0], Dataset):
        same(*read)
        pairs = set(zip(*(tables["interactions"][c].to_pylist() for c in ("user_id", "item_id")), strict=True))
        assert len(read[0].interactions) == len(pairs)
        assert len(read[0].reviews) == len(tables["interactions"]["text"].drop_null())
        assert np.asarray(read[0].interactions["user"]).max() < read[0].n_users
    else:
        assert read[0] == read[1]


def test_a_file_that_would_go_unread_is_told(tmp_path):
    """A misspelt table costs a whole table if nobody says so; notes and other files may lie there."""
    write(tmp_path, **SOUND)
    (tmp_path / "notes.txt").write_text("mine")
    read_tables(tmp_path)
    (tmp_path / "item.csv").write_text("item_id\ni1\n")
    (tmp_path / "users.csv.zip").write_bytes(b"")
    report = told(tmp_path)
    assert "item.csv: is no table of the format" in report and "users.csv.zip: is no file of a form that" in report


def test_acts_of_ties_are_ids(tmp_path):
    ties = {"source_id": ["u1"], "target_id": ["u2"], "item_id": [[1]]}
    pq.write_table(pa.table(ties), write(tmp_path, **{**SOUND, "ties": ""}) / "ties.parquet")
    (tmp_path / "ties.csv").unlink()
    assert "ties.parquet, row 2: item_id holds list<element: int64> values" in told(tmp_path)
    pq.write_table(pa.table({**ties, "item_id": ["i9"]}), tmp_path / "ties.parquet")
    assert "the tie from 'u1' to 'u2' names an unknown user or item" in told(tmp_path)
    pq.write_table(pa.table({**ties, "item_id": [None]}), tmp_path / "ties.parquet")
    assert read_tables(tmp_path).ties.column_names == ["source", "target", "kind"]
