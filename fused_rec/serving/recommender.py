"""A finished run put to use: loaded from its workdir, ranking products for customers under rules, part by part."""

import numbers
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Int64

from fused_rec.config import Config, from_dict, to_dict
from fused_rec.data.dataset import Dataset, column, contents, digest
from fused_rec.data.io.arrow import pc
from fused_rec.distributed.devices import computes, select_devices
from fused_rec.evaluation.filters import SEEN_RULE, Refuse, Rule, apply
from fused_rec.evaluation.ranking import CandidateFilter, Scorer, item_sets, users_per_batch
from fused_rec.evaluation.suitability import FilteredRanking, rank_with_filters
from fused_rec.memory import require_memory
from fused_rec.training.checkpoint import Checkpoints
from fused_rec.training.evaluate import scorer
from fused_rec.training.inputs import Prepared, init_state, prepare, read, with_finetuned_text
from fused_rec.training.train_step import TrainState
from fused_rec.training.trainer import TABLES, check_tables, read_finished

CHUNK_USERS = 65_536  # customers whose rankings are in memory at once
SCHEMA = pa.schema(
    {"user_id": pa.string(), "rank": pa.int32(), "item_id": pa.string(), "score": pa.float32()}  # rank from 1
)


class RankedChunk(NamedTuple):
    """The rankings of some customers: as rows of `SCHEMA`, and as `screen` found them for these rows of the users."""

    table: pa.Table
    users: Int64[np.ndarray, "V"]
    ranking: FilteredRanking


@computes
def load(
    workdir: str | Path,
    split: str = "test",
    *,
    data_path: str | Path | None = None,
    cache: str | Path | None = None,
) -> tuple[Config, Prepared, TrainState]:
    """Opens a finished run, ready to rank: its config, its tables and graph, and the state that was chosen.

    Args:
      workdir: the run's folder.
      split: what will be asked of it. A refitted run has learned from the validation part, so for "valid" the model
        that chose its step comes back, with the graph of the training part alone.
      data_path: where the same tables lie now; None = where they were at training.
      cache: the folder of text vectors; None = that of training.

    Raises:
      TablesChangedError: the tables have changed since.
      NoFolderError: the tables are not there.
      CacheError: words are encoded, and the cache of their vectors cannot be made.
      CheckpointError: the state that was chosen is damaged; no other one takes its place.
      FileNotFoundError: workdir holds no finished run.
    """
    workdir = Path(workdir)
    config, checkpoints, step = _chosen(workdir, split)
    known = ("train", "valid") if config.train.refit and split != "valid" else ("train",)
    config = _placed(config, workdir, data_path, cache)
    dataset, data_split = read(config)
    check_tables(digest(dataset), workdir, contents(dataset))
    prepared = prepare(config, dataset, data_split, known)
    state, _ = checkpoints.restore(step, like=init_state(config, prepared))
    return config, with_finetuned_text(config, prepared, state), state


def _placed(config: Config, workdir: Path, data_path: str | Path | None, cache: str | Path | None) -> Config:
    values = to_dict(config)
    kept = Path(config.data.path)
    if data_path is not None:
        values["data"]["path"] = str(Path(data_path).expanduser().resolve())
    elif kept.name == TABLES and not kept.is_dir() and (workdir / TABLES).is_dir():
        values["data"]["path"] = str((workdir / TABLES).resolve())  # the workdir was moved, and these tables with it
    if cache is not None:
        values["text"]["cache"] = str(cache)
    return from_dict(values)


def model_digest(workdir: str | Path, split: str = "test") -> str:
    """SHA-256 that tells the state `load` gives from every other: of its checkpoint's manifest, config included."""
    _, checkpoints, step = _chosen(Path(workdir), split)
    return checkpoints.digest(step)


def _chosen(workdir: Path, split: str) -> tuple[Config, Checkpoints, int]:
    config, step = read_finished(workdir)
    phase = "refit" if config.train.refit and split != "valid" else "select"
    checkpoints = Checkpoints(workdir / phase / "checkpoints")
    if step not in checkpoints.steps():
        raise FileNotFoundError(
            f"{workdir / phase} does not hold the checkpoint of step {step}, which was chosen; train in a new workdir"
        )
    return config, checkpoints, step


def as_texts(ids: Any, what: str = "users") -> list[str]:
    """Ids as the tables have them, from text and integers of Python, NumPy, Arrow, pandas or polars.

    what: how messages call them. Raises ValueError for a single id in place of a list, and for what is no id (a float,
    a missing value, a boolean).
    """
    if isinstance(ids, str):
        raise ValueError(f"{what} is {ids!r}, one string; give a list of ids")
    if isinstance(ids, bytes | Mapping) or not isinstance(ids, Iterable):
        raise ValueError(f"{what} is {ids!r}, of type {type(ids).__name__}; give a list of ids")
    texts = []
    for given in ids:
        value = given.as_py() if isinstance(given, pa.Scalar) else given
        if isinstance(value, bool) or not isinstance(value, str | numbers.Integral):
            raise ValueError(f"{what} has {value!r} of type {type(value).__name__}; give ids as text or integers")
        texts.append(str(value))
    return texts


def user_rows(dataset: Dataset, ids: Any) -> Int64[np.ndarray, "B"]:
    """Rows of the customers with these ids, each once; all customers for None, and none where no id is given.

    Raises ValueError naming an id that is unknown or, as `as_texts`, no id.
    """
    if ids is None:
        return np.arange(dataset.n_users)
    asked = list(dict.fromkeys(as_texts(ids)))
    rows = pc.index_in(pa.array(asked, pa.string()), value_set=dataset.users.column("user_id").combine_chunks())
    if rows.null_count:
        first = asked[rows.is_null().to_pylist().index(True)]
        raise ValueError(
            f"{rows.null_count} unknown customer ids, first {first!r}; {dataset.name} has {dataset.n_users}"
        )
    return rows.to_numpy().astype(np.int64)


def candidate_filter(dataset: Dataset, rules: Sequence[Rule] = (), *, include_seen: bool = False) -> CandidateFilter:
    """The rules on these tables, and last, unless `include_held`, that nobody gets what they hold in any part.

    Raises ValueError where `include_held` contradicts the rules, and as `rules.apply` does.
    """
    asked = [rule.name for rule in rules if isinstance(rule, Refuse) and rule.held]
    if asked and include_seen:
        raise ValueError(f"rule {asked[0]!r} refuses what a customer holds, and include_held asks for it; drop one")
    if not asked and not include_seen:
        rules = (*rules, Refuse(SEEN_RULE, held=True))
    held = item_sets(column(dataset.interactions, "user"), column(dataset.interactions, "item"), dataset.n_users)
    return apply(rules, dataset.users, dataset.items, held)


@computes
def recommend(
    config: Config,
    prepared: Prepared,
    state: TrainState,
    ids: Any,
    k: int,
    *,
    include_seen: bool = False,
) -> pa.Table:
    """The k best products of each customer (of all for None), fewer for one who holds nearly everything.

    Returns rows of `SCHEMA`. Products that the customer holds in any part of the split are left out unless
    `include_held`. Raises ValueError naming unknown ids. For many customers, or under rules: `rank_chunks`.
    """
    dataset = prepared.dataset
    may = candidate_filter(dataset, include_seen=include_seen)
    rows = user_rows(dataset, ids)
    require_table(dataset, len(rows), k)
    found = rank_chunks(scorer(config, prepared, state), dataset, may, rows, k)
    return pa.concat_tables([SCHEMA.empty_table(), *(part.table for part in found)])


def require_table(dataset: Dataset, n_users: int, k: int) -> None:
    """Raises InsufficientMemoryError where the rankings of so many customers do not fit as one table of `SCHEMA`."""
    row = 16 + sum(
        _mean_length(table, name) for table, name in ((dataset.users, "user_id"), (dataset.items, "item_id"))
    )
    what = f"a table of {k:,} products for {n_users:,} customers"
    instead = "ask for fewer customers or a smaller k, or write a file by experiments.recommend, which ranks in parts"
    require_memory(int(row * n_users * min(k, dataset.n_items)), what, instead)


def _mean_length(table: pa.Table, name: str) -> float:
    """Bytes of an id as Arrow has it."""
    return 4 + table.column(name).nbytes / max(table.num_rows, 1)


def count_chunks(n_users: int) -> int:
    """Parts in which `rank_chunks` ranks for so many customers."""
    return -(-n_users // CHUNK_USERS)


def rank_chunks(
    scorer: Scorer,
    dataset: Dataset,
    candidates: CandidateFilter,
    users: Int64[np.ndarray, "V"],
    k: int,
    *,
    first: int = 0,
    devices: int | None = None,
) -> Iterator[RankedChunk]:
    """The k best eligible products of each customer, `CHUNK_USERS` customers at a time, from part number `first` on.

    What a part holds does not depend on the part it begins with, so that what was interrupted ends as if it had not
    been. Only the parts that the caller keeps stay in memory.
    """
    ids = [dataset.users.column("user_id").combine_chunks(), dataset.items.column("item_id").combine_chunks()]
    nothing = item_sets(np.zeros(0, np.int32), np.zeros(0, np.int32), dataset.n_users)
    # Of the last part too: a score may depend on the shape.
    batch = min(users_per_batch(dataset.n_items), -(-len(users) // len(select_devices(devices))))
    n_parts = count_chunks(len(users))
    for part in range(first, n_parts):
        own = users[part * CHUNK_USERS : (part + 1) * CHUNK_USERS]
        ranking = rank_with_filters(
            scorer,
            candidates,
            own,
            seen=nothing,
            n_items=dataset.n_items,
            k=k,
            batch=batch,
            progress=f"rank, part {part + 1} of {n_parts}",
            devices=devices,
        )
        yield RankedChunk(_rows(own, ranking, *ids), own, ranking)


def _rows(users: Int64[np.ndarray, "V"], ranking: FilteredRanking, user_ids: pa.Array, item_ids: pa.Array) -> pa.Table:
    row, rank = np.nonzero(ranking.items >= 0)
    columns = [
        user_ids.take(pa.array(users[row])),
        pa.array(rank + 1, pa.int32()),
        item_ids.take(pa.array(ranking.items[row, rank])),
        pa.array(ranking.scores[row, rank], pa.float32()),
    ]
    return pa.Table.from_arrays(columns, schema=SCHEMA)
