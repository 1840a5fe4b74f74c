"""HTML and SVG as element trees. Only `document` serializes them, with the escaping of the standard library."""

import re
from xml.etree import ElementTree

Element = ElementTree.Element
Child = Element | str | None

# Characters that move the cursor, change the text direction, or cannot be encoded.
_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
)


def element(tag: str, *children: Child, **attributes: str | int | float | None) -> Element:
    """Creates an element.

    Args:
      tag: its name.
      *children: elements and texts in order; None is skipped.
      **attributes: `class_` is class, `aria_label` is aria-label. None and False are skipped, True is an attribute
        without a value, numbers are rounded to 2 decimals.

    Returns:
      The element.
    """
    made = Element(tag)
    for name, value in attributes.items():
        if value is None or value is False:
            continue
        made.set(name.rstrip("_").replace("_", "-"), _value(value))
    for child in children:
        append(made, child)
    return made


def append(parent: Element, child: Child) -> None:
    """Appends an element or a text; None is skipped."""
    if child is None:
        return
    if isinstance(child, Element):
        parent.append(child)
    elif len(parent):
        parent[-1].tail = (parent[-1].tail or "") + visible(child)
    else:
        parent.text = (parent.text or "") + visible(child)


def document(root: Element) -> str:
    """Serializes the page as HTML."""
    return "<!DOCTYPE html>\n" + ElementTree.tostring(root, encoding="unicode", method="html") + "\n"


def visible(text: str) -> str:
    """Escapes characters that are invisible, cannot be encoded or change the direction of the text around them."""
    return _UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def cut(text: str, most: int) -> str:
    """Shortens a text to `most` characters, with … at the end."""
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"


def _value(value: str | int | float) -> str:
    if value is True:
        return ""
    return visible(value) if isinstance(value, str) else f"{round(float(value), 2):g}"
