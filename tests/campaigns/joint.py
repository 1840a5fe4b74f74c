"""What a step costs with the language model frozen and trained along, and what encoding all texts anew costs.

    FUSED_REC_DATA=DIR python tests/campaigns/joint.py --texts=32 --steps=4

Amazon Musical Instruments with MiniLM, settings of experiments/configs/amazon.py. Prints seconds of the processor, all
threads together, which other processes do not lengthen as they do seconds of the clock, and the most memory in use.
"""

import argparse
import dataclasses
import resource
import time
from typing import Any

import jax
import numpy as np

from experiments.configs import amazon
from fused_rec.config import Config, from_dict
from fused_rec.data.batches import batch, holdings
from fused_rec.train import joint
from fused_rec.train.parallel import divide_state, divide_task, parallel_step
from fused_rec.train.prepare import fresh, prepare, read


def measured(config: Config, steps: int) -> None:
    """Prints one line a step; the first of each shape compiles."""
    dataset, parts_of = read(config)
    prepared = prepare(config, dataset, parts_of)
    observed, settings, words = prepared.observed, config.train, prepared.words
    held = holdings(observed.user, observed.item, dataset.n_users, np.asarray(prepared.task.present))
    whole = fresh(config, prepared)
    cache = None if words is None else joint.cached(config, words, prepared.task, whole.said)
    state, task = divide_state(dataclasses.replace(whole, said=())), divide_task(prepared.task)
    step: Any = parallel_step(config) if words is None else joint.parallel_joint_step(config, words)
    print(f"\ntext.train={config.text.train}: {sum(leaf.size for leaf in jax.tree.leaves(whole.params)):,} parameters")
    if words is not None:
        counts = np.bincount(words.of_length)
        print(
            f"{len(words.tokens)} texts; "
            + ", ".join(f"{n} of up to {size} tokens" for n, size in zip(counts, words.length, strict=True))
        )
    shapes = set()
    for number in range(steps):
        sizes = {"batch_users": settings.batch_users, "positives": settings.positives, "negatives": 16}
        users = batch(held, number, seed=0, **sizes)
        began, said = time.process_time(), ()
        if cache is not None:
            said = (joint.draw(config, cache, users, number),)
        state, loss = jax.block_until_ready(step(state, task, users, *said))
        shape = said[0].ids.shape[1:] if said else ()
        compiled = " compiled" if shape not in shapes else ""
        shapes.add(shape)
        print(f"step {number} {shape}: {time.process_time() - began:.2f} s{compiled}, {peak()}", flush=True)
    if words is not None:
        began = time.process_time()
        joint.cached(config, words, prepared.task, jax.tree.map(lambda x: np.asarray(x) + 1e-3, whole.said))
        print(f"all texts anew: {time.process_time() - began:.1f} s, {peak()}")


def peak() -> str:
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB at most so far"


def main() -> None:
    """Measures each way of training."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--texts", type=int, default=32)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--train", nargs="+", default=["frozen", "lora"])
    given = parser.parse_args()
    for train in given.train:
        values = amazon.get_config().to_dict()
        values["text"] = values.get("text", {}) | {"train": train, "texts_per_step": given.texts}
        measured(from_dict(values), given.steps)


if __name__ == "__main__":
    main()
