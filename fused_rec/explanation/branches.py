"""The trained branches of a model as linear functions: embeddings of all layers, matrices and gates, as NumPy arrays.

Propagation is linear, h^l = M_l h^{l-1} + text (`fused_rec.model.propagation`). Changes of edges and texts at few nodes
change few columns and rows of M_l: `fused_rec.explanation.set_removal`, `fused_rec.explanation.pair_score`.
"""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import scipy.sparse
from jaxtyping import PyTree

from fused_rec.config import Config, ModelConfig
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
    static = Config(model=config.model, train=config.train)
    captured, fewer = jax.device_get(_captured(static, params, graph, _with_fewer_edges(graph)))
    settings = [config.model] if len(captured) == 1 else [config.model, config.model.text_branch()]
    return tuple(
        _branch(own, graph, params.get(name, {}), found, less)
        for own, name, found, less in zip(settings, BRANCHES, captured, fewer, strict=False)
    )


def _with_fewer_edges(graph: DeviceGraph) -> DeviceGraph:
    """The graph with every degree less by one, as the two ends of a removed edge have it; edges stay."""

    def fewer(adjacency: Adjacency) -> Adjacency:
        into, out = (np.diff(start) - 1 for start in (adjacency.receiver_start, adjacency.sender_start))
        degrees = degrees_of(np.maximum(into, 0), np.maximum(out, 0), adjacency.scale)
        return dataclasses.replace(adjacency, degrees=degrees)

    return graph.with_adjacencies({relation: fewer(a) for relation, a in graph.adjacencies.items()})


@functools.partial(jax.jit, static_argnums=0)
def _captured(config: Config, params: PyTree, graph: DeviceGraph, fewer: DeviceGraph) -> Any:
    """(ID embeddings, layers, output, weights) of each branch, and the weights with fewer edges."""
    found = []
    for given in (graph, fewer):
        captured: Any
        vectors, captured = FusedModel(config.model).apply({"params": params}, given, mutable=["intermediates"])
        found.append([captured["intermediates"][name][LINEAR][0] for name in BRANCHES[: len(vectors)]])
    whole = []
    for ids, text, weights in found[0]:
        layers = propagate_layers(graph, weights, {t: ids[t] + text[t] for t in ids}, text)
        whole.append((ids, layers, combine_layers(weights, layers), weights))
    return whole, [weights for _, _, weights in found[1]]


def _branch(config: ModelConfig, graph: DeviceGraph, params: PyTree, found: tuple, less: PropagationWeights) -> Branch:
    """Builds the matrices of a branch."""
    ids, layers, out, weights = found
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
