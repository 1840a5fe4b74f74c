"""Purchases of insurance products by customers of one insurer (Bruun, Maistro and Lioma, RecSys 2022).

Folder: `purchase_events_train.csv` and `purchase_events_test.csv`, each may be .gz. The published split is by time;
`valid` = 1 marks the validation part of the first file. Customers buy the same product again: an interaction is a pair
at its first purchase and belongs to the split of that purchase, so a repeated purchase is not held out. Events without
a purchase (the sessions of the publication) are not read.
"""

from pathlib import Path

import numpy as np
import pyarrow as pa
from jaxtyping import Bool

from fused_rec.data.dataset import DataError, Dataset, Problem
from fused_rec.data.io.arrow import flags, missing, pc
from fused_rec.data.io.files import plain_or_gz, read_delimited
from fused_rec.data.io.times import read_times
from fused_rec.data.io.validate import Tables, assemble

COLUMNS = ("user_id", "item_id", "event_time")


def insurance(path: Path, repair: bool) -> Dataset:
    """Reads the purchases: 44,434 customers, 16 products, 55,619 and 6,121 events.

    Args:
      path: folder with both files.
      repair: as in `fused_rec.data.io.tables.read_tables`.

    Returns:
      The dataset with a predefined split into train, validation and test, and times read as UTC.

    Raises:
      DataError: lists the faults of the first faulty file.
    """
    train_file, test_file = (plain_or_gz(path / f"purchase_events_{split}.csv") for split in ("train", "test"))
    train, test = _events(train_file, (*COLUMNS, "valid")), _events(test_file, COLUMNS)
    known = flags(pc.is_in(train["valid"], value_set=pa.array(["0", "1"])))
    if faults := _faults(train_file, train["valid"], ~known, "valid", "write 0 for train and 1 for validation"):
        raise DataError(faults)
    split = pc.if_else(pc.equal(train["valid"], "1"), "valid", "train")
    events = pa.concat_tables([train.select(COLUMNS), test]).rename_columns({"event_time": "timestamp"})
    events = events.append_column(
        "split", pa.chunked_array([*split.chunks, pa.array(["test"] * len(test), pa.string())])
    )
    return assemble("insurance", Tables(events), repair=repair, auto_repair=("repeated interaction",))


def _events(file: Path, columns: tuple[str, ...]) -> pa.Table:
    """Reads columns of one file; raises DataError where an id or a time is missing or cannot be read."""
    rows = read_delimited(file, ",", needed=columns, quoted=True).select(columns)
    faults = _faults(
        file, rows["event_time"], ~read_times(rows["event_time"]).good, "event_time", "write 2020-01-31 12:00:00"
    )
    for name in ("user_id", "item_id"):
        faults += _faults(file, rows[name], missing(rows[name].cast(pa.string())), name, "give each row its id")
    if faults:
        raise DataError(faults)
    return rows


def _faults(file: Path, cells: pa.ChunkedArray, bad: Bool[np.ndarray, "R"], name: str, remedy: str) -> list[Problem]:
    """Reports the first bad cell of a column, with the number of bad ones."""
    if not bad.any():
        return []
    row, count = int(bad.argmax()), int(bad.sum())
    message = f"{name} is {cells[row].as_py()!r:.60} ({count:,} such rows in all)"
    return [Problem(file.name, row + 2, message, remedy, count)]
