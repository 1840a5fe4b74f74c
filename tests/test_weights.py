"""Weights on disk: found, checked, and read without ever being there twice."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fused_rec.text.encoders import registry
from fused_rec.text.encoders.weights import stored_weights
from fused_rec.text.pretrained import open_model

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "tests" / "golden" / "families"

CHILD = """
import sys
from fused_rec.text.encode import encode_texts
from fused_rec.text.pretrained import open_model

def memory(kind):
    [line] = [line for line in open("/proc/self/status") if line.startswith(kind)]
    return int(line.split()[1]) * 1024

small, large = sys.argv[1:]
encode_texts(["rate"], open_model(small), cache=None, progress=False)  # imports, and the compiler's own memory
before = memory("VmRSS")
model = open_model(large)
loaded = memory("VmHWM") - before
encode_texts(["rate", "fund"], model, cache=None, progress=False)
print(loaded, memory("VmHWM") - before)
"""


def write_zeros(file, shapes):
    """A safetensors file of bfloat16 zeros, which takes no place on most disks; returns their bytes."""
    header, at = {}, 0
    for name, shape in shapes.items():
        end = at + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, end]}
        at = end
    content = json.dumps(header).encode()
    with open(file, "wb") as stream:
        stream.write(len(content).to_bytes(8, "little") + content)
        stream.truncate(8 + len(content) + at)
    return at


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="tells a process's memory on Linux only")
def test_a_model_is_never_in_memory_twice(tmp_path):
    """300 MB, of which the words are 45 %, in two shards: at most 1.3 times that to load it and to encode with it."""
    folder = Path(shutil.copytree(FOLDER / "mistral", tmp_path / "large"))
    sizes = {"vocab_size": 131_072, "hidden_size": 512, "num_hidden_layers": 21, "intermediate_size": 2048}
    config = json.loads((folder / "config.json").read_text()) | sizes
    config |= {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64}
    (folder / "config.json").write_text(json.dumps(config))
    small = {name: value.shape for name, value in load_file(folder / "model.safetensors").items()}
    (folder / "model.safetensors").unlink()
    wide = {"q_proj": (512, 512), "k_proj": (256, 512), "v_proj": (256, 512), "o_proj": (512, 512)}
    wide |= {"gate_proj": (2048, 512), "up_proj": (2048, 512), "down_proj": (512, 2048)}
    layer = {name.split(".", 2)[2]: name.split(".")[-2] for name in small if name.startswith("layers.0.")}
    shapes = {f"layers.{i}.{name}": wide.get(part, (512,)) for i in range(21) for name, part in layer.items()}
    parts = {"model-1.safetensors": {"embed_tokens.weight": (131_072, 512), "norm.weight": (512,)}}
    parts["model-2.safetensors"] = shapes
    size = sum(write_zeros(folder / file, part) for file, part in parts.items())
    weight_map = {name: file for file, part in parts.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert 2.9e8 < size < 3.1e8
    child = [sys.executable, "-c", CHILD, str(FOLDER / "mistral"), str(folder)]
    one_device = os.environ | {"PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": "1"}
    done = subprocess.run(child, capture_output=True, text=True, env=one_device, timeout=600)
    assert done.returncode == 0, done.stderr
    loaded, encoded = (int(part) / size for part in done.stdout.split())
    assert 0.9 < loaded <= 1.3, f"loading took {loaded:.2f} times the model's bytes"
    assert encoded <= 1.3, f"encoding took {encoded:.2f} times the model's bytes"


def test_rows_are_read_where_they_are(tmp_path, monkeypatch):
    """Whole and a few rows at a time, of every dtype that is kept and from either end of a file."""
    arrays = {
        "a": np.arange(12, dtype=np.float32).reshape(4, 3),
        "b": np.arange(5, dtype=np.float16),
        "c": np.arange(24).reshape(6, 2, 2).astype(np.int64),
    }
    save_file(arrays, tmp_path / "x.safetensors")
    stored = stored_weights([tmp_path / "x.safetensors"])
    for name, array in arrays.items():
        assert (stored[name].shape, stored[name].dtype) == (array.shape, array.dtype)
        for rows in (slice(None), slice(1, 3), slice(3, 99)):
            np.testing.assert_array_equal(stored[name][rows], array[rows])
    whole = open_model(str(FOLDER / "roberta")).params
    monkeypatch.setattr(registry, "SLAB", 100)  # a row or two
    np.testing.assert_equal(open_model(str(FOLDER / "roberta")).params, whole)


def test_a_file_that_becomes_shorter_is_noticed(tmp_path):
    file = tmp_path / "x.safetensors"
    save_file({"a": np.ones((4, 4), np.float32)}, file)
    stored = stored_weights([file])
    os.truncate(file, file.stat().st_size - 4)
    with pytest.raises(ValueError, match="has become shorter while it was read; fetch the file again"):
        stored["a"][2:]
    with pytest.raises(ValueError, match="is no whole safetensors file"):
        stored_weights([file])
