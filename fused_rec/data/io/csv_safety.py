"""Texts as CSV cells that no spreadsheet computes, and back.

A spreadsheet takes a cell for a formula that begins with = + - or @, and a formula can call programs or send the sheet
away (CWE-1236; OWASP, "CSV injection"). Ids and names come from tables that others wrote. The convention here: a text
that begins with one of these, or with ', whatever white space or unprintable characters stand before it, or with a tab
or line break, gets one ' in front. So a cell that begins with ' holds the text behind that first '; every other cell
holds the text as it is. Numbers that this project computes are written as numbers.
"""

import re

_UNSEEN = r"[\s\x00-\x20\x7f-\xa0\xad\u061c\u180e\u200b-\u200f\u2028-\u202f\u2060-\u206f\ufeff]"
# The full-width forms count as well: spreadsheets in Chinese, Japanese and Korean compute them.
_FORMULA = re.compile(rf"[\t\r\n]|{_UNSEEN}*['=+\-@＝＋－＠]")


def escape_csv(text: str) -> str:
    """The text as a CSV cell that is no formula: itself, or with one ' in front."""
    return f"'{text}" if _FORMULA.match(text) else text


def unescape_csv(cell: str) -> str:
    """The inverse of `escape_csv`."""
    return cell.removeprefix("'")
