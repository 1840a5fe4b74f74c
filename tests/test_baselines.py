"""Baselines by hand, against dense NumPy oracles, and against figures measured elsewhere on LastFM."""

import functools
import os
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse
from market import write_tables

from fused_rec import memory
from fused_rec.baselines.linear import ease, text_ease
from fused_rec.baselines.neighbors import (
    Interactions,
    NotApplicableError,
    als,
    friends_mean,
    item_knn,
    popularity,
    text_gcn,
    text_mean,
    user_knn,
)
from fused_rec.baselines.registry import BASELINES
from fused_rec.config import Config, DataConfig, ModelConfig
from fused_rec.evaluation import ranking
from fused_rec.evaluation.item_sets import item_sets
from fused_rec.evaluation.ranking import RankingSpec, evaluate, mean
from fused_rec.evaluation.top_k import TieBreak
from fused_rec.training.evaluate import baseline, choose_settings, evaluate_mean
from fused_rec.training.inputs import prepare, read

# user 0: items 0 1    user 1: items 1 2    user 2: items 1 2 3    user 3: none; one pair given twice
USER, ITEM = np.array([0, 0, 1, 1, 2, 2, 2, 0]), np.array([0, 1, 1, 2, 1, 2, 3, 0])
TINY = Interactions(USER, ITEM, 4, 4)


def scores(scorer, n_users):
    got = jax.jit(scorer)(jnp.arange(n_users, dtype=jnp.int32))
    assert got.dtype == jnp.float32
    return np.asarray(got)


def test_popularity_by_hand():
    np.testing.assert_array_equal(scores(popularity(TINY), 4), [[1, 3, 2, 1]] * 4)


def test_older_interactions_count_less():
    """Half-life of ten days: ages 0, 10 and 20 days weigh as 4 : 2 : 1, and add up to three as they do without one."""
    age = np.array([20, 0, 10], np.float32)
    seen = Interactions(np.array([0, 1, 2]), np.array([0, 1, 1]), 3, 3, age=age)
    np.testing.assert_allclose(scores(popularity(seen, half_life=10.0), 3), [[3 / 7, 18 / 7, 0]] * 3, rtol=1e-6)
    later = seen._replace(age=age + 30)
    np.testing.assert_allclose(scores(popularity(later, half_life=10.0), 3), [[3 / 7, 18 / 7, 0]] * 3, rtol=1e-6)
    np.testing.assert_array_equal(scores(popularity(seen), 3), [[1, 2, 0]] * 3)
    undated = seen._replace(age=None)
    np.testing.assert_array_equal(scores(popularity(undated, half_life=10.0), 3), [[1, 2, 0]] * 3)


# Cosines of items: (0, 1) 1/sqrt 3, (1, 2) 2/sqrt 6, (1, 3) 1/sqrt 3, (2, 3) 1/sqrt 2, the others 0.
A, B, C = 1 / 3**0.5, 2 / 6**0.5, 1 / 2**0.5


@pytest.mark.parametrize(
    ("num_neighbors", "expected"),
    [
        (4, [[A, A, B, A], [A, B, B, A + C], [A, B + A, B + C, A + C], [0, 0, 0, 0]]),
        # The nearest: of 0 it is 1, of 1 it is 2, of 2 it is 1, of 3 it is 2.
        (1, [[0, A, B, 0], [0, B, B, 0], [0, B, B + C, 0], [0, 0, 0, 0]]),
    ],
)
def test_item_knn_by_hand(num_neighbors, expected):
    np.testing.assert_allclose(scores(item_knn(TINY, num_neighbors=num_neighbors, shrink=0.0), 4), expected, rtol=1e-6)


def test_shrinking_by_hand():
    got = scores(item_knn(TINY, num_neighbors=4, shrink=2.0), 4)[0]
    expected = [1 / (3**0.5 + 2), 1 / (3**0.5 + 2), 2 / (6**0.5 + 2), 1 / (3**0.5 + 2)]
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_equally_near_neighbors_go_by_their_position():
    # Items 0, 1 and 2 are alike in every way: with one neighbour, 0 takes 1, and 1 and 2 take 0.
    got = scores(
        item_knn(
            Interactions(np.array([0, 0, 0, 1, 2, 3]), np.array([0, 1, 2, 0, 1, 2]), 4, 3), num_neighbors=1, shrink=0.0
        ),
        4,
    )
    np.testing.assert_allclose(got[1:], [[0, 0.5, 0], [0.5, 0, 0], [0.5, 0, 0]], rtol=1e-6)


@pytest.mark.parametrize(
    ("num_neighbors", "user_0"),
    [(1, [0, 1 / 2, 1 / 2, 0]), (4, [0, 1 / 2 + 1 / 6**0.5, 1 / 2 + 1 / 6**0.5, 1 / 6**0.5])],
)
def test_user_knn_by_hand(num_neighbors, user_0):
    got = scores(user_knn(TINY, num_neighbors=num_neighbors, shrink=0.0), 4)
    np.testing.assert_allclose(got[0], user_0, rtol=1e-6)
    assert (got[3] == 0).all()


def test_friends_mean_by_hand():
    source, target = np.array([0, 0, 0, 2, 2]), np.array([1, 2, 1, 0, 3])  # 0 -> 1 twice; user 3 has no history
    got = scores(friends_mean(TINY._replace(source=source, target=target)), 4)
    np.testing.assert_allclose(got, [[0, 1, 1, 1 / 2], [0, 0, 0, 0], [1 / 2, 1 / 2, 0, 0], [0, 0, 0, 0]], rtol=1e-6)


def _random(n_users, n_items, share, seed=0):
    matrix = np.random.default_rng(seed).random((n_users, n_items)) < share * np.linspace(0.2, 2, n_items)
    user, item = np.nonzero(matrix)
    return matrix.astype(np.float64), Interactions(user, item, n_users, n_items)


def _cosine(matrix):
    common = matrix @ matrix.T
    similar = common / np.sqrt(np.outer(np.diag(common), np.diag(common)))
    np.fill_diagonal(similar, 0)
    return similar


def test_long_rows_add_up():
    """Histories and neighbourhoods of hundreds of entries, and more than one block of rows."""
    history, seen = _random(60, 1100, 0.5)
    expected = history @ _cosine(history.T)
    np.testing.assert_allclose(scores(item_knn(seen, num_neighbors=1100, shrink=0.0), 60), expected, rtol=1e-5)
    expected = _cosine(history) @ history
    np.testing.assert_allclose(scores(user_knn(seen, num_neighbors=60, shrink=0.0), 60), expected, rtol=1e-5)


# Items 0 and 1 are at right angles, 2 is half way, 3 opposite to 0, and 4 without words.
WORDS = np.array([[1, 0], [0, 1], [C, C], [-1, 0], [0, 0]], np.float32)


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        # user 0: item 0 and words like item 1; user 1: items 0 and 1, no words; user 2: words alone; user 3: nothing.
        (0.0, [[1, 0, C, -1, -1], [C, C, 1, -C, -C], [0, 0, 0, 0, 0], [0, 0, 0, 0, 0]]),
        (1.0, [[C, C, 1, -C, -C], [C, C, 1, -C, -C], [0, 1, C, 0, 0], [0, 0, 0, 0, 0]]),
    ],
)
def test_text_mean_by_hand(own, expected):
    user_text = np.array([[0, 1], [0, 0], [0, 1], [0, 0]], np.float32)
    seen = Interactions(np.array([0, 1, 1]), np.array([0, 0, 1]), 4, 5, user_text, WORDS)
    np.testing.assert_allclose(scores(text_mean(seen, own=own), 4), expected, atol=1e-6)


def test_new_items_rank_by_their_words():
    """Item 2 is nobody's; its words are those of item 0. Item 3 has other words, item 4 none."""
    seen = Interactions(np.array([0, 1]), np.array([0, 1]), 2, 5, None, WORDS[[0, 1, 0, 1, 4]])
    np.testing.assert_allclose(scores(text_mean(seen, own=1.0), 2), [[1, 0, 1, 0, 0], [0, 1, 0, 1, 0]], atol=1e-6)


@pytest.mark.parametrize("user_mean", [True, False])
@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_text_gcn_equals_its_definition(num_layers, user_mean):
    """Against powers of the dense adjacency: user 3 has no item, item 4 neither users nor text, item 3 text alone."""
    history = np.array([[1, 1, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 0, 0]], float)
    adjacency = np.block([[np.zeros((4, 4)), history], [history.T, np.zeros((5, 5))]])
    root = np.sqrt(np.maximum(adjacency.sum(1), 1))
    start = np.concatenate([user_mean * history @ WORDS / np.maximum(history.sum(1, keepdims=True), 1), WORDS])
    powers = [np.linalg.matrix_power(adjacency / np.outer(root, root), level) for level in range(num_layers + 1)]
    final = sum(powers) @ start / (num_layers + 1)
    final /= np.maximum(np.linalg.norm(final, axis=1, keepdims=True), 1e-12)
    expected = final[:4] @ final[4:].T
    expected[:, 4] = expected.min(1)  # nothing is known of the item
    user, item = history.nonzero()
    got = scores(text_gcn(Interactions(user, item, 4, 5, None, WORDS), num_layers=num_layers, user_mean=user_mean), 4)
    np.testing.assert_allclose(got, expected, atol=1e-6)
    assert (got[3] == 0).all()


def test_text_gcn_scores_an_item_without_text_by_its_users():
    """Item 1 has no text. Its only user holds item 0, so it is near item 0 and far from item 2."""
    text = np.array([[1, 0], [0, 0], [0, 1]], np.float32)
    seen = Interactions(np.array([0, 0, 1, 2]), np.array([0, 1, 0, 2]), 3, 3, None, text)
    got = scores(text_gcn(seen, num_layers=2, user_mean=True), 3)
    np.testing.assert_allclose(got[1], [1, 1, 0], atol=1e-6)


ALS: dict[str, Any] = {"factors": 4, "regularization": 5.0, "alpha": 10.0, "seed": 3}


def test_als_scores_as_the_library_does():
    als_module = pytest.importorskip("implicit.cpu.als")
    threadpoolctl = pytest.importorskip("threadpoolctl")
    history, seen = _random(60, 25, 0.5)
    with threadpoolctl.threadpool_limits(1, "blas"):
        model = als_module.AlternatingLeastSquares(4, 5.0, 10.0, iterations=15, random_state=3, num_threads=1)
        pairs = scipy.sparse.csr_matrix(history, dtype=np.float32)
        model.fit(pairs, show_progress=False)
        items, expected = model.recommend(np.arange(60), pairs, N=25, filter_already_liked_items=False)
    got = np.take_along_axis(scores(als(seen, **ALS), 60), items, axis=1)
    np.testing.assert_allclose(got[history.any(1)], expected[history.any(1)], atol=1e-5)


def test_als_solves_the_weighted_least_squares():
    """With one factor, conjugate gradients are exact: the scores are those of 15 rounds of division."""
    pytest.importorskip("implicit")
    history, seen = _random(30, 20, 0.6)
    history[0], history[:, 0] = 0, 0  # nobody's item, and a user without any
    user, item = np.nonzero(history)
    rng = np.random.default_rng(3)
    weight = np.where(history > 0, 10.0, 1.0)
    users, items = (rng.random((n, 1), np.float32) * 0.01 for n in (30, 20))
    for _ in range(15):
        users = (weight * history) @ items / (weight @ items**2 + 5)
        items = (weight * history).T @ users / (weight.T @ users**2 + 5)
    got = scores(als(seen._replace(user=user, item=item), **dict(ALS, factors=1)), 30)
    np.testing.assert_allclose(got[1:, 1:], (users @ items.T)[1:, 1:], atol=1e-5)
    assert (got[0] == 0).all()
    np.testing.assert_array_equal(got[:, 0], got.min(1))


def test_als_repeats_itself():
    pytest.importorskip("implicit")
    _, seen = _random(200, 90, 0.2)
    first, again, other = (scores(als(seen, **dict(ALS, seed=seed)), 200) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-3


def test_als_names_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "implicit.cpu.als", None)
    with pytest.raises(ImportError, match=r"pip install -e '\.\[als\]'"):
        als(TINY, **ALS)


NONE = np.array([], int)


def test_without_interactions_all_score_alike():
    nothing = Interactions(NONE, NONE, 3, 5, np.zeros((3, 2), np.float32), WORDS, np.array([0]), np.array([1]))
    for scorer in (
        popularity(nothing),
        item_knn(nothing, num_neighbors=2, shrink=0.0),
        user_knn(nothing, num_neighbors=2, shrink=0.0),
        friends_mean(nothing),
        text_mean(nothing, own=1.0),
        text_gcn(nothing, num_layers=2, user_mean=True),
    ):
        np.testing.assert_array_equal(scores(scorer, 3), np.zeros((3, 5)))


def test_what_is_not_reported_is_asked_for():
    with pytest.raises(NotApplicableError, match="friends_mean needs social edges"):
        friends_mean(TINY._replace(source=NONE, target=NONE))
    with pytest.raises(NotApplicableError, match="text_mean needs text of items"):
        text_mean(TINY._replace(item_text=np.zeros((4, 1), np.float32)), own=0.0)
    with pytest.raises(NotApplicableError, match="text_gcn needs text of items"):
        text_gcn(TINY, num_layers=1, user_mean=True)


@pytest.mark.parametrize("name", ["tfidf_mean", "term_ease"])
@pytest.mark.parametrize("terms", [None, scipy.sparse.csr_matrix((4, 0))])
def test_terms_are_asked_for(name, terms):
    with pytest.raises(NotApplicableError, match=f"{name} needs TF-IDF terms of items, and there are none; set"):
        BASELINES[name].fit(TINY._replace(item_terms=terms), **BASELINES[name].grid[0])


@pytest.mark.parametrize("name", ["tfidf_mean", "term_ease"])
def test_terms_that_do_not_fit_are_refused(name, monkeypatch):
    monkeypatch.setattr(memory, "ALWAYS_ALLOWED", 0)
    monkeypatch.setattr(memory, "available_memory", lambda: 12 * 4 * 9 - 1)
    given = TINY._replace(item_terms=scipy.sparse.csr_matrix(np.ones((4, 9), np.float32)))
    with pytest.raises(memory.InsufficientMemoryError, match="9 columns of terms of 4 items"):
        BASELINES[name].fit(given, **BASELINES[name].grid[0])


def test_methods_over_terms_read_terms_in_place_of_text_features():
    rng = np.random.default_rng(3)
    terms = rng.random((4, 9)).astype(np.float32)
    terms /= np.linalg.norm(terms, axis=1, keepdims=True)
    given = TINY._replace(item_terms=scipy.sparse.csr_matrix(terms))
    plain = given._replace(item_text=terms, user_text=None)
    for name, fit in ("tfidf_mean", text_mean), ("term_ease", text_ease):
        for settings in BASELINES[name].grid:
            got = scores(BASELINES[name].fit(given, **settings), 3)
            np.testing.assert_allclose(got, scores(fit(plain, **settings), 3), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: popularity(Interactions(np.array([4]), np.array([0]), 4, 4)), "user ids span 4..4"),
        (lambda: popularity(Interactions(np.array([0]), np.array([-1]), 4, 4)), "item ids span -1..-1"),
        (lambda: friends_mean(TINY._replace(source=np.array([9]), target=np.array([0]))), "source ids span 9..9"),
        (lambda: friends_mean(TINY._replace(source=np.array([0]), target=np.array([9]))), "target ids span 9..9"),
        (lambda: text_mean(TINY, own=-1.0), "own is -1.0"),
        (lambda: text_gcn(TINY, num_layers=0, user_mean=True), "num_layers is 0"),
        (lambda: als(TINY, **dict(ALS, factors=0)), "factors is 0"),
        (lambda: als(TINY, **dict(ALS, regularization=-1.0)), "regularization is -1.0"),
        (lambda: als(TINY, **dict(ALS, alpha=0.5)), "alpha is 0.5; it must be at least 1"),
        (lambda: item_knn(TINY, num_neighbors=0, shrink=0.0), "num_neighbors is 0"),
        (lambda: user_knn(TINY, num_neighbors=1, shrink=-1.0), "shrink is -1.0"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.fixture(scope="module")
def lastfm():
    folder = Path(os.environ["FUSED_REC_DATA"]) / "lastfm" / "sociallgn_split"
    names = ("train_set.txt", "test_set.txt", "trust.txt")
    return [np.loadtxt(folder / name, delimiter=",", skiprows=1, dtype=np.int32).T for name in names]


LASTFM = (1892, 17632)  # users, items


@pytest.mark.skipif("FUSED_REC_DATA" not in os.environ, reason="FUSED_REC_DATA names no folder of real data")
@pytest.mark.parametrize(
    ("make", "recall", "ndcg"),
    [
        (popularity, 0.0712, 0.0828),
        (functools.partial(item_knn, num_neighbors=LASTFM[1], shrink=0.0), 0.1761, 0.2281),
        (functools.partial(ease, l2=100.0), 0.1951, 0.2475),
    ],
    ids=["popularity", "item_knn", "ease"],
)
def test_lastfm_figures(lastfm, make, recall, ndcg):
    """Recall@10 and NDCG@10 on the split of SocialLGN, as the notes that come with the data give them."""
    means = measured(lastfm, make)
    assert means["recall@10"] == pytest.approx(recall, abs=0.002)
    assert means["ndcg@10"] == pytest.approx(ndcg, abs=0.002)


@pytest.mark.skipif("FUSED_REC_DATA" not in os.environ, reason="FUSED_REC_DATA names no folder of real data")
def test_lastfm_figures_of_equal_scores(lastfm, monkeypatch):
    """A few friends leave many scores equal. The notes' .1112 and .1431 and ours lie between the orders by number."""
    ours, by_number = measured(lastfm, friends_mean), []
    for columns in (np.arange(LASTFM[1]), np.arange(LASTFM[1])[::-1].copy()):
        order = TieBreak(jnp.asarray(columns, jnp.int32), jnp.zeros(1, jnp.int32))
        monkeypatch.setattr(ranking, "random_order", lambda *_, order=order: order)
        by_number.append(measured(lastfm, friends_mean))
    first, last = by_number
    for name, figure in (("recall@10", 0.1112), ("ndcg@10", 0.1431)):
        assert last[name] < figure < first[name]
        assert last[name] < ours[name] < first[name]


def measured(lastfm, make):
    train, test, ties = lastfm
    n_users, n_items = LASTFM
    return mean(
        evaluate(
            make(Interactions(train[0], train[1], *LASTFM, source=ties[0], target=ties[1])),
            RankingSpec(item_sets(train[0], train[1], n_users), n_items),
            item_sets(test[0], test[1], n_users),
        )
    )


def test_all_are_tuned_alike():
    """No more than 8 settings each, all different."""
    for name, grid in ((name, entry.grid) for name, entry in BASELINES.items()):
        assert 1 <= len(grid) <= 8, name
        assert len({str(settings) for settings in grid}) == len(grid), name


@pytest.fixture(scope="module")
def market(tmp_path_factory):
    """A market without words, prepared from the training part and from what may be seen before the test part."""
    folder = write_tables(tmp_path_factory.mktemp("tables"))
    config = Config(data=DataConfig(name="tables", path=str(folder)), model=ModelConfig(variant="graph"))
    tables = read(config)
    return prepare(config, *tables), prepare(config, *tables, ("train", "valid"))


def test_validation_chooses_the_settings(market):
    alone, seen = market
    users, items = alone.observed.user, alone.observed.item
    values = [
        evaluate_mean(
            alone, item_knn(Interactions(users, items, alone.dataset.n_users, alone.dataset.n_items), **tried), "valid"
        )
        for tried in BASELINES["item_knn"].grid
    ]
    chosen = choose_settings("item_knn", alone)
    assert chosen == max(zip(values, BASELINES["item_knn"].grid, strict=True), key=lambda pair: pair[0]["ndcg@10"])[1]
    expected = item_knn(Interactions(seen.observed.user, seen.observed.item, 80, 30), **chosen)
    np.testing.assert_array_equal(scores(baseline("item_knn", seen, chosen), 80), scores(expected, 80))


def test_settings_are_not_chosen_where_the_answers_are_seen(market):
    with pytest.raises(ValueError, match="data prepared from train, valid; prepare the split train alone"):
        choose_settings("popularity", market[1])


def test_ties_reach_their_baseline_and_missing_words_are_reported(market):
    alone, seen = market
    ties = seen.observed.ties
    adjacency = {(s, t) for s, t in zip(*(ties.column(name).to_pylist() for name in ("source", "target")), strict=True)}
    expected = np.zeros((80, 30))
    for u in range(80):
        friends = [t for s, t in adjacency if s == u]
        for t in friends:
            expected[u, seen.observed.item[seen.observed.user == t]] += 1 / len(friends)
    popular = np.bincount(seen.observed.item, minlength=30)
    blank = expected.max(1) == 0  # of whom it knows nothing: no friend, or friends who hold nothing
    assert 0 < blank.sum() < 80
    expected[blank] = popular
    np.testing.assert_allclose(scores(baseline("friends_mean", seen, {}), 80), expected, atol=1e-6)
    with pytest.raises(NotApplicableError, match="text_ease needs text of items"):
        choose_settings("text_ease", alone)
