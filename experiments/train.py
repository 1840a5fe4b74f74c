"""Train one model on one dataset and measure it on the held-out part.

    python -m experiments.train --config=experiments/configs/lastfm.py --workdir=runs/lastfm

The same command again resumes a run that was stopped. Any setting can be given: --config.model.dim=128.
"""

import logging

from absl import app, flags
from ml_collections import config_flags

from fused_rec.config import from_dict
from fused_rec.train.loop import train

CONFIG = config_flags.DEFINE_config_file("config", None, "A file of experiments/configs.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: checkpoints, curves, results.json.")
SHOWN = ("recall@10", "ndcg@10", "accuracy")


def main(argv: list[str]) -> None:
    """Parses the flags, trains, and prints where things lie."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {argv[1:]}; settings are given as --config.section.name=value")
    logging.getLogger("fused_rec").setLevel(logging.INFO)
    results = train(from_dict(CONFIG.value.to_dict()), WORKDIR.value)
    for part in ("valid", "test"):
        print(f"{part:5}  " + "  ".join(f"{name} {results[part][name]:.4f}" for name in SHOWN))
    print(f"results: {WORKDIR.value}/results.json")
    print(f"rank products: python -m experiments.recommend --workdir={WORKDIR.value} --k=10 --out=ranked.csv")


def cli() -> None:
    """The console entry."""
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main)


if __name__ == "__main__":
    cli()
