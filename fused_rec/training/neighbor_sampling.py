"""Tasks of sampled neighbours, one for each step, on their way to the devices (`train.num_neighbors`).

A step over such a task is the step over the whole graph, of fewer rows: `train_step` takes the id rows of the nodes at
hand, and dropout, noise, degrees and popularity follow their numbers in the whole graph. All devices share one sample.
"""

from collections.abc import Callable, Sequence

import numpy as np

from fused_rec.config import Config
from fused_rec.data.batches import Batch
from fused_rec.distributed.devices import select_devices
from fused_rec.graph.build import ITEM, USER
from fused_rec.graph.sampling import (
    Capacity,
    Sample,
    bucketed_capacity,
    build_subgraph,
    max_capacity,
    required_capacity,
    sample,
)
from fused_rec.model.model import active_relations
from fused_rec.training.sharding import shard_graph_inputs
from fused_rec.training.train_step import GraphInputs

Sampler = Callable[[int, Batch], tuple[GraphInputs, Batch]]
PROBE_BATCHES = 3  # batches that tell how much room a step usually takes
SAMPLE_STREAM = 2  # beside (seed, step): batches draw with 0 and 1


def full_graph_sampler(graph_inputs: GraphInputs) -> Sampler:
    """Gives every step the same divided task, and its batch as it is."""
    return lambda step, batch: (graph_inputs, batch)


def neighbor_sampler(
    config: Config, graph_inputs: GraphInputs, probe_batches: Sequence[Batch], devices: int | None = None
) -> Sampler:
    """A function of (step, its batch) that gives the step's divided task and the batch numbered as its nodes are.

    What it draws follows from (config.train.seed, step) and the batch, on any number of devices. Steps share a few
    shapes, and so compiled programs: room is made for an eighth more than the largest of the `pilots`, batches like
    those to come, took; a step that takes more gets twice as much, and so on.

    Raises:
      ValueError: no pilot, or a config that samples nothing.
    """
    settings = config.train
    if not settings.num_neighbors or not probe_batches:
        raise ValueError(
            f"train.num_neighbors is {settings.num_neighbors} and pilots are {len(probe_batches)}; both must be "
            f"at least 1"
        )
    count, counts = len(select_devices(devices)), dict(graph_inputs.graph.node_types)
    adjacencies = {
        relation: graph_inputs.adjacencies[relation] for relation in active_relations(config.model, graph_inputs.graph)
    }
    rounds = min(config.model.num_layers, 1) if config.model.variant == "text" else config.model.num_layers

    def draw(seed: int, step: int, batch: Batch) -> Sample:
        items = np.concatenate([batch.items.ravel(), batch.negatives.ravel()])
        rng = np.random.default_rng((seed, step, SAMPLE_STREAM))
        seeds = {USER: batch.users, ITEM: items}
        return sample(adjacencies, counts, seeds, num_layers=rounds, num_neighbors=settings.num_neighbors, rng=rng)

    # With one seed for all runs: theirs then share compiled programs.
    tried = [required_capacity(draw(0, step, batch), count) for step, batch in enumerate(probe_batches)]
    usual = Capacity(
        *({name: max(of[name] for of in parts) for name in parts[0]} for parts in zip(*tried, strict=True))
    )
    bound = max_capacity(adjacencies, counts, settings.num_neighbors, count)

    def of_step(step: int, batch: Batch) -> tuple[GraphInputs, Batch]:
        found = draw(settings.seed, step, batch)
        room = bucketed_capacity(required_capacity(found, count), usual, bound)
        graph, adjacencies, places = build_subgraph(graph_inputs.graph, graph_inputs.adjacencies, found, room, count)
        popularity = np.zeros(graph.count(ITEM), np.float32)
        popularity[places[ITEM][found.nodes[ITEM]]] = np.asarray(graph_inputs.popularity)[found.nodes[ITEM]]
        edges = {relation: room.edges.get(relation, 0) for relation in adjacencies}
        part = shard_graph_inputs(
            GraphInputs(graph, adjacencies, graph_inputs.trained_items, popularity), devices, edges
        )
        return part, Batch(
            users=places[USER][batch.users],
            items=places[ITEM][batch.items],
            mask=batch.mask,
            negatives=places[ITEM][batch.negatives],
        )

    return of_step
