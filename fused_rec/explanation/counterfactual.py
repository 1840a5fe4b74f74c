"""Counterfactuals: scores and ranks without some sources of the user, and smallest sets that change a top list."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, Float32, PyTree

from fused_rec.baselines.neighbors import item_counts
from fused_rec.config import Config
from fused_rec.data.splits import Observed
from fused_rec.explanation.decomposition import INTERACTION, REVIEW, require_trained
from fused_rec.explanation.leave_one_out import LeaveOneOut, SetScores
from fused_rec.explanation.own_reviews import OwnReviews
from fused_rec.explanation.sources import Source, sources
from fused_rec.graph.edit import drop_edges, drop_interaction
from fused_rec.graph.schema import Relation
from fused_rec.training.evaluate import scores_of
from fused_rec.training.inputs import ModelInputs
from fused_rec.training.sharding import embed_on_one_device
from fused_rec.training.train_step import GraphInputs

LARGEST_SET = 3  # sources: smaller sets are searched exhaustively
MOST_SETS = 5000  # of one size that are tested
PREFIXES = 4  # sets that are completed by each further source at once


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

    Text features stay, including the user's reviews of the item, which are sources of their own (`without_sources`).
    What training fitted stays as well: parameters, the standardization of degrees, and the rows of the closed-form
    components of late fusion, item popularity among them.
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
    config: Config,
    observed: Observed,
    graph_inputs: GraphInputs,
    user: int,
    gone: Sequence[Source],
    reviews: OwnReviews | None = None,
) -> GraphInputs:
    """Removes sources of a user from the graph inputs: edges by `fused_rec.graph.edit.drop_edges`, and texts.

    As in `without_interaction` text features stay, but for those of the reviews among the sources.

    Args:
      config: settings of the run.
      observed: training interactions.
      graph_inputs: graph and item statistics.
      user: user row.
      gone: sources to remove.
      reviews: those that can be removed; None where no source is a review.

    Returns:
      The changed inputs.
    """
    edges: dict[Relation, list[int]] = {}
    for source in gone:
        for relation, edge in source.edges:
            edges.setdefault(relation, []).append(edge)
    changed = dataclasses.replace(graph_inputs, graph=drop_edges(graph_inputs.graph, edges))
    if reviewed := [source.row for source in gone if source.kind == REVIEW]:
        assert reviews is not None
        text = reviews.edited(changed.graph.text, user, reviewed)
        changed = dataclasses.replace(changed, graph=changed.graph.with_text(text))
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
        given = _scores(config, params, graph_inputs, user)
        found += [float(given[item]), 1 + int((given[candidates] > given[item]).sum())]
    return CounterfactualEffect(*found)


class CounterfactualSet(NamedTuple):
    """Sources of a user without which an item leaves the user's top k, or enters it.

    Attributes:
      sources: the sources, in descending order of effect.
      smallest: no smaller set has this effect; False where that is not known.
      rank: rank of the item, from 1.
      rank_after: its rank without the sources, recomputed.
      entering: row of the item, or of the best one that enters in its place; -1 if none is left.
      leaving: row of the item, or of the last one that leaves in its place.
    """

    sources: tuple[Source, ...]
    smallest: bool
    rank: int
    rank_after: int
    entering: int
    leaving: int


def counterfactual_sets(
    model: LeaveOneOut, prepared: ModelInputs, user: int, items: Sequence[int], k: int, eligible: Bool[np.ndarray, "I"]
) -> list[CounterfactualSet | None]:
    """Finds for each item the smallest set of a user's sources without which it leaves the top k, or enters it.

    Scores without each set of one, two and three sources are computed in closed form, once for all items, and tested
    with the most promising first. Where none suffices, or there are more than `MOST_SETS` of a size, sources are
    removed one by one, each time the best, and those that turn out not to be needed are put back. The set that is
    returned is recomputed on the graph without it.

    Args:
      model: of `leave_one_out` for `prepared`.
      prepared: tables and graph, on the host.
      user: user row.
      items: rows of eligible items.
      k: length of the list.
      eligible: candidates of the ranking; items whose interactions are removed are added only if they are among them.

    Returns:
      The set of each item; None if the item stays where it is without any source.
    """
    leads = _Leads(model, prepared, user, items, k, eligible)
    return [_SetSearch(leads, place).search() for place in range(len(items))]


class _Leads:
    """Rankings of a user without some of the sources, numbered by their places in `sources`."""

    def __init__(
        self,
        model: LeaveOneOut,
        prepared: ModelInputs,
        user: int,
        items: Sequence[int],
        k: int,
        eligible: Bool[np.ndarray, "I"],
    ):
        self.model, self.prepared, self.user, self.items, self.k = model, prepared, user, np.asarray(items), k
        self.candidates = np.flatnonzero(eligible)
        self.sources = sources(model.graph, model.reverse, user, model.reviews)
        self.without = SetScores(model, user)
        self.known: dict[frozenset[int], np.ndarray] = {}
        self.scores = functools.lru_cache(maxsize=16)(self._scores)

    def _scores(self, gone: frozenset[int]) -> Float32[np.ndarray, "I"]:
        """All scores on the graph without these sources, recomputed."""
        removed = [self.sources[place] for place in gone]
        config, inputs = self.model.config, self.prepared
        given = inputs.graph_inputs
        edited = without_sources(config, inputs.observed, given, self.user, removed, self.model.reviews)
        return _scores(config, self.model.params, edited, self.user)

    def compute(self, sets: Iterable[frozenset[int]]) -> None:
        """Computes by how much each item is ahead of the k-th best other without each set, all of one size.

        NaN where no score is left, and popularity ranks.
        """
        new = [one for one in sets if one not in self.known]
        if not new:
            return
        without = self.without.scores(np.array([sorted(one) for one in new]), np.arange(len(self.model.popularity)))
        # The k best others are the k best of all or, where the item is one of these, the next one too.
        border = len(self.candidates) - self.k - 1
        best = np.partition(without[:, self.candidates], (border, border + 1), axis=1)[:, border : border + 2]
        own = without[:, self.items]
        lead = own - np.where(own >= best[:, 1:], best[:, :1], best[:, 1:])
        self.known.update(zip(new, np.where(np.ptp(without, axis=1, keepdims=True) == 0, np.nan, lead), strict=True))

    def after(self, gone: frozenset[int]) -> Float[np.ndarray, "P n"]:
        """The leads without `gone` and each further source; infinite for sources that are gone."""
        sets = {place: gone | {place} for place in range(len(self.sources)) if place not in gone}
        self.compute(sets.values())
        found = np.full((len(self.sources), len(self.items)), np.inf)
        for place, one in sets.items():
            found[place] = self.known[one]
        return found


class _SetSearch:
    """Search for a set of sources without which one item leaves the top k, or enters it."""

    def __init__(self, leads: _Leads, place: int):
        self.leads, self.place, self.item = leads, place, int(leads.items[place])
        self.others = leads.candidates[leads.candidates != self.item]
        self.before = leads.scores(frozenset())
        self.rank = self.rank_in(self.before)
        self.leaves = self.rank <= leads.k
        known = leads.sources and len(self.others) >= leads.k
        gain = self.gains(frozenset()) if known else np.zeros(0)
        self.order = np.argsort(-gain, kind="stable").tolist()  # first those without which the item is nearest

    def rank_in(self, scores: np.ndarray) -> int:
        return 1 + int((scores[self.others] > scores[self.item]).sum())

    def gains(self, gone: frozenset[int]) -> Float[np.ndarray, "P"]:
        """How far the item is beyond the border of the top k, without `gone` and each further source."""
        lead = self.leads.after(gone)[:, self.place]
        gain = np.where(np.isnan(lead), np.inf, -lead if self.leaves else lead)
        gain[[*gone]] = -np.inf
        return gain

    def search(self) -> CounterfactualSet | None:
        refuted = 0  # no set of so many sources, or of fewer, suffices
        for size in range(1, min(LARGEST_SET, len(self.order)) + 1):
            if math.comb(len(self.order), size) > MOST_SETS:
                break
            prefixes = [frozenset(prefix) for prefix in self.prefixes(size)]
            for some in (prefixes[start : start + PREFIXES] for start in range(0, len(prefixes), PREFIXES)):
                self.leads.compute({prefix | {last} for prefix in some for last in self.order if last not in prefix})
                for prefix in some:
                    if found := self.completed(prefix):
                        return found
            refuted = size
        return self.greedy(refuted)

    def prefixes(self, size: int) -> list[tuple[int, ...]]:
        """Sets of one source less, of which every set of this size has one: of three sources two are in one half."""
        if size < 3:
            return list(itertools.combinations(self.order[: -size + 1 or None], size - 1))
        halves = (self.order[::2], self.order[1::2])
        pairs = [pair for half in halves for pair in itertools.combinations(half, size - 1)]
        return sorted(pairs, key=lambda pair: sum(map(self.order.index, pair)))

    def completed(self, prefix: frozenset[int]) -> CounterfactualSet | None:
        """A set of the prefix and a further source that suffices."""
        gain = self.gains(prefix)
        for last in np.argsort(-gain, kind="stable")[: int((gain >= 0).sum())].tolist():
            if found := self.verified(prefix | {last}, smallest=True):
                return found
        return None

    def greedy(self, refuted: int) -> CounterfactualSet | None:
        """The first set, source by source, that suffices, less what it does not need."""
        gone: frozenset[int] = frozenset()
        found, added = None, []
        while found is None and len(gone) < len(self.order):
            added.append(int(self.gains(gone).argmax()))
            gone = gone | {added[-1]}
            found = self.verified(gone, smallest=len(gone) == refuted + 1)
        for place in added if found else ():
            rest = gone - {place}
            if len(rest) > refuted and (fewer := self.verified(rest, smallest=len(rest) == refuted + 1)):
                gone, found = rest, fewer
        return found

    def verified(self, gone: frozenset[int], *, smallest: bool) -> CounterfactualSet | None:
        """The set, if a recomputation confirms it."""
        after, k = self.leads.scores(gone), self.leads.k
        rank = self.rank_in(after)
        if (rank > k) != self.leaves:
            return None
        named = tuple(self.leads.sources[place] for place in sorted(gone, key=self.order.index))
        candidates = self.leads.candidates
        old, new = (candidates[np.argsort(-x[candidates], kind="stable")[:k]].tolist() for x in (self.before, after))
        if self.leaves:
            entering = next((other for other in new if other not in old and other != self.item), -1)
            return CounterfactualSet(named, smallest, self.rank, rank, entering, self.item)
        leaving = next(other for other in old[::-1] if other not in new)
        return CounterfactualSet(named, smallest, self.rank, rank, self.item, leaving)


def _scores(config: Config, params: PyTree, graph_inputs: GraphInputs, user: int) -> Float32[np.ndarray, "I"]:
    """All scores of a user, recomputed."""
    embeddings = embed_on_one_device(config, params, graph_inputs)
    return np.asarray(_scores_of(*embeddings, graph_inputs.popularity, np.array([user], np.int32)))[0]


_scores_of = jax.jit(scores_of)
