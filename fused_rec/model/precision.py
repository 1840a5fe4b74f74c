"""Dense products of narrow numbers, such as bfloat16, with sums in float32 both ways."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32


@jax.custom_vjp
def matmul_f32(a: Float[Array, "n m"], b: Float[Array, "m k"]) -> Float32[Array, "n k"]:
    """a @ b of two matrices of one type, which the derivative is rounded to before it is multiplied in its turn.

    JAX's own derivative would multiply float32 by the narrow type, which no accelerator does at the narrow type's
    speed.
    """
    return jnp.matmul(a, b, preferred_element_type=jnp.float32)


def _forward(a: Array, b: Array) -> tuple[Array, tuple[Array, Array]]:
    return matmul_f32(a, b), (a, b)


def _backward(residuals: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    a, b = residuals
    g = g.astype(a.dtype)
    return matmul_f32(g, b.T).astype(a.dtype), matmul_f32(a.T, g).astype(b.dtype)


matmul_f32.defvjp(_forward, _backward)
