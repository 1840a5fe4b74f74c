"""Products of bfloat16: what is exact there, what float32 sums must keep, and what is rounded."""

import jax
import jax.numpy as jnp
import numpy as np

from fused_rec.model.precision import matmul_f32

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
