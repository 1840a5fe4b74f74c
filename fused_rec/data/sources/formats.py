"""Readers of public formats: Amazon reviews, LightGCN's text files, integer edge tables, RecBole's atomic files.

Each takes (folder, repair), reads its files into `Tables` and passes them to `validate.assemble`. The known faults of a
format (repeated pairs, users with social edges only) are always repaired and counted.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from fused_rec.data.dataset import DataError, Dataset, Problem
from fused_rec.data.io.arrow import flags, join_texts, known, pc, replace
from fused_rec.data.io.checks import EXAMPLES
from fused_rec.data.io.files import integers, read_delimited, read_json_lines, read_lines
from fused_rec.data.io.validate import Tables, assemble

SPLIT_NAMES = ("train", "test")  # of the predefined splits read here
_INTEGER = re.compile("[+-]?[0-9]{1,18}")  # int() also takes 1_0, and digits of other scripts; 18 fit into 64 bits


def amazon(path: Path, repair: bool, min_value: int | float | None = None) -> Dataset:
    """Reads the `*.json.gz` of an Amazon review data set of 2014.

    Args:
      path: folder with this one file.
      repair: as in `fused_rec.data.io.tables.read_tables`.
      min_value: minimum rating of an interaction, None = all.

    Returns:
      The dataset; the text of a review is "summary. reviewText", its `value` the stars.

    Raises:
      DataError: lists all faults.
    """
    schema = dict.fromkeys(("reviewerID", "asin", "reviewText", "summary"), pa.string())
    rows = read_json_lines(_only(path, "*.json.gz"), {**schema, "overall": pa.float64(), "unixReviewTime": pa.int64()})
    text_columns = {name: pc.utf8_trim_whitespace(pc.fill_null(rows[name], "")) for name in ("summary", "reviewText")}
    empty = {name: pc.equal(text, "") for name, text in text_columns.items()}
    text = join_texts(
        *(pc.if_else(empty[name], pa.scalar(None, pa.string()), text_columns[name]) for name in text_columns)
    )
    events = pa.table(
        {
            "user_id": rows["reviewerID"],
            "item_id": rows["asin"],
            "timestamp": rows["unixReviewTime"],
            "value": rows["overall"],
            "text": text,
        }
    )
    bare = pc.sum(empty["reviewText"]).as_py()
    notes = {"interactions: reviews without a body, for which the summary stands": bare} if bare else {}
    auto_repair = ("repeated interaction",)
    return assemble(path.name, Tables(events), repair=repair, min_value=min_value, notes=notes, auto_repair=auto_repair)


def lightgcn_text(path: Path, repair: bool) -> Dataset:
    """Reads `train.txt` and `test.txt` with one line per user (`user item item ...`), the format of NGCF and LightGCN.

    Args:
      path: folder with both files.
      repair: as in `fused_rec.data.io.tables.read_tables`.

    Returns:
      The dataset with a predefined split.

    Raises:
      DataError: lists all faults.
    """
    problems: list[Problem] = []
    rows = [(split, ids) for split in SPLIT_NAMES for ids in _id_lines(path / f"{split}.txt", problems)]
    if problems:
        raise DataError(problems)
    first = np.array([ids[0] for _, ids in rows], np.int64)
    lengths = [len(ids) - 1 for _, ids in rows]
    events = pa.table(
        {
            "user_id": np.repeat(first, lengths),
            "item_id": np.concatenate([np.zeros(0, np.int64), *(ids[1:] for _, ids in rows)]),
            "split": np.repeat(np.array([split for split, _ in rows], np.str_), lengths),
        }
    )
    return _numbered(path.name, events, first, None, repair)


def _id_lines(file: Path, problems: list[Problem]) -> Iterator[np.ndarray]:
    """Yields the integers of each non-empty line as int64, and reports lines with anything else."""
    bad = 0
    for row, line in enumerate(read_lines(file), start=1):
        words = line.split()
        if all(map(_INTEGER.fullmatch, words)):
            if words:
                yield np.array(words, np.int64)
            continue
        bad += 1
        if bad <= EXAMPLES:
            word = next(word for word in words if not _INTEGER.fullmatch(word))
            message = f"{word[:60]!r} is no integer of up to 18 digits"
            problems.append(Problem(file.name, row, message, "give a line a user, `user item item ...`, all integers"))
    if bad > EXAMPLES:
        message = f"{bad:,} lines hold other than integers, the first {EXAMPLES} listed"
        problems.append(Problem(file.name, None, message, "download it again", bad - EXAMPLES))


def edges(path: Path, repair: bool) -> Dataset:
    """Reads `train.tsv`, `test.tsv` and optionally `social.tsv` (each may be .gz) with two integers per row.

    Args:
      path: folder with the files.
      repair: as in `fused_rec.data.io.tables.read_tables`.

    Returns:
      The dataset with a predefined split; users with social edges only are kept as new users, and noted.

    Raises:
      DataError: lists all faults.
    """
    pairs = {split: _integer_pairs(_only(path, f"{split}.tsv*"), "user_id", "item_id") for split in SPLIT_NAMES}
    events = [rows.append_column("split", pa.array([name] * len(rows), pa.string())) for name, rows in pairs.items()]
    ties = _integer_pairs(_only(path, "social.tsv*"), "source_id", "target_id") if _has(path, "social.tsv*") else None
    ends = [] if ties is None else [np.asarray(end) for end in ties.columns]
    return _numbered(path.name, pa.concat_tables(events), np.concatenate([[], *ends]).astype(np.int64), ties, repair)


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
    events, text_columns = _atomic(_only(path, "*.inter"), ("user_id", "item_id"))
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
        if _has(path, f"*.{ending}"):
            tables[table], _ = _atomic(_only(path, f"*.{ending}"), ids)
    auto_repair = ("repeated interaction", "unknown id")
    tables = Tables(**tables)
    return assemble(path.name, tables, repair=repair, min_value=min_value, notes=notes, auto_repair=auto_repair)


def _numbered(name: str, events: pa.Table, more_users: np.ndarray, ties: pa.Table | None, repair: bool) -> Dataset:
    """Builds a dataset with integer ids in numeric order; `more_users` need not have interactions."""
    users = np.unique(np.concatenate([np.asarray(events["user_id"]), more_users]))
    items = np.unique(np.asarray(events["item_id"]))
    if ties is not None:
        ties = ties.append_column("kind", pa.array(["trust"] * len(ties), pa.string()))
    tables = Tables(events, users=pa.table({"user_id": users}), items=pa.table({"item_id": items}), ties=ties)
    return assemble(name, tables, repair=repair, auto_repair=("repeated interaction", "tie to oneself"))


def _integer_pairs(file: Path, *names: str) -> pa.Table:
    """Reads a file without header as integer columns."""
    rows = read_delimited(file, names=names)
    return pa.table({name: integers(rows, name, file, header=False) for name in names})


def _atomic(file: Path, ids: tuple[str, ...]) -> tuple[pa.Table, list[str]]:
    """The table with the types its header names, its texts joined as `text`, and the columns that went into it."""
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
            if kind == "float" and name not in ("rating", "timestamp"):  # the checks read these two themselves
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


def _has(path: Path, pattern: str) -> bool:
    """Returns whether a file matches."""
    return any(path.glob(pattern))


def _only(path: Path, pattern: str) -> Path:
    """Finds the one file that matches; raises DataError for none or several."""
    found = sorted(file for file in path.glob(pattern) if file.is_file())
    if len(found) != 1:
        names = sorted(file.name for file in (found or path.iterdir()))
        message = f"{len(found)} files match {pattern} in {path}, which must be one (there: {names})"
        raise DataError([Problem(pattern, None, message, "name a folder that holds one dataset")])
    return found[0]
