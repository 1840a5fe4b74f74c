"""Effects of suitability rules on the rankings of a held-out split."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float64

from fused_rec.data.dataset import column
from fused_rec.evaluation.filters import Rule, apply
from fused_rec.evaluation.ranking import Scorer, evaluate, rank
from fused_rec.evaluation.suitability import (
    Gaps,
    check_groups,
    exclusion_counts,
    group_gaps,
    groups_of,
    period_returns,
    realised_return,
    rule_costs,
    suitable,
    suitable_share,
)
from fused_rec.training.evaluate import held_out
from fused_rec.training.inputs import Prepared


def evaluate_rules(
    prepared: Prepared,
    scorer: Scorer,
    split: str,
    rules: Sequence[Rule],
    *,
    k: int = 10,
    groups: Sequence[str] = (),
    returns: Float64[np.ndarray, "I"] | None = None,
) -> dict[str, Any]:
    """Reports the effects of suitability rules on the rankings of a held-out split.

    Args:
      prepared: tables and split.
      scorer: see `fused_rec.evaluation.ranking.Scorer`.
      split: "valid" or "test".
      rules: suitability rules; one that refuses what is held refuses the interactions before the split.
      k: length of the lists.
      groups: columns of the users.
      returns: return of each item (`returns_after`), NaN where unknown.

    Returns:
      As JSON, of the users that `evaluate_mean` ranks for: "suitable", the mean share of suitable items in the first k;
      "exclusions", `suitability.exclusion_counts`; "costs", `suitability.rule_costs` of ndcg@10; with `returns`,
      "returns",
      the mean over users of `suitability.realised_return` and the share of listed items with a return; and "groups", by
      attribute and metric, `suitability.group_gaps` under the rules.

    Raises:
      ValueError: the rules do not fit the tables, or an attribute defines no groups.
    """
    dataset, (spec, truth) = prepared.dataset, held_out(prepared, split)
    check_groups(dataset.users, groups)
    candidates = apply(rules, dataset.users, dataset.items, spec.seen)
    spec = dataclasses.replace(spec, filter=candidates)
    under = evaluate(scorer, spec, truth)
    ranking = rank(scorer, under.users, spec, k)
    lists = {"without": ranking.before, "under": ranking.items}
    shares = {name: suitable_share(suitable(candidates, under.users, items), items) for name, items in lists.items()}
    of_users = {"ndcg@10": under.metrics["ndcg@10"], f"suitable@{k} without": shares["without"]}
    report: dict[str, Any] = {
        "users": len(under.users),
        "k": k,
        "suitable": {name: _mean(share) for name, share in shares.items()},
        "exclusions": exclusion_counts(ranking, candidates.names),
        "costs": {name: dataclasses.asdict(cost) for name, cost in rule_costs(scorer, spec, truth).items()},
    }
    if returns is not None:
        of_users["return under"] = realised_return(ranking.items, returns)
        report["returns"] = {name: _returns_of(items, returns) for name, items in lists.items()}
    report["groups"] = {
        attribute: {
            metric: _gaps(group_gaps(values, groups_of(dataset.users, attribute, under.users)))
            for metric, values in of_users.items()
        }
        for attribute in groups
    }
    return report


def returns_after(prepared: Prepared, split: str, prices: pa.Table, days: int) -> Float64[np.ndarray, "I"]:
    """Computes each item's return from the last interaction known before a split (`suitability.period_returns`).

    Args:
      prepared: tables and split.
      split: "valid" or "test".
      prices: as for `suitability.period_returns`.
      days: horizon.

    Raises:
      ValueError: the interactions have no timestamps, or the horizon is below one day.
    """
    dataset, data_split = prepared.dataset, prepared.split
    if "timestamp" not in dataset.interactions.column_names:
        raise ValueError(f"{dataset.name} has no times of purchases; returns are counted from the last one known")
    start = int(np.nanmax(column(dataset.interactions, "timestamp")[data_split.before(split)]))
    return period_returns(prices, dataset.items.column("item_id"), start, days)


def _returns_of(items: np.ndarray, returns: np.ndarray) -> dict[str, float | None]:
    priced = float(np.isfinite(returns[items[items >= 0]]).mean()) if (items >= 0).any() else None
    return {"mean": _mean(realised_return(items, returns)), "priced": priced}


def _mean(values: np.ndarray) -> float | None:
    known = values[~np.isnan(values)]
    return float(known.mean(dtype=np.float64)) if len(known) else None


def _gaps(gaps: Gaps) -> dict[str, Any]:
    found = {name: group._asdict() for name, group in gaps.groups.items()}
    return {name: getattr(gaps, name) for name in ("best", "worst", "gap", "low", "high", "p")} | {"groups": found}
