"""Published methods and baselines as runs: trained or fitted, measured, served on other tables, exported, refused."""

import dataclasses
import functools
import json
import subprocess
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import preloaded
import pytest
from absl import flags
from ml_collections import config_flags
from test_serving import frames, tables

import fused_rec as fr
from experiments.configs.tables import get_config
from fused_rec.baselines.neighbors import NotApplicableError
from fused_rec.baselines.registry import BASELINES
from fused_rec.commands import launch
from fused_rec.data.io.arrow import pc
from fused_rec.data.synthetic import make_synthetic
from fused_rec.evaluation.ranking import mean
from fused_rec.runs.run_dir import TEST_METRICS_PER_USER, read_users
from fused_rec.serving.recommender import load_measured, model_digest
from fused_rec.studies.variants import configured
from fused_rec.training.evaluate import baseline, choose_settings, evaluate_users, scorer, user_item_vectors
from fused_rec.training.inputs import Prepared, prepare, read

MODEL = str(Path(__file__).parent / "golden" / "tiny_bert")
USERS, ITEMS = 60, 24
METHODS = (*BASELINES, "lightgcn")
TODAY = 1_600_000_000


@pytest.fixture(scope="module")
def market() -> fr.Dataset:
    return make_synthetic(0, USERS, ITEMS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("methods")


@pytest.fixture(scope="module")
def base(folder) -> fr.Config:
    """Settings of a fused model, which a method replaces."""
    return fr.configure(
        text={"model": MODEL, "tfidf_dim": 8, "cache": str(folder / "cache")}, model={"late_fusion": True}
    )


def method(base: fr.Config, name: str) -> fr.Config:
    steps = {"max_steps": 4, "eval_every": 2} if name == "lightgcn" else {}
    return fr.configure(base, model={"method": name}, train=steps)


@pytest.fixture(scope="module")
def run_of(base, folder, market):
    """The finished run of a method, by its name."""

    @functools.cache
    def made(name: str) -> fr.Run:
        if name == "als":
            pytest.importorskip("implicit", reason="the extra als is not installed")
        return fr.train(method(base, name), folder / name, market)

    return made


@pytest.fixture(scope="module")
def prepared(base, run_of) -> Prepared:
    """Inputs of the fused model, with which `evaluate --baselines` tunes and measures."""
    config = fr.configure(base, data=dataclasses.asdict(run_of("popularity").config.data))
    return prepare(config, *read(config))


@pytest.fixture(scope="module")
def today(market) -> fr.Dataset:
    """Newer tables: user K1 holds P005 and, as C0001 does, the new item P999."""
    rows = frames(market)
    rows["users"].append({"user_id": "K1", "text": "I follow markets in Brazil."})
    rows["items"].append(rows["items"][3] | {"item_id": "P999"})
    pairs = ("K1", "P005"), ("K1", "P999"), ("C0001", "P999")
    rows["interactions"] += [{"user_id": u, "item_id": i, "timestamp": TODAY} for u, i in pairs]
    kind = rows["ties"][0]["kind"]
    rows["ties"].append({"source_id": "K1", "target_id": "C0001", "kind": kind, "timestamp": TODAY})
    return tables(rows)


def scores(run: fr.Run) -> np.ndarray:
    return np.asarray(scorer(run.config, run.prepared, run.state)(jnp.arange(run.prepared.dataset.n_users)))


# --- measured ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BASELINES)
def test_a_run_has_the_metrics_of_a_comparison_with_baselines(name, run_of, prepared):
    run = run_of(name)
    settings = choose_settings(name, prepared)
    per_user = evaluate_users(prepared, baseline(name, prepared, settings), "test")
    assert run.results["settings"] == settings and run.results["variant"] == name
    np.testing.assert_equal(run.results["test"], mean(per_user))
    written = read_users(run.workdir / TEST_METRICS_PER_USER)
    np.testing.assert_array_equal(written.metrics["ndcg@10"], per_user.metrics["ndcg@10"])
    valid = evaluate_users(prepared, baseline(name, prepared, settings), "valid")
    np.testing.assert_equal(run.results["valid"], mean(valid))
    assert run.results["counts"]["customers"] == USERS and run.results["parameters"] is None
    assert not (run.workdir / "select").exists()


def test_a_comparison_leaves_the_same_runs(base, run_of, folder, market):
    report = fr.compare(base, folder / "compared", ["ease", "friends_mean"], [0], dataset=market)
    for row in report["rows"]:
        run = run_of(row["variant"])
        assert {part: row[part] for part in ("test", "valid", "slices")} == {
            part: run.results[part] for part in ("test", "valid", "slices")
        }
    left = fr.load(folder / "compared" / "runs" / "ease" / "0")
    np.testing.assert_array_equal(scores(left), scores(run_of("ease")))


@pytest.mark.parametrize("name", ["ease", "lightgcn"])
def test_evaluation_measures_the_run_again_under_the_name_of_its_method(name, run_of):
    run = run_of(name)
    assert run.evaluate("test") == {name: pytest.approx(run.results["test"], nan_ok=True, abs=1e-6)}
    assert repr(run).startswith(f"Run('{run.workdir}': tables, {name}, valid ndcg@10 ")


# --- served --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_the_best_unseen_items_are_recommended(name, run_of, market):
    run = run_of(name)
    expected = scores(run)
    held = market.interactions["user"].to_numpy(), market.interactions["item"].to_numpy()
    unseen = expected.copy()
    unseen[held] = -np.inf
    ranked = run.recommend(k=3)
    assert ranked.num_rows == 3 * USERS
    np.testing.assert_array_equal(ranked["score"].to_numpy().reshape(-1, 3), -np.sort(-unseen, axis=1)[:, :3])


@pytest.mark.parametrize("name", METHODS)
def test_vectors_of_the_export_have_the_scores_as_products(name, run_of):
    run = run_of(name)
    users, items = user_item_vectors(run.config, run.prepared, run.state)
    np.testing.assert_allclose(users @ items.T, scores(run), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_new_users_and_items_are_served(name, run_of, today):
    run = run_of(name)
    other = fr.load(run.workdir, dataset=today)
    found = scores(other)
    assert found.shape == (USERS + 1, ITEMS + 1) and np.isfinite(found).all()
    assert np.ptp(found[-1]) > 0 and not np.array_equal(found[:-1, :-1], scores(run))
    if name in BASELINES:
        assert np.unique(found[:, -1]).size > 1 or name == "popularity"
        expected = baseline(name, other.prepared, run.results["settings"])(jnp.arange(USERS + 1))
        np.testing.assert_array_equal(found, expected)


def test_a_closed_form_is_fitted_to_the_rows_that_are_served(run_of, market, today):
    """EASE in NumPy, on all rows, on those of the training, and on newer tables."""
    run = run_of("ease")
    train = fr.load(run.workdir, history="train")
    assert 0 < len(train.prepared.observed.user) < market.interactions.num_rows
    for one in (run, train, fr.load(run.workdir, dataset=today)):
        dataset, observed = one.prepared.dataset, one.prepared.observed
        history = np.zeros((dataset.n_users, dataset.n_items))
        history[observed.user, observed.item] = 1
        inverse = np.linalg.inv(history.T @ history + run.results["settings"]["l2"] * np.eye(dataset.n_items))
        weights = -inverse / np.diag(inverse)
        np.fill_diagonal(weights, 0)
        known = history.sum(0) > 0
        expected = history @ weights
        user = np.flatnonzero(np.abs(expected).max(1) > 1e-6)  # others, as all baselines rank them, by popularity
        assert len(user) > USERS - 5
        np.testing.assert_allclose(scores(one)[np.ix_(user, known)], expected[np.ix_(user, known)], atol=1e-4)
    assert fr.load(run.workdir, dataset=today).recommend(["K1"], k=3).num_rows == 3


@pytest.mark.parametrize("name", ["ease", "item_knn"])
def test_one_user_gets_the_list_of_all_users_and_new_interactions_are_folded_in(name, run_of, market):
    run = run_of(name)
    ranked = run.recommend(k=3)
    assert run.recommend(["C0003"], k=3) == ranked.filter(pc.equal(ranked["user_id"], "C0003"))
    bought = {
        "user_id": ["C0003"],
        "item_id": ranked.filter(pc.equal(ranked["user_id"], "C0003"))["item_id"][:1],
        "timestamp": [TODAY],
    }
    updated = run.update(bought)
    again = fr.load(run.workdir, dataset=updated.prepared.dataset)
    assert updated.prepared.dataset.interactions.num_rows == market.interactions.num_rows + 1
    np.testing.assert_array_equal(scores(updated), scores(again))
    assert not np.array_equal(scores(updated), scores(run))


def test_a_refit_on_validation_is_measured_and_served(base, folder, market):
    config = fr.configure(base, model={"method": "item_knn"}, train={"refit": "valid"})
    run = fr.train(config, folder / "refit", market)
    for split, splits in (("valid", ("train",)), ("test", ("train", "valid"))):
        _, measured, _ = load_measured(run.workdir, split)
        assert measured.splits == splits
        found = run.evaluate(split)["item_knn"]
        np.testing.assert_equal(found, run.results[split])


# --- written -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["als", "lightgcn"])
def test_export_card_and_page_name_the_method(name, run_of, tmp_path):
    run = run_of(name)
    out = run.save(tmp_path / "out")
    assert (out / "model.safetensors").exists() == (name == "lightgcn")
    page = fr.report(run.workdir, tmp_path / "page.html", baselines=["popularity"], num_users=2, k=2).read_text()
    for text in ((run.workdir / "README.md").read_text(), (out / "README.md").read_text(), page):
        assert name in text
        assert ("fitted to the rows that it ranks with" in text) == (name == "als")
    assert "No reasons are known." in page or name == "lightgcn"
    assert json.loads((out / "config.json").read_text())["model"]["method"] == name
    assert model_digest(run.workdir) in (run.workdir / "README.md").read_text()


# --- refused -------------------------------------------------------------------------------------------------------


def test_another_method_is_another_config(base, run_of, market):
    run = run_of("ease")
    with pytest.raises(ValueError, match=r"another config \(model.method is 'ease' there and 'gf_cf' here\)"):
        fr.train(method(base, "gf_cf"), run.workdir, market)
    assert fr.train(method(base, "ease"), run.workdir, market).results == run.results


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("friends_mean", "friends_mean reads social edges, and .* has none; give the table ties, or"),
        ("social_lightgcn", "social_lightgcn reads social edges"),
        ("text_mean", "text_mean reads texts, and .* has none; give a column text of items or users, or the table rev"),
        ("alpharec", "alpharec reads texts"),
    ],
)
def test_tables_without_what_a_method_reads_are_refused_first(name, why, base, market, tmp_path, monkeypatch):
    rows = frames(market)
    plain = tables(
        {
            "users": [{"user_id": row["user_id"]} for row in rows["users"]],
            "items": [{"item_id": row["item_id"]} for row in rows["items"]],
            "interactions": [{name: row[name] for name in ("user_id", "item_id")} for row in rows["interactions"]],
        }
    )
    monkeypatch.setattr("fused_rec.training.trainer.prepare", None)
    with pytest.raises(NotApplicableError, match=why):
        fr.train(method(base, name), tmp_path / "run", plain)
    assert not (tmp_path / "run" / "run.json").exists()


def test_what_a_baseline_cannot_do_is_refused_with_what_can(run_of, base, tmp_path):
    run = run_of("ease")
    why = "model.method is ease, whose scores have no decomposition; explanations need a trained model: .* lightgcn"
    with pytest.raises(ValueError, match=why):
        run.explain("C0001")
    item, held = "P001", run.prepared.dataset.items["item_id"][int(run.prepared.observed.item[0])].as_py()
    with pytest.raises(ValueError, match=why):
        run.counterfactual("C0001", item, without=held)
    assert run_of("lightgcn").explain("C0001", k=1)[0]["parts"]
    pytest.importorskip("optuna", reason="the extra sweeps is not installed")
    with pytest.raises(ValueError, match="model.method is ease, which training itself tunes; tune a model with"):
        fr.tune(method(base, "ease"), tmp_path, trials=1)


# --- named ---------------------------------------------------------------------------------------------------------


def test_a_method_sets_its_settings_and_others_win():
    config = fr.configure(fr.Config(), model={"method": "lightgcn", "dim": 7}, train={"max_steps": 3})
    assert (config.model.method, config.model.variant, config.model.num_layers) == ("lightgcn", "graph", 3)
    assert (config.model.dim, config.train.max_steps, config.train.loss) == (7, 3, "bpr")
    assert not config.model.late_fusion and config.model.name == "lightgcn" and config.model.is_trained
    assert configured(config, {"model": {"dim": 9}}).train.max_steps == 3, "settings alone apply no method again"
    with pytest.raises(ValueError, match="model.method is 'no_gates'; it must be empty or one of"):
        fr.configure(model={"method": "no_gates"})
    assert (
        not fr.configure(model={"method": "als"}).encodes_text
        and fr.configure(model={"method": "text_ease"}).encodes_text
    )


def test_flags_beside_the_name_of_a_method_win(monkeypatch):
    given = ["--config.model.method=lightgcn", "--config.model.dim=7", "--config.graph.attributes=('sector',)"]
    argv = ["train", *given]
    monkeypatch.setattr("sys.argv", argv)
    values = flags.FlagValues()
    holder = config_flags.DEFINE_config_dict("config", get_config(), flag_values=values)
    monkeypatch.setattr(launch.flags, "FLAGS", values)
    values(argv)
    config = launch.config_of(holder.value)
    assert (config.model.method, config.model.dim, config.graph.attributes) == ("lightgcn", 7, ("sector",))
    assert (config.model.num_layers, config.train.loss, config.train.refit) == (3, "bpr", "all")


def test_the_commands_take_a_method(run_of, tmp_path):
    path, run = run_of("popularity").config.data.path, tmp_path / "run"

    def ended(module: str, *given: str) -> subprocess.CompletedProcess:
        return preloaded.run(f"experiments.{module}", f"--workdir={run}", *given)

    data = f"--config.data.path={path}", "--config.data.repair=True"
    done = ended("train", "--config=tables", *data, "--config.model.method=item_knn")
    assert done.returncode == 0, done.stderr
    assert "served model: fitted to the rows that it ranks with" in done.stdout
    assert json.loads((run / "results.json").read_text())["variant"] == "item_knn"
    done = ended("recommend", "--k=2", f"--out={tmp_path}/ranked.csv")
    assert done.returncode == 0 and f"{2 * USERS} recommendations" in done.stdout, done.stderr
    done = ended("recommend", "--k=2", f"--out={tmp_path}/other.csv", "--explain")
    assert done.returncode == 1 and "model.method is item_knn, whose scores have no decomposition" in done.stderr
    assert not (tmp_path / "other.csv").exists()
