"""Comparison of models: paired bootstrap, corrected p-values and tables.

S seeds, V evaluated users, N resamples ("draws").
"""

import csv
import dataclasses
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Float64, Int64

from fused_rec.data.dataset import printable
from fused_rec.data.io.csv_safety import escape_csv
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


def summarise(
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


def table(rows: Mapping[str, Mapping[str, float]], metrics: Sequence[str]) -> str:
    """Formats metrics as aligned columns, one row per model."""
    width = max(map(len, rows))
    lines = [" " * width + "".join(f"{name:>12}" for name in metrics)]
    for model, values in rows.items():
        lines.append(f"{model:<{width}}" + "".join(f"{values[name]:12.4f}" for name in metrics))
    return "\n".join(lines)


def markdown(report: Mapping[str, Any], metrics: Sequence[str]) -> str:
    """Formats a report of `fused_rec.studies.compare` as a Markdown table, followed by its failures."""
    header, *body = _cells(report, metrics, in_markdown)
    lines = ["| " + " | ".join(row) + " |" for row in (header, ["---"] + ["---:"] * (len(header) - 1), *body)]
    return "\n".join([*lines, *(f"\nFailed: {in_markdown(note)}" for note in _notes(report))]) + "\n"


def latex(report: Mapping[str, Any], metrics: Sequence[str]) -> str:
    """Formats a report as a LaTeX tabular for booktabs."""
    rows = [[_in_latex(cell) for cell in row] for row in _cells(report, metrics, _one_line)]
    # Behind \\ and \midrule LaTeX would take [ and * for arguments of theirs.
    header, *body = ("{}" * row[0].startswith(("[", "*")) + " & ".join(row) + r" \\" for row in rows)
    columns = "l" + "r" * (3 + 2 * len(metrics))
    notes = [rf"\par Failed: {_in_latex(note)}" for note in _notes(report)]
    lines = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", header, r"\midrule", *body, r"\bottomrule"]
    return "\n".join([*lines, r"\end{tabular}", *notes]) + "\n"


def csv_text(report: Mapping[str, Any], metrics: Sequence[str]) -> str:
    """Formats a report as CSV in full precision, with a column of failures; inapplicable cells are empty.

    Texts are as `fused_rec.data.io.csv_safety` writes them.
    """
    moments = ("mean", "sd", "low", "high")
    tests = tuple(field.name for field in dataclasses.fields(Difference)) + ("p_holm",)
    out = io.StringIO()
    # Quotes keep a text in its cell where the list separator is ; as well.
    writer = csv.writer(out, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
    header = ["variant", "seeds"]
    for metric in metrics:
        header += [f"{metric} {name}" for name in moments]
        header += [f"{metric} {report['reference']} less it: {name}" for name in tests]
    writer.writerow([*map(escape_csv, header), "seconds", "parameters", "failed"])
    for entry in report["summary"]:
        row = [escape_csv(entry["variant"]), entry["seeds"]]
        for metric in metrics:
            found = entry["metrics"].get(metric, {})
            row += [found.get(name) for name in moments]
            tested = _difference(report, entry["variant"], metric) or {}
            row += [tested.get(name) for name in tests]
        failed = escape_csv("; ".join(_notes(report, entry["variant"])))
        writer.writerow([*row, entry["seconds"], entry["parameters"], failed])
    return out.getvalue()


def _cells(report: Mapping[str, Any], metrics: Sequence[str], named: Callable[[str], str]) -> list[list[str]]:
    """The table, header first; `named` makes a cell of a name."""
    header = ["variant", "seeds"]
    for metric in metrics:
        header += [metric, f"{named(report['reference'])} less it"]
    cells = [[*header, "seconds", "parameters"]]
    for entry in report["summary"]:
        row = [named(entry["variant"]), str(entry["seeds"])]
        for metric in metrics:
            found = entry["metrics"].get(metric)
            row += [_mean(found) if found else "failed" if entry["failed"] else "–"]
            row += [_tested(_difference(report, entry["variant"], metric))]
        parameters = "–" if entry["parameters"] is None else f"{entry['parameters']:,}"
        cells.append([*row, "–" if entry["seconds"] is None else f"{entry['seconds']:.0f}", parameters])
    return cells


def _difference(report: Mapping[str, Any], variant: str, metric: str) -> Mapping[str, Any] | None:
    return next((row for row in report["differences"] if (row["variant"], row["metric"]) == (variant, metric)), None)


def _mean(found: Mapping[str, float | None]) -> str:
    return f"{found['mean']:.4f}" + ("" if found["sd"] is None else f" ± {found['sd']:.4f}")


def _tested(row: Mapping[str, Any] | None) -> str:
    """Relative where it can be: "+12.3 % [+8.1, +16.2], p = .012", p adjusted."""
    if row is None:
        return "–"
    p = "p < .001" if row["p_holm"] < 0.001 else f"p = {row['p_holm']:.3f}".replace("0.", ".")
    relative = [row[name] for name in ("relative", "relative_low", "relative_high")]
    if any(value is None or math.isnan(value) for value in relative):
        return f"{row['difference']:+.4f} [{row['low']:+.4f}, {row['high']:+.4f}], {p}"
    value, low, high = (100 * value for value in relative)
    return f"{value:+.1f} % [{low:+.1f}, {high:+.1f}], {p}"


def _notes(report: Mapping[str, Any], variant: str | None = None) -> list[str]:
    return [
        _one_line(f"{failure['variant']}, {_moment(failure['seed'])}: {failure['message']}")
        for failure in report["failures"]
        if variant in (None, failure["variant"])
    ]


def _moment(seed: int | None) -> str:
    return "tuning" if seed is None else f"seed {seed}"


def _one_line(text: str) -> str:
    return printable(" ".join(text.split()))


# What Markdown may read as markup; an underscore inside a word is none (CommonMark 0.31, section 6.2).
_MARKUP = re.compile(r"(?<![^\W_])_|_(?![^\W_])|[\\|`*\[\]{}$~#!&<>]")
_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}


def in_markdown(text: str) -> str:
    """Escapes a text for Markdown, on one line."""
    return _MARKUP.sub(lambda found: _ENTITIES.get(found[0], f"\\{found[0]}"), _one_line(text))


_LATEX = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"},
    **{"<": "$<$", ">": "$>$", "|": r"\textbar{}", "`": "{`}", "±": r"$\pm$", "–": "--"},
}


def _in_latex(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text)
