"""The type of a step's products: named, or chosen by a probe that a resumed run does not repeat."""

import dataclasses
import json

import numpy as np
import pytest
from tiny import whole

from fused_rec.config import Config, ModelConfig, TrainConfig, from_dict, to_dict
from fused_rec.training import compute_type, trainer
from fused_rec.training.compute_type import ComputeType, choose_compute_type
from fused_rec.training.inputs import prepare, read
from fused_rec.training.train_step import GraphInputs

CONFIG = Config(model=ModelConfig(dim=4), train=TrainConfig(batch_size=3, compute_dtype="auto"))


@pytest.fixture(scope="module")
def graph_inputs():
    graph = whole()
    return GraphInputs(graph, np.ones(graph.count("item"), bool), np.ones(graph.count("item"), np.float32))


def measures(monkeypatch, float32, bfloat16):
    monkeypatch.setattr(compute_type, "_probe", lambda *sizes: {"float32": float32, "bfloat16": bfloat16})


def test_a_named_type_is_not_probed(graph_inputs, monkeypatch):
    monkeypatch.setattr(compute_type, "_probe", None)
    for dtype in ("float32", "bfloat16"):
        config = dataclasses.replace(CONFIG, train=TrainConfig(compute_dtype=dtype))
        assert choose_compute_type(config, graph_inputs) == ComputeType(dtype, {})


def test_bfloat16_has_to_be_faster_by_a_clear_margin(graph_inputs, monkeypatch, caplog):
    measures(monkeypatch, 0.01, 0.005)
    with caplog.at_level("INFO"):
        found = choose_compute_type(CONFIG, graph_inputs)
    assert found == ComputeType("bfloat16", {"float32": 10.0, "bfloat16": 5.0})
    assert "train.compute_dtype is auto: bfloat16" in caplog.text
    measures(monkeypatch, 0.01, 0.0095)
    assert choose_compute_type(CONFIG, graph_inputs).dtype == "float32"


def test_the_first_choice_of_a_run_stays(graph_inputs, monkeypatch, tmp_path):
    measures(monkeypatch, 0.01, 0.005)
    first = choose_compute_type(CONFIG, graph_inputs, tmp_path)
    measures(monkeypatch, 0.01, 0.02)
    assert choose_compute_type(CONFIG, graph_inputs, tmp_path) == first


def test_the_probe_measures_both_types(graph_inputs):
    found = compute_type._probe(20, 6, 4, 3)
    assert set(found) == {"float32", "bfloat16"} and min(found.values()) > 0


def test_a_step_needs_a_chosen_type():
    with pytest.raises(ValueError, match="choose_compute_type comes before a step"):
        assert CONFIG.train.dtype


def test_a_run_tells_its_type(tmp_path, monkeypatch):
    measures(monkeypatch, 0.01, 0.005)
    values = to_dict(Config(model=ModelConfig(variant="graph", dim=4)))
    values["train"] |= {"compute_dtype": "auto", "max_steps": 1, "eval_every": 1, "batch_size": 16, "refit": "valid"}
    config = from_dict(values)
    results = trainer.run_training(config, tmp_path)
    expected = {"dtype": "bfloat16", "milliseconds": {"float32": 10.0, "bfloat16": 5.0}}
    assert results["compute"] == json.loads((tmp_path / compute_type.CHOICE).read_text()) == expected
    assert results["config"]["train"]["compute_dtype"] == "auto"


def test_a_training_of_a_study_chooses_too(tmp_path, monkeypatch):
    measures(monkeypatch, 0.01, 0.005)
    values = to_dict(Config(model=ModelConfig(variant="graph", dim=4)))
    values["train"] |= {"compute_dtype": "auto", "max_steps": 1}
    config = from_dict(values)
    monkeypatch.setattr(trainer, "Trainer", lambda config, *rest: pytest.fail(config.train.dtype))
    with pytest.raises(pytest.fail.Exception, match="bfloat16"):
        trainer.fit(config, prepare(config, *read(config)), tmp_path)
