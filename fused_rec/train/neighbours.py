"""Tasks of sampled neighbours, one for each step, on their way to the devices (`train.neighbours`).

A step over such a task is the step over the whole graph, of fewer rows: `train_step` takes the id rows of the nodes at
hand, and dropout, noise, degrees and popularity follow their numbers in the whole graph. All devices share one sample.
"""

from collections.abc import Callable, Sequence

import numpy as np

from fused_rec.config import Config
from fused_rec.data.batches import Batch
from fused_rec.devices import used
from fused_rec.graph.build import ITEM, USER
from fused_rec.graph.sample import Room, Sample, fitting, most, placed, sample, taken
from fused_rec.model.fused import heard_relations
from fused_rec.train.parallel import divide_task
from fused_rec.train.step import Task

Sampler = Callable[[int, Batch], tuple[Task, Batch]]
PILOTS = 3  # batches that tell how much room a step usually takes
DRAW = 2  # beside (seed, step): batches draw with 0 and 1


def whole_graph(task: Task) -> Sampler:
    """Gives every step the same divided task, and its batch as it is."""
    return lambda step, batch: (task, batch)


def sampler(config: Config, task: Task, pilots: Sequence[Batch], devices: int | None = None) -> Sampler:
    """A function of (step, its batch) that gives the step's divided task and the batch numbered as its nodes are.

    What it draws follows from (config.train.seed, step) and the batch, on any number of devices. Steps share a few
    shapes, and so compiled programs: room is made for an eighth more than the largest of the `pilots`, batches like
    those to come, took; a step that takes more gets twice as much, and so on.

    Raises:
      ValueError: no pilot, or a config that samples nothing.
    """
    settings = config.train
    if not settings.neighbours or not pilots:
        raise ValueError(
            f"train.neighbours is {settings.neighbours} and pilots are {len(pilots)}; both must be at least 1"
        )
    count, counts = len(used(devices)), dict(task.graph.node_types)
    hears = {relation: task.adjacencies[relation] for relation in heard_relations(config.model, task.graph)}
    rounds = min(config.model.rounds, 1) if config.model.variant == "text" else config.model.rounds

    def draw(seed: int, step: int, batch: Batch) -> Sample:
        items = np.concatenate([batch.items.ravel(), batch.negatives.ravel()])
        rng = np.random.default_rng((seed, step, DRAW))
        seeds = {USER: batch.users, ITEM: items}
        return sample(hears, counts, seeds, rounds=rounds, neighbours=settings.neighbours, rng=rng)

    # With one seed for all runs: theirs then share compiled programs.
    tried = [taken(draw(0, step, batch), count) for step, batch in enumerate(pilots)]
    usual = Room(*({name: max(of[name] for of in parts) for name in parts[0]} for parts in zip(*tried, strict=True)))
    bound = most(hears, counts, settings.neighbours, count)

    def of_step(step: int, batch: Batch) -> tuple[Task, Batch]:
        found = draw(settings.seed, step, batch)
        room = fitting(taken(found, count), usual, bound)
        graph, adjacencies, places = placed(task.graph, task.adjacencies, found, room, count)
        popularity = np.zeros(graph.count(ITEM), np.float32)
        popularity[places[ITEM][found.nodes[ITEM]]] = np.asarray(task.popularity)[found.nodes[ITEM]]
        edges = {relation: room.edges.get(relation, 0) for relation in adjacencies}
        part = divide_task(Task(graph, adjacencies, task.present, popularity), devices, edges)
        return part, Batch(
            users=places[USER][batch.users],
            items=places[ITEM][batch.items],
            mask=batch.mask,
            negatives=places[ITEM][batch.negatives],
        )

    return of_step
