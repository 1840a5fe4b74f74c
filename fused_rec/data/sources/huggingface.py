"""Reader of Hugging Face dataset folders of Parquet shards.

Two layouts are read:

- one folder per table, as `fused_rec.data.io.writers` writes: interactions/train-00000-of-00001.parquet,
  .../validation-..., .../test-..., and optionally items/, users/, ties/, reviews/train-00000-of-00001.parquet;
- interactions only, as `push_to_hub` writes: data/train-00000-of-00001.parquet, ...

Columns are those of `fused_rec.data.io.tables`. Where interactions are in several splits, these become their column
`split`, and an optional column `row` is their order before splitting. Reports count rows over all shards of a table,
train before validation before test, with the header as row 1.
"""

import re
from collections.abc import Collection
from pathlib import Path

import pyarrow as pa

from fused_rec.data.dataset import DataError, Dataset, Problem
from fused_rec.data.io.arrow import pc
from fused_rec.data.io.files import read_parquet
from fused_rec.data.io.folder import FORMATS
from fused_rec.data.io.shards import ROW, SPLITS, shard
from fused_rec.data.io.tables import COLUMNS, select
from fused_rec.data.io.validate import ReaderLog, Tables, assemble

_SHARD = re.compile(r"(?P<split>.+)-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})\.parquet")


def huggingface(path: Path, repair: bool, min_value: int | float | None = None) -> Dataset:
    """Reads and checks a Hugging Face dataset folder.

    Args:
      path: folder with a subfolder of Parquet shards per table.
      repair: as in `fused_rec.data.io.tables.read_tables`.
      min_value: minimum value of an interaction, None = all.

    Returns:
      The dataset.

    Raises:
      DataError: lists all faults, including missing shards and table files that would not be read.
    """
    problems: list[Problem] = []
    tables: dict[str, pa.Table] = {}
    files: dict[str, str] = {}
    notes: dict[str, int] = {}
    folders = {name: path / name for name in COLUMNS if (path / name).is_dir()}
    if "interactions" not in folders:
        folders["interactions"] = path / "data"
    for stray in sorted(file for file in path.rglob("*") if _is_stray(file, folders.values())):
        remedy = f"write it as Parquet into one of the folders {', '.join(COLUMNS)}, or take it out"
        problems.append(Problem(stray.relative_to(path).as_posix(), None, "would not be read", remedy))
    for name, folder in folders.items():
        files[name] = f"{folder.name}/*.parquet"
        try:
            tables[name] = select(_read(name, folder), name, files[name], notes, typed=True)
        except DataError as error:
            problems += error.problems
    if "interactions" not in tables:
        raise DataError(problems)
    log = ReaderLog(notes, problems, files)
    return assemble(path.name, Tables(**tables), repair=repair, min_value=min_value, log=log)


def _is_stray(file: Path, folders: Collection[Path]) -> bool:
    """Returns whether a file has a table format and would not be read; hidden files are caches and leftovers."""
    table = not FORMATS.isdisjoint(file.name.lower().split(".")[1:]) and not file.name.startswith(".")
    return table and file.is_file() and not (file.suffix == ".parquet" and file.parent in folders)


def _read(name: str, folder: Path) -> pa.Table:
    """Reads the shards of a table in the order of its rows."""
    shards = _shards(folder)
    allowed = SPLITS if name == "interactions" else {"train": "train"}
    if unknown := sorted(shards.keys() - allowed.keys()):
        remedy = f"{name} may have the splits {', '.join(allowed)}; rename it, or take it out"
        raise DataError([Problem(f"{folder.name}/{unknown[0]}-*.parquet", None, "is no split of this table", remedy)])
    read = {split: [_plain(file) for file in shards[split]] for split in allowed if split in shards}
    if len(read) > 1:
        read = {split: [_with_split(table, split, folder) for table in tables] for split, tables in read.items()}
    try:
        table = pa.concat_tables([table for tables in read.values() for table in tables], promote_options="default")
    except pa.ArrowException as error:
        fault = Problem(f"{folder.name}/*.parquet", None, f"shards differ: {error}", "give all the same columns")
        raise DataError([fault]) from error
    ordered = len(read) > 1 and folder.name == name and ROW in table.column_names
    if ordered and pa.types.is_integer(table[ROW].type) and not table[ROW].null_count:
        return table.take(pc.sort_indices(table, [(ROW, "ascending")])).drop_columns([ROW])
    return table


def _shards(folder: Path) -> dict[str, list[Path]]:
    """Finds the shards of each split, in order."""
    numbers: dict[tuple[str, int], list[int]] = {}
    for file in sorted(folder.glob("*.parquet")):
        if (match := _SHARD.fullmatch(file.name)) is None:
            fault = "is not named as a shard"
            raise DataError([Problem(f"{folder.name}/{file.name}", None, fault, f"name it {shard('train')}")])
        numbers.setdefault((match["split"], int(match["count"])), []).append(int(match["number"]))
    if not numbers:
        fault = f"no shards are in {folder}"
        raise DataError([Problem(f"{folder.name}/*.parquet", None, fault, f"add {folder.name}/{shard('train')}")])
    found: dict[str, list[Path]] = {}
    for (split, count), present in numbers.items():
        if present != list(range(count)) or split in found:
            fault = f"{len(present)} of {count} shards found, or shards of two versions"
            raise DataError([Problem(f"{folder.name}/{split}-*.parquet", None, fault, "download all of one version")])
        found[split] = [folder / f"{split}-{number:05d}-of-{count:05d}.parquet" for number in present]
    return found


def _plain(file: Path) -> pa.Table:
    """Reads a shard and checks that column names are unique."""
    table = read_parquet(file)
    names = table.column_names
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DataError([Problem(file.name, None, f"column {twice[0]} occurs twice", "keep one of them")])
    return table


def _with_split(table: pa.Table, split: str, folder: Path) -> pa.Table:
    """Adds the column `split`, or checks it where it exists."""
    if "split" not in table.column_names:
        return table.append_column("split", pa.array([SPLITS[split]] * len(table), pa.string()))
    if pa.types.is_string(table["split"].type):  # the checks refuse any other
        other = pc.sum(pc.fill_null(pc.not_equal(table["split"], SPLITS[split]), True)).as_py()
        if other:
            fault = f"{other:,} rows have another split than {SPLITS[split]}"
            remedy = "move them to the shards of their split, or drop the column"
            raise DataError([Problem(f"{folder.name}/{split}-*.parquet", None, fault, remedy)])
    return table
