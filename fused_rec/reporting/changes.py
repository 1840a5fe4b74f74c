"""The differences of two runs in words: tables that Markdown and the page share, and a page of their own."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fused_rec.evaluation.result_tables import in_markdown, markdown_table
from fused_rec.evaluation.significance import Difference
from fused_rec.reporting.figures import Bar, bars, interval
from fused_rec.reporting.layout import METRICS, NAME, gain, html_page, table, tiles, versions
from fused_rec.reporting.markup import Element, cut, element
from fused_rec.runs.model_card import describe_dates, describe_repairs, describe_served

OUTPUTS = "diff.json", "diff.md", "diff.html"
# What is measured between two runs, by its name in the results of `fused_rec.reporting.diff`.
LISTS = {
    "overlap": "products in both lists",
    "jaccard": "Jaccard index of the lists",
    "rank_biased_overlap": "rank-biased overlap of the lists",
    "first_unchanged": "customers with the same first product",
    "unchanged": "customers with the same list",
    "score_correlation": "rank correlation of the scores",
}
REASONS = {
    "first_reason": "products with the same first reason",
    "reasons": "reasons that survive",
    "sources": "first three sources that survive",
    "chance": "the same, of sources chosen at random",
    "effects": "rank correlation of the effects of sources",
}
STABLE = ("overlap", "first_unchanged", "score_correlation", "first_reason", "reasons", "sources", "chance")
SURVIVAL = (
    "A reason survives where the other run gives one with the same code for the same product, and where the "
    "interaction that it names first is among the three with the largest effects there."
)


class ChangeTable(NamedTuple):
    """A table: caption, titles of the columns, cells by row; `note` is a sentence below it.

    words: the cells are texts, and not numbers.
    """

    caption: str
    header: tuple[str, ...]
    rows: list[list[str]]
    note: str = ""
    words: bool = False


def change_tables(found: Mapping[str, Any]) -> dict[str, list[ChangeTable]]:
    """Puts the differences of two runs into tables.

    Args:
      found: of `fused_rec.reporting.diff.diff`.

    Returns:
      Tables by the title of their section.
    """
    return {
        "Runs and data": [_runs(found), _data(found), _settings(found)],
        "Metrics": [_metrics(found["metrics"])],
        "Top lists": [_lists(found["lists"]), _exposure(found["lists"])],
        "Reasons": [_reasons(found["reasons"]), *_codes(found["reasons"])],
    }


def _runs(found: Mapping[str, Any]) -> ChangeTable:
    sides = [found["before"], found["after"]]
    rows = {
        "Folder": [side["workdir"] for side in sides],
        "Data": [side["dataset"] for side in sides],
        "Model": [f"{side['variant']}, seed {side['seed']}" for side in sides],
        "Trained": [side["finished"] for side in sides],
        "Interactions trained on": [describe_dates(side["trained_period"]) for side in sides],
        "Repairs by the reader": [describe_repairs(side["repairs"]) for side in sides],
        "Ranks with": [_served(side) for side in sides],
        "SHA-256 of the model": [side["model"][:16] for side in sides],
        "SHA-256 of the tables": [side["tables"][:16] for side in sides],
    }
    cells = [[name, *values] for name, values in rows.items()]
    return ChangeTable("The two runs", ("Property", "Before", "After"), cells, words=True)


def _served(side: Mapping[str, Any]) -> str:
    return describe_served(side["served"]) + ("; other tables than those of the training" * side["other_tables"])


def _data(found: Mapping[str, Any]) -> ChangeTable:
    columns = ("before", "after", "common", "new", "gone")
    rows = [[name.capitalize(), *(f"{of[key]:,}" for key in columns)] for name, of in found["data"].items()]
    return ChangeTable("Data that they rank with", ("Table", "Before", "After", "In both", "New", "Gone"), rows)


def _settings(found: Mapping[str, Any]) -> ChangeTable:
    rows = [[name, *map(repr, values)] for name, values in found["settings"].items()]
    note = "" if rows else "All settings are the same."
    return ChangeTable("Settings that differ", ("Setting", "Before", "After"), rows, note, words=True)


def _metrics(found: Mapping[str, Any] | None) -> ChangeTable:
    header = ("Metric", "Before", "After", "Change", "95 % interval", "p")
    if found is None:
        return ChangeTable("Test metrics", header, [], "Both are the same trained run, with the same test metrics.")
    rows = []
    for name, of in found["metrics"].items():
        value, between = gain(_difference(of))
        p = "< .001" if of["p"] < 0.001 else f"{of['p']:.3f}"
        ends = between.removeprefix("95 % interval ")
        rows.append([METRICS[name], f"{of['before']:.4f}", f"{of['after']:.4f}", value, ends, p])
    note = f"Of the {found['users']:,} customers with held-out products in both, paired."
    if not found["same_held_out"]:
        note += " The held-out interactions of the two runs are not the same ones: tables or splits differ."
    return ChangeTable("Test metrics", header, rows, note)


def _difference(of: Mapping[str, float | None]) -> Difference:
    fields = {name: of[name] for name in Difference.__dataclass_fields__}
    return Difference(**{name: float("nan") if value is None else value for name, value in fields.items()})


def _lists(found: Mapping[str, Any]) -> ChangeTable:
    taken = found["taken"]
    note = f"The first {found['k']} products of {found['users']:,} customers who are in both runs."
    if taken["left"]:
        note += f" {taken['left']:,} products left the lists, {taken['now_held']:,} of them held by the customer now."
    return ChangeTable("How far the lists agree", ("Measure", "Mean [95 %]"), _rows(found, LISTS), note)


def _rows(found: Mapping[str, Any], named: Mapping[str, str]) -> list[list[str]]:
    return [[title[:1].upper() + title[1:], mean_text(found[name])] for name, title in named.items()]


def mean_text(found: Mapping[str, Any]) -> str:
    """Formats a mean over users with its interval."""
    return "–" if found["mean"] is None else interval(found["mean"], found["low"], found["high"])


def _exposure(found: Mapping[str, Any]) -> ChangeTable:
    rows = [
        [of["name"], f"{of['before']:.1%}", f"{of['after']:.1%}", f"{100 * (of['after'] - of['before']):+.1f} points"]
        for of in [*found["gained"], *reversed(found["lost"])]
    ]
    note = "" if rows else "Every product is in as many lists as before."
    header = ("Product", "Lists before", "Lists after", "Change")
    return ChangeTable("Products that gained and lost most exposure", header, rows, note)


def _reasons(found: Mapping[str, Any] | None) -> ChangeTable:
    caption, header = "How far the reasons agree", ("Measure", "Mean [95 %]")
    if found is None:
        return ChangeTable(caption, header, [], "A baseline has no explanations, so no reasons are compared.")
    pairs = f"{found['pairs']:,} products of {found['users']:,} customers"
    note = f"What was recommended before, explained by both runs: {pairs}."
    return ChangeTable(caption, header, _rows(found, REASONS), f"{note} {SURVIVAL}")


def _codes(found: Mapping[str, Any] | None) -> list[ChangeTable]:
    """Returns the table of how often a reason survives by its code, if there are reasons."""
    rows = [
        [code, f"{of['given']:,}", f"{of['survives']:.1%}"] for code, of in (found or {"codes": {}})["codes"].items()
    ]
    return [ChangeTable("Reasons by code", ("Code", "Given before", "Survive"), rows)] if rows else []


def stability_table(differences: Sequence[Mapping[str, Any]]) -> ChangeTable:
    """Puts the stability of lists, scores and reasons into a table, a column for each other run.

    Args:
      differences: of `fused_rec.reporting.diff.diff`, each between the run and another one.
    """
    header = ("Measure", *(Path(found["after"]["workdir"]).name for found in differences))
    rows = [["What differs", *(found["change"] for found in differences)]]
    for name, title in (LISTS | REASONS).items():
        if name in STABLE:
            values = [(found["lists"] | (found["reasons"] or {})).get(name) for found in differences]
            rows.append([title[:1].upper() + title[1:], *("–" if of is None else mean_text(of) for of in values)])
    return ChangeTable("What stays in other runs, from 0 to 1, with 95 % intervals", header, rows, SURVIVAL, words=True)


def change_of(found: Mapping[str, Any]) -> str:
    """Says in a sentence what changed between two runs."""
    of = (found["metrics"] or {"metrics": {}})["metrics"].get("ndcg@10")
    said = [f"since {found['before']['finished']}: {found['change']}"]
    if of is not None:
        value, between = gain(_difference(of))
        said.append(f"NDCG@10 on the test split {value} ({between})")
    said.append(f"{mean_text(found['lists']['overlap'])} of the first {found['lists']['k']} products stayed")
    if found["reasons"] is not None:
        said.append(f"{mean_text(found['reasons']['reasons'])} of the reasons survived")
    return "; ".join(said)


def in_words(differences: Sequence[Mapping[str, Any]]) -> str:
    """Writes the differences of two runs as Markdown, with a table of stability where there are further runs.

    Args:
      differences: of `fused_rec.reporting.diff.diff`, between the first run and each of the others.
    """
    found = differences[0]
    sections = change_tables(found)
    if len(differences) > 1:
        sections |= {"Stability": [stability_table(differences)]}
    lines = [f"# What changed: {in_markdown(found['before']['dataset'])}\n"]
    for title, tables in sections.items():
        lines.append(f"\n## {title}\n")
        for one in tables:
            cells = [one.header, *([in_markdown(cell) for cell in row] for row in one.rows)]
            lines.append(f"\n{one.caption}:\n\n{markdown_table(cells)}" if one.rows else "")
            lines.append(f"\n{in_markdown(one.note)}\n" if one.note else "")
    return "".join(lines)


def change_elements(found: Mapping[str, Any]) -> list[tuple[str, list[Element]]]:
    """Makes the sections of a page about the differences of two runs: title and content of each."""
    made = [(title, _elements(tables)) for title, tables in change_tables(found).items()]
    figures = {"Metrics": _metric_figures(found["metrics"]), "Top lists": _list_figures(found)}
    return [(title, [*_grid(figures.get(title, [])), *content]) for title, content in made]


def _elements(tables: Sequence[ChangeTable]) -> list[Element]:
    made = []
    for one in tables:
        if one.rows:
            made.append(table(one.caption, one.header, one.rows, words=one.words))
        if one.note:
            made.append(element("p", one.note, class_="muted"))
    return made


def _grid(figures: Sequence[Element]) -> list[Element]:
    return [element("div", *figures, class_="figures")] if figures else []


def _metric_figures(found: Mapping[str, Any] | None) -> list[Element]:
    figures = []
    for name, of in (found or {"metrics": {}})["metrics"].items():
        rows = [Bar("before", of["before"]), Bar("after", of["after"], own=True)]
        title, (value, between) = f"{METRICS[name]} on the test split", gain(_difference(of))
        drawn = bars(f"change-{name.replace('@', '-')}", title, rows, METRICS[name])
        figures.append(_figure(title, drawn, f"Change {value}, {between}."))
    return figures


def _list_figures(found: Mapping[str, Any]) -> list[Element]:
    parts = [(found["lists"], LISTS), (found["reasons"] or {}, REASONS)]
    rows = [
        Bar(title, of[name]["mean"], of[name]["low"], of[name]["high"], own=name in REASONS and name != "chance")
        for of, named in parts
        for name, title in named.items()
        if name in of and of[name]["mean"] is not None
    ]
    title = "What stayed, from 0 to 1"
    figures = [_figure(title, bars("stayed", title, rows, "share or correlation"), "With 95 % intervals over users.")]
    moved = [*found["lists"]["gained"], *reversed(found["lists"]["lost"])]
    if moved:
        title = "Change of exposure"
        rows = [Bar(cut(of["name"], NAME), 100 * (of["after"] - of["before"]), own=True) for of in moved]
        drawn = bars("exposure", title, rows, "percentage points of the lists")
        figures.append(_figure(title, drawn, "The products that gained and lost most."))
    return figures


def _figure(title: str, svg: Element, caption: str) -> Element:
    return element("figure", element("h3", title), svg, element("figcaption", caption))


def stability_elements(differences: Sequence[Mapping[str, Any]]) -> list[Element]:
    """Makes the content of a section about stability."""
    return _elements([stability_table(differences)])


def render_changes(differences: Sequence[Mapping[str, Any]], results: Mapping[str, Any]) -> str:
    """Renders the page about the differences of two runs.

    Args:
      differences: of `fused_rec.reporting.diff.diff`, between the first run and each of the others; the page shows the
        first in full, and the stability in all.
      results: content of `results.json` of the first run.
    """
    found = differences[0]
    sections = [(title.lower().replace(" ", "-"), title, content) for title, content in change_elements(found)]
    if len(differences) > 1:
        sections.append(("stability", "Stability", stability_elements(differences)))
    name = cut(found["before"]["dataset"], NAME)
    heading = [
        element("h1", "What changed: ", element("bdi", name)),
        element("p", f"The run of {found['before']['finished']} and that of {found['after']['finished']}."),
        tiles(_numbers(found)),
    ]
    footer = [
        "Shares are means over customers who are in both runs. No customer is named.",
        f"Made by fused_rec with {versions(results)}.",
    ]
    return html_page(f"What changed: {name}", heading, sections, footer)


def _numbers(found: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    shown = []
    of = (found["metrics"] or {"metrics": {}})["metrics"].get("ndcg@10")
    if of is not None:
        shown.append(("NDCG@10, test split", *gain(_difference(of))))
    for part, name in (("lists", "overlap"), ("lists", "first_unchanged"), ("reasons", "reasons")):
        one = (found[part] or {}).get(name)
        if one and one["mean"] is not None:
            title = (LISTS | REASONS)[name]
            between = f"95 % interval {one['low']:.1%} to {one['high']:.1%}"
            shown.append((title[:1].upper() + title[1:], f"{one['mean']:.1%}", between))
    return shown
