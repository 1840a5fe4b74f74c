"""A small market as a user's own tables, for tests that run the whole path."""

from pathlib import Path

import pyarrow as pa
import pyarrow.csv

from fused_rec.data.synthetic import make_market


def write_tables(folder: Path, n_users: int = 80, n_items: int = 30) -> Path:
    """Writes interactions, items, users and ties as CSV and returns the folder."""
    market = make_market(0, n_users=n_users, n_items=n_items)
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
