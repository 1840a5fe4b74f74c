"""Public data: the published counts where the files are at hand, each format on a few rows, naming, k-core."""

import gzip
import json
import logging
import os
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from malformed_inputs import BETWEEN, CITEULIKE, FARTRANS, INSURANCE, TARGETS

from fused_rec.config import DataConfig, SplitConfig
from fused_rec.data.dataset import DataError, Dataset, column, empty_reviews
from fused_rec.data.sources.amazon import amazon
from fused_rec.data.sources.citeulike import citeulike_t
from fused_rec.data.sources.edges import edges
from fused_rec.data.sources.fartrans import fartrans, read_prices
from fused_rec.data.sources.insurance import insurance
from fused_rec.data.sources.lastfm import lastfm
from fused_rec.data.sources.lightgcn import lightgcn_text
from fused_rec.data.sources.recbole import recbole
from fused_rec.data.sources.registry import READERS, k_core, load
from fused_rec.data.sources.stocknet import mask_tickers, stocknet
from fused_rec.data.splits import split

DATA = Path(os.environ.get("FUSED_REC_DATA", ""))
real = pytest.mark.skipif("FUSED_REC_DATA" not in os.environ, reason="set FUSED_REC_DATA to the folder of public data")


def read(name: str) -> Dataset:
    return load(DataConfig(name=name))


def parts(dataset: Dataset) -> Counter:
    return Counter(dataset.interactions["split"].to_pylist())


def gz(file: Path, *rows: dict) -> None:
    file.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))


@real
def test_lastfm():
    dataset = read("lastfm")
    assert (dataset.n_users, dataset.n_items, len(dataset.interactions)) == (1892, 17632, 92834)
    assert len(dataset.ties) == 25434 and set(dataset.ties["kind"].to_pylist()) == {"friend"}
    tags = {"reviews: bad times left empty": 4, "reviews: reviews of unknown users or items dropped": 1538}
    assert dataset.repairs == tags
    assert len(dataset.reviews) == 186479 - 1538
    first = dataset.reviews.slice(0, 1).to_pylist()[0]  # "2 52 13 1 4 2009", tag 13 is chillout, 2009-04-01 in UTC
    assert dataset.users["user_id"][first["user"]].as_py() == "2"
    assert dataset.items["item_id"][first["item"]].as_py() == "52"
    assert (first["text"], first["timestamp"]) == ("chillout", 1238544000)
    assert "tropicália" in dataset.reviews["text"].to_pylist()  # tags.dat is latin-1


@real
def test_lastfm_sociallgn_is_the_raw_data_under_its_raw_ids():
    dataset, raw = read("lastfm_sociallgn"), read("lastfm")
    assert (dataset.n_users, dataset.n_items) == (1892, 17632)
    assert parts(dataset) == {"train": 74267, "test": 18567}
    assert named(dataset) == named(raw)
    assert sorted(tied(dataset)) == sorted(tied(raw))
    assert len(dataset.reviews) == len(raw.reviews)
    train = np.asarray(dataset.interactions["split"]) == "train"
    item = column(dataset.interactions, "item")
    assert len(np.setdiff1d(item[~train], item[train])) == 2312  # items of the test part alone


@real
def test_lastfm_lightgcn_ids_agree_with_the_recovered_maps():
    dataset = read("lastfm_lightgcn")
    folder = DATA / "lastfm" / "lightgcn_split"
    assert (dataset.n_users, dataset.n_items) == (1892, 4489)
    assert parts(dataset) == {"train": 42135, "test": 10533}
    users, items = (
        [line.split("\t") for line in (folder / f"{n}_map.tsv").read_text().splitlines()[1:]] for n in ("user", "item")
    )
    assert dataset.users["user_id"].to_pylist() == [row[1] for row in users]
    assert dataset.items.to_pydict() == {
        key: [row[n] for row in items] for key, n in (("item_id", 1), ("name", 2), ("text", 2))
    }
    assert sorted(tied(dataset)) == sorted(tied(read("lastfm")))
    assert dataset.repairs["reviews: reviews of unknown users or items dropped"] + len(dataset.reviews) == 186479


@real
def test_stocknet():
    dataset = read("stocknet")
    assert (dataset.n_users, dataset.n_items, len(dataset.interactions)) == (25100, 5720, 118531)
    assert len(dataset.reviews) == 159151  # 62,410 tweets, one row for each symbol
    assert dataset.items["name"].length() - dataset.items["name"].null_count == 3078
    assert dataset.items["text"].null_count == dataset.items["name"].null_count
    times = column(dataset.reviews, "timestamp")
    assert (times.min(), times.max()) == (1388531408, 1435646237)  # 2013-12-31 to 2015-06-30
    symbol = np.array(dataset.items["item_id"].to_pylist())[column(dataset.reviews, "item")]
    for name, text in zip(symbol.tolist(), dataset.reviews["text"].to_pylist(), strict=True):
        assert "$" not in text or not re.search(r"\$[A-Za-z]", text), text
        assert name not in text or not re.search(rf"(?<![^\W\d_]){re.escape(name)}(?![^\W\d_])", text), (name, text)
    ties = dataset.repairs
    assert (ties["ties: ties to unknown users dropped"], ties["ties: ties to oneself dropped"]) == (19388, 1176)
    assert set(dataset.ties["kind"].to_pylist()) == {"retweet", "reply", "mention"}
    # A tie was seen in its source's own act on that item.
    pairs = set(zip(column(dataset.interactions, "user"), column(dataset.interactions, "item"), strict=True))
    assert set(zip(column(dataset.ties, "source"), column(dataset.ties, "item"), strict=True)) <= pairs


@real
def test_amazon():
    dataset = read("amazon")
    assert (dataset.n_users, dataset.n_items, len(dataset.interactions)) == (1429, 900, 10261)
    assert len(dataset.reviews) == 10261 and dataset.items.column_names == ["item_id"]
    assert dataset.repairs == {}
    assert dataset.notes["interactions: reviews without a body, for which the summary stands"] == 7
    words = np.mean([len(text.split()) for text in dataset.reviews["text"].to_pylist()])
    assert 93 < words < 97
    times = column(dataset.interactions, "timestamp")
    assert (times.min(), times.max()) == (1095465600, 1405987200)  # 2004-09-18 to 2014-07-22


@real
def test_gowalla():
    dataset = read("lightgcn_text")
    assert (dataset.name, dataset.n_users, dataset.n_items) == ("gowalla", 29858, 40981)
    assert parts(dataset) == {"train": 810128, "test": 217242}
    assert dataset.items["item_id"].to_pylist() == [str(n) for n in range(40981)]


@real
def test_douban_book():
    dataset = read("edges")
    active = np.unique(column(dataset.interactions, "user"))
    assert (len(active), dataset.n_items) == (12859, 22294)
    assert parts(dataset) == {"train": 478730, "test": 119690}
    assert dataset.repairs == {"ties: ties to oneself dropped": 169150 - len(dataset.ties)}
    assert dataset.notes == {"users: users without an interaction, kept as new users": dataset.n_users - 12859}


@real
def test_epinions():
    dataset = read("epinions")
    assert (dataset.name, dataset.n_users, dataset.n_items) == ("epinions", 18202, 47449)
    assert parts(dataset) == {"train": 273946, "test": 64454}
    assert (len(dataset.ties), dataset.repairs) == (595259 - 155, {"ties: ties to oneself dropped": 155})


@real
def test_insurance():
    dataset = read("insurance")
    assert (dataset.n_users, dataset.n_items, len(dataset.interactions)) == (44434, 16, 60135)
    # 55,619 and 6,121 events, without repeats of a pair
    assert dataset.repairs == {"interactions: rows that repeat a pair merged into its earliest": 61740 - 60135}
    assert parts(dataset) == {"train": 48951, "valid": 5329, "test": 5855}
    times = column(dataset.interactions, "timestamp")
    assert (times.min(), times.max()) == (1538379743, 1601506437)  # 2018-10-01 07:42:23, 2020-09-30 22:53:57
    latest = [times[np.asarray(dataset.interactions["split"]) == part].max() for part in ("train", "valid", "test")]
    assert latest == sorted(latest)


@real
@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("citeulike_t_words", {}),
        ("citeulike_t_p1", {"train": 7947, "valid": 16795, "test": 110118}),
        ("citeulike_t_p10", {"train": 53399, "valid": 12255, "test": 69206}),
    ],
)
def test_citeulike_t(name, counts):
    dataset, every = read(name), read("citeulike_t")
    assert (dataset.name, dataset.n_users, dataset.n_items) == (name, 7947, 25975)
    assert len(dataset.interactions) == 134860 and dataset.repairs == {}
    assert named(dataset) == named(every)  # train and test together are all pairs
    assert not counts or parts(dataset) == counts
    assert dataset.items["text"].null_count == (31 if name == "citeulike_t_words" else 0)
    assert ("tags" in dataset.items.column_names) == (name != "citeulike_t_words")
    for short, long in zip(*(d.items["text"].to_pylist() for d in (read("citeulike_t_words"), every)), strict=True):
        assert long.startswith(short or "")


@real
def test_ml_100k():
    dataset = read("recbole")
    assert (dataset.n_users, dataset.n_items, len(dataset.interactions)) == (943, 1682, 100000)
    assert dataset.items.slice(0, 1).to_pylist() == [
        {
            "item_id": "1",
            "name": "Toy Story",
            "text": "Toy Story. Animation Children's Comedy",
            "class": "Animation Children's Comedy",
            "release_year": "1995",
        }
    ]
    assert dataset.interactions.slice(0, 1).to_pylist() == [
        {"user": 195, "item": 241, "timestamp": 881250949, "value": 3}
    ]


def named(dataset: Dataset) -> set[tuple[str, str]]:
    users, items = (np.array(c.to_pylist()) for c in (dataset.users["user_id"], dataset.items["item_id"]))
    user, item = users[column(dataset.interactions, "user")], items[column(dataset.interactions, "item")]
    return set(zip(user.tolist(), item.tolist(), strict=True))


def tied(dataset: Dataset) -> list[tuple[str, str]]:
    users = np.array(dataset.users["user_id"].to_pylist())
    return list(zip(*(users[column(dataset.ties, end)].tolist() for end in ("source", "target")), strict=True))


@pytest.mark.parametrize(
    ("text", "symbols", "masked"),
    [
        ("Long $AAPL, short $fb and AAPL.", ["AAPL", "FB"], "Long <ticker>, short <ticker> and <ticker>."),
        ("$BRK.A beats BRK.A and BRK-A", ["BRK-A"], "<ticker> beats <ticker> and <ticker>"),
        ("#aapl #CML_AAPL AAPL150306C00132", ["AAPL"], "<ticker> #CML_<ticker> <ticker>150306C00132"),
        ("GE Appliances, IGE and gem cost $5", ["GE"], "<ticker> Appliances, IGE and gem cost $5"),
        ("TWTR is not of this tweet", ["AAPL"], "TWTR is not of this tweet"),
        ("$TÝLLO", ["T"], "<ticker>"),
    ],
)
def test_tickers_are_masked(text, symbols, masked):
    assert mask_tickers(text, symbols) == masked


def test_stocknet_ties_stand_for_each_symbol_of_the_tweet(tmp_path):
    gz(
        tmp_path / "tweets.jsonl.gz",
        {"t": 0, "user": 0, "ts": 50, "text": "RT $A $B", "symbols": ["A", "B"], "rt_of": 1, "mentions": [1, 2, 99]},
        {"t": 1, "user": 1, "ts": 40, "text": "$A", "symbols": ["A"]},
        {"t": 2, "user": 2, "ts": 70, "text": "$B", "symbols": ["B"], "reply_to": 0, "mentions": [2]},
        {"t": 3, "user": 0, "ts": 30, "text": "again $A", "symbols": ["A"]},
    )
    gz(tmp_path / "users.jsonl.gz", *({"user": n, "followers": n, "friends": 0} for n in range(3)))
    company = {
        "name": "Alpha Inc.",
        "sector": "Tech",
        "industry": None,
        "country": "US",
        "kind": "Equities",
        "summary": "It makes.",
    }
    gz(tmp_path / "items.jsonl.gz", {"symbol": "A", **company}, {"symbol": "B", **dict.fromkeys(company)})
    dataset = stocknet(tmp_path, False)

    assert dataset.interactions.to_pydict() == {
        "user": [0, 1, 2, 0],
        "item": [1, 0, 1, 0],
        "timestamp": [50, 40, 70, 30],
    }
    assert dataset.reviews.to_pydict() == {
        "user": [0, 0, 1, 2, 0],
        "item": [0, 1, 0, 1, 0],
        "text": ["RT <ticker> <ticker>", "RT <ticker> <ticker>", "<ticker>", "<ticker>", "again <ticker>"],
        "timestamp": [50, 50, 40, 70, 30],
    }
    kind, source, target, item, time = (
        dataset.ties[c].to_pylist() for c in ("kind", "source", "target", "item", "timestamp")
    )
    assert list(zip(kind, source, target, item, time, strict=True)) == [
        ("retweet", 0, 1, 0, 50),
        ("retweet", 0, 1, 1, 50),
        ("reply", 2, 0, 1, 70),
        ("mention", 0, 2, 0, 50),
        ("mention", 0, 2, 1, 50),
    ]
    assert dataset.items["text"].to_pylist() == ["Alpha Inc. Tech. It makes.", None]
    assert dataset.repairs == {
        "interactions: rows that repeat a pair merged into its earliest": 1,
        "ties: ties to unknown users dropped": 2,  # account 99, once for each symbol
        "ties: ties to oneself dropped": 1,
    }


def test_lastfm_keeps_tags_on_artists_no_user_played(tmp_path):
    files = {
        "artists.dat": 'id\tname\turl\tpictureURL\n1\tAbba "live"\tx\ty\n2\tBjörk\tx\ty\n',
        "user_artists.dat": "userID\tartistID\tweight\n7\t1\t30\n8\t1\t2\n",
        "user_friends.dat": "userID\tfriendID\n7\t8\n8\t7\n",
        "user_taggedartists.dat": "userID\tartistID\ttagID\tday\tmonth\tyear\n"
        "7\t2\t5\t1\t4\t2009\n8\t9\t5\t1\t1\t2010\n8\t1\t5\t1\t1\t1956\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_bytes(text.replace("\n", "\r\n").encode())  # as the publisher packs them
    (tmp_path / "tags.dat").write_bytes("tagID\ttagValue\n5\tfußball\n".encode("latin-1"))
    dataset = lastfm(tmp_path, False)

    assert dataset.items["name"].to_pylist() == ['Abba "live"', "Björk"]
    assert dataset.interactions.to_pydict() == {"user": [0, 1], "item": [0, 0], "value": [30.0, 2.0]}
    assert dataset.reviews.to_pydict() == {
        "user": [0, 1],
        "item": [1, 0],
        "text": ["fußball", "fußball"],
        "timestamp": [1238544000, None],
    }
    (tmp_path / "tags.dat").unlink()
    with pytest.raises(DataError, match=r"tags.dat: no such file in .* \(there: \['artists.dat'"):
        lastfm(tmp_path, False)


def test_fartrans(tmp_path):
    files = {
        "customer_information.csv": "customerID,customerType,riskLevel,investmentCapacity,lastQuestionnaireDate,"
        "timestamp\n"
        "C2,Mass,Income,CAP_LT30K,2018-01-02,2018-01-03\n"
        "C1,Mass,Not_Available,Not_Available,,2018-01-03\n"
        "C2,Premium,Balanced,Predicted_CAP_30K_80K,2020-05-05,2020-05-06\n"
        "C3,Mass,Predicted_Aggressive,CAP_LT30K,2018-01-02,2018-01-03\n",
        "asset_information.csv": "ISIN,assetName,assetShortName,assetCategory,assetSubCategory,marketID,sector,"
        "industry,timestamp\n"
        'I1,"Alpha, Inc.",ALPHA,Stock,,XATH,Energy,Oil & Gas,2020-01-01\n'
        "I1,Old name,ALPHA,Stock,,XATH,Energy,Oil & Gas,2019-01-01\n"
        "I2,Beta fund,BETA,MTF,Balanced,,,,2019-01-01\n",
        "transactions.csv": "customerID,ISIN,transactionID,transactionType,timestamp,totalValue,units,channel,"
        "marketID\n"
        "C1,I1,1,Buy,2018-02-02,250.5,10.0,Internet Banking,XATH\n"
        "C1,I1,2,Buy,2018-02-01,100.0,4.0,Branch,XATH\n"
        "C1,I1,3,Sell,2018-03-01,100.0,4.0,Branch,XATH\n"
        "C2,I2,4,Sell,2018-03-01,7.0,4.0,Branch,\n"
        "C2,I3,5,Buy,2019-03-01,7.0,4.0,Branch,\n",
        "close_prices.csv": "ISIN,timestamp,closePrice\nI1,2018-02-01,25.0\nI1,2018-02-02,25.05\nI2,2018-02-02,1\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    dataset = load(DataConfig(name="fartrans", path=str(tmp_path)))
    assert dataset.users.to_pylist() == [
        {
            "user_id": user,
            "customerType": kind,
            "riskLevel": risk,
            "investmentCapacity": capacity,
            "lastQuestionnaireDate": asked,
        }
        for user, kind, risk, capacity, asked in (
            ("C2", "Premium", "Balanced", "Predicted_CAP_30K_80K", "2020-05-05"),
            ("C1", "Mass", None, None, None),
            ("C3", "Mass", "Predicted_Aggressive", "CAP_LT30K", "2018-01-02"),
        )
    ]
    assert dataset.items["name"].to_pylist() == ["Alpha, Inc.", "Beta fund", None]
    assert dataset.items["text"].to_pylist() == [
        "Alpha, Inc.. Stock. Energy. Oil & Gas",
        "Beta fund. MTF. Balanced",
        None,
    ]
    assert dataset.items["item_id"].to_pylist() == ["I1", "I2", "I3"]
    assert dataset.interactions.to_pylist() == [
        {"user": 1, "item": 0, "timestamp": 1517443200, "value": 100.0},  # 2018-02-01 in UTC, the earlier purchase
        {"user": 0, "item": 2, "timestamp": 1551398400, "value": 7.0},
    ]
    assert dataset.repairs == {
        "interactions: rows with an unknown item_id, which was added without attributes": 1,
        "interactions: rows that repeat a pair merged into its earliest": 1,
    }
    assert dataset.notes == {
        "interactions: sales not read": 2,
        "users: earlier rows of one customerID, of which the last is read": 1,
        "items: earlier rows of one ISIN, of which the last is read": 1,
        "interactions: values kept, which the model does not use (data.min_value makes use of them)": 3,
        "users: users without an interaction, kept as new users": 1,
    }
    assert read_prices(tmp_path / "close_prices.csv").to_pylist() == [
        {"item_id": "I1", "timestamp": 1517443200, "price": 25.0},
        {"item_id": "I1", "timestamp": 1517529600, "price": 25.05},
        {"item_id": "I2", "timestamp": 1517529600, "price": 1.0},
    ]


@pytest.mark.parametrize(
    ("name", "old", "new", "said"),
    [
        ("transactions.csv", "Buy", "Gift", "transactions.csv, row 2: transactionType is 'Gift'. write Buy or Sell"),
        ("transactions.csv", "customerID,", "customer,", "column customerID occurs 0 times"),
        ("customer_information.csv", "2018-01-03", "soon", "row 2: timestamp is 'soon'"),
        ("asset_information.csv", "I1,", ",", "row 2: ISIN is missing"),
        ("close_prices.csv", "10.5", "-1", "close_prices.csv, row 2: closePrice is '-1'"),
        ("close_prices.csv", "10.5", "nan", "closePrice is 'nan'"),
        ("close_prices.csv", "2018-01-01", "01.01.18", "row 2: timestamp"),
    ],
)
def test_fartrans_refuses_what_it_cannot_read(tmp_path, name, old, new, said):
    for file, part in zip(FARTRANS, TARGETS["fartrans"].seeds[0][1:].split(BETWEEN), strict=True):
        text = part.decode()
        (tmp_path / file).write_text(text.replace(old, new, 1) if file == name else text)
    with pytest.raises(DataError, match=said):
        fartrans(tmp_path, True)
        read_prices(tmp_path / "close_prices.csv")


def test_prices_as_a_spreadsheet_writes_them(tmp_path, caplog):
    file = tmp_path / "prices.csv"
    file.write_bytes("ISIN;timestamp;closePrice\r\nI1;20181201;1.234\r\n".encode("utf-16"))
    with caplog.at_level(logging.INFO):
        assert read_prices(file).to_pylist() == [{"item_id": "I1", "timestamp": 1543622400, "price": 1.234}]
    assert "semicolon-separated, UTF-16; closePrice '1.234' in row 2 is read with a decimal point" in caplog.text
    file.write_text("ISIN;timestamp;closePrice\nI1;2018-12-01;1,5\n")
    with pytest.raises(DataError, match="row 2: closePrice is '1,5'. give a price as 12.5"):
        read_prices(file)
    file.write_text("ISIN;date;closePrice\nI1;2018-12-01;1.5\n")
    with pytest.raises(DataError, match="column timestamp occurs 0 times .there: ISIN, date, closePrice."):
        read_prices(file)


def test_amazon_texts(tmp_path):
    row = {"reviewerID": "A", "asin": "007", "overall": 4.0, "unixReviewTime": 9, "helpful": [0, 1]}
    gz(
        tmp_path / "reviews.json.gz",
        {**row, "summary": "Good", "reviewText": "It hums."},
        {**row, "asin": "008", "summary": "Bad", "reviewText": ""},
        {**row, "asin": "009", "summary": "", "reviewText": " "},
    )
    dataset = amazon(tmp_path, False)
    assert dataset.items["item_id"].to_pylist() == ["007", "008", "009"]
    assert dataset.interactions["value"].to_pylist() == [4.0, 4.0, 4.0]
    assert dataset.reviews["text"].to_pylist() == ["Good. It hums.", "Bad"]
    whole = (tmp_path / "reviews.json.gz").read_bytes()
    (tmp_path / "reviews.json.gz").write_bytes(whole[:-20])
    with pytest.raises(DataError, match="reviews.json.gz: cannot be read"):
        amazon(tmp_path, False)
    (tmp_path / "other.json.gz").write_bytes(whole)
    with pytest.raises(DataError, match="2 files match"):
        amazon(tmp_path, False)


def test_lightgcn_text(tmp_path):
    (tmp_path / "train.txt").write_text("10 3 5\n2 3\n4\n")
    (tmp_path / "test.txt").write_text("2 5\n10 3\n")
    dataset = lightgcn_text(tmp_path, False)
    assert dataset.users["user_id"].to_pylist() == ["2", "4", "10"]  # in numeric order
    assert dataset.interactions.to_pydict() == {
        "user": [2, 2, 0, 0],
        "item": [0, 1, 0, 1],
        "split": ["train", "train", "train", "test"],
    }
    # 10 3, of both parts: train has it
    assert dataset.repairs == {"interactions: rows that repeat a pair merged into its earliest": 1}
    assert dataset.notes == {"users: users without an interaction, kept as new users": 1}  # user 4


def test_edges(tmp_path):
    (tmp_path / "train.tsv").write_text("1\t5\n2\t5\n")
    (tmp_path / "test.tsv.gz").write_bytes(gzip.compress(b"1\t6\n"))
    (tmp_path / "social.tsv").write_text("1\t2\n9\t1\n2\t2\n")
    dataset = edges(tmp_path, False)
    assert dataset.users["user_id"].to_pylist() == ["1", "2", "9"]
    assert dataset.ties.to_pydict() == {"source": [0, 2], "target": [1, 0], "kind": ["trust", "trust"]}
    assert dataset.interactions["split"].to_pylist() == ["train", "train", "test"]
    (tmp_path / "social.tsv").write_text("1\tx\n")
    with pytest.raises(DataError, match="social.tsv, row 1: target_id 'x' is no integer"):
        edges(tmp_path, False)


def lay_out(folder: Path, names: tuple[str, ...], target: str, changes: dict[str, tuple[bytes, bytes]]) -> None:
    """Writes a sound input of several files, some of them changed."""
    for name, part in zip(names, TARGETS[target].seeds[0][1:].split(BETWEEN), strict=True):
        old, new = changes.get(name.removesuffix(".gz"), (b"", b""))
        assert old in part
        part = part.replace(old, new, 1) if old else part
        (folder / name).write_bytes(gzip.compress(part) if name.endswith(".gz") else part)


def test_citeulike_t_texts_have_words_by_count_and_tags(tmp_path):
    lay_out(tmp_path, CITEULIKE, "citeulike_t", {})
    dataset = citeulike_t(tmp_path, False)
    # mult.dat: "text" once and "graph" six times; nothing; a blank word of the vocabulary
    assert dataset.items.to_pydict() == {
        "item_id": ["0", "1", "2"],
        "text": ["graph text graph graph graph. ml, to-read", None, "ml"],
        "tags": [["ml", "to-read"], [], ["ml"]],
    }
    assert dataset.users.to_pydict() == {"user_id": ["0", "1"]}
    assert dataset.interactions.to_pydict() == {"user": [0, 0, 1], "item": [0, 1, 2]}
    words = citeulike_t(tmp_path, False, tags=False)
    assert (words.name, words.items["text"].to_pylist()) == (
        "citeulike_t_words",
        ["graph text graph graph graph", None, None],
    )
    assert words.items.column_names == ["item_id", "text"]


def test_citeulike_t_published_split(tmp_path):
    lay_out(tmp_path, CITEULIKE, "citeulike_t", {})
    dataset = citeulike_t(tmp_path, False, train_size=1)
    assert dataset.name == "citeulike_t_p1"
    assert dataset.interactions.to_pydict() == {
        "user": [0, 1, 0],
        "item": [1, 2, 0],
        "split": ["train", "train", "valid"],  # user 0 is for validation
    }
    with pytest.raises(DataError, match="cf-train-10-users.dat.gz: no such file"):
        citeulike_t(tmp_path, False, train_size=10)


@pytest.mark.parametrize(
    ("file", "old", "new", "said"),
    [
        ("users.dat", b"2 0 1", b"3 0 1", "users.dat, row 1: 3 entries are announced, and 2 follow. download it again"),
        ("users.dat", b"1 2", b"1 3", "users.dat, row 2: id 3 is not below 3, the number of papers"),
        ("users.dat", b"1 2", b"1 2.0", "users.dat, row 2: '1 2.0' is not the number of entries .* as '2 10 11'"),
        ("users.dat", b"1 2", b"1 -1", "users.dat, row 2: '1 -1' is not the number of entries"),
        ("mult.dat", b"0:6", b"0", "mult.dat, row 1: '2 2:1 0' is not the number of entries .* as '2 10:1 11:4'"),
        ("mult.dat", b"0:6", b"3:6", "mult.dat, row 1: id 3 is not below 3, the number of words"),
        ("tag-item.dat", b"2 0 2", b"2 0 9", "tag-item.dat.gz, row 2: id 9 is not below 3"),
        ("tags.dat", b"to-read\n", b"", "tag-item.dat.gz: has 2 lines, and tags.dat has 1. download it again"),
        ("cf-test-1-users.dat", b"0 \n", b"", "cf-test-1-users.dat: has 1 lines, and cf-train-1-users.dat has 2"),
    ],
)
def test_citeulike_t_names_the_faulty_line(tmp_path, file, old, new, said):
    lay_out(tmp_path, CITEULIKE, "citeulike_t", {file: (old, new)})
    with pytest.raises(DataError, match=said):
        citeulike_t(tmp_path, True, train_size=1 if file.startswith("cf") else None)


def test_citeulike_t_lists_few_of_many_faulty_lines_and_refuses_a_cut_file(tmp_path):
    lay_out(tmp_path, CITEULIKE, "citeulike_t", {})
    (tmp_path / "users.dat").write_text("1 9\n" * 100)
    with pytest.raises(
        DataError, match="100 faults in the input:(?s:.*)users.dat: 100 lines are faulty in all"
    ) as error:
        citeulike_t(tmp_path, False)
    assert len(error.value.problems) < 20
    packed = (tmp_path / "tag-item.dat.gz").read_bytes()
    (tmp_path / "tag-item.dat.gz").write_bytes(packed[:-9])
    with pytest.raises(DataError, match="tag-item.dat.gz: cannot be read: .*download it again"):
        citeulike_t(tmp_path, False)


def test_insurance_has_its_published_validation_split_and_no_repeats(tmp_path):
    lay_out(tmp_path, INSURANCE, "insurance", {})
    dataset = insurance(tmp_path, False)
    assert dataset.users["user_id"].to_pylist() == ["7", "8", "9"]
    assert dataset.items["item_id"].to_pylist() == ["item_2", "item_1"]
    assert dataset.interactions.to_pydict() == {
        "user": [0, 0, 1, 2],
        "item": [0, 1, 1, 1],
        "timestamp": [1538379743, 1538379743, 1590969600, 1596326400],
        "split": ["train", "train", "valid", "test"],
    }
    # 7 bought item_2 again in the test period: a known pair
    assert dataset.repairs == {"interactions: rows that repeat a pair merged into its earliest": 1}
    rows = split(dataset, SplitConfig(kind="predefined"))
    assert (rows.train.tolist(), rows.valid.tolist(), rows.test.tolist()) == ([0, 1], [2], [3])


@pytest.mark.parametrize(
    ("part", "old", "new", "said"),
    [
        ("train", b",1,item_1", b",2,item_1", "train.csv, row 4: valid is '2' .1 such rows in all.. write 0 for train"),
        ("train", b",1,item_1", b",,item_1", "train.csv, row 4: valid is None"),
        ("train", b",7,", b",,", "train.csv, row 2: user_id is None .* give each row its id"),
        (
            "test",
            b"2020-08-02 00:00:00",
            b"soon",
            "test.csv.gz, row 3: event_time is 'soon' .* write 2020-01-31 12:00:00",
        ),
        ("test", b"event_time", b"time", "test.csv.gz: column event_time occurs 0 times"),
    ],
)
def test_insurance_names_the_faulty_row(tmp_path, part, old, new, said):
    lay_out(tmp_path, INSURANCE, "insurance", {f"purchase_events_{part}.csv": (old, new)})
    with pytest.raises(DataError, match=f"purchase_events_{said}"):
        insurance(tmp_path, True)


def test_recbole(tmp_path):
    (tmp_path / "x.inter").write_text(
        "user_id:token\titem_id:token\trating:float\ttext:token_seq\tdevice:token\nu\ti\t2.5\tso so\tphone\n"
    )
    (tmp_path / "x.item").write_text(
        "item_id:token\tname:token_seq\tother_name:token_seq\tprice:float\tpoint:float_seq\n"
        "i\tThing\tIt\t1.5\t1 2\nj\t\t\t\t\n"
    )
    (tmp_path / "x.net").write_text("source_id:token\ttarget_id:token\nu\tv\n")
    (tmp_path / "x.user").write_text("user_id:token\nu\nv\n")
    dataset = recbole(tmp_path, False)
    assert dataset.items.to_pylist() == [
        {"item_id": "i", "price": 1.5, "point": [1.0, 2.0], "text": "Thing. It", "other_name": "It", "name": "Thing"},
        {"item_id": "j", "price": None, "point": None, "text": None, "other_name": None, "name": None},
    ]
    assert dataset.interactions.to_pylist() == [{"user": 0, "item": 0, "value": 2.5}]
    assert dataset.reviews["text"].to_pylist() == ["so so"]
    assert dataset.ties.to_pylist() == [{"source": 0, "target": 1, "kind": "tie"}]
    assert dataset.repairs == {}
    assert dataset.notes == {
        "interactions: column 'device' not read": 1,
        "interactions: values kept, which the model does not use (data.min_value makes use of them)": 1,
        "users: users without an interaction, kept as new users": 1,
    }
    (tmp_path / "x.user").write_text("id:token\nu\n")
    with pytest.raises(DataError, match=r"x.user: no column user_id \(there: id\)"):
        recbole(tmp_path, False)


def test_recbole_rounds_no_number_and_takes_blanks_for_missing(tmp_path):
    (tmp_path / "x.inter").write_text(
        "user_id:token\titem_id:token\ttimestamp:float\nu\ti\t20241201\nu\tj\t1733011201.0\n"
    )
    head = "item_id:token\tsector:token\tprice:float\tpoint:float_seq\n"
    (tmp_path / "x.item").write_text(f"{head}i\t \t \t9007199254740992 0.1\nj\toil\tnan\t\n")
    dataset = recbole(tmp_path, False)
    assert dataset.items.to_pylist() == [
        {"item_id": "i", "sector": None, "price": None, "point": [2.0**53, 0.1]},
        {"item_id": "j", "sector": "oil", "price": None, "point": None},
    ]
    assert dataset.interactions["timestamp"].to_pylist() == [1733011200, 1733011201]
    for cells, said in (
        ("9007199254740993\t1", "row 2: price:float is 9007199254740993, which a 64-bit float would round"),
        ("1\t1 12345678901234567891", "row 2: point:float_seq is 12345678901234567891"),
        ("0x1A\t1", "price:float holds something else"),
    ):
        (tmp_path / "x.item").write_text(f"{head}i\toil\t{cells}\n")
        with pytest.raises(DataError, match=said):
            recbole(tmp_path, False)


@pytest.mark.parametrize(
    ("time", "read"), [("20180201", 1517443200), ("2018-02-01T00:00:00Z", 1517443200), ("1517443200", 1517443200)]
)
def test_prices_have_the_times_of_all_tables(tmp_path, time, read):
    file = tmp_path / "close_prices.csv"
    file.write_text(f"ISIN,timestamp,closePrice\nI1,{time},25.0\nI1,2018-02-02,25.05\n")
    assert read_prices(file)["timestamp"].to_pylist() == [read, 1517529600]


@pytest.mark.parametrize(
    "time", ["2018", "43132", "2018-02", "1517443200000", "5", "1_517_443_200", "0x10", "01/02/2018"]
)
def test_prices_without_a_day_are_refused(tmp_path, time):
    file = tmp_path / "close_prices.csv"
    file.write_text(f"ISIN,timestamp,closePrice\nI1,{time},25.0\nI1,2018-02-02,25.05\nI1,2018-02-03,25\n")
    with pytest.raises(DataError, match=f"close_prices.csv, row 2: timestamp is '{time}', which is .*give a date"):
        read_prices(file)


def test_core_is_repeated_until_stable_and_counts_what_it_removes():
    #  a-0  a-1  b-0  b-1  c-1  c-2  d-2: item 2 has two users, but d has one item; without d, 2 falls; then c.
    pairs = [(0, 0), (0, 1), (1, 0), (1, 1), (2, 1), (2, 2), (3, 2)]
    ties = [(0, 1, None), (0, 1, 2), (1, 0, 1), (0, 3, None)]
    dataset = Dataset(
        "small",
        pa.table({"user_id": list("abcd")}),
        pa.table({"item_id": ["0", "1", "2", "3"]}),
        int32(pairs, "user", "item"),
        int32([(0, 0), (0, 2), (3, 1)], "user", "item").append_column("text", pa.array(["keep", "item 2", "user d"])),
        int32(ties, "source", "target", "item").append_column("kind", pa.array(["tie"] * 4)),
        {"before": 1},
    )
    cut = k_core(dataset, 2)
    assert cut.users.to_pydict() == {"user_id": ["a", "b"]} and cut.items.to_pydict() == {"item_id": ["0", "1"]}
    assert cut.interactions.to_pydict() == {"user": [0, 0, 1, 1], "item": [0, 1, 0, 1]}
    assert cut.interactions.schema == dataset.interactions.schema and cut.ties.schema == dataset.ties.schema
    assert cut.reviews["text"].to_pylist() == ["keep"]
    assert cut.ties.to_pydict() == {"source": [0, 1], "target": [1, 0], "item": [None, 1], "kind": ["tie", "tie"]}
    assert cut.repairs == {"before": 1}
    assert cut.notes == {
        "users: removed by core 2": 2,
        "items: removed by core 2": 2,
        "interactions: removed by core 2": 3,
        "reviews: removed by core 2": 2,
        "ties: removed by core 2": 2,
    }
    assert k_core(Dataset("s", cut.users, cut.items, cut.interactions, empty_reviews(), cut.ties), 2).notes == {}
    with pytest.raises(ValueError, match="data.k_core is 3, and no user and item are left"):
        k_core(dataset, 3)


def int32(rows: list[tuple], *names: str) -> pa.Table:
    return pa.table({name: pa.array([row[n] for row in rows], pa.int32()) for n, name in enumerate(names)})


def test_load_finds_folders_and_says_what_is_missing(tmp_path, monkeypatch):
    (tmp_path / "gowalla").mkdir()
    for part in ("train", "test"):
        (tmp_path / "gowalla" / f"{part}.txt").write_text("0 1\n" if part == "train" else "1 1\n")
    monkeypatch.setenv("FUSED_REC_DATA", str(tmp_path))
    assert load(DataConfig(name="lightgcn_text")).n_users == 2
    assert load(DataConfig(name="lightgcn_text", path=str(tmp_path / "gowalla"), k_core=1)).name == "gowalla"
    monkeypatch.chdir(tmp_path / "gowalla")
    assert load(DataConfig(name="lightgcn_text", path=".")).name == "gowalla"
    with pytest.raises(ValueError, match="no user and item are left"):
        load(DataConfig(name="lightgcn_text", k_core=3))
    with pytest.raises(FileNotFoundError, match=r"(?s)douban_book.*set FUSED_REC_DATA .*, or data.path to that of"):
        load(DataConfig(name="edges"))
    monkeypatch.delenv("FUSED_REC_DATA")
    with pytest.raises(FileNotFoundError, match="or run python -m fused_rec.data.sources.download gowalla"):
        load(DataConfig(name="lightgcn_text"))
    with pytest.raises(FileNotFoundError, match=r"data.name 'tables' needs a folder: set data.path"):
        load(DataConfig(name="tables"))
    with pytest.raises(ValueError, match="data.name is 'netflix'; it must be one of synthetic, tables, lastfm, "):
        load(DataConfig(name="netflix"))


def test_load_makes_the_synthetic_market_from_its_seed():
    one, again, other = (load(DataConfig(seed=seed)) for seed in (3, 3, 4))
    assert one.interactions.equals(again.interactions) and not one.interactions.equals(other.interactions)
    assert set(READERS) == {
        *("synthetic", "tables", "lastfm", "lastfm_sociallgn", "lastfm_lightgcn", "stocknet"),
        *("fartrans", "amazon", "lightgcn_text", "recbole", "huggingface", "edges", "epinions", "insurance"),
        *(f"citeulike_t{split}{words}" for split in ("", "_p1", "_p10") for words in ("", "_words")),
    }
