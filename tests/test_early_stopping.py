"""Which evaluation is the best, and for how long none was better."""

import math

import pytest

from fused_rec.training.early_stopping import Progress, update_early_stopping


def test_judge_keeps_the_first_of_equals():
    progress = update_early_stopping(Progress(), 0.2, 10)
    assert (progress.best, progress.best_step, progress.evals_since_best) == (0.2, 10, 0)
    progress = update_early_stopping(progress, 0.2, 20)
    assert (progress.best_step, progress.evals_since_best) == (10, 1)
    progress = update_early_stopping(progress, 0.3, 30)
    assert (progress.best_step, progress.evals_since_best) == (30, 0)


def test_a_value_that_is_not_a_number_is_refused():
    with pytest.raises(ValueError, match="the validation metric of step 10 is not a number"):
        update_early_stopping(Progress(), math.nan, 10)
