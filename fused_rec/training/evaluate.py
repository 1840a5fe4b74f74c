"""How good a scorer is on a held-out part of prepared tables."""

import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
from jaxtyping import Array, Bool, Float32, Int32, PyTree

from fused_rec.baselines import linear, neighbors
from fused_rec.config import Config
from fused_rec.data.dataset import column
from fused_rec.data.splits import observe
from fused_rec.distributed.devices import AnyArray
from fused_rec.evaluation.filters import Rule, apply
from fused_rec.evaluation.ranking import Scorer, UserMetrics, evaluate, item_sets, mean, users_per_batch
from fused_rec.evaluation.slices import Slices, bands, item_slices, user_slices
from fused_rec.evaluation.suitability import (
    Gaps,
    check_groups,
    exclusion_counts,
    group_gaps,
    groups_of,
    period_returns,
    rank_with_filters,
    realised_return,
    rule_costs,
    suitable,
    suitable_share,
)
from fused_rec.graph.schema import ITEM, USER
from fused_rec.training.footprint import require_embedding
from fused_rec.training.inputs import Prepared
from fused_rec.training.sharding import parallel_embed_nodes, shard_graph_inputs, shard_state
from fused_rec.training.train_step import GraphInputs, TrainState

LOG = logging.getLogger(__name__)

NEIGHBOR_GRID = tuple({"num_neighbors": n, "shrink": s} for n in (20, 100, 500) for s in (0.0, 10.0))
# Recommenders without gradient training, each with the settings among which validation chooses: at most 8, so that
# none is better for having been tuned more.
BASELINES: dict[str, tuple[Callable[..., Scorer], tuple[dict[str, Any], ...]]] = {
    "popularity": (neighbors.popularity, tuple({"half_life": days} for days in (0.0, 365.0, 180.0, 90.0, 30.0))),
    "item_knn": (neighbors.item_knn, NEIGHBOR_GRID),
    "user_knn": (neighbors.user_knn, NEIGHBOR_GRID),
    "friends_mean": (neighbors.friends_mean, ({},)),
    "text_mean": (neighbors.text_mean, tuple({"own": w} for w in (0.0, 0.25, 0.5, 1.0, 2.0))),
    "als": (
        neighbors.als,
        tuple(
            {"factors": k, "regularization": r, "alpha": a, "seed": 0}
            for k in (32, 64)
            for r in (10.0, 100.0)
            for a in (10.0, 40.0)
        ),
    ),
    "gf_cf": (linear.gf_cf, tuple({"rank": k, "alpha": a} for k in (16, 128) for a in (0.1, 0.3, 1.0, 3.0))),
    "ease": (linear.ease, tuple({"l2": l2} for l2 in (10.0, 30.0, 100.0, 300.0, 1000.0))),
    "text_ease": (
        linear.text_ease,
        tuple(
            {"l2": l2, "l2_text": t, "l2_words": w}
            for l2 in (30.0, 300.0)
            for t in (30.0, 300.0)
            for w in (10.0, 100.0)
        ),
    ),
}


def evaluate_mean(prepared: Prepared, scorer: Scorer, split: str) -> dict[str, float]:
    """Ranks the whole catalogue for the users with held-out items in `part`, items known before it left out."""
    return mean(evaluate_users(prepared, scorer, split))


def evaluate_users(prepared: Prepared, scorer: Scorer, split: str) -> UserMetrics:
    """What `evaluate_mean` averages."""
    dataset = prepared.dataset
    items = column(dataset.interactions, "item")[prepared.split.train]
    return evaluate(scorer, **_held_out(prepared, split), item_counts=np.bincount(items, minlength=dataset.n_items))


def evaluate_slices(
    prepared: Prepared, scorer: Scorer, per_user: UserMetrics, splits: tuple[str, ...]
) -> dict[str, Slices]:
    """The test part divided by who asks and by what was held out; an empty slice is left out.

    user_interactions, user_ties: means over a slice's users. item_interactions: only held-out items of the slice
    count. Interactions and ties are those that `parts`, what the model has seen, tell of; the ties are the true
    ones also where a control trains on others, so that all variants are measured on the same slices.

    per_user: of `evaluate_users` on the test part.
    """
    dataset = prepared.dataset
    ties = observe(dataset, prepared.split, splits).ties
    tied = np.zeros(dataset.n_users, bool)
    tied[np.concatenate([column(ties, "source"), column(ties, "target")])] = True
    users = bands(np.bincount(prepared.observed.user, minlength=dataset.n_users))
    items = bands(np.bincount(prepared.observed.item, minlength=dataset.n_items))
    return {
        "user_interactions": user_slices(per_user, users),
        "user_social_degree": user_slices(per_user, {"with": tied, "without": ~tied}),
        "item_interactions": item_slices(scorer, items, **_held_out(prepared, "test")),
    }


def evaluate_rules(
    prepared: Prepared,
    scorer: Scorer,
    split: str,
    rules: Sequence[Rule],
    *,
    k: int = 10,
    groups: Sequence[str] = (),
    prices: pa.Table | None = None,
    days: int = 180,
) -> dict[str, Any]:
    """What rules do to the rankings of `part`, as JSON: shares of suitable products, costs, returns and group gaps.

    Of the users that `evaluate_mean` ranks for. "suitable": the mean share of suitable products in the first k, and
    "account": `suitability.exclusion_counts`; "costs": what a metric gains without a rule, "" without any
    (`suitability.rule_costs`, ndcg@10); "groups": by attribute and metric, `suitability.group_gaps` under the rules;
    "returns", with `prices`: the mean over users of `suitability.realised_return`, from the last purchase known
    before the part, and the share of listed products that have one. A rule that refuses what is held knows what was
    held before the part.

    prices, days: as of `suitability.period_returns`. groups: columns of the users.

    Raises:
      ValueError: rules that the tables do not bear, attributes that make no groups, prices but no times of purchases.
    """
    dataset, held_out = prepared.dataset, _held_out(prepared, split)
    check_groups(dataset.users, groups)
    may = apply(rules, dataset.users, dataset.items, held_out["seen"])
    returns = None if prices is None else _returns(prepared, split, prices, days)
    counts = np.zeros(dataset.n_items, np.int64)  # novelty is not asked for
    under = evaluate(scorer, **held_out, item_counts=counts, eligible=may)
    where = {name: held_out[name] for name in ("seen", "n_items", "candidates")}
    screened = rank_with_filters(scorer, may, under.users, **where, k=k)
    lists = {"without": screened.before, "under": screened.items}
    shares = {name: suitable_share(suitable(may, under.users, items), items) for name, items in lists.items()}
    of_users = {"ndcg@10": under.metrics["ndcg@10"], f"suitable@{k} without": shares["without"]}
    report: dict[str, Any] = {
        "users": len(under.users),
        "k": k,
        "suitable": {name: _mean(share) for name, share in shares.items()},
        "account": exclusion_counts(screened, may.names),
        "costs": {
            name: dataclasses.asdict(cost)
            for name, cost in rule_costs(scorer, may, **held_out, item_counts=counts).items()
        },
    }
    if returns is not None:
        of_users["return under"] = realised_return(screened.items, returns)
        report["returns"] = {
            name: {
                "mean": _mean(realised_return(items, returns)),
                "priced": float(np.isfinite(returns[items[items >= 0]]).mean()) if (items >= 0).any() else None,
            }
            for name, items in lists.items()
        }
    report["groups"] = {
        attribute: {
            metric: _gaps(group_gaps(values, groups_of(dataset.users, attribute, under.users)))
            for metric, values in of_users.items()
        }
        for attribute in groups
    }
    return report


def _mean(values: np.ndarray) -> float | None:
    known = values[~np.isnan(values)]
    return float(known.mean(dtype=np.float64)) if len(known) else None


def _gaps(gaps: Gaps) -> dict[str, Any]:
    found = {name: group._asdict() for name, group in gaps.groups.items()}
    return {name: getattr(gaps, name) for name in ("best", "worst", "gap", "low", "high", "p")} | {"groups": found}


def _returns(prepared: Prepared, split: str, prices: pa.Table, days: int) -> np.ndarray:
    dataset, data_split = prepared.dataset, prepared.split
    if "timestamp" not in dataset.interactions.column_names:
        raise ValueError(f"{dataset.name} has no times of purchases; returns are counted from the last one known")
    known = data_split.train if split == "valid" else np.concatenate([data_split.train, data_split.valid])
    start = int(np.nanmax(column(dataset.interactions, "timestamp")[known]))
    return period_returns(prices, dataset.items.column("item_id"), start, days)


def _held_out(prepared: Prepared, split: str) -> dict[str, Any]:
    """Arguments of `evaluate`."""
    dataset, data_split = prepared.dataset, prepared.split
    users, items = (column(dataset.interactions, name) for name in ("user", "item"))
    rows = getattr(data_split, split)
    known = data_split.train if split == "valid" else np.concatenate([data_split.train, data_split.valid])
    return {
        "truth": item_sets(users[rows], items[rows], dataset.n_users),
        "seen": item_sets(users[known], items[known], dataset.n_users),
        "n_items": dataset.n_items,
        "candidates": data_split.valid_candidates if split == "valid" else data_split.test_candidates,
    }


def scorer(config: Config, prepared: Prepared, state: TrainState) -> jax.tree_util.Partial:
    """Of a whole state: scores of the catalogue for a batch of users, as `fused_rec.evaluation.ranking` takes them.

    A user of whom the model knows nothing gets what is popular, as from a `baseline`.
    """
    return sharded_scorer(config, shard_graph_inputs(prepared.graph_inputs), shard_state(state.params))


def sharded_scorer(config: Config, graph_inputs: GraphInputs, params: PyTree) -> jax.tree_util.Partial:
    """The same of a task and parameters that the devices share already."""
    return jax.tree_util.Partial(
        scores_of, *parallel_embed_nodes(config)(params, graph_inputs), graph_inputs.popularity
    )


def scores_of(
    users: Float32[AnyArray, "U D"],
    items: Float32[AnyArray, "I D"],
    popularity: Float32[AnyArray, "I"],
    batch: Int32[AnyArray, "B"],
) -> Float32[Array, "B I"]:
    """What `scorer` gives a batch of users, of the vectors of all users and items."""
    return _popularity_where_unscorable(lambda batch: users[batch] @ items.T, popularity, batch)


def user_item_vectors(
    config: Config, prepared: Prepared, state: TrainState
) -> tuple[Float32[np.ndarray, "U D"], Float32[np.ndarray, "I D"]]:
    """Of a whole state: one vector a user and an item, on the host, whose inner products are the scores of `scorer`.

    Towers, their weights, popularity and EASE's part are columns of what `embed` gives. Only users of whom the model
    knows nothing, whom `scorer` gives what is popular, are not in it: where there are any, one more column holds each
    item's popularity, and such a user's vector is 1 there and 0 elsewhere.

    Raises ValueError where a vector is not finite, InsufficientMemoryError where they do not fit.
    """
    require_embedding(config, prepared.graph_inputs, "lower model.dim or model.ease_rank")
    users, items = parallel_embed_nodes(config)(shard_state(state.params), shard_graph_inputs(prepared.graph_inputs))
    rows = np.arange(len(users), dtype=np.int32)
    step = users_per_batch(len(items))
    unscorable = np.concatenate(
        [_unscorable_users(users, items, rows[first : first + step]) for first in range(0, len(rows), step)]
    )
    users, items = jax.device_get((users, items))
    for name, vectors in (("customer", users), ("product", items)):
        if not np.isfinite(vectors).all():
            row = int(np.flatnonzero(~np.isfinite(vectors).all(1))[0])
            raise ValueError(f"the vector of {name} {row} is not finite; train with a lower train.learning_rate")
    if not unscorable.any():
        return users, items
    column = unscorable[:, None].astype(np.float32)
    popularity = np.asarray(prepared.graph_inputs.popularity, np.float32)[:, None]
    return np.concatenate([users * (1 - column), column], axis=1), np.concatenate([items, popularity], axis=1)


@jax.jit
def _unscorable_users(
    users: Float32[AnyArray, "U D"], items: Float32[AnyArray, "I D"], batch: Int32[AnyArray, "B"]
) -> Bool[Array, "B"]:
    return _has_equal_scores(users[batch] @ items.T)[:, 0]


def choose_settings(name: str, prepared: Prepared, metric: str = "ndcg@10") -> dict[str, Any]:
    """Of one of `BASELINES`, by this metric on validation; the first of the best.

    prepared: of the training part alone, words and ties included.

    Raises:
      NotApplicableError: the tables tell nothing of what it needs.
    """
    if len(prepared.observed.user) != len(prepared.split.train):
        raise ValueError(
            f"settings are to be chosen on {len(prepared.observed.user)} observed interactions, and the training part "
            f"has {len(prepared.split.train)}: prepare it alone, or what is seen gives away what validation asks"
        )
    _, grid = BASELINES[name]
    if len(grid) == 1:
        return grid[0]
    values = [evaluate_mean(prepared, baseline(name, prepared, tried), "valid")[metric] for tried in grid]
    chosen = grid[int(np.argmax(values))]
    LOG.info("%s: validation chooses %s", name, chosen)
    return chosen


def baseline(name: str, prepared: Prepared, settings: dict[str, Any]) -> Scorer:
    """One of `BASELINES`, made of all that `prepared` tells; a user of whom it knows nothing gets what is popular.

    So would anyone serve it, and a table says by how much a model ranks better, not for how many it ranks at all.

    Raises:
      NotApplicableError: the tables tell nothing of what it needs.
    """
    make, _ = BASELINES[name]
    return jax.tree_util.Partial(
        _popularity_where_unscorable,
        make(_interactions(prepared), **settings),
        jnp.asarray(prepared.graph_inputs.popularity),
    )


def _popularity_where_unscorable(scorer: Callable[..., Any], popularity: AnyArray, users: AnyArray) -> jax.Array:
    scores = scorer(users)
    return jnp.where(_has_equal_scores(scores), popularity[None, :], scores)


def _has_equal_scores(scores: Any) -> jax.Array:
    """Bool [B, 1]: whose scores are all the same."""
    return scores.max(axis=1, keepdims=True) == scores.min(axis=1, keepdims=True)


def _interactions(prepared: Prepared) -> neighbors.Interactions:
    dataset, observed, graph = prepared.dataset, prepared.observed, prepared.graph_inputs.graph
    text = (np.asarray(graph.text[node_type]) for node_type in (USER, ITEM))
    ties = (column(observed.ties, name) for name in ("source", "target"))
    pairs = observed.user, observed.item, dataset.n_users, dataset.n_items
    return neighbors.Interactions(*pairs, *text, *ties, age=observed.age)
