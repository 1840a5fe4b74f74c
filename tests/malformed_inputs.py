"""What reads files that others wrote: each reader, sound inputs to spoil, and the errors it may end in.

`tests/test_malformed_inputs.py` spoils them a little in every run of the tests, `tests/stress/fuzz.py` for minutes,
guided by coverage. An input of several files is one string, the files between lines of `====`.
"""

import dataclasses
import functools
import gzip
import io
import json
import shutil
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.numpy

from fused_rec.config import Config, from_dict, to_dict
from fused_rec.data.dataset import DataError
from fused_rec.data.io.tables import read_tables
from fused_rec.data.sources.amazon import amazon
from fused_rec.data.sources.citeulike import citeulike_t
from fused_rec.data.sources.edges import edges
from fused_rec.data.sources.fartrans import fartrans, read_prices
from fused_rec.data.sources.fetch import DownloadError, unpack, verify
from fused_rec.data.sources.huggingface import huggingface
from fused_rec.data.sources.insurance import insurance
from fused_rec.data.sources.lastfm import lastfm, lastfm_lightgcn, lastfm_sociallgn
from fused_rec.data.sources.lightgcn import lightgcn_text
from fused_rec.data.sources.recbole import recbole
from fused_rec.data.sources.stocknet import stocknet
from fused_rec.evaluation.filters import apply
from fused_rec.evaluation.item_sets import item_sets
from fused_rec.evaluation.ranking import UserMetrics
from fused_rec.runs import run_dir
from fused_rec.serving.write_rankings import read_rules
from fused_rec.text.cache import read_vectors, write_vectors
from fused_rec.text.pretrained import open_model

TINY = Path(__file__).parent / "golden" / "tiny_bert"
FAMILIES = sorted(path.parent for path in TINY.parent.glob("families/*/config.json"))
BETWEEN = b"\n====\n"


@dataclasses.dataclass(frozen=True)
class Target:
    """read: lays the input out in an empty folder and reads it. errors: those its documentation names."""

    read: Callable[[Path, bytes], object]
    seeds: tuple[bytes, ...]
    errors: tuple[type[Exception], ...]
    words: tuple[bytes, ...] = ()  # of the format, to be put where they do not belong


def try_one(target: Target, data: bytes) -> Exception | None:
    """Reads one input in a folder of its own; the error that its documentation names, if it ended in one."""
    folder = tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None)
    try:
        target.read(Path(folder), data)
    except target.errors as error:
        str(error).encode()  # it must be possible to print it
        return error
    finally:
        shutil.rmtree(folder)
    return None


def files(*contents: bytes) -> bytes:
    """One input of several files."""
    return BETWEEN.join(contents)


def _lay_out(folder: Path, data: bytes, names: tuple[str, ...]) -> None:
    """The parts of the input as files; one that is missing or empty is not written, one named *.gz is packed."""
    for name, part in zip(names, data.split(BETWEEN), strict=False):
        if part:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(gzip.compress(part, 1) if name.endswith(".gz") else part)


def _folder_of(names: tuple[str, ...], reader: Callable[[Path, bool], object]) -> Callable[[Path, bytes], object]:
    def read(folder: Path, data: bytes) -> object:
        _lay_out(folder, data[1:], names)
        return reader(folder, data[:1] > b"\x80")

    return read


TEXT_TABLES = ("interactions.tsv", "ITEMS.CSV", "users.txt", "ties.csv.gz", "reviews.csv")
ENCODINGS = ("", "cp1252", "utf-16", "utf-7", "shift_jis")
PARTS_OF_TABLES = (
    *("interactions.csv/part-0.csv", "interactions.csv/part-1.csv.gz", "interactions.csv/part-2.CSV"),
    *("items/sector=a%20b/0.csv", "items/sector=__HIVE_DEFAULT_PARTITION__/1.csv"),
    *("users.parquet/part-0.snappy.parquet", "users.parquet/part-1.parquet"),
)


def _tables_text(folder: Path, data: bytes) -> object:
    """The first byte chooses the settings; spreadsheets' formats, each file as it finds itself."""
    _lay_out(folder, data[1:], TEXT_TABLES)
    chosen = data[0] if data else 0
    encoding, delimiter = ENCODINGS[chosen % len(ENCODINGS)], "^"[: chosen % 2]
    return read_tables(folder, repair=chosen > 128, encoding=encoding, delimiter=delimiter)


def _parquet(table: dict, **settings) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table(table), file, **settings)
    return file.getvalue()


CSV_TABLES = ("interactions.csv", "items.csv", "users.csv", "ties.csv", "reviews.csv")
ATOMIC = ("x.inter", "x.item", "x.user", "x.net")
HETREC = ("artists.dat", "tags.dat", "user_artists.dat", "user_friends.dat", "user_taggedartists.dat")
SOCIAL = tuple(
    f"sociallgn_split/{name}"
    for name in ("userReindex.json", "itemReindex.json", "train_set.txt", "test_set.txt", "trust.txt")
)
LIGHT = tuple(f"lightgcn_split/{name}" for name in ("data1.txt", "test1.txt", "trustnetwork.txt"))
LISTENS = (
    b"id\tname\turl\tpictureURL\n1\tAbba\tx\ty\n2\tBj\xc3\xb6rk\tx\ty\n",
    b"tagID\ttagValue\n5\tfu\xdfball\n6\tpop\n",
    b"userID\tartistID\tweight\n7\t1\t30\n8\t1\t2\n9\t1\t2\n7\t2\t1\n8\t2\t1\n9\t2\t1\n",
    b"userID\tfriendID\n7\t8\n8\t7\n",
    b"userID\tartistID\ttagID\tday\tmonth\tyear\n7\t2\t5\t1\t4\t2009\n8\t1\t6\t31\t12\t1956\n",
)
REVIEW = {"reviewerID": "A", "asin": "7", "overall": 4, "unixReviewTime": 9, "summary": "s", "reviewText": "It hums."}
TWEET = {"user": 0, "ts": 50, "text": "RT $A #b", "symbols": ["A", "B-C"], "rt_of": 1, "reply_to": 2, "mentions": [1]}
COMPANY = {"symbol": "A", "name": "Alpha Inc.", "kind": "k", "sector": "s", "industry": None, "country": "c"}
NUMBERS = (b"-1", b"0", b"9223372036854775808", b"1e400", b"nan", b"99999999999", b"4102444800", b"1970-01-01T00:00Z")
DELIMITED = (b'"', b",", b"\t", b"\r", b"\0", b"\xff", b"\xef\xbb\xbf", BETWEEN, *NUMBERS)
JSON_WORDS = (b"null", b"[]", b"{}", b'""', b"true", b"[" * 3000, b'"\\ud800"', b"NaN", BETWEEN, *NUMBERS)


# Of each layout; a seed leaves the others empty.
SHARDS = (
    *(f"interactions/{split}-00000-of-00001.parquet" for split in ("train", "validation", "test")),
    *(f"{table}/train-00000-of-00001.parquet" for table in ("items", "users", "ties", "reviews")),
    *("data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "data/test-00000-of-00001.parquet"),
)
CITEULIKE = (
    *("vocabulary.dat", "mult.dat", "tags.dat", "tag-item.dat.gz", "users.dat"),
    *("cf-train-1-users.dat.gz", "cf-test-1-users.dat"),
)
INSURANCE = ("purchase_events_train.csv", "purchase_events_test.csv.gz")
FARTRANS = ("customer_information.csv", "asset_information.csv", "transactions.csv", "close_prices.csv")


def _fartrans(path: Path, repair: bool) -> object:
    return fartrans(path, repair), read_prices(path / "close_prices.csv")


def _tables_parquet(folder: Path, data: bytes) -> object:
    (folder / "interactions.parquet").write_bytes(data)
    return read_tables(folder, repair=True)


# What Arrow may hold in a column, wherever a file of tables may put it.
COLUMNS: tuple[Callable[[int], pa.Array], ...] = tuple(
    functools.partial(lambda values, kind, n: pa.array((values * n)[:n], kind), values, kind)
    for values, kind in (
        (["a", "b", ""], pa.string()),
        (["a", None, "\u2028"], pa.large_string()),
        ([1, -1, None], pa.int64()),
        ([2**64 - 1, 0], pa.uint64()),
        ([1.5, float("nan"), float("inf")], pa.float64()),
        ([1.0, None], pa.float16()),
        ([None], pa.null()),
        ([True, False, None], pa.bool_()),
        ([b"\xff", b"a"], pa.binary()),
        ([0, 10**15, None], pa.timestamp("us", "UTC")),
        ([-(10**15), 5], pa.timestamp("s")),
        ([1, 2], pa.date32()),
        ([1, 2], pa.duration("s")),
        ([1, None], pa.time64("us")),
        (["1.5", None], pa.decimal128(5, 2)),
        ([["a"], None, []], pa.list_(pa.string())),
        ([{"a": 1}, None], pa.struct([("a", pa.int8())])),
        ([[(1, 2)], None], pa.map_(pa.int8(), pa.int8())),
        (["x", "y", None], pa.dictionary(pa.int8(), pa.string())),
        ([1, 2], pa.dictionary(pa.int32(), pa.int64())),
        ([1.5, 2], pa.dictionary(pa.int32(), pa.float32())),
        (["a", "b"], pa.string_view()),
    )
    for values in [[pa.scalar(v).cast(kind).as_py() if kind == pa.decimal128(5, 2) and v else v for v in values]]
)
COLUMN_NAMES = (
    "user_id",
    "item_id",
    "timestamp",
    "value",
    "text",
    "split",
    "name",
    "kind",
    "source_id",
    "target_id",
    "x",
)


def _tables_typed(folder: Path, data: bytes) -> object:
    """Each table: a byte of rows, then pairs of a column's name and type; 255 ends it."""
    for table, part in zip(("interactions", "items", "users", "ties", "reviews"), data.split(b"\xff"), strict=False):
        if len(part) > 2:
            columns = {
                COLUMN_NAMES[name % len(COLUMN_NAMES)]: COLUMNS[kind % len(COLUMNS)](part[0] % 5)
                for name, kind in zip(part[1::2], part[2::2], strict=False)
            }
            pq.write_table(pa.table(columns), folder / f"{table}.parquet")
    return read_tables(folder, repair=len(data) % 2 == 0)


def _config(_: Path, data: bytes) -> object:
    try:
        values = json.loads(data)
    except RecursionError as error:  # of Python's own parser, before any of our code
        raise ValueError("nested too deeply") from error
    config = from_dict(values)
    assert from_dict(json.loads(json.dumps(to_dict(config), allow_nan=False))) == config
    return config


RULES = (
    b'{"rules": [{"name": "risk", "require": ["item.risk", "at_most", "user.risk"], "order": ["low", ["mid", "high"]]},'
    b'{"name": "land", "require": ["user.land", "one_of", "item.sold"], "separator": ";", "allow_unknown": ["item"]},'
    b'{"name": "age", "require": ["user.age", "at_least", 18]}, {"name": "mine", "refuse": "held"},'
    b'{"name": "out", "refuse": {"items": ["p"]}}, {"name": "no", "refuse": {"pairs": [["u", "p"]]}}]}'
)


def _rules(folder: Path, data: bytes) -> object:
    """Whatever is taken for rules can be applied to tables that have the columns, or is refused by name."""
    (folder / "rules.json").write_bytes(data)
    rules, _ = read_rules(folder / "rules.json")
    users = pa.table({"user_id": ["u", "v"], "risk": ["low", None], "land": ["a", "b"], "age": [17, None]})
    items = pa.table({"item_id": ["p", "q"], "risk": ["mid", "high"], "sold": ["a;b", None]})
    return apply(rules, users, items, item_sets(np.array([0]), np.array([1]), 2))


def _run(folder: Path, data: bytes) -> object:
    _lay_out(folder, data, ("run.json", "results.json"))
    run_dir.check_config(Config(), folder)
    run_dir.check_tables("a", folder)
    return run_dir.read_finished(folder)


def _users(folder: Path, data: bytes) -> object:
    (folder / "test_metrics_per_user.npz").write_bytes(data)
    return run_dir.read_users(folder / "test_metrics_per_user.npz")


def _users_seed() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        metrics = {"ndcg@10": np.ones(2, np.float32), "auc": np.zeros(2, np.float32)}
        run_dir.write_users(Path(folder, "a"), UserMetrics(np.arange(2, dtype=np.int32), metrics, {}))
        return Path(folder, "a").read_bytes()


KEYS, VECTORS = np.arange(96, dtype=np.uint8).reshape(3, 32), np.arange(12, dtype=np.float32).reshape(3, 4)


def _shard(folder: Path, data: bytes) -> object:
    """A spoiled shard gives a vector that was stored, or none."""
    (folder / f"{'0' * 32}.safetensors").write_bytes(data)
    vectors, found = read_vectors(folder, KEYS, 4)
    assert np.array_equal(vectors[found], VECTORS[found]) and not vectors[~found].any()
    return found


def _shard_seed() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        write_vectors(Path(folder), KEYS, VECTORS)
        [shard] = Path(folder).glob("*.safetensors")
        return shard.read_bytes()


MODEL_FILES = (
    *("config.json", "modules.json", "1_Pooling/config.json", "sentence_bert_config.json"),
    *("config_sentence_transformers.json", "model.safetensors.index.json", "tokenizer_config.json", "tokenizer.json"),
)


def _model(folder: Path, data: bytes) -> object:
    _lay_out(folder, data, MODEL_FILES)
    weights = "model-1.safetensors" if (folder / MODEL_FILES[5]).exists() else "model.safetensors"
    (folder / weights).symlink_to(TINY / "model.safetensors")
    return open_model(str(folder))


def _weights(folder: Path, data: bytes) -> object:
    for name in MODEL_FILES[:1] + MODEL_FILES[6:]:
        (folder / name).symlink_to(TINY / name)
    (folder / "model.safetensors").write_bytes(data)
    return open_model(str(folder))


def _weights_seed() -> bytes:
    """A few of the weights: enough to be read, too few to be accepted."""
    stored = safetensors.numpy.load_file(TINY / "model.safetensors")
    return safetensors.numpy.save({name: stored[name][:2] for name in sorted(stored)[:3]})


def model_seed(**more: bytes) -> bytes:
    """The tiny model's folder with other contents of some files."""
    there = {name: (TINY / name).read_bytes() for name in MODEL_FILES if (TINY / name).exists()}
    return files(*({**there, **more}.get(name, b"") for name in MODEL_FILES))


FAMILY_FILES = (
    *("config.json", "modules.json", "1_Pooling/config.json", "config_sentence_transformers.json"),
    *("sentence_roberta_config.json", "tokenizer_config.json", "tokenizer.json"),
)


def _family(folder: Path, data: bytes) -> object:
    """The first byte chooses the tiny model whose weights lie in the folder; its tokenizer where none is given."""
    tiny = FAMILIES[data[0] % len(FAMILIES)] if data else FAMILIES[0]
    _lay_out(folder, data[1:], FAMILY_FILES)
    for name in ("model.safetensors", "tokenizer.json"):
        if not (folder / name).exists():
            (folder / name).symlink_to(tiny / name)
    return open_model(str(folder), prompt="query" if b'"query"' in data else "")


def _family_seed(number: int) -> bytes:
    there = [file for file in FAMILY_FILES[:-1] if (FAMILIES[number] / file).exists()]
    contents = ((FAMILIES[number] / name).read_bytes() if name in there else b"" for name in FAMILY_FILES)
    return bytes([number]) + files(*contents)


def _unpack(name: str) -> Callable[[Path, bytes], object]:
    def read(folder: Path, data: bytes) -> None:
        (folder / name).write_bytes(data)
        unpack(folder / name, folder / "out", limit=100_000)
        assert sum(file.stat().st_size for file in (folder / "out").rglob("*")) <= 100_000
        assert {entry.name for entry in folder.iterdir()} <= {name, "out"}

    return read


def _gzip(folder: Path, data: bytes) -> None:
    (folder / "a.gz").write_bytes(data)
    verify(folder / "a.gz", "a.gz", "", 10_000)


def zipped(*members: tuple[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    """A zip file of these members."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return file.getvalue()


def tarred(*members: tuple[str, bytes], form: int = tarfile.PAX_FORMAT) -> bytes:
    """A tar.gz file of these members."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz", format=form) as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


def _tar(folder: Path, data: bytes) -> None:
    """The mutations go to the tar inside, whose gzip they would only break."""
    _unpack("a.tar.gz")(folder, gzip.compress(data, 1))


MEMBERS = (("in/a.txt", b"hello"), ("b.txt", b"x" * 300), ("n/" * 60 + "n", b""))

TARGETS: dict[str, Target] = {
    "tables_csv": Target(
        _folder_of(CSV_TABLES, lambda path, repair: read_tables(path, repair=repair)),
        (
            b"\xff"
            + files(
                b'user_id,item_id,timestamp,value,text,split\nu,i,100,1.5,"a, b",train\nv,i,2020-01-01,,,valid\n',
                b"item_id,name,text,sector,price\ni,One,First,tech,1.5\nj,Two,,,\n",
                b"user_id,age\nu,30\nv,\n",
                b"source_id,target_id,kind,timestamp,item_id\nu,v,refers,5,i\nv,u,,,\n",
                b"user_id,item_id,text,timestamp\nu,j,fine,7\nu,j,again,\n",
            ),
            b"\0user_id,item_id\n1,2\n",
        ),
        (DataError,),
        (*DELIMITED, b"user_id", b"row in the file", b"timestamp", b"text"),
    ),
    "tables_text": Target(
        _tables_text,
        (
            b"\x83"  # cp1252, ^ and a repair
            + files(
                "sep=\t\r\nuser_id\titem_id\tvalue\nü\ti\t1\nv\tj\t2\n".encode("utf-16"),
                'item_id;name;price\ni;"Ö;ne";1.5\nj;;2\n'.encode(),
                "user_id|age\nü|30\nv|\n".encode("cp1252"),
                b"source_id^target_id\nv^v\n",
                b'user_id,item_id,text\nv,j,"' + b"long " * 300_000 + b'"\n',
            ),
            b"\1user_id;item_id\n1;2\n",
        ),
        (DataError,),
        (*DELIMITED, b"sep=;\n", b"\xff\xfe", b"\0", b"user_id", b"item_id", b"^", b";", b"|", b"+AGE-", b"1,5"),
    ),
    "tables_parts": Target(
        _folder_of(PARTS_OF_TABLES, lambda path, repair: read_tables(path, repair=repair)),
        (
            b"\xff"
            + files(
                *(b"user_id,item_id\nu,i\n", b"item_id,user_id\nj,v\n", b"user_id;item_id\nw;i\n"),
                *(b"item_id,price\ni,1\n", b"item_id,price\nj,2.5\n"),
                _parquet({"user_id": ["u", "v"], "age": [30, None]}),
                _parquet({"user_id": ["w"], "age": [1.5]}, compression="none"),
            ),
        ),
        (DataError,),
        (*DELIMITED, b"user_id", b"item_id", b"sector", b"PAR1"),
    ),
    "tables_parquet": Target(
        _tables_parquet,
        (
            _parquet({"user_id": ["u", "v"], "item_id": ["i", "i"], "value": [1.0, None], "timestamp": [5, 6]}),
            _parquet({"user_id": [1], "item_id": pa.array(["i"]).dictionary_encode()}, compression="none"),
        ),
        (DataError,),
    ),
    "tables_typed": Target(
        _tables_typed, (bytes([3, 0, 0, 1, 0, 2, 9, 3, 4, 255, 2, 1, 0, 10, 15, 255, 2, 0, 0]),), (DataError,)
    ),
    "lastfm": Target(_folder_of(HETREC, lastfm), (b"\0" + files(*LISTENS),), (DataError,), DELIMITED),
    "lastfm_sociallgn": Target(
        _folder_of(HETREC + SOCIAL, lastfm_sociallgn),
        (
            b"\0"
            + files(
                *LISTENS,
                b'{"7": 0, "8": 1, "9": 2}',
                b'{"1": 0, "2": 1}',
                b"user,item\n0,0\n1,1\n",
                b"user,item\n2,0\n",
                b"user,friend\n0,1\n",
            ),
        ),
        (DataError,),
        (*DELIMITED, *JSON_WORDS),
    ),
    "lastfm_lightgcn": Target(
        _folder_of(HETREC + LIGHT, lastfm_lightgcn),
        (b"\0" + files(*LISTENS, b"1\t1\t1\n2\t1\t1\n", b"3\t2\t1\n", b"1\t2\n"),),
        (DataError,),
        DELIMITED,
    ),
    "stocknet": Target(
        _folder_of(("tweets.jsonl.gz", "items.jsonl.gz", "users.jsonl.gz"), stocknet),
        (
            b"\0"
            + files(
                b"".join(json.dumps(TWEET | {"user": n}).encode() + b"\n" for n in range(3)),
                json.dumps(COMPANY).encode() + b'\n{"symbol": "B-C"}\n',
                b"".join(b'{"user": %d, "followers": 1, "friends": 2}\n' % n for n in range(3)),
            ),
        ),
        (DataError,),
        JSON_WORDS,
    ),
    "fartrans": Target(
        _folder_of(FARTRANS, _fartrans),
        (
            b"\0"
            + files(
                b"customerID,customerType,riskLevel,investmentCapacity,lastQuestionnaireDate,timestamp\n"
                b"c,Mass,Income,CAP_LT30K,2018-01-02,2018-01-03\nd,Premium,Predicted_Balanced,Not_Available,,2019-01-01\n",
                b"ISIN,assetName,assetShortName,assetCategory,assetSubCategory,marketID,sector,industry,timestamp\n"
                b'I1,"A, Inc.",A,Stock,,XATH,Energy,Oil,2018-01-01\nI2,B fund,B,MTF,Equity,,,,2018-01-01\n',
                b"customerID,ISIN,transactionID,transactionType,timestamp,totalValue,units,channel,marketID\n"
                b"c,I1,1,Buy,2018-02-01,100.5,10.0,Internet Banking,XATH\nd,I2,2,Buy,2018-02-02,1.0,1.0,Branch,XATH\n"
                b"c,I1,3,Sell,2018-03-01,100.5,10.0,Internet Banking,XATH\n",
                b"ISIN,timestamp,closePrice\nI1,2018-01-01,10.5\nI2,2018-01-01,3\n",
            ),
        ),
        (DataError,),
        (*DELIMITED, b"Buy", b"timestamp", b"closePrice", b"Not_Available"),
    ),
    "amazon": Target(
        _folder_of(("r.json.gz",), amazon),
        (b"\0" + json.dumps(REVIEW).encode() + b"\n" + json.dumps(REVIEW | {"reviewText": ""}).encode() + b"\n",),
        (DataError,),
        JSON_WORDS,
    ),
    "lightgcn_text": Target(
        _folder_of(("train.txt", "test.txt"), lightgcn_text),
        (b"\0" + files(b"10 3 5\n2 3\n4\n", b"2 5\n10 3\n"),),
        (DataError,),
        (b" ", b"x", b"\xff", b"\r", b"\x85", BETWEEN, *NUMBERS),
    ),
    "edges": Target(
        _folder_of(("train.tsv", "test.tsv.gz", "social.tsv"), edges),
        (b"\0" + files(b"1\t5\n2\t5\n", b"1\t6\n", b"1\t2\n9\t1\n2\t2\n"),),
        (DataError,),
        DELIMITED,
    ),
    "citeulike_t": Target(
        _folder_of(
            CITEULIKE, lambda path, repair: (citeulike_t(path, repair), citeulike_t(path, repair, train_size=1))
        ),
        (
            b"\0"
            + files(
                b"graph\n\xc2\xa0\ntext",
                b"2 2:1 0:6\n0\n1 1:1",
                b"to-read\nml",
                b"1 0\n2 0 2",
                b"2 0 1\n1 2",
                b"1 1\n1 2\n",
                b"1 0\n0 \n",
            ),
        ),
        (DataError,),
        (b" ", b":", b"x", b"\n", b"\r", b"\xff", b"\x85", BETWEEN, *NUMBERS),
    ),
    "insurance": Target(
        _folder_of(INSURANCE, insurance),
        (
            b"\0"
            + files(
                b"event_id,user_id,event_time,valid,item_id\r\n1,7,2018-10-01 07:42:23,0,item_2\r\n"
                b"1,7,2018-10-01 07:42:23,0,item_1\r\n2,8,2020-06-01 00:00:00,1,item_1\r\n",
                b"event_id,user_id,event_time,item_id\r\n3,7,2020-08-01 00:00:00,item_2\r\n"
                b"4,9,2020-08-02 00:00:00,item_1\r\n",
            ),
        ),
        (DataError,),
        (*DELIMITED, b"valid", b"event_time", b"item_id"),
    ),
    "recbole": Target(
        _folder_of(ATOMIC, recbole),
        (
            b"\0"
            + files(
                b"user_id:token\titem_id:token\trating:float\ttext:token_seq\tdevice:token\nu\ti\t2.5\tso so\tphone\n",
                b"item_id:token\tname:token_seq\tprice:float\tpoint:float_seq\ni\tThing\t1.5\t1 2\nj\t\t\t\n",
                b"user_id:token\nu\nv\n",
                b"source_id:token\ttarget_id:token\nu\tv\n",
            ),
            b"\0"
            + files(
                b"user_id:token\titem_id:token\ttimestamp:float\tsplit:token\nu\ti\t5\ttrain\nv\tj\t\ttest\n",
                b"item_id:token\tname:token_seq\ttext:token_seq\ni\tThing\tA thing\nj\t\t\n",
                b"",
                b"source_id:token\ttarget_id:token\titem_id:token\nu\tv\ti\nv\tu\t\n",
            ),
        ),
        (DataError,),
        (*DELIMITED, b":float", b":token_seq", b":float_seq", b"text", b"name", b"user_id"),
    ),
    "huggingface": Target(
        _folder_of(SHARDS, huggingface),
        (
            b"\xff"
            + files(
                _parquet({"user_id": ["u", "v"], "item_id": ["i", "i"], "split": ["train"] * 2, "row": [2, 0]}),
                _parquet({"user_id": ["u"], "item_id": ["j"], "split": ["valid"], "row": [1]}),
                b"",
                _parquet({"item_id": ["i", "j"], "name": ["One", None], "price": [1.5, None]}),
                _parquet({"user_id": ["u", "v", "w"], "age": [30, None, 4]}),
                _parquet({"source_id": ["u"], "target_id": ["v"], "kind": ["refers"]}),
                _parquet({"user_id": ["u"], "item_id": ["j"], "text": ["fine"]}),
            ),
            b"\0"
            + files(
                *[b""] * 7,
                _parquet({"user_id": [1], "item_id": [7], "value": [1.0]}),
                _parquet({"user_id": [2], "item_id": [7], "value": [None]}, compression="none"),
                _parquet({"user_id": [2], "item_id": [8], "value": [2.0]}),
            ),
        ),
        (DataError,),
        (BETWEEN, b"row", b"part", b"user_id", b"train"),
    ),
    "config": Target(
        _config,
        (json.dumps(to_dict(Config())).encode(), b'{"model": {"dim": 8}, "graph": {"attributes": ["a"]}}'),
        (ValueError,),
        (*JSON_WORDS, *(f'"{name}"'.encode() for name in ("model", "dim", "train", "learning_rate", "attributes"))),
    ),
    "rules": Target(
        _rules,
        (RULES, b'{"rules": []}'),
        (ValueError,),
        (*JSON_WORDS, b'"none_of"', b'"user."', b'"refuse"', b'"require"', b'"held"', b"[[", b'"allow_unknown"'),
    ),
    "run": Target(
        _run,
        (
            files(
                json.dumps({"config": to_dict(Config()), "tables": "a"}).encode(),
                b'{"best_step": 5, "phase": "select", "temperature": 0.3}',
            ),
        ),
        (ValueError, FileNotFoundError),
        JSON_WORDS,
    ),
    "users": Target(_users, (_users_seed(),), (ValueError, FileNotFoundError)),
    "shard": Target(_shard, (_shard_seed(),), (), (b'"F64"', b'"BF16"', b'"shape":[]', b"[3,32]", b"keys")),
    "model": Target(
        _model,
        (model_seed(), model_seed(**{MODEL_FILES[5]: b'{"weight_map": {"a": "model-1.safetensors"}}'})),
        (ValueError, FileNotFoundError),
        (*JSON_WORDS, b'"auto_map": {}', b'"path": "../x"'),
    ),
    "family": Target(
        _family,
        (
            *(_family_seed(number) for number in range(len(FAMILIES))),
            b"\0" + files(b"{}", b"", b"", b"", b"", b"", (FAMILIES[0] / "tokenizer.json").read_bytes()[:2000]),
        ),
        (ValueError, FileNotFoundError),
        (*JSON_WORDS, b'"rope_type": "yarn", "factor": 2.0', b'"layer_types": null', b'"sliding_window": 3', b"1e300"),
    ),
    "weights": Target(_weights, (_weights_seed(),), (ValueError, FileNotFoundError), (b'"BF16"', b'"I8"', b"[2,32]")),
    "zip": Target(
        _unpack("a.zip"),
        (zipped(*MEMBERS), zipped(*MEMBERS, method=zipfile.ZIP_STORED), zipped(*MEMBERS, method=zipfile.ZIP_LZMA)),
        (DownloadError,),
        (b"../", b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07"),
    ),
    "tar": Target(
        _tar,
        tuple(
            gzip.decompress(tarred(*MEMBERS, form=form))
            for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT)
        ),
        (DownloadError,),
        (b"../", b"ustar", b"27 GNU.sparse.size=99999999\n", b"20 size=99999999999\n"),
    ),
    "gzip": Target(_gzip, (gzip.compress(b"hello " * 50),), (DownloadError,)),
}
