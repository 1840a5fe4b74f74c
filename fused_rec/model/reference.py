"""The model in plain jraph, slow and obvious: read this first. Tests hold the fast path (`model.py`) to it within 1e-5.

The heterogeneous graph is one `jraph.GraphsTuple`: nodes of all types one after another, edges with the index of their
relation. A layer is one `jraph.GraphNetwork`. For layer l and an edge e of relation r from node u to node v:

    edge update:  message_e = gate[v, r, l] * weight_e * scale[u, r] * h_u
    node update:  h_v       = sum of the messages into v + text_gate[v, l] * text_v

`text` are the language model's features projected to the width of the embeddings; gates and scales are functions of
text features and degrees. Text thus enters as an input, in every node update, and in what a relation lets through.
Inference on one device: no dropout, no sampling, no sharding.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import jraph
import numpy as np
from jaxtyping import Array, Float32

from fused_rec.config import ModelConfig
from fused_rec.distributed.devices import AnyArray
from fused_rec.graph.hetero import HostGraph
from fused_rec.graph.schema import INTERACTED_BY, INTERACTS, ITEM, USER, Relation
from fused_rec.model.model import active_relations


def embeddings(
    config: ModelConfig, params: Mapping[str, Any], graph: HostGraph
) -> tuple[Float32[Array, "U _"], Float32[Array, "I _"]]:
    """Computes the embeddings of `FusedModel` and `concat_branches`: scores without popularity and EASE.

    Args:
      config: the model's settings.
      params: parameters of a `FusedModel`.
      graph: the graph.

    Returns:
      Embeddings of users and items. The score of a pair is their inner product.
    """
    users, items = branch(config, params["main"], graph)
    if "words" not in params:
        return users, items
    text_users, text_items = branch(config.text_branch(), params["words"], graph)
    degree = np.bincount(graph.edges[INTERACTS].receivers, minlength=graph.count(ITEM))
    share = (degree / (degree + 1))[:, None]  # an item without interactions is ranked by its text alone
    return jnp.hstack([users, text_users]), jnp.hstack([share * items, (1 - share) * text_items])


def branch(config: ModelConfig, params: Mapping[str, Any], graph: HostGraph) -> tuple[Array, Array]:
    """Computes the embeddings of users and items of one branch: inputs, L layers, their weighted sum."""
    num_layers = config.effective_layers
    relations = active_relations(config, graph)
    ids, text, text_gate = node_inputs(config, params, graph, num_layers)
    scale, gate = relation_factors(config, params, graph, relations, num_layers)
    edges, senders, receivers = typed_edges(graph, relations)
    # No gradient reached the ID embedding of a user without incoming edges, or of an item without interactions.
    of_users, of_items = graph.node_slice(USER), graph.node_slice(ITEM)
    ids = ids.at[of_users].multiply(np.isin(np.arange(len(ids)), receivers)[of_users, None])
    ids = ids.at[of_items].multiply(np.isin(np.arange(graph.count(ITEM)), graph.edges[INTERACTS].receivers)[:, None])
    layer_weights = {
        "learned": lambda: jnp.exp(params["layer_weights"]) / (num_layers + 1),
        "mean": lambda: jnp.full(num_layers + 1, 1 / (num_layers + 1)),
        "mean_without_input": lambda: jnp.full(num_layers + 1, 1 / num_layers).at[0].set(0),
    }[config.layer_combination]()

    def update_edge(edge: Any, sender: Any, receiver: Any, globals_: Any) -> Any:
        of_relation = np.arange(len(edge["relation"])), edge["relation"]
        factor = receiver["gate"][of_relation] * edge["weight"] * sender["scale"][of_relation]
        return {"message": factor[:, None] * sender["h"]}

    def update_node(node: Any, sent: Any, received: Any, globals_: Any) -> Any:
        return {"h": received["message"] + node["text_gate"][:, None] * node["text"]}

    layer = jraph.GraphNetwork(update_edge, update_node)
    h = ids + text
    out = layer_weights[0] * h
    for number in range(num_layers):
        nodes = {"h": h, "scale": scale, "gate": gate[:, :, number], "text": text, "text_gate": text_gate[:, number]}
        parts: dict[str, Any] = {"nodes": nodes, "edges": edges, "senders": senders, "receivers": receivers}
        sizes: dict[str, Any] = {"n_node": np.array([len(h)]), "n_edge": np.array([len(senders)])}
        after: Any = layer(jraph.GraphsTuple(**parts, **sizes, globals=None)).nodes
        h = after["h"]
        out += layer_weights[number + 1] * h
    if config.score == "cosine":
        out /= jnp.maximum(jnp.linalg.norm(out, axis=1, keepdims=True), 1e-6)
    return out[of_users], out[of_items]


def node_inputs(
    config: ModelConfig, params: Mapping[str, Any], graph: HostGraph, num_layers: int
) -> tuple[Array, Array, Array]:
    """Returns ID embeddings and projected text features, [N, K], and text gates, [N, L]; 0 where there are none."""
    num_nodes = sum(count for _, count in graph.node_types)
    ids, text = jnp.zeros((num_nodes, config.dim)), jnp.zeros((num_nodes, config.dim))
    text_gate = jnp.zeros((num_nodes, num_layers))
    for node_type, count in graph.node_types:
        at = graph.node_slice(node_type)
        if f"id_{node_type}" in params:
            ids = ids.at[at].set(params[f"id_{node_type}"])
        if f"text_{node_type}" in params:
            features = graph.text_of(node_type)
            text = text.at[at].set(projected(params[f"text_{node_type}"], features))
            if config.fuses_text:
                gates = gate_of(params.get(f"gate_text_{node_type}"), features, np.zeros(count), num_layers)
                text_gate = text_gate.at[at].set(gates)
    if config.users_start_as_items:
        edges, features = graph.edges[INTERACTED_BY], graph.text_of(ITEM)
        sums = np.stack([features[edges.senders[edges.receivers == user]].sum(0) for user in range(graph.count(USER))])
        mean = sums / np.maximum(np.bincount(edges.receivers, minlength=graph.count(USER)), 1)[:, None]
        text = text.at[graph.node_slice(USER)].set(projected(params[f"text_{ITEM}"], mean))
    return ids, text, text_gate


def projected(params: Mapping[str, Any], features: np.ndarray) -> Array:
    """Returns features projected to the width of the embeddings, linearly or by two layers; 0 without text."""
    if "kernel" in params:
        return features @ params["kernel"]
    hidden = jax.nn.leaky_relu(features @ params["hidden"]["kernel"] + params["hidden"]["bias"][None, :])
    has_text = np.any(features != 0, axis=1, keepdims=True)
    return has_text * (hidden @ params["output"]["kernel"] + params["output"]["bias"][None, :])


def relation_factors(
    config: ModelConfig, params: Mapping[str, Any], graph: HostGraph, relations: list[Relation], num_layers: int
) -> tuple[Array, Array]:
    """Returns the scales of sources, [N, R], and the gates of targets, [N, R, L]; 0 for nodes of other types."""
    num_nodes = sum(count for _, count in graph.node_types)
    scale, gate = jnp.zeros((num_nodes, len(relations))), jnp.zeros((num_nodes, len(relations), num_layers))
    for r, relation in enumerate(relations):
        edges = graph.edges[relation]
        out_degree = centered_log_degree(edges.senders, graph.count(relation.source))
        in_degree = centered_log_degree(edges.receivers, graph.count(relation.target))
        exponent = params.get(f"source_scale_{relation}", 0.0)
        scale = scale.at[graph.node_slice(relation.source), r].set(jnp.exp(exponent * out_degree))
        features = graph.text_of(relation.target) * config.fuses_text
        gates = gate_of(params.get(f"gate_{relation}"), features, in_degree / (in_degree.std() + 1e-6), num_layers)
        gate = gate.at[graph.node_slice(relation.target), r].set(gates)
    return scale, gate


def typed_edges(graph: HostGraph, relations: list[Relation]) -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
    """Returns weight and relation of all edges, their senders and their receivers, numbered over all node types."""
    weights, index, senders, receivers = [], [], [], []
    for r, relation in enumerate(relations):
        edges = graph.edges[relation]
        weights.append(edges.weight)
        index.append(np.full(len(edges.weight), r))
        senders.append(edges.senders + graph.node_slice(relation.source).start)
        receivers.append(edges.receivers + graph.node_slice(relation.target).start)
    edges = {"weight": np.concatenate(weights), "relation": np.concatenate(index)}
    return edges, np.concatenate(senders), np.concatenate(receivers)


def gate_of(params: Mapping[str, Any] | None, text: AnyArray, log_degree: np.ndarray, num_layers: int) -> Array:
    """Returns exp(level) * 2 sigmoid(w . [text V, has text, log degree]), [n, L]; 1 where nothing is learned."""
    if params is None:
        return jnp.ones((len(text), num_layers))
    level = jnp.exp(params["level"])
    if "view" not in params:
        return jnp.broadcast_to(level, (len(text), num_layers))
    has_text = jnp.any(text != 0, axis=1, keepdims=True)
    features = jnp.hstack([text @ params["view"]["kernel"], has_text, log_degree[:, None]])
    return level[None, :] * 2 * jax.nn.sigmoid(features @ params["weight"]["kernel"])


def centered_log_degree(ends: np.ndarray, count: int) -> np.ndarray:
    """Returns log(1 + degree) of each node, minus the mean over the nodes of the type."""
    log_degree = np.log1p(np.bincount(ends, minlength=count))
    return log_degree - log_degree.mean()
