"""Runs the whole pipeline on the synthetic market: `make demo`.

Trains the text, graph and fused variants, ranks all items for held-out interactions, prints a table of metrics, one
user's recommendations and the paths of all outputs, and writes a report page.
"""

from pathlib import Path
from typing import Any

import numpy as np

from fused_rec.commands.configs.synthetic import get_config
from fused_rec.commands.places import DEFINE_path, written_folder
from fused_rec.config import Config, from_dict
from fused_rec.studies.variants import variant

WORKDIR = DEFINE_path("workdir", written_folder, "Folder of the three runs.", default="runs/demo")
VARIANTS = {"text": "text only", "graph": "graph only", "fused": "fused"}
BASELINES = {"popularity": "popularity", "item_knn": "itemKNN"}
CUSTOMER = "C0001"
DRAWN = 2  # further users on the page
GROUPS = ("age_band",)
SHOWN = ["recall@10", "ndcg@10", "auc"]


def variant_config(name: str) -> Config:
    """Returns a variant of the synthetic config."""
    return variant(from_dict(get_config().to_dict()), name)


def main(argv: list[str]) -> None:
    """Runs or resumes the three trainings, and prints the results."""
    from fused_rec.evaluation.ranking import UserMetrics, mean
    from fused_rec.evaluation.result_tables import table
    from fused_rec.runs.run_dir import TEST_METRICS_PER_USER, read_users
    from fused_rec.serving.recommender import load_measured
    from fused_rec.training.evaluate import baseline, choose_settings, evaluate_users
    from fused_rec.training.trainer import run_training

    workdir = WORKDIR.value
    trained = {}
    for key, name in VARIANTS.items():
        print(f"\n== {name}")
        run_training(variant_config(key), workdir / key)
        trained[name] = read_users(workdir / key / TEST_METRICS_PER_USER)
    _, prepared, _ = load_measured(workdir / "fused", "test")
    measured: dict[str, UserMetrics] = {}
    for key, name in BASELINES.items():
        measured[name] = evaluate_users(prepared, baseline(key, prepared, choose_settings(key, prepared)), "test")
    measured |= trained

    print("\nHeld-out purchases, the whole catalogue ranked for every customer:\n")
    print(table({name: mean(per_user) for name, per_user in measured.items()}, SHOWN))
    phase = _write_page(workdir, prepared, measured)
    print(f"\ncheckpoints: {workdir}/fused/{phase}/checkpoints")
    print(f"results:     {workdir}/fused/results.json")
    print(f"page:        {workdir}/report.html")


def _write_page(workdir: Path, prepared: Any, measured: dict[str, Any]) -> str:
    """Writes report.html about the fused run, prints one user's recommendations, returns the phase of the run.

    Args:
      workdir: folder of the three runs.
      prepared: inputs of the fused run, with its splits.
      measured: metrics per user of the test split, by model.
    """
    from fused_rec.reporting.data import Explain, ReportData, compared, passages, recommended, sample, sliced
    from fused_rec.reporting.page import render_page
    from fused_rec.runs.loggers import read_curves
    from fused_rec.runs.run_dir import read_results, read_run
    from fused_rec.serving.recommender import candidate_filter, load, model_digest, user_rows
    from fused_rec.storage import write_file

    first, others = user_rows(prepared.dataset, [CUSTOMER]), sample(prepared, DRAWN)
    users = np.concatenate([first, np.setdiff1d(others, first)])
    model = load(workdir / "fused", dataset=prepared.dataset)
    customers = recommended(model, candidate_filter(prepared.dataset), users, Explain(5, passages(*model)))
    print(f"\nFor customer {customers[0].user_id}:\n")
    for item in customers[0].items:
        print(f"  {item.rank}. {item.item_id}  {item.name}  (score {item.score:.3f})")

    results = read_results(workdir / "fused")
    facts = ReportData(
        results,
        counts=results["counts"],
        served=model[1].served(),
        digests={"tables": read_run(workdir / "fused")["tables"], "model": model_digest(workdir / "fused")},
        split="test",
        models=compared(measured, VARIANTS["fused"]),
        curve=tuple(read_curves(workdir / "fused" / results["phase"])),
        slices=sliced(prepared, measured[VARIANTS["fused"]], GROUPS),
        rules=None,
        customers=customers,
        selection=f"{CUSTOMER} and others drawn at random",
    )
    write_file(workdir / "report.html", render_page(facts).encode())
    return results["phase"]
