"""Matrix products in bfloat16 or another narrow type, with sums in float32 in both directions of differentiation."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from fused_rec import kernels
from fused_rec.config import ComputeDtype

FEW_COLUMNS = 16


@jax.custom_vjp
def matmul_f32(a: Float[Array, "n m"], b: Float[Array, "m k"]) -> Float32[Array, "n k"]:
    """Multiplies two matrices of one type with float32 accumulation.

    The cotangent is rounded to the type of the matrices before it is multiplied. JAX's own derivative would multiply
    float32 by the narrow type, which no accelerator does at the narrow type's speed.

    Args:
      a: [n, m].
      b: [m, k], of the type of `a`.

    Returns:
      a @ b, float32 [n, k].
    """
    return jnp.matmul(a, b, preferred_element_type=jnp.float32)


def _forward(a: Array, b: Array) -> tuple[Array, tuple[Array, Array]]:
    return matmul_f32(a, b), (a, b)


def _backward(residuals: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    a, b = residuals
    g = g.astype(a.dtype)
    return matmul_f32(g, b.T).astype(a.dtype), product_over_rows(a, g).astype(b.dtype)


def product_over_rows(a: Float[Array, "n m"], b: Float[Array, "n k"]) -> Float32[Array, "m k"]:
    """Multiplies the transpose of a matrix by another one of few columns, a.T @ b, with float32 sums.

    On a CPU, XLA multiplies such matrices by very few columns at a tenth of its speed. There the narrow one is
    transposed beforehand: (b.T @ a).T. The barriers keep XLA from undoing this. With more columns transposing takes
    longer than it saves.

    Args:
      a: [n, m].
      b: [n, k], of the type of `a`.

    Returns:
      float32 [m, k].
    """
    if jax.default_backend() != "cpu":
        return jnp.matmul(a.T, b, preferred_element_type=jnp.float32)
    if b.shape[1] > FEW_COLUMNS:  # of a narrow type, this product takes twice the time on a CPU
        return jnp.matmul(a.T.astype(jnp.float32), b.astype(jnp.float32))
    apart = jax.lax.optimization_barrier
    return apart(jnp.matmul(apart(b.T), a, preferred_element_type=jnp.float32)).T


matmul_f32.defvjp(_forward, _backward)


def product_in(
    compute_dtype: ComputeDtype, a: Float32[Array, "n m"], b: Float32[Array, "m k"]
) -> Float32[Array, "n k"]:
    """Multiplies two float32 matrices, rounded to a type, with float32 accumulation.

    Args:
      compute_dtype: the type of both factors, and of the cotangent before it is multiplied.
      a: float32 [n, m].
      b: float32 [m, k].

    Returns:
      a @ b, float32 [n, k].
    """
    if compute_dtype == "bfloat16" and kernels.has_tiles():
        return _by_tiles(a, b)
    return matmul_f32(a.astype(compute_dtype), b.astype(compute_dtype))


@jax.custom_vjp
def _by_tiles(a: Array, b: Array) -> Array:
    """The product in bfloat16 by a kernel that rounds while it reads: no rounded copies."""
    return _tile_product(a, b, False)


def _forward_by_tiles(a: Array, b: Array) -> tuple[Array, tuple[Array, Array]]:
    return _by_tiles(a, b), (a, b)


def _backward_by_tiles(residuals: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    a, b = residuals
    return _tile_product(g, b.T, False), _tile_product(a, g, True)  # XLA removes the one that is unused


_by_tiles.defvjp(_forward_by_tiles, _backward_by_tiles)


def _tile_product(a: Array, b: Array, over_rows: bool) -> Array:
    """a @ b, or a.T @ b, of float32 or bfloat16."""
    shape = a.shape[1] if over_rows else a.shape[0], b.shape[1]
    call = jax.ffi.ffi_call(kernels.TILE_PRODUCT, jax.ShapeDtypeStruct(shape, jnp.float32))
    # JAX takes the result of a call for the same on all devices; a term of the factors tells that it is not.
    differs = 0 * (a[:1, :1].sum() + b[:1, :1].sum()).astype(jnp.float32)
    return call(a, b, over_rows=over_rows) + differs
