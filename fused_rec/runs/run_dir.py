"""The run directory: what it holds, who writes in it, and whether a run in it has this config and these tables.

workdir/
  run.json             config, and digests of the tables and of their columns; a run with another config (except the
                       settings of `config.NEUTRAL`) or with changed tables is refused
  select/              checkpoints and curves of step selection; select_0.3/ and select_0.1/ with other temperatures,
                       where validation chooses it
  refit/, refit_all/   those of the second training, with train.refit "valid" or "all"
  test_metrics_per_user.npz   test metrics per user: `user` (row in the users table) and one float32 array per metric
  fitted.npz           what serving needs besides parameters: text transforms, degree scales, the ids of ID embeddings;
                       with a refit, fitted_select.npz has those of step selection
  pairs.npz            hashes of the pairs of each split, so that a warm start can tell what this run has learned from
  init.npz, init_fitted.npz   of a warm start: the parameters and transforms that it started from
  README.md            the model card: data, training, metrics, and how to load the model
  results.json         written last: validation and test metrics, test slices, seconds, parameters, versions, and the
                       UTC time at which the run finished; later, what a review found (`record_review`)
  wandb.json           if train.wandb names a project: the run's ID there; wandb/ has what was sent
  run.lock             held by the training process, and removed at its end
"""

import contextlib
import dataclasses
import datetime
import errno
import fcntl
import importlib.metadata
import io
import json
import logging
import math
import os
import platform
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import jax
import numpy as np

from fused_rec.config import NEUTRAL, Config, Refit, differing, from_dict, to_dict, with_temperature
from fused_rec.data.dataset import changes
from fused_rec.data.splits import SPLIT_NAMES
from fused_rec.evaluation.ranking import UserMetrics
from fused_rec.evaluation.slices import Slices
from fused_rec.runs.model_card import LIBRARY
from fused_rec.storage import write_file

LOG = logging.getLogger(__name__)
RUN, RESULTS, TEST_METRICS_PER_USER, CARD = "run.json", "results.json", "test_metrics_per_user.npz", "README.md"
TABLES = "tables"  # folder in the workdir for tables given in memory (fused_rec.api)
LOCK = "run.lock"
REFIT, REFIT_ALL = "refit", "refit_all"  # folders of the second training, by train.refit
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}  # of some network file systems


class BusyError(OSError):
    """Another process writes in the folder; the message says which, where and since when."""


class TablesChangedError(ValueError):
    """Tables other than those of the run; the message lists the changes. Commands exit with status 3."""

    exit_status = 3


class TablesNotReadError(OSError):
    """Tables of a finished run that cannot be read, and may have changed. Commands exit with status 4."""

    setting = "data.path"  # the setting with their place
    exit_status = 4


@contextlib.contextmanager
def lock_run_dir(workdir: Path) -> Iterator[None]:
    """Creates `workdir` if needed and locks it against other processes until the block ends.

    The system releases the lock when the process ends, in any way. Readers need no lock. A new folder that is empty
    after the block is removed.

    Raises:
      BusyError: another process holds it.
      OSError: the folder cannot be written.
    """
    made = not workdir.exists()
    file = workdir / LOCK
    stream = _lock(file)
    try:
        stream.truncate(0)
        began = datetime.datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
        json.dump({"pid": os.getpid(), "host": platform.node(), "since": began}, stream)
        stream.flush()
        yield
    finally:
        file.unlink(missing_ok=True)  # before the lock goes: what another process locks then is a file of its own
        stream.close()
        if made:
            with contextlib.suppress(OSError):
                workdir.rmdir()


def _lock(file: Path) -> TextIO:
    for attempts_left in reversed(range(100)):
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            stream = file.open("a+", encoding="utf-8")
        except (FileExistsError, FileNotFoundError):
            if not attempts_left:
                raise
            continue  # its last holder removed the empty folder meanwhile
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in NO_LOCKS:
                LOG.warning("%s: %s; see to it that no other process uses this folder", file, error)
                return stream
            with stream:
                if not isinstance(error, BlockingIOError):
                    raise
                raise BusyError(_who_holds(file, stream)) from None
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(stream.fileno()), file.stat()):
                return stream
        stream.close()  # its last holder removed it between the opening and the locking
    raise BusyError(
        f"{file.parent} is taken and left by other processes all the time; give this run a workdir of its own"
    )


def _who_holds(file: Path, stream: TextIO) -> str:
    stream.seek(0)
    try:
        holder = json.loads(stream.read())
        who = f"process {holder['pid']} on {holder['host']} since {holder['since']}"
    except (ValueError, KeyError, TypeError):  # caught between locking and writing
        who = "another process"
    return f"{file.parent} is in use by {who}; wait for it, stop it, or give this run a workdir of its own"


@dataclasses.dataclass(frozen=True)
class RunResults:
    """The results of a trained run or a measured baseline, as `results.json` has them.

    Attributes:
      dataset: name of the dataset.
      split: kind of the split.
      variant: name of the variant or baseline.
      seed: train.seed; of a baseline a fixed number.
      valid: validation metrics.
      test: test metrics.
      slices: test metrics by slices of users and items.
      selected: what validation selected: `best_step` of a run, `settings` of a baseline.
      seconds: of training, or of tuning.
      parameters: the number of parameters trained by gradients; None: none is.
      config: all settings.
    """

    dataset: str
    split: str
    variant: str
    seed: int
    valid: Mapping[str, float]
    test: Mapping[str, float]
    slices: Mapping[str, Slices]
    selected: Mapping[str, Any]
    seconds: float
    parameters: int | None
    config: Config

    def contents(self) -> dict[str, Any]:
        """Returns the contents of `results.json`, with the versions of the libraries and the time of this call."""
        found: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            found |= value if field.name == "selected" else {field.name: value}
        made = {"config": to_dict(self.config), "versions": versions(), "finished": now()}
        return found | {"seconds": round(self.seconds, 1)} | made


def finished_results(config: Config, tables: str, made_of: Mapping[str, Any], workdir: Path) -> dict[str, Any]:
    """Returns the results of a finished run after checking that config and tables are the run's.

    Args:
      config: the config of this call.
      tables: `digest` of the tables as they are now.
      made_of: `contents` of the tables as they are now.
      workdir: folder of the run.

    Returns:
      The contents of `results.json`.

    Raises:
      ValueError: the run has another config.
      TablesChangedError: the tables have changed.
    """
    check_config(config, workdir)
    try:
        check_tables(tables, workdir, made_of)
    except TablesChangedError as error:
        raise TablesChangedError(f"{when_finished(workdir)}; {error}") from None
    if differing(config, read_run(workdir)["config"]):
        try:
            with lock_run_dir(workdir):
                init_run_dir(config, tables, workdir, made_of)
                write_json(workdir / RESULTS, read_results(workdir) | {"config": to_dict(config)})
        except OSError as error:
            LOG.warning("%s could not be updated with the new settings: %s", workdir / RUN, error)
    LOG.info("%s with the same tables; returning its results", when_finished(workdir))
    return read_results(workdir)


def record_review(workdir: Path, review: Mapping[str, str]) -> dict[str, Any]:
    """Records what a review of a finished run found, for its card.

    Args:
      workdir: folder of the run.
      review: answers by question.

    Returns:
      The contents of `results.json`, with the date and the answers under `review`.

    Raises:
      BusyError: another process writes in the folder.
      SaveError: the file cannot be written.
    """
    with lock_run_dir(workdir):
        results = read_results(workdir) | {"review": {"Reviewed": now(), **review}}
        write_json(workdir / RESULTS, results)
    return results


def when_finished(workdir: Path) -> str:
    """Names a finished run and the time it finished, for messages."""
    return f"{workdir} was finished at {read_results(workdir).get('finished', 'an unknown time')}"


def now() -> str:
    """Returns the current UTC time, to the second, in ISO 8601."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def check_config(config: Config, workdir: Path) -> None:
    """Checks that a run in `workdir`, if any, has this config; settings of `config.NEUTRAL` may differ.

    Args:
      config: the config of this call.
      workdir: folder of the run.

    Raises:
      ValueError: other settings differ; names them with both values.
    """
    if not (workdir / RUN).exists():
        return
    neutral = {f"{section}.{name}" for section, name in NEUTRAL}
    differ = [
        f"{setting} is {recorded!r} there and {given!r} here"
        for setting, (recorded, given) in differing(config, read_run(workdir)["config"]).items()
        if setting not in neutral
    ]
    if differ:
        raise ValueError(
            f"{workdir} holds a run of another config ({'; '.join(differ)}); give this run a workdir of its own"
        )


def check_init_from(init_from: Path | None, workdir: Path) -> None:
    """Checks that a run in `workdir`, if any, started from this run; it is not read again.

    Args:
      init_from: folder of the earlier run of this call; None: the run starts from nothing.
      workdir: folder of the run.

    Raises:
      ValueError: the run started from another one, or from nothing; names both.
    """
    if not (workdir / RUN).exists():
        return
    there = read_run(workdir).get("init_from", {}).get("workdir")
    here = None if init_from is None else str(init_from.expanduser().resolve())
    if there != here:
        raise ValueError(
            f"{workdir} holds a run with another start (init_from is {there} there and {here} here); give this run a "
            "workdir of its own"
        )


def init_run_dir(
    config: Config,
    tables: str,
    workdir: Path,
    made_of: Mapping[str, Any] | None = None,
    init_from: Mapping[str, Any] | None = None,
) -> None:
    """Writes `run.json` of a new run, or updates the settings of `config.NEUTRAL` in that of an existing one.

    Args:
      config: the config of the run.
      tables: `digest` of the tables.
      workdir: folder of the run; made where it is missing.
      made_of: `contents` of the tables, which let later messages name changes.
      init_from: the run that a warm start starts from; None: nothing, or as recorded.

    Raises:
      ValueError: the folder has a run of another config.
      TablesChangedError: the folder has a run of other tables.
    """
    check_config(config, workdir)
    started = {} if init_from is None else {"init_from": dict(init_from)}
    if (workdir / RUN).exists():
        check_tables(tables, workdir, made_of)
        recorded = read_run(workdir)
        if not differing(config, recorded["config"]):
            return
        started = {"init_from": recorded["init_from"]} if "init_from" in recorded else {}
    workdir.mkdir(parents=True, exist_ok=True)
    values = {"config": to_dict(config), "tables": tables, "contents": dict(made_of or {})}
    write_json(workdir / RUN, values | started)


def check_tables(tables: str, workdir: Path, made_of: Mapping[str, Any] | None = None) -> None:
    """Checks that the tables are the run's: with others the rows of embeddings would be other users and items.

    Args:
      tables: `digest` of the tables as they are now.
      workdir: folder of the run.
      made_of: `contents` of the tables as they are now.

    Raises:
      TablesChangedError: the digests differ; names the changes.
    """
    recorded = read_run(workdir)
    if recorded["tables"] != tables:
        changed = "; ".join(changes(recorded.get("contents", {}), made_of or {}))
        raise TablesChangedError(
            f"the tables have changed since {workdir} was started{f' ({changed})' if changed else ''}; train on them "
            "in a new workdir, or serve them: --tables=DIR of recommend, export and report, dataset= of fr.load"
        )


def read_run(workdir: Path) -> dict[str, Any]:
    """Reads `run.json`: config, `digest` and `contents` of the tables.

    Args:
      workdir: folder of the run.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it is damaged.
    """
    found = read_json_object(workdir / RUN)
    sections = found.get("config")
    sound = isinstance(sections, dict) and all(isinstance(settings, dict) for settings in sections.values())
    sound = sound and all(isinstance(found.get(name, {}), dict) for name in ("contents", "init_from"))
    if not sound or not isinstance(found.get("tables"), str):
        raise ValueError(f"{workdir / RUN} has no config or no digest of the tables; train in a new workdir")
    return found


def read_results(workdir: Path) -> dict[str, Any]:
    """Reads `results.json`.

    Args:
      workdir: folder of the run.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it is damaged.
    """
    return read_json_object(workdir / RESULTS)


def read_json_object(file: Path, remedy: str = "train in a new workdir") -> dict[str, Any]:
    """Reads a JSON object.

    Args:
      file: the path.
      remedy: what to do where the file is damaged.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it is damaged.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is damaged ({error}); {remedy}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file} is damaged (it holds a {type(found).__name__}); {remedy}")
    return found


def read_finished(workdir: Path) -> tuple[Config, int, str]:
    """Reads what validation selected in a finished run.

    Args:
      workdir: folder of the run.

    Returns:
      The config with the selected temperature, the step of the selected checkpoint, and the folder of its training; of
      a baseline, which has neither, 0 and an empty name.

    Raises:
      FileNotFoundError: the folder has no finished run.
      ValueError: its files are damaged.
    """
    if not (workdir / RESULTS).exists():
        raise FileNotFoundError(f"{workdir} holds no {RESULTS}; finish the run there with `fused-rec train` first")
    results, config = read_results(workdir), from_dict(read_run(workdir)["config"])
    selected = {"best_step": int, "temperature": float, "phase": str} if config.model.is_trained else {"settings": dict}
    for name, kind in selected.items():
        if not isinstance(results.get(name), kind):
            raise ValueError(f"{workdir / RESULTS} has no {name}; train in a new workdir")
    if not config.model.is_trained:
        return config, 0, ""
    config = with_temperature(config, results["temperature"])
    return config, results["best_step"], results["phase"]


def phase_of(refit: Refit, selected: str, model: str) -> str:
    """Returns the folder of the training of a model of a run.

    Args:
      refit: train.refit.
      selected: folder of the training that validation selected.
      model: "valid", "test" or "served": the model that validation or test metrics are of, or the one that ranks.
    """
    if refit == "all" and model == "served":
        return REFIT_ALL
    return REFIT if refit == "valid" and model != "valid" else selected


def seen_splits(refit: Refit, model: str = "test") -> tuple[str, ...]:
    """Returns the splits that a model of a run was trained on.

    Args:
      refit: train.refit.
      model: that of step selection, which validation metrics are of ("valid"), that which test metrics are of
        ("test"), or the one that is served.
    """
    if refit == "all" and model == "served":
        return SPLIT_NAMES
    return SPLIT_NAMES[:2] if refit == "valid" and model != "valid" else SPLIT_NAMES[:1]


def versions() -> dict[str, str]:
    """Returns the versions of Python, the backend and the libraries that a result depends on."""
    names = ("fused_rec", "jax", "jaxlib", "flax", "optax", "jraph", "orbax-checkpoint", "transformers", "numpy")
    found = {"python": platform.python_version(), "backend": f"{jax.local_device_count()} {jax.default_backend()}"}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def write_json(file: Path, values: dict[str, Any]) -> None:
    """Writes a JSON file atomically; NaN becomes null.

    Args:
      file: the path.
      values: what JSON can hold.

    Raises:
      SaveError: the file cannot be written.
    """
    write_file(file, (json.dumps(as_json(values), indent=1, allow_nan=False) + "\n").encode())


def write_card(file: Path, content: str) -> None:
    """Writes the model card atomically; a file of that name that is not a model card is kept, with a warning.

    Args:
      file: the path.
      content: the card, Markdown.

    Raises:
      SaveError: the file cannot be written.
    """
    if file.exists() and LIBRARY not in file.read_text(encoding="utf-8", errors="replace").splitlines():
        LOG.warning("%s is not a model card and is kept; this run has no model card", file)
        return
    write_file(file, content.encode())


def write_users(file: Path, per_user: UserMetrics) -> None:
    """Writes test metrics per user atomically, as an .npz file.

    Args:
      file: the path.
      per_user: `user` int32 [V] and float32 [V] for each metric.

    Raises:
      SaveError: the file cannot be written.
    """
    write_arrays(file, {"user": per_user.users, **per_user.metrics})


def write_arrays(file: Path, arrays: Mapping[str, Any]) -> None:
    """Writes arrays atomically, as an .npz file, which has a checksum of each.

    Args:
      file: the path.
      arrays: by name.

    Raises:
      SaveError: the file cannot be written.
    """
    archive = io.BytesIO()
    np.savez(archive, **arrays)
    write_file(file, archive.getvalue())


def read_arrays(file: Path, remedy: str) -> dict[str, np.ndarray]:
    """Reads a file of `write_arrays`.

    Args:
      file: the path.
      remedy: what to do where the file is damaged.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it is damaged.
    """
    try:
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except FileNotFoundError:
        raise
    except Exception as error:  # zipfile and NumPy raise a dozen types, tokenize.TokenError among them
        raise ValueError(f"{file} is damaged ({error}); {remedy}") from error


def read_users(file: Path) -> UserMetrics:
    """Reads test metrics per user, without aggregates, which are in `results.json`.

    Args:
      file: a file of `write_users`.

    Returns:
      int32 [V] users and float32 [V] values of each metric.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it is damaged.
    """
    remedy = f"remove {RESULTS} beside it and run the same command again"
    found = read_arrays(file, remedy)
    users = found.pop("user", np.zeros(()))
    for name, values in [("user", users), *found.items()]:
        sound = values.ndim == 1 and values.shape == users.shape
        if not sound or values.dtype != (np.int32 if name == "user" else np.float32):
            raise ValueError(f"{file} is damaged ({name} is {values.dtype} {values.shape}); {remedy}")
    return UserMetrics(users, found, {})


def as_json(value: Any) -> Any:
    """Replaces NaN by None, recursively, and tuples by lists."""
    if isinstance(value, dict):
        return {name: as_json(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(part) for part in value]
    return None if isinstance(value, float) and math.isnan(value) else value
