"""Registry of data sets by name, and the function that loads the one of a configuration."""

import dataclasses
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Bool

from fused_rec.config import DataConfig
from fused_rec.data.dataset import Dataset, column
from fused_rec.data.io.arrow import flags, pc, replace
from fused_rec.data.io.tables import read_tables
from fused_rec.data.sources.amazon import amazon
from fused_rec.data.sources.citeulike import citeulike_t
from fused_rec.data.sources.edges import edges
from fused_rec.data.sources.fartrans import fartrans
from fused_rec.data.sources.huggingface import huggingface
from fused_rec.data.sources.insurance import insurance
from fused_rec.data.sources.lastfm import lastfm, lastfm_lightgcn, lastfm_sociallgn
from fused_rec.data.sources.lightgcn import lightgcn_text
from fused_rec.data.sources.recbole import recbole
from fused_rec.data.sources.stocknet import stocknet


@dataclasses.dataclass(frozen=True)
class Reader:
    """Reader of a named data set.

    Attributes:
      read: called with the folder and `data.repair`; None: generated data.
      folder: default folder under $FUSED_REC_DATA, empty for none.
      description: one line for lists of data sets.
      download: name in `fused_rec.data.sources.download`, empty where it cannot be downloaded.
      values: whether it may have a column `value`, so that `read` takes `min_value`; user tables also take `delimiter`
        and `encoding`.
    """

    read: Callable[..., Dataset] | None
    folder: str
    description: str
    download: str = ""
    values: bool = False


AMAZON = "amazon_musical_instruments"  # folder and download name


TABLES = "tables"
READERS: dict[str, Reader] = {
    "synthetic": Reader(None, "", "a seeded market of made-up products, reviews and referrals; needs no files"),
    TABLES: Reader(
        lambda path, repair, **given: read_tables(path, repair=repair, **given), "", "your own tables", values=True
    ),
    "lastfm": Reader(lastfm, "lastfm", "Last.fm listens, tags and friends (HetRec 2011)", "lastfm"),
    "lastfm_sociallgn": Reader(lastfm_sociallgn, "lastfm", "Last.fm in the SocialLGN split", "lastfm_sociallgn"),
    "lastfm_lightgcn": Reader(lastfm_lightgcn, "lastfm", "Last.fm in the LightGCN split", "lastfm_lightgcn"),
    "stocknet": Reader(stocknet, "stocknet", "tweets about stock tickers with company profiles (StockNet)"),
    "fartrans": Reader(fartrans, "fartrans", "purchases of securities by a bank's customers, with prices (FAR-Trans)"),
    "amazon": Reader(amazon, AMAZON, "Amazon reviews of 2014", AMAZON, values=True),
    "lightgcn_text": Reader(lightgcn_text, "gowalla", "train.txt and test.txt, a line a user (Gowalla)", "gowalla"),
    "recbole": Reader(recbole, "ml_100k", "RecBole atomic files (MovieLens 100k)", "ml_100k", values=True),
    "huggingface": Reader(huggingface, "", "Parquet shards in a folder a table, as of Hugging Face", values=True),
    "edges": Reader(edges, "douban_book", "integer edge tables with ties (Douban-Book)"),
    "epinions": Reader(edges, "epinions", "rated products and trust between users (Epinions) in the GBSR split"),
    "insurance": Reader(
        insurance, "insurance", "purchases of insurance products (Bruun et al.), in the published split"
    ),
    "citeulike_t": Reader(citeulike_t, "citeulike_t", "papers saved, with words and tags (CiteULike-t)"),
    "citeulike_t_words": Reader(functools.partial(citeulike_t, tags=False), "citeulike_t", "CiteULike-t without tags"),
    **{
        f"citeulike_t_p{size}{suffix}": Reader(
            functools.partial(citeulike_t, train_size=size, tags=tags),
            "citeulike_t",
            f"CiteULike-t{without}, published split with up to {size} in train for each user",
        )
        for size in (1, 10)
        for tags, suffix, without in ((True, "", ""), (False, "_words", " without tags"))
    },
}


class NoFolderError(FileNotFoundError):
    """Error for a missing data folder; the message has the folder and the alternatives."""

    setting = "data.path"  # the setting to change


def load(config: DataConfig) -> Dataset:
    """Loads the data set of a configuration, filtered to its k-core.

    Args:
      config: name, path and options.

    Returns:
      The dataset.

    Raises:
      ValueError: the name is unknown, or an option does not apply to it.
      NoFolderError: its folder is missing.
      DataError: its files are faulty; lists all faults.
    """
    if config.name not in READERS:
        raise ValueError(f"data.name is {config.name!r}; it must be one of {', '.join(READERS)}")
    reader = READERS[config.name]
    given: dict[str, Any] = {n: value for n in ("delimiter", "encoding") if (value := getattr(config, n))}
    if config.min_value is not None and not reader.values:
        values = ", ".join(name for name, other in READERS.items() if other.values)
        raise ValueError(f"data.min_value is {config.min_value}; it can be given for {values}, not for {config.name!r}")
    if given and config.name != TABLES:
        name, value = next(iter(given.items()))
        raise ValueError(f"data.{name} is {value!r}, but {config.name!r} has a format of its own; leave it empty")
    if reader.values:
        given["min_value"] = config.min_value
    if reader.read is None:
        from fused_rec.data.synthetic import make_synthetic

        if config.path:
            raise ValueError(f"data.path is {config.path!r}, but {config.name!r} is generated and reads no files")
        dataset = make_synthetic(config.seed)
    else:
        dataset = reader.read(_folder(config, reader), config.repair, **given)
    return k_core(dataset, config.k_core) if config.k_core > 1 else dataset


def k_core(dataset: Dataset, core: int) -> Dataset:
    """Filters to the k-core: users and items with at least `core` interactions among themselves.

    Args:
      dataset: the data.
      core: minimum number of interactions k.

    Returns:
      The k-core with its reviews and social edges; edges with an `item` are removed with the item. `notes` has the
      number of removed rows.

    Raises:
      ValueError: nothing is left.
    """
    user, item = column(dataset.interactions, "user"), column(dataset.interactions, "item")
    kept = np.ones(len(user), bool)
    while True:
        users = np.bincount(user[kept], minlength=dataset.n_users) >= core
        items = np.bincount(item[kept], minlength=dataset.n_items) >= core
        stable = kept & users[user] & items[item]
        if stable.sum() == kept.sum():
            break
        kept = stable
    if not kept.any():
        raise ValueError(f"data.k_core is {core}, and no user and item are left; choose a smaller one")
    new = {"users": dataset.users.filter(pa.array(users)), "items": dataset.items.filter(pa.array(items))}
    ends = {"user": users, "item": items, "source": users, "target": users}
    for name in ("interactions", "reviews", "ties"):
        new[name] = _cut(getattr(dataset, name), ends)
    removed = {
        f"{name}: removed by core {core}": len(getattr(dataset, name)) - len(table) for name, table in new.items()
    }
    counts = {description: count for description, count in removed.items() if count}
    return dataclasses.replace(dataset, **new, notes={**dataset.notes, **counts})


def _cut(table: pa.Table, ends: dict[str, Bool[np.ndarray, "R"]]) -> pa.Table:
    """Selects the rows whose users and items are all kept, with their new indices; null stays null."""
    kept = np.ones(len(table), bool)
    for name in ends.keys() & set(table.column_names):
        rows = table[name].combine_chunks()
        kept &= flags(pc.fill_null(pa.array(ends[name]).take(rows), True))
        indices = np.cumsum(ends[name], dtype=np.int32) - 1
        table = replace(table, name, pa.array(indices, pa.int32()).take(rows))
    return table.filter(pa.array(kept))


def _folder(config: DataConfig, reader: Reader) -> Path:
    """Finds the folder of a data set."""
    root = os.environ.get("FUSED_REC_DATA", "")
    if not config.path and not reader.folder:
        raise NoFolderError(f"data.name {config.name!r} needs a folder: set data.path")
    if not config.path and not root:
        raise NoFolderError(f"no folder for data.name {config.name!r}: {_remedies(reader)}")
    folder = Path(config.path or Path(root) / reader.folder)
    try:
        folder = folder.expanduser().resolve() if config.path else folder.resolve()
    except (RuntimeError, OSError) as error:  # no home directory, or circular links
        raise NoFolderError(f"data.name {config.name!r} is read from {folder}: {error}; {_remedies(reader)}") from error
    if not folder.is_dir():
        raise NoFolderError(f"data.name {config.name!r} is read from {folder}, which is no folder: {_remedies(reader)}")
    return folder


def _remedies(reader: Reader) -> str:
    """Lists the ways to provide the folder."""
    remedies = ["set data.path to the folder of its files"]
    if reader.folder:
        remedies = ["set FUSED_REC_DATA to the folder that holds the datasets", "data.path to that of its files"]
    if reader.download:
        remedies.append(f"run python -m fused_rec.data.sources.download {reader.download}")
    return ", or ".join(remedies)
