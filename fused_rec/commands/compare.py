"""Compares variants of one config and baselines over seeds: means, intervals, tests, slices, figures.

    python -m experiments.compare --config=experiments/configs/lastfm.py --out=runs/compare_lastfm

Each variant is trained with each seed (train.seed; the split keeps its own seed). Finished runs are reused, so the same
command resumes, and more variants or seeds extend the comparison.
"""

import sys
from pathlib import Path

from absl import app, flags

from fused_rec.commands.launch import command, config_of
from fused_rec.commands.places import DEFINE_config, DEFINE_path, written_folder
from fused_rec.config import BASELINE_NAMES
from fused_rec.studies.variants import VARIANTS

CONFIG = DEFINE_config()
OUT = DEFINE_path("out", written_folder, "Folder of the runs, tables and figures.", required=True)
NAMES = flags.DEFINE_list(
    "variants",
    [name for name in (*VARIANTS, *BASELINE_NAMES) if name != "lora"],  # as slow as all others together
    f"Variants and baselines to compare, of {', '.join((*VARIANTS, *BASELINE_NAMES))}.",
)
SEEDS = flags.DEFINE_integer("num_seeds", 5, "Runs of each learned variant: train.seed 0, 1, and so on.", lower_bound=1)
TRIALS = flags.DEFINE_integer("trials", 0, "Trials that tune each learned variant on validation.", lower_bound=0)


def main(argv: list[str]) -> None:
    """Runs the comparison, and prints the table and the paths; exits with status 1 if a run failed."""
    from fused_rec.studies.compare import check_names, compare_variants

    try:
        check_names(NAMES.value)
    except ValueError as error:
        raise app.UsageError(str(error)) from error
    config = config_of(CONFIG.value)
    report = compare_variants(
        config, NAMES.value, range(SEEDS.value), OUT.value, trials=TRIALS.value, command=command()
    )
    print(f"\n{report['task']}; intervals 95 %, p adjusted after Holm\n")
    if SEEDS.value == 1:
        print("With one seed the intervals cover the choice of users only, not the noise of training.\n")
    print(Path(OUT.value, "compare.md").read_text(encoding="utf-8"))
    for name, why in report["skipped"].items():
        print(f"left out: {name}: {why}")
    print(f"numbers: {OUT.value}/compare.json, compare.csv\ntables:  {OUT.value}/compare.md, compare.tex")
    for figure in sorted(Path(OUT.value).glob("*.png")):
        print(f"figure:  {figure}")
    if report["failures"]:
        sys.exit(1)
