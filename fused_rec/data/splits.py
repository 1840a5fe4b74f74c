"""Train, validation and test splits, and the data that is observable under each.

`split` assigns rows of `dataset.interactions` to splits. `observe` then removes what leaks the held-out rows: reviews
of those pairs, social edges observed in acts on them, and records dated after the cut. Random choices order rows by a
hash of (seed, user, item), so a split depends on the set of pairs and on the user and item indices, not on row order.

`split.history` and `split.new_item_share` drop rows of the training split, to measure models on sparse data. Dropped
rows are held out from every model, with their reviews and social edges, but they are no truth of an evaluation and are
not ranked: the user has them, so an item of a dropped row is never a false recommendation.
"""

from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, Float32, Int8, Int32, Int64, UInt64

from fused_rec.config import SplitConfig
from fused_rec.data.dataset import Dataset, column

SECONDS_A_DAY = 86_400
SPLIT_NAMES = ("train", "valid", "test")
DROPPED = 3  # split code of dropped rows, beside indices into SPLIT_NAMES
ACT_WORDS = 5  # the same text of at least 5 words, by one user at one time about several items, is one post
SHOWN = 3  # rows listed in an error about missing timestamps


@dataclass(frozen=True)
class Split:
    """Partition of the rows of `dataset.interactions` into train, validation, test and dropped rows.

    Attributes:
      kind: `SplitConfig.kind` it was made with.
      train, valid, test: row indices, ascending; with `dropped` disjoint, and together all rows.
      valid_from, test_from: first held-out time of each split in unix seconds; only of kind "time".
      valid_candidates, test_candidates: item indices to rank, ascending; None = all items. Only kind "new_items" sets
        them, to the items of the split's interactions.
      dropped: row indices, ascending, of training interactions that no model sees and that are not ranked.
      new_items: item indices, ascending, of `SplitConfig.new_item_share`: all their training interactions are dropped.
    """

    kind: str
    train: Int64[np.ndarray, "_"]
    valid: Int64[np.ndarray, "_"]
    test: Int64[np.ndarray, "_"]
    valid_from: int | None = None
    test_from: int | None = None
    valid_candidates: Int32[np.ndarray, "_"] | None = None
    test_candidates: Int32[np.ndarray, "_"] | None = None
    dropped: Int64[np.ndarray, "_"] = field(default_factory=lambda: np.empty(0, np.int64))
    new_items: Int32[np.ndarray, "_"] = field(default_factory=lambda: np.empty(0, np.int32))

    def before(self, split: str) -> Int64[np.ndarray, "_"]:
        """Returns the rows that users had before a held-out split, dropped ones included; their items are not ranked.

        Args:
          split: "valid" or "test".
        """
        return np.concatenate([self.train, self.dropped, *([] if split == "valid" else [self.valid])])


@dataclass(frozen=True)
class Observed:
    """Data that a model may use under a split.

    Attributes:
      user, item: E distinct pairs, in the order of their rows.
      reviews: rows of `Dataset.reviews` that leak nothing held out.
      ties: distinct (source, target, kind) of the social edges that leak nothing held out, without time and item.
      age: days by which each pair is older than the newest one; 0 for pairs without a timestamp.
    """

    user: Int32[np.ndarray, "E"]
    item: Int32[np.ndarray, "E"]
    reviews: pa.Table
    ties: pa.Table
    age: Float32[np.ndarray, "E"]


def split(dataset: Dataset, config: SplitConfig) -> Split:
    """Splits the interactions into train, validation and test by `config.kind`.

    - time: the latest interactions are held out. The cut is the time nearest to the requested fraction, so equal times
      stay in one split. Every row needs a timestamp.
    - per_user: the last ceil(test * n) of a user's n interactions, then the last ceil(valid * rest), never the first
      one. Rows are ordered by time, then hash; by hash alone without `timestamp`.
    - per_user_random: the same counts, by hash alone. leave_one_out: one and one, in the order of per_user.
    - random: uniform over all interactions.
    - new_items, new_users: uniform over the items (users) with interactions; all interactions of one go together.
    - predefined: the `split` column; without a validation split, one is sampled from train, and each user keeps a row.

    Then training rows are dropped: those of `config.new_item_share` of the items, drawn by hash, and of each user all
    but the newest `config.history` of the rest; rows without a timestamp count as the oldest, ties are ordered by hash.
    The rows of a shorter history are among those of a longer one, and the items of a smaller share among those of a
    larger one. Validation and test splits do not change.

    Args:
      dataset: data with at least three interactions.
      config: kind, seed, fractions and limits; `config.valid` is a fraction of the rows outside the test split.

    Returns:
      The splits and dropped rows, with cut times for "time" and candidate items for "new_items".

    Raises:
      ValueError: the tables lack what the kind needs, or a split is empty.
    """
    n_rows = dataset.interactions.num_rows
    valid_from = test_from = valid_candidates = test_candidates = None
    split_codes = np.zeros(n_rows, np.int8)  # indices into SPLIT_NAMES, or DROPPED
    hashes = _hash(config.seed, column(dataset.interactions, "user"), column(dataset.interactions, "item"))
    if config.kind == "time":
        times = _times(dataset, "time")
        test_from = _instant(times, config.test, "test")
        valid_from = _instant(times[times < test_from], config.valid, "valid")
        split_codes = (times >= valid_from).astype(np.int8) + (times >= test_from)
    elif config.kind in ("per_user", "per_user_random", "leave_one_out"):
        split_codes = _per_user(dataset, config, hashes)
    elif config.kind == "random":
        split_codes = _random(hashes, config.test, config.valid)
    elif config.kind in ("new_items", "new_users"):
        node_of_row = column(dataset.interactions, "item" if config.kind == "new_items" else "user")
        nodes, node_of_row = np.unique(node_of_row, return_inverse=True)
        node_codes = _random(_hash(config.seed, nodes, np.zeros_like(nodes)), config.test, config.valid)
        split_codes = node_codes[node_of_row]
        if config.kind == "new_items":
            valid_candidates, test_candidates = (nodes[node_codes == code].astype(np.int32) for code in (1, 2))
    else:
        split_codes = _predefined(dataset, config, hashes)
    new_items = _drop(dataset, config, hashes, split_codes)
    train, valid, test, dropped = (np.flatnonzero(split_codes == code) for code in (0, 1, 2, DROPPED))
    for name, rows in zip(SPLIT_NAMES, (train, valid, test), strict=True):
        if not len(rows):
            raise ValueError(
                f"split.kind {config.kind} leaves the {name} split without interactions: split.test is {config.test} "
                f"and split.valid {config.valid} of {n_rows} interactions; change the fractions or use more data"
            )
    cuts, candidates = (valid_from, test_from), (valid_candidates, test_candidates)
    return Split(config.kind, train, valid, test, *cuts, *candidates, dropped, new_items)


def observe(dataset: Dataset, split: Split, splits: tuple[str, ...] = ("train",)) -> Observed:
    """Selects the data that is observable when `splits` are known and the others are held out.

    A review or social edge is removed where it leaks held-out interactions:

    - any kind: a review of a held-out pair; an edge whose `item` forms a held-out pair with its source or its target (a
      retweeted user has posted about it); and rows of the same act, since a post that names several items leaks all of
      them: reviews of the same user, time and text (at least 5 words), edges of the same source, target, kind and time.
    - new_items: every review and act about a held-out item; its text in `dataset.items` is kept.
    - new_users: every review and act of a held-out user; their edges without `item` are kept.
    - time: every record dated at or after the first held-out time.

    Dropped pairs count as held out with any `splits`, and so does every review and act about `split.new_items`.

    Args:
      dataset: the data that was split.
      split: the result of `split` for it.
      splits: names of the known splits: ("train",), ("train", "valid") or all three.

    Returns:
      The pairs of the known splits, and the reviews and social edges that leak nothing.

    Raises:
      ValueError: `splits` is none of these, or, for kind "time", a review or edge has no timestamp, so that it cannot
        be shown to come before the cut.
    """
    if splits not in (SPLIT_NAMES[:1], SPLIT_NAMES[:2], SPLIT_NAMES):
        raise ValueError(f"splits is {splits!r}; it must be ('train',), ('train', 'valid') or all of {SPLIT_NAMES}")
    rows = np.sort(np.concatenate([getattr(split, name) for name in splits]))
    user, item = column(dataset.interactions, "user"), column(dataset.interactions, "item")
    held_out = _held_out(dataset, split, splits)
    reviews = dataset.reviews.filter(pa.array(_review_is_observed(dataset, held_out)))
    ties = dataset.ties.filter(pa.array(_tie_is_observed(dataset, held_out))).select(["source", "target", "kind"])
    age = _age(dataset.interactions.take(rows))
    return Observed(user[rows], item[rows], reviews, ties.take(_first_rows(ties)), age)


def observe_all(dataset: Dataset) -> Observed:
    """Returns everything the tables have, as a trained model is given it to rank; an evaluation uses `observe`."""
    user, item = column(dataset.interactions, "user"), column(dataset.interactions, "item")
    ties = dataset.ties.select(["source", "target", "kind"])
    return Observed(user, item, dataset.reviews, ties.take(_first_rows(ties)), _age(dataset.interactions))


def _age(interactions: pa.Table) -> Float32[np.ndarray, "E"]:
    """Computes the days by which each pair is older than the newest one, 0 without a timestamp."""
    if "timestamp" not in interactions.column_names or interactions.column("timestamp").null_count == len(interactions):
        return np.zeros(len(interactions), np.float32)
    times = interactions.column("timestamp")
    newest = int(times.drop_null().to_numpy().max())
    return ((newest - times.fill_null(newest).to_numpy()) / SECONDS_A_DAY).astype(np.float32)


def _hash(seed: int, user: Int32[np.ndarray, "E"], item: Int32[np.ndarray, "E"]) -> UInt64[np.ndarray, "E"]:
    """Hashes (user, item) injectively, so no two rows tie: SplitMix64 finalizer (Steele, Lea & Flood 2014)."""

    def mix(z: np.ndarray) -> np.ndarray:
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))

    key = mix(np.array([seed % 2**64], np.uint64) + np.uint64(0x9E3779B97F4A7C15))
    return mix(mix((user.astype(np.uint64) << np.uint64(32)) | item.astype(np.uint64)) ^ key)


def _random(hashes: UInt64[np.ndarray, "E"], test: float, valid: float) -> np.ndarray:
    """Assigns split codes in the order of the hashes: test first, then validation."""
    n_test = round(test * len(hashes))
    n_valid = round(valid * (len(hashes) - n_test))
    split_codes = np.zeros(len(hashes), np.int8)
    order = np.argsort(hashes)
    split_codes[order[:n_test]] = 2
    split_codes[order[n_test : n_test + n_valid]] = 1
    return split_codes


def _times(dataset: Dataset, kind: str) -> Int64[np.ndarray, "_"]:
    """Returns the timestamps of all interactions; raises ValueError where one is missing."""
    table = dataset.interactions
    if "timestamp" not in table.column_names:
        raise ValueError(f"split.kind {kind} needs interactions with a timestamp column; choose random or per_user")
    missing = table.column("timestamp").null_count
    if missing:
        raise ValueError(
            f"split.kind {kind} needs a timestamp on every interaction, and {missing} of {table.num_rows} have none; "
            f"fill them in, remove those rows, or choose random: {without_time(dataset, 'interactions')}"
        )
    return column(table, "timestamp").astype(np.int64)


def without_time(dataset: Dataset, what: str) -> str:
    """Names the first rows of a table without a timestamp by their ids."""
    table = getattr(dataset, what)
    ends = {"source": "user", "target": "user"} if what == "ties" else {"user": "user", "item": "item"}
    rows = table.take(np.flatnonzero(table["timestamp"].is_null())) if "timestamp" in table.column_names else table
    first = [
        " and ".join(
            f"{end}_id {getattr(dataset, f'{of}s')[f'{of}_id'][row[end]].as_py()!r}" for end, of in ends.items()
        )
        for row in rows.slice(0, SHOWN).to_pylist()
    ]
    return f"{what} of {'; '.join(first)}{' ...' if len(rows) > SHOWN else ''}"


def _instant(times: Int64[np.ndarray, "_"], fraction: float, name: str) -> int:
    """Finds the time from which nearest to `fraction` of the interactions are held out."""
    instants, starts = np.unique(np.sort(times), return_index=True)
    if len(instants) < 2:
        raise ValueError(
            f"split.kind time cannot place the {name} split: the {len(times)} interactions before it share "
            f"{len(instants)} instant(s) and at least 2 are needed; lower split.test or choose random"
        )
    nearest = np.argmin(np.abs(starts[1:] - (1 - fraction) * len(times)))
    return int(instants[1 + nearest])


def _per_user(dataset: Dataset, config: SplitConfig, hashes: UInt64[np.ndarray, "E"]) -> np.ndarray:
    """Assigns split codes by each user's order of interactions."""
    user = column(dataset.interactions, "user")
    timed = config.kind != "per_user_random" and "timestamp" in dataset.interactions.column_names
    times = _times(dataset, config.kind) if timed else np.zeros(len(user), np.int64)
    order = np.lexsort((hashes, times, user))
    count = np.bincount(user, minlength=dataset.n_users)
    n_test = np.minimum(_held_out_count(config, config.test, count), np.maximum(count - 1, 0))
    n_valid = np.minimum(_held_out_count(config, config.valid, count - n_test), np.maximum(count - n_test - 1, 0))
    ordered = user[order]
    from_end = np.cumsum(count)[ordered] - np.arange(len(user))  # 1 for a user's last row
    split_codes = np.empty(len(user), np.int8)
    split_codes[order] = (from_end <= (n_test + n_valid)[ordered]).astype(np.int8) + (from_end <= n_test[ordered])
    return split_codes


def _held_out_count(config: SplitConfig, fraction: float, count: np.ndarray) -> np.ndarray:
    """Counts the rows that a fraction of each user's rows holds out."""
    if config.kind == "leave_one_out":
        return np.ones_like(count)
    return np.ceil(fraction * count - 1e-9)  # .07 * 100 is 7.000000000000001 in binary and must not become 8


def _predefined(dataset: Dataset, config: SplitConfig, hashes: UInt64[np.ndarray, "E"]) -> np.ndarray:
    """Reads split codes from the `split` column and samples a validation split where it has none."""
    table = dataset.interactions
    if "split" not in table.column_names:
        raise ValueError(
            f"split.kind predefined needs a split column, and {dataset.name} has none; choose another kind"
        )
    split_codes = np.array(
        [SPLIT_NAMES.index(name) if name in SPLIT_NAMES else -1 for name in table.column("split").to_pylist()], np.int8
    )
    if (split_codes < 0).any():
        row = int(np.flatnonzero(split_codes < 0)[0])
        raise ValueError(
            f"{(split_codes < 0).sum()} interactions name no known split, first row {row} with "
            f"{table.column('split')[row].as_py()!r}; write one of {SPLIT_NAMES}"
        )
    if not (split_codes == 2).any():
        raise ValueError(f"the predefined split of {dataset.name} has no test rows; choose another split.kind")
    if not (split_codes == 1).any():
        train = np.flatnonzero(split_codes == 0)
        user = column(table, "user")[train]
        order = np.lexsort((hashes[train], user))
        is_last = np.ones(len(order), bool)
        is_last[:-1] = user[order][1:] != user[order][:-1]
        last_of_user = np.empty(len(order), bool)
        last_of_user[order] = is_last
        n_valid = round(config.valid * len(train))
        if n_valid > (~last_of_user).sum():
            raise ValueError(
                f"the predefined split of {dataset.name} has no validation rows, and {n_valid} of its {len(train)} "
                f"training rows (split.valid {config.valid}) cannot be drawn: {last_of_user.sum()} are the only one "
                "left of their user; name validation rows in the split column, or lower split.valid"
            )
        split_codes[train[np.lexsort((hashes[train], last_of_user))[:n_valid]]] = 1
    return split_codes


def _drop(
    dataset: Dataset, config: SplitConfig, hashes: UInt64[np.ndarray, "E"], split_codes: Int8[np.ndarray, "E"]
) -> Int32[np.ndarray, "_"]:
    """Drops training rows by `config.new_item_share` and `config.history`, in `split_codes`; returns the new items."""
    user, item = (column(dataset.interactions, name) for name in ("user", "item"))
    new_items = np.empty(0, np.int32)
    if config.new_item_share:
        items = np.unique(item[split_codes == 0])
        drawn = np.argsort(_hash(config.seed, np.zeros_like(items), items))
        new_items = np.sort(items[drawn[: round(config.new_item_share * len(items))]])
        split_codes[(split_codes == 0) & np.isin(item, new_items)] = DROPPED
    if config.history:
        rows = np.flatnonzero(split_codes == 0)
        times = np.zeros(len(rows), np.int64)
        if "timestamp" in dataset.interactions.column_names:
            oldest = np.iinfo(np.int64).min
            times = pc.fill_null(dataset.interactions.column("timestamp").take(rows), oldest).to_numpy()
        rows = rows[np.lexsort((hashes[rows], times, user[rows]))]
        count = np.bincount(user[rows], minlength=dataset.n_users)
        from_end = np.cumsum(count)[user[rows]] - np.arange(len(rows))  # 1 for a user's last row
        split_codes[rows[from_end > config.history]] = DROPPED
    return new_items


@dataclass(frozen=True)
class _HeldOut:
    """Held-out pairs, nodes and time."""

    pairs: np.ndarray  # sorted codes user * I + item
    users: np.ndarray  # bool[U]
    items: np.ndarray  # bool[I]
    cut: int | None

    def leaks(self, user: np.ndarray, item: np.ndarray) -> Bool[np.ndarray, "_"]:
        """Returns whether knowing (user, item) leaks held-out data; item -1 = none."""
        is_pair = np.isin(user.astype(np.int64) * len(self.items) + item, self.pairs)
        return (item >= 0) & (is_pair | self.users[user] | self.items[item])


def _held_out(dataset: Dataset, split: Split, splits: tuple[str, ...]) -> _HeldOut:
    """Collects what is held out when `splits` are known."""
    rows = np.concatenate(
        [np.empty(0, np.int64), *(getattr(split, name) for name in SPLIT_NAMES if name not in splits)]
    )
    user, item = (column(dataset.interactions, name) for name in ("user", "item"))
    users, items = np.zeros(dataset.n_users, bool), np.zeros(dataset.n_items, bool)
    users[user[rows]] = split.kind == "new_users"  # of dropped rows the user and the item are known
    items[item[rows]] = split.kind == "new_items"
    items[split.new_items] = True
    cut = (split.valid_from, split.test_from, None)[len(splits) - 1]
    rows = np.concatenate([rows, split.dropped])
    return _HeldOut(np.unique(user[rows].astype(np.int64) * dataset.n_items + item[rows]), users, items, cut)


def _late(dataset: Dataset, what: str, cut: int | None) -> Bool[np.ndarray, "_"]:
    """Returns which rows of a table are dated at or after the cut."""
    table = getattr(dataset, what)
    if cut is None or not table.num_rows:
        return np.zeros(table.num_rows, bool)
    missing = table.column("timestamp").null_count if "timestamp" in table.column_names else table.num_rows
    if missing:
        raise ValueError(
            f"{missing} of {table.num_rows} {what} have no timestamp, so a time split cannot place them before or "
            f"after {cut}; give each a time (0 = from the start) or choose another split.kind: "
            f"{without_time(dataset, what)}"
        )
    return column(table, "timestamp") >= cut


def _review_is_observed(dataset: Dataset, held_out: _HeldOut) -> Bool[np.ndarray, "_"]:
    """Returns which reviews leak nothing held out."""
    reviews = dataset.reviews
    leaking = held_out.leaks(column(reviews, "user"), column(reviews, "item"))
    acts = _groups(reviews, ("user", "timestamp", "text"))
    n_words = [len((text or "").split()) for text in reviews.column("text").filter(pa.array(leaking)).to_pylist()]
    leaking |= np.isin(acts, acts[leaking][np.array(n_words, np.int64) >= ACT_WORDS])
    return ~leaking & ~_late(dataset, "reviews", held_out.cut)


def _tie_is_observed(dataset: Dataset, held_out: _HeldOut) -> Bool[np.ndarray, "_"]:
    """Returns which social edges leak nothing held out."""
    ties = dataset.ties
    leaking = np.zeros(ties.num_rows, bool)
    if "item" in ties.column_names:
        item = pc.fill_null(ties.column("item"), -1).to_numpy()
        leaking = held_out.leaks(column(ties, "source"), item) | held_out.leaks(column(ties, "target"), item)
        acts = _groups(ties, ("source", "target", "kind", "timestamp"))
        leaking |= np.isin(acts, acts[leaking])
    return ~leaking & ~_late(dataset, "ties", held_out.cut)


def _groups(table: pa.Table, names: tuple[str, ...]) -> Int64[np.ndarray, "_"]:
    """Numbers rows so that equal values of the named columns (those present) give equal numbers, null equal to null."""
    group = np.zeros(table.num_rows, np.int64)
    for name in names:
        if name in table.column_names:
            values = table.column(name).combine_chunks().dictionary_encode(null_encoding="encode")
            codes = values.indices.to_numpy(zero_copy_only=False).astype(np.int64)
            group = np.unique(group * (codes.max(initial=0) + 1) + codes, return_inverse=True)[1]
    return group


def _first_rows(table: pa.Table) -> Int64[np.ndarray, "_"]:
    """Returns the index of the first of each set of equal rows, ascending."""
    return np.sort(np.unique(_groups(table, tuple(table.column_names)), return_index=True)[1])
