"""Faithfulness of explanations: deletion and insertion curves over the sources of a user, in the order of attributions.

Deletion and insertion follow Petsiuk, Das and Saenko (BMVC 2018, arXiv 1806.07421). Features are the user's sources:
interactions, social neighbors and text-kNN neighbors. With a faithful order the score drops fast when sources are
removed from the first on, and rises fast when they are restored. Each score equals that of a recomputation on the graph
without the removed sources: edges in both directions, their weights, degrees and popularity. No substitute input is
needed.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, PyTree

from fused_rec.config import Config
from fused_rec.distributed.devices import AnyArray
from fused_rec.evaluation.significance import paired_bootstrap, resampled_means
from fused_rec.explanation.decomposition import contributions
from fused_rec.explanation.explained_model import ExplainedModel
from fused_rec.explanation.leave_one_out import SetScores, closed_slopes, effects
from fused_rec.explanation.sources import Source, sources
from fused_rec.graph.schema import Relation
from fused_rec.model.late_fusion import LateFusion
from fused_rec.rng import numbered_rng
from fused_rec.training.train_step import GraphInputs, compile_key, embed_nodes

ORDERS = ("leave_one_out", "two_ended", "shapley", "integrated", "gradient", "parts", "attention", "random")
PERMUTATIONS, SETS = 50, 1000  # of the sources, by which Shapley values are estimated: at most, and sets of them in all
POINTS = 8  # Gauss-Legendre points of integrated gradients
SHARES = np.linspace(0, 1, 6)
LEAST_SOURCES = 10  # fewest sources of a user: of fewer, a fifth is one or none
LEAST_RISE = 0.05  # smallest increase of the score by all sources, by which curves are normalized
DRAWS = 10_000


class Curves(NamedTuple):
    """Curves of one (user, item) pair by order: the normalized score at each of `SHARES`.

    Attributes:
      rise: score with all sources minus score without any; the curves are 1 at the former and 0 at the latter.
      deletion: score with this share of the sources removed.
      insertion: score with this share of the sources restored.
    """

    rise: float
    deletion: dict[str, Float[np.ndarray, "S"]]
    insertion: dict[str, Float[np.ndarray, "S"]]


def attributions(
    model: ExplainedModel, given: SetScores, item: int, rng: np.random.Generator
) -> dict[str, Float[np.ndarray, "n"]]:
    """Attributes a score to the user's sources by each of `ORDERS` except random.

    Args:
      model: of `fused_rec.explanation.explained_model.explained_model`, without reviews.
      given: scores without sets of a user's sources.
      item: item row.
      rng: of the permutations.

    Returns:
      By order, a value per source. leave_one_out: its effect. two_ended: the mean of its effect and of what it adds to
      no source. shapley: the mean of what it adds to the sources before it in drawn permutations.
      integrated: integrated gradients along the path that scales all edges of all sources from 0 to 1 and keeps
      degrees. gradient: the derivative of the score by a factor on all edges of the source (gradient x input),
      including their effect on norms and other nodes. parts: its contribution. attention: the source's weight in the
      user's embedding, summed over layers, times the norm of the item's embedding, as a heat map of edge weights shows.
    """
    user = given.user
    user_sources = sources(model.inputs.graph_inputs.graph, model.leave_one_out.reverse, user)
    split, effect = contributions(model.decomposition, user, [item]), effects(model.leave_one_out, user, [item])
    of = dict(zip(zip(split.kind, split.source.tolist(), strict=True), split.value[:, 0], strict=True))
    nodes, weights = np.polynomial.legendre.leggauss(POINTS)
    closed = closed_slopes(given, item)
    along = [by_gradient(model, user, item, user_sources, factor) + closed / factor for factor in (nodes + 1) / 2]
    return {
        "leave_one_out": effect.value[:, 0],
        "two_ended": (effect.value[:, 0] + _additions(given, item)) / 2,
        "shapley": shapley(given, item, rng),
        "integrated": np.tensordot(weights / 2, along, 1),
        "gradient": by_gradient(model, user, item, user_sources, 1.0) + closed,
        "parts": np.array([of.get((source.kind, source.row), 0.0) for source in user_sources]),
        "attention": _attention(model, user, item, user_sources),
    }


def _additions(given: SetScores, item: int) -> Float[np.ndarray, "n"]:
    """What each source adds to the score without any."""
    everything = np.arange(len(given.rows))
    others = np.array([np.delete(everything, place) for place in everything])
    return (given.scores(others, [item]) - given.scores(everything[None], [item]))[:, 0]


def shapley(
    given: SetScores, item: int, rng: np.random.Generator, permutations: int | None = None
) -> Float[np.ndarray, "n"]:
    """Estimates Shapley values of the sources (Castro et al., 2009, doi 10.1016/j.cor.2008.04.004).

    Args:
      given: scores without sets of the user's sources.
      item: item row.
      rng: of the permutations.
      permutations: number of permutations; None: `PERMUTATIONS`, fewer where they would have more than `SETS` sets.

    Returns:
      A value per source; they sum to the score minus the score without any source.
    """
    count = len(given.rows)
    permutations = permutations or max(1, min(PERMUTATIONS, SETS // count))
    order = np.stack([rng.permutation(count) for _ in range(permutations)])
    scores = np.stack([given.scores(order[:, :gone], [item])[:, 0] for gone in range(count + 1)], axis=1)
    found = np.zeros(count)
    np.add.at(found, order, scores[:, :-1] - scores[:, 1:])
    return found / permutations


def by_gradient(
    model: ExplainedModel, user: int, item: int, user_sources: Sequence[Source], factor: float
) -> Float[np.ndarray, "n"]:
    """The derivative of the trained components by a factor on the edges of each source, where all have this factor."""
    graph_inputs = model.inputs.graph_inputs
    if graph_inputs.fusion is not None:  # closed-form components hold vectors of all nodes, gigabytes in a gradient
        if not graph_inputs.fusion.trained:
            return np.zeros(len(user_sources))
        graph_inputs = dataclasses.replace(graph_inputs, fusion=LateFusion(graph_inputs.fusion.trained))
    graph = graph_inputs.graph
    own = {relation: np.array(adjacency.weight) for relation, adjacency in graph.adjacencies.items()}
    weights = {relation: weight.copy() for relation, weight in own.items()}
    for source in user_sources:
        for relation, edge in source.edges:
            weights[relation][edge] = factor * own[relation][edge]
    slope = _slope(compile_key(model.config), model.params, graph_inputs, weights, user, item)
    slope = {relation: np.asarray(value) for relation, value in slope.items()}
    return np.array([sum(float(slope[r][e]) * float(own[r][e]) for r, e in s.edges) for s in user_sources])


def _attention(model: ExplainedModel, user: int, item: int, user_sources: Sequence[Source]) -> Float[np.ndarray, "n"]:
    found = np.zeros(len(user_sources))
    for branch in model.decomposition.branches:
        given, size = branch.weights, np.linalg.norm(branch.items[item]) / branch.user_norm[user]
        for number, source in enumerate(user_sources):
            relation, edge = source.edges[0]
            if relation in given.edge and len(given.layer_weights) > 1:
                factor = given.layer_weights[1:] @ given.gate[relation][:, user]
                found[number] += size * factor * given.edge[relation][edge] * given.source_scale[relation][source.row]
    return found


@functools.partial(jax.jit, static_argnums=0)
def _slope(
    config: Config,
    params: PyTree,
    graph_inputs: GraphInputs,
    weights: dict[Relation, Float32[AnyArray, "_"]],
    user: int | AnyArray,
    item: int | AnyArray,
) -> dict[Relation, Float32[Array, "_"]]:
    graph = graph_inputs.graph

    def score(weights: Mapping[Relation, Array]) -> Array:
        changed = graph.with_adjacencies(
            {r: adjacency.with_weight(weights[r]) for r, adjacency in graph.adjacencies.items()}
        )
        users, items = embed_nodes(config, params, dataclasses.replace(graph_inputs, graph=changed))
        return users[user] @ items[item]

    return jax.grad(score)({relation: jnp.asarray(weight) for relation, weight in weights.items()})


def curves(model: ExplainedModel, user: int, item: int, rng: np.random.Generator, seed: int = 0) -> Curves | None:
    """Computes the deletion and insertion curves of one pair for each of `ORDERS`.

    Args:
      model: of `fused_rec.explanation.explained_model.explained_model`, without reviews.
      user: user row.
      item: item row.
      rng: of the random order.
      seed: of the permutations of `shapley`.

    Returns:
      The curves; None with fewer than `LEAST_SOURCES` sources or a rise below `LEAST_RISE`.
    """
    without = SetScores(model.leave_one_out, user)
    count = len(without.rows)
    if count < LEAST_SOURCES:
        return None

    def score(gone: Bool[np.ndarray, "n"]) -> float:
        return float(without.scores(np.flatnonzero(gone)[None], [item])[0, 0])

    none = score(np.ones(count, bool))
    rise = score(np.zeros(count, bool)) - none
    if rise < LEAST_RISE:
        return None
    given = attributions(model, without, item, numbered_rng(seed, user))
    given["random"] = rng.random(count)
    found: tuple[dict[str, np.ndarray], dict[str, np.ndarray]] = {}, {}
    for name in ORDERS:
        rank = np.argsort(np.argsort(-given[name], kind="stable"))
        counts = np.round(SHARES * count)
        for curve, taken in zip(found, ([rank < n for n in counts], [rank >= n for n in counts]), strict=True):
            curve[name] = np.array([(score(gone) - none) / rise for gone in taken])
    return Curves(rise, *found)


def area(curve: Float[np.ndarray, "S"]) -> float:
    """Returns the area under a curve over `SHARES` by the trapezoidal rule."""
    return float((curve[1:] + curve[:-1]).mean() / 2)


def summary(found: Sequence[Curves], seed: int = 0) -> dict[str, Any]:
    """Summarizes curves of many pairs.

    Args:
      found: curves of the pairs.
      seed: random seed of the bootstrap.

    Returns:
      By "deletion" (lower is better) and "insertion" (higher is better) and by order: mean area with its 95 % interval
      over users, mean curve, and "difference", the area of order "leave_one_out" minus that of this order over the same
      users (`paired_bootstrap`).

    Raises:
      ValueError: there is no pair.
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
