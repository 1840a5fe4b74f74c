"""What a run offers: rankings, similar users and items, scores of pairs, vectors, explanations."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pandas as pd
import polars as pl
import pytest
from market import write_tables

import fused_rec as fr
from fused_rec.evaluation.filters import parse

MODEL = str(Path(__file__).parent / "golden" / "tiny_bert")
SETTINGS = {
    "train": {"batch_size": 32, "max_steps": 10, "eval_every": 5, "learning_rate": 0.02},
    "model": {"dim": 8, "num_layers": 1},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def config(folder) -> fr.Config:
    return fr.configure(text={"model": MODEL, "cache": str(folder / "cache")}, **SETTINGS)


@pytest.fixture(scope="module")
def market(folder) -> fr.Dataset:
    return fr.load_dataset(write_tables(folder / "mine"))


@pytest.fixture(scope="module")
def run(config, folder, market) -> fr.Run:
    return fr.train(config, folder / "run", market)


# --- rankings --------------------------------------------------------------------------------------------------------


def test_recommend_and_reasons(run, market):
    ranked = run.recommend(["C0003", "C0001"], k=4)
    assert ranked.column_names == ["user_id", "rank", "item_id", "score", "name"]
    assert ranked["user_id"].to_pylist() == ["C0003"] * 4 + ["C0001"] * 4
    names = dict(zip(market.items["item_id"].to_pylist(), market.items["name"].to_pylist(), strict=True))
    assert ranked["name"].to_pylist() == [names[item] for item in ranked["item_id"].to_pylist()]
    reported = run.explain("C0003", k=4)
    assert [row["item_id"] for row in reported] == ranked["item_id"].to_pylist()[:4]
    for row, score in zip(reported, ranked["score"].to_pylist()[:4], strict=True):
        assert row["score"] == pytest.approx(score, rel=1e-4)
        assert sum(part["value"] for part in row["parts"]) == pytest.approx(score, rel=1e-4)
        assert row["reasons"]
    with pytest.raises(ValueError, match="users is 'C0001', one string; give a list"):
        run.recommend("C0001")
    with pytest.raises(ValueError, match="1 unknown item ids, first 'P999'; tables has 30"):
        run.explain("C0001", ["P999"])


def test_a_run_of_integer_ids_is_asked_for_them(folder, config):
    rng = np.random.default_rng(0)
    pairs = np.unique(rng.integers(0, 20, (150, 2)), axis=0)
    dataset = fr.dataset_from_tables({"user_id": pairs[:, 0], "item_id": pairs[:, 1]})
    run = fr.train(fr.configure(config, model={"variant": "graph"}), folder / "integers", dataset)
    user, item = (int(value) for value in pairs[0])
    best = run.recommend([user], k=1)
    assert best["user_id"].to_pylist() == [str(user)]
    other = int(best["item_id"][0].as_py())
    assert run.explain(user, [other])[0]["item_id"] == str(other)
    assert run.counterfactual(user, other, without=item).rank == 1
    page = fr.report(folder / "integers", folder / "integers.html", baselines=["popularity"], users=[user], k=1)
    assert f">{user}<" in page.read_text() or str(user) in page.read_text()
    with pytest.raises(ValueError, match="items has 1.0 of type float"):
        run.explain(user, [1.0])  # pyright: ignore[reportArgumentType]


def test_items_and_where_restrict_the_candidates(run, market):
    bands = dict(zip(market.items["item_id"].to_pylist(), market.items["risk_band"].to_pylist(), strict=True))
    whole = run.recommend(["C0001", "C0002"], k=30).to_pylist()
    calm = run.recommend(["C0001", "C0002"], k=30, where="risk_band <= 2", progress=False).to_pylist()
    expected = [(row["user_id"], row["item_id"]) for row in whole if bands[row["item_id"]] <= 2]
    assert [(row["user_id"], row["item_id"]) for row in calm] == expected and len(expected) > 2
    listed = [row["item_id"] for row in whole if row["user_id"] == "C0001"][3:9]
    found = run.recommend(["C0001"], k=30, items=listed[::-1], where="risk_band > 2")["item_id"].to_pylist()
    assert found == [item for item in listed if bands[item] > 2]
    assert run.recommend(["C0001"], where="risk_band > 99").num_rows == 0
    with pytest.raises(ValueError, match="1 unknown item ids, first 'P999'"):
        run.recommend(["C0001"], items=["P001", "P999"])
    with pytest.raises(ValueError, match="where has typo, which is no column of the items; they have item_id, "):
        run.recommend(["C0001"], where="typo == 1")


def test_rules_are_a_file_a_dictionary_or_a_list(run, folder):
    rules = [{"name": "withdrawn", "refuse": {"items": run.recommend(["C0001"], k=2)["item_id"].to_pylist()}}]
    (folder / "rules.json").write_text(json.dumps({"rules": rules}))
    expected = run.recommend(["C0001"], k=5)["item_id"].to_pylist()[2:]
    for given in (folder / "rules.json", {"rules": rules}, rules):
        assert run.recommend(["C0001"], k=3, rules=given)["item_id"].to_pylist() == expected
    with pytest.raises(ValueError, match="rule 1: name is null"):
        run.recommend(rules=[{"refuse": "held"}])
    with pytest.raises(ValueError, match="the rules cannot be written as JSON"):
        run.recommend(rules=[{"name": {1, 2}}])


def test_a_few_customers_get_the_lists_that_they_get_among_all(run, market):
    """They are ranked on the host, all others by XLA."""
    rules = [
        {"name": "risk", "require": ["item.risk_band", "at_most", "user.risk_tolerance"], "allow_unknown": ["user"]},
        {"name": "withdrawn", "refuse": {"items": ["P003", "P007"]}},
        {"name": "advised against", "refuse": {"pairs": [["C0005", "P001"], ["C0079", "P012"], ["C0001", "P002"]]}},
    ]
    under_rules = (
        {"k": 30, "rules": rules},
        {"k": 30, "rules": parse(json.dumps({"rules": rules})), "include_seen": True},
        {"k": 30, "rules": rules[:1], "where": "risk_band <= 3"},
        {"k": 30, "rules": [{"name": "seen", "refuse": "held"}]},
    )
    free = ({"k": 7}, {"k": 7, "include_seen": True}, {"k": 30, "where": "risk_band <= 3"}, {"k": 1000})
    for settings in (*free, *under_rules):
        whole = run.recommend(**settings).to_pandas().set_index("user_id")
        for users in (["C0001"], ["C0079", "C0005", "C0080"]):
            few = run.recommend(users, **settings).to_pandas()
            expected = whole.loc[users].reset_index()
            assert few.drop(columns="score").equals(expected.drop(columns="score"))
            np.testing.assert_allclose(few["score"], expected["score"], rtol=1e-4, atol=1e-5)


def test_equal_scores_are_in_the_same_order_for_few_and_for_all(run, market):
    """Of nodes about which nothing is known, all items have a score in common with others."""
    params = jax.tree.map(np.zeros_like, run.state.params)
    blank = dataclasses.replace(run, state=dataclasses.replace(run.state, params=params))
    whole = blank.recommend(k=30, include_seen=True)
    assert len(set(whole["score"].to_pylist())) < 30, "popularity is in the place of equal scores"
    few = blank.recommend(["C0001", "C0002"], k=30, include_seen=True)
    assert few.equals(whole.slice(0, 60))
    assert blank.recommend(["C0001"], k=11, include_seen=True).equals(whole.slice(0, 11))


def test_a_score_that_is_not_finite_is_named_for_few_users_too(run):
    params = jax.tree.map(lambda leaf: np.full_like(leaf, np.nan), run.state.params)
    spoiled = dataclasses.replace(run, state=dataclasses.replace(run.state, params=params))
    with pytest.raises(ValueError, match="the scores of user 0 hold NaN or infinity"):
        spoiled.recommend(["C0001"])
    with pytest.raises(ValueError, match="k is True of type bool; it must be an integer of at least 1"):
        run.recommend(["C0001"], k=True)
    with pytest.raises(ValueError, match="k is 0; it must be at least 1"):
        run.recommend(["C0001"], k=0)


def test_progress_can_be_silenced(run, capfd):
    run.recommend(k=1, progress=False)
    assert capfd.readouterr().err == ""
    run.recommend(k=1)
    assert "rank, part 1 of 1" in capfd.readouterr().err


# --- vectors ---------------------------------------------------------------------------------------------------------


def test_pairs_have_the_scores_of_the_ranking(run):
    ranked = run.recommend(["C0003", "C0001"], k=5, include_seen=True)
    users, items = ranked["user_id"], ranked["item_id"]
    pairs = list(zip(users.to_pylist(), items.to_pylist(), strict=True))
    frame = ranked.to_pandas()
    for given in (pairs, (users, items), ranked, frame, pl.from_arrow(ranked), {"user_id": users, "item_id": items}):
        scores = run.score(given)
        assert scores.dtype == np.float32
        np.testing.assert_allclose(scores, ranked["score"].to_numpy(), rtol=1e-4, atol=1e-5)
    assert run.score([]).shape == (0,)


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ("C0001", "pairs is of type str, without the columns"),
        ([("C0001",)], r"pairs has \('C0001',\); each must be"),
        (["C0001"], "pairs has 'C0001'; each must be"),
        ((["C0001"], ["P001", "P002"]), "pairs has 1 users and 2 items"),
        ((["C0001"],), "pairs is a tuple of 1"),
        ([("C0001", "nothing")], "1 unknown item ids, first 'nothing'"),
        ([("nobody", "P001")], "1 unknown user ids, first 'nobody'"),
        (pd.DataFrame({"user": ["C0001"]}), "pairs is of type DataFrame, without the columns"),
    ],
)
def test_what_is_no_pair_is_refused(run, pairs, message):
    with pytest.raises(ValueError, match=message):
        run.score(pairs)


def test_vectors_give_the_scores(run, market):
    scores = run.user_vectors @ run.item_vectors.T
    assert scores.shape == (market.n_users, market.n_items) and run.item_vectors is run.item_vectors
    ids = market.items["item_id"].to_pylist()
    ranked = run.recommend(k=3, include_seen=True)
    found = [ids[i] for row in np.argsort(-scores, axis=1)[:, :3] for i in row]
    assert found == ranked["item_id"].to_pylist()


def test_similar_users_and_items_are_those_that_are_scored_alike(run, market):
    scores = (run.user_vectors @ run.item_vectors.T).astype(np.float64)
    centered = scores - scores.mean(1, keepdims=True)
    for method, rows, key in (
        (run.similar_users, centered, "user_id"),
        (run.similar_items, centered.T, "item_id"),
    ):
        ids = (market.users if key == "user_id" else market.items)[key].to_pylist()
        unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        cosines = unit @ unit[4]
        order = [row for row in np.argsort(-cosines) if row != 4][:6]
        found = method(ids[4], k=6)
        assert found[key].to_pylist() == [ids[row] for row in order] and found["rank"].to_pylist() == [*range(1, 7)]
        np.testing.assert_allclose(found["score"].to_numpy(), cosines[order], atol=1e-4)
    assert found.column_names == ["item_id", "rank", "score", "name"]
    assert len(run.similar_items(ids[4], k=1000)) == market.n_items - 1
    with pytest.raises(ValueError, match="k is 0; it must be at least 1"):
        run.similar_items(ids[4], k=0)
    with pytest.raises(ValueError, match="1 unknown user ids, first 'nobody'"):
        run.similar_users("nobody")


# --- explanations ----------------------------------------------------------------------------------------------------


def test_what_if(run, market):
    user = run.prepared.observed.user
    item = run.prepared.observed.item[user == 0]
    ids = market.items["item_id"].to_pylist()
    best = run.recommend(["C0001"], k=1)
    changed = run.counterfactual("C0001", best["item_id"][0].as_py(), without=ids[item[0]])
    assert changed.rank == 1 and changed.score == pytest.approx(best["score"][0].as_py(), rel=1e-4)
    assert changed.score_after != changed.score


def test_the_set_without_which_an_item_is_not_the_first(run):
    first, second = run.recommend(["C0001"], k=2)["item_id"].to_pylist()
    found = run.counterfactual_set("C0001", first, k=1)
    assert found["rank"] == 1 < found["rank_after"] and found["sources"] and found["entering"] not in (None, first)
    assert found["leaving"] == first and found["text"].startswith("You see this because of ")
    enters = run.counterfactual_set("C0001", second, k=1, language="fr")
    assert enters is None or (enters["rank"], enters["rank_after"], enters["entering"]) == (2, 1, second)
    rules = [{"name": "withdrawn", "refuse": {"items": [found["entering"]]}}]
    assert run.counterfactual_set("C0001", first, k=1, rules=rules)["entering"] != found["entering"]
    held = run.prepared.dataset.items["item_id"][int(run.prepared.observed.item[run.prepared.observed.user == 0][0])]
    with pytest.raises(ValueError, match="is no candidate of user C0001: it is held or refused; give another item"):
        run.counterfactual_set("C0001", held.as_py(), k=1)
    if found["smallest"] and [source["kind"] for source in found["sources"]] == ["interaction"]:
        [source] = found["sources"]
        assert run.counterfactual("C0001", first, without=source["item_id"]).rank_after > 1


# --- evaluation ------------------------------------------------------------------------------------------------------


def test_measure(run):
    found = run.evaluate("test", ["popularity"])
    assert list(found) == ["popularity", "fused"]
    assert found["fused"] == pytest.approx(run.results["test"], nan_ok=True)
    with pytest.raises(ValueError, match="split is 'train'; it must be valid or test"):
        run.evaluate("train")
    with pytest.raises(ValueError, match=r"baselines are \['popular'\]"):
        run.evaluate("valid", ["popular"])
