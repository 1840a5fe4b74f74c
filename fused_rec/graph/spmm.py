"""Sparse sum over an adjacency: y[v] = sum over edges (u, v) of weight[e] x[u], differentiable.

Three backends compute the same sum. `segment` gathers and adds with `jax.ops.segment_sum`; it is the reference, and
accelerators run it. On a CPU it is many times slower than the other two: `compiled`, kernels/sparse_sum.cc, where the
installation built it, and `csr`, jaxlib's kernel for compressed sparse rows, otherwise. Neither has a fast transpose,
so edges are stored twice, sorted by receiver and by sender, and the derivative runs the same kernel on the second
order.

x may be narrower than float32: `segment` and `compiled` then read less memory, and `csr` widens it first. Weights,
products and sums are float32 in every backend.
"""

import jax
import jax.numpy as jnp
from jax.experimental import sparse
from jaxtyping import Array, Float, Float32

from fused_rec import kernels
from fused_rec.distributed.devices import AnyArray
from fused_rec.graph.adjacency import Adjacency, Backend


def neighbor_sum(
    adjacency: Adjacency, weight: Float32[AnyArray, "E"], x: Float[AnyArray, "sources K"]
) -> Float32[Array, "targets K"]:
    """Sums weighted source rows into each target: y[v] = sum_{e = (u, v)} weight[e] x[u].

    Differentiable in weight and x. The cotangent of y, and the derivative of x, are rounded to the type of x.

    Args:
      adjacency: the edges; no derivative.
      weight: float32 [E], edge weights; those of the adjacency are not sorted again for the derivative.
      x: [sources, K], rows of the source nodes.

    Returns:
      float32 [targets, K]; zeros for a target without edges.
    """
    own = weight is adjacency.weight
    return _neighbor_sum(
        adjacency, weight, adjacency.weight_by_sender if own else adjacency.sorted_by_sender(weight), x
    )


@jax.custom_vjp
def _neighbor_sum(adjacency: Adjacency, weight: AnyArray, by_sender: AnyArray, x: AnyArray) -> Array:
    """`neighbor_sum`; by_sender: the weights in the order by sender, whose derivative is counted as that of weight."""
    return _to_receivers(adjacency, weight, x)


@jax.custom_vjp
def edge_dot(
    adjacency: Adjacency,
    target: Float[AnyArray, "targets K"],
    source: Float[AnyArray, "sources K"],
) -> Float32[Array, "E"]:
    """Computes <target[v], source[u]> for each edge (u, v), the derivative of `neighbor_sum` in its weights.

    Args:
      adjacency: the edges; no derivative.
      target: [targets, K].
      source: [sources, K].

    Returns:
      float32 [E].
    """
    pairs = target[adjacency.receivers], source[adjacency.senders]
    return jnp.einsum("ek,ek->e", *pairs, preferred_element_type=jnp.float32)


def _to_receivers(adjacency: Adjacency, weight: AnyArray, x: AnyArray) -> Array:
    """Sums source rows into receivers."""
    a = adjacency
    if a.backend == "segment":
        return _segment_sum(weight, a.senders, x, a.receivers, len(a.receiver_start) - 1)
    return _row_sum(a.backend, a.receiver_start, a.senders, weight, x)


def _to_senders(adjacency: Adjacency, by_sender: AnyArray, x: AnyArray) -> Array:
    """Sums target rows into senders, over reversed edges; by_sender: their weights in that order."""
    a, weight = adjacency, by_sender
    if a.backend == "segment":
        return _segment_sum(weight, a.receivers_by_sender, x, a.senders[a.by_sender], len(a.sender_start) - 1)
    return _row_sum(a.backend, a.sender_start, a.receivers_by_sender, weight, x)


def _segment_sum(weight: AnyArray, source: AnyArray, x: AnyArray, target: AnyArray, n_targets: int) -> Array:
    return jax.ops.segment_sum(weight[:, None] * x[source], target, n_targets, indices_are_sorted=True)


def _row_sum(backend: Backend, start: AnyArray, source: AnyArray, weight: AnyArray, x: AnyArray) -> Array:
    """Sums rows of x by compressed sparse rows."""
    n_targets = len(start) - 1
    if backend == "compiled":
        kernels.usable()  # registers the kernel in a process that received the adjacency
        call = jax.ffi.ffi_call(kernels.NEIGHBOR_SUM, jax.ShapeDtypeStruct((n_targets, x.shape[1]), jnp.float32))
        return call(start, source, weight, x)
    matrix = sparse.BCSR((jnp.asarray(weight), jnp.asarray(source), jnp.asarray(start)), shape=(n_targets, len(x)))
    return matrix @ x.astype(jnp.float32)


def _sum_forward(adjacency: Adjacency, weight: AnyArray, by_sender: AnyArray, x: AnyArray) -> tuple[Array, tuple]:
    return _to_receivers(adjacency, weight, x), (adjacency, by_sender, x)


def _sum_backward(residuals: tuple, g: Float[AnyArray, "targets K"]) -> tuple:
    adjacency, by_sender, x = residuals
    g = g.astype(x.dtype)
    # XLA removes the derivative of the weights where it is unused.
    return None, edge_dot(adjacency, g, x), None, _to_senders(adjacency, by_sender, g).astype(x.dtype)


def _dot_forward(adjacency: Adjacency, target: AnyArray, source: AnyArray) -> tuple[Array, tuple]:
    return edge_dot(adjacency, target, source), (adjacency, target, source)


def _dot_backward(residuals: tuple, g: Float[AnyArray, "E"]) -> tuple:
    adjacency, target, source = residuals
    d_target, d_source = (
        _to_receivers(adjacency, g, source),
        _to_senders(adjacency, adjacency.sorted_by_sender(g), target),
    )
    return None, d_target.astype(target.dtype), d_source.astype(source.dtype)


_neighbor_sum.defvjp(_sum_forward, _sum_backward)
edge_dot.defvjp(_dot_forward, _dot_backward)
