"""Show what changed between two finished runs: data, settings, metrics, top lists, reasons.

    python -m experiments.diff --before=runs/march --after=runs/april --out=changes
    python -m experiments.diff --before=runs/seed0 --after=runs/seed1,runs/seed2 --out=stability
    python -m experiments.diff --before=runs/mine --after=runs/mine --tables=DIR_OF_TODAY --out=today

Users and items are matched by id; metrics are compared on the users with held-out items in both runs, by pairs. Writes
diff.json, diff.md and diff.html into --out. With several runs after a comma, the first is described in full, and a
table shows how much of lists, scores and reasons stays in each. --tables serves the runs of --after with other tables,
such as those of today. docs/EXPLANATIONS.md explains the measures.
"""

from pathlib import Path

from absl import app, flags

from fused_rec.commands.places import DEFINE_path, DEFINE_served, existing_folder, new_folder

BEFORE = DEFINE_path("before", existing_folder, "Folder of the finished run to compare with.", required=True)
AFTER = flags.DEFINE_list("after", None, "Folders of finished runs that are compared with it.", required=True)
OUT = DEFINE_path("out", new_folder, "New folder to write into.", required=True)
HISTORY, TABLES = DEFINE_served()
CACHE = DEFINE_path("cache", new_folder, "Folder of cached text embeddings; those of the trainings by default.")
K = flags.DEFINE_integer("k", 10, "Items per list.", lower_bound=1)
NUM_USERS = flags.DEFINE_integer("num_users", 200, "Users whose reasons and scores are compared.", lower_bound=1)


def main(argv: list[str]) -> None:
    """Compares, writes, and prints the tables."""
    from fused_rec.api import diff, load
    from fused_rec.reporting.changes import OUTPUTS, in_words
    from fused_rec.serving.recommender import read_served_tables

    after = [Path(name).expanduser() for name in AFTER.value]
    if not after:
        raise app.UsageError("--after is empty; name at least one folder")
    for folder in after:
        if problem := existing_folder(folder):
            raise app.UsageError(f"--after has {folder}: {problem}")
    workdir, cache = BEFORE.value, CACHE.value
    dataset = read_served_tables(after[0], TABLES.value) if TABLES.value else None
    if dataset is not None and HISTORY.value != "all":
        raise app.UsageError("--tables has no training split; leave out --history=train")
    others = (load(folder, history=HISTORY.value, dataset=dataset, cache=cache) for folder in after)
    out = OUT.value
    found = diff(load(workdir, history=HISTORY.value, cache=cache), others, out, k=K.value, num_users=NUM_USERS.value)
    print(in_words(found["differences"]))
    for name in OUTPUTS:
        print(out / name)
