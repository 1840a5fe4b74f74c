"""The whole path on the built-in market: `make demo`.

Trains text alone, graph alone and both fused, ranks the whole catalogue on held-out data, and prints one table, one
customer's recommendations and where everything lies.
"""

from pathlib import Path

from absl import app, flags, logging

from experiments.configs.synthetic import get_config
from experiments.evaluate import measure_baseline, table
from experiments.recommend import recommendations
from fused_rec.config import Config, from_dict
from fused_rec.train.loop import load, train

WORKDIR = flags.DEFINE_string("workdir", "runs/demo", "Folder of the three runs.")
VARIANTS = {"text": "text only", "graph": "graph only", "fused": "fused"}
SHOWN = ["recall@10", "ndcg@10", "accuracy"]


def variant_config(variant: str) -> Config:
    """The synthetic config with another variant."""
    config = get_config()
    config.model.variant = variant
    return from_dict(config.to_dict())


def main(argv: list[str]) -> None:
    """Runs or resumes the three trainings and shows what came out."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {argv[1:]}")
    logging.set_verbosity(logging.INFO)
    workdir = Path(WORKDIR.value)
    rows = {}
    for variant, name in VARIANTS.items():
        print(f"\n== {name}")
        rows[name] = train(variant_config(variant), workdir / variant)["test"]
    _, prepared, _ = load(workdir / "fused")
    rows = {name: measure_baseline(key, prepared, "test") for key, name in BASELINES.items()} | rows

    print("\nHeld-out purchases, the whole catalogue ranked for every customer:\n")
    print(table(rows, SHOWN))
    show_customer(workdir / "fused")
    print(f"\ncheckpoints: {workdir}/fused/choose/checkpoints")
    print(f"results:     {workdir}/fused/results.json")


def show_customer(workdir: Path) -> None:
    """Prints five recommendations for the first customer of the market."""
    ranked, dataset = recommendations(str(workdir), ["C0001"], 5)
    names = dict(zip(*(dataset.items.column(name).to_pylist() for name in ("item_id", "name")), strict=True))
    print("\nFor customer C0001:\n")
    for row in ranked.to_pylist():
        print(f"  {row['rank']}. {row['item_id']}  {names[row['item_id']]}  (score {row['score']:.3f})")


BASELINES = {"popularity": "popularity", "item_knn": "itemKNN"}

if __name__ == "__main__":
    app.run(main)
