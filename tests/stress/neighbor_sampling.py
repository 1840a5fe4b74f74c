"""What a step over sampled neighbours costs beside the step over the whole graph, on a generated graph.

    python tests/stress/neighbor_sampling.py [--pairs=1e6] [--num_neighbors=0,5,10] [--num_layers=3] [--batch=2048]
    [--steps=8] [--lazy_adam]

Each row is a process of its own: nodes and edges with room on the device, seconds of processor time a step (host and
device alike, compilation left out; on a busy machine the clock would tell more of the others) and of that the draw,
and the most memory that the process ever had, all of the graph and the optimiser's moments of all rows included.
"""

import argparse
import dataclasses
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]


def main() -> None:
    """Prints one row a number of neighbours; 0 is the whole graph."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--pairs", type=float, default=1e6)
    parser.add_argument("--num_neighbors", default="0,5,10")
    parser.add_argument("--num_layers", type=int, default=3)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--lazy_adam", action="store_true", help="for numbers of neighbors above 0")
    parser.add_argument("--alone", action="store_true", help="measure in this process")
    arguments = parser.parse_args()
    if arguments.alone:
        measure(arguments, int(arguments.num_neighbors))
        return
    print("neighbours      nodes      edges   step s   draw s   peak MiB", flush=True)
    for num_neighbors in arguments.num_neighbors.split(","):
        given = (f"--{name}={getattr(arguments, name)}" for name in ("pairs", "num_layers", "batch", "steps"))
        command = [sys.executable, __file__, *given, f"--num_neighbors={num_neighbors}", "--alone"]
        command += ["--lazy_adam"] * arguments.lazy_adam
        subprocess.run(command, check=True, cwd=ROOT)


def measure(arguments: argparse.Namespace, num_neighbors: int) -> None:
    """One row, of this process."""
    sys.path.insert(0, str(ROOT))
    from fused_rec.distributed.devices import keep_memory

    keep_memory()
    import jax
    import numpy as np

    from experiments.benchmark import generated
    from fused_rec.config import Config
    from fused_rec.data.batches import batch, user_items
    from fused_rec.graph.build import bidirectional_edges
    from fused_rec.graph.device_graph import device_graph
    from fused_rec.graph.hetero import hetero_graph
    from fused_rec.graph.schema import INTERACTED_BY, INTERACTS, ITEM, NO_TEXT_DIM, USER
    from fused_rec.studies.variants import variant
    from fused_rec.training.neighbor_sampling import PROBE_BATCHES, neighbor_sampler
    from fused_rec.training.sharding import parallel_train_step, shard_graph_inputs, shard_state
    from fused_rec.training.train_step import GraphInputs, init

    pairs = generated(int(arguments.pairs))
    counts = {USER: pairs.n_users, ITEM: pairs.n_items}
    relations = bidirectional_edges(INTERACTS, INTERACTED_BY, pairs.user, pairs.item, counts)
    graph = hetero_graph(counts, relations, np.zeros((sum(counts.values()), NO_TEXT_DIM), np.float32))
    held_by = np.bincount(pairs.item, minlength=pairs.n_items)
    graph_inputs = GraphInputs(device_graph(graph), held_by > 0, held_by.astype(np.float32))
    config = variant(Config(), "lightgcn")
    lazy_adam = arguments.lazy_adam and num_neighbors > 0
    train = dataclasses.replace(config.train, num_neighbors=num_neighbors, lazy_adam=lazy_adam)
    config = dataclasses.replace(
        config, model=dataclasses.replace(config.model, num_layers=arguments.num_layers), train=train
    )
    held = user_items(pairs.user, pairs.item, pairs.n_users, held_by > 0)
    shape = {"seed": 0, "batch_size": arguments.batch, "positives_per_user": 1, "num_negatives": 1}
    batches = [batch(held, step, **shape) for step in range(arguments.steps + 1)]
    state, step = shard_state(init(config, graph_inputs)), parallel_train_step(config)
    sample = neighbor_sampler(config, graph_inputs, batches[:PROBE_BATCHES]) if num_neighbors else None
    whole = graph_inputs if num_neighbors else shard_graph_inputs(graph_inputs)
    steps, draws, part = [], [], graph_inputs
    for number, users in enumerate(batches):
        began = time.process_time()
        part, users = sample(number, users) if sample else (whole, users)
        draws.append(time.process_time() - began)
        state, _ = jax.block_until_ready(step(state, part, users))
        steps.append(time.process_time() - began)
    nodes = sum(count for _, count in part.graph.node_types)
    edges = sum(np.size(adjacency.weight) for adjacency in part.graph.adjacencies.values())
    seconds, drawn = (statistics.median(part[1:]) for part in (steps, draws))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{num_neighbors:10} {nodes:10,} {edges:10,} {seconds:8.3f} {drawn:8.3f} {peak:10,.0f}", flush=True)


if __name__ == "__main__":
    main()
