"""Last.fm listening, tags and friends of HetRec 2011 (Cantador, Brusilovsky, Kuflik), raw and in two published splits.

All three readers take the folder of the raw `*.dat` files, with `sociallgn_split/` and `lightgcn_split/` inside it.
Ids are the raw ones. A tag assignment is one review, dated by day; 1,538 name artists nothing else is known of and
4 are dated before 1970, which is counted. Tags are evidence of a listen: `splits.observe` takes those of held-out
pairs away.
"""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa

from fused_rec.data.arrow import pc
from fused_rec.data.dataset import DataError, Dataset, Problem
from fused_rec.data.files import read_delimited, read_lines
from fused_rec.data.validate import Tables, assemble

INHERENT = ("bad time", "unknown review", "unknown id", "idle user")


def lastfm(path: Path, repair: bool) -> Dataset:
    """1,892 users, 17,632 artists, 92,834 listens; value = plays. An item's name and text are the artist's name."""
    listens = read_delimited(path / "user_artists.dat").rename_columns(["user_id", "item_id", "value"])
    friends = read_delimited(path / "user_friends.dat").rename_columns(["source_id", "target_id"])
    tables = Tables(listens, items=_artists(path), reviews=_tags(path), ties=_as_friends(friends))
    return assemble("lastfm", tables, repair=repair, inherent=INHERENT)


def lastfm_sociallgn(path: Path, repair: bool) -> Dataset:
    """The SocialLGN split, 74,267 / 18,567: all 1,892 users and 17,632 artists, in the published order."""
    split = path / "sociallgn_split"
    users, items = _reindexed(split / "userReindex.json"), _reindexed(split / "itemReindex.json")
    parts = {}
    for part in ("train", "test"):
        rows = read_delimited(split / f"{part}_set.txt", ",")
        parts[part] = pa.table({"user_id": _pick(users, rows["user"]), "item_id": _pick(items, rows["item"])})
    trust = read_delimited(split / "trust.txt", ",")
    ties = pa.table({"source_id": _pick(users, trust["user"]), "target_id": _pick(users, trust["friend"])})
    return _published("lastfm_sociallgn", path, users, items, parts, ties, repair)


def lastfm_lightgcn(path: Path, repair: bool) -> Dataset:
    """The LightGCN-PyTorch split, 42,135 / 10,533: 1,892 users and the 4,489 artists of 3 to 100 listeners.

    The split numbers users and those artists from 1 in the order of their raw ids, which gives the raw ids back.
    Raises DataError where that does not lead to a listen of the raw files.
    """
    split = path / "lightgcn_split"
    listens = read_delimited(path / "user_artists.dat").rename_columns(["user_id", "item_id", "value"])
    raw_users = _integers(listens["user_id"])
    raw_items = _integers(listens["item_id"])
    artists, listeners = np.unique(raw_items, return_counts=True)
    users = pa.array(np.unique(raw_users)).cast(pa.string())
    items = pa.array(artists[(listeners >= 3) & (listeners <= 100)]).cast(pa.string())
    parts = {}
    for part, file in (("train", "data1.txt"), ("test", "test1.txt")):
        rows = read_delimited(split / file, names=("user", "item", "value"))
        ids = {"user_id": _pick(users, rows["user"], 1), "item_id": _pick(items, rows["item"], 1)}
        known = np.isin(_integers(ids["user_id"]) << 32 | _integers(ids["item_id"]), raw_users << 32 | raw_items)
        if not known.all():
            message = f"{int((~known).sum()):,} pairs are no listen of user_artists.dat"
            raise DataError([Problem(file, None, message, "take the raw files and the split as published")])
        parts[part] = pa.table({**ids, "value": rows["value"]})
    trust = read_delimited(split / "trustnetwork.txt", names=("source", "target"))
    ties = pa.table({"source_id": _pick(users, trust["source"], 1), "target_id": _pick(users, trust["target"], 1)})
    return _published("lastfm_lightgcn", path, users, items, parts, ties, repair)


def _published(
    name: str,
    path: Path,
    users: pa.Array,
    items: pa.Array,
    parts: dict[str, pa.Table],
    ties: pa.Table,
    repair: bool,
) -> Dataset:
    pairs = [rows.append_column("part", pa.array([part] * len(rows))) for part, rows in parts.items()]
    artists = _artists(path)
    names = artists["name"].take(pc.index_in(items, value_set=artists["item_id"]))
    tables = Tables(
        pa.concat_tables(pairs),
        users=pa.table({"user_id": users}),
        items=pa.table({"item_id": items, "name": names, "text": names}),
        reviews=_tags(path),
        ties=_as_friends(ties),
    )
    return assemble(name, tables, repair=repair, inherent=INHERENT)


def _artists(path: Path) -> pa.Table:
    rows = read_delimited(path / "artists.dat")
    return pa.table({"item_id": rows["id"], "name": rows["name"], "text": rows["name"]})


def _tags(path: Path) -> pa.Table:
    tags = read_delimited(path / "tags.dat", encoding="latin-1")
    rows = read_delimited(path / "user_taggedartists.dat")
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
    return ties.append_column("kind", pa.array(["friend"] * len(ties)))


def _reindexed(file: Path) -> pa.Array:
    """Raw ids in the order of the positions that the file gives them."""
    positions = json.loads("".join(read_lines(file)))
    return pa.array(sorted(positions, key=positions.__getitem__))


def _pick(ids: pa.Array, positions: pa.ChunkedArray, first: int = 0) -> pa.ChunkedArray:
    return pa.chunked_array([ids.take(pa.array(_integers(positions) - first))])


def _integers(column: pa.ChunkedArray) -> np.ndarray:
    return np.asarray(column.cast(pa.string()).cast(pa.int64()))
