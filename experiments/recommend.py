"""Rank products for customers with a finished run.

    python -m experiments.recommend --workdir=runs/lastfm --users=2,3 --k=10 --out=ranked.csv

Writes CSV or Parquet, by the name's ending: user_id, rank (from 1), item_id, score. What a customer already holds,
in whichever part of the split, is left out unless --include_held.
"""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
from absl import app, flags
from jaxtyping import Int64

from fused_rec.data.dataset import Dataset, column
from fused_rec.evaluate.ranking import item_sets, top_k
from fused_rec.train.loop import load, scorer

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a finished run.")
USERS = flags.DEFINE_list("users", [], "Customer ids; none = all.")
K = flags.DEFINE_integer("k", 10, "Products a customer.", lower_bound=1)
OUT = flags.DEFINE_string("out", None, "File to write, .csv or .parquet.")
INCLUDE_HELD = flags.DEFINE_bool("include_held", False, "Rank products that the customer holds as well.")

WRITERS = {".csv": pyarrow.csv.write_csv, ".parquet": pyarrow.parquet.write_table}


def user_rows(dataset: Dataset, ids: list[str]) -> Int64[np.ndarray, "B"]:
    """Rows of the customers with these ids, all where none is given. Raises ValueError naming unknown ids."""
    if not ids:
        return np.arange(dataset.n_users)
    place = {user: row for row, user in enumerate(dataset.users.column("user_id").to_pylist())}
    unknown = [user for user in ids if user not in place]
    if unknown:
        raise ValueError(f"{len(unknown)} unknown customer ids, first {unknown[0]!r}; {dataset.name} has {len(place)}")
    return np.array([place[user] for user in ids])


def recommendations(workdir: str, ids: list[str], k: int, *, include_held: bool = False) -> tuple[pa.Table, Dataset]:
    """The table that is written, and the dataset that names its products."""
    config, prepared, state = load(workdir)
    dataset = prepared.dataset
    users = user_rows(dataset, ids)
    held = dataset.interactions.slice(0, 0) if include_held else dataset.interactions
    seen = item_sets(column(held, "user"), column(held, "item"), dataset.n_users)
    items, scores = top_k(scorer(config, prepared, state), users, seen=seen, n_items=dataset.n_items, k=k, progress=True)
    row, rank = np.nonzero(items >= 0)  # customers who hold nearly everything get fewer than k
    return pa.table(
        {
            "user_id": dataset.users.column("user_id").take(pa.array(users[row])),
            "rank": pa.array(rank + 1, pa.int32()),
            "item_id": dataset.items.column("item_id").take(pa.array(items[row, rank])),
            "score": pa.array(scores[row, rank], pa.float32()),
        }
    ), dataset


def main(argv: list[str]) -> None:
    """Parses the flags, ranks, writes the file under its name only when it is whole."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {argv[1:]}")
    out = Path(OUT.value)
    if out.suffix not in WRITERS:
        raise app.UsageError(f"--out is {out.name}; it must end in one of {', '.join(WRITERS)}")
    if not out.parent.is_dir():
        raise app.UsageError(f"--out is in {out.parent}, which is no folder; make it first")
    ranked, _ = recommendations(WORKDIR.value, USERS.value, K.value, include_held=INCLUDE_HELD.value)
    partial = out.with_name(f".{out.name}.partial")
    WRITERS[out.suffix](ranked, partial)
    partial.replace(out)
    print(f"{ranked.num_rows} recommendations for {len(ranked.column('user_id').unique())} customers in {out}")


def cli() -> None:
    """The console entry."""
    flags.mark_flags_as_required(["workdir", "out"])
    app.run(main)


if __name__ == "__main__":
    cli()
