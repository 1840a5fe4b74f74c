"""Last.fm listens, tags and friends of HetRec 2011 (Cantador, Brusilovsky, Kuflik), raw and in two published splits.

All three readers take the folder of the raw `*.dat` files, with `sociallgn_split/` and `lightgcn_split/` inside it.
Ids are the raw ones. A tag assignment is one review, dated by day; 1,538 of them name unknown artists and 4 have a
date before 1970; both are counted. Tags reveal a listen, so `splits.observe` removes those of held-out pairs.
"""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa

from fused_rec.data.dataset import DataError, Dataset, Problem
from fused_rec.data.io.arrow import pc
from fused_rec.data.io.files import integers, read_delimited, read_lines
from fused_rec.data.io.validate import Tables, assemble

AUTO_REPAIR = ("bad time", "unknown review", "unknown id")


def lastfm(path: Path, repair: bool) -> Dataset:
    """Reads the raw data: 1,892 users, 17,632 artists, 92,834 listens.

    Args:
      path: folder of the raw files.
      repair: as in `fused_rec.data.io.tables.read_tables`.

    Returns:
      The dataset; `value` is the number of plays, and the artist's name is `name` and `text` of an item.

    Raises:
      DataError: lists all faults.
    """
    friends = read_delimited(path / "user_friends.dat", needed=("userID", "friendID"))
    friends = pa.table({"source_id": friends["userID"], "target_id": friends["friendID"]})
    tables = Tables(_listens(path), items=_artists(path), reviews=_tags(path), ties=_as_friends(friends))
    return assemble("lastfm", tables, repair=repair, auto_repair=AUTO_REPAIR)


def lastfm_sociallgn(path: Path, repair: bool) -> Dataset:
    """Reads the SocialLGN split: 74,267 training and 18,567 test pairs of all 1,892 users and 17,632 artists.

    Args:
      path: folder of the raw files and `sociallgn_split/`.
      repair: as in `fused_rec.data.io.tables.read_tables`.

    Returns:
      The dataset with the predefined split; users and items are in the published order.

    Raises:
      DataError: lists all faults.
    """
    split = path / "sociallgn_split"
    users, items = _reindexed(split / "userReindex.json"), _reindexed(split / "itemReindex.json")
    parts = {}
    for part in ("train", "test"):
        file = split / f"{part}_set.txt"
        rows = read_delimited(file, ",", needed=("user", "item"))
        ids = {"user_id": _pick(users, rows, "user", file), "item_id": _pick(items, rows, "item", file)}
        parts[part] = pa.table(ids)
    file = split / "trust.txt"
    trust = read_delimited(file, ",", needed=("user", "friend"))
    ends = {"source_id": _pick(users, trust, "user", file), "target_id": _pick(users, trust, "friend", file)}
    return _published("lastfm_sociallgn", path, users, items, parts, pa.table(ends), repair)


def lastfm_lightgcn(path: Path, repair: bool) -> Dataset:
    """Reads the LightGCN-PyTorch split: 42,135 training and 10,533 test pairs, 1,892 users and 4,489 artists.

    The artists are those of 3 to 100 listeners. The split numbers users and artists from 1 in the order of their raw
    ids, from which the raw ids are restored.

    Args:
      path: folder of the raw files and `lightgcn_split/`.
      repair: as in `fused_rec.data.io.tables.read_tables`.

    Returns:
      The dataset with the predefined split.

    Raises:
      DataError: lists all faults, including pairs that are no listen of the raw files.
    """
    split = path / "lightgcn_split"
    raw = _listens(path)
    raw_users, raw_items = (_identifiers(raw, name, path / "user_artists.dat") for name in ("user_id", "item_id"))
    artists, listeners = np.unique(raw_items, return_counts=True)
    users = pa.array(np.unique(raw_users)).cast(pa.string())
    items = pa.array(artists[(listeners >= 3) & (listeners <= 100)]).cast(pa.string())
    parts = {}
    for part, file in (("train", split / "data1.txt"), ("test", split / "test1.txt")):
        rows = read_delimited(file, names=("user", "item", "value"))
        ids = {"user_id": _pick(users, rows, "user", file, 1), "item_id": _pick(items, rows, "item", file, 1)}
        pairs = [np.asarray(column.cast(pa.int64())) for column in ids.values()]
        known = np.isin(pairs[0] << 32 | pairs[1], raw_users << 32 | raw_items)
        if not known.all():
            message = f"{int((~known).sum()):,} pairs are no listen of user_artists.dat"
            raise DataError([Problem(file.name, None, message, "take the raw files and the split as published")])
        parts[part] = pa.table({**ids, "value": rows["value"]})
    file = split / "trustnetwork.txt"
    trust = read_delimited(file, names=("source", "target"))
    ends = {"source_id": _pick(users, trust, "source", file, 1), "target_id": _pick(users, trust, "target", file, 1)}
    return _published("lastfm_lightgcn", path, users, items, parts, pa.table(ends), repair)


def _published(
    name: str,
    path: Path,
    users: pa.Array,
    items: pa.Array,
    parts: dict[str, pa.Table],
    ties: pa.Table,
    repair: bool,
) -> Dataset:
    pairs = [rows.append_column("split", pa.array([part] * len(rows))) for part, rows in parts.items()]
    artists = _artists(path)
    names = artists["name"].take(pc.index_in(items, value_set=artists["item_id"]))
    tables = Tables(
        pa.concat_tables(pairs),
        users=pa.table({"user_id": users}),
        items=pa.table({"item_id": items, "name": names, "text": names}),
        reviews=_tags(path),
        ties=_as_friends(ties),
    )
    return assemble(name, tables, repair=repair, auto_repair=AUTO_REPAIR)


def _listens(path: Path) -> pa.Table:
    rows = read_delimited(path / "user_artists.dat", needed=("userID", "artistID", "weight"))
    return pa.table({"user_id": rows["userID"], "item_id": rows["artistID"], "value": rows["weight"]})


def _artists(path: Path) -> pa.Table:
    rows = read_delimited(path / "artists.dat", needed=("id", "name"))
    return pa.table({"item_id": rows["id"], "name": rows["name"], "text": rows["name"]})


def _tags(path: Path) -> pa.Table:
    tags = read_delimited(path / "tags.dat", encoding="latin-1", needed=("tagID", "tagValue"))
    date = ("year", "month", "day")
    rows = read_delimited(path / "user_taggedartists.dat", needed=("userID", "artistID", "tagID", *date))
    month, day = (pc.utf8_lpad(rows[column], 2, "0") for column in ("month", "day"))
    return pa.table(
        {
            "user_id": rows["userID"],
            "item_id": rows["artistID"],
            "text": tags["tagValue"].take(pc.index_in(rows["tagID"], value_set=tags["tagID"])),
            "timestamp": pc.binary_join_element_wise(rows["year"], month, day, "-"),
        }
    )


def _as_friends(ties: pa.Table) -> pa.Table:
    return ties.append_column("kind", pa.array(["friend"] * len(ties), pa.string()))


def _reindexed(file: Path) -> pa.Array:
    """Returns the raw ids in the order of their positions in a JSON file; raises DataError for invalid positions."""
    try:
        positions = json.loads("".join(read_lines(file)))
        ids = sorted(positions, key=positions.__getitem__)
        if [positions[name] for name in ids] != list(range(len(ids))) or not all(map(str.isascii, ids)):
            raise ValueError("its positions do not count up from 0")
    except DataError:
        raise
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        fault = Problem(file.name, None, f"is no JSON object from id to position: {error}", "download it again")
        raise DataError([fault]) from error
    return pa.array(ids, pa.string())


def _pick(ids: pa.Array, rows: pa.Table, name: str, file: Path, first: int = 0) -> pa.ChunkedArray:
    """Returns the ids at the positions in a column, counted from `first`; files with positions from 0 have a header."""
    positions = integers(rows, name, file, header=first == 0) - first
    if bad := np.flatnonzero((positions < 0) | (positions >= len(ids)))[:1].tolist():
        found = f"{name} is {positions[bad[0]] + first}, and there are {first} to {len(ids) - 1 + first}"
        remedy = "take the raw files and the split as published"
        raise DataError([Problem(file.name, bad[0] + 1 + (first == 0), found, remedy)])
    return pa.chunked_array([ids.take(pa.array(positions))])


def _identifiers(rows: pa.Table, name: str, file: Path) -> np.ndarray:
    """Returns ids as integers below 2^31, so that a pair fits into 64 bits."""
    ids = integers(rows, name, file)
    if len(ids) and not 0 <= ids.min() <= ids.max() < 2**31:
        found = f"{name} reaches from {ids.min()} to {ids.max()}"
        raise DataError([Problem(file.name, None, found, "take the raw file as published, its ids below 2^31")])
    return ids
