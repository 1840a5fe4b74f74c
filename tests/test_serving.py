"""What a finished run ranks with: all rows of its tables, those of its training, and tables that came later."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import preloaded
import pyarrow as pa
import pyarrow.parquet
import pytest

import fused_rec as fr
from fused_rec.data.dataset import column, period
from fused_rec.data.synthetic import make_synthetic
from fused_rec.graph.schema import ITEM, USER
from fused_rec.serving import recommender
from fused_rec.serving.recommender import load_measured, model_digest
from fused_rec.training.checkpoint import Checkpoints
from fused_rec.training.evaluate import scorer
from fused_rec.training.fitted import FITTED, read_fitted, write_fitted
from fused_rec.training.inputs import ModelInputs, init_state, state_like

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


@pytest.mark.parametrize("lazy", [False, True])
def test_a_state_to_fill_is_like_an_initial_one(run, lazy):
    neighbors = {"loss": "bpr", "num_neighbors": 2} if lazy else {}
    train = dataclasses.replace(run.config.train, seed=3, lazy_adam=lazy, **neighbors)
    config = dataclasses.replace(run.config, train=train)
    given, expected = (make(config, run.prepared) for make in (state_like, init_state))
    assert jax.tree.structure(given) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(given), jax.tree.leaves(expected), strict=True):
        assert isinstance(one, np.ndarray) and (one.shape, one.dtype) == (other.shape, other.dtype)
    assert (given.step, given.seed) == (expected.step, expected.seed)


# --- all rows ------------------------------------------------------------------------------------------------------


def test_a_run_ranks_with_all_rows_by_default(run, market):
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
    parts = [part for row in run.explain(name, k=3) for part in row["parts"] if part["kind"] == "interaction"]
    named = {market.items["item_id"].to_pylist().index(part["source"]) for part in parts if part["source"]}
    assert named == held
    hidden = held - set(train.prepared.observed.item[train.prepared.observed.user == user].tolist())
    item_id = market.items["item_id"][hidden.pop()].as_py()
    best = run.recommend([name], k=1)["item_id"][0].as_py()
    assert run.counterfactual(name, best, without=item_id).rank == 1


def test_evaluation_withholds_whatever_the_run_was_opened_with(run):
    for split in ("valid", "test"):
        assert run.evaluate(split)["fused"] == pytest.approx(run.results[split], nan_ok=True, abs=1e-6)
    assert isinstance(run.prepared, ModelInputs) and not hasattr(run.prepared, "split")


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
                one, other = (np.asarray(part.graph_inputs.graph.text[node_type]) for part in (run.prepared, measured))
                np.testing.assert_allclose(one[node], other[node], atol=2e-5)
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
    first, last = period(market.interactions) or ("", "")
    rows = f"{market.interactions.num_rows:,} interactions ({first} to {last}), {market.reviews.num_rows:,} reviews"
    used = f"history=all): {rows}"
    card = run.save(tmp_path / "out") / "README.md"
    assert used in card.read_text()
    page = fr.report(run.workdir, tmp_path / "page.html", baselines=[], num_users=2)
    assert used in page.read_text()
    page = fr.report(run.workdir, tmp_path / "page.html", baselines=[], num_users=2, history="train")
    assert "history=train" in page.read_text() and used not in page.read_text()


# --- a model of all rows -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run_of_all(market, folder) -> fr.Run:
    return fr.train(settings(folder, refit="all"), folder / "all", market)


def test_the_model_of_all_rows_is_served_and_another_one_is_measured(run, run_of_all):
    assert run_of_all.results["valid"] == run.results["valid"] and run_of_all.results["test"] == run.results["test"]
    assert run_of_all.evaluate("test")["fused"] == pytest.approx(run.results["test"], nan_ok=True, abs=1e-6)
    step = run.results["best_step"]
    steps = {
        phase: Checkpoints(run_of_all.workdir / phase / "checkpoints").steps() for phase in ("select", "refit_all")
    }
    assert step in steps["select"] and steps["refit_all"][-1] == step
    assert model_digest(run_of_all.workdir) != model_digest(run.workdir)
    assert "retrained on all interactions once it was measured" in (run_of_all.workdir / "README.md").read_text()
    kernel = [one.state.params["main"]["text_item"]["kernel"] for one in (run, run_of_all)]
    assert not np.array_equal(*kernel)


def test_a_model_of_all_rows_has_one_history(run_of_all, market):
    """What was fitted on all rows and is applied to them are the inputs of the training, up to rounding."""
    train = fr.load(run_of_all.workdir, history="train")
    assert len(train.prepared.observed.user) == market.interactions.num_rows
    np.testing.assert_allclose(scores(train), scores(run_of_all), rtol=1e-3, atol=1e-4)


# --- other tables --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(market, folder) -> fr.Run:
    """A run without closed-form components, whose singular vectors depend on all interactions."""
    config = fr.configure(
        settings(folder),
        model={"late_fusion": False, "user_id_embedding": False},
        graph={"attributes": ("sector",), "text_knn": 3},
    )
    return fr.train(config, folder / "plain", market)


def frames(market: fr.Dataset) -> dict[str, list[dict]]:
    """The tables as rows with ids, as a user writes them."""
    users, items = market.users["user_id"].to_pylist(), market.items["item_id"].to_pylist()

    def named(table: pa.Table, **ids: tuple[str, list[str]]) -> list[dict]:
        def cell(name: str, value):
            return (ids[name][0], ids[name][1][value]) if name in ids else (name, value)

        return [dict(cell(*pair) for pair in row.items()) for row in table.to_pylist()]

    pair = {"user": ("user_id", users), "item": ("item_id", items)}
    return {
        "users": market.users.to_pylist(),
        "items": market.items.to_pylist(),
        "interactions": named(market.interactions, **pair),
        "reviews": named(market.reviews, **pair),
        "ties": named(market.ties, source=("source_id", users), target=("target_id", users)),
    }


def tables(rows: dict[str, list[dict]]) -> fr.Dataset:
    return fr.dataset_from_tables(**{name: pa.Table.from_pylist(of_table) for name, of_table in rows.items()})


def scores_by_id(run: fr.Run) -> dict[str, dict[str, float]]:
    users, items = (getattr(run.prepared.dataset, f"{name}s")[f"{name}_id"].to_pylist() for name in ("user", "item"))
    return {user: dict(zip(items, row, strict=True)) for user, row in zip(users, scores(run).tolist(), strict=True)}


def test_the_same_rows_in_another_order_are_scored_alike(plain, market):
    """Users and items are matched by id, also those of ID embeddings and of attribute nodes."""
    rng = np.random.default_rng(0)
    rows = {name: [of[k] for k in rng.permutation(len(of))] for name, of in frames(market).items()}
    other = fr.load(plain.workdir, dataset=tables(rows))
    assert other.prepared.dataset.users["user_id"].to_pylist() != market.users["user_id"].to_pylist()
    expected, found = scores_by_id(plain), scores_by_id(other)
    for user, of_user in expected.items():
        assert found[user] == pytest.approx(of_user, abs=1e-4)


def test_a_stranger_moves_no_other(plain, market):
    """Rows that nothing connects with the others leave scores as they were; a text leaves other nodes' features."""
    rows = frames(market)
    rows["users"].append({"user_id": "stranger"})
    rows["items"].append({"item_id": "unheard"})
    rows["interactions"].append({"user_id": "stranger", "item_id": "unheard", "timestamp": 1_600_000_000})
    before, after = scores_by_id(plain), scores_by_id(fr.load(plain.workdir, dataset=tables(rows)))
    for user, of_user in before.items():
        assert {item: after[user][item] for item in of_user} == pytest.approx(of_user, abs=2e-5)
    rows["users"][-1]["text"] = "I believe in uranium and in nothing else, and I say so in many words of my own."
    talking = fr.load(plain.workdir, dataset=tables(rows))
    for node_type, count in ((USER, market.n_users), (ITEM, market.n_items)):
        text, as_before = (np.asarray(one.prepared.graph_inputs.graph.text[node_type]) for one in (talking, plain))
        np.testing.assert_allclose(text[:count], as_before, atol=1e-5)
    assert np.asarray(talking.prepared.graph_inputs.graph.text[USER])[-1].any()


def test_new_users_and_items_are_served_by_what_is_known_of_them(plain, market):
    """A new customer with another one's rows gets nearly that one's scores; a new product is known by its words."""
    rows = frames(market)
    rows["users"].append(rows["users"][0] | {"user_id": "twin"})
    for name, own in (
        ("interactions", "user_id"),
        ("reviews", "user_id"),
        ("ties", "source_id"),
        ("ties", "target_id"),
    ):
        rows[name] += [row | {own: "twin"} for row in rows[name] if row[own] == "C0001"]
    rows["items"].append(rows["items"][3] | {"item_id": "new"})
    run = fr.load(plain.workdir, dataset=tables(rows))
    found = scores_by_id(run)
    both = [np.array([found[user][item] for item in found[user]]) for user in ("C0001", "twin")]
    assert np.corrcoef(both[0], both[1])[0, 1] > 0.99
    new = run.state.params["main"]["id_item"][-1]
    assert not new.any() and run.state.params["main"]["id_item"].any(1)[:-1].mean() > 0.9
    assert len({found[user]["new"] for user in found}) > 60, "the words of the new product say whom it suits"
    ranked = run.recommend(["twin"], k=31)
    assert "new" in ranked["item_id"].to_pylist()
    assert run.explain("twin", ["new"])[0]["reasons"]


def test_what_is_gone_vanishes_and_what_cannot_be_served_is_counted(plain, market):
    rows = frames(market)
    gone_user, gone_item = "C0002", "P002"
    rows = {
        name: [row for row in of if gone_user not in row.values() and gone_item not in row.values()]
        for name, of in rows.items()
    }
    rows["users"].append({"user_id": "nobody"})
    rows["ties"].append({"source_id": "C0001", "target_id": "C0003", "kind": "a new kind", "timestamp": None})
    run = fr.load(plain.workdir, dataset=tables(rows))
    found = scores_by_id(run)
    assert gone_user not in found and gone_item not in found["C0001"]
    assert run.prepared.served()["unknown"] == {
        "ties of kinds that the training did not have, not used (the first: 'a new kind')": 1,
        "customers without text and edges, ranked by popularity alone": 1,
    }
    assert len(run.prepared.observed.ties) == len(rows["ties"]) - 1
    best = run.recommend(["nobody"], k=1)["item_id"][0].as_py()
    counts = np.bincount(run.prepared.observed.item)
    assert counts[run.prepared.dataset.items["item_id"].to_pylist().index(best)] == counts.max()


def test_names_that_the_graph_gives_to_relations_of_users_are_no_kinds_of_ties(plain, market):
    """The reverse of ties of the kind referral, and edges between similar texts."""
    rows = frames(market)
    for kind in ("referral_of", "similar_text"):
        rows["ties"].append({"source_id": "C0001", "target_id": "C0003", "kind": kind, "timestamp": None})
    inputs = fr.load(plain.workdir, dataset=tables(rows)).prepared
    assert inputs.unknown == {
        "ties of kinds that the training did not have, not used (the first: 'referral_of')": 2,
    }
    assert len(inputs.observed.ties) == market.ties.num_rows


def test_a_run_with_all_components_serves_tables_that_lack_what_some_need(run, market):
    rows = frames(market) | {"ties": []}
    del rows["ties"], rows["reviews"]
    rows["users"] = [{"user_id": row["user_id"]} for row in rows["users"]]
    rows["items"] = [{"item_id": row["item_id"]} for row in rows["items"]]
    other = fr.load(run.workdir, dataset=tables(rows))
    assert np.isfinite(scores(other)).all()


def test_a_moved_folder_of_newer_tables_is_served_by_the_commands(plain, market, tmp_path):
    rows = frames(market)
    rows["users"].append({"user_id": "K1", "text": "I follow markets in Brazil."})
    rows["interactions"].append({"user_id": "K1", "item_id": "P005", "timestamp": 1_620_000_000})
    fr.save_dataset(tables(rows), tmp_path / "newer")
    with pytest.raises(fr.api.TablesChangedError, match="or serve them: --tables=DIR"):
        fr.load(plain.workdir, data_path=tmp_path / "newer")
    for module, flags in {
        "recommend": ["--users=K1", "--k=3", f"--out={tmp_path}/ranked.parquet", "--explain"],
        "export": [f"--out={tmp_path}/exported"],
        "report": ["--users=K1", "--k=2", "--baselines=popularity", f"--out={tmp_path}/page.html"],
    }.items():
        asked = [f"--workdir={plain.workdir}", f"--tables={tmp_path}/newer", *flags]
        done = preloaded.run(f"experiments.{module}", *asked)
        assert done.returncode == 0, done.stderr
    audit = json.loads((tmp_path / "ranked.parquet.audit.json").read_text())["inputs"]
    assert audit["served"] == fr.load(plain.workdir, dataset=tables(rows)).prepared.served()
    assert audit["served"]["interactions"] == market.interactions.num_rows + 1
    assert audit["tables"] != json.loads((plain.workdir / "run.json").read_text())["tables"]
    ranked = pyarrow.parquet.read_table(tmp_path / "ranked.parquet")
    assert ranked["user_id"].to_pylist() == ["K1"] * 3 and "P005" not in ranked["item_id"].to_pylist()
    assert "Customer K1" in (tmp_path / "page.html").read_text()
    assert f"{market.n_users + 1} customers" in (tmp_path / "exported" / "README.md").read_text()


def test_a_damaged_file_of_what_was_fitted_is_refused(plain, market, tmp_path):
    fitted = read_fitted(plain.workdir / FITTED)
    write_fitted(tmp_path / "again.npz", fitted)
    again = read_fitted(tmp_path / "again.npz")
    assert (again.scales, again.trained, again.tie_kinds) == (fitted.scales, fitted.trained, ("referral",))
    content = bytearray((tmp_path / "again.npz").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "again.npz").write_bytes(content)
    with pytest.raises(ValueError, match="again.npz is damaged .*; train in a new workdir"):
        read_fitted(tmp_path / "again.npz")


def test_interactions_below_the_minimum_value_of_the_training_are_not_served():
    interactions = pa.table({"user": [0, 0, 1], "item": [0, 1, 1], "value": pa.array([2.0, 4.0, None])})
    dataset = make_synthetic(0, 20, 20)
    dataset = dataclasses.replace(dataset, interactions=interactions)
    assert recommender._above_min_value(dataset, 3.0).interactions["item"].to_pylist() == [1, 1]
    assert recommender._above_min_value(dataset, None) is dataset
