"""Escaping of texts as CSV cells so that spreadsheets do not run them as formulas.

Spreadsheets treat a cell that begins with = + - or @ as a formula, which can start programs or send data
(CWE-1236; OWASP, "CSV injection"). Ids and names come from tables of others. The convention: one ' is put in front of
a text that begins with one of these characters or with ', also after white space or unprintable characters, or with a
tab or line break. To read a cell, remove one leading ' if there is one. Numbers that this project computes are not
escaped.
"""

import re

_UNSEEN = r"[\s\x00-\x20\x7f-\xa0\xad\u061c\u180e\u200b-\u200f\u2028-\u202f\u2060-\u206f\ufeff]"
# Full-width forms too: Chinese, Japanese and Korean spreadsheets treat them as formulas.
_FORMULA = re.compile(rf"[\t\r\n]|{_UNSEEN}*['=+\-@＝＋－＠]")


def escape_csv(text: str) -> str:
    """Returns the text as a safe CSV cell: unchanged, or with one ' in front."""
    return f"'{text}" if _FORMULA.match(text) else text


def unescape_csv(cell: str) -> str:
    """Inverts `escape_csv`."""
    return cell.removeprefix("'")
