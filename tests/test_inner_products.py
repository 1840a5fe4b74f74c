"""Every baseline as inner products of vectors, on more users than items and on fewer."""

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse

from fused_rec.baselines import inner_products
from fused_rec.baselines.inner_products import baseline_vectors
from fused_rec.baselines.neighbors import Interactions
from fused_rec.baselines.registry import BASELINES


def interactions(n_users: int, n_items: int) -> Interactions:
    """Of which the last user has no interaction, and the last item neither that nor text."""
    rng = np.random.default_rng(0)
    held = rng.random((n_users, n_items)) < 0.3
    held[-1], held[:, -1] = False, False
    user, item = np.nonzero(held)
    texts = [rng.normal(size=(n, 5)).astype(np.float32) for n in (n_users, n_items)]
    texts[1][-1] = 0
    of_user, of_item = (rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-6) for rows in texts)
    ties = rng.integers(0, n_users, (2, 12))
    age = rng.random(len(user)).astype(np.float32)
    terms = scipy.sparse.csr_matrix(np.abs(of_item))
    return Interactions(user, item, n_users, n_items, of_user, of_item, *ties, age=age, item_terms=terms)


@pytest.mark.parametrize("sides", [(12, 7), (7, 12)])
@pytest.mark.parametrize("name", BASELINES)
def test_products_are_the_scores(name, sides):
    if name == "als":
        pytest.importorskip("implicit", reason="the extra als is not installed")
    scorer = BASELINES[name].fit(interactions(*sides), **BASELINES[name].grid[-1])
    expected = np.asarray(scorer(jnp.arange(sides[0])))
    users, items = baseline_vectors(name, scorer, sides[0])
    assert users.dtype == items.dtype == np.float32 and np.ptp(expected) > 0
    np.testing.assert_allclose(users @ items.T, expected, rtol=1e-4, atol=1e-6)


def test_vectors_that_are_too_wide_are_refused(monkeypatch):
    monkeypatch.setattr(inner_products, "MAX_WIDTH", 6)
    scorer = BASELINES["ease"].fit(interactions(12, 7), l2=10.0)
    with pytest.raises(
        ValueError, match="ease needs vectors of 7 numbers for these tables; at most 6 are exported: rank"
    ):
        baseline_vectors("ease", scorer, 12)
    scorer = BASELINES["popularity"].fit(interactions(12, 7), half_life=0.0)
    assert baseline_vectors("popularity", scorer, 12).users.shape == (12, 1)
