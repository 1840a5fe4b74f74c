"""Ranking and evaluation against hand-made lists, a brute-force ranking, and ir-measures."""

from typing import Any

import ir_measures
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ir_measures import AP, RR, P, R, Success, nDCG
from jax.tree_util import Partial

from fused_rec import kernels
from fused_rec.evaluation import ranking
from fused_rec.evaluation import top_k as top_k_module
from fused_rec.evaluation.item_sets import UserItemSets, contained, item_sets
from fused_rec.evaluation.ranking import CandidateFilter, RankingSpec, evaluate, mean, rank, users_per_batch
from fused_rec.evaluation.top_k import random_order, top_k_filtered


def _lookup(table, users):
    return table[users]


def scorer_of(table):
    return Partial(_lookup, jnp.asarray(table, jnp.float32))


def sets_of(lists):
    user = np.repeat(np.arange(len(lists)), [len(x) for x in lists])
    return item_sets(user, np.array([i for x in lists for i in x], int), len(lists))


def sets_where(mask):
    user, item = np.nonzero(mask)
    return item_sets(user, item, len(mask))


def ranked(scorer, users, k, **spec):
    found = rank(scorer, users, RankingSpec(**spec), k)
    return found.items, found.scores


def lists_of(sets: UserItemSets):
    return [list(sets.items[sets.indptr[u] : sets.indptr[u + 1]]) for u in range(sets.n_users)]


# --- item sets ----------------------------------------------------------------------------------------------------


def test_item_sets_are_sorted_and_unique():
    sets = item_sets(np.array([2, 0, 2, 2]), np.array([5, 1, 3, 5]), 4)
    assert lists_of(sets) == [[1], [], [3, 5], []]
    assert (sets.indptr.dtype, sets.items.dtype) == (np.int64, np.int32)
    assert list(sets.sizes) == [1, 0, 2, 0]
    assert list(sets.users) == [0, 2, 2]


@pytest.mark.parametrize(("user", "item", "message"), [([4], [0], "0..3"), ([-1], [0], "0..3"), ([0], [-2], "item -2")])
def test_item_sets_outside_their_bounds(user, item, message):
    with pytest.raises(ValueError, match=message):
        item_sets(np.array(user), np.array(item), 4)


# --- three users, five items, by hand ------------------------------------------------------------------------------

# item      0    1    2    3    4
TABLE = [[0.5, 0.4, 0.3, 0.2, 0.1],  # user 0 has seen 0: ranks 1 2 3 4, holds out 2 and 4: hits at ranks 2 and 4
         [0.1, 0.2, 0.3, 0.4, 0.5],  # user 1 has seen 4 and 3: ranks 2 1 0, holds out 2: hit at rank 1
         [0.1, 0.9, 0.2, 0.8, 0.3]]  # user 2 holds out nothing: ranked, not evaluated  # fmt: skip
SEEN = [[0], [3, 4], [2]]
TRUTH = [[2, 4], [2], []]


def _by_hand(**changes):
    arguments: dict[str, Any] = {"truth": sets_of(TRUTH), "ks": (2, 4), "item_counts": np.array([1, 0, 1, 2, 3])}
    arguments |= {name: changes.pop(name) for name in (*arguments,) if name in changes}
    return evaluate(scorer_of(TABLE), RankingSpec(**{"seen": sets_of(SEEN), "n_items": 5, **changes}), **arguments)


def test_what_sets_contain():
    """Of users in any order, and an item that only the next user has is not the last of the one before."""
    sets = sets_of([[4], [0, 2], []])
    found = contained(sets, np.array([1, 0, 2, 1]), np.array([[0, 4], [4, 0], [0, 4], [2, 1]]))
    assert found.tolist() == [[True, False], [True, False], [False, False], [True, False]]


@pytest.mark.parametrize(("n_items", "users"), [(10, 8192), (40_981, 64), (1_000_000, 64)])
def test_users_at_a_time(n_items, users):
    assert users_per_batch(n_items) == users


def test_rank_by_hand():
    items, scores = ranked(scorer_of(TABLE), np.array([2, 0, 1]), seen=sets_of(SEEN), n_items=5, k=4, batch_size=2)
    assert items.tolist() == [[1, 3, 4, 0], [1, 2, 3, 4], [2, 1, 0, -1]]
    np.testing.assert_allclose(scores[2], [0.3, 0.2, 0.1, -np.inf], rtol=1e-6)
    assert (items.dtype, scores.dtype) == (np.int32, np.float32)


def test_evaluate_by_hand():
    per_user = _by_hand()
    assert per_user.users.tolist() == [0, 1]
    rank_2, rank_4 = 1 / np.log2(3), 1 / np.log2(5)
    expected = {
        "recall@2": [1 / 2, 1],
        "recall@4": [1, 1],
        "precision@2": [1 / 2, 1 / 2],
        "precision@4": [2 / 4, 1 / 4],
        "hitrate@2": [1, 1],
        "ndcg@2": [rank_2 / (1 + rank_2), 1],
        "ndcg@4": [(rank_2 + rank_4) / (1 + rank_2), 1],
        "mrr@4": [1 / 2, 1],
        "map@4": [(1 / 2 + 2 / 4) / 2, 1],
        # User 0: 2 and 4 against 1 and 3: 2 beats 3. User 1: 2 against 0 and 1.
        "auc": [1 / 4, 1],
        # log2(3 users / count), item 1 as if one user had it: items 1 2 3 4, and 2 1 0.
        "novelty@10": [(2 * np.log2(3) + np.log2(3 / 2)) / 4, np.log2(3)],
    }
    for name, values in expected.items():
        np.testing.assert_allclose(per_user.metrics[name], values, rtol=1e-6, err_msg=name)
        assert per_user.metrics[name].dtype == np.float32
    means = mean(per_user)
    assert means["recall@2"] == pytest.approx(3 / 4)
    assert means["coverage@10"] == 1  # user 0 is given items 1 to 4, user 1 item 0
    assert set(means) == set(per_user.metrics) | {"coverage@10"}


def test_without_item_counts_only_novelty_is_missing():
    per_user, without = _by_hand(), _by_hand(item_counts=None)
    assert set(per_user.metrics) - set(without.metrics) == {"novelty@10"}
    for name, values in without.metrics.items():
        np.testing.assert_array_equal(values, per_user.metrics[name], err_msg=name)


def test_evaluate_among_candidates():
    # Of 0, 1 and 4, user 0 has 1 and 4 left and holds out 4; user 1 has 1 and 0 left and holds out none of them.
    per_user = _by_hand(candidates=np.array([4, 0, 1]))
    assert per_user.users.tolist() == [0]
    assert per_user.metrics["recall@2"] == [1]
    assert per_user.metrics["mrr@2"] == [1 / 2]
    assert per_user.metrics["auc"] == [0]
    assert per_user.aggregate == {"coverage@10": pytest.approx(2 / 3)}


def test_evaluate_without_excluded_items():
    # User 0 must not get 1 and 2 and is given 3 and 4; of the held-out 2 and 4, 2 counts as missed but is in no pair
    # of AUC as a negative: 2 and 4 against 3.
    barred = CandidateFilter(("barred",), excluded=(sets_of([[1, 2], [], [1]]),))
    per_user, without = _by_hand(filter=barred), _by_hand()
    expected = {"recall@2": 1 / 2, "mrr@2": 1 / 2, "map@4": 1 / 4, "auc": 1 / 2, "novelty@10": np.log2(3 / 2) / 2}
    for name, value in expected.items():
        np.testing.assert_allclose(per_user.metrics[name][0], value, rtol=1e-6, err_msg=name)
        assert per_user.metrics[name][1] == without.metrics[name][1], name


def test_blocks_of_lists_change_nothing(monkeypatch):
    """More lists than are computed together, in blocks of which the last is not full."""
    rng = np.random.default_rng(0)
    kind, table = rng.choice(3, (8, 9)), rng.normal(size=(8, 9))
    kind[:, 0] = 0  # every user is evaluated
    spec, truth, counts = RankingSpec(sets_where(kind == 1), 9), sets_where(kind == 0), np.arange(9) % 5
    found = []
    for lists in (ranking.LISTS, 3):
        monkeypatch.setattr(ranking, "LISTS", lists)
        found.append(evaluate(scorer_of(table), spec, truth, item_counts=counts, ks=(1, 3)))
    assert len(found[0].users) == 8
    for name, values in found[0].metrics.items():
        assert len(np.unique(values)) > 1
        np.testing.assert_array_equal(values, found[1].metrics[name], err_msg=name)


def test_mean_leaves_out_users_without_pairs():
    # User 1 has seen all but its held-out item: every metric is 1, and there is nothing to compare it with.
    per_user = _by_hand(seen=sets_of([[0], [0, 1, 3, 4], []]))
    np.testing.assert_allclose(per_user.metrics["auc"], [1 / 4, np.nan])
    assert mean(per_user)["auc"] == 1 / 4
    assert per_user.metrics["recall@2"].tolist() == [1 / 2, 1]


def test_users_who_have_seen_everything():
    seen = sets_of([[0, 1, 2, 3, 4], [0, 1, 2, 3], []])
    items, scores = ranked(scorer_of(TABLE), np.arange(3), seen=seen, n_items=5, k=7)
    assert items.tolist() == [[-1] * 7, [4] + [-1] * 6, [1, 3, 4, 2, 0, -1, -1]]
    assert np.isneginf(scores[0]).all()


def test_empty_ranks_hit_nothing():
    # User 1 has items 2 1 0 left: rank 4 is empty (-1), and must not count as a second hit of item 0.
    per_user = _by_hand(truth=sets_of([[], [0], []]))
    assert per_user.metrics["recall@4"] == [1]
    assert per_user.metrics["precision@4"] == [1 / 4]


def test_no_users_no_rows():
    items, scores = ranked(scorer_of(TABLE), np.array([], int), seen=sets_of(SEEN), n_items=5, k=3)
    assert items.shape == scores.shape == (0, 3)


# --- against other implementations ---------------------------------------------------------------------------------


@pytest.mark.parametrize("rounded", [False, True], ids=["distinct", "ties"])
def test_equals_ir_measures(rounded):
    rng = np.random.default_rng(3)
    n_users, n_items, ks, seed = 150, 120, (1, 5, 10, 50), 11
    table = rng.normal(size=(n_users, n_items)).astype(np.float32)
    table = np.round(table, 1) if rounded else table  # also gives -0.0 and 0.0, which tie
    kind = rng.choice(3, (n_users, n_items), p=[0.08, 0.7, 0.22])  # held out, neither, seen
    truth, seen = sets_where(kind == 0), sets_where(kind == 2)
    assert truth.sizes.min() > 0
    per_user = evaluate(
        scorer_of(table),
        RankingSpec(seen, n_items, batch_size=64, seed=seed),
        truth,
        item_counts=(kind == 2).sum(0),
        ks=ks,
    )

    place = np.argsort(random_order(n_items, seed).items(n_items))
    run, judged = [], []
    for user in range(n_users):
        open_to = np.flatnonzero(kind[user] != 2)
        ranked = open_to[np.lexsort((place[open_to], -table[user, open_to]))]
        run += [ir_measures.ScoredDoc(str(user), str(i), float(n_items - rank)) for rank, i in enumerate(ranked)]
        judged += [ir_measures.Qrel(str(user), str(i), 1) for i in np.flatnonzero(kind[user] == 0)]
    theirs = {"recall": R, "precision": P, "hitrate": Success, "ndcg": nDCG, "mrr": RR, "map": AP}
    measures = {f"{name}@{k}": measure @ k for name, measure in theirs.items() for k in ks}
    expected = {(m.measure, int(m.query_id)): m.value for m in ir_measures.iter_calc(measures.values(), judged, run)}
    assert len(expected) == len(measures) * n_users
    for name, measure in measures.items():
        want = [expected[measure, user] for user in per_user.users]
        np.testing.assert_allclose(per_user.metrics[name], want, rtol=1e-6, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("n_items", [1, 19, 20, 81, 700, 2003])
@pytest.mark.parametrize("k", [1, 7, 60, 2500])
def test_the_best_columns_hold_the_best_items(n_items, k):
    """Against a full sort, with few distinct scores, some users' lists shorter than k and one user's empty."""
    rng = np.random.default_rng(n_items)
    table = rng.integers(0, 9, (12, n_items)) * 1.0
    kind = rng.random((12, n_items)) < np.linspace(0, 1, 12)[:, None]
    items, scores = ranked(scorer_of(table), np.arange(12), seen=sets_where(kind), n_items=n_items, k=k)
    in_order = random_order(n_items, 0).items(n_items)
    assert sorted(in_order) == list(range(n_items))
    place = np.argsort(in_order)
    for user in range(12):
        open_to = np.flatnonzero(~kind[user])
        want = open_to[np.lexsort((place[open_to], -table[user, open_to]))][:k]
        assert items[user].tolist() == [*want, *[-1] * (k - len(want))]
        assert scores[user].tolist() == [*table[user, want], *[-np.inf] * (k - len(want))]


def test_masks_hold_for_every_user():
    rng = np.random.default_rng(0)
    n_users, n_items = 70, 40
    kind = rng.random((n_users, n_items)) < 0.5
    candidates = np.sort(rng.choice(n_items, 25, replace=False))
    table = rng.normal(size=(n_users, n_items))
    seen = sets_where(kind)
    items, _ = ranked(
        scorer_of(table), np.arange(n_users), seen=seen, n_items=n_items, k=40, candidates=candidates, batch_size=16
    )
    for user in range(n_users):
        open_to = np.setdiff1d(candidates, np.flatnonzero(kind[user]))
        found = items[user][items[user] >= 0]
        assert found.tolist() == open_to[np.argsort(-table[user, open_to])].tolist()


def test_batch_size_changes_nothing():
    rng = np.random.default_rng(5)
    n_users, n_items = 53, 31
    kind = rng.choice(3, (n_users, n_items), p=[0.1, 0.6, 0.3])
    truth, seen = sets_where(kind == 0), sets_where(kind == 2)
    table = np.round(rng.normal(size=(n_users, n_items)), 1)
    results = [
        evaluate(scorer_of(table), RankingSpec(seen, n_items, batch_size=size), truth, item_counts=(kind == 2).sum(0))
        for size in (7, 52, 1000)
    ]
    for result in results[1:]:
        assert result.users.tolist() == results[0].users.tolist()
        assert result.aggregate == results[0].aggregate
        for name, values in results[0].metrics.items():
            # XLA adds in another order for another shape: one unit in the last place
            np.testing.assert_allclose(result.metrics[name], values, rtol=3e-7, err_msg=name)


@pytest.mark.skipif(not kernels.usable(), reason="no kernel was compiled here")
@pytest.mark.parametrize(("rows", "n_items", "k"), [(1, 1, 1), (3, 5, 8), (7, 63, 20), (33, 1000, 50), (300, 4489, 20)])
@pytest.mark.parametrize("kind", ["distinct", "ties", "constant", "ascending", "signed zeros"])
def test_the_kernel_finds_what_plain_jax_finds(rows, n_items, k, kind):
    """Rows of every length, lists longer than what is eligible, and the worst case of a row: ever better scores."""
    rng = np.random.default_rng(n_items)
    scores = rng.normal(size=(rows, n_items)).astype(np.float32)
    scores = {
        "distinct": scores,
        "ties": np.round(scores, 1),
        "constant": np.full_like(scores, 0.25),
        "ascending": np.sort(scores, axis=1),
        "signed zeros": np.where(scores > 0, np.float32(0), np.float32(-0.0)),
    }[kind]
    eligible = rng.random((rows, n_items)) < rng.random((rows, 1))  # of some rows hardly any, of others nearly all
    eligible[0] = False
    order = random_order(n_items, 0)
    for got, expected in zip(
        jax.jit(top_k_filtered, static_argnums=3)(scores, eligible, order, k),
        (*jax.jit(top_k_module._top_k_filtered, static_argnums=3)(scores, eligible, order, k), np.ones(rows, bool)),
        strict=True,
    ):
        np.testing.assert_array_equal(got, expected)
        assert got.dtype == expected.dtype and not np.signbit(np.asarray(got, float)[np.asarray(got) == 0]).any()


@pytest.mark.parametrize("strange", [np.nan, np.inf, -np.inf])
def test_rows_that_are_not_finite_are_reported(strange):
    scores = np.zeros((3, 130), np.float32)
    scores[1, 128] = strange
    order = random_order(130, 0)
    assert top_k_filtered(jnp.asarray(scores), jnp.zeros((3, 130), bool), order, 4)[2].tolist() == [
        True,
        False,
        True,
    ]


def test_places_are_the_order():
    for n_items in (1, 2, 5, 20, 41, 1000):
        order = random_order(n_items, 3)
        assert np.argsort(order.places(n_items)).tolist() == order.items(n_items).tolist()


# --- equal scores --------------------------------------------------------------------------------------------------


def test_a_constant_scorer_is_chance():
    """Half the items are held out by everybody and have the low ids: preferring low ids would give recall 10/20."""
    n_users, n_items = 8, 40
    truth, seen = sets_of([list(range(20))] * n_users), sets_of([[]] * n_users)
    scorer = scorer_of(np.ones((n_users, n_items)))
    recalls = [mean(evaluate(scorer, RankingSpec(seen, n_items, seed=seed), truth, ks=(10,))) for seed in range(60)]
    assert all(r["auc"] == 0.5 for r in recalls)
    # Hypergeometric: mean 10 * 20 / 40 / 20 = 1/4, deviation of the mean of 60 draws .0088.
    assert np.mean([r["recall@10"] for r in recalls]) == pytest.approx(1 / 4, abs=0.03)


def test_negative_zero_ties_with_zero():
    table = np.where(np.arange(20) % 2, -0.0, 0.0)[None, :]
    items, _ = ranked(scorer_of(table), np.array([0]), seen=sets_of([[]]), n_items=20, k=20, seed=4)
    assert items[0].tolist() == np.random.default_rng(4).permutation(20).tolist()


def test_a_plain_function_is_a_scorer():
    items, _ = ranked(lambda users: jnp.asarray(TABLE)[users], np.arange(3), seen=sets_of(SEEN), n_items=5, k=1)
    assert items.tolist() == [[1], [2], [1]]


# --- compilation ---------------------------------------------------------------------------------------------------


def test_new_parameters_and_the_last_batch_need_no_compilation():
    traced = []

    def score(table, users):
        traced.append(users.shape)
        return table[users]

    seen = sets_of([[]] * 10)
    for scale in (1.0, 2.0):
        ranked(
            Partial(score, jnp.arange(50.0).reshape(10, 5) * scale),
            np.arange(10),
            seen=seen,
            n_items=5,
            k=2,
            batch_size=4,
        )
    assert len(traced) == 1


def test_half_precision_scores_are_ranked():
    items, scores = ranked(
        Partial(_lookup, jnp.asarray(TABLE, jnp.bfloat16)), np.array([0]), seen=sets_of(SEEN), n_items=5, k=2
    )
    assert items.tolist() == [[1, 2]]
    assert scores.dtype == np.float32


def test_one_program_evaluates_all_scorers_and_splits(monkeypatch):
    """Vectors of three widths and a table, splits of 13 and 15 users: what is traced once is compiled once."""
    traced, auc = [], ranking.metrics.pairwise_auc
    monkeypatch.setattr(ranking.metrics, "pairwise_auc", lambda *arrays: [traced.append(1), auc(*arrays)][1])
    rng = np.random.default_rng(0)
    kind = rng.choice(3, (16, 67), p=[0.1, 0.5, 0.4])
    splits = [sets_where((kind == 0) & (np.arange(16) < count)[:, None]) for count in (13, 15)]
    for width in (2, 3, 4):
        users, items = (rng.normal(size=(count, width)).astype(np.float32) for count in (16, 67))
        for truth in splits:
            scorer = Partial(_product, jnp.asarray(users), jnp.asarray(items))
            found = evaluate(scorer, RankingSpec(sets_where(kind == 1), 67, devices=1), truth, ks=(5, 10))
            table = scorer_of(users @ items.T)
            whole = evaluate(table, RankingSpec(sets_where(kind == 1), 67, devices=1), truth, ks=(5, 10))
            np.testing.assert_allclose(found.metrics["ndcg@5"], whole.metrics["ndcg@5"])
    assert len(traced) == 1


def _product(users, items, batch):
    return users[batch] @ items.T


def test_subsets_of_the_usual_cutoffs_share_a_program():
    """Metrics are those of a call with other cutoffs too, which has a program of its own."""
    one, other = (evaluate(scorer_of(TABLE), RankingSpec(sets_of(SEEN), 5), sets_of(TRUTH), ks=ks)
                  for ks in ((5, 20), (3, 5, 20)))  # fmt: skip
    assert set(one.metrics) == {name for name in other.metrics if not name.endswith("@3")}
    for name, values in one.metrics.items():
        np.testing.assert_array_equal(values, other.metrics[name], err_msg=name)


# --- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_scores_that_are_not_finite(bad):
    table = np.array(TABLE)
    table[1, 3] = bad  # also where the item is seen: a broken scorer must not hide behind a mask
    with pytest.raises(ValueError, match="user 1 hold NaN or infinity"):
        ranked(scorer_of(table), np.array([0, 2, 1]), seen=sets_of(SEEN), n_items=5, k=1)
    with pytest.raises(ValueError, match="user 1 hold NaN or infinity"):
        evaluate(scorer_of(table), RankingSpec(sets_of(SEEN), 5), sets_of(TRUTH), ks=(1,))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ks": ()}, "at least 1"),
        ({"ks": (0, 5)}, "at least 1"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"candidates": np.array([], int)}, "0..4"),
        ({"candidates": np.array([5])}, "0..4"),
        ({"candidates": np.array([3])}, "no user has a held-out item"),
        ({"seen": sets_of([[2], [], []])}, "1 held-out pairs are seen as well, first user 0 with item 2"),
        ({"seen": sets_of([[], []])}, "truth is of 3 users and seen of 2"),
        ({"seen": sets_of([[], [], [5]])}, "seen holds item 5"),
        ({"truth": sets_of([[], [9], []])}, "truth holds item 9"),
        ({"item_counts": np.array([1, 2, 3, 0])}, "item_counts has 4 entries"),
        ({"item_counts": np.array([1, 2, 3, 0, 4])}, "at most 3"),
        ({"n_items": 6, "item_counts": np.ones(6, int)}, r"shape \(1, 5\); it must be \(1, 6\)"),
    ],
)
def test_evaluate_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        _by_hand(**changes)


@pytest.mark.parametrize(("users", "k", "message"), [([0, 3], 1, "0..2"), ([-1], 1, "0..2"), ([0], 0, "k is 0")])
def test_rank_refuses(users, k, message):
    with pytest.raises(ValueError, match=message):
        ranked(scorer_of(TABLE), np.array(users), seen=sets_of(SEEN), n_items=5, k=k)


def test_a_bar_shows_progress(capfd):
    ranked(scorer_of(TABLE), np.arange(3), seen=sets_of(SEEN), n_items=5, k=1, progress="rank")
    assert "rank" in capfd.readouterr().err
