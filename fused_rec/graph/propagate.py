"""The one sparse sum: y[v] = sum over edges (u, v) of weight[e] * x[u], with its exact derivatives.

Both backends compute the same sum. `segment` gathers and adds with `jax.ops.segment_sum`; it is the oracle and
what accelerators run. `csr` hands the product to jaxlib's compressed-sparse-row kernel, on a CPU 5 to 8 times
faster; that kernel has no fast transpose, so the edges are stored twice, by receiver and by sender, and the
derivative is the same kernel over the second order.
"""

from typing import Literal, no_type_check

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import sparse
from jaxtyping import Array, Float, Float32, Int32

from fused_rec.graph.hetero import Edges, HeteroGraph, Relation

Backend = Literal["csr", "segment"]


@no_type_check  # jax.pmap rebuilds its arguments with placeholders for arrays, which a checked constructor refuses
@flax.struct.dataclass
class Adjacency:
    """One relation, ready to be summed over. Edges ascend by receiver; `by_sender` reorders them by sender."""

    senders: Int32[Array, "E"]
    receivers: Int32[Array, "E"]
    weight: Float32[Array, "E"]
    receiver_start: Int32[Array, "targets_plus_1"]
    by_sender: Int32[Array, "E"]
    sender_start: Int32[Array, "sources_plus_1"]
    backend: Backend = flax.struct.field(pytree_node=False)


def adjacency(edges: Edges, n_sources: int, n_targets: int, backend: Backend | None = None) -> Adjacency:
    """Sorts one relation both ways, on the host. backend None: csr on a CPU, segment elsewhere."""
    senders, receivers = np.asarray(edges.senders), np.asarray(edges.receivers)
    if np.any(np.diff(receivers) < 0):
        raise ValueError("edges must ascend by receiver; take them from HeteroGraph.edges")
    order = np.argsort(senders, kind="stable")
    return Adjacency(
        jnp.asarray(senders, jnp.int32),
        jnp.asarray(receivers, jnp.int32),
        jnp.asarray(edges.weight, jnp.float32),
        jnp.asarray(np.searchsorted(receivers, np.arange(n_targets + 1)), jnp.int32),
        jnp.asarray(order, jnp.int32),
        jnp.asarray(np.searchsorted(senders[order], np.arange(n_sources + 1)), jnp.int32),
        backend or ("csr" if jax.default_backend() == "cpu" else "segment"),
    )


def adjacencies(graph: HeteroGraph, backend: Backend | None = None) -> dict[Relation, Adjacency]:
    """Every relation of the graph, ready to be summed over."""
    return {
        relation: adjacency(graph.edges(relation), graph.count(relation.source), graph.count(relation.target), backend)
        for relation, _ in graph.relations
    }


@jax.custom_vjp
def neighbour_sum(
    adjacency: Adjacency, weight: Float32[Array, "E"], x: Float32[Array, "sources K"]
) -> Float32[Array, "targets K"]:
    """y[v] = sum_{e = (u, v)} weight[e] x[u]; differentiable in weight and x, not in the adjacency."""
    return _to_receivers(adjacency, weight, x)


@jax.custom_vjp
def edge_dot(
    adjacency: Adjacency, target: Float32[Array, "targets K"], source: Float32[Array, "sources K"]
) -> Float32[Array, "E"]:
    """<target[v], source[u]> of each edge (u, v): the other half of the pair, whose derivatives are sparse sums."""
    return jnp.einsum("ek,ek->e", target[adjacency.receivers], source[adjacency.senders])


def _to_receivers(adjacency: Adjacency, weight: Array, x: Array) -> Array:
    return _sum(adjacency.backend, adjacency.receiver_start, adjacency.receivers, adjacency.senders, weight, x)


def _to_senders(adjacency: Adjacency, weight: Array, x: Array) -> Array:
    a, order = adjacency, adjacency.by_sender
    return _sum(a.backend, a.sender_start, a.senders[order], a.receivers[order], weight[order], x)


def _sum(backend: Backend, start: Array, to: Array, frm: Array, weight: Array, x: Array) -> Array:
    n_targets = len(start) - 1
    if backend == "csr":
        return sparse.BCSR((weight, frm, start), shape=(n_targets, len(x))) @ x
    return jax.ops.segment_sum(weight[:, None] * x[frm], to, n_targets, indices_are_sorted=True)


def _sum_forward(adjacency: Adjacency, weight: Array, x: Array) -> tuple[Array, tuple]:
    return _to_receivers(adjacency, weight, x), (adjacency, weight, x)


def _sum_backward(residuals: tuple, g: Float[Array, "targets K"]) -> tuple:
    adjacency, weight, x = residuals
    # XLA drops the derivative of the weights where nobody asks for it.
    return None, edge_dot(adjacency, g, x), _to_senders(adjacency, weight, g)


def _dot_forward(adjacency: Adjacency, target: Array, source: Array) -> tuple[Array, tuple]:
    return edge_dot(adjacency, target, source), (adjacency, target, source)


def _dot_backward(residuals: tuple, g: Float[Array, "E"]) -> tuple:
    adjacency, target, source = residuals
    return None, _to_receivers(adjacency, g, source), _to_senders(adjacency, g, target)


neighbour_sum.defvjp(_sum_forward, _sum_backward)
edge_dot.defvjp(_dot_forward, _dot_backward)
