"""Writers of datasets: own tables as Parquet, RecBole's atomic files, a Hugging Face dataset folder.

Parquet tables and the Hugging Face folder read back as the same dataset.
"""

import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from fused_rec.data.dataset import Dataset, column, printable
from fused_rec.data.io.arrow import pc, replace
from fused_rec.data.io.shards import ROW, SPLITS, shard
from fused_rec.storage import fill_folder

EXACT = 2**53  # integers up to here are exact as 64-bit floats
# Characters that end a cell or a line for some reader, and a leading quote, which opens a quoted cell.
_BREAKS = r'^"|[\t\n\v\f\r\x{1c}-\x{1e}\x{85}\x{2028}\x{2029}]+'


def save_dataset(dataset: Dataset, folder: str | os.PathLike[str], layout: str = "tables") -> dict[str, int]:
    """Writes the dataset atomically into a new or empty folder.

    Layouts:

    - "tables": Parquet files, which `fused_rec.data.io.tables.read_tables` reads as the same dataset (with `repair` if
      users have no interactions);
    - "recbole": atomic files named after the folder, with types in their headers;
    - "huggingface": a folder of Parquet shards per table and a dataset card, which
      `datasets.load_dataset(folder, "interactions")` and `fused_rec.data.sources.huggingface` read. Interactions with a
      column `split` are divided by it.

    Args:
      dataset: the data.
      folder: a new or empty folder.
      layout: name of the layout.

    Returns:
      Description and number of what the layout cannot hold.

    Raises:
      ValueError: the layout is unknown, or cannot hold an id.
      FileExistsError: the folder is not empty.
      SaveError: the folder cannot be written.

    Example:
      fr.save_dataset(fr.load_dataset("synthetic"), "saved")
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout is {layout!r}; it must be one of {', '.join(LAYOUTS)}")
    name = Path(folder).resolve().name
    return fill_folder(Path(folder), lambda partial: LAYOUTS[layout](dataset, partial, name))


def named(dataset: Dataset) -> dict[str, pa.Table]:
    """Replaces row indices by ids, as `fused_rec.data.io.tables` reads them.

    Args:
      dataset: the data.

    Returns:
      The tables by name, without empty ones.
    """
    users, items = (
        table.column(name).combine_chunks() for table, name in ((dataset.users, "user_id"), (dataset.items, "item_id"))
    )
    ends = {"user": users, "item": items, "source": users, "target": users}
    tables = {"users": dataset.users, "items": dataset.items}
    for name in ("interactions", "reviews", "ties"):
        table = getattr(dataset, name)
        for end in [end for end in ends if end in table.column_names]:
            table = replace(table, end, ends[end].take(table[end].combine_chunks()))
        tables[name] = table.rename_columns([f"{n}_id" if n in ends else n for n in table.column_names])
    return {name: table for name, table in tables.items() if len(table)}


def _write_tables(dataset: Dataset, folder: Path, _: str) -> dict[str, int]:
    for name, table in named(dataset).items():
        pyarrow.parquet.write_table(table, folder / f"{name}.parquet")
    return {}


def _write_recbole(dataset: Dataset, folder: Path, name: str) -> dict[str, int]:
    """Writes atomic files; the reviews of a pair become one text."""
    tables, lost = named(dataset), {}
    events, reviews = tables.pop("interactions"), tables.pop("reviews", None)
    if reviews is not None:
        text, lost = _texts_of_pairs(dataset)
        events = events.append_column("text", text)
    events = events.rename_columns([{"value": "rating"}.get(column, column) for column in events.column_names])
    for ending, table in (("inter", events), ("item", tables["items"]), ("user", tables["users"])):
        _write_atomic(folder / f"{name}.{ending}", table, lost)
    if "ties" in tables:
        _write_atomic(folder / f"{name}.net", tables["ties"], lost)
    return lost


def _write_huggingface(dataset: Dataset, folder: Path, _: str) -> dict[str, int]:
    from huggingface_hub import DatasetCardData  # slow import

    configs, listed = [], []
    for name, table in named(dataset).items():
        (folder / name).mkdir()
        splits = {"train": table}
        if "split" in table.column_names and name == "interactions":
            numbered = table.append_column(ROW, pa.array(np.arange(len(table))))
            of_parts = {split: numbered.filter(pc.equal(table["split"], part)) for split, part in SPLITS.items()}
            splits = {split: rows for split, rows in of_parts.items() if len(rows)}
        for split, rows in splits.items():
            pyarrow.parquet.write_table(rows, folder / name / shard(split))
            listed.append(f"| `{name}` | {split} | {len(rows):,} |")
        data_files = [{"split": split, "path": f"{name}/{shard(split)}"} for split in splits]
        default = {"default": True} if name == "interactions" else {}
        configs.append({"config_name": name, "data_files": data_files, **default})
    card = DatasetCardData(
        pretty_name=printable(dataset.name), tags=["recommendation", "tabular", "graph"], configs=configs
    )
    (folder / "README.md").write_text(_CARD.format(card.to_yaml(), "\n".join(listed)), encoding="utf-8", newline="\n")
    return {}


_CARD = """---
{}
---

Interactions of users and items, with what is known of both. Each table is a configuration:

| configuration | split | rows |
|---|---|---:|
{}

```python
from datasets import load_dataset

load_dataset("path/to/this/folder", "interactions")
```

Ids are text. `timestamp` is in unix seconds. `row`, where it is there, is the place of an interaction before they were
divided into splits, and `part` its split. The tables keep the licence of their source.
"""

LAYOUTS: dict[str, Callable[[Dataset, Path, str], dict[str, int]]] = {
    "tables": _write_tables,
    "recbole": _write_recbole,
    "huggingface": _write_huggingface,
}


def _texts_of_pairs(dataset: Dataset) -> tuple[pa.Array, dict[str, int]]:
    """Joins the reviews of each interaction's pair, and counts the reviews that this cannot keep."""
    keys = [
        column(table, "user").astype(np.int64) * dataset.n_items + column(table, "item")
        for table in (dataset.interactions, dataset.reviews)
    ]
    order = np.argsort(keys[0])
    place = order[np.minimum(np.searchsorted(keys[0], keys[1], sorter=order), len(order) - 1)]
    held = keys[0][place] == keys[1]
    texts_of_pair: dict[int, list[str]] = {}
    for row, text in zip(place[held].tolist(), dataset.reviews["text"].filter(pa.array(held)).to_pylist(), strict=True):
        texts_of_pair.setdefault(row, []).append(text)
    joined = pa.array(
        [" ".join(texts_of_pair[row]) if row in texts_of_pair else None for row in range(len(keys[0]))], pa.string()
    )
    timed = 0
    if "timestamp" in dataset.reviews.column_names:
        timed = pc.sum(pc.is_valid(dataset.reviews["timestamp"].filter(pa.array(held)))).as_py() or 0
    lost = {
        "reviews: of pairs that are no interaction, left out": int((~held).sum()),
        "reviews: joined to another one of the same pair": int(held.sum()) - len(texts_of_pair),
        "reviews: times left out": timed,
    }
    return joined, {what: count for what, count in lost.items() if count}


def _write_atomic(file: Path, table: pa.Table, lost: dict[str, int]) -> None:
    headers, cells = [], []
    for name in table.column_names:
        if re.search(r"[:\t\r\n]", name):
            raise ValueError(f"{file.name}: column {name!r} has a colon, tab or line break; rename it")
        kind, texts = _cells(name, table[name])
        if count := _unlike(table[name], texts):
            lost[f"{file.name}: lists of {name} with an empty entry, or a blank within one, where entries end"] = count
        if count := pc.sum(pc.equal(texts, "")).as_py():
            lost[f"{file.name}: empty lists in {name}, which are read as missing"] = count
        broken = pc.match_substring_regex(texts, _BREAKS)
        if count := pc.sum(broken).as_py():
            if name.endswith("_id"):
                bad = texts.filter(broken)[0].as_py()
                raise ValueError(
                    f"{file.name}: {name} {bad!r} has a tab, a line break or a leading quote, which the format cannot "
                    "hold; rename it"
                )
            texts = pc.replace_substring_regex(texts, _BREAKS, " ")
            lost[f"{file.name}: cells of {name} whose tabs, line breaks or leading quote became a space"] = count
        headers.append(f"{name}:{kind}")
        cells.append(pc.fill_null(texts, "").to_pylist())
    lines = ["\t".join(headers), *("\t".join(row) for row in zip(*cells, strict=True))]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")


def _cells(name: str, values: pa.ChunkedArray) -> tuple[str, pa.ChunkedArray]:
    """Returns the type of an atomic column and its cells as text; blanks separate the elements of a list."""
    kind = values.type
    if pa.types.is_integer(kind) and any(abs(end.as_py() or 0) > EXACT for end in pc.min_max(values).values()):
        return "token", values.cast(pa.string())  # a float would round them
    if name == "timestamp" or (not name.endswith("_id") and _is_number(kind)):
        return "float", values.cast(pa.string())
    if pa.types.is_list(values.type):
        entries = values.cast(pa.list_(pa.string())).combine_chunks()
        rows = [None if row is None else " ".join(filter(None, row)) for row in entries.to_pylist()]
        kind = "float_seq" if _is_number(values.type.value_type) else "token_seq"
        return kind, pa.chunked_array([pa.array(rows, pa.string())])
    return ("token_seq" if name in ("text", "name") else "token"), values.cast(pa.string())


def _unlike(values: pa.ChunkedArray, texts: pa.ChunkedArray) -> int:
    """Counts the lists that blank-separated text would read back with other elements."""
    if not pa.types.is_list(values.type):
        return 0
    entries = values.cast(pa.list_(pa.string())).to_pylist()
    return sum(bool(row) and row != text.split(" ") for row, text in zip(entries, texts.to_pylist(), strict=True))


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)
