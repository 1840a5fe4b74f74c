"""The trained branches of a model as linear functions: embeddings of all layers, matrices and gates, as NumPy arrays.

Propagation is linear, h^l = M_l h^{l-1} + text (`fused_rec.model.propagation`). Changes of edges and texts at few nodes
change few columns and rows of M_l: `fused_rec.explanation.set_removal`, `fused_rec.explanation.pair_score`.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import numpy as np
import scipy.sparse
from jaxtyping import PyTree

from fused_rec.config import Config, ModelConfig
from fused_rec.distributed.devices import AnyArray
from fused_rec.graph.adjacency import Adjacency, degrees_of
from fused_rec.graph.device_graph import DeviceGraph
from fused_rec.graph.schema import Relation
from fused_rec.model.model import LINEAR, FusedModel
from fused_rec.model.propagation import PropagationWeights, combine_layers, propagate_layers
from fused_rec.training.train_step import BRANCHES


@dataclasses.dataclass(frozen=True)
class Branch:
    """A trained branch on the whole graph, and what its factors would be with all degrees less by one."""

    config: ModelConfig
    graph: DeviceGraph
    params: PyTree
    ids: dict[str, np.ndarray]
    layers: list[dict[str, np.ndarray]]  # h^0 to h^L
    out: dict[str, np.ndarray]
    weights: PropagationWeights
    less: PropagationWeights  # gates and source scales count
    matrices: dict[Relation, scipy.sparse.csr_matrix]  # edge weights times source scales, receivers by senders
    columns: dict[Relation, scipy.sparse.csc_matrix]


def branches(config: Config, params: PyTree, graph: DeviceGraph) -> tuple[Branch, ...]:
    """Computes the embeddings and matrices of each trained branch.

    Args:
      config: settings of model and training.
      params: parameters, not sharded.
      graph: the whole graph, on the host.

    Returns:
      The graph branch, and the text branch where the model has one.
    """
    found, fewer = (linear_inputs(config.model, params, given) for given in (graph, _with_fewer_edges(graph)))
    settings = [config.model] if len(found) == 1 else [config.model, config.model.text_branch()]
    return tuple(
        _branch(own, graph, params.get(name, {}), inputs, less.weights)
        for own, name, inputs, less in zip(settings, BRANCHES, found, fewer, strict=False)
    )


class LinearInputs(NamedTuple):
    """What the layers of a branch are a linear function of, by node type, and the coefficients."""

    ids: dict[str, np.ndarray]
    text: dict[str, np.ndarray]
    weights: PropagationWeights


def linear_inputs(config: ModelConfig, params: PyTree, graph: DeviceGraph) -> list[LinearInputs]:
    """Computes the inputs of each trained branch.

    Args:
      config: settings of the model.
      params: parameters, not sharded.
      graph: the whole graph, on the host.

    Returns:
      Those of the graph branch, and of the text branch where the model has one, as NumPy arrays.
    """
    return [LinearInputs(*found) for found in jax.device_get(_captured(config, params, graph))]


def layers_of(
    graph: DeviceGraph, weights: PropagationWeights, inputs: dict[str, np.ndarray], text: dict[str, np.ndarray]
) -> tuple[list[dict[str, np.ndarray]], dict[str, np.ndarray]]:
    """Propagates inputs of a branch.

    Args:
      graph: the whole graph, on the host.
      weights: of `linear_inputs`.
      inputs: h^0, by node type.
      text: what the text gates add to later layers.

    Returns:
      h^0 to h^L, and the weighted sum of them, as NumPy arrays.
    """
    return jax.device_get(_propagated(graph, weights, inputs, text))


def _with_fewer_edges(graph: DeviceGraph) -> DeviceGraph:
    """The graph with every degree less by one, as the two ends of a removed edge have it; edges stay."""

    def fewer(adjacency: Adjacency) -> Adjacency:
        into, out = (np.diff(start) - 1 for start in (adjacency.receiver_start, adjacency.sender_start))
        degrees = degrees_of(np.maximum(into, 0), np.maximum(out, 0), adjacency.scale)
        return dataclasses.replace(adjacency, degrees=degrees)

    return graph.with_adjacencies({relation: fewer(a) for relation, a in graph.adjacencies.items()})


@functools.partial(jax.jit, static_argnums=0)
def _captured(config: ModelConfig, params: PyTree, graph: DeviceGraph) -> Any:
    captured: Any
    vectors, captured = FusedModel(config).apply({"params": params}, graph, mutable=["intermediates"])
    return [captured["intermediates"][name][LINEAR][0] for name in BRANCHES[: len(vectors)]]


@jax.jit
def _propagated(
    graph: DeviceGraph, weights: PropagationWeights, inputs: dict[str, AnyArray], text: dict[str, AnyArray]
) -> Any:
    layers = propagate_layers(graph, weights, inputs, text)
    return layers, combine_layers(weights, layers)


def _branch(
    config: ModelConfig, graph: DeviceGraph, params: PyTree, found: LinearInputs, less: PropagationWeights
) -> Branch:
    """Propagates the inputs of a branch, and builds its matrices."""
    ids, text, weights = found
    layers, out = layers_of(graph, weights, {t: ids[t] + text[t] for t in ids}, text)
    matrices = {}
    for relation, edge in weights.edge.items():
        adjacency = graph.adjacencies[relation]
        n_edges = int(adjacency.receiver_start[-1])
        senders = np.asarray(adjacency.senders)[:n_edges]
        data = np.asarray(edge)[:n_edges] * weights.source_scale[relation][senders]
        shape = graph.count(relation.target), graph.count(relation.source)
        matrices[relation] = scipy.sparse.csr_matrix((data, senders, np.asarray(adjacency.receiver_start)), shape)
    columns = {relation: matrix.tocsc() for relation, matrix in matrices.items()}
    return Branch(config, graph, params, ids, layers, out, weights, less, matrices, columns)
