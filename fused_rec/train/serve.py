"""A finished run put to use: loaded from its workdir, ranking products for customers."""

from pathlib import Path

import numpy as np
import pyarrow as pa
from jaxtyping import Int64

from fused_rec.config import Config
from fused_rec.data.dataset import Dataset, column, digest
from fused_rec.evaluate.ranking import item_sets, top_k
from fused_rec.train.checkpoint import Checkpoints
from fused_rec.train.loop import check_tables, finished
from fused_rec.train.measure import scorer
from fused_rec.train.prepare import Prepared, prepare, read
from fused_rec.train.step import TrainState, init


def load(workdir: str | Path, part: str = "test") -> tuple[Config, Prepared, TrainState]:
    """A finished run, ready to rank: its config, its tables and graph, and the state that was chosen.

    part: what will be asked of it. A refitted run has learned from the validation part, so for "valid" the model
    that chose its step comes back, with the graph of the training part alone.

    Raises:
      ValueError: the tables have changed since.
      CheckpointError: the state that was chosen is damaged; no other one takes its place.
      FileNotFoundError: workdir holds no finished run.
    """
    workdir = Path(workdir)
    config, step = finished(workdir)
    refitted = config.train.refit and part != "valid"
    phase, known = ("refit", ("train", "valid")) if refitted else ("choose", ("train",))
    checkpoints = Checkpoints(workdir / phase / "checkpoints")
    if step not in checkpoints.steps():
        raise FileNotFoundError(
            f"{workdir / phase} does not hold the checkpoint of step {step}, which was chosen; train in a new workdir"
        )
    dataset, parts_of = read(config)
    check_tables(digest(dataset), workdir)
    prepared = prepare(config, dataset, parts_of, known)
    state, _ = checkpoints.restore(step, like=init(config, prepared.task))
    return config, prepared, state


def user_rows(dataset: Dataset, ids: list[str]) -> Int64[np.ndarray, "B"]:
    """Rows of the customers with these ids, all where none is given. Raises ValueError naming unknown ids."""
    if not ids:
        return np.arange(dataset.n_users)
    place = {user: row for row, user in enumerate(dataset.users.column("user_id").to_pylist())}
    unknown = [user for user in ids if user not in place]
    if unknown:
        raise ValueError(f"{len(unknown)} unknown customer ids, first {unknown[0]!r}; {dataset.name} has {len(place)}")
    return np.array([place[user] for user in dict.fromkeys(ids)])


def recommend(
    config: Config, prepared: Prepared, state: TrainState, ids: list[str], k: int, *, include_held: bool = False
) -> pa.Table:
    """The k best products of each customer (all where no id is given), fewer for one who holds nearly everything.

    Returns columns user_id, rank (int32, from 1), item_id and score (float32). Products that the customer holds in
    any part of the split are left out unless `include_held`. Raises ValueError naming unknown ids.
    """
    dataset = prepared.dataset
    users = user_rows(dataset, ids)
    held = dataset.interactions.slice(0, 0) if include_held else dataset.interactions
    seen = item_sets(column(held, "user"), column(held, "item"), dataset.n_users)
    items, scores = top_k(
        scorer(config, prepared, state), users, seen=seen, n_items=dataset.n_items, k=k, progress=True
    )
    row, rank = np.nonzero(items >= 0)
    return pa.table(
        {
            "user_id": dataset.users.column("user_id").take(pa.array(users[row])),
            "rank": pa.array(rank + 1, pa.int32()),
            "item_id": dataset.items.column("item_id").take(pa.array(items[row, rank])),
            "score": pa.array(scores[row, rank], pa.float32()),
        }
    )
