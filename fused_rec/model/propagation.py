"""Text-conditioned linear propagation over a heterogeneous graph.

With inputs x and h^0 = x, layer l computes for every node v

    h^l_v = sum_r gate_r[l, v] sum_{e = (u, v) in r} edge_r[e] source_scale_r[u] h^{l-1}_u + text_gate[l, v] text_v

and the output is the layer combination sum_l layer_weights[l] h^l_v. Gates, source scales and edge weights are
functions of text and degrees, never of h, so the output is linear in (x, text): it decomposes exactly over inputs and
over paths. With gates and scales of 1, edges of 1 / sqrt(d_u d_v), no text and equal layer weights it is LightGCN (He
et al., 2020, arXiv 2002.02126).

In training, noise may be added to every h^l, l > 0 (XSimGCL: Yu et al., 2023, arXiv 2209.02544).
"""

from collections.abc import Mapping
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32, PRNGKeyArray

from fused_rec.config import ComputeDtype
from fused_rec.distributed.devices import AnyArray
from fused_rec.graph.device_graph import DeviceGraph
from fused_rec.graph.schema import USER, Relation
from fused_rec.graph.spmm import gated_sum, gated_sum_of

Nodes = Mapping[str, Float32[AnyArray, "_ K"]]  # one row per node, by node type


@flax.struct.dataclass
class PropagationWeights:
    """Coefficients of the propagation with L layers, by relation or node type."""

    edge: Mapping[Relation, Float32[AnyArray, "_"]]  # one weight per edge of the relation
    source_scale: Mapping[Relation, Float32[AnyArray, "_"]]  # one factor per node of the relation's source type
    gate: Mapping[Relation, Float32[AnyArray, "L _"]]  # one column per node of the relation's target type
    text_gate: Mapping[str, Float32[AnyArray, "L _"]]  # one column per node of the type
    layer_weights: Float32[AnyArray, "L_plus_1"]  # of h^0 to h^L


class Noise(NamedTuple):
    """Noise of a training step, a function of the key, the layer, the node type and the node's ID.

    Attributes:
      length: the norm of the noise of each row.
      key: a key of this step.
      node_ids: by node type, int32 IDs of the rows in the whole graph.
    """

    length: float
    key: PRNGKeyArray
    node_ids: Mapping[str, Int32[AnyArray, "_"]]


def propagate(
    graph: DeviceGraph, coefficients: PropagationWeights, inputs: Nodes, text: Nodes
) -> dict[str, Float32[Array, "_ K"]]:
    """Propagates the inputs through all layers and combines the layers.

    Args:
      graph: the graph, for its adjacencies.
      coefficients: weights, gates and layer weights.
      inputs: h^0 by node type, float32 [n, K].
      text: the text inputs by node type, float32 [n, K], which each layer may add again.

    Returns:
      The output embeddings by node type, float32 [n, K].
    """
    return combine_layers(coefficients, propagate_layers(graph, coefficients, inputs, text))


def propagate_layers(
    graph: DeviceGraph,
    coefficients: PropagationWeights,
    inputs: Nodes,
    text: Nodes,
    noise: Noise | None = None,
    compute_dtype: ComputeDtype = "float32",
    users: Int32[AnyArray, "B"] | None = None,
) -> list[dict[str, Float32[Array, "_ K"]]]:
    """Computes h^0 to h^L of `propagate`.

    Args:
      graph: the graph or this device's share: adjacencies, and how many devices share the nodes. Source rows are
        gathered from all of them, except those of users for sums into other nodes, which are added over devices.
      coefficients: weights and gates.
      inputs: h^0 by node type, float32 [rows, K]; absent where all of it is zero, which is then not summed.
      text: the text inputs by node type, float32 [rows, K].
      noise: noise to add to every layer but h^0; None: none.
      compute_dtype: the type of messages and of rows sent to other devices; sums are float32.
      users: int32 [B], the users whose rows are returned, on one device; None: all. The last layer then sums into
        these alone.

    Returns:
      One mapping from node types to float32 [rows, K] per layer, L + 1 in all; a type of zeros may be absent.
    """
    h: dict[str, Array] = {node_type: jnp.asarray(x) for node_type, x in inputs.items()}
    levels, layers = len(coefficients.layer_weights) - 1, []
    for level in range(levels):
        h, shown = _with_users(h, users)
        layers.append(shown)
        only = {USER: jnp.asarray(users)} if users is not None and level == levels - 1 else {}
        h = _next_layer(graph, coefficients, level, h, text, only, compute_dtype)
        if noise is not None:
            key = jax.random.fold_in(noise.key, level)
            keys = {t: jax.random.fold_in(key, number) for number, (t, _) in enumerate(sorted(graph.node_types))}
            ids = {t: _part(only, t, noise.node_ids[t]) for t in h}
            h = {t: x + noise_like(x, noise.length, keys[t], ids[t]) for t, x in h.items()}
    return [*layers, h if levels else _with_users(h, users)[1]]


def _next_layer(
    graph: DeviceGraph,
    coefficients: PropagationWeights,
    level: int,
    h: Nodes,
    text: Nodes,
    only: Mapping[str, Int32[Array, "B"]],
    compute_dtype: ComputeDtype,
) -> dict[str, Float32[Array, "_ K"]]:
    """Computes h^(level + 1) of h^level; `only`: by node type, the rows that are computed, where not all."""
    aggregated: dict[str, Array] = {
        t: _part(only, t, gate[level])[:, None] * _part(only, t, text[t]) for t, gate in coefficients.text_gate.items()
    }
    edges = {relation: edge for relation, edge in coefficients.edge.items() if relation.source in h}
    sources = dict.fromkeys(r.source for r in edges if not graph.sums_own_rows(r))
    gathered = {t: graph.shards.all_gather(h[t].astype(compute_dtype)) for t in sources}
    for relation, edge in edges.items():
        adjacency, scale = graph.adjacencies[relation], coefficients.source_scale[relation]
        gate = _part(only, relation.target, coefficients.gate[relation][level])
        if graph.sums_own_rows(relation):
            ones = graph.shards.varying(jnp.ones(len(adjacency.receiver_start) - 1))
            sums = gated_sum(adjacency, edge, scale, ones, h[relation.source].astype(compute_dtype))
            message = gate[:, None] * graph.shards.scatter_sums(sums)
        elif relation.target in only:
            message = gated_sum_of(adjacency, edge, scale, gate, gathered[relation.source], only[relation.target])
        else:
            message = gated_sum(adjacency, edge, scale, gate, gathered[relation.source])
        aggregated[relation.target] = (
            aggregated[relation.target] + message if relation.target in aggregated else message
        )
    # A type without incoming relations is zero from layer 1 on; the layer combination has its input from h^0.
    return {t: 0 * _part(only, t, x) for t, x in h.items() if t not in aggregated} | aggregated


def _part(only: Mapping[str, Int32[Array, "B"]], node_type: str, rows: AnyArray) -> Array:
    """The rows of a type that are computed."""
    rows = jnp.asarray(rows)
    return rows[only[node_type]] if node_type in only else rows


def _with_users(h: dict[str, Array], users: AnyArray | None) -> tuple[dict[str, Array], dict[str, Array]]:
    """Returns a layer for the next one to read, and for the caller, with the rows of these users."""
    if users is None or USER not in h:
        return h, h
    whole, rows = _taken(h[USER], users)
    return {**h, USER: whole}, {**h, USER: rows}


@jax.custom_vjp
def _taken(x: AnyArray, rows: AnyArray) -> tuple[Array, Array]:
    """Returns x and some of its rows, whose derivative is added to that of x in its memory."""
    return jnp.asarray(x), jnp.asarray(x)[rows]


_taken.defvjp(
    lambda x, rows: ((jnp.asarray(x), jnp.asarray(x)[rows]), rows),
    lambda rows, derivatives: (derivatives[0].at[rows].add(derivatives[1]), None),
)


def combine_layers(
    coefficients: PropagationWeights, layers: list[dict[str, Array]]
) -> dict[str, Float32[Array, "_ K"]]:
    """Combines the layers: sum_l layer_weights[l] h^l, by node type.

    Args:
      coefficients: of which the layer weights count.
      layers: h^0 to h^L; a type that is absent from a layer is zero there.

    Returns:
      float32 [rows, K] by node type.
    """
    out: dict[str, Array] = {}
    for weight, h in zip(coefficients.layer_weights, layers, strict=True):
        weighted = {node_type: weight * x for node_type, x in h.items()}
        out |= {node_type: out[node_type] + x if node_type in out else x for node_type, x in weighted.items()}
    return out


def noise_like(
    x: Float32[AnyArray, "n K"], size: float, key: PRNGKeyArray, numbers: Int32[AnyArray, "n"]
) -> Float32[Array, "n K"]:
    """Draws noise of norm `size` for each row, in the row's orthant (SimGCL: Yu et al., 2022, arXiv 2112.08679).

    Args:
      x: the rows, float32 [n, K].
      size: the norm of each row's noise.
      key: the key of this layer and node type.
      numbers: int32 [n], IDs of the rows; a row's noise depends on the key and its ID, not on the device.

    Returns:
      float32 [n, K] with the signs of x.
    """
    drawn = jax.vmap(lambda number: jax.random.uniform(jax.random.fold_in(key, number), x.shape[1:]))(numbers)
    return size * jnp.sign(x) * drawn / jnp.linalg.norm(drawn, axis=1, keepdims=True)
