"""Counterfactual scores and ranks: recomputed on the graph without one interaction of the user."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Bool, Float32, Int32, PyTree

from fused_rec.baselines.neighbors import item_counts
from fused_rec.config import Config
from fused_rec.distributed.devices import AnyArray
from fused_rec.graph.adjacency import build_adjacencies
from fused_rec.graph.build import bidirectional_edges
from fused_rec.graph.hetero import hetero_graph
from fused_rec.graph.schema import INTERACTED_BY, INTERACTS
from fused_rec.training.evaluate import scores_of
from fused_rec.training.inputs import Prepared, trained_item_mask
from fused_rec.training.train_step import GraphInputs, compile_key, embed_nodes


class CounterfactualEffect(NamedTuple):
    """Score and rank (from 1) of an item before and after the removal of an interaction.

    If nothing else is known of the user and model.popularity_weight is 0, `score_after` is an item degree.
    """

    score: float
    rank: int
    score_after: float
    rank_after: int


def without_interaction(config: Config, prepared: Prepared, user: int, item: int) -> GraphInputs:
    """Removes one interaction from the graph inputs: edges, their weights, degrees and popularity.

    Text features stay, including the user's reviews of the item, and so do parameters and the factors of EASE.

    Args:
      config: settings of the run.
      prepared: tables, split and graph.
      user: user row.
      item: item row.

    Returns:
      The changed inputs.

    Raises:
      ValueError: the model's graph does not have the interaction.
    """
    observed, graph = prepared.observed, prepared.graph_inputs.graph
    kept = ~((observed.user == user) & (observed.item == item))
    if kept.all():
        raise ValueError(
            f"user {user} has no training interaction with item {item}; give one that is in the model's graph"
        )
    counts = dict(graph.node_types)
    relations = {relation: graph.edges(relation) for relation, _ in graph.relations}
    relations |= bidirectional_edges(INTERACTS, INTERACTED_BY, observed.user[kept], observed.item[kept], counts)
    changed = hetero_graph(counts, relations, np.concatenate([graph.text(node_type) for node_type in counts]))
    changes = {name: getattr(observed, name)[kept] for name in ("user", "item", "age")}
    observed = dataclasses.replace(observed, **changes)
    popularity = item_counts(observed.item, observed.age, config.model.popularity_half_life, prepared.dataset.n_items)
    trained = trained_item_mask(prepared.dataset, observed)
    return GraphInputs(changed, build_adjacencies(changed), trained, popularity, prepared.graph_inputs.ease)


def counterfactual_effect(
    config: Config,
    params: PyTree,
    prepared: Prepared,
    user: int,
    item: int,
    removed_item: int,
    eligible: Bool[np.ndarray, "I"],
) -> CounterfactualEffect:
    """Computes an item's score and rank with and without an interaction of the user.

    Args:
      config: settings of the run.
      params: parameters.
      prepared: tables, split and graph.
      user: user row.
      item: row of the item that is ranked.
      removed_item: row of the item whose interaction is removed; it is no candidate in either ranking.
      eligible: candidates of the rankings.

    Returns:
      Score and rank before and after.

    Raises:
      ValueError: the model's graph does not have the interaction.
    """
    candidates = eligible.copy()
    candidates[removed_item] = False
    found = []
    for graph_inputs in (prepared.graph_inputs, without_interaction(config, prepared, user, removed_item)):
        given = np.asarray(_scores(compile_key(config), params, graph_inputs, np.array([user], np.int32)))[0]
        found += [float(given[item]), 1 + int((given[candidates] > given[item]).sum())]
    return CounterfactualEffect(*found)


@functools.partial(jax.jit, static_argnums=0)
def _scores(
    config: Config, params: PyTree, graph_inputs: GraphInputs, users: Int32[AnyArray, "B"]
) -> Float32[Array, "B I"]:
    return scores_of(*embed_nodes(config, params, graph_inputs), graph_inputs.popularity, users)
