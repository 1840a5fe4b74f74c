"""Text embedding: deduplicates texts, sorts them by length, encodes batches of few shapes, caches vectors by content.

Dimensions: T texts, L tokens, B texts of a batch, D hidden size.
"""

import contextlib
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
from jaxtyping import Bool, Float32, Int32, Int64, UInt8
from tqdm import tqdm

from fused_rec.distributed import processes
from fused_rec.distributed.devices import device_put
from fused_rec.memory import require_memory
from fused_rec.text.cache import KEY_BYTES, lease, open_shards, read_vectors, shard_folder, write_vectors
from fused_rec.text.encoders.layers import PRECISION, Params, as_bits
from fused_rec.text.encoders.registry import apply_encoder, apply_packed, flops, packs
from fused_rec.text.pretrained import PretrainedModel

# Increment when the same text, weights and settings give other vectors than before: old cache entries become invalid.
VECTORS_VERSION = 2
FLUSH_SECONDS = 20.0
FLUSH_TEXTS = 65_536
COMPILE_TOKENS = 6_000  # tokens that two CPU cores encode while XLA compiles one more shape, 0.8 s
PEAK_ROWS, PEAK_REPEATS = 4096, 8  # of the matrix product that measures peak FLOP/s, some 50 ms
LEAST_TOKENS = 64  # of a packed batch: less is not faster
TOKENIZE_TEXTS = 8_192  # per tokenizer call, whose results take some kilobytes per text


def encode_texts(
    texts: Sequence[str],
    model: PretrainedModel,
    *,
    cache: str | Path | None,
    batch_tokens: int = 2048,
    max_tokens: int = 0,
    progress: bool = True,
) -> Float32[np.ndarray, "T D"]:
    """Embeds texts with a pretrained model; equal texts are encoded once, and the model's prompt is prepended to each.

    With several processes (`fused_rec.distributed.processes`), all call this with the same texts and each encodes a
    share of those not cached.

    Args:
      texts: T texts.
      model: the pretrained model.
      cache: folder of cached vectors, None for none; each combination of model and settings has its own subfolder.
        Vectors are written every 20 s, so an interrupted run continues where it stopped.
      batch_tokens: padded tokens per device and encoder call (at least one text).
      max_tokens: texts are truncated to this many tokens, special ones included; 0 = the model's own limit.
      progress: shows tokens encoded, tokens/s, time left, and FLOP/s without padding, on an accelerator also relative
        to its measured peak of float32 matrix products.

    Returns:
      One vector per text, in the order of `texts`.

    Raises:
      TypeError: a text is no str.
      ValueError: a text is not valid Unicode, a setting is out of bounds, or a vector is not finite.
      CacheError: the cache folder cannot be created.
      InsufficientMemoryError: the vectors would not fit into memory.
    """
    limit = _token_limit(model, max_tokens)
    if batch_tokens < 1:
        raise ValueError(f"batch_tokens is {batch_tokens}; it must be at least 1")
    unique, inverse = _distinct(texts, model.prompt)
    dims = model.config.hidden_size
    rows = len(unique) if len(unique) == len(texts) else len(unique) + len(texts)
    what = f"the vectors of {len(unique):,} texts with {dims} dimensions"
    require_memory(4 * rows * dims, what, "encode fewer texts at a time, or take a smaller text.model")
    table = _read_cache(unique, model, limit, cache)
    wanted = np.flatnonzero(processes.any_process_elementwise(~table.found))
    missing = processes.local_shard(wanted)
    with _lease(table, missing) as rows:
        _encode_missing(table, rows, [unique[row] for row in rows], model, limit, batch_tokens, progress)
    table.vectors[wanted] = processes.gather_shards(wanted, table.vectors[missing])
    if table.folder is not None and not processes.is_single_process():
        # Vectors that another process encoded, unless it wrote to the same folder.
        lacking = np.setdiff1d(wanted[~table.found[wanted]], missing)
        _, cached = read_vectors(table.folder, table.keys[lacking], dims)
        table.write(lacking[~cached])
    return table.vectors if len(unique) == len(texts) else table.vectors[inverse]


def _distinct(texts: Sequence[str], prompt: str) -> tuple[list[str], Int64[np.ndarray, "T"]]:
    """Returns the distinct texts with the prompt prepended, and the index of each text among them."""
    first_seen: dict[str, int] = {}
    prompted = (prompt + text for text in _checked(texts))
    inverse = np.array([first_seen.setdefault(text, len(first_seen)) for text in prompted], np.int64)
    return list(first_seen), inverse


class _Vectors(NamedTuple):
    """Vectors of distinct texts and their keys in the cache folder, None for none."""

    folder: Path | None
    keys: UInt8[np.ndarray, "T 32"]
    vectors: Float32[np.ndarray, "T D"]
    found: Bool[np.ndarray, "T"]  # in the cache

    def write(self, rows: Int64[np.ndarray, "_"]) -> None:
        """Writes these rows to the cache, if there is one."""
        if self.folder is not None and len(rows):
            write_vectors(self.folder, self.keys[rows], self.vectors[rows])


def _read_cache(texts: Sequence[str], model: PretrainedModel, limit: int, cache: str | Path | None) -> _Vectors:
    """Reads the vectors of distinct texts; zero where they are not in the cache."""
    count, dims = len(texts), model.config.hidden_size
    if cache is None:
        keys, vectors = np.zeros((count, KEY_BYTES), np.uint8), np.zeros((count, dims), np.float32)
        return _Vectors(None, keys, vectors, np.zeros(count, bool))
    identity = _identity(model, limit)
    folder, keys = shard_folder(cache, identity), _keys(texts, identity)
    return _Vectors(folder, keys, *read_vectors(folder, keys, dims))


@contextlib.contextmanager
def _lease(table: _Vectors, missing: Int64[np.ndarray, "B"]) -> Iterator[Int64[np.ndarray, "B"]]:
    """Yields the rows that are still missing once no other process encodes for the folder of the cache.

    The processes of one run have divided the texts and do not wait for each other.
    """
    if table.folder is None or not len(missing):
        yield missing
        return
    open_shards(table.folder)
    with lease(table.folder) if processes.is_single_process() else contextlib.nullcontext(False) as waited:
        if waited:
            vectors, found = read_vectors(table.folder, table.keys[missing], table.vectors.shape[1])
            table.vectors[missing[found]] = vectors[found]
            missing = missing[~found]
        yield missing


def _encode_missing(
    table: _Vectors,
    rows: Int64[np.ndarray, "B"],
    texts: Sequence[str],
    model: PretrainedModel,
    limit: int,
    batch_tokens: int,
    progress: bool,
) -> None:
    """Encodes these rows of the table, writes them to the cache from time to time, and shows progress."""
    lengths, batches = _encode_all(texts, model, limit, batch_tokens)
    flops_of_texts, shown = flops(model.config, lengths), progress and len(rows) > 0
    peak = _matrix_peak() if shown else 0.0
    began = saved_at = time.monotonic()
    unsaved: list[np.ndarray] = []
    texts_done = flops_done = 0
    with tqdm(total=int(lengths.sum()), desc="encoding", unit="token", unit_scale=True, disable=not shown) as bar:
        for batch, values in batches:
            finite = np.isfinite(values).all(axis=1)
            if not finite.all():
                text = texts[batch[~finite][0]]
                raise ValueError(f"the model gives a vector that is not finite for {text[:80]!r}; check its weights")
            table.vectors[rows[batch]] = values
            unsaved.append(rows[batch])
            texts_done, flops_done = texts_done + len(batch), flops_done + float(flops_of_texts[batch].sum())
            rate = _rate(flops_done / (time.monotonic() - began), peak)
            bar.set_postfix_str(f"{texts_done:,}/{len(rows):,} texts, {rate}", refresh=False)
            bar.update(int(lengths[batch].sum()))
            if time.monotonic() - saved_at > FLUSH_SECONDS or sum(map(len, unsaved)) >= FLUSH_TEXTS:
                table.write(np.concatenate(unsaved))
                unsaved.clear()
                saved_at = time.monotonic()
    table.write(np.concatenate([rows[:0], *unsaved]))


def count_tokens(texts: Sequence[str], model: PretrainedModel, *, max_tokens: int = 0) -> Int32[np.ndarray, "T"]:
    """Counts the tokens of each text with the model's prompt.

    Args:
      texts: T texts.
      model: the pretrained model.
      max_tokens: as in `encode_texts`.

    Returns:
      Tokens of each text after truncation, special ones included.

    Raises:
      ValueError: `max_tokens` is out of bounds.
    """
    return np.array([len(ids) for ids in token_ids(texts, model, max_tokens=max_tokens)], np.int32)


@functools.cache
def _matrix_peak() -> float:
    """Measures FLOP/s of float32 matrix products on all devices of this process; 0 on a CPU, where it takes long."""
    return 0.0 if jax.default_backend() == "cpu" else _product_rate(PEAK_ROWS, PEAK_REPEATS) * jax.local_device_count()


def _product_rate(rows: int, repeats: int) -> float:
    """Measures FLOP/s of one device in products of square matrices, at the precision of the encoders."""
    multiply = jax.jit(lambda x: jnp.matmul(x, x, precision=PRECISION) / rows)
    x = multiply(jnp.ones((rows, rows), jnp.float32)).block_until_ready()  # compiles
    began = time.perf_counter()
    for _ in range(repeats):
        x = multiply(x)
    x.block_until_ready()
    return 2.0 * rows**3 * repeats / (time.perf_counter() - began)


def _rate(speed: float, peak: float) -> str:
    """Formats FLOP/s."""
    size, unit = next(((s, u) for s, u in ((1e12, "T"), (1e9, "G")) if speed >= s), (1e6, "M"))
    return f"{speed / size:.3g} {unit}FLOP/s" + (f", {speed / peak:.0%} of peak" if peak else "")


class Tokens(NamedTuple):
    """Token sequence of one text, L tokens, as given to the encoder."""

    ids: Int32[np.ndarray, "L"]
    special: Bool[np.ndarray, "L"]  # added by the tokenizer, such as [CLS]
    spans: list[tuple[int, int]]  # start and end of each token in characters of the text
    words: list[int | None]  # index of each token's word; None for special tokens


def tokens(texts: Sequence[str], model: PretrainedModel, *, max_tokens: int = 0) -> list[Tokens]:
    """Tokenizes texts, without the model's prompt, with the position of each token.

    Args:
      texts: texts.
      model: the pretrained model.
      max_tokens: as in `encode_texts`.

    Returns:
      The tokens of each text after truncation.

    Raises:
      ValueError: `max_tokens` is out of bounds.
    """
    model.tokenizer.enable_truncation(_token_limit(model, max_tokens), direction=model.cut)
    return [
        Tokens(np.array(e.ids, np.int32), np.array(e.special_tokens_mask, bool), e.offsets, e.word_ids)
        for e in model.tokenizer.encode_batch(list(texts))
    ]


def token_ids(texts: Sequence[str], model: PretrainedModel, *, max_tokens: int = 0) -> list[Int32[np.ndarray, "L"]]:
    """Tokenizes texts, with the model's prompt, to ids.

    Args:
      texts: texts.
      model: the pretrained model.
      max_tokens: as in `encode_texts`.

    Returns:
      The token ids of each text after truncation, not padded.

    Raises:
      ValueError: `max_tokens` is out of bounds.
    """
    return _tokenize([model.prompt + text for text in texts], model, _token_limit(model, max_tokens))


def _token_limit(model: PretrainedModel, max_tokens: int) -> int:
    """Returns the number of tokens that texts are truncated to."""
    if max_tokens and not 3 <= max_tokens <= model.max_tokens:
        raise ValueError(f"max_tokens is {max_tokens}; it must be 0 or from 3 to the model's limit, {model.max_tokens}")
    return max_tokens or model.max_tokens


def _checked(texts: Sequence[str]) -> Iterator[str]:
    """Yields the texts; raises TypeError or ValueError for one that cannot be encoded."""
    if isinstance(texts, str):
        raise TypeError("texts is one str; give a list of them")
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"text {i} is {text!r}; every text must be a str (a missing one the empty string)")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"text {i} is no valid Unicode ({error}); decode it from UTF-8 strictly") from error
        yield text


def _identity(model: PretrainedModel, limit: int) -> str:
    """Hashes everything besides the text that a vector depends on, as 64 hex digits."""
    settings = [VECTORS_VERSION, model.digest, limit, model.cut, model.pooling, model.normalize]
    if model.config.compute_dtype != "float32":
        settings.append(model.config.compute_dtype)
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()


def _keys(texts: Sequence[str], identity: str) -> UInt8[np.ndarray, "T 32"]:
    """Hashes each text together with the identity, SHA-256."""
    start = hashlib.sha256(identity.encode())
    digests = []
    for text in texts:
        digest = start.copy()
        digest.update(text.encode())
        digests.append(digest.digest())
    return np.frombuffer(b"".join(digests), np.uint8).reshape(-1, KEY_BYTES)


def _tokenize(texts: Sequence[str], model: PretrainedModel, limit: int) -> list[Int32[np.ndarray, "L"]]:
    """Tokenizes texts to ids, at most `limit` each."""
    model.tokenizer.enable_truncation(limit, direction=model.cut)
    ids: list[np.ndarray] = []
    for start in range(0, len(texts), TOKENIZE_TEXTS):
        encodings = model.tokenizer.encode_batch_fast(list(texts[start : start + TOKENIZE_TEXTS]))
        ids += [np.array(encoding.ids, np.int32) for encoding in encodings]
    return ids


def _padded_length(length: int, limit: int) -> int:
    """Rounds a length up to a multiple of 4 to 32 tokens, at most `limit`."""
    length = max(length, 1)  # a decoder's tokenizer may return no token
    step = 4 if length <= 64 else 8 if length <= 128 else 16 if length <= 256 else 32
    return min(-(-length // step) * step, limit)


def _batch_lengths(lengths: Int32[np.ndarray, "T"], limit: int) -> list[int]:
    """Chooses the lengths to pad to, ascending, at minimum total cost of padded tokens and compilations.

    Dynamic programming from the shortest texts up: costs[i] is the minimum for all texts of the i lowest lengths.
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
    """Yields (text indices, padded rows, padded length) of each batch, longest texts first so that memory fails early.

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
    """Returns the lengths of texts in tokens, and an iterator of (text indices, vectors) by batch."""
    ids = _tokenize(texts, model, limit)
    return np.array([len(row) for row in ids], np.int32), _encode_batches(ids, model, limit, batch_tokens)


def _encode_batches(
    ids: list[np.ndarray], model: PretrainedModel, limit: int, batch_tokens: int
) -> Iterator[tuple[np.ndarray, Float32[np.ndarray, "B D"]]]:
    """Encodes token ids batch by batch; yields (text indices, vectors)."""
    if not ids:
        return
    encode = _packed if packs(model.config) else _padded
    waiting: tuple[np.ndarray, jax.Array] | None = None  # the device computes the next batch meanwhile
    for found in encode(ids, model, limit, batch_tokens):
        if waiting is not None:
            yield waiting[0], np.asarray(waiting[1])[: len(waiting[0])]
        waiting = found
    if waiting is not None:
        yield waiting[0], np.asarray(waiting[1])[: len(waiting[0])]


def _params(model: PretrainedModel) -> Params:
    """Returns parameters as the device takes them: matrices in the type of products, if that is narrower."""
    if model.config.compute_dtype == "float32":
        return as_bits(model.params)

    def narrow(path: tuple, leaf: np.ndarray) -> np.ndarray:
        return leaf.astype(jnp.bfloat16) if path[-1].key == "kernel" else leaf

    return as_bits(jax.tree_util.tree_map_with_path(narrow, model.params))


def _padded(
    ids: list[np.ndarray], model: PretrainedModel, limit: int, batch_tokens: int
) -> Iterator[tuple[np.ndarray, jax.Array]]:
    """Starts to encode texts padded to a common length; yields (text indices, vectors and padding)."""
    lengths = np.array([len(row) for row in ids], np.int32)
    params, devices = device_put(_params(model), None), jax.local_device_count()
    for batch, rows, length in _batches(lengths, batch_tokens * devices, limit):
        rows = -(-rows // devices) * devices
        padded = np.zeros((rows, length), np.int32)
        mask = np.zeros((rows, length), bool)
        for row, text in enumerate(batch):
            padded[row, : lengths[text]] = ids[text]
            mask[row, : lengths[text]] = True
        inputs = device_put(padded, 0), device_put(mask, 0)
        yield batch, apply_encoder(params, *inputs, model.config, model.pooling, model.normalize)


def _packed(
    ids: list[np.ndarray], model: PretrainedModel, limit: int, batch_tokens: int
) -> Iterator[tuple[np.ndarray, jax.Array]]:
    """Starts to encode texts that lie one after the other; yields (text indices, vectors and padding)."""
    lengths = np.array([len(row) for row in ids], np.int32)
    params = _params(model)
    for batch, tokens in _packed_batches(lengths, max(batch_tokens, int(lengths.max()))):
        ends = np.cumsum(lengths[batch], dtype=np.int32)
        flat = np.zeros(tokens, np.int32)
        flat[: ends[-1]] = np.concatenate([ids[text] for text in batch])
        starts = np.full(_texts_of_batch(tokens) + 1, ends[-1], np.int32)
        starts[: len(ends) + 1] = np.concatenate([[0], ends])
        yield batch, apply_packed(params, flat, starts, model.config, model.pooling, model.normalize)


def _packed_batches(lengths: Int32[np.ndarray, "T"], batch_tokens: int) -> Iterator[tuple[np.ndarray, int]]:
    """Yields (text indices, tokens with padding) of each batch.

    A batch takes the longest text that fits, until none does. The last one is padded to a power of two.
    """
    longest = int(lengths.max())
    waiting: list[list[int]] = [[] for _ in range(longest + 1)]
    for text in reversed(range(len(lengths))):
        waiting[lengths[text]].append(text)
    left = len(lengths)
    while left:
        batch: list[int] = []
        room, length = batch_tokens, longest
        while length >= 0 and len(batch) < _texts_of_batch(batch_tokens):
            if waiting[length]:
                batch.append(waiting[length].pop())
                room -= length
                length = min(length, room)
            else:
                length -= 1
        left -= len(batch)
        used = max(batch_tokens - room, 4 * len(batch), LEAST_TOKENS)
        yield np.array(batch), batch_tokens if left else min(batch_tokens, 1 << (used - 1).bit_length())


def _texts_of_batch(tokens: int) -> int:
    """Returns the most texts of a packed batch of so many tokens."""
    return max(tokens // 4, 1)
