"""Write an HTML report of a finished run: data, metrics, group differences, recommendations and explanations.

    python -m experiments.report --workdir=runs/mine
    python -m experiments.report --workdir=runs/mine --split=test --users=2,3 --rules=rules.json --groups=age_band

The file needs no network and no script. --split is evaluated again, together with baselines; the other numbers are
those of results.json. --previous names the run before, from which the page shows what changed, and --compared_runs
other runs (another seed, a refit, other data): a reason that does not survive there is marked as weak. --card writes
rules, gaps between groups, stability and changes into the model card too. Items are recommended as by
experiments.recommend, also with --history and --tables.
docs/EXPLANATIONS.md describes the page.
"""

from pathlib import Path

from absl import app, flags

from fused_rec.commands.places import (
    DEFINE_baselines,
    DEFINE_language,
    DEFINE_path,
    DEFINE_rules,
    DEFINE_run,
    DEFINE_served,
    DEFINE_split,
    existing_folder,
    require_known,
    written_file,
)
from fused_rec.config import BASELINE_NAMES

WORKDIR, DATA_PATH, CACHE = DEFINE_run()
HISTORY, TABLES = DEFINE_served()
OUT = DEFINE_path("out", written_file, "File to write; report.html in the workdir by default.")
SPLIT = DEFINE_split()
BASELINE = DEFINE_baselines(BASELINE_NAMES, default=["popularity", "item_knn"])
USERS = flags.DEFINE_list("users", None, "Ids of the users to show; a random sample by default.")
NUM_USERS = flags.DEFINE_integer("num_users", 5, "Size of the random sample of users.", lower_bound=0)
K = flags.DEFINE_integer("k", 5, "Items per user.", lower_bound=1)
RULES = DEFINE_rules()
LANGUAGE = DEFINE_language()
GROUPS = flags.DEFINE_list("groups", [], "User attributes whose groups are compared.")
NAMES = flags.DEFINE_bool("names", False, "Show the users' names, and not their ids alone.")
PREVIOUS = DEFINE_path("previous", existing_folder, "Folder of the run before, from which changes are shown.")
COMPARED = flags.DEFINE_list("compared_runs", [], "Folders of other runs, in which reasons survive or not.")
CARD = flags.DEFINE_bool("card", False, "Also write what a reviewer asks into the model card.")

SHOWN = 500  # recommendations: of the names of real tables they take less than the page may have


def main(argv: list[str]) -> None:
    """Parses the flags, measures, explains, writes."""
    from fused_rec.api import report
    from fused_rec.serving.recommender import read_served_tables

    require_known(BASELINE, BASELINE_NAMES)
    if USERS.present and not USERS.value:
        raise app.UsageError("--users is empty; leave it out to draw customers at random")
    count = len(USERS.value or range(NUM_USERS.value))
    if count * K.value > SHOWN:
        raise app.UsageError(f"{count} customers with {K.value} products each; the page has room for {SHOWN} products")
    for folder in COMPARED.value:
        if problem := existing_folder(Path(folder).expanduser()):
            raise app.UsageError(f"--compared_runs has {folder}: {problem}")
    workdir = WORKDIR.value
    out = OUT.value or workdir / "report.html"
    if problem := written_file(out):
        raise app.UsageError(f"{out}: {problem}; --out names another file")
    made = report(
        workdir,
        out,
        split=SPLIT.value,
        baselines=BASELINE.value,
        users=USERS.value,
        num_users=NUM_USERS.value,
        k=K.value,
        rules=RULES.value,
        groups=GROUPS.value,
        names=NAMES.value,
        previous=PREVIOUS.value,
        compared_runs=[Path(folder).expanduser() for folder in COMPARED.value],
        card=CARD.value,
        language=LANGUAGE.value,
        history=HISTORY.value,
        dataset=read_served_tables(workdir, TABLES.value) if TABLES.value else None,
        data_path=DATA_PATH.value,
        cache=CACHE.value,
    )
    print(f"page: {made}")
