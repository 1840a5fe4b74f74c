"""What each of several devices has of a training step and of its state, on a graph as large as Gowalla's.

    python tests/stress/sharding.py [--devices=4] [--out=shares.json]

Compiles the step for one device and for several simulated ones, runs nothing, and prints each device's flops and bytes
accessed (XLA's own cost analysis of the compiled program, plain segment sums, of which it sees every operation) and
bytes of state (parameters, moments, texts, edges), and their ratios to those of one device.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

USERS, ITEMS, PAIRS = 29_858, 40_981, 810_128  # of the training part as LightGCN published it
WORDS = 640  # columns of text: MiniLM's and TF-IDF's
BATCH, POSITIVES = 2_048, 16


def main() -> None:
    """Prints one row a variant."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--devices", type=int, default=4)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={arguments.devices}"
    sys.path.insert(0, str(Path(__file__).parents[2]))
    rows = []
    for variant, words in (("graph", 1), ("fused", WORDS)):
        alone, shared = (costs(variant, words, devices) for devices in (1, arguments.devices))
        for what, value in alone.items():
            rows.append({"variant": variant, "of": what, "one device": value, "each": shared[what]})
            share = shared[what] / value
            print(f"{variant:6} {what:15} {value:10.3g} {shared[what]:10.3g}  {share:.3f}", flush=True)
    if arguments.out:
        arguments.out.write_text(json.dumps(rows, indent=1))


def costs(variant: Any, words: int, devices: int) -> dict[str, float]:
    """Of one device when so many share the work."""
    import jax
    import numpy as np

    from fused_rec.config import Config, ModelConfig, TrainConfig
    from fused_rec.data.batches import Batch
    from fused_rec.graph.build import bidirectional_edges
    from fused_rec.graph.device_graph import device_graph
    from fused_rec.graph.hetero import hetero_graph
    from fused_rec.graph.schema import INTERACTED_BY, INTERACTS, ITEM, USER
    from fused_rec.training.sharding import parallel_train_step, shard_batch, shard_graph_inputs, shard_state
    from fused_rec.training.train_step import GraphInputs, init

    rng = np.random.default_rng(0)
    drawn = [(n * rng.random(PAIRS * 5 // 4) ** 2).astype(np.int64) for n in (USERS, ITEMS)]  # few hold most
    pairs = rng.permutation(np.unique(np.stack(drawn, axis=1), axis=0))[:PAIRS]
    counts = {USER: USERS, ITEM: ITEMS}
    relations = bidirectional_edges(INTERACTS, INTERACTED_BY, pairs[:, 0], pairs[:, 1], counts)
    graph = hetero_graph(counts, relations, np.ones((USERS + ITEMS, words), np.float32))
    graph_inputs = GraphInputs(device_graph(graph, "segment"), np.ones(ITEMS, bool), np.ones(ITEMS, np.float32))
    model = ModelConfig(variant=variant, dim=64, num_layers=3, edge_dropout=0.5)
    config = Config(model=model, train=TrainConfig(batch_size=BATCH, positives_per_user=POSITIVES))
    state, graph_inputs = shard_state(init(config, graph_inputs), devices), shard_graph_inputs(graph_inputs, devices)
    shape = BATCH, POSITIVES
    ids = np.zeros(shape, np.int32)
    batch = shard_batch(Batch(ids[:, 0], ids, np.ones(shape, np.float32), ids), devices)
    program = parallel_train_step(config, devices).compiled(state, graph_inputs)
    cost = program.lower(state, graph_inputs, batch).compile().cost_analysis()
    kept = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves((state, graph_inputs)))
    return {"flops": cost["flops"], "bytes accessed": cost["bytes accessed"], "bytes of state": float(kept)}


if __name__ == "__main__":
    main()
