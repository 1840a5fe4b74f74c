"""Style of the report page: two palettes with tested contrast, and one self-contained style sheet."""

LIGHT = {
    "page": "#ffffff",
    "card": "#f5f6f8",
    "ink": "#1c2128",
    "muted": "#545d68",
    "line": "#d3d9e0",
    "own": "#0b5cad",
    "other": "#727b87",
    "against": "#b3261e",
    "mark-1": "#e3eefb",
    "mark-2": "#c9dff7",
    "mark-3": "#a6caf2",
    "mark-4": "#82b5ec",
    "minus-1": "#fbe9e7",
    "minus-2": "#f8d5d1",
    "minus-3": "#f3b9b3",
    "minus-4": "#ee9f97",
}
DARK = {
    "page": "#12161b",
    "card": "#1b2128",
    "ink": "#e8edf3",
    "muted": "#a5afbb",
    "line": "#39424d",
    "own": "#74b6f9",
    "other": "#8b95a1",
    "against": "#ff8f86",
    "mark-1": "#15283d",
    "mark-2": "#16334f",
    "mark-3": "#174066",
    "mark-4": "#194d7d",
    "minus-1": "#361d1c",
    "minus-2": "#482320",
    "minus-3": "#5a2925",
    "minus-4": "#6e302b",
}
# Text colors and backgrounds: at least 4.5:1 (WCAG 2.2, 1.4.3). Bars and lines: at least 3:1 (1.4.11).
READ = (
    *((ink, ground) for ink in ("ink", "muted", "own", "against") for ground in ("page", "card")),
    *(("ink", f"{kind}-{degree}") for kind in ("mark", "minus") for degree in (1, 2, 3, 4)),
    ("page", "own"),
)
SEEN = tuple((ink, ground) for ink in ("own", "other", "against") for ground in ("page", "card"))


def contrast(one: str, other: str) -> float:
    """Computes the contrast ratio of two colors (WCAG 2.2, "contrast ratio").

    Args:
      one: color as #rrggbb.
      other: color as #rrggbb.

    Returns:
      The ratio, from 1 to 21.
    """
    low, high = sorted(map(_luminance, (one, other)))
    return (high + 0.05) / (low + 0.05)


def _luminance(colour: str) -> float:
    shares = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in shares]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _variables(palette: dict[str, str]) -> str:
    return ":root{" + "".join(f"--{name}:{colour};" for name, colour in palette.items()) + "}"


def stylesheet() -> str:
    """Returns the style sheet. It must not contain text of tables, because style sheets are not escaped."""
    return "".join(
        [
            _variables(LIGHT),
            "@media screen and (prefers-color-scheme:dark){",
            _variables(DARK),
            "}",
            " ".join(_RULES.split()),
        ]
    )


_RULES = """
:root { color-scheme: light dark; }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif;
  overflow-wrap: anywhere; }
header, main, footer { max-width: 1120px; margin: 0 auto; padding: 0 16px; }
header { padding-top: 28px; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 8px; }
h2 { font-size: 1.3rem; line-height: 1.25; margin: 0 0 4px; }
h3 { font-size: 1.05rem; line-height: 1.3; margin: 0; }
h4, h5 { font-size: .95rem; line-height: 1.3; margin: 0 0 8px; }
p { margin: 0 0 12px; max-width: 72ch; }
section { padding: 28px 0 4px; }
section[id], details[id] { scroll-margin-top: 8px; }
.muted, figcaption, caption, .axis { color: var(--muted); }
.muted, figcaption, caption { font-size: .9rem; }
a { color: var(--own); }
a:focus-visible, summary:focus-visible, .scroll:focus-visible { outline: 3px solid var(--own); outline-offset: 2px;
  border-radius: 4px; }
.skip { position: absolute; left: -9999px; }
.skip:focus { left: 8px; top: 8px; background: var(--page); padding: 8px 12px; z-index: 1; }
nav ul { list-style: none; display: flex; flex-wrap: wrap; gap: 4px 18px; padding: 0; margin: 12px 0 0; }
nav a { display: inline-block; padding: 6px 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin: 20px 0 0;
  padding: 0; }
.tiles > div { background: var(--card); border-radius: 10px; padding: 12px 14px; }
.tiles dt { font-size: .85rem; color: var(--muted); }
.tiles dd { margin: 0; }
.tiles .number { font-size: 1.6rem; line-height: 1.25; font-weight: 650; font-variant-numeric: tabular-nums; }
.tiles .note { font-size: .85rem; color: var(--muted); }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 320px), 1fr)); gap: 20px;
  margin: 12px 0 16px; align-items: start; }
.figures.wide { grid-template-columns: repeat(auto-fit, minmax(min(100%, 320px), 1fr)); }
figure { margin: 0; background: var(--card); border-radius: 10px; padding: 14px; min-width: 0; }
figure svg { display: block; width: 100%; max-width: 460px; height: auto; margin: 0 auto; }
figcaption { margin-top: 6px; }
svg text { fill: var(--ink); font: 12px system-ui, sans-serif; }
svg .axis { fill: var(--muted); font-size: 11px; }
svg .strong { font-weight: 650; }
svg .end { text-anchor: end; } svg .middle { text-anchor: middle; }
svg .halo { paint-order: stroke; stroke: var(--card); stroke-width: 5px; stroke-linejoin: round; }
svg .grid { stroke: var(--line); stroke-width: 1; }
svg .own { fill: var(--own); } svg .other { fill: var(--other); }
svg .whisker { stroke: var(--ink); stroke-width: 1.5; fill: none; }
svg .line { stroke: var(--own); stroke-width: 2; fill: none; stroke-linejoin: round; }
svg .best { stroke: var(--ink); stroke-width: 1; stroke-dasharray: 3 3; }
svg .way { stroke: var(--own); fill: none; }
svg .way.alike { stroke: var(--other); stroke-dasharray: 7 4; }
svg .node { fill: var(--card); stroke: var(--own); stroke-width: 2.5; }
svg .node.goal { fill: var(--own); }
.scroll { overflow-x: auto; margin: 8px 0 16px; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; min-width: 100%; }
caption { text-align: left; padding: 4px 0; }
th, td { text-align: right; padding: 6px 10px; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 600; white-space: nowrap; }
td { white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
tbody th { white-space: normal; min-width: 7em; }
tr.own th, tr.own td { font-weight: 650; }
table.facts { min-width: 0; } table.facts td { text-align: left; white-space: normal; }
table.facts th { text-align: left; vertical-align: top; white-space: normal; min-width: 8em; }
details { margin: 8px 0; }
summary { cursor: pointer; padding: 6px 0; }
summary > h3, summary > h4 { display: inline; }
.customer { border: 1px solid var(--line); border-radius: 10px; padding: 4px 14px; margin: 12px 0; }
.customer > summary { padding: 10px 0; }
.chips { list-style: none; padding: 0; margin: 4px 0 12px; display: flex; flex-wrap: wrap; gap: 6px; }
.chips li { background: var(--card); border: 1px solid var(--line); border-radius: 999px; padding: 2px 10px;
  font-size: .85rem; max-width: 100%; }
.recommendations { list-style: none; padding: 0; margin: 0; }
.recommendations > li { border-top: 1px solid var(--line); }
.recommendations > li > details { margin: 0; }
.recommendations > li > details > summary { padding: 10px 0; }
.rank { color: var(--own); font-weight: 650; font-variant-numeric: tabular-nums; }
.because { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 320px), 1fr)); gap: 16px;
  align-items: start; padding-bottom: 14px; }
.reasons { list-style: none; padding: 0; margin: 0 0 12px; }
.reasons li { margin: 0 0 10px; }
.weak { display: block; color: var(--against); font-size: .9rem; }
.part { margin: 20px 0 8px; }
.track { display: block; height: 8px; border-radius: 4px; background: var(--line); overflow: hidden; margin-top: 3px; }
.track span { display: block; height: 100%; background: var(--own); border-radius: 4px; }
.if { border-left: 4px solid var(--own); padding: 2px 0 2px 12px; margin: 0 0 12px; }
.passage { background: var(--card); border-radius: 10px; padding: 12px 14px; margin: 0 0 12px; }
.passage p { margin: 0; } .passage blockquote { margin: 0 0 8px; white-space: pre-line; line-height: 1.9; }
mark { color: var(--ink); border-radius: 3px; padding: 1px 2px; }
mark.plus { border-bottom: 3px solid var(--own); } mark.minus { border-bottom: 3px dotted var(--against); }
.mark-1 { background: var(--mark-1); } .mark-2 { background: var(--mark-2); }
.mark-3 { background: var(--mark-3); } .mark-4 { background: var(--mark-4); font-weight: 650; }
.minus-1 { background: var(--minus-1); } .minus-2 { background: var(--minus-2); }
.minus-3 { background: var(--minus-3); } .minus-4 { background: var(--minus-4); font-weight: 650; }
footer { padding-top: 24px; padding-bottom: 40px; color: var(--muted); font-size: .9rem; }
@media (forced-colors: active) { svg .own, svg .other, .track span { forced-color-adjust: none; } }
@media print { figure, tr { break-inside: avoid; } nav, .skip { display: none; }
  details::details-content { content-visibility: visible; height: auto; } .scroll { overflow: visible; }
  th, td { white-space: normal; } }
"""
