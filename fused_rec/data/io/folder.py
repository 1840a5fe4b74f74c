"""Classification of the files of a data folder: tables, unreadable files that look like tables, and others.

A name is divided at its first dot into stem and ending; case is ignored. Each entry is one of:

  a table       its stem is the name of a table and its ending one of READ; or a folder with such a name or the bare
                name, whose files are the parts of one table
  a fault       any other entry that is named after a table (`items`, `item.json`, `items_2024.txt`) or has the ending
                of a table format anywhere in its name (`prices.csv`, `holdings.xlsx`)
  not a table   everything else: documents and pictures (`items.md`), other folders, and temporary files of editors and
                systems (names that begin with `.`, `~$` or `#` or end with `~`)

So no file that may be a table is skipped silently.
"""

import contextlib
import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from fused_rec.data.dataset import DataError, Problem

PARQUET = (".parquet", ".pq")
TEXT = (".csv", ".tsv", ".txt", ".csv.gz", ".tsv.gz", ".txt.gz")
READ = (*TEXT, *PARQUET)
# Endings of table formats. .txt, .json and archives may contain anything, so they count by their stem.
FORMATS = {
    *("csv", "tsv", "psv", "tab", "parquet", "pq", "feather", "arrow", "ipc", "orc", "avro", "jsonl", "ndjson"),
    *("xls", "xlsx", "xlsm", "xlsb", "ods", "numbers", "dta", "sav", "sas7bdat"),
}
DOCUMENTS = {
    *(
        "md",
        "rst",
        "pdf",
        "html",
        "htm",
        "tex",
        "doc",
        "docx",
        "odt",
        "ppt",
        "pptx",
        "png",
        "jpg",
        "jpeg",
        "gif",
        "svg",
    ),
    *("py", "ipynb", "r", "sh", "sql", "log", "yaml", "yml", "toml", "ini", "cfg"),
}
# Folders of Parquet files, some of which may no longer belong to the table.
LAKES = {"_delta_log": "Delta Lake", ".hoodie": "Hudi", "metadata": "Iceberg"}
NO_VALUE = "__HIVE_DEFAULT_PARTITION__"
_SHARD = re.compile(r"[^.]+-[0-9]{5}-of-[0-9]{5}\.parquet")
_EXPORT = "export it as CSV or Parquet"


@dataclasses.dataclass(frozen=True)
class Part:
    """File of a table.

    Attributes:
      file: its path.
      values: values of the columns that its folders name (`sector=oil`); null is None.
    """

    file: Path
    values: Mapping[str, str | None] = dataclasses.field(default_factory=dict)


def find_tables(folder: Path, names: Sequence[str]) -> tuple[dict[str, Path], list[Problem]]:
    """Finds the file or folder of each table.

    Args:
      folder: the data folder.
      names: names of the tables.

    Returns:
      The path of each table that exists, and the faults of other entries.
    """
    found: dict[str, list[Path]] = {name: [] for name in names}
    problems: list[Problem] = []
    for entry in sorted(folder.iterdir()) if folder.is_dir() else []:
        stem, ending = _taken_apart(entry)
        if _is_left_over(entry.name):
            continue
        if stem in found and (ending in READ or not ending and entry.is_dir()):
            if _is_special(entry):
                problems.append(Problem(entry.name, None, "is no file", "put a file in its place"))
            elif ending or not _is_album(entry):
                found[stem].append(entry)
        elif _looks_like_table(entry, names):
            problems.append(_unread(entry, names))
    for entries in found.values():
        if len(entries) > 1:
            shown = " and ".join(entry.name for entry in entries)
            both = "both " if len(entries) == 2 else ""
            problems.append(Problem(_taken_apart(entries[0])[0], None, f"{both}{shown} are there", "keep one of them"))
    return {name: entries[0] for name, entries in found.items() if len(entries) == 1}, problems


def list_parts(table: Path) -> list[Part]:
    """Lists the parts of a folder that is one table, in the order of their numbers.

    As in Spark and Hive, names that begin with `_` or `.` are no parts, and a folder `column=value` gives a column.

    Args:
      table: the folder.

    Returns:
      The parts.

    Raises:
      DataError: an entry is not a part, or the folder has none; lists all faults.
    """
    problems: list[Problem] = []
    parts = list(_parts(table, table, {}, problems))
    if problems:
        raise DataError(problems)
    if not parts:
        remedy = f"put its parts into it ({', '.join(READ)}), or take the folder out"
        raise DataError([Problem(table.name, None, "is a folder without parts", remedy)])
    endings = {"Parquet" if _ending(part.file) in PARQUET else "CSV": part for part in parts}
    if len(endings) > 1:
        shown = " and ".join(name_in(table, part.file) for part in endings.values())
        raise DataError([Problem(table.name, None, f"parts of two formats: {shown}", "keep those of one format")])
    columns = {tuple(part.values): part for part in parts}
    if len(columns) > 1:
        one, other, *_ = columns.values()
        message = f"{name_in(table, one.file)} and {name_in(table, other.file)} lie in folders of different columns"
        raise DataError([Problem(table.name, None, message, "divide the table by the same columns everywhere")])
    return parts


def is_parquet(file: Path) -> bool:
    """Returns whether the name is that of a Parquet file."""
    return _ending(file) in PARQUET


def name_in(table: Path, file: Path) -> str:
    """Returns the name of a part for reports, with the folders from the table on."""
    return file.relative_to(table.parent).as_posix()


def _parts(table: Path, folder: Path, values: Mapping[str, str | None], problems: list[Problem]) -> Iterator[Part]:
    try:
        entries = sorted(folder.iterdir(), key=lambda entry: _numbered(entry.name))
    except OSError as error:
        problems.append(Problem(name_in(table, folder), None, f"cannot be read: {error}", "make it readable"))
        return
    for entry in entries:
        name = name_in(table, entry)
        if kind := LAKES.get(entry.name) if entry.is_dir() else None:
            message = f"this is a table of {kind}, and some of its files may hold rows that are deleted"
            problems.append(Problem(name, None, message, f"{_EXPORT} by a program that reads {kind}"))
        elif entry.name == "_temporary":
            problems.append(Problem(name, None, "the job that wrote the table has not ended", "write the table again"))
        elif entry.name.startswith("_") or _is_left_over(entry.name):
            continue
        elif entry.is_dir():
            column, equals, value = entry.name.partition("=")
            if not equals or not column or column in values:
                message = "is a folder among the parts, and would not be read"
                problems.append(Problem(name, None, message, "move its parts up, or take it out"))
            else:
                try:
                    given = {_unescaped(column): None if value == NO_VALUE else _unescaped(value)}
                except UnicodeError as error:
                    problems.append(Problem(name, None, f"its name is not UTF-8: {error}", "name it in UTF-8"))
                else:
                    yield from _parts(table, entry, {**values, **given}, problems)
        elif _SHARD.fullmatch(entry.name) and not _taken_apart(table)[1]:
            message = "is a shard as Hugging Face lays them out"
            problems.append(Problem(name, None, message, "read the folder with data.name=huggingface"))
        elif _is_special(entry):
            problems.append(Problem(name, None, "is no file", "put a file in its place"))
        elif _ending(entry) in READ:
            yield Part(entry, values)
        elif _last(entry) not in DOCUMENTS:
            message = f"is no part that can be read ({', '.join(READ)})"
            problems.append(Problem(name, None, message, f"{_EXPORT}, or take it out"))


def _taken_apart(entry: Path) -> tuple[str, str]:
    stem, dot, ending = entry.name.lower().partition(".")
    return stem, dot + ending


def _ending(file: Path) -> str:
    """Returns the last ending, or the last two for .gz: parts have names like `part-00000-a.c000.snappy.parquet`."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    return "".join(suffixes[-2:] if suffixes[-1:] == [".gz"] else suffixes[-1:])


def _last(entry: Path) -> str:
    return entry.suffix.lower().removeprefix(".")


def _is_left_over(name: str) -> bool:
    return name.startswith((".", "~$", "#")) or name.endswith("~")


def _is_special(entry: Path) -> bool:
    """Returns whether an entry is a pipe or device, which can block a reader forever."""
    return entry.exists() and not entry.is_file() and not entry.is_dir()


def _is_album(folder: Path) -> bool:
    """Returns whether a folder holds only documents or pictures, such as `items/1.png`."""
    files = [entry for entry in _entries(folder) if not _is_left_over(entry.name)]
    return bool(files) and all(entry.is_file() and _last(entry) in DOCUMENTS for entry in files)


def _looks_like_table(entry: Path, names: Sequence[str]) -> bool:
    stem, ending = _taken_apart(entry)
    named = stem in {name.removesuffix("s") for name in names} or any(
        re.match(rf"{name}([^a-z]|$)", stem) for name in names
    )
    known = not FORMATS.isdisjoint(ending.split("."))
    if entry.is_dir():  # which may be a run's, a copy of all tables, or anything else
        return known or named and any(_last(file) in FORMATS for file in _entries(entry))
    return known or named and _last(entry) not in DOCUMENTS


def _entries(folder: Path) -> list[Path]:
    with contextlib.suppress(PermissionError):  # an unreadable folder is no table
        return sorted(folder.iterdir())
    return []


def _unread(entry: Path, names: Sequence[str]) -> Problem:
    stem, ending = _taken_apart(entry)
    if stem in names:
        readable = f"is {'a folder' if entry.is_dir() else 'no file'} of a form that is read ({', '.join(READ)})"
        return Problem(entry.name, None, readable, f"{_EXPORT} ({stem}.csv, {stem}.parquet), or take it out")
    remedy = f"name it {' or '.join(f'{name}.csv' for name in names)} (or .parquet), or take it out"
    return Problem(entry.name, None, "is no table of the format and would not be read", remedy)


def _numbered(name: str) -> list[tuple[int, str]]:
    """Returns a sort key that orders `part.2` before `part.10`."""
    return [(int(word), "") if word.isdecimal() else (-1, word) for word in re.split(r"([0-9]+)", name)]


def _unescaped(word: str) -> str:
    """Decodes %XX, as which Hive writes characters that a path cannot hold."""
    return re.sub("(?:%[0-9A-Fa-f]{2})+", lambda codes: bytes.fromhex(codes[0].replace("%", "")).decode(), word)
