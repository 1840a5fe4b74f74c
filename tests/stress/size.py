"""A model over a whole generated graph of up to 1e8 pairs: memory by arithmetic and as measured, and seconds.

    python tests/stress/size.py --pairs=1e5,1e6,1e7 [--variant=fused] [--user_ids] [--edge_dropout=.5] [--steps=3]

About 50 pairs a user and 500 an item, items by a power law. Each size is a process of its own: it generates the pairs,
builds the graph, takes steps, embeds all nodes while the state is there, measures recall of one held-out item of 2,000
users, and ranks 10 items for as many. A step of `lightgcn` has 2,048 users with one positive and one negative item; of
`fused` 512 users with up to 64 positives, a softmax over all items, text features of items in 64 columns, no user IDs
(as in config `tables`, but for --user_ids) and no late fusion. The memory is the highest of the process to its last
step, and in the next column to its end. The expected one is what it has after its imports and steps on two tiny graphs,
and the arithmetic of docs/SCALE.md to the last step.
"""

import argparse
import dataclasses
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
USERS_A_PAIR, ITEMS_A_PAIR, POWER = 1 / 50, 1 / 500, 2.2
BLOCK = 2**17  # users whose pairs are drawn at a time
SAMPLE = 2_000  # users with a held-out item
TEXT_WIDTH = 64  # of `fused`
ROWS = {"lightgcn": 4, "fused": 8}  # of a node in a step of three layers
MIB = 2**20


def expected(arguments: argparse.Namespace, pairs: int, users: int, items: int) -> int:
    """Bytes of a run to its last step: the arithmetic of docs/SCALE.md.

    A pair: two int32 as given, and an int64 by which negatives are drawn; in each direction a sender, a weight and a
    place in the order by sender; with edge dropout four weights. A node: six degrees, two row starts; its embedding and
    two moments, if it has one, and the rows of a step. An item: columns of text.
    """
    nodes, row, fused = users + items, 4 * arguments.dim, arguments.variant == "fused"
    embedded = items + users * (arguments.user_ids or not fused)
    text = 4 * (items * TEXT_WIDTH if fused else nodes)
    of_pair = 8 + 8 + 2 * 12 + 16 * (arguments.edge_dropout > 0)
    return pairs * of_pair + nodes * 4 * 8 + text + row * (3 * embedded + ROWS[arguments.variant] * nodes)


def main() -> None:
    """Prints one row a size."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--pairs", default="1e5,1e6,1e7")
    parser.add_argument("--variant", choices=("lightgcn", "fused"), default="lightgcn")
    parser.add_argument("--user_ids", action="store_true", help="of fused: users have ID embeddings")
    parser.add_argument("--edge_dropout", type=float, default=0.0, help="of fused")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--num_layers", type=int, default=3)
    parser.add_argument("--alone", action="store_true", help="measure in this process")
    arguments = parser.parse_args()
    if arguments.alone:
        measure(arguments, int(float(arguments.pairs)))
        return
    columns = "expected MiB  measured MiB  to the end  load s  step s  ns/pair  embed s  rank users/s"
    print(f"      pairs    users   items  {columns}", flush=True)
    names = "variant", "edge_dropout", "steps", "dim", "num_layers"
    given = [f"--{name}={getattr(arguments, name)}" for name in names] + ["--user_ids"] * arguments.user_ids
    for pairs in arguments.pairs.split(","):
        subprocess.run([sys.executable, __file__, *given, f"--pairs={pairs}", "--alone"], check=True, cwd=ROOT)


def generate(pairs: int):
    """Distinct pairs ascending by (user, item), int32 each, and the numbers of users and items."""
    import numpy as np

    rng = np.random.default_rng(0)
    n_users, n_items = int(pairs * USERS_A_PAIR), int(pairs * ITEMS_A_PAIR)
    users, items = [], []
    for first in range(0, n_users, BLOCK):
        count = min(BLOCK, n_users - first)
        user = np.repeat(np.arange(count), int(1 / USERS_A_PAIR))
        item = (n_items * rng.random(len(user)) ** POWER).astype(np.int64)
        user, item = np.divmod(np.unique(user * n_items + item), n_items)
        users.append((user + first).astype(np.int32))
        items.append(item.astype(np.int32))
    return np.concatenate(users), np.concatenate(items), n_users, n_items


def inputs(user, item, n_users: int, n_items: int, text_width: int):
    """Graph inputs on the host, with random text features of items; the pairs are theirs to keep or not."""
    import numpy as np

    from fused_rec.graph.build import bidirectional_edges
    from fused_rec.graph.device_graph import device_graph
    from fused_rec.graph.hetero import hetero_graph
    from fused_rec.graph.schema import INTERACTED_BY, INTERACTS, ITEM, NO_TEXT_DIM, USER
    from fused_rec.training.train_step import GraphInputs

    counts = {USER: n_users, ITEM: n_items}
    relations = bidirectional_edges(INTERACTS, INTERACTED_BY, user, item, counts)
    text = np.zeros((n_users + n_items, text_width), np.float32)
    if text_width > NO_TEXT_DIM:
        text[n_users:] = np.random.default_rng(2).standard_normal((n_items, text_width), np.float32)
        text[n_users:] /= np.linalg.norm(text[n_users:], axis=1, keepdims=True)
    graph = hetero_graph(counts, relations, text)
    del relations
    held = np.bincount(item, minlength=n_items)
    return GraphInputs(device_graph(graph), held > 0, held.astype(np.float32))


def batches(config, user, item, sizes, count: int):
    """Batches of the config's users and positives, as training draws them."""
    import numpy as np

    from fused_rec.data.batches import batch, user_items

    settings = {name: getattr(config.train, name) for name in ("seed", "batch_size", "positives_per_user")}
    settings["num_negatives"] = 1 if config.train.loss == "bpr" else config.train.num_negatives
    of_users = user_items(user, item, sizes[0], np.bincount(item, minlength=sizes[1]) > 0)
    for step in range(count):
        yield batch(of_users, step, **settings)


def train(config, user, item, sizes, steps: int):
    """Takes steps; returns the state and inputs on the device, seconds of loading, and of each step but the first."""
    import jax

    from fused_rec.graph.schema import NO_TEXT_DIM
    from fused_rec.training.sharding import parallel_train_step, shard_graph_inputs, shard_state
    from fused_rec.training.train_step import init

    began = time.perf_counter()
    given = inputs(user, item, *sizes, text_width=TEXT_WIDTH if config.model.uses_text else NO_TEXT_DIM)
    state, given = shard_state(init(config, given)), shard_graph_inputs(given)
    load, step, seconds = time.perf_counter() - began, parallel_train_step(config), []
    for users in batches(config, user, item, sizes, count=steps + 1):
        began = time.perf_counter()
        state, metrics = jax.block_until_ready(step(state, given, users))
        seconds.append(time.perf_counter() - began)
    print(f"loss {float(metrics['loss']):.6f}", file=sys.stderr)
    return state, given, load, seconds[1:]


def ranked(vectors, user, item, held_out, n_items: int) -> float:
    """Users per second of ranking and of metrics; prints the recall of the held-out items."""
    import jax
    import numpy as np

    from fused_rec.evaluation.item_sets import item_sets
    from fused_rec.evaluation.ranking import RankingSpec, evaluate, mean, rank

    rows, items = held_out
    counts = np.searchsorted(user, rows), np.searchsorted(user, rows, "right")
    seen = np.concatenate([np.arange(*ends) for ends in zip(*counts, strict=True)])
    names = np.repeat(np.arange(len(rows)), counts[1] - counts[0])
    spec = RankingSpec(item_sets(names, item[seen], len(rows)), n_items)
    scorer = jax.tree_util.Partial(_dot, vectors[0][rows], vectors[1])
    for _ in range(2):  # the first compiles
        began = time.perf_counter()
        rank(scorer, np.arange(len(rows)), spec, 10)
        seconds = time.perf_counter() - began
    truth = item_sets(np.arange(len(rows)), items, len(rows))
    found = mean(evaluate(scorer, spec, truth, item_counts=np.bincount(item[seen], minlength=n_items), ks=(20,)))
    print(f"recall@20 of {len(rows):,} users {found['recall@20']:.4f}", file=sys.stderr)
    return len(rows) / seconds


def _dot(users, items, batch):
    return users[batch] @ items.T


def hold_out(user, item, n_users: int):
    """Splits off one pair of each of `SAMPLE` users; returns the others, and those users and their items."""
    import numpy as np

    start = np.searchsorted(user, np.arange(n_users + 1))
    rows = np.flatnonzero(np.diff(start) > 1)
    rows = rows[:: max(len(rows) // SAMPLE, 1)][:SAMPLE]
    places = start[rows] + np.diff(start)[rows] // 2
    taken = rows, item[places]
    return np.delete(user, places), np.delete(item, places), taken


def memory(name: str) -> float:
    """VmRSS or VmHWM of this process, MiB."""
    return int(re.findall(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))[0]) / 1024


def measure(arguments: argparse.Namespace, pairs: int) -> None:
    """One row, of this process."""
    sys.path.insert(0, str(ROOT))
    from fused_rec.distributed.devices import keep_memory

    keep_memory()
    from fused_rec.training.sharding import parallel_embed_nodes

    config = config_of(arguments)
    for few in (10_000, 20_000):  # a compiled program stays, and each size has its own
        tiny = generate(few)
        train(config, *tiny[:2], tiny[2:], 1)
    before = memory("VmHWM")
    user, item, *sizes = generate(pairs)
    user, item, held_out = hold_out(user, item, sizes[0])
    state, given, load, seconds = train(config, user, item, sizes, arguments.steps)
    peak, step = memory("VmHWM"), statistics.median(seconds)
    began = time.perf_counter()
    vectors = tuple(map(_on_host, parallel_embed_nodes(config)(state.params, given)))
    embed = time.perf_counter() - began
    rate = ranked(vectors, user, item, held_out, sizes[1])
    law = before + expected(arguments, len(user), *sizes) / MIB
    print(
        f"{len(user):11,} {sizes[0]:8,} {sizes[1]:7,} {law:13,.0f} {peak:13,.0f} {memory('VmHWM'):11,.0f} {load:7.1f} "
        f"{step:7.3f} {1e9 * step / len(user):8.0f} {embed:8.2f} {rate:14,.0f}",
        flush=True,
    )


def config_of(arguments: argparse.Namespace):
    """The config that is measured."""
    from fused_rec.config import Config
    from fused_rec.studies.variants import variant

    config = variant(Config(), arguments.variant)
    settings = {"dim": arguments.dim, "num_layers": arguments.num_layers}
    if arguments.variant == "fused":
        settings |= {"user_id_embedding": arguments.user_ids, "edge_dropout": arguments.edge_dropout}
    step = {} if arguments.variant == "fused" else {"batch_size": 2048, "positives_per_user": 1}
    parts = {"model": settings, "train": step}
    return dataclasses.replace(config, **{k: dataclasses.replace(getattr(config, k), **v) for k, v in parts.items()})


def _on_host(x):
    import numpy as np

    return np.asarray(x)


if __name__ == "__main__":
    main()
