"""Measure a finished run again, beside recommenders that need no training, or under rules of who may get what.

    python -m experiments.evaluate --workdir=runs/lastfm --split=valid --baselines=popularity,item_knn,ease
    python -m experiments.evaluate --workdir=runs/mine --split=test --rules=rules.json --groups=age_band --out=rules.out

With --rules, --out gets as JSON how much of the lists is suitable, what each rule excludes and costs, what was earned
where --prices are given, and how far groups of customers are apart; docs/SUITABILITY.md explains each number.
"""

import json
from pathlib import Path

from absl import app, flags

from fused_rec.commands.places import (
    FINISHED,
    KEPT,
    MOVED,
    RULES_FILE,
    DEFINE_path,
    existing_file,
    existing_folder,
    new_folder,
    written_file,
)
from fused_rec.config import METRICS
from fused_rec.data.sources.fartrans import read_prices
from fused_rec.evaluation.significance import table
from fused_rec.evaluation.suitability import check_groups
from fused_rec.serving.recommender import load
from fused_rec.serving.write_rankings import read_rules
from fused_rec.training.evaluate import (
    BASELINES,
    baseline,
    choose_settings,
    evaluate_mean,
    evaluate_rules,
    scorer,
)
from fused_rec.training.inputs import prepare, with_pretrained_text
from fused_rec.training.trainer import write_json

WORKDIR = DEFINE_path("workdir", existing_folder, FINISHED, required=True)
DATA_PATH = DEFINE_path("data_path", existing_folder, MOVED)
CACHE = DEFINE_path("cache", new_folder, KEPT)
SPLIT = flags.DEFINE_enum("split", "valid", ["valid", "test"], "Held-out part that is ranked.")
BASELINE = flags.DEFINE_list("baselines", [], f"Recommenders to measure beside it, of {', '.join(BASELINES)}.")
METRIC = flags.DEFINE_list("metrics", ["recall@10", "ndcg@10", "auc"], f"Columns, of {', '.join(METRICS)}.")
RULES = DEFINE_path("rules", existing_file, RULES_FILE)
GROUPS = flags.DEFINE_list("groups", [], "With --rules: attributes of customers whose groups are compared.")
PRICES = DEFINE_path("prices", existing_file, "With --rules: CSV of ISIN, timestamp, closePrice, as FAR-Trans has it.")
DAYS = flags.DEFINE_integer("days", 180, "With --prices: days over which a return is counted.", lower_bound=1)
OUT = DEFINE_path("out", written_file, "With --rules: file for what they do, JSON.")


def main(argv: list[str]) -> None:
    """Parses the flags, measures, prints one table."""
    for flag, known in ((BASELINE, tuple(BASELINES)), (METRIC, METRICS)):
        if unknown := set(flag.value) - set(known):
            raise app.UsageError(f"--{flag.name} has {sorted(unknown)}; they must be of {', '.join(known)}")
    if not METRIC.value:
        raise app.UsageError("--metrics is empty; leave it out, or name one or more")
    if (RULES.value is None) != (OUT.value is None):
        raise app.UsageError("--rules and --out are given together or not at all")
    if RULES.value is None and (GROUPS.value or PRICES.value):
        raise app.UsageError("--groups and --prices say more of --rules; give these too")
    rules, _ = read_rules(RULES.value) if RULES.value else ((), "")
    prices = read_prices(Path(PRICES.value)) if PRICES.value else None
    config, prepared, state = load(WORKDIR.value, SPLIT.value, data_path=DATA_PATH.value, cache=CACHE.value)
    check_groups(prepared.dataset.users, GROUPS.value)
    # The words and ties of a refitted run tell of the validation part, on which settings are chosen.
    seen = with_pretrained_text(prepared)
    alone = prepare(config, prepared.dataset, prepared.split) if BASELINE.value and config.train.refit else seen
    rows = {}
    for name in BASELINE.value:
        made = baseline(name, seen, choose_settings(name, alone))
        rows[name] = evaluate_mean(prepared, made, SPLIT.value)
    rows[config.model.variant] = evaluate_mean(prepared, scorer(config, prepared, state), SPLIT.value)
    print(f"{prepared.dataset.name}, {prepared.split.kind} split, {SPLIT.value} part")
    print(table(rows, METRIC.value))
    if RULES.value and OUT.value:
        trained = scorer(config, prepared, state)
        about = {"groups": GROUPS.value, "prices": prices, "days": DAYS.value}
        report = evaluate_rules(prepared, trained, SPLIT.value, rules, **about)
        write_json(Path(OUT.value), report)
        print(f"suitable among the first 10: {json.dumps(report['suitable'])}")
        for name, cost in report["costs"].items():
            named = f"rule {name}" if name else "all rules"
            print(f"ndcg@10 that {named} costs: {cost['difference']:.4f} [{cost['low']:.4f}, {cost['high']:.4f}]")
        print(f"the rest is in {OUT.value}")
