"""Early stopping: the state of the training loop besides the model, and what an evaluation changes in it."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Progress(NamedTuple):
    """The state of the training loop besides the model, saved with each checkpoint.

    Attributes:
      best: the best validation value, at `best_step`.
      best_step: its step.
      evals_since_best: evaluations since `best_step`.
      seconds: of training and validation.
      pending: of each step since the last evaluation its metrics, by name, of a run stopped between two evaluations.
    """

    best: float | None = None
    best_step: int = 0
    evals_since_best: int = 0
    seconds: float = 0.0
    pending: Sequence[Mapping[str, float]] = ()


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
