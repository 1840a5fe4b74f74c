"""Text-conditioned linear propagation.

With x the inputs and h^0 = x, one round is

    h^l_v = sum_r gate_r[l, v] * sum_{e = (u, v) in r} edge_r[e] * source_scale_r[u] * h^{l-1}_u + text_gate[l, v] *
    text_v

and the readout sum_l mix[l] * h^l_v. Gates, voices and edge weights depend on words and degrees, never on h, so the
result is linear in (x, text): it splits exactly over inputs and over paths. With gates and voices of 1, edges of
1 / sqrt(deg deg), no text and an even mix it is LightGCN (He et al., 2020, arXiv 2002.02126).

In training, noise may be added to every h^l, l > 0 (XSimGCL: Yu et al., 2023, arXiv 2209.02544).
"""

from collections.abc import Mapping
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32, PRNGKeyArray

from fused_rec.config import ComputeDtype
from fused_rec.distributed.devices import AnyArray, Shards
from fused_rec.graph.adjacency import Adjacency, neighbor_sum
from fused_rec.graph.hetero import Relation

Nodes = Mapping[str, Float32[AnyArray, "_ K"]]  # one row a node, by node type


@flax.struct.dataclass
class PropagationWeights:
    """All that turns inputs into outputs. L rounds; mappings by relation or node type."""

    edge: Mapping[Relation, Float32[AnyArray, "_"]]  # one weight an edge of the relation
    source_scale: Mapping[Relation, Float32[AnyArray, "_"]]  # one factor a node of the relation's source type
    gate: Mapping[Relation, Float32[AnyArray, "L _"]]  # one column a node of the relation's target type
    text_gate: Mapping[str, Float32[AnyArray, "L _"]]  # one column a node of the type
    layer_weights: Float32[AnyArray, "L_plus_1"]


class Noise(NamedTuple):
    """size: the length of each row's step. Steps follow from the key, the round, the node type and the row's number."""

    length: float
    key: PRNGKeyArray
    node_ids: Mapping[str, Int32[AnyArray, "_"]]


def propagate(
    adjacencies: Mapping[Relation, Adjacency], coefficients: PropagationWeights, inputs: Nodes, text: Nodes
) -> dict[str, Float32[Array, "_ K"]]:
    """The rounds and the readout. `text` holds the part of the inputs that each round may add again."""
    return combine_layers(coefficients, propagate_layers(adjacencies, coefficients, inputs, text))


def propagate_layers(
    adjacencies: Mapping[Relation, Adjacency],
    coefficients: PropagationWeights,
    inputs: Nodes,
    text: Nodes,
    noise: Noise | None = None,
    shards: Shards = Shards(),  # noqa: B008
    compute_dtype: ComputeDtype = "float32",
) -> list[dict[str, Float32[Array, "_ K"]]]:
    """h^0 to h^L of `propagate`. Where several `shards` share the nodes, each device hears the rows of all.

    compute_dtype: the type in which rows are told to neighbours and other devices; what is heard is summed in float32.
    """
    h: dict[str, Array] = {node_type: jnp.asarray(x) for node_type, x in inputs.items()}
    layers = [h]
    for level in range(len(coefficients.layer_weights) - 1):
        aggregated: dict[str, Array] = {t: gate[level][:, None] * text[t] for t, gate in coefficients.text_gate.items()}
        sources = dict.fromkeys(relation.source for relation in coefficients.edge)
        source_embeddings = {node_type: shards.all_gather(h[node_type].astype(compute_dtype)) for node_type in sources}
        for relation, edge in coefficients.edge.items():
            scaled = coefficients.source_scale[relation][:, None] * source_embeddings[relation.source]
            message = neighbor_sum(adjacencies[relation], edge, scaled.astype(compute_dtype))
            message = coefficients.gate[relation][level][:, None] * message
            aggregated[relation.target] = (
                aggregated[relation.target] + message if relation.target in aggregated else message
            )
        # A type that hears nothing is silent from here on: its own input is in the readout already.
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
    """sum_l mix[l] * h^l."""
    out = {node_type: coefficients.layer_weights[0] * x for node_type, x in layers[0].items()}
    for level, h in enumerate(layers[1:], start=1):
        out = {node_type: out[node_type] + coefficients.layer_weights[level] * x for node_type, x in h.items()}
    return out


def noise_like(
    x: Float32[AnyArray, "n K"], size: float, key: PRNGKeyArray, numbers: Int32[AnyArray, "n"]
) -> Float32[Array, "n K"]:
    """A random direction a row, of length `length` and in the row's orthant: it blurs a row and turns no sign.

    numbers: of the rows; each follows from the key and its own, whichever device draws it.
    """
    drawn = jax.vmap(lambda number: jax.random.uniform(jax.random.fold_in(key, number), x.shape[1:]))(numbers)
    return size * jnp.sign(x) * drawn / jnp.linalg.norm(drawn, axis=1, keepdims=True)
