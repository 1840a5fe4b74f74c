"""Evaluate a finished run again, with baselines or under suitability rules.

    python -m experiments.evaluate --workdir=runs/lastfm --split=valid --baselines=popularity,item_knn,ease
    python -m experiments.evaluate --workdir=runs/mine --split=test --rules=rules.json --groups=age_band --out=rules.out

With --rules, --out is a JSON file of the suitable share of the lists, exclusions and metric cost of each rule, returns
(with --prices) and differences between groups of users; docs/SUITABILITY.md explains each number.
"""

import json
from pathlib import Path

from absl import app, flags

from fused_rec.commands.places import (
    DEFINE_baselines,
    DEFINE_path,
    DEFINE_rules,
    DEFINE_run,
    DEFINE_split,
    existing_file,
    require_known,
    written_file,
)
from fused_rec.config import BASELINE_NAMES, METRICS

WORKDIR, DATA_PATH, CACHE = DEFINE_run()
SPLIT = DEFINE_split()
BASELINE = DEFINE_baselines(BASELINE_NAMES, default=[])
METRIC = flags.DEFINE_list(
    "metrics", ["recall@10", "ndcg@10", "auc"], f"Metrics to print: any of {', '.join(METRICS)}."
)
RULES = DEFINE_rules()
GROUPS = flags.DEFINE_list("groups", [], "With --rules: user attributes whose groups are compared.")
PRICES = DEFINE_path("prices", existing_file, "With --rules: CSV of ISIN, timestamp, closePrice, as FAR-Trans has it.")
DAYS = flags.DEFINE_integer("days", 180, "With --prices: horizon of the returns in days.", lower_bound=1)
OUT = DEFINE_path("out", written_file, "With --rules: JSON file of their effects.")


def main(argv: list[str]) -> None:
    """Parses the flags, measures, prints one table."""
    from fused_rec.data.sources.fartrans import read_prices
    from fused_rec.evaluation.ranking import mean
    from fused_rec.evaluation.result_tables import table
    from fused_rec.evaluation.suitability import check_groups
    from fused_rec.runs.run_dir import write_json
    from fused_rec.serving.recommender import load_measured
    from fused_rec.serving.write_rankings import read_rules
    from fused_rec.training.evaluate import evaluate_with_baselines, scorer
    from fused_rec.training.evaluate_rules import evaluate_rules, returns_after

    require_known(BASELINE, BASELINE_NAMES)
    require_known(METRIC, METRICS)
    if not METRIC.value:
        raise app.UsageError("--metrics is empty; leave it out, or name one or more")
    if (RULES.value is None) != (OUT.value is None):
        raise app.UsageError("--rules and --out are given together or not at all")
    if RULES.value is None and (GROUPS.value or PRICES.value):
        raise app.UsageError("--groups and --prices say more of --rules; give these too")
    rules, _ = read_rules(RULES.value) if RULES.value else ((), "")
    prices = read_prices(Path(PRICES.value)) if PRICES.value else None
    config, prepared, state = load_measured(WORKDIR.value, SPLIT.value, data_path=DATA_PATH.value, cache=CACHE.value)
    check_groups(prepared.dataset.users, GROUPS.value)
    measured = evaluate_with_baselines(config, prepared, state, SPLIT.value, BASELINE.value)
    print(f"{prepared.dataset.name}, {prepared.split.kind} split, {SPLIT.value} part")
    print(table({name: mean(per_user) for name, per_user in measured.items()}, METRIC.value))
    if RULES.value and OUT.value:
        trained = scorer(config, prepared, state)
        returns = None if prices is None else returns_after(prepared, SPLIT.value, prices, DAYS.value)
        report = evaluate_rules(prepared, trained, SPLIT.value, rules, groups=GROUPS.value, returns=returns)
        write_json(Path(OUT.value), report)
        print(f"suitable among the first 10: {json.dumps(report['suitable'])}")
        for name, cost in report["costs"].items():
            named = f"rule {name}" if name else "all rules"
            print(f"ndcg@10 that {named} costs: {cost['difference']:.4f} [{cost['low']:.4f}, {cost['high']:.4f}]")
        print(f"the rest is in {OUT.value}")
