"""The one sparse sum: y[v] = sum over edges (u, v) of weight[e] * x[u], with its exact derivatives.

All backends compute the same sum. `segment` gathers and adds with `jax.ops.segment_sum`; it is the oracle and what
accelerators run. On a CPU that takes many times longer than the two others: `compiled`, kernels/sparse_sum.cc,
where the installation has built it, and `csr`, jaxlib's kernel for compressed sparse rows, elsewhere. Neither has a
fast transpose, so the edges are stored twice, by receiver and by sender, and the derivative is the same kernel over
the second order.

What is summed may be narrower than float32: `segment` and `compiled` then fetch so much less, and `csr` widens it
first. Weights, products and sums are float32 either way.
"""

from typing import Literal, NamedTuple, no_type_check

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import sparse
from jaxtyping import Array, Float, Float32, Int32

from fused_rec import kernels
from fused_rec.distributed.devices import AnyArray
from fused_rec.graph.hetero import Edges, HeteroGraph, Relation

Backend = Literal["compiled", "csr", "segment"]


def default_backend() -> Backend:
    """What sums soonest on the default device; a function of the installation."""
    if jax.default_backend() != "cpu":
        return "segment"
    return "compiled" if kernels.usable() else "csr"


class Degrees(NamedTuple):
    """How many neighbours the nodes of a relation have in the whole graph, of whose edges a step may sum over a part.

    in_degree: senders of each target, which `log_in_degree` has as log(1 + heard), of mean 0 and deviation 1 over the
    nodes of the type. log_out_degree: log(1 + receivers) of each source, less its mean over the nodes of the type.
    """

    in_degree: Float32[AnyArray, "targets"]
    log_in_degree: Float32[AnyArray, "targets"]
    log_out_degree: Float32[AnyArray, "sources"]


@no_type_check  # jax.pmap rebuilds its arguments with placeholders for arrays, which a checked constructor refuses
@flax.struct.dataclass
class Adjacency:
    """One relation, ready to be summed over. Edges ascend by receiver; `by_sender` reorders them by sender.

    receivers_by_sender: the receivers in that second order.

    Where several devices share the nodes, one has the edges into its own: receivers are its rows, senders stay numbers
    among all. Its edges are filled up to as many as any device has: after the last start, with weight 0, into a
    receiver and from a sender that are one too high.
    """

    senders: Int32[AnyArray, "E"]
    receivers: Int32[AnyArray, "E"]
    weight: Float32[AnyArray, "E"]
    receiver_start: Int32[AnyArray, "targets_plus_1"]
    by_sender: Int32[AnyArray, "E"]
    receivers_by_sender: Int32[AnyArray, "E"]
    sender_start: Int32[AnyArray, "sources_plus_1"]
    degrees: Degrees
    backend: Backend = flax.struct.field(pytree_node=False)


def build_adjacency(edges: Edges, n_sources: int, n_targets: int, backend: Backend | None = None) -> Adjacency:
    """Sorts one relation both ways, on the host. backend None: the `default_backend`."""
    senders, receivers = np.asarray(edges.senders), np.asarray(edges.receivers)
    if np.any(np.diff(receivers) < 0):
        raise ValueError("edges must ascend by receiver; take them from HeteroGraph.edges")
    # Of edges that ascend by receiver, what a stable sort by sender gives, and sooner.
    order = np.argsort(senders.astype(np.int64) * n_targets + receivers)
    receiver_start = np.searchsorted(receivers, np.arange(n_targets + 1)).astype(np.int32)
    sender_start = np.searchsorted(senders[order], np.arange(n_sources + 1)).astype(np.int32)
    return Adjacency(
        senders.astype(np.int32),
        receivers.astype(np.int32),
        np.asarray(edges.weight, np.float32),
        receiver_start,
        order.astype(np.int32),
        receivers[order].astype(np.int32),
        sender_start,
        degrees_of(np.diff(receiver_start), np.diff(sender_start)),
        backend or default_backend(),
    )


def degrees_of(in_degree: np.ndarray, out_degree: np.ndarray) -> Degrees:
    """Of how many each target hears and each source tells."""
    log_in_degree, log_out_degree = (
        np.log1p(count) - np.log1p(count).sum() / max(len(count), 1) for count in (in_degree, out_degree)
    )
    deviation = np.sqrt((log_in_degree * log_in_degree).sum() / max(len(in_degree), 1))
    return Degrees(
        *(part.astype(np.float32) for part in (in_degree, log_in_degree / (deviation + 1e-6), log_out_degree))
    )


def shard_adjacency(adjacency: Adjacency, count: int, capacity: int | None = None) -> list[Adjacency]:
    """The part of each of `count` devices, on the host: the edges into its rows, in the order they had.

    capacity: how many edges each part is filled up to; None: as many as the largest has.
    """
    if count == 1 and capacity is None:
        return [adjacency]
    a = adjacency
    n_sources, n_targets = (-(-(len(start) - 1) // count) * count for start in (a.sender_start, a.receiver_start))
    own = [np.flatnonzero(a.receivers % count == device) for device in range(count)]
    longest = max(map(len, own)) if capacity is None else capacity
    # The last devices may have one row less than there is room for.
    in_degree, log_in_degree = (
        np.pad(x, (0, n_targets - len(x))).reshape(-1, count).T for x in (a.degrees.in_degree, a.degrees.log_in_degree)
    )
    log_out_degree = np.pad(a.degrees.log_out_degree, (0, n_sources - len(a.degrees.log_out_degree)))
    parts = []
    for device, edges in enumerate(own):
        fill = (0, longest - len(edges))
        senders, receivers = a.senders[edges], a.receivers[edges] // count
        # Among the device's own, what by_sender says of all.
        at = np.full(len(a.senders), -1, np.int32)
        at[edges] = np.arange(len(edges))
        order = at[a.by_sender][at[a.by_sender] >= 0]
        none = n_targets // count
        parts.append(
            Adjacency(
                np.pad(senders, fill, constant_values=n_sources),
                np.pad(receivers, fill, constant_values=none),
                np.pad(a.weight[edges], fill),
                np.searchsorted(receivers, np.arange(none + 1)).astype(np.int32),
                np.concatenate([order, np.arange(len(edges), longest)]).astype(np.int32),
                np.pad(receivers[order], fill, constant_values=none),
                np.searchsorted(senders[order], np.arange(n_sources + 1)).astype(np.int32),
                Degrees(in_degree[device], log_in_degree[device], log_out_degree),
                a.backend,
            )
        )
    return parts


def build_adjacencies(graph: HeteroGraph, backend: Backend | None = None) -> dict[Relation, Adjacency]:
    """Every relation of the graph, ready to be summed over."""
    return {
        relation: build_adjacency(
            graph.edges(relation), graph.count(relation.source), graph.count(relation.target), backend
        )
        for relation, _ in graph.relations
    }


@jax.custom_vjp
def neighbor_sum(
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
    a = adjacency
    if a.backend == "segment":
        return _segment_sum(weight, a.senders, x, a.receivers, len(a.receiver_start) - 1)
    return _row_sum(a.backend, a.receiver_start, a.senders, None, weight, x)


def _to_senders(adjacency: Adjacency, weight: AnyArray, x: AnyArray) -> Array:
    a, order = adjacency, adjacency.by_sender
    if a.backend == "segment":
        return _segment_sum(weight[order], a.receivers_by_sender, x, a.senders[order], len(a.sender_start) - 1)
    return _row_sum(a.backend, a.sender_start, a.receivers_by_sender, order, weight, x)


def _segment_sum(weight: AnyArray, frm: AnyArray, x: AnyArray, to: AnyArray, n_targets: int) -> Array:
    return jax.ops.segment_sum(weight[:, None] * x[frm], to, n_targets, indices_are_sorted=True)


def _row_sum(
    backend: Backend, start: AnyArray, frm: AnyArray, order: AnyArray | None, weight: AnyArray, x: AnyArray
) -> Array:
    """order: where the weights of the edges stand, None for in their own order."""
    n_targets = len(start) - 1
    if backend == "compiled":
        kernels.usable()  # makes the kernel known in a process that was given its adjacency
        call = jax.ffi.ffi_call(kernels.NEIGHBOUR_SUM, jax.ShapeDtypeStruct((n_targets, x.shape[1]), jnp.float32))
        return call(start, frm, jnp.zeros(0, jnp.int32) if order is None else order, weight, x)
    weight = weight if order is None else weight[order]
    matrix = sparse.BCSR((jnp.asarray(weight), jnp.asarray(frm), jnp.asarray(start)), shape=(n_targets, len(x)))
    return matrix @ x.astype(jnp.float32)


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


neighbor_sum.defvjp(_sum_forward, _sum_backward)
edge_dot.defvjp(_dot_forward, _dot_backward)
