"""Train one model on one dataset and measure it on the held-out part.

    python -m experiments.train --config=experiments/configs/lastfm.py --workdir=runs/lastfm

The same command again resumes a run that was stopped. Any setting can be given: --config.model.dim=128.
"""

import dataclasses
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from experiments import start
from fused_rec.config import from_dict
from fused_rec.train.loop import train

CONFIG = config_flags.DEFINE_config_file("config", None, "A file of experiments/configs.", lock_config=True)
flags.mark_flag_as_required("config")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: checkpoints, curves, results.json.", required=True)
SHOWN = ("recall@10", "ndcg@10", "accuracy")


def main(argv: list[str]) -> None:
    """Parses the flags, trains, and prints where things lie."""
    config = from_dict(CONFIG.value.to_dict())
    if config.data.path:  # kept in the workdir, which is opened from other folders too
        path = str(Path(config.data.path).expanduser().resolve())
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, path=path))
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
