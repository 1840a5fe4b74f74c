"""Content of the HTML report of a finished run, as plain values for `fused_rec.reporting.page`."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int, Int64
from tqdm import tqdm

from fused_rec.config import Config
from fused_rec.data.dataset import Dataset, column
from fused_rec.data.io.arrow import pc
from fused_rec.evaluation.ranking import CandidateFilter, UserMetrics
from fused_rec.evaluation.significance import Difference, mean_intervals, paired_bootstraps
from fused_rec.evaluation.suitability import Gaps, group_gaps, groups_of, suitable
from fused_rec.explanation.catalogs import ENGLISH, SOURCE, Catalog
from fused_rec.explanation.counterfactual import CounterfactualEffect, counterfactual_effect, counterfactual_sets
from fused_rec.explanation.decomposition import INTERACTION, SIMILAR_USERS, Contributions
from fused_rec.explanation.explained_model import ExplainedModel, contributions_and_effects, explained_model
from fused_rec.explanation.paths import Path, best_paths
from fused_rec.explanation.reasons import Reason, names, reasons, set_sentence
from fused_rec.explanation.stability import ExplainedItem, explained_item, explained_items, survives
from fused_rec.explanation.token_attribution import attribute_tokens, attributor
from fused_rec.graph.build import attribute_values
from fused_rec.graph.schema import INTERACTED_BY, INTERACTS, ITEM, USER, Relation
from fused_rec.serving.recommender import rank_chunks as ranked
from fused_rec.training.evaluate import scorer, user_groups
from fused_rec.training.inputs import ModelInputs, Prepared
from fused_rec.training.train_step import TrainState

METRICS = ("ndcg@10", "recall@10", "auc")
DRAWS = 2000  # resamples of an interval
PATHS = 3  # drawn for a recommendation
TEXTS = 2  # of the customer and of the product whose words are weighed
TEXT_TITLES = {USER: "What the customer says", ITEM: "What is said of the product"}
EDGES = 3_000_000  # of a graph in which a holding is taken away and everything computed anew


class Model(NamedTuple):
    """A recommender measured on a part: of each metric (mean, low, high), and by how much the run's own is better.

    against: None for the run's own model.
    """

    name: str
    metrics: Mapping[str, tuple[float, float, float]]
    against: Mapping[str, Difference] | None


class Sliced(NamedTuple):
    """A metric by groups of customers."""

    title: str
    metric: str
    gaps: Gaps


class Span(NamedTuple):
    """text[start:end] of a passage adds `value` to the score."""

    start: int
    end: int
    value: float


class Passage(NamedTuple):
    """A text of the customer or of the product; its spans ascend and do not overlap."""

    title: str
    text: str
    spans: tuple[Span, ...] = ()


class Hop(NamedTuple):
    """A node of a path: `node` identifies it, `by` is its relation to the node before."""

    node: tuple[str, int]
    label: str
    by: str


class Route(NamedTuple):
    """A path from the customer on. arrives: its last node is the product itself, reached by the last hop.

    by_text: what stands at its start and is likest to the product are words, and not a learned row.
    """

    hops: tuple[Hop, ...]
    arrives: bool
    by_text: bool
    value: float


class Recommended(NamedTuple):
    """One product for one customer.

    effect: (name of a holding, what changes without it). survived: of each reason, in how many other runs it survives,
    of how many that know customer and product. without: the smallest set without which another product would be in its
    place, as a sentence. language: of the sentences.
    """

    rank: int
    item_id: str
    name: str
    score: float
    reasons: tuple[Reason, ...] = ()
    survived: tuple[tuple[int, int], ...] = ()
    routes: tuple[Route, ...] = ()
    effect: tuple[str, CounterfactualEffect] | None = None
    passages: tuple[Passage, ...] = ()
    without: str = ""
    language: str = SOURCE


class Customer(NamedTuple):
    """A customer whose recommendations are shown. interactions: names of what the model has seen them hold.

    name: the id, unless names were asked for.
    """

    user_id: str
    name: str
    interactions: tuple[str, ...]
    ties: int
    items: tuple[Recommended, ...]


@dataclasses.dataclass(frozen=True)
class ReportData:
    """Everything on the page.

    results: of `results.json`. served: what the recommendations use, as `describe_served` takes it. curve: lines of
    `train.curves.read_curves`. rules: of `train.measure.measure_rules`, None without rules. selection: how the
    customers were, as in "5 customers, drawn at random". changed: of `fused_rec.reporting.diff.diff`, from the run
    before to this one, None without one. stability: the same from this run to each other one.
    """

    results: Mapping[str, Any]
    counts: Mapping[str, int]
    served: Mapping[str, Any]
    digests: Mapping[str, str]
    split: str
    models: tuple[Model, ...]
    curve: tuple[Mapping[str, Any], ...]
    slices: tuple[Sliced, ...]
    rules: Mapping[str, Any] | None
    customers: tuple[Customer, ...]
    selection: str
    changed: Mapping[str, Any] | None = None
    stability: tuple[Mapping[str, Any], ...] = ()


TokenPassages = Callable[[int, int], tuple[Passage, ...]]


class Explain(NamedTuple):
    """What is shown of each customer.

    Attributes:
      k: number of products.
      token_passages: of `passages`.
      others: explained models of other runs, in which reasons may survive.
      with_names: whether customers are named.
      catalog: language of the reasons.
    """

    k: int
    token_passages: TokenPassages
    others: Sequence[ExplainedModel] = ()
    with_names: bool = False
    catalog: Catalog = ENGLISH


def compared(measured: Mapping[str, UserMetrics], own: str) -> tuple[Model, ...]:
    """Computes means with 95 % intervals, and paired differences of the own model minus each other; the own is last."""
    others = [other for other in measured if other != own]
    values = {name: [measured[name].metrics[metric][None] for metric in METRICS] for name in measured}
    means = iter(mean_intervals([one for name in (*others, own) for one in values[name]], draws=DRAWS))
    pairs = [pair for name in others for pair in zip(values[own], values[name], strict=True)]
    tested = iter(paired_bootstraps(pairs, draws=DRAWS))
    return tuple(
        Model(
            name,
            {metric: next(means) for metric in METRICS},
            None if name == own else {metric: next(tested) for metric in METRICS},
        )
        for name in (*others, own)
    )


def sliced(prepared: Prepared, per_user: UserMetrics, groups: Sequence[str]) -> tuple[Sliced, ...]:
    """Computes NDCG@10 by number of interactions, presence of social edges, and customer attributes."""
    values, rows = per_user.metrics["ndcg@10"], per_user.users
    of_users = user_groups(prepared)
    found = [Sliced("Products held", "ndcg@10", group_gaps(values, _named(of_users["user_interactions"], rows)))]
    if of_users["user_social_degree"]["with"].any():
        found.append(Sliced("Ties", "ndcg@10", group_gaps(values, _named(of_users["user_social_degree"], rows))))
    for name in groups:
        found.append(Sliced(name, "ndcg@10", group_gaps(values, groups_of(prepared.dataset.users, name, rows))))
    return tuple(found)


def _named(members: Mapping[str, np.ndarray], rows: Int[np.ndarray, "V"]) -> list[str | None]:
    out: list[str | None] = [None] * len(rows)
    for name, mask in members.items():
        for place in np.flatnonzero(mask[rows]):
            out[place] = name
    return out


def sample(prepared: ModelInputs, count: int, seed: int = 0) -> Int64[np.ndarray, "_"]:
    """Samples customers with training interactions at random; returns their rows, ascending."""
    known = np.unique(prepared.observed.user)
    drawn = np.random.default_rng(seed).choice(known, min(count, len(known)), replace=False)
    return np.sort(drawn).astype(np.int64)


def no_passages(user: int, item: int) -> tuple[Passage, ...]:
    """Returns no passages, for a model without token attribution."""
    return ()


def passages(config: Config, prepared: ModelInputs, state: TrainState) -> TokenPassages:
    """Of a user's row and an item's row: the weightiest texts of both with what their words add to the score.

    A model without text has none, and neither has a pair whose token values do not add up, which is logged. A text of a
    language that the encoder does not read has no spans.
    """
    try:
        read = attributor(config, state.params, prepared)
    except ValueError:
        return no_passages

    def of_pair(user: int, item: int) -> tuple[Passage, ...]:
        [found] = attribute_tokens(read, [(user, item)], limit=TEXTS)
        if found is None:
            return ()
        spans: list[list[Span]] = [[] for _ in found.texts]
        for word in found.tokens:
            if not found.texts[word.text].foreign:
                spans[word.text].append(Span(word.start, word.end, word.value))
        return tuple(
            Passage(TEXT_TITLES[text.side], text.text, tuple(own)) for text, own in zip(found.texts, spans, strict=True)
        )

    return of_pair


def recommended(
    model: tuple[Config, ModelInputs, TrainState],
    may: CandidateFilter,
    users: Int64[np.ndarray, "V"],
    how: Explain,
) -> tuple[Customer, ...]:
    """The best products of each customer under `may`, with why.

    Of each customer's first product: what is `said`, word by word, what becomes of it without the interaction without
    which the score falls most, and without what another would be the first. Both are left out where the graph has more
    than `EDGES` edges.
    """
    config, prepared, state = model
    if not len(users):
        return ()
    dataset = prepared.dataset
    names_of, why = _Names(dataset), _explainer(model, may, how)
    [part] = ranked(scorer(config, prepared, state), dataset, may, users, how.k)
    found = []
    for place, user in enumerate(tqdm(users.tolist(), desc="explain", unit="customer")):
        items = [item for item in part.ranking.items[place].tolist() if item >= 0]
        scores = part.ranking.scores[place].tolist()
        best = tuple(
            Recommended(
                rank + 1,
                names_of.item_ids[item],
                names_of.items[item],
                scores[rank],
                *explained,
                language=how.catalog.language,
            )
            for rank, (item, explained) in enumerate(zip(items, why(user, items), strict=True))
        )
        holds = tuple(names_of.items[item] for item in prepared.observed.item[prepared.observed.user == user].tolist())
        name = (names_of.users if how.with_names else names_of.user_ids)[user]
        found.append(Customer(names_of.user_ids[user], name, holds, _n_ties(prepared, user), best))
    return tuple(found)


def _explainer(
    model: tuple[Config, ModelInputs, TrainState], may: CandidateFilter, how: Explain
) -> Callable[[int, list[int]], list[tuple]]:
    """Returns what explains the items of a user: of each item, the last fields of `Recommended`.

    A baseline has no explanations.
    """
    config, prepared, state = model
    if not config.model.is_trained:
        return lambda user, items: [() for _ in items]
    dataset = prepared.dataset
    explains, names_of = explained_model(config, state.params, prepared), _Names(dataset)
    affordable = sum(count for _, count in prepared.graph_inputs.graph.relations) <= EDGES

    def without(user: int, item: int, best: int | None) -> tuple[tuple[str, CounterfactualEffect] | None, str]:
        if not affordable:
            return None, ""
        [open_to], effect = suitable(may, np.array([user]), np.arange(dataset.n_items)[None]), None
        if best is not None:
            removed = counterfactual_effect(config, state.params, prepared, user, item, best, open_to)
            effect = names_of.items[best], removed
        [found] = counterfactual_sets(explains.leave_one_out, prepared, user, [item], 1, open_to)
        return effect, set_sentence(dataset, found, how.catalog) if found else ""

    def explained(user: int, items: list[int]) -> list[tuple]:
        contributed, effect = contributions_and_effects(explains, user, items)
        best, found = _best_interaction(contributed, effect) if items else None, []
        own = [explained_item(dataset, contributed, effect, place, item) for place, item in enumerate(items)]
        survived = _survived(names_of.user_ids[user], own, how.others)
        for rank, item in enumerate(items):
            routes = tuple(names_of.route(path, item) for path in best_paths(explains.decomposition, user, item, PATHS))
            first = ()
            if rank == 0:
                removed, sentence = without(user, item, best)
                first = (removed, how.token_passages(user, item), sentence)
            own_reasons = tuple(reasons(dataset, contributed, effect, rank, how.catalog))
            found.append((own_reasons, survived[rank], routes, *first))
        return found

    return explained


def _survived(
    user_id: str, own: Sequence[ExplainedItem], others: Sequence[ExplainedModel]
) -> list[tuple[tuple[int, int], ...]]:
    """Counts, for each reason of each item, the other runs in which it survives, and those that know user and item."""
    counts = [np.zeros((len(item.codes), 2), np.int64) for item in own]
    for model in others if own else ():
        tables = model.inputs.dataset
        user = pc.index(tables.users["user_id"], user_id).as_py()
        rows = [pc.index(tables.items["item_id"], item.item_id).as_py() for item in own]
        known = [place for place, row in enumerate(rows) if row >= 0 and user >= 0]
        there = explained_items(model, user, [rows[place] for place in known]) if known else []
        for place, other in zip(known, there, strict=True):
            counts[place] += [[survives(code, own[place], other), 1] for code in own[place].codes]
    return [tuple((int(kept), int(asked)) for kept, asked in of_item) for of_item in counts]


def _best_interaction(contributed: Contributions, effect: Float[np.ndarray, "P n"]) -> int | None:
    """Returns the interaction with the largest positive effect on the first item, if any."""
    values = {
        int(source): value
        for kind, source, value in zip(contributed.kind, contributed.source, effect[:, 0].tolist(), strict=True)
        if kind == INTERACTION and value > 0
    }
    return max(values, key=lambda source: values[source]) if values else None


def _n_ties(prepared: ModelInputs, user: int) -> int:
    ties = prepared.observed.ties
    source, target = (column(ties, name) for name in ("source", "target"))
    return len({*target[source == user].tolist(), *source[target == user].tolist()} - {user})


class _Names:
    """What nodes and relations are called. Other customers stay unnamed, as in `reasons`."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset
        self.user_ids, self.users = dataset.users.column("user_id").to_pylist(), names(dataset.users, "user_id")
        self.item_ids, self.items = dataset.items.column("item_id").to_pylist(), names(dataset.items, "item_id")

    def route(self, path: Path, item: int) -> Route:
        hops = [Hop(node, self.label(node, path.nodes[0]), "") for node in path.nodes]
        for place, relation in enumerate(path.steps):
            hops[place + 1] = hops[place + 1]._replace(by=relation_label(relation))
        arrives = len(hops) > 1 and path.nodes[-1] == (ITEM, item)
        return Route(tuple(hops), arrives, path.text >= path.ids, path.value)

    def label(self, node: tuple[str, int], customer: tuple[str, int]) -> str:
        node_type, row = node
        if node_type == USER:
            return "the customer" if node == customer else "another customer"
        if node_type == ITEM:
            return self.items[row]
        return f"{node_type}: {attribute_values(self.dataset.items, node_type)[row]}"


def relation_label(relation: Relation) -> str:
    """Returns the label of a relation in a path diagram that starts at the customer."""
    if relation == INTERACTED_BY:
        return "holds"
    if relation == INTERACTS:
        return "held by"
    if relation.name == SIMILAR_USERS:
        return "alike in words"
    if relation.source == relation.target == USER:
        return f"tie: {relation.name}"
    return "also there" if relation.source == ITEM else "is in"
