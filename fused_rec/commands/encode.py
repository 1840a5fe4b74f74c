"""Encode the lines of a text file with a language model.

python -m experiments.encode --input=texts.txt --out=vectors.safetensors
python -m experiments.encode --model=ORG/NAME@COMMIT --download --input=texts.txt --out=vectors.safetensors

Writes `vectors`, float32, a row per line of the input. Cached embeddings are reused.

python -m experiments.encode --purge

Deletes all cached text embeddings, including those of trainings, and prints the number of files and bytes.
"""

import time
import typing
from pathlib import Path
from typing import Any

from absl import app, flags

from fused_rec.commands.places import DEFINE_path, existing_file, new_folder, written_file_anywhere
from fused_rec.config import ComputeDtype, TextConfig

DEFAULTS = TextConfig()
MODEL = flags.DEFINE_string("model", DEFAULTS.model, "all-MiniLM-L6-v2, a Hugging Face folder, or ORG/NAME@COMMIT.")
PROMPT = flags.DEFINE_string("prompt", DEFAULTS.prompt, "Name of the model's prompt; empty = its default, if any.")
INPUT = flags.DEFINE_string("input", None, "UTF-8 file with one text per line.")
OUTPUT = DEFINE_path("out", written_file_anywhere, "File to write, .safetensors.")
CACHE = DEFINE_path(
    "cache", new_folder, "Folder that keeps vectors between runs; empty = none.", default=DEFAULTS.cache, optional=True
)
MAX_TOKENS = flags.DEFINE_integer(
    "max_tokens", DEFAULTS.max_tokens, "Truncate texts to this many tokens; 0 = the model's limit."
)
COMPUTE = flags.DEFINE_enum(
    "compute_dtype", DEFAULTS.compute_dtype, typing.get_args(ComputeDtype), "Type of the model's matrix products."
)
BATCH_TOKENS = flags.DEFINE_integer("batch_tokens", DEFAULTS.batch_tokens, "Padded tokens per encoder call.")
PURGE = flags.DEFINE_bool("purge", False, "Delete all cached text embeddings instead.")
DOWNLOAD = flags.DEFINE_bool("download", not DEFAULTS.offline, "Download a model that is not in the local cache.")


def main(argv: list[str]) -> None:
    """Encodes a file, or deletes the cache."""
    from fused_rec.distributed.devices import check_devices
    from fused_rec.text.cache import open_cache, purge
    from fused_rec.text.encode import count_tokens, encode_texts
    from fused_rec.text.pretrained import open_model
    from fused_rec.text.vectors import check_name, read_lines, save_vectors

    if PURGE.value:
        if INPUT.value or OUTPUT.value or not CACHE.value:
            raise app.UsageError("--purge takes no other flag than --cache, the folder whose text vectors go")
        files, size = purge(CACHE.value)
        print(f"deleted {files:,} files, {size:,} bytes, of text vectors in {CACHE.value}")
        return
    if not INPUT.value or not OUTPUT.value:
        raise app.UsageError(f"flag --{OUTPUT.name if INPUT.value else INPUT.name} must have a value")
    check_name(OUTPUT.value)
    source = Path(INPUT.value)
    if problem := existing_file(source):
        raise app.UsageError(f"flag --input={source}: {problem}")
    check_devices()
    if CACHE.value:
        open_cache(CACHE.value)
    texts = read_lines(source)
    compute: Any = COMPUTE.value
    model = open_model(MODEL.value, offline=not DOWNLOAD.value, prompt=PROMPT.value, compute_dtype=compute)
    began = time.perf_counter()
    vectors = encode_texts(
        texts, model, cache=CACHE.value, batch_tokens=BATCH_TOKENS.value, max_tokens=MAX_TOKENS.value
    )
    seconds = time.perf_counter() - began
    tokens = int(count_tokens(texts, model, max_tokens=MAX_TOKENS.value).sum())
    save_vectors(OUTPUT.value, vectors)
    rate = f"{tokens / seconds:,.0f} tokens/s, cached texts included"
    print(f"{len(texts):,} texts, {tokens:,} tokens in {seconds:.1f} s: {rate}")
    print(f"wrote {vectors.shape[0]} x {vectors.shape[1]} float32 to {OUTPUT.value}")
