"""Interactions read from Parquet as own tables: seconds and the memory it takes.

    python tests/stress/tables.py --rows=1e6,1e7

Distinct pairs, 30 a customer and 60 a product, are written to a temporary folder and read by a process of its own, all
checks included. Prints the seconds and the largest resident memory, imports included.
"""

import argparse
import multiprocessing
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fused_rec.config import DataConfig
from fused_rec.data.sources.registry import load

PART = 10**7  # rows written at once
MIB = 2**10  # of ru_maxrss


def write(rows: int, file: Path) -> None:
    """Customers in order, each with 30 products that lie far apart."""
    n_items = max(rows // 60, 31)
    columns = pa.schema([("user_id", pa.int64()), ("item_id", pa.int64())])
    with pq.ParquetWriter(file, columns) as writer:
        for start in range(0, rows, PART):
            user, held = np.divmod(np.arange(start, min(start + PART, rows)), 30)
            writer.write_table(pa.table({"user_id": user, "item_id": (user * 7919 + held * (n_items // 31)) % n_items}))


def read(folder: str) -> tuple[int, float, float]:
    """Rows, seconds, and the process's largest memory in MiB."""
    began = time.perf_counter()
    dataset = load(DataConfig(name="tables", path=folder))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / MIB
    return len(dataset.interactions), time.perf_counter() - began, peak


def main() -> None:
    """Writes and reads each size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="1e6,1e7")
    for rows in (int(float(size)) for size in parser.parse_args().rows.split(",")):
        with tempfile.TemporaryDirectory() as folder, multiprocessing.get_context("spawn").Pool(1) as alone:
            write(rows, Path(folder, "interactions.parquet"))
            found, seconds, peak = alone.apply(read, (folder,))
            print(f"{found:,} rows: {seconds:.1f} s, {peak:,.0f} MiB", flush=True)


if __name__ == "__main__":
    main()
