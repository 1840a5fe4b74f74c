"""Counterfactual scores and ranks: recomputed on the graph without one interaction of the user."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Bool, Float32, Int32, PyTree

from fused_rec.baselines.neighbors import item_counts
from fused_rec.config import Config
from fused_rec.data.splits import Observed
from fused_rec.distributed.devices import AnyArray
from fused_rec.explanation.decomposition import require_trained
from fused_rec.graph.edit import drop_interaction
from fused_rec.training.evaluate import scores_of
from fused_rec.training.inputs import ModelInputs
from fused_rec.training.train_step import GraphInputs, compile_key, embed_nodes


class CounterfactualEffect(NamedTuple):
    """Score and rank (from 1) of an item before and after the removal of an interaction.

    If nothing else is known of the user and model.popularity_weight is 0, `score_after` is an item degree.
    """

    score: float
    rank: int
    score_after: float
    rank_after: int


def without_interaction(config: Config, prepared: ModelInputs, user: int, item: int) -> GraphInputs:
    """Removes one interaction from the graph inputs: edges, their weights, degrees and popularity.

    Text features stay, including the user's reviews of the item, and so do parameters and the rows of the closed-form
    components of late fusion, item popularity among them. Arrays keep their shapes (`fused_rec.graph.edit`).

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
    observed, graph_inputs = prepared.observed, prepared.graph_inputs
    if not ((observed.user == user) & (observed.item == item)).any():
        raise ValueError(
            f"user {user} has no training interaction with item {item}; give one that is in the model's graph"
        )
    graph = drop_interaction(graph_inputs.graph, user, item)
    return edited_inputs(config, observed, dataclasses.replace(graph_inputs, graph=graph), user, [item])


def edited_inputs(
    config: Config, observed: Observed, graph_inputs: GraphInputs, user: int, items: Sequence[int]
) -> GraphInputs:
    """Recomputes item statistics without interactions of a user.

    Args:
      config: settings of the run.
      observed: training interactions.
      graph_inputs: with a graph from which the interactions are removed.
      user: user row.
      items: item rows of the removed interactions.

    Returns:
      The inputs with other popularity and trained items.
    """
    kept = ~((observed.user == user) & np.isin(observed.item, items))
    item, n_items = observed.item[kept], len(graph_inputs.popularity)
    popularity = item_counts(item, observed.age[kept], config.model.popularity_half_life, n_items)
    trained = np.bincount(item, minlength=n_items) > 0
    return dataclasses.replace(graph_inputs, trained_items=trained, popularity=popularity)


def counterfactual_effect(
    config: Config,
    params: PyTree,
    prepared: ModelInputs,
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
      ValueError: the model's graph does not have the interaction, or the model is a baseline.
    """
    require_trained(config)
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
