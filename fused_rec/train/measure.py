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

from fused_rec.config import Config
from fused_rec.data.dataset import column
from fused_rec.data.splits import observe
from fused_rec.devices import AnyArray
from fused_rec.evaluate.ranking import PerUser, Scorer, evaluate, item_sets, mean, together
from fused_rec.evaluate.rules import Rule, apply
from fused_rec.evaluate.slices import Slices, bands, item_slices, user_slices
from fused_rec.evaluate.suitability import (
    Gaps,
    account,
    check_groups,
    group_gaps,
    groups_of,
    period_returns,
    realised_return,
    rule_costs,
    screen,
    suitable,
    suitable_share,
)
from fused_rec.graph.build import ITEM, USER
from fused_rec.model import baselines, closed_form
from fused_rec.train.footprint import require_embedding
from fused_rec.train.parallel import divide_state, divide_task, parallel_embed
from fused_rec.train.prepare import Prepared
from fused_rec.train.step import Task, TrainState

LOG = logging.getLogger(__name__)

NEIGHBOURS = tuple({"neighbours": n, "shrink": s} for n in (20, 100, 500) for s in (0.0, 10.0))
# Recommenders without gradient training, each with the settings among which validation chooses: at most 8, so that
# none is better for having been tuned more.
BASELINES: dict[str, tuple[Callable[..., Scorer], tuple[dict[str, Any], ...]]] = {
    "popularity": (baselines.popularity, tuple({"half_life": days} for days in (0.0, 365.0, 180.0, 90.0, 30.0))),
    "item_knn": (baselines.item_knn, NEIGHBOURS),
    "user_knn": (baselines.user_knn, NEIGHBOURS),
    "friends_mean": (baselines.friends_mean, ({},)),
    "text_mean": (baselines.text_mean, tuple({"own": w} for w in (0.0, 0.25, 0.5, 1.0, 2.0))),
    "als": (
        baselines.als,
        tuple(
            {"factors": k, "regularisation": r, "alpha": a, "seed": 0}
            for k in (32, 64)
            for r in (10.0, 100.0)
            for a in (10.0, 40.0)
        ),
    ),
    "gf_cf": (closed_form.gf_cf, tuple({"rank": k, "alpha": a} for k in (16, 128) for a in (0.1, 0.3, 1.0, 3.0))),
    "ease": (closed_form.ease, tuple({"l2": l2} for l2 in (10.0, 30.0, 100.0, 300.0, 1000.0))),
    "text_ease": (
        closed_form.text_ease,
        tuple(
            {"l2": l2, "l2_text": t, "l2_words": w}
            for l2 in (30.0, 300.0)
            for t in (30.0, 300.0)
            for w in (10.0, 100.0)
        ),
    ),
}


def measure(prepared: Prepared, scorer: Scorer, part: str) -> dict[str, float]:
    """Ranks the whole catalogue for the users with held-out items in `part`, items known before it left out."""
    return mean(measure_users(prepared, scorer, part))


def measure_users(prepared: Prepared, scorer: Scorer, part: str) -> PerUser:
    """What `measure` averages."""
    dataset = prepared.dataset
    items = column(dataset.interactions, "item")[prepared.split.train]
    return evaluate(scorer, **_held_out(prepared, part), item_counts=np.bincount(items, minlength=dataset.n_items))


def measure_slices(prepared: Prepared, scorer: Scorer, per_user: PerUser, parts: tuple[str, ...]) -> dict[str, Slices]:
    """The test part divided by who asks and by what was held out; an empty slice is left out.

    user_interactions, user_ties: means over a slice's users. item_interactions: only held-out items of the slice
    count. Interactions and ties are those that `parts`, what the model has seen, tell of; the ties are the true
    ones also where a control trains on others, so that all variants are measured on the same slices.

    per_user: of `measure_users` on the test part.
    """
    dataset = prepared.dataset
    ties = observe(dataset, prepared.split, parts).ties
    tied = np.zeros(dataset.n_users, bool)
    tied[np.concatenate([column(ties, "source"), column(ties, "target")])] = True
    users = bands(np.bincount(prepared.observed.user, minlength=dataset.n_users))
    items = bands(np.bincount(prepared.observed.item, minlength=dataset.n_items))
    return {
        "user_interactions": user_slices(per_user, users),
        "user_ties": user_slices(per_user, {"with": tied, "without": ~tied}),
        "item_interactions": item_slices(scorer, items, **_held_out(prepared, "test")),
    }


def measure_rules(
    prepared: Prepared,
    scorer: Scorer,
    part: str,
    rules: Sequence[Rule],
    *,
    k: int = 10,
    groups: Sequence[str] = (),
    prices: pa.Table | None = None,
    days: int = 180,
) -> dict[str, Any]:
    """What rules do to the rankings of `part`, as JSON: shares of suitable products, costs, returns and group gaps.

    Of the users that `measure` ranks for. "suitable": the mean share of suitable products in the first k, and
    "account": `suitability.account`; "costs": what a metric gains without a rule, "" without any
    (`suitability.rule_costs`, ndcg@10); "groups": by attribute and metric, `suitability.group_gaps` under the rules;
    "returns", with `prices`: the mean over users of `suitability.realised_return`, from the last purchase known
    before the part, and the share of listed products that have one. A rule that refuses what is held knows what was
    held before the part.

    prices, days: as of `suitability.period_returns`. groups: columns of the users.

    Raises:
      ValueError: rules that the tables do not bear, attributes that make no groups, prices but no times of purchases.
    """
    dataset, held_out = prepared.dataset, _held_out(prepared, part)
    check_groups(dataset.users, groups)
    may = apply(rules, dataset.users, dataset.items, held_out["seen"])
    returns = None if prices is None else _returns(prepared, part, prices, days)
    counts = np.zeros(dataset.n_items, np.int64)  # novelty is not asked for
    under = evaluate(scorer, **held_out, item_counts=counts, eligible=may)
    where = {name: held_out[name] for name in ("seen", "n_items", "candidates")}
    screened = screen(scorer, may, under.users, **where, k=k)
    lists = {"without": screened.before, "under": screened.items}
    shares = {name: suitable_share(suitable(may, under.users, items), items) for name, items in lists.items()}
    of_users = {"ndcg@10": under.metrics["ndcg@10"], f"suitable@{k} without": shares["without"]}
    report: dict[str, Any] = {
        "users": len(under.users),
        "k": k,
        "suitable": {name: _mean(share) for name, share in shares.items()},
        "account": account(screened, may.names),
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


def _returns(prepared: Prepared, part: str, prices: pa.Table, days: int) -> np.ndarray:
    dataset, parts_of = prepared.dataset, prepared.split
    if "timestamp" not in dataset.interactions.column_names:
        raise ValueError(f"{dataset.name} has no times of purchases; returns are counted from the last one known")
    known = parts_of.train if part == "valid" else np.concatenate([parts_of.train, parts_of.valid])
    start = int(np.nanmax(column(dataset.interactions, "timestamp")[known]))
    return period_returns(prices, dataset.items.column("item_id"), start, days)


def _held_out(prepared: Prepared, part: str) -> dict[str, Any]:
    """Arguments of `evaluate`."""
    dataset, parts_of = prepared.dataset, prepared.split
    users, items = (column(dataset.interactions, name) for name in ("user", "item"))
    rows = getattr(parts_of, part)
    known = parts_of.train if part == "valid" else np.concatenate([parts_of.train, parts_of.valid])
    return {
        "truth": item_sets(users[rows], items[rows], dataset.n_users),
        "seen": item_sets(users[known], items[known], dataset.n_users),
        "n_items": dataset.n_items,
        "candidates": parts_of.valid_candidates if part == "valid" else parts_of.test_candidates,
    }


def scorer(config: Config, prepared: Prepared, state: TrainState) -> jax.tree_util.Partial:
    """Of a whole state: scores of the catalogue for a batch of users, as `fused_rec.evaluate.ranking` takes them.

    A user of whom the model knows nothing gets what is popular, as from a `baseline`.
    """
    return divided_scorer(config, divide_task(prepared.task), divide_state(state.params))


def divided_scorer(config: Config, task: Task, params: PyTree) -> jax.tree_util.Partial:
    """The same of a task and parameters that the devices share already."""
    return jax.tree_util.Partial(scores_of, *parallel_embed(config)(params, task), task.popularity)


def scores_of(
    users: Float32[AnyArray, "U D"],
    items: Float32[AnyArray, "I D"],
    popularity: Float32[AnyArray, "I"],
    batch: Int32[AnyArray, "B"],
) -> Float32[Array, "B I"]:
    """What `scorer` gives a batch of users, of the vectors of all users and items."""
    return _popular_where_mute(lambda batch: users[batch] @ items.T, popularity, batch)


def product_vectors(
    config: Config, prepared: Prepared, state: TrainState
) -> tuple[Float32[np.ndarray, "U D"], Float32[np.ndarray, "I D"]]:
    """Of a whole state: one vector a user and an item, on the host, whose inner products are the scores of `scorer`.

    Towers, their weights, popularity and EASE's part are columns of what `embed` gives. Only users of whom the model
    knows nothing, whom `scorer` gives what is popular, are not in it: where there are any, one more column holds each
    item's popularity, and such a user's vector is 1 there and 0 elsewhere.

    Raises ValueError where a vector is not finite, InsufficientMemoryError where they do not fit.
    """
    require_embedding(config, prepared.task, "lower model.dim or model.spectrum_rank")
    users, items = parallel_embed(config)(divide_state(state.params), divide_task(prepared.task))
    rows = np.arange(len(users), dtype=np.int32)
    step = together(len(items))
    mute = np.concatenate(
        [_mute_users(users, items, rows[first : first + step]) for first in range(0, len(rows), step)]
    )
    users, items = jax.device_get((users, items))
    for name, vectors in (("customer", users), ("product", items)):
        if not np.isfinite(vectors).all():
            row = int(np.flatnonzero(~np.isfinite(vectors).all(1))[0])
            raise ValueError(f"the vector of {name} {row} is not finite; train with a lower train.learning_rate")
    if not mute.any():
        return users, items
    column = mute[:, None].astype(np.float32)
    popularity = np.asarray(prepared.task.popularity, np.float32)[:, None]
    return np.concatenate([users * (1 - column), column], axis=1), np.concatenate([items, popularity], axis=1)


@jax.jit
def _mute_users(
    users: Float32[AnyArray, "U D"], items: Float32[AnyArray, "I D"], batch: Int32[AnyArray, "B"]
) -> Bool[Array, "B"]:
    return _mute(users[batch] @ items.T)[:, 0]


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
    values = [measure(prepared, baseline(name, prepared, tried), "valid")[metric] for tried in grid]
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
        _popular_where_mute, make(_seen(prepared), **settings), jnp.asarray(prepared.task.popularity)
    )


def _popular_where_mute(scorer: Callable[..., Any], popularity: AnyArray, users: AnyArray) -> jax.Array:
    scores = scorer(users)
    return jnp.where(_mute(scores), popularity[None, :], scores)


def _mute(scores: Any) -> jax.Array:
    """Bool [B, 1]: whose scores are all the same."""
    return scores.max(axis=1, keepdims=True) == scores.min(axis=1, keepdims=True)


def _seen(prepared: Prepared) -> baselines.Seen:
    dataset, observed, graph = prepared.dataset, prepared.observed, prepared.task.graph
    words = (np.asarray(graph.text(node_type)) for node_type in (USER, ITEM))
    ties = (column(observed.ties, name) for name in ("source", "target"))
    pairs = observed.user, observed.item, dataset.n_users, dataset.n_items
    return baselines.Seen(*pairs, *words, *ties, age=observed.age)
