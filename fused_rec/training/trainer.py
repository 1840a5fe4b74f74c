"""The training run: from a config and tables to a checkpointed model and `results.json`.

`run_training(config, workdir)` reads, splits and prepares the tables, selects a step by validation (`fit`), optionally
refits on train and valid, and evaluates on the test split once. It writes

workdir/
  run.json             config, and digests of the tables and of their columns; a run with another config (except the
                       settings of `config.NEUTRAL`) or with changed tables is refused
  select/, refit/      checkpoints and curves of the two phases (refit only with train.refit)
  test_metrics_per_user.npz   test metrics per user: `user` (row in the users table) and one float32 array per metric
  README.md            the model card: data, training, metrics, and how to load the model
  results.json         written last: validation and test metrics, test slices, seconds, parameters, versions, and the
                       UTC time at which the run finished
  wandb.json           if train.wandb names a project: the run's ID there; wandb/ has what was sent
  run.lock             held by the training process, and removed at its end
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
from fused_rec.training.inputs import (
    Prepared,
    init_state,
    prepare,
    read,
    read_dataset,
    seen_splits,
    with_finetuned_text,
)
from fused_rec.training.neighbor_sampling import PROBE_BATCHES, full_graph_sampler, neighbor_sampler
from fused_rec.training.sharding import gather_state, parallel_train_step, shard_graph_inputs, shard_state
from fused_rec.training.train_step import TrainState

LOG = logging.getLogger(__name__)
RUN, RESULTS, TEST_METRICS_PER_USER, CARD = "run.json", "results.json", "test_metrics_per_user.npz", "README.md"
TABLES = "tables"  # folder in the workdir for tables given in memory (fused_rec.api)
LOSS_EVERY = 10  # steps between reads of the loss; each read waits for the device


class NonFiniteLossError(FloatingPointError):
    """A loss that is NaN or infinite; the message names the step and the last good checkpoint."""


class TablesChangedError(ValueError):
    """Tables other than those of the run; the message lists the changes. Commands exit with status 3."""

    exit_status = 3


class TablesNotReadError(OSError):
    """Tables of a finished run that cannot be read, and may have changed. Commands exit with status 4."""

    setting = "data.path"  # the setting with their place
    exit_status = 4


class Progress(NamedTuple):
    """The state of the training loop besides the model, saved with each checkpoint."""

    best: float | None = None  # the best validation value, at `best_step`
    best_step: int = 0
    evals_since_best: int = 0  # evaluations since `best_step`
    seconds: float = 0.0  # of training and validation
    losses: Sequence[float] = ()  # losses since the last evaluation, of a run stopped between two evaluations


@computes
def run_training(config: Config, workdir: str | Path) -> dict[str, Any]:
    """Starts or resumes one run and trains it to the end.

    For a finished run the tables are read and compared with the run's, and its results come back.

    Args:
      config: all settings.
      workdir: folder of the run; made where it is missing.

    Returns:
      The contents of `results.json`.

    Raises:
      ValueError: workdir holds a run of another config.
      TablesChangedError: workdir holds a run of other tables.
      TablesNotReadError: the run in workdir is finished, and the tables cannot be read.
      DeviceError: JAX has no device.
      CacheError: texts must be encoded, and the cache of their embeddings cannot be written.
      DataError, LeakError: the tables have faults, or held-out data leaks into the input.
      InsufficientMemoryError: preparation or a step does not fit in memory.
      NonFiniteLossError: training diverged.
      BusyError: another process trains in workdir.
      SaveError: a checkpoint or result could not be written.
      CheckpointError: the checkpoint of the best step is damaged.
      ImportError: train.wandb names a project, and the library is not installed.
      Stopped: a signal requested a stop (see `fused_rec.distributed.signals`); the same call resumes the run.
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
        wandb_library()  # fails here rather than after the tables are read and encoded
    with lock_run_dir(workdir) if processes.is_primary() else contextlib.nullcontext():
        return _run_training(config, workdir)


def _run_training(config: Config, workdir: Path) -> dict[str, Any]:
    """`run_training` of an unfinished run, with the lock held."""
    dataset, data_split = read(config)
    tables = digest(dataset)
    processes.check_equal_across_processes("the digest of the tables", tables)
    prepared = prepare(config, dataset, data_split)
    # Only now: a fault of the input leaves the folder free for a corrected command.
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
    """Selects a step by validation, refits if configured, evaluates on the test split and writes the results."""
    state, progress = fit(config, prepared, workdir / "select", metric_writer_of=shown)
    seconds = progress.seconds
    prepared = with_finetuned_text(config, prepared, state)
    valid = evaluate_mean(prepared, scorer(config, prepared, state), "valid")

    if config.train.refit:
        prepared = prepare(config, dataset, data_split, seen_splits(refit=True))
        state, refitted = fit(config, prepared, workdir / "refit", steps=progress.best_step, metric_writer_of=shown)
        prepared = with_finetuned_text(config, prepared, state)
        seconds += refitted.seconds

    # Model selection is over: the only use of the test split.
    score = scorer(config, prepared, state)
    per_user = evaluate_users(prepared, score, "test")
    results = {
        "dataset": dataset.name,
        "split": data_split.kind,
        "variant": config.model.variant,
        "seed": config.train.seed,
        "valid": valid,
        "test": mean(per_user),
        "slices": evaluate_slices(prepared, score, per_user),
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


def fit(
    config: Config,
    prepared: Prepared,
    folder: Path,
    *,
    steps: int | None = None,
    on_evaluation: Callable[[int, float], None] | None = None,
    metric_writer_of: MetricWriter | None = None,
) -> tuple[TrainState, Progress]:
    """Trains one model, resuming from the newest checkpoint in `folder`.

    Args:
      config: all settings.
      prepared: the data, split and graph inputs.
      folder: where checkpoints and curves are written.
      steps: None: train until early stopping, with validation every train.eval_every steps, and return the best step;
        a number: train that many steps without validation and return the last.
      on_evaluation: called with (step, value of train.metric) after each validation; what it raises ends training.
      metric_writer_of: receives the curves too.

    Returns:
      The selected state, unsharded, on the host; and the progress of the loop.

    Raises:
      InsufficientMemoryError: a step does not fit in memory.
      NonFiniteLossError: a loss is not finite.
      CheckpointError: the checkpoint of the best step is damaged.
      Stopped: a signal requested a stop; the state is saved.
    """
    settings = config.train
    dataset, observed = prepared.dataset, prepared.observed
    if settings.num_neighbors:  # validation embeds the whole graph
        require_embedding(config, prepared.graph_inputs)
    else:
        require_step(config, prepared.graph_inputs, prepared.encoder_data)
    interactions = user_items(
        observed.user, observed.item, dataset.n_users, np.asarray(prepared.graph_inputs.trained_items)
    )
    checkpoints = Checkpoints(folder / "checkpoints")
    batch_at = functools.partial(batch_of, settings, interactions)
    whole, progress = resume(config, prepared, checkpoints)
    step: Any = parallel_train_step(config)
    graph_inputs, cache = prepared.graph_inputs, None
    if prepared.encoder_data is not None:
        cache = finetune.encode_all_texts(config, prepared.encoder_data, graph_inputs, whole.encoder_snapshot)
        graph_inputs, step = cache.graph_inputs, finetune.parallel_finetune_step(config, prepared.encoder_data)
        whole = dataclasses.replace(whole, encoder_snapshot=())
    # With neighbor sampling the devices get the whole graph for validation only.
    sharded = None if settings.num_neighbors else shard_graph_inputs(graph_inputs)
    if sharded is None:
        inputs_at = neighbor_sampler(config, graph_inputs, [batch_at(0, number) for number in range(PROBE_BATCHES)])
    else:
        inputs_at = full_graph_sampler(sharded)
    first, last, began = int(whole.step), steps or settings.max_steps, time.monotonic()
    state = shard_state(whole)
    if first:
        LOG.info("%s: resumes from the checkpoint of step %d", folder.name, first)
    LOG.info("%s: %d steps per epoch", folder.name, steps_per_epoch(interactions, settings.batch_size))

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

    # A stop request waits for the end of a step: only there do state and progress agree.
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
                            sharded = shard_graph_inputs(cache.graph_inputs)
                            inputs_at = full_graph_sampler(sharded)
                    if steps is None:
                        # With several processes a stop here would leave the others waiting in a collective.
                        with signals.immediate() if processes.is_single_process() else contextlib.nullcontext():
                            full_graph = sharded or shard_graph_inputs(prepared.graph_inputs)
                            values = evaluate_mean(prepared, sharded_scorer(config, full_graph, state.params), "valid")
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
                users = batch_at(settings.seed, taken)
                text_batch = () if cache is None else (finetune.make_text_batch(config, cache, users, taken),)
                # Dispatch is asynchronous: the host samples this step while the devices may still run the last one.
                state, loss = step(state, *inputs_at(taken, users), *text_batch)
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
    """Samples the batch of a step.

    Args:
      settings: sizes of the batch and the loss.
      user_items_of: training interactions by user.
      seed: seed of the run.
      step: the number of steps taken before it.

    Returns:
      The batch, on the host; a function of the arguments.
    """
    return batch(
        user_items_of,
        step,
        seed=seed,
        batch_size=settings.batch_size,
        positives_per_user=settings.positives_per_user,
        num_negatives=settings.positives_per_user if settings.loss == "bpr" else settings.num_negatives,
    )


def resume(config: Config, prepared: Prepared, checkpoints: Checkpoints) -> tuple[TrainState, Progress]:
    """Restores the newest undamaged checkpoint of the first process, or initializes a state.

    Args:
      config: settings of the run.
      prepared: the graph inputs, for the shapes of the state.
      checkpoints: of the phase's folder.

    Returns:
      The state, unsharded, on the host; and the progress of the loop.

    Raises:
      CheckpointError: the checkpoint of the best step, the one that training would return, is damaged.
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
                    f"{error} It is the best state so far, and training would return it; remove the folder of the "
                    "checkpoints, and the same command trains from the start"
                ) from error
    return processes.broadcast_arrays(state), Progress(**processes.broadcast_json(progress._asdict()))


def mean_loss(losses: list[jax.Array]) -> float:
    """Returns the mean of float32 scalars; bitwise equal whether they come from a checkpoint or from the device."""
    return float(np.mean(np.asarray(jax.device_get(losses), np.float32)))


def update_early_stopping(progress: Progress, value: float, step: int) -> Progress:
    """Updates the progress with a validation value; a value equal to the best does not improve on it.

    Args:
      progress: before the evaluation.
      value: the value of train.metric; higher is better.
      step: the number of steps taken.

    Returns:
      The progress with `best`, `best_step` and `evals_since_best` updated.

    Raises:
      ValueError: the value is NaN.
    """
    if math.isnan(value):
        raise ValueError(
            f"the validation metric of step {step} is not a number: the validation split has no pair to compare"
        )
    if progress.best is None or value > progress.best:
        return progress._replace(best=value, best_step=step, evals_since_best=0)
    return progress._replace(evals_since_best=progress.evals_since_best + 1)


def progress_text(loss: float, metric: str, progress: Progress) -> str:
    """Returns the text beside the progress bar: the loss, and the best validation value with its step."""
    best = "" if progress.best is None else f", {metric} {progress.best:.4f} at {progress.best_step}"
    return f"loss {loss:.4f}{best}"


def check_finite(losses: list[jax.Array], step: int, checkpoints: Checkpoints, folder: Path) -> None:
    """Checks that the last losses are finite.

    Args:
      losses: float32 scalars of consecutive steps.
      step: the number of steps taken, the newest loss included.
      checkpoints: for the message: the last good step.
      folder: for the message: where that step is.

    Raises:
      NonFiniteLossError: one of them is NaN or infinite.
    """
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
    """Digest and contents of the tables as they are now, for a finished run."""
    try:
        dataset = read_dataset(config)
    except (OSError, ValueError) as error:  # ValueError: faults of the tables, or nothing left of them
        raise TablesNotReadError(
            f"{_when_finished(workdir)}, and its tables cannot be read now, so whether they have changed is unknown; "
            f"the results are in {workdir / RESULTS}. {error}"
        ) from error
    return digest(dataset), contents(dataset)


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
        raise TablesChangedError(f"{_when_finished(workdir)}; {error}") from None
    if differing(config, read_run(workdir)["config"]):
        try:
            with lock_run_dir(workdir):
                init_run_dir(config, tables, workdir, made_of)
        except OSError as error:
            LOG.warning("%s could not be updated with the new settings: %s", workdir / RUN, error)
    LOG.info("%s with the same tables; returning its results", _when_finished(workdir))
    return read_results(workdir)


def _when_finished(workdir: Path) -> str:
    """Names the run and the time it finished."""
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


def init_run_dir(config: Config, tables: str, workdir: Path, made_of: Mapping[str, Any] | None = None) -> None:
    """Writes `run.json` of a new run, or updates the settings of `config.NEUTRAL` in that of an existing one.

    Args:
      config: the config of the run.
      tables: `digest` of the tables.
      workdir: folder of the run; made where it is missing.
      made_of: `contents` of the tables, which let later messages name changes.

    Raises:
      ValueError: the folder has a run of another config.
      TablesChangedError: the folder has a run of other tables.
    """
    check_config(config, workdir)
    if (workdir / RUN).exists():
        check_tables(tables, workdir, made_of)
        if not differing(config, read_run(workdir)["config"]):
            return
    workdir.mkdir(parents=True, exist_ok=True)
    write_json(workdir / RUN, {"config": to_dict(config), "tables": tables, "contents": dict(made_of or {})})


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
            "in a new workdir"
        )


def read_run(workdir: Path) -> dict[str, Any]:
    """Reads `run.json`: config, `digest` and `contents` of the tables.

    Args:
      workdir: folder of the run.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it is damaged.
    """
    found = _read_json(workdir / RUN)
    sections = found.get("config")
    sound = isinstance(sections, dict) and all(isinstance(settings, dict) for settings in sections.values())
    sound = sound and isinstance(found.get("contents", {}), dict)
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
    return _read_json(workdir / RESULTS)


def _read_json(file: Path) -> dict[str, Any]:
    """Reads a JSON object; raises ValueError where the file is damaged."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is damaged ({error}); train in a new workdir") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file} is damaged (it holds a {type(found).__name__}); train in a new workdir")
    return found


def read_finished(workdir: Path) -> tuple[Config, int]:
    """Reads the config and the best step of a finished run.

    Args:
      workdir: folder of the run.

    Returns:
      The config, and the step of the selected checkpoint.

    Raises:
      FileNotFoundError: the folder has no finished run.
      ValueError: its files are damaged.
    """
    if not (workdir / RESULTS).exists():
        raise FileNotFoundError(f"{workdir} holds no {RESULTS}; finish the run there with experiments.train first")
    step = read_results(workdir).get("best_step")
    if not isinstance(step, int):
        raise ValueError(f"{workdir / RESULTS} has no best_step; train in a new workdir")
    return from_dict(read_run(workdir)["config"]), step


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
    write_file(file, (json.dumps(_as_json(values), indent=1, allow_nan=False) + "\n").encode())


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
    arrays: dict[str, Any] = {"user": per_user.users, **per_user.metrics}
    archive = io.BytesIO()
    np.savez(archive, **arrays)
    write_file(file, archive.getvalue())


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
    try:
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in arrays.files}
            users = found.pop("user")
            for name, values in [("user", users), *found.items()]:
                if values.dtype != (np.int32 if name == "user" else np.float32) or values.shape != (len(users),):
                    raise ValueError(f"{name} is {values.dtype} {values.shape}")
    except FileNotFoundError:
        raise
    except Exception as error:  # zipfile and NumPy raise a dozen types, tokenize.TokenError among them
        raise ValueError(
            f"{file} is damaged ({error}); remove {RESULTS} beside it and run the same command again"
        ) from error
    return UserMetrics(users, found, {})


def _as_json(value: Any) -> Any:
    """Replaces NaN by None, recursively, and tuples by lists."""
    if isinstance(value, dict):
        return {name: _as_json(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(part) for part in value]
    return None if isinstance(value, float) and math.isnan(value) else value
