"""Leave-one-out effects: how much each source of a user changes a score, for all sources at once and exactly.

The effect of a source (interaction, social edge, text-kNN edge, review) is the score minus the score without it: edges
in both directions, their weights, degrees, gates, popularity, texts, norms, and the standard deviations of late fusion.
It equals recomputation (`fused_rec.explanation.counterfactual.without_sources`) up to rounding. Embeddings without
sources are from `fused_rec.explanation.set_removal`; user vectors of closed-form components lose rows.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, Float32, Int, PyTree

from fused_rec.config import Config, ModelConfig
from fused_rec.data.splits import Observed
from fused_rec.explanation.branches import Branch, branches
from fused_rec.explanation.decomposition import INTERACTION, REVIEWED_BY, TIE, source_kind
from fused_rec.explanation.own_reviews import OwnReviews
from fused_rec.explanation.removed_texts import RemovedTexts
from fused_rec.explanation.set_removal import Change, SetRemoval, Term, without_rounding
from fused_rec.explanation.sources import Sources, reverse_relations, senders_of, sources_by_relation
from fused_rec.graph.device_graph import DeviceGraph
from fused_rec.graph.schema import INTERACTED_BY, INTERACTS, ITEM, USER, Relation
from fused_rec.model.late_fusion import (
    GRAPH_BRANCH,
    LAUNCH,
    MIN_SHARE,
    MIN_VARIANCE,
    MODEL,
    TEXT_BRANCH,
    ClosedForm,
    social_relations,
)
from fused_rec.training.train_step import GraphInputs

CHUNK = 1 << 24  # entries of the columns of the sources that are computed together
SET_CHUNK = 1 << 21  # the same of sets of sources, some megabytes
TINY = 1e-12  # as in `fused_rec.model.losses.unit`
CANCELED = 0.05  # a squared norm less than that of what it was is computed again


class Effects(NamedTuple):
    """Effects of the P sources of a user on the scores of n items.

    Attributes:
      kind: as of `Contributions`.
      source: row of the item or neighboring user.
      value: the score minus the score without the source.
      score: the score with all sources.
    """

    kind: list[str]
    source: Int[np.ndarray, "P"]
    value: Float[np.ndarray, "P n"]
    score: Float[np.ndarray, "n"]


class _Gone(NamedTuple):
    """P sets of sources that are removed.

    Attributes:
      changes: embeddings of each trained branch without them.
      items: rows [P, m] of the items whose interactions are removed; -1 for other sources.
      friends: rows [P, m] of the users whose social edges are removed; -1 for other sources.
      text: the user's text features; None where they stay.
    """

    changes: Sequence[Change]
    items: Int[np.ndarray, "P m"]
    friends: Int[np.ndarray, "P m"]
    text: Float32[np.ndarray, "P D"] | None = None


class _Closed(NamedTuple):
    """A closed-form component and the covariance of its item rows."""

    part: ClosedForm
    covariance: Float32[np.ndarray, "R R"]


@dataclasses.dataclass(frozen=True)
class LeaveOneOut:
    """What `effects` reads of a model on one graph; see `leave_one_out`."""

    config: Config
    params: PyTree
    graph: DeviceGraph
    observed: Observed
    popularity: Float32[np.ndarray, "I"]
    age_weight: Float[np.ndarray, "E"]  # what each interaction adds to the popularity of its item
    trained: Mapping[str, float] | None  # weights of the trained components; None without late fusion
    branches: tuple[Branch, ...]
    closed: tuple[_Closed, ...]
    reverse: Mapping[Relation, Relation | None]
    reviews: OwnReviews | None


def leave_one_out(
    config: Config,
    params: PyTree,
    observed: Observed,
    graph_inputs: GraphInputs,
    reviews: OwnReviews | None = None,
) -> LeaveOneOut:
    """Prepares `effects`, once per model and graph.

    Args:
      config: settings of the run.
      params: parameters, not sharded.
      observed: interactions of the graph.
      graph_inputs: graph and item statistics, on the host.
      reviews: of `fused_rec.explanation.own_reviews.own_reviews`; None: reviews are no sources.

    Returns:
      Embeddings of all layers, sparse matrices, and covariances of late fusion.
    """
    graph, fusion = graph_inputs.graph, graph_inputs.fusion
    parts = fusion.closed if fusion else ()
    closed = tuple(_Closed(jax.device_get(part), _covariance(np.asarray(part.target))) for part in parts)
    return LeaveOneOut(
        config,
        params,
        graph,
        observed,
        np.asarray(graph_inputs.popularity),
        _age_weight(config.model, observed),
        None if fusion is None else {name: float(weight) for name, weight in fusion.trained.items()},
        branches(config, params, graph),
        closed,
        reverse_relations(graph),
        reviews,
    )


def _age_weight(config: ModelConfig, observed: Observed) -> np.ndarray:
    """What each interaction adds to the popularity of its item, as in `fused_rec.baselines.neighbors.item_counts`."""
    if not config.popularity_half_life or not len(observed.item):
        return np.ones(len(observed.item))
    weight = np.exp2((observed.age.min() - observed.age.astype(np.float64)) / config.popularity_half_life)
    return weight * (len(weight) / weight.sum())


def _covariance(rows: np.ndarray) -> np.ndarray:
    centered = rows - rows.mean(0, keepdims=True)
    return centered.T @ centered / len(rows)


def effects(model: LeaveOneOut, user: int, items: Sequence[int] | Int[np.ndarray, "n"]) -> Effects:
    """Computes the effect of each source of a user on the scores of items.

    Args:
      model: of `leave_one_out`.
      user: user row.
      items: n item rows.

    Returns:
      The effects, in the order of `fused_rec.explanation.sources.sources`. The score is the sum of the components, also
      where nothing is left of the user, whom `fused_rec.explanation.decomposition.scores` ranks by popularity.
    """
    rows = np.asarray(items, np.int64)
    whole = _scores(model, user, _nothing(model, user), rows)
    kinds, found, values = [], [], []
    nodes = sum(count for _, count in model.graph.node_types)
    layers = max([1, *(len(branch.layers) - 1 for branch in model.branches)])
    size = max(1, CHUNK // (nodes * 4 * layers))  # columns over the nodes: at most four new ones a source and layer
    for some in _divided(_sources(model, user), size):
        given = SetScores(model, user, some)
        kinds += given.kinds.tolist()
        found.append(given.rows)
        values.append(whole - given.scores(np.arange(len(given.rows))[:, None], rows))
    if not kinds:
        return Effects([], np.zeros(0, np.int64), np.zeros((0, len(rows))), whole[0])
    return Effects(kinds, np.concatenate(found), np.concatenate(values), whole[0])


def _sources(model: LeaveOneOut, user: int) -> list[Sources]:
    return sources_by_relation(model.graph, model.reverse, user, model.reviews)


def _divided(groups: list[Sources], size: int) -> Iterator[list[Sources]]:
    """Divides sources into parts of at most `size`."""
    part, room = [], size
    for group in groups:
        start = 0
        while start < len(group.rows):
            part.append(_part(group, slice(start, start + room)))
            taken = len(part[-1].rows)
            start, room = start + taken, room - taken
            if not room:
                yield part
                part, room = [], size
    if part:
        yield part


class SetScores:
    """Scores of a user without sets of their sources, exactly; columns over the nodes are computed once.

    Args:
      model: of `leave_one_out`.
      user: user row.
      groups: the sources that sets may have; None: all.
    """

    def __init__(self, model: LeaveOneOut, user: int, groups: list[Sources] | None = None):
        groups = _sources(model, user) if groups is None else groups
        self.model, self.user = model, user
        self.texts = None
        if model.reviews is not None and any(group.relation == REVIEWED_BY for group in groups):
            self.texts = RemovedTexts(model.reviews, user, np.asarray(model.graph.text[USER])[user], groups)
        self.removals = [SetRemoval(branch, user, groups, self.texts) for branch in model.branches]
        self.kinds = np.array([source_kind(group.relation) for group in groups for _ in group.rows])
        self.rows = np.concatenate([np.zeros(0, np.int64), *(group.rows for group in groups)]).astype(np.int64)

    def scores(
        self, sets: Int[np.ndarray, "P m"], items: Sequence[int] | Int[np.ndarray, "n"]
    ) -> Float[np.ndarray, "P n"]:
        """Computes the scores without each set.

        Args:
          sets: P sets of m sources, all different, numbered in the order of the groups: of all sources as in
            `fused_rec.explanation.sources.sources`.
          items: n item rows.

        Returns:
          The scores, as of `effects`.
        """
        rows = np.asarray(items, np.int64)
        whole = _scores(self.model, self.user, _nothing(self.model, self.user), rows)
        if not sets.shape[1]:
            return np.repeat(whole, len(sets), axis=0)
        layers = max([1, *(len(branch.layers) for branch in self.model.branches)])
        # Of a set each branch has up to three columns a source, layer and item.
        step = max(1, SET_CHUNK // (len(self.model.popularity) * layers * (3 * sets.shape[1] + 3)))
        found = []
        for some in (sets[start : start + step] for start in range(0, len(sets), step)):
            nodes = np.concatenate([np.zeros((len(some), 1), np.int64), some + 1], axis=1)
            texts = self.texts and self.texts.of_sets(nodes)
            changes = [removal.without(nodes, texts) for removal in self.removals]
            gone = _gone(changes, self.kinds[some], self.rows[some], texts.user if texts else None)
            found.append(np.where(self._changes(gone)[:, None], _scores(self.model, self.user, gone, rows), whole))
        return np.concatenate(found)

    def _changes(self, gone: _Gone) -> Bool[np.ndarray, "P"]:
        """Which sets change a score by more than rounding."""
        found, closed = np.array((gone.items >= 0).any(1)), [component.part for component in self.model.closed]
        if any(part.friends is not None for part in closed):
            found |= (gone.friends >= 0).any(1)
        if gone.text is not None and any(part.user_source == "text" for part in closed):
            found |= (gone.text != np.asarray(self.model.graph.text[USER])[self.user]).any(1)
        for branch, change in zip(self.model.branches, gone.changes, strict=True):
            found |= (change.user != branch.out[USER][self.user]).any(1)
            for term in change.terms:
                found |= term.rows.any((1, 2))
        return found


def _nothing(model: LeaveOneOut, user: int) -> _Gone:
    """One set without a source."""
    nothing = np.zeros((1, 0), np.int64)
    return _Gone([Change(branch.out[USER][[user]], []) for branch in model.branches], nothing, nothing)


def _gone(changes: Sequence[Change], kinds: np.ndarray, rows: Int[np.ndarray, "P m"], text: np.ndarray | None) -> _Gone:
    """Sets of sources of these kinds [P, m] and rows."""
    items, friends = kinds == INTERACTION, np.char.startswith(kinds, TIE)
    return _Gone(changes, np.where(items, rows, -1), np.where(friends, rows, -1), text)


def _part(group: Sources, at: slice) -> Sources:
    return group._replace(rows=group.rows[at], edges=group.edges[at], back_edges=group.back_edges[at])


# --- the score -----------------------------------------------------------------------------------------------------


def _scores(model: LeaveOneOut, user: int, gone: _Gone, items: np.ndarray) -> np.ndarray:
    """Scores [P, n] without each of the sets."""
    if model.trained is None:
        return _trained_scores(model, user, gone, items)[MODEL][0].astype(np.float64)
    parts = []  # (name, weight, 1 / standard deviation [P or 1], scores of the items [P or 1, n])
    if model.trained:  # a standard deviation is one over all items
        by_name = _trained_scores(model, user, gone, np.arange(len(model.popularity)))
        for name, weight in model.trained.items():
            scored, bound = by_name[name]
            parts.append((name, weight, _inverse(scored.astype(np.float64).var(1), bound), scored[:, items]))
    for closed in model.closed:
        vectors = _closed_vectors(model.graph, closed.part, user, gone)
        variance = ((vectors @ closed.covariance) * vectors).sum(1).astype(np.float64)
        bound = (vectors * vectors).sum(1) * np.trace(closed.covariance)
        scored = vectors @ closed.part.target[items].T
        parts.append((closed.part.name, float(closed.part.weight), _inverse(variance, bound), scored))
    others = [(weight, inverse > 0) for name, weight, inverse, _ in parts if name not in LAUNCH]
    share = sum((weight * active for weight, active in others), np.zeros(1)) / sum(weight for weight, _ in others)
    share = np.where(share < MIN_SHARE, 0, share)
    factors = [weight * inverse * (share if name in LAUNCH else 1) for name, weight, inverse, _ in parts]
    scores = (factor[:, None] * part[3].astype(np.float64) for factor, part in zip(factors, parts, strict=True))
    return sum(scores, np.zeros((1, len(items))))


def closed_slopes(given: SetScores, item: int) -> Float[np.ndarray, "n"]:
    """Computes the derivatives of the closed-form components of a score by a factor on the edges of each source.

    A component is w <x, y> / sigma with sigma^2 = x'Cx, and x a sum over sources.

    Args:
      given: of the user, without reviews.
      item: item row.

    Returns:
      A derivative per source, where all factors are 1. With the same factor f on all they are 1 / f of these, since
      x / sigma stays.
    """
    model, found, shares = given.model, np.zeros(len(given.rows)), []
    nothing = _nothing(model, given.user)
    for part, covariance in model.closed:
        x = _closed_vectors(model.graph, part, given.user, nothing)[0].astype(np.float64)
        along = covariance @ x
        inverse = float(_inverse(np.atleast_1d(x @ along), (x @ x) * np.trace(covariance))[0])
        shares.append((part, float(part.weight), inverse, along, x))
    # The trained components say something about every user who has a source.
    total = sum((model.trained or {}).values()) + sum(weight for part, weight, *_ in shares if part.name not in LAUNCH)
    inactive = sum(weight for part, weight, inverse, *_ in shares if part.name not in LAUNCH and not inverse)
    for part, weight, inverse, along, x in shares:
        by_source, y = _by_source(given, part), np.asarray(part.target)[item]
        slope = inverse * (by_source @ y) - (x @ y) * inverse**3 * (by_source @ along)
        found += weight * (1 - inactive / total if part.name in LAUNCH else 1) * slope
    return found


def _by_source(given: SetScores, part: ClosedForm) -> Float[np.ndarray, "n R"]:
    """Derivatives of the user's vector of a closed-form component by a factor on each source's edges."""
    if part.user_source in ("constant", "text"):
        return np.zeros((len(given.rows), part.target.shape[1]))
    blocks = []
    if part.source.shape[1]:
        own = (given.kinds == INTERACTION)[:, None]
        blocks.append(np.where(own, np.asarray(part.source)[np.where(own[:, 0], given.rows, 0)], 0))
    if part.friends is not None:
        own, rows = np.char.startswith(given.kinds, TIE)[:, None], np.asarray(part.friends)
        social = social_relations(given.model.graph)
        friends = np.concatenate([senders_of(given.model.graph, relation, given.user) for relation in social])
        count = max(len(friends), 1)  # the sum is divided by its root
        # At the kink of max(count, 1) the mean of both sides, as JAX has it.
        less = rows[friends].sum(0) / (2 * count**1.5) * (1 if len(friends) > 1 else 0.5)
        blocks.append(np.where(own, rows[np.where(own[:, 0], given.rows, 0)] / count**0.5 - less, 0))
    return np.concatenate(blocks, axis=1).astype(np.float64)


def _inverse(variance: np.ndarray, bound: np.ndarray | float) -> np.ndarray:
    """One over the standard deviation, 0 where the variance is rounding, as `inverse_deviation` has it."""
    varies = variance > MIN_VARIANCE * bound
    return np.where(varies, 1 / np.sqrt(np.where(varies, variance, 1)), 0)


def _closed_vectors(graph: DeviceGraph, part: ClosedForm, user: int, gone: _Gone) -> np.ndarray:
    """The user's vector of a closed-form component, [1, R], or [P, R] where sources are parts of it."""
    if part.user_source == "constant":
        return np.ones((1, 1), np.float32)
    if part.user_source == "text":
        return np.asarray(graph.text[USER])[[user]] if gone.text is None else gone.text
    sums = []
    if part.source.shape[1]:
        source = np.asarray(part.source)
        own = source[senders_of(graph, INTERACTED_BY, user)].sum(0, keepdims=True)
        sums.append(own - _sums(source, gone.items))
    if part.friends is not None:
        friends = np.concatenate([senders_of(graph, relation, user) for relation in social_relations(graph)])
        rows = np.asarray(part.friends)
        total = rows[friends].sum(0, keepdims=True) - _sums(rows, gone.friends)
        count = len(friends) - (gone.friends >= 0).sum(1, keepdims=True)
        sums.append(total / np.sqrt(np.maximum(count, 1)).astype(np.float32))
    return np.concatenate(sums, axis=1)


def _sums(rows: np.ndarray, of: Int[np.ndarray, "P m"]) -> np.ndarray:
    """Sums [P, R] of the rows of each set."""
    return (rows[of] * (of >= 0)[:, :, None]).sum(1, dtype=rows.dtype)


def _trained_scores(
    model: LeaveOneOut, user: int, gone: _Gone, wanted: np.ndarray
) -> dict[str, tuple[np.ndarray, Any]]:
    """Scores [P, n] of the trained components, and the bounds of their variances."""
    count = len(gone.items)
    found, sizes, spreads = [], [], []
    for branch, change in zip(model.branches, gone.changes, strict=True):
        scored, size, spread = _branch_scores(branch, change, wanted)
        found.append(np.broadcast_to(scored, (count, len(wanted))))
        sizes.append(size)
        spreads.append(spread)
    bias = _popularity_bias(model, user, gone, wanted)
    if len(found) == 1:
        joined = found[0]
    else:
        adjacency = model.graph.adjacencies[INTERACTS]
        n_interactions = np.diff(adjacency.receiver_start)[wanted] - _at_items(
            model, np.ones(gone.items.shape), gone, wanted
        )
        share = (n_interactions / (n_interactions + 1)).astype(np.float32)
        joined = share * found[0] + (1 - share) * found[1]
    names = (MODEL, GRAPH_BRANCH, TEXT_BRANCH)[: 1 if len(found) == 1 else 3]
    with_bias = bias is not None
    totals = [sum(sizes), *sizes]
    return {
        name: (scored + bias if with_bias else scored, (total + with_bias) * sum(spreads))
        for name, scored, total in zip(names, (joined, *found), totals, strict=False)
    }


def _popularity_bias(model: LeaveOneOut, user: int, gone: _Gone, wanted: np.ndarray) -> np.ndarray | None:
    """The popularity bias of items, [P, n] without each of the sources; None without one."""
    factor = model.config.model.popularity_weight * model.config.train.temperature
    if not factor:
        return None
    counts = model.popularity[None, wanted].astype(np.float64)
    if (gone.items >= 0).any():
        observed, n_edges = model.observed, len(model.observed.item)
        own = np.flatnonzero(observed.user == user)
        order = np.argsort(observed.item[own], kind="stable")
        place = np.searchsorted(observed.item[own][order], np.maximum(gone.items, observed.item[own].min()))
        lost = model.age_weight[own][order][place] * (gone.items >= 0)
        counts = counts - _at_items(model, lost, gone, wanted)
        # Counts with decay are scaled to the number of interactions.
        left = n_edges - (gone.items >= 0).sum(1)
        counts = np.maximum(counts, 0) * (left / np.maximum(n_edges - lost.sum(1), 1e-12))[:, None]
    return (factor * np.log1p(counts)).astype(np.float32)


def _at_items(
    model: LeaveOneOut, values: Float[np.ndarray, "P m"], gone: _Gone, wanted: np.ndarray
) -> Float[np.ndarray, "P n"]:
    """The values of removed interactions at their items, 0 at others."""
    found = np.zeros((len(gone.items), len(model.popularity)))
    of_set = np.broadcast_to(np.arange(len(gone.items))[:, None], gone.items.shape)
    np.add.at(found, (of_set, np.maximum(gone.items, 0)), np.where(gone.items >= 0, values, 0))
    return found[:, wanted]


def _branch_scores(branch: Branch, change: Change, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Scores [P, n] of one branch, |u|^2 [P], and the trace of the covariance of the items' rows."""
    cosine = branch.config.score == "cosine"
    items, user = branch.out[ITEM], change.user
    if cosine:
        user = user / np.sqrt((user * user).sum(1, keepdims=True) + TINY)
    rows = items[wanted]
    scored = user @ rows.T
    size, own = (user * user).sum(1), (rows * rows).sum(1)
    spread = 1.0 if cosine else float(items.var(0).sum())
    if not change.terms:
        return scored / np.sqrt(own + TINY) if cosine else scored, size, spread
    if sum(term.rows.shape[1] for term in change.terms) > rows.shape[1]:  # more products than numbers of a row
        return _rebuilt_scores(rows, user, change.terms, wanted, cosine), size, spread
    columns = np.concatenate([term.items[wanted] for term in change.terms], axis=2).swapaxes(0, 1)  # [P, n, T]
    changes = np.concatenate([term.rows for term in change.terms], axis=1)  # [P, T, K]
    scored = scored + (columns @ (changes @ user[:, :, None]))[:, :, 0]
    if not cosine:
        return scored, size, spread
    turned = changes.swapaxes(1, 2)
    squares = own + (columns * (2 * (rows @ turned) + columns @ (changes @ turned))).sum(2)
    for source, item in np.argwhere(squares < CANCELED * own):  # differences of large numbers: row by row
        exact = rows[[item]] + columns[source, item] @ changes[source]
        [left] = without_rounding(exact, rows[[item]])
        scored[source, item], squares[source, item] = left @ user[source], left @ left
    return scored / np.sqrt(squares + TINY), size, spread


def _rebuilt_scores(
    rows: np.ndarray, user: np.ndarray, terms: Sequence[Term], wanted: np.ndarray, cosine: bool
) -> Float[np.ndarray, "P n"]:
    """Scores of the items' rows [n, K] with their changes, set by set."""
    scored = np.empty((len(user), len(rows)), np.float32)
    for place, own in enumerate(user):
        changed = rows + sum(term.items[wanted, place] @ term.rows[place] for term in terms)
        left = without_rounding(changed, rows)
        scored[place] = left @ own
        if cosine:
            scored[place] /= np.sqrt(np.einsum("nk,nk->n", left, left) + TINY)
    return scored
