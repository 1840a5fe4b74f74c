"""Serving a finished run: load it from its workdir and rank items for users under rules, in chunks of users."""

import dataclasses
import logging
import numbers
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Float32, Int32, Int64

from fused_rec.config import Config, from_dict, to_dict
from fused_rec.data.attributes import describe
from fused_rec.data.dataset import Dataset, column, contents, digest
from fused_rec.data.io.arrow import pc
from fused_rec.data.splits import split
from fused_rec.distributed.devices import computes, select_devices
from fused_rec.evaluation.filters import SEEN_RULE, Refuse, Rule, Side, apply
from fused_rec.evaluation.item_sets import UserItemSets, item_sets
from fused_rec.evaluation.ranking import CandidateFilter, FilteredRanking, RankingSpec, Scorer, rank, users_per_batch
from fused_rec.memory import require_memory
from fused_rec.runs.run_dir import TABLES, check_tables, phase_of, read_finished, read_results, seen_splits
from fused_rec.serving.item_conditions import matching_rows
from fused_rec.text.cache import open_cache
from fused_rec.training.baseline_runs import fitted_state, settings_digest
from fused_rec.training.checkpoint import Checkpoints
from fused_rec.training.fitted import FITTED, Fitted, read_fitted, trained_parameters
from fused_rec.training.inputs import (
    ModelInputs,
    Prepared,
    prepare,
    read_dataset,
    serving_inputs,
    state_like,
    with_finetuned_text,
)
from fused_rec.training.late_fusion import selection_of, with_late_fusion
from fused_rec.training.train_step import TrainState
from fused_rec.training.warm_start import stored_initial

LOG = logging.getLogger(__name__)
HISTORIES = "train", "all"  # what serving uses of the tables
FEW = 8  # users who are ranked on the host, without a call of XLA
CHUNK_USERS = 65_536  # users whose rankings are in memory at once
SCHEMA = pa.schema(
    {"user_id": pa.string(), "rank": pa.int32(), "item_id": pa.string(), "score": pa.float32()}  # rank from 1
)


class RankedChunk(NamedTuple):
    """Rankings of a chunk of users: their `ranking_table`, the user rows, and the result of `rank`."""

    table: pa.Table
    users: Int64[np.ndarray, "V"]
    ranking: FilteredRanking


@computes
def load(
    workdir: str | Path,
    history: str = "all",
    *,
    dataset: Dataset | None = None,
    data_path: str | Path | None = None,
    cache: str | Path | None = None,
) -> tuple[Config, ModelInputs, TrainState]:
    """Loads a finished run for ranking.

    Args:
      workdir: folder of the run.
      history: what the model uses of the tables: "all" rows, or those of the splits it was trained on ("train").
      dataset: tables to serve in place of those of the training. Users and items are matched by id; what the training
        fitted is applied.
      data_path: current folder of the tables of the training; None = as recorded.
      cache: current folder of cached text embeddings; None = that of the training.

    Returns:
      The config, tables and graph, and the state of the selected step.

    Raises:
      ValueError: `history` is neither, or "train" with other tables, which have no split.
      TablesChangedError: the tables differ from those of the training.
      NoFolderError: the folder of the tables does not exist.
      CacheError: text must be encoded, and the cache cannot be created.
      CheckpointError: the selected checkpoint is damaged; no other one is used instead.
      NotApplicableError: the tables lack what a baseline reads.
      FileNotFoundError: workdir holds no finished run.
    """
    workdir = Path(workdir)
    if history not in HISTORIES:
        raise ValueError(f"history is {history!r}; it must be one of {HISTORIES}")
    if history == "train":
        if dataset is not None:
            raise ValueError("history is 'train', and other tables have no training split; it must be 'all'")
        return load_measured(workdir, "served", data_path=data_path, cache=cache)
    config, checkpoints, step = _chosen(workdir, "served")
    config = _placed(config, workdir, data_path, cache)
    fitted = read_fitted(workdir / FITTED)
    if config.encodes_text:
        open_cache(config.text.cache)  # fails here rather than after the tables are read
    if dataset is None:
        dataset = training_tables(config, workdir)
    else:
        dataset = describe(_above_min_value(dataset, config.data.min_value), config.text.attributes)
    inputs = serving_inputs(config, dataset, fitted)
    for what, count in inputs.unknown.items():
        LOG.warning("%d %s", count, what)
    if checkpoints is None:
        return config, inputs, fitted_state(config, inputs, read_results(workdir)["settings"])
    state = restore_parameters(checkpoints, step, state_like(config, inputs), fitted, dataset)
    inputs = with_finetuned_text(config, inputs, state)
    return config, with_late_fusion(inputs, selection_of(read_results(workdir))), state


@computes
def load_measured(
    workdir: str | Path, model: str, *, data_path: str | Path | None = None, cache: str | Path | None = None
) -> tuple[Config, Prepared, TrainState]:
    """Loads a model of a finished run with the splits it was trained on, as it was evaluated.

    Args:
      workdir: folder of the run.
      model: "valid": that of step selection, which the validation metrics are of; "test": that which the test metrics
        are of; "served": that which ranks.
      data_path: as of `load`.
      cache: as of `load`.

    Returns:
      The config, the prepared tables and graph, and the state of the selected step.

    Raises:
      TablesChangedError, NoFolderError, CacheError, CheckpointError, FileNotFoundError: as `load`.
    """
    workdir = Path(workdir)
    config, checkpoints, step = _chosen(workdir, model)
    config = _placed(config, workdir, data_path, cache)
    if config.encodes_text:
        open_cache(config.text.cache)
    dataset = training_tables(config, workdir)
    data_split, splits = split(dataset, config.split), seen_splits(config.train.refit, model)
    prepared = prepare(config, dataset, data_split, splits, stored_initial(workdir))
    if checkpoints is None:
        return config, prepared, fitted_state(config, prepared, read_results(workdir)["settings"])
    state, _ = checkpoints.restore(step, like=state_like(config, prepared))
    prepared = with_finetuned_text(config, prepared, state)
    return config, with_late_fusion(prepared, selection_of(read_results(workdir))), state


def read_served_tables(workdir: str | Path, folder: str | Path) -> Dataset:
    """Reads tables to serve in place of those of the training, in the format of `docs/tables.md`.

    Args:
      workdir: folder of the run, whose settings of repair, `min_value`, delimiter and encoding hold; `k_core` does
        not, so that users and items with few interactions are served.
      folder: of the tables.

    Raises:
      DataError, NoFolderError: as `read_dataset`.
      FileNotFoundError: workdir holds no finished run.
    """
    config, _, _ = read_finished(Path(workdir))
    data = dataclasses.replace(config.data, name="tables", path=str(folder), k_core=1)
    return read_dataset(dataclasses.replace(config, data=data))


def restore_parameters(
    checkpoints: Checkpoints, step: int, like: TrainState, fitted: Fitted, dataset: Dataset
) -> TrainState:
    """Restores the parameters of a checkpoint for the nodes of any tables.

    Args:
      checkpoints: of the training.
      step: of the checkpoint.
      like: an initial state for the tables.
      fitted: of the training, with the ids of the nodes that were trained.
      dataset: the tables.

    Returns:
      `like` with the trained parameters and no state of the optimizer. Rows of ID embeddings belong to ids; they are
      zero for nodes that were not trained.

    Raises:
      CheckpointError: the checkpoint is damaged, or of another model.
    """
    params = trained_parameters(checkpoints.arrays(step), like.params, fitted, dataset)
    return dataclasses.replace(like, step=np.int32(step), params=params, opt_state=(), encoder_snapshot=())


def training_tables(config: Config, workdir: Path) -> Dataset:
    """Reads the tables of the training, and checks that they are these.

    Args:
      config: settings of the run.
      workdir: folder of the run.

    Raises:
      TablesChangedError: they are others.
      DataError, NoFolderError: as `read_dataset`.
    """
    dataset = read_dataset(config)
    check_tables(digest(dataset), workdir, contents(dataset))
    return dataset


def _above_min_value(dataset: Dataset, min_value: float | None) -> Dataset:
    """Drops the interactions below data.min_value, as readers do; rows without a value stay."""
    if min_value is None or "value" not in dataset.interactions.column_names:
        return dataset
    kept = pc.fill_null(pc.greater_equal(dataset.interactions["value"], min_value), True)
    return dataclasses.replace(dataset, interactions=dataset.interactions.filter(kept))


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


def model_digest(workdir: str | Path) -> str:
    """Returns the SHA-256 of the served checkpoint's manifest, or of a baseline's settings, which identifies the model.

    Args:
      workdir: folder of the run.
    """
    config, checkpoints, step = _chosen(Path(workdir), "served")
    if checkpoints is None:
        return settings_digest(config, read_results(Path(workdir))["settings"])
    return checkpoints.digest(step)


def _chosen(workdir: Path, model: str) -> tuple[Config, Checkpoints | None, int]:
    """Returns the config, and the checkpoints and the step of a model of a run; a baseline has no checkpoints."""
    config, step, selected = read_finished(workdir)
    if not config.model.is_trained:
        return config, None, step
    phase = phase_of(config.train.refit, selected, model)
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


def as_pairs(pairs: Any) -> tuple[list[str], list[str]]:
    """Converts pairs of ids to two lists of ids.

    Args:
      pairs: a list of (user id, item id); or a tuple of two columns, as for `as_texts`; or a mapping, data frame or
        Arrow table with the columns user_id and item_id.

    Returns:
      User ids and item ids, of one length.

    Raises:
      ValueError: it is none of these, or the columns differ in length.
    """
    if not isinstance(pairs, tuple | list):
        try:
            pairs = pairs["user_id"], pairs["item_id"]
        except (KeyError, TypeError, IndexError) as error:
            raise ValueError(
                f"pairs is of type {type(pairs).__name__}, without the columns user_id and item_id; give a list of "
                "(user id, item id), or a tuple of two columns"
            ) from error
    elif isinstance(pairs, list):
        if wrong := [pair for pair in pairs if not isinstance(pair, tuple | list) or len(pair) != 2]:
            raise ValueError(f"pairs has {wrong[0]!r:.80}; each must be (user id, item id)")
        pairs = tuple(zip(*pairs, strict=True)) or ((), ())
    if len(pairs) != 2:
        raise ValueError(f"pairs is a tuple of {len(pairs)}; it must be two columns, user ids and item ids")
    users, items = as_texts(pairs[0], "users"), as_texts(pairs[1], "items")
    if len(users) != len(items):
        raise ValueError(f"pairs has {len(users)} users and {len(items)} items; it must have as many of both")
    return users, items


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
    return find_rows(dataset, "user", list(dict.fromkeys(as_texts(ids))))


def find_rows(dataset: Dataset, side: Side, ids: Sequence[str]) -> Int64[np.ndarray, "B"]:
    """Looks up rows of users or items by id.

    Args:
      dataset: tables.
      side: "user" or "item".
      ids: B ids.

    Returns:
      The row of each id.

    Raises:
      ValueError: an id is unknown (names it).
    """
    table = dataset.users if side == "user" else dataset.items
    column = table.column(f"{side}_id")
    if len(ids) <= FEW:  # reading the column for each takes less than making a hash table of it
        rows = np.array([pc.index(column, given).as_py() for given in ids], np.int64)
    else:
        found = pc.index_in(pa.array(ids, pa.string()), value_set=column.combine_chunks())
        rows = pc.fill_null(found, -1).to_numpy().astype(np.int64)
    if (rows < 0).any():
        unknown, first = int((rows < 0).sum()), ids[int(np.argmax(rows < 0))]
        raise ValueError(f"{unknown} unknown {side} ids, first {first!r}; {dataset.name} has {table.num_rows} {side}s")
    return rows


def candidate_items(dataset: Dataset, items: Any = None, where: str | None = None) -> Int64[np.ndarray, "C"] | None:
    """Finds the items that are candidates.

    Args:
      dataset: tables.
      items: item ids, as for `as_texts`; None = all items.
      where: condition on columns of the items (`fused_rec.serving.item_conditions`); None = none.

    Returns:
      Rows of the items that are listed and match, ascending; None = all items.

    Raises:
      ValueError: an id is unknown, or the condition does not fit the items.
    """
    listed = None if items is None else np.unique(find_rows(dataset, "item", as_texts(items, "items")))
    if where is None:
        return listed
    matching = matching_rows(dataset.items, where)
    return matching if listed is None else np.intersect1d(listed, matching)


def candidate_filter(
    dataset: Dataset,
    rules: Sequence[Rule] = (),
    *,
    include_seen: bool = False,
    items: Int64[np.ndarray, "C"] | None = None,
    held: UserItemSets | None = None,
) -> CandidateFilter:
    """Compiles rules for these tables; by default the last rule refuses the user's interactions of all splits.

    Args:
      dataset: tables.
      rules: suitability rules.
      include_seen: do not add that last rule.
      items: rows of the candidates, as of `candidate_items`; None = all items.
      held: of `held_items`, if that was called before.

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
    held = held or held_items(dataset)
    return dataclasses.replace(apply(rules, dataset.users, dataset.items, held), items=items)


def held_items(dataset: Dataset) -> UserItemSets:
    """Returns the items that each user has interacted with, in any split."""
    return item_sets(column(dataset.interactions, "user"), column(dataset.interactions, "item"), dataset.n_users)


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
    progress: bool = True,
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
      progress: show a progress bar per chunk.

    Yields:
      The rankings of each chunk.
    """
    nothing = item_sets(np.zeros(0, np.int32), np.zeros(0, np.int32), dataset.n_users)
    # Of the last part too: a score may depend on the shape.
    batch = min(users_per_batch(dataset.n_items), max(1, -(-len(users) // len(select_devices(None)))))
    spec = RankingSpec(nothing, dataset.n_items, filter=candidates, batch_size=batch)
    n_parts = count_chunks(len(users))
    for part in range(first, n_parts):
        own = users[part * CHUNK_USERS : (part + 1) * CHUNK_USERS]
        label = f"rank, part {part + 1} of {n_parts}" if progress else ""
        of_part = dataclasses.replace(spec, progress=label)
        ranking = rank(scorer, own, of_part, k)
        yield RankedChunk(ranking_table(dataset, own, ranking.items, ranking.scores), own, ranking)


def ranking_table(
    dataset: Dataset,
    users: Int64[np.ndarray, "V"],
    items: Int32[np.ndarray, "V k"],
    scores: Float32[np.ndarray, "V k"],
) -> pa.Table:
    """Makes a table of rankings.

    Args:
      dataset: tables.
      users: user rows.
      items: ranked items of each user, -1 at empty ranks.
      scores: their scores.

    Returns:
      A row for each rank with an item, with the columns of `SCHEMA` and, where items have one, `name`.
    """
    row, rank = np.nonzero(items >= 0)
    of_item = pa.array(items[row, rank])
    columns = [
        dataset.users["user_id"].combine_chunks().take(pa.array(users[row])),
        pa.array(rank + 1, pa.int32()),
        dataset.items["item_id"].combine_chunks().take(of_item),
        pa.array(scores[row, rank], pa.float32()),
    ]
    table = pa.Table.from_arrays(columns, schema=SCHEMA)
    if "name" not in dataset.items.column_names:
        return table
    return table.append_column("name", dataset.items["name"].combine_chunks().take(of_item).cast(pa.string()))


def with_user_names(table: pa.Table, dataset: Dataset) -> pa.Table:
    """Adds the column `user_name` to rankings, where users have names."""
    if "name" not in dataset.users.column_names:
        return table
    rows = pc.index_in(table["user_id"], value_set=dataset.users["user_id"].combine_chunks()).combine_chunks()
    return table.append_column("user_name", dataset.users["name"].combine_chunks().take(rows).cast(pa.string()))
