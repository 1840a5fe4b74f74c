"""Late fusion of two finished runs, against the same sums worked out in NumPy, and as a row of a comparison."""

import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from market import write_tables

from fused_rec.config import Config, DataConfig, GraphConfig, ModelConfig, TrainConfig
from fused_rec.runs.run_dir import read_users
from fused_rec.serving.recommender import load_measured
from fused_rec.studies.compare import check_names, compare_variants, is_single
from fused_rec.studies.late_pairs import WEIGHTS
from fused_rec.studies.variants import VARIANTS
from fused_rec.training.evaluate import evaluate_mean, user_item_vectors

NAMES = ["lightgcn", "bpr_mf+lightgcn", "bpr_mf", "popularity"]


@pytest.fixture(scope="module")
def compared(tmp_path_factory) -> tuple[Path, dict]:
    config = Config(
        data=DataConfig(name="tables", path=str(write_tables(tmp_path_factory.mktemp("tables")))),
        graph=GraphConfig(text_knn=0),
        model=ModelConfig(variant="graph"),
        train=TrainConfig(batch_size=32),
    )
    out = tmp_path_factory.mktemp("out")
    with pytest.MonkeyPatch.context() as patched:
        short = {"max_steps": 20, "eval_every": 10}
        for name in ("lightgcn", "bpr_mf"):
            _shorten(patched, name, short)
        report = compare_variants(config, NAMES, [0, 1], out)
        again = compare_variants(config, NAMES, [0, 1], out)
    assert [row["test"] for row in again["rows"]] == [row["test"] for row in report["rows"]]
    return out, report


def _shorten(patched: pytest.MonkeyPatch, name: str, settings: dict) -> None:
    overrides = VARIANTS[name].overrides
    train = {**overrides["train"], **settings}
    patched.setitem(VARIANTS, name, dataclasses.replace(VARIANTS[name], overrides={**overrides, "train": train}))


def test_a_pair_is_a_row_with_a_test_like_all_others(compared):
    out, report = compared
    assert report["reference"] == "lightgcn" and not report["failures"]
    assert [entry["variant"] for entry in report["summary"]] == NAMES
    assert {row["variant"] for row in report["differences"]} == {"bpr_mf+lightgcn", "bpr_mf", "popularity"}
    rows = [row for row in report["rows"] if row["variant"] == "bpr_mf+lightgcn"]
    assert [row["seed"] for row in rows] == [0, 1]
    for row in rows:
        measured = read_users(out / "runs" / "bpr_mf+lightgcn" / str(row["seed"]) / "test_metrics_per_user.npz")
        assert np.nanmean(measured.metrics["auc"]) == pytest.approx(row["test"]["auc"])
        parts = [other for other in report["rows"] if other["variant"] in ("bpr_mf", "lightgcn")]
        assert row["parameters"] == sum(other["parameters"] for other in parts if other["seed"] == row["seed"])
        of_parts = [other["valid"]["ndcg@10"] for other in parts if other["seed"] == row["seed"]]
        assert row["valid"]["ndcg@10"] >= max(of_parts) - 1e-6  # the ends of the grid are the runs


def test_the_weight_is_the_best_on_validation_of_standardized_scores(compared):
    out, _ = compared
    results = json.loads((out / "runs" / "bpr_mf+lightgcn" / "1" / "results.json").read_text())
    scores = []
    for name in ("bpr_mf", "lightgcn"):
        config, prepared, state = load_measured(out / "runs" / name / "1", "valid")
        users, items = user_item_vectors(config, prepared, state)
        raw = users.astype(np.float64) @ items.T
        scores.append(raw / raw.std(1, keepdims=True))
    weight, other = results["weights"]
    assert weight in WEIGHTS and other == 1 - weight

    def of(weight: float, split: str) -> dict:
        total = jnp.asarray(weight * scores[0] + (1 - weight) * scores[1], jnp.float32)
        return evaluate_mean(prepared, lambda users: total[users], split)

    values = [of(tried, "valid")["ndcg@10"] for tried in WEIGHTS]
    assert of(weight, "valid")["ndcg@10"] == pytest.approx(max(values), abs=2e-3)  # equal sums may be rounded apart
    assert of(weight, "test")["ndcg@10"] == pytest.approx(results["test"]["ndcg@10"], abs=2e-3)


def test_a_pair_is_of_two_trained_names_of_the_comparison():
    check_names(["text", "lightgcn", "text+lightgcn"])
    for names in (["text+lightgcn", "text"], ["text", "ease", "text+ease"], ["text", "text+text"]):
        with pytest.raises(ValueError, match="two of these variants"):
            check_names(names)
    assert not is_single("text+lightgcn")
