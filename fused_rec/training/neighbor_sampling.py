"""A sampled subgraph per step (train.num_neighbors).

A step on a subgraph is the step on the whole graph with fewer rows: `train_step` reads the ID embeddings of the sampled
nodes, and dropout, noise, degrees and popularity follow node IDs of the whole graph. All devices share one sample.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from fused_rec.config import Config
from fused_rec.data.batches import Batch
from fused_rec.distributed.devices import select_devices
from fused_rec.graph.sampling import (
    Capacity,
    Sample,
    bucketed_capacity,
    build_subgraph,
    max_capacity,
    required_capacity,
    sample,
)
from fused_rec.graph.schema import ITEM, USER
from fused_rec.model.model import active_relations
from fused_rec.rng import Stream, numpy_rng
from fused_rec.training.sharding import shard_graph_inputs
from fused_rec.training.train_step import GraphInputs

Sampler = Callable[[int, Batch], tuple[GraphInputs, Batch]]
PROBE_BATCHES = 3  # batches sampled to estimate the usual capacity


def neighbor_sampler(
    config: Config, graph_inputs: GraphInputs, probe_batches: Sequence[Batch], devices: int | None = None
) -> Sampler:
    """Builds the sampler of subgraphs.

    A sample is a function of (train.seed, step) and the batch, on any number of devices. Steps share few shapes, and so
    few compiled programs: the capacity is 9/8 of what the probe batches need, times a power of 2 where a step needs
    more.

    Args:
      config: settings of the model and of training.
      graph_inputs: of the whole graph, unsharded, on the host.
      probe_batches: batches like those of training, at least one.
      devices: the number of devices; None: all.

    Returns:
      A function of (step, batch) that returns sharded graph inputs of the subgraph, and the batch in its node numbers.

    Raises:
      ValueError: no probe batch, or train.num_neighbors is 0.
    """
    settings = config.train
    if not settings.num_neighbors or not probe_batches:
        raise ValueError(
            f"train.num_neighbors is {settings.num_neighbors} and there are {len(probe_batches)} probe batches; both "
            "must be at least 1"
        )
    count, counts = len(select_devices(devices)), dict(graph_inputs.graph.node_types)
    relations = active_relations(config.model, graph_inputs.graph)
    adjacencies = {relation: graph_inputs.graph.adjacencies[relation] for relation in relations}
    hops = config.model.hops

    def draw_sample(seed: int, step: int, batch: Batch) -> Sample:
        items = np.concatenate([batch.items.ravel(), batch.negatives.ravel()])
        rng = numpy_rng(seed, step, Stream.NEIGHBORS)
        seeds = {USER: batch.users, ITEM: items}
        return sample(adjacencies, counts, seeds, num_layers=hops, num_neighbors=settings.num_neighbors, rng=rng)

    # One seed for all runs, so that runs of different seeds share compiled programs.
    needed = [required_capacity(draw_sample(0, step, batch), count) for step, batch in enumerate(probe_batches)]
    usual = Capacity(
        *({name: max(size[name] for size in parts) for name in parts[0]} for parts in zip(*needed, strict=True))
    )
    bound = max_capacity(adjacencies, counts, settings.num_neighbors, count)

    def of_step(step: int, batch: Batch) -> tuple[GraphInputs, Batch]:
        found = draw_sample(settings.seed, step, batch)
        capacity = bucketed_capacity(required_capacity(found, count), usual, bound)
        graph, places = build_subgraph(graph_inputs.graph, found, capacity, count)
        popularity = np.zeros(graph.count(ITEM), np.float32)
        popularity[places[ITEM][found.nodes[ITEM]]] = np.asarray(graph_inputs.popularity)[found.nodes[ITEM]]
        edges = {relation: capacity.edges.get(relation, 0) for relation in graph.adjacencies}
        part = shard_graph_inputs(GraphInputs(graph, graph_inputs.trained_items, popularity), devices, edges)
        return part, _renumbered(batch, places)

    return of_step


def _renumbered(batch: Batch, places: Mapping[str, np.ndarray]) -> Batch:
    """The batch in the node numbers of a subgraph."""
    users, items = places[USER], places[ITEM]
    return Batch(users[batch.users], items[batch.items], batch.mask, items[batch.negatives])
