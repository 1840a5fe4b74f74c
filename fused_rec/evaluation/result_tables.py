"""Results as tables: aligned text, Markdown, LaTeX and CSV, in which no name is taken for markup or a formula."""

import csv
import dataclasses
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fused_rec.data.dataset import printable
from fused_rec.data.io.csv_safety import escape_csv
from fused_rec.evaluation.significance import Difference


def table(rows: Mapping[str, Mapping[str, float]], metrics: Sequence[str]) -> str:
    """Formats metrics as aligned columns, one row per model."""
    width = max(map(len, rows))
    lines = [" " * width + "".join(f"{name:>12}" for name in metrics)]
    for model, values in rows.items():
        lines.append(f"{model:<{width}}" + "".join(f"{values[name]:12.4f}" for name in metrics))
    return "\n".join(lines)


def markdown(report: Mapping[str, Any], metrics: Sequence[str]) -> str:
    """Formats a report of `fused_rec.studies.compare` as a Markdown table, followed by its failures."""
    notes = [f"\nFailed: {in_markdown(note)}\n" for note in _notes(report)]
    new = _new_item_cells(report)
    return (
        markdown_table(_cells(report, metrics, in_markdown))
        + ("\n" + markdown_table(new) if new else "")
        + "".join(notes)
    )


def markdown_table(cells: Sequence[Sequence[str]]) -> str:
    """Formats cells, the header first, as a Markdown table; numbers, in all columns but the first, are on the right."""
    header, *body = cells
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "".join("| " + " | ".join(row) + " |\n" for row in (header, rule, *body))


def csv_table(rows: Sequence[Sequence[Any]]) -> str:
    """Formats rows as CSV in full precision; texts are as `fused_rec.data.io.csv_safety` writes them, None is empty."""
    out = io.StringIO()
    # Quotes keep a text in its cell where the list separator is ; as well.
    writer = csv.writer(out, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
    writer.writerows([escape_csv(cell) if isinstance(cell, str) else cell for cell in row] for row in rows)
    return out.getvalue()


def relative_text(found: Mapping[str, Any]) -> str:
    """Formats the fields of a `Difference`: "+12.3 % [+8.1, +16.2]", or the absolute one where the other mean is 0."""
    relative = [found[name] for name in ("relative", "relative_low", "relative_high")]
    if any(value is None or math.isnan(value) for value in relative):
        return f"{found['difference']:+.4f} [{found['low']:+.4f}, {found['high']:+.4f}]"
    value, low, high = (100 * value for value in relative)
    return f"{value:+.1f} % [{low:+.1f}, {high:+.1f}]"


def interval_text(found: Mapping[str, Any]) -> str:
    """Formats a mean with its 95 % interval: "0.1234 [0.1200, 0.1270]"."""
    return f"{found['mean']:.4f} [{found['low']:.4f}, {found['high']:.4f}]"


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
    header = ["variant", "seeds"]
    for metric in metrics:
        header += [f"{metric} {name}" for name in moments]
        header += [f"{metric} {report['reference']} vs. row: {name}" for name in tests]
    rows = [[*header, "seconds", "parameters", "failed"]]
    for entry in report["summary"]:
        row = [entry["variant"], entry["seeds"]]
        for metric in metrics:
            found = entry["metrics"].get(metric, {})
            row += [found.get(name) for name in moments]
            tested = _difference(report, entry["variant"], metric) or {}
            row += [tested.get(name) for name in tests]
        rows.append([*row, entry["seconds"], entry["parameters"], "; ".join(_notes(report, entry["variant"]))])
    return csv_table(rows)


def _cells(report: Mapping[str, Any], metrics: Sequence[str], named: Callable[[str], str]) -> list[list[str]]:
    """The table, header first; `named` makes a cell of a name."""
    header = ["variant", "seeds"]
    for metric in metrics:
        header += [metric, f"{named(report['reference'])} vs. row"]
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


def _new_item_cells(report: Mapping[str, Any]) -> list[list[str]]:
    """Recall of held-out items without and with training interactions, means over seeds; empty without the former."""
    slices = {"new items, recall@20": "0", "known items, recall@20": "1+"}
    cells = []
    for entry in report["summary"]:
        rows = [
            row.get("slices", {}).get("item_interactions", {})
            for row in report["rows"]
            if row["variant"] == entry["variant"]
        ]
        if rows and all(name in row for row in rows for name in slices.values()):
            means = (sum(row[name]["recall@20"] for row in rows) / len(rows) for name in slices.values())
            cells.append([in_markdown(entry["variant"]), *(f"{mean:.4f}" for mean in means)])
    return [["variant", *slices], *cells] if cells else []


def _difference(report: Mapping[str, Any], variant: str, metric: str) -> Mapping[str, Any] | None:
    return next((row for row in report["differences"] if (row["variant"], row["metric"]) == (variant, metric)), None)


def _mean(found: Mapping[str, float | None]) -> str:
    return f"{found['mean']:.4f}" + ("" if found["sd"] is None else f" ± {found['sd']:.4f}")


def _tested(row: Mapping[str, Any] | None) -> str:
    """Relative where it can be: "+12.3 % [+8.1, +16.2], p = .012", p adjusted."""
    if row is None:
        return "–"
    p = "p < .001" if row["p_holm"] < 0.001 else f"p = {row['p_holm']:.3f}".replace("0.", ".")
    return f"{relative_text(row)}, {p}"


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
