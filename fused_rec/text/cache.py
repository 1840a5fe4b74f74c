"""Text vectors on disk, found again by content: a folder of shards that are written once and never changed.

A shard is a safetensors file with `keys` (uint8, T x 32), `vectors` (float32, T x D) and a checksum over both. It is
written under a temporary name, synced and renamed, so a reader sees a whole shard or none, any number of
processes may write to one folder, and a kill costs only what was not yet written. Two shards may hold the same
key. To forget everything delete the folder; so too files named *.tmp that a killed process left.
"""

import contextlib
import hashlib
import logging
import os
import uuid
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy
from jaxtyping import Bool, Float32, UInt8

KEY_BYTES = 32
DAMAGED = ".damaged"

log = logging.getLogger(__name__)


def read_vectors(
    folder: Path, keys: UInt8[np.ndarray, "T 32"], dims: int
) -> tuple[Float32[np.ndarray, "T {dims}"], Bool[np.ndarray, "T"]]:
    """The vectors stored under `keys`, which must be distinct, and which of them were found; other rows are zero.

    A shard that is cut short or whose bytes have changed gives no vector: it is logged as a warning and renamed
    to *.damaged, so its texts count as not found.
    """
    vectors = np.zeros((len(keys), dims), np.float32)
    found = np.zeros(len(keys), bool)
    # The first 8 bytes of a SHA-256 place a key among the others, all 32 decide.
    heads = _heads(keys)
    order = np.argsort(heads)
    for shard in sorted(folder.glob("*.safetensors")):
        if found.all():
            break
        try:
            with safetensors.safe_open(shard, framework="numpy") as file:
                stored = file.get_tensor("keys")
                _check_array(stored, np.uint8, KEY_BYTES)
                near = order[np.searchsorted(heads, _heads(stored), sorter=order).clip(max=len(keys) - 1)]
                rows = np.flatnonzero((stored == keys[near]).all(axis=1) & ~found[near])
                if not len(rows):
                    continue
                values = file.get_tensor("vectors")
                _check_array(values, np.float32, dims)
                if len(values) != len(stored) or (file.metadata() or {}).get("sha256") != _checksum(stored, values):
                    raise ValueError("its bytes have changed since they were written")
        except FileNotFoundError:
            continue  # another process has just found it damaged, or someone clears the folder
        except (safetensors.SafetensorError, ValueError) as error:
            log.warning("%s is damaged (%s); its texts are encoded again", shard, error)
            with contextlib.suppress(FileNotFoundError):  # another process was faster
                shard.rename(shard.with_suffix(DAMAGED))
            continue
        vectors[near[rows]] = values[rows]
        found[near[rows]] = True
    return vectors, found


def write_vectors(folder: Path, keys: UInt8[np.ndarray, "T 32"], vectors: Float32[np.ndarray, "T D"]) -> None:
    """Adds one shard. When this returns, its bytes are on the disk under their final name."""
    folder.mkdir(parents=True, exist_ok=True)
    checksum = _checksum(keys, vectors)
    temporary = folder / f"{uuid.uuid4().hex}.tmp"
    try:
        with temporary.open("xb") as file:
            file.write(safetensors.numpy.save({"keys": keys, "vectors": vectors}, {"sha256": checksum}))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, folder / f"{checksum[:32]}.safetensors")
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    directory = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(directory)  # the new name too has to outlive a power cut
    finally:
        os.close(directory)


def _heads(keys: UInt8[np.ndarray, "T 32"]) -> np.ndarray:
    return np.ascontiguousarray(keys[:, :8]).view(np.uint64)[:, 0]


def _check_array(array: np.ndarray, dtype: type, columns: int) -> None:
    if array.dtype != dtype or array.ndim != 2 or array.shape[1] != columns:
        raise ValueError(f"it holds {array.dtype} {array.shape} where {np.dtype(dtype)} of {columns} columns belongs")


def _checksum(keys: UInt8[np.ndarray, "T 32"], vectors: Float32[np.ndarray, "T D"]) -> str:
    digest = hashlib.sha256(np.ascontiguousarray(keys).data)
    digest.update(np.ascontiguousarray(vectors).data)
    return digest.hexdigest()
