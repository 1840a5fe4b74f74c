"""HTML and SVG as trees. Text becomes markup in `document` alone, where the standard library escapes all of it."""

import re
from xml.etree import ElementTree

Element = ElementTree.Element
Child = Element | str | None

# What moves the cursor, turns the direction of the text around it, or cannot be encoded.
_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
)


def element(tag: str, *children: Child, **attributes: str | int | float | None) -> Element:
    """An element with these children, in their order; a child that is None is left out.

    Attributes: `class_` is class, `aria_label` is aria-label; None and False are left out, True is an attribute
    without a value, numbers are rounded to 2 decimals.
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
    """Adds an element or a text at the end."""
    if child is None:
        return
    if isinstance(child, Element):
        parent.append(child)
    elif len(parent):
        parent[-1].tail = (parent[-1].tail or "") + visible(child)
    else:
        parent.text = (parent.text or "") + visible(child)


def document(root: Element) -> str:
    """The page as HTML."""
    return "<!DOCTYPE html>\n" + ElementTree.tostring(root, encoding="unicode", method="html") + "\n"


def visible(text: str) -> str:
    """The text with characters that hide, cannot be encoded or turn what stands beside them spelt out."""
    return _UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def cut(text: str, most: int) -> str:
    """The text, or its beginning and … where it has more than `most` characters."""
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"


def _value(value: str | int | float) -> str:
    if value is True:
        return ""
    return visible(value) if isinstance(value, str) else f"{round(float(value), 2):g}"
