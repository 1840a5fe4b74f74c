"""SVG figures of width 336, so that phones show them at about their own size and letters stay readable.

Each figure has a title and a description for screen readers; its content is also in the text or in a table.
"""

import math
import textwrap
from collections.abc import Sequence
from typing import NamedTuple

from fused_rec.reporting.markup import Element, append, cut, element

Number = int | float

WIDTH = 336
LETTER = 6.3  # width of a letter of 12 units, on average
LANE = 112  # width of a path
LABEL = 15  # letters a line of a node's label
LEVEL = 108  # vertical distance of two nodes of a path
MEET = 70  # below a node: label of the last edge to the item


class Bar(NamedTuple):
    """Row of a bar chart.

    Attributes:
      label: text beside the bar.
      value: length of the bar.
      low: lower end of the interval, None without one.
      high: upper end of the interval, None without one.
      own: whether it is the model of the report.
    """

    label: str
    value: Number
    low: Number | None = None
    high: Number | None = None
    own: bool = False


class Step(NamedTuple):
    """Node of a path.

    Attributes:
      key: unique in the diagram.
      label: text at the node.
      by: how it is reached from the node above.
    """

    key: str
    label: str
    by: str = ""


class PathDiagram(NamedTuple):
    """Path from the user down to the item.

    Attributes:
      steps: its nodes without the item.
      by: how the last node leads to the item.
      alike: whether it ends at a similar node, and not at the item itself.
      value: its contribution to the score.
    """

    steps: Sequence[Step]
    by: str
    alike: bool
    value: float


def bars(name: str, title: str, rows: Sequence[Bar], unit: str) -> Element:
    """Draws horizontal bars from 0 with their intervals.

    Args:
      name: prefix of ids, unique on the page.
      title: title of the figure.
      rows: the bars, from top to bottom.
      unit: label of the axis.

    Returns:
      The svg element.
    """
    pitch, left, right, top = 42, 4, 58, 4
    ends = [end for row in rows for end in (row.value, row.low, row.high) if end is not None and _known(end)]
    ticks = _ticks(min([0.0, *ends]), max([0.0, *ends]))
    scale = (WIDTH - left - right) / (ticks[-1] - ticks[0])

    def x(value: Number) -> Number:
        return left + (value - ticks[0]) * scale

    bottom = top + pitch * len(rows)
    summary = "; ".join(f"{row.label}: {interval(row.value, row.low, row.high)}" for row in rows)
    svg = _figure(name, title, f"{unit}. {summary}.", bottom + 34)
    for tick in ticks:
        svg.append(element("line", class_="grid", x1=x(tick), x2=x(tick), y1=top, y2=bottom + 4))
        svg.append(
            element("text", f"{tick:g}", class_="axis middle", x=max(x(tick), 3.0 * len(f"{tick:g}")), y=bottom + 17)
        )
    svg.append(element("text", unit, class_="axis middle", x=x((ticks[0] + ticks[-1]) / 2), y=bottom + 31))
    for place, row in enumerate(rows):
        y = top + pitch * place
        group = element("g", element("title", f"{row.label}: {interval(row.value, row.low, row.high)}"))
        fits = int((WIDTH - left) / LETTER)
        group.append(element("text", cut(row.label, fits), class_="strong" if row.own else None, x=left, y=y + 14))
        if _known(row.value):
            begin, end = sorted((x(0), x(row.value)))
            shown = element("rect", x=begin, y=y + 20, width=max(end - begin, 1.0), height=14.0, rx=2)
            shown.set("class", "own" if row.own else "other")
            group.append(shown)
            if row.low is not None and row.high is not None and _known(row.low) and _known(row.high):
                group.append(element("path", class_="whisker", d=_whisker(x(row.low), x(row.high), y + 27)))
            group.append(element("text", _number(row.value), class_="strong end", x=WIDTH, y=y + 32))
        else:
            group.append(element("text", "no value", class_="axis", x=x(0) + 4, y=y + 32))
        svg.append(group)
    return svg


def curve(name: str, title: str, points: Sequence[tuple[Number, Number | None]], unit: str, best: Number) -> Element:
    """Draws a line over training steps.

    Args:
      name: prefix of ids, unique on the page.
      title: title of the figure.
      points: (step, value); None or a nonfinite value is a gap.
      unit: name of the values.
      best: the selected step.

    Returns:
      The svg element.
    """
    left, right, top, height = 48, 14, 12, 150
    known = [(step, value) for step, value in points if value is not None and _known(value)]
    values = [value for _, value in known] or [0.0]
    across = _ticks(0.0, max([step for step, _ in points] or [1.0]))
    up = _ticks(min(values), max(values))
    scale = (WIDTH - left - right) / (across[-1] - across[0]), height / (up[-1] - up[0])

    def at(step: Number, value: Number) -> tuple[Number, Number]:
        return left + (step - across[0]) * scale[0], top + height - (value - up[0]) * scale[1]

    last = f"{_number(known[-1][1])} at step {known[-1][0]:g}" if known else "no value"
    summary = (
        f"{unit} over {len(known)} evaluations: from {_number(values[0])} to {last}, between {_number(min(values))} "
    )
    summary += f"and {_number(max(values))}. The step that was chosen is {best:g}."
    svg = _figure(name, title, summary, top + height + 34)
    for tick in up:
        _, y = at(0, tick)
        svg.append(element("line", class_="grid", x1=left, x2=WIDTH - right, y1=y, y2=y))
        svg.append(element("text", f"{tick:g}", class_="axis end", x=left - 6, y=y + 4))
    for tick in across:
        svg.append(element("text", f"{tick:g}", class_="axis middle", x=at(tick, 0)[0], y=top + height + 16))
    svg.append(
        element("text", "training step", class_="axis middle", x=(left + WIDTH - right) / 2, y=top + height + 31)
    )
    x = at(best, 0)[0]
    svg.append(element("line", class_="best", x1=x, x2=x, y1=top, y2=top + height))
    aside = {"class_": "axis halo end", "x": x - 5} if x > WIDTH / 2 else {"class_": "axis halo", "x": x + 5}
    svg.append(element("text", f"chosen: step {best:g}", y=top + 9, **aside))
    parts, drawing = [], False
    for step, value in points:
        if value is None or not _known(value):
            drawing = False
            continue
        x, y = at(step, value)
        parts.append(f"{'L' if drawing else 'M'}{x:.1f} {y:.1f}")
        drawing = True
    svg.append(element("path", class_="line", d=" ".join(parts) or "M0 0"))
    for step, value in known if len(known) <= 40 else []:
        x, y = at(step, value)
        title_of = element("title", f"step {step:g}: {_number(value)}")
        svg.append(element("circle", title_of, class_="own", cx=x, cy=y, r=4.5 if step == best else 2.5))
    return svg


def path_diagrams(name: str, title: str, found: Sequence[PathDiagram], goal: str) -> Element:
    """Draws paths from the user at the top down to the item, wider for larger contributions.

    Paths share the nodes of a common beginning, so no two lines cross.

    Args:
      name: prefix of ids, unique on the page.
      title: title of the figure.
      found: 1 to 3 paths.
      goal: label of the item.

    Returns:
      The svg element.
    """
    ordered = _in_branches(list(found))
    depth = max(len(way.steps) for way in ordered)
    edge = (WIDTH - LANE * len(ordered)) / 2
    lane = {place: edge + LANE * (place + 0.5) for place in range(len(ordered))}
    top, end = 26, 26 + LEVEL * depth + 16
    widest = max(way.value for way in ordered)
    middle = WIDTH / 2
    svg = _figure(name, title, " ".join(map(in_words, found)), end + 52)

    members = _paths_by_prefix(ordered)

    def x(prefix: tuple[str, ...]) -> Number:
        own = members[prefix]
        return middle if len(prefix) == 1 else sum(lane[place] for place in own) / len(own)

    lines, labels = [], []
    for prefix, own in members.items():
        value = sum(ordered[place].value for place in own)
        if len(prefix) > 1:
            above, y = x(prefix[:-1]), top + LEVEL * (len(prefix) - 2)
            lines.append(_line(above, y, x(prefix), y + LEVEL, value / widest, alike=False))
    for place, way in enumerate(ordered):
        prefix = tuple(step.key for step in way.steps)
        y, share, down = top + LEVEL * (len(prefix) - 1), way.value / widest, lane[place]
        last = top + LEVEL * (depth - 1) + MEET  # from here on the lanes converge
        if len(prefix) > 1 or len(ordered) == 1:
            down = x(prefix) if len(members[prefix]) == 1 else down
        lines.append(_line(x(prefix), y, down, min(y + MEET, last), share, way.alike))
        if y + MEET < last:
            lines.append(_straight(down, y + MEET, last, share, way.alike))
        lines.append(_line(down, last, middle, end, share, way.alike))
        labels.append(_written([way.by, f"+{way.value:.3f}"], down, y + MEET, "axis middle halo"))
    for line in lines:
        svg.append(line)
    for prefix, own in members.items():
        svg.append(_node(ordered[own[0]].steps[len(prefix) - 1], x(prefix), top + LEVEL * (len(prefix) - 1)))
    for label in labels:
        svg.append(label)
    node = element("g", element("title", goal), element("circle", class_="node goal", cx=middle, cy=end, r=8))
    node.append(_written(_lines(goal, 42, 2), middle, end + 24, "middle strong halo"))
    svg.append(node)
    return svg


def in_words(way: PathDiagram) -> str:
    """Returns a path as a sentence."""
    parts = [way.steps[0].label, *(f"{step.by}: {step.label}" for step in way.steps[1:]), way.by]
    return f"{' → '.join(parts)} → the product: adds {way.value:.3f} to the score."


def interval(value: Number, low: Number | None, high: Number | None) -> str:
    """Formats a number, with its interval if it has one."""
    if low is None or high is None or not (_known(low) and _known(high)):
        return _number(value)
    return f"{_number(value)} [{_number(low)}, {_number(high)}]"


def _figure(name: str, title: str, summary: str, height: Number) -> Element:
    labelled = f"{name}-title {name}-said"
    svg = element("svg", role="img", aria_labelledby=labelled)
    svg.set("viewBox", f"0 0 {WIDTH} {height:g}")
    append(svg, element("title", title, id=f"{name}-title"))
    append(svg, element("desc", summary, id=f"{name}-said"))
    return svg


def _paths_by_prefix(paths: Sequence[PathDiagram]) -> dict[tuple[str, ...], list[int]]:
    """Returns the positions of the paths that share each beginning, by the keys of its nodes."""
    members: dict[tuple[str, ...], list[int]] = {}
    for place, way in enumerate(paths):
        for length in range(1, len(way.steps) + 1):
            members.setdefault(tuple(step.key for step in way.steps[:length]), []).append(place)
    return members


def _node(step: Step, x: Number, y: Number) -> Element:
    node = element("g", element("title", f"{step.by}: {step.label}" if step.by else step.label))
    node.append(element("circle", class_="node", cx=x, cy=y, r=7))
    if step.by:
        node.append(element("text", cut(step.by, LABEL + 3), class_="axis middle halo", x=x, y=y - 15))
        node.append(_written(_lines(step.label, LABEL, 3), x, y + 21, "middle halo"))
    else:
        node.append(element("text", cut(step.label, 40), class_="middle strong", x=x, y=y - 13))
    return node


def _in_branches(found: list[PathDiagram]) -> list[PathDiagram]:
    """Sorts paths so that those with a common beginning are adjacent, otherwise in the given order."""
    order: dict[tuple[str, ...], int] = {}
    for way in found:
        for length in range(1, len(way.steps) + 1):
            order.setdefault(tuple(step.key for step in way.steps[:length]), len(order))
    return sorted(
        found,
        key=lambda way: [order[tuple(step.key for step in way.steps[: n + 1])] for n in range(len(way.steps))],
    )


def _line(x: Number, y: Number, to_x: Number, to_y: Number, share: Number, alike: bool) -> Element:
    half = (y + to_y) / 2
    return _stroke(f"M{x:.1f} {y:.1f}C{x:.1f} {half:.1f} {to_x:.1f} {half:.1f} {to_x:.1f} {to_y:.1f}", share, alike)


def _straight(x: Number, y: Number, to_y: Number, share: Number, alike: bool) -> Element:
    return _stroke(f"M{x:.1f} {y:.1f}V{to_y:.1f}", share, alike)


def _stroke(d: str, share: Number, alike: bool) -> Element:
    return element("path", class_="way alike" if alike else "way", d=d, stroke_width=1.5 + 4.5 * min(share, 1.0))


def _written(lines: Sequence[str], x: Number, y: Number, kind: str) -> Element:
    spans = [element("tspan", line, x=x, dy=0 if place == 0 else 14) for place, line in enumerate(lines)]
    return element("text", *spans, class_=kind, x=x, y=y)


def _lines(text: str, width: int, most: int) -> list[str]:
    lines = textwrap.wrap(text, width) or [text]
    return lines if len(lines) <= most else [*lines[: most - 1], cut(" ".join(lines[most - 1 :]), width)]


def _whisker(low: Number, high: Number, y: Number) -> str:
    return f"M{low:.1f} {y:.1f}H{high:.1f}M{low:.1f} {y - 4:.1f}v8M{high:.1f} {y - 4:.1f}v8"


def _known(value: Number) -> bool:
    return math.isfinite(value)


def _number(value: Number) -> str:
    """Formats a number with three significant digits: 0.0123, 1.23, 123."""
    if not _known(value):
        return "–"
    if value == 0:
        return "0"
    return f"{value:.{min(max(2 - math.floor(math.log10(abs(value))), 0), 4)}f}"


def _ticks(low: Number, high: Number) -> list[Number]:
    """Returns about four round numbers, from at most `low` to at least `high`."""
    span = (high - low) or abs(high) or 1.0
    step = 10 ** math.floor(math.log10(span / 3))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (factor * step) <= 4)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(step * n, 12) for n in range(first, max(last, first + 1) + 1)]
