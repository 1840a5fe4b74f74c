"""Late fusion of a trained model: its components are built, weighed on validation, and put into the graph inputs."""

import dataclasses
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import scipy.sparse
from jaxtyping import Float32, Int

from fused_rec.baselines.factors import COMPONENTS, Evidence, Factors
from fused_rec.baselines.neighbors import NotApplicableError
from fused_rec.config import Config
from fused_rec.distributed import processes
from fused_rec.graph.device_graph import DeviceGraph
from fused_rec.graph.schema import INTERACTED_BY, USER, Relation
from fused_rec.model.late_fusion import ClosedForm, LateFusion, social_relations
from fused_rec.rng import Stream, numpy_rng
from fused_rec.training.component_weights import (
    FALLBACK,
    MAX_USERS,
    Candidate,
    Selection,
    ValidationUsers,
    select_weights,
)
from fused_rec.training.evaluate import held_out, interactions_of
from fused_rec.training.inputs import AnyInputs, Prepared
from fused_rec.training.sharding import parallel_trained_vectors, shard_graph_inputs, shard_state
from fused_rec.training.train_step import TrainState

LOG = logging.getLogger(__name__)


def select_late_fusion(config: Config, prepared: Prepared, state: TrainState) -> Selection:
    """Builds the components, and chooses their settings and weights on validation.

    Args:
      config: all settings; train.seed decides which users are ranked where there are more than `MAX_USERS`.
      prepared: of the training split alone.
      state: the trained state, unsharded.

    Returns:
      The selection, the same in all processes.

    Raises:
      ValueError: `prepared` includes the validation split.
      InsufficientMemoryError: singular vectors do not fit in memory.
    """
    if prepared.splits != ("train",):
        raise ValueError(
            f"late fusion is selected on data prepared from {', '.join(prepared.splits)}; prepare the split train alone"
        )
    vectors = jax.device_get(
        parallel_trained_vectors(config)(shard_state(state.params), shard_graph_inputs(prepared.graph_inputs))
    )
    found = None
    if processes.is_primary():
        on = _validation_users(config, prepared)
        found = select_weights(_candidates(prepared, vectors, on.users), on)
        found = dataclasses.asdict(found)
    return Selection(**processes.broadcast_json(found))


def with_late_fusion(prepared: AnyInputs, selection: Selection | None) -> AnyInputs:
    """Adds weights and closed-form components to the graph inputs, built from what `prepared` observes.

    Args:
      prepared: tables and graph.
      selection: of `select_late_fusion`, possibly of another split or other tables, which may lack what a component
        needs: it is left out then. None: the trained model alone.

    Returns:
      `prepared` with other graph inputs.
    """
    if selection is None:
        return prepared
    evidence = Evidence(interactions_of(prepared))
    trained, closed = {}, []
    # Items that no other component orders are ordered by popularity, in the selection and here.
    for name, weight in {"popularity": FALLBACK, **selection.weights}.items():
        if name not in COMPONENTS:
            trained[name] = np.asarray(weight, np.float32)
            continue
        if absent := [what for what in COMPONENTS[name].needs if not evidence.has(what)]:
            LOG.warning("%s is left out of the score: the tables have no %s", name, " and no ".join(absent))
            continue
        part = _closed_form(
            name, weight, COMPONENTS[name].make(evidence, **selection.settings.get(name, COMPONENTS[name].grid[0]))
        )
        # From one process: singular vectors may differ by a rotation between machines, and must not be mixed.
        closed.append(processes.broadcast_arrays(part))
    fusion = LateFusion(trained, tuple(closed))
    return dataclasses.replace(prepared, graph_inputs=dataclasses.replace(prepared.graph_inputs, fusion=fusion))


def selection_of(results: Mapping[str, Any]) -> Selection | None:
    """Reads the selection of a finished run.

    Args:
      results: contents of `results.json`.
    """
    found = results.get("late_fusion")
    return None if found is None else Selection(**found)


def _validation_users(config: Config, prepared: Prepared) -> ValidationUsers:
    spec, truth = held_out(prepared, "valid")
    users = np.flatnonzero(truth.sizes)
    if len(users) > MAX_USERS:
        drawn = numpy_rng(config.train.seed, 0, Stream.FUSION_USERS).choice(users, MAX_USERS, replace=False)
        users = np.sort(drawn)
    allowed = np.ones(spec.n_items, bool)
    if spec.candidates is not None:
        allowed = np.isin(np.arange(spec.n_items), spec.candidates)
    counts = np.bincount(prepared.observed.item, minlength=spec.n_items)
    return ValidationUsers(users, truth, spec.seen, allowed, np.log1p(counts).astype(np.float32))


def _candidates(prepared: Prepared, vectors: Mapping[str, Any], users: Int[np.ndarray, "V"]) -> Iterator[Candidate]:
    """Yields the trained components and the closed-form ones that the tables allow, with each of their settings."""
    for name, (of_users, items) in vectors.items():
        yield Candidate(name, {}, of_users[users], items)
    evidence = Evidence(interactions_of(prepared))
    for name, recommender in COMPONENTS.items():
        if not all(map(evidence.has, recommender.needs)):
            continue
        for settings in recommender.grid:
            try:
                factors = recommender.make(evidence, **settings)
            except NotApplicableError as error:
                LOG.info("%s %s is left out: %s", name, settings, error)
                continue
            rows = user_rows(_closed_form(name, 1.0, factors), prepared.graph_inputs.graph, users)
            yield Candidate(name, settings, rows, factors.target)


def user_rows(part: ClosedForm, graph: DeviceGraph, users: Int[np.ndarray, "V"]) -> Float32[np.ndarray, "V R"]:
    """Computes `fused_rec.model.late_fusion.user_vectors` of some users on the host, without a compilation.

    Args:
      part: the component.
      graph: the whole graph, of NumPy arrays.
      users: V user rows.

    Returns:
      Their vectors, neither standardized nor weighted.
    """
    if part.user_source == "constant":
        return np.ones((len(users), 1), np.float32)
    if part.user_source == "text":
        return np.asarray(graph.text[USER])[users]
    history = _edges_of(graph, INTERACTED_BY)
    if part.user_source == "items":
        return history[users] @ part.source
    sums = history @ part.source
    return np.sum([_edges_of(graph, relation)[users] @ sums for relation in social_relations(graph)], axis=0)


def _edges_of(graph: DeviceGraph, relation: Relation) -> scipy.sparse.csr_matrix:
    """A relation as a sparse matrix of ones, receivers by senders."""
    adjacency = graph.adjacencies[relation]
    ones = (np.asarray(adjacency.weight) > 0).astype(np.float32)
    shape = graph.count(relation.target), graph.count(relation.source)
    return scipy.sparse.csr_matrix((ones, np.asarray(adjacency.senders), np.asarray(adjacency.receiver_start)), shape)


def _closed_form(name: str, weight: float, factors: Factors) -> ClosedForm:
    return ClosedForm(
        np.asarray(weight, np.float32), *factors[:2], name, COMPONENTS[name].user_source, factors.text_columns
    )
