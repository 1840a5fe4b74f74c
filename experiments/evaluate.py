"""Measure a finished run again, beside recommenders that need no training.

python -m experiments.evaluate --workdir=runs/lastfm --part=valid --baselines=popularity,item_knn,ease
"""

from absl import app, flags

from experiments import start
from fused_rec.config import METRICS
from fused_rec.evaluate.compare import table
from fused_rec.train.measure import BASELINES, baseline, choose_settings, measure, scorer
from fused_rec.train.prepare import prepare
from fused_rec.train.serve import load

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a finished run.", required=True)
PART = flags.DEFINE_enum("part", "valid", ["valid", "test"], "Held-out part that is ranked.")
BASELINE = flags.DEFINE_list("baselines", [], f"Recommenders to measure beside it, of {', '.join(BASELINES)}.")
METRIC = flags.DEFINE_list("metrics", ["recall@10", "ndcg@10", "accuracy"], f"Columns, of {', '.join(METRICS)}.")


def main(argv: list[str]) -> None:
    """Parses the flags, measures, prints one table."""
    for flag, known in ((BASELINE, tuple(BASELINES)), (METRIC, METRICS)):
        if unknown := set(flag.value) - set(known):
            raise app.UsageError(f"--{flag.name} has {sorted(unknown)}; they must be of {', '.join(known)}")
    config, prepared, state = load(WORKDIR.value, PART.value)
    # The words and ties of a refitted run tell of the validation part, on which settings are chosen.
    alone = prepare(config, prepared.dataset, prepared.split) if BASELINE.value and config.train.refit else prepared
    rows = {}
    for name in BASELINE.value:
        made = baseline(name, prepared, choose_settings(name, alone))
        rows[name] = measure(prepared, made, PART.value)
    rows[config.model.variant] = measure(prepared, scorer(config, prepared, state), PART.value)
    print(f"{prepared.dataset.name}, {prepared.split.kind} split, {PART.value} part")
    print(table(rows, METRIC.value))


if __name__ == "__main__":
    start(main)
