"""Content-addressed cache of text vectors on disk: folders of immutable shards.

A shard is a safetensors file with `keys` (uint8 [T, 32]), `vectors` (float32 [T, D]) and a checksum over both. It is
written under a temporary name, flushed and renamed, so readers see complete shards only, any number of processes may
write to one folder, and a kill loses only vectors not yet written. Two shards may have the same key. One process at a
time encodes for a folder (`lease`).

Vectors reveal much of their texts, which may be personal data. All shards are therefore below `text_vectors` in the
cache, in folders with mode 0700 and files with mode 0600, and `purge` deletes all of them.
"""

import contextlib
import hashlib
import logging
import os
import re
import stat
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy
from jaxtyping import Bool, Float32, UInt8

if sys.platform != "win32":
    import fcntl

KEY_BYTES = 32
DAMAGED = ".damaged"
LEASE = "lease.lock"  # locked by the process that encodes for a folder
TOP = "text_vectors"
SHARD_BYTES = 1 << 31  # larger files are not from here: `encode_texts` writes some 65,536 vectors per shard
_FOLDER = re.compile("[0-9a-f]{32}")  # of one model and its settings
_FILE = re.compile(rf"[0-9a-f]{{32}}\.(safetensors|damaged|tmp)|{re.escape(LEASE)}")

log = logging.getLogger(__name__)


class CacheError(OSError):
    """Error for a cache folder that cannot be used; the message has the folder and the reason."""

    setting = "text.cache"  # the setting to change


def top_folder(cache: str | Path) -> Path:
    """Returns the folder of all text vectors of a cache.

    Args:
      cache: folder of the cache, with ~ for the home directory.

    Returns:
      The folder, which need not exist.

    Raises:
      CacheError: the home directory is not known.
    """
    try:
        return Path(cache).expanduser() / TOP
    except RuntimeError as error:  # no HOME, and no entry in the system's list of users
        raise CacheError(
            f"text.cache is {str(cache)!r}, and the home directory is not known ({error}); set HOME, or text.cache to "
            "a folder that can be written"
        ) from error


def shard_folder(cache: str | Path, identity: str) -> Path:
    """Returns the folder of the vectors of one model and its settings.

    Args:
      cache: folder of the cache.
      identity: at least 32 hex digits, the hash of model and settings.

    Returns:
      The folder, which need not exist.
    """
    return top_folder(cache) / identity[:32]


def open_cache(cache: str | Path) -> None:
    """Creates the folder of a cache where it is missing, before any work is done.

    An existing one need not be writable, since it may contain all vectors needed.

    Args:
      cache: folder of the cache.

    Raises:
      CacheError: the folder is missing and cannot be created.
    """
    top = top_folder(cache)
    if not os.path.isdir(top):  # Path.is_dir raises where a parent is not accessible
        _make(top)


def open_shards(folder: Path) -> None:
    """Creates the folder of one model's vectors with mode 0700, before texts are encoded; likewise its parent.

    Args:
      folder: from `shard_folder`.

    Raises:
      CacheError: it cannot be created or written.
    """
    for private in (folder.parent, folder) if folder.parent.name == TOP else (folder,):
        _make(private)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise CacheError(f"text vectors cannot be kept: {folder} cannot be written; set text.cache to another folder")


def _make(folder: Path) -> None:
    """Creates a folder with mode 0700."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if stat.S_IMODE(folder.stat().st_mode) != 0o700:
            folder.chmod(0o700)
    except OSError as error:
        raise CacheError(
            f"text vectors cannot be kept: {folder} cannot be made or closed to others ({error}); set text.cache to "
            "another folder"
        ) from error


@contextlib.contextmanager
def lease(folder: Path) -> Iterator[bool]:
    """Waits until no other process of this machine encodes for a folder, and keeps others waiting meanwhile.

    Commands that start together thus encode a text once. The system ends the lease with the process, however that ends.
    A file system without locks, and Windows, grant it at once.

    Args:
      folder: from `shard_folder`, opened by `open_shards`.

    Yields:
      Whether it waited: what is in the cache may have changed.
    """
    with open(folder / LEASE, "ab", opener=_private) as file:
        waited = False
        if sys.platform != "win32":
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log.warning("waiting for another process that encodes texts for %s", folder)
                fcntl.flock(file, fcntl.LOCK_EX)
                waited = True
            except OSError:  # this file system has no locks
                pass
        yield waited


def read_vectors(
    folder: Path, keys: UInt8[np.ndarray, "T 32"], dims: int
) -> tuple[Float32[np.ndarray, "T {dims}"], Bool[np.ndarray, "T"]]:
    """Reads cached vectors.

    A truncated, changed or foreign shard is logged as a warning and renamed to *.damaged; its texts count as not found.

    Args:
      folder: from `shard_folder`.
      keys: distinct keys of T texts.
      dims: dimensions D.

    Returns:
      The vectors, zero where not found, and which were found.
    """
    vectors = np.zeros((len(keys), dims), np.float32)
    found = np.zeros(len(keys), bool)
    # Keys are searched by their first 8 bytes and compared by all 32.
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
            continue  # renamed by another process, or deleted
        except (safetensors.SafetensorError, ValueError, TypeError, OSError) as error:
            log.warning("%s is damaged (%s); its texts are encoded again", shard, error)
            with contextlib.suppress(OSError):  # renamed by another process, or not writable
                shard.rename(shard.with_suffix(DAMAGED))
            continue
        vectors[near[rows]] = values[rows]
        found[near[rows]] = True
    return vectors, found


def write_vectors(folder: Path, keys: UInt8[np.ndarray, "T 32"], vectors: Float32[np.ndarray, "T D"]) -> None:
    """Writes one shard; when this returns, it is on disk under its final name.

    Args:
      folder: from `shard_folder`; created as by `open_shards`.
      keys: keys of T texts.
      vectors: their vectors.

    Raises:
      CacheError: the folder cannot be created or written.
      OSError: the shard cannot be written.
    """
    open_shards(folder)
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
        os.fsync(directory)  # the new name must survive a power failure too
    finally:
        os.close(directory)


def purge(cache: str | Path) -> tuple[int, int]:
    """Deletes all text vectors of a cache, and leftovers of killed processes.

    Args:
      cache: folder of the cache.

    Returns:
      Number of deleted files, and their bytes.

    Raises:
      FileNotFoundError: the cache has no vectors.
      ValueError: its folder contains files that this module does not write; nothing is deleted.
      OSError: a file or folder cannot be deleted, for example while another process writes there.
    """
    top = top_folder(cache)
    if not top.is_dir():
        raise FileNotFoundError(f"{top} is no folder, so no text vectors are stored there; name the cache with --cache")
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
    return sum(file.name != LEASE for file in files), size


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """Lists a folder by name."""
    with os.scandir(folder) as entries:
        return sorted(entries, key=lambda entry: entry.name)


def _private(name: str, flags: int) -> int:
    """Opens a file with mode 0600."""
    return os.open(name, flags, 0o600)


def _check_file(shard: Path) -> None:
    """Raises ValueError for a file that would block or exhaust memory when opened."""
    found = shard.stat()
    if not stat.S_ISREG(found.st_mode) or found.st_size > SHARD_BYTES:
        raise ValueError(f"it is no file, or one of more than {SHARD_BYTES:,} bytes: {found.st_size:,}")


def _heads(keys: UInt8[np.ndarray, "T 32"]) -> np.ndarray:
    """Returns the first 8 bytes of each key as uint64."""
    return np.ascontiguousarray(keys[:, :8]).view(np.uint64)[:, 0]


def _check_array(array: np.ndarray, dtype: type, columns: int) -> None:
    """Raises ValueError for another dtype or number of columns."""
    if array.dtype != dtype or array.ndim != 2 or array.shape[1] != columns:
        raise ValueError(f"it holds {array.dtype} {array.shape} where {np.dtype(dtype)} of {columns} columns belongs")


def _checksum(keys: UInt8[np.ndarray, "T 32"], vectors: Float32[np.ndarray, "T D"]) -> str:
    """Hashes the bytes of keys and vectors, SHA-256."""
    digest = hashlib.sha256(np.ascontiguousarray(keys).data)
    digest.update(np.ascontiguousarray(vectors).data)
    return digest.hexdigest()
