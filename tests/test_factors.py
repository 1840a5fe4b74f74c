"""Closed-form recommenders as bilinear forms, against the full methods and their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.sparse import csr_matrix

from fused_rec.baselines import factors
from fused_rec.baselines.linear import ease, gf_cf, text_ease
from fused_rec.baselines.neighbors import Interactions, NotApplicableError, item_knn

SHAPES = pytest.mark.parametrize(("n_users", "n_items"), [(60, 25), (25, 60), (40, 40)])


def _random(n_users, n_items, share, dims=6):
    """Interactions with every item but the first, and unit text vectors of all items but the last."""
    rng = np.random.default_rng(0)
    history = rng.random((n_users, n_items)) < share
    history[rng.integers(n_users, size=n_items), np.arange(n_items)] = True
    history[:, 0] = False
    text = rng.normal(size=(n_items, dims)).astype(np.float32)
    text /= np.linalg.norm(text, axis=1, keepdims=True)
    text[-1] = 0
    user, item = np.nonzero(history)
    return history, Interactions(user, item, n_users, n_items, None, text)


def _unseen(history, found, full, without=()):
    """Scores of the factors and of the full method, of the items that the user has not interacted with."""
    unseen = ~history
    unseen[:, list(without)] = False
    scores = (history @ found.source) @ found.target.T
    expected = np.asarray(jax.jit(full)(jnp.arange(len(history), dtype=jnp.int32)))
    return scores[unseen], expected[unseen]


@SHAPES
@pytest.mark.parametrize("l2", [1.0, 50.0])
def test_all_directions_give_ease(n_users, n_items, l2):
    history, interactions = _random(n_users, n_items, 0.3)
    found = factors.ease_factors(factors.singular_vectors(interactions, 1000), l2=l2)
    assert found.source.dtype == found.target.dtype == np.float32
    np.testing.assert_allclose(*_unseen(history, found, ease(interactions, l2=l2), without=[0]), rtol=0, atol=2e-5)
    assert np.abs(found.source[0]).max() < 1e-6  # nobody has item 0


@SHAPES
@pytest.mark.parametrize(("l2", "l2_text", "l2_words"), [(1.0, 5.0, 2.0), (50.0, 0.5, 1.0), (5.0, 100.0, 10.0)])
def test_all_directions_give_text_ease(n_users, n_items, l2, l2_text, l2_words):
    history, interactions = _random(n_users, n_items, 0.3)
    penalties = {"l2": l2, "l2_text": l2_text, "l2_words": l2_words}
    singular, text = factors.singular_vectors(interactions, 1000), interactions.require_item_text("text_ease")
    found = factors.text_ease_factors(singular, factors.text_directions(singular, text), **penalties)
    scores, expected = _unseen(history, found, text_ease(interactions, **penalties))
    np.testing.assert_allclose(scores, expected, rtol=0, atol=5e-5)


@SHAPES
@pytest.mark.parametrize(("rank", "alpha"), [(4, 0.3), (20, 2.0)])
def test_all_directions_give_gf_cf(n_users, n_items, rank, alpha):
    history, interactions = _random(n_users, n_items, 0.3)
    found = factors.gf_cf_factors(*factors.Evidence(interactions).normalized, rank=rank, alpha=alpha)
    full = gf_cf(interactions, rank=rank, alpha=alpha)
    np.testing.assert_allclose(*_unseen(history, found, full, without=[0]), rtol=0, atol=2e-5)


@SHAPES
@pytest.mark.parametrize(("num_neighbors", "shrink"), [(3, 0.0), (8, 10.0)])
def test_a_column_per_item_gives_item_knn(n_users, n_items, num_neighbors, shrink):
    history, interactions = _random(n_users, n_items, 0.3)
    settings = {"num_neighbors": num_neighbors, "shrink": shrink}
    found = factors.item_knn_factors(interactions, **settings)
    assert found.source.dtype == found.target.dtype == np.float32
    scores, expected = _unseen(history, found, item_knn(interactions, **settings))
    np.testing.assert_allclose(scores, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("n_users", "n_items", "few"), [(10, 2048, True), (10, 2049, False), (10**6, 400, False)])
def test_item_knn_is_for_catalogs_of_few_items(n_users, n_items, few):
    """A million users have a column for each of 387 items: (U + I) R^2 is at most 1.5e11."""
    none = np.zeros(0, np.int32)
    assert factors.Evidence(Interactions(none, none, n_users, n_items)).few_items is few


def test_few_directions_are_the_largest():
    """Of 200, which fall slowly here: what is left out is little more than with the exact directions."""
    history, interactions = _random(300, 200, 0.3)
    values, right = factors.singular_vectors(interactions, 100)
    _, singular, exact = np.linalg.svd(history, full_matrices=False)
    np.testing.assert_allclose(values, singular[:100], rtol=1e-9)
    np.testing.assert_allclose(np.abs((right * exact[:100].T).sum(0)), 1, atol=1e-6)


def test_subspace_iteration_is_near_the_exact_directions(monkeypatch):
    history, interactions = _random(300, 200, 0.3)
    monkeypatch.setattr(factors, "EXACT", 100)
    found = factors.singular_vectors(interactions, 100)
    _, singular, right = np.linalg.svd(history, full_matrices=False)
    whole = (right.T * singular**2) @ right
    error = np.linalg.norm((found.right * found.values**2) @ found.right.T - whole)
    best = np.linalg.norm((right[:100].T * singular[:100] ** 2) @ right[:100] - whole)
    assert 1 <= error / best < 1.01
    again = factors.singular_vectors(interactions, 100)
    np.testing.assert_array_equal(found.right, again.right)


def test_penalties_too_small_for_float32_are_refused():
    _, interactions = _random(3000, 20, 0.5)
    singular = factors.singular_vectors(interactions, 20)
    assert np.isfinite(factors.ease_factors(singular, l2=1.0).target).all()
    with pytest.raises(NotApplicableError, match=r"l2 is 0.01: .* must be at least 0.0001; raise it"):
        factors.ease_factors(singular, l2=0.01)


def test_text_mean_is_what_it_says():
    history, interactions = _random(30, 20, 0.3)
    text = interactions.require_item_text("text_mean")
    found = factors.text_mean_factors(text)
    expected = (history @ text) @ text.T
    np.testing.assert_allclose((history @ found.source) @ found.target.T, expected, atol=1e-5)


def test_all_directions_give_ease_and_the_items_of_friends():
    """EASE plus the degree-normalized rows of friends, by the dense formula; user 3 has no items."""
    history, _ = _random(30, 20, 0.3)
    history[3] = False
    user, item = np.nonzero(history)
    interactions = Interactions(user, item, 30, 20)
    found = factors.social_ease_factors(interactions, factors.singular_vectors(interactions, 1000), l2=5.0, weight=0.7)
    assert found.friends is not None
    assert found.source.dtype == found.target.dtype == found.friends.dtype == np.float32
    own = found.source.shape[1]
    ease_alone = factors.ease_factors(factors.singular_vectors(interactions, 1000), l2=5.0)
    np.testing.assert_array_equal(found.source, ease_alone.source)
    np.testing.assert_array_equal(found.target[:, :own], ease_alone.target)
    of_user, of_item = (np.maximum(history.sum(axis, keepdims=True), 1) for axis in (1, 0))
    expected = 0.7 * history / (of_user**0.5 * of_item**0.25)
    np.testing.assert_allclose(found.friends @ found.target[:, own:].T, expected, atol=1e-5)


def test_friends_mean_is_the_history_of_friends():
    history, interactions = _random(30, 20, 0.3)
    found = factors.friends_mean_factors(interactions, factors.singular_vectors(interactions, 1000))
    assert found.friends is not None
    assert found.source.shape == (20, 0)
    np.testing.assert_allclose(found.friends @ found.target.T, history, atol=1e-5)


def test_friends_have_few_directions(monkeypatch):
    _, interactions = _random(30, 20, 0.3)
    monkeypatch.setattr(factors, "FRIENDS_RANK", 4)
    found = factors.social_ease_factors(interactions, factors.singular_vectors(interactions, 1000), l2=5.0, weight=1.0)
    assert found.friends is not None
    assert found.friends.shape == (30, 4)
    assert found.target.shape[1] == found.source.shape[1] + 4


def _terms(n_items, n_terms):
    """TF-IDF rows of items, of which the last has no term."""
    rng = np.random.default_rng(1)
    rows = rng.random((n_items, n_terms)) * (rng.random((n_items, n_terms)) < 0.3)
    rows[-1] = 0
    return csr_matrix(rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9))


def test_tfidf_mean_is_the_similarity_of_terms():
    history, interactions = _random(30, 20, 0.3)
    rows = _terms(20, 50)
    found = factors.COMPONENTS["tfidf_mean"].make(factors.Evidence(interactions._replace(item_terms=rows)))
    expected = history @ (rows @ rows.T).toarray()
    np.testing.assert_allclose((history @ found.source) @ found.target.T, expected, atol=1e-5)
    assert found.text_columns == found.target.shape[1] == 50


@pytest.mark.parametrize("settings", factors.COMPONENTS["term_ease"].grid)
def test_term_ease_is_text_ease_over_all_terms(settings):
    history, interactions = _random(40, 30, 0.3)
    rows = _terms(30, 50)
    found = factors.COMPONENTS["term_ease"].make(factors.Evidence(interactions._replace(item_terms=rows)), **settings)
    terms = interactions._replace(item_text=rows.toarray().astype(np.float32))
    scores, expected = _unseen(history, found, text_ease(terms, **settings))
    np.testing.assert_allclose(scores, expected, rtol=0, atol=5e-5)
    assert found.text_columns == np.linalg.matrix_rank(rows.toarray()) == 29


def test_the_largest_terms_have_columns_of_their_own():
    rows = _terms(200, 50)
    found = factors.term_rows(rows, 30)
    dense = rows.toarray()
    order = np.argsort(-(dense**2).sum(0), kind="stable")
    np.testing.assert_allclose(found[:, :15], dense[:, order[:15]], atol=1e-6)
    assert found.shape == (200, 30)
    for place in range(15):  # of the others, the terms 0, 15 and 30 share a column, the terms 1, 16 and 31, ...
        shared = dense[:, order[15:][place::15]]
        signs, *_ = np.linalg.lstsq(shared, found[:, 15 + place], rcond=None)
        np.testing.assert_allclose(np.abs(signs), 1, atol=1e-5)
        np.testing.assert_allclose(shared @ signs, found[:, 15 + place], atol=1e-5)


def test_shared_columns_keep_inner_products_on_average(monkeypatch):
    rows, found = _terms(30, 400)[:-1], []
    draws = np.random.default_rng(0)
    monkeypatch.setattr(factors, "numpy_rng", lambda *_: draws)
    for _ in range(200):
        made = factors.term_rows(rows, 100)
        found.append(made @ made.T - (rows @ rows.T).toarray())
    assert np.std(found) < 50**-0.5  # of 50 shared columns
    assert np.abs(np.mean(found, axis=0)).max() < 4 * np.std(found, axis=0).max() / 200**0.5


@pytest.mark.parametrize("rows", [None, csr_matrix((20, 0)), csr_matrix((20, 7))])
def test_without_terms_there_is_no_tfidf_mean(rows):
    evidence = factors.Evidence(_random(30, 20, 0.3)[1]._replace(item_terms=rows))
    assert not evidence.has("item_terms") and evidence.has("item_text")


@pytest.mark.parametrize(
    ("n_users", "n_items", "rank"),
    [(100, 50, 50), (8_000, 26_000, 2048), (300_000, 200_000, 547), (10**7, 10**6, 116), (10**9, 10**8, 64)],
)
def test_the_rank_falls_with_the_number_of_nodes(n_users, n_items, rank):
    assert factors.default_rank(n_users, n_items) == rank
