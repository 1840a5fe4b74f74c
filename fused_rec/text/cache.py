"""Text vectors on disk, found again by content: folders of shards that are written once and never changed.

A shard is a safetensors file with `keys` (uint8, T x 32), `vectors` (float32, T x D) and a checksum over both. It is
written under a temporary name, synced and renamed, so a reader sees a whole shard or none, any number of
processes may write to one folder, and a kill costs only what was not yet written. Two shards may hold the same
key.

A vector tells much of its text, and a text may be a person's. So all shards lie below `text_vectors` in the cache,
folders that only their owner can enter (0700) and files that only they can read (0600), and `purge` deletes them all.
"""

import contextlib
import hashlib
import logging
import os
import re
import stat
import uuid
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy
from jaxtyping import Bool, Float32, UInt8

KEY_BYTES = 32
DAMAGED = ".damaged"
TOP = "text_vectors"
SHARD_BYTES = 1 << 31  # a larger file is none of ours: `embed` writes some 65,536 vectors a shard
_FOLDER = re.compile("[0-9a-f]{32}")  # of one model and its settings
_FILE = re.compile(r"[0-9a-f]{32}\.(safetensors|damaged|tmp)")

log = logging.getLogger(__name__)


def shard_folder(cache: str | Path, identity: str) -> Path:
    """Where the vectors of one model and its settings lie. identity: at least 32 hex digits."""
    return Path(cache).expanduser() / TOP / identity[:32]


def read_vectors(
    folder: Path, keys: UInt8[np.ndarray, "T 32"], dims: int
) -> tuple[Float32[np.ndarray, "T {dims}"], Bool[np.ndarray, "T"]]:
    """The vectors stored under `keys`, which must be distinct, and which of them were found; other rows are zero.

    A shard that is cut short, whose bytes have changed or that is no shard of ours gives no vector: it is logged as a
    warning and renamed to *.damaged, so its texts count as not found.
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
            _check_file(shard)
            with safetensors.safe_open(shard, framework="numpy") as file:
                stored = file.get_tensor("keys")
                _check_array(stored, np.uint8, KEY_BYTES)
                near = order[np.searchsorted(heads, _heads(stored), sorter=order).clip(max=len(keys) - 1)]
                rows = np.flatnonzero((stored == keys[near]).all(axis=1) & ~found[near])
                if not len(rows):
                    continue
                values = file.get_tensor("vectors")
                _check_array(values, np.float32, dims)
                if not np.isfinite(values).all():
                    raise ValueError("it holds values that are not finite")
                if len(values) != len(stored) or (file.metadata() or {}).get("sha256") != _checksum(stored, values):
                    raise ValueError("its bytes have changed since they were written")
        except FileNotFoundError:
            continue  # another process has just found it damaged, or someone clears the folder
        except (safetensors.SafetensorError, ValueError, TypeError, OSError) as error:
            log.warning("%s is damaged (%s); its texts are encoded again", shard, error)
            with contextlib.suppress(OSError):  # another process was faster, or the folder is not ours to write
                shard.rename(shard.with_suffix(DAMAGED))
            continue
        vectors[near[rows]] = values[rows]
        found[near[rows]] = True
    return vectors, found


def write_vectors(folder: Path, keys: UInt8[np.ndarray, "T 32"], vectors: Float32[np.ndarray, "T D"]) -> None:
    """Adds one shard. When this returns, its bytes are on the disk under their final name.

    The folder and, in a cache, the one above it are closed to others (0700). Raises OSError where that fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for private in (folder.parent, folder) if folder.parent.name == TOP else (folder,):
        if stat.S_IMODE(private.stat().st_mode) != 0o700:
            private.chmod(0o700)
    checksum = _checksum(keys, vectors)
    temporary = folder / f"{uuid.uuid4().hex}.tmp"
    try:
        with open(temporary, "xb", opener=_private) as file:
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


def purge(cache: str | Path) -> tuple[int, int]:
    """Deletes every text vector of a cache, and what killed processes left; returns how many files and bytes.

    Raises FileNotFoundError where the cache holds no vectors, and ValueError, before anything is deleted, where its
    folder holds anything that this module does not write: then it is none of ours. Raises OSError where a file or
    folder cannot be deleted, as while another process writes there.
    """
    top = Path(cache).expanduser() / TOP
    if not top.is_dir():
        raise FileNotFoundError(f"{top} is no folder, so no text vectors are kept there; name the cache with --cache")
    folders, files, strange = [], [], []
    for entry in _entries(top):
        (folders if _FOLDER.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False) else strange).append(entry)
    for folder in folders:
        for entry in _entries(Path(folder)):
            ours = _FILE.fullmatch(entry.name) and not entry.is_dir(follow_symlinks=False)
            (files if ours else strange).append(entry)
    if strange:
        raise ValueError(
            f"{top} is no cache of text vectors: it holds {len(strange)} other file(s), first {strange[0].path!r}; "
            "nothing was deleted. Move them away if they are yours, or name another cache"
        )
    size = sum(file.stat(follow_symlinks=False).st_size for file in files)
    for file in files:
        Path(file).unlink(missing_ok=True)
    for folder in (*folders, top):
        Path(folder).rmdir()
    return len(files), size


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return sorted(entries, key=lambda entry: entry.name)


def _private(name: str, flags: int) -> int:
    return os.open(name, flags, 0o600)


def _check_file(shard: Path) -> None:
    """Raises ValueError for what would block or fill the memory when it is opened."""
    found = shard.stat()
    if not stat.S_ISREG(found.st_mode) or found.st_size > SHARD_BYTES:
        raise ValueError(f"it is no file, or one of more than {SHARD_BYTES:,} bytes: {found.st_size:,}")


def _heads(keys: UInt8[np.ndarray, "T 32"]) -> np.ndarray:
    return np.ascontiguousarray(keys[:, :8]).view(np.uint64)[:, 0]


def _check_array(array: np.ndarray, dtype: type, columns: int) -> None:
    if array.dtype != dtype or array.ndim != 2 or array.shape[1] != columns:
        raise ValueError(f"it holds {array.dtype} {array.shape} where {np.dtype(dtype)} of {columns} columns belongs")


def _checksum(keys: UInt8[np.ndarray, "T 32"], vectors: Float32[np.ndarray, "T D"]) -> str:
    digest = hashlib.sha256(np.ascontiguousarray(keys).data)
    digest.update(np.ascontiguousarray(vectors).data)
    return digest.hexdigest()
