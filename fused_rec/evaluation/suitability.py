"""Rankings under suitability rules: exclusions and metric cost of each rule, returns, and differences between groups.

Rules and their file: `fused_rec.evaluation.filters`. Refused pairs are removed before ranking.
U users, I items, R rules; B users per batch, k ranks; V users that are ranked; N resamples ("draws"), G groups.
"""

import bisect
import dataclasses
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float, Float32, Float64, Int

from fused_rec.config import KS
from fused_rec.data.io.arrow import known, pc
from fused_rec.data.io.plain import is_single
from fused_rec.evaluation.item_sets import UserItemSets, contained
from fused_rec.evaluation.ranking import CandidateFilter, FilteredRanking, RankingSpec, Scorer, evaluate
from fused_rec.evaluation.significance import Difference, paired_bootstraps, resampled_means
from fused_rec.rng import numbered_rng

DAY = 86_400  # seconds
STALE = 30 * DAY  # an older price is ignored: the item is no longer traded
SMALLEST = 10  # smallest group that a gap is computed for


def exclusion_counts(screened: FilteredRanking, names: Sequence[str]) -> dict[str, Any]:
    """Counts the exclusions of these users, as integers that add up over chunks of users (`sum_counts`).

    Args:
      screened: rankings of the users.
      names: names of the rules.

    Returns:
      `users`; `recommendations`; `users_without_recommendations`; `users_with_short_list` (fewer than k); `top` and
      `top_suitable`: items in the lists without rules, and those that pass every rule; and `rules`, by name: `excluded`
      pairs, pairs that are `excluded_only_by_rule`, and `excluded_from_topk`, items of the lists without rules.
    """
    filled, filled_before = screened.items >= 0, screened.before >= 0
    refused = (filled_before[:, :, None] & ~screened.passes).sum((0, 1))
    excluded, alone = (counts.sum(0, dtype=np.int64) for counts in (screened.excluded, screened.excluded_alone))
    return {
        "users": len(filled),
        "recommendations": int(filled.sum()),
        "users_without_recommendations": int((~filled.any(1)).sum()),
        "users_with_short_list": int((~filled.all(1)).sum()),
        "top": int(filled_before.sum()),
        "top_suitable": int((filled_before & screened.passes.all(2)).sum()),
        "rules": {
            name: {
                "excluded": int(excluded[n]),
                "excluded_only_by_rule": int(alone[n]),
                "excluded_from_topk": int(refused[n]),
            }
            for n, name in enumerate(names)
        },
    }


def sum_counts(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Adds the `exclusion_counts` of two disjoint sets of users."""
    return {
        name: sum_counts(value, other[name]) if isinstance(value, Mapping) else value + other[name]
        for name, value in one.items()
    }


def suitable(
    eligible: CandidateFilter, users: Int[np.ndarray, "V"], items: Int[np.ndarray, "V k"], *, batch: int = 256
) -> Bool[np.ndarray, "V k"]:
    """Tests which items of given lists pass every rule.

    Args:
      eligible: the rules.
      users: user rows.
      items: a list of items per user; -1 at empty ranks.
      batch: users per batch.

    Returns:
      True where the item passes; False at empty ranks.
    """
    fine = items >= 0
    taken = np.maximum(items, 0)
    if eligible.items is not None:
        fine &= np.isin(taken, eligible.items)
    for start in range(0, len(users), batch):
        rows = slice(start, start + batch)
        for test in eligible.tests:
            passes = np.asarray(test(jnp.asarray(users[rows], jnp.int32)))
            fine[rows] &= np.take_along_axis(passes, taken[rows], axis=1)
    for excluded in eligible.excluded:
        fine &= ~contained(excluded, users, taken)
    return fine


def suitable_share(fine: Bool[np.ndarray, "V k"], items: Int[np.ndarray, "V k"]) -> Float64[np.ndarray, "V"]:
    """Returns each user's share of suitable items among those in the list; NaN for an empty list."""
    return _mean_of(fine.astype(np.float64), items >= 0)


def rule_costs(
    scorer: Scorer, spec: RankingSpec, truth: UserItemSets, metric: str = "ndcg@10", ks: Sequence[int] = KS
) -> dict[str, Difference]:
    """Computes the cost of each rule in a metric, paired over users (`significance.paired_bootstraps`).

    Held-out items that a rule refuses count as missed.

    Args:
      scorer: see `ranking.Scorer`.
      spec: what may be recommended; its filter holds the rules.
      truth: held-out items.
      metric: name of a metric of `ranking.evaluate`.
      ks: cutoffs of `ranking.evaluate`.

    Returns:
      By rule, the metric without this rule minus the metric with all rules; under "", without any rule minus with all.
    """

    def values(under: CandidateFilter) -> Float32[np.ndarray, "1 V"]:
        return evaluate(scorer, dataclasses.replace(spec, filter=under), truth, ks=ks).metrics[metric][None]

    with_all = values(spec.filter)
    others = {"": CandidateFilter()} | {name: spec.filter.without(name) for name in spec.filter.names}
    tested = paired_bootstraps([(values(under), with_all) for under in others.values()])
    return dict(zip(others, tested, strict=True))


def period_returns(prices: pa.Table, item_ids: pa.ChunkedArray, start: int, days: int) -> Float64[np.ndarray, "I"]:
    """Computes simple price returns p(start + days) / p(start) - 1, without dividends, fees and currency conversion.

    p is the last close at or before the time, at most 30 days old.

    Args:
      prices: `item_id` string, `timestamp` int64 unix seconds, `price` float64, in any order.
      item_ids: ids of the items, in the order of the rows.
      start: unix seconds.
      days: horizon.

    Returns:
      Float64 [I]: a return of .05 is 5 %; NaN if a price is missing or the first is not positive.

    Raises:
      ValueError: the horizon is below one day.
    """
    if days < 1:
        raise ValueError(f"the horizon is {days} days; it must be at least 1")
    item = np.asarray(pc.fill_null(pc.index_in(prices["item_id"], value_set=item_ids.combine_chunks()), -1))
    time, price = np.asarray(prices["timestamp"]), np.asarray(prices["price"])

    def last(until: int) -> Float64[np.ndarray, "I"]:
        rows = np.flatnonzero((item >= 0) & (time <= until) & (time > until - STALE) & np.isfinite(price))
        rows = rows[np.argsort(time[rows], kind="stable")]
        found = np.full(len(item_ids), np.nan)
        found[item[rows]] = price[rows]  # NumPy keeps the last of several rows of an item
        return found

    before, after = last(start), last(start + days * DAY)
    return np.where(before > 0, after, np.nan) / np.where(before > 0, before, 1.0) - 1


def realised_return(items: Int[np.ndarray, "V k"], returns: Float64[np.ndarray, "I"]) -> Float64[np.ndarray, "V"]:
    """Returns each user's mean return over the recommended items with a return; NaN if none has one."""
    of_items = returns[np.maximum(items, 0)]
    return _mean_of(of_items, (items >= 0) & ~np.isnan(of_items))


def _mean_of(values: Float64[np.ndarray, "V k"], counted: Bool[np.ndarray, "V k"]) -> Float64[np.ndarray, "V"]:
    n = counted.sum(1)
    return np.where(n > 0, np.where(counted, values, 0.0).sum(1) / np.maximum(n, 1), np.nan)


class Group(NamedTuple):
    """Users with the same value of an attribute: their number, the mean of a metric and its 95 % interval."""

    users: int
    mean: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Gaps:
    """Metric by group, and the gap between the best and the worst group with at least 10 users.

    If fewer than two groups are large enough, the gap and its statistics are NaN, and `best` and `worst` are empty.

    Attributes:
      groups: statistics by group.
      best: group with the highest mean.
      worst: group with the lowest mean.
      gap: difference of their means.
      low: lower end of its 95 % interval, conditional on the two groups.
      high: upper end.
      p: permutation p-value of the widest gap between any two groups, which accounts for the selection.
    """

    groups: Mapping[str, Group]
    best: str = ""
    worst: str = ""
    gap: float = math.nan
    low: float = math.nan
    high: float = math.nan
    p: float = math.nan


def group_gaps(
    values: Float[np.ndarray, "V"], groups: Sequence[str | None], *, draws: int = 2000, seed: int = 0
) -> Gaps:
    """Compares a metric between groups of users.

    Args:
      values: metric of each user; NaN is ignored.
      groups: group of each user; None is the group "unknown".
      draws: bootstrap resamples within each group, and permutations of the p-value, which count the observation as one
        (Davison and Hinkley, 1997, section 4.3).
      seed: random seed.

    Returns:
      Means with percentile intervals by group, and the widest gap.

    Raises:
      ValueError: `values` and `groups` differ in length.
    """
    if len(values) != len(groups):
        raise ValueError(f"{len(values)} values and {len(groups)} users with a group; they must be the same users")
    known = ~np.isnan(values)
    values = values[known].astype(np.float64)
    names, group = np.unique(
        np.array(["unknown" if name is None else name for name in groups], np.str_)[known], return_inverse=True
    )
    found: dict[str, Group] = {}
    drawn: dict[str, np.ndarray] = {}
    for n, name in enumerate(names.tolist()):
        own = values[group == n]
        drawn[name] = resampled_means(own, draws, numbered_rng(seed, n))
        low, high = np.quantile(drawn[name], (0.025, 0.975))
        found[name] = Group(len(own), float(own.mean()), float(low), float(high))
    sizes = np.bincount(group, minlength=len(names))
    large = np.flatnonzero(sizes >= SMALLEST)
    if len(large) < 2:
        return Gaps(found)
    means = _means(values, group, sizes)[large]
    best, worst = (names[large[place]].item() for place in (means.argmax(), means.argmin()))
    gap = float(np.ptp(means))
    low, high = np.quantile(drawn[best] - drawn[worst], (0.025, 0.975))
    rng = numbered_rng(seed, len(names))
    by_chance = [np.ptp(_means(rng.permutation(values), group, sizes)[large]) for _ in range(draws)]
    p = (1 + sum(wide >= gap * (1 - 1e-9) for wide in by_chance)) / (1 + draws)
    return Gaps(found, best, worst, gap, float(low), float(high), float(p))


def _means(values: Float64[np.ndarray, "V"], group: np.ndarray, sizes: np.ndarray) -> Float64[np.ndarray, "G"]:
    return np.bincount(group, values, minlength=len(sizes)) / np.maximum(sizes, 1)


def check_groups(users: pa.Table, names: Sequence[str]) -> None:
    """Checks that attributes define groups.

    Args:
      users: user table.
      names: columns.

    Raises:
      ValueError: as `groups_of`, for the first invalid attribute.
    """
    for name in names:
        groups_of(users, name, np.zeros(0, np.int64))


def _quarters(values: Sequence[int]) -> list[Fraction]:
    """Computes the quartiles of `np.quantile` exactly, since integers may exceed the precision of floats."""
    ordered = sorted(values)
    cuts = []
    for quarter in (1, 2, 3):
        place, rest = divmod(Fraction(quarter * (len(ordered) - 1), 4), 1)
        low, high = (Fraction(ordered[min(place + step, len(ordered) - 1)]) for step in (0, 1))
        cuts.append(low + (high - low) * rest)
    return cuts


def groups_of(users: pa.Table, name: str, rows: Int[np.ndarray, "V"]) -> list[str | None]:
    """Assigns users to groups by an attribute; numbers with more than 20 distinct values are grouped by quartiles.

    Args:
      users: user table.
      name: column.
      rows: user rows.

    Returns:
      Group of each row; None for a missing value.

    Raises:
      ValueError: the column is missing, holds lists, or has more than 20 distinct texts.
    """
    if name not in users.column_names:
        raise ValueError(f"users have no column {name!r}; they have {', '.join(users.column_names)}")
    values = known(users.column(name))
    if pa.types.is_dictionary(values.type):
        values = values.cast(values.type.value_type)
    if not is_single(values.type):
        raise ValueError(
            f"users.{name} holds {values.type} values; groups need a column with one text or number per user"
        )
    if pa.types.is_null(values.type):
        return [None] * len(rows)
    distinct = pc.count_distinct(values).as_py()
    number = (pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal)
    if distinct > 20 and any(test(values.type) for test in number):
        present = values.drop_null()
        exact = not pa.types.is_floating(values.type)
        cuts = _quarters(present.to_pylist()) if exact else np.quantile(np.asarray(present), (0.25, 0.5, 0.75)).tolist()
        bands = ("lowest quarter", "second quarter", "third quarter", "highest quarter")
        of_rows = values.take(pa.array(rows)).to_pylist()
        return [None if x is None else bands[bisect.bisect_left(cuts, x)] for x in of_rows]
    if distinct > 20:
        raise ValueError(f"users.{name} has {distinct} distinct values; groups need at most 20; bin them first")
    return values.take(pa.array(rows)).cast(pa.string()).to_pylist()
