"""A training that starts from a finished run: the same model at step 0, ids in other tables, leaks, resuming."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow as pa
import pytest
from market import differences

import fused_rec as fr
from fused_rec.data.dataset import column
from fused_rec.data.periods import until
from fused_rec.data.splits import split
from fused_rec.data.synthetic import make_synthetic
from fused_rec.distributed import processes
from fused_rec.graph.schema import ITEM, USER
from fused_rec.runs.loggers import read_curves
from fused_rec.runs.run_dir import read_run
from fused_rec.serving.recommender import load, load_measured
from fused_rec.training import trainer
from fused_rec.training.evaluate import scorer
from fused_rec.training.fitted import FITTED, FITTED_SELECT, read_fitted
from fused_rec.training.inputs import init_state, prepare
from fused_rec.training.warm_start import INIT, pair_hashes, read_initial, stored_initial

MODEL = str(Path(__file__).parent / "golden" / "tiny_bert")


@pytest.fixture(scope="module")
def market() -> fr.Dataset:
    """80 users and 30 items with texts, reviews and ties, all with a time."""
    made = make_synthetic(0, 80, 30)
    ties = made.ties.append_column("timestamp", pa.array(np.zeros(made.ties.num_rows, np.int64)))
    return dataclasses.replace(made, ties=ties if "timestamp" not in made.ties.column_names else made.ties)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("init")


def settings(folder: Path, kind: str = "time", model: dict | None = None, **train) -> fr.Config:
    return fr.configure(
        split={"kind": kind, "test": 0.1, "valid": 0.1},
        text={"model": MODEL, "tfidf_dim": 8, "cache": str(folder / "cache")},
        model={"dim": 8, "num_layers": 2, "late_fusion": False, **(model or {})},
        train={"max_steps": 20, "eval_every": 10, "batch_size": 32, "positives_per_user": 8, "patience": 9, **train},
    )


def time_of(market: fr.Dataset, share: float) -> int:
    return int(np.quantile(column(market.interactions, "timestamp"), share))


def last_month(market: fr.Dataset) -> fr.Dataset:
    """The tables as they were then, when user 5 had not come yet, and nobody had bought item 7."""
    interactions, reviews, ties = market.interactions, market.reviews, market.ties
    bought = (column(interactions, "user") != 5) & (column(interactions, "item") != 7)
    among = (column(ties, "source") != 5) & (column(ties, "target") != 5)
    then = dataclasses.replace(
        market,
        interactions=interactions.filter(pa.array(bought)),
        reviews=reviews.filter(pa.array(column(reviews, "user") != 5)),
        ties=ties.filter(pa.array(among)),
    )
    return until(then, time_of(market, 0.7))


@pytest.fixture(scope="module")
def earlier(market, folder) -> fr.Run:
    """Last month's run, whose served model learned from all rows of last month's tables."""
    return fr.train(settings(folder, refit="all"), folder / "earlier", last_month(market))


@pytest.fixture(scope="module")
def warm(market, folder, earlier) -> fr.Run:
    config = settings(folder, refit="all", max_steps=10, eval_every=5)
    return fr.train(config, folder / "warm", market, init_from=earlier.workdir)


def all_scores(config, inputs, state) -> np.ndarray:
    return np.asarray(scorer(config, inputs, state)(np.arange(inputs.dataset.n_users, dtype=np.int32)))


def check_same_scores(config: fr.Config, workdir: Path, tables: fr.Dataset) -> None:
    """With the same tables the start is the model of step selection, and scores as it does before the first step."""
    _, measured, state = load_measured(workdir, "valid")
    initial = read_initial(config, workdir, tables, split(tables, config.split))
    assert initial.source["phase"] == "select"  # the served model knows held-out pairs
    prepared = prepare(config, tables, split(tables, config.split), initial=initial)
    trained = np.asarray(prepared.graph_inputs.trained_items)
    found, expected = all_scores(config, prepared, init_state(config, prepared)), all_scores(config, measured, state)
    np.testing.assert_allclose(found[:, trained], expected[:, trained], atol=1e-5)
    assert not np.allclose(expected, all_scores(config, measured, init_state(config, measured)), atol=1e-2)


def test_with_the_same_tables_step_0_has_the_scores_of_the_earlier_run(earlier, market):
    check_same_scores(earlier.config, earlier.workdir, last_month(market))


def test_the_same_holds_for_a_split_that_is_not_by_time(folder, market):
    run = fr.train(settings(folder, "per_user", refit="valid"), folder / "per_user", market)
    check_same_scores(run.config, run.workdir, market)


def test_the_start_is_evaluated_as_step_0(warm):
    at_start, *later = read_curves(warm.workdir / "select")
    assert (at_start["step"], [entry["step"] for entry in later]) == (0, [5, 10])
    best = max((at_start, *later), key=lambda entry: entry["valid/ndcg@10"])
    assert warm.results["best_step"] == best["step"]
    assert [entry["step"] for entry in read_curves(warm.workdir / "refit_all")][:1] != [0]  # nothing is validated there


def test_the_served_model_of_earlier_tables_is_the_start_where_the_held_out_rows_are_later(warm, earlier):
    initial = stored_initial(warm.workdir)
    assert initial is not None and initial.source["phase"] == "refit_all"
    recorded = read_run(warm.workdir)["init_from"]
    assert recorded == initial.source and recorded["workdir"] == str(earlier.workdir.resolve())
    assert warm.results["init_from"]["model"] == recorded["model"] == fr.api.model_digest(earlier.workdir)
    assert (
        f"started from the parameters of earlier (model {recorded['model'][:12]})"
        in (warm.workdir / "README.md").read_text()
    )


def test_rows_go_by_id_and_new_nodes_start_fresh(market, folder, earlier):
    config = settings(folder, refit="all")
    data_split = split(market, config.split)
    initial = read_initial(config, earlier.workdir, market, data_split)
    prepared = prepare(config, market, data_split, initial=initial)
    fresh = init_state(config, dataclasses.replace(prepared, initial=None)).params["main"]
    params = init_state(config, prepared).params["main"]
    for node_type, ids in ((USER, market.users["user_id"]), (ITEM, market.items["item_id"])):
        known = initial.fitted.trained[node_type]
        rows = params[f"id_{node_type}"]
        for row, name in enumerate(ids.to_pylist()):
            source = initial.params[f"params/main/id_{node_type}"][known[name]] if name in known else None
            expected = fresh[f"id_{node_type}"][row] if source is None else source
            np.testing.assert_array_equal(rows[row], expected)
    assert set(market.users["user_id"].to_pylist()) - set(initial.fitted.trained[USER]) >= {"C0006"}
    assert set(market.items["item_id"].to_pylist()) - set(initial.fitted.trained[ITEM])
    assert jax.tree.structure(params) == jax.tree.structure(fresh)


def test_what_the_earlier_run_fitted_is_applied_and_stored(warm, earlier):
    first: Any = read_fitted(earlier.workdir / FITTED)
    second: Any = read_fitted(warm.workdir / FITTED)
    assert second.text.tfidf.terms == first.text.tfidf.terms
    for node_type in (USER, ITEM):
        np.testing.assert_array_equal(second.text.whitening[node_type].matrix, first.text.whitening[node_type].matrix)
    assert {relation: second.scales[relation] for relation in first.scales} == first.scales
    assert len(second.trained[USER]) > len(first.trained[USER])
    # A refit fits on more rows, and the model of step selection keeps its own transforms.
    own: Any = read_fitted(earlier.workdir / FITTED_SELECT)
    assert own.text.whitening[ITEM].center.tolist() != first.text.whitening[ITEM].center.tolist()


def test_a_warm_run_is_served_evaluated_and_exported_as_others(warm, tmp_path):
    assert warm.evaluate("valid")["fused"] == pytest.approx(warm.results["valid"], nan_ok=True, abs=1e-5)
    _, served, state = load_measured(warm.workdir, "served")
    config, inputs, again = load(warm.workdir)
    trained = np.asarray(inputs.graph_inputs.trained_items)
    one, other = all_scores(config, served, state), all_scores(config, inputs, again)
    np.testing.assert_allclose(one[:, trained], other[:, trained], atol=1e-5)
    assert warm.save(tmp_path / "exported").exists()


def test_a_run_that_learned_from_held_out_rows_is_refused(market, folder, earlier, tmp_path):
    config = settings(folder, "random")
    with pytest.raises(ValueError, match=r"learned from \d+ of the \d+ pairs that are held out now.*split.kind time"):
        fr.train(config, tmp_path / "other", market, init_from=earlier.workdir)
    assert not (tmp_path / "other" / "run.json").exists()


def test_a_step_chosen_by_what_is_the_test_split_now_is_refused(market, folder, earlier):
    """The validation rows of the earlier run are the test rows now, and its model learned from none of them."""
    tables = last_month(market)
    then = split(tables, earlier.config.split)
    now = dataclasses.replace(then, valid=then.test, test=then.valid)
    with pytest.raises(ValueError, match=rf"chose its step by {len(then.valid)} of the {len(then.valid)} pairs"):
        read_initial(earlier.config, earlier.workdir, tables, now)


def test_what_ancestors_learned_counts(market, folder, warm, earlier, tmp_path):
    initial = stored_initial(warm.workdir)
    known = pair_hashes(earlier.prepared.dataset, np.arange(earlier.prepared.dataset.interactions.num_rows))
    assert initial is not None and np.isin(known, initial.pairs.learned).all()
    next_one = read_initial(warm.config, warm.workdir, market, split(market, warm.config.split))
    assert np.isin(known, next_one.pairs.learned).all() and next_one.source["phase"] == "select"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"dim": 16}, "model.dim is 8 there and 16 here"),
        ({"variant": "graph"}, "model.variant is 'fused' there and 'graph' here"),
        ({"num_layers": 1}, "model.num_layers is 2 there and 1 here"),
    ],
)
def test_settings_whose_parameters_do_not_fit_are_refused_by_name(market, folder, earlier, tmp_path, change, expected):
    with pytest.raises(ValueError, match=expected):
        fr.train(settings(folder, model=change), tmp_path / "other", market, init_from=earlier.workdir)
    other = fr.configure(settings(folder), text={"tfidf_dim": 4})
    with pytest.raises(ValueError, match=r"text.tfidf_dim is 8 there and 4 here.*or train without init_from"):
        fr.train(other, tmp_path / "other", market, init_from=earlier.workdir)


def test_another_start_is_refused_like_another_config(market, warm, earlier, folder, tmp_path):
    with pytest.raises(ValueError, match=r"another start \(init_from is .*earlier there and None here\)"):
        fr.train(warm.config, warm.workdir, market)
    with pytest.raises(ValueError, match=r"another start \(init_from is .*earlier there and .*other here\)"):
        fr.train(warm.config, warm.workdir, market, init_from=tmp_path / "other")
    with pytest.raises(ValueError, match="init_from is None there"):
        fr.train(earlier.config, earlier.workdir, earlier.prepared.dataset, init_from=warm.workdir)
    again = fr.train(warm.config, warm.workdir, market, init_from=earlier.workdir)
    assert again.results == warm.results
    with pytest.raises(FileNotFoundError, match="finish the run there"):
        fr.train(settings(folder), tmp_path / "new", market, init_from=tmp_path)


def test_a_killed_run_resumes_without_the_earlier_one(market, warm, earlier, monkeypatch, tmp_path):
    """Stopped right after three checkpoints; each time the same call, which does not read the earlier run."""
    stops, write = [("select", 0), ("select", 5), ("refit_all", 0)], trainer.Trainer.checkpoint

    def dies(self, *, best=False):
        write(self, best=best)
        if stops and (self._folder.name, self.taken) == stops[0]:
            del stops[0]
            raise KeyboardInterrupt

    def train() -> fr.Run:
        return fr.train(warm.config, tmp_path / "run", market, init_from=earlier.workdir)

    monkeypatch.setattr(trainer.Trainer, "checkpoint", dies)
    with pytest.raises(KeyboardInterrupt):
        train()
    assert (tmp_path / "run" / INIT).exists()
    monkeypatch.setattr(trainer, "read_initial", lambda *_: pytest.fail("the earlier run is read again"))
    for left in (1, 0):
        with pytest.raises(KeyboardInterrupt):
            train()
        assert len(stops) == left
    # The folder of the tables differs.
    assert differences(train().workdir, warm.workdir) == ["results.json, config"]


def test_no_step_is_a_choice(market, folder, earlier, tmp_path):
    """Steps that only do harm: step 0 is selected, and the refit keeps its parameters."""
    config = settings(folder, refit="all", learning_rate=5.0, max_steps=4, eval_every=2)
    run = fr.train(config, tmp_path / "harmed", market, init_from=earlier.workdir)
    assert run.results["best_step"] == 0
    initial = stored_initial(run.workdir)
    assert initial is not None
    known = initial.fitted.trained[ITEM]
    rows = [market.items["item_id"].to_pylist().index(name) for name in known]
    np.testing.assert_array_equal(
        run.state.params["main"]["id_item"][rows], initial.params["params/main/id_item"][[*known.values()]]
    )
    assert json.loads((run.workdir / "results.json").read_text())["init_from"]["step"] == earlier.results["best_step"]


def test_several_processes_are_refused(folder, earlier, tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "is_single_process", lambda: False)
    with pytest.raises(ValueError, match="run of several processes; train it in one"):
        trainer.run_training(settings(folder), tmp_path / "run", earlier.workdir)
