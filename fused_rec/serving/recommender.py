"""Serving a finished run: load it from its workdir and rank items for users under rules, in chunks of users."""

import dataclasses
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
from fused_rec.evaluation.item_sets import item_sets
from fused_rec.evaluation.ranking import CandidateFilter, FilteredRanking, RankingSpec, Scorer, rank, users_per_batch
from fused_rec.memory import require_memory
from fused_rec.runs.run_dir import TABLES, check_tables, read_finished, read_results
from fused_rec.training.checkpoint import Checkpoints
from fused_rec.training.inputs import Prepared, init_state, prepare, read, seen_splits, with_finetuned_text
from fused_rec.training.late_fusion import selection_of, with_late_fusion
from fused_rec.training.train_step import TrainState

CHUNK_USERS = 65_536  # users whose rankings are in memory at once
SCHEMA = pa.schema(
    {"user_id": pa.string(), "rank": pa.int32(), "item_id": pa.string(), "score": pa.float32()}  # rank from 1
)


class RankedChunk(NamedTuple):
    """Rankings of a chunk of users: a table of `SCHEMA`, the user rows, and the result of `rank`."""

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
    """Loads a finished run for ranking.

    Args:
      workdir: folder of the run.
      split: the split to evaluate. A refitted run was trained on the validation split, so "valid" loads the model of
        step selection, with the graph of the training split alone.
      data_path: current folder of the tables; None = that of the training.
      cache: current folder of cached text embeddings; None = that of the training.

    Returns:
      The config, the prepared tables and graph, and the state of the selected step.

    Raises:
      TablesChangedError: the tables differ from those of the training.
      NoFolderError: the folder of the tables does not exist.
      CacheError: text must be encoded, and the cache cannot be created.
      CheckpointError: the selected checkpoint is damaged; no other one is used instead.
      FileNotFoundError: workdir holds no finished run.
    """
    workdir = Path(workdir)
    config, checkpoints, step = _chosen(workdir, split)
    config = _placed(config, workdir, data_path, cache)
    dataset, data_split = read(config)
    check_tables(digest(dataset), workdir, contents(dataset))
    prepared = prepare(config, dataset, data_split, seen_splits(config.train.refit, split))
    state, _ = checkpoints.restore(step, like=init_state(config, prepared))
    prepared = with_finetuned_text(config, prepared, state)
    return config, with_late_fusion(prepared, selection_of(read_results(workdir))), state


def _placed(config: Config, workdir: Path, data_path: str | Path | None, cache: str | Path | None) -> Config:
    values = to_dict(config)
    kept = Path(config.data.path)
    if data_path is not None:
        values["data"]["path"] = str(Path(data_path).expanduser().resolve())
    elif kept.name == TABLES and not kept.is_dir() and (workdir / TABLES).is_dir():
        values["data"]["path"] = str((workdir / TABLES).resolve())  # the workdir was moved with its tables
    if cache is not None:
        values["text"]["cache"] = str(cache)
    return from_dict(values)


def model_digest(workdir: str | Path, split: str = "test") -> str:
    """Returns the SHA-256 of the selected checkpoint's manifest, which identifies parameters and config.

    Args:
      workdir: folder of the run.
      split: as for `load`.
    """
    _, checkpoints, step = _chosen(Path(workdir), split)
    return checkpoints.digest(step)


def _chosen(workdir: Path, split: str) -> tuple[Config, Checkpoints, int]:
    config, step, selected = read_finished(workdir)
    phase = "refit" if config.train.refit and split != "valid" else selected
    checkpoints = Checkpoints(workdir / phase / "checkpoints")
    if step not in checkpoints.steps():
        raise FileNotFoundError(
            f"{workdir / phase} does not hold the checkpoint of the selected step {step}; train in a new workdir"
        )
    return config, checkpoints, step


def as_texts(ids: Any, what: str = "users") -> list[str]:
    """Converts ids to text, as in the tables.

    Args:
      ids: text or integers in a list, or in an array or column of NumPy, Arrow, pandas or polars.
      what: name of the argument in messages.

    Returns:
      The ids in their order.

    Raises:
      ValueError: a single id instead of a list, or an entry that is neither text nor integer.
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
    """Looks up user rows by id.

    Args:
      dataset: tables.
      ids: user ids, as for `as_texts`; None = all users.

    Returns:
      Each row once, in the order of the ids.

    Raises:
      ValueError: an id is unknown (names it), or neither text nor integer.
    """
    if ids is None:
        return np.arange(dataset.n_users)
    asked = list(dict.fromkeys(as_texts(ids)))
    rows = pc.index_in(pa.array(asked, pa.string()), value_set=dataset.users.column("user_id").combine_chunks())
    if rows.null_count:
        first = asked[rows.is_null().to_pylist().index(True)]
        raise ValueError(
            f"{rows.null_count} unknown user ids, first {first!r}; {dataset.name} has {dataset.n_users} users"
        )
    return rows.to_numpy().astype(np.int64)


def candidate_filter(dataset: Dataset, rules: Sequence[Rule] = (), *, include_seen: bool = False) -> CandidateFilter:
    """Compiles rules for these tables; by default the last rule refuses the user's interactions of all splits.

    Args:
      dataset: tables.
      rules: suitability rules.
      include_seen: do not add that last rule.

    Returns:
      The filter.

    Raises:
      ValueError: `include_seen` contradicts a rule, or a rule does not fit the tables.
    """
    asked = [rule.name for rule in rules if isinstance(rule, Refuse) and rule.held]
    if asked and include_seen:
        raise ValueError(f"rule {asked[0]!r} refuses seen items, and include_seen includes them; drop one")
    if not asked and not include_seen:
        rules = (*rules, Refuse(SEEN_RULE, held=True))
    held = item_sets(column(dataset.interactions, "user"), column(dataset.interactions, "item"), dataset.n_users)
    return apply(rules, dataset.users, dataset.items, held)


def require_table(dataset: Dataset, n_users: int, k: int) -> None:
    """Checks that the rankings of all users fit in memory as one table.

    Args:
      dataset: tables.
      n_users: users to rank.
      k: items per user.

    Raises:
      InsufficientMemoryError: they do not fit.
    """
    row = 16 + sum(
        _mean_length(table, name) for table, name in ((dataset.users, "user_id"), (dataset.items, "item_id"))
    )
    what = f"a table of {k:,} products for {n_users:,} customers"
    instead = "ask for fewer customers or a smaller k, or write a file with `fused-rec recommend`, which ranks in parts"
    require_memory(int(row * n_users * min(k, dataset.n_items)), what, instead)


def _mean_length(table: pa.Table, name: str) -> float:
    """Returns the mean bytes of an id in Arrow."""
    return 4 + table.column(name).nbytes / max(table.num_rows, 1)


def count_chunks(n_users: int) -> int:
    """Returns the number of chunks in which `rank_chunks` ranks this many users."""
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
    """Ranks the k best allowed items of each user, in chunks of `CHUNK_USERS` users.

    The content of a chunk does not depend on `first`, so an interrupted ranking resumes with equal results. Only chunks
    that the caller keeps stay in memory.

    Args:
      scorer: scorer of the model.
      dataset: tables.
      candidates: filter of the items of each user.
      users: int64 [V], user rows.
      k: items per user.
      first: number of the first chunk.
      devices: number of devices, None = all.

    Yields:
      The rankings of each chunk.
    """
    ids = [dataset.users.column("user_id").combine_chunks(), dataset.items.column("item_id").combine_chunks()]
    nothing = item_sets(np.zeros(0, np.int32), np.zeros(0, np.int32), dataset.n_users)
    # Of the last part too: a score may depend on the shape.
    batch = min(users_per_batch(dataset.n_items), max(1, -(-len(users) // len(select_devices(devices)))))
    spec = RankingSpec(nothing, dataset.n_items, filter=candidates, batch_size=batch, devices=devices)
    n_parts = count_chunks(len(users))
    for part in range(first, n_parts):
        own = users[part * CHUNK_USERS : (part + 1) * CHUNK_USERS]
        of_part = dataclasses.replace(spec, progress=f"rank, part {part + 1} of {n_parts}")
        ranking = rank(scorer, own, of_part, k)
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
