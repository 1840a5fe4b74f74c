"""Texts to vectors: parity on real weights, the laws of batching, and a cache that never gives a wrong vector."""

import dataclasses
import importlib.util
import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load, load_file

from fused_rec.text import encode as embed_module
from fused_rec.text.cache import LEASE, purge, read_vectors, write_vectors
from fused_rec.text.encode import count_tokens, encode_texts, token_ids
from fused_rec.text.pretrained import MINILM, MINILM_PACKAGE, open_model

GOLDEN = Path(__file__).parent / "golden"
ROOT = Path(__file__).parents[1]
TINY = GOLDEN / "tiny_bert"
TEXTS = json.loads((GOLDEN / "minilm_texts.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def tiny():
    return open_model(str(TINY))


@pytest.fixture(scope="module")
def fresh(tiny):
    return encode_texts(TEXTS, tiny, cache=None, progress=False)


def encoded_texts(monkeypatch):
    """Counts the texts that reach the encoder from now on."""
    seen: list[str] = []
    encode_all = embed_module._encode_all

    def counting(texts, *settings):
        seen.extend(texts)
        return encode_all(texts, *settings)

    monkeypatch.setattr(embed_module, "_encode_all", counting)
    return seen


def shards(cache):
    return sorted(Path(cache).glob("text_vectors/*/*.safetensors"))


# --- parity ---


@pytest.mark.skipif(importlib.util.find_spec(MINILM_PACKAGE) is None, reason="requirements-minilm.txt is not installed")
def test_minilm_vectors_are_those_of_pytorch():
    """210 texts, from empty to 2,000 characters and in twenty scripts; measured maximum 3e-7."""
    model = open_model(MINILM)
    assert (model.pooling, model.normalize, model.max_tokens) == ("mean", True, 256)
    expected = load_file(GOLDEN / "minilm_vectors.safetensors")["vectors"]
    assert expected.shape == (len(TEXTS), 384) and len(TEXTS) >= 200
    assert count_tokens(TEXTS, model).max() == 256 and count_tokens([""], model)[0] == 2
    vectors = encode_texts(TEXTS, model, cache=None, progress=False)
    assert np.abs(vectors - expected).max() <= 2e-5


def test_tiny_vectors_are_those_of_pytorch(tiny, fresh, tmp_path):
    expected = load_file(GOLDEN / "tiny_bert_outputs.safetensors")
    np.testing.assert_allclose(fresh[:100], expected["vectors_cls"], atol=1e-5)
    # The first token's vector is not normalised, and a limit of 9 tokens cuts most texts.
    assert np.linalg.norm(fresh, axis=1).std() > 0.1
    kinds = ("Transformer", "Pooling", "Normalize")
    modules = [{"type": f"sentence_transformers.models.{kind}", "path": ""} for kind in kinds]
    folder = tmp_path / "mean"
    folder.mkdir()
    for file in TINY.glob("*"):
        if file.is_file():
            (folder / file.name).write_bytes(file.read_bytes())
    (folder / "modules.json").write_text(json.dumps([modules[0], modules[1] | {"path": "1_Pooling"}, modules[2]]))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode": "mean"}')
    vectors = encode_texts(TEXTS[:100], open_model(str(folder)), cache=None, max_tokens=9, progress=False)
    np.testing.assert_allclose(vectors, expected["vectors_mean_9"], atol=1e-5)


# --- laws ---


def test_order_and_batch_size_do_not_matter(tiny, fresh):
    order = np.random.default_rng(3).permutation(len(TEXTS))
    shuffled = encode_texts([TEXTS[i] for i in order], tiny, cache=None, batch_tokens=600, progress=False)
    np.testing.assert_allclose(shuffled, fresh[order], atol=1e-5)
    alone = encode_texts(TEXTS[:3], tiny, cache=None, batch_tokens=1, progress=False)
    np.testing.assert_allclose(alone, fresh[:3], atol=1e-5)


def test_token_ids_start_with_the_prompt(tiny):
    """Fine-tuning encodes them, and compares with cached vectors, whose texts have it."""
    prompted = dataclasses.replace(tiny, prompt="query: ")
    expected = token_ids([f"query: {text}" for text in TEXTS], tiny, max_tokens=9)
    found = token_ids(TEXTS, prompted, max_tokens=9)
    assert [ids.tolist() for ids in found] == [ids.tolist() for ids in expected]
    assert [len(ids) for ids in found] == count_tokens(TEXTS, prompted, max_tokens=9).tolist()


def test_equal_texts_are_encoded_once(tiny, monkeypatch):
    seen = encoded_texts(monkeypatch)
    vectors = encode_texts(["rate", "fund", "rate", "rate"], tiny, cache=None, progress=False)
    assert seen == ["rate", "fund"]
    np.testing.assert_array_equal(vectors[[2, 3]], vectors[[0, 0]])
    assert np.abs(vectors[0] - vectors[1]).max() > 0.1


def test_no_texts_give_no_rows(tiny, tmp_path):
    assert encode_texts([], tiny, cache=tmp_path, progress=False).shape == (0, 32)
    assert not shards(tmp_path)


def test_padded_lengths_by_hand():
    padded = {0: 4, 2: 4, 8: 8, 9: 12, 64: 64, 65: 72, 128: 128, 129: 144, 160: 160, 250: 256, 257: 288}
    assert {length: embed_module._padded_length(length, 512) for length in padded} == padded
    assert embed_module._padded_length(37, 37) == 37  # a limit that is no multiple of a step


@pytest.mark.parametrize(
    ("short", "expected"),
    [
        (100, [60]),  # 101 x 60 and one compilation, 6,000, against 100 x 8 + 60 and two
        (150, [8, 60]),  # 151 x 60 + 6,000 = 15,060 against 150 x 8 + 60 + 12,000 = 13,260
    ],
)
def test_a_shape_must_save_more_than_its_compilation(short, expected):
    """So many texts of 7 tokens and one of 60."""
    assert embed_module._batch_lengths(np.array([7] * short + [60], np.int32), 256) == expected


def test_batches_by_hand(monkeypatch):
    """64 tokens a batch: the text of 60 alone, five rows of 12, and three left over of at most 16."""
    monkeypatch.setattr(embed_module, "COMPILE_TOKENS", 0)
    batches = list(embed_module._batches(np.array([60, 8, 10, 8, 8, 7, 3, 3, 3], np.int32), 64, 256))
    assert [(list(texts), rows, length) for texts, rows, length in batches] == [
        ([0], 1, 60),
        ([2, 1, 3, 4, 5], 5, 12),
        ([6, 7, 8], 4, 4),
    ]


@pytest.mark.parametrize(
    ("texts", "settings", "error", "message"),
    [
        ("rate", {}, TypeError, "texts is one str; give a list of them"),
        (["rate", None], {}, TypeError, "None"),  # told by position, or by the type checker before
        (["rate", "\ud800"], {}, ValueError, "text 1 is no valid Unicode"),
        (["rate"], {"max_tokens": 38}, ValueError, "max_tokens is 38; it must be 0 or from 3 to the model's limit, 37"),
        (["rate"], {"max_tokens": 2}, ValueError, "max_tokens is 2"),
        (["rate"], {"batch_tokens": 0}, ValueError, "batch_tokens is 0; it must be at least 1"),
    ],
)
def test_bad_arguments_are_refused(tiny, texts, settings, error, message):
    with pytest.raises(error, match=message):
        encode_texts(texts, tiny, cache=None, progress=False, **settings)


def test_vectors_that_are_not_finite_are_refused_and_not_kept(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(
        embed_module, "apply_encoder", lambda params, ids, *rest: np.full((len(ids), 32), np.nan, np.float32)
    )
    with pytest.raises(ValueError, match="not finite for 'rate'; check its weights"):
        encode_texts(["rate"], tiny, cache=tmp_path, progress=False)
    assert not shards(tmp_path)


# --- the cache ---


def test_cached_vectors_are_the_fresh_ones_bit_for_bit(tiny, fresh, tmp_path, monkeypatch):
    np.testing.assert_array_equal(encode_texts(TEXTS, tiny, cache=tmp_path, progress=False), fresh)
    monkeypatch.setattr(embed_module, "apply_encoder", None)
    again = encode_texts(TEXTS[::-1], tiny, cache=str(tmp_path), progress=False)
    np.testing.assert_array_equal(again, fresh[::-1])
    assert again.dtype == np.float32


def test_only_new_texts_are_encoded(tiny, fresh, tmp_path, monkeypatch):
    encode_texts(TEXTS[:50], tiny, cache=tmp_path, progress=False)
    seen = encoded_texts(monkeypatch)
    vectors = encode_texts(TEXTS[40:60], tiny, cache=tmp_path, progress=False)
    assert seen == TEXTS[50:60]
    np.testing.assert_allclose(vectors, fresh[40:60], atol=1e-5)


def test_other_settings_never_share_vectors(tiny, tmp_path, monkeypatch):
    """Each of the weights, the limit, the pooling, the normalisation and the version has entries of its own."""
    calls: list[str] = []

    def encode(params, ids, *rest):
        calls.append("")
        return np.full((len(ids), 32), len(calls), np.float32)

    monkeypatch.setattr(embed_module, "apply_encoder", encode)

    def value(model, **settings):
        return encode_texts(["rate"], model, cache=tmp_path, progress=False, **settings)[0, 0]

    variants = [{}, {"digest": "0" * 64}, {"pooling": "mean"}, {"normalize": True}]
    models = [dataclasses.replace(tiny, **variant) for variant in variants]
    assert [value(model) for model in models] == [1, 2, 3, 4]
    assert value(tiny, max_tokens=9) == 5
    assert [value(model) for model in models] == [1, 2, 3, 4]
    assert value(tiny, max_tokens=37) == 1  # the model's own limit, said aloud
    narrow = dataclasses.replace(tiny, config=dataclasses.replace(tiny.config, compute_dtype="bfloat16"))
    assert (value(narrow), value(narrow)) == (6, 6)
    monkeypatch.setattr(embed_module, "VECTORS_VERSION", -1)
    assert value(tiny) == 7


def make_shard(folder):
    keys = np.random.default_rng(0).integers(0, 256, (3, 32)).astype(np.uint8)
    vectors = np.arange(12, dtype=np.float32).reshape(3, 4)
    write_vectors(folder, keys, vectors)
    [shard] = folder.glob("*.safetensors")
    return keys, vectors, shard


def test_shards_by_hand(tmp_path):
    keys, vectors, _ = make_shard(tmp_path)
    other = keys[:1] ^ 1
    write_vectors(tmp_path, other, np.full((1, 4), 7, np.float32))
    absent = np.zeros((1, 32), np.uint8)
    got, found = read_vectors(tmp_path, np.concatenate([keys[2:], absent, other, keys[:1]]), 4)
    assert found.tolist() == [True, False, True, True]
    np.testing.assert_array_equal(got, [[8, 9, 10, 11], [0, 0, 0, 0], [7, 7, 7, 7], [0, 1, 2, 3]])
    # A key that agrees in all bytes but its last is another key.
    twin = keys[:1].copy()
    twin[0, 31] ^= 1
    assert not read_vectors(tmp_path, twin, 4)[1].any()
    assert not list(tmp_path.glob("*.tmp"))


def test_no_damaged_byte_gives_a_wrong_vector(tmp_path, caplog):
    """Each byte of a shard flipped in turn, and each cut: a row comes back right or not at all."""
    keys, vectors, shard = make_shard(tmp_path)
    content = shard.read_bytes()
    flips = [content[:i] + bytes([content[i] ^ (1 << i % 8)]) + content[i + 1 :] for i in range(len(content))]
    cuts = [content[:i] for i in range(len(content))]
    reported = 0
    with caplog.at_level(logging.WARNING):
        for damaged in flips + cuts + [content + b"\0"]:
            shard.write_bytes(damaged)
            caplog.clear()
            got, found = read_vectors(tmp_path, keys, 4)
            np.testing.assert_array_equal(got[found], vectors[found])
            if not found.all():
                assert caplog.records and "is damaged" in caplog.text and str(shard) in caplog.text
                assert not shard.exists() and shard.with_suffix(".damaged").exists()
                reported += 1
    assert reported >= len(flips) + len(cuts) - 40  # spaces that pad the header may change unnoticed


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "other size"])
def test_a_damaged_shard_is_reported_and_encoded_again(tiny, fresh, tmp_path, damage, caplog, monkeypatch):
    encode_texts(TEXTS, tiny, cache=tmp_path, progress=False)
    [shard] = shards(tmp_path)
    content = shard.read_bytes()
    place = len(content) - 1000
    if damage == "other size":
        shard.unlink()
        keys = np.concatenate([np.frombuffer(b"x" * 32, np.uint8)[None], load(content)["keys"]])
        write_vectors(shard.parent, keys, np.zeros((len(keys), 31), np.float32))
    else:
        flipped = content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :]
        shard.write_bytes({"flip": flipped, "truncate": content[:place], "empty": b""}[damage])
    seen = encoded_texts(monkeypatch)
    with caplog.at_level(logging.WARNING):
        again = encode_texts(TEXTS, tiny, cache=tmp_path, progress=False)
    assert "is damaged" in caplog.text and len(seen) == len(set(TEXTS))
    np.testing.assert_array_equal(again, fresh)
    caplog.clear()
    seen.clear()
    np.testing.assert_array_equal(encode_texts(TEXTS, tiny, cache=tmp_path, progress=False), fresh)
    assert not seen and not caplog.records


def test_only_the_owner_can_read_what_is_kept(tiny, tmp_path):
    """Also where the folders were there before, open to all, and whatever the process would give its files."""
    (tmp_path / "text_vectors").mkdir(mode=0o755)
    before = os.umask(0)
    try:
        encode_texts(["rate"], tiny, cache=tmp_path, progress=False)
    finally:
        os.umask(before)
    assert (tmp_path / "text_vectors").stat().st_mode & 0o777 == 0o700
    [folder] = (tmp_path / "text_vectors").iterdir()
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {file.name for file in folder.iterdir()} == {LEASE, *(shard.name for shard in shards(tmp_path))}
    for file in folder.iterdir():
        assert file.stat().st_mode & 0o777 == 0o600
        file.unlink()
    folder.chmod(0o777)
    encode_texts(["fund"], tiny, cache=tmp_path, progress=False)
    assert folder.stat().st_mode & 0o777 == 0o700


def test_a_shard_that_was_made_with_nan_is_not_trusted(tmp_path, caplog):
    keys, vectors, shard = make_shard(tmp_path)
    shard.unlink()
    write_vectors(tmp_path, keys, np.where(vectors == 5, np.nan, vectors).astype(np.float32))
    with caplog.at_level(logging.WARNING):
        assert not read_vectors(tmp_path, keys, 4)[1].any()
    assert "not finite" in caplog.text


def test_a_purge_deletes_all_vectors_and_says_how_many(tiny, tmp_path):
    (tmp_path / "mine.txt").write_text("beside the vectors")
    encode_texts(["rate"], tiny, cache=tmp_path, progress=False)
    encode_texts(["rate"], tiny, cache=tmp_path, max_tokens=9, progress=False)
    [first, second] = (tmp_path / "text_vectors").iterdir()
    (first / f"{'a' * 32}.tmp").write_bytes(b"left by a killed process")
    (second / f"{'b' * 32}.damaged").symlink_to(tmp_path / "mine.txt")
    size = sum(file.lstat().st_size for folder in (first, second) for file in folder.iterdir())
    assert purge(tmp_path) == (4, size)
    assert [entry.name for entry in tmp_path.iterdir()] == ["mine.txt"]
    assert (tmp_path / "mine.txt").read_text() == "beside the vectors"
    with pytest.raises(FileNotFoundError, match="text_vectors is no folder"):
        purge(tmp_path)


@pytest.mark.parametrize("place", ["text_vectors/notes.txt", "text_vectors/{folder}/vectors.npy", "{folder}", "link"])
def test_a_purge_refuses_what_is_not_ours(tiny, tmp_path, place):
    """A stray file at either depth, a file or a link in the place of a folder: nothing goes, and it is named."""
    encode_texts(["rate"], tiny, cache=tmp_path, progress=False)
    [shard] = shards(tmp_path)
    if place == "link":
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "elsewhere" / f"{'c' * 32}.tmp").write_text("not to be deleted")
        (tmp_path / "text_vectors" / ("d" * 32)).symlink_to(tmp_path / "elsewhere")
    elif place == "{folder}":
        (tmp_path / "text_vectors" / ("d" * 32)).write_text("a file")
    else:
        (tmp_path / place.format(folder=shard.parent.name)).write_text("a file")
    with pytest.raises(ValueError, match="holds 1 other file.*nothing was deleted"):
        purge(tmp_path)
    assert shard.exists() and (place != "link" or len(list((tmp_path / "elsewhere").iterdir())) == 1)


# --- real processes ---

CHILD = """
import json, logging, os, signal, sys
import numpy as np
from fused_rec.text import cache, encode
from fused_rec.text.pretrained import open_model

model_folder, texts_file, cache_folder, output, kill_at, stops = sys.argv[1:]
logging.basicConfig(stream=sys.stdout, format="%(message)s")
encode.FLUSH_SECONDS = 0.0  # a shard a batch
replace, calls = os.replace, 0

def replace_or_die(source, target):
    global calls
    calls += 1
    if calls == int(kill_at):
        if stops:
            print("stopped", flush=True)
            sys.stdin.readline()
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)

cache.os.replace = replace_or_die
texts = json.load(open(texts_file))
model = open_model(model_folder)
print("ready", flush=True)
sys.stdin.readline()
np.save(output, encode.encode_texts(texts, model, cache=cache_folder, batch_tokens=600, progress=False))
"""


def start_child(tmp_path, name, texts, kill_at=0, stops=""):
    (tmp_path / f"{name}.json").write_text(json.dumps(texts))
    arguments = [TINY, tmp_path / f"{name}.json", tmp_path / "cache", tmp_path / f"{name}.npy", kill_at, stops]
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, *map(str, arguments)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ
        | {"PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": "1"},  # one device: batches small enough to be killed in
    )
    return child


def begin(child):
    assert child.stdout.readline() == "ready\n"
    child.stdin.write("\n")
    child.stdin.flush()


def finish(children):
    """Lets all go, and waits for their ends."""
    for child in children:
        begin(child)
    for child in children:
        child.communicate(timeout=120)
    return [child.returncode for child in children]


def test_two_processes_fill_one_cache(tiny, fresh, tmp_path, monkeypatch):
    parts = {"first": slice(0, 140), "second": slice(70, 210)}
    children = [start_child(tmp_path, name, TEXTS[part]) for name, part in parts.items()]
    assert finish(children) == [0, 0]
    for name, part in parts.items():
        np.testing.assert_allclose(np.load(tmp_path / f"{name}.npy"), fresh[part], atol=1e-5)
    assert len(shards(tmp_path / "cache")) > 10
    stored = [key.tobytes() for shard in shards(tmp_path / "cache") for key in load_file(shard)["keys"]]
    assert len(stored) == len(set(stored)) == len(set(TEXTS)), "a text was encoded twice"
    monkeypatch.setattr(embed_module, "apply_encoder", None)
    np.testing.assert_allclose(encode_texts(TEXTS, tiny, cache=tmp_path / "cache", progress=False), fresh, atol=1e-5)


def test_a_killed_run_goes_on_where_it_stopped(tiny, fresh, tmp_path, monkeypatch):
    """Killed in the middle of its fourth shard: three are whole, the fourth is a temporary file nobody reads."""
    assert finish([start_child(tmp_path, "killed", TEXTS, kill_at=4)]) == [-signal.SIGKILL]
    kept = shards(tmp_path / "cache")
    rows = sum(len(load_file(shard)["keys"]) for shard in kept)
    assert len(kept) == 3 and rows > 0 and len(list(kept[0].parent.glob("*.tmp"))) == 1
    seen = encoded_texts(monkeypatch)
    resumed = encode_texts(TEXTS, tiny, cache=tmp_path / "cache", batch_tokens=600, progress=False)
    assert len(seen) == len(set(TEXTS)) - rows
    np.testing.assert_allclose(resumed, fresh, atol=1e-5)


def test_one_waits_for_another_and_takes_over_when_it_is_killed(fresh, tmp_path):
    """The owner stops in the middle of its fourth shard. The other waits, and encodes only what is not there."""
    owner = start_child(tmp_path, "owner", TEXTS, kill_at=4, stops="True")
    begin(owner)
    assert owner.stdout is not None and owner.stdout.readline() == "stopped\n"
    kept = sum(len(load_file(shard)["keys"]) for shard in shards(tmp_path / "cache"))
    other = start_child(tmp_path, "other", TEXTS)
    begin(other)
    assert other.stdout is not None
    assert other.stdout.readline().startswith("waiting for another process that encodes texts")
    assert sum(len(load_file(shard)["keys"]) for shard in shards(tmp_path / "cache")) == kept
    owner.kill()
    owner.communicate(timeout=120)
    other.communicate(timeout=120)
    assert other.returncode == 0
    np.testing.assert_allclose(np.load(tmp_path / "other.npy"), fresh, atol=1e-5)
    stored = [key.tobytes() for shard in shards(tmp_path / "cache") for key in load_file(shard)["keys"]]
    assert 0 < kept < len(stored) == len(set(stored)) == len(set(TEXTS))


def test_progress_shows_tokens_speed_and_time_left(tiny, capfd, monkeypatch):
    """Of two distinct texts: [CLS] rate [SEP] and [CLS] fund [SEP]; a share of the peak where one is measured."""
    encode_texts(["rate", "fund", "rate"], tiny, cache=None)
    printed = capfd.readouterr().err
    assert "encoding: 100%" in printed and "6.00/6.00 [" in printed and "token/s, 2/2 texts, " in printed
    assert "<00:00" in printed and "FLOP/s" in printed and "of peak" not in printed  # on a CPU
    monkeypatch.setattr(embed_module, "_matrix_peak", lambda: 1e9)
    encode_texts(["rate"], tiny, cache=None)
    assert "% of peak" in capfd.readouterr().err


def test_rates_by_hand():
    assert embed_module._rate(2.5e9, 0.0) == "2.5 GFLOP/s" and embed_module._rate(3e4, 0.0) == "0.03 MFLOP/s"
    assert embed_module._rate(3.21e13, 6.42e13) == "32.1 TFLOP/s, 50% of peak"
    assert 1e6 < embed_module._product_rate(64, 2) < 1e14
