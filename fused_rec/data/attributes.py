"""Attributes as text: a template description for users and items without a text of their own."""

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
    """Fills missing `text` of users and items from attribute columns.

    The template is `Column name: value.` per column, in the order of `names`, joined by a space:

        sector = "technology", risk_band = 3.0, listed = true   ->   Sector: technology. Risk band: 3. Listed: yes.

    In column names, underscores become spaces and the first letter a capital. Numbers have the fewest digits that
    identify them within their type, booleans are yes and no, dates are ISO 8601, lists are joined by commas, and no
    full stop is doubled. Null and blank values are skipped; a node with no other value stays without text.

    A column computed from held-out rows would leak them, and the audit cannot detect it: use only attributes known
    before the cut.

    Args:
      dataset: users and items with attribute columns.
      names: attribute columns, each looked up in both tables.

    Returns:
      The dataset with `text` filled in where it was missing; existing texts are kept.

    Raises:
      ValueError: a name is a column of neither table, is no attribute, or has a type without a text form.
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
    """Fills missing `text` of one table."""
    if not (present := [name for name in names if name in table.column_names]):
        return table
    cells = [_attribute_text(name, table.column(name)) for name in present]
    made = [" ".join(filter(None, row)) or None for row in zip(*cells, strict=True)]
    if "text" not in table.column_names:
        return table.append_column("text", pa.array(made, pa.string()))
    own = table.column("text").to_pylist()
    texts = [text if text and text.strip() else other for text, other in zip(own, made, strict=True)]
    return table.set_column(table.column_names.index("text"), "text", pa.array(texts, pa.string()))


def _attribute_text(name: str, values: pa.ChunkedArray) -> list[str]:
    """Formats one sentence per row, empty where the value is missing."""
    kind = values.type.value_type if pa.types.is_dictionary(values.type) else values.type
    _check(name, kind)
    label = " ".join(name.replace("_", " ").split())
    label = label[:1].upper() + label[1:]
    if pa.types.is_timestamp(kind) and kind.unit == "ns":  # Python's datetimes have microseconds
        values = values.cast(pa.timestamp("us", kind.tz), safe=False)
    formatted = (_format(value, kind) for value in values.to_pylist())
    return [f"{label}: {text}{'' if text.endswith('.') else '.'}" if text else "" for text in formatted]


def _check(name: str, kind: pa.DataType) -> None:
    """Raises ValueError for a type without a text form."""
    if pa.types.is_list(kind):
        return _check(name, kind.value_type)
    if not is_single(kind):
        raise ValueError(f"text.attributes names {name!r}, whose values ({kind}) have no text form; take it out")


def _format(value: Any, kind: pa.DataType) -> str:
    """Formats one value, empty for a missing one."""
    if value is None:
        return ""
    if isinstance(value, list):
        return ", ".join(filter(None, (_format(element, kind.value_type) for element in value)))
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
    """Formats a float with the fewest digits that identify it within its type."""
    if not np.isfinite(value):
        return ""
    exact = np.dtype(kind.to_pandas_dtype()).type(value)  # 0.1 of float32 then has one digit
    if not value or _PLAIN[0] <= abs(value) < _PLAIN[1]:
        return np.format_float_positional(exact + 0, trim="-")  # + 0 turns -0 into 0
    return np.format_float_scientific(exact, trim="-")
