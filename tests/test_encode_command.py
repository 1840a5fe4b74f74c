"""The command, as a process and by its parts."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from fused_rec.text.vectors import load_vectors, read_lines, save_vectors

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"


def run(*flags):
    command = [sys.executable, "-W", "error", "-m", "experiments.encode", *map(str, flags)]
    return subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=120)


def test_a_file_becomes_a_row_a_line(tmp_path):
    """The same texts again come from the cache; a blank line is a text too."""
    texts = [text for text in json.loads((GOLDEN / "minilm_texts.json").read_text("utf-8"))[:100] if "\n" not in text]
    texts = [text for text in texts if not text.endswith("\r")]
    expected = load_file(GOLDEN / "tiny_bert_outputs.safetensors")["vectors_cls"]
    kept = [
        i for i, text in enumerate(json.loads((GOLDEN / "minilm_texts.json").read_text("utf-8"))[:100]) if text in texts
    ]
    (tmp_path / "texts.txt").write_bytes("".join(text + "\n" for text in texts).encode())
    output = tmp_path / "new" / "vectors.safetensors"
    done = run(
        f"--model={GOLDEN / 'tiny_bert'}",
        f"--input={tmp_path / 'texts.txt'}",
        f"--out={output}",
        f"--cache={tmp_path / 'cache'}",
    )
    assert done.returncode == 0, done.stderr
    assert f"{len(texts)} texts, " in done.stdout and "tokens/s" in done.stdout
    assert f"wrote {len(texts)} x 32 float32 to {output}" in done.stdout
    assert "PyTorch" not in done.stderr
    [(name, vectors)] = load_file(output).items()
    assert name == "vectors" and vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, expected[kept], atol=1e-5)
    assert [file.name for file in output.parent.iterdir()] == ["vectors.safetensors"]
    assert len(list((tmp_path / "cache").glob("text_vectors/*/*.safetensors"))) == 1


def test_lines_by_hand(tmp_path):
    file = tmp_path / "texts.txt"
    for content, lines in [
        (b"", []),
        (b"\n", [""]),
        (b"a", ["a"]),
        (b"a\n\nb \r\n", ["a", "", "b "]),
        # Only \n ends a line; Unicode knows more line ends, and a text may hold them.
        ("a\u2028b\x0bc\x85d\n".encode(), ["a\u2028b\x0bc\x85d"]),
    ]:
        file.write_bytes(content)
        assert read_lines(file) == lines


def test_a_line_not_in_utf8_is_named(tmp_path):
    (tmp_path / "texts.txt").write_bytes(b"good\nf\xfcr\nalso good\n")
    with pytest.raises(ValueError, match=r"texts.txt, line 2: not UTF-8 \(.*0xfc.*\); convert the file to UTF-8"):
        read_lines(tmp_path / "texts.txt")


def test_an_output_is_whole_or_as_before(tmp_path, monkeypatch):
    file = tmp_path / "vectors.safetensors"
    save_vectors(file, np.ones((2, 3), np.float32))
    before = file.read_bytes()

    def fail(self, target):
        raise OSError("no space left")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
        patch.setattr(Path, "replace", fail)
        save_vectors(file, np.zeros((2, 3), np.float32))
    assert file.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("name", ["vectors.npy", "vectors", "vectors.parquet", "vectors.safetensors.gz"])
def test_an_output_of_another_format_is_refused_before_anything_is_encoded(tmp_path, name):
    (tmp_path / "texts.txt").write_text("good\n")
    command = [sys.executable, "-m", "experiments.encode", f"--input={tmp_path}/texts.txt", "--model=nothing"]
    done = subprocess.run([*command, f"--out={tmp_path}/{name}"], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and f"the file is {name}; vectors are written as safetensors" in done.stderr
    with pytest.raises(ValueError, match="its name must end in .safetensors"):
        save_vectors(tmp_path / name, np.zeros((1, 3), np.float32))
    assert os.listdir(tmp_path) == ["texts.txt"]


def test_vectors_keep_the_ids_of_their_rows(tmp_path):
    file, vectors = tmp_path / "vectors.safetensors", np.arange(6, dtype=np.float32).reshape(2, 3)
    for ids in ([], ["DE000", 'a "quoted" \u00e9\n id']):
        save_vectors(file, vectors, ids)
        found, kept = load_vectors(file)
        np.testing.assert_array_equal(found, vectors)
        assert kept == ids
    with pytest.raises(ValueError, match="1 ids for 2 vectors"):
        save_vectors(file, vectors, ["a"])
    with pytest.raises(ValueError, match="'a' stands at two rows"):
        save_vectors(file, vectors, ["a", "a"])
    file.write_bytes(b"no such file")
    with pytest.raises(ValueError, match="is no file of vectors"):
        load_vectors(file)


def test_a_stray_argument_and_a_missing_flag_are_refused():
    done = run("texts.txt", "--input=a", "--out=b")
    assert done.returncode != 0 and "unknown argument 'texts.txt'; every setting is a flag" in done.stdout + done.stderr
    done = run("--input=a")
    assert done.returncode != 0 and "--out must have a value" in done.stdout + done.stderr


def test_purge_empties_the_cache_and_says_what_went(tmp_path):
    folder = tmp_path / "text_vectors" / ("0" * 32)
    folder.mkdir(parents=True)
    (folder / f"{'0' * 32}.safetensors").write_bytes(b"12345")
    done = run("--purge", f"--cache={tmp_path}", "--input=a")
    assert done.returncode != 0 and "--purge takes no other flag" in done.stdout + done.stderr and folder.exists()
    done = run("--purge", f"--cache={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"deleted 1 files, 5 bytes, of text vectors in {tmp_path}\n"
    assert not list(tmp_path.iterdir())
    done = run("--purge", f"--cache={tmp_path}")
    assert done.returncode == 1 and "is no folder" in done.stderr and "Traceback" not in done.stderr
