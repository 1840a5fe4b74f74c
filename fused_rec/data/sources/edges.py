"""Reader of integer edge tables: train.tsv, test.tsv, social.tsv."""

from pathlib import Path

import numpy as np
import pyarrow as pa

from fused_rec.data.dataset import Dataset
from fused_rec.data.io.files import integers, only_file, read_delimited
from fused_rec.data.sources.integer_ids import SPLIT_NAMES, with_integer_ids


def edges(path: Path, repair: bool) -> Dataset:
    """Reads `train.tsv`, `test.tsv` and optionally `social.tsv` (each may be .gz) with two integers per row.

    Args:
      path: folder with the files.
      repair: as in `fused_rec.data.io.tables.read_tables`.

    Returns:
      The dataset with a predefined split; users with social edges only are kept as new users, and noted.

    Raises:
      DataError: lists all faults.
    """
    pairs = {split: _integer_pairs(only_file(path, f"{split}.tsv*"), "user_id", "item_id") for split in SPLIT_NAMES}
    events = [rows.append_column("split", pa.array([name] * len(rows), pa.string())) for name, rows in pairs.items()]
    has_ties = any(path.glob("social.tsv*"))
    ties = _integer_pairs(only_file(path, "social.tsv*"), "source_id", "target_id") if has_ties else None
    users = np.concatenate([[], *(() if ties is None else ties.columns)]).astype(np.int64)
    return with_integer_ids(path.name, pa.concat_tables(events), users, ties, repair)


def _integer_pairs(file: Path, *names: str) -> pa.Table:
    """Reads a file without header as integer columns."""
    rows = read_delimited(file, names=names)
    return pa.table({name: integers(rows, name, file, header=False) for name in names})
