"""Purchases of insurance products by customers of one insurer (Bruun, Maistro and Lioma, RecSys 2022).

Folder: `purchase_events_train.csv` and `purchase_events_test.csv`, each may be .gz. The published split is by time;
`valid` = 1 marks the validation part of the first file. Customers buy the same product again: an interaction is a pair
at its first purchase and belongs to the split of that purchase, so a repeated purchase is not held out. Events without
a purchase (the sessions of the publication) are not read.
"""

from pathlib import Path

import numpy as np
import pyarrow as pa

from fused_rec.data.dataset import DataError, Dataset, Problem
from fused_rec.data.io.arrow import flags, pc
from fused_rec.data.io.checks import EXAMPLES
from fused_rec.data.io.files import plain_or_gz, read_delimited
from fused_rec.data.io.validate import Tables, assemble

NEEDED = ("user_id", "item_id", "event_time")


def insurance(path: Path, repair: bool) -> Dataset:
    """Reads the purchases: 44,434 customers, 16 products, 55,619 and 6,121 events.

    Args:
      path: folder with both files.
      repair: as in `fused_rec.data.io.tables.read_tables`.

    Returns:
      The dataset with a predefined split into train, validation and test, and times in UTC.

    Raises:
      DataError: lists all faults of the first faulty file, or of the values.
    """
    files = {split: plain_or_gz(path / f"purchase_events_{split}.csv") for split in ("train", "test")}
    train = read_delimited(files["train"], ",", needed=(*NEEDED, "valid"), quoted=True)
    valid = pc.fill_null(train["valid"], "")
    bad = np.flatnonzero(~flags(pc.is_in(valid, value_set=pa.array(["0", "1"]))))
    remedy = "write 0 for train and 1 for validation"
    problems = [
        Problem(files["train"].name, int(row) + 2, f"valid is {valid[row].as_py()[:60]!r}", remedy)
        for row in bad[:EXAMPLES]
    ]
    if len(bad) > EXAMPLES:
        total = f"{len(bad):,} rows in all have another value of valid"
        problems.append(Problem(files["train"].name, None, total, remedy, len(bad) - EXAMPLES))
    if problems:
        raise DataError(problems)
    test = read_delimited(files["test"], ",", needed=NEEDED, quoted=True)
    splits = pc.if_else(pc.equal(valid, "1"), "valid", "train"), pa.array(["test"] * len(test), pa.string())
    events = [
        rows.select(NEEDED).append_column("split", split) for rows, split in zip((train, test), splits, strict=True)
    ]
    tables = Tables(pa.concat_tables(events).rename_columns({"event_time": "timestamp"}))
    return assemble("insurance", tables, repair=repair, auto_repair=("repeated interaction",))
