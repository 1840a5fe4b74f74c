"""Runs of baselines (`fused_rec.baselines`): tuned and measured as trained runs are, and fitted to what is served.

The state of such a run has the fitted scorer, a pytree of arrays, in the place of trained parameters.
"""

import hashlib
import json
import time
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from fused_rec.config import Config
from fused_rec.distributed import processes
from fused_rec.evaluation.ranking import UserMetrics, mean
from fused_rec.runs.run_dir import RunResults, seen_splits
from fused_rec.training.evaluate import baseline, choose_settings, evaluate_mean, evaluate_slices, evaluate_users
from fused_rec.training.inputs import ModelInputs, Prepared, prepare
from fused_rec.training.train_step import TrainState


def measure_baseline(config: Config, alone: Prepared) -> tuple[RunResults, Prepared, UserMetrics]:
    """Tunes the baseline model.method on validation, and evaluates it on the test split once.

    Args:
      config: all settings.
      alone: inputs of the training split.

    Returns:
      The results, the inputs of the served rows, and the test metrics per user.

    Raises:
      NotApplicableError: the tables lack what the baseline needs.
      ImportError: its library is not installed.
      InsufficientMemoryError: it does not fit in memory.
    """
    name, began = config.model.method, time.monotonic()
    settings = processes.broadcast_json(choose_settings(name, alone, config.train.metric))
    seen = _observing(config, alone, "test")
    score = baseline(name, seen, settings)
    seconds = time.monotonic() - began
    valid = evaluate_mean(alone, score if seen is alone else baseline(name, alone, settings), "valid")
    per_user = evaluate_users(seen, score, "test")
    results = RunResults(
        dataset=seen.dataset.name,
        split=seen.split.kind,
        variant=name,
        seed=config.train.seed,
        valid=valid,
        test=mean(per_user),
        slices=evaluate_slices(seen, score, per_user),
        selected={"settings": settings},
        seconds=seconds,
        parameters=None,
        config=config,
    )
    return results, _observing(config, seen, "served"), per_user


def _observing(config: Config, prepared: Prepared, model: str) -> Prepared:
    """Returns the inputs of the splits that a model of the run is fitted on."""
    splits = seen_splits(config.train.refit, model)
    return prepared if splits == prepared.splits else prepare(config, prepared.dataset, prepared.split, splits)


def fitted_state(config: Config, inputs: ModelInputs, settings: Mapping[str, Any]) -> TrainState:
    """Fits the baseline model.method to the rows of any tables.

    Args:
      config: settings of the run.
      inputs: tables and graph.
      settings: those that validation chose.

    Returns:
      The state, whose parameters are the scorer.

    Raises:
      NotApplicableError, ImportError, InsufficientMemoryError: as `measure_baseline`.
    """
    fitted = baseline(config.model.method, inputs, settings)
    return TrainState(jnp.int32(0), jnp.int32(config.train.seed), params=fitted, opt_state=())


def settings_digest(config: Config, settings: Mapping[str, Any]) -> str:
    """Returns the SHA-256 of the method and its settings, which identify a baseline as a checkpoint does a model."""
    return hashlib.sha256(json.dumps([config.model.method, settings], sort_keys=True).encode()).hexdigest()
