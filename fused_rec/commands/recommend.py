"""Recommend items to users with a finished run, under suitability rules.

    python -m experiments.recommend --workdir=runs/lastfm --users=2,3 --k=10 --out=ranked.csv
    python -m experiments.recommend --workdir=runs/mine --rules=rules.json --out=ranked.parquet
    python -m experiments.recommend --workdir=runs/mine --tables=DIR_OF_TODAY --out=ranked.csv
    python -m experiments.recommend --workdir=runs/mine --users_file=USERS --where="fee < 1" --out=ranked.csv
    python -m experiments.recommend --workdir=runs/mine --index=ivf --recall=.98 --out=ranked.parquet

Writes CSV or Parquet, by the name's ending: user_id, rank (from 1), item_id, score, the items' name where they have
one, and with --names the users' as user_name; and beside it OUT.audit.json: hashes of model, tables and rules, filters,
what the model uses of the tables, and the exclusions of each rule. It uses all rows, held-out ones too; with
--history=train those it was trained on. --tables serves other tables (docs/commands.md). docs/SUITABILITY.md describes
rules. Items that the user has interacted with, in any split, are excluded unless --include_seen.

--users_file and --items_file have one id a line, or are CSV or Parquet with a column user_id or item_id. --items_file
and --where restrict what may be recommended; --where compares columns of the items with values (==, !=, <, <=, >, >=,
in [...], not in [...]), joined by and, or and not.

Users are ranked and written in chunks: memory does not grow with the number of rankings, and the same command resumes
after an interruption. Parquet has the ids unchanged; in CSV an id or name that a spreadsheet would read as a formula,
or that begins with ', is prefixed by ' (fused_rec/data/io/csv_safety.py).

--index=ivf, for catalogues of many thousand items, compares each user with a part of the items only and tells the
recall that this had on a sample of the users (docs/commands.md); it needs the extra faiss.

--explain writes reasons.jsonl beside the file: for each of its rows, in its order, the contributions that sum to the
score and reasons as sentences (fused_rec/explanation/reasons.py), after all rankings are written. --language chooses
that of the sentences. --sets adds the smallest set without which the item would leave the list, and --words the words
of the texts with the largest attributions (docs/EXPLANATIONS.md). Other customers are named only with --user_ids.
"""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from absl import app, flags

from fused_rec.commands.launch import command
from fused_rec.commands.places import (
    DEFINE_language,
    DEFINE_path,
    DEFINE_rules,
    DEFINE_run,
    DEFINE_served,
    existing_file,
    written_file,
)

WORKDIR, DATA_PATH, CACHE = DEFINE_run()
HISTORY, TABLES = DEFINE_served()
USERS = flags.DEFINE_list("users", None, "User ids; all users by default.")
USERS_FILE = DEFINE_path("users_file", existing_file, "File of user ids: one a line, or with a column user_id.")
ITEMS_FILE = DEFINE_path("items_file", existing_file, "File of item ids that may be recommended; all by default.")
WHERE = flags.DEFINE_string("where", None, "Condition on columns of the items, such as: type == 'fund' and fee < 1.")
NAMES = flags.DEFINE_bool("names", False, "Also write the users' names.")
K = flags.DEFINE_integer("k", 10, "Items per user.", lower_bound=1)
OUT = DEFINE_path("out", written_file, "File to write, .csv or .parquet.", required=True)
RULES = DEFINE_rules()
INDEX = flags.DEFINE_enum("index", None, ["ivf"], "Rank approximately, by an inverted file. None: exactly.")
RECALL = flags.DEFINE_float(
    "recall", 0.95, "With --index: share of the exact lists that is to be found.", lower_bound=0.01, upper_bound=1
)
EXPLAIN = flags.DEFINE_bool("explain", False, "Write reasons.jsonl beside the file.")
LANGUAGE = DEFINE_language()
SETS = flags.DEFINE_bool("sets", False, "With --explain: what each item would leave the list without; takes seconds.")
WORDS = flags.DEFINE_bool("words", False, "With --explain: the words of the texts that count most.")
USER_IDS = flags.DEFINE_bool("user_ids", False, "With --explain: name other users in parts by their ids.")
INCLUDE_HELD = flags.DEFINE_bool("include_seen", False, "Also rank items that the user has interacted with.")


def _listed(file: Path | None, known: Any, column: str) -> list[str] | None:
    """Reads a file of ids that are in the tables."""
    from fused_rec.data.io.id_lists import read_ids

    remedy = f"correct it, or serve tables that have this {column}: --tables=DIR"
    return None if file is None else read_ids(Path(file), column, known, remedy)


def _checked_out() -> Path:
    """Refuses flags that do not go together, and returns the file to write."""
    from fused_rec.serving.write_rankings import WRITERS

    if USERS.present and not USERS.value:
        raise app.UsageError("--users is empty; leave it out to rank for all customers")
    if USERS.present and USERS_FILE.value:
        raise app.UsageError("--users and --users_file are both given; drop one")
    if not EXPLAIN.value and (
        unused := [f"--{flag.name}" for flag in (LANGUAGE, SETS, WORDS, USER_IDS) if flag.present]
    ):
        raise app.UsageError(f"{', '.join(unused)} without --explain; give it too, or drop {unused[0]}")
    if RECALL.present and not INDEX.value:
        raise app.UsageError("--recall without --index; exact rankings miss nothing, so drop it, or give --index=ivf")
    if INDEX.value:
        from fused_rec.serving.approximate import open_faiss

        open_faiss("--index=ivf")
    out = Path(OUT.value)
    if out.suffix not in WRITERS:
        raise app.UsageError(f"--out is {out.name}; it must end in one of {', '.join(WRITERS)}")
    return out


def _chunks(model: Any, may: Any, users: Any, inputs: dict[str, Any]) -> Callable[[int], Iterator[Any]]:
    """Returns what ranks from a chunk on; of an index, `inputs` gets what was measured."""
    from fused_rec.serving.approximate import build_index, rank_chunks_with, with_recall
    from fused_rec.serving.recommender import rank_chunks
    from fused_rec.training.evaluate import scorer, user_item_vectors

    scores, dataset = scorer(*model), model[1].dataset
    if not INDEX.value:
        return lambda first: rank_chunks(scores, dataset, may, users, K.value, first=first)
    built = build_index(scores, *user_item_vectors(*model), may)
    index, inputs["index"] = with_recall(built, users, K.value, RECALL.value)
    return lambda first: rank_chunks_with(index, dataset, users, K.value, first=first)


def _print_exclusions(exclusions: dict[str, Any]) -> None:
    among = " among the products that were compared" if INDEX.value else ""
    for name, counts in exclusions["rules"].items():
        print(
            f"rule {name}: excludes {counts['excluded']} pairs{among}, "
            f"{counts['excluded_only_by_rule']} of them alone, "
            f"and {counts['excluded_from_topk']} of the {exclusions['top']} products ranked without rules"
        )


def main(argv: list[str]) -> None:
    """Parses the flags, ranks, writes, tells what the rules excluded."""
    from fused_rec.commands.written_reasons import REASONS
    from fused_rec.explanation.catalogs import open_catalog
    from fused_rec.explanation.decomposition import require_trained
    from fused_rec.explanation.token_attribution import require_text
    from fused_rec.serving import recommender
    from fused_rec.serving.write_rankings import read_rules

    out, catalog = _checked_out(), open_catalog(LANGUAGE.value)
    rules, rules_digest = read_rules(RULES.value) if RULES.value else ((), None)
    other = recommender.read_served_tables(WORKDIR.value, TABLES.value) if TABLES.value else None
    folders = {"data_path": DATA_PATH.value, "cache": CACHE.value}
    model = recommender.load(WORKDIR.value, HISTORY.value, dataset=other, **folders)
    if EXPLAIN.value:
        require_trained(model[0])
    if WORDS.value:
        require_text(model[0])
    dataset = model[1].dataset
    items = _listed(ITEMS_FILE.value, dataset.items["item_id"], "item_id")
    among = recommender.candidate_items(dataset, items, WHERE.value)
    may = recommender.candidate_filter(dataset, rules, include_seen=INCLUDE_HELD.value, items=among)
    users = _listed(USERS_FILE.value, dataset.users["user_id"], "user_id") or USERS.value
    inputs = {
        "rules": rules_digest,
        "candidates": "all" if among is None else hashlib.sha256(among.tobytes()).hexdigest(),
    }
    out.with_name(REASONS).unlink(missing_ok=True)  # it would tell of other rankings
    exclusions = _write_ranked(out, model, may, recommender.user_rows(dataset, users), inputs)
    if EXPLAIN.value:
        print(f"reasons: {_write_reasons(out, model, may, exclusions['recommendations'], catalog)}")
    if exclusions["users_with_short_list"]:
        print(
            f"{exclusions['users_with_short_list']} customers have fewer than {K.value}, "
            f"{exclusions['users_without_recommendations']} of them none"
        )


def _write_ranked(out: Path, model: Any, may: Any, users: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """Writes the file and its audit, and prints what the rules excluded.

    Args:
      out: the file.
      model: config, inputs and state of the run.
      may: filter of the candidates.
      users: int [U], rows of the users.
      inputs: what the audit tells of rules and candidates.

    Returns:
      The exclusions that the audit has.
    """
    from fused_rec.data.dataset import digest
    from fused_rec.evaluation.suitability import exclusion_counts
    from fused_rec.runs.model_card import describe_served
    from fused_rec.serving.recommender import CHUNK_USERS, count_chunks, model_digest, with_user_names
    from fused_rec.serving.write_rankings import write_rankings

    _, prepared, _ = model
    inputs = inputs | {
        "model": model_digest(WORKDIR.value),
        "tables": digest(prepared.dataset),
        "served": prepared.served(),
        "customers": hashlib.sha256(users.tobytes()).hexdigest(),
        "k": K.value,
        "include_seen": INCLUDE_HELD.value,
        "where": WHERE.value,
        "names": NAMES.value,
        "part": CHUNK_USERS,
    }

    chunks = _chunks(model, may, users, inputs)

    def ranked(first: int) -> Iterator[tuple[Any, dict[str, Any]]]:
        for part in chunks(first):
            table = with_user_names(part.table, prepared.dataset) if NAMES.value else part.table
            yield table, exclusion_counts(part.ranking, may.names)

    exclusions = write_rankings(out, inputs, count_chunks(len(users)), ranked, command())["exclusions"]
    _print_exclusions(exclusions)
    print(f"ranked with {describe_served(prepared.served())}")
    if INDEX.value:
        from fused_rec.serving.approximate import describe_recall

        print(describe_recall(inputs["index"]))
    print(
        f"{exclusions['recommendations']} recommendations for "
        f"{exclusions['users'] - exclusions['users_without_recommendations']} customers in {out}"
    )
    return exclusions


def _write_reasons(out: Path, model: Any, may: Any, rows: int, catalog: Any) -> Path:
    """Writes the reasons of so many rows of the file, in the catalog's language."""
    from fused_rec.commands.written_reasons import write_reasons
    from fused_rec.explanation.explained_model import explained_model
    from fused_rec.explanation.reasons import Content
    from fused_rec.explanation.token_attribution import attributor

    config, prepared, state = model
    words = attributor(config, state.params, prepared) if WORDS.value else None
    content = Content(catalog, USER_IDS.value, K.value if SETS.value else 0, may)
    return write_reasons(explained_model(config, state.params, prepared), out, rows, content, words)
