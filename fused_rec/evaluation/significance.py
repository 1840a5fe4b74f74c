"""Comparison of models: paired bootstrap, corrected p-values, and summaries over seeds.

S seeds, V evaluated users, N resamples ("draws").
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Float64, Int64

from fused_rec.memory import require_memory

BLOCK = 4_000_000  # resampled users per block: 32 MB of indices


@dataclasses.dataclass(frozen=True)
class Difference:
    """Mean of a minus mean of b with 95 % intervals; the relative values are shares of b's mean, NaN if that is 0."""

    difference: float
    low: float
    high: float
    relative: float
    relative_low: float
    relative_high: float
    p: float


def paired_bootstrap(
    a: Float[np.ndarray, "S_a V"], b: Float[np.ndarray, "S_b W"], *, draws: int = 10_000, seed: int = 0
) -> Difference:
    """Tests the difference of two models on the same users (so V = W).

    A draw takes V of the users and S of the seeds with replacement, the same users for both models (pairs stay
    pairs), and the same seeds if both have equally many; a model with one run keeps it. The interval covers the sample
    of users and the variance of training; of the latter only (S - 1) / S, an underestimate with few seeds.

    Intervals: percentiles 2.5 and 97.5 of the draws (Efron and Tibshirani, An Introduction to the Bootstrap, 1993,
    section 13.3), the relative one of mean(a*) / mean(b*) - 1. Two-sided p: how often a draw strays from the
    observed difference d by as much as that is from 0, p = (1 + #{|d* - d| >= |d|}) / (1 + N): the bootstrap shifted
    to the null hypothesis, as in Smucker, Allan and Carterette (CIKM 2007; Sakai, SIGIR 2006, studentised), with
    the observation counted as a draw (Davison and Hinkley, 1997, section 4.2.3), so that it is never 0.

    Args:
      a: metric of the first model by seed and user. Users with NaN in any run are ignored.
      b: metric of the second model.
      draws: N.
      seed: random seed.

    Returns:
      Difference, intervals and p-value.

    Raises:
      ValueError: different users, no user with values in all runs, or draws below 1.
      InsufficientMemoryError: the resamples do not fit.
    """
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"a has {a.shape[1]} users and b {b.shape[1]}; they must be the same users")
    if draws < 1:
        raise ValueError(f"draws is {draws}; it must be at least 1")
    n, runs = a.shape[1], len(a) + len(b)
    # In float64 as they are, by user, and joined; and what a block of draws counts.
    what = f"a bootstrap of {runs} runs over {n:,} users"
    require_memory(
        24 * runs * n + 24 * max(BLOCK, n), what, "compare fewer variants or seeds at a time, or fewer users"
    )
    known = ~(np.isnan(a).any(0) | np.isnan(b).any(0))
    if not known.any():
        raise ValueError("no user has a value in every run; there is nothing to compare")
    a, b = a[:, known].astype(np.float64), b[:, known].astype(np.float64)
    of_a, of_b = _resampled_means(a, b, draws, np.random.default_rng(seed))
    mean_a, mean_b = a.mean(), b.mean()
    difference, drawn = mean_a - mean_b, of_a - of_b
    # Sums in another order differ in their last bits; what is equal must count as equal.
    strays = np.abs(drawn - difference) >= np.abs(difference) * (1 - 1e-9)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(of_b == 0, np.nan, of_a / of_b - 1)
    low, high = np.quantile(drawn, (0.025, 0.975))
    relative_low, relative_high = np.quantile(ratio, (0.025, 0.975))
    relative = difference / mean_b if mean_b else math.nan
    values = (difference, low, high, relative, relative_low, relative_high, (1 + strays.sum()) / (1 + draws))
    return Difference(*map(float, values))


def mean_interval(
    values: Float[np.ndarray, "S V"], *, draws: int = 10_000, seed: int = 0
) -> tuple[float, float, float]:
    """Computes the mean over users and seeds, and the ends of its 95 % interval (`paired_bootstrap` against 0)."""
    found = paired_bootstrap(values, np.zeros_like(values[:1]), draws=draws, seed=seed)
    return found.difference, found.low, found.high


def resampled_means(values: Float64[np.ndarray, "V"], draws: int, rng: np.random.Generator) -> Float64[np.ndarray, "N"]:
    """Computes bootstrap means: of V users drawn with replacement, `draws` times.

    Args:
      values: a value per user.
      draws: N.
      rng: random generator.
    """
    n, step = len(values), max(1, BLOCK // len(values))
    blocks = (_counts(rng, min(step, draws - start), n) @ values / n for start in range(0, draws, step))
    return np.concatenate(list(blocks))


def _resampled_means(
    a: Float64[np.ndarray, "S_a V"], b: Float64[np.ndarray, "S_b V"], draws: int, rng: np.random.Generator
) -> tuple[Float64[np.ndarray, "N"], Float64[np.ndarray, "N"]]:
    """Computes the means of both over the users and seeds of each draw."""
    n = a.shape[1]
    seeds = [_counts(rng, draws, len(a)) / len(a)]
    seeds.append(seeds[0] if len(a) == len(b) else _counts(rng, draws, len(b)) / len(b))
    both, means = np.concatenate([a, b]).T, []
    step = max(1, BLOCK // n)
    for start in range(0, draws, step):
        means.append(_counts(rng, min(step, draws - start), n) @ both / n)
    of_a, of_b = np.split(np.concatenate(means), [len(a)], axis=1)
    return (of_a * seeds[0]).sum(1), (of_b * seeds[1]).sum(1)


def _counts(rng: np.random.Generator, draws: int, n: int) -> Int64[np.ndarray, "N n"]:
    """Draws multinomial counts: n picks of n with replacement, for each draw."""
    picks = rng.integers(n, size=(draws, n)) + n * np.arange(draws)[:, None]
    return np.bincount(picks.reshape(-1), minlength=draws * n).reshape(draws, n)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusts p-values of a family (Holm, 1979): the i-th smallest of m times m - i + 1, monotone, at most 1."""
    order = np.argsort(p_values, kind="stable")
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * float(p_values[place])))
        adjusted[place] = highest
    return adjusted


def differences(values: Mapping[str, Mapping[str, np.ndarray]], reference: str) -> list[dict[str, Any]]:
    """Tests the reference against each other variant.

    Args:
      values: float [S, V] by variant and metric, the same users for all.
      reference: name of the reference.

    Returns:
      A dictionary per metric and variant with the fields of `Difference` (reference minus variant) and `p_holm`,
      adjusted within the metric.
    """
    found: list[dict[str, Any]] = []
    for metric in values[reference]:
        family: list[dict[str, Any]] = [
            {"reference": reference, "variant": name, "metric": metric}
            | dataclasses.asdict(paired_bootstrap(values[reference][metric], of_variant[metric]))
            for name, of_variant in values.items()
            if name != reference
        ]
        for row, p in zip(family, holm([row["p"] for row in family]), strict=True):
            row["p_holm"] = p
        found += family
    return found


def summarize(
    names: Sequence[str],
    rows: Sequence[Mapping[str, Any]],
    failures: Sequence[Mapping[str, Any]],
    values: Mapping[str, Mapping[str, np.ndarray]],
) -> list[dict[str, Any]]:
    """Summarizes each variant over its seeds.

    A variant that failed with any seed has no metrics, since the other seeds are selected by outcome.

    Args:
      names: of the variants.
      rows: results by variant and seed, with "test", "seconds" and "parameters".
      failures: failed runs.
      values: as for `differences`.

    Returns:
      An entry per variant: number of seeds, and by metric the mean, its standard deviation over seeds (None for one)
      and its 95 % interval over users and seeds (`paired_bootstrap`).
    """
    entries = []
    for name in names:
        own = [row for row in rows if row["variant"] == name]
        failed = any(failure["variant"] == name for failure in failures)
        entry: dict[str, Any] = {"variant": name, "seeds": len(own), "failed": failed, "metrics": {}}
        for metric in values.get(name, ()) if not failed else ():
            of_seeds = [row["test"][metric] for row in own]
            _, low, high = mean_interval(values[name][metric])
            entry["metrics"][metric] = {
                "mean": float(np.mean(of_seeds)),
                "sd": float(np.std(of_seeds, ddof=1)) if len(own) > 1 else None,
                "low": low,
                "high": high,
            }
        entry["seconds"] = float(np.mean([row["seconds"] for row in own])) if own else None
        entry["parameters"] = own[0]["parameters"] if own else None
        entries.append(entry)
    return entries
