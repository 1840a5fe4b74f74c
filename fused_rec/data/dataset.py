"""The tables every later package works on: ids replaced by positions, nothing aggregated.

Words about a (user, item) pair and ties keep the pair and the time they come from, so that what a split
holds out can be taken away from them too (`fused_rec.data.splits.observe`) and the audit can prove it
(`fused_rec.data.leakage`).
"""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa


@dataclasses.dataclass(frozen=True, repr=False)
class Dataset:
    """What was read. U users and I items are addressed by their row in `users` and `items`.

    users: U rows; `user_id` string, unique; optional `text` string (null = none); other columns are attributes.
    items: I rows; `item_id` string, unique; optional `text` and `name`, likewise; other columns are attributes.
    interactions: one row a distinct pair; `user` int32, `item` int32; optional `timestamp` int64 (unix seconds,
      the first time the pair was seen), `value` float32, `part` string (a published split: train, valid or test).
    reviews: what a user wrote about an item (a review, a tag, a post), any number of rows a pair, and the pair
      need not be an interaction; `user` int32, `item` int32, `text` string; optional `timestamp` int64.
    ties: directed; `source` int32, `target` int32 (rows of `users`), `kind` string; optional `timestamp` int64;
      optional `item` int32: the tie was seen in an act of `source` on that item (a retweet of a post about it),
      so it tells of that interaction; null where it does not.
    repairs: faults that were mended, by description, with the count of rows.
    notes: what is worth knowing and no fault, by description, with its count: columns that are not read, customers
      without interactions, rows that a setting leaves out.

    `timestamp` and `value` may hold nulls.
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
    """The column as one NumPy array, NaN for null (which makes integers floats). Raises KeyError for an absent one."""
    return table.column(name).to_numpy()


def empty_reviews() -> pa.Table:
    """A `Dataset.reviews` table without rows."""
    return pa.table(
        {"user": pa.array([], pa.int32()), "item": pa.array([], pa.int32()), "text": pa.array([], pa.string())}
    )


def empty_ties() -> pa.Table:
    """A `Dataset.ties` table without rows."""
    return pa.table(
        {"source": pa.array([], pa.int32()), "target": pa.array([], pa.int32()), "kind": pa.array([], pa.string())}
    )


TABLES = ("users", "items", "interactions", "reviews", "ties")


def digest(dataset: Dataset) -> str:
    """SHA-256 of all tables in their order of rows, which numbers the users and items that a checkpoint speaks of.

    It depends on the values alone: what lies in memory where there is none (null) does not count.
    """
    return _sha256([getattr(dataset, name) for name in TABLES])


def contents(dataset: Dataset) -> dict[str, dict[str, Any]]:
    """Describes each table so that `changes` can say later what has changed: `rows`, and SHA-256 by `columns`."""
    found = {}
    for name in TABLES:
        table = getattr(dataset, name)
        columns = {column_name: _sha256([table.select([column_name])]) for column_name in table.column_names}
        found[name] = {"rows": table.num_rows, "columns": columns}
    return found


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Compares two `contents`, the first as JSON from a file that may be damaged.

    Returns:
      A phrase for each table that differs: rows before and after, else the columns; none where nothing is known.
    """
    found = []
    for name in TABLES:
        there, here = before.get(name), after.get(name)
        if not isinstance(there, Mapping) or here is None or there == here:
            continue
        old, new = there.get("columns"), here["columns"]
        if there.get("rows") != here["rows"]:
            found.append(f"{name} had {there.get('rows')} rows and has {here['rows']}")
            continue
        known = old if isinstance(old, Mapping) else {}
        other = [column_name for column_name in new if known.get(column_name, "") not in ("", new[column_name])]
        parts = [
            ("other values", other),
            ("new", [column_name for column_name in new if column_name not in known]),
            ("gone", [column_name for column_name in known if column_name not in new]),
        ]
        told = "; ".join(f"{what}: {printable(', '.join(names))}" for what, names in parts if names)
        found.append(f"{name} has its {here['rows']} rows with changed columns ({told or 'in another order'})")
    return found


def _sha256(tables: Sequence[pa.Table]) -> str:
    sha = hashlib.sha256()
    for table in tables:
        sha.update(str(table.schema.remove_metadata()).encode())
        for batch in table.combine_chunks().to_batches(max_chunksize=65_536):
            columns = [_without_remains(column) for column in batch.columns]
            sha.update(pa.record_batch(columns, schema=batch.schema).serialize())
    return sha.hexdigest()


def _without_remains(column: pa.Array) -> pa.Array:
    if not column.null_count or pa.types.is_null(column.type):
        return column
    return column.take(pa.array(np.arange(len(column)), mask=np.asarray(column.is_null())))


def printable(text: str) -> str:
    """The text with everything that moves a cursor, hides or cannot be encoded spelt out as in Python source."""
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)


@dataclasses.dataclass(frozen=True)
class Problem:
    """One thing wrong with the input.

    row: 1-based line of the file (header = 1), None where it concerns the file. count: the faults it stands for; of a
    line that states a total, those that have no line of their own. mendable: a repair would mend it.
    """

    file: str
    row: int | None
    message: str
    remedy: str
    count: int = 1
    mendable: bool = False

    def __str__(self) -> str:
        where = self.file if self.row is None else f"{self.file}, row {self.row}"
        return printable(f"{where}: {self.message}. {self.remedy}.")  # names of files and columns are anybody's


class DataError(ValueError):
    """Input that must not be used; carries every problem found, and prints them as one report."""

    def __init__(self, problems: list[Problem]):
        self.problems = tuple(problems)
        total = sum(problem.count for problem in problems)
        mended = sum(problem.count for problem in problems if problem.mendable)
        head = f"{total:,} fault{'s' * (total != 1)} in the input"
        if mended:
            head += f", {mended:,} of which a repair would mend (--config.data.repair=True; in Python repair=True)"
        super().__init__("\n".join([f"{head}:", *(f"  {problem}" for problem in problems)]))
