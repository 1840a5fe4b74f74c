"""Comparison of models: paired bootstrap, corrected p-values, and summaries over seeds.

S seeds, V evaluated users, N resamples ("draws").
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float64, Int64

from fused_rec.memory import require_memory

BLOCK = 4_000_000  # resampled users per block: 32 MB of indices
ROUNDING = 1e-6  # relative; a metric of a user is a float32 sum, equal lists in another order differ by less


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

    Users and training are both random. With d_u the difference of user u averaged over seeds, the variance of the mean
    is estimated by s_users^2 / V + sum_m c_m, c_m = max(0, s_m^2 - r_m / V) / S_m: s_users^2 is the variance of d_u,
    s_m^2 the variance of the seeds' means (divided by S - 1), and r_m the mean square of the interaction of seed and
    user, which s_users^2 contains already (analysis of variance of crossed random effects; Searle, Casella and
    McCulloch, Variance Components, 1992, chapter 4). m is a - b by seed if both have equally many (pairs stay pairs),
    else a and b apart; a model with one run adds nothing.

    A draw takes V of the users with replacement, the same for both models, and adds for each m noise sqrt(c_m) t, with
    t of Student's distribution with S_m - 1 degrees of freedom. Sums of such terms are the solution of Behrens and
    Fisher, which is conservative at most (Robinson, Annals of Statistics 4, 1976). Where users dominate, this is the
    bootstrap over users; where seeds dominate, the t test over seeds.

    Intervals: percentiles 2.5 and 97.5 of the draws (Efron and Tibshirani, An Introduction to the Bootstrap, 1993,
    section 13.3), the relative one of mean(a*) / mean(b*) - 1 in the same draws. Two-sided p: how often a draw strays
    from the observed difference d by as much as that is from 0, p = (1 + #{|d* - d| >= |d|}) / (1 + N): the bootstrap
    shifted to the null hypothesis, as in Smucker, Allan and Carterette (CIKM 2007; Sakai, SIGIR 2006, studentised),
    with the observation counted as a draw (Davison and Hinkley, 1997, section 4.2.3), so that it is never 0.

    Args:
      a: metric of the first model by seed and user. Users with NaN in any run are ignored.
      b: metric of the second model.
      draws: N.
      seed: random seed.

    Returns:
      Difference, intervals and p-value. Differences within `ROUNDING` of the mean are 0, with p = 1.

    Raises:
      ValueError: different users, no user with values in all runs, or draws below 1.
      InsufficientMemoryError: the resamples do not fit.
    """
    return paired_bootstraps([(a, b)], draws=draws, seed=seed)[0]


def paired_bootstraps(
    pairs: Sequence[tuple[Float[np.ndarray, "_ _"], Float[np.ndarray, "_ _"]]], *, draws: int = 10_000, seed: int = 0
) -> list[Difference]:
    """Tests several pairs of models, each as `paired_bootstrap` does alone.

    Pairs with values of the same users have the same resamples, which are drawn once for all of them: they take most of
    the time.

    Args:
      pairs: the metric of the first and of the second model, as `paired_bootstrap` takes them.
      draws: N.
      seed: random seed, the same for each pair.

    Returns:
      The differences, in the order of the pairs.

    Raises:
      ValueError, InsufficientMemoryError: as `paired_bootstrap`.
    """
    if draws < 1:
        raise ValueError(f"draws is {draws}; it must be at least 1")
    prepared = [_pair(a, b) for a, b in pairs]
    of_users: dict[bytes, list[int]] = {}
    for place, pair in enumerate(prepared):
        of_users.setdefault(np.packbits(pair.known).tobytes(), []).append(place)
    found: dict[int, Difference] = {}
    for places in of_users.values():
        n = len(prepared[places[0]].of_users)
        # The columns, what a block of draws counts, and the means, once more while blocks are joined.
        need = 16 * len(places) * (n + 2 * draws) + 24 * max(BLOCK, n)
        what = f"a bootstrap of {len(places):,} pairs over {n:,} users"
        require_memory(need, what, "compare fewer variants at a time, or fewer users")
        rng = np.random.default_rng(seed)
        means = resampled_means(np.concatenate([prepared[place].of_users for place in places], axis=1), draws, rng)
        after = rng.bit_generator.state
        for column, place in enumerate(places):
            rng.bit_generator.state = after  # each pair goes on as if it were alone
            drawn = means[:, 2 * column : 2 * column + 2] + _noise_of_seeds(prepared[place].of_seeds, draws, rng)
            found[place] = _difference(prepared[place], drawn)
    return [found[place] for place in range(len(pairs))]


class _Pair(NamedTuple):
    """What a bootstrap of two models draws from.

    Attributes:
      known: bool [V], users with a value in every run: K.
      of_users: float64 [K, 2], the values of both models by user, averaged over seeds.
      of_seeds: for each m of `paired_bootstrap`, the share of its variance and the means of both models by seed.
      means: of both models.
      rounding: differences up to this are 0.
    """

    known: Bool[np.ndarray, "V"]
    of_users: Float64[np.ndarray, "K 2"]
    of_seeds: tuple[tuple[float, Float64[np.ndarray, "_ 2"]], ...]
    means: tuple[float, float]
    rounding: float


def _pair(a: Float[np.ndarray, "S_a V"], b: Float[np.ndarray, "S_b W"]) -> _Pair:
    """Takes the users with a value in every run; raises as `paired_bootstrap`."""
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"a has {a.shape[1]} users and b {b.shape[1]}; they must be the same users")
    n, runs = a.shape[1], len(a) + len(b)
    # In float64, their differences, and the interaction of users and seeds.
    what = f"a bootstrap of {runs} runs over {n:,} users"
    require_memory(24 * runs * n, what, "compare fewer variants or seeds at a time, or fewer users")
    known = np.asarray(~(np.isnan(a).any(0) | np.isnan(b).any(0)))
    if not known.any():
        raise ValueError("no user has a value in every run; there is nothing to compare")
    a, b = a[:, known].astype(np.float64), b[:, known].astype(np.float64)
    apart = [(a, b.mean(0, keepdims=True)), (a.mean(0, keepdims=True), b)]
    of_seeds = tuple(
        (_share_of_seeds(of_a - of_b), np.stack(np.broadcast_arrays(of_a.mean(1), of_b.mean(1)), axis=1))
        for of_a, of_b in ([(a, b)] if len(a) == len(b) else apart)
    )
    rounding = ROUNDING * max(float(np.abs(a).mean()), float(np.abs(b).mean()))
    of_users = np.stack([a.mean(0), b.mean(0)], axis=1)
    return _Pair(known, of_users, of_seeds, (float(a.mean()), float(b.mean())), rounding)


def _difference(pair: _Pair, drawn: Float64[np.ndarray, "N 2"]) -> Difference:
    """Computes the interval and p-value of a pair from the drawn means of both models."""
    mean_a, mean_b = pair.means
    of_a, of_b = drawn.T
    difference, drawn_difference = (
        np.where(np.abs(x) <= pair.rounding, 0.0, x) for x in (np.float64(mean_a - mean_b), of_a - of_b)
    )
    # Sums in another order differ in their last bits; what is equal must count as equal.
    strays = np.abs(drawn_difference - difference) >= np.abs(difference) * (1 - 1e-9)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(of_b == 0, np.nan, drawn_difference / of_b)
    low, high = np.quantile(drawn_difference, (0.025, 0.975))
    relative_low, relative_high = np.quantile(ratio, (0.025, 0.975))
    relative = difference / mean_b if mean_b else math.nan
    values = (difference, low, high, relative, relative_low, relative_high, (1 + strays.sum()) / (1 + len(drawn)))
    return Difference(*map(float, values))


def mean_intervals(
    of_models: Sequence[Float[np.ndarray, "_ _"]], *, draws: int = 10_000, seed: int = 0
) -> list[tuple[float, float, float]]:
    """Computes means over users and seeds, and the ends of their 95 % intervals (`paired_bootstrap` against 0).

    Args:
      of_models: the metric of each model by seed and user.
      draws: number of resamples.
      seed: random seed, the same for each model.

    Returns:
      Mean, low end and high end of each model.
    """
    tested = paired_bootstraps([(values, np.zeros_like(values[:1])) for values in of_models], draws=draws, seed=seed)
    return [(found.difference, found.low, found.high) for found in tested]


def resampled_means(
    values: Float64[np.ndarray, "V *columns"], draws: int, rng: np.random.Generator
) -> Float64[np.ndarray, "N *columns"]:
    """Computes bootstrap means: of V users drawn with replacement, `draws` times.

    Args:
      values: values by user.
      draws: N.
      rng: random generator.
    """
    n, step = len(values), max(1, BLOCK // len(values))
    blocks = (_counts(rng, min(step, draws - start), n) @ values / n for start in range(0, draws, step))
    return np.concatenate(list(blocks))


def _noise_of_seeds(
    of_seeds: tuple[tuple[float, Float64[np.ndarray, "_ 2"]], ...], draws: int, rng: np.random.Generator
) -> Float64[np.ndarray, "N 2"]:
    """Draws the noise of both means that `paired_bootstrap` adds for the seeds."""
    noise = np.zeros((draws, 2))
    for share, means in of_seeds:
        if not share:
            continue
        n = len(means)
        # Normal weights, the same for both models: their difference gets noise of variance s^2 / S, and after division
        # by the root of chi^2 / (S - 1), t noise.
        weights = rng.standard_normal((draws, n)) / np.sqrt(n * rng.chisquare(n - 1, (draws, 1)))
        noise += math.sqrt(share) * weights @ (means - means.mean(0))
    return noise


def _share_of_seeds(values: Float64[np.ndarray, "S V"]) -> float:
    """Estimates the share of the seeds' variance that is not of the interaction with users, max(0, 1 - r / (V s^2))."""
    seeds, users = values.shape
    rest = values - values.mean(0)
    of_seeds = rest.mean(1)
    rest -= of_seeds[:, None]
    between, interaction = float(of_seeds @ of_seeds), float(np.vdot(rest, rest))
    # Both have the factor 1 / (S - 1).
    return max(0.0, 1 - interaction / (users * max(users - 1, 1) * between)) if between else 0.0


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
    others = [name for name in values if name != reference]
    keys = [(metric, name) for metric in values[reference] for name in others]
    tested = paired_bootstraps([(values[reference][metric], values[name][metric]) for metric, name in keys])
    rows: list[dict[str, Any]] = [
        {"reference": reference, "variant": name, "metric": metric} | dataclasses.asdict(test)
        for (metric, name), test in zip(keys, tested, strict=True)
    ]
    for metric in values[reference]:
        family = [row for row in rows if row["metric"] == metric]
        for row, p in zip(family, holm([row["p"] for row in family]), strict=True):
            row["p_holm"] = p
    return rows


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
    keys = [(name, metric) for name in values for metric in values[name]]
    intervals = dict(zip(keys, mean_intervals([values[name][metric] for name, metric in keys]), strict=True))
    entries = []
    for name in names:
        own = [row for row in rows if row["variant"] == name]
        failed = any(failure["variant"] == name for failure in failures)
        entry: dict[str, Any] = {"variant": name, "seeds": len(own), "failed": failed, "metrics": {}}
        for metric in values.get(name, ()) if not failed else ():
            of_seeds = [row["test"][metric] for row in own]
            _, low, high = intervals[name, metric]
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
