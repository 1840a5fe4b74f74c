"""EASE, EASE towards words and graph filters, each against its definition solved densely in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fused_rec.baselines import linear
from fused_rec.baselines.linear import ease, gf_cf, text_ease
from fused_rec.baselines.neighbors import Interactions, NotApplicableError


def scores(scorer, n_users):
    got = jax.jit(scorer)(jnp.arange(n_users, dtype=jnp.int32))
    assert got.dtype == jnp.float32
    return np.asarray(got)


def _random(n_users, n_items, share, dims=6):
    """A history of which every item but the first is part, and unit words for all items but the last."""
    rng = np.random.default_rng(0)
    history = rng.random((n_users, n_items)) < share
    history[rng.integers(n_users, size=n_items), np.arange(n_items)] = True
    history[:, 0] = False
    words = rng.normal(size=(n_items, dims)).astype(np.float32)
    words /= np.linalg.norm(words, axis=1, keepdims=True)
    words[-1] = 0
    user, item = np.nonzero(history)
    return history.astype(np.float64), Interactions(user, item, n_users, n_items, None, words)


def _ridge_without_self(rows, l2, towards, l2_towards):
    """Each column regressed on all others, its weights drawn towards those given."""
    n = rows.shape[1]
    weights = np.zeros((n, n))
    for j in range(n):
        others = np.delete(np.arange(n), j)
        x = rows[:, others]
        gram = x.T @ x + (l2 + l2_towards) * np.eye(n - 1)
        weights[others, j] = np.linalg.solve(gram, x.T @ rows[:, j] + l2_towards * towards[others, j])
    return weights


def _unknown_last(dense, unknown):
    dense = dense.copy()
    dense[:, unknown] = 0
    dense[:, unknown] = dense.min(1, keepdims=True)
    return dense


SHAPES = pytest.mark.parametrize(("n_users", "n_items"), [(60, 25), (25, 60), (40, 40)])


@SHAPES
@pytest.mark.parametrize("l2", [1.0, 50.0])
def test_ease_equals_its_definition(n_users, n_items, l2):
    history, seen = _random(n_users, n_items, 0.3)
    expected = history @ _ridge_without_self(history, l2, np.zeros((n_items, n_items)), 0)
    np.testing.assert_allclose(scores(ease(seen, l2=l2), n_users), _unknown_last(expected, [0]), rtol=0, atol=2e-5)


@SHAPES
def test_large_inverses_go_by_blocks(n_users, n_items, monkeypatch):
    history, seen = _random(n_users, n_items, 0.3)
    expected = history @ _ridge_without_self(history, 20.0, np.zeros((n_items, n_items)), 0)
    monkeypatch.setattr(linear, "WHOLE", 7)  # three levels of blocks, of odd sizes too
    monkeypatch.setattr(linear, "BLOCK", 60)
    np.testing.assert_allclose(scores(ease(seen, l2=20.0), n_users), _unknown_last(expected, [0]), rtol=0, atol=2e-5)
    with pytest.raises(ValueError, match="too small for an inverse in float32"):
        ease(seen, l2=1e-9)


@SHAPES
@pytest.mark.parametrize("l2_text", [3.0, 100.0])
def test_text_ease_equals_its_definition(n_users, n_items, l2_text):
    history, seen = _random(n_users, n_items, 0.3)
    words = seen.require_item_text("this test").astype(np.float64)
    towards = _ridge_without_self(words.T, 2.0, np.zeros((n_items, n_items)), 0)
    expected = history @ _ridge_without_self(history, 5.0, towards, l2_text)
    assert np.abs(expected[:, 0]).max() > 0.01  # nobody's item, and yet scored
    got = scores(text_ease(seen, l2=5.0, l2_text=l2_text, l2_words=2.0), n_users)
    np.testing.assert_allclose(got, expected, rtol=0, atol=5e-5)


def test_text_ease_by_hand():
    """Two items: S_01 = t0 t1 / (t1 t1 + 1) = 0.6 / 2; B_01 = (x0 x1 + 4 S_01) / (x0 x0 + 2 + 4) = 2.2 / 8."""
    words = np.array([[1, 0], [0.6, 0.8]], np.float32)
    seen = Interactions(np.array([0, 1, 1]), np.array([0, 0, 1]), 2, 2, None, words)
    expected = [[0, 2.2 / 8], [2.2 / 7, 2.2 / 8]]  # B_10 = (1 + 4 * 0.3) / (1 + 2 + 4)
    np.testing.assert_allclose(scores(text_ease(seen, l2=2.0, l2_text=4.0, l2_words=1.0), 2), expected, rtol=1e-5)


@SHAPES
def test_text_ease_without_weight_is_ease(n_users, n_items):
    _, seen = _random(n_users, n_items, 0.3)
    expected = scores(ease(seen, l2=10.0), n_users)
    got = scores(text_ease(seen, l2=10.0, l2_text=0.0, l2_words=2.0), n_users)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6)


def _all(seen):
    yield ease(seen, l2=10.0)
    yield text_ease(seen, l2=10.0, l2_text=30.0, l2_words=2.0)
    yield gf_cf(seen, rank=7, alpha=0.5)
    yield gf_cf(seen, rank=1000, alpha=0.5)


def test_both_forms_agree():
    """Users without history change nothing but which form is the smaller."""
    _, seen = _random(80, 200, 0.1)
    for by_users, by_items in zip(_all(seen), _all(seen._replace(n_users=201)), strict=True):
        by_items = scores(by_items, 201)
        np.testing.assert_allclose(scores(by_users, 80), by_items[:80], rtol=0, atol=2e-5)
        assert (by_items[80:] == 0).all()


@SHAPES
def test_items_may_stand_in_any_order(n_users, n_items):
    _, seen = _random(n_users, n_items, 0.3)
    order = np.random.default_rng(1).permutation(n_items)  # new position of each item
    words = np.zeros((n_items, 6), np.float32)
    words[order] = seen.require_item_text("this test")
    moved = seen._replace(item=order[seen.item], item_text=words)
    for before, after in zip(_all(seen), _all(moved), strict=True):
        np.testing.assert_allclose(scores(after, n_users)[:, order], scores(before, n_users), rtol=0, atol=2e-5)


@pytest.mark.parametrize("n_users", [3, 9])
def test_new_items_rank_by_their_words(n_users):
    """Items 0, 1 and 2 are held; 3 has the words of 0, 4 those of 1, and 5 those of nothing. User 2 has no history."""
    words = np.eye(4, dtype=np.float32)[[0, 1, 2, 0, 1, 3]]
    words[:, 3] += 0.3
    words /= np.linalg.norm(words, axis=1, keepdims=True)
    seen = Interactions(np.array([0, 0, 1]), np.array([0, 2, 1]), n_users, 6, None, words)
    got = scores(text_ease(seen, l2=1.0, l2_text=1.0, l2_words=1.0), n_users)[:, 3:]
    np.testing.assert_array_equal(got[:3].argmax(1), [0, 1, 0])
    assert got[0, 0] > 0.05 + got[0, 1] and got[1, 1] > 0.05 + got[1, 0]
    assert (got[2] == 0).all()


def test_items_without_interactions_or_words_come_last():
    _, seen = _random(40, 30, 0.3)
    seen = seen._replace(item=np.where(seen.item == 29, 1, seen.item))  # nobody has 0 and 29; 29 has no words either
    lowest = [scores(scorer, 40) for scorer in _all(seen)]
    assert (lowest[0].min(1) < -0.01).any()  # 0, as the formula has it, would not be the last place
    for got in lowest:
        np.testing.assert_array_equal(got[:, 29], got.min(1))


def _filtered(history, rank, alpha):
    """Both filters from the eigenvectors of the items' normalised co-occurrence."""
    of_user, of_item = np.maximum(history.sum(1), 1), np.maximum(history.sum(0), 1)
    normal = history / np.sqrt(np.outer(of_user, of_item))
    values, vectors = np.linalg.eigh(normal.T @ normal)
    vectors = vectors[:, np.argsort(-values)[: min(rank, (values > 1e-12).sum())]]
    low_pass = vectors @ vectors.T * np.sqrt(of_item)[None, :] / np.sqrt(of_item)[:, None]
    return history @ (normal.T @ normal + alpha * low_pass)


@SHAPES
@pytest.mark.parametrize("rank", [1, 8, 23, 24, 25, 500])
def test_gf_cf_equals_its_definition(n_users, n_items, rank):
    history, seen = _random(n_users, n_items, 0.3)
    expected = _unknown_last(_filtered(history, rank, 0.7), [0])
    np.testing.assert_allclose(scores(gf_cf(seen, rank=rank, alpha=0.7), n_users), expected, rtol=0, atol=1e-5)


def test_gf_cf_of_many_users_and_items_is_nearly_the_same(monkeypatch):
    history, seen = _random(300, 200, 0.3)
    expected = _unknown_last(_filtered(history, 8, 0.7), [0])
    monkeypatch.setattr(linear, "EXACT", 100)
    np.testing.assert_allclose(scores(gf_cf(seen, rank=8, alpha=0.7), 300), expected, rtol=0, atol=2e-4)


def test_gf_cf_by_hand():
    """One user with two items: R is [1/sqrt 2, 1/sqrt 2], R'R and V V' are 1/2 everywhere, the scores 1 + alpha."""
    seen = Interactions(np.array([0, 0]), np.array([0, 1]), 1, 2)
    np.testing.assert_allclose(scores(gf_cf(seen, rank=1, alpha=0.5), 1), [[1.5, 1.5]], rtol=1e-6)


def test_gf_cf_repeats_itself_where_singular_values_are_equal():
    """Ten pairs of users and items, all alike: which 3 of 10 directions pass is arbitrary, and yet always the same."""
    seen = Interactions(np.arange(10), np.arange(10), 10, 10)
    first, again = (scores(gf_cf(seen, rank=3, alpha=1.0), 10) for _ in range(2))
    np.testing.assert_array_equal(first, again)


NONE = np.array([], int)


@pytest.mark.parametrize("n_users", [3, 5])
def test_without_interactions_all_score_alike(n_users):
    words = np.eye(5, dtype=np.float32)
    for scorer in _all(Interactions(NONE, NONE, n_users, 5, None, words)):
        np.testing.assert_array_equal(scores(scorer, n_users), np.zeros((n_users, 5)))


SQUARE = Interactions(np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1]), 3, 2)  # X'X is [[2, 2], [2, 2]], singular
WIDE = Interactions(np.array([0, 0, 1, 1]), np.array([0, 1, 0, 2]), 2, 3)  # X X' is [[2, 1], [1, 2]]
WORDY = SQUARE._replace(item_text=np.eye(2, dtype=np.float32))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ease(SQUARE, l2=0.0), "l2 is 0.0"),
        (lambda: ease(SQUARE, l2=3e-5), "l2 is 3e-05, .* at least 4e-05"),
        (lambda: ease(WIDE, l2=2e-5), "l2 is 2e-05, .* at least 3e-05"),
        (lambda: text_ease(WORDY, l2=0.0, l2_text=1.0, l2_words=1.0), "l2 is 0.0"),
        (lambda: text_ease(WORDY, l2=1.0, l2_text=-1.0, l2_words=1.0), "l2_text is -1.0"),
        (lambda: text_ease(WORDY, l2=1.0, l2_text=1.0, l2_words=0.0), "l2_words is 0.0"),
        (lambda: gf_cf(SQUARE, rank=0, alpha=1.0), "rank is 0"),
        (lambda: gf_cf(SQUARE, rank=1, alpha=-1.0), "alpha is -1.0"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_text_ease_asks_for_words():
    with pytest.raises(NotApplicableError, match="text_ease needs text of items"):
        text_ease(SQUARE, l2=1.0, l2_text=1.0, l2_words=1.0)
