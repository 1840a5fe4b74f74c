"""Sparse sum over an adjacency: y[v] = sum over edges (u, v) of weight[e] x[u], differentiable.

`gated_sum` has factors of sources and targets too. It does not multiply rows by them beforehand, which would copy all.

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
from jaxtyping import Array, Float, Float32, Int32

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
    return _neighbor_sum(adjacency, weight, _by_sender(adjacency, weight), x)


@jax.custom_vjp
def _neighbor_sum(adjacency: Adjacency, weight: AnyArray, by_sender: AnyArray, x: AnyArray) -> Array:
    """`neighbor_sum`; by_sender: the weights in the order by sender, whose derivative is counted as that of weight."""
    return _to_receivers(adjacency, weight, x)


def gated_sum(
    adjacency: Adjacency,
    weight: Float32[AnyArray, "E"],
    scale: Float32[AnyArray, "sources"],
    gate: Float32[AnyArray, "targets"],
    x: Float[AnyArray, "sources K"],
) -> Float32[Array, "targets K"]:
    """Sums scaled source rows into each target: y[v] = gate[v] sum_{e = (u, v)} weight[e] scale[u] x[u].

    Differentiable in all arrays. The cotangent of y, and the derivative of x, are rounded to the type of x.

    Args:
      adjacency: the edges; no derivative.
      weight: float32 [E], edge weights, in place of those of the adjacency.
      scale: float32 [sources], factors of the source nodes.
      gate: float32 [targets], factors of the target nodes.
      x: [sources, K], rows of the source nodes.

    Returns:
      float32 [targets, K]; zeros for a target without edges.
    """
    return _gated_sum(adjacency, weight, _by_sender(adjacency, weight), scale, gate, x)


@jax.custom_vjp
def _gated_sum(
    adjacency: Adjacency, weight: AnyArray, by_sender: AnyArray, scale: AnyArray, gate: AnyArray, x: AnyArray
) -> Array:
    """`gated_sum`; by_sender: as of `_neighbor_sum`."""
    return jnp.asarray(gate)[:, None] * _to_receivers(adjacency, weight, x, scale)


@jax.custom_vjp
def gated_sum_of(
    adjacency: Adjacency,
    weight: Float32[AnyArray, "E"],
    scale: Float32[AnyArray, "sources"],
    gate: Float32[AnyArray, "B"],
    x: Float[AnyArray, "sources K"],
    rows: Int32[AnyArray, "B"],
) -> Float32[Array, "B K"]:
    """Computes rows of `gated_sum` alone: y[b] = gate[b] sum_{e = (u, rows[b])} weight[e] scale[u] x[u].

    With the compiled kernels both passes read the edges of these rows only.

    Args:
      adjacency: as of `gated_sum`.
      weight: as of `gated_sum`.
      scale: as of `gated_sum`.
      gate: float32 [B], factors of these target nodes.
      x: as of `gated_sum`.
      rows: int32 [B], target nodes, which may be repeated; no derivative.

    Returns:
      float32 [B, K].
    """
    return jnp.asarray(gate)[:, None] * _sums_of(adjacency, weight, scale, x, rows)


def _sums_of(adjacency: Adjacency, weight: AnyArray, scale: AnyArray, x: AnyArray, rows: AnyArray) -> Array:
    """Sums source rows, times `scale`, into some receivers."""
    a = adjacency
    if a.backend != "compiled":
        return _to_receivers(a, weight, x, scale)[rows]
    kernels.usable()
    call = jax.ffi.ffi_call(kernels.NEIGHBOR_SUM_OF, jax.ShapeDtypeStruct((len(rows), x.shape[1]), jnp.float32))
    return call(a.receiver_start, a.senders, weight, scale, x, rows)


def _from_some(adjacency: Adjacency, weight: AnyArray, y: AnyArray, rows: AnyArray) -> Array:
    """Sums float32 rows of some receivers into their senders, over reversed edges."""
    a, n_sources = adjacency, len(adjacency.sender_start) - 1
    if a.backend != "compiled":
        return _to_senders(a, _by_sender(a, weight), _scattered(a, y, rows))
    kernels.usable()
    call = jax.ffi.ffi_call(kernels.SPREAD_FROM, jax.ShapeDtypeStruct((n_sources, y.shape[1]), jnp.float32))
    return call(a.receiver_start, a.senders, weight, y, rows)


def _scattered(adjacency: Adjacency, y: AnyArray, rows: AnyArray) -> Array:
    """Adds rows of some receivers to zeros of all."""
    return jnp.zeros((len(adjacency.receiver_start) - 1, y.shape[1])).at[rows].add(y)


def _by_sender(adjacency: Adjacency, weight: AnyArray) -> AnyArray:
    """Weights in the order by sender; those of the adjacency are there already."""
    return adjacency.weight_by_sender if weight is adjacency.weight else adjacency.sorted_by_sender(weight)


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


def _to_receivers(adjacency: Adjacency, weight: AnyArray, x: AnyArray, scale: AnyArray | None = None) -> Array:
    """Sums source rows, times `scale`, into receivers."""
    a = adjacency
    if a.backend == "segment":
        return _segment_sum(_scaled(weight, scale, a.senders), a.senders, x, a.receivers, len(a.receiver_start) - 1)
    return _row_sum(a.backend, a.receiver_start, a.senders, weight, scale, x)


def _to_senders(adjacency: Adjacency, by_sender: AnyArray, x: AnyArray, scale: AnyArray | None = None) -> Array:
    """Sums target rows, times `scale`, into senders, over reversed edges; by_sender: their weights in that order."""
    a = adjacency
    if a.backend == "segment":
        weight, targets = _scaled(by_sender, scale, a.receivers_by_sender), a.senders[a.by_sender]
        return _segment_sum(weight, a.receivers_by_sender, x, targets, len(a.sender_start) - 1)
    return _row_sum(a.backend, a.sender_start, a.receivers_by_sender, by_sender, scale, x)


def _scaled(weight: AnyArray, scale: AnyArray | None, source: AnyArray) -> AnyArray:
    """Weights of edges times the factors of their sources; None: no factors."""
    return weight if scale is None else weight * scale[source]


def _segment_sum(weight: AnyArray, source: AnyArray, x: AnyArray, target: AnyArray, n_targets: int) -> Array:
    return jax.ops.segment_sum(weight[:, None] * x[source], target, n_targets, indices_are_sorted=True)


def _row_sum(
    backend: Backend, start: AnyArray, source: AnyArray, weight: AnyArray, scale: AnyArray | None, x: AnyArray
) -> Array:
    """Sums rows of x by compressed sparse rows."""
    n_targets = len(start) - 1
    if backend == "compiled":
        kernels.usable()  # registers the kernel in a process that received the adjacency
        call = jax.ffi.ffi_call(kernels.NEIGHBOR_SUM, jax.ShapeDtypeStruct((n_targets, x.shape[1]), jnp.float32))
        return call(start, source, weight, jnp.zeros(0) if scale is None else scale, x)
    weight = _scaled(weight, scale, source)
    matrix = sparse.BCSR((jnp.asarray(weight), jnp.asarray(source), jnp.asarray(start)), shape=(n_targets, len(x)))
    return matrix @ x.astype(jnp.float32)


def _sum_forward(adjacency: Adjacency, weight: AnyArray, by_sender: AnyArray, x: AnyArray) -> tuple[Array, tuple]:
    return _to_receivers(adjacency, weight, x), (adjacency, by_sender, x)


def _sum_backward(residuals: tuple, g: Float[AnyArray, "targets K"]) -> tuple:
    adjacency, by_sender, x = residuals
    g = g.astype(x.dtype)
    # XLA removes the derivative of the weights where it is unused.
    return None, edge_dot(adjacency, g, x), None, _to_senders(adjacency, by_sender, g).astype(x.dtype)


def _gated_forward(
    adjacency: Adjacency, weight: AnyArray, by_sender: AnyArray, scale: AnyArray, gate: AnyArray, x: AnyArray
) -> tuple[Array, tuple]:
    sums = _to_receivers(adjacency, weight, x, scale)
    return jnp.asarray(gate)[:, None] * sums, (adjacency, by_sender, scale, gate, x, sums)


def _gated_backward(residuals: tuple, g: Float[AnyArray, "targets K"]) -> tuple:
    adjacency, by_sender, scale, gate, x, sums = residuals
    narrow = g.astype(x.dtype)
    back = _to_senders(adjacency, by_sender, narrow, gate)
    by_edge = edge_dot(adjacency, narrow, x) * gate[adjacency.receivers] * scale[adjacency.senders]
    by_scale = (x.astype(jnp.float32) * back).sum(axis=1)
    return None, by_edge, None, by_scale, (g * sums).sum(axis=1), (scale[:, None] * back).astype(x.dtype)


def _some_forward(
    adjacency: Adjacency, weight: AnyArray, scale: AnyArray, gate: AnyArray, x: AnyArray, rows: AnyArray
) -> tuple[Array, tuple]:
    sums = _sums_of(adjacency, weight, scale, x, rows)
    return jnp.asarray(gate)[:, None] * sums, (adjacency, weight, scale, gate, x, rows, sums)


def _some_backward(residuals: tuple, g: Float[AnyArray, "B K"]) -> tuple:
    adjacency, weight, scale, gate, x, rows, sums = residuals
    gated = gate[:, None] * g.astype(x.dtype)
    back = _from_some(adjacency, weight, gated, rows)
    by_edge = edge_dot(adjacency, _scattered(adjacency, gated, rows), x) * scale[adjacency.senders]
    by_scale = (x.astype(jnp.float32) * back).sum(axis=1)
    return None, by_edge, by_scale, (g * sums).sum(axis=1), (scale[:, None] * back).astype(x.dtype), None


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
_gated_sum.defvjp(_gated_forward, _gated_backward)
gated_sum_of.defvjp(_some_forward, _some_backward)
edge_dot.defvjp(_dot_forward, _dot_backward)
