"""Hugging Face dataset folders: what is written comes back the same; half of what others wrote is not read."""

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from test_writers import small

from fused_rec.config import DataConfig
from fused_rec.data.dataset import DataError, digest
from fused_rec.data.io.tables import dataset_from_tables
from fused_rec.data.io.writers import save_dataset
from fused_rec.data.sources.huggingface import huggingface
from fused_rec.data.sources.registry import load
from fused_rec.data.synthetic import make_synthetic


def written(folder: Path, **files: dict | pa.Table) -> Path:
    """Parquet files by their path, `__` for a slash and `_` for a dash, as train_00000_of_00001."""
    for name, table in files.items():
        *folders, last = name.split("__")
        file = Path(folder, *folders, f"{last.replace('_', '-')}.parquet")
        file.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(table), file)
    return folder


PAIR = {"user_id": ["u"], "item_id": ["i"]}


# --- what is written -----------------------------------------------------------------------------------------------


def test_the_card_names_every_table_and_split(tmp_path):
    assert save_dataset(small(), tmp_path / "mine", "huggingface") == {}
    _, matter, below = (tmp_path / "mine" / "README.md").read_text().split("---\n", 2)
    read = yaml.safe_load(matter)
    assert read["pretty_name"] == "tables"
    found = {
        (config["config_name"], entry["split"]): entry["path"]
        for config in read["configs"]
        for entry in config["data_files"]
    }
    expected = {("interactions", split) for split in ("train", "test")}  # no validation part: no empty file
    expected |= {(table, "train") for table in ("users", "items", "ties", "reviews")}
    assert set(found) == expected
    assert [config["config_name"] for config in read["configs"] if config.get("default")] == ["interactions"]
    files = {file.relative_to(tmp_path / "mine").as_posix() for file in (tmp_path / "mine").rglob("*.parquet")}
    assert files == set(found.values())
    test = pq.read_table(tmp_path / "mine" / found["interactions", "test"])
    assert test.to_pylist() == [
        {"user_id": "v", "item_id": "i", "timestamp": None, "value": 2.0, "split": "test", "row": 1}
    ]
    assert "| `interactions` | train | 2 |" in below


@pytest.mark.parametrize("changes", [{}, {"reviews": None, "ties": None}], ids=["all", "few"])
def test_it_comes_back_the_same(tmp_path, changes):
    dataset = small(**changes)
    save_dataset(dataset, tmp_path / "mine", "huggingface")
    again = huggingface(tmp_path / "mine", False)
    assert digest(again) == digest(dataset) and again.repairs == {} and again.name == "mine"


def test_one_part_alone_comes_back_too(tmp_path):
    dataset = dataset_from_tables(PAIR | {"split": ["train"]})
    save_dataset(dataset, tmp_path / "mine", "huggingface")
    assert digest(huggingface(tmp_path / "mine", False)) == digest(dataset)


words = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=8).map(str.strip).filter(bool)
parts = st.sampled_from(["train", "valid", "test"])


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(words, words, parts), min_size=1, max_size=8, unique_by=lambda row: row[:2]))
def test_order_and_parts_come_back(tmp_path_factory, rows):
    user, item, part = (list(column) for column in zip(*rows, strict=True))
    dataset = dataset_from_tables({"user_id": user, "item_id": item, "split": part})
    folder = tmp_path_factory.mktemp("saved") / "x"
    save_dataset(dataset, folder, "huggingface")
    assert digest(huggingface(folder, False)) == digest(dataset)


def test_users_without_an_interaction_come_back(tmp_path):
    market = make_synthetic(3, 60, 25)
    save_dataset(market, tmp_path / "market", "huggingface")
    again = load(DataConfig("huggingface", str(tmp_path / "market")))
    assert digest(again) == digest(market)


@pytest.mark.skipif("FUSED_REC_DATA" not in os.environ, reason="set FUSED_REC_DATA to the folder of public data")
@pytest.mark.parametrize("name", ["lastfm", "lastfm_lightgcn"])
def test_real_data_come_back(tmp_path, name):
    dataset = load(DataConfig(name=name))
    save_dataset(dataset, tmp_path / "saved", "huggingface")
    assert digest(huggingface(tmp_path / "saved", False)) == digest(dataset)


# --- what others wrote ---------------------------------------------------------------------------------------------


def test_a_plain_folder_of_shards(tmp_path):
    written(
        tmp_path,
        data__train_00000_of_00002={"user_id": [7, 8], "item_id": ["a", "b"], "stars": [1, 2]},
        data__train_00001_of_00002={"user_id": [9], "item_id": ["a"], "stars": [3]},
        data__validation_00000_of_00001={"user_id": [7], "item_id": ["b"], "stars": [3]},
        data__test_00000_of_00001={"user_id": [8], "item_id": ["a"], "stars": [3]},
    )
    dataset = huggingface(tmp_path, False)
    assert dataset.users["user_id"].to_pylist() == ["7", "8", "9"]
    assert dataset.interactions["split"].to_pylist() == ["train", "train", "train", "valid", "test"]
    assert dataset.notes == {"interactions: column 'stars', which the format does not have, not read": 1}


def test_one_split_is_no_published_split(tmp_path):
    written(tmp_path, data__train_00000_of_00001=PAIR | {"row": [5]})
    dataset = huggingface(tmp_path, False)
    assert dataset.interactions.column_names == ["user", "item"]
    assert dataset.notes == {"interactions: column 'row', which the format does not have, not read": 1}


# --- what is refused -----------------------------------------------------------------------------------------------

TRAIN = "data__train_00000_of_00001"


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, "data/*.parquet: no shards are in "),
        ({"data__train_00001_of_00002": PAIR}, "1 of 2 shards found"),
        ({TRAIN: PAIR, "data__train_00000_of_00002": PAIR}, "1 of 2 shards found"),
        ({"data__train": PAIR}, "data/train.parquet: is not named as a shard"),
        ({TRAIN: PAIR, "data__extra_00000_of_00001": PAIR}, "data/extra-*.parquet: is no split of this table"),
        ({TRAIN: PAIR, "items__test_00000_of_00001": {"item_id": ["i"]}}, "items/test-*.parquet: is no split"),
        ({TRAIN: PAIR, "more": PAIR}, "more.parquet: would not be read"),
        ({TRAIN: PAIR, "interactions__train_00000_of_00001": PAIR}, "data/train-00000-of-00001.parquet: would not be"),
        (
            {TRAIN: PAIR, "data__test_00000_of_00001": PAIR | {"split": ["train"]}},
            "data/test-*.parquet: 1 rows have another split than test",
        ),
        ({TRAIN: PAIR, "data__test_00000_of_00001": {"user_id": [1], "item_id": ["i"]}}, "shards differ"),
        ({TRAIN: {"user": ["u"], "item_id": ["i"]}}, "column user_id is missing"),
    ],
)
def test_what_is_refused(tmp_path, files, said):
    with pytest.raises(DataError) as error:
        huggingface(written(tmp_path, **files), True)
    assert said in str(error.value)
