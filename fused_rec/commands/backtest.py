"""Measures how to keep a model up to date: retrain from nothing, train on from the last model, or leave it.

    python -m experiments.backtest --config=experiments/configs/stocknet.py --out=runs/backtest_stocknet

The tables are cut by time. At each cut the models are trained on all rows until then, and rank the interactions of the
next period. Finished runs are kept, so the same command resumes, and more seeds extend the study.
"""

from pathlib import Path

from absl import app, flags

from fused_rec.commands.launch import command, config_of
from fused_rec.commands.places import DEFINE_config, DEFINE_path, written_folder

CONFIG = DEFINE_config()
OUT = DEFINE_path("out", written_folder, "Folder of the runs, tables and figure.", required=True)
PERIODS = flags.DEFINE_integer("periods", 5, "Periods to rank, each with as many interactions.", lower_bound=2)
FIRST = flags.DEFINE_float("first", 0.5, "Share of the interactions that the first model is trained on.")
SEEDS = flags.DEFINE_integer("num_seeds", 1, "Runs of each training: train.seed 0, 1, and so on.", lower_bound=1)


def main(argv: list[str]) -> None:
    """Runs the study, and prints the tables and the paths."""
    from fused_rec.studies.backtest import Backtest, backtest

    try:
        plan = Backtest(PERIODS.value, FIRST.value, tuple(range(SEEDS.value)))
    except ValueError as error:
        raise app.UsageError(f"--{error}") from error
    report = backtest(config_of(CONFIG.value), plan, OUT.value, command=command())
    print(f"\n{report['task']}; intervals 95 %, p adjusted after Holm\n")
    print(Path(OUT.value, "backtest.md").read_text(encoding="utf-8"))
    print(f"numbers: {OUT.value}/backtest.json, backtest.csv\ntables:  {OUT.value}/backtest.md")
    if (figure := Path(OUT.value, "backtest.png")).exists():
        print(f"figure:  {figure}")
