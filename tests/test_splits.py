"""What each kind of split holds out, by hand, and what may be seen beside it."""

import dataclasses
import os
import typing

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fused_rec.config import DataConfig, SplitConfig, SplitKind
from fused_rec.data.dataset import Dataset, column, empty_reviews, empty_ties
from fused_rec.data.sources.registry import load
from fused_rec.data.splits import SPLIT_NAMES, Split, observe, split


def table(**columns) -> pa.Table:
    """Integer columns become int32 (timestamps int64), as in a Dataset."""
    types = {"timestamp": pa.int64(), "text": pa.string(), "kind": pa.string(), "split": pa.string()}
    return pa.table({name: pa.array(values, types.get(name, pa.int32())) for name, values in columns.items()})


def dataset(interactions: pa.Table, reviews: pa.Table | None = None, ties: pa.Table | None = None, n=12) -> Dataset:
    ids = [str(k) for k in range(n)]
    reviews, ties = reviews or empty_reviews(), ties or empty_ties()
    return Dataset("tiny", pa.table({"user_id": ids}), pa.table({"item_id": ids}), interactions, reviews, ties)


def pairs_of(data: Dataset, rows: np.ndarray) -> set[tuple[int, int]]:
    user, item = column(data.interactions, "user")[rows], column(data.interactions, "item")[rows]
    return set(zip(user.tolist(), item.tolist(), strict=True))


def times_of(data: Dataset, rows: np.ndarray) -> list[int]:
    return column(data.interactions, "timestamp")[rows].tolist()


def grid(n_users: int, n_items: int) -> pa.Table:
    user, item = np.divmod(np.arange(n_users * n_items), n_items)
    return table(user=user, item=item, timestamp=np.arange(n_users * n_items) * 7 % 101)


def test_age_is_in_days_before_the_newest_observed_pair():
    day = 86_400
    times = [0, 3 * day, 5 * day, 90 * day, 100 * day]  # the last two are held out and set no clock
    data = dataset(table(user=[0] * 5, item=range(5), timestamp=times))
    parts = split(data, SplitConfig(kind="time", test=0.2, valid=0.2))
    assert observe(data, parts).age.tolist() == [5, 2, 0]
    assert observe(data, parts, ("train", "valid")).age.tolist() == [90, 87, 85, 0]


@pytest.mark.parametrize("times", [None, [None] * 5, [None, 0, 86_400, None, 86_400]])
def test_pairs_without_a_time_have_no_age(times):
    columns = {} if times is None else {"timestamp": times}
    data = dataset(table(user=[0] * 5, item=range(5), **columns))
    parts = Split("random", np.array([0, 1, 2]), np.array([3]), np.array([4]))
    dated = times is not None and times[1] is not None
    assert observe(data, parts).age.tolist() == ([0, 1, 0] if dated else [0, 0, 0])


def test_time_cuts_between_instants():
    times = [5, 1, 2, 3, 4, 5, 5, 8, 9, 10]
    data = dataset(table(user=[0] * 10, item=range(10), timestamp=times))
    # test: 8 of 10 before the cut is exact at instant 9. valid: .7 * 8 = 5.6 lies inside the three rows at 5, whose
    # ends leave 4 or 7 rows before the cut; 7 is nearer.
    parts = split(data, SplitConfig(kind="time", test=0.2, valid=0.3))
    assert (parts.valid_from, parts.test_from) == (8, 9)
    assert sorted(times_of(data, parts.train)) == [1, 2, 3, 4, 5, 5, 5]
    assert parts.valid.tolist() == [7]
    assert parts.test.tolist() == [8, 9]
    assert parts.valid_candidates is parts.test_candidates is None


def test_per_user_holds_out_the_last_and_keeps_the_first():
    data = dataset(
        table(
            user=[0] * 6 + [1] * 2 + [2],
            item=[0, 1, 2, 3, 4, 5, 0, 1, 0],
            timestamp=[60, 50, 40, 30, 20, 10, 5, 6, 1],
        )
    )
    # user 0: ceil(.3 * 6) = 2 for test, ceil(.1 * 4) = 1 for valid; user 1: 1 and never the first; user 2: none
    parts = split(data, SplitConfig(kind="per_user", test=0.3, valid=0.1))
    assert pairs_of(data, parts.test) == {(0, 0), (0, 1), (1, 1)}
    assert pairs_of(data, parts.valid) == {(0, 2)}
    assert pairs_of(data, parts.train) == {(0, 3), (0, 4), (0, 5), (1, 0), (2, 0)}


def test_leave_one_out_holds_out_the_last_and_the_last_but_one():
    data = dataset(
        table(
            user=[0] * 4 + [1] * 2 + [2],
            item=[0, 1, 2, 3, 0, 1, 0],
            timestamp=[40, 30, 20, 10, 5, 6, 1],
        )
    )
    # user 1 has no row left for valid, user 2 none for test: the first row is never held out
    parts = split(data, SplitConfig(kind="leave_one_out", test=0.9, valid=0.9))
    assert pairs_of(data, parts.test) == {(0, 0), (1, 1)}
    assert pairs_of(data, parts.valid) == {(0, 1)}
    assert pairs_of(data, parts.train) == {(0, 2), (0, 3), (1, 0), (2, 0)}


def test_per_user_random_has_the_counts_of_per_user_and_ignores_times():
    data = dataset(grid(6, 11))
    drawn, last = (split(data, SplitConfig(kind=kind)) for kind in ("per_user_random", "per_user"))
    for name in SPLIT_NAMES:
        users = [column(data.interactions, "user")[getattr(parts, name)] for parts in (drawn, last)]
        assert np.bincount(users[0]).tolist() == np.bincount(users[1]).tolist()
    assert pairs_of(data, drawn.test) != pairs_of(data, last.test)
    missing = table(user=[0] * 3, item=range(3), timestamp=[1, None, 3])
    untimed = dataset(data.interactions.drop_columns("timestamp"))
    assert split(untimed, SplitConfig(kind="per_user_random")).test.tolist() == drawn.test.tolist()
    assert len(split(dataset(missing), SplitConfig(kind="per_user_random")).test) == 1
    other = split(data, SplitConfig(kind="per_user_random", seed=1))
    assert pairs_of(data, other.test) != pairs_of(data, drawn.test)


def test_per_user_counts_do_not_suffer_from_binary_fractions():
    data = dataset(table(user=[0] * 100, item=range(100), timestamp=range(100)), n=100)
    assert len(split(data, SplitConfig(kind="per_user", test=0.07)).test) == 7  # .07 * 100 = 7.000000000000001


def test_per_user_breaks_equal_times_by_seed_and_not_by_row():
    data = dataset(table(user=np.repeat(range(10), 10), item=list(range(10)) * 10, timestamp=[7] * 100))
    first = split(data, SplitConfig(kind="per_user", test=0.5, seed=0))
    other = split(data, SplitConfig(kind="per_user", test=0.5, seed=1))
    assert pairs_of(data, first.test) != pairs_of(data, other.test)
    held = column(data.interactions, "item")[first.test]
    assert 3 < held.mean() < 6  # the last rows of each user would give 7
    untimed = dataset(data.interactions.drop_columns("timestamp"))
    assert split(untimed, SplitConfig(kind="per_user", test=0.5)).test.tolist() == first.test.tolist()


def test_random_counts_and_seed():
    data = dataset(grid(10, 10))
    parts = split(data, SplitConfig(kind="random", test=0.2, valid=0.25))
    assert [len(parts.train), len(parts.valid), len(parts.test)] == [60, 20, 20]
    assert pairs_of(data, parts.test) != pairs_of(data, split(data, SplitConfig(test=0.2, seed=1)).test)
    # neither users nor items are favoured: every row of the grid lands in test for some of 60 seeds
    held = np.concatenate([split(data, SplitConfig(seed=seed)).test for seed in range(60)])
    assert np.bincount(held, minlength=100).min() >= 2


def test_new_items_go_with_all_their_interactions():
    data = dataset(grid(4, 10), n=12)  # items 10 and 11 have no interactions and are never held out
    parts = split(data, SplitConfig(kind="new_items", test=0.3, valid=0.3))
    item = column(data.interactions, "item")
    assert parts.test_candidates is not None and parts.valid_candidates is not None
    assert len(parts.test_candidates) == 3 and len(parts.valid_candidates) == 2
    assert parts.test.tolist() == np.flatnonzero(np.isin(item, parts.test_candidates)).tolist()
    assert parts.valid.tolist() == np.flatnonzero(np.isin(item, parts.valid_candidates)).tolist()
    assert parts.test_candidates.dtype == np.int32 and parts.test_candidates.max() < 10
    drawn = [split(data, SplitConfig(kind="new_items", seed=seed)).test_candidates for seed in range(60)]
    assert np.bincount(np.concatenate([new for new in drawn if new is not None]), minlength=12)[:10].min() >= 2


def test_new_users_go_with_all_their_interactions():
    data = dataset(grid(10, 4))
    parts = split(data, SplitConfig(kind="new_users", test=0.3, valid=0.3))
    users = [set(column(data.interactions, "user")[rows].tolist()) for rows in (parts.train, parts.valid, parts.test)]
    assert [len(u) for u in users] == [5, 2, 3]
    assert len(set.union(*users)) == 10


def test_published_parts_stay_as_given():
    data = dataset(table(user=[0, 0, 1, 1], item=[0, 1, 0, 1], split=["test", "train", "valid", "train"]))
    parts = split(data, SplitConfig(kind="predefined"))
    assert (parts.train.tolist(), parts.valid.tolist(), parts.test.tolist()) == ([1, 3], [2], [0])


def test_published_without_valid_carves_it_from_train_and_spares_each_users_last_row():
    user = [0, 1, 2, 3, 3, 3, 3, 3, 3, 0]
    data = dataset(table(user=user, item=range(10), split=["train"] * 9 + ["test"]))
    parts = split(data, SplitConfig(kind="predefined", valid=0.5))
    assert parts.test.tolist() == [9]
    assert len(parts.valid) == 4  # round(.5 * 9), to even
    assert set(np.array(user)[parts.train].tolist()) == {0, 1, 2, 3}
    # five rows can go without emptying a user, and six cannot
    assert len(split(data, SplitConfig(kind="predefined", valid=0.56)).valid) == 5
    with pytest.raises(ValueError, match="6 of its 9 training rows .* cannot be drawn: 4 are the only one left"):
        split(data, SplitConfig(kind="predefined", valid=0.67))


@pytest.mark.parametrize("kind", typing.get_args(SplitKind))
@pytest.mark.parametrize("seed", [0, 2**40])
def test_laws(kind: SplitKind, seed: int):
    interactions = grid(9, 11)
    if kind == "predefined":
        interactions = interactions.append_column("split", pa.array(["train"] * 90 + ["test"] * 9))
    data = dataset(interactions)
    parts = split(data, SplitConfig(kind=kind, seed=seed))
    rows = [parts.train, parts.valid, parts.test]
    assert np.sort(np.concatenate(rows)).tolist() == list(range(99))
    assert all(len(r) and (np.diff(r) > 0).all() and r.dtype == np.int64 for r in rows)
    shuffled = dataset(interactions.take(np.random.default_rng(seed).permutation(99)))
    again = split(shuffled, SplitConfig(kind=kind, seed=seed))
    for name in SPLIT_NAMES:
        assert pairs_of(data, getattr(parts, name)) == pairs_of(shuffled, getattr(again, name))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=3, max_size=40), st.floats(0.01, 0.99), st.floats(0.01, 0.99))
def test_time_never_straddles_and_per_user_never_empties(times, test, valid):
    data = dataset(table(user=np.arange(len(times)) % 3, item=range(len(times)), timestamp=times), n=40)
    try:
        parts = split(data, SplitConfig(kind="time", test=test, valid=valid))
    except ValueError as error:
        assert "instant(s) and at least 2 are needed" in str(error)
    else:
        assert parts.valid_from is not None and parts.test_from is not None
        assert max(times_of(data, parts.train)) < parts.valid_from <= min(times_of(data, parts.valid))
        assert max(times_of(data, parts.valid)) < parts.test_from <= min(times_of(data, parts.test))
    try:
        parts = split(data, SplitConfig(kind="per_user", test=test, valid=valid))
    except ValueError as error:
        assert "leaves the valid split without" in str(error) or len(times) == 3
    else:
        assert set(column(data.interactions, "user")[parts.train].tolist()) == {0, 1, 2}


@pytest.mark.parametrize(
    ("kind", "columns", "words"),
    [
        ("time", {}, "needs interactions with a timestamp column; choose random or per_user"),
        ("time", {"timestamp": [1, None, 3]}, "and 1 of 3 have none; fill them in"),
        ("time", {"timestamp": [1, None, 3]}, "choose random: interactions of user_id '0' and item_id '1'"),
        ("per_user", {"timestamp": [1, None, 3]}, "and 1 of 3 have none; fill them in"),
        ("time", {"timestamp": [4, 4, 4]}, "cannot place the test split: the 3 interactions before it share 1 instant"),
        (
            "time",
            {"timestamp": [4, 4, 5]},
            "cannot place the valid split: the 2 interactions before it share 1 instant",
        ),
        ("random", {}, "leaves the valid split without interactions: split.test is 0.2 and split.valid 0.1 of 3"),
        ("new_users", {}, "leaves the valid split without interactions"),
        ("predefined", {}, "needs a split column, and tiny has none"),
        ("predefined", {"split": ["train", None, "dev"]}, "2 interactions name no known split, first row 1 with None"),
        ("predefined", {"split": ["train", "train", "valid"]}, "the predefined split of tiny has no test rows"),
    ],
)
def test_impossible_requests_say_what_to_do(kind, columns, words):
    with pytest.raises(ValueError, match=words):
        split(dataset(table(user=[0, 0, 1], item=[0, 1, 0], **columns)), SplitConfig(kind=kind))


# Six interactions: rows 0-3 known, 4 validation, 5 test. Held out: (0, 2) and (1, 3).
PAIRS = {"user": [0, 0, 1, 2, 0, 1], "item": [0, 1, 1, 3, 2, 3], "timestamp": [10, 11, 12, 13, 20, 30]}
LONG = "five words make a post"


def six(kind: str) -> Split:
    cuts = (20, 30) if kind == "time" else (None, None)
    valid, test = [np.array([k], np.int32) for k in (2, 3)] if kind == "new_items" else (None, None)
    return Split(kind, np.arange(4), np.array([4]), np.array([5]), *cuts, valid, test)


def seen_reviews(kind: str, rows: list[tuple], parts: tuple[str, ...] = ("train",)) -> list[int]:
    """Positions of the reviews (user, item, text, timestamp) that are seen."""
    user, item, text, time = zip(*rows, strict=True)
    reviews = table(user=user, item=item, text=text, timestamp=time).append_column("row", pa.array(range(len(rows))))
    return observe(dataset(table(**PAIRS), reviews), six(kind), parts).reviews.column("row").to_pylist()


def seen_ties(kind: str, rows: list[tuple], parts: tuple[str, ...] = ("train",)) -> list[tuple]:
    source, target, kinds, time, item = zip(*rows, strict=True)
    ties = table(source=source, target=target, kind=kinds, timestamp=time, item=item)
    seen = observe(dataset(table(**PAIRS), None, ties), six(kind), parts).ties
    assert seen.column_names == ["source", "target", "kind"]
    return [tuple(row.values()) for row in seen.to_pylist()]


def test_observed_pairs_are_the_known_rows():
    data = dataset(table(**PAIRS))
    assert observe(data, six("random")).item.tolist() == [0, 1, 1, 3]
    assert observe(data, six("random"), ("train", "valid")).item.tolist() == [0, 1, 1, 3, 2]
    everything = observe(data, six("random"), SPLIT_NAMES)
    assert (everything.user.tolist(), everything.item.tolist()) == (PAIRS["user"], PAIRS["item"])
    assert everything.user.dtype == everything.item.dtype == np.int32


@pytest.mark.parametrize("parts", [(), ("valid",), ("valid", "train"), ("train", "test"), ("train", "dev")])
def test_parts_come_in_order(parts):
    with pytest.raises(ValueError, match="it must be"):
        observe(dataset(table(**PAIRS)), six("random"), parts)


def test_reviews_of_held_out_pairs_are_withheld():
    rows = [(0, 0, "known", 10), (0, 2, "valid", 20), (1, 3, "test", 30), (2, 2, "no interaction", 99), (1, 3, "", 0)]
    assert seen_reviews("random", rows) == [0, 3]
    assert seen_reviews("random", rows, ("train", "valid")) == [0, 1, 3]
    assert seen_reviews("random", rows, SPLIT_NAMES) == [0, 1, 2, 3, 4]


def test_a_post_that_names_a_held_out_item_too_is_withheld():
    rows = [
        (0, 0, LONG, 5),  # the same post as the next row
        (0, 2, LONG, 5),
        (0, 1, LONG, 6),  # the same words at another time: another post
        (2, 0, LONG, 5),  # another user
        (0, 1, "rock", 7),  # a tag given to two items on one day is two acts
        (0, 2, "rock", 7),
    ]
    assert seen_reviews("random", rows) == [2, 3, 4]
    assert seen_reviews("random", rows, SPLIT_NAMES) == [0, 1, 2, 3, 4, 5]


def test_new_items_receive_nothing_said_about_them_by_anyone():
    rows = [(0, 0, "old", 1), (2, 2, "a tag without interaction", 1), (0, 3, "likewise on the test item", 1)]
    assert seen_reviews("random", rows) == [0, 1, 2]
    assert seen_reviews("new_items", rows) == [0]
    assert seen_reviews("new_items", rows, ("train", "valid")) == [0, 1]


def test_new_users_have_said_nothing():
    rows = [(2, 0, "known", 1), (0, 3, "user 0 is new until validation is over", 1), (1, 0, "user 1 is new", 1)]
    assert seen_reviews("random", rows) == [0, 1, 2]
    assert seen_reviews("new_users", rows) == [0]
    assert seen_reviews("new_users", rows, ("train", "valid")) == [0, 1]


def test_time_withholds_what_is_dated_at_or_after_the_cut():
    rows = [(0, 0, "early", 19), (0, 0, "at", 20), (0, 0, "between", 29), (0, 0, "at test", 30), (0, 2, "held", 1)]
    assert seen_reviews("time", rows) == [0]
    assert seen_reviews("time", rows, ("train", "valid")) == [0, 1, 2, 4]
    ties = [(0, 1, "follows", 19, None), (1, 0, "follows", 20, None), (2, 0, "follows", 30, None)]
    assert seen_ties("time", ties) == [(0, 1, "follows")]
    assert seen_ties("time", ties, ("train", "valid")) == [(0, 1, "follows"), (1, 0, "follows")]


def test_time_refuses_what_has_no_date():
    undated = table(user=[0], item=[0], text=["when?"])
    with pytest.raises(ValueError, match=r"1 of 1 reviews have no timestamp.*after 20; give each a time \(0 ="):
        observe(dataset(table(**PAIRS), undated), six("time"))
    with pytest.raises(ValueError, match="1 of 2 ties have no timestamp"):
        seen_ties("time", [(0, 1, "follows", 1, None), (0, 2, "follows", None, None)])
    assert observe(dataset(table(**PAIRS), undated), six("time"), SPLIT_NAMES).reviews.num_rows == 1
    assert observe(dataset(table(**PAIRS)), six("time")).reviews.num_rows == 0


def test_ties_from_acts_on_held_out_items_are_withheld():
    ties = [
        (0, 1, "retweet", 1, 2),  # source held (0, 2) out
        (0, 1, "retweet", 1, 1),  # the same act
        (2, 1, "retweet", 2, 3),  # target's (1, 3) is held out: to be retweeted about 3, user 1 posted on 3
        (2, 1, "mention", 2, 1),  # another kind: another act
        (2, 0, "retweet", 3, 1),
        (2, 0, "retweet", 4, 1),  # seen again
        (1, 2, "friend", 5, None),
    ]
    assert seen_ties("random", ties) == [(2, 1, "mention"), (2, 0, "retweet"), (1, 2, "friend")]
    assert seen_ties("random", ties, ("train", "valid"))[0] == (0, 1, "retweet")
    assert len(seen_ties("random", ties, SPLIT_NAMES)) == 5


def test_an_act_without_time_is_all_acts_of_its_pair_and_kind():
    ties = table(source=[0, 0, 2], target=[1, 1, 1], kind=["retweet"] * 3, item=[2, 1, 1])
    seen = observe(dataset(table(**PAIRS), None, ties), six("random")).ties
    assert seen.to_pylist() == [{"source": 2, "target": 1, "kind": "retweet"}]
    assert seen_ties("random", [(0, 1, "a", None, 2), (0, 1, "a", None, 1), (0, 1, "a", 7, 1)]) == [(0, 1, "a")]


def test_new_users_keep_their_ties_but_not_their_acts():
    ties = [(0, 2, "referral", 1, None), (2, 1, "referral", 1, None), (0, 2, "retweet", 1, 0), (2, 1, "retweet", 1, 1)]
    assert seen_ties("new_users", ties) == [(0, 2, "referral"), (2, 1, "referral")]


def test_new_items_lend_no_tie():
    assert seen_ties("new_items", [(0, 2, "retweet", 1, 3), (0, 2, "retweet", 2, 0)]) == [(0, 2, "retweet")]
    assert seen_ties("new_items", [(0, 2, "retweet", 1, 3)]) == []


needs_data = pytest.mark.skipif("FUSED_REC_DATA" not in os.environ, reason="set FUSED_REC_DATA to run on real data")


@needs_data
def test_sociallgn_split_of_lastfm():
    data = load(DataConfig("lastfm_sociallgn"))
    parts = split(data, SplitConfig("predefined"))
    assert (len(parts.train), len(parts.valid), len(parts.test)) == (
        66_840,
        7_427,
        18_567,
    )  # 74,267 published to train on
    cold = np.setdiff1d(
        column(data.interactions, "item")[parts.test],
        column(data.interactions, "item")[np.r_[parts.train, parts.valid]],
    )
    assert len(cold) == 2_312
    seen = observe(data, parts, ("train", "valid"))
    tagged = {tuple(pair) for pair in zip(*(column(seen.reviews, c).tolist() for c in ("user", "item")), strict=True)}
    assert seen.reviews.num_rows < data.reviews.num_rows and not tagged & pairs_of(data, parts.test)
    assert seen.ties.num_rows == 25_434


@needs_data
def test_amazon_by_user_and_by_time():
    data = load(DataConfig("amazon"))
    parts = split(data, SplitConfig("per_user"))
    user = column(data.interactions, "user")
    for rows in (parts.train, parts.valid, parts.test):
        assert len(np.unique(user[rows])) == 1_429  # everyone wrote at least five
    last, first = np.zeros(1_429, np.int64), np.full(1_429, 2**62)
    np.maximum.at(last, user[parts.train], times_of(data, parts.train))
    np.minimum.at(first, user[parts.test], times_of(data, parts.test))
    assert (last <= first).all()
    parts = split(data, SplitConfig("time"))
    assert abs(len(parts.test) / data.interactions.num_rows - 0.2) < 0.01
    assert observe(data, parts).reviews.num_rows == len(parts.train)


@needs_data
def test_stocknet_sees_no_tie_of_the_future():
    data = load(DataConfig("stocknet"))
    parts = split(data, SplitConfig("time"))
    seen, known = observe(data, parts), observe(data, parts, ("train", "valid"))
    assert parts.valid_from is not None and parts.test_from is not None
    assert column(seen.reviews, "timestamp").max() < parts.valid_from
    assert parts.valid_from <= column(known.reviews, "timestamp").max() < parts.test_from
    assert 0 < seen.ties.num_rows < known.ties.num_rows < observe(data, parts, SPLIT_NAMES).ties.num_rows


# --- dropped training rows -------------------------------------------------------------------------------------------


def dropped_parts(data: Dataset, **limits) -> tuple[Split, Split]:
    """The split without limits, and the same with them."""
    return split(data, SplitConfig(kind="random", seed=3)), split(data, SplitConfig(kind="random", seed=3, **limits))


def test_a_limited_history_keeps_the_newest_training_rows_of_each_user():
    data = dataset(grid(6, 10))
    whole, parts = dropped_parts(data, history=2)
    assert (parts.valid.tolist(), parts.test.tolist()) == (whole.valid.tolist(), whole.test.tolist())
    assert sorted([*parts.train, *parts.dropped]) == whole.train.tolist()
    user, time = column(data.interactions, "user"), column(data.interactions, "timestamp")
    for one in range(6):
        of_user = whole.train[user[whole.train] == one]
        newest = of_user[np.argsort(time[of_user])[-2:]]
        assert sorted(newest) == parts.train[user[parts.train] == one].tolist()
    assert set(dropped_parts(data, history=1)[1].train) < set(parts.train)
    assert dropped_parts(data, history=50)[1].dropped.tolist() == whole.dropped.tolist() == []


@pytest.mark.parametrize("times", [False, True])
def test_a_limited_history_without_times_is_drawn_by_the_seed(times):
    """A row without a time among others that have one counts as the oldest."""
    rows = grid(4, 10).drop_columns(["timestamp"])
    if times:
        rows = rows.append_column("timestamp", pa.array([None, -5] * 20, pa.int64()))
    whole, parts = dropped_parts(dataset(rows), history=3)
    items = column(rows, "item")[parts.train]
    assert np.bincount(column(rows, "user")[parts.train]).tolist() == [3] * 4
    assert len(set(items.tolist())) > 3  # users keep other items
    if times:
        at_end = [column(rows, "user")[whole.train[whole.train % 2 == 1]] == one for one in range(4)]
        known = [min(3, int(of_user.sum())) for of_user in at_end]
        assert np.bincount(column(rows, "user")[parts.train[parts.train % 2 == 1]], minlength=4).tolist() == known
    other = split(dataset(rows), SplitConfig(kind="random", seed=4, history=3))
    assert set(other.train) != set(parts.train)


def test_a_share_of_items_loses_all_training_rows():
    data = dataset(grid(8, 12))
    whole, parts = dropped_parts(data, new_item_share=0.25)
    assert len(parts.new_items) == 3
    items = column(data.interactions, "item")
    assert not np.isin(items[parts.train], parts.new_items).any()
    assert np.isin(items[parts.dropped], parts.new_items).all()
    assert (parts.valid.tolist(), parts.test.tolist()) == (whole.valid.tolist(), whole.test.tolist())
    more = dropped_parts(data, new_item_share=0.5, history=1)[1]
    assert set(parts.new_items) < set(more.new_items)
    assert np.bincount(column(data.interactions, "user")[more.train]).tolist() == [1] * 8
    with pytest.raises(ValueError, match="leaves the train split without interactions"):
        dropped_parts(dataset(grid(12, 2)), new_item_share=0.9)


def test_dropped_pairs_are_held_out_from_whatever_is_known():
    """Their reviews and edges too; those of the same users and items stay, except of new items."""
    rows = table(user=[0, 0, 1, 1, 2], item=[0, 1, 2, 3, 4])
    reviews = table(user=[0, 0, 1, 2, 5], item=[0, 1, 0, 4, 4], text=["a", "b", "c", "d", "e"])
    ties = table(source=[0, 0, 3], target=[1, 1, 4], kind=["r", "s", "r"], item=[1, None, 4])
    data = dataset(rows, reviews, ties)
    parts = Split("random", np.array([0]), np.array([2]), np.array([3]), dropped=np.array([1, 4]))
    for splits, pairs in ((("train",), [0]), (("train", "valid"), [0, 2]), (SPLIT_NAMES, [0, 2, 3])):
        seen = observe(data, parts, splits)
        assert seen.item.tolist() == pairs
        assert seen.reviews.column("text").to_pylist() == ["a", "c", "e"]
        assert seen.ties.num_rows == 2
    new = dataclasses.replace(parts, new_items=np.array([4], np.int32))
    seen = observe(data, new)
    assert seen.reviews.column("text").to_pylist() == ["a", "c"]
    assert seen.ties.num_rows == 1


@pytest.mark.parametrize("kind", ["new_users", "new_items"])
def test_users_and_items_of_dropped_pairs_are_known(kind):
    data = dataset(grid(10, 10), table(user=list(range(10)), item=[11] * 10, text=["x"] * 10))
    parts = split(data, SplitConfig(kind=kind, history=1))
    known = np.unique(column(data.interactions, "user")[parts.train])
    reviewers = column(observe(data, parts).reviews, "user")
    assert reviewers.tolist() == (known.tolist() if kind == "new_users" else list(range(10)))


def test_users_had_the_dropped_rows_before_both_held_out_splits():
    parts = Split("random", np.array([0]), np.array([2]), np.array([3]), dropped=np.array([1]))
    assert parts.before("valid").tolist() == [0, 1]
    assert parts.before("test").tolist() == [0, 1, 2]
