"""Checkpoints of training states: complete, verified, and independent of the devices. The only module that uses Orbax.

Orbax writes the arrays. It does not notice flipped bits, casts wrong dtypes, saves NaN and takes an empty folder for
the latest step, so each step folder is completed under a hidden name and then renamed:

    <folder>/<step>/state/            the arrays, as Orbax writes them
    <folder>/<step>/checkpoint.json   step, best, extras, and the name, shape and dtype of every leaf
    <folder>/<step>/manifest.sha256   a digest of every other file, in the format of `sha256sum --check`; written last
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jaxtyping import PyTree

from fused_rec.storage import persist

STATE, RECORD, MANIFEST = "state", "checkpoint.json", "manifest.sha256"
PARTIAL, DISCARDED = ".partial", ".discarded"  # suffixes of hidden folders, which a killed process leaves behind


class CheckpointError(ValueError):
    """Error for a checkpoint that is missing, damaged, invalid, or of another model."""


class Checkpoints:
    """The checkpoints of one run: the best one and the last `keep_last`, each in a folder named after its step.

    One process writes at a time. Reading never changes the folder, which may be read-only. Saving is synchronous: a
    state is small, so an asynchronous save would gain little time, and after `save` returns, the checkpoint is on disk.
    """

    def __init__(self, folder: str | os.PathLike[str], *, keep_last: int = 2):
        if keep_last < 1:
            raise ValueError(f"keep_last is {keep_last}; it must be at least 1")
        self._folder = Path(folder)
        self._keep_last = keep_last

    def save(self, step: int, state: PyTree, extras: Mapping[str, Any], *, best: bool, replace: bool = False) -> None:
        """Saves a checkpoint, and returns when it is on disk.

        A process killed before that leaves all earlier checkpoints unchanged. Damaged checkpoints of this and later
        steps are replaced, and logged, because the run was resumed before them. A failed write is retried once.

        Args:
          step: optimizer steps taken, 0 or more.
          state: tree of arrays without a device axis, all values finite.
          extras: configuration and bookkeeping of the loop, as JSON; tuples become lists.
          best: whether this is the best step of the run so far.
          replace: replace a valid checkpoint of this step, where the run was stopped before its evaluation.

        Raises:
          CheckpointError: a value is not finite or no array, JSON cannot hold the extras, or a valid checkpoint of
            this step or a later one exists.
          SaveError: the folder cannot be written; names it, the reason and the last valid step. Nothing of the failed
            save remains, and all earlier checkpoints are unchanged.
        """
        if step < 0:
            raise CheckpointError(f"step is {step}; it must be 0 or more")
        arrays = {name: _host_array(name, leaf) for name, leaf in named_leaves(state).items()}
        leaves = {name: {"shape": list(array.shape), "dtype": array.dtype.name} for name, array in arrays.items()}
        record = {"step": step, "best": best, "extras": dict(extras), "leaves": leaves}
        try:
            written = json.dumps(record, indent=1, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"extras cannot be written as JSON: {error}") from error
        stale = {later: self._problem(later) for later in self._folders() if later >= step}
        for later, problem in stale.items():
            if problem is None and not (replace and later == step):
                raise CheckpointError(
                    f"step {step} is not saved: {self._folder} holds a sound step {later}; "
                    "resume from that one, or give this run another folder"
                )

        def attempt() -> None:
            # A unique name: threads of a failed attempt may still write under its name.
            partial = self._folder / f".{step}-{time.monotonic_ns()}{PARTIAL}"
            try:
                self._write(partial, arrays, written)
                for later, problem in ({step: None} | stale).items():
                    if (self._folder / str(later)).exists():
                        if problem is not None:
                            logging.warning("%s It is replaced by the run that now saves step %d.", problem, step)
                        self._discard(later)
                partial.rename(self._folder / str(step))
                _flush(self._folder)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise

        persist(attempt, self._folder / str(step), self._kept)
        self._prune()

    def _write(self, partial: Path, arrays: dict[str, np.ndarray], record: str) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        for left in [*self._folder.glob(f".*{PARTIAL}"), *self._folder.glob(f".*{DISCARDED}")]:
            logging.warning("Removing %s, left by a process that was stopped while it saved.", left)
            shutil.rmtree(left)
        partial.mkdir()
        # TensorStore would fail midway, in threads that still log errors afterwards.
        needed, free = sum(array.nbytes for array in arrays.values()), shutil.disk_usage(partial).free
        if free < needed:
            raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}, and the state takes {needed / 1e6:.1f} MB")
        # Orbax refuses empty arrays; the record has their shapes and dtypes.
        if stored := {name: array for name, array in arrays.items() if array.size}:
            with _orbax() as orbax:
                orbax.save((partial / STATE).absolute(), stored)
        (partial / RECORD).write_text(record, encoding="utf-8")
        (partial / MANIFEST).write_text(_manifest(partial), encoding="utf-8")
        for path in [*partial.rglob("*"), partial]:
            _flush(path)

    def _kept(self) -> str:
        good = self.last_good()
        return "No checkpoint was saved before." if good is None else f"The last good checkpoint is step {good}."

    def steps(self) -> list[int]:
        """Returns the completed steps, ascending. Folders without a manifest are skipped and logged."""
        complete = self._complete()
        for step in set(self._folders()) - set(complete):
            logging.warning("%s has no %s and is no checkpoint; ignored.", self._folder / str(step), MANIFEST)
        return complete

    def best_step(self) -> int | None:
        """Returns the latest completed step that was saved as the best; None if there is none."""
        for step in reversed(self._complete()):
            try:
                if self._record(step)["best"]:
                    return step
            except CheckpointError as error:
                logging.warning("%s", error)
        return None

    def last_good(self) -> int | None:
        """Returns the latest completed step with matching digests, or None; damaged later steps are logged."""
        for step in reversed(self.steps()):
            problem = self._problem(step)
            if problem is None:
                return step
            logging.warning("%s An earlier checkpoint is looked for.", problem)
        return None

    def restore(self, step: int, like: PyTree) -> tuple[PyTree, dict[str, Any]]:
        """Restores a checkpoint.

        Args:
          step: one of `steps()`.
          like: tree of arrays or jax.ShapeDtypeStruct with the state's structure, shapes and dtypes. Each leaf is
            placed on the devices of its counterpart; NumPy arrays stay on the host.

        Returns:
          The state and its extras.

        Raises:
          CheckpointError: the step is missing or damaged, or a leaf is missing, unknown, or of another shape or dtype
            than in `like`; names the leaf. Nothing is cast.
        """
        record = self._sound_record(step)
        path, wanted = self._folder / str(step), named_leaves(like)
        saved = _shapes(record)
        for name in sorted(wanted.keys() | saved.keys()):
            here = saved.get(name)
            there = (tuple(wanted[name].shape), wanted[name].dtype.name) if name in wanted else None
            if here != there:
                raise CheckpointError(
                    f"{path}: {name} is {_describe(here)} in the checkpoint and {_describe(there)} in the model; "
                    "build the model from the configuration that the checkpoint was trained with."
                )
        arrays = self._arrays(step, record)
        placed = [_place(name, arrays[name], leaf) for name, leaf in wanted.items()]
        return jax.tree.unflatten(jax.tree.structure(like), placed), record["extras"]

    def arrays(self, step: int) -> dict[str, np.ndarray]:
        """Returns the arrays of a checkpoint by name, on the host, for a model of other nodes.

        Args:
          step: one of `steps()`.

        Raises:
          CheckpointError: the step is missing or damaged.
        """
        return {name: np.asarray(array) for name, array in self._arrays(step, self._sound_record(step)).items()}

    def _sound_record(self, step: int) -> dict[str, Any]:
        path = self._folder / str(step)
        if not (path / MANIFEST).is_file():
            raise CheckpointError(f"{path} holds no checkpoint; this run has the steps {self.steps()}")
        if problem := self._problem(step):
            raise CheckpointError(problem)
        return self._record(step)

    def _arrays(self, step: int, record: Mapping[str, Any]) -> dict[str, Any]:
        saved = _shapes(record)
        arrays = {name: np.zeros(shape, jnp.dtype(dtype)) for name, (shape, dtype) in saved.items() if 0 in shape}
        if len(arrays) < len(saved):
            with _orbax() as orbax:
                arrays |= orbax.restore((self._folder / str(step) / STATE).absolute())
        return arrays

    def digest(self, step: int) -> str:
        """Returns the SHA-256 of the manifest of a step, which covers all bytes that `restore` verifies."""
        return hashlib.sha256((self._folder / str(step) / MANIFEST).read_bytes()).hexdigest()

    def _folders(self) -> list[int]:
        if not self._folder.is_dir():
            return []
        return sorted(int(path.name) for path in self._folder.iterdir() if re.fullmatch("0|[1-9][0-9]*", path.name))

    def _complete(self) -> list[int]:
        return [step for step in self._folders() if (self._folder / str(step) / MANIFEST).is_file()]

    def _problem(self, step: int) -> str | None:
        """Verifies all bytes of a step, and describes the fault; None if there is none."""
        path = self._folder / str(step)
        try:
            listed, now = (path / MANIFEST).read_bytes(), _manifest(path).encode()
        except OSError as error:
            return f"{path} cannot be read: {error}."
        if listed == now:
            try:
                self._record(step)
            except CheckpointError as error:
                return str(error)
            return None
        changed = sorted(
            {line[66:].decode(errors="replace") for line in set(now.splitlines()) ^ set(listed.splitlines())}
        )
        return f"{path} is damaged: {', '.join(changed) or MANIFEST} differs from {MANIFEST}."

    def _record(self, step: int) -> dict[str, Any]:
        path = self._folder / str(step)
        try:
            listed, written = (path / MANIFEST).read_bytes(), (path / RECORD).read_bytes()
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error}.") from error
        if f"{hashlib.sha256(written).hexdigest()}  {RECORD}\n".encode() not in listed:
            raise CheckpointError(f"{path} is damaged: {RECORD} differs from {MANIFEST}.")
        record = json.loads(written)
        if record["step"] != step:
            raise CheckpointError(f"{path} is damaged: by its {RECORD} it is step {record['step']}.")
        return record

    def _prune(self) -> None:
        steps = self._complete()
        for step in set(steps) - set(steps[-self._keep_last :]) - {self.best_step()}:
            try:
                self._discard(step)
            except OSError as error:  # the new checkpoint is complete anyway
                logging.warning(
                    "%s is not needed any more but could not be removed: %s", self._folder / str(step), error
                )

    def _discard(self, step: int) -> None:
        # Renamed first, so that a process killed during the removal leaves no step that only looks complete.
        hidden = self._folder / f".{step}{DISCARDED}"
        (self._folder / str(step)).rename(hidden)
        shutil.rmtree(hidden)


@contextlib.contextmanager
def _orbax() -> Iterator[Any]:
    """Yields a synchronous Orbax checkpointer that logs only warnings."""
    import orbax.checkpoint as ocp  # not at the top: --help would take a fifth longer

    verbosity = logging.get_verbosity()
    logging.set_verbosity(min(verbosity, logging.WARNING))
    try:
        # With several processes, one writes and the others do not wait here.
        me = ocp.options.MultiprocessingOptions(
            primary_host=jax.process_index(),
            active_processes={jax.process_index()},
            barrier_sync_key_prefix=f"process{jax.process_index()}",
        )
        handler = ocp.StandardCheckpointHandler(multiprocessing_options=me)
        with ocp.Checkpointer(handler, multiprocessing_options=me) as checkpointer:
            yield checkpointer
    finally:
        logging.set_verbosity(verbosity)


def named_leaves(tree: PyTree) -> dict[str, Any]:
    """Returns the leaves of a tree in its order, by names such as params/gates/kernel."""
    paths = jax.tree_util.tree_flatten_with_path(tree)[0]
    leaves = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in paths}
    if len(leaves) < len(paths):
        raise CheckpointError("two leaves of the state share one name; keep '/' and '.' out of its keys")
    for name, leaf in leaves.items():
        if not isinstance(leaf, jax.Array | np.ndarray | jax.ShapeDtypeStruct):
            raise CheckpointError(f"{name} is a {type(leaf).__name__}; every leaf of a state must be an array")
    return leaves


def _host_array(name: str, leaf: Any) -> np.ndarray:
    array = np.asarray(leaf)
    if jnp.issubdtype(array.dtype, jnp.inexact) and not np.isfinite(array).all():
        count = int((~np.isfinite(array)).sum())
        raise CheckpointError(
            f"{name} has {count} of {array.size} values that are not finite, so the state is not saved; "
            "resume from the last checkpoint with a lower learning rate"
        )
    return array


def _place(name: str, array: Any, leaf: Any) -> Any:
    if isinstance(leaf, np.ndarray):
        placed = np.asarray(array)
    else:
        placed = jax.device_put(array, leaf.sharding)
    if placed.shape != leaf.shape or placed.dtype != leaf.dtype:  # device_put narrows 64-bit values unless told not to
        raise CheckpointError(f"{name} came back as {placed.dtype}{placed.shape}, not {leaf.dtype}{leaf.shape}")
    return placed


def _shapes(record: Mapping[str, Any]) -> dict[str, tuple[tuple[int, ...], str]]:
    """Returns shape and dtype of each leaf of a checkpoint."""
    return {name: (tuple(leaf["shape"]), leaf["dtype"]) for name, leaf in record["leaves"].items()}


def _describe(leaf: tuple[tuple[int, ...], str] | None) -> str:
    return "absent" if leaf is None else f"{leaf[1]}{list(leaf[0])}"


def _files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _manifest(folder: Path) -> str:
    """Returns the manifest of the files in a folder, in the format of `sha256sum`."""
    return "".join(f"{_digest(folder / file)}  {file}\n" for file in _files(folder) if file != MANIFEST)


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """Flushes a file or the entries of a folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
