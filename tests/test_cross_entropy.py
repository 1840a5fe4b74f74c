"""The cross-entropy and its written-out derivative against automatic differentiation, in one block and in several."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fused_rec.model import cross_entropy as module
from fused_rec.model.cross_entropy import Targets, cross_entropy

USERS, POSITIVES, ITEMS, WIDTH, TEMPERATURE = 7, 4, 50, 5, 0.3


def case(dtype=jnp.float32):
    """Embeddings and targets: an item twice among the positives of a user, padding, items that do not count."""
    rng = np.random.default_rng(0)
    user, catalogue = (jnp.asarray(rng.normal(size=(n, WIDTH)), dtype) for n in (USERS, ITEMS))
    items = rng.integers(1, ITEMS, (USERS, POSITIVES))
    items[0, :2], items[1, 2:] = 9, 0
    weight = rng.random((USERS, POSITIVES))
    weight[1, 2:], weight[3] = 0, 0
    counted = np.arange(ITEMS) % 6 > 0
    items[~counted[items]] = 1
    bias = jnp.asarray(np.where(counted, rng.normal(size=ITEMS), -np.inf), jnp.float32)
    return user, catalogue, Targets(jnp.asarray(items), jnp.asarray(weight, jnp.float32), bias)


def plain(user, catalogue, targets):
    logits = user.astype(jnp.float32) @ catalogue.astype(jnp.float32).T / TEMPERATURE + targets.bias[None, :]
    positive = jnp.where(targets.weight > 0, jnp.take_along_axis(logits, targets.items, 1), 0)
    return (targets.weight * (jax.nn.logsumexp(logits, axis=1)[:, None] - positive)).sum()


def ours(user, catalogue, targets):
    return cross_entropy(TEMPERATURE, user, catalogue, targets)


@pytest.mark.parametrize("most", [1, 3 * ITEMS, 1 << 20])
def test_values_and_derivatives(monkeypatch, most):
    """Blocks of one user, of three with padding, and all users at once."""
    monkeypatch.setattr(module, "CPU_LOGITS", most)
    monkeypatch.setattr(module, "LOGITS", most)
    arguments = case()
    expected, slopes = jax.value_and_grad(plain, (0, 1))(*arguments)
    assert float(ours(*arguments)) == pytest.approx(float(expected), rel=1e-6)
    found, by = jax.jit(jax.value_and_grad(ours, (0, 1)))(*arguments)
    assert float(found) == pytest.approx(float(expected), rel=1e-6)
    for one, other in zip(by, slopes, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_a_factor_of_the_loss_is_one_of_the_derivative():
    user, catalogue, targets = case()
    one = jax.grad(lambda user: 3 * jnp.asarray(ours(user, catalogue, targets)))(user)
    np.testing.assert_allclose(one, 3 * jax.grad(lambda user: ours(user, catalogue, targets))(user), rtol=1e-6)


def test_derivatives_have_the_type_of_the_embeddings():
    user, catalogue, targets = case(jnp.bfloat16)
    by = jax.grad(ours, (0, 1))(user, catalogue, targets)
    assert {part.dtype for part in by} == {jnp.dtype(jnp.bfloat16)}
    for one, other in zip(by, jax.grad(plain, (0, 1))(user, catalogue, targets), strict=True):
        np.testing.assert_allclose(*(np.asarray(part, np.float32) for part in (one, other)), rtol=0.01, atol=0.03)
