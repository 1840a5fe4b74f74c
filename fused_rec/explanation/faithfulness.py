"""Do explanations name what the score rests on? What a user holds and hears is taken away in the order they give.

Deletion and insertion (Petsiuk, Das and Saenko, BMVC 2018, arXiv 1806.07421) with a user's sources as the features: the
products held, the customers tied to and those of similar words. Where the order is right the score falls fast while
sources are taken away from the first on, and rises fast while they come back. Each score is computed anew on the graph
without the sources: edges both ways, their weights, degrees, holders and popularity, for everybody. Nothing stands in
for what is gone, so no input is made up.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, PyTree

from fused_rec.baselines.neighbors import item_counts
from fused_rec.config import Config
from fused_rec.data.splits import Observed
from fused_rec.distributed.devices import AnyArray
from fused_rec.evaluation.significance import paired_bootstrap, resampled_means
from fused_rec.explanation.decomposition import INTERACTION, SIMILAR_USERS, TIE, ScoreDecomposition, contributions
from fused_rec.graph.adjacency import Adjacency, degrees_of
from fused_rec.graph.build import INTERACTED_BY, INTERACTS, USER
from fused_rec.graph.hetero import Relation
from fused_rec.training.inputs import Prepared
from fused_rec.training.train_step import GraphInputs, compile_key, embed_nodes

ORDERS = ("parts", "gradient", "attention", "random")
SHARES = np.linspace(0, 1, 6)
LEAST_SOURCES = 10  # of a user: with fewer, a fifth of them is one or none
LEAST_RISE = 0.05  # of the score by all sources together: what is divided by less is noise
SIMILAR = Relation(USER, SIMILAR_USERS, USER)
DRAWS = 10_000


class Source(NamedTuple):
    """One thing that the user holds or hears, and the edges that go with it: (relation, number of the edge)."""

    kind: str
    row: int
    edges: tuple[tuple[Relation, int], ...]


class Curves(NamedTuple):
    """Of one pair, by order: the score at each of `SHARES` taken away, or come back, over the score by all sources.

    1 is the score with all sources, 0 without any. rise: the difference of the two, in units of the score.
    """

    rise: float
    deletion: dict[str, Float[np.ndarray, "S"]]
    insertion: dict[str, Float[np.ndarray, "S"]]


def sources(graph_inputs: GraphInputs, user: int) -> list[Source]:
    """What the user hears, as `ledger.parts` names it, and with it the edges by which it hears the user.

    A holding and a tie go both ways; to be heard for similar words does not.
    """
    found = []
    for relation, adjacency in graph_inputs.adjacencies.items():
        if relation.target != USER:
            continue
        kind = (
            INTERACTION if relation == INTERACTED_BY else SIMILAR_USERS if relation == SIMILAR else TIE + relation.name
        )
        back = None if relation == SIMILAR else _reverse(graph_inputs.adjacencies, relation)
        for edge in range(*np.asarray(adjacency.receiver_start[user : user + 2]).tolist()):
            sender = int(adjacency.senders[edge])
            edges = [(relation, edge)]
            if back is not None:
                reverse = graph_inputs.adjacencies[back]
                at = slice(*np.asarray(reverse.receiver_start[sender : sender + 2]).tolist())
                edges.append((back, at.start + int(np.searchsorted(reverse.senders[at], user))))
            found.append(Source(kind, sender, tuple(edges)))
    return found


def _reverse(adjacencies: Mapping[Relation, Adjacency], relation: Relation) -> Relation:
    """The relation of the same pairs the other way round: of a mutual one, itself."""
    if relation == INTERACTED_BY:
        return INTERACTS
    names = relation.name, f"{relation.name}_of", relation.name.removesuffix("_of")
    one = adjacencies[relation]
    turned = np.stack([one.senders, one.receivers])[:, one.by_sender]
    for other in (Relation(USER, name, USER) for name in names):
        back = adjacencies.get(other)
        if back is not None and np.array_equal(turned, np.stack([back.receivers, back.senders])):
            return other
    raise ValueError(f"no relation has the edges of {relation} the other way round; build the graph with `build`")


def without_sources(
    config: Config, observed: Observed, graph_inputs: GraphInputs, user: int, gone: Sequence[Source]
) -> GraphInputs:
    """The task as if the user had none of these sources, in arrays of the same shapes, so that nothing is recompiled.

    Weights are made again from the degrees that are left; the shares of customers of similar words add up to 1 again.
    As in `fused_rec.explanation.counterfactual` words stay, and nobody else is heard in place of one who is gone.
    """
    edges: dict[Relation, list[int]] = {}
    for source in gone:
        for relation, edge in source.edges:
            edges.setdefault(relation, []).append(edge)
    changed = {
        relation: _drop_edges(graph_inputs.adjacencies[relation], at, relation == SIMILAR)
        for relation, at in edges.items()
    }
    items = [source.row for source in gone if source.kind == INTERACTION]
    kept = ~((observed.user == user) & np.isin(observed.item, items))
    popularity = item_counts(
        observed.item[kept], observed.age[kept], config.model.popularity_half_life, len(graph_inputs.popularity)
    )
    return graph_inputs.replace(  # pyright: ignore[reportAttributeAccessIssue]
        adjacencies={**graph_inputs.adjacencies, **changed}, popularity=popularity
    )


def _drop_edges(full: Adjacency, gone: Sequence[int], shares: bool) -> Adjacency:
    """The adjacency without these edges, filled up as `Adjacency` allows."""
    keep = np.ones(len(full.senders), bool)
    keep[list(gone)] = False
    senders, receivers, order = full.senders[keep], full.receivers[keep], full.by_sender
    n_sources, n_targets = len(full.sender_start) - 1, len(full.receiver_start) - 1
    out_degree, in_degree = np.bincount(senders, minlength=n_sources), np.bincount(receivers, minlength=n_targets)
    if shares:
        left = full.weight[keep]
        weight = left / np.bincount(receivers, left, minlength=n_targets)[receivers]
    else:
        weight = 1 / np.sqrt(out_degree[senders] * in_degree[receivers])
    fill = (0, len(keep) - len(senders))
    number = np.cumsum(keep) - 1
    by_sender = np.concatenate([number[order[keep[order]]], np.arange(len(senders), len(keep))]).astype(np.int32)
    receivers = np.pad(receivers, fill, constant_values=n_targets)
    return Adjacency(
        np.pad(senders, fill, constant_values=n_sources),
        receivers,
        np.pad(weight.astype(np.float32), fill),
        np.concatenate([[0], np.cumsum(in_degree)]).astype(np.int32),
        by_sender,
        receivers[by_sender],
        np.concatenate([[0], np.cumsum(out_degree)]).astype(np.int32),
        degrees_of(in_degree, out_degree),
        full.backend,
    )


def attributions(
    config: Config,
    params: PyTree,
    graph_inputs: GraphInputs,
    decomposition: ScoreDecomposition,
    user: int,
    item: int,
    user_sources: Sequence[Source],
) -> dict[str, Float[np.ndarray, "n"]]:
    """What each source is given, by order, but for the random one.

    parts: what it adds, of `ledger.parts`. gradient: the derivative of the score by a factor on all the source's edges
    (gradient x input), which is heard also where lengths, and others' vectors, depend on them. attention: the weight
    that the source's message has in the user's vector, summed over rounds, times the length of the item's vector, whose
    direction does not enter: what a heat map of edge weights would show.
    """
    split = contributions(decomposition, user, [item])
    of = dict(zip(zip(split.kind, split.source.tolist(), strict=True), split.value[:, 0], strict=True))
    slope = {r: np.asarray(g) for r, g in _slope(compile_key(config), params, graph_inputs, user, item).items()}
    attention = np.zeros(len(user_sources))
    for branch in decomposition.branches:
        given, size = branch.weights, np.linalg.norm(branch.items[item]) / branch.user_norm[user]
        for number, source in enumerate(user_sources):
            relation, edge = source.edges[0]
            if relation in given.edge and len(given.layer_weights) > 1:
                factor = given.layer_weights[1:] @ given.gate[relation][:, user]
                attention[number] += (
                    size * factor * given.edge[relation][edge] * given.source_scale[relation][source.row]
                )
    return {
        "parts": np.array([of.get((source.kind, source.row), 0.0) for source in user_sources]),
        "gradient": np.array(
            [
                sum(float(slope[r][e]) * float(graph_inputs.adjacencies[r].weight[e]) for r, e in s.edges)
                for s in user_sources
            ]
        ),
        "attention": attention,
    }


@functools.partial(jax.jit, static_argnums=0)
def _slope(
    config: Config, params: PyTree, graph_inputs: GraphInputs, user: int | AnyArray, item: int | AnyArray
) -> dict[Relation, Float32[Array, "_"]]:
    weights = {relation: jnp.asarray(adjacency.weight) for relation, adjacency in graph_inputs.adjacencies.items()}

    def score(weights: Mapping[Relation, Array]) -> Array:
        adjacencies = {
            relation: dataclasses.replace(adjacency, weight=weights[relation])
            for relation, adjacency in graph_inputs.adjacencies.items()
        }
        users, items = embed_nodes(config, params, dataclasses.replace(graph_inputs, adjacencies=adjacencies))
        return users[user] @ items[item]

    return jax.grad(score)(weights)


@functools.partial(jax.jit, static_argnums=0)
def _score(
    config: Config, params: PyTree, graph_inputs: GraphInputs, user: int | AnyArray, item: int | AnyArray
) -> Float32[Array, ""]:
    users, items = embed_nodes(config, params, graph_inputs)
    return users[user] @ items[item]


def curves(
    config: Config,
    params: PyTree,
    prepared: Prepared,
    decomposition: ScoreDecomposition,
    user: int,
    item: int,
    rng: np.random.Generator,
) -> Curves | None:
    """Both curves of one pair under each of `ORDERS`; None for fewer than `LEAST_SOURCES` or less than `LEAST_RISE`."""
    user_sources = sources(prepared.graph_inputs, user)
    if len(user_sources) < LEAST_SOURCES:
        return None
    known: dict[bytes, float] = {}

    def score(gone: Bool[np.ndarray, "n"]) -> float:
        if gone.tobytes() not in known:
            without_them = [source for source, away in zip(user_sources, gone, strict=True) if away]
            graph_inputs = without_sources(config, prepared.observed, prepared.graph_inputs, user, without_them)
            known[gone.tobytes()] = float(_score(compile_key(config), params, graph_inputs, user, item))
        return known[gone.tobytes()]

    none = score(np.ones(len(user_sources), bool))
    rise = score(np.zeros(len(user_sources), bool)) - none
    if rise < LEAST_RISE:
        return None
    given = attributions(config, params, prepared.graph_inputs, decomposition, user, item, user_sources)
    given["random"] = rng.random(len(user_sources))
    found: tuple[dict[str, np.ndarray], dict[str, np.ndarray]] = {}, {}
    for name in ORDERS:
        rank = np.argsort(np.argsort(-given[name], kind="stable"))
        counts = np.round(SHARES * len(user_sources))
        for curve, taken in zip(found, ([rank < n for n in counts], [rank >= n for n in counts]), strict=True):
            curve[name] = np.array([(score(gone) - none) / rise for gone in taken])
    return Curves(rise, *found)


def area(curve: Float[np.ndarray, "S"]) -> float:
    """Under a curve over `SHARES`, by trapezoids: the mean height."""
    return float((curve[1:] + curve[:-1]).mean() / 2)


def summary(found: Sequence[Curves], seed: int = 0) -> dict[str, Any]:
    """Of many pairs: by order and curve the mean, its 95 % interval over users, and how far the parts are ahead.

    "deletion" is better low, "insertion" high. "difference": the area of the parts less that of the order, of the same
    users (`paired_bootstrap`). Raises ValueError where there is no pair.
    """
    if not found:
        raise ValueError(
            f"no user asked has {LEAST_SOURCES} sources that together raise the score by {LEAST_RISE}; ask for others, "
            "or train on tables in which users hold more"
        )
    report: dict[str, Any] = {}
    for kind in ("deletion", "insertion"):
        by_order = {name: np.stack([getattr(one, kind)[name] for one in found]) for name in ORDERS}
        areas = {name: np.array([area(curve) for curve in rows]) for name, rows in by_order.items()}
        report[kind] = {}
        for name in ORDERS:
            means = resampled_means(areas[name], DRAWS, np.random.default_rng(seed))
            low, high = np.quantile(means, (0.025, 0.975))
            apart = paired_bootstrap(areas[ORDERS[0]][None], areas[name][None], draws=DRAWS, seed=seed)
            report[kind][name] = {
                "area": float(areas[name].mean()),
                "low": float(low),
                "high": float(high),
                "difference": {"mean": apart.difference, "low": apart.low, "high": apart.high},
                "curve": by_order[name].mean(0).tolist(),
            }
    return report
