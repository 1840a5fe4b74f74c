"""Baselines by hand, against dense NumPy oracles, and against figures measured elsewhere on LastFM."""

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fused_rec.evaluate.ranking import evaluate, item_sets, mean
from fused_rec.model.baselines import ease, friends_mean, item_knn, popularity, user_knn

# user 0: items 0 1    user 1: items 1 2    user 2: items 1 2 3    user 3: none; one pair given twice
USER, ITEM = np.array([0, 0, 1, 1, 2, 2, 2, 0]), np.array([0, 1, 1, 2, 1, 2, 3, 0])
TINY = (USER, ITEM, 4, 4)


def scores(scorer, n_users):
    got = jax.jit(scorer)(jnp.arange(n_users, dtype=jnp.int32))
    assert got.dtype == jnp.float32
    return np.asarray(got)


def test_popularity_by_hand():
    np.testing.assert_array_equal(scores(popularity(*TINY), 4), [[1, 3, 2, 1]] * 4)


# Cosines of items: (0, 1) 1/sqrt 3, (1, 2) 2/sqrt 6, (1, 3) 1/sqrt 3, (2, 3) 1/sqrt 2, the others 0.
A, B, C = 1 / 3**0.5, 2 / 6**0.5, 1 / 2**0.5


@pytest.mark.parametrize(
    ("neighbours", "expected"),
    [
        (4, [[A, A, B, A], [A, B, B, A + C], [A, B + A, B + C, A + C], [0, 0, 0, 0]]),
        # The nearest: of 0 it is 1, of 1 it is 2, of 2 it is 1, of 3 it is 2.
        (1, [[0, A, B, 0], [0, B, B, 0], [0, B, B + C, 0], [0, 0, 0, 0]]),
    ],
)
def test_item_knn_by_hand(neighbours, expected):
    np.testing.assert_allclose(scores(item_knn(*TINY, neighbours=neighbours, shrink=0.0), 4), expected, rtol=1e-6)


def test_shrinking_by_hand():
    got = scores(item_knn(*TINY, neighbours=4, shrink=2.0), 4)[0]
    expected = [1 / (3**0.5 + 2), 1 / (3**0.5 + 2), 2 / (6**0.5 + 2), 1 / (3**0.5 + 2)]
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_equally_near_neighbours_go_by_their_position():
    # Items 0, 1 and 2 are alike in every way: with one neighbour, 0 takes 1, and 1 and 2 take 0.
    got = scores(
        item_knn(np.array([0, 0, 0, 1, 2, 3]), np.array([0, 1, 2, 0, 1, 2]), 4, 3, neighbours=1, shrink=0.0), 4
    )
    np.testing.assert_allclose(got[1:], [[0, 0.5, 0], [0.5, 0, 0], [0.5, 0, 0]], rtol=1e-6)


@pytest.mark.parametrize(
    ("neighbours", "user_0"),
    [(1, [0, 1 / 2, 1 / 2, 0]), (4, [0, 1 / 2 + 1 / 6**0.5, 1 / 2 + 1 / 6**0.5, 1 / 6**0.5])],
)
def test_user_knn_by_hand(neighbours, user_0):
    got = scores(user_knn(*TINY, neighbours=neighbours, shrink=0.0), 4)
    np.testing.assert_allclose(got[0], user_0, rtol=1e-6)
    assert (got[3] == 0).all()


def test_friends_mean_by_hand():
    source, target = np.array([0, 0, 0, 2, 2]), np.array([1, 2, 1, 0, 3])  # 0 -> 1 twice; user 3 has no history
    got = scores(friends_mean(USER, ITEM, source, target, 4, 4), 4)
    np.testing.assert_allclose(got, [[0, 1, 1, 1 / 2], [0, 0, 0, 0], [1 / 2, 1 / 2, 0, 0], [0, 0, 0, 0]], rtol=1e-6)


def _random(n_users, n_items, share, seed=0):
    matrix = np.random.default_rng(seed).random((n_users, n_items)) < share * np.linspace(0.2, 2, n_items)
    user, item = np.nonzero(matrix)
    return matrix.astype(np.float64), (user, item, n_users, n_items)


def _cosine(matrix):
    common = matrix @ matrix.T
    similar = common / np.sqrt(np.outer(np.diag(common), np.diag(common)))
    np.fill_diagonal(similar, 0)
    return similar


def test_long_rows_add_up():
    """Histories and neighbourhoods of hundreds of entries, and more than one block of rows."""
    history, pairs = _random(60, 1100, 0.5)
    expected = history @ _cosine(history.T)
    np.testing.assert_allclose(scores(item_knn(*pairs, neighbours=1100, shrink=0.0), 60), expected, rtol=1e-5)
    expected = _cosine(history) @ history
    np.testing.assert_allclose(scores(user_knn(*pairs, neighbours=60, shrink=0.0), 60), expected, rtol=1e-5)


def _ridge_without_self(history, l2):
    """EASE from its definition: each item regressed on all others."""
    weights = np.zeros((history.shape[1],) * 2)
    for j in range(history.shape[1]):
        others = np.delete(np.arange(history.shape[1]), j)
        x = history[:, others]
        weights[others, j] = np.linalg.solve(x.T @ x + l2 * np.eye(len(others)), x.T @ history[:, j])
    return history @ weights


@pytest.mark.parametrize(("n_users", "n_items"), [(60, 25), (25, 60), (40, 40)])
@pytest.mark.parametrize("l2", [1.0, 50.0])
def test_ease_equals_its_definition(n_users, n_items, l2):
    history, pairs = _random(n_users, n_items, 0.3)
    np.testing.assert_allclose(
        scores(ease(*pairs, l2=l2), n_users), _ridge_without_self(history, l2), rtol=0, atol=2e-5
    )


def test_both_forms_of_ease_agree():
    """Users without history change nothing but which of the two inverses is the smaller."""
    _, (user, item, n_users, n_items) = _random(80, 200, 0.1)
    by_users = scores(ease(user, item, n_users, n_items, l2=10.0), n_users)
    by_items = scores(ease(user, item, n_items + 1, n_items, l2=10.0), n_items + 1)
    np.testing.assert_allclose(by_users, by_items[:n_users], rtol=0, atol=1e-5)
    assert (by_items[n_users:] == 0).all()


NONE = np.array([], int)


def test_without_interactions_all_score_alike():
    for scorer in (
        popularity(NONE, NONE, 3, 5),
        item_knn(NONE, NONE, 3, 5, neighbours=2, shrink=0.0),
        user_knn(NONE, NONE, 3, 5, neighbours=2, shrink=0.0),
        friends_mean(NONE, NONE, NONE, NONE, 3, 5),
        ease(NONE, NONE, 3, 5, l2=1.0),
        ease(NONE, NONE, 5, 5, l2=1.0),
    ):
        np.testing.assert_array_equal(scores(scorer, 3), np.zeros((3, 5)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: popularity(np.array([4]), np.array([0]), 4, 4), "user ids span 4..4"),
        (lambda: ease(np.array([0]), np.array([-1]), 4, 4, l2=1.0), "item ids span -1..-1"),
        (lambda: friends_mean(USER, ITEM, np.array([9]), np.array([0]), 4, 4), "source ids span 9..9"),
        (lambda: friends_mean(USER, ITEM, np.array([0]), np.array([9]), 4, 4), "target ids span 9..9"),
        (lambda: item_knn(*TINY, neighbours=0, shrink=0.0), "neighbours is 0"),
        (lambda: user_knn(*TINY, neighbours=1, shrink=-1.0), "shrink is -1.0"),
        (lambda: ease(*TINY, l2=0.0), "l2 is 0.0"),
        # X'X is [[2, 2], [2, 2]] and X X' [[2, 1], [1, 2]]: row sums 4 and 3. The first is singular.
        (lambda: ease(np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1]), 3, 2, l2=3e-5), "l2 is 3e-05, .* at least 4e-05"),
        (lambda: ease(np.array([0, 0, 1, 1]), np.array([0, 1, 0, 2]), 2, 3, l2=2e-5), "l2 is 2e-05, .* at least 3e-05"),
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
    ("build", "recall", "ndcg"),
    [
        (lambda train, ties: popularity(train[0], train[1], *LASTFM), 0.0712, 0.0828),
        (lambda train, ties: item_knn(train[0], train[1], *LASTFM, neighbours=LASTFM[1], shrink=0.0), 0.1761, 0.2281),
        (lambda train, ties: ease(train[0], train[1], *LASTFM, l2=100.0), 0.1951, 0.2475),
        (lambda train, ties: friends_mean(train[0], train[1], ties[0], ties[1], *LASTFM), 0.1112, 0.1431),
    ],
    ids=["popularity", "item_knn", "ease", "friends_mean"],
)
def test_lastfm_figures(lastfm, build, recall, ndcg):
    """Recall@10 and NDCG@10 on the split of SocialLGN, as the notes that come with the data give them."""
    train, test, ties = lastfm
    n_users, n_items = LASTFM
    means = mean(
        evaluate(
            build(train, ties),
            truth=item_sets(test[0], test[1], n_users),
            seen=item_sets(train[0], train[1], n_users),
            n_items=n_items,
            item_counts=np.bincount(train[1], minlength=n_items),
        )
    )
    assert means["recall@10"] == pytest.approx(recall, abs=0.002)
    assert means["ndcg@10"] == pytest.approx(ndcg, abs=0.002)
