"""What each of several devices has of a training step, of its state and of its memory.

    python tests/stress/sharding.py [--devices=1,2,4,8] [--out=shares.json]

Compiles the step for one device and for several simulated ones, and runs nothing. On a graph as large as Gowalla's, for
the graph alone and with texts, it prints each device's flops and bytes accessed (XLA's own cost analysis of the
compiled program, plain segment sums, of which it sees every operation) and bytes of state (parameters, moments, texts,
edges). On graphs of LightGCN with many users and few items it prints the bytes of arguments and of temporary buffers
(XLA's memory analysis): of the larger graph in all, for each user (the difference of two graphs), and the largest array
that the program names, in rows of 64 columns.
"""

import argparse
import dataclasses
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

USERS, ITEMS, PAIRS = 29_858, 40_981, 810_128  # of the training part as LightGCN published it
WORDS = 640  # columns of text: MiniLM's and TF-IDF's
DIM = 64
BATCH, POSITIVES = 2_048, 16
MANY_USERS, FEW_ITEMS, PAIRS_A_USER = (100_000, 200_000), 2_000, 10


def main() -> None:
    """Prints one row a variant and device count, and one a device count."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--devices", default="1,2,4,8")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    counts = [int(count) for count in arguments.devices.split(",")]
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={max(counts)}"
    sys.path.insert(0, str(Path(__file__).parents[2]))
    rows = [row for variant, words in (("graph", 1), ("fused", WORDS)) for row in shares(variant, words, counts)]
    print("devices  arguments MB  temporary MB  bytes a user  largest array, rows", flush=True)
    rows += [user_rows(devices) for devices in counts]
    if arguments.out:
        arguments.out.write_text(json.dumps(rows, indent=1))


def shares(variant: str, words: int, counts: list[int]) -> list[dict[str, Any]]:
    """Costs of each device, beside those of one alone."""
    from fused_rec.config import Config, ModelConfig, TrainConfig

    model: Any = {"variant": variant, "dim": DIM, "num_layers": 3, "edge_dropout": 0.5}
    config = Config(model=ModelConfig(**model), train=TrainConfig(batch_size=BATCH, positives_per_user=POSITIVES))
    rows, alone = [], {}
    for devices in counts:
        program, kept = compiled(config, words, devices, generate(USERS, ITEMS, PAIRS), "segment")
        cost = program.cost_analysis()
        each = {"flops": cost["flops"], "bytes accessed": cost["bytes accessed"], "bytes of state": float(kept)}
        alone = alone or each
        for what, value in each.items():
            rows.append({"variant": variant, "devices": devices, "of": what, "each": value})
            print(f"{variant:6} {devices} {what:15} {value:10.3g}  {value / alone[what]:.3f}", flush=True)
    return rows


def user_rows(devices: int) -> dict[str, Any]:
    """Memory of each device with many users."""
    from fused_rec.config import Config
    from fused_rec.studies.variants import variant

    config, found = variant(Config(), "lightgcn"), []
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, dim=DIM, num_layers=3))
    for users in MANY_USERS:
        pairs = generate(users, FEW_ITEMS, users * PAIRS_A_USER)
        program, _ = compiled(config, 1, devices, pairs)
        found.append((program.memory_analysis(), program.as_text()))
    (less, _), (more, text) = found
    sizes = [m.argument_size_in_bytes + m.temp_size_in_bytes for m in (less, more)]
    of_user = (sizes[1] - sizes[0]) / (MANY_USERS[1] - MANY_USERS[0])
    largest = max(int(rows) for rows in re.findall(rf"f32\[(\d+),{DIM}\]", text))
    megabytes = more.argument_size_in_bytes / 1e6, more.temp_size_in_bytes / 1e6
    print(f"{devices:7} {megabytes[0]:13.1f} {megabytes[1]:13.1f} {of_user:13.1f} {largest:20,}", flush=True)
    return {"devices": devices, "megabytes": megabytes, "bytes a user": of_user, "largest array": largest}


def generate(users: int, items: int, count: int):
    """Distinct pairs of which few users and items hold most, and the numbers of both."""
    import numpy as np

    rng = np.random.default_rng(0)
    drawn = [(n * rng.random(count * 5 // 4) ** 2).astype(np.int64) for n in (users, items)]
    pairs = rng.permutation(np.unique(np.stack(drawn, axis=1), axis=0))[:count]
    return pairs, users, items


def compiled(config: Any, words: int, devices: int, market: tuple, backend: Any = None) -> tuple[Any, int]:
    """The compiled step, and the bytes of state of one device."""
    import jax
    import numpy as np

    from fused_rec.data.batches import Batch
    from fused_rec.graph.build import bidirectional_edges
    from fused_rec.graph.device_graph import device_graph
    from fused_rec.graph.hetero import hetero_graph
    from fused_rec.graph.schema import INTERACTED_BY, INTERACTS, ITEM, USER
    from fused_rec.training.sharding import parallel_train_step, shard_batch, shard_graph_inputs, shard_state
    from fused_rec.training.train_step import GraphInputs, init

    pairs, users, items = market
    counts = {USER: users, ITEM: items}
    relations = bidirectional_edges(INTERACTS, INTERACTED_BY, pairs[:, 0], pairs[:, 1], counts)
    graph = hetero_graph(counts, relations, np.ones((users + items, words), np.float32))
    graph_inputs = GraphInputs(device_graph(graph, backend), np.ones(items, bool), np.ones(items, np.float32))
    state, graph_inputs = shard_state(init(config, graph_inputs), devices), shard_graph_inputs(graph_inputs, devices)
    ids = np.zeros((config.train.batch_size, config.train.positives_per_user), np.int32)
    batch = shard_batch(Batch(ids[:, 0], ids, np.ones(ids.shape, np.float32), ids), devices)
    program = parallel_train_step(config, devices).compiled(state, graph_inputs).lower(state, graph_inputs, batch)
    kept = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves((state, graph_inputs)))
    return program.compile(), kept


if __name__ == "__main__":
    main()
