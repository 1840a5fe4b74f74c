"""Datasets of public formats whose ids are integers and whose split is predefined."""

import numpy as np
import pyarrow as pa

from fused_rec.data.dataset import Dataset
from fused_rec.data.io.validate import Tables, assemble

SPLIT_NAMES = ("train", "test")  # of the predefined splits


def with_integer_ids(
    name: str, events: pa.Table, more_users: np.ndarray, ties: pa.Table | None, repair: bool
) -> Dataset:
    """Builds a dataset with users and items in numeric order of their ids.

    Repeated pairs and self-loops are always repaired and counted.

    Args:
      name: name of the dataset.
      events: columns `user_id`, `item_id`, `split` of the interactions.
      more_users: int64 ids of users, who need not have interactions.
      ties: columns `source_id`, `target_id` of the social edges, or None.
      repair: as in `fused_rec.data.io.tables.read_tables`.

    Returns:
      The dataset.

    Raises:
      DataError: lists all faults.
    """
    users = np.unique(np.concatenate([np.asarray(events["user_id"]), more_users]))
    items = np.unique(np.asarray(events["item_id"]))
    if ties is not None:
        ties = ties.append_column("kind", pa.array(["trust"] * len(ties), pa.string()))
    tables = Tables(events, users=pa.table({"user_id": users}), items=pa.table({"item_id": items}), ties=ties)
    return assemble(name, tables, repair=repair, auto_repair=("repeated interaction", "tie to oneself"))
