"""Exact ranking of all items for many users, in blocks: its cost by arithmetic, as measured, and of ten million users.

    python tests/stress/ranking.py --users=1e6 --items=1e5 [--dim=64] [--k=20] [--seen=30] [--batch=64]

Vectors and seen items are generated. Batches of users are ranked until all are, each once; the compilation is not
counted. The last line scales the measured time to 1e7 users and 1e6 items by the number of scores.
"""

import argparse
import time
from pathlib import Path

import numpy as np

WHOLE = 10_000_000, 1_000_000  # users and items


def main() -> None:
    """Prints the arithmetic and what was measured."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    defaults = {"users": "1e5", "items": "1e5", "dim": "64", "k": "20", "seen": "30", "batch": "0"}
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=lambda text: int(float(text)), default=default)
    given = parser.parse_args()

    import jax

    from fused_rec.distributed.devices import keep_memory
    from fused_rec.evaluation.item_sets import UserItemSets
    from fused_rec.evaluation.ranking import RankingSpec, rank

    keep_memory()
    rng = np.random.default_rng(0)
    users, items = (
        jax.numpy.asarray(rng.standard_normal((n, given.dim), np.float32)) for n in (given.users, given.items)
    )
    stride = given.items // given.seen  # distinct ascending items for each user
    first = rng.integers(0, stride, (given.users, 1), np.int32)
    seen = first + stride * np.arange(given.seen, dtype=np.int32)
    sets = UserItemSets(given.seen * np.arange(given.users + 1, dtype=np.int64), seen.ravel())
    spec = RankingSpec(sets, given.items, batch_size=given.batch or None)  # 0: the default
    scorer = jax.tree_util.Partial(_dot, *map(jax.numpy.asarray, (users, items)))
    rank(scorer, np.arange(2 * spec.users_at_once), spec, given.k)

    began, processor = time.perf_counter(), time.process_time()
    found = rank(scorer, np.arange(given.users), spec, given.k)
    seconds, processor = time.perf_counter() - began, time.process_time() - processor
    assert found.items.shape == (given.users, given.k) and found.items.min() >= 0
    scores, batches = given.users * given.items, -(-given.users // spec.users_at_once)
    flops = 2 * scores * given.dim
    moved = batches * given.items * given.dim * 4 + 2 * 5 * scores  # items; scores and masks, written and read
    print(f"{given.users:,} users x {given.items:,} items x {given.dim} columns, {spec.users_at_once} users at a time")
    print(f"arithmetic: {flops:.3g} FLOP, {moved:.3g} bytes if no batch stays in a cache")
    print(f"measured: {seconds:.1f} s, {processor:.1f} s of processor time, {peak()} MiB at most")
    print(
        f"  {given.users / seconds:,.0f} users/s, {scores / seconds:.3g} scores/s, {flops / seconds / 1e9:.0f} GFLOP/s"
    )
    factor = WHOLE[0] * WHOLE[1] / scores
    hours = seconds * factor / 3600
    print(f"{WHOLE[0]:,} users x {WHOLE[1]:,} items: {seconds:.1f} s x {factor:g} = {hours:.1f} h")


def peak() -> int:
    """The highest resident memory of this process, MiB; on Linux."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) // 1024


def _dot(users, items, batch):
    return users[batch] @ items.T


if __name__ == "__main__":
    main()
