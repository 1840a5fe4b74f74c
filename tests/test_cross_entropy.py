"""The cross-entropy and its written-out derivative against automatic differentiation, in one block and in several."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fused_rec import kernels
from fused_rec.distributed.devices import SHARDED, Shards, pmap_over_devices, shard_rows
from fused_rec.model import cross_entropy as module
from fused_rec.model.cross_entropy import Targets, cross_entropy
from fused_rec.model.precision import product_in

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


needs_tiles = pytest.mark.skipif(not kernels.has_tiles(), reason="this processor has no AMX, or no kernel was compiled")


def large_case(users, positives, items, width):
    """Embeddings in bfloat16: repeated positives, padding at item 0, which does not count, users without positives."""
    rng = np.random.default_rng(users)
    user, catalogue = (jnp.asarray(rng.normal(size=(n, width)) / width**0.25, jnp.bfloat16) for n in (users, items))
    chosen = rng.integers(min(1, items - 1), items, (users, positives))
    chosen[0] = chosen[0, 0]
    weight = rng.random((users, positives)) * (rng.random((users, positives)) < 0.7)
    weight[users // 2] = 0
    counted = np.isin(np.arange(items), chosen) | (np.arange(items) % 6 > 0)
    counted[0] = items == 1
    bias = np.where(counted, rng.normal(size=items), -np.inf)
    chosen[weight == 0] = 0
    return user, catalogue, Targets(*map(jnp.asarray, (np.int32(chosen), np.float32(weight), np.float32(bias))))


def in_float64(user, catalogue, targets):
    """Loss and derivatives; those by logits are rounded to bfloat16 before they are multiplied."""
    x, y = (np.asarray(part, np.float64) for part in (user, catalogue))
    items, weight, bias = map(np.asarray, targets)
    logits = x @ y.T / TEMPERATURE + bias
    highest, whole = logits.max(axis=1, keepdims=True), weight.sum(axis=1, keepdims=True)
    normalizer = highest + np.log(np.exp(logits - highest).sum(axis=1, keepdims=True))
    slope = whole * np.exp(logits - normalizer) / TEMPERATURE
    np.add.at(slope, (np.arange(len(x))[:, None], items), -weight / TEMPERATURE)
    positive = np.where(weight > 0, np.take_along_axis(logits, items, axis=1), 0)
    slope = np.asarray(jnp.asarray(slope, jnp.bfloat16), np.float64)
    return (whole * normalizer).sum() - (weight * positive).sum(), slope @ y, slope.T @ x


@needs_tiles
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (7, 4, 50, 5), (33, 1, 129, 33), (600, 3, 2100, 70), (64, 2, 256, 64)])
def test_the_kernel_computes_what_float64_does(shape):
    """One of everything; widths, users and items that no tile fits; several blocks of each; whole tiles."""
    arguments = large_case(*shape)
    found = jax.jit(lambda *given: module._compiled(TEMPERATURE, *given))(*arguments)
    for one, other in zip(found, in_float64(*arguments), strict=True):
        largest = np.abs(other).max()
        # A slope that lies between two numbers of bfloat16 is sometimes rounded to the other one.
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-3 * largest if one.ndim else 1e-6)
        assert np.abs(np.asarray(one) - other).mean() < 1e-5 * largest + 1e-6


@needs_tiles
@pytest.mark.parametrize("shift", [0, -1000, 1000])
def test_logits_of_any_size_stay_finite(shift):
    """Exponentials that a float32 does not hold, and items that are far below all others."""
    user, catalogue, targets = large_case(40, 2, 300, 32)
    arguments = user * 300, catalogue, targets._replace(bias=targets.bias + shift)
    for one, other in zip(module._compiled(TEMPERATURE, *arguments), in_float64(*arguments), strict=True):
        assert np.isfinite(one).all()
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-3 * np.abs(other).max())


@needs_tiles
def test_a_number_that_is_none_is_not_hidden():
    user, catalogue, targets = large_case(40, 2, 300, 32)
    loss, by_user, by_catalogue = module._compiled(TEMPERATURE, user.at[3, 5].set(jnp.nan), catalogue, targets)
    assert np.isnan(loss) and np.isnan(by_catalogue).all()
    assert np.isnan(by_user).any(axis=1).nonzero()[0].tolist() == [3]


@needs_tiles
def test_the_kernel_refuses_positives_outside_of_the_catalogue():
    user, catalogue, targets = large_case(7, 2, 50, 8)
    far = targets._replace(items=targets.items.at[1, 1].set(50), weight=jnp.ones_like(targets.weight))
    with pytest.raises(jax.errors.JaxRuntimeError, match="positives must be rows of the catalogue"):
        jax.block_until_ready(module._compiled(TEMPERATURE, user, catalogue, far))


@needs_tiles
def test_the_derivative_in_bfloat16_is_the_kernels(monkeypatch):
    arguments = large_case(33, 3, 200, 16)
    kernel = jax.value_and_grad(ours, (0, 1))(*arguments)
    monkeypatch.setattr(kernels, "has_tiles", lambda: False)
    plain_jax = jax.value_and_grad(ours, (0, 1))(*arguments)
    for one, other in zip(jax.tree.leaves(kernel), jax.tree.leaves(plain_jax), strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        np.testing.assert_allclose(np.float32(one), np.float32(other), rtol=0.01, atol=1e-3 * float(abs(other).max()))
    monkeypatch.setattr(kernels, "has_tiles", lambda: True)
    monkeypatch.setattr(module, "_sums", None)  # it is not called
    jax.grad(ours)(*arguments)


@needs_tiles
def test_derivatives_over_two_devices_are_those_of_one():
    """Of a matrix that all devices have, through both kernels; each device has its own half of the users."""
    user, catalogue, targets = large_case(32, 2, 200, 16)
    text, matrix = (jax.random.normal(jax.random.key(seed), shape) for seed, shape in enumerate(((32, 40), (40, 16))))

    def sums(devices: int):
        shards = Shards(devices)

        def mapped(shared, of_user):
            catalogue, bias, matrix = (shards.varying(x) for x in shared)
            user, text, items, weight = of_user

            def loss(matrix):
                embedded = (product_in("bfloat16", text, matrix) + user).astype(jnp.bfloat16)
                return cross_entropy(TEMPERATURE, embedded, catalogue, Targets(items, weight, bias))

            return jax.tree.map(shards.psum, jax.value_and_grad(loss)(matrix))

        call = pmap_over_devices(mapped, devices, in_axes=(None, SHARDED), out_axes=None)
        rows = (np.asarray(x) for x in (user.astype(jnp.float32), text, targets.items, targets.weight))
        return call((catalogue, targets.bias, matrix), tuple(shard_rows(x, devices) for x in rows))

    for one, two in zip(sums(1), sums(2), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-5 * float(np.abs(one).max()))
