"""Adjacency of a relation: its edges in two orders, built and divided over devices on the host.

The sparse sum (`fused_rec.graph.spmm`) reads one order and its derivative the other.
"""

import dataclasses
from collections.abc import Mapping
from typing import Literal, NamedTuple, no_type_check

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int32

from fused_rec import kernels
from fused_rec.distributed.devices import AnyArray
from fused_rec.graph.hetero import HostGraph
from fused_rec.graph.order import aligned, ascends, counting_order, row_starts
from fused_rec.graph.schema import Edges, Relation

Backend = Literal["compiled", "csr", "segment"]


def default_backend() -> Backend:
    """Returns the fastest backend of the default device: `segment` on accelerators, else `compiled` or `csr`."""
    if jax.default_backend() != "cpu":
        return "segment"
    return "compiled" if kernels.usable() else "csr"


class DegreeScale(NamedTuple):
    """What standardizes the log degrees of a relation: fitted on one graph, it may be applied to others.

    Attributes:
      in_mean: mean of log(1 + in-degree) over the target type.
      in_deviation: its standard deviation.
      out_mean: mean of log(1 + out-degree) over the source type.
    """

    in_mean: float
    in_deviation: float
    out_mean: float


class Degrees(NamedTuple):
    """Degrees of a relation's nodes in the whole graph, also where a step sums over a sample of the edges.

    Attributes:
      in_degree: float32, the number of incoming edges of each target node.
      log_in_degree: log(1 + in-degree), standardized by a `DegreeScale`.
      log_out_degree: log(1 + out-degree) of each source node, less the mean of the `DegreeScale`.
    """

    in_degree: Float32[AnyArray, "targets"]
    log_in_degree: Float32[AnyArray, "targets"]
    log_out_degree: Float32[AnyArray, "sources"]


@no_type_check  # jax.pmap rebuilds its arguments with placeholders for arrays, which a checked constructor refuses
@flax.struct.dataclass
class Adjacency:
    """The edges of one relation, sorted by receiver, with their order by sender.

    With several devices each has the edges into its own rows, whose receivers are local rows and senders IDs over all
    devices, or those from its own rows (`Relation.by_sender`), the other way around. Edges are padded to the largest
    number on any device: after the last row start, with weight 0, and with a receiver and a sender one past the last.
    Receivers follow from the row starts and are not stored.

    Attributes:
      senders: int32 [E], source nodes.
      weight: float32 [E], edge weights.
      receiver_start: int32 [targets + 1]; the edges into v are receiver_start[v] to receiver_start[v + 1] - 1.
      by_sender: int32 [E], the permutation that sorts edges by sender.
      receivers_by_sender: int32 [E], target nodes in the order of `by_sender`.
      weight_by_sender: float32 [E], `weight` in the order of `by_sender`.
      sender_start: int32 [sources + 1], row starts in the order of `by_sender`.
      degrees: degrees in the whole graph.
      backend: which implementation of the sparse sum to use.
      scale: what standardizes the degrees, fitted on these edges or on those of a training; None for a device's share.
    """

    senders: Int32[AnyArray, "E"]
    weight: Float32[AnyArray, "E"]
    receiver_start: Int32[AnyArray, "targets_plus_1"]
    by_sender: Int32[AnyArray, "E"]
    receivers_by_sender: Int32[AnyArray, "E"]
    weight_by_sender: Float32[AnyArray, "E"]
    sender_start: Int32[AnyArray, "sources_plus_1"]
    degrees: Degrees
    backend: Backend = flax.struct.field(pytree_node=False)
    scale: DegreeScale | None = flax.struct.field(pytree_node=False, default=None)

    def with_weight(self, weight: Float32[AnyArray, "E"]) -> "Adjacency":
        """Returns the same edges with other weights, float32 [E]."""
        return dataclasses.replace(self, weight=weight, weight_by_sender=self.sorted_by_sender(weight))

    def sorted_by_sender(self, weight: Float32[AnyArray, "E"]) -> Array:
        """Returns weights in the order of `by_sender`."""
        return jnp.asarray(weight).at[self.by_sender].get(mode="promise_in_bounds", unique_indices=True)

    @property
    def receivers(self) -> Int32[AnyArray, "E"]:
        """int32 [E], target nodes, ascending; computed from the row starts. Of stacked shards [devices, E]."""
        start, edges, compiled = self.receiver_start, self.senders.shape[-1], self.backend == "compiled"
        if start.ndim == 1:
            return _rows_of(start, edges, compiled)
        return (np if isinstance(start, np.ndarray) else jnp).stack([_rows_of(own, edges, compiled) for own in start])


def _rows_of(start: Int32[AnyArray, "rows_plus_1"], edges: int, compiled: bool) -> Int32[AnyArray, "E"]:
    """Returns the row of each edge; edges after the last row are of one row more."""
    if isinstance(start, np.ndarray):
        counts = np.append(np.diff(start), edges - start[-1])
        return np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    if compiled and kernels.usable():
        return jax.ffi.ffi_call(kernels.ROWS_OF, jax.ShapeDtypeStruct((edges,), jnp.int32))(start)
    return jnp.zeros(edges + 1, jnp.int32).at[start[1:]].add(1).cumsum()[:-1]


def build_adjacency(
    edges: Edges, n_sources: int, n_targets: int, backend: Backend | None = None, scale: DegreeScale | None = None
) -> Adjacency:
    """Builds the adjacency of one relation, on the host.

    Args:
      edges: edges that ascend by receiver, as `HostGraph.edges` returns them.
      n_sources: the number of source nodes.
      n_targets: the number of target nodes.
      backend: implementation of the sparse sum; None: `default_backend()`.
      scale: what standardizes the degrees; None: the degrees of these edges.

    Returns:
      The adjacency, of NumPy arrays.

    Raises:
      ValueError: receivers do not ascend.
    """
    senders, receivers = (np.asarray(nodes).astype(np.int32, copy=False) for nodes in edges[:2])
    weight = aligned(np.asarray(edges.weight, np.float32))
    if not ascends(receivers):
        raise ValueError("edges must ascend by receiver; take them from HostGraph.edges")
    order, sender_start = counting_order(senders, n_sources)
    receiver_start = row_starts(receivers, n_targets)
    degrees = np.diff(receiver_start), np.diff(sender_start)
    scale = scale or degree_scale(*degrees)
    return Adjacency(
        aligned(senders),
        weight,
        receiver_start,
        aligned(order),
        aligned(receivers[order]),
        aligned(weight[order]),
        sender_start,
        degrees_of(*degrees, scale),
        backend or default_backend(),
        scale,
    )


def degrees_of(in_degree: np.ndarray, out_degree: np.ndarray, scale: DegreeScale | None = None) -> Degrees:
    """Computes `Degrees` of in-degrees [targets] and out-degrees [sources]; scale: None: `degree_scale` of them."""
    scale = scale or degree_scale(in_degree, out_degree)
    log_in_degree = (np.log1p(in_degree) - scale.in_mean) / (scale.in_deviation + 1e-6)
    parts = in_degree, log_in_degree, np.log1p(out_degree) - scale.out_mean
    return Degrees(*(part.astype(np.float32) for part in parts))


def degree_scale(in_degree: np.ndarray, out_degree: np.ndarray) -> DegreeScale:
    """Fits what standardizes in-degrees [targets] and out-degrees [sources] of a relation."""
    in_mean, out_mean = (np.log1p(count).sum() / max(len(count), 1) for count in (in_degree, out_degree))
    centered = np.log1p(in_degree) - in_mean
    deviation = np.sqrt((centered * centered).sum() / max(len(in_degree), 1))
    return DegreeScale(float(in_mean), float(deviation), float(out_mean))


def shard_adjacency(
    adjacency: Adjacency, count: int, capacity: int | None = None, by_sender: bool = False
) -> list[Adjacency]:
    """Divides an adjacency over devices by receiver or by sender, on the host; the order of edges is kept.

    Args:
      adjacency: of the whole relation.
      count: the number of devices; node v belongs to device v mod count.
      capacity: the number of edges to pad each shard to; None: that of the largest shard.
      by_sender: whether a device has the edges from its nodes, in place of those into its nodes.

    Returns:
      One adjacency per device.
    """
    if count == 1 and capacity is None:
        return [adjacency]
    a = adjacency
    n_sources, n_targets = (-(-(len(start) - 1) // count) * count for start in (a.sender_start, a.receiver_start))
    all_receivers = a.receivers
    owners = (a.senders if by_sender else all_receivers) % count
    own = [np.flatnonzero(owners == device) for device in range(count)]
    longest = max(map(len, own)) if capacity is None else capacity
    # The last devices may have one node less than rows.
    in_degree, log_in_degree = (
        np.pad(x, (0, n_targets - len(x))).reshape(-1, count).T for x in (a.degrees.in_degree, a.degrees.log_in_degree)
    )
    log_out_degree = np.pad(a.degrees.log_out_degree, (0, n_sources - len(a.degrees.log_out_degree)))
    sources, targets = (n_sources // count, n_targets) if by_sender else (n_sources, n_targets // count)
    parts = []
    for device, edges in enumerate(own):
        padding = (0, longest - len(edges))
        senders, receivers = np.asarray(a.senders)[edges], np.asarray(all_receivers)[edges]
        senders, receivers = (senders // count, receivers) if by_sender else (senders, receivers // count)
        # The restriction of by_sender to this device's edges.
        local = np.full(len(a.senders), -1, np.int32)
        local[edges] = np.arange(len(edges))
        order = local[a.by_sender][local[a.by_sender] >= 0]
        parts.append(
            Adjacency(
                np.pad(senders, padding, constant_values=sources),
                np.pad(a.weight[edges], padding),
                row_starts(receivers, targets),
                np.concatenate([order, np.arange(len(edges), longest)]).astype(np.int32),
                np.pad(receivers[order], padding, constant_values=targets),
                np.pad(a.weight[edges][order], padding),
                row_starts(senders[order], sources),
                Degrees(
                    in_degree[device],
                    log_in_degree[device],
                    log_out_degree[device::count] if by_sender else log_out_degree,
                ),
                a.backend,
            )
        )
    return parts


def build_adjacencies(
    graph: HostGraph, backend: Backend | None = None, scales: Mapping[Relation, DegreeScale] | None = None
) -> dict[Relation, Adjacency]:
    """Builds the adjacency of every relation of the graph; backend and scales as in `build_adjacency`."""
    return share_reverses(
        {
            relation: build_adjacency(
                edges, graph.count(relation.source), graph.count(relation.target), backend, (scales or {}).get(relation)
            )
            for relation, edges in graph.edges.items()
        }
    )


def share_reverses(adjacencies: Mapping[Relation, Adjacency]) -> dict[Relation, Adjacency]:
    """Lets a relation and its reverse share memory: what one has by sender the other has by receiver."""
    found = dict(adjacencies)
    for one in adjacencies:
        for other in adjacencies:
            back, there = adjacencies[one], adjacencies[other]
            if (other.source, other.target) == (one.target, one.source) and _reverse(back, there):
                shared = {"receivers_by_sender": there.senders, "sender_start": there.receiver_start}
                if np.array_equal(back.weight_by_sender, there.weight):
                    shared["weight_by_sender"] = there.weight
                found[one] = dataclasses.replace(back, **shared)
                break
    return found


def _reverse(one: Adjacency, other: Adjacency) -> bool:
    """Whether two relations have the same edges, in opposite directions."""
    starts = one.sender_start, other.receiver_start
    return np.array_equal(*starts) and np.array_equal(one.receivers_by_sender, other.senders)
