"""train(config, workdir): from files to a checkpointed model and `results.json`, in the order in which it happens.

workdir/
  run.json             config, and what the tables were: their digest, and by table rows and a digest of each column;
                       another config (settings of `config.NEUTRAL` apart), or changed tables, are refused
  select/, refit/      checkpoints and curves of the two phases (refit only where config.train.refit)
  test_metrics_per_user.npz       test metrics of each user: `user` (rows of the users) and one float32 array a metric
  README.md            the model card: what was trained on what, how good it is, how to load it
  results.json         written last: validation and test metrics, the test's slices, seconds, parameters, versions, and
                       when it was `read_finished`, in UTC
  wandb.json           where train.wandb names a project: the run's id there, and wandb/ with what was sent
  run.lock             held by the process that trains here, and there only as long
"""

import contextlib
import dataclasses
import datetime
import functools
import importlib.metadata
import io
import json
import logging
import math
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from fused_rec.config import NEUTRAL, Config, TrainConfig, differing, from_dict, to_dict
from fused_rec.data.batches import Batch, UserItems, batch, steps_per_epoch, user_items
from fused_rec.data.dataset import Dataset, changes, contents, digest
from fused_rec.data.splits import Split
from fused_rec.distributed import processes, signals
from fused_rec.distributed.devices import computes
from fused_rec.evaluation.ranking import UserMetrics, mean
from fused_rec.runs.loggers import CurveLogger, MetricWriter, metric_writer, wandb_library
from fused_rec.runs.model_card import LIBRARY, card, counts
from fused_rec.runs.run_dir import lock_run_dir
from fused_rec.storage import write_file
from fused_rec.training import finetune
from fused_rec.training.checkpoint import CheckpointError, Checkpoints
from fused_rec.training.evaluate import (
    evaluate_mean,
    evaluate_slices,
    evaluate_users,
    scorer,
    sharded_scorer,
)
from fused_rec.training.footprint import require_embedding, require_step
from fused_rec.training.inputs import Prepared, init_state, prepare, read, read_dataset, with_finetuned_text
from fused_rec.training.neighbor_sampling import PROBE_BATCHES, full_graph_sampler, neighbor_sampler
from fused_rec.training.sharding import gather_state, parallel_train_step, shard_graph_inputs, shard_state
from fused_rec.training.train_step import TrainState

LOG = logging.getLogger(__name__)
RUN, RESULTS, TEST_METRICS_PER_USER, CARD = "run.json", "results.json", "test_metrics_per_user.npz", "README.md"
TABLES = "tables"  # in the workdir of a run: the tables that it was given in memory (fused_rec.api)
LOSS_EVERY = 10  # steps between looks at the loss; each look waits for the device


class NonFiniteLossError(FloatingPointError):
    """Training diverged; the message names the step and the last good checkpoint."""


class TablesChangedError(ValueError):
    """The tables are not those that a run was made of; the message says what changed. Commands end with status 3."""

    exit_status = 3


class TablesNotReadError(OSError):
    """The tables of a finished run cannot be read, and may have changed. Commands end with status 4."""

    setting = "data.path"  # that says where they are
    exit_status = 4


class Progress(NamedTuple):
    """The loop's bookkeeping, kept with each checkpoint. best: the best validation value, at `best_step`."""

    best: float | None = None
    best_step: int = 0
    evals_since_best: int = 0  # evaluations since the best
    seconds: float = 0.0
    losses: Sequence[float] = ()  # since the last evaluation, of a run that was stopped between two


@computes
def run_training(config: Config, workdir: str | Path) -> dict[str, Any]:
    """Runs or resumes one run and returns what `results.json` holds.

    Of a finished run the tables are read, and compared with those that it was made of, before its results come back.

    Raises:
      ValueError: workdir holds a run of another config.
      TablesChangedError: workdir holds a run of other tables.
      TablesNotReadError: the run in workdir is finished, and the tables cannot be read.
      DeviceError: JAX has no device.
      CacheError: texts are to be encoded, and their vectors cannot be kept.
      DataError, LeakError: the input must not be used.
      InsufficientMemoryError: a step, or what comes before the first one, does not fit.
      NonFiniteLossError: training diverged.
      BusyError: another process trains in workdir.
      SaveError: a checkpoint or result could not be written.
      CheckpointError: the checkpoint of the best step is damaged.
      ImportError: train.wandb names a project, and the library is not installed.
      Stopped: a signal asked for an end (see `fused_rec.distributed.signals`); the same call goes on.
    """
    workdir = Path(workdir)
    processes.check_equal_across_processes("the config", json.dumps(_as_json(to_dict(config)), sort_keys=True))
    results = None
    if processes.is_primary():
        check_config(config, workdir)
        if (workdir / RESULTS).exists():
            results = finished_results(config, *_read_again(config, workdir), workdir)
    if (results := processes.broadcast_json(results)) is not None:
        return results
    if config.train.wandb and processes.is_primary():
        wandb_library()  # now, and not when the tables are read and encoded
    with lock_run_dir(workdir) if processes.is_primary() else contextlib.nullcontext():
        return _run_training(config, workdir)


def _run_training(config: Config, workdir: Path) -> dict[str, Any]:
    dataset, data_split = read(config)
    tables = digest(dataset)
    processes.check_equal_across_processes("the digest of the tables", tables)
    prepared = prepare(config, dataset, data_split)
    # Only now: faults of the input leave the folder free for the command that mends them.
    if processes.is_primary():
        init_run_dir(config, tables, workdir, contents(dataset))
    with metric_writer(config, workdir) if processes.is_primary() else contextlib.nullcontext() as shown:
        results = _chosen_and_tested(config, workdir, dataset, data_split, prepared, tables, shown)
        if shown is not None:
            shown.write_results(results)
    return results


def _chosen_and_tested(
    config: Config,
    workdir: Path,
    dataset: Dataset,
    data_split: Split,
    prepared: Prepared,
    tables: str,
    shown: MetricWriter | None,
) -> dict[str, Any]:
    state, progress = fit(config, prepared, workdir / "select", metric_writer_of=shown)
    seconds = progress.seconds
    prepared = with_finetuned_text(config, prepared, state)
    valid = evaluate_mean(prepared, scorer(config, prepared, state), "valid")

    known = seen_splits(config)
    if config.train.refit:
        prepared = prepare(config, dataset, data_split, known)
        state, refitted = fit(config, prepared, workdir / "refit", steps=progress.best_step, metric_writer_of=shown)
        prepared = with_finetuned_text(config, prepared, state)
        seconds += refitted.seconds

    # Everything is chosen: the one time that the test part is read.
    score = scorer(config, prepared, state)
    per_user = evaluate_users(prepared, score, "test")
    results = {
        "dataset": dataset.name,
        "split": data_split.kind,
        "variant": config.model.variant,
        "seed": config.train.seed,
        "valid": valid,
        "test": mean(per_user),
        "slices": evaluate_slices(prepared, score, per_user, known),
        "best_step": progress.best_step,
        "seconds": round(seconds, 1),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        "config": to_dict(config),
        "versions": versions(),
        "finished": now(),
    }
    if processes.is_primary():
        write_users(workdir / TEST_METRICS_PER_USER, per_user)
        checkpoints = Path("refit" if config.train.refit else "select") / "checkpoints"
        model = Checkpoints(workdir / checkpoints).digest(progress.best_step)
        amounts, chosen = counts(dataset, data_split), checkpoints / str(progress.best_step)
        digests = {"tables": tables, "model": model}
        write_card(workdir / CARD, card(results, amounts, digests, chosen.as_posix()))
        write_json(workdir / RESULTS, results)
    return results


def seen_splits(config: Config) -> tuple[str, ...]:
    """The parts of the split that a model may see before the test part is read."""
    return ("train", "valid") if config.train.refit else ("train",)


def fit(
    config: Config,
    prepared: Prepared,
    folder: Path,
    *,
    steps: int | None = None,
    on_evaluation: Callable[[int, float], None] | None = None,
    metric_writer_of: MetricWriter | None = None,
) -> tuple[TrainState, Progress]:
    """Trains in `folder`, from its newest checkpoint on, and returns the state that counts, whole and on the host.

    steps None: validation every `eval_every` steps chooses; the state of the best step comes back.
    steps given: trains so many without looking at anything; the last state comes back.
    on_evaluation: told of each step at which validation is measured and of its value; what it raises ends training.
    metric_writer_of: gets the curves too.
    """
    settings = config.train
    dataset, observed = prepared.dataset, prepared.observed
    if settings.num_neighbors:  # the whole graph is embedded to be measured
        require_embedding(config, prepared.graph_inputs)
    else:
        require_step(config, prepared.graph_inputs, prepared.encoder_data)
    held = user_items(observed.user, observed.item, dataset.n_users, np.asarray(prepared.graph_inputs.trained_items))
    checkpoints = Checkpoints(folder / "checkpoints")
    drawn = functools.partial(batch_of, settings, held)
    whole, progress = resume(config, prepared, checkpoints)
    step: Any = parallel_train_step(config)
    graph_inputs, cache = prepared.graph_inputs, None
    if prepared.encoder_data is not None:
        cache = finetune.encode_all_texts(config, prepared.encoder_data, graph_inputs, whole.encoder_snapshot)
        graph_inputs, step = cache.graph_inputs, finetune.parallel_finetune_step(config, prepared.encoder_data)
        whole = dataclasses.replace(whole, encoder_snapshot=())
    # With sampled neighbours the devices get the whole graph only to be measured.
    divided = None if settings.num_neighbors else shard_graph_inputs(graph_inputs)
    if divided is None:
        tasks = neighbor_sampler(config, graph_inputs, [drawn(0, number) for number in range(PROBE_BATCHES)])
    else:
        tasks = full_graph_sampler(divided)
    first, last, began = int(whole.step), steps or settings.max_steps, time.monotonic()
    state = shard_state(whole)
    if first:
        LOG.info("%s: goes on from the checkpoint of step %d", folder.name, first)
    LOG.info("%s: %d steps an epoch", folder.name, steps_per_epoch(held, settings.batch_size))

    losses = [jnp.float32(loss) for loss in progress.losses]
    progress = progress._replace(losses=())
    bar = tqdm(total=last, initial=first, desc=folder.name, unit="step", dynamic_ncols=True)
    taken = saved = first

    def save(*, best: bool) -> None:
        gathered = gather_state(state, whole)
        if cache is not None:
            gathered = dataclasses.replace(gathered, encoder_snapshot=cache.encoder_params)
        extras = {"config": to_dict(config), "progress": progress._asdict()}
        if processes.is_primary():
            checkpoints.save(taken, gathered, extras, best=best, replace=taken == saved)

    # A request to stop waits for the end of a step: only there do the state and its bookkeeping belong together.
    with (
        signals.deferred(),
        bar,
        CurveLogger(folder, metric_writer_of) if processes.is_primary() else contextlib.nullcontext() as curves,
    ):
        if curves is not None:
            curves.rewind(first)
        try:
            while True:
                if losses and (taken % settings.eval_every == 0 or taken == last):
                    scalars = {"loss": mean_loss(losses)}
                    improved = False
                    if cache is not None and (steps is None or taken < last):
                        with signals.immediate() if processes.is_single_process() else contextlib.nullcontext():
                            trained = gather_state(state, whole).params[finetune.ENCODER]
                            cache = finetune.encode_all_texts(config, cache.encoder_data, cache.graph_inputs, trained)
                            divided = shard_graph_inputs(cache.graph_inputs)
                            tasks = full_graph_sampler(divided)
                    if steps is None:
                        # One of several processes must not leave the others waiting for its share of the work.
                        with signals.immediate() if processes.is_single_process() else contextlib.nullcontext():
                            there = divided or shard_graph_inputs(prepared.graph_inputs)
                            values = evaluate_mean(prepared, sharded_scorer(config, there, state.params), "valid")
                        scalars |= {f"valid/{name}": value for name, value in values.items()}
                        progress = update_early_stopping(progress, values[settings.metric], taken)
                        improved = progress.evals_since_best == 0
                        if on_evaluation is not None:
                            on_evaluation(taken, values[settings.metric])
                    progress = progress._replace(seconds=progress.seconds + time.monotonic() - began)
                    began = time.monotonic()
                    if curves is not None:
                        curves.write(taken, scalars)
                    save(best=improved)
                    saved, losses = taken, []
                if taken == last or progress.evals_since_best >= settings.patience:
                    break
                signals.raise_if_requested(processes.any_process)
                users = drawn(settings.seed, taken)
                text_batch = () if cache is None else (finetune.make_text_batch(config, cache, users, taken),)
                # The devices may still be at the last step while the host draws for this one.
                state, loss = step(state, *tasks(taken, users), *text_batch)
                taken += 1
                losses.append(loss)
                bar.update()
                if taken % settings.eval_every == 0 or taken == last or len(losses) % LOSS_EVERY == 0:
                    check_finite(losses, taken, checkpoints, folder)
                    bar.set_postfix_str(progress_text(float(losses[-1]), settings.metric, progress))
        except signals.Stopped as stopped:
            if taken > saved:
                check_finite(losses, taken, checkpoints, folder)
                progress = progress._replace(
                    losses=np.asarray(jax.device_get(losses), np.float32).tolist(),
                    seconds=progress.seconds + time.monotonic() - began,
                )
                save(best=False)
            stopped.add_note(f"step {taken} of {last} is saved in {folder}")
            raise
    if steps is not None:
        return gather_state(state, whole), progress
    if cache is not None:
        whole = dataclasses.replace(whole, encoder_snapshot=cache.encoder_params)
    best = checkpoints.restore(progress.best_step, like=whole)[0] if processes.is_primary() else whole
    return processes.broadcast_arrays(best), progress


def batch_of(settings: TrainConfig, user_items_of: UserItems, seed: int, step: int) -> Batch:
    """The batch of a step of a run with that seed."""
    return batch(
        user_items_of,
        step,
        seed=seed,
        batch_size=settings.batch_size,
        positives_per_user=settings.positives_per_user,
        num_negatives=settings.positives_per_user if settings.loss == "bpr" else settings.num_negatives,
    )


def resume(config: Config, prepared: Prepared, checkpoints: Checkpoints) -> tuple[TrainState, Progress]:
    """The first process's newest sound checkpoint, or a fresh start.

    Raises:
      CheckpointError: the best state is damaged; told now, because in the end it is that one which counts.
    """
    state, progress = init_state(config, prepared), Progress()
    if processes.is_primary() and (step := checkpoints.last_good()) is not None:
        state, extras = checkpoints.restore(step, like=state)
        progress = Progress(**extras["progress"])
        if progress.best_step in checkpoints.steps():
            try:
                checkpoints.restore(progress.best_step, like=state)
            except CheckpointError as error:
                raise CheckpointError(
                    f"{error} It is the best state so far, without which the later ones are of no use; remove the "
                    "folder of the checkpoints, and the same command trains anew"
                ) from error
    return processes.broadcast_arrays(state), Progress(**processes.broadcast_json(progress._asdict()))


def mean_loss(losses: list[jax.Array]) -> float:
    """Of float32 scalars; the same bits whether some of them come from a checkpoint or all from the device."""
    return float(np.mean(np.asarray(jax.device_get(losses), np.float32)))


def update_early_stopping(progress: Progress, value: float, step: int) -> Progress:
    """The bookkeeping after a validation value; equal to the best is not better. Raises ValueError on NaN."""
    if math.isnan(value):
        raise ValueError(f"the validation metric of step {step} is not a number: its part has no pair to compare")
    if progress.best is None or value > progress.best:
        return progress._replace(best=value, best_step=step, evals_since_best=0)
    return progress._replace(evals_since_best=progress.evals_since_best + 1)


def progress_text(loss: float, metric: str, progress: Progress) -> str:
    """What stands beside the progress bar."""
    best = "" if progress.best is None else f", {metric} {progress.best:.4f} at {progress.best_step}"
    return f"loss {loss:.4f}{best}"


def check_finite(losses: list[jax.Array], step: int, checkpoints: Checkpoints, folder: Path) -> None:
    """Raises NonFiniteLossError where one of the last losses, the newest of them `step`'s, is not finite."""
    values = np.asarray(jax.device_get(losses))
    if np.isfinite(values).all():
        return
    first = step - len(values) + 1 + int(np.argmin(np.isfinite(values)))
    good = checkpoints.last_good()
    kept = "there is no checkpoint yet" if good is None else f"the last good checkpoint is step {good} in {folder}"
    raise NonFiniteLossError(
        f"the loss of step {first} is {values[first - step - 1]}; {kept}. Lower train.learning_rate or raise "
        "train.temperature, and use a new workdir"
    )


def _read_again(config: Config, workdir: Path) -> tuple[str, dict[str, Any]]:
    try:
        dataset = read_dataset(config)
    except (OSError, ValueError) as error:  # ValueError: faults of the tables, or nothing left of them
        raise TablesNotReadError(
            f"{_when_finished(workdir)}, and its tables cannot be read now; its results are not shown as if they were "
            f"those of today's tables, and stand in {workdir / RESULTS}. {error}"
        ) from error
    return digest(dataset), contents(dataset)


def finished_results(config: Config, tables: str, made_of: Mapping[str, Any], workdir: Path) -> dict[str, Any]:
    """What `results.json` of a finished run holds, when config and tables are the run's.

    tables, made_of: `digest` and `contents` of the tables that there are now.

    Raises ValueError where it is another config's, and TablesChangedError where the tables have changed.
    """
    check_config(config, workdir)
    try:
        check_tables(tables, workdir, made_of)
    except TablesChangedError as error:
        raise TablesChangedError(f"{_when_finished(workdir)}; {error}") from None
    if differing(config, read_run(workdir)["config"]):
        try:
            with lock_run_dir(workdir):
                init_run_dir(config, tables, workdir, made_of)
        except OSError as error:
            LOG.warning("%s still names the tables' former place: %s", workdir / RUN, error)
    LOG.info("%s, and its tables are the same; its results are shown again", _when_finished(workdir))
    return read_results(workdir)


def _when_finished(workdir: Path) -> str:
    return f"{workdir} was finished at {read_results(workdir).get('finished', 'a time that is not recorded')}"


def now() -> str:
    """The time in UTC, to the second, as ISO 8601."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def check_config(config: Config, workdir: Path) -> None:
    """Raises ValueError where `workdir` is another config's, naming the settings that differ.

    Those of `config.NEUTRAL` may differ.
    """
    if not (workdir / RUN).exists():
        return
    neutral = {f"{section}.{name}" for section, name in NEUTRAL}
    differ = [
        f"{setting} is {there!r} there and {here!r} here"
        for setting, (there, here) in differing(config, read_run(workdir)["config"]).items()
        if setting not in neutral
    ]
    if differ:
        raise ValueError(
            f"{workdir} holds a run of another config ({'; '.join(differ)}); give this run a workdir of its own"
        )


def init_run_dir(config: Config, tables: str, workdir: Path, made_of: Mapping[str, Any] | None = None) -> None:
    """Makes `workdir` this run's, of tables with this `digest` and, by which later changes are named, these `contents`.

    Where it is already, what has changed of the settings of `config.NEUTRAL`, such as the tables' place, is kept.

    Raises ValueError where it is another config's, and TablesChangedError where it is that of other tables.
    """
    check_config(config, workdir)
    if (workdir / RUN).exists():
        check_tables(tables, workdir, made_of)
        if not differing(config, read_run(workdir)["config"]):
            return
    workdir.mkdir(parents=True, exist_ok=True)
    write_json(workdir / RUN, {"config": to_dict(config), "tables": tables, "contents": dict(made_of or {})})


def check_tables(tables: str, workdir: Path, made_of: Mapping[str, Any] | None = None) -> None:
    """Raises TablesChangedError where the run was made of other tables: its rows would be other users and items.

    tables, made_of: `digest` and `contents` of those that there are now.
    """
    there = read_run(workdir)
    if there["tables"] != tables:
        told = "; ".join(changes(there.get("contents", {}), made_of or {}))
        raise TablesChangedError(
            f"the tables have changed since {workdir} was begun{f' ({told})' if told else ''}; train on them in a new "
            "workdir"
        )


def read_run(workdir: Path) -> dict[str, Any]:
    """What `run.json` holds: config, `digest` and `contents` of the tables. Raises ValueError where it is damaged."""
    found = _read_json(workdir / RUN)
    sections = found.get("config")
    sound = isinstance(sections, dict) and all(isinstance(settings, dict) for settings in sections.values())
    sound = sound and isinstance(found.get("contents", {}), dict)
    if not sound or not isinstance(found.get("tables"), str):
        raise ValueError(f"{workdir / RUN} has no config or no digest of the tables; train in a new workdir")
    return found


def read_results(workdir: Path) -> dict[str, Any]:
    """What `results.json` holds. Raises ValueError where it is damaged."""
    return _read_json(workdir / RESULTS)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is damaged ({error}); train in a new workdir") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file} is damaged (it holds a {type(found).__name__}); train in a new workdir")
    return found


def read_finished(workdir: Path) -> tuple[Config, int]:
    """The config of a run that is over, and its best step. Raises FileNotFoundError where there is none."""
    if not (workdir / RESULTS).exists():
        raise FileNotFoundError(f"{workdir} holds no {RESULTS}; finish the run there with experiments.train first")
    step = read_results(workdir).get("best_step")
    if not isinstance(step, int):
        raise ValueError(f"{workdir / RESULTS} has no best_step; train in a new workdir")
    return from_dict(read_run(workdir)["config"]), step


def versions() -> dict[str, str]:
    """What a result depends on besides its config."""
    names = ("fused_rec", "jax", "jaxlib", "flax", "optax", "jraph", "orbax-checkpoint", "transformers", "numpy")
    found = {"python": platform.python_version(), "backend": f"{jax.local_device_count()} {jax.default_backend()}"}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def write_json(file: Path, values: dict[str, Any]) -> None:
    """Writes all or nothing. A number that is none becomes null. Raises SaveError."""
    write_file(file, (json.dumps(_as_json(values), indent=1, allow_nan=False) + "\n").encode())


def write_card(file: Path, content: str) -> None:
    """Writes all or nothing; a file of that name that is no card of ours is somebody's, and stays. Raises SaveError."""
    if file.exists() and LIBRARY not in file.read_text(encoding="utf-8", errors="replace").splitlines():
        LOG.warning("%s is no model card, and is left as it is; the run has none", file)
        return
    write_file(file, content.encode())


def write_users(file: Path, per_user: UserMetrics) -> None:
    """Writes all or nothing: `user` int32 [V] and each metric float32 [V], by its name. Raises SaveError."""
    arrays: dict[str, Any] = {"user": per_user.users, **per_user.metrics}
    archive = io.BytesIO()
    np.savez(archive, **arrays)
    write_file(file, archive.getvalue())


def read_users(file: Path) -> UserMetrics:
    """What `write_users` wrote, without the aggregates, which stand in `results.json`.

    Raises FileNotFoundError where it is not there and ValueError where it is damaged.
    """
    try:
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in arrays.files}
            users = found.pop("user")
            for name, values in [("user", users), *found.items()]:
                if values.dtype != (np.int32 if name == "user" else np.float32) or values.shape != (len(users),):
                    raise ValueError(f"{name} is {values.dtype} {values.shape}")
    except FileNotFoundError:
        raise
    except Exception as error:  # zipfile and NumPy end in a dozen kinds, tokenize.TokenError among them
        raise ValueError(
            f"{file} is damaged ({error}); take {RESULTS} out beside it and run the same command again"
        ) from error
    return UserMetrics(users, found, {})


def _as_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _as_json(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(part) for part in value]
    return None if isinstance(value, float) and math.isnan(value) else value
