"""Reasons of written rankings: reasons.jsonl beside the file, a line for each of its rows."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
from tqdm import tqdm

from fused_rec.data.io.arrow import pc
from fused_rec.data.io.csv_safety import unescape_csv
from fused_rec.explanation.explained_model import ExplainedModel
from fused_rec.explanation.reasons import Content, add_words, record
from fused_rec.explanation.token_attribution import Attributor
from fused_rec.storage import fill_file

TOGETHER = 64  # users whose texts are encoded together
REASONS = "reasons.jsonl"  # one folder has the reasons of the file that was last written there


def read_ranked(out: Path) -> Iterator[pa.Table]:
    """What was written to `out`, some rows at a time, ids as in the tables."""
    if out.suffix == ".parquet":
        with pyarrow.parquet.ParquetFile(out) as file:
            for batch in file.iter_batches(columns=["user_id", "item_id"]):
                yield pa.Table.from_batches([batch])
        return
    types = {"user_id": pa.string(), "item_id": pa.string()}
    text = pyarrow.csv.ConvertOptions(column_types=types, include_columns=list(types))
    layout = pyarrow.csv.ParseOptions(newlines_in_values=True)
    with pyarrow.csv.open_csv(out, parse_options=layout, convert_options=text) as file:
        for batch in file:
            yield pa.table(
                {name: [unescape_csv(cell) for cell in batch[name].to_pylist()] for name in ("user_id", "item_id")}
            )


def write_reasons(
    model: ExplainedModel, out: Path, rows: int, content: Content, words: Attributor | None = None
) -> Path:
    """`REASONS` beside `out`, a line for each of its so many rows; there only when whole."""
    file, dataset = out.with_name(REASONS), model.inputs.dataset
    ids = {
        name: table.column(name).combine_chunks()
        for name, table in (("user_id", dataset.users), ("item_id", dataset.items))
    }

    def fill(partial: Path) -> None:
        with partial.open("w", encoding="utf-8") as stream, tqdm(total=rows, desc="explain", unit="row") as bar:
            for table in read_ranked(out):
                user, item = (
                    pc.index_in(table[name], value_set=ids[name]).to_numpy() for name in ("user_id", "item_id")
                )
                starts = [*np.flatnonzero(np.diff(user, prepend=-1)).tolist(), len(user)]
                users = list(itertools.pairwise(starts))
                for some in (users[place : place + TOGETHER] for place in range(0, len(users), TOGETHER)):
                    found = []
                    for start, end in some:
                        found += record(model, int(user[start]), item[start:end].tolist(), content)
                    for row in found:  # an approximate list may have items that the exact one lacks
                        if row.get("set") and row["set"]["rank"] > content.k:
                            row["set"] = None
                    if words is not None:
                        these = slice(some[0][0], some[-1][1])
                        pairs = list(zip(user[these].tolist(), item[these].tolist(), strict=True))
                        add_words(found, words, pairs, bar.update)
                    stream.writelines(json.dumps(row, ensure_ascii=True) + "\n" for row in found)
                    bar.update(len(found) if words is None else 0)

    fill_file(file, fill)
    return file
