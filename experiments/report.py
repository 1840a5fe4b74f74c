"""One HTML page about a finished run: what it was trained on, how well it ranks, for whom, and what it recommends why.

    python -m experiments.report --workdir=runs/mine
    python -m experiments.report --workdir=runs/mine --part=test --users=2,3 --rules=rules.json --groups=age_band

The file needs no network and no script. --part is measured anew, beside recommenders that need no training; the other
numbers are those of results.json. Products are recommended as by experiments.recommend. docs/EXPLANATIONS.md tells
what is on the page.
"""

from pathlib import Path

from absl import app, flags

from experiments import start
from fused_rec.explain.facts import Facts, compared, measure_models, passages, recommended, sample, sliced
from fused_rec.explain.report import page
from fused_rec.train.card import counts
from fused_rec.train.curves import read_curves
from fused_rec.train.export import read_rules
from fused_rec.train.loop import read_results, read_run
from fused_rec.train.measure import BASELINES, measure_rules, scorer
from fused_rec.train.serve import eligible, load, model_digest, user_rows
from fused_rec.train.workdir import write_file

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a finished run.", required=True)
OUT = flags.DEFINE_string("out", None, "File to write; report.html in the workdir without this flag.")
PART = flags.DEFINE_enum("part", "valid", ["valid", "test"], "Held-out part that is ranked.")
BASELINE = flags.DEFINE_list(
    "baselines", ["popularity", "item_knn"], f"Recommenders to measure beside it, of {', '.join(BASELINES)}."
)
USERS = flags.DEFINE_list("users", None, "Ids of the customers who are shown; some drawn at random without this flag.")
SAMPLE = flags.DEFINE_integer("sample", 5, "Customers to draw.", lower_bound=0)
K = flags.DEFINE_integer("k", 5, "Products a customer.", lower_bound=1)
RULES = flags.DEFINE_string("rules", None, "File of rules, JSON; see docs/SUITABILITY.md.")
GROUPS = flags.DEFINE_list("groups", [], "Attributes of customers whose groups are compared.")

SHOWN = 500  # recommendations: of the names of real tables they take less than the page may have


def main(argv: list[str]) -> None:
    """Parses the flags, measures, explains, writes."""
    if unknown := set(BASELINE.value) - set(BASELINES):
        raise app.UsageError(f"--baselines has {sorted(unknown)}; they must be of {', '.join(BASELINES)}")
    if USERS.present and not USERS.value:
        raise app.UsageError("--users is empty; leave it out to draw customers at random")
    count = len(USERS.value or range(SAMPLE.value))
    if count * K.value > SHOWN:
        raise app.UsageError(f"{count} customers with {K.value} products each; the page has room for {SHOWN} products")
    workdir = Path(WORKDIR.value)
    out = Path(OUT.value) if OUT.value else workdir / "report.html"
    if not out.parent.is_dir():
        raise app.UsageError(f"--out is in {out.parent}, which is no folder; make it first")
    write_report(workdir, out)


def write_report(workdir: Path, out: Path) -> None:
    """The page of the run in `workdir`, as the flags ask for it."""
    rules, rules_digest = read_rules(RULES.value) if RULES.value else ((), None)
    results = read_results(workdir)
    config, prepared, state = load(workdir, PART.value)
    own = config.model.variant
    measured = measure_models(config, prepared, state, PART.value, BASELINE.value, own)
    found = None
    if RULES.value:
        trained = scorer(config, prepared, state)
        found = measure_rules(prepared, trained, PART.value, rules, groups=GROUPS.value)
    models, slices = compared(measured, own), sliced(prepared, measured[own], GROUPS.value)
    if config.train.refit and PART.value == "valid":  # what is recommended comes from the model that saw more
        config, prepared, state = load(workdir)
    users = user_rows(prepared.dataset, USERS.value) if USERS.value else sample(prepared, SAMPLE.value)
    may = eligible(prepared.dataset, rules)
    digests = {"tables": read_run(workdir)["tables"], "model": model_digest(workdir)}
    facts = Facts(
        results,
        counts=counts(prepared.dataset, prepared.split),
        digests=digests | ({"rules": rules_digest} if rules_digest else {}),
        part=PART.value,
        models=models,
        curve=tuple(read_curves(workdir / "choose")),
        slices=slices,
        rules=found,
        customers=recommended(config, prepared, state, may, users, K.value, passages(config, prepared, state)),
        chosen="as named" if USERS.value else "drawn at random",
    )
    write_file(out, page(facts).encode())
    print(f"page: {out}")


if __name__ == "__main__":
    start(main)
