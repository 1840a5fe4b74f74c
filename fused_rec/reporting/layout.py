"""The frame that pages share: head, skip link, header with links to the sections, tables, folded parts, footer."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fused_rec.evaluation.significance import Difference
from fused_rec.reporting.markup import Child, Element, cut, document, element
from fused_rec.reporting.style import stylesheet

LARGEST = 5_000_000  # maximum bytes of a page; larger ones are slow on phones
NAME, SENTENCE = 120, 600  # maximum characters shown of a name and a sentence
METRICS = {"ndcg@10": "NDCG@10", "recall@10": "Recall@10", "mrr@10": "MRR@10", "auc": "AUC"}  # titles
Section = tuple[str, str, Sequence[Element]]  # id, title, content
# No script runs and nothing is loaded, whatever a text of the tables holds.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def html_page(title: str, heading: Sequence[Child], sections: Sequence[Section], footer: Sequence[str]) -> str:
    """Renders a page, light or dark as the reader's system prefers.

    Args:
      title: of the window.
      heading: content above the links to the sections; the last part follows the links.
      sections: the content.
      footer: its paragraphs.

    Returns:
      The HTML page.

    Raises:
      ValueError: it has more than `LARGEST` bytes.
    """
    links = [element("li", element("a", name, href=f"#{key}")) for key, name, _ in sections]
    nav = element("nav", element("ul", *links), aria_label="Sections")
    *above, below = heading
    body = element(
        "body",
        element("a", "Skip to the content", class_="skip", href="#content"),
        element("header", *above, nav, below),
        element("main", *(section(*one) for one in sections), id="content", tabindex="-1"),
        element("footer", *(element("p", text) for text in footer)),
    )
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", title),
        element("style", stylesheet()),
    )
    made = document(element("html", head, body, lang="en"))
    if (size := len(made.encode())) > LARGEST:
        raise ValueError(f"the page has {size:,} bytes, at most {LARGEST:,}; ask for fewer customers or products")
    return made


def section(key: str, title: str, content: Sequence[Element]) -> Element:
    """Makes a section of the page that its title names."""
    return element("section", element("h2", title, id=f"{key}-title"), *content, id=key, aria_labelledby=f"{key}-title")


def tiles(shown: Sequence[tuple[str, str, str]]) -> Element:
    """Makes a row of numbers.

    Args:
      shown: title, number and note of each.
    """
    made = [
        element(
            "div",
            element("dt", cut(title, NAME)),
            element("dd", number, class_="number"),
            element("dd", note, class_="note"),
        )
        for title, number, note in shown
    ]
    return element("dl", *made, class_="tiles")


def versions(results: Mapping[str, Any]) -> str:
    """Says with which versions a run was made."""
    there = results["versions"]
    return ", ".join(f"{name} {there[name]}" for name in ("python", "jax", "flax") if name in there)


def gain(found: Difference) -> tuple[str, str]:
    """Returns a difference and its interval, relative where possible."""
    if math.isfinite(found.relative):
        low, high = found.relative_low, found.relative_high
        return f"{found.relative:+.1%}", f"95 % interval {low:+.1%} to {high:+.1%}"
    return f"{found.difference:+.4f}", f"95 % interval {found.low:+.4f} to {found.high:+.4f}"


def closed(title: str, *content: Element) -> Element:
    """Makes a part that is folded under its title."""
    return element("details", element("summary", title), *content)


def table(
    caption: str,
    header: Sequence[str] | None,
    body: Sequence[Sequence[str]],
    own: Sequence[bool] | None = None,
    words: bool = False,
) -> Element:
    """Makes a table that scrolls in its own box; the first cell of each row is its header.

    Args:
      caption: its caption.
      header: titles of the columns; None: of a table of facts, which has none.
      body: cells of each row.
      own: rows in bold letters.
      words: the cells are texts, which are broken into lines, and not numbers; so are those of a table of facts.
    """
    rows = [
        element(
            "tr",
            element("th", element("bdi", cut(row[0], NAME)), scope="row"),
            *(element("td", cut(cell, SENTENCE)) for cell in row[1:]),
            class_="own" if own and own[place] else None,
        )
        for place, row in enumerate(body)
    ]
    head = None
    if header is not None:
        head = element("thead", element("tr", *(element("th", title, scope="col") for title in header)))
    kind = "facts" if words or header is None else None
    made = element("table", element("caption", caption), head, element("tbody", *rows), class_=kind)
    return element("div", made, class_="scroll", tabindex="0", role="region", aria_label=caption)
