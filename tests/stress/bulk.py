"""A million customers by a thousand products, ranked under rules and written: seconds and the memory it takes.

    python tests/stress/bulk.py --customers=1000000 --products=1000

Vectors, attributes and interactions are drawn. Prints the seconds of applying the rules and of ranking and writing, and
the largest resident memory before and after, which tells what the tables take and what ranking adds.
"""

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa

from fused_rec.data.dataset import Dataset, empty_reviews, empty_ties
from fused_rec.evaluation.filters import parse
from fused_rec.evaluation.suitability import exclusion_counts
from fused_rec.serving.recommender import candidate_filter, count_chunks, rank_chunks
from fused_rec.serving.write_rankings import write_rankings

RULES = (
    {"name": "risk", "require": ["item.risk", "at_most", "user.tolerance"]},
    {"name": "country", "require": ["user.country", "one_of", "item.sold_in"], "separator": ";"},
    {"name": "age", "require": ["user.age", "at_least", "item.min_age"], "allow_unknown": ["item"]},
    {"name": "accreditation", "require": ["item.open_to", "at_most", "user.kind"], "order": ["retail", "professional"]},
    {"name": "cash", "require": ["item.minimum", "at_most", "user.cash"]},
    {"name": "withdrawn", "refuse": {"items": ["P3", "P5"]}},
)
COUNTRIES = np.array(["AT", "CA", "CH", "DE", "FR", "GB", "SG"])


def market(n_users: int, n_items: int, held: int) -> Dataset:
    """Customers with five attributes, products with five limits, `held` interactions a customer."""
    rng = np.random.default_rng(0)
    users = pa.table(
        {
            "user_id": pa.array(np.char.add("C", np.arange(n_users).astype(str))),
            "tolerance": rng.integers(1, 6, n_users),
            "country": pa.array(COUNTRIES[rng.integers(0, 7, n_users)]).dictionary_encode(),
            "age": pa.array(rng.integers(16, 90, n_users), mask=rng.random(n_users) < 0.01),
            "kind": pa.array(np.array(["retail", "professional"])[(rng.random(n_users) < 0.1).astype(int)]),
            "cash": rng.lognormal(8, 2, n_users).round(2),
        }
    )
    sold = [";".join(COUNTRIES[rng.random(7) < 0.7]) for _ in range(n_items)]
    items = pa.table(
        {
            "item_id": [f"P{n}" for n in range(n_items)],
            "risk": rng.integers(1, 6, n_items),
            "sold_in": sold,
            "min_age": pa.array(np.full(n_items, 18), mask=rng.random(n_items) < 0.5),
            "open_to": np.array(["retail", "professional"])[(rng.random(n_items) < 0.2).astype(int)],
            "minimum": np.array([0, 100, 1000, 10_000])[rng.integers(0, 4, n_items)],
        }
    )
    interactions = pa.table(
        {
            "user": np.repeat(np.arange(n_users, dtype=np.int32), held),
            "item": rng.integers(0, n_items, n_users * held).astype(np.int32),
        }
    )
    return Dataset("drawn", users, items, interactions, empty_reviews(), empty_ties())


def _dot(users: jax.Array, items: jax.Array, batch: jax.Array) -> jax.Array:
    return users[batch] @ items.T


def _resident() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # GB


def main() -> None:
    """Draws, ranks, writes, prints."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--customers", type=int, default=1_000_000)
    parser.add_argument("--products", type=int, default=1000)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--held", type=int, default=5)
    parser.add_argument("--k", type=int, default=10)
    asked = parser.parse_args()
    dataset = market(asked.customers, asked.products, asked.held)
    keys = jax.random.split(jax.random.key(0))
    drawn = (
        jax.random.normal(key, (n, asked.dim)) for key, n in zip(keys, (dataset.n_users, dataset.n_items), strict=True)
    )
    scorer = jax.tree_util.Partial(_dot, *map(jnp.asarray, drawn))
    start = time.perf_counter()
    may = candidate_filter(dataset, parse(json.dumps({"rules": RULES})))
    print(f"rules applied in {time.perf_counter() - start:.1f} s; {_resident():.2f} GB resident at most so far")
    users = np.arange(dataset.n_users)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        reported = write_rankings(
            Path(folder, "ranked.parquet"),
            {},
            count_chunks(len(users)),
            lambda first: (
                (part.table, exclusion_counts(part.ranking, may.names))
                for part in rank_chunks(scorer, dataset, may, users, asked.k, first=first)
            ),
            "bulk",
        )["exclusions"]
        size = Path(folder, "ranked.parquet").stat().st_size
    seconds = time.perf_counter() - start
    print(f"{reported['ranked']:,} rankings of {reported['users']:,} customers in {seconds:.1f} s, {size / 1e6:.0f} MB")
    print(f"{_resident():.2f} GB resident at most, {jax.device_count()} {jax.default_backend()} devices")
    print(json.dumps(reported["rules"], indent=1))


if __name__ == "__main__":
    main()
