"""The in-memory data model: five Arrow tables with ids replaced by row indices, nothing aggregated.

Users are a bank's customers, items its products. Reviews and social edges (`ties`) keep their pair and timestamp, so
that `fused_rec.data.splits.observe` can remove those that leak held-out interactions and `fused_rec.data.leakage` can
check the removal.
"""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa


@dataclasses.dataclass(frozen=True, repr=False)
class Dataset:
    """Tables of one data set; U users and I items are indexed by their row in `users` and `items`.

    `timestamp` (unix seconds) and `value` may contain nulls.

    Attributes:
      name: printable name of the data set.
      users: U rows; `user_id` string, unique; optional `text` string (null = none); other columns are attributes.
      items: I rows; `item_id` string, unique; optional `text` and `name` string; other columns are attributes.
      interactions: one row per distinct pair; `user` int32, `item` int32; optional `timestamp` int64 (first time of
        the pair), `value` float32, `split` string (predefined split: train, valid or test).
      reviews: texts by a user about an item (review, tag, post), any number per pair, also for pairs that are no
        interaction; `user` int32, `item` int32, `text` string; optional `timestamp` int64.
      ties: directed social edges; `source` int32, `target` int32 (rows of `users`), `kind` string; optional
        `timestamp` int64; optional `item` int32 (null = none): the item of the act in which the edge was observed (a
        retweet of a post about it), so that the edge leaks this interaction.
      repairs: number of repaired rows by description of the fault.
      notes: counts by description of what is no fault: columns not read, users without interactions, rows excluded by
        a setting.

    Example:
      dataset = fr.load_dataset("synthetic")
      dataset.n_users, dataset.items.column_names
    """

    name: str
    users: pa.Table
    items: pa.Table
    interactions: pa.Table
    reviews: pa.Table
    ties: pa.Table
    repairs: Mapping[str, int] = dataclasses.field(default_factory=dict)
    notes: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def __repr__(self) -> str:
        names = ("users", "items", "interactions", "reviews", "ties")
        amounts = ", ".join(f"{getattr(self, name).num_rows:,} {name}" for name in names)
        repairs = f", {sum(self.repairs.values()):,} repairs" if self.repairs else ""
        notes = f", {len(self.notes):,} notes" if self.notes else ""
        return f"Dataset({self.name!r}: {amounts}{repairs}{notes})"

    @property
    def n_users(self) -> int:
        return self.users.num_rows

    @property
    def n_items(self) -> int:
        return self.items.num_rows


def column(table: pa.Table, name: str) -> np.ndarray:
    """Converts a column to one NumPy array.

    Args:
      table: any table.
      name: name of the column.

    Returns:
      Array of the column's dtype; with nulls, integers become floats and null becomes NaN.

    Raises:
      KeyError: the table has no such column.
    """
    return table.column(name).to_numpy()


def empty_reviews() -> pa.Table:
    """Returns a `Dataset.reviews` table without rows."""
    return pa.table(
        {"user": pa.array([], pa.int32()), "item": pa.array([], pa.int32()), "text": pa.array([], pa.string())}
    )


def empty_ties() -> pa.Table:
    """Returns a `Dataset.ties` table without rows."""
    return pa.table(
        {"source": pa.array([], pa.int32()), "target": pa.array([], pa.int32()), "kind": pa.array([], pa.string())}
    )


def period(table: pa.Table) -> list[str] | None:
    """Finds the first and the last date of a table.

    Args:
      table: with or without a column `timestamp`, unix seconds.

    Returns:
      Both dates, UTC, in ISO 8601; None without any timestamp.
    """
    times = table.column("timestamp").drop_null() if "timestamp" in table.column_names else ()
    if not len(times):
        return None
    seconds = np.asarray(times, np.int64)
    return [str(np.datetime64(int(end), "s").astype("datetime64[D]")) for end in (seconds.min(), seconds.max())]


TABLES = ("users", "items", "interactions", "reviews", "ties")


def digest(dataset: Dataset) -> str:
    """Computes a digest of all tables, which identifies the user and item indices of a checkpoint.

    It depends on values and row order only, not on the memory behind nulls.

    Returns:
      SHA-256 as 64 hex digits.
    """
    return _sha256([getattr(dataset, name) for name in TABLES])


def contents(dataset: Dataset) -> dict[str, dict[str, Any]]:
    """Summarizes each table, for `changes` to compare later.

    Returns:
      By table: `rows`, its number of rows, and `columns`, the SHA-256 of each column by name.
    """
    found = {}
    for name in TABLES:
        table = getattr(dataset, name)
        columns = {column_name: _sha256([table.select([column_name])]) for column_name in table.column_names}
        found[name] = {"rows": table.num_rows, "columns": columns}
    return found


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Compares two results of `contents`.

    Args:
      before: the earlier one, read from a JSON file that may be damaged; malformed entries are skipped.
      after: the current one.

    Returns:
      One phrase per table that differs: rows before and after, else the changed columns.
    """
    found = []
    for name in TABLES:
        old, new = before.get(name), after.get(name)
        if not isinstance(old, Mapping) or new is None or old == new:
            continue
        if old.get("rows") != new["rows"]:
            found.append(f"{name} had {old.get('rows')} rows and has {new['rows']}")
            continue
        old_columns, new_columns = old.get("columns"), new["columns"]
        old_columns = old_columns if isinstance(old_columns, Mapping) else {}
        changed = [column for column in new_columns if old_columns.get(column, "") not in ("", new_columns[column])]
        differences = [
            ("other values", changed),
            ("new", [column for column in new_columns if column not in old_columns]),
            ("gone", [column for column in old_columns if column not in new_columns]),
        ]
        details = "; ".join(f"{what}: {printable(', '.join(names))}" for what, names in differences if names)
        found.append(f"{name} has its {new['rows']} rows with changed columns ({details or 'in another order'})")
    return found


def _sha256(tables: Sequence[pa.Table]) -> str:
    """Hashes schemas and values of tables, batch by batch."""
    sha = hashlib.sha256()
    for table in tables:
        sha.update(str(table.schema.remove_metadata()).encode())
        for batch in table.combine_chunks().to_batches(max_chunksize=65_536):
            columns = [_with_cleared_nulls(column) for column in batch.columns]
            sha.update(pa.record_batch(columns, schema=batch.schema).serialize())
    return sha.hexdigest()


def _with_cleared_nulls(column: pa.Array) -> pa.Array:
    """Rebuilds a column so that the memory behind its nulls is the same for equal columns."""
    if not column.null_count or pa.types.is_null(column.type):
        return column
    return column.take(pa.array(np.arange(len(column)), mask=np.asarray(column.is_null())))


def printable(text: str) -> str:
    """Escapes control characters, invisible characters and lone surrogates of a text as in Python source."""
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)


@dataclasses.dataclass(frozen=True)
class Problem:
    """Fault of the input, as one line of a report.

    Attributes:
      file: name of the file or table.
      row: 1-based row of the file (header = 1), None for a fault of the whole file.
      message: what is wrong, with the value.
      remedy: what to do about it.
      count: number of faults this line counts for; on a line with a total, the faults not listed one by one.
      repairable: whether `repair` fixes it.
    """

    file: str
    row: int | None
    message: str
    remedy: str
    count: int = 1
    repairable: bool = False

    def __str__(self) -> str:
        where = self.file if self.row is None else f"{self.file}, row {self.row}"
        return printable(f"{where}: {self.message}. {self.remedy}.")  # file and column names are user input


class DataError(ValueError):
    """Error for input that cannot be used; `problems` has every fault found, the message lists them all.

    Example:
      try:
          fr.dataset_from_tables({"user_id": [None], "item_id": ["fund"]})
      except fr.DataError as error:
          [problem.remedy for problem in error.problems]
    """

    def __init__(self, problems: list[Problem]):
        self.problems = tuple(problems)
        total = sum(problem.count for problem in problems)
        repairable = sum(problem.count for problem in problems if problem.repairable)
        head = f"{total:,} fault{'s' * (total != 1)} in the input"
        if repairable:
            head += f", {repairable:,} of which can be repaired (--config.data.repair=True; in Python repair=True)"
        super().__init__("\n".join([f"{head}:", *(f"  {problem}" for problem in problems)]))

    def __reduce__(self) -> tuple[type["DataError"], tuple[list[Problem]]]:
        return type(self), (list(self.problems),)  # else a pool of processes hangs on an error that it cannot unpickle
