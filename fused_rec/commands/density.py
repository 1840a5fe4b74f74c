"""Measures when fusion pays: text, graph and fused with few to all training interactions per user.

    python -m experiments.density --config=experiments/configs/citeulike_t.py --out=runs/density_citeulike

At each history length, every user keeps that many training interactions (the newest where there are times); with
--new_items, a share of the items loses all of theirs. Validation and test splits stay the same. Finished runs are kept,
so the same command resumes, and more history lengths, shares, variants or seeds extend the study. No run is refitted on
the validation split.
"""

import sys
from pathlib import Path

from absl import app, flags

from fused_rec.commands.launch import command, config_of
from fused_rec.commands.places import DEFINE_baselines, DEFINE_config, DEFINE_path, written_folder
from fused_rec.config import BASELINE_NAMES
from fused_rec.studies.variants import REQUIRED

CONFIG = DEFINE_config()
OUT = DEFINE_path("out", written_folder, "Folder of the comparisons, tables and figure.", required=True)
HISTORY = flags.DEFINE_list(
    "history", ["1", "2", "3", "5", "10", "all"], "Most training interactions of a user; all keeps them."
)
NEW_ITEMS = flags.DEFINE_list("new_items", ["0"], "Shares of the items without training interactions, as 0,.1,.3.")
NAMES = flags.DEFINE_list("variants", list(REQUIRED), f"Variants, {', '.join(REQUIRED)} and more, as no_late_fusion.")
SINGLE = DEFINE_baselines(BASELINE_NAMES, ["popularity", "item_knn", "ease", "text_mean"])
SEEDS = flags.DEFINE_integer("num_seeds", 3, "Runs of each learned variant: train.seed 0, 1, and so on.", lower_bound=1)


def main(argv: list[str]) -> None:
    """Runs the study, and prints the tables and the paths; exits with status 1 if a run failed."""
    from fused_rec.studies.density import Density, measure_density

    try:
        density = Density(
            tuple(_history(length) for length in HISTORY.value),
            tuple(_share(share) for share in NEW_ITEMS.value),
            tuple(NAMES.value),
            tuple(SINGLE.value),
            tuple(range(SEEDS.value)),
        )
    except ValueError as error:
        raise app.UsageError(str(error)) from error
    report = measure_density(config_of(CONFIG.value), density, OUT.value, command=command())
    print(f"\n{report['task']}; intervals 95 %; validation chooses the baseline and the better single method\n")
    print(Path(OUT.value, "density.md").read_text(encoding="utf-8"))
    print(f"numbers: {OUT.value}/density.json, density.csv\ntables:  {OUT.value}/density.md")
    if (figure := Path(OUT.value, "density.png")).exists():
        print(f"figure:  {figure}")
    if any(point["failures"] for point in report["points"]):
        sys.exit(1)


def _history(text: str) -> int:
    if text.strip() == "all":
        return 0
    if not text.strip().isdecimal() or not int(text):
        raise ValueError(f"--history has {text!r}; it must be a number above 0, or all")
    return int(text)


def _share(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"--new_items has {text!r}; it must be a share in [0, 1)") from None
