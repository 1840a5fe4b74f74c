"""A small market as a user's own tables, and what makes two runs on it the same, for tests of the whole path."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv

from fused_rec.data.synthetic import make_synthetic
from fused_rec.training.checkpoint import RECORD, Checkpoints


def write_tables(folder: Path, n_users: int = 80, n_items: int = 30) -> Path:
    """Writes interactions, items, users and ties as CSV and returns the folder."""
    market = make_synthetic(0, n_users=n_users, n_items=n_items)
    users, items = market.users.column("user_id"), market.items.column("item_id")

    def named(table: pa.Table, **ids: tuple[str, pa.ChunkedArray]) -> dict:
        return {new: names.take(table.column(old)) for new, (old, names) in ids.items()}

    pairs = {"user_id": ("user", users), "item_id": ("item", items)}
    columns = {name: market.interactions.column(name) for name in ("timestamp",)}
    tables = {
        "interactions": pa.table(named(market.interactions, **pairs) | columns),
        "items": market.items,
        "users": market.users,
        "ties": pa.table(named(market.ties, source_id=("source", users), target_id=("target", users))),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, table in tables.items():
        pyarrow.csv.write_csv(table, folder / f"{name}.csv")
    return folder


def differences(workdir: Path, other: Path) -> list[str]:
    """How two finished runs differ, bit for bit, in whatever does not tell the time; empty where they do not."""
    found = []
    one, two = (json.loads((folder / "results.json").read_text()) for folder in (workdir, other))
    times = ("seconds", "finished")
    found += [f"results.json, {name}" for name in one | two if name not in times and one.get(name) != two.get(name)]
    one, two = (dict(np.load(folder / "test_metrics_per_user.npz")) for folder in (workdir, other))
    found += [f"test_metrics_per_user.npz, {name}" for name in one | two if not _same(one.get(name), two.get(name))]
    for phase in sorted(path.parent.name for path in other.glob("*/checkpoints")):
        curves = [(folder / phase / "curves.jsonl").read_text() for folder in (workdir, other)]
        found += [f"{phase}/curves.jsonl"] if curves[0] != curves[1] else []
        kept = Checkpoints(other / phase / "checkpoints")
        for step in {kept.best_step(), max(kept.steps())} - {None}:
            one, two = (arrays(folder / phase / "checkpoints", step) for folder in (workdir, other))
            found += [f"{phase}, step {step}, {name}" for name in one | two if not _same(one.get(name), two.get(name))]
    return found


def arrays(checkpoints: Path, step: int) -> dict[str, np.ndarray]:
    """Every leaf of a checkpoint by its name; empty where there is none."""
    if step not in Checkpoints(checkpoints).steps():
        return {}
    leaves = json.loads((checkpoints / str(step) / RECORD).read_text())["leaves"]
    like = {name: np.zeros(leaf["shape"], leaf["dtype"]) for name, leaf in leaves.items()}
    return Checkpoints(checkpoints).restore(step, like)[0]


def _same(one: np.ndarray | None, other: np.ndarray | None) -> bool:
    if one is None or other is None:
        return False
    return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()
