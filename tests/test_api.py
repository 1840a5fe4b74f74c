"""The public names: what they cost, what they are called, and one whole story on a small market in memory."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.csv
import pytest
from market import write_tables

import fused_rec as fr
from fused_rec.data.dataset import digest
from fused_rec.data.synthetic import make_synthetic
from fused_rec.runs.run_dir import TablesChangedError
from fused_rec.serving.recommender import user_rows

PACKAGE = Path(fr.__file__).parent
MODEL = str(Path(__file__).parent / "golden" / "tiny_bert")
SETTINGS = {
    "train": {"batch_size": 32, "max_steps": 10, "eval_every": 5, "learning_rate": 0.02},
    "model": {"dim": 8, "num_layers": 1},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("api")


@pytest.fixture(scope="module")
def frames(folder) -> dict[str, pa.Table]:
    write_tables(folder / "mine")
    text = pyarrow.csv.ConvertOptions(strings_can_be_null=True)
    names = ("interactions", "items", "users", "ties")
    return {name: pyarrow.csv.read_csv(folder / "mine" / f"{name}.csv", convert_options=text) for name in names}


@pytest.fixture(scope="module")
def market(frames) -> fr.Dataset:
    return fr.dataset_from_tables(**frames, name="small")


@pytest.fixture(scope="module")
def config(folder) -> fr.Config:
    return fr.configure(text={"model": MODEL, "cache": str(folder / "cache")}, **SETTINGS)


@pytest.fixture(scope="module")
def run(config, folder, market) -> fr.Run:
    return fr.train(config, folder / "run", market)


def test_a_setting_outside_of_its_section_is_named_with_it():
    with pytest.raises(ValueError, match=r'dim is no section of the config but a setting; write model=\{"dim": 3\}$'):
        fr.configure(dim=3)
    with pytest.raises(ValueError, match=r'write data=\{"seed": 1\} or split=\{"seed": 1\} or train=\{"seed": 1\}$'):
        fr.configure(seed=1)
    with pytest.raises(
        ValueError, match="model is 3; give a dictionary of settings by section.*; the sections are data,"
    ):
        fr.configure(model=3)


def test_a_finished_run_of_other_tables_is_not_opened(config, run, market, folder, tmp_path):
    fewer = dataclasses.replace(market, ties=market.ties.slice(1))
    with pytest.raises(TablesChangedError, match=f"ties had {market.ties.num_rows} rows and has"):
        fr.train(config, folder / "run", fewer)


def test_a_workdir_that_moved_takes_its_tables_along(run, folder, tmp_path):
    shutil.copytree(folder / "run", tmp_path / "moved")
    (folder / "run").rename(folder / "away")
    try:
        assert fr.load(tmp_path / "moved").config.data.path == str(tmp_path / "moved" / "tables")
        elsewhere = fr.load(tmp_path / "moved", data_path=folder / "away" / "tables")
        assert elsewhere.config.data.path == str(folder / "away" / "tables")
        assert elsewhere.evaluate("test")["fused"] == pytest.approx(run.results["test"], nan_ok=True)
    finally:
        (folder / "away").rename(folder / "run")


@pytest.fixture
def wide():
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


def test_64_bit_types_of_jax_change_nothing(run, wide):
    assert run.recommend(["C0001"], k=3)["score"].type == pa.float32()
    assert run.evaluate("test")[run.config.model.variant]["ndcg@10"] == pytest.approx(run.results["test"]["ndcg@10"])
    assert jax.numpy.arange(1).dtype == np.int64, "it stays on for the caller"


# --- names ---------------------------------------------------------------------------------------------------------


def test_every_name_is_there_and_documented():
    assert fr.__all__ == sorted(fr.__all__) and 15 <= len(fr.__all__) <= 20
    for name in fr.__all__:
        assert getattr(fr, name).__doc__, name
    assert set(fr.__all__) <= set(dir(fr))
    with pytest.raises(AttributeError, match="no attribute 'fir'; it has Config"):
        _ = fr.fir


def test_no_name_is_that_of_a_subpackage():
    """Importing `fused_rec.training.trainer` sets `fused_rec.training`: a function of that name would come and go."""
    modules = {file.stem for file in PACKAGE.glob("*.py")} | {file.parent.name for file in PACKAGE.glob("*/*.py")}
    assert not modules & set(fr.__all__)


def test_importing_the_package_imports_nothing_else():
    code = "import json, sys; import fused_rec; print(json.dumps(sorted(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert not {"jax", "numpy", "pyarrow", "flax"} & set(json.loads(out)), out


# --- tables in memory ----------------------------------------------------------------------------------------------


def from_pandas(table: pa.Table) -> pd.DataFrame:
    frame = table.to_pandas()
    frame.index = range(7, 7 + len(frame))  # an index without a name is no column
    return frame.astype({name: "category" for name in frame.columns if name in ("user_id", "sector")})


@pytest.mark.parametrize(
    "kind",
    [from_pandas, lambda table: pl.from_arrow(table), lambda table: table.to_pydict()],
    ids=["pandas", "polars", "dict"],
)
def test_frames_of_any_kind_are_the_same_dataset(frames, market, kind):
    assert digest(fr.dataset_from_tables(**{name: kind(table) for name, table in frames.items()})) == digest(market)


def test_files_and_frames_are_the_same_dataset(folder, market):
    assert digest(fr.load_dataset(folder / "mine")) == digest(market)


def test_every_fault_of_frames_is_in_one_report(frames):
    spoiled = pd.DataFrame({"user_id": ["C0001", None], "item_id": ["P001", "nobody"]})
    with pytest.raises(fr.DataError) as error:
        fr.dataset_from_tables(spoiled, items=frames["items"], users={"id": ["C0001"]}, ties={"source_id": [[], 1]})
    reported = str(error.value)
    assert "interactions, row 3: user_id is empty" in reported
    assert "users: column user_id is missing (there: id)" in reported
    assert "ties: column source_id cannot be made an Arrow table" in reported
    with pytest.raises(TypeError, match="items is a list; give a data frame"):
        fr.dataset_from_tables(frames["interactions"], items=[1, 2])


def test_reviews_and_acts_have_their_place(tmp_path):
    """Words about what is not held, several about one pair, and ties seen in an act: in memory, and back from disk."""
    held = {"user_id": ["u", "v"], "item_id": ["i", "j"]}
    texts_given = {"user_id": ["u", "u", "v"], "item_id": ["i", "i", "i"], "text": ["good", "very good", "bad"]}
    ties = {"source_id": ["u", "v"], "target_id": ["v", "u"], "item_id": ["j", None]}
    dataset = fr.dataset_from_tables(held, reviews=texts_given, ties=ties)
    assert dataset.reviews.to_pydict() == {"user": [0, 0, 1], "item": [0, 0, 0], "text": ["good", "very good", "bad"]}
    assert dataset.ties["item"].to_pylist() == [1, None]
    assert fr.save_dataset(dataset, tmp_path / "saved") == {}
    assert digest(fr.load_dataset(tmp_path / "saved")) == digest(dataset)


def test_a_saved_market_comes_back_as_it_was(tmp_path):
    market = make_synthetic(3, 60, 25)
    fr.save_dataset(market, tmp_path / "saved")
    assert digest(fr.load_dataset(tmp_path / "saved", repair=True)) == digest(market)
    with pytest.raises(FileExistsError, match="holds files already"):
        fr.save_dataset(market, tmp_path / "saved")
    with pytest.raises(ValueError, match="layout is 'csv'; it must be one of tables, recbole"):
        fr.save_dataset(market, tmp_path / "other", "csv")


def test_load_dataset_says_what_there_is():
    assert repr(fr.load_dataset("synthetic")).startswith("Dataset('synthetic-0': 2,000 users, 400 items, ")
    with pytest.raises(ValueError, match="'lastfn' is no folder, and no dataset of that name; there are synthetic"):
        fr.load_dataset("lastfn")
    with pytest.raises(ValueError, match="no download is called 'x'; there are lastfm"):
        fr.fetch_dataset("x")


# --- configs -------------------------------------------------------------------------------------------------------


def test_configure_changes_what_is_named_and_nothing_else():
    assert fr.configure() == fr.Config()
    once = fr.configure(model={"dim": 7})
    twice = fr.configure(once, train={"seed": 3})
    assert (twice.model.dim, twice.train.seed, twice.split) == (7, 3, fr.Config().split)
    with pytest.raises(ValueError, match=r"config section model is \['dims'\]"):
        fr.configure(model={"dims": 7})
    with pytest.raises(ValueError, match=r"config is \['modle'\]"):
        fr.configure(modle={"dim": 7})


# --- a run ---------------------------------------------------------------------------------------------------------


def test_a_run_is_kept_whole(run, config, folder, market):
    assert digest(run.prepared.dataset) == digest(market)
    assert repr(run).startswith(f"Run('{folder}/run': tables, fused, valid ndcg@10 ")
    again = fr.load(folder / "run")
    assert again.results == run.results
    assert again.recommend(k=3).equals(run.recommend(k=3))
    assert fr.train(config, folder / "run", market).results == run.results  # finished: opened, not trained


def test_a_run_whose_tables_are_gone_says_where_they_were(config, market, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    with pytest.raises(ValueError, match="run holds a run, but .*run/tables, .* is missing; restore it"):
        fr.train(config, tmp_path / "run", market)


def test_a_workdir_takes_no_other_tables(config, folder, run):
    with pytest.raises(ValueError, match="holds other tables than these"):
        fr.train(config, folder / "run", make_synthetic(1, 30, 20))


def test_fit_reads_what_the_config_names(config, folder, run, monkeypatch):
    monkeypatch.chdir(folder)
    named = fr.configure(config, data={"name": "tables", "path": "mine"})
    other = fr.train(named, "named")
    assert other.config.data.path == str(folder / "mine")
    assert other.results["test"] == run.results["test"]


def test_an_empty_list_of_users_is_no_user(run, folder):
    none = run.recommend([])
    assert len(none) == 0 and none.schema == run.recommend(["C0001"], k=1).schema
    assert run.explain("C0001", []) == []
    page = fr.report(folder / "run", folder / "nobody.html", baselines=["popularity"], users=[])
    assert "C0001" not in page.read_text()


@pytest.mark.parametrize(
    "ids",
    [
        *([7, 10], (7, 10), np.array([7, 10]), np.array([7, 10], np.uint8), ["7", 10], pa.array([7, 10])),
        *(pa.chunked_array([["7"], ["10"]]), pd.Series([7, 10]), pd.Series([7, 10], dtype="Int64"), pl.Series([7, 10])),
        *(pd.Index([7, 10, 7]), pa.array(["7", "10"]).dictionary_encode(), iter([7, 10])),
    ],
    ids=lambda ids: type(ids).__name__,
)
def test_integer_ids_are_asked_as_integers(ids):
    dataset = fr.dataset_from_tables({"user_id": [10, 9, 7], "item_id": [1, 1, 2]})
    assert user_rows(dataset, ids).tolist() == [2, 0]


@pytest.mark.parametrize(
    "bad", [7.0, float("nan"), None, True, np.bool_(True), np.float64(7), pd.NA, b"7", ["7"]], ids=repr
)
def test_what_is_no_id_is_refused_by_name(bad):
    dataset = fr.dataset_from_tables({"user_id": [10, 9, 7], "item_id": [1, 1, 2]})
    with pytest.raises(ValueError, match=r"users has .* of type \w+; give ids as text or integers"):
        user_rows(dataset, [7, bad])
    with pytest.raises(ValueError, match="users is 7, of type int; give a list of ids"):
        user_rows(dataset, 7)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="1 unknown user ids, first '8'"):
        user_rows(dataset, [7, 8])


def test_report(run, folder):
    out = fr.report(folder / "run", folder / "page.html", baselines=["popularity"], users=["C0002"], k=2)
    assert out == folder / "page.html"
    page = out.read_text()
    assert "Customer C0002" in page and "popularity" in page


def test_compare(config, folder, market):
    small = fr.configure(config, train={"max_steps": 5, "refit": "all"})
    found = fr.compare(small, folder / "compare", ["fused", "popularity"], seeds=[0], dataset=market)
    assert not found["failures"] and (folder / "compare" / "compare.md").exists()
    assert not list((folder / "compare").rglob("refit*")), "nothing is trained for serving alone"


def test_encode(folder):
    vectors = fr.encode(["a fund", "a bond", "a fund"], MODEL, cache=str(folder / "cache"))
    assert vectors.shape[0] == 3 and vectors.dtype == np.float32
    assert (vectors[0] == vectors[2]).all() and (vectors[0] != vectors[1]).any()
