"""StockNet (Xu & Cohen, ACL 2018): tweets of users about stock tickers, with company profiles. Internal use only.

Folder: `tweets.jsonl.gz`, `items.jsonl.gz`, `users.jsonl.gz`. An interaction is a user and a ticker of one of the
user's tweets, at the earliest time. Each pair of tweet and symbol is a review; tickers in its text are masked, because
they name the label. The counts of mentions in `items` cover the whole period including the test period, so they are
not read.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from fused_rec.data.dataset import DataError, Dataset, Problem
from fused_rec.data.io.arrow import flags, join_texts, pc
from fused_rec.data.io.files import read_json_lines
from fused_rec.data.io.validate import Tables, assemble

MASK = "<ticker>"
# A dollar sign and a word, with an exchange or share class behind a dot, hyphen or underscore: $BRK.A, $T-V.
_CASHTAG = re.compile(r"\$[A-Za-z]\w*(?:[.\-][A-Za-z]{1,2}\b)?")


def stocknet(path: Path, repair: bool) -> Dataset:
    """Reads StockNet: 25,100 users, 5,720 tickers (3,078 with name and text), 118,531 pairs from 62,410 tweets.

    The kind of a social edge is retweet, reply or mention (of accounts other than the one retweeted or replied to),
    with one row per tweet, account and symbol. Edges to accounts without tweets and self-loops are removed and counted.

    Args:
      path: folder of the files.
      repair: as in `fused_rec.data.io.tables.read_tables`.

    Returns:
      The dataset.

    Raises:
      DataError: lists all faults.
    """
    tweets = read_json_lines(
        path / "tweets.jsonl.gz",
        {
            **dict.fromkeys(("user", "ts", "rt_of", "reply_to"), pa.int64()),
            "text": pa.string(),
            "symbols": pa.list_(pa.string()),
            "mentions": pa.list_(pa.int64()),
        },
    ).combine_chunks()
    _refuse_gaps(tweets, path / "tweets.jsonl.gz")
    texts = [mask_tickers(*row) for row in zip(*(tweets[c].to_pylist() for c in ("text", "symbols")), strict=True)]
    tweet = np.asarray(pc.list_parent_indices(tweets["symbols"]))
    posts = pa.table(
        {
            "user_id": tweets["user"].take(tweet),
            "item_id": pc.list_flatten(tweets["symbols"]),
            "timestamp": tweets["ts"].take(tweet),
            "text": pa.array(texts).take(tweet),
        }
    )
    tables = Tables(posts, users=_users(path), items=_items(path), ties=_ties(tweets, posts["item_id"]))
    return assemble(
        "stocknet", tables, repair=repair, auto_repair=("repeated interaction", "unknown tie", "tie to oneself")
    )


def mask_tickers(text: str, symbols: Sequence[str]) -> str:
    """Replaces all cashtags, and the tweet's own symbols in capitals or as hashtags, by `MASK`.

    Args:
      text: of the tweet.
      symbols: the tweet's symbols.

    Returns:
      The masked text.
    """
    text = _CASHTAG.sub(MASK, text)
    forms = {form for symbol in symbols for form in (symbol, symbol.replace("-", "."))}
    for form in sorted(form for form in forms if form.upper() in text.upper()):
        own, letter = re.escape(form), r"[^\W\d_]"  # so that AAPL is found in AAPL150306C132 and #CML_AAPL
        text = re.sub(rf"#(?i:{own})\b|(?<!{letter}){own}(?!{letter})", MASK, text)
    return text


def _refuse_gaps(tweets: pa.Table, file: Path) -> None:
    """Raises DataError if a tweet has no text or symbols, or if one of its symbols or mentions is null."""
    for name in ("text", "symbols", "mentions"):
        gaps = np.zeros(len(tweets), bool) if name == "mentions" else flags(pc.is_null(tweets[name]))
        if name != "text":
            inside = flags(pc.is_null(pc.list_flatten(tweets[name])))
            gaps[np.asarray(pc.list_parent_indices(tweets[name]))[inside]] = True
        if gaps.any():
            first = f"first the one in place {gaps.argmax() + 1}"
            message = f"{gaps.sum():,} tweets have no {name} or null among them, {first}"
            raise DataError([Problem(file.name, None, message, "give each tweet its text and a list of its symbols")])


def _users(path: Path) -> pa.Table:
    rows = read_json_lines(path / "users.jsonl.gz", dict.fromkeys(("user", "followers", "friends"), pa.int64()))
    return rows.rename_columns({"user": "user_id"})


def _items(path: Path) -> pa.Table:
    columns = ("symbol", "name", "kind", "sector", "industry", "country", "summary")
    rows = read_json_lines(path / "items.jsonl.gz", dict.fromkeys(columns, pa.string()))
    name = pc.utf8_rtrim(rows["name"], ".")  # "Apple Inc." would end in two
    text = join_texts(name, rows["sector"], rows["industry"], rows["summary"])
    return rows.rename_columns({"symbol": "item_id"}).drop_columns(["summary"]).append_column("text", text)


def _ties(tweets: pa.Table, symbols: pa.ChunkedArray) -> pa.Table:
    addressed = []
    for kind, column in (("retweet", "rt_of"), ("reply", "reply_to")):
        tweet = np.flatnonzero(tweets[column].is_valid())
        addressed.append((tweet, np.asarray(tweets[column].drop_null()), kind))
    tweet, target = (np.asarray(f(tweets["mentions"])) for f in (pc.list_parent_indices, pc.list_flatten))
    rows = tweets.take(tweet)
    new = ~np.any([np.asarray(pc.fill_null(rows[c], -1)) == target for c in ("rt_of", "reply_to")], axis=0)
    addressed.append((tweet[new], target[new], "mention"))

    tweet = np.concatenate([tweets for tweets, _, _ in addressed])
    target = np.concatenate([targets for _, targets, _ in addressed])
    kind = np.repeat([kind for _, _, kind in addressed], [len(tweets) for tweets, _, _ in addressed])
    # One row for each symbol of the tweet: `tie` repeats the row, `symbol` counts through the tweet's symbols.
    lengths = np.asarray(pc.list_value_length(tweets["symbols"]))
    starts, repeats = np.cumsum(lengths) - lengths, lengths[tweet]
    tie = np.repeat(np.arange(len(tweet)), repeats)
    symbol = np.arange(len(tie)) - np.repeat(np.cumsum(repeats) - repeats, repeats) + starts[tweet[tie]]
    rows = tweets.take(tweet[tie])
    return pa.table(
        {
            "source_id": rows["user"],
            "target_id": target[tie],
            "kind": kind[tie],
            "timestamp": rows["ts"],
            "item_id": symbols.take(symbol),
        }
    )
