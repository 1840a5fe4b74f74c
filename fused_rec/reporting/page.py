"""Report page of a finished run: one self-contained HTML file without scripts.

`render_page` is pure: data in, HTML out. All texts of the tables pass through `fused_rec.reporting.markup`.
"""

import math
from collections.abc import Mapping
from typing import Any

from fused_rec.evaluation.suitability import Gaps, Group
from fused_rec.reporting.changes import change_elements, stability_elements
from fused_rec.reporting.data import Customer, Passage, Recommended, ReportData, Route, Sliced
from fused_rec.reporting.figures import Bar, PathDiagram, Step, bars, curve, in_words, interval, path_diagrams
from fused_rec.reporting.layout import METRICS, NAME, SENTENCE, closed, gain, html_page, table, tiles, versions
from fused_rec.reporting.markup import Element, append, cut, element
from fused_rec.reporting.review import review
from fused_rec.runs.model_card import describe_late_fusion, describe_model, describe_training

MEANING = {
    "ndcg@10": "how high the held-out products stand among the first ten",
    "recall@10": "the share of the held-out products found among the first ten",
    "auc": "how often a held-out product is ranked above another one",
}
SPLIT_TITLES = {"valid": "validation split", "test": "test split"}
TEXT = 4000  # maximum characters shown of a passage
INTERACTIONS = 12  # maximum interactions of a user shown by name
DEGREES = 4  # number of highlighting levels
FAINT = 0.1  # minimum weight of a marked token, relative to the largest of its passage


def render_page(facts: ReportData) -> str:
    """Renders the report, light or dark as the reader's system prefers.

    Args:
      facts: content of the report.

    Returns:
      The HTML page.

    Raises:
      ValueError: it has more than `LARGEST` bytes.
    """
    name, variant = facts.results["dataset"], facts.results["variant"]
    sections = [
        ("review", "For a review", _review(facts)),
        ("quality", "How well it ranks", _quality(facts)),
        ("training", "How it was trained", _training(facts)),
        ("slices", "For whom it works", _slices(facts)),
        ("suitability", "Suitability", _suitability(facts)),
        ("stability", "Stability", _stability(facts)),
        ("changes", "Since the run before", _changes(facts)),
        ("customers", "Recommendations", _customers(facts)),
    ]
    heading = [
        element("h1", element("bdi", cut(name, NAME)), f": {variant} model"),
        element("p", _lead(facts)),
        _tiles(facts),
    ]
    footer = [
        "The model ranks products. It does not judge whether one suits a person, and this is no investment "
        "advice. The page may hold personal data; share it as you would share the tables.",
        f"Made by fused_rec with {versions(facts.results)}.",
    ]
    return html_page(f"{cut(name, NAME)}: {variant} model", heading, sections, footer)


def _review(facts: ReportData) -> list[Element]:
    rows = [[question, answer] for question, answer in review(facts).items()]
    return [table("What a reviewer asks", None, rows)]


def _stability(facts: ReportData) -> list[Element]:
    if not facts.stability:
        return [element("p", "No other run was compared, so it is not known which reasons would stay.")]
    return stability_elements(facts.stability)


def _changes(facts: ReportData) -> list[Element]:
    if facts.changed is None:
        return [element("p", "No earlier run was compared.")]
    return [
        part
        for title, content in change_elements(facts.changed)
        for part in (element("h3", title, class_="part"), *content)
    ]


def _lead(facts: ReportData) -> str:
    there, kind = facts.counts, facts.results["split"]
    return (
        f"Trained on {there['in the training split']:,} interactions of {there['customers']:,} customers and "
        f"{there['products']:,} products; the others are held out ({kind} split) and say how well it ranks."
    )


def _tiles(facts: ReportData) -> Element:
    results = facts.results
    shown = [
        ("NDCG@10, test split", f"{results['test']['ndcg@10']:.3f}", "as trained"),
        (
            "NDCG@10, validation split",
            f"{results['valid']['ndcg@10']:.3f}",
            f"step {results['best_step']} chosen by it" if "best_step" in results else "settings chosen by it",
        ),
    ]
    others = [model for model in facts.models if model.against is not None]
    if others:
        best = max(others, key=lambda model: _order(model.metrics["ndcg@10"][0]))
        assert best.against is not None
        shown.append((f"Against {best.name}, the best other", *gain(best.against["ndcg@10"])))
    shown.append(("Training", f"{results['seconds']:,.0f} s", describe_model(results)))
    return tiles(shown)


def _order(value: float) -> float:
    return value if math.isfinite(value) else -math.inf


def _quality(facts: ReportData) -> list[Element]:
    part = SPLIT_TITLES[facts.split]
    figures = []
    for metric in MEANING:
        rows = [Bar(cut(model.name, NAME), *model.metrics[metric], own=model.against is None) for model in facts.models]
        title = f"{METRICS[metric]} on the {part}"
        figures.append(_figure(bars(f"bars-{metric.replace('@', '-')}", title, rows, METRICS[metric]), title, metric))
    header = ["Model", *(f"{METRICS[metric]} [95 %]" for metric in MEANING), "NDCG@10 gained by the run's model"]
    body = []
    for model in facts.models:
        gained = "–"
        if model.against is not None:
            value, between = gain(model.against["ndcg@10"])
            gained = f"{value} ({between.removeprefix('95 % interval ')})"
        body.append([model.name, *(interval(*model.metrics[metric]) for metric in MEANING), gained])
    own = [model.against is None for model in facts.models]
    note = "Whole catalogue ranked, known products left out; intervals by a bootstrap over customers."
    if facts.split == "valid":
        note += " Validation chose the step and the settings, so these numbers flatter all models a little."
    return [
        element("p", note, class_="muted"),
        element("div", *figures, class_="figures"),
        table(f"Each model on the {part}", header, body, own),
    ]


def _figure(svg: Element, title: str, metric: str) -> Element:
    meaning = MEANING[metric]
    return element("figure", element("h3", title), svg, element("figcaption", f"{METRICS[metric]}: {meaning}."))


def _training(facts: ReportData) -> list[Element]:
    results, counts = facts.results, facts.counts
    metric = results["config"]["train"]["metric"]
    of_metric = f"{METRICS.get(metric, metric)} on the validation split"
    rows = [
        *([name[:1].upper() + name[1:], f"{count:,}"] for name, count in counts.items()),
        ["Split", f"{results['split']}, seed {results['config']['split']['seed']}"],
        ["Model", f"{results['variant']}: {describe_model(results)}"],
        ["Served model", describe_training(results) + describe_late_fusion(results.get("late_fusion"))],
        *([f"SHA-256 of the {name}", digest] for name, digest in facts.digests.items()),
    ]
    drawn = []
    shown = ((f"valid/{metric}", metric, of_metric), ("loss", "loss", "Training loss"))
    for key, unit, title in shown:
        points = [(float(line["step"] or 0), line.get(key)) for line in facts.curve]
        if any(value is not None for _, value in points):
            svg = curve(f"curve-{unit.replace('@', '-')}", title, points, unit, results["best_step"])
            drawn.append(element("figure", element("h3", title), svg))
    none = None if drawn else element("p", "No curves were kept.", class_="muted")
    header = ["Step", "Training loss", of_metric]
    body = [[f"{line['step']:g}", _cell(line.get("loss")), _cell(line.get(f"valid/{metric}"))] for line in facts.curve]
    settings = [
        [f"{section}.{name}", repr(value)]
        for section, values in results["config"].items()
        for name, value in values.items()
    ]
    content = [
        element("div", *drawn, class_="figures wide") if drawn else none,
        closed("The curves in numbers", table("Every evaluation", header, body)) if facts.curve else None,
        table("What it was trained on", None, rows),
        closed("All settings", table("Settings of the run", None, settings)),
    ]
    return [part for part in content if part is not None]


def _cell(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _slices(facts: ReportData) -> list[Element]:
    found = [_sliced(f"slice-{place}", one, facts.split) for place, one in enumerate(facts.slices)]
    by_item = facts.results.get("slices", {}).get("item_interactions", {})
    if by_item:
        rows = [Bar(f"{name} holders, {of['items']:,} products", of["ndcg@10"]) for name, of in by_item.items()]
        title = "NDCG@10 by holders of the product, test split"
        caption = "Only held-out products of the group count. As trained, without intervals."
        drawn = bars("slice-items", title, rows, "NDCG@10")
        found.append(element("figure", element("h3", title), drawn, element("figcaption", caption)))
    note = "Groups of fewer than ten customers say little; their intervals are wide."
    return [element("p", note, class_="muted"), element("div", *found, class_="figures")]


def _sliced(key: str, one: Sliced, split: str) -> Element:
    gaps, metric = one.gaps, METRICS.get(one.metric, one.metric)
    groups = sorted(gaps.groups.items(), key=lambda group: _natural(group[0]))
    rows = [
        Bar(f"{cut(name, NAME)}: {group.users:,} customers", group.mean, group.low, group.high)
        for name, group in groups
    ]
    title = f"{metric} by {one.title[:1].lower() + one.title[1:]}, {SPLIT_TITLES[split]}"
    caption = "No two groups are large enough to compare."
    if gaps.best:
        caption = (
            f"Widest gap between groups of ten or more: {interval(gaps.gap, gaps.low, gaps.high)}, from "
            f"{cut(gaps.worst, NAME)} to {cut(gaps.best, NAME)}; as wide by chance alone with {_p(gaps.p)}."
        )
    return element(
        "figure", element("h3", cut(title, NAME)), bars(key, title, rows, metric), element("figcaption", caption)
    )


def _p(value: float) -> str:
    return "p < .001" if value < 0.001 else f"p = {value:.3f}"


def _natural(name: str) -> tuple[int, int, str]:
    """Returns a sort key that orders ranges of numbers by their first number, before words."""
    digits = name.split("-")[0].rstrip("+")
    return (0, int(digits), name) if digits.isdecimal() and len(digits) < 18 else (1, 0, name)


def _suitability(facts: ReportData) -> list[Element]:
    rules = facts.rules
    if rules is None:
        meaning = (
            "No rules were given: nothing here says that a product suits a person. With a file of rules, what they "
            "exclude and cost stands here."
        )
        return [element("p", meaning)]
    suited, exclusions, k = rules["suitable"], rules["exclusions"], rules["k"]
    rows = [Bar("without rules", _nan(suited["without"])), Bar("under the rules", _nan(suited["under"]), own=True)]
    title = f"Suitable share of the first {k}"
    caption = (
        "Suitable: passes every rule of the file that was given. Whether the rules are right, the file must answer."
    )
    costs = []
    for name, cost in rules["costs"].items():
        costs.append(Bar(cut(name, NAME) or "all rules", cost["difference"], cost["low"], cost["high"], own=not name))
    cost_title = "NDCG@10 that a rule costs"
    figures = [
        element("figure", element("h3", title), bars("suitable", title, rows, "share"), element("figcaption", caption)),
        element(
            "figure",
            element("h3", cost_title),
            bars("costs", cost_title, costs, "NDCG@10"),
            element("figcaption", "What the metric gains without it. A held-out product that is refused is missed."),
        ),
    ]
    header = ["Rule", "Excludes", "Alone", "Of the first without rules"]
    body = [
        [name, *(f"{of[key]:,}" for key in ("excluded", "excluded_only_by_rule", "excluded_from_topk"))]
        for name, of in exclusions["rules"].items()
    ]
    content = [
        element("div", *figures, class_="figures"),
        table(f"(Customer, product) pairs of {rules['users']:,} customers that each rule excludes", header, body),
    ]
    if exclusions["users_without_recommendations"]:
        content.append(
            element("p", f"{exclusions['users_without_recommendations']:,} customers are left without any product.")
        )
    drawn = [
        _sliced(f"rules-{place}-{number}", _under_rules(attribute, metric, found), facts.split)
        for place, (attribute, metrics) in enumerate(rules["groups"].items())
        for number, (metric, found) in enumerate(metrics.items())
    ]
    return [*content, element("div", *drawn, class_="figures")] if drawn else content


def _under_rules(attribute: str, metric: str, found: Mapping[str, Any]) -> Sliced:
    """Selects results of `evaluate_rules` by group; names end in "under" or "without", except NDCG@10 under rules."""
    groups = {
        name: Group(of["users"], *(_nan(of[key]) for key in Group._fields[1:])) for name, of in found["groups"].items()
    }
    gap = {name: _nan(found[name]) for name in ("gap", "low", "high", "p")}
    caption = f"{METRICS[metric]} under the rules" if metric in METRICS else f"{metric} the rules"
    return Sliced(attribute, caption, Gaps(groups, found["best"], found["worst"], **gap))


def _nan(value: float | None) -> float:
    return math.nan if value is None else value


def _customers(facts: ReportData) -> list[Element]:
    if not facts.customers:
        return [element("p", "No customer was asked for.")]
    note = (
        f"{_count(len(facts.customers), 'customer')}, {facts.selection}. Of each product: why, split exactly; "
        f"the three "
        "paths that add most to its score, the wider the more; other customers stay unnamed."
    )
    shown = [_customer(place, customer) for place, customer in enumerate(facts.customers)]
    return [element("p", note, class_="muted"), *shown]


def _customer(place: int, customer: Customer) -> Element:
    title = "Customer " + customer.user_id
    known = (
        element("span", " ", element("bdi", cut(customer.name, NAME))) if customer.name != customer.user_id else None
    )
    caption = f" holds {_count(len(customer.interactions), 'product')}, {_count(customer.ties, 'tie')}"
    more = len(customer.interactions) - INTERACTIONS
    chips = [element("li", element("bdi", cut(name, NAME))) for name in customer.interactions[:INTERACTIONS]]
    if more > 0:
        chips.append(element("li", f"and {more:,} more"))
    items = [element("li", _recommended(f"c{place}-{item.rank}", item, item.rank == 1)) for item in customer.items]
    summary = element(
        "summary", element("h3", element("bdi", cut(title, NAME)), known), element("span", caption, class_="muted")
    )
    return element(
        "details",
        summary,
        element("h4", "Holds") if chips else None,
        element("ul", *chips, class_="chips") if chips else None,
        element("h4", "Recommended"),
        element("ol", *items, class_="recommendations") if items else element("p", "Nothing is left to recommend."),
        class_="customer",
        open=place == 0,
    )


def _count(number: int, of: str) -> str:
    return f"{number:,} {of}{'' if number == 1 else 's'}"


def _recommended(key: str, item: Recommended, first: bool) -> Element:
    summary = element(
        "summary",
        element("h4", element("span", f"{item.rank}. ", class_="rank"), element("bdi", cut(item.name, NAME))),
        element("span", f" {item.item_id if item.item_id != item.name else ''} score {item.score:.3f}", class_="muted"),
    )
    why = []
    survived = item.survived or [(0, 0)] * len(item.reasons)
    for reason, (kept, asked) in zip(item.reasons, survived, strict=True):
        bar = element("span", class_="track", aria_hidden="true")
        bar.append(element("span", style=f"width:{min(max(reason.share, 0.0), 1.0):.1%}"))
        why.append(element("li", cut(reason.text, SENTENCE), _weak(kept, asked), bar))
    reasons = (
        element("ol", *why, class_="reasons", lang=item.language)
        if why
        else element("p", "No reasons are known.", class_="muted")
    )
    left = element("div", element("h5", "Why"), reasons)
    if item.effect is not None:
        append(left, _without(*item.effect))
    if item.without:
        append(left, element("p", cut(item.without, SENTENCE), class_="if", lang=item.language))
    for passage in item.passages:
        append(left, _passage(passage))
    content = element("div", left, class_="because")
    if item.routes:
        found = [_path_diagram(route) for route in item.routes]
        title = f"Paths by which the score of {cut(item.name, NAME)} comes about"
        path_list = element("ul", *(element("li", in_words(way)) for way in found))
        figure = element(
            "figure",
            element("h5", "The paths that add most"),
            path_diagrams(f"ways-{key}", title, found, cut(item.name, NAME)),
            element("figcaption", "Solid: over the graph. Dashed: by likeness to the product."),
            closed("The paths in words", path_list),
        )
        append(content, figure)
    return element("details", summary, content, open=first)


def _weak(kept: int, asked: int) -> Element | None:
    """Marks a reason that does not survive in every other run."""
    if kept >= asked:
        return None
    return element("strong", f" Weak: it holds in {kept} of {_count(asked, 'other run')}.", class_="weak", lang="en")


def _without(item: str, change: Any) -> Element:
    if change.rank_after > change.rank:
        caption = f"it falls from rank {change.rank} to {change.rank_after}."
    elif change.rank_after < change.rank:
        caption = f"it rises from rank {change.rank} to {change.rank_after}."
    else:
        caption = (
            f"it stays at rank {change.rank}; its score changes from {change.score:.3f} to {change.score_after:.3f}."
        )
    return element("p", "Without holding ", element("bdi", cut(item, NAME)), ", ", caption, class_="if")


def _path_diagram(route: Route) -> PathDiagram:
    steps = [
        Step("|".join(map(str, (hop.by, *hop.node))), cut(hop.label, NAME), cut(hop.by, NAME))
        for hop in (route.hops[:-1] if route.arrives else route.hops)
    ]
    steps[0] = steps[0]._replace(label="The customer")
    likeness = "alike in words" if route.by_text else "alike in tastes"
    by = route.hops[-1].by if route.arrives else likeness
    return PathDiagram(steps, by, not route.arrives, route.value)


def _passage(passage: Passage) -> Element:
    """Marks the spans of a text: solid for positive, dotted for negative contributions, stronger for larger ones."""
    most = max((abs(span.value) for span in passage.spans), default=0.0)
    quote, end = element("blockquote"), 0
    weighted = []
    for span in passage.spans:
        if span.end > TEXT or abs(span.value) <= FAINT * most:
            continue
        degree = min(DEGREES, math.ceil(DEGREES * abs(span.value) / most))
        kind = "plus" if span.value > 0 else "minus"
        append(quote, passage.text[end : span.start])
        word = passage.text[span.start : span.end]
        shade = f"{'mark' if span.value > 0 else 'minus'}-{degree}"
        append(quote, element("mark", word, class_=f"{kind} {shade}", title=f"{span.value:+.4f}"))
        end = span.end
        weighted.append((abs(span.value), word, span.value))
    append(quote, passage.text[end:TEXT] + ("…" if len(passage.text) > TEXT else ""))
    weightiest = sorted(weighted, key=lambda word: -word[0])[:5]
    top_words = "; ".join(f"{cut(word, NAME)} {value:+.3f}" for _, word, value in weightiest)
    return element(
        "div",
        element("h5", passage.title),
        quote,
        element("p", f"Words that count most: {top_words}.", class_="muted") if top_words else None,
        class_="passage",
    )
