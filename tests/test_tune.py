"""Sweeps as they are run: processes that share a folder, are killed, and are given the command again."""

import dataclasses
import importlib.util
import itertools
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import optuna
import preloaded
import pytest
from market import write_tables
from optuna.distributions import CategoricalDistribution, FloatDistribution

from experiments.configs import config_dict
from fused_rec.config import Config, DataConfig, ModelConfig, TextConfig, TrainConfig, from_dict, to_dict
from fused_rec.distributed import signals
from fused_rec.runs.run_dir import TablesChangedError
from fused_rec.studies import tune as sweeping
from fused_rec.studies.tune import (
    as_source,
    history,
    importances,
    open_study,
    space,
    tune,
    with_settings,
)
from fused_rec.studies.variants import variant
from fused_rec.training import batch_sources, evaluate, trainer
from fused_rec.training.early_stopping import Progress
from fused_rec.training.trainer import NonFiniteLossError

COMPLETE, PRUNED, FAIL, RUNNING = (optuna.trial.TrialState[name] for name in ("COMPLETE", "PRUNED", "FAIL", "RUNNING"))
SETTINGS = {
    "model.variant": "graph",
    "model.dim": 8,
    "train.batch_size": 32,
    "train.max_steps": 6,
    "train.eval_every": 3,
}


@pytest.fixture(scope="module")
def tables(tmp_path_factory) -> Path:
    return write_tables(tmp_path_factory.mktemp("tables"), n_users=40, n_items=20)


@pytest.fixture(scope="module")
def config(tables) -> Config:
    return with_settings(Config(data=DataConfig(name="tables", path=str(tables))), SETTINGS)


RATE = {"train.learning_rate": FloatDistribution(0.001, 0.02, log=True)}


@pytest.fixture
def no_figures(monkeypatch):
    """For many trials: a figure after each takes longer than the trial. `swept` draws its own."""
    monkeypatch.setattr(sweeping.plots, "by_setting", lambda trials, metric: None)
    monkeypatch.setattr(sweeping, "write_figure", lambda file, figure: None)


@pytest.fixture
def narrow(monkeypatch, no_figures):
    """One setting, so that trials differ in little."""
    monkeypatch.setattr(sweeping, "SPACE", RATE)


def by_rate(tried, prepared, folder, on_evaluation):
    """In place of training: the lower the learning rate, the better."""
    return None, Progress(best=1 - tried.train.learning_rate)


def states(folder: Path) -> list[optuna.trial.TrialState]:
    return [trial.state for trial in open_study(folder).get_trials()]


# --- in this process


@pytest.fixture(scope="module")
def swept(config, tmp_path_factory) -> tuple[Path, Config, list[str]]:
    """The folder of a sweep of two trials, its best config, and the parts of the split that were measured."""
    folder, parts = tmp_path_factory.mktemp("swept"), []
    real = evaluate.evaluate_mean

    def spy(prepared, scorer, part):
        parts.append(part)
        return real(prepared, scorer, part)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "evaluate_mean", spy)
        patch.setattr(trainer, "evaluate_users", lambda *_: pytest.fail("the test part was read"))
        patch.setattr(sweeping, "SPACE", RATE)
        return folder, tune(config, folder, 2), parts


def test_the_config_itself_is_the_first_trial_and_the_test_part_is_never_read(config, swept):
    folder, best, parts = swept
    assert parts == ["valid"] * 4
    trials = history(folder)
    assert [trial["trial"] for trial in trials] == [0, 1]
    assert trials[0]["train.learning_rate"] == config.train.learning_rate != trials[1]["train.learning_rate"]
    record = json.loads((folder / "best.json").read_text())
    assert record["value"] == max(trial["value"] for trial in trials)
    assert trials[record["trial"]]["train.learning_rate"] == best.train.learning_rate
    assert from_dict(record["config"]) == best
    assert with_settings(best, {"train.learning_rate": config.train.learning_rate}) == config
    assert not list((folder / "trials").iterdir())
    drawn = importlib.util.find_spec("matplotlib") is not None
    assert (folder / "trials.png").exists() == drawn


def test_a_temperature_that_training_chooses_is_tried_first_in_each_way(config, tmp_path, monkeypatch):
    monkeypatch.setattr(sweeping, "SPACE", {"train.temperature": sweeping.SPACE["train.temperature"]})
    chosen = with_settings(config, {"train.temperature": 0.0})
    tune(chosen, tmp_path, 2)
    assert [trial["train.temperature"] for trial in history(tmp_path)] == [0.15, 0.3]


def test_a_finished_sweep_returns_at_once_and_a_longer_one_goes_on(config, tmp_path, monkeypatch, narrow):
    monkeypatch.setattr(sweeping, "fit", by_rate)
    best = tune(config, tmp_path, 3)
    trials = history(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(sweeping, "prepare", lambda *_: pytest.fail("texts were encoded"))
        assert tune(config, tmp_path, 3) == best
        assert tune(config, tmp_path, 2) == best
        dataset, data_split = sweeping.read(config)
        fewer = dataclasses.replace(dataset, ties=dataset.ties.slice(1))
        patch.setattr(sweeping, "read", lambda *_: (fewer, data_split))
        with pytest.raises(TablesChangedError, match=f"ties had {dataset.ties.num_rows} rows and has"):
            tune(config, tmp_path, 3)
    tune(config, tmp_path, 4)
    assert history(tmp_path)[:3] == trials
    assert len(history(tmp_path)) == 4


def test_equal_seeds_draw_equal_trials_also_after_a_stop(config, tmp_path, monkeypatch, narrow):
    monkeypatch.setattr(sweeping, "fit", by_rate)
    tune(config, tmp_path / "one", 13)
    tune(config, tmp_path / "two", 12)
    tune(config, tmp_path / "two", 13)
    assert history(tmp_path / "one") == history(tmp_path / "two")
    assert len({trial["train.learning_rate"] for trial in history(tmp_path / "one")}) == 13
    tune(with_settings(config, {"train.seed": 1}), tmp_path / "other", 2)
    drawn = [history(tmp_path / name)[1]["train.learning_rate"] for name in ("one", "other")]
    assert drawn[0] != drawn[1]


def test_the_best_config_loads_from_its_file_and_trains_to_its_value(swept, tmp_path):
    folder, best, _ = swept
    spec = importlib.util.spec_from_file_location("best", folder / "best.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert from_dict(module.get_config().to_dict()) == best
    done = preloaded.run("experiments.train", f"--config={folder}/best.py", f"--workdir={tmp_path}/run")
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    value = json.loads((folder / "best.json").read_text())["value"]
    assert results["valid"]["ndcg@10"] == pytest.approx(value, abs=1e-6)


def test_a_sweep_that_is_asked_to_stop_repeats_the_one_that_was_not(config, swept, tmp_path, monkeypatch):
    """Stopped in the second trial, once between evaluations and once in one, that trial goes on and fails nothing."""
    monkeypatch.setattr(sweeping, "SPACE", RATE)
    for owner, name, call in ((batch_sources, "batch", 8), (trainer, "evaluate_mean", 1)):
        real, calls = getattr(owner, name), itertools.count(1)

        def asking(*arguments, real=real, calls=calls, call=call, **settings):
            if next(calls) == call:
                signal.raise_signal(signal.SIGTERM)
            return real(*arguments, **settings)

        with monkeypatch.context() as patch, pytest.raises(signals.Stopped), signals.handle_signals():
            patch.setattr(owner, name, asking)
            tune(config, tmp_path, 2)
        assert states(tmp_path) == [COMPLETE, RUNNING]
        assert [path.name for path in (tmp_path / "trials" / "trial_1" / "checkpoints").iterdir()]
    assert tune(config, tmp_path, 2) == swept[1]
    assert history(tmp_path) == history(swept[0])
    assert not list((tmp_path / "trials").iterdir())


def test_a_hopeless_trial_is_stopped_early_and_counts(config, tmp_path, monkeypatch, narrow):
    """From the sixth trial on, one below the median of the others at its step ends there."""
    calls = []

    def fit(tried, prepared, folder, on_evaluation):
        number = int(folder.name.split("_")[1])
        for step in range(3, 31, 3):
            calls.append((number, step))
            on_evaluation(step, 0.5 - number / 100 + step / 1000)
        return None, Progress(best=0.5 - number / 100)

    monkeypatch.setattr(sweeping, "fit", fit)
    tune(config, tmp_path, 7)
    assert states(tmp_path) == [COMPLETE] * 5 + [PRUNED] * 2
    assert [max(step for number, step in calls if number == trial) for trial in range(7)] == [30] * 5 + [18] * 2
    assert json.loads((tmp_path / "best.json").read_text())["trial"] == 0


def test_what_stops_a_trial_comes_through_the_training_loop(config, tmp_path):
    dataset, data_split = sweeping.read(config)
    prepared = sweeping.prepare(config, dataset, data_split)
    seen = []

    def report(step, value):
        seen.append((step, value))
        raise optuna.TrialPruned

    with pytest.raises(optuna.TrialPruned):
        trainer.fit(config, prepared, tmp_path / "pruned", on_evaluation=report)
    seen_whole = []
    _, progress = trainer.fit(
        config, prepared, tmp_path / "whole", on_evaluation=lambda step, value: seen_whole.append((step, value))
    )
    assert [step for step, _ in seen_whole] == [3, 6]
    assert seen == seen_whole[:1]
    assert progress.best == max(value for _, value in seen_whole)


def test_divergence_ends_a_trial_and_an_error_ends_the_sweep(config, tmp_path, monkeypatch, narrow):
    fates = iter([NonFiniteLossError("nan"), 0.3, ValueError("fault"), 0.1, 0.2])

    def fit(tried, prepared, folder, on_evaluation):
        fate = next(fates)
        if isinstance(fate, Exception):
            raise fate
        return None, Progress(best=fate)

    monkeypatch.setattr(sweeping, "fit", fit)
    with pytest.raises(ValueError, match="none of the 1 trials .* was completed: each diverged"):
        tune(config, tmp_path, 1)
    with pytest.raises(ValueError, match="fault"):
        tune(config, tmp_path, 4)
    tune(config, tmp_path, 4)
    assert states(tmp_path) == [PRUNED, COMPLETE, FAIL, COMPLETE, COMPLETE]
    trials = open_study(tmp_path).get_trials()
    assert trials[3].params == trials[2].params  # begun anew
    assert json.loads((tmp_path / "best.json").read_text())["trial"] == 1


def test_a_trial_that_fails_twice_is_left(config, tmp_path, monkeypatch, narrow):
    attempts = []

    def fit(tried, prepared, folder, on_evaluation):
        attempts.append(tried.train.learning_rate)
        if tried == config:
            raise MemoryError
        return None, Progress(best=0.1)

    monkeypatch.setattr(sweeping, "fit", fit)
    for _ in range(2):
        with pytest.raises(MemoryError):
            tune(config, tmp_path, 2)
    tune(config, tmp_path, 2)
    assert attempts[0] == attempts[1] == config.train.learning_rate
    assert config.train.learning_rate not in attempts[2:]
    assert states(tmp_path) == [FAIL, FAIL, COMPLETE, COMPLETE]


def test_a_folder_is_one_config_only(config, tmp_path, narrow, monkeypatch):
    monkeypatch.setattr(sweeping, "fit", lambda *_, **__: (None, Progress(best=0.1)))
    tune(config, tmp_path, 1)
    with pytest.raises(ValueError, match=r"train\.seed is 0 there and 1 here"):
        tune(with_settings(config, {"train.seed": 1}), tmp_path, 1)
    with pytest.raises(ValueError, match="trials is 0; it must be at least 1"):
        tune(config, tmp_path, 0)


def test_the_space_reaches_to_the_config():
    default, absent = space(Config()), set(sweeping.OPT_IN) - {"model.popularity_weight"}
    assert default == {name: found for name, found in sweeping.SPACE.items() if name not in absent}
    assert "train.contrastive_weight" in space(Config(train=TrainConfig(contrastive_weight=0.1)))
    assert absent & space(variant(Config(), "rlmrec_con")).keys() == {"model.text_alignment"}
    assert absent & space(variant(Config(), "rlmrec_gen")).keys() == {"model.text_reconstruction"}
    assert "model.popularity_weight" not in space(Config(model=ModelConfig(popularity_weight=0.0)))
    assert "model.edge_dropout" not in space(Config(model=ModelConfig(num_layers=0)))
    wide = space(Config(model=ModelConfig(dim=32, score="dot"), train=TrainConfig(learning_rate=0.05)))
    assert wide["model.dim"] == CategoricalDistribution((64, 128, 256, 32))
    assert wide["train.learning_rate"] == FloatDistribution(0.0005, 0.05, log=True)
    assert wide["train.temperature"] == FloatDistribution(0.05, 2.0, log=True)
    assert "model.id_embedding_dropout" not in space(Config(model=ModelConfig(variant="text")))
    with pytest.raises(ValueError, match=r"train\.weight_decay is 0\.0; to be swept .* it must be above 0"):
        space(Config(train=TrainConfig(weight_decay=0.0)))


def test_importances_name_the_setting_that_matters(config, tmp_path, monkeypatch, no_figures):
    def fit(tried, prepared, folder, on_evaluation):
        return None, Progress(best=tried.train.temperature + 0.001 * tried.model.id_embedding_dropout)

    monkeypatch.setattr(sweeping, "fit", fit)
    tune(config, tmp_path, 9)
    assert importances(tmp_path) == {}
    tune(config, tmp_path, 25)
    shares = importances(tmp_path)
    assert next(iter(shares)) == "train.temperature"
    assert shares.keys() == space(config).keys()
    assert sum(shares.values()) == pytest.approx(1)


def test_a_config_as_source_comes_back(tmp_path):
    said = Config(
        data=DataConfig(name="tables", path='C:\\a "folder" of Zoë’s 🦊', repair=True),
        text=TextConfig(features="shuffled"),
        train=TrainConfig(learning_rate=1 / 3, refit="all"),
    )
    values = to_dict(said)
    values["graph"]["attributes"] = ("sector",)
    said = from_dict(values)
    for config in (said, Config()):
        names: dict = {}
        exec(compile(as_source(config, "Said."), "best.py", "exec"), names)
        assert from_dict(names["get_config"]().to_dict()) == config
        assert names["__doc__"] == "Said."
    assert as_source(Config(), "Said.").endswith("return config_dict()\n")
    assert config_dict().to_dict() == to_dict(Config())


# --- in processes of their own


def command(tables: Path, folder: Path, trials: int) -> list[str]:
    settings = SETTINGS | {"data.path": tables}
    return [
        *(sys.executable, "-m", "experiments.tune", "--config=experiments/configs/tables.py"),
        *(f"--out={folder}", f"--trials={trials}"),
        *(f"--config.{name}={value}" for name, value in settings.items()),
    ]


def running(folder: Path) -> list[Path]:
    return list(folder.glob("trials/trial_*/checkpoints/3"))


def test_processes_share_a_sweep_and_one_that_is_killed_is_made_up_for(tables, tmp_path):
    """One is killed in its first trial, two go on together: four trials in all, the killed one's begun anew."""
    first = subprocess.Popen(command(tables, tmp_path, 4), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while first.poll() is None and time.monotonic() < deadline and not running(tmp_path):
        time.sleep(0.005)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert running(tmp_path), "the trial was over before it could be killed"
    both = [
        subprocess.Popen(command(tables, tmp_path, 4), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    ends = [process.communicate(timeout=400) for process in both]
    assert [process.returncode for process in both] == [0, 0], ends
    assert ends[0][0] == ends[1][0], "both end with the same best"
    assert f"--config={tmp_path}/best.py" in ends[0][0]

    trials = open_study(tmp_path).get_trials()
    assert [trial.state for trial in trials if trial.state != COMPLETE] == [FAIL]
    assert len(trials) == 5
    [anew] = [trial for trial in trials if "again" in trial.user_attrs]
    assert trials[0].state == FAIL and anew.params == trials[0].params
    assert len({tuple(trial.params.values()) for trial in trials}) == 4, "no two processes drew the same"
    shares = [{line for line in err.splitlines() if ": validation ndcg@10" in line} for _, err in ends]
    assert all(shares) and sum(map(len, shares)) == 4
    assert not list((tmp_path / "trials").iterdir())
    best = max(trials[1:], key=lambda trial: trial.value or 0)
    assert json.loads((tmp_path / "best.json").read_text())["trial"] == best.number
