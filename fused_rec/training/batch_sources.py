"""What the steps of a run are given: the whole graph, sampled neighbors, or the whole graph with fine-tuned texts."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Protocol, runtime_checkable

from jaxtyping import PyTree

from fused_rec.config import Config, TrainConfig
from fused_rec.data.batches import Batch, UserItems, batch
from fused_rec.distributed import processes, signals
from fused_rec.distributed.devices import device_put
from fused_rec.model.review_dropout import device_reviews
from fused_rec.training import finetune
from fused_rec.training.finetune import EncoderData
from fused_rec.training.finetune_step import frozen_parts, make_text_batch, parallel_finetune_step
from fused_rec.training.inputs import Prepared, dropped_reviews
from fused_rec.training.neighbor_sampling import PROBE_BATCHES, neighbor_sampler
from fused_rec.training.sharding import ParallelStep, parallel_train_step, shard_graph_inputs
from fused_rec.training.train_step import GraphInputs

Batches = Callable[[int, int], Batch]  # the batch of (seed, step)


@runtime_checkable  # for checks of types in tests
class BatchSource(Protocol):
    """Gives each step its inputs.

    Attributes:
      train_step: the step that takes them.
      encoder_snapshot: `TrainState.encoder_snapshot` of the present inputs.
    """

    train_step: ParallelStep
    encoder_snapshot: PyTree

    def step_inputs(self, step: int) -> tuple[PyTree, ...]:
        """Returns the arguments of `train_step` after the state, for the step after `step` steps."""
        ...

    def validation_inputs(self) -> GraphInputs:
        """Returns the whole graph, sharded."""
        ...

    def refresh(self, params: PyTree) -> None:
        """Computes anew what depends on the parameters and is cached between evaluations. params: sharded."""
        ...


class WholeGraph:
    """Every step gets the whole graph, which stays on the devices; validation gets it without the reviews to drop."""

    encoder_snapshot: PyTree = ()

    def __init__(self, config: Config, graph_inputs: GraphInputs, batches: Batches):
        self.train_step = parallel_train_step(config)
        self._batches = functools.partial(batches, config.train.seed)
        self._sharded = shard_graph_inputs(graph_inputs)

    def step_inputs(self, step: int) -> tuple[PyTree, ...]:
        """Returns graph inputs and batch."""
        return self._sharded, self._batches(step)

    def validation_inputs(self) -> GraphInputs:
        """Returns the whole graph with all texts."""
        return dataclasses.replace(self._sharded, reviews=None)

    def refresh(self, params: PyTree) -> None:
        """Changes nothing."""


class SampledNeighbors:
    """Every step gets a sampled subgraph; the whole graph is on the devices during validation only."""

    encoder_snapshot: PyTree = ()

    def __init__(self, config: Config, graph_inputs: GraphInputs, batches: Batches):
        self.train_step = parallel_train_step(config)
        self._batches = functools.partial(batches, config.train.seed)
        self._graph_inputs = graph_inputs
        self._sample = neighbor_sampler(config, graph_inputs, [batches(0, step) for step in range(PROBE_BATCHES)])

    def step_inputs(self, step: int) -> tuple[PyTree, ...]:
        """Returns the graph inputs of a subgraph, and the batch in its node numbers."""
        return self._sample(step, self._batches(step))

    def validation_inputs(self) -> GraphInputs:
        """Shards the whole graph."""
        return shard_graph_inputs(self._graph_inputs)

    def refresh(self, params: PyTree) -> None:
        """Changes nothing."""


class FinetunedTexts:
    """Every step gets the whole graph with cached text embeddings, and the texts that it encodes."""

    def __init__(
        self, config: Config, graph_inputs: GraphInputs, encoder_data: EncoderData, encoder: PyTree, batches: Batches
    ):
        """Encodes all texts by the encoder parameters `encoder`."""
        self.train_step = parallel_finetune_step(config, encoder_data)
        self._config = config
        self._batches = functools.partial(batches, config.train.seed)
        self._fixed = device_put(frozen_parts(config, encoder_data), None)
        self._encode(encoder_data, graph_inputs, encoder)

    def _encode(self, encoder_data: EncoderData, graph_inputs: GraphInputs, encoder: PyTree) -> None:
        cache = finetune.encode_all_texts(self._config, encoder_data, graph_inputs, encoder)
        self._sharded, self._cache = shard_graph_inputs(cache.graph_inputs), cache

    @property
    def encoder_snapshot(self) -> PyTree:
        """The encoder parameters that the cached text embeddings come from."""
        return self._cache.encoder_params

    def step_inputs(self, step: int) -> tuple[PyTree, ...]:
        """Returns graph inputs, batch, the texts of the step and the frozen parts of the encoder."""
        users = self._batches(step)
        return self._sharded, users, make_text_batch(self._config, self._cache, users, step), self._fixed

    def validation_inputs(self) -> GraphInputs:
        """Returns the whole graph with the cached text embeddings."""
        return self._sharded

    def refresh(self, params: PyTree) -> None:
        """Encodes all texts by the present encoder; a stop request is answered meanwhile."""
        with interruptible():
            self._encode(self._cache.encoder_data, self._cache.graph_inputs, params[finetune.ENCODER])


def batch_source(config: Config, prepared: Prepared, encoder_snapshot: PyTree, batches: Batches) -> BatchSource:
    """Builds the source of a run's steps.

    Args:
      config: of which train.num_neighbors selects the source, for texts that are not fine-tuned.
      prepared: the graph inputs and encoder data.
      encoder_snapshot: of the state that training starts or resumes from.
      batches: the batch of (seed, step).

    Returns:
      The source, its arrays on the devices.
    """
    if prepared.encoder_data is not None:
        return FinetunedTexts(config, prepared.graph_inputs, prepared.encoder_data, encoder_snapshot, batches)
    if config.train.num_neighbors:
        return SampledNeighbors(config, prepared.graph_inputs, batches)
    reviews = dropped_reviews(config, prepared.text.texts)
    on_device = None if reviews is None else device_reviews(prepared.text, reviews)
    return WholeGraph(config, dataclasses.replace(prepared.graph_inputs, reviews=on_device), batches)


def batch_of(settings: TrainConfig, user_items_of: UserItems, seed: int, step: int) -> Batch:
    """Samples the batch of a step.

    Args:
      settings: sizes of the batch and the loss.
      user_items_of: training interactions by user.
      seed: seed of the run.
      step: the number of steps taken before it.

    Returns:
      The batch, on the host; a function of the arguments.
    """
    # The softmax is over all items.
    num_negatives = {"softmax": 0, "sampled_softmax": settings.num_negatives, "bpr": settings.positives_per_user}
    return batch(
        user_items_of,
        step,
        seed=seed,
        batch_size=settings.batch_size,
        positives_per_user=settings.positives_per_user,
        num_negatives=num_negatives[settings.loss],
    )


def interruptible() -> contextlib.AbstractContextManager[None]:
    """Returns a block in which a stop request is answered at once, in a run of one process.

    With several processes a stop there would leave the others waiting in a collective.
    """
    return signals.immediate() if processes.is_single_process() else contextlib.nullcontext()
