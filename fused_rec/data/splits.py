"""Which interactions are held out, and what may be seen while they are.

`split` only ever chooses rows of `dataset.interactions`; `observe` then takes away everything else that tells of
the rows held out: reviews of those pairs, ties seen in acts on them, and whatever is dated too late.
Every draw orders rows by a hash of (seed, user, item), so a split depends on which pairs there are and on how
users and items are numbered, never on the order of the rows.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, Float32, Int32, Int64, UInt64

from fused_rec.config import SplitConfig
from fused_rec.data.dataset import Dataset, column

SECONDS_A_DAY = 86_400
SPLIT_NAMES = ("train", "valid", "test")
ACT_WORDS = 5  # a text of so many words, by one user at one time about several items, is one post and not chance
SHOWN = 3  # rows named where a time is missing


@dataclass(frozen=True)
class Split:
    """Rows of `dataset.interactions`, ascending; the three parts are disjoint and together all rows.

    valid_from, test_from: the first held-out instants in unix seconds, of a split by global time only.
    valid_candidates, test_candidates: the items to rank, ascending; None = the whole catalogue. Only a new_items
      split sets them, to the items whose interactions the part holds.
    """

    kind: str
    train: Int64[np.ndarray, "_"]
    valid: Int64[np.ndarray, "_"]
    test: Int64[np.ndarray, "_"]
    valid_from: int | None = None
    test_from: int | None = None
    valid_candidates: Int32[np.ndarray, "_"] | None = None
    test_candidates: Int32[np.ndarray, "_"] | None = None


@dataclass(frozen=True)
class Observed:
    """What may be seen.

    user, item: E distinct pairs, in the order of their rows.
    reviews: as in `Dataset`, fewer rows.
    ties: distinct (source, target, kind); when and over which item a tie was seen is no longer told.
    age: days by which each pair is older than the newest one; 0 for pairs without a time.
    """

    user: Int32[np.ndarray, "E"]
    item: Int32[np.ndarray, "E"]
    reviews: pa.Table
    ties: pa.Table
    age: Float32[np.ndarray, "E"]


def split(dataset: Dataset, config: SplitConfig) -> Split:
    """Divides the interactions; `config.valid` is always a fraction of what the test part leaves.

    time: the last interactions of all. The cut falls at the instant that comes nearest to the asked fraction, so
      that equal times stay together. Every row needs a timestamp.
    per_user: of a user's n interactions the last ceil(test * n), then the last ceil(valid * rest), but never the
      first one; so fractions near 0 leave one out. Order: time, then hash; the hash alone without a `timestamp`.
    random: drawn over all interactions.
    new_items, new_users: drawn over the items (users) that have interactions; all interactions of one go together.
    published: the `part` column; without a valid part, one is drawn from train, each user's last row of train last.

    Raises ValueError where the tables cannot be divided so or where a part comes out empty.
    """
    n_rows = dataset.interactions.num_rows
    valid_from = test_from = valid_candidates = test_candidates = None
    part = np.zeros(n_rows, np.int8)  # positions in PARTS
    hashes = _hash(config.seed, column(dataset.interactions, "user"), column(dataset.interactions, "item"))
    if config.kind == "time":
        times = _times(dataset, "time")
        test_from = _instant(times, config.test, "test")
        valid_from = _instant(times[times < test_from], config.valid, "valid")
        part = (times >= valid_from).astype(np.int8) + (times >= test_from)
    elif config.kind == "per_user":
        part = _per_user(dataset, config, hashes)
    elif config.kind == "random":
        part = _drawn(hashes, config.test, config.valid)
    elif config.kind in ("new_items", "new_users"):
        of_row = column(dataset.interactions, "item" if config.kind == "new_items" else "user")
        nodes, of_row = np.unique(of_row, return_inverse=True)
        part_of_node = _drawn(_hash(config.seed, nodes, np.zeros_like(nodes)), config.test, config.valid)
        part = part_of_node[of_row]
        if config.kind == "new_items":
            valid_candidates, test_candidates = (nodes[part_of_node == p].astype(np.int32) for p in (1, 2))
    else:
        part = _predefined(dataset, config, hashes)
    train, valid, test = (np.flatnonzero(part == p) for p in range(3))
    for name, rows in zip(SPLIT_NAMES, (train, valid, test), strict=True):
        if not len(rows):
            raise ValueError(
                f"split.kind {config.kind} leaves the {name} part without interactions: split.test is {config.test} "
                f"and split.valid {config.valid} of {n_rows} interactions; change the fractions or use more data"
            )
    return Split(config.kind, train, valid, test, valid_from, test_from, valid_candidates, test_candidates)


def observe(dataset: Dataset, split: Split, splits: tuple[str, ...] = ("train",)) -> Observed:
    """What may be seen when `parts` are known and the rest is held out; splits: train, then valid, then test.

    A review or tie is seen unless it tells of something held out:
    - a held-out pair: a review of it; a tie whose `item` was held by its source or by its target (who is retweeted
      has posted), or a sibling of such a row: a review of the same user, time and text of at least 5 words, a tie of
      the same source, target, kind and time, because a post that names several items tells of them all;
    - new_items: anything said about a held-out item, by whomever; its text in `dataset.items` stays known;
    - new_users: anything a held-out user said, or did to an item; their ties without `item` stay known;
    - time: anything dated at or after the first held-out instant.

    Raises ValueError for other parts and, under a time split, for reviews or ties without a timestamp: they cannot
    be shown to come before the cut.
    """
    if splits not in (SPLIT_NAMES[:1], SPLIT_NAMES[:2], SPLIT_NAMES):
        raise ValueError(f"parts is {splits!r}; it must be ('train',), ('train', 'valid') or all of {SPLIT_NAMES}")
    rows = np.sort(np.concatenate([getattr(split, name) for name in splits]))
    user, item = column(dataset.interactions, "user"), column(dataset.interactions, "item")
    hidden = _hidden(dataset, split, splits)
    reviews = dataset.reviews.filter(pa.array(_review_is_seen(dataset, hidden)))
    ties = dataset.ties.filter(pa.array(_tie_is_seen(dataset, hidden))).select(["source", "target", "kind"])
    age = _age(dataset.interactions.take(rows))
    return Observed(user[rows], item[rows], reviews, ties.take(_first_rows(ties)), age)


def _age(interactions: pa.Table) -> Float32[np.ndarray, "E"]:
    if "timestamp" not in interactions.column_names or interactions.column("timestamp").null_count == len(interactions):
        return np.zeros(len(interactions), np.float32)
    times = interactions.column("timestamp")
    newest = int(times.drop_null().to_numpy().max())
    return ((newest - times.fill_null(newest).to_numpy()) / SECONDS_A_DAY).astype(np.float32)


def _hash(seed: int, user: Int32[np.ndarray, "E"], item: Int32[np.ndarray, "E"]) -> UInt64[np.ndarray, "E"]:
    """One to one in (user, item) for a seed, so no two rows tie: SplitMix64's finaliser (Steele, Lea & Flood 2014)."""

    def mix(z: np.ndarray) -> np.ndarray:
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))

    key = mix(np.array([seed % 2**64], np.uint64) + np.uint64(0x9E3779B97F4A7C15))
    return mix(mix((user.astype(np.uint64) << np.uint64(32)) | item.astype(np.uint64)) ^ key)


def _drawn(hashes: UInt64[np.ndarray, "E"], test: float, valid: float) -> np.ndarray:
    n_test = round(test * len(hashes))
    n_valid = round(valid * (len(hashes) - n_test))
    part = np.zeros(len(hashes), np.int8)
    order = np.argsort(hashes)
    part[order[:n_test]] = 2
    part[order[n_test : n_test + n_valid]] = 1
    return part


def _times(dataset: Dataset, kind: str) -> Int64[np.ndarray, "_"]:
    table = dataset.interactions
    if "timestamp" not in table.column_names:
        raise ValueError(f"split.kind {kind} needs interactions with a timestamp column; choose random or per_user")
    missing = table.column("timestamp").null_count
    if missing:
        raise ValueError(
            f"split.kind {kind} needs a timestamp on every interaction, and {missing} of {table.num_rows} have none; "
            f"fill them in, remove those rows, or choose random: {_without_time(dataset, 'interactions')}"
        )
    return column(table, "timestamp").astype(np.int64)


def _without_time(dataset: Dataset, what: str) -> str:
    """The first rows of a table that have no time, by their ids."""
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
    instants, starts = np.unique(np.sort(times), return_index=True)
    if len(instants) < 2:
        raise ValueError(
            f"split.kind time cannot place the {name} part: the {len(times)} interactions before it share "
            f"{len(instants)} instant(s) and at least 2 are needed; lower split.test or choose random"
        )
    nearest = np.argmin(np.abs(starts[1:] - (1 - fraction) * len(times)))
    return int(instants[1 + nearest])


def _per_user(dataset: Dataset, config: SplitConfig, hashes: UInt64[np.ndarray, "E"]) -> np.ndarray:
    user = column(dataset.interactions, "user")
    timed = "timestamp" in dataset.interactions.column_names
    times = _times(dataset, "per_user") if timed else np.zeros(len(user), np.int64)
    order = np.lexsort((hashes, times, user))
    count = np.bincount(user, minlength=dataset.n_users)
    # 1e-9: 0.07 * 100 is 7.000000000000001 in binary and must not become 8
    n_test = np.minimum(np.ceil(config.test * count - 1e-9), np.maximum(count - 1, 0))
    n_valid = np.minimum(np.ceil(config.valid * (count - n_test) - 1e-9), np.maximum(count - n_test - 1, 0))
    ordered = user[order]
    from_end = np.cumsum(count)[ordered] - np.arange(len(user))  # 1 for a user's last row
    part = np.empty(len(user), np.int8)
    part[order] = (from_end <= (n_test + n_valid)[ordered]).astype(np.int8) + (from_end <= n_test[ordered])
    return part


def _predefined(dataset: Dataset, config: SplitConfig, hashes: UInt64[np.ndarray, "E"]) -> np.ndarray:
    table = dataset.interactions
    if "split" not in table.column_names:
        raise ValueError(f"split.kind published needs a split column, and {dataset.name} has none; choose another kind")
    part = np.array(
        [SPLIT_NAMES.index(p) if p in SPLIT_NAMES else -1 for p in table.column("split").to_pylist()], np.int8
    )
    if (part < 0).any():
        row = int(np.flatnonzero(part < 0)[0])
        raise ValueError(
            f"{(part < 0).sum()} interactions name no known split, first row {row} with "
            f"{table.column('split')[row].as_py()!r}; write one of {SPLIT_NAMES}"
        )
    if not (part == 2).any():
        raise ValueError(f"the predefined split of {dataset.name} has no test part; choose another split.kind")
    if not (part == 1).any():
        train = np.flatnonzero(part == 0)
        user = column(table, "user")[train]
        order = np.lexsort((hashes[train], user))
        is_last = np.ones(len(order), bool)
        is_last[:-1] = user[order][1:] != user[order][:-1]
        kept = np.empty(len(order), bool)
        kept[order] = is_last
        part[train[np.lexsort((hashes[train], kept))[: round(config.valid * len(train))]]] = 1
    return part


@dataclass(frozen=True)
class _Hidden:
    pairs: np.ndarray  # sorted codes user * I + item
    users: np.ndarray  # bool[U]
    items: np.ndarray  # bool[I]
    cut: int | None

    def leaks(self, user: np.ndarray, item: np.ndarray) -> Bool[np.ndarray, "_"]:
        """Whether (user, item) tells of something hidden; item -1 = none."""
        is_pair = np.isin(user.astype(np.int64) * len(self.items) + item, self.pairs)
        return (item >= 0) & (is_pair | self.users[user] | self.items[item])


def _hidden(dataset: Dataset, split: Split, splits: tuple[str, ...]) -> _Hidden:
    rows = np.concatenate(
        [np.empty(0, np.int64), *(getattr(split, name) for name in SPLIT_NAMES if name not in splits)]
    )
    user, item = (column(dataset.interactions, name)[rows] for name in ("user", "item"))
    users, items = np.zeros(dataset.n_users, bool), np.zeros(dataset.n_items, bool)
    users[user] = split.kind == "new_users"
    items[item] = split.kind == "new_items"
    cut = (split.valid_from, split.test_from, None)[len(splits) - 1]
    return _Hidden(np.unique(user.astype(np.int64) * dataset.n_items + item), users, items, cut)


def _late(dataset: Dataset, what: str, cut: int | None) -> Bool[np.ndarray, "_"]:
    table = getattr(dataset, what)
    if cut is None or not table.num_rows:
        return np.zeros(table.num_rows, bool)
    missing = table.column("timestamp").null_count if "timestamp" in table.column_names else table.num_rows
    if missing:
        raise ValueError(
            f"{missing} of {table.num_rows} {what} have no timestamp, so a time split cannot tell whether they come "
            f"before {cut}; give each a time (0 says that it stood from the start) or choose another split.kind: "
            f"{_without_time(dataset, what)}"
        )
    return column(table, "timestamp") >= cut


def _review_is_seen(dataset: Dataset, hidden: _Hidden) -> Bool[np.ndarray, "_"]:
    reviews = dataset.reviews
    leaking = hidden.leaks(column(reviews, "user"), column(reviews, "item"))
    acts = _groups(reviews, ("user", "timestamp", "text"))
    words = [len((text or "").split()) for text in reviews.column("text").filter(pa.array(leaking)).to_pylist()]
    leaking |= np.isin(acts, acts[leaking][np.array(words, np.int64) >= ACT_WORDS])
    return ~leaking & ~_late(dataset, "reviews", hidden.cut)


def _tie_is_seen(dataset: Dataset, hidden: _Hidden) -> Bool[np.ndarray, "_"]:
    ties = dataset.ties
    leaking = np.zeros(ties.num_rows, bool)
    if "item" in ties.column_names:
        item = pc.fill_null(ties.column("item"), -1).to_numpy()
        leaking = hidden.leaks(column(ties, "source"), item) | hidden.leaks(column(ties, "target"), item)
        acts = _groups(ties, ("source", "target", "kind", "timestamp"))
        leaking |= np.isin(acts, acts[leaking])
    return ~leaking & ~_late(dataset, "ties", hidden.cut)


def _groups(table: pa.Table, names: tuple[str, ...]) -> Int64[np.ndarray, "_"]:
    """A number for each row, equal where the named columns (those the table has) are equal, null equal to null."""
    group = np.zeros(table.num_rows, np.int64)
    for name in names:
        if name in table.column_names:
            values = table.column(name).combine_chunks().dictionary_encode(null_encoding="encode")
            codes = values.indices.to_numpy(zero_copy_only=False).astype(np.int64)
            group = np.unique(group * (codes.max(initial=0) + 1) + codes, return_inverse=True)[1]
    return group


def _first_rows(table: pa.Table) -> Int64[np.ndarray, "_"]:
    return np.sort(np.unique(_groups(table, tuple(table.column_names)), return_index=True)[1])
