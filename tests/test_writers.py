"""Datasets written down: tables give the same again, atomic files what they have room for, and the rest is told."""

import decimal
import os
import subprocess
import sys

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fused_rec.config import DataConfig
from fused_rec.data.dataset import Dataset, digest
from fused_rec.data.io.tables import dataset_from_tables, read_tables
from fused_rec.data.io.writers import save_dataset
from fused_rec.data.sources.recbole import recbole
from fused_rec.data.sources.registry import load
from fused_rec.data.synthetic import make_synthetic


def small(**changes) -> Dataset:
    tables = {
        "interactions": {
            "user_id": ["u", "v", "v"],
            "item_id": ["i", "i", "j"],
            "timestamp": [5, None, 7],
            "value": [1.5, 2.0, None],
            "split": ["train", "test", "train"],
        },
        "items": {
            "item_id": ["i", "j", "k"],
            "name": ["One", None, "Three"],
            "text": ["A fund", 'It\'s "plain"', None],
            "price": [1.5, None, 2.0],
            "sector": ["tech and more", "oil", None],
        },
        "users": {"user_id": ["u", "v"], "age": [30, None]},
        "ties": {"source_id": ["u"], "target_id": ["v"], "kind": ["refers"], "timestamp": [3]},
        "reviews": {"user_id": ["v", "v", "u"], "item_id": ["j", "j", "k"], "text": ["good", "no, bad", "unseen"]},
    }
    return dataset_from_tables(**(tables | changes))


def test_atomic_files_are_as_recbole_lays_them_out(tmp_path):
    lost = save_dataset(small(), tmp_path / "mine", "recbole")
    assert sorted(file.name for file in (tmp_path / "mine").iterdir()) == [
        f"mine.{ending}" for ending in ("inter", "item", "net", "user")
    ]
    assert (tmp_path / "mine" / "mine.inter").read_text() == (
        "user_id:token\titem_id:token\ttimestamp:float\trating:float\tsplit:token\ttext:token_seq\n"
        "u\ti\t5\t1.5\ttrain\t\n"
        "v\ti\t\t2\ttest\t\n"
        "v\tj\t7\t\ttrain\tgood no, bad\n"
    )
    assert (tmp_path / "mine" / "mine.item").read_text() == (
        "item_id:token\tname:token_seq\ttext:token_seq\tprice:float\tsector:token\n"
        'i\tOne\tA fund\t1.5\ttech and more\nj\t\tIt\'s "plain"\t\toil\nk\tThree\t\t2\t\n'
    )
    assert (tmp_path / "mine" / "mine.net").read_text() == (
        "source_id:token\ttarget_id:token\tkind:token\ttimestamp:float\nu\tv\trefers\t3\n"
    )
    assert lost == {
        "reviews: of pairs that are no interaction, left out": 1,
        "reviews: joined to another one of the same pair": 1,
    }


def test_words_go_to_their_pair_in_whatever_order_pairs_stand(tmp_path):
    held = {"user_id": ["v", "u", "v"], "item_id": ["j", "i", "i"]}
    users, items = {"user_id": ["u", "v"]}, {"item_id": ["i", "j"]}
    texts_given = {"user_id": ["u", "v", "v"], "item_id": ["i", "i", "j"], "text": ["one", "two", "three"]}
    dataset = dataset_from_tables(held, users=users, items=items, reviews=texts_given)
    assert save_dataset(dataset, tmp_path / "mine", "recbole") == {}
    assert (tmp_path / "mine" / "mine.inter").read_text().splitlines()[1:] == ["v\tj\tthree", "u\ti\tone", "v\ti\ttwo"]


def test_what_the_layout_has_room_for_comes_back(tmp_path):
    dataset = small(reviews=None)
    assert save_dataset(dataset, tmp_path / "mine", "recbole") == {}
    again = recbole(tmp_path / "mine", False)
    for name in ("users", "items", "interactions", "ties"):
        ours, theirs = getattr(dataset, name), getattr(again, name)
        assert theirs.select(ours.column_names).to_pylist() == ours.to_pylist(), name
    assert again.repairs == {}


def test_texts_lose_what_ends_a_cell_and_it_is_counted(tmp_path):
    items = {
        "item_id": ["i", "j", "k"],
        "text": ['"Quoted" at the start', "two\r\nlines\tand a tab\u2028more", "sound"],
    }
    lost = save_dataset(small(items=items, reviews=None), tmp_path / "mine", "recbole")
    assert lost == {"mine.item: cells of text whose tabs, line breaks or leading quote became a space": 2}
    assert recbole(tmp_path / "mine", False).items["text"].to_pylist() == [
        *(' Quoted" at the start', "two lines and a tab more", "sound")
    ]


@pytest.mark.parametrize("bad", ["a\tb", "a\nb", '"a', "a\x85b"])
def test_an_id_that_would_break_a_line_is_refused(tmp_path, bad):
    events = {"user_id": [bad], "item_id": ["i"]}
    with pytest.raises(ValueError, match="mine.inter: user_id .* has a tab, a line break or a leading quote"):
        save_dataset(dataset_from_tables(events), tmp_path / "mine", "recbole")


def test_a_column_that_would_break_the_header_is_refused(tmp_path):
    users = {"user_id": ["u", "v"], "a:b": [1, 2]}
    with pytest.raises(ValueError, match="mine.user: column 'a:b' has a colon"):
        save_dataset(small(users=users), tmp_path / "mine", "recbole")


def test_large_integers_and_empty_lists_in_atomic_files(tmp_path):
    """Written as a float, 2^53 + 1 would be read as 2^53; an empty cell is missing, which an empty list is not."""
    items = {"item_id": ["i", "j", "k"], "n": [2**53 + 1, 1, None], "tags": [["a"], [], None]}
    lost = save_dataset(small(items=items, reviews=None), tmp_path / "mine", "recbole")
    assert lost == {"mine.item: empty lists in tags, which are read as missing": 1}
    again = recbole(tmp_path / "mine", False).items
    assert again["n"].to_pylist() == ["9007199254740993", "1", None] and again["tags"].to_pylist() == ["a", None, None]


words = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=8).map(str.strip).filter(bool)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(words, words, st.one_of(st.none(), words)), min_size=1, max_size=6, unique_by=lambda r: r[:2])
)
def test_tables_give_the_same_dataset_again(tmp_path_factory, rows):
    user, item, text = (list(column) for column in zip(*rows, strict=True))
    texts_given = pa.array(text, pa.string())
    dataset = dataset_from_tables({"user_id": user, "item_id": item, "text": texts_given}, repair=True)
    folder = tmp_path_factory.mktemp("saved") / "x"
    assert save_dataset(dataset, folder) == {}
    assert digest(read_tables(folder)) == digest(dataset)


@pytest.mark.skipif("FUSED_REC_DATA" not in os.environ, reason="set FUSED_REC_DATA to the folder of public data")
@pytest.mark.parametrize("name", ["lastfm", "stocknet", "recbole"])
def test_real_data_come_back(tmp_path, name):
    dataset = load(DataConfig(name=name))
    assert save_dataset(dataset, tmp_path / "saved") == {}
    assert digest(read_tables(tmp_path / "saved", repair=True)) == digest(dataset)


def test_the_command(tmp_path):
    save_dataset(make_synthetic(0, 40, 20), tmp_path / "market")
    command = [sys.executable, "-m", "experiments.convert", f"--path={tmp_path}/market", "--to=recbole"]
    done = subprocess.run([*command, f"--out={tmp_path}/atomic"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Dataset('tables': 40 users, 20 items")
    assert "not kept: reviews: times left out:" in done.stdout
    again = subprocess.run([*command, f"--out={tmp_path}/atomic"], capture_output=True, text=True)
    assert again.returncode == 1 and "holds files already; name a new folder" in again.stderr


def test_lists_whose_entries_would_change_are_counted(tmp_path):
    items = {
        "item_id": ["i", "j", "k"],
        "sold_in": [["CH", "DE"], ["South Korea"], ["FR", None]],
        "risks": [[1, 2], [], None],
        "price": [decimal.Decimal("1.50"), None, decimal.Decimal("2.00")],
    }
    lost = save_dataset(small(items=items, reviews=None), tmp_path / "mine", "recbole")
    assert lost == {
        "mine.item: lists of sold_in with an empty entry, or a blank within one, where entries end": 1,
        "mine.item: empty lists in risks, which are read as missing": 1,
    }
    assert (tmp_path / "mine" / "mine.item").read_text() == (
        "item_id:token\tsold_in:token_seq\trisks:float_seq\tprice:float\n"
        "i\tCH DE\t1 2\t1.50\nj\tSouth Korea\t\t\nk\tFR\t\t2.00\n"
    )
