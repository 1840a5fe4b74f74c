"""Late fusion of a trained model: its components are built, weighed on validation, and put into the graph inputs."""

import dataclasses
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import scipy.sparse
from jaxtyping import Float32, Int

from fused_rec.baselines.factors import COMPONENTS, ClosedFormRecommender, Evidence, Factors, UserSource
from fused_rec.baselines.launch import Launch, launch_parts
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
from fused_rec.training.inputs import AnyInputs, ModelInputs, Prepared
from fused_rec.training.sharding import parallel_trained_vectors, shard_graph_inputs, shard_state
from fused_rec.training.train_step import TrainState

LOG = logging.getLogger(__name__)


def select_late_fusion(config: Config, prepared: Prepared, state: TrainState) -> tuple[Prepared, Selection]:
    """Builds the components, chooses their settings and weights on validation, and adds what was chosen.

    Args:
      config: all settings; train.seed decides which users are ranked where there are more than `MAX_USERS`.
      prepared: of the training split alone.
      state: the trained state, unsharded.

    Returns:
      `prepared` with the late fusion in its graph inputs, and the selection, the same in all processes.

    Raises:
      ValueError: `prepared` includes the validation split.
      InsufficientMemoryError: singular vectors do not fit in memory.
    """
    if prepared.splits != ("train",):
        raise ValueError(
            f"late fusion is selected on data prepared from {', '.join(prepared.splits)}; prepare the split train alone"
        )
    params, graph_inputs = shard_state(state.params, own=False), shard_graph_inputs(prepared.graph_inputs)
    vectors = jax.device_get(parallel_trained_vectors(config)(params, graph_inputs))
    found, evidence = None, _evidence(prepared)
    if processes.is_primary():
        on = validation_users(config, prepared)
        found = select_weights(_candidates(prepared, vectors, evidence, on.users), on)
        found = dataclasses.asdict(found)
    selection = Selection(**processes.broadcast_json(found))
    return _fused(prepared, selection, evidence), selection


def with_late_fusion(prepared: AnyInputs, selection: Selection | None) -> AnyInputs:
    """Adds weights and closed-form components to the graph inputs, built from what `prepared` observes.

    Args:
      prepared: tables and graph.
      selection: of `select_late_fusion`, possibly of another split or other tables. These may lack what a component
        needs: it is left out then. They may also need a larger l2: the next of the grid is taken. None: the trained
        model alone.

    Returns:
      `prepared` with other graph inputs.
    """
    return prepared if selection is None else _fused(prepared, selection, _evidence(prepared))


def _fused(prepared: AnyInputs, selection: Selection, evidence: Evidence) -> AnyInputs:
    """`with_late_fusion`, with what the tables tell the components."""
    trained, closed = {}, []
    # Items that no other component orders are ordered by popularity, in the selection and here.
    for name, weight in {"popularity": FALLBACK, **selection.weights}.items():
        if name not in COMPONENTS:
            trained[name] = np.asarray(weight, np.float32)
            continue
        recommender = COMPONENTS[name]
        if absent := [what for what in recommender.needs if not evidence.has(what)]:
            LOG.warning("%s is left out of the score: the tables have no %s", name, " and no ".join(absent))
            continue
        made = _factors(name, recommender, evidence, selection.settings.get(name, recommender.grid[0]))
        if made is None:
            continue
        part = closed_form(name, weight, made, recommender.user_source)
        # From one process: singular vectors may differ by a rotation between machines, and must not be mixed.
        closed.append(processes.broadcast_arrays(part))
    found = _with_fusion(prepared, LateFusion(trained, tuple(closed)))
    return found if selection.launch is None else with_launch(found, Launch(**selection.launch))


def _factors(
    name: str, recommender: ClosedFormRecommender, evidence: Evidence, settings: Mapping[str, Any]
) -> Factors | None:
    """Makes a component, with the next larger l2 of its grid where the tables need one; None where none is enough."""
    larger = [
        other
        for other in recommender.grid
        if "l2" in settings and other == {**settings, "l2": other["l2"]} and other["l2"] > settings["l2"]
    ]
    following = min(larger, key=lambda other: other["l2"], default=None)
    try:
        return recommender.make(evidence, **settings)
    except NotApplicableError as error:
        if following is None:
            LOG.warning("%s %s is left out of the score: %s", name, settings, error)
            return None
        LOG.warning("%s %s does not apply to these tables, %s is used: %s", name, settings, following, error)
    return _factors(name, recommender, evidence, following)


def with_launch(prepared: AnyInputs, launch: Launch) -> AnyInputs:
    """Adds the components of a launch prior, built from what `prepared` observes.

    Args:
      prepared: with the other components of the score.
      launch: weights of the prior.

    Returns:
      `prepared` with other graph inputs.
    """
    fusion = prepared.graph_inputs.fusion
    assert fusion is not None
    parts = tuple(
        processes.broadcast_arrays(closed_form(*part)) for part in launch_parts(interactions_of(prepared), launch)
    )
    return _with_fusion(prepared, dataclasses.replace(fusion, closed=fusion.closed + parts))


def _with_fusion(prepared: AnyInputs, fusion: LateFusion) -> AnyInputs:
    return dataclasses.replace(prepared, graph_inputs=dataclasses.replace(prepared.graph_inputs, fusion=fusion))


def selection_of(results: Mapping[str, Any]) -> Selection | None:
    """Reads the selection of a finished run.

    Args:
      results: contents of `results.json`.
    """
    found = results.get("late_fusion")
    return None if found is None else Selection(**found)


def validation_users(config: Config, prepared: Prepared) -> ValidationUsers:
    """Returns the users on whom late fusion is selected, all or `MAX_USERS` of those with held-out items.

    Args:
      config: of which train.seed decides whom.
      prepared: tables, split and observed interactions.
    """
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


def _evidence(prepared: ModelInputs) -> Evidence:
    return Evidence(interactions_of(prepared))


def _candidates(
    prepared: Prepared, vectors: Mapping[str, Any], evidence: Evidence, users: Int[np.ndarray, "V"]
) -> Iterator[Candidate]:
    """Yields the trained components and the closed-form ones that the tables allow, with each of their settings."""
    for name, (of_users, items) in vectors.items():
        yield Candidate(name, {}, of_users[users], items, trained=True)
    for name, recommender in COMPONENTS.items():
        if not all(map(evidence.has, recommender.needs)) or (recommender.few_items and not evidence.few_items):
            continue
        for settings in recommender.grid:
            try:
                factors = recommender.make(evidence, **settings)
            except NotApplicableError as error:
                LOG.info("%s %s is left out: %s", name, settings, error)
                continue
            rows = user_rows(
                closed_form(name, 1.0, factors, recommender.user_source), prepared.graph_inputs.graph, users
            )
            yield Candidate(name, settings, rows, factors.target, trained=False)


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
    sums = _edges_of(graph, INTERACTED_BY)[users] @ part.source
    if part.friends is None:
        return sums
    edges = [_edges_of(graph, relation)[users] for relation in social_relations(graph)]
    number = sum((e.sum(1) for e in edges), np.zeros((len(users), 1)))
    of_friends = sum((e @ part.friends for e in edges), np.zeros((len(users), part.friends.shape[1]), np.float32))
    return np.concatenate([sums, np.asarray(of_friends / np.sqrt(np.maximum(number, 1)), np.float32)], axis=1)


def _edges_of(graph: DeviceGraph, relation: Relation) -> scipy.sparse.csr_matrix:
    """A relation as a sparse matrix of ones, receivers by senders."""
    adjacency = graph.adjacencies[relation]
    ones = (np.asarray(adjacency.weight) > 0).astype(np.float32)
    shape = graph.count(relation.target), graph.count(relation.source)
    return scipy.sparse.csr_matrix((ones, np.asarray(adjacency.senders), np.asarray(adjacency.receiver_start)), shape)


def closed_form(name: str, weight: float, factors: Factors, user_source: UserSource) -> ClosedForm:
    """Makes a component of the fused score from factors."""
    of_rows = np.asarray(weight, np.float32), factors.source, factors.target
    return ClosedForm(*of_rows, name, user_source, factors.text_columns, factors.friends)
