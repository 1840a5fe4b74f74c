"""What a step costs with the language model frozen and trained along, and what encoding all texts anew costs.

    FUSED_REC_DATA=DIR python tests/stress/finetune.py --texts=32 --steps=4

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
from fused_rec.data.batches import batch, user_items
from fused_rec.distributed.devices import device_put
from fused_rec.training import finetune, finetune_step
from fused_rec.training.inputs import init_state, prepare, read
from fused_rec.training.sharding import parallel_train_step, shard_graph_inputs, shard_state


def measured(config: Config, steps: int) -> None:
    """Prints one line a step; the first of each shape compiles."""
    dataset, data_split = read(config)
    prepared = prepare(config, dataset, data_split)
    observed, settings, words = prepared.observed, config.train, prepared.encoder_data
    held = user_items(observed.user, observed.item, dataset.n_users, np.asarray(prepared.graph_inputs.trained_items))
    whole = init_state(config, prepared)
    cache = (
        None
        if words is None
        else finetune.encode_all_texts(config, words, prepared.graph_inputs, whole.encoder_snapshot)
    )
    state, graph_inputs = (
        shard_state(dataclasses.replace(whole, encoder_snapshot=())),
        shard_graph_inputs(prepared.graph_inputs),
    )
    fixed = None if words is None else device_put(finetune_step.frozen_parts(config, words), None)
    step: Any = parallel_train_step(config) if words is None else finetune_step.parallel_finetune_step(config, words)
    print(
        f"\ntext.finetune={config.text.finetune}: "
        f"{sum(leaf.size for leaf in jax.tree.leaves(whole.params)):,} parameters"
    )
    if words is not None:
        counts = np.bincount(words.bucket_of_text)
        print(
            f"{len(words.tokens)} texts; "
            + ", ".join(f"{n} of up to {size} tokens" for n, size in zip(counts, words.bucket_length, strict=True))
        )
    shapes = set()
    for number in range(steps):
        sizes = {
            "batch_size": settings.batch_size,
            "positives_per_user": settings.positives_per_user,
            "num_negatives": 16,
        }
        users = batch(held, number, seed=0, **sizes)
        began, text_batch = time.process_time(), ()
        if cache is not None:
            text_batch = finetune_step.make_text_batch(config, cache, users, number), fixed
        state, _ = jax.block_until_ready(step(state, graph_inputs, users, *text_batch))
        shape = text_batch[0].ids.shape[1:] if text_batch else ()
        compiled = " compiled" if shape not in shapes else ""
        shapes.add(shape)
        print(f"step {number} {shape}: {time.process_time() - began:.2f} s{compiled}, {peak()}", flush=True)
    if words is not None:
        began = time.process_time()
        finetune.encode_all_texts(
            config, words, prepared.graph_inputs, jax.tree.map(lambda x: np.asarray(x) + 1e-3, whole.encoder_snapshot)
        )
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
        values["text"] = values.get("text", {}) | {"finetune": train, "finetune_texts_per_step": given.texts}
        measured(from_dict(values), given.steps)


if __name__ == "__main__":
    main()
