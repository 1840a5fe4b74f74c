"""The training run: from a config and tables to a checkpointed model and `results.json`.

`run_training(config, workdir)` reads, splits and prepares the tables, selects a step by validation (`fit`), optionally
refits on train and valid, and evaluates on the test split once. The
files are those of `fused_rec.runs.run_dir`.
"""

import contextlib
import dataclasses
import functools
import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from fused_rec.config import Config, TrainConfig, to_dict
from fused_rec.data.batches import Batch, UserItems, batch, steps_per_epoch, user_items
from fused_rec.data.dataset import Dataset, contents, digest
from fused_rec.data.splits import Split
from fused_rec.distributed import processes, signals
from fused_rec.distributed.devices import computes
from fused_rec.evaluation.ranking import mean
from fused_rec.runs.loggers import CurveLogger, MetricWriter, metric_writer, wandb_library
from fused_rec.runs.model_card import card, counts
from fused_rec.runs.run_dir import (
    CARD,
    RESULTS,
    TEST_METRICS_PER_USER,
    RunResults,
    TablesNotReadError,
    as_json,
    check_config,
    finished_results,
    init_run_dir,
    lock_run_dir,
    when_finished,
    write_card,
    write_json,
    write_users,
)
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
LOSS_EVERY = 10  # steps between reads of the loss; each read waits for the device


class NonFiniteLossError(FloatingPointError):
    """A loss that is NaN or infinite; the message names the step and the last good checkpoint."""


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
    processes.check_equal_across_processes("the config", json.dumps(as_json(to_dict(config)), sort_keys=True))
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

    known = seen_splits(config)
    if config.train.refit:
        prepared = prepare(config, dataset, data_split, known)
        state, refitted = fit(config, prepared, workdir / "refit", steps=progress.best_step, metric_writer_of=shown)
        prepared = with_finetuned_text(config, prepared, state)
        seconds += refitted.seconds

    # Model selection is over: the only use of the test split.
    score = scorer(config, prepared, state)
    per_user = evaluate_users(prepared, score, "test")
    results = RunResults(
        dataset=dataset.name,
        split=data_split.kind,
        variant=config.model.variant,
        seed=config.train.seed,
        valid=valid,
        test=mean(per_user),
        slices=evaluate_slices(prepared, score, per_user, known),
        selected={"best_step": progress.best_step},
        seconds=seconds,
        parameters=sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        config=config,
    ).contents()
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
    """Returns the splits that the final model is trained on: train, and valid with train.refit."""
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
            f"{when_finished(workdir)}, and its tables cannot be read now, so whether they have changed is unknown; "
            f"the results are in {workdir / RESULTS}. {error}"
        ) from error
    return digest(dataset), contents(dataset)
