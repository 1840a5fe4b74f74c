"""What a finished run ranks with: all rows of its tables, those of its training, and tables that came later."""

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pytest
from tiny import quick_compilation  # noqa: F401

import fused_rec as fr
from fused_rec.data.dataset import column
from fused_rec.data.synthetic import make_synthetic
from fused_rec.graph.schema import ITEM, USER
from fused_rec.serving.recommender import load_measured
from fused_rec.training.evaluate import scorer

MODEL = str(Path(__file__).parent / "golden" / "tiny_bert")


@pytest.fixture(scope="module")
def market() -> fr.Dataset:
    """80 users and 30 items with texts, reviews and ties; only item 0 has no interaction but with user 0."""
    made = make_synthetic(0, 80, 30)
    user, item = column(made.interactions, "user"), column(made.interactions, "item")
    return dataclasses.replace(made, interactions=made.interactions.filter(pa.array((item != 0) | (user == 0))))


def settings(folder: Path, **train) -> fr.Config:
    return fr.configure(
        text={"model": MODEL, "tfidf_dim": 8, "cache": str(folder / "cache")},
        model={"dim": 8, "num_layers": 2, "late_fusion": True},
        train={"max_steps": 20, "eval_every": 10, "batch_size": 32, "positives_per_user": 8, "patience": 9, **train},
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("serving")


@pytest.fixture(scope="module")
def run(market, folder) -> fr.Run:
    return fr.train(settings(folder), folder / "run", market)


def scores(run: fr.Run) -> np.ndarray:
    return np.asarray(scorer(run.config, run.prepared, run.state)(jnp.arange(run.prepared.dataset.n_users)))


# --- all rows ------------------------------------------------------------------------------------------------------


def test_a_run_ranks_with_all_rows_unless_told_otherwise(run, market):
    observed = run.prepared.observed
    pairs = set(zip(observed.user.tolist(), observed.item.tolist(), strict=True))
    assert pairs == set(zip(*(column(market.interactions, name).tolist() for name in ("user", "item")), strict=True))
    assert len(observed.reviews) == market.reviews.num_rows and len(observed.ties) == market.ties.num_rows
    popularity = np.bincount(column(market.interactions, "item"), minlength=market.n_items)
    np.testing.assert_array_equal(run.prepared.graph_inputs.popularity, popularity)
    by_name = {part.name: part for part in run.prepared.graph_inputs.fusion.closed}
    np.testing.assert_allclose(by_name["popularity"].target[:, 0], np.log1p(popularity), rtol=1e-6)

    train = fr.load(run.workdir, history="train", cache=run.config.text.cache)
    assert 0 < len(train.prepared.observed.user) < len(observed.user)
    assert train.prepared.served()["history"] == "train" and run.prepared.served()["history"] == "all"
    assert not np.array_equal(scores(train), scores(run))
    with pytest.raises(ValueError, match=r"history is 'test'; it must be one of \('train', 'all'\)"):
        fr.load(run.workdir, history="test")
    with pytest.raises(ValueError, match="history is 'train', and other tables have no training split"):
        fr.load(run.workdir, history="train", dataset=market)


def test_held_out_holdings_explain_a_recommendation(run, market):
    """The customer whose holdings are all held out is known by them, and not by popularity alone."""
    train = fr.load(run.workdir, history="train")
    everything, known = (np.bincount(one.prepared.observed.user, minlength=market.n_users) for one in (run, train))
    user = int(np.argmax(everything - known))
    name = market.users["user_id"][user].as_py()
    held = set(run.prepared.observed.item[run.prepared.observed.user == user].tolist())
    parts = [part for row in fr.explain(run, name, k=3) for part in row["parts"] if part["kind"] == "interaction"]
    named = {market.items["item_id"].to_pylist().index(part["source"]) for part in parts if part["source"]}
    assert named == held
    hidden = held - set(train.prepared.observed.item[train.prepared.observed.user == user].tolist())
    item_id = market.items["item_id"][hidden.pop()].as_py()
    best = fr.recommend(run, [name], k=1)["item_id"][0].as_py()
    assert fr.counterfactual(run, name, best, without=item_id).rank == 1


def test_evaluation_withholds_whatever_the_run_was_opened_with(run):
    for split in ("valid", "test"):
        assert fr.evaluate(run, split)["fused"] == pytest.approx(run.results[split], nan_ok=True, abs=1e-6)
    assert isinstance(run.prepared, fr.api.ModelInputs) and not hasattr(run.prepared, "split")


def test_what_was_fitted_is_applied_to_all_texts(run):
    """A node with the same texts has the same features with both histories; the training's whitening holds for all."""
    _, measured, _ = load_measured(run.workdir, "served")
    assert run.prepared.text.fitted.tfidf.terms == measured.text.fitted.tfidf.terms
    assert len(run.prepared.text.texts.texts) > len(measured.text.texts.texts)
    same = 0
    for node_type in (USER, ITEM):
        of_all, of_train = (
            {node: texts_of(one, node_type, node) for node in range(one.graph_inputs.graph.count(node_type))}
            for one in (run.prepared, measured)
        )
        for node, texts in of_all.items():
            if texts and texts == of_train[node]:
                same += 1
                rows = (one.graph_inputs.graph.text[node_type][node] for one in (run.prepared, measured))
                np.testing.assert_allclose(*rows, atol=2e-5)
    assert same > 20


def texts_of(inputs, node_type: str, node: int) -> list[str]:
    links = inputs.text.texts.links[node_type]
    return [inputs.text.texts.texts[text] for text in links.texts[links.nodes == node].tolist()]


def test_an_untrained_id_embedding_is_not_used(run, market):
    """Item 0 has one interaction. Where it is held out, the row of its ID embedding is noise."""
    _, measured, state = load_measured(run.workdir, "served")
    trained = np.asarray(measured.graph_inputs.trained_items)
    untrained = np.flatnonzero(~trained)
    rows = np.asarray(run.state.params["main"]["id_item"])
    assert len(untrained) and np.abs(state.params["main"]["id_item"][untrained]).max() > 0.01
    np.testing.assert_array_equal(rows[trained], state.params["main"]["id_item"][trained])
    assert not rows[untrained].any()


def test_audit_card_and_page_say_what_was_used(run, market, tmp_path):
    used = f"history=all): {market.interactions.num_rows:,} interactions, {market.reviews.num_rows:,} reviews"
    card = fr.export(run, tmp_path / "out") / "README.md"
    assert used in card.read_text()
    page = fr.report(run.workdir, tmp_path / "page.html", baselines=[], num_users=2)
    assert used in page.read_text()
    page = fr.report(run.workdir, tmp_path / "page.html", baselines=[], num_users=2, history="train")
    assert "history=train" in page.read_text() and used not in page.read_text()
