"""Tables as they were at a time, and periods of time with equal numbers of interactions."""

import dataclasses

import numpy as np
import pyarrow as pa
from jaxtyping import Bool

from fused_rec.data.dataset import Dataset, column
from fused_rec.data.io.arrow import pc
from fused_rec.data.splits import without_time


def period_ends(dataset: Dataset, first: float, periods: int) -> list[int]:
    """Places the ends of periods so that each has about as many interactions as the others.

    Equal numbers of interactions, and not equal times, give each period an evaluation of the same precision.

    Args:
      dataset: the tables; each interaction has a timestamp.
      first: share of the interactions until the first end.
      periods: number of periods that follow it.

    Returns:
      Their `periods` + 1 ends in unix seconds, ascending; interactions at an end are before it.

    Raises:
      ValueError: an interaction has no timestamp, or a period would be empty.
    """
    _require_times(dataset, "interactions")
    times = np.sort(column(dataset.interactions, "timestamp").astype(np.int64))
    shares = first + (1 - first) * np.arange(periods + 1) / periods
    places = np.clip(np.round(shares * len(times)).astype(np.int64), 1, len(times)) - 1
    ends = times[places].tolist() if len(times) else []
    if len(set(ends)) <= periods:
        raise ValueError(
            f"{len(times):,} interactions at {len(np.unique(times)):,} times make no {periods} periods after a first "
            f"share of {first:g}, each with interactions; ask for fewer periods"
        )
    return ends


def until(dataset: Dataset, end: int) -> Dataset:
    """Returns the tables as they were at a time: without any row after it, and without users of later rows alone.

    Items, their texts and attributes have no time, and all stay.

    Args:
      dataset: the tables; each interaction, review and social edge has a timestamp.
      end: unix seconds; rows at this time stay.

    Returns:
      The tables, with new user indices.

    Raises:
      ValueError: a row has no timestamp.
    """
    tables = {}
    known = np.zeros(dataset.n_users, bool)
    for name in ("interactions", "reviews", "ties"):
        table = getattr(dataset, name)
        if table.num_rows:
            _require_times(dataset, name)
            table = table.filter(pc.less_equal(table["timestamp"], end))
        tables[name] = table
        for end_of in {"user", "source", "target"} & set(table.column_names):
            known[column(table, end_of)] = True
    users = dataset.users.filter(pa.array(known))
    return dataclasses.replace(
        dataset, users=users, **{name: _with_rows(table, known) for name, table in tables.items()}
    )


def _with_rows(table: pa.Table, known: Bool[np.ndarray, "U"]) -> pa.Table:
    """Replaces user indices by those among the users that are known."""
    rows = np.cumsum(known) - 1
    for place, name in enumerate(table.column_names):
        if name in ("user", "source", "target"):
            table = table.set_column(place, name, pa.array(rows[column(table, name)].astype(np.int32)))
    return table


def _require_times(dataset: Dataset, what: str) -> None:
    table = getattr(dataset, what)
    missing = table["timestamp"].null_count if "timestamp" in table.column_names else table.num_rows
    if missing:
        raise ValueError(
            f"{missing} of {table.num_rows} {what} have no timestamp, so that they belong to no period; give each a "
            f"time (0 = from the start): {without_time(dataset, what)}"
        )
