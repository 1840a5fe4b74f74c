"""What would be recommended if a customer did not hold a product: computed anew, not read off the parts."""

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
from fused_rec.graph.build import INTERACTED_BY, INTERACTS, bidirectional_edges
from fused_rec.graph.hetero import hetero_graph
from fused_rec.training.evaluate import scores_of
from fused_rec.training.inputs import Prepared, trained_item_mask
from fused_rec.training.train_step import GraphInputs, compile_key, embed_nodes


class CounterfactualEffect(NamedTuple):
    """Score and rank (from 1) of an item before and after.

    Of a customer of whom nothing else is known, and with model.popularity_weight 0, the score after is a number of
    holders.
    """

    score: float
    rank: int
    score_after: float
    rank_after: int


def without_interaction(config: Config, prepared: Prepared, user: int, item: int) -> GraphInputs:
    """The task as if the user did not hold the item: edges, their weights, degrees and popularity follow.

    Words stay, those that the user wrote about the item among them, and so does what was learned: parameters and the
    rows of the spectrum. Raises ValueError where the user is not seen to hold it.
    """
    observed, graph = prepared.observed, prepared.graph_inputs.graph
    kept = ~((observed.user == user) & (observed.item == item))
    if kept.all():
        raise ValueError(f"user {user} is not seen to hold item {item}; name one of the holdings the model has seen")
    counts = dict(graph.node_types)
    relations = {relation: graph.edges(relation) for relation, _ in graph.relations}
    relations |= bidirectional_edges(INTERACTS, INTERACTED_BY, observed.user[kept], observed.item[kept], counts)
    changed = hetero_graph(counts, relations, np.concatenate([graph.text(node_type) for node_type in counts]))
    changes = {name: getattr(observed, name)[kept] for name in ("user", "item", "age")}
    observed = dataclasses.replace(observed, **changes)
    popularity = item_counts(observed.item, observed.age, config.model.popularity_half_life, prepared.dataset.n_items)
    there = trained_item_mask(prepared.dataset, observed)
    return GraphInputs(changed, build_adjacencies(changed), there, popularity, prepared.graph_inputs.ease)


def counterfactual_effect(
    config: Config,
    params: PyTree,
    prepared: Prepared,
    user: int,
    item: int,
    removed_item: int,
    eligible: Bool[np.ndarray, "I"],
) -> CounterfactualEffect:
    """What becomes of an item's score and of its rank among `candidate_filter` items if the user did not hold
    `holding`.

    Without the holding itself, which nobody has to be told of in either case.
    """
    open_to = eligible.copy()
    open_to[removed_item] = False
    found = []
    for graph_inputs in (prepared.graph_inputs, without_interaction(config, prepared, user, removed_item)):
        given = np.asarray(_scores(compile_key(config), params, graph_inputs, np.array([user], np.int32)))[0]
        found += [float(given[item]), 1 + int((given[open_to] > given[item]).sum())]
    return CounterfactualEffect(*found)


@functools.partial(jax.jit, static_argnums=0)
def _scores(
    config: Config, params: PyTree, graph_inputs: GraphInputs, users: Int32[AnyArray, "B"]
) -> Float32[Array, "B I"]:
    return scores_of(*embed_nodes(config, params, graph_inputs), graph_inputs.popularity, users)
