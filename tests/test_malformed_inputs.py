"""Spoiled input ends in a documented error or in data, never otherwise; what once did not is kept here.

`tests/stress/fuzz.py` looks for more, for minutes.
"""

import gzip
import json
import os
import resource
import subprocess
import sys

import jaxtyping
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from malformed_inputs import BETWEEN, KEYS, TARGETS, TINY, files, model_seed, try_one

from fused_rec.data.dataset import DataError, printable
from fused_rec.data.io.tables import read_tables
from fused_rec.data.sources.lightgcn import lightgcn_text
from fused_rec.data.sources.recbole import recbole
from fused_rec.data.sources.stocknet import stocknet
from fused_rec.text.cache import read_vectors

EXAMPLES = {"model": 10, "weights": 10, "family": 25}
# Under test every annotated function checks its arguments, and is quicker to refuse a wrong type.
CHECKED = ("config", "run")


@st.composite
def spoiled(draw: st.DrawFn, name: str) -> bytes:
    """A sound input with a few places cut, repeated or overwritten."""
    data = draw(st.sampled_from(TARGETS[name].seeds))
    words = st.sampled_from(TARGETS[name].words) if TARGETS[name].words else st.nothing()
    for _ in range(draw(st.integers(1, 4))):
        at, cut = draw(st.integers(0, len(data))), draw(st.integers(0, 12))
        data = data[:at] + draw(st.one_of(words, st.binary(max_size=6))) + data[at + cut :]
    return data


@pytest.mark.parametrize("name", TARGETS)
def test_spoiled_input_ends_in_a_documented_error(name):
    @settings(
        max_examples=EXAMPLES.get(name, 40),
        deadline=None,
        database=None,
        phases=(Phase.generate,),
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(spoiled(name))
    def spoil(data):
        try:
            try_one(TARGETS[name], data)
        except jaxtyping.TypeCheckError:
            assert name in CHECKED

    spoil()


@pytest.mark.parametrize("name", TARGETS)
def test_sound_input_is_read(name):
    """Otherwise spoiling it would show nothing. Seeds that are refused: odd types, few weights, LZMA."""
    refused = [str(error) for error in (try_one(TARGETS[name], seed) for seed in TARGETS[name].seeds) if error]
    expected = {
        "tables_typed": "is empty",
        "weights": "do not fit the config",
        "zip": "encrypted or packed",
        "model": "",
        "family": "model_type is None",
    }
    assert all(name in expected and expected[name] in message for message in refused), refused


SOCIAL, LIGHT, TWEETS, ZIP, USERS = (
    TARGETS[name].seeds[0] for name in ("lastfm_sociallgn", "lastfm_lightgcn", "stocknet", "zip", "users")
)
LASTFM = TARGETS["lastfm"].seeds[0][1:].split(BETWEEN)[1:]
NESTED = b'{"a": ' + b"[" * 100_000
ONCE = [  # each ended in another error before, or in none: in a crash or a hang
    ("tables_csv", b"\0" + files(b"user_id,item_id\nu,i\n", b"item_id,kind,split\ni,a,b\n"), None),
    ("tables_csv", b"\0" + files(b"user_id,item_id\nu,i\n", b"item_id,row in the file\ni,7\n"), "another name"),
    ("tables_csv", b"\0user_id,\x1b[2J\n1,2\n", r"there: user_id, \x1b[2J"),
    ("tables_typed", bytes([3, 0, 0, 1, 0, 4, 15, 255, 2, 1, 0]), "text holds list<"),
    ("tables_typed", bytes([2, 0, 0, 1, 0, 3, 16, 255, 2, 1, 0]), None),  # a value that nothing needs
    ("tables_typed", bytes([3, 0, 0, 1, 0, 5, 8, 255, 2, 1, 0]), "split holds binary values"),
    ("tables_typed", bytes([3, 0, 0, 1, 0, 255, 255, 255, 3, 8, 0, 9, 0, 7, 15]), "kind holds list<"),
    ("tables_typed", bytes([2, 0, 21, 1, 21, 10, 21]), None),
    (
        "lastfm",
        b"\0" + files(b"id\tnom\n1\tAbba\n", *LASTFM),
        "column name",
    ),
    ("lastfm_sociallgn", SOCIAL.replace(b"0,0\n", b"0,9\n"), "and there are 0 to 1"),
    (
        "lastfm_sociallgn",
        SOCIAL.replace(b"0,0\n", b"0, 0\n"),
        "row 2: item ' 0' is no int",
    ),
    ("lastfm_sociallgn", SOCIAL.replace(b'"8": 1', b'"8": []'), "from id to position"),
    ("lastfm_sociallgn", SOCIAL.replace(b'{"7": 0', NESTED), "from id to position"),
    (
        "lastfm_lightgcn",
        LIGHT.replace(b"3\t2\t1\n", b"9\t2\t1\n"),
        "row 1: user is 9, and",
    ),
    ("amazon", b"\0null\n", "row 1: is no JSON object"),
    ("amazon", b"\0" + NESTED, "row 1: is no JSON object"),
    ("amazon", b'\0{"reviewerID": "a"}\n{"reviewerID": "\\ud800"}\n', "row 2: reviewerID is"),
    ("amazon", b'\0{"reviewerID": "a"}\n\n{"asin": "\xff"}\n', "row 3: is no JSON object"),
    ("stocknet", TWEETS.replace(b'"RT $A #b"', b"null", 1), "1 tweets have no text"),
    (
        "stocknet",
        TWEETS.replace(b'["A", "B-C"]', b'["A", null]', 1),
        "1 tweets have no symbols or null",
    ),
    ("stocknet", TWEETS.replace(b'["A", "B-C"]', b"null", 1), "1 tweets have no symbols"),
    ("edges", b"\0" + files(b"1\t5\n\xdc\n", b"1\t6\n"), r"train.tsv, row 2: not UTF-8: b'\xdc\n'"),
    ("edges", b"\0" + files(b"1\t\n", b"1\t6\n"), "train.tsv, row 1: item_id None is no integer"),
    ("edges", b"\0" + files(b"1\t5\n", b"9223372036854775808\t6\n"), "test.tsv.gz, row 1: user_id '92233"),
    ("recbole", b"\0a:token\ta:float\n1\t2\n", "a column is there twice"),
    (
        "recbole",
        b"\0user_id:token\titem_id:token\ttext:token\tx:token_seq\nu\ti\tt\tx\n",
        "column text is there, and x would",
    ),
    ("lightgcn_text", b"\0" + files(b"1 2\n", b"1 2\n\n3 x4 5\n"), "test.txt, row 3: 'x4' is no integer of up to 18"),
    ("lightgcn_text", b"\0" + files(b"1 1_0\n", b"1 2\n"), "train.txt, row 1: '1_0' is no integer"),
    ("lightgcn_text", b"\0" + files(b"1 2\n", b"1 99999999999999999999\n"), "test.txt, row 1: '99999999999999999999'"),
    ("lightgcn_text", b"\0" + files(b"\n", b"\n"), "there is no usable interaction"),
    ("run", b"[]", "run.json is damaged (it holds a list)"),
    ("run", b"[" * 100_000, "run.json is damaged"),
    ("run", b'{"config": {"model": 3}, "tables": "a"}', "has no config or no digest of the tables"),
    ("run", b'{"config": {}}', "has no config or no digest of the tables"),
    ("users", b"", "test_metrics_per_user.npz is damaged"),
    ("users", USERS.replace(b"user", b"uses"), "test_metrics_per_user.npz is damaged"),
    ("users", USERS.replace(b"<i4", b"|O8"), "test_metrics_per_user.npz is damaged"),
    ("users", USERS.replace(b"(2,), }", b"(2,)(((", 1), "test_metrics_per_user.npz is damaged"),
    ("config", b'{"train": {"learning_rate": Infinity}}', "train.learning_rate is inf; it must be finite"),
    ("config", b'{"train": {"learning_rate": 1' + b"0" * 400 + b"}}", "of 64 bits"),
    ("config", b'{"model": {"dim": 1' + b"0" * 40 + b"}}", "of 64 bits"),
    ("config", b'{"data": {"path": "a\\u0000b"}}', "text without NUL"),
    ("config", b'{"data": {"path": "\\ud800"}}', "text without NUL or surrogates"),
    (
        "zip",
        ZIP.replace(b"PK\x01\x02\x14\x03\x14", b"PK\x01\x02\x14\x03\xff"),
        "cannot be unpacked",
    ),
]


@pytest.mark.parametrize(("name", "data", "message"), ONCE, ids=[f"{name}-{n}" for n, (name, _, _) in enumerate(ONCE)])
def test_what_once_went_wrong_does_not_again(name, data, message):
    error = try_one(TARGETS[name], data)
    assert (error is None) if message is None else message in str(error)


@pytest.mark.parametrize("values", [[], None, 3, "model", {"model": []}, {"model": {1: 2}}, {3: {}}])
def test_a_config_that_is_no_dictionary_of_dictionaries(values):
    """As users run it: the type checker of the tests would refuse it before config.py can."""
    program = (
        f"from fused_rec.config import from_dict\ntry:\n    from_dict({values!r})\nexcept ValueError: print('told')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout == "told\n", done.stderr


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", "[]", "config.json contains a list, not a dict"),
        ("config.json", "[" * 100_000, "config.json is not JSON"),
        ("modules.json", "[3]", "must be a list of objects with type and path"),
        ("modules.json", '[{"type": "a.Transformer", "path": "../other"}]', "folders outside of the model's"),
        ("model.safetensors.index.json", "{}", "must map each weight to a file"),
        ("tokenizer.json", "{", "the tokenizer cannot be read from its files"),
        ("tokenizer_config.json", '{"model_max_length": "x"}', "the tokenizer cannot be read from its files"),
        ("sentence_bert_config.json", '{"max_seq_length": "9"}', "max_seq_length is '9'; it must be between 3 and"),
    ],
)
def test_model_folders_of_other_json_are_refused(file, content, message):
    error = try_one(TARGETS["model"], model_seed(**{file: content.encode()}))
    assert message in str(error)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("vocab_size", "90"), ("hidden_size", 10**30), ("num_hidden_layers", 10**7), ("layer_norm_eps", float("nan"))],
)
def test_a_model_config_cannot_ask_for_the_impossible(setting, value):
    config = json.loads((TINY / "config.json").read_text()) | {setting: value}
    error = try_one(TARGETS["model"], model_seed(**{"config.json": json.dumps(config).encode()}))
    assert f"{setting} is " in str(error)


def test_every_bad_line_of_integers_is_counted(tmp_path):
    (tmp_path / "train.txt").write_text("1 2\n" + "x\n" * 7)
    (tmp_path / "test.txt").write_text("y 1\n")
    with pytest.raises(DataError) as error:
        lightgcn_text(tmp_path, True)
    reported = str(error.value).splitlines()
    assert reported[1] == (
        "  train.txt, row 2: 'x' is no integer of up to 18 digits. "
        "give a line a user, `user item item ...`, all integers."
    )
    assert reported[6] == "  train.txt: 7 lines hold other than integers, the first 5 listed. download it again."
    assert reported[7].startswith("  test.txt, row 1: 'y'") and len(reported) == 8


def test_reports_move_no_cursor():
    assert printable("a\x1b[2J\u202eb\ud800\n\u00e9 \u4e2d") == r"a\x1b[2J\u202eb\ud800\né 中"


def test_the_name_of_a_folder_is_made_printable(tmp_path):
    folder = tmp_path / "a\x1b[31m\n=1"
    folder.mkdir()
    (folder / "x.inter").write_text("user_id:token\titem_id:token\nu\ti\n")
    assert recbole(folder, False).name == r"a\x1b[31m\n=1"


LIMITED = """
import resource, sys
from pathlib import Path
from fused_rec.data.sources import amazon, edges, stocknet; from fused_rec.data.io import tables
from fused_rec.data.dataset import DataError

def pages():
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()

resource.setrlimit(resource.RLIMIT_AS, (pages() + 1_500_000_000,) * 2)
try:
    {call}
except DataError as error:
    print(error)
"""


def limited(call: str) -> str:
    """What a reader says in a process that may take 1.5 GB more than it has when it starts."""
    done = subprocess.run(
        [sys.executable, "-c", LIMITED.format(call=call)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_packed_file_that_fills_the_memory_is_refused(tmp_path):
    """2 GB of spaces in 2 MB."""
    block = gzip.compress(b" " * (1 << 27))
    (tmp_path / "r.json.gz").write_bytes(block * 16)
    assert "unpacks to more than 268,435,456 bytes" in limited(f"amazon.amazon(Path({str(tmp_path)!r}), False)")
    (tmp_path / "train.tsv.gz").write_bytes(block * 16)
    assert "unpacks to more than 268,435,456 bytes" in limited(f"edges.edges(Path({str(tmp_path)!r}), False)")


def test_a_parquet_file_that_claims_too_many_rows_is_refused(tmp_path):
    one = pa.array(["u"]).dictionary_encode()
    ids = pa.DictionaryArray.from_arrays(pa.array([0], pa.int32()).take(pa.nulls(0, pa.int32())), one.dictionary)
    ids = pa.concat_arrays([ids, one]).take(pa.array([0] * (1 << 22), pa.int32()))
    pq.write_table(pa.table({"user_id": ids, "item_id": ids}), tmp_path / "interactions.parquet")
    assert (tmp_path / "interactions.parquet").stat().st_size < 100_000
    with pytest.raises(DataError, match="it claims 4,194,304 rows in"):
        read_tables(tmp_path)


def test_what_is_no_file_blocks_nothing(tmp_path):
    """A named pipe among the shards would wait for a writer for ever; a folder cannot be mapped."""
    os.mkfifo(tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").mkdir()
    (tmp_path / "c.safetensors").symlink_to("/dev/zero")
    (tmp_path / "d.safetensors").symlink_to(tmp_path / "nothing")
    with (tmp_path / "e.safetensors").open("wb") as file:
        file.truncate(1 << 40)
    _, found = read_vectors(tmp_path, KEYS, 4)
    assert not found.any()
    assert sorted(entry.name for entry in tmp_path.glob("*.damaged")) == [f"{name}.damaged" for name in "abce"]


@pytest.mark.parametrize("words", ["$" + "A" * 20_000, "$A." * 7_000, "#" * 20_000, "_A" * 10_000 + "!"])
def test_masking_takes_no_more_than_its_time(tmp_path, words):
    """No regular expression of the readers runs away on a long text."""
    tweet = json.dumps({"user": 1, "ts": 1, "text": words, "symbols": ["A", "A.B", "_"]}).encode()
    for name, line in (("tweets", tweet), ("items", b'{"symbol": "A"}'), ("users", b'{"user": 1}')):
        (tmp_path / f"{name}.jsonl.gz").write_bytes(gzip.compress(line))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_utime
    try:
        stocknet(tmp_path, True)
    except DataError:
        pass
    assert resource.getrusage(resource.RUSAGE_SELF).ru_utime - before < 5
