"""Writes twenty small sets of tables from public datasets, to measure what default settings are worth on few users.

FUSED_REC_DATA=DATASETS python tests/stress/small_tables.py OUT

Writes a folder NAME of CSV tables (docs/tables.md) for each of `TASKS`, the same each time, and OUT/tasks.json: split,
size and contents of each. docs/RESULTS.md compares methods on them.
"""

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from fused_rec.config import DataConfig
from fused_rec.data.io.writers import named
from fused_rec.data.sources.registry import load

Table = Any  # a DataFrame: by the annotations of pandas most selections may be a Series


class Task(NamedTuple):
    """A part of a dataset.

    Attributes:
      name: of the folder.
      dataset: data.name.
      split: split.kind for it.
      seed: of the draw.
      random_users: so many users, drawn after `core_before`; 0 = all.
      circle: or so many users reached over ties from one of them, breadth first; 0 = all.
      densest: so many items, those with most users; 0 = all.
      core: least interactions of a user and of an item in what is left.
      core_before: the same, before users are drawn.
      texts: of "items", and "reviews" as well; "" = none.
      ties: whether ties are written.
      times: whether times are written.
      rows: of the interactions, "sci-fi" or "liked" ones.
    """

    name: str
    dataset: str
    split: str
    seed: int
    random_users: int = 0
    circle: int = 0
    densest: int = 0
    core: tuple[int, int] = (3, 3)
    core_before: tuple[int, int] = (1, 1)
    texts: str = ""
    ties: bool = False
    times: bool = False
    rows: str = ""


TASKS = (
    Task("amazon_600users", "amazon", "per_user", 1, 600, core=(3, 2), texts="reviews", times=True),
    Task("amazon_300items", "amazon", "time", 0, densest=300, core=(2, 2), texts="reviews", times=True),
    Task("amazon_900users", "amazon", "random", 2, 900, texts="reviews"),
    Task("ml_scifi", "recbole", "random", 3, 400, core=(4, 3), rows="sci-fi"),
    Task("ml_150users", "recbole", "per_user", 4, 150, densest=800, core=(5, 3), texts="items", times=True),
    Task("ml_300users_time", "recbole", "time", 5, 300, densest=400, core=(3, 2), texts="items", times=True),
    Task("ml_liked", "recbole", "random", 6, 500, texts="items", rows="liked"),
    Task("lastfm_friends", "lastfm", "per_user", 7, circle=400, densest=500, texts="reviews", ties=True),
    Task("lastfm_ties_only", "lastfm", "random", 8, 900, densest=600, ties=True),
    Task("lastfm_names", "lastfm", "random", 9, 250, densest=800, core=(3, 2), texts="items"),
    Task("stocks_tweets", "stocknet", "time", 10, 700, 0, 300, (3, 3), (5, 5), "reviews", ties=True, times=True),
    Task("stocks_profiles", "stocknet", "per_user", 11, 500, 0, 400, (4, 2), (5, 5), "items", times=True),
    Task("stocks_circle", "stocknet", "random", 12, 0, 600, 500, (3, 2), (3, 3), "items", ties=True),
    Task("insurer_time", "insurance", "time", 13, 1500, core=(1, 1), times=True),
    Task("insurer_3products", "insurance", "per_user", 14, 1000, core=(1, 1), core_before=(3, 1), times=True),
    Task("papers_600", "citeulike_t_words", "random", 19, 2500, densest=600, texts="items"),
    Task("papers_300users", "citeulike_t_words", "per_user", 15, 300, 0, 800, (3, 2), (10, 5), "items"),
    Task("books_circle", "edges", "random", 16, circle=500, densest=700, ties=True),
    Task("epinions_circle", "epinions", "per_user", 17, circle=900, densest=800, core=(3, 2), ties=True),
    Task("places_400", "lightgcn_text", "random", 18, 1500, densest=400, core=(4, 3)),
)


def with_core(pairs: Table, least: tuple[int, int]) -> Table:
    """Drops users and items with fewer interactions, until there are none."""
    while True:
        before = len(pairs)
        for column, number in zip(("user_id", "item_id"), least, strict=True):
            pairs = pairs[pairs.groupby(column)[column].transform("size") >= number]
        if len(pairs) == before:
            return pairs


def drawn_users(pairs: Table, number: int, seed: int) -> Table:
    """The interactions of random users."""
    users = np.random.default_rng(seed).permutation(np.sort(pairs.user_id.unique()))[:number]
    return pairs[pairs.user_id.isin(users)]


def circle_of(pairs: Table, ties: Table, number: int, seed: int) -> Table:
    """The interactions of the users nearest to a random one over ties."""
    ends = ["source_id", "target_id"]
    around: Table = pd.concat([ties[ends], ties[ends[::-1]].set_axis(ends, axis=1)]).drop_duplicates()
    around = around[around.isin(set(pairs.user_id)).all(axis=1)].sort_values(ends)
    friends = around.groupby("source_id").target_id.apply(list)
    found = [np.random.default_rng(seed).choice(np.sort(friends.index.to_numpy()))]
    known = set(found)
    for user in found:
        new = [other for other in friends[user] if other not in known][: number - len(found)]
        found += new
        known |= set(new)
    return pairs[pairs.user_id.isin(known)]


def of_rows(tables: dict[str, Table], rows: str) -> Table:
    """The interactions of a task before users and items are drawn."""
    pairs, items = tables["interactions"], tables["items"]
    if rows == "sci-fi":
        return pairs[pairs.item_id.isin(items.item_id[items["class"].map(lambda classes: "Sci-Fi" in classes)])]
    return pairs[pairs.value >= 5] if rows == "liked" else pairs


def written(task: Task, tables: dict[str, Table], folder: Path) -> dict[str, Any]:
    """Writes the tables of a task, and returns its entry of tasks.json."""
    pairs = with_core(of_rows(tables, task.rows), task.core_before)
    if task.random_users:
        pairs = drawn_users(pairs, task.random_users, task.seed)
    if task.circle:
        pairs = circle_of(pairs, tables["ties"], task.circle, task.seed)
    if task.densest:
        counts = pairs.item_id.value_counts().sort_index()
        pairs = pairs[pairs.item_id.isin(counts.nlargest(task.densest).index)]
    pairs = with_core(pairs, task.core)
    users, items = pairs.user_id, pairs.item_id
    parts = {"interactions": pairs[["user_id", "item_id", *(["timestamp"] if task.times else [])]]}
    if task.texts:
        parts["items"] = tables["items"][tables["items"].item_id.isin(items)]
    if task.texts == "reviews":
        reviews = tables["reviews"]
        parts["reviews"] = reviews[reviews.user_id.isin(users) & reviews.item_id.isin(items)]
    if task.ties:
        ties = tables["ties"]
        parts["ties"] = ties[ties.source_id.isin(users) & ties.target_id.isin(users)]
        if "item_id" in ties:
            parts["ties"] = parts["ties"][parts["ties"].item_id.isin(items)]
    folder.mkdir(parents=True, exist_ok=True)
    for name, table in parts.items():
        timeless = not task.times and "timestamp" in table and name != "interactions"
        (table.drop(columns="timestamp") if timeless else table).to_csv(folder / f"{name}.csv", index=False)
    counts = {"users": users.nunique(), "items": items.nunique(), "interactions": len(pairs)}
    has = {"text": bool(task.texts), "ties": task.ties, "times": task.times}
    return {"name": task.name, "split": task.split} | counts | has


def main() -> None:
    out = Path(sys.argv[1])
    entries = []
    for task in TASKS:
        tables = {name: table.to_pandas() for name, table in named(load(DataConfig(task.dataset))).items()}
        for name, cells in tables["items"].items():  # line breaks are faults in tables that are read strictly
            tables["items"][name] = cells.map(lambda cell: " ".join(cell.split()) if isinstance(cell, str) else cell)
        entries.append(written(task, tables, out / task.name))
        print(entries[-1])
    (out / "tasks.json").write_text(json.dumps(entries, indent=1))


if __name__ == "__main__":
    main()
