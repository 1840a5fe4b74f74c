"""Texts to vectors: deduplicated, sorted by length, encoded in batches of few shapes, kept on disk by content."""

import functools
import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float32, Int32, UInt8
from tqdm import tqdm

from fused_rec.distributed import processes
from fused_rec.distributed.devices import device_put
from fused_rec.memory import require_memory
from fused_rec.text.cache import KEY_BYTES, open_shards, read_vectors, shard_folder, write_vectors
from fused_rec.text.encoders.layers import PRECISION, as_bits
from fused_rec.text.encoders.registry import apply_encoder, flops
from fused_rec.text.pretrained import PretrainedModel

# Raise it when the same text, weights and settings give other vectors than before: old cache entries then lapse.
VECTORS_VERSION = 2
FLUSH_SECONDS = 20.0
FLUSH_TEXTS = 65_536
COMPILE_TOKENS = 6_000  # what two CPU cores encode while XLA compiles one more shape, 0.8 s
PEAK_ROWS, PEAK_REPEATS = 4096, 8  # of the product that tells what an accelerator can do, some 50 ms
TOKENIZE_TEXTS = 8_192  # a tokenizer call; its results take some kilobytes a text until they are arrays


def encode_texts(
    texts: Sequence[str],
    model: PretrainedModel,
    *,
    cache: str | Path | None,
    batch_tokens: int = 2048,
    max_tokens: int = 0,
    progress: bool = True,
) -> Float32[np.ndarray, "T D"]:
    """One vector a text, in the order given; equal texts are encoded once. The model's prompt is put before each.

    Several processes (fused_rec.distributed.processes) divide among them what any of them lacks, all calling this with
    the same texts.

    cache: folder to keep vectors in and take them from, None for none; below it each combination of model and
    settings has its own folder. Vectors are written every 20 s, so a run that was killed goes on where it stopped.
    batch_tokens: padded tokens that a device takes in an encoder call, at least one text. max_tokens: a text is cut
    after so many tokens, special ones included; 0 = the model's own limit. progress: shows tokens encoded, tokens/s,
    the time left, and the arithmetic that the texts themselves ask for in FLOP/s, on an accelerator also as a share of
    what its float32 matrix products reach. Raises TypeError on a text that is no str
    and ValueError on one that is no valid Unicode, on settings out of bounds and on vectors that are not finite.
    """
    limit = _token_limit(model, max_tokens)
    if batch_tokens < 1:
        raise ValueError(f"batch_tokens is {batch_tokens}; it must be at least 1")
    first_seen: dict[str, int] = {}
    prompted = (model.prompt + text for text in _checked(texts))
    inverse = np.array([first_seen.setdefault(text, len(first_seen)) for text in prompted], np.int64)
    unique = list(first_seen)
    dims = model.config.hidden_size
    rows = len(unique) if len(unique) == len(texts) else len(unique) + len(texts)
    what = f"the vectors of {len(unique):,} texts with {dims} dimensions"
    require_memory(4 * rows * dims, what, "encode fewer texts at a time, or take a smaller text.model")
    if cache is None:
        folder, keys = None, np.zeros((len(unique), KEY_BYTES), np.uint8)
        vectors, found = np.zeros((len(unique), dims), np.float32), np.zeros(len(unique), bool)
    else:
        identity = _identity(model, limit)
        folder = shard_folder(cache, identity)
        keys = _keys(unique, identity)
        vectors, found = read_vectors(folder, keys, dims)
    wanted = np.flatnonzero(processes.any_process_elementwise(~found))
    missing = processes.local_shard(wanted)
    if folder is not None and len(missing):
        open_shards(folder)

    unsaved: list[np.ndarray] = []

    def save() -> None:
        if folder is not None and unsaved:
            rows = np.concatenate(unsaved)
            write_vectors(folder, keys[rows], vectors[rows])
        unsaved.clear()

    lengths, batches = _encode_all([unique[row] for row in missing], model, limit, batch_tokens)
    asked, shown = flops(model.config, lengths), progress and len(missing) > 0
    peak = _matrix_peak() if shown else 0.0
    began = saved_at = time.monotonic()
    texts_done = flops_done = 0
    with tqdm(total=int(lengths.sum()), desc="encoding", unit="token", unit_scale=True, disable=not shown) as bar:
        for batch, values in batches:
            rows = missing[batch]
            finite = np.isfinite(values).all(axis=1)
            if not finite.all():
                text = unique[rows[~finite][0]]
                raise ValueError(f"the model gives a vector that is not finite for {text[:80]!r}; check its weights")
            vectors[rows] = values
            unsaved.append(rows)
            texts_done, flops_done = texts_done + len(rows), flops_done + float(asked[batch].sum())
            rate = _rate(flops_done / (time.monotonic() - began), peak)
            bar.set_postfix_str(f"{texts_done:,}/{len(missing):,} texts, {rate}", refresh=False)
            bar.update(int(lengths[batch].sum()))
            if time.monotonic() - saved_at > FLUSH_SECONDS or sum(map(len, unsaved)) >= FLUSH_TEXTS:
                save()
                saved_at = time.monotonic()
    save()
    vectors[wanted] = processes.gather_shards(wanted, vectors[missing])
    if folder is not None and not processes.is_single_process():
        # What another process encoded, unless it wrote to this very folder.
        lacking = np.setdiff1d(wanted[~found[wanted]], missing)
        _, there = read_vectors(folder, keys[lacking], dims)
        unsaved.append(lacking[~there])
        save()
    return vectors if len(unique) == len(texts) else vectors[inverse]


def count_tokens(texts: Sequence[str], model: PretrainedModel, *, max_tokens: int = 0) -> Int32[np.ndarray, "T"]:
    """Tokens of each text after the cut, special ones included. Raises ValueError as `encode_texts` does."""
    prompted = [model.prompt + text for text in texts]
    return np.array([len(ids) for ids in _tokenize(prompted, model, _token_limit(model, max_tokens))], np.int32)


@functools.cache
def _matrix_peak() -> float:
    """FLOP/s of float32 matrix products on all devices of this process, measured; 0 on a CPU, whose time is dear."""
    return 0.0 if jax.default_backend() == "cpu" else _product_rate(PEAK_ROWS, PEAK_REPEATS) * jax.local_device_count()


def _product_rate(rows: int, repeats: int) -> float:
    """FLOP/s of one device in products of square matrices, as exact as the encoders'."""
    multiply = jax.jit(lambda x: jnp.matmul(x, x, precision=PRECISION) / rows)
    x = multiply(jnp.ones((rows, rows), jnp.float32)).block_until_ready()  # compiles
    began = time.perf_counter()
    for _ in range(repeats):
        x = multiply(x)
    x.block_until_ready()
    return 2.0 * rows**3 * repeats / (time.perf_counter() - began)


def _rate(speed: float, peak: float) -> str:
    size, unit = next(((s, u) for s, u in ((1e12, "T"), (1e9, "G")) if speed >= s), (1e6, "M"))
    return f"{speed / size:.3g} {unit}FLOP/s" + (f", {speed / peak:.0%} of peak" if peak else "")


class Tokens(NamedTuple):
    """L tokens of one text as the encoder gets them."""

    ids: Int32[np.ndarray, "L"]
    special: Bool[np.ndarray, "L"]  # added by the model, such as [CLS]
    spans: list[tuple[int, int]]  # start and end in characters of the text
    words: list[int | None]  # number of the word, of which a token may be a part; None for special ones


def tokens(texts: Sequence[str], model: PretrainedModel, *, max_tokens: int = 0) -> list[Tokens]:
    """The tokens of each text after the cut, and where they stand in it. Raises ValueError as `encode_texts` does."""
    model.tokenizer.enable_truncation(_token_limit(model, max_tokens), direction=model.cut)
    return [
        Tokens(np.array(e.ids, np.int32), np.array(e.special_tokens_mask, bool), e.offsets, e.word_ids)
        for e in model.tokenizer.encode_batch(list(texts))
    ]


def token_ids(texts: Sequence[str], model: PretrainedModel, *, max_tokens: int = 0) -> list[Int32[np.ndarray, "L"]]:
    """What `encode_texts` gives the encoder for each text, before padding. Raises ValueError as `encode_texts` does."""
    return _tokenize(texts, model, _token_limit(model, max_tokens))


def _token_limit(model: PretrainedModel, max_tokens: int) -> int:
    if max_tokens and not 3 <= max_tokens <= model.max_tokens:
        raise ValueError(f"max_tokens is {max_tokens}; it must be 0 or from 3 to the model's limit, {model.max_tokens}")
    return max_tokens or model.max_tokens


def _checked(texts: Sequence[str]) -> Iterator[str]:
    if isinstance(texts, str):
        raise TypeError("texts is one str; give a list of them")
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"text {i} is {text!r}; every text must be a str (an absent one the empty string)")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"text {i} is no valid Unicode ({error}); decode it from UTF-8 strictly") from error
        yield text


def _identity(model: PretrainedModel, limit: int) -> str:
    """What a vector depends on apart from its text, as 64 hex digits."""
    parts = [VECTORS_VERSION, model.digest, limit, model.cut, model.pooling, model.normalize]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _keys(texts: Sequence[str], identity: str) -> UInt8[np.ndarray, "T 32"]:
    start = hashlib.sha256(identity.encode())
    digests = []
    for text in texts:
        digest = start.copy()
        digest.update(text.encode())
        digests.append(digest.digest())
    return np.frombuffer(b"".join(digests), np.uint8).reshape(-1, KEY_BYTES)


def _tokenize(texts: Sequence[str], model: PretrainedModel, limit: int) -> list[Int32[np.ndarray, "L"]]:
    model.tokenizer.enable_truncation(limit, direction=model.cut)
    ids: list[np.ndarray] = []
    for start in range(0, len(texts), TOKENIZE_TEXTS):
        encodings = model.tokenizer.encode_batch_fast(list(texts[start : start + TOKENIZE_TEXTS]))
        ids += [np.array(encoding.ids, np.int32) for encoding in encodings]
    return ids


def _padded_length(length: int, limit: int) -> int:
    length = max(length, 1)  # a decoder's tokenizer may make nothing of a text
    step = 4 if length <= 64 else 8 if length <= 128 else 16 if length <= 256 else 32
    return min(-(-length // step) * step, limit)


def _batch_lengths(lengths: Int32[np.ndarray, "T"], limit: int) -> list[int]:
    """The lengths to pad to, ascending: those that cost least in padded tokens and compilations together.

    Dynamic programming from the shortest texts up: costs[i] is the least for all texts of the i lowest lengths.
    """
    table = np.array([_padded_length(length, limit) for length in range(limit + 1)])
    sizes, counts = np.unique(table[lengths], return_counts=True)
    below = np.concatenate([[0], np.cumsum(counts)])
    costs, choices = [0], [[]]
    for i, size in enumerate(sizes):
        options = [costs[j] + COMPILE_TOKENS + int(size * (below[i + 1] - below[j])) for j in range(i + 1)]
        best = int(np.argmin(options))
        costs.append(options[best])
        choices.append([*choices[best], int(size)])
    return choices[-1]


def _batches(lengths: Int32[np.ndarray, "T"], batch_tokens: int, limit: int) -> Iterator[tuple[np.ndarray, int, int]]:
    """(texts, padded rows, padded length) a batch, longest texts first so that a lack of memory shows at once.

    Only the last batch is not full; its rows are rounded up to a power of two.
    """
    order = np.argsort(-lengths, kind="stable")
    sizes = _batch_lengths(lengths, limit)
    start = 0
    while start < len(order):
        length = sizes[int(np.searchsorted(sizes, lengths[order[start]]))]
        rows = max(1, batch_tokens // length)
        batch = order[start : start + rows]
        yield batch, min(rows, 1 << (len(batch) - 1).bit_length()), length
        start += rows


def _encode_all(
    texts: Sequence[str], model: PretrainedModel, limit: int, batch_tokens: int
) -> tuple[Int32[np.ndarray, "T"], Iterator[tuple[np.ndarray, Float32[np.ndarray, "B D"]]]]:
    """The texts' lengths in tokens, and (positions in `texts`, their vectors) batch by batch, each text once."""
    ids = _tokenize(texts, model, limit)
    return np.array([len(row) for row in ids], np.int32), _encode_batches(ids, model, limit, batch_tokens)


def _encode_batches(
    ids: list[np.ndarray], model: PretrainedModel, limit: int, batch_tokens: int
) -> Iterator[tuple[np.ndarray, Float32[np.ndarray, "B D"]]]:
    if not ids:
        return
    lengths = np.array([len(row) for row in ids], np.int32)
    params, devices = device_put(as_bits(model.params), None), jax.local_device_count()
    waiting: tuple[np.ndarray, jax.Array] | None = None  # the device works on the next batch while this one is read
    for batch, rows, length in _batches(lengths, batch_tokens * devices, limit):
        rows = -(-rows // devices) * devices
        padded = np.zeros((rows, length), np.int32)
        mask = np.zeros((rows, length), bool)
        for row, text in enumerate(batch):
            padded[row, : lengths[text]] = ids[text]
            mask[row, : lengths[text]] = True
        vectors = apply_encoder(
            params, device_put(padded, 0), device_put(mask, 0), model.config, model.pooling, model.normalize
        )
        if waiting is not None:
            yield waiting[0], np.asarray(waiting[1])[: len(waiting[0])]
        waiting = batch, vectors
    if waiting is not None:
        yield waiting[0], np.asarray(waiting[1])[: len(waiting[0])]
