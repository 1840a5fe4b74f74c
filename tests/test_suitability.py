"""Rankings under rules against brute force, and what the rules exclude, cost, return and do to groups, by hand."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fused_rec.config import Config, ModelConfig, SplitConfig
from fused_rec.data.dataset import column
from fused_rec.data.splits import split
from fused_rec.data.synthetic import make_synthetic
from fused_rec.evaluation.filters import apply, parse
from fused_rec.evaluation.item_sets import UserItemSets, item_sets
from fused_rec.evaluation.ranking import CandidateFilter, RankingSpec, evaluate, rank
from fused_rec.evaluation.suitability import (
    DAY,
    check_groups,
    exclusion_counts,
    group_gaps,
    groups_of,
    period_returns,
    realised_return,
    rule_costs,
    suitable,
    suitable_share,
    sum_counts,
)
from fused_rec.training.evaluate_rules import evaluate_rules, returns_after
from fused_rec.training.inputs import prepare

N_USERS, N_ITEMS, K = 9, 12, 3


def _look_up(scores: jax.Array, users: jax.Array) -> jax.Array:
    return scores[users]


def given_scores(scores: np.ndarray) -> jax.tree_util.Partial:
    return jax.tree_util.Partial(_look_up, jnp.asarray(scores, jnp.float32))


def none_held(n_users: int = N_USERS) -> UserItemSets:
    return item_sets(np.zeros(0, np.int32), np.zeros(0, np.int32), n_users)


RULES = (
    {"name": "risk", "require": ["item.risk", "at_most", "user.risk"]},
    {"name": "kind", "require": ["user.kind", "one_of", "item.kinds"], "separator": ";"},
    {"name": "withdrawn", "refuse": {"items": ["i3"]}},
    {"name": "mine", "refuse": "held"},
)
NUMBER = st.one_of(st.none(), st.integers(0, 3))


@st.composite
def markets(draw) -> tuple[pa.Table, pa.Table, set[tuple[int, int]]]:
    def column(values, n: int) -> list:
        return draw(st.lists(values, min_size=n, max_size=n))

    users = pa.table(
        {
            "user_id": [f"u{n}" for n in range(N_USERS)],
            "risk": pa.array(column(NUMBER, N_USERS), pa.int64()),
            "kind": pa.array(column(st.sampled_from(["a", "b", None]), N_USERS), pa.string()),
        }
    )
    items = pa.table(
        {
            "item_id": [f"i{n}" for n in range(N_ITEMS)],
            "risk": pa.array(column(NUMBER, N_ITEMS), pa.int64()),
            "kinds": pa.array(column(st.sampled_from(["a", "b", "a;b", "", None]), N_ITEMS), pa.string()),
        }
    )
    held = draw(st.sets(st.tuples(st.integers(0, N_USERS - 1), st.integers(0, N_ITEMS - 1)), max_size=40))
    return users, items, held


def passes_by_hand(users: pa.Table, items: pa.Table, held: set[tuple[int, int]]) -> np.ndarray:
    """bool [rules, U, I], pair by pair."""
    found = np.zeros((len(RULES), N_USERS, N_ITEMS), bool)
    for u, user in enumerate(users.to_pylist()):
        for i, item in enumerate(items.to_pylist()):
            known = None not in (user["risk"], item["risk"])
            found[0, u, i] = known and item["risk"] <= user["risk"]
            found[1, u, i] = None not in (user["kind"], item["kinds"]) and user["kind"] in item["kinds"].split(";")
            found[2, u, i] = item["item_id"] != "i3"
            found[3, u, i] = (u, i) not in held
    return found


@settings(max_examples=15, deadline=None)
@given(markets(), st.integers(0, 2**32 - 1), st.sampled_from([1, 4]))
def test_nothing_unsuitable_is_ever_recommended_and_every_exclusion_is_counted(market, seed, devices):
    users, items, held = market
    rng = np.random.default_rng(seed)
    scores = rng.permutation(N_USERS * N_ITEMS).reshape(N_USERS, N_ITEMS)
    pairs = np.array(sorted(held), np.int64).reshape(-1, 2)
    eligible = apply(parse(json.dumps({"rules": RULES})), users, items, item_sets(pairs[:, 0], pairs[:, 1], N_USERS))
    asked = rng.permutation(N_USERS)[:7]
    spec = RankingSpec(none_held(), N_ITEMS, filter=eligible, batch_size=2, devices=devices)
    found = rank(given_scores(scores), asked, spec, K)

    passes = passes_by_hand(users, items, held)[:, asked]
    fine = np.asarray(passes.all(0))
    for row, user in enumerate(asked.tolist()):
        ranked = np.argsort(-scores[user])
        best = [item for item in ranked if fine[row, item]][:K]
        assert found.items[row].tolist() == best + [-1] * (K - len(best))
        assert found.scores[row, : len(best)].tolist() == scores[user][best].tolist()
        assert found.before[row].tolist() == ranked[:K].tolist()

    reported = exclusion_counts(found, eligible.names)
    top = np.take_along_axis(passes, found.before[None], axis=2)
    for name, own in zip((rule["name"] for rule in RULES), range(len(RULES)), strict=True):
        refused = ~passes[own]
        others = np.delete(passes, own, axis=0).all(0)
        assert reported["rules"][name] == {
            "excluded": refused.sum(),
            "excluded_only_by_rule": (refused & others).sum(),
            "excluded_from_topk": (~top[own]).sum(),
        }
    assert reported["recommendations"] == np.minimum(fine.sum(1), K).sum()
    assert (reported["users"], reported["users_without_recommendations"], reported["users_with_short_list"]) == (
        7,
        (fine.sum(1) == 0).sum(),
        (fine.sum(1) < K).sum(),
    )
    assert (reported["top"], reported["top_suitable"]) == (7 * K, top.all(0).sum())

    assert suitable(eligible, asked, found.before, batch=2).tolist() == top.all(0).tolist()
    assert suitable(eligible, asked, found.items).tolist() == (found.items >= 0).tolist()


def test_accounts_add_up():
    one = {"users": 2, "rules": {"a": {"excluded_only_by_rule": 1}}}
    assert sum_counts(one, {"users": 3, "rules": {"a": {"excluded_only_by_rule": 5}}}) == {
        "users": 5,
        "rules": {"a": {"excluded_only_by_rule": 6}},
    }


# Four users by four items: user u scores item i by 10 - i, so that everybody's list is 0, 1, 2, 3.
FOUR = pa.table({"user_id": list("abcd"), "risk": [3, 1, 2, None]})
PRODUCTS = pa.table({"item_id": list("wxyz"), "risk": [3, 1, 2, 1]})
SCORES = np.tile(10.0 - np.arange(4), (4, 1))


def risk_and_list(*withdrawn: str) -> CandidateFilter:
    rules = [
        {"name": "risk", "require": ["item.risk", "at_most", "user.risk"]},
        {"name": "withdrawn", "refuse": {"items": withdrawn}},
        {"name": "not for a", "refuse": {"pairs": [["a", "z"]]}},
    ]
    return apply(parse(json.dumps({"rules": rules})), FOUR, PRODUCTS, none_held(4))


def test_rank_and_evaluate_take_the_same_masks():
    eligible = risk_and_list("x")
    spec = RankingSpec(none_held(4), 4, filter=eligible)
    assert rank(given_scores(SCORES), np.arange(4), spec, 3).items.tolist() == [
        [0, 2, -1],
        [3, -1, -1],
        [2, 3, -1],
        [-1, -1, -1],
    ]
    # Held out: a bought z, which the pair rule refuses, and y; b z; c x, which is withdrawn; d nothing suitable.
    truth = item_sets(np.array([0, 0, 1, 2, 3]), np.array([3, 2, 3, 1, 0]), 4)
    measured = evaluate(given_scores(SCORES), spec, truth, ks=(1, 2))
    assert measured.metrics["recall@2"].tolist() == [0.5, 1, 0, 0]
    assert measured.metrics["recall@1"].tolist() == [0, 1, 0, 0]
    open_to_all = evaluate(given_scores(SCORES), RankingSpec(none_held(4), 4), truth, ks=(1, 2))
    assert open_to_all.metrics["recall@2"].tolist() == [0, 0, 1, 1]

    costs = rule_costs(given_scores(SCORES), spec, truth, "recall@2", ks=(1, 2))
    assert list(costs) == ["", "risk", "withdrawn", "not for a"]
    assert costs[""].difference == pytest.approx(0.5 - 0.375)
    # Without the risk rule: a: w, y; b: w, y, z; c: w, y; d: w, y.
    assert costs["risk"].difference == pytest.approx((0.5 + 0 + 0 + 1) / 4 - 0.375)
    assert costs["withdrawn"].difference == pytest.approx((0 + 1 + 1 + 0) / 4 - 0.375)
    assert costs["not for a"].difference == 0.0
    assert costs["risk"].low <= costs["risk"].difference <= costs["risk"].high


def test_shares_by_hand():
    eligible = risk_and_list("x")
    lists = np.array([[0, 3], [0, 3], [1, -1], [-1, -1]])
    fine = suitable(eligible, np.arange(4), lists)
    assert fine.tolist() == [[True, False], [False, True], [False, False], [False, False]]
    np.testing.assert_array_equal(suitable_share(fine, lists), [0.5, 0.5, 0, np.nan])


def test_without_rules_a_screen_is_a_ranking():
    spec = RankingSpec(none_held(4), 4)
    found = rank(given_scores(SCORES), np.arange(4), spec, 2)
    assert found.items.tolist() == found.before.tolist() == [[0, 1]] * 4
    assert exclusion_counts(found, ())["top_suitable"] == 8
    for users in (np.array([4]), np.array([-1])):
        with pytest.raises(ValueError, match=r"they must lie in 0\.\.3, those of seen"):
            rank(given_scores(SCORES), users, spec, 2)
    with pytest.raises(ValueError, match="k is 0"):
        rank(given_scores(SCORES), np.arange(4), spec, 0)


# --- returns


def test_returns_by_hand():
    day = 1000 * DAY
    rows = [
        ("w", day - 3 * DAY, 8.0),
        ("w", day - DAY, 10.0),  # the last at or before the start
        ("w", day + 1, 99.0),
        ("w", day + 9 * DAY, 12.0),
        ("w", day + 11 * DAY, 50.0),  # after the end
        ("x", day, 4.0),
        ("x", day + 10 * DAY, 3.0),
        ("y", day - 31 * DAY, 5.0),  # stale
        ("y", day + 9 * DAY, 5.0),
        ("z", day, 0.0),
        ("z", day + 9 * DAY, 5.0),
        ("other", day, 1.0),
    ]
    prices = pa.table(
        {name: [row[n] for row in reversed(rows)] for n, name in enumerate(("item_id", "timestamp", "price"))}
    )
    returns = period_returns(prices, PRODUCTS["item_id"], day, 10)
    np.testing.assert_allclose(returns, [0.2, -0.25, np.nan, np.nan])
    lists = np.array([[0, 1], [1, 2], [2, 3], [-1, -1], [0, -1]])
    np.testing.assert_allclose(realised_return(lists, returns), [-0.025, -0.25, np.nan, np.nan, 0.2])
    with pytest.raises(ValueError, match="horizon is 0 days"):
        period_returns(prices, PRODUCTS["item_id"], day, 0)


# --- groups


def test_gaps_by_hand():
    values = np.array([1.0] * 20 + [0.0] * 20 + [0.5] * 3 + [np.nan])
    groups = ["old"] * 20 + ["young"] * 20 + [None] * 3 + ["old"]
    found = group_gaps(values, groups)
    assert {name: (group.users, group.mean) for name, group in found.groups.items()} == {
        "old": (20, 1.0),
        "young": (20, 0.0),
        "unknown": (3, 0.5),  # too few to be the best or the worst
    }
    assert (found.best, found.worst, found.gap) == ("old", "young", 1.0)
    assert (found.low, found.high) == (1.0, 1.0) and found.p == pytest.approx(1 / 2001)
    alone = group_gaps(values[:20], groups[:20])
    assert alone.best == "" and np.isnan(alone.gap) and alone.groups["old"].low == 1.0


def test_the_interval_of_a_gap_covers_and_chance_alone_is_reported():
    """Two groups whose true gap is .3: the interval holds it in about 95 of 100 draws. Six groups alike: p is even."""
    covered, small = 0, 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        two = np.concatenate([rng.normal(0.3, 1, 150), rng.normal(0, 1, 150)])
        gap = group_gaps(two, ["a"] * 150 + ["b"] * 150, draws=200, seed=seed)
        covered += gap.best == "a" and gap.low <= 0.3 <= gap.high
        alike = group_gaps(rng.normal(size=180), list("abcdef") * 30, draws=200, seed=seed)
        small += alike.p <= 0.1
    assert 87 <= covered <= 100
    assert 3 <= small <= 20


def test_groups_of_missing_and_of_large_values():
    """Blank and NaN are no group; integers keep their order beyond what floats hold."""
    users = pa.table({"user_id": list("abcd"), "kind": ["a", "", " ", None], "score": [1.5, float("nan"), None, 2.0]})
    assert groups_of(users, "kind", np.arange(4)) == ["a", None, None, None]
    assert groups_of(users, "score", np.arange(4)) == ["1.5", None, None, "2"]
    big = 2**53 + 1  # as floats, 44 of these would be 22
    users = pa.table({"user_id": [str(n) for n in range(44)], "n": [big + n for n in range(44)]})
    bands = groups_of(users, "n", np.arange(44))
    assert [bands.index(band) for band in dict.fromkeys(bands)] == [0, 11, 22, 33]
    users = pa.table({"user_id": [str(n) for n in range(24)], "n": pa.array([big + n // 2 % 2 for n in range(24)])})
    assert set(groups_of(users, "n", np.arange(24))) == {str(big), str(big + 1)}


def test_groups_of_an_attribute():
    users = pa.table(
        {
            "user_id": [f"u{n}" for n in range(40)],
            "age": pa.array([None, *range(1, 40)], pa.int64()),
            "children": pa.array([None, *([0, 1] * 19), 2], pa.int64()),
            "kind": pa.array(["a", "b"] * 20).dictionary_encode(),
        }
    )
    assert groups_of(users, "age", np.array([0, 1, 10, 11, 39])) == [
        *(None, "lowest quarter", "lowest quarter", "second quarter", "highest quarter"),
    ]
    assert groups_of(users, "children", np.array([0, 1, 39])) == [None, "0", "2"]
    assert groups_of(users, "kind", np.array([1, 0])) == ["b", "a"]
    with pytest.raises(ValueError, match="user_id has 40 distinct values; groups need at most 20"):
        groups_of(users, "user_id", np.array([0]))
    with pytest.raises(ValueError, match="no column 'sex'; they have user_id, age"):
        groups_of(users, "sex", np.array([0]))
    more = pa.table({"country": [["CH", "DE"], ["CH"]], "empty": pa.nulls(2), "born": [{"year": 1}, {"year": 2}]})
    with pytest.raises(ValueError, match=r"users.country holds list<.*> values; groups need a column with one text or"):
        groups_of(more, "country", np.array([0]))
    with pytest.raises(ValueError, match="users.born holds struct<year: int64> values"):
        groups_of(more, "born", np.array([0]))
    assert groups_of(more, "empty", np.array([1, 0])) == [None, None]
    check_groups(users, ["age", "kind"])
    with pytest.raises(ValueError, match="user_id has 40 distinct values"):
        check_groups(users, ["kind", "user_id"])


# --- all of it together


def test_what_rules_do_to_a_market():
    """Scores that rank risky products first, a rule against them, and prices that double."""
    config = Config(model=ModelConfig(variant="graph"), split=SplitConfig(kind="random"))
    market = make_synthetic(0, n_users=60, n_items=25)
    prepared = prepare(config, market, split(market, config.split))
    risk = column(market.items, "risk_band")
    scores = np.tile(risk + np.linspace(0, 0.5, 25), (60, 1))
    rules = [
        {"name": "risk", "require": ["item.risk_band", "at_most", "user.risk_tolerance"]},
        {"name": "mine", "refuse": "held"},
    ]
    times = column(market.interactions, "timestamp")
    known = np.concatenate([prepared.split.train, prepared.split.valid])
    start = int(times[known].max())
    ids = market.items["item_id"].to_pylist()
    prices = pa.table(
        {
            "item_id": ids + ids,
            "timestamp": [start] * 25 + [start + 100 * DAY] * 25,
            "price": [2.0] * 25 + [4.0] * 24 + [float("nan")],
        }
    )
    parsed = parse(json.dumps({"rules": rules}))
    returns = returns_after(prepared, "test", prices, 100)
    report = evaluate_rules(
        prepared, given_scores(scores), "test", parsed, k=5, groups=["risk_tolerance"], returns=returns
    )
    assert report["suitable"]["under"] == 1.0
    assert report["suitable"]["without"] == report["exclusions"]["top_suitable"] / report["exclusions"]["top"] < 0.6
    # seen, and so no candidate
    assert report["exclusions"]["rules"]["mine"] == {"excluded": 0, "excluded_only_by_rule": 0, "excluded_from_topk": 0}
    assert list(report["costs"]) == ["", "risk", "mine"]
    assert report["costs"][""] == report["costs"]["risk"] and report["costs"]["mine"]["difference"] == 0
    assert report["returns"]["under"]["mean"] == 1.0 and 0.9 < report["returns"]["under"]["priced"] < 1.0
    reported = report["groups"]["risk_tolerance"]
    assert set(reported) == {"ndcg@10", "suitable@5 without", "return under"}
    shares = reported["suitable@5 without"]
    # Who bears most risk loses nothing by a rule about risk.
    assert shares["best"] == "5" and shares["groups"]["5"]["mean"] == 1.0 and shares["gap"] > 0.5 and shares["p"] < 0.01
    json.dumps(report, allow_nan=False)
