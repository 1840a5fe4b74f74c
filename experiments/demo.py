"""The whole path on the built-in market: `make demo`.

Trains text alone, graph alone and both fused, ranks the whole catalogue on held-out data, and prints one table, one
customer's recommendations and where everything lies.
"""

import dataclasses
from pathlib import Path

import pyarrow as pa
from absl import flags

from experiments import start
from experiments.configs.synthetic import get_config
from fused_rec.config import Config, from_dict
from fused_rec.data.dataset import Dataset
from fused_rec.evaluate.compare import table
from fused_rec.train.loop import train
from fused_rec.train.measure import baseline, choose_settings, measure
from fused_rec.train.serve import load, recommend

WORKDIR = flags.DEFINE_string("workdir", "runs/demo", "Folder of the three runs.")
VARIANTS = {"text": "text only", "graph": "graph only", "fused": "fused"}
BASELINES = {"popularity": "popularity", "item_knn": "itemKNN"}
CUSTOMER = "C0001"
SHOWN = ["recall@10", "ndcg@10", "accuracy"]


def variant_config(variant: str) -> Config:
    """The synthetic config with another variant."""
    config = from_dict(get_config().to_dict())
    return dataclasses.replace(config, model=dataclasses.replace(config.model, variant=variant))


def main(argv: list[str]) -> None:
    """Runs or resumes the three trainings and shows what came out."""
    workdir = Path(WORKDIR.value)
    rows = {}
    for variant, name in VARIANTS.items():
        print(f"\n== {name}")
        rows[name] = train(variant_config(variant), workdir / variant)["test"]
    config, prepared, state = load(workdir / "fused")
    chosen = {key: choose_settings(key, prepared) for key in BASELINES}
    made = {name: baseline(key, prepared, chosen[key]) for key, name in BASELINES.items()}
    rows = {name: measure(prepared, one, "test") for name, one in made.items()} | rows

    print("\nHeld-out purchases, the whole catalogue ranked for every customer:\n")
    print(table(rows, SHOWN))
    show_customer(prepared.dataset, recommend(config, prepared, state, [CUSTOMER], 5))
    print(f"\ncheckpoints: {workdir}/fused/choose/checkpoints")
    print(f"results:     {workdir}/fused/results.json")


def show_customer(dataset: Dataset, ranked: pa.Table) -> None:
    """Prints a customer's recommendations with the products' names."""
    names = dict(zip(*(dataset.items.column(name).to_pylist() for name in ("item_id", "name")), strict=True))
    print(f"\nFor customer {CUSTOMER}:\n")
    for row in ranked.to_pylist():
        print(f"  {row['rank']}. {row['item_id']}  {names[row['item_id']]}  (score {row['score']:.3f})")


if __name__ == "__main__":
    start(main)
