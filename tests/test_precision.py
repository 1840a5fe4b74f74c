"""Products of bfloat16: what is exact there, what float32 sums must keep, and what is rounded."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fused_rec import kernels
from fused_rec.model.precision import _tile_product, matmul_f32, product_in

ONES = jnp.ones((2, 4096), jnp.bfloat16)  # a sum in bfloat16 would stay at 256: 256 + 1 is no number of it


def test_sums_are_float32_both_ways():
    assert matmul_f32(ONES, ONES.T).dtype == jnp.float32
    assert matmul_f32(ONES, ONES.T).tolist() == [[4096, 4096], [4096, 4096]]
    by_a, by_b = jax.grad(lambda a, b: matmul_f32(a.T, b).sum(), (0, 1))(ONES[:1].T, ONES[:1].T)
    assert {by_a.dtype, by_b.dtype} == {jnp.dtype(jnp.bfloat16)}
    tall = jnp.ones((4096, 1), jnp.bfloat16)
    by_a, by_b = jax.grad(lambda a, b: matmul_f32(a, b).sum(), (0, 1))(tall, jnp.ones((1, 4096), jnp.bfloat16))
    assert set(by_a.ravel().tolist()) == set(by_b.ravel().tolist()) == {4096.0}


def test_a_derivative_is_multiplied_in_the_type_of_the_factors():
    def loss(a, b):
        return (matmul_f32(a, b) ** 2).sum()

    shapes = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((3, 5), (5, 7))]
    program = jax.jit(jax.grad(loss, (0, 1))).lower(*shapes).as_text()
    products = [line for line in program.splitlines() if "dot_general" in line]
    assert len(products) == 3
    assert all("xbf16>" in line and "-> tensor<" in line and "xf32>" in line for line in products)
    assert not any("xf32>," in line for line in products), products  # no factor is float32


def test_of_float32_it_is_the_product_and_its_derivative():
    a, b = (jax.random.normal(jax.random.key(seed), shape) for seed, shape in enumerate(((3, 5), (5, 7))))
    weight = jnp.arange(21.0).reshape(3, 7)
    ours = jax.grad(lambda a, b: (matmul_f32(a, b) * weight).sum(), (0, 1))(a, b)
    theirs = jax.grad(lambda a, b: ((a @ b) * weight).sum(), (0, 1))(a, b)
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)


def rounded(x):
    return np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64)


needs_tiles = pytest.mark.skipif(not kernels.has_tiles(), reason="this processor has no AMX, or no kernel was compiled")


@needs_tiles
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 3, 2), (33, 65, 17), (300, 40, 9), (2100, 64, 128), (1025, 70, 33)])
def test_tiles_multiply_what_was_rounded_to_bfloat16(shape, dtype):
    n, m, k = shape
    rng = np.random.default_rng(n)
    a, b, g = (jnp.asarray(rng.normal(size=of), dtype) for of in ((n, m), (m, k), (n, k)))
    for found, expected in (
        (_tile_product(a, b, False), rounded(a) @ rounded(b)),
        (_tile_product(a, g, True), rounded(a).T @ rounded(g)),
    ):
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, expected, atol=3e-6 * np.abs(expected).max())


@needs_tiles
def test_tiles_refuse_matrices_that_do_not_fit():
    for a, b, over_rows in (((3, 4), (5, 2), False), ((3, 4), (4, 2), True)):
        with pytest.raises(jax.errors.JaxRuntimeError, match="fitting shapes"):
            jax.block_until_ready(_tile_product(jnp.zeros(a), jnp.zeros(b), over_rows))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tiles", [False, pytest.param(True, marks=needs_tiles)])
def test_products_of_a_type_and_their_derivatives(monkeypatch, tiles, dtype):
    monkeypatch.setattr(kernels, "has_tiles", lambda: tiles)
    a, b = (jax.random.normal(jax.random.key(seed), shape) for seed, shape in enumerate(((50, 33), (33, 20))))
    weight = jax.random.normal(jax.random.key(2), (50, 20))
    of: Any = rounded if dtype == "bfloat16" else np.float64
    np.testing.assert_allclose(product_in(dtype, a, b), of(a) @ of(b), atol=1e-5)
    by_a, by_b = jax.jit(jax.grad(lambda a, b: (product_in(dtype, a, b) * weight).sum(), (0, 1)))(a, b)
    share = 2**-8 if dtype == "bfloat16" else 0  # plain JAX rounds derivatives to bfloat16
    np.testing.assert_allclose(by_a, of(weight) @ of(b).T, rtol=share, atol=2e-5)
    np.testing.assert_allclose(by_b, of(a).T @ of(weight), rtol=share, atol=2e-5)


@needs_tiles
@pytest.mark.parametrize("shapes", [((0, 3), (3, 2)), ((4, 0), (0, 2))])
def test_empty_factors_have_derivatives(shapes):
    a, b = (jnp.ones(shape) for shape in shapes)
    by_a, by_b = jax.grad(lambda a, b: product_in("bfloat16", a, b).sum(), (0, 1))(a, b)
    assert (by_a.shape, by_b.shape) == shapes and not by_b.any()
