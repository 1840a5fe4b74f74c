"""Interactions that are folded into a run: as if the tables had had them when it was opened."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv
import pytest
from market import write_tables

import fused_rec as fr
from fused_rec.baselines.factors import COMPONENTS
from fused_rec.data.dataset import digest
from fused_rec.model.late_fusion import component_names

MODEL = str(Path(__file__).parent / "golden" / "tiny_bert")
L2 = {"ease": {"l2": 300.0}, "text_ease": {"l2": 300.0, "l2_text": 100.0, "l2_words": 30.0}}
DAY = 86_400


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A finished run and its tables, in whose score every component has a part, a launch prior included."""
    folder = tmp_path_factory.mktemp("update")
    config = fr.configure(
        data={"name": "tables", "path": str(write_tables(folder / "tables"))},
        text={"model": MODEL, "cache": str(folder / "cache")},
        model={"dim": 4, "num_layers": 1, "popularity_half_life": 30.0},
        train={"batch_size": 32, "max_steps": 2, "eval_every": 1},
    )
    fr.train(config, folder / "run")
    results = json.loads((folder / "run" / "results.json").read_text())
    names = ["model", *COMPONENTS]
    results["late_fusion"] = {
        "weights": {name: 1.0 + n / 10 for n, name in enumerate(names)},
        "settings": {**dict.fromkeys(names, {}), **{name: COMPONENTS[name].grid[-1] for name in COMPONENTS}, **L2},
        "single": {},
        "fused": 0.0,
        "users": 0,
        "launch": {"level": 1.0, "slope": 0.5, "taste": 0.7},
    }
    (folder / "run" / "results.json").write_text(json.dumps(results))
    return folder


@pytest.fixture(scope="module")
def run(folder) -> fr.Run:
    return fr.load(folder / "run")


def rows(folder: Path) -> pd.DataFrame:
    return pyarrow.csv.read_csv(folder / "tables" / "interactions.csv").to_pandas()


def new_rows(folder: Path) -> pd.DataFrame:
    """New pairs, one of them twice; old pairs, with an earlier and a later time; and a row without a time."""
    old = rows(folder)
    records = old.to_dict("records")
    first, last, newest = records[0], records[-1], max(row["timestamp"] for row in records)
    held = set(zip(old["user_id"], old["item_id"], strict=True))
    pairs = [(f"C{u:04d}", f"P{i:03d}") for u in range(1, 9) for i in range(1, 31)]
    new = [pair for pair in pairs if pair not in held][::7][:8]
    given = [(*pair, newest + n * DAY) for n, pair in enumerate(new)]
    given += [(*new[0], newest - 90 * DAY), (*new[1], None)]
    given += [(first["user_id"], first["item_id"], int(first["timestamp"]) - 200 * DAY)]
    given += [(last["user_id"], last["item_id"], newest + DAY)]
    frame = pd.DataFrame(given, columns=["user_id", "item_id", "timestamp"])
    return frame.astype({"timestamp": "Int64"})


def test_a_run_with_new_interactions_is_the_one_of_the_longer_table(folder, run):
    before = run.recommend(k=5, progress=False)
    new = new_rows(folder)
    updated = run.update(new)

    tables = {name: pyarrow.csv.read_csv(folder / "tables" / f"{name}.csv") for name in ("items", "users", "ties")}
    whole = fr.dataset_from_tables(pd.concat([rows(folder), new]), **tables, repair=True)
    expected = fr.load(folder / "run", dataset=whole)
    assert digest(updated.prepared.dataset) == digest(whole) != digest(run.prepared.dataset)
    assert updated.prepared.served() == expected.prepared.served()
    fusion = expected.prepared.graph_inputs.fusion
    assert fusion is not None and {"ease", "recent_popularity", "launch_prior"} <= set(component_names(fusion))
    scores, of_load, old = (r.user_vectors @ r.item_vectors.T for r in (updated, expected, run))
    np.testing.assert_allclose(scores, of_load, atol=1e-5)
    assert np.abs(scores - old).max() > 0.01
    assert updated.recommend(k=5, progress=False).equals(expected.recommend(k=5, progress=False))

    ranked = updated.recommend(new["user_id"].unique(), k=30).to_pandas()
    assert not set(zip(ranked["user_id"], ranked["item_id"], strict=True)) & set(
        zip(new["user_id"], new["item_id"], strict=True)
    )
    assert run.recommend(k=5, progress=False).equals(before), "the old run stays as it was"
    again = run.update(new[:6]).update(new[6:])
    np.testing.assert_allclose(again.user_vectors @ again.item_vectors.T, of_load, atol=1e-5)
    [reason] = updated.explain(new["user_id"][0], k=1)
    assert reason["reasons"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"user_id": ["C0001", "nobody"], "item_id": ["P001"] * 2},
            "row 3: user_id 'nobody' is unknown. correct it",
        ),
        ({"user_id": ["C0001"], "item_id": ["P999"]}, r"item_id 'P999' is unknown. .*fr.load\(workdir, dataset=...\)"),
        ({"user_id": ["C0001"], "item_id": ["P001"], "timestamp": ["soon"]}, "interactions, row 2: timestamp 'soon'"),
        ({"user_id": ["C0001"], "item_id": [None]}, "interactions, row 2: item_id is empty"),
        ({"user_id": ["C0001"]}, "column item_id is missing"),
        ({"user_id": ["C0001"], "item_id": ["P001"], "text": ["good"]}, "text has to be encoded. leave the column out"),
        (
            {"user_id": ["C0001"], "item_id": ["P021"], "time": ["2024-05-01"]},
            "column 'time' would not be read. leave it",
        ),
    ],
)
def test_faults_are_named(run, given, message):
    with pytest.raises(fr.DataError, match=message):
        run.update(given)
    with pytest.raises(TypeError, match="interactions is a list"):
        run.update([("C0001", "P001")])


def test_a_run_of_the_training_history_is_not_updated(folder):
    with pytest.raises(ValueError, match='history is "train"'):
        fr.load(folder / "run", history="train").update({"user_id": ["C0001"], "item_id": ["P001"]})


def test_a_missing_time_is_said_where_all_rows_have_one(run, caplog):
    rows = run.prepared.dataset.interactions
    timed = dataclasses.replace(run.prepared.dataset, interactions=rows.filter(rows["timestamp"].is_valid()))
    known = dataclasses.replace(run, prepared=dataclasses.replace(run.prepared, dataset=timed))
    [item] = known.recommend(["C0001"], k=1)["item_id"].to_pylist()
    known.update({"user_id": ["C0001"], "item_id": [item]})
    assert "1 new interactions have no timestamp" in caplog.text
    caplog.clear()
    known.update({"user_id": ["C0001"], "item_id": [item], "timestamp": [1_700_000_000]})
    assert "no timestamp" not in caplog.text


def test_no_rows_change_nothing(run):
    none = pa.table({"user_id": pa.array([], pa.string()), "item_id": pa.array([], pa.string())})
    updated = run.update(none)
    assert digest(updated.prepared.dataset) == digest(run.prepared.dataset)
    np.testing.assert_allclose(updated.user_vectors, run.user_vectors, atol=1e-6)
