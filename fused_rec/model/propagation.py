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
from fused_rec.graph.schema import Relation
from fused_rec.graph.spmm import gated_sum

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
) -> list[dict[str, Float32[Array, "_ K"]]]:
    """Computes h^0 to h^L of `propagate`.

    Args:
      graph: the graph or this device's share: adjacencies, and how many devices share the nodes. Source rows are
        gathered from all of them, except those of users for sums into other nodes, which are added over devices.
      coefficients: weights and gates.
      inputs: h^0 by node type, float32 [rows, K].
      text: the text inputs by node type, float32 [rows, K].
      noise: noise to add to every layer but h^0; None: none.
      compute_dtype: the type of messages and of rows sent to other devices; sums are float32.

    Returns:
      One mapping from node types to float32 [rows, K] per layer, L + 1 in all.
    """
    h: dict[str, Array] = {node_type: jnp.asarray(x) for node_type, x in inputs.items()}
    layers = [h]
    for level in range(len(coefficients.layer_weights) - 1):
        aggregated: dict[str, Array] = {t: gate[level][:, None] * text[t] for t, gate in coefficients.text_gate.items()}
        sources = dict.fromkeys(r.source for r in coefficients.edge if not graph.sums_own_rows(r))
        gathered = {t: graph.shards.all_gather(h[t].astype(compute_dtype)) for t in sources}
        for relation, edge in coefficients.edge.items():
            adjacency, gate = graph.adjacencies[relation], coefficients.gate[relation][level]
            scale = coefficients.source_scale[relation]
            if graph.sums_own_rows(relation):
                ones = graph.shards.varying(jnp.ones(len(adjacency.receiver_start) - 1))
                sums = gated_sum(adjacency, edge, scale, ones, h[relation.source].astype(compute_dtype))
                message = gate[:, None] * graph.shards.scatter_sums(sums)
            else:
                message = gated_sum(adjacency, edge, scale, gate, gathered[relation.source])
            aggregated[relation.target] = (
                aggregated[relation.target] + message if relation.target in aggregated else message
            )
        # A type without incoming relations is zero from layer 1 on; the layer combination has its input from h^0.
        h = {node_type: aggregated.get(node_type, 0 * x) for node_type, x in h.items()}
        if noise is not None:
            key = jax.random.fold_in(noise.key, level)
            keys = {node_type: jax.random.fold_in(key, number) for number, node_type in enumerate(sorted(h))}
            h = {t: x + noise_like(x, noise.length, keys[t], noise.node_ids[t]) for t, x in h.items()}
        layers.append(h)
    return layers


def combine_layers(
    coefficients: PropagationWeights, layers: list[dict[str, Array]]
) -> dict[str, Float32[Array, "_ K"]]:
    """Combines the layers: sum_l layer_weights[l] h^l, by node type.

    Args:
      coefficients: of which the layer weights count.
      layers: h^0 to h^L.

    Returns:
      float32 [rows, K] by node type.
    """
    out = {node_type: coefficients.layer_weights[0] * x for node_type, x in layers[0].items()}
    for level, h in enumerate(layers[1:], start=1):
        out = {node_type: out[node_type] + coefficients.layer_weights[level] * x for node_type, x in h.items()}
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
