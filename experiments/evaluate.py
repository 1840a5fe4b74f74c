"""Measure a finished run again, beside recommenders that need no training.

    python -m experiments.evaluate --workdir=runs/lastfm --part=valid --baselines=popularity,item_knn,ease
"""

from absl import app, flags

from fused_rec.config import METRICS
from fused_rec.model import baselines
from fused_rec.train.loop import load, measure, scorer
from fused_rec.train.prepare import Prepared

BASELINES = {"popularity": baselines.popularity, "item_knn": baselines.item_knn, "ease": baselines.ease}

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a finished run.")
PART = flags.DEFINE_enum("part", "valid", ["valid", "test"], "Held-out part that is ranked.")
BASELINE = flags.DEFINE_multi_enum("baselines", [], sorted(BASELINES), "Recommenders to measure beside it; repeatable.")
METRIC = flags.DEFINE_multi_enum("metrics", ["recall@10", "ndcg@10", "accuracy"], METRICS, "Columns; repeatable.")


def measure_baseline(name: str, prepared: Prepared, part: str) -> dict[str, float]:
    """One baseline at its defaults, from the interactions that the run saw."""
    observed, dataset = prepared.observed, prepared.dataset
    scores = BASELINES[name](observed.user, observed.item, dataset.n_users, dataset.n_items)
    return measure(prepared, scores, part)


def table(rows: dict[str, dict[str, float]], metrics: list[str]) -> str:
    """Aligned columns, one row a model."""
    width = max(map(len, rows))
    lines = [" " * width + "".join(f"{name:>12}" for name in metrics)]
    for model, values in rows.items():
        lines.append(f"{model:<{width}}" + "".join(f"{values[name]:12.4f}" for name in metrics))
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    """Parses the flags, measures, prints one table."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {argv[1:]}")
    config, prepared, state = load(WORKDIR.value)
    rows = {name: measure_baseline(name, prepared, PART.value) for name in BASELINE.value}
    rows[config.model.variant] = measure(prepared, scorer(config, prepared, state), PART.value)
    print(f"{prepared.dataset.name}, {prepared.split.kind} split, {PART.value} part")
    print(table(rows, METRIC.value))


def cli() -> None:
    """The console entry."""
    flags.mark_flag_as_required("workdir")
    app.run(main)


if __name__ == "__main__":
    cli()
