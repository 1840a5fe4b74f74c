"""Faithfulness of explanations: deletion and insertion curves over the sources of a user, in the order of attributions.

Deletion and insertion follow Petsiuk, Das and Saenko (BMVC 2018, arXiv 1806.07421). Features are the user's sources:
interactions, social neighbors and text-kNN neighbors. With a faithful order the score drops fast when sources are
removed from the first on, and rises fast when they are restored. Each score is recomputed on the graph without the
removed sources: edges in both directions, their weights, degrees and popularity. No substitute input is needed.
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
from fused_rec.explanation.counterfactual import score_of, without_sources
from fused_rec.explanation.decomposition import contributions
from fused_rec.explanation.explained_model import ExplainedModel
from fused_rec.explanation.leave_one_out import effects
from fused_rec.explanation.sources import Source, sources
from fused_rec.graph.schema import Relation
from fused_rec.training.train_step import GraphInputs, compile_key, embed_nodes

ORDERS = ("leave_one_out", "parts", "gradient", "attention", "random")
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
    model: ExplainedModel, user: int, item: int, user_sources: Sequence[Source]
) -> dict[str, Float[np.ndarray, "n"]]:
    """Attributes a score to the user's sources by each of `ORDERS` except random.

    Args:
      model: of `fused_rec.explanation.explained_model.explained_model`.
      user: user row.
      item: item row.
      user_sources: `sources` of the user.

    Returns:
      By order, a value per source. leave_one_out: its effect. parts: its contribution. gradient: the derivative of
      the score by a factor on all edges of the source (gradient x input), including their effect on norms and other
      nodes. attention: the source's weight in the user's embedding, summed over layers, times the norm of the item's
      embedding, as a heat map of edge weights shows.
    """
    graph_inputs, decomposition = model.inputs.graph_inputs, model.decomposition
    split = contributions(decomposition, user, [item])
    of = dict(zip(zip(split.kind, split.source.tolist(), strict=True), split.value[:, 0], strict=True))
    slope = {
        r: np.asarray(g) for r, g in _slope(compile_key(model.config), model.params, graph_inputs, user, item).items()
    }
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
        "leave_one_out": effects(model.leave_one_out, user, [item]).value[:, 0],
        "parts": np.array([of.get((source.kind, source.row), 0.0) for source in user_sources]),
        "gradient": np.array(
            [
                sum(float(slope[r][e]) * float(graph_inputs.graph.adjacencies[r].weight[e]) for r, e in s.edges)
                for s in user_sources
            ]
        ),
        "attention": attention,
    }


@functools.partial(jax.jit, static_argnums=0)
def _slope(
    config: Config, params: PyTree, graph_inputs: GraphInputs, user: int | AnyArray, item: int | AnyArray
) -> dict[Relation, Float32[Array, "_"]]:
    graph = graph_inputs.graph
    weights = {relation: jnp.asarray(adjacency.weight) for relation, adjacency in graph.adjacencies.items()}

    def score(weights: Mapping[Relation, Array]) -> Array:
        changed = graph.with_adjacencies(
            {r: dataclasses.replace(adjacency, weight=weights[r]) for r, adjacency in graph.adjacencies.items()}
        )
        users, items = embed_nodes(config, params, dataclasses.replace(graph_inputs, graph=changed))
        return users[user] @ items[item]

    return jax.grad(score)(weights)


def curves(model: ExplainedModel, user: int, item: int, rng: np.random.Generator) -> Curves | None:
    """Computes the deletion and insertion curves of one pair for each of `ORDERS`.

    Args:
      model: of `fused_rec.explanation.explained_model.explained_model`.
      user: user row.
      item: item row.
      rng: of the random order.

    Returns:
      The curves; None with fewer than `LEAST_SOURCES` sources or a rise below `LEAST_RISE`.
    """
    user_sources = sources(model.inputs.graph_inputs.graph, model.leave_one_out.reverse, user)
    if len(user_sources) < LEAST_SOURCES:
        return None
    known: dict[bytes, float] = {}

    def score(gone: Bool[np.ndarray, "n"]) -> float:
        if gone.tobytes() not in known:
            without_them = [source for source, away in zip(user_sources, gone, strict=True) if away]
            graph_inputs = without_sources(
                model.config, model.inputs.observed, model.inputs.graph_inputs, user, without_them
            )
            known[gone.tobytes()] = float(score_of(model.config, model.params, graph_inputs, user, item))
        return known[gone.tobytes()]

    none = score(np.ones(len(user_sources), bool))
    rise = score(np.zeros(len(user_sources), bool)) - none
    if rise < LEAST_RISE:
        return None
    given = attributions(model, user, item, user_sources)
    given["random"] = rng.random(len(user_sources))
    found: tuple[dict[str, np.ndarray], dict[str, np.ndarray]] = {}, {}
    for name in ORDERS:
        rank = np.argsort(np.argsort(-given[name], kind="stable"))
        counts = np.round(SHARES * len(user_sources))
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
