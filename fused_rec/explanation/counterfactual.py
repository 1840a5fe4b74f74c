"""Counterfactuals: scores and ranks without some sources of the user, and smallest sets that change a top list."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int32, PyTree

from fused_rec.baselines.neighbors import item_counts
from fused_rec.config import Config
from fused_rec.data.splits import Observed
from fused_rec.distributed.devices import AnyArray
from fused_rec.explanation.decomposition import INTERACTION, require_trained
from fused_rec.explanation.leave_one_out import LeaveOneOut, effects, on_edited
from fused_rec.explanation.sources import Source, sources
from fused_rec.graph.edit import drop_edges, drop_interaction
from fused_rec.graph.schema import Relation
from fused_rec.training.evaluate import scores_of
from fused_rec.training.inputs import ModelInputs
from fused_rec.training.train_step import GraphInputs, compile_key, embed_nodes

LARGEST_SET = 3  # sources: smaller sets are searched exhaustively
MOST_GRAPHS = 500  # without each of which effects are computed, for all sets of a size


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

    Text features stay, including the user's reviews of the item, and so does what training fitted: parameters, the
    standardization of degrees, and the rows of the closed-form components of late fusion, item popularity among them.
    Arrays keep their shapes (`fused_rec.graph.edit`).

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
        dataset = prepared.dataset
        ids = dataset.users["user_id"][user].as_py(), dataset.items["item_id"][item].as_py()
        raise ValueError(
            f"user {ids[0]} has no training interaction with item {ids[1]}; give one that is in the model's graph"
        )
    graph = drop_interaction(graph_inputs.graph, user, item)
    return edited_inputs(config, observed, dataclasses.replace(graph_inputs, graph=graph), user, [item])


def without_interactions(observed: Observed, user: int, items: Sequence[int]) -> Observed:
    """Removes interactions of a user with items from the observed ones; reviews stay."""
    kept = ~((observed.user == user) & np.isin(observed.item, items))
    return dataclasses.replace(observed, user=observed.user[kept], item=observed.item[kept], age=observed.age[kept])


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
    left, n_items = without_interactions(observed, user, items), len(graph_inputs.popularity)
    popularity = item_counts(left.item, left.age, config.model.popularity_half_life, n_items)
    trained = np.bincount(left.item, minlength=n_items) > 0
    return dataclasses.replace(graph_inputs, trained_items=trained, popularity=popularity)


def without_sources(
    config: Config, observed: Observed, graph_inputs: GraphInputs, user: int, gone: Sequence[Source]
) -> GraphInputs:
    """Removes sources of a user from the graph inputs, by `fused_rec.graph.edit.drop_edges`.

    As in `without_interaction` text features stay.

    Args:
      config: settings of the run.
      observed: training interactions.
      graph_inputs: graph and item statistics.
      user: user row.
      gone: sources to remove.

    Returns:
      The changed inputs.
    """
    edges: dict[Relation, list[int]] = {}
    for source in gone:
        for relation, edge in source.edges:
            edges.setdefault(relation, []).append(edge)
    changed = dataclasses.replace(graph_inputs, graph=drop_edges(graph_inputs.graph, edges))
    items = [source.row for source in gone if source.kind == INTERACTION]
    return edited_inputs(config, observed, changed, user, items)


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


def score_of(config: Config, params: PyTree, graph_inputs: GraphInputs, user: int, item: int) -> float:
    """Computes one score.

    Args:
      config: settings of the run.
      params: parameters.
      graph_inputs: graph and item statistics.
      user: user row.
      item: item row.

    Returns:
      The sum of the components, also for a user of whom nothing is known.
    """
    return float(_score(compile_key(config), params, graph_inputs, user, item))


@functools.partial(jax.jit, static_argnums=0)
def _score(
    config: Config, params: PyTree, graph_inputs: GraphInputs, user: int | AnyArray, item: int | AnyArray
) -> Float32[Array, ""]:
    users, items = embed_nodes(config, params, graph_inputs)
    return users[user] @ items[item]


class CounterfactualSet(NamedTuple):
    """Sources of a user without which an item leaves the user's top k.

    Attributes:
      sources: the sources, in descending order of effect.
      smallest: no smaller set has this effect; False where the search was greedy.
      rank: rank of the item, from 1.
      rank_after: its rank without the sources, above k, recomputed.
      entering: row of the best item that enters the top k; -1 if none is left.
    """

    sources: tuple[Source, ...]
    smallest: bool
    rank: int
    rank_after: int
    entering: int


def counterfactual_set(
    model: LeaveOneOut, prepared: ModelInputs, user: int, item: int, k: int, eligible: Bool[np.ndarray, "I"]
) -> CounterfactualSet | None:
    """Finds the smallest set of a user's sources without which an item leaves the top k.

    Sets of one source are tested by their effects, sets of two and three by the effects on the graph without one or two
    of them, in descending order of effect. Where none suffices, or three would take more than `MOST_GRAPHS` graphs,
    sources are removed one by one, each time the one without which the item is ahead least, and those that turn out not
    to be needed are put back. The set that is returned is recomputed.

    Args:
      model: of `leave_one_out` for `prepared`.
      prepared: tables and graph, on the host.
      user: user row.
      item: row of an item in the top k.
      k: length of the list.
      eligible: candidates of the ranking; items whose interactions are removed are added only if they are among them.

    Returns:
      The set; None if the item is not in the top k, or stays there without any source.
    """
    search = _SetSearch(model, prepared, user, item, k, eligible)
    if search.rank > k:
        return None
    for size in range(1, LARGEST_SET + 1):
        if math.comb(len(search.sources), size - 1) > MOST_GRAPHS:
            break
        if found := search.of_size(size):
            return found
    return search.greedy()


class _SetSearch:
    """Search for a set of sources without which an item leaves the top k."""

    def __init__(
        self, model: LeaveOneOut, prepared: ModelInputs, user: int, item: int, k: int, eligible: Bool[np.ndarray, "I"]
    ):
        self.model, self.prepared, self.user, self.item, self.k = model, prepared, user, item, k
        self.others = np.flatnonzero(eligible & (np.arange(len(eligible)) != item))
        self.sources = sources(model.graph, model.reverse, user)
        self.before = self.recomputed(())
        self.rank = self.rank_in(self.before)
        lead = self.leads(()) if self.sources else np.zeros(0)
        self.order = np.argsort(lead, kind="stable").tolist()  # first those without which the item is ahead least

    def edited(self, gone: Sequence[int]) -> GraphInputs:
        removed = [self.sources[place] for place in gone]
        return without_sources(
            self.model.config, self.prepared.observed, self.prepared.graph_inputs, self.user, removed
        )

    def recomputed(self, gone: Sequence[int]) -> Float32[np.ndarray, "I"]:
        users = np.array([self.user], np.int32)
        return np.asarray(_scores(compile_key(self.model.config), self.model.params, self.edited(gone), users))[0]

    def rank_in(self, scores: np.ndarray) -> int:
        return 1 + int((scores[self.others] > scores[self.item]).sum())

    def leads(self, gone: Sequence[int]) -> Float[np.ndarray, "P"]:
        """By how much the item is ahead of the k-th best other without `gone` and each further source.

        Infinite for sources that are gone, minus infinite where no score is left: popularity ranks then.
        """
        model = self.model
        if gone:
            away = [self.sources[place].row for place in gone if self.sources[place].kind == INTERACTION]
            model = on_edited(model, without_interactions(model.observed, self.user, away), self.edited(gone))
        given = effects(model, self.user, np.arange(len(model.popularity)))
        without = given.score - given.value
        lead = np.full(len(without), np.inf)
        if len(self.others) >= self.k:
            best = np.partition(without[:, self.others], len(self.others) - self.k, axis=1)[:, -self.k :].min(1)
            lead = without[:, self.item] - best
        lead = np.where(np.ptp(without, axis=1) == 0, -np.inf, lead)
        found = np.full(len(self.sources), np.inf)
        found[np.setdiff1d(np.arange(len(found)), gone)] = lead
        return found

    def of_size(self, size: int) -> CounterfactualSet | None:
        """The first set of a size, in the order of the sources, without which the item leaves the top k."""
        for first in itertools.combinations(range(len(self.order)), size - 1):
            gone = [self.order[place] for place in first]
            lead = self.leads(gone)
            later = [self.order[place] for place in range(first[-1] + 1 if first else 0, len(self.order))]
            for last in sorted((place for place in later if lead[place] < 0), key=lambda place: lead[place]):
                if found := self.verified([*gone, last], smallest=True):
                    return found
        return None

    def greedy(self) -> CounterfactualSet | None:
        """The first set, source by source, without which the item leaves the top k, less what it does not need."""
        gone: list[int] = []
        found = None
        while found is None and len(gone) < len(self.sources):
            gone.append(int(self.leads(gone).argmin()))
            found = self.verified(gone, smallest=False)
        for place in gone if found else ():
            rest = [other for other in gone if other != place]
            if smaller := self.verified(rest, smallest=False):
                gone, found = rest, smaller
        return found

    def verified(self, gone: list[int], *, smallest: bool) -> CounterfactualSet | None:
        """The set, if a recomputation confirms it."""
        after = self.recomputed(gone)
        rank = self.rank_in(after)
        if rank <= self.k:
            return None
        first = np.argsort(-self.before[self.others], kind="stable")[: self.k - 1]
        top = self.others[np.argsort(-after[self.others], kind="stable")[: self.k]]
        entering = [other for other in top.tolist() if other not in set(self.others[first].tolist())]
        named = tuple(self.sources[place] for place in sorted(gone, key=self.order.index))
        return CounterfactualSet(named, smallest, self.rank, rank, entering[0] if entering else -1)


@functools.partial(jax.jit, static_argnums=0)
def _scores(
    config: Config, params: PyTree, graph_inputs: GraphInputs, users: Int32[AnyArray, "B"]
) -> Float32[Array, "B I"]:
    return scores_of(*embed_nodes(config, params, graph_inputs), graph_inputs.popularity, users)
