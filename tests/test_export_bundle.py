"""A run as a folder for others: products of its vectors are the scores, and it is read without this package."""

import dataclasses
import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from market import write_tables
from safetensors.numpy import load_file

import fused_rec as fr
from fused_rec.config import from_dict, portable, to_dict
from fused_rec.serving import export_bundle
from fused_rec.storage import SaveError
from fused_rec.studies.variants import variant
from fused_rec.text.vectors import load_vectors, save_vectors
from fused_rec.training import evaluate
from fused_rec.training.checkpoint import named_leaves
from fused_rec.training.evaluate import scorer, user_item_vectors
from fused_rec.training.inputs import init_state, prepare, read

ROOT = Path(__file__).parents[1]
MODEL = str(Path(__file__).parent / "golden" / "tiny_bert")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("hub")


@pytest.fixture(scope="module")
def config(folder) -> fr.Config:
    """Of a market with a customer who holds nothing and says nothing, and a product that nobody holds."""
    tables = write_tables(folder / "tables")
    for name, row in (("users", 'C9999,"New, Ms."'), ("items", "P999,New fund,A fund of bonds")):
        file = tables / f"{name}.csv"
        columns = file.read_text().splitlines()[0].count(",") + 1
        with file.open("a") as stream:
            stream.write(row + "," * (columns - row.replace('"New, Ms."', "x").count(",") - 1) + "\n")
    return fr.configure(
        data={"name": "tables", "path": str(tables), "repair": True},
        text={"model": MODEL, "cache": str(folder / "cache")},
        model={"dim": 8, "num_layers": 1},
        train={"batch_size": 32, "max_steps": 4, "eval_every": 2, "learning_rate": 0.02},
        card={"owner": "Retail", "license": "Internal"},
    )


@pytest.fixture(scope="module")
def run(config, folder) -> fr.Run:
    return fr.train(config, folder / "run")


@pytest.fixture(scope="module")
def exported(run, folder) -> Path:
    """By the command, as a user would."""
    pytest.importorskip("faiss", reason="the extra faiss is not installed")
    command = [sys.executable, "-m", "experiments.export", f"--workdir={folder}/run", f"--out={folder}/out", "--faiss"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {line.split("/")[-1] for line in done.stdout.splitlines()} == set(export_bundle.FILES) | {export_bundle.CARD}
    return folder / "out"


def prepared_with(config: fr.Config) -> tuple:
    """Prepared tables and a state with every parameter moved, as training would."""
    prepared = prepare(config, *read(config))
    state = init_state(config, prepared)
    keys = iter(jax.random.split(jax.random.key(1), len(jax.tree.leaves(state.params))))
    moved = jax.tree.map(lambda leaf: leaf + 0.3 * jax.random.normal(next(keys), leaf.shape), state.params)
    return prepared, dataclasses.replace(state, params=jax.device_get(moved))


# --- the law -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fused", "graph", "text", "lightgcn", "no_popularity"])
def test_products_are_the_scores(config, name):
    config = variant(config, name)
    prepared, state = prepared_with(config)
    users, items = user_item_vectors(config, prepared, state)
    assert users.dtype == items.dtype == np.float32
    scores = np.asarray(scorer(config, prepared, state)(jnp.arange(len(users))))
    assert scores.shape == (prepared.dataset.n_users, prepared.dataset.n_items)
    assert np.ptp(scores, axis=1).min() > 0
    np.testing.assert_allclose(users @ items.T, scores, rtol=1e-4, atol=1e-6)


def test_who_is_unknown_gets_what_is_popular_by_a_product_too(config, monkeypatch):
    monkeypatch.setattr(evaluate, "users_per_batch", lambda n_items: 7)  # the unknown user is in a later batch
    config = variant(config, "lightgcn")
    prepared, state = prepared_with(config)
    users, items = user_item_vectors(config, prepared, state)
    assert prepared.dataset.users["user_id"][-1].as_py() == "C9999"
    item_degrees = np.bincount(prepared.observed.item, minlength=len(items))
    assert (users[-1] @ items.T == item_degrees).all() and item_degrees.max() > 1
    known = np.flatnonzero(np.bincount(prepared.observed.user, minlength=len(users)))
    assert not users[known, -1].any()


# --- the folder ----------------------------------------------------------------------------------------------------


def test_what_the_folder_holds(run, exported, config):
    users, user_ids = load_vectors(exported / export_bundle.USERS)
    items, item_ids = load_vectors(exported / export_bundle.ITEMS)
    assert user_ids == run.prepared.dataset.users["user_id"].to_pylist() and user_ids[-1] == "C9999"
    assert item_ids == run.prepared.dataset.items["item_id"].to_pylist() and item_ids[-1] == "P999"
    scores = np.asarray(scorer(run.config, run.prepared, run.state)(jnp.arange(len(users))))
    np.testing.assert_allclose(users @ items.T, scores, rtol=1e-4, atol=1e-6)
    parameters = load_file(exported / export_bundle.PARAMETERS)
    expected = named_leaves(run.state.params)
    assert set(parameters) == set(expected) and "main/id_user" in parameters
    assert all((parameters[name] == expected[name]).all() for name in expected)


def test_settings_come_back_but_for_places(exported, config):
    there = json.loads((exported / export_bundle.SETTINGS).read_text())
    assert there.pop("model_type") == "fused_rec" and {"python", "jax"} <= set(there.pop("versions"))
    there = {section: there[section] for section in to_dict(config)}
    expected = fr.configure(config, data={"path": ""}, text={"cache": fr.Config().text.cache})
    assert from_dict(there) == expected
    assert not any(
        str(exported.parent) in file.read_text()
        for file in (exported / export_bundle.SETTINGS, exported / export_bundle.CARD)
    )


@pytest.mark.parametrize("history", ["all", "train"])
def test_the_settings_say_what_was_trained_and_served(run, folder, tmp_path, history):
    loaded = fr.load(run.workdir, history=history)
    loaded.save(tmp_path / "out")
    there = json.loads((tmp_path / "out" / export_bundle.SETTINGS).read_text())
    tables = json.loads((run.workdir / "run.json").read_text())["tables"]
    assert there["served"] == loaded.prepared.served() | {"sha256": tables} and there["served"]["history"] == history
    assert there["card"] == {"owner": "Retail", "purpose": "", "license": "Internal"}
    for name in ("data", "counts", "finished", "best_step"):
        assert there["trained"][name] == run.results[name]
    assert there["trained"]["data"]["sha256"] == tables
    of_rows = {"all": run.results["counts"]["interactions"], "train": run.results["counts"]["in the training split"]}
    assert there["served"]["interactions"] == of_rows[history]
    dates = run.results["data"]["period" if history == "all" else "trained_period"]
    assert there["served"]["period"] == dates and dates[0] < dates[1]
    card = (tmp_path / "out" / export_bundle.CARD).read_text()
    assert f"(history={history}): {of_rows[history]:,} interactions ({dates[0]} to {dates[1]})" in card


def test_the_card_is_read_by_a_hub(run, exported):
    from huggingface_hub import ModelCard

    content = (exported / export_bundle.CARD).read_text()
    data = ModelCard(content).data.to_dict()
    assert data["library_name"] == "fused_rec" and data["license"] == "other" and data["license_name"] == "Internal"
    measured = {
        (result["dataset"]["split"], metric["type"]): metric["value"]
        for result in data["model-index"][0]["results"]
        for metric in result["metrics"]
    }
    assert measured["test", "ndcg@10"] == run.results["test"]["ndcg@10"]
    reported = dict(re.findall(r"^- (\S+): `([0-9a-f]{64})`$", content, re.MULTILINE))
    assert reported.pop("tables") == json.loads((run.workdir / "run.json").read_text())["tables"]
    assert reported == {
        name: hashlib.sha256((exported / name).read_bytes()).hexdigest() for name in export_bundle.FILES
    }


def test_the_card_s_code_runs_without_this_package(run, exported):
    blocks = re.findall(r"```python\n(.*?)```", (exported / export_bundle.CARD).read_text(), re.DOTALL)
    assert len(blocks) == 2
    reported = "import sys; assert not [m for m in sys.modules if m.startswith('fused_rec')]"
    reported += "; print(json.dumps([best, all_scores.tolist()]))"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", "\n".join([*blocks, reported])],
        cwd=exported,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    best, scores = json.loads(done.stdout)
    ids = run.prepared.dataset.users["user_id"].to_pylist()
    expected = run.recommend([ids[0]], k=10, include_seen=True)
    assert best == expected["item_id"].to_pylist()
    wanted = np.asarray(scorer(run.config, run.prepared, run.state)(jnp.arange(len(ids))))
    np.testing.assert_allclose(scores, wanted, rtol=1e-4, atol=1e-6)


def test_faiss_finds_what_recommend_ranks(run, exported):
    import faiss

    index = faiss.read_index(str(exported / export_bundle.INDEX))
    users, user_ids = load_vectors(exported / export_bundle.USERS)
    _, item_ids = load_vectors(exported / export_bundle.ITEMS)
    scores, rows = index.search(users, 7)
    ranked = run.recommend(k=7, include_seen=True)
    assert ranked["user_id"].to_pylist() == np.repeat(user_ids, 7).tolist()
    assert np.array(item_ids)[rows].ravel().tolist() == ranked["item_id"].to_pylist()
    np.testing.assert_allclose(scores.ravel(), ranked["score"].to_numpy(), rtol=1e-4, atol=1e-6)


# --- the program ---------------------------------------------------------------------------------------------------


def test_the_program_is_for_all_platforms_and_any_sizes():
    program = jax.export.deserialize(bytearray(export_bundle.score_program(3)))
    assert program.platforms == ("cpu", "cuda", "tpu")
    for users, items, rows in ((2, 4, [1, 0, 1]), (5, 1, [4])):
        drawn = np.random.default_rng(0).normal(size=(users + items, 3)).astype(np.float32)
        scores = program.call(drawn[:users], drawn[users:], np.array(rows, np.int32))
        np.testing.assert_allclose(scores, drawn[rows] @ drawn[users:].T, rtol=1e-6)
    scores = program.call(drawn[:5], drawn[5:], np.array([-1, 5, 0], np.int32))
    assert np.isnan(scores).tolist() == [[True], [True], [False]]


# --- what is refused -----------------------------------------------------------------------------------------------


def test_a_folder_with_files_is_left_alone(run, tmp_path):
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(FileExistsError, match="holds files already; name a new folder"):
        run.save(tmp_path)
    with pytest.raises(FileExistsError, match="is a file"):
        run.save(tmp_path / "mine.txt")
    assert os.listdir(tmp_path) == ["mine.txt"]


def test_an_empty_folder_will_do_and_no_index_comes_unasked(run, tmp_path):
    (tmp_path / "out").mkdir()
    assert run.save(tmp_path / "out") == tmp_path / "out"
    assert set(os.listdir(tmp_path / "out")) == set(export_bundle.FILES) - {export_bundle.INDEX} | {export_bundle.CARD}
    assert "faiss" not in (tmp_path / "out" / export_bundle.CARD).read_text()
    assert os.listdir(tmp_path) == ["out"]


def test_what_fails_leaves_nothing(run, tmp_path):
    spoiled = jax.tree.map(lambda leaf: np.full_like(leaf, np.nan), run.state.params)
    with pytest.raises(ValueError, match="the vector of customer 0 is not finite"):
        dataclasses.replace(run, state=dataclasses.replace(run.state, params=spoiled)).save(tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_a_full_disk_names_path_need_and_free_space(run, full_disk):
    (full_disk / "filler").write_bytes(bytes(2_097_152 - 20_480))
    said = (
        rf"{full_disk}/out could not be written: .*No space left.*; at least 0\.\d MB are needed; 0\.0 MB are free in"
    )
    with pytest.raises(SaveError, match=said):
        run.save(full_disk / "out")
    assert os.listdir(full_disk) == ["filler"]


def test_without_faiss_the_error_names_the_extra(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImportError, match=r"items.faiss needs the library faiss: pip install -e '.\[faiss\]'"):
        run.save(tmp_path / "out", faiss=True)
    assert os.listdir(tmp_path) == []


def test_ids_that_no_header_holds_are_refused(tmp_path):
    ids = [f"{number:0100d}" for number in range(1_000_000)]
    with pytest.raises(ValueError, match="its header takes 100 MB, and 1,000,000 ids need more"):
        save_vectors(tmp_path / "x.safetensors", np.zeros((1_000_000, 1), np.float32), ids)
    assert os.listdir(tmp_path) == []


def test_portable_settings_leave_out_two_places():
    everything, shown = to_dict(fr.Config()), portable(fr.Config())
    assert {s: set(everything[s]) - set(shown[s]) for s in everything if everything[s] != shown[s]} == {
        "data": {"path"},
        "text": {"cache"},
    }
