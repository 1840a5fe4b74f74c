"""Reader of RecBole atomic files."""

import re
from pathlib import Path

import numpy as np
import pyarrow as pa

from fused_rec.data.dataset import DataError, Dataset, Problem
from fused_rec.data.io.arrow import flags, join_texts, known, pc, replace
from fused_rec.data.io.files import only_file, read_delimited
from fused_rec.data.io.validate import ReaderLog, Tables, assemble


def recbole(path: Path, repair: bool, min_value: int | float | None = None) -> Dataset:
    """Reads RecBole atomic files: `*.inter` and optionally `*.item`, `*.user`, `*.net` (headers `name:type`).

    The text of a row is its token_seq column `text`, or else all its token_seq columns. The first of these with "title"
    or "name" in its name is the `name`; the others stay attributes, each as one string, like those of other types. In
    `*.inter`, the text is the review, `rating` the value, and `split` (as `fused_rec.data.io.writers` writes it) the
    predefined split; columns other than these, user_id, item_id and timestamp are noted and not read.

    Args:
      path: folder with the files.
      repair: as in `fused_rec.data.io.tables.read_tables`.
      min_value: minimum rating of an interaction, None = all.

    Returns:
      The dataset.

    Raises:
      DataError: lists all faults.
    """
    events, text_columns = _atomic(only_file(path, "*.inter"), ("user_id", "item_id"))
    read = ("user_id", "item_id", "rating", "timestamp", "text", "split")
    selected = [name for name in read if name in events.column_names]
    unread = [name for name in events.column_names if name not in (*selected, *text_columns, "name")]
    notes = {f"interactions: column {name!r} not read": 1 for name in unread}
    interactions = events.select(selected).rename_columns([{"rating": "value"}.get(name, name) for name in selected])
    tables = {"interactions": interactions}
    for table, ending, ids in (
        ("items", "item", ("item_id",)),
        ("users", "user", ("user_id",)),
        ("ties", "net", ("source_id", "target_id")),
    ):
        if any(path.glob(f"*.{ending}")):
            tables[table], _ = _atomic(only_file(path, f"*.{ending}"), ids)
    auto_repair = ("repeated interaction", "unknown id")
    log, tables = ReaderLog(notes), Tables(**tables)
    return assemble(path.name, tables, repair=repair, min_value=min_value, log=log, auto_repair=auto_repair)


def _atomic(file: Path, ids: tuple[str, ...]) -> tuple[pa.Table, list[str]]:
    """Reads a file with the types of its header; returns the table with `text`, and the columns joined in it."""
    rows = read_delimited(file)
    rows = pa.Table.from_arrays([known(column) for column in rows.columns], rows.column_names)
    types = {header.partition(":")[0]: header.partition(":")[2] for header in rows.column_names}
    if len(types) < len(rows.column_names):
        there = ", ".join(rows.column_names)
        raise DataError([Problem(file.name, None, f"a column is there twice (there: {there})", "keep one of them")])
    rows = rows.rename_columns(list(types))
    if missing := [name for name in ids if name not in types]:
        there = ", ".join(types)
        raise DataError([Problem(file.name, None, f"no column {name} (there: {there})", "add it") for name in missing])
    sequences = [name for name, kind in types.items() if kind == "token_seq"]
    texts = ["text"] if "text" in sequences else sequences
    titles = [name for name in sequences if "title" in name or "name" in name]
    clashing = ["text"] if texts and "text" in types and "text" not in texts else []
    clashing += ["name"] if titles and "name" in types and "name" != titles[0] else []
    if clashing:
        message = f"column {clashing[0]} is there, and {', '.join(titles[:1] or texts)} would be read as it"
        raise DataError([Problem(file.name, None, message, "give one of them another name")])
    for name, kind in types.items():
        try:
            if kind == "float" and name not in ("rating", "timestamp"):  # parsed by the checks
                _refuse_large(rows[name], f"{name}:{kind}", file)
                rows = replace(rows, name, rows[name].cast(pa.float64()))
            elif kind == "float_seq":
                _refuse_large(rows[name], f"{name}:{kind}", file)
                rows = replace(rows, name, pc.split_pattern(rows[name], " ").cast(pa.list_(pa.float64())))
        except pa.ArrowInvalid as error:
            fault = Problem(
                file.name, None, f"{name}:{kind} holds something else: {error}", "correct the value or the type"
            )
            raise DataError([fault]) from error
    if texts:
        text = join_texts(*(rows[name] for name in texts))
        title = rows[titles[0]] if titles else None
        rows = rows.drop_columns([*titles[:1], *(["text"] if "text" in texts else [])]).append_column("text", text)
        rows = rows if title is None else rows.append_column("name", title)
    return rows, texts


def _refuse_large(column: pa.ChunkedArray, name: str, file: Path) -> None:
    """Raises DataError for integers that a 64-bit float would round."""
    long = np.flatnonzero(flags(pc.match_substring_regex(column, r"(\A| )[+-]?[0-9]{16,}( |\z)")))
    for row in long.tolist():
        for word in column[row].as_py().split(" "):
            if re.fullmatch("[+-]?[0-9]{16,}", word) and int(float(word)) != int(word[:400]):
                message = f"{name} is {word[:60]}, which a 64-bit float would round"
                remedy = f"declare the column as {'token_seq' if name.endswith('_seq') else 'token'}"
                raise DataError([Problem(file.name, row + 2, message, remedy)])
