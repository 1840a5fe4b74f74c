"""Conversion of text columns to numbers if it changes no value: codes such as 0x1A, 1E5 and 007 stay text."""

import decimal
import re

import numpy as np
import pyarrow as pa
from jaxtyping import Bool

from fused_rec.data.io.arrow import flags, known, pc

_INTEGER = r"\A(0|-?[1-9][0-9]*)\z"
_DECIMAL = r"\A-?(0|[1-9][0-9]*)(\.[0-9]+)?\z"
_SHORT = r"\A-?[0-9.]{1,15}\z"  # a 64-bit float preserves 15 digits
_POWER = re.compile(r"-?[1-9](\.[0-9]*[1-9])?e(\+[0-9]{2,}|-[0-9]+)")  # as programs write huge and tiny numbers
_NO_NUMBER = r"(?i)\A-?(nan|inf|infinity)\z"  # nonfinite floats: missing, or refused by the checks
# Texts that look like numbers: hexadecimal, signs, leading zeros, exponents, thousands separators.
_LIKE = r"(?i)\A\s*[+-]?(0x[0-9a-f]+|([0-9][0-9_,' ]*)?\.?[0-9][0-9_,' ]*\.?(e[+-]?[0-9]+)?)\s*\z"
_EXACT = 2**53  # integers up to here are exact as 64-bit floats


def typed(column: pa.ChunkedArray) -> tuple[pa.ChunkedArray, int | None]:
    """Converts texts to integers or floats if each text equals the output of its number.

    Args:
      column: texts.

    Returns:
      The column, and the first row that keeps it text if some texts look like numbers, else None.
    """
    column = known(column.cast(pa.string()))  # columns of ids and kinds are read as dictionaries
    if not len(column.drop_null()):
        return column.cast(pa.int64()), None
    whole = flags(pc.match_substring_regex(column, _INTEGER))
    there = flags(column.is_valid())
    if (whole == there).all():
        try:
            return column.cast(pa.int64()), None
        except pa.ArrowInvalid:  # more than 64 bits
            odd = ~_fits(column)
    else:
        plain = _gives_back(column)
        no_number = flags(pc.match_substring_regex(column, _NO_NUMBER))
        odd = there & ~plain & ~no_number
        if not odd.any() and plain.any():
            return column.cast(pa.float64()), None
        odd |= no_number & ~plain.any()
    alike = pc.any(pc.match_substring_regex(column, _LIKE)).as_py()
    return column, int(np.flatnonzero(odd & there)[0]) if alike else None


def _fits(column: pa.ChunkedArray) -> Bool[np.ndarray, "R"]:
    """Returns which integers fit into 64 bits."""
    return np.array([value is None or -(2**63) <= int(value[:25]) < 2**63 for value in column.to_pylist()], bool)


def _gives_back(column: pa.ChunkedArray) -> Bool[np.ndarray, "R"]:
    """Returns which texts equal the output of their 64-bit float, except for trailing zeros of decimals."""
    fixed = flags(pc.match_substring_regex(column, _DECIMAL))
    sure = fixed & flags(pc.match_substring_regex(column, _SHORT))
    rest = np.flatnonzero(~sure & flags(column.is_valid()))
    texts = column.take(pa.array(rest)).to_pylist()
    sure[rest] = [
        _is_exact(text) if is_fixed or _POWER.fullmatch(text) else False
        for text, is_fixed in zip(texts, fixed[rest], strict=True)
    ]
    return sure


def _is_exact(text: str) -> bool:
    number = float(text)
    if repr(number) == text:
        return bool(np.isfinite(number))
    if not np.isfinite(number) or ("e" in text and "e" not in repr(number)):
        return False
    if text.lstrip("-").isdigit() and abs(number) > _EXACT:
        return False
    return decimal.Decimal(repr(number)) == decimal.Decimal(text)
