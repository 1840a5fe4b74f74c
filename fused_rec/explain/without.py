"""What would be recommended if a customer did not hold a product: computed anew, not read off the parts."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Bool, Float32, Int32, PyTree

from fused_rec.config import Config
from fused_rec.devices import AnyArray
from fused_rec.graph.build import HELD_BY, HOLDS, both_ways
from fused_rec.graph.hetero import hetero_graph
from fused_rec.graph.propagate import adjacencies
from fused_rec.model.baselines import counted
from fused_rec.train.measure import scores_of
from fused_rec.train.prepare import Prepared, present
from fused_rec.train.step import Task, embed, program


class Change(NamedTuple):
    """Score and rank (from 1) of an item before and after.

    Of a customer of whom nothing else is known, and with model.popularity 0, the score after is a number of holders.
    """

    score: float
    rank: int
    score_after: float
    rank_after: int


def without_holding(config: Config, prepared: Prepared, user: int, item: int) -> Task:
    """The task as if the user did not hold the item: edges, their weights, degrees and popularity follow.

    Words stay, those that the user wrote about the item among them, and so does what was learned: parameters and the
    rows of the spectrum. Raises ValueError where the user is not seen to hold it.
    """
    observed, graph = prepared.observed, prepared.task.graph
    kept = ~((observed.user == user) & (observed.item == item))
    if kept.all():
        raise ValueError(f"user {user} is not seen to hold item {item}; name one of the holdings the model has seen")
    counts = dict(graph.node_types)
    relations = {relation: graph.edges(relation) for relation, _ in graph.relations}
    relations |= both_ways(HOLDS, HELD_BY, observed.user[kept], observed.item[kept], counts)
    changed = hetero_graph(counts, relations, np.concatenate([graph.text(node_type) for node_type in counts]))
    changes = {name: getattr(observed, name)[kept] for name in ("user", "item", "age")}
    observed = dataclasses.replace(observed, **changes)
    popularity = counted(observed.item, observed.age, config.model.half_life, prepared.dataset.n_items)
    there = present(prepared.dataset, observed)
    return Task(changed, adjacencies(changed), there, popularity, prepared.task.spectrum)


def effect(
    config: Config,
    params: PyTree,
    prepared: Prepared,
    user: int,
    item: int,
    holding: int,
    eligible: Bool[np.ndarray, "I"],
) -> Change:
    """What becomes of an item's score and of its rank among `eligible` items if the user did not hold `holding`.

    Without the holding itself, which nobody has to be told of in either case.
    """
    open_to = eligible.copy()
    open_to[holding] = False
    found = []
    for task in (prepared.task, without_holding(config, prepared, user, holding)):
        given = np.asarray(_scores(program(config), params, task, np.array([user], np.int32)))[0]
        found += [float(given[item]), 1 + int((given[open_to] > given[item]).sum())]
    return Change(*found)


@functools.partial(jax.jit, static_argnums=0)
def _scores(config: Config, params: PyTree, task: Task, users: Int32[AnyArray, "B"]) -> Float32[Array, "B I"]:
    return scores_of(*embed(config, params, task), task.popularity, users)
