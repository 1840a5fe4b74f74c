"""What changed between two runs: data, settings, metrics, lists and reasons, on a small market trained twice."""

import dataclasses
import json

import numpy as np
import preloaded
import pyarrow as pa
import pytest
from market import write_tables
from webpage import Page

import fused_rec as fr
from fused_rec.explanation.stability import TOP, ExplainedItem, agreement, survives
from fused_rec.reporting.changes import in_words
from fused_rec.runs.run_dir import TEST_METRICS_PER_USER, read_users

SETTINGS = {
    "train": {"batch_size": 32, "max_steps": 10, "eval_every": 5, "learning_rate": 0.02, "refit": "none"},
    "model": {"dim": 8, "num_layers": 1, "variant": "graph", "late_fusion": False},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("diff")
    write_tables(folder / "tables")
    return folder


@pytest.fixture(scope="module")
def market(place) -> fr.Dataset:
    return fr.load_dataset(place / "tables")


def trained(place, market, name: str, **changes) -> fr.Run:
    return fr.train(fr.configure(fr.configure(**SETTINGS), **changes), place / name, market)


@pytest.fixture(scope="module")
def first(place, market) -> fr.Run:
    return trained(place, market, "first")


@pytest.fixture(scope="module")
def second(place, market) -> fr.Run:
    return trained(place, market, "second", train={"seed": 1})


@pytest.fixture(scope="module")
def changed(first, second) -> dict:
    return fr.diff(first, second, num_users=20)["differences"][0]


def test_a_run_does_not_differ_from_itself(first):
    [found] = fr.diff(first, first, num_users=10)["differences"]
    assert found["settings"] == {} and found["metrics"] is None
    assert all(of["new"] == of["gone"] == 0 for of in found["data"].values())
    for name in ("overlap", "jaccard", "rank_biased_overlap", "first_unchanged", "unchanged", "score_correlation"):
        assert found["lists"][name]["mean"] == pytest.approx(1), name
    for name in ("first_reason", "reasons", "sources", "effects"):
        assert found["reasons"][name]["mean"] == pytest.approx(1), name
    assert found["lists"]["gained"] == found["lists"]["lost"] == [] and found["lists"]["taken"]["left"] == 0


def test_another_seed_is_the_setting_that_differs(changed):
    assert changed["settings"] == {"train.seed": [0, 1]}
    assert changed["data"]["interactions"]["new"] == 0
    assert 0 < changed["lists"]["overlap"]["mean"] < 1
    assert changed["reasons"]["users"] == 20 and changed["reasons"]["pairs"] <= 200


def test_metrics_are_those_of_the_runs_paired(first, second, changed):
    found = changed["metrics"]
    assert found["same_held_out"]
    values = [read_users(run.workdir / TEST_METRICS_PER_USER).metrics["ndcg@10"] for run in (first, second)]
    of = found["metrics"]["ndcg@10"]
    assert (of["before"], of["after"]) == tuple(pytest.approx(float(v.mean()), abs=1e-6) for v in values)
    assert of["difference"] == pytest.approx(of["after"] - of["before"], abs=1e-6)
    assert of["low"] <= of["difference"] <= of["high"]
    assert found["users"] == len(values[0])


def lists_of(run: fr.Run, users: list[str]) -> list[list[str]]:
    """The ids of the ten items recommended to each user."""
    listed = run.recommend(users, k=10, progress=False).to_pandas().groupby("user_id").item_id.apply(list)
    return [listed[user] for user in users]


def shared(lists: list[list[list[str]]]) -> float:
    """The mean share of common ids."""
    return float(
        np.mean([len({*one} & {*other}) / max(len(one), len(other)) for one, other in zip(*lists, strict=True)])
    )


def test_lists_are_those_that_are_recommended(first, second, changed):
    users = first.prepared.dataset.users["user_id"].to_pylist()
    lists = [lists_of(run, users) for run in (first, second)]
    assert changed["lists"]["overlap"]["mean"] == pytest.approx(shared(lists))
    top = changed["lists"]["gained"][0]
    count = [sum(top["item_id"] in own for own in side) / len(side) for side in lists]
    assert (top["before"], top["after"]) == (pytest.approx(count[0]), pytest.approx(count[1]))


def test_new_interactions_are_counted_and_no_longer_recommended(first):
    listed = first.recommend(k=3, progress=False).to_pandas()
    bought = listed[listed["rank"] == 1].head(5)
    updated = first.update({"user_id": bought.user_id.tolist(), "item_id": bought.item_id.tolist()})
    [found] = fr.diff(first, updated, k=3, num_users=5)["differences"]
    assert found["data"]["interactions"]["new"] == 5 and found["data"]["interactions"]["gone"] == 0
    assert found["after"]["other_tables"] and found["metrics"] is None
    assert found["lists"]["taken"]["now_held"] == 5
    assert found["lists"]["first_unchanged"]["mean"] < 1


def renamed(dataset: fr.Dataset, side: str, keep: int) -> fr.Dataset:
    """The tables with other ids of users or items, from row `keep` on; rows in reverse order."""
    table = getattr(dataset, f"{side}s")
    ids = [own if row < keep else f"X{row}" for row, own in enumerate(table[f"{side}_id"].to_pylist())]
    place = table.column_names.index(f"{side}_id")
    return dataclasses.replace(dataset, **{f"{side}s": table.set_column(place, f"{side}_id", pa.array(ids))})


def test_runs_without_common_users_are_refused(first, market):
    other = fr.load(first.workdir, dataset=renamed(market, "user", 0))
    with pytest.raises(
        ValueError, match=r"0 of \d+ and \d+ users are in both runs \(the first ids are 'C0001' and 'X0'\)"
    ):
        fr.diff(first, other)
    other = fr.load(first.workdir, dataset=renamed(market, "item", 0))
    with pytest.raises(ValueError, match="items are in both runs"):
        fr.diff(first, other)


def test_only_common_ids_are_compared(first, market, caplog):
    other = fr.load(first.workdir, dataset=renamed(renamed(market, "user", 30), "item", 20))
    [found] = fr.diff(first, other, num_users=10)["differences"]
    assert found["data"]["customers"]["common"] == found["lists"]["users"] == 30
    assert found["data"]["products"] == {
        **{"before": market.n_items, "after": market.n_items, "common": 20},
        **{"new": market.n_items - 20, "gone": market.n_items - 20},
    }
    users = market.users["user_id"].to_pylist()[:30]
    assert found["lists"]["overlap"]["mean"] == pytest.approx(shared([lists_of(run, users) for run in (first, other)]))
    assert "only 30 of" in caplog.text


def test_a_baseline_has_no_reasons(place, market, first):
    baseline = trained(place, market, "ease", model={"method": "ease"})
    [found] = fr.diff(first, baseline, num_users=5)["differences"]
    assert found["reasons"] is None and found["lists"]["overlap"]["mean"] < 1
    assert "A baseline has no explanations" in in_words([found])


def test_files_and_stability(place, first, second, tmp_path):
    found = fr.diff(first, [second, place / "first"], tmp_path / "out", num_users=5)
    written = json.loads((tmp_path / "out" / "diff.json").read_text())
    assert written["stability"] == found["stability"]
    means = [of["lists"]["overlap"]["mean"] for of in found["differences"]]
    assert found["stability"]["lists.overlap"] == pytest.approx(np.mean(means))
    page = Page((tmp_path / "out" / "diff.html").read_text())
    assert page.faults == []
    shown, words = " ".join(page.texts), (tmp_path / "out" / "diff.md").read_text()
    for said in ("Top lists", "Products that gained and lost most exposure", "train.seed", "What stays in other runs"):
        assert said in shown and said in words, said
    with pytest.raises(FileExistsError):
        fr.diff(first, second, tmp_path / "out")
    with pytest.raises(ValueError, match="after is empty"):
        fr.diff(first, [])


def test_the_command(place, first, second, tmp_path):
    asked = [f"--before={first.workdir}", f"--after={second.workdir}", f"--out={tmp_path}/out", "--num_users=5"]
    done = preloaded.run("experiments.diff", *asked)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"{tmp_path}/out/diff.html"
    done = preloaded.run("experiments.diff", asked[0], "--after=none", asked[2])
    assert done.returncode == 1 and "--after has none: there is no such folder" in done.stderr


def test_the_report_shows_changes_and_weak_reasons(place, market, first, second, tmp_path):
    named = dataclasses.replace(
        market, users=market.users.append_column("name", pa.array([f"Name {n}" for n in range(market.n_users)]))
    )
    asked = {"num_users": 3, "k": 2, "baselines": (), "dataset": named}
    page = fr.report(first.workdir, tmp_path / "plain.html", **asked).read_text()
    assert "Name " not in page and "No other run was compared" in page and "Weak:" not in page
    compared = {"compared_runs": [second.workdir], "previous": second.workdir}
    page = Page(fr.report(first.workdir, tmp_path / "all.html", names=True, card=True, **compared, **asked).read_text())
    assert page.faults == []
    shown = " ".join(page.texts)
    for said in ("Name ", "What stays in other runs", "second (train.seed 1", "train.seed", "Weak: it holds in 0 of 1"):
        assert said in shown, said
    card = (first.workdir / "README.md").read_text()
    for said in (
        "| Reviewed |",
        "| Stability | second (train.seed 1",
        "| Since the run before | since ",
        "| Gaps between",
    ):
        assert said in card, said
    assert fr.load(first.workdir).results["review"]["Stability"] in card.replace("\\", "")
    assert str(place) not in card


# --- reasons ---------------------------------------------------------------------------------------------------------


def item(codes: tuple[str, ...], **effects: float) -> ExplainedItem:
    return ExplainedItem("P", codes, {("interaction", name): value for name, value in effects.items()})


def test_a_reason_survives_with_the_interaction_that_it_names_first():
    one = item(("INTERACTIONS", "POPULAR"), a=5, b=4, c=3, d=2, e=1)
    assert survives("INTERACTIONS", one, one) and survives("POPULAR", one, item(("POPULAR",)))
    assert not survives("POPULAR", one, item(("INTERACTIONS",)))
    assert survives("INTERACTIONS", one, item(("INTERACTIONS",), b=9, c=8, a=7, d=1))
    assert not survives("INTERACTIONS", one, item(("INTERACTIONS",), b=9, c=8, d=7, a=1))


def test_agreement_by_hand():
    one = item(("INTERACTIONS", "POPULAR"), a=5, b=4, c=3, d=2, e=1)
    other = item(("POPULAR", "INTERACTIONS"), a=5, b=1, c=2, d=3, e=4)
    found = agreement(one, other)
    assert (found.first_reason, found.reasons) == (0, 1)
    found_other = agreement(item(("POPULAR", "NEW")), item(("POPULAR", "OWN_TEXT")))
    assert (found_other.first_reason, found_other.reasons) == (1, 0.5)
    assert found.sources == pytest.approx(1 / 3)  # a, b, c against a, e, d
    assert found.chance == pytest.approx(TOP / 5)
    assert found.effects == pytest.approx(0)
    few = agreement(item(("POPULAR",), a=1, b=2, c=3), other)
    assert np.isnan(few.sources) and np.isnan(few.effects)
