"""Exports a finished run as a folder of vectors, parameters, scoring function and model card, for sharing or serving.

    python -m experiments.export --workdir=runs/mine --out=exported/mine
    python -m experiments.export --workdir=runs/mine --out=exported/mine --faiss
    python -m experiments.export --workdir=runs/mine --tables=DIR_OF_TODAY --out=exported/today

The folder is readable with safetensors, jax or Faiss alone; docs/INTEROP.md describes each file. --out is a new or
empty folder. Vectors contain information about the users: protect the folder as the tables.
"""

from pathlib import Path

from absl import flags

import fused_rec as fr
from fused_rec.commands.places import DEFINE_path, DEFINE_run, DEFINE_served, written_folder

WORKDIR, DATA_PATH, CACHE = DEFINE_run()
HISTORY, TABLES = DEFINE_served()
OUT = DEFINE_path("out", written_folder, "Folder to write, new or empty.", required=True)
FAISS = flags.DEFINE_bool("faiss", False, "Also write items.faiss; needs the extra faiss.")


def main(argv: list[str]) -> None:
    """Opens the run, writes the folder, and lists its files."""
    from fused_rec.serving import export_bundle
    from fused_rec.serving.recommender import read_served_tables

    export_bundle.check(Path(OUT.value), faiss=FAISS.value)
    other = read_served_tables(WORKDIR.value, TABLES.value) if TABLES.value else None
    folders = {"data_path": DATA_PATH.value, "cache": CACHE.value}
    run = fr.load(WORKDIR.value, history=HISTORY.value, dataset=other, **folders)
    out = run.save(OUT.value, faiss=FAISS.value)
    for file in sorted(out.iterdir()):
        print(f"{file.stat().st_size:>12,}  {file}")
