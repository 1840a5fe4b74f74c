"""What a step over sampled neighbours costs beside the step over the whole graph, on a generated graph.

    python tests/campaigns/neighbours.py [--pairs=1e6] [--neighbours=0,5,10] [--rounds=3] [--batch=2048] [--steps=8]

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
    parser.add_argument("--neighbours", default="0,5,10")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--alone", action="store_true", help="measure in this process")
    arguments = parser.parse_args()
    if arguments.alone:
        measure(arguments, int(arguments.neighbours))
        return
    print("neighbours      nodes      edges   step s   draw s   peak MiB", flush=True)
    for neighbours in arguments.neighbours.split(","):
        given = (f"--{name}={getattr(arguments, name)}" for name in ("pairs", "rounds", "batch", "steps"))
        command = [sys.executable, __file__, *given, f"--neighbours={neighbours}", "--alone"]
        subprocess.run(command, check=True, cwd=ROOT)


def measure(arguments: argparse.Namespace, neighbours: int) -> None:
    """One row, of this process."""
    sys.path.insert(0, str(ROOT))
    from fused_rec.devices import keep_memory

    keep_memory()
    import jax
    import numpy as np

    from experiments.benchmark import generated
    from fused_rec.config import Config
    from fused_rec.data.batches import batch, holdings
    from fused_rec.graph.build import HELD_BY, HOLDS, ITEM, USER, WORDLESS, both_ways
    from fused_rec.graph.hetero import hetero_graph
    from fused_rec.graph.propagate import adjacencies
    from fused_rec.train.neighbours import PILOTS, sampler, whole_graph
    from fused_rec.train.parallel import divide_state, divide_task, parallel_step
    from fused_rec.train.step import Task, init
    from fused_rec.train.variants import variant

    pairs = generated(int(arguments.pairs))
    counts = {USER: pairs.n_users, ITEM: pairs.n_items}
    relations = both_ways(HOLDS, HELD_BY, pairs.user, pairs.item, counts)
    graph = hetero_graph(counts, relations, np.zeros((sum(counts.values()), WORDLESS), np.float32))
    held_by = np.bincount(pairs.item, minlength=pairs.n_items)
    task = Task(graph, adjacencies(graph), held_by > 0, held_by.astype(np.float32))
    config = variant(Config(), "lightgcn")
    train = dataclasses.replace(config.train, neighbours=neighbours)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, rounds=arguments.rounds), train=train)
    held = holdings(pairs.user, pairs.item, pairs.n_users, held_by > 0)
    shape = {"seed": 0, "batch_users": arguments.batch, "positives": 1, "negatives": 1}
    batches = [batch(held, step, **shape) for step in range(arguments.steps + 1)]
    state, step = divide_state(init(config, task)), parallel_step(config)
    tasks = sampler(config, task, batches[:PILOTS]) if neighbours else whole_graph(divide_task(task))
    steps, draws, part = [], [], task
    for number, users in enumerate(batches):
        began = time.process_time()
        part, users = tasks(number, users)
        draws.append(time.process_time() - began)
        state, _ = jax.block_until_ready(step(state, part, users))
        steps.append(time.process_time() - began)
    nodes = sum(count for _, count in part.graph.node_types)
    edges = sum(np.size(hears.weight) for hears in part.adjacencies.values())
    seconds, drawn = (statistics.median(part[1:]) for part in (steps, draws))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{neighbours:10} {nodes:10,} {edges:10,} {seconds:8.3f} {drawn:8.3f} {peak:10,.0f}", flush=True)


if __name__ == "__main__":
    main()
