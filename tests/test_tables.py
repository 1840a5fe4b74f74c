"""A user's own tables: what is read, what is refused and how it is told, what a repair changes, CSV = Parquet."""

import datetime
import decimal
import pickle
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fused_rec.data.dataset import DataError, Dataset
from fused_rec.data.io.arrow import join_texts
from fused_rec.data.io.numbers import typed
from fused_rec.data.io.tables import dataset_from_tables, read_tables
from fused_rec.data.io.times import parse_times, read_times

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


def reported(folder: Path, **arguments) -> str:
    with pytest.raises(DataError) as error:
        read_tables(folder, **arguments)
    return str(error.value)


def same(left: Dataset, right: Dataset) -> None:
    for name in ("users", "items", "interactions", "reviews", "ties"):
        ours, theirs = getattr(left, name), getattr(right, name)
        assert ours.schema == theirs.schema, name
        assert ours.to_pylist() == theirs.to_pylist(), name
    assert (left.repairs, left.notes) == (right.repairs, right.notes)


def test_sound_tables_are_read_as_they_are(tmp_path):
    dataset = read_tables(write(tmp_path, **SOUND), name="mine")

    assert dataset.name == "mine"
    note = "users.csv: postcode read as text because of '01234' in row 2, which is not a plain number"
    kept = "interactions: values kept, which the model does not use (data.min_value makes use of them)"
    assert dataset.notes == {note: 1, kept: 2} and dataset.repairs == {}
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
    rows = "user_id,item_id,text,split\nŻółw,007,a new product,train\nNA,7,,valid\nŻółw,7,good,test\n"
    dataset = read_tables(write(tmp_path, interactions=rows))

    assert dataset.users.to_pydict() == {"user_id": ["Żółw", "NA"]}
    assert dataset.items.to_pydict() == {"item_id": ["007", "7"]}
    assert dataset.interactions["split"].to_pylist() == ["train", "valid", "test"]
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


def test_every_fault_of_every_file_is_reported_at_once(tmp_path):
    write(
        tmp_path,
        interactions="user_id,item_id,timestamp,value,text,split\n"
        "u1,i1,1400000000,inf,fine,train\n"  # row 2
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
    report = reported(tmp_path, min_value=0.5)  # else no value is needed, and none a fault

    for line in (
        "interactions.csv, row 2: value 'inf' is not a finite 32-bit number.",
        "interactions.csv, row 2: the pair ('u1', 'i1') is also in row 3. keep one row for each pair.",
        "interactions.csv, row 4: user_id is empty. give it an id or remove the row.",
        "interactions.csv, row 5: user_id 'u9' is not in users.csv. add it to users.csv or remove the row.",
        "interactions.csv, row 5: item_id 'i9' is not in items.csv.",
        "interactions.csv, row 5: split is 'dev'. use one of ('train', 'valid', 'test').",
        "interactions.csv, row 6: timestamp '1400000000000' is after 2100 (milliseconds? divide them by 1000).",
        "interactions.csv, row 7: timestamp '-5' is before 1970.",
        "interactions.csv, row 7: value 'one' is not a number.",
        "interactions.csv, row 8: timestamp 'soon' is not a time. give unix seconds or ISO 8601",
        "interactions.csv, row 8: value '1e300' is not a finite 32-bit number.",
        "items.csv, row 4: item_id 'i1' is already in row 2. keep one row for each id.",
        "users.csv, row 3: score is inf.",
        "ties.csv, row 3: the tie from 'u1' to 'u1' joins a user to itself.",
        "ties.csv, row 4: the tie from 'u1' to 'u2' is repeated.",
        "ties.csv, row 5: the tie from 'u1' to 'nobody' names an unknown user.",
    ):
        assert line in report, line
    head = "16 faults in the input, 10 of which can be repaired (--config.data.repair=True; in Python repair=True):"
    assert report.splitlines()[0] == head
    # What cannot be mended is refused even where a repair is asked for, and it alone is told.
    assert reported(tmp_path, min_value=0.5, repair=True).startswith("6 faults in the input:")


def test_an_error_goes_from_one_process_to_another(tmp_path):
    write(tmp_path, interactions="user_id,item_id\n,i1\n")
    with pytest.raises(DataError) as error:
        read_tables(tmp_path)
    other = pickle.loads(pickle.dumps(error.value))
    assert (str(other), other.problems) == (str(error.value), error.value.problems)


def test_a_repair_mends_counts_and_changes_nothing_else(tmp_path):
    write(
        tmp_path,
        interactions="user_id,item_id,timestamp,value,text\n"
        "u1,i1,1400000000,1,later\n"
        "u1,i1,1300000000,2,first\n"
        "u1,i1,,3,undated\n"
        'u1,i2,1400000000,inf,""\n'
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
        "interactions: rows with an unknown user_id, which was added without attributes": 1,
        "interactions: rows with an unknown item_id, which was added without attributes": 1,
        "interactions: rows that repeat a pair merged into its earliest": 2,
        "ties: ties to unknown users dropped": 1,
        "ties: ties to oneself dropped": 1,
        "ties: repeated ties dropped": 1,
    }
    assert dataset.notes == {
        "interactions: value not finite left empty, the first in row 5: 'inf' is not a finite 32-bit number": 1,
        "interactions: values kept, which the model does not use (data.min_value makes use of them)": 5,
        "users: users without an interaction, kept as new users": 1,  # u3
    }


def test_a_repair_of_sound_tables_changes_nothing(tmp_path):
    write(tmp_path, **SOUND)
    same(read_tables(tmp_path, repair=True), read_tables(tmp_path))


def test_a_column_of_mostly_bad_times_is_not_emptied(tmp_path):
    write(tmp_path, interactions="user_id,item_id,timestamp\nu,a,1400000000000\nu,b,1400000000001\nu,c,5\n")
    assert "milliseconds?" in reported(tmp_path, repair=True)


def test_examples_are_capped_and_the_total_is_said(tmp_path):
    rows = "".join(f"u,i{n},bad\n" for n in range(12)) + "".join(f"u,j{n},5\n" for n in range(12))
    report = reported(write(tmp_path, interactions="user_id,item_id,timestamp\n" + rows))
    assert report.count("is not a time") == 5
    assert "interactions.csv: bad time: 12 rows in all, the first 5 listed." in report


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"items": "item_id\ni\n"}, "has no interactions.csv or interactions.parquet (there: ['items.csv'])"),
        ({"interactions": "user,item_id\nu,i\n"}, "column user_id is missing (there: user, item_id)"),
        ({"interactions": "user;item_id\nu;i\n"}, "column user_id is missing (there: user, item_id)"),
        ({"interactions": "user_id:item_id\nu:i\n"}, "row 1: its header 'user_id:item_id' is one cell"),
        ({"interactions": "user_id,item_id,item_id\nu,i,i\n"}, "column item_id occurs 2 times"),
        ({"interactions": "user_id,item_id\n"}, "there is no usable interaction"),
        ({"interactions": ""}, "interactions.csv: cannot be read: Empty CSV file"),
        ({"interactions": "user_id,item_id\nu,i\nv"}, "row 3: 1 cells instead of 2: 'v'"),
        ({"interactions": 'user_id,item_id\nu,i\nv,"never closed\nw,i\n'}, "row 3: a quote is not closed"),
    ],
)
def test_files_of_the_wrong_form(tmp_path, tables, message):
    assert message in reported(write(tmp_path, **tables))


def test_a_fault_in_one_file_does_not_hide_those_of_the_others(tmp_path):
    write(tmp_path, interactions="user_id\nu\n", items="item_id\ni\ni\n", users="user_id\nu\n", ties="source_id\nu\n")
    report = reported(tmp_path)
    assert "3 faults" in report  # and not that every user is without an interaction
    assert "interactions.csv: column item_id is missing" in report
    assert "items.csv, row 3: item_id 'i' is already in row 2" in report
    assert "ties.csv: column target_id is missing" in report


def test_text_that_is_not_utf8(tmp_path):
    (tmp_path / "interactions.csv").write_bytes("user_id,item_id\nu,i\nJosé,i\n".encode("latin-1"))
    assert "interactions.csv, row 3: not UTF-8: b'Jos\\xe9,i\\n'. save the file as UTF-8, or name its" in reported(
        tmp_path
    )
    (tmp_path / "interactions.csv").write_bytes("user_id,item_id\nJosé,i\n".encode("utf-8-sig"))
    assert read_tables(tmp_path).users["user_id"].to_pylist() == ["José"]


def test_both_forms_of_a_table(tmp_path):
    write(tmp_path, interactions="user_id,item_id\nu,i\n")
    pq.write_table(pa.table({"user_id": ["u"], "item_id": ["i"]}), tmp_path / "interactions.parquet")
    assert "both interactions.csv and interactions.parquet are there. keep one of them" in reported(tmp_path)


def test_broken_parquet(tmp_path):
    file = tmp_path / "interactions.parquet"
    pq.write_table(pa.table({"user_id": ["u"] * 999, "item_id": [str(n) for n in range(999)]}), file)
    whole = file.read_bytes()
    for content in (whole[: len(whole) // 2], b"user_id,item_id\nu,i\n", b""):
        file.write_bytes(content)
        assert "interactions.parquet: cannot be read" in reported(tmp_path)
    pq.write_table(
        pa.table({"user_id": ["abcd"], "item_id": ["i"]}), file, write_page_checksum=True, compression="none"
    )
    file.write_bytes(file.read_bytes().replace(b"abcd", b"abce", 1))
    assert "cannot be read: could not verify page integrity, CRC checksum verification failed" in reported(tmp_path)
    bad = pa.array([b"\xff"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"user_id": bad, "item_id": ["i"]}), file)
    assert "Invalid UTF8" in reported(tmp_path)


def test_ids_in_parquet_may_be_integers_or_categories_but_not_floats(tmp_path):
    file = tmp_path / "interactions.parquet"
    pq.write_table(pa.table({"user_id": [7, 8], "item_id": pa.array(["a", "b"]).dictionary_encode()}), file)
    assert read_tables(tmp_path).users["user_id"].to_pylist() == ["7", "8"]
    pq.write_table(pa.table({"user_id": [7.0, None], "item_id": ["a", "b"]}), file)
    assert "row 2: user_id holds double values such as 7.0. write ids as text or integers" in reported(tmp_path)


def test_a_column_outside_the_format_is_named(tmp_path):
    dataset = read_tables(write(tmp_path, interactions="user_id,item_id,rating\nu,i,5\n"))
    assert dataset.repairs == {}
    assert dataset.notes == {"interactions: column 'rating', which the format does not have, not read": 1}


def test_joined_texts():
    first, second = pa.chunked_array([["a", None, None]]), pa.chunked_array([["b", "b", None]])
    assert join_texts(first, second).to_pylist() == ["a. b", "b", None]


WORDS = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=6)
IDS = WORDS.map(str.strip).filter(bool)
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


def test_a_file_that_would_go_unread_is_reported(tmp_path):
    """A misspelt table costs a whole table if nobody says so; notes and other files may lie there."""
    write(tmp_path, **SOUND)
    (tmp_path / "notes.txt").write_text("mine")
    read_tables(tmp_path)
    (tmp_path / "item.csv").write_text("item_id\ni1\n")
    (tmp_path / "users.csv.zip").write_bytes(b"")
    report = reported(tmp_path)
    assert "item.csv: is no table of the format" in report and "users.csv.zip: is no file of a form that" in report


def test_acts_of_ties_are_ids(tmp_path):
    ties = {"source_id": ["u1"], "target_id": ["u2"], "item_id": [[1]]}
    pq.write_table(pa.table(ties), write(tmp_path, **{**SOUND, "ties": ""}) / "ties.parquet")
    (tmp_path / "ties.csv").unlink()
    assert "ties.parquet, row 2: item_id holds list<item: int64> values" in reported(tmp_path)
    pq.write_table(pa.table({**ties, "item_id": ["i9"]}), tmp_path / "ties.parquet")
    assert "the tie from 'u1' to 'u2' names an unknown user or item" in reported(tmp_path)
    pq.write_table(pa.table({**ties, "item_id": [None]}), tmp_path / "ties.parquet")
    assert read_tables(tmp_path).ties.column_names == ["source", "target", "kind"]


def test_blanks_around_ids_are_a_fault_that_a_repair_mends(tmp_path):
    """Such an id would be a customer of its own."""
    events = "user_id,item_id\nK1,a\nK1 ,b\n K1,a\nK2\u00a0,b\n"
    write(tmp_path, interactions=events, users="user_id\nK1\nK2\n", ties="source_id,target_id\nK1, K2\n")
    report = reported(tmp_path)
    assert "interactions.csv, row 3: user_id 'K1 ' has blanks around it, and would differ from 'K1'. write" in report
    assert "ties.csv, row 2: target_id ' K2' has blanks around it" in report
    assert "is not in users.csv" not in report  # they are known without
    dataset = read_tables(tmp_path, repair=True)
    assert dataset.users["user_id"].to_pylist() == ["K1", "K2"]
    assert dataset.interactions.select(["user", "item"]).to_pydict() == {"user": [0, 0, 1], "item": [0, 1, 1]}
    assert dataset.repairs == {
        "interactions: blanks around user_id removed": 3,
        "interactions: rows that repeat a pair merged into its earliest": 1,
        "ties: blanks around target_id removed": 1,
    }
    write(tmp_path, users="user_id\nK1\nK2\nK1 \n")  # two rows of one customer: which one counts, nobody can know
    assert "users.csv, row 4: user_id 'K1' is already in row 2" in reported(tmp_path, repair=True)


VALUED = "user_id,item_id,value,text\nu,a,1,bad\nu,a,5,better\nu,b,4,\nv,a,,\nv,b,3.99,poor\nw,c,-2,sold\n"


def test_rows_below_the_least_value_are_no_interactions(tmp_path):
    dataset = read_tables(write(tmp_path, interactions=VALUED), min_value=4)
    assert dataset.users["user_id"].to_pylist() == ["u", "v", "w"]  # w is a new customer, c a new product
    assert dataset.items["item_id"].to_pylist() == ["a", "b", "c"]
    assert dataset.interactions.to_pydict() == {"user": [0, 0, 1], "item": [0, 1, 0], "value": [5.0, 4.0, None]}
    assert dataset.reviews["text"].to_pylist() == ["bad", "better", "poor", "sold"]  # what was said was said
    assert dataset.repairs == {}
    assert dataset.notes == {
        "interactions: rows of a value below 4, which are no interactions": 3,
        "interactions: rows without a value, which stay interactions": 1,
        "users: users without an interaction, kept as new users": 1,
    }
    assert repr(dataset).endswith("0 ties, 3 notes)")
    assert "there is no usable interaction of a value of 9 or more" in reported(
        write(tmp_path, interactions="user_id,item_id,value\nu,a,1\n"), min_value=9
    )
    write(tmp_path, interactions="user_id,item_id\nu,a\n")
    assert "interactions.csv: there is no column value that can be read, and data.min_value is 4" in reported(
        tmp_path, min_value=4
    )


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("n/a", "is not a number."),
        ("1'234.50", "is not a number (a thousands separator is in it)."),
        ('"1,234.50"', "is not a number (a thousands separator is in it)."),
        ('"1.234,50"', "is not a number (a thousands separator is in it)."),
        ('"1,234"', "is not a number (a thousands separator or a decimal comma is in it)."),
        ('"12,5"', "is not a number (a decimal comma is in it)."),
        ("1 234", "is not a number (a thousands separator is in it)."),
        ("inf", "is not a finite 32-bit number."),
    ],
)
def test_values_matter_only_where_they_are_needed(tmp_path, written, said):
    write(tmp_path, interactions=f"user_id,item_id,value\nu,a,1\nu,b,{written}\nv,b,{written}\n")
    for repair in (False, True):  # to guess would change an amount
        report = reported(tmp_path, min_value=1, repair=repair)
        assert (
            report.startswith("2 faults in the input:") and f"row 3: value {written.strip(chr(34))!r} {said}" in report
        )
    dataset = read_tables(tmp_path)
    assert dataset.interactions["value"].to_pylist() == [1.0, None, None] and dataset.repairs == {}
    [note] = [note for note in dataset.notes if "left empty" in note]
    assert note.endswith(f"left empty, the first in row 3: {written.strip(chr(34))!r} {said[:-1]}")
    assert dataset.notes[note] == 2


def test_faults_are_counted_by_rows_and_not_by_lines(tmp_path):
    rows = "".join(f"u,i{n},bad\n" for n in range(12)) + "".join(f"u,j{n},5\n" for n in range(12)) + ",i,5\n"
    report = reported(write(tmp_path, interactions="user_id,item_id,timestamp\n" + rows))
    assert report.startswith("13 faults in the input, 12 of which can be repaired (")
    assert len(report.splitlines()) == 1 + 5 + 1 + 1


# --- missing values


MISSING = pa.array(["a", None, "", " \t", "\u00a0", "NA"])
HELD = {"user_id": ["u", "v", "u", "v", "u", "v"], "item_id": ["i", "j", "k", "l", "m", "n"]}


def frames(**items) -> Dataset:
    return dataset_from_tables(HELD, items={"item_id": HELD["item_id"], **items})


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        (MISSING, ["a", None, None, None, None, "NA"]),
        (MISSING.cast(pa.large_string()), ["a", None, None, None, None, "NA"]),
        (MISSING.dictionary_encode(), ["a", None, None, None, None, "NA"]),
        (pa.array([1.5, float("nan"), None, 0.0, -0.0, 2]), [1.5, None, None, 0.0, 0.0, 2.0]),
        (pa.array([1.5, float("nan"), None, 0, 0, 0], pa.float32()), [1.5, None, None, 0, 0, 0]),
        (
            pa.array([["a", None, "", " "], [], None, [None], [""], ["b"]]),
            [["a"], [], None, None, None, ["b"]],  # known to have none; unknown; nothing but unknown elements
        ),
        (
            pa.array([["a", ""], [], None, [None], [""], ["b"]], pa.large_list(pa.large_string())),
            [["a"], [], None, None, None, ["b"]],
        ),
        (
            pa.array([[1.0, float("nan")], [float("nan")], [], None, [2.0], [3.0]]),
            [[1.0], None, [], None, [2.0], [3.0]],
        ),
        (pa.array([[1, None], [None], [], None, [2], [3]], pa.large_list(pa.int64())), [[1], None, [], None, [2], [3]]),
    ],
)
def test_missing_has_one_meaning_in_every_type_of_column(column, expected, tmp_path):
    assert frames(sector=column).items["sector"].to_pylist() == expected
    pq.write_table(pa.table(HELD), tmp_path / "interactions.parquet")
    pq.write_table(pa.table({"item_id": HELD["item_id"], "sector": column}), tmp_path / "items.parquet")
    assert read_tables(tmp_path).items["sector"].to_pylist() == expected


def test_missing_has_one_meaning_in_every_column(tmp_path):
    """Quoted or not, in names, texts, parts of ties, numbers and codes; no fault, and nothing to repair."""
    write(
        tmp_path,
        interactions='user_id,item_id,value,text,timestamp\nu,i,"",""," "\nv,j, ,"  ",1400000000\nu,k,nan,,""\n',
        items='"item_id","name","text","sector","price"\n"i",""," ","",""\n"j","J","","oil","1.5"\n"k",,,,nan\n',
        ties='source_id,target_id,kind,item_id,timestamp\nu,v,""," ",""\nv,u," ",i,0\n',
        reviews='user_id,item_id,text,timestamp\nu,i,"",\nu,j,fine,""\n',
    )
    dataset = read_tables(tmp_path)
    assert dataset.repairs == {}
    assert dataset.items.to_pydict() == {
        "item_id": ["i", "j", "k"],
        "name": [None, "J", None],
        "text": [None, None, None],
        "sector": [None, "oil", None],
        "price": [None, 1.5, None],
    }
    assert dataset.interactions["value"].to_pylist() == [None, None, None]
    assert dataset.interactions["timestamp"].to_pylist() == [None, 1400000000, None]
    assert dataset.reviews.to_pydict() == {"user": [0], "item": [1], "text": ["fine"], "timestamp": [None]}
    assert dataset.ties["kind"].to_pylist() == ["tie", "tie"] and dataset.ties["item"].to_pylist() == [None, 0]


# --- numbers in CSV


@pytest.mark.parametrize(
    ("cells", "read", "odd"),
    [
        (["1", "-2", ""], [1, -2, None], None),
        (["0", "9223372036854775807", "-9223372036854775808"], [0, 2**63 - 1, -(2**63)], None),
        (["9007199254740993", "1", ""], [2**53 + 1, 1, None], None),
        (["1.5", "2", "3.250"], [1.5, 2.0, 3.25], None),
        (["1.5", "nan", "NaN"], [1.5, None, None], None),
        (["0.1", "0.30000000000000004", "123456789.123456"], [0.1, 0.30000000000000004, 123456789.123456], None),
        (["0.00001", "1e-07", "1e+20"], [1e-5, 1e-7, 1e20], None),
        (["1e-7", "-2.5e-10", "0.5"], [1e-7, -2.5e-10, 0.5], None),  # as Arrow writes them
        (["0x1A", "0xFF", "0x02"], None, ("0x1A", 2)),
        (["1", "12345678901234567891", "3"], None, ("12345678901234567891", 3)),
        (["1", "9223372036854775808", "3"], None, ("9223372036854775808", 3)),
        (["9007199254740993", "0.5", "1"], None, ("9007199254740993", 2)),
        (
            ["9007199254740994", "0.5", "1"],
            None,
            ("9007199254740994", 2),
        ),  # 2^53 + 2 is a float, its neighbours are not
        (["1E5", "10E4", "2E5"], None, ("1E5", 2)),
        (["1e5", "1", "2"], None, ("1e5", 2)),
        (["1e+05", "1", "2"], None, ("1e+05", 2)),
        (["007", "7", ""], None, ("007", 2)),
        (["-007", "7", ""], None, ("-007", 2)),
        (["00", "0", ""], None, ("00", 2)),
        (["+5", "5", ""], None, ("+5", 2)),
        (["1_000", "5", ""], None, ("1_000", 2)),
        (['"1,000"', "5", ""], None, ("1,000", 2)),
        (["1'000", "5", ""], None, ("1'000", 2)),
        ([" 5", "5", ""], None, (" 5", 2)),
        (["5", "1.", ""], None, ("1.", 3)),
        (["5", ".5", ""], None, (".5", 3)),
        (["5", "n/a", ""], None, ("n/a", 3)),
        (["5", "0.1234567890123456789", ""], None, ("0.1234567890123456789", 3)),
        (["\u0665", "5", ""], None, ("\u0665", 2)),
        (["true", "false", ""], ["true", "false", None], None),
        (["oil", "tech", ""], ["oil", "tech", None], None),
        (["2024-01-01", "2024-01-02", ""], ["2024-01-01", "2024-01-02", None], None),
        (["nan", "", "inf"], ["nan", None, "inf"], None),
    ],
)
def test_a_column_of_csv_is_numbers_only_where_no_value_changes(tmp_path, cells, read, odd):
    rows = "".join(f"{item},{cell}\n" for item, cell in zip("ijk", cells, strict=True))
    write(tmp_path, interactions="user_id,item_id\nu,i\nu,j\nu,k\n", items=f"item_id,code\n{rows}")
    dataset = read_tables(tmp_path)
    if odd is None:
        assert dataset.items["code"].to_pylist() == read and dataset.repairs == {}
        return
    value, row = odd
    note = f"items.csv: code read as text because of {value!r} in row {row}, which is not a plain number"
    twins = [cell for cell in cells if cell != cell.strip() and cell.strip() in cells]
    apart = "items: values of code that differ from others only by blanks around them, such as {!r}, kept apart"
    assert dataset.notes == {note: 1, **{apart.format(twin): 1 for twin in twins}} and dataset.repairs == {}
    assert dataset.items["code"].to_pylist() == [cell.strip('"') or None for cell in cells]


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.integers(-(10**21), 10**21).map(str),
            st.floats(allow_nan=False, allow_infinity=False).map(repr),
            st.from_regex(r"\A[-+]?[0-9]{0,3}[.xXeE_]?[0-9A-F]{0,20}\Z"),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_different_texts_stay_different_values(cells):
    """Up to zeros at the end of decimals: what numbers write back is the text that was read."""
    read, _ = typed(pa.chunked_array([pa.array(cells, pa.string())]))
    for cell, value in zip(cells, read.to_pylist(), strict=True):
        if isinstance(value, int | float):
            assert decimal.Decimal(cell) == decimal.Decimal(repr(value))
        else:
            assert value == (cell or None)


def test_value_is_no_number_with_underscores(tmp_path):
    write(tmp_path, interactions="user_id,item_id,value\nu,i,1_000\nu,j,\u0662\n")
    report = reported(tmp_path, min_value=1)
    assert "row 2: value '1_000' is not a number" in report and "row 3" in report


# --- times


SECONDS = 1733045400  # 2024-12-01T09:30:00Z
MIDNIGHT = 1733011200


@pytest.mark.parametrize(
    ("written", "seconds"),
    [
        ("2024-12-01", MIDNIGHT),
        ("20241201", MIDNIGHT),
        ("20241201.0", MIDNIGHT),
        ("2024-W48-7", MIDNIGHT),
        ("2024W487", MIDNIGHT),
        ("2024-336", MIDNIGHT),
        ("2024336", MIDNIGHT),
        ("2024-12-01T09:30:00", SECONDS),
        ("2024-12-01t09:30:00z", SECONDS),
        ("2024-12-01 09:30", SECONDS),
        ("2024-12-01T09", SECONDS - 1800),
        ("20241201T093000", SECONDS),
        ("20241201T0930", SECONDS),
        ("20241201T093000Z", SECONDS),
        ("2024W487T093000", SECONDS),
        ("2024336T093000", SECONDS),
        ("2024-12-01T09:30:00.999999999", SECONDS),
        ("2024-12-01T09:30:00,999", SECONDS),
        ("2024-12-01T09:30,5", SECONDS + 30),
        ("2024-12-01T09.5", SECONDS),
        ("2024-12-01T10:30:00+01:00", SECONDS),
        ("2024-12-01T10:30:00+0100", SECONDS),
        ("2024-12-01T10:30:00+01", SECONDS),
        ("2024-12-01 10:30:00 +0100", SECONDS),
        ("20241201T043000-0500", SECONDS),
        ("2024-12-01T04:30:00\u221205:00", SECONDS),
        ("2024-11-30T24:00:00", MIDNIGHT),
        ("2024-11-30T23:59:60Z", MIDNIGHT),
        ("1733045400", SECONDS),
        ("1733045400.75", SECONDS),
        ("1.7330454e9", SECONDS),
        (" 1733045400 ", SECONDS),
        ("+1733045400", SECONDS),
        ("874724710", 874724710),
        (1733045400, SECONDS),
        (20241201, MIDNIGHT),
        (20241201.0, MIDNIGHT),
        (1733045400.75, SECONDS),
        (decimal.Decimal("1733045400.75"), SECONDS),
        (decimal.Decimal("20241201"), MIDNIGHT),
        (datetime.date(2024, 12, 1), MIDNIGHT),
        (datetime.datetime(2024, 12, 1, 9, 30, 0, 999999), SECONDS),
        (pa.scalar(SECONDS * 10**9 + 999_999_999, pa.timestamp("ns", "Europe/Zurich")), SECONDS),
        (pa.scalar(MIDNIGHT * 1000, pa.date64()), MIDNIGHT),
        (pa.scalar(SECONDS, pa.uint64()), SECONDS),
        (pa.scalar(SECONDS, pa.uint32()), SECONDS),
    ],
)
def test_a_time_is_read_alone_and_beside_a_plain_date(written, seconds):
    value = written if isinstance(written, pa.Scalar) else pa.scalar(written)
    times = read_times(pa.chunked_array([pa.array([value, None], value.type)]))
    assert (times.seconds[0], times.good.tolist(), times.faults.tolist()) == (seconds, [True, False], [0, 0])
    if isinstance(written, str):
        times = read_times(pa.chunked_array([["2024-11-30", written, "1730000000"]]))
        assert times.seconds.tolist() == [MIDNIGHT - 86400, seconds, 1730000000] and times.good.all()


@pytest.mark.parametrize(
    ("written", "says"),
    [
        ("2024", "is a year without a day (write 2024-12-01)"),
        (2024, "is a year without a day"),
        ("2024-12", "is a month without a day"),
        (202412, "is a month without a day"),
        ("2024-W48", "is a week without a day"),
        ("2024W48", "is a week without a day"),
        ("45627", "is a day number"),
        (45627, "is a day number"),
        (45627.396, "is a day number"),
        (20058, "is a day number"),
        ("20241301", "has eight digits"),
        (20240230, "has eight digits"),
        (1122024, "can be a date with the day or the month first"),
        ("01122024", "is not a time"),
        (31122024, "has eight digits"),
        (99991231, "has eight digits"),
        (241201, "can be a date with two digits of its year"),
        ("0020241201", "is not a time"),
        ("20241201093000", "is a date and a time without a T between them"),
        (202412010930, "is a date and a time without a T between them"),
        ("2024120109", "can be a date and an hour, or unix seconds"),
        (1733045400123, "is after 2100 (milliseconds? divide them by 1000)"),
        (1733045400123456, "is after 2100 (microseconds? divide them by 1000000)"),
        (1733045400123456789, "is after 2100 (nanoseconds? divide them by 1000000000)"),
        (pa.scalar(2**64 - 1, pa.uint64()), "is not a time"),
        ("99999999999999999999", "is not a time"),
        ("18991231", "has eight digits"),
        ("19691231", "is before 1970"),
        ("21000101", "is after 2100"),
        ("1_700_000_000", "is not a time"),
        ("0x65f0f0f0", "is not a time"),
        ("\u0662\u0660\u0662\u0664\u0661\u0662\u0660\u0661", "is not a time"),
        ("\u0662\u0660\u0662\u0664-12-01", "is not a time"),
        ("2024-02-30", "is not a time"),
        ("2023-366", "is not a time"),
        ("2024-W53-1", "is not a time"),
        ("2024-12-01T25:00", "is not a time"),
        ("2024-12-01T24:01", "is not a time"),
        ("2024-12-01T09:60", "is not a time"),
        ("2024-12-01x09:30", "is not a time"),
        ("2024-12-01T09:30:00+24:00", "is not a time"),
        ("01/12/2024", "is not a time"),
        ("01.12.2024", "is not a time"),
        ("+002024-12-01", "is not a time"),
        ("2024-12-01/2024-12-02", "is not a time"),
        ("T09:30", "is not a time"),
        ("NaT", "is not a time"),
        (True, "is not a time (bool values are none)"),
        (datetime.timedelta(1), "is not a time (duration[us] values are none)"),
        (datetime.time(9), "is not a time (time64[us] values are none)"),
        (float("inf"), "is not a time"),
        (pa.scalar(1733045376.0, pa.float32()), "is of 32-bit floats, which round times to minutes"),
    ],
)
def test_what_is_no_time_is_refused_alone_and_among_others(written, says):
    value = written if isinstance(written, pa.Scalar) else pa.scalar(written)
    times = read_times(pa.chunked_array([pa.array([value, None], value.type)]))
    assert times.good.tolist() == [False, False] and times.says(0).startswith(says)
    if isinstance(written, str | int) and not isinstance(written, bool):
        amid = [str(written), *(f"2024-11-{day:02d}" for day in range(1, 29))]
        times = read_times(pa.chunked_array([amid]))
        assert times.good.tolist() == [False] + [True] * 28 and times.says(0).startswith(says)


@pytest.mark.parametrize("odd", [5, 3600, 481392, "1970-01-01", "1970-01-01T00:00:00Z", 0, datetime.date(1970, 1, 1)])
def test_1970_amid_later_times_is_refused(odd):
    """Sentinels, hours and minutes since 1970. As text, and in a column of its own type where there is one."""
    later = range(1_700_000_000, 1_700_000_009)
    columns: list[list] = [[str(odd), *map(str, later)]]
    if not isinstance(odd, str):
        columns.append([odd, *([datetime.date(2024, 1, 2)] * 3 if isinstance(odd, datetime.date) else later)])
    for column in columns:
        times = read_times(pa.chunked_array([pa.array(column)]))
        assert times.good.tolist() == [False] + [True] * (len(column) - 1)
        assert times.says(0).startswith("is in 1970, in a column of much later times")


def test_numbers_of_1970_beside_dates_of_digits_are_refused():
    """A counter that passes 1,900,001 would be half counter and half dates."""
    times = read_times(pa.chunked_array([[9_000_099, 19_990_101, 2_000_000, 5]]))
    assert times.good.tolist() == [False, True, False, False]


def test_small_times_that_agree_with_their_column_are_read():
    """Counters, and what public data hold: MovieLens begins in 1997."""
    for column in ([0, 1, 2], [100, 1950, 2000], list(range(3000)), [874724710, 893286638], [5, 45627, 9999999]):
        assert read_times(pa.chunked_array([column])).good.all()


def test_zero_stands_for_the_start_in_ties_and_reviews():
    late = {"user_id": ["u", "v"], "item_id": ["i", "j"], "timestamp": [1_700_000_000, 1_700_000_001]}
    ties = {"source_id": ["u", "v"], "target_id": ["v", "u"], "timestamp": [1_700_000_000, 0]}
    said = {**late, "text": ["a", "b"], "timestamp": [0, 1_700_000_000]}
    dataset = dataset_from_tables(late, ties=ties, reviews=said)
    assert dataset.ties["timestamp"].to_pylist() == [1_700_000_000, 0]
    assert dataset.reviews["timestamp"].to_pylist() == [0, 1_700_000_000]
    with pytest.raises(DataError, match="row 3: timestamp '0' is in 1970"):
        dataset_from_tables({**late, "timestamp": [1_700_000_000, 0]})


@pytest.mark.parametrize(
    ("unit", "seconds"), [("D", MIDNIGHT), ("h", SECONDS - 1800), ("min", SECONDS), ("s", SECONDS)]
)
def test_periods_of_pandas_are_times(tmp_path, unit, seconds):
    """As a frame, and in a Parquet file, where Arrow without pandas has numbers of days, hours or minutes."""
    pandas = pytest.importorskip("pandas")
    times = pandas.PeriodIndex(["2024-12-01T09:30:00"], freq=unit)
    frame = pandas.DataFrame({"user_id": ["u"], "item_id": ["i"], "timestamp": times})
    assert dataset_from_tables(frame).interactions["timestamp"].to_pylist() == [seconds]
    frame.to_parquet(tmp_path / "interactions.parquet")
    assert read_tables(tmp_path).interactions["timestamp"].to_pylist() == [seconds]
    table = pq.read_table(tmp_path / "interactions.parquet")
    ordinals = pa.field(
        "timestamp",
        pa.int64(),
        metadata={"ARROW:extension:name": "pandas.period", "ARROW:extension:metadata": f'{{"freq": "{unit}"}}'},
    )
    plain = pa.schema([table.schema.field(0), table.schema.field(1), ordinals])
    stored = [table["user_id"], table["item_id"], pa.chunked_array([pa.array([times[0].ordinal])])]
    pq.write_table(pa.Table.from_arrays(stored, schema=plain), tmp_path / "interactions.parquet")
    assert read_tables(tmp_path).interactions["timestamp"].to_pylist() == [seconds]


def test_longer_periods_are_refused():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(
        {"user_id": ["u"], "item_id": ["i"], "timestamp": pandas.PeriodIndex(["2024-12"], freq="M")}
    )
    with pytest.raises(DataError, match="timestamp holds extension<pandas.period.* values"):
        dataset_from_tables(frame)


@pytest.mark.parametrize(
    ("values", "least", "kept"),
    [
        ([2**24, 2**24 + 1], 2**24 + 1, [False, True]),  # one number in 32 bits
        ([decimal.Decimal("2.99999999"), decimal.Decimal(3)], 3, [False, True]),
        (["3.0999999", "3.1"], 3.1, [False, True]),
        (pa.array([0.7, 0.6], pa.float32()), 0.7, [True, False]),  # given in 32 bits, where 0.7 is 0.69999999
    ],
)
def test_values_are_compared_before_they_are_rounded(values, least, kept):
    dataset = dataset_from_tables({"user_id": ["a", "b"], "item_id": ["x", "x"], "value": values}, min_value=least)
    assert dataset.interactions["user"].to_pylist() == [row for row in range(2) if kept[row]]
    assert dataset.interactions["value"].type == pa.float32()


def test_an_integer_of_more_than_64_bits_in_a_dictionary_is_named():
    with pytest.raises(DataError, match="items: column lot cannot be made an Arrow table"):
        dataset_from_tables({"user_id": ["a"], "item_id": ["x"]}, items={"item_id": ["x"], "lot": [2**70]})


def test_texts_that_blanks_alone_tell_apart_are_noted():
    dataset = dataset_from_tables(
        {"user_id": ["a", "b"], "item_id": ["x", "y"]},
        items={"item_id": ["x", "y"], "sector": ["oil ", "oil"], "code": ["a ", "b"]},
        ties={"source_id": ["a", "b"], "target_id": ["b", "a"], "kind": ["trust", " trust"]},
    )
    assert {
        "items: values of sector that differ from others only by blanks around them, such as 'oil ', kept apart": 1,
        "ties: values of kind that differ from others only by blanks around them, such as ' trust', kept apart": 1,
    }.items() <= dataset.notes.items()
    assert not any("code" in note for note in dataset.notes)
