"""The one sparse sum: y[v] = sum over edges (u, v) of weight[e] * x[u], with its exact derivatives.

Both backends compute the same sum. `segment` gathers and adds with `jax.ops.segment_sum`; it is the oracle and
what accelerators run. `csr` hands the product to jaxlib's compressed-sparse-row kernel, on a CPU 5 to 8 times
faster; that kernel has no fast transpose, so the edges are stored twice, by receiver and by sender, and the
derivative is the same kernel over the second order.

What is summed may be narrower than float32: `segment` then gathers so much less, and `csr` widens it first. Weights,
products and sums are float32 either way.
"""

from typing import Literal, no_type_check

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import sparse
from jaxtyping import Array, Float, Float32, Int32

from fused_rec.devices import AnyArray
from fused_rec.graph.hetero import Edges, HeteroGraph, Relation

Backend = Literal["csr", "segment"]


@no_type_check  # jax.pmap rebuilds its arguments with placeholders for arrays, which a checked constructor refuses
@flax.struct.dataclass
class Adjacency:
    """One relation, ready to be summed over. Edges ascend by receiver; `by_sender` reorders them by sender.

    Where several devices share the nodes, one has the edges into its own: receivers are its rows, senders stay numbers
    among all. Its edges are filled up to as many as any device has: after the last start, with weight 0, into a
    receiver and from a sender that are one too high.
    """

    senders: Int32[AnyArray, "E"]
    receivers: Int32[AnyArray, "E"]
    weight: Float32[AnyArray, "E"]
    receiver_start: Int32[AnyArray, "targets_plus_1"]
    by_sender: Int32[AnyArray, "E"]
    sender_start: Int32[AnyArray, "sources_plus_1"]
    backend: Backend = flax.struct.field(pytree_node=False)


def adjacency(edges: Edges, n_sources: int, n_targets: int, backend: Backend | None = None) -> Adjacency:
    """Sorts one relation both ways, on the host. backend None: csr on a CPU, segment elsewhere."""
    senders, receivers = np.asarray(edges.senders), np.asarray(edges.receivers)
    if np.any(np.diff(receivers) < 0):
        raise ValueError("edges must ascend by receiver; take them from HeteroGraph.edges")
    order = np.argsort(senders, kind="stable")
    return Adjacency(
        senders.astype(np.int32),
        receivers.astype(np.int32),
        np.asarray(edges.weight, np.float32),
        np.searchsorted(receivers, np.arange(n_targets + 1)).astype(np.int32),
        order.astype(np.int32),
        np.searchsorted(senders[order], np.arange(n_sources + 1)).astype(np.int32),
        backend or ("csr" if jax.default_backend() == "cpu" else "segment"),
    )


def divide(adjacency: Adjacency, count: int) -> list[Adjacency]:
    """The part of each of `count` devices, on the host: the edges into its rows, in the order they had."""
    a = adjacency
    n_sources, n_targets = (-(-(len(start) - 1) // count) * count for start in (a.sender_start, a.receiver_start))
    own = [np.flatnonzero(a.receivers % count == device) for device in range(count)]
    longest = max(map(len, own))
    parts = []
    for edges in own:
        fill = (0, longest - len(edges))
        senders, receivers = a.senders[edges], a.receivers[edges] // count
        order = np.argsort(senders, kind="stable")
        parts.append(
            Adjacency(
                np.pad(senders, fill, constant_values=n_sources),
                np.pad(receivers, fill, constant_values=n_targets // count),
                np.pad(a.weight[edges], fill),
                np.searchsorted(receivers, np.arange(n_targets // count + 1)).astype(np.int32),
                np.concatenate([order, np.arange(len(edges), longest)]).astype(np.int32),
                np.searchsorted(senders[order], np.arange(n_sources + 1)).astype(np.int32),
                a.backend,
            )
        )
    return parts


def adjacencies(graph: HeteroGraph, backend: Backend | None = None) -> dict[Relation, Adjacency]:
    """Every relation of the graph, ready to be summed over."""
    return {
        relation: adjacency(graph.edges(relation), graph.count(relation.source), graph.count(relation.target), backend)
        for relation, _ in graph.relations
    }


@jax.custom_vjp
def neighbour_sum(
    adjacency: Adjacency, weight: Float32[AnyArray, "E"], x: Float[AnyArray, "sources K"]
) -> Float32[Array, "targets K"]:
    """y[v] = sum_{e = (u, v)} weight[e] x[u]; differentiable in weight and x, not in the adjacency.

    The derivative of y is rounded to the type of x before it is sent back, and so is that of x.
    """
    return _to_receivers(adjacency, weight, x)


@jax.custom_vjp
def edge_dot(
    adjacency: Adjacency,
    target: Float[AnyArray, "targets K"],
    source: Float[AnyArray, "sources K"],
) -> Float32[Array, "E"]:
    """<target[v], source[u]> of each edge (u, v): the other half of the pair, whose derivatives are sparse sums."""
    pairs = target[adjacency.receivers], source[adjacency.senders]
    return jnp.einsum("ek,ek->e", *pairs, preferred_element_type=jnp.float32)


def _to_receivers(adjacency: Adjacency, weight: AnyArray, x: AnyArray) -> Array:
    return _sum(adjacency.backend, adjacency.receiver_start, adjacency.receivers, adjacency.senders, weight, x)


def _to_senders(adjacency: Adjacency, weight: AnyArray, x: AnyArray) -> Array:
    a, order = adjacency, adjacency.by_sender
    return _sum(a.backend, a.sender_start, a.senders[order], a.receivers[order], weight[order], x)


def _sum(backend: Backend, start: AnyArray, to: AnyArray, frm: AnyArray, weight: AnyArray, x: AnyArray) -> Array:
    n_targets = len(start) - 1
    if backend == "csr":
        matrix = sparse.BCSR((jnp.asarray(weight), jnp.asarray(frm), jnp.asarray(start)), shape=(n_targets, len(x)))
        return matrix @ x.astype(jnp.float32)
    return jax.ops.segment_sum(weight[:, None] * x[frm], to, n_targets, indices_are_sorted=True)


def _sum_forward(adjacency: Adjacency, weight: AnyArray, x: AnyArray) -> tuple[Array, tuple]:
    return _to_receivers(adjacency, weight, x), (adjacency, weight, x)


def _sum_backward(residuals: tuple, g: Float[AnyArray, "targets K"]) -> tuple:
    adjacency, weight, x = residuals
    g = g.astype(x.dtype)
    # XLA drops the derivative of the weights where nobody asks for it.
    return None, edge_dot(adjacency, g, x), _to_senders(adjacency, weight, g).astype(x.dtype)


def _dot_forward(adjacency: Adjacency, target: AnyArray, source: AnyArray) -> tuple[Array, tuple]:
    return edge_dot(adjacency, target, source), (adjacency, target, source)


def _dot_backward(residuals: tuple, g: Float[AnyArray, "E"]) -> tuple:
    adjacency, target, source = residuals
    of_target, of_source = _to_receivers(adjacency, g, source), _to_senders(adjacency, g, target)
    return None, of_target.astype(target.dtype), of_source.astype(source.dtype)


neighbour_sum.defvjp(_sum_forward, _sum_backward)
edge_dot.defvjp(_dot_forward, _dot_backward)
