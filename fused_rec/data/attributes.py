"""Attributes as words: a description, made by one template, for users and items that come without one."""

import dataclasses
import datetime
import decimal
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from fused_rec.data.dataset import Dataset
from fused_rec.data.io.plain import is_single

_PLAIN = 1e-4, 1e16  # magnitudes written without an exponent


def describe(dataset: Dataset, names: Sequence[str]) -> Dataset:
    """The dataset with a `text` for each user and item that has none and knows one of these columns.

    The template is `Column name: value.` a column, in the order of `names`, with a space between:

        sector = "technology", risk_band = 3.0, listed = true   ->   Sector: technology. Risk band: 3. Listed: yes.

    Underscores in a column's name become spaces, its first letter a capital. Numbers take as few digits as tell them
    from others of their type, booleans are yes and no, dates are of ISO 8601, lists are joined by commas,
    and no full stop is doubled. What is null or blank is left out; a node with nothing else stays without words.
    Each name counts for both tables, where they have it. A column computed from held-out rows would give them away,
    and no audit can see it: name only what was known beforehand.

    Raises:
      ValueError: a name that is a column of neither table, that is no attribute, or whose type has no words.
    """
    if not names:
        return dataset
    for name in names:
        if name in ("text", "user_id", "item_id"):
            raise ValueError(f"text.attributes names {name!r}, which is no attribute; take it out")
        if name not in dataset.users.column_names and name not in dataset.items.column_names:
            raise ValueError(
                f"text.attributes names {name!r}; the users have {dataset.users.column_names} and the items "
                f"{dataset.items.column_names}"
            )
    tables = {what: _described(getattr(dataset, what), names) for what in ("users", "items")}
    return dataclasses.replace(dataset, **tables)


def _described(table: pa.Table, names: Sequence[str]) -> pa.Table:
    if not (here := [name for name in names if name in table.column_names]):
        return table
    cells = [_attribute_text(name, table.column(name)) for name in here]
    made = [" ".join(filter(None, row)) or None for row in zip(*cells, strict=True)]
    if "text" not in table.column_names:
        return table.append_column("text", pa.array(made, pa.string()))
    own = table.column("text").to_pylist()
    words = [text if text and text.strip() else other for text, other in zip(own, made, strict=True)]
    return table.set_column(table.column_names.index("text"), "text", pa.array(words, pa.string()))


def _attribute_text(name: str, values: pa.ChunkedArray) -> list[str]:
    """A sentence a row, empty where there is nothing to say."""
    kind = values.type.value_type if pa.types.is_dictionary(values.type) else values.type
    _check(name, kind)
    label = " ".join(name.replace("_", " ").split())
    label = label[:1].upper() + label[1:]
    if pa.types.is_timestamp(kind) and kind.unit == "ns":  # Python's datetimes have microseconds
        values = values.cast(pa.timestamp("us", kind.tz), safe=False)
    described = (_words(value, kind) for value in values.to_pylist())
    return [f"{label}: {words}{'' if words.endswith('.') else '.'}" if words else "" for words in described]


def _check(name: str, kind: pa.DataType) -> None:
    if pa.types.is_list(kind):
        return _check(name, kind.value_type)
    if not is_single(kind):
        raise ValueError(f"text.attributes names {name!r}, whose values ({kind}) have no words; take it out")


def _words(value: Any, kind: pa.DataType) -> str:
    if value is None:
        return ""
    if isinstance(value, list):
        return ", ".join(filter(None, (_words(part, kind.value_type) for part in value)))
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return _number(value, kind)
    if isinstance(value, decimal.Decimal):
        return f"{value.normalize():f}"
    if isinstance(value, datetime.date | datetime.time):  # datetimes among them
        return value.isoformat()
    return str(value).strip()


def _number(value: float, kind: pa.DataType) -> str:
    if not np.isfinite(value):
        return ""
    exact = np.dtype(kind.to_pandas_dtype()).type(value)  # of float32 too, 0.1 is told by one digit
    if not value or _PLAIN[0] <= abs(value) < _PLAIN[1]:
        return np.format_float_positional(exact + 0, trim="-")  # + 0: there is no -0 in words
    return np.format_float_scientific(exact, trim="-")
