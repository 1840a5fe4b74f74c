"""Tunes hyperparameters on the validation split; each trial trains a model.

    python -m experiments.tune --config=experiments/configs/lastfm.py --trials=30 --out=runs/lastfm_sweep

Any number of processes, on all hosts with access to the folder, share the trials when they run the same command, and a
stopped study resumes. OUT/best.py is the best config. The test split is never read.
"""

import json
from pathlib import Path

from absl import flags

from fused_rec.commands.launch import command_named, config_of
from fused_rec.commands.places import DEFINE_config, DEFINE_path, written_folder

CONFIG = DEFINE_config()
TRIALS = flags.DEFINE_integer("trials", 30, "Finished trials, over all processes.", lower_bound=1)
OUT = DEFINE_path("out", written_folder, "Folder of the trials, best.py and best.json.", required=True)


def main(argv: list[str]) -> None:
    """Tunes, and prints the best trial."""
    from fused_rec.studies.tune import (  # needs Optuna: here, its absence is reported in one line
        history,
        importances,
        tune,
    )

    config = config_of(CONFIG.value)
    folder = Path(OUT.value)
    tune(config, folder, TRIALS.value)
    best = json.loads((folder / "best.json").read_text(encoding="utf-8"))
    trials = history(folder)
    pruned = sum(trial["state"] == "pruned" for trial in trials)
    print(f"{len(trials)} trials, {pruned} of them stopped early or diverged")
    print(f"best: trial {best['trial']}, validation {best['metric']} {best['value']:.4f}")
    for name in (name for name in trials[0] if "." in name):
        section, setting = name.split(".")
        print(f"  {name:22} {best['config'][section][setting]:.6g}")
    if shares := importances(folder):
        print("what mattered: " + ", ".join(f"{name} {share:.0%}" for name, share in shares.items()))
    print(f"train it: {command_named('train')} --config={folder}/best.py --workdir={folder}/run")
