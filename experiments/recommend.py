"""Rank products for customers with a finished run.

    python -m experiments.recommend --workdir=runs/lastfm --users=2,3 --k=10 --out=ranked.csv

Writes CSV or Parquet, by the name's ending: user_id, rank (from 1), item_id, score. What a customer already holds,
in whichever part of the split, is left out unless --include_held. Parquet has the ids as they are; in CSV an id that a
spreadsheet would take for a formula, or that begins with ', has one ' in front (fused_rec/data/spreadsheet.py).
"""

from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
from absl import app, flags

from experiments import start
from fused_rec.data.spreadsheet import harmless
from fused_rec.train.serve import load, recommend

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a finished run.", required=True)
USERS = flags.DEFINE_list("users", None, "Customer ids; all customers without this flag.")
K = flags.DEFINE_integer("k", 10, "Products a customer.", lower_bound=1)
OUT = flags.DEFINE_string("out", None, "File to write, .csv or .parquet.", required=True)
INCLUDE_HELD = flags.DEFINE_bool("include_held", False, "Rank products that the customer holds as well.")


def write_csv(ranked: pa.Table, file: Path) -> None:
    """The table as CSV, its ids made harmless."""
    for name in ("user_id", "item_id"):
        cells = pa.array(map(harmless, ranked.column(name).to_pylist()), pa.string())
        ranked = ranked.set_column(ranked.column_names.index(name), name, cells)
    pyarrow.csv.write_csv(ranked, file)


WRITERS = {".csv": write_csv, ".parquet": pyarrow.parquet.write_table}


def main(argv: list[str]) -> None:
    """Parses the flags, ranks, writes the file under its name only when it is whole."""
    if USERS.present and not USERS.value:
        raise app.UsageError("--users is empty; leave it out to rank for all customers")
    out = Path(OUT.value)
    if out.suffix not in WRITERS:
        raise app.UsageError(f"--out is {out.name}; it must end in one of {', '.join(WRITERS)}")
    if not out.parent.is_dir():
        raise app.UsageError(f"--out is in {out.parent}, which is no folder; make it first")
    ranked = recommend(*load(WORKDIR.value), USERS.value or [], K.value, include_held=INCLUDE_HELD.value)
    partial = out.with_name(f".{out.name}.partial")
    WRITERS[out.suffix](ranked, partial)
    partial.replace(out)
    print(f"{ranked.num_rows} recommendations for {len(ranked.column('user_id').unique())} customers in {out}")


if __name__ == "__main__":
    start(main)
