"""The training run: from a config and tables to a checkpointed model and `results.json`.

`run_training(config, workdir)` reads, splits and prepares the tables, selects a step by validation (`fit`), optionally
refits on train and valid, evaluates on the test split once, and optionally trains the model to serve on all rows. The
files are those of `fused_rec.runs.run_dir`.
"""

import contextlib
import dataclasses
import functools
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from fused_rec.baselines.factors import require_singular_vectors
from fused_rec.config import (
    LOW_TEMPERATURE,
    TEMPERATURES,
    Config,
    from_dict,
    to_dict,
    with_compute_dtype,
    with_temperature,
)
from fused_rec.data.batches import UserItems, steps_per_epoch, user_items
from fused_rec.data.dataset import contents, digest
from fused_rec.distributed import processes, signals
from fused_rec.distributed.devices import AnyArray, computes
from fused_rec.evaluation.ranking import UserMetrics, mean
from fused_rec.runs.loggers import CurveLogger, MetricWriter, metric_writer, wandb_library
from fused_rec.runs.model_card import card, counts, describe_sources
from fused_rec.runs.run_dir import (
    CARD,
    REFIT,
    REFIT_ALL,
    RESULTS,
    RUN,
    TEST_METRICS_PER_USER,
    RunResults,
    TablesNotReadError,
    as_json,
    check_config,
    check_init_from,
    finished_results,
    init_run_dir,
    lock_run_dir,
    phase_of,
    read_run,
    seen_splits,
    when_finished,
    write_card,
    write_json,
    write_users,
)
from fused_rec.text.coverage import foreign_text_warning
from fused_rec.training.baseline_runs import measure_baseline, settings_digest
from fused_rec.training.batch_sources import batch_of, batch_source, interruptible
from fused_rec.training.checkpoint import CheckpointError, Checkpoints
from fused_rec.training.compute_type import choose_compute_type
from fused_rec.training.early_stopping import Progress, update_early_stopping
from fused_rec.training.evaluate import (
    evaluate_mean,
    evaluate_slices,
    evaluate_users,
    evaluate_validation,
    scorer,
    sharded_scorer,
)
from fused_rec.training.fitted import FITTED, FITTED_SELECT, Fitted, fitted_of, write_fitted
from fused_rec.training.footprint import require_embedding, require_step
from fused_rec.training.inputs import (
    Prepared,
    dropped_reviews,
    init_state,
    prepare,
    read,
    read_dataset,
    require_method_inputs,
    with_finetuned_text,
)
from fused_rec.training.late_fusion import select_late_fusion, with_late_fusion, with_launch
from fused_rec.training.launch_weights import select_launch
from fused_rec.training.sharding import gather_state, settle, shard_state
from fused_rec.training.train_step import TrainState
from fused_rec.training.warm_start import PAIRS, read_initial, stored_initial, write_initial, write_pairs

LOG = logging.getLogger(__name__)
MANY_INTERACTIONS = 100_000  # above, a temperature is not chosen by training several times
LOSS_EVERY = 10  # steps between reads of the loss; each read waits for the device


class NonFiniteLossError(FloatingPointError):
    """A loss that is NaN or infinite; the message names the step and the last good checkpoint."""


@computes
def run_training(config: Config, workdir: str | Path, init_from: str | Path | None = None) -> dict[str, Any]:
    """Starts or resumes one run and trains it to the end.

    For a finished run the tables are read and compared with the run's, and its results come back.

    Args:
      config: all settings.
      workdir: folder of the run; made where it is missing.
      init_from: folder of a finished run whose parameters a new run starts from (`fused_rec.training.warm_start`); it
        is read once.

    Returns:
      The contents of `results.json`.

    Raises:
      ValueError: workdir holds a run of another config or with another start; or as `read_initial`.
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
      ImportError: train.wandb names a project, or model.method a baseline, whose library is not installed.
      NotApplicableError: the tables lack what model.method reads.
      Stopped: a signal requested a stop (see `fused_rec.distributed.signals`); the same call resumes the run.
    """
    workdir, init_from = Path(workdir), None if init_from is None else Path(init_from)
    if init_from is not None and not processes.is_single_process():
        raise ValueError("init_from is given to a run of several processes; train it in one")
    if init_from is not None and not config.model.is_trained:
        raise ValueError(f"init_from is given to {config.model.method}, which has no parameters; leave it out")
    processes.check_equal_across_processes("the config", json.dumps(as_json(to_dict(config)), sort_keys=True))
    results = None
    if processes.is_primary():
        check_config(config, workdir)
        check_init_from(init_from, workdir)
        if (workdir / RESULTS).exists():
            stated = read_run(workdir)["config"].get("card")
            results = finished_results(config, *_read_again(config, workdir), workdir)
            if stated != to_dict(config)["card"]:
                update_card(workdir, results)
    if (results := processes.broadcast_json(results)) is not None:
        return results
    if config.train.wandb and processes.is_primary():
        wandb_library()  # fails here rather than after the tables are read and encoded
    with lock_run_dir(workdir) if processes.is_primary() else contextlib.nullcontext():
        return _run_training(config, workdir, init_from)


def _run_training(config: Config, workdir: Path, init_from: Path | None) -> dict[str, Any]:
    """`run_training` of an unfinished run, with the lock held."""
    dataset, data_split = read(config)
    tables = digest(dataset)
    processes.check_equal_across_processes("the digest of the tables", tables)
    require_method_inputs(config, dataset, data_split)
    started = (workdir / RUN).exists() if processes.is_primary() else False
    initial = stored_initial(workdir) if started else None
    if init_from is not None and initial is None:
        initial = read_initial(config, init_from, dataset, data_split)
    prepared = prepare(config, dataset, data_split, initial=initial)
    if processes.is_primary() and (warning := foreign_text_warning(config.text.model, prepared.text.coverage)):
        LOG.warning("%s", warning)
    # Only now: a fault of the input leaves the folder free for a corrected command.
    if processes.is_primary():
        if initial is not None and not started:  # before run.json, which says that it is there
            write_initial(workdir, initial)
        init_run_dir(config, tables, workdir, contents(dataset), initial and initial.source)
    with metric_writer(config, workdir) if processes.is_primary() else contextlib.nullcontext() as shown:
        if config.model.is_trained:
            measured, prepared, per_user, selected = _select_and_test(config, workdir, prepared, shown)
        else:
            selected = _fitted(config, prepared)
            measured, prepared, per_user = measure_baseline(config, prepared)
        results = measured.contents() | _data_of(config, prepared)
        if processes.is_primary():
            _write(workdir, prepared, per_user, results, selected)
        if shown is not None:
            shown.write_results(results)
    return results


def _select_and_test(
    config: Config, workdir: Path, prepared: Prepared, shown: MetricWriter | None
) -> tuple[RunResults, Prepared, UserMetrics, Fitted]:
    """Selects a step by validation, evaluates on the test split, and refits as train.refit says.

    Returns the results, the inputs of the served model, the test metrics per user, and what step selection fitted.
    """
    given, compute = config, choose_compute_type(config, prepared.graph_inputs, workdir)
    config = with_compute_dtype(config, compute.dtype)
    if config.model.late_fusion:  # refused now rather than after training
        require_singular_vectors(prepared.dataset.n_users, prepared.dataset.n_items)
    config, phase, state, progress, seconds = _select(config, prepared, workdir, shown)
    prepared = with_finetuned_text(config, prepared, state)
    fusion = None
    if config.model.late_fusion:
        prepared, fusion = select_late_fusion(config, prepared, state)
    if fusion and config.model.launch_cost and (launch := select_launch(config, prepared, state)):
        fusion = dataclasses.replace(fusion, launch=dataclasses.asdict(launch))
        prepared = with_launch(prepared, launch)
    valid = evaluate_validation(prepared, scorer(config, prepared, state), config.train.metric)

    selected = _fitted(config, prepared)
    if config.train.refit == "valid":
        prepared = prepare(config, prepared.dataset, prepared.split, seen_splits("valid"), prepared.initial)
        state, refitted = fit(config, prepared, workdir / REFIT, steps=progress.best_step, metric_writer_of=shown)
        prepared = with_late_fusion(with_finetuned_text(config, prepared, state), fusion)
        seconds += refitted.seconds

    # Model selection is over: the only use of the test split.
    score = scorer(config, prepared, state)
    per_user = evaluate_users(prepared, score, "test")
    slices = evaluate_slices(prepared, score, per_user)

    if config.train.refit == "all":  # for serving alone; the metrics stay those of the model before
        splits = seen_splits("all", "served")
        prepared = prepare(config, prepared.dataset, prepared.split, splits, prepared.initial)
        _, refitted = fit(config, prepared, workdir / REFIT_ALL, steps=progress.best_step, metric_writer_of=shown)
        seconds += refitted.seconds
    results = RunResults(
        dataset=prepared.dataset.name,
        split=prepared.split.kind,
        variant=config.model.name,
        seed=config.train.seed,
        valid=valid,
        test=mean(per_user),
        slices=slices,
        selected={
            "best_step": progress.best_step,
            "phase": phase,
            "temperature": config.train.temperature,
            "late_fusion": fusion and dataclasses.asdict(fusion),
            "init_from": _started_from(prepared),
            "compute": dataclasses.asdict(compute),
        },
        seconds=seconds,
        parameters=sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        config=given,
    )
    return results, prepared, per_user, selected


def _data_of(config: Config, prepared: Prepared) -> dict[str, Any]:
    """The parts of the results about the data of the served model."""
    data = describe_sources(config.data.name, prepared.dataset, prepared.used_interactions())
    shares = {"foreign_texts": prepared.text.coverage.share}
    return {"counts": counts(prepared.dataset, prepared.split), "data": data | shares}


def _write(workdir: Path, prepared: Prepared, per_user: UserMetrics, results: dict[str, Any], selected: Fitted) -> None:
    """Writes the files of a finished run, results.json last; `selected` is what step selection fitted."""
    config = from_dict(results["config"])
    write_users(workdir / TEST_METRICS_PER_USER, per_user)
    write_fitted(workdir / FITTED, _fitted(config, prepared))
    if config.train.refit != "none":
        write_fitted(workdir / FITTED_SELECT, selected)
    write_pairs(workdir / PAIRS, prepared.dataset, prepared.split, prepared.initial)
    write_card(workdir / CARD, _card(workdir, results))
    write_json(workdir / RESULTS, results)


def _fitted(config: Config, prepared: Prepared) -> Fitted:
    """What a training on these inputs fits; a warm start keeps the degree scales of the earlier run."""
    inputs = prepared.dataset, prepared.text.fitted, prepared.graph_inputs, prepared.observed.ties
    own = fitted_of(config.model, *inputs)
    if prepared.initial is None:
        return own
    return dataclasses.replace(own, scales={**own.scales, **prepared.initial.fitted.scales})


def _started_from(prepared: Prepared) -> dict[str, Any] | None:
    """Names the run that a warm start started from, without the place of its folder."""
    if prepared.initial is None:
        return None
    source = prepared.initial.source
    return {"run": Path(source["workdir"]).name} | {name: source[name] for name in ("phase", "step", "model", "tables")}


def _select(
    config: Config, prepared: Prepared, workdir: Path, shown: MetricWriter | None
) -> tuple[Config, str, TrainState, Progress, float]:
    """Trains with each temperature to try, and returns config, folder, state and progress of the best, and the seconds.

    Large tables take the first of `TEMPERATURES`: it is the better one there, and further trainings take long. Others
    try all of them, and `LOW_TEMPERATURE` where the first is the best.
    """
    waiting = [config.train.temperature or TEMPERATURES[0]]
    if not config.train.temperature and len(prepared.observed.item) <= MANY_INTERACTIONS:
        waiting = list(TEMPERATURES)
    found, tried, seconds = None, [], 0.0
    while waiting:
        temperature = waiting.pop(0)
        phase, own = f"select_{temperature:g}" if tried else "select", with_temperature(config, temperature)
        state, progress = fit(own, prepared, workdir / phase, metric_writer_of=shown)
        seconds += progress.seconds
        tried.append(temperature)
        if found is None or (progress.best or 0) > (found[3].best or 0):
            found = own, phase, state, progress
        if tuple(tried) == TEMPERATURES and found[1] == "select":
            waiting.append(LOW_TEMPERATURE)
    assert found is not None
    if len(tried) > 1:
        LOG.info("validation chooses the temperature %g of %s", found[0].train.temperature, tried)
    return *found, seconds


def _card(workdir: Path, results: Mapping[str, Any]) -> str:
    """The model card of the served model."""
    tables = read_run(workdir)["tables"]
    if "settings" in results:  # of a baseline
        model = settings_digest(from_dict(results["config"]), results["settings"])
        return card(results, {"tables": tables, "model": model})
    checkpoints = Path(phase_of(results["config"]["train"]["refit"], results["phase"], "served")) / "checkpoints"
    step = results["best_step"]
    digests = {"tables": tables, "model": Checkpoints(workdir / checkpoints).digest(step)}
    return card(results, digests, (checkpoints / str(step)).as_posix())


def update_card(workdir: Path, results: Mapping[str, Any]) -> None:
    """Writes the card of a finished run again; a folder that cannot be written is a warning.

    Args:
      workdir: folder of the run.
      results: content of `results.json`.
    """
    try:
        write_card(workdir / CARD, _card(workdir, results))
    except OSError as error:
        LOG.warning("%s could not be updated: %s", workdir / CARD, error)


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
    # Of a run the choice was made before; of a study it is made here.
    config = with_compute_dtype(config, choose_compute_type(config, prepared.graph_inputs).dtype)
    if config.train.num_neighbors:  # validation embeds the whole graph
        require_embedding(config, prepared.graph_inputs)
    else:
        reviews = dropped_reviews(config, prepared.text.texts)
        num_reviews = 0 if reviews is None else len(reviews.text)
        require_step(config, prepared.graph_inputs, prepared.encoder_data, num_reviews)
    return Trainer(config, prepared, folder, steps, on_evaluation, metric_writer_of).train()


class Trainer:
    """The training of one model in one folder: steps, evaluations, checkpoints.

    Several processes take the same steps; the first writes curves and checkpoints.
    """

    def __init__(
        self,
        config: Config,
        prepared: Prepared,
        folder: Path,
        steps: int | None = None,
        on_evaluation: Callable[[int, float], None] | None = None,
        metric_writer_of: MetricWriter | None = None,
    ):
        """Restores the newest checkpoint, or initializes a state. Arguments as of `fit`."""
        self._config, self._prepared, self._folder = config, prepared, folder
        self._on_evaluation, self._metric_writer = on_evaluation, metric_writer_of
        self._curves: CurveLogger | None = None
        self._validates, self._last = steps is None, config.train.max_steps if steps is None else steps
        self._checkpoints = Checkpoints(folder / "checkpoints")
        state, self.progress = resume(config, prepared, self._checkpoints)
        self._whole = dataclasses.replace(state, encoder_snapshot=())  # for shapes
        interactions = training_interactions(prepared)
        batches = functools.partial(batch_of, config.train, interactions)
        self._source = batch_source(config, prepared, state.encoder_snapshot, batches)
        self._state = shard_state(self._whole)
        self.taken = self._saved = int(state.step)
        self._pending: list[Any] = jax.tree.map(
            functools.partial(np.asarray, dtype=np.float32), [*self.progress.pending]
        )
        self.progress = self.progress._replace(pending=())
        self._began = time.monotonic()
        if self.taken:
            LOG.info("%s: resumes from the checkpoint of step %d", folder.name, self.taken)
        LOG.info("%s: %d steps per epoch", folder.name, steps_per_epoch(interactions, config.train.batch_size))

    def train(self) -> tuple[TrainState, Progress]:
        """Trains to the end, and returns the selected state, unsharded, on the host, and the progress.

        Raises:
          NonFiniteLossError: a loss is not finite.
          Stopped: a signal requested a stop; the state is saved.
        """
        bar = tqdm(total=self._last, initial=self.taken, desc=self._folder.name, unit="step", dynamic_ncols=True)
        writes = processes.is_primary()
        curves = CurveLogger(self._folder, self._metric_writer) if writes else contextlib.nullcontext()
        # A stop request waits for the end of a step: only there do state and progress agree.
        with signals.deferred(), bar, curves as self._curves:
            if self._curves is not None:
                self._curves.rewind(self.taken)
            try:
                self._take_steps(bar)
            except signals.Stopped as stopped:
                if self.taken > self._saved:
                    self._check_finite()
                    self._add_seconds()
                    self.checkpoint()
                stopped.add_note(f"step {self.taken} of {self._last} is saved in {self._folder}")
                raise
        return self._selected(), self.progress

    def _take_steps(self, bar: tqdm) -> None:
        """Takes steps until the last one or until early stopping, and evaluates between them.

        A warm start is evaluated before its first step, which may be the best choice.
        """
        if self._prepared.initial is not None and not self.taken and self.progress.best is None:
            self.evaluate()
        while True:
            if self._pending and self._is_evaluated():
                self.evaluate()
            if self.taken == self._last or self.progress.evals_since_best >= self._config.train.patience:
                return
            signals.raise_if_requested(processes.any_process)
            self.step()
            bar.update()
            if self._is_evaluated() or len(self._pending) % LOSS_EVERY == 0:
                self._check_finite()
                loss = float(self._pending[-1]["loss"])
                bar.set_postfix_str(progress_text(loss, self._config.train.metric, self.progress))

    def _is_evaluated(self) -> bool:
        """Whether an evaluation follows the step taken last."""
        return self.taken % self._config.train.eval_every == 0 or self.taken == self._last

    def step(self) -> None:
        """Takes one step."""
        # Dispatch is asynchronous: the host samples this step while the devices may still run the last one.
        inputs = self._source.step_inputs(self.taken)
        self._state, metrics = self._source.train_step(self._state, *inputs)
        self.taken += 1
        self._pending.append(metrics)

    def evaluate(self) -> None:
        """Validates, updates early stopping, and writes curves and a checkpoint of the step taken last."""
        values, improved = mean_metrics(self._pending) if self._pending else {}, False
        if self._config.train.lazy_adam:
            self._state = settle(self._config.train, self._state)
        if self._validates or self.taken < self._last:
            self._source.refresh(self._state.params)
        if self._validates:
            with interruptible():
                score = sharded_scorer(self._config, self._source.validation_inputs(), self._state.params)
                found = evaluate_mean(self._prepared, score, "valid")
            values |= {f"valid/{name}": value for name, value in found.items()}
            value = found[self._config.train.metric]
            self.progress = update_early_stopping(self.progress, value, self.taken)
            improved = self.progress.evals_since_best == 0
            if self._on_evaluation is not None:
                self._on_evaluation(self.taken, value)
        self._add_seconds()
        if self._curves is not None and values:
            self._curves.write(self.taken, values)
        self._pending = []
        self.checkpoint(best=improved)

    def checkpoint(self, *, best: bool = False) -> None:
        """Saves state and progress.

        Args:
          best: whether no earlier step is better.
        """
        gathered = dataclasses.replace(
            gather_state(self._state, self._whole), encoder_snapshot=self._source.encoder_snapshot
        )
        pending = jax.tree.map(float, jax.device_get(self._pending))
        extras = {"config": to_dict(self._config), "progress": self.progress._replace(pending=pending)._asdict()}
        if processes.is_primary():
            self._checkpoints.save(self.taken, gathered, extras, best=best, replace=self.taken == self._saved)
        self._saved = self.taken

    def _check_finite(self) -> None:
        check_finite([metrics["loss"] for metrics in self._pending], self.taken, self._checkpoints, self._folder)

    def _add_seconds(self) -> None:
        now = time.monotonic()
        self.progress = self.progress._replace(seconds=self.progress.seconds + now - self._began)
        self._began = now

    def _selected(self) -> TrainState:
        """The best state of a training with validation, else the last."""
        if not self._validates:
            return gather_state(self._state, self._whole)
        whole = dataclasses.replace(self._whole, encoder_snapshot=self._source.encoder_snapshot)
        if processes.is_primary():
            whole, _ = self._checkpoints.restore(self.progress.best_step, like=whole)
        return processes.broadcast_arrays(whole)


def training_interactions(prepared: Prepared) -> UserItems:
    """Returns the observed interactions by user, from which batches are sampled."""
    observed, trained_items = prepared.observed, np.asarray(prepared.graph_inputs.trained_items)
    return user_items(observed.user, observed.item, prepared.dataset.n_users, trained_items)


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


def mean_metrics(steps: Sequence[Mapping[str, AnyArray]]) -> dict[str, float]:
    """Returns the mean of each metric over steps; bitwise equal whether they come from a checkpoint or the device."""
    found = jax.device_get(steps)
    return {name: float(np.mean(np.asarray([of_step[name] for of_step in found], np.float32))) for name in found[0]}


def progress_text(loss: float, metric: str, progress: Progress) -> str:
    """Returns the text beside the progress bar: the loss, and the best validation value with its step."""
    best = "" if progress.best is None else f", {metric} {progress.best:.4f} at {progress.best_step}"
    return f"loss {loss:.4f}{best}"


def check_finite(losses: Sequence[AnyArray], step: int, checkpoints: Checkpoints, folder: Path) -> None:
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
