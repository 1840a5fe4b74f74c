"""Hyperparameter tuning with Optuna: trials selected on validation, shared by any number of processes.

folder/
  run.json             config and digest of the tables; another config, or changed tables, are refused
  journal.log          Optuna's journal of the study, with an event per line, written under a lock
  turn.lock            held briefly by the process that starts or ends a trial
  trials/              checkpoints and a lock of each running or stopped trial; removed when it is finished
  best.py, best.json   the best trial so far, as a file of experiments/configs and with its value
  trials.png           values of all trials over their settings, if Matplotlib is installed
"""

import contextlib
import fcntl
import importlib.util
import json
import logging
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fused_rec.config import TEMPERATURES, Config, from_dict, to_dict, with_temperature
from fused_rec.data.dataset import contents, digest
from fused_rec.distributed import signals
from fused_rec.distributed.devices import computes
from fused_rec.evaluation import plots
from fused_rec.runs.run_dir import RUN, check_config, init_run_dir, write_json
from fused_rec.storage import write_figure, write_file
from fused_rec.training.inputs import Prepared, prepare, read
from fused_rec.training.trainer import NonFiniteLossError, fit

try:
    import optuna
    from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("sweeps need Optuna; install it with: pip install -e '.[sweeps]'") from error

LOG = logging.getLogger(__name__)
SPACE: Mapping[str, BaseDistribution] = {
    "train.learning_rate": FloatDistribution(0.0005, 0.02, log=True),
    "train.temperature": FloatDistribution(0.05, 1.0, log=True),
    "train.weight_decay": FloatDistribution(0.001, 1.0, log=True),
    "model.id_embedding_dropout": FloatDistribution(0.0, 0.5),
    "model.edge_dropout": FloatDistribution(0.0, 0.7),
    "model.dim": CategoricalDistribution((64, 128, 256)),
    "model.popularity_weight": FloatDistribution(0.0, 1.2),
    "train.contrastive_weight": FloatDistribution(0.005, 0.5, log=True),
    "model.text_alignment": FloatDistribution(0.001, 0.1, log=True),
    "model.text_reconstruction": FloatDistribution(0.01, 1.0, log=True),
}
# 0 leaves a part out of the model; no trial adds it.
OPT_IN = ("model.popularity_weight", "train.contrastive_weight", "model.text_alignment", "model.text_reconstruction")
DOT_TEMPERATURE = FloatDistribution(0.05, 2.0, log=True)  # dot products are not bounded as cosines are
JOURNAL, STUDY_LOCK, TRIALS, BEST = "journal.log", "turn.lock", "trials", "best"
STOPPED = "stopped"  # a trial's attribute
PRUNER_WARMUP = 5  # trials, and evaluations of each later one, before a trial can be stopped for being below the median
POLL_SECONDS = 0.5


@computes
def tune(config: Config, folder: str | Path, trials: int) -> Config:
    """Runs trials until `trials` of the folder's study are finished.

    The first trial is `config` itself, or one for each of `TEMPERATURES` where train.temperature is 0. Later ones are
    sampled from `space(config)` by a tree-structured Parzen estimator (Bergstra et al., 2011) and pruned below the
    median of the others. A trial sees only the training and validation splits. All processes with the same folder work
    on the same study, and return the same config; a single process with equal seeds is deterministic.

    A trial is finished when it is complete, pruned or has diverged. If its process was asked to stop, the next process
    resumes it from its checkpoint; if its process died, it is restarted once.

    Args:
      config: settings of the first trial, and all settings that are not searched.
      folder: of the study.
      trials: finished trials, over all processes.

    Returns:
      The config of the best trial.

    Raises:
      TablesChangedError: the folder's trials used other tables.
      ValueError: the folder belongs to another config or was started with another space, `config` lies outside a space
        that cannot be extended to it, or no trial was completed.
      DataError, LeakError: the input is invalid.
    """
    if trials < 1:
        raise ValueError(f"trials is {trials}; it must be at least 1")
    if not config.model.is_trained:
        name = config.model.method
        raise ValueError(f"model.method is {name}, which training itself tunes; tune a model with trained parameters")
    folder = Path(folder)
    firsts = [config]
    if not config.train.temperature:  # a run would try several; here the first trials do
        firsts = [with_temperature(config, temperature) for temperature in TEMPERATURES]
        config = firsts[0]
    check_config(config, folder)
    dataset, data_split = read(config)
    tables, made_of = digest(dataset), contents(dataset)
    if begun := (folder / RUN).exists():  # checked before texts are encoded, and for a finished study too
        init_run_dir(config, tables, folder, made_of)
    if not begun or not (folder / JOURNAL).exists() or len(finished_trials(open_study(folder))) < trials:
        prepared = prepare(config, dataset, data_split)
        init_run_dir(config, tables, folder, made_of)
        work(firsts, prepared, folder, trials)
    return write_best(config, folder)


def space(config: Config) -> dict[str, BaseDistribution]:
    """Returns the search space: `SPACE`, extended to the config's values, without settings that its variant ignores.

    Args:
      config: the base config.

    Raises:
      ValueError: a setting of the config is 0 and its scale is logarithmic.
    """
    found = dict(SPACE)
    if config.model.score == "dot":
        found["train.temperature"] = DOT_TEMPERATURE
    if not config.model.uses_ids:
        found.pop("model.id_embedding_dropout", None)
    if config.model.num_layers == 0:
        found.pop("model.edge_dropout", None)
    for name in OPT_IN:
        if not _settings(config, [name])[name]:
            found.pop(name, None)
    return {name: _extended(name, found[name], value) for name, value in _settings(config, found).items()}


def work(firsts: Sequence[Config], prepared: Prepared, folder: Path, trials: int) -> None:
    """Runs trials in this process; returns when the trials of all processes are finished.

    Args:
      firsts: configs of the first trials, the base config before those that differ from it in settings of `space`.
      prepared: tables, split and graph.
      folder: of the study.
      trials: finished trials, over all processes.
    """
    config = firsts[0]
    searched = space(config)
    with _locked(folder / STUDY_LOCK):
        study = open_study(folder)
        if not study.get_trials(deepcopy=False):
            for first in firsts:
                study.enqueue_trial(_settings(first, searched))
    while True:
        # A request to stop finds no trial that is neither drawn nor reported: it waits, except while one trains.
        with signals.deferred(), contextlib.ExitStack() as held:
            with _locked(folder / STUDY_LOCK):
                if len(finished_trials(study)) >= trials:
                    return
                running = fail_dead_trials(study, folder)
                trial = resume_stopped_trial(study, folder)
                if trial is None and running + len(finished_trials(study)) < trials:
                    trial = ask_trial(study, searched, config.train.seed)
                if trial is not None:
                    held.enter_context(_locked(_lock_of(folder, trial.number)))
            if trial is None:
                with signals.immediate():
                    time.sleep(POLL_SECONDS)
            else:
                run_trial(config, prepared, folder, study, trial)


def ask_trial(study: "optuna.Study", searched: dict[str, BaseDistribution], seed: int) -> "optuna.trial.Trial":
    """Creates a trial whose sample depends only on the seed and the trials before it.

    The sampler is seeded for each trial: otherwise, processes with equal seeds would repeat each other's samples.

    Args:
      study: the study.
      searched: search space.
      seed: of the study.

    Returns:
      The trial.
    """
    drawn = np.random.SeedSequence((seed, len(study.get_trials(deepcopy=False)))).generate_state(1)
    study.sampler = optuna.samplers.TPESampler(seed=int(drawn[0]), multivariate=True, constant_liar=True)
    return study.ask(searched)


def run_trial(
    config: Config, prepared: Prepared, folder: Path, study: "optuna.Study", trial: "optuna.trial.Trial"
) -> None:
    """Trains with the settings of a trial and reports its result to the study.

    Args:
      config: the base config.
      prepared: tables, split and graph.
      folder: of the study.
      study: the study.
      trial: the trial.
    """
    tried = with_settings(config, trial.params)

    def report(step: int, value: float) -> None:
        trial.report(value, step)
        if step > PRUNER_WARMUP * config.train.eval_every and trial.should_prune():
            raise optuna.TrialPruned

    value = None
    try:
        with signals.immediate():
            if (tried.text, tried.graph) != (config.text, config.graph):
                prepared = prepare(tried, prepared.dataset, prepared.split)
            value = fit(tried, prepared, _folder_of(folder, trial.number), on_evaluation=report)[1].best
        end = f"validation {config.train.metric} {value:.4f}"
    except optuna.TrialPruned:
        end = "stopped early"
    except NonFiniteLossError:
        end = "diverged"
    except signals.Stopped:
        trial.set_user_attr(STOPPED, True)
        raise
    with _locked(folder / STUDY_LOCK):
        state = optuna.trial.TrialState.PRUNED if value is None else optuna.trial.TrialState.COMPLETE
        study.tell(trial, value, state=state)
        _remove(folder, trial.number)
        if any(other.state == optuna.trial.TrialState.COMPLETE for other in finished_trials(study)):
            write_best(config, folder)
    LOG.info("trial %d: %s with %s", trial.number, end, _described(trial.params))


def finished_trials(study: "optuna.Study") -> list["optuna.trial.FrozenTrial"]:
    """Lists the finished trials: complete or pruned."""
    states = optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED
    return study.get_trials(deepcopy=False, states=states)


def fail_dead_trials(study: "optuna.Study", folder: Path) -> int:
    """Marks trials of dead processes as failed, and restarts each once.

    Stopped trials are left to `resume_stopped_trial`.
    A process holds a lock on its trial, which the system releases when the process ends. On file systems with locks per
    host, a trial of another host may be considered dead and run twice.

    Args:
      study: the study.
      folder: of the study.

    Returns:
      The number of running trials.
    """
    running = 0
    for trial in _running_trials(study):
        with _locked(_lock_of(folder, trial.number), wait=False) as free:
            if not free:
                running += 1
                continue
            if trial.user_attrs.get(STOPPED):
                continue
            study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
            _remove(folder, trial.number)
            again = "begun anew" if "again" not in trial.user_attrs else "left, having failed twice"
            LOG.warning("trial %d ended with its process; its settings are %s", trial.number, again)
            if "again" not in trial.user_attrs:
                study.enqueue_trial(trial.params, {"again": True})
    return running


def resume_stopped_trial(study: "optuna.Study", folder: Path) -> "optuna.trial.Trial | None":
    """Finds a trial whose process was asked to stop, to resume it from its checkpoint.

    Args:
      study: the study.
      folder: of the study.

    Returns:
      The trial, or None if there is none.
    """
    for begun in _running_trials(study):
        with _locked(_lock_of(folder, begun.number), wait=False) as free:
            if free and begun.user_attrs.get(STOPPED):
                trial = optuna.trial.Trial(study, begun._trial_id)
                trial.set_user_attr(STOPPED, False)
                return trial
    return None


def open_study(folder: Path) -> "optuna.Study":
    """Opens the study of a folder, or creates it."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # at INFO it tells of every trial, as the log here does
    journal = str(folder / JOURNAL)
    lock = JournalFileOpenLock(journal)
    backend = JournalFileBackend(journal, lock_obj=lock)
    return optuna.create_study(
        storage=optuna.storages.JournalStorage(backend),
        study_name="sweep",
        direction="maximize",
        load_if_exists=True,
        pruner=optuna.pruners.MedianPruner(n_startup_trials=PRUNER_WARMUP),
    )


def write_best(config: Config, folder: Path) -> Config:
    """Writes best.py and best.json.

    Args:
      config: the base config.
      folder: of the study.

    Returns:
      The config of the best trial.

    Raises:
      ValueError: no trial is complete.
    """
    trials = finished_trials(open_study(folder))
    complete = [
        trial for trial in trials if trial.value is not None and trial.state == optuna.trial.TrialState.COMPLETE
    ]
    if not complete:
        raise ValueError(
            f"none of the {len(trials)} trials in {folder} was completed: each diverged; lower train.learning_rate or "
            "raise train.temperature in the config, and use a new folder"
        )
    best = max(complete, key=lambda trial: (trial.value, -trial.number))
    chosen = with_settings(config, best.params)
    record = {"metric": config.train.metric, "value": best.value, "trial": best.number, "trials": len(trials)}
    docstring = f"Trial {best.number} of {len(trials)}, the best on validation: {config.train.metric} {best.value:.4f}."
    write_file(folder / f"{BEST}.py", as_source(chosen, docstring).encode())
    write_json(folder / f"{BEST}.json", record | {"config": to_dict(chosen)})
    if importlib.util.find_spec("matplotlib") is not None:
        write_figure(folder / "trials.png", plots.by_setting(history(folder), config.train.metric))
    return chosen


def as_source(config: Config, docstring: str) -> str:
    """Formats a config as a file of experiments/configs, with the settings that differ from the defaults.

    Args:
      config: the config.
      docstring: of the file.

    Returns:
      Python source.
    """
    sections = []
    for name, defaults in to_dict(Config()).items():
        there = to_dict(config)[name]
        differ = [f'"{key}": {_literal(there[key])}' for key, default in defaults.items() if there[key] != default]
        if differ:
            sections.append(f"        {name}={{{', '.join(differ)}}},\n")
    called = "".join(["\n", *sections, "    "]) if sections else ""
    return (
        f'"""{docstring}"""\n\nfrom fused_rec.commands.configs import config_dict\n\n\n'
        f'def get_config():\n    """Settings chosen on validation."""\n    return config_dict({called})\n'
    )


def importances(folder: Path) -> dict[str, float]:
    """Computes the importance of each setting for the best trials (PED-ANOVA; Watanabe et al., 2023).

    Args:
      folder: of the study.

    Returns:
      Shares by setting, largest first; empty for fewer than ten complete trials.
    """
    study = open_study(folder)
    if len(study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))) < 10:
        return {}
    return optuna.importance.get_param_importances(study)


def history(folder: Path) -> list[dict[str, Any]]:
    """Lists all finished trials in order: `trial`, `state` (complete or pruned), `value` and settings."""
    return [
        {"trial": trial.number, "state": trial.state.name.lower(), "value": trial.value, **trial.params}
        for trial in finished_trials(open_study(folder))
    ]


def with_settings(config: Config, settings: Mapping[str, Any]) -> Config:
    """Replaces settings of a config.

    Args:
      config: the config.
      settings: values by name, such as "model.dim".

    Returns:
      The new config.

    Raises:
      ValueError: a name is unknown.
    """
    values = to_dict(config)
    for name, value in settings.items():
        section, setting = name.split(".")
        values[section][setting] = value
    return from_dict(values)


def _settings(config: Config, names: Iterable[str]) -> dict[str, Any]:
    values = to_dict(config)
    return {name: values[name.split(".")[0]][name.split(".")[1]] for name in names}


def _extended(name: str, distribution: BaseDistribution, value: Any) -> BaseDistribution:
    if isinstance(distribution, CategoricalDistribution):
        known = distribution.choices
        return distribution if value in known else CategoricalDistribution((*known, value))
    if not isinstance(distribution, FloatDistribution):
        return distribution
    if distribution.log and value <= 0:
        raise ValueError(f"{name} is {value}; to be swept on a logarithmic scale it must be above 0")
    low, high = min(distribution.low, value), max(distribution.high, value)
    return FloatDistribution(low, high, log=distribution.log)


def _literal(value: Any) -> str:
    if isinstance(value, tuple):
        return f"({''.join(f'{_literal(part)}, ' for part in value).strip()})"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


def _described(settings: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}" for name, value in settings.items()
    )


def _running_trials(study: "optuna.Study") -> list["optuna.trial.FrozenTrial"]:
    return study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,))


def _folder_of(folder: Path, number: int) -> Path:
    return folder / TRIALS / f"trial_{number}"


def _lock_of(folder: Path, number: int) -> Path:
    return folder / TRIALS / f"{number}.lock"


def _remove(folder: Path, number: int) -> None:
    shutil.rmtree(_folder_of(folder, number), ignore_errors=True)
    _lock_of(folder, number).unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(file: Path, *, wait: bool = True) -> Iterator[bool]:
    """Holds a lock that the system releases with the process; yields whether it was acquired."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True
