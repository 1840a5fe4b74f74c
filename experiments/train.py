"""Train one model on one dataset and measure it on the held-out part.

    python -m experiments.train --config=experiments/configs/lastfm.py --workdir=runs/lastfm

The same command again resumes a run that was stopped. Any setting can be given: --config.model.dim=128.
"""

from absl import flags
from ml_collections import config_flags

from experiments import config_of, start
from fused_rec.train.loop import train

CONFIG = config_flags.DEFINE_config_file("config", None, "A file of experiments/configs.", lock_config=True)
flags.mark_flag_as_required("config")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: checkpoints, curves, results.json.", required=True)
SHOWN = ("recall@10", "ndcg@10", "accuracy")


def main(argv: list[str]) -> None:
    """Parses the flags, trains, and prints where things lie."""
    config = config_of(CONFIG.value)
    results = train(config, WORKDIR.value)
    for part in ("valid", "test"):
        print(
            f"{part:5}  "
            + "  ".join(f"{name} {results[part][name]:.4f}" for name in SHOWN if results[part][name] is not None)
        )
    print(f"results: {WORKDIR.value}/results.json")
    print(f"rank products: python -m experiments.recommend --workdir={WORKDIR.value} --k=10 --out=ranked.csv")


if __name__ == "__main__":
    start(main)
