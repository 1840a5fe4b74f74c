"""What a risk officer asks of a model, each answered in a sentence, for the page and the model card."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fused_rec.reporting.changes import change_of, mean_text
from fused_rec.reporting.data import ReportData
from fused_rec.reporting.figures import interval
from fused_rec.runs.model_card import NAMES as SPLITS
from fused_rec.runs.model_card import describe_origin, describe_served

RULES, GAPS, STABILITY, CHANGES = "Rules and their cost", "Gaps between groups", "Stability", "Since the run before"
WEAK = 0.5  # a reason that survives in a smaller share of recommendations is weak


def review(facts: ReportData) -> dict[str, str]:
    """Answers the questions of a review, as texts without markup.

    Args:
      facts: content of the page.

    Returns:
      Answers by question: owner, purpose, license, data with their dates and repairs; what it ranks with; rules
      with their cost; gaps between groups; stability; what changed since the run before. What was not measured is named
      with the flag that measures it.
    """
    return describe_origin(facts.results) | {"Ranks with": describe_served(facts.served)} | measured(facts)


def measured(facts: ReportData) -> dict[str, str]:
    """Answers those questions of a review that take a measurement, as of `review`."""
    changes = "not compared; --previous=DIR names the run before"
    if facts.changed is not None:
        changes = change_of(facts.changed)
    return {
        RULES: _rules(facts.rules),
        GAPS: f"of NDCG@10 on the {SPLITS[facts.split]} split: {_gaps(facts)}",
        STABILITY: _stability(facts.stability),
        CHANGES: changes,
    }


def _rules(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "no rules were given; --rules=FILE applies some"
    parts = []
    for name, of in found["exclusions"]["rules"].items():
        cost = found["costs"][name]
        spent = interval(*(float("nan") if cost[key] is None else cost[key] for key in ("difference", "low", "high")))
        parts.append(f"{name}: excludes {of['excluded']:,} pairs, costs {spent} of NDCG@10")
    return "; ".join(parts) or "the file has no rules"


def _gaps(facts: ReportData) -> str:
    parts = []
    for one in facts.slices:
        gaps = one.gaps
        if gaps.best:
            p = "p < .001" if gaps.p < 0.001 else f"p = {gaps.p:.3f}"
            between = f"{gaps.worst} to {gaps.best}"
            parts.append(f"{one.title}: {interval(gaps.gap, gaps.low, gaps.high)} from {between}, by chance with {p}")
        else:
            parts.append(f"{one.title}: no two groups of ten or more")
    return "; ".join(parts) or "no groups"


def _stability(differences: Sequence[Mapping[str, Any]]) -> str:
    if not differences:
        return "not measured; --compared_runs=DIR,DIR names runs with another seed, refit or other data"
    parts = []
    for found in differences:
        lists, reasons = found["lists"], found["reasons"]
        said = f"{mean_text(lists['overlap'])} of the first {lists['k']} products"
        said += f", rank correlation of scores {mean_text(lists['score_correlation'])}"
        if reasons is not None:
            said += f", {mean_text(reasons['reasons'])} of the reasons, {mean_text(reasons['sources'])} of the first "
            said += f"three sources ({mean_text(reasons['chance'])} by chance)"
            weak = [code for code, of in reasons["codes"].items() if of["survives"] < WEAK]
            said += f"; weak, surviving in less than half: {', '.join(weak)}" if weak else ""
        parts.append(f"{Path(found['after']['workdir']).name} ({found['change']}) keeps {said}")
    return "; ".join(parts)
