"""Exact decomposition of a score into contributions of the user's embedding, text, interactions and social edges.

A score is a sum over branches of <u / |u|, v_i>, and biases: popularity and launch prior. Given the propagation
weights, u is linear in ID embeddings and text features (fused_rec/model/propagation.py); v_i includes its norm and the
weight of the branch. With late fusion (fused_rec/model/late_fusion.py) each component has branches of its own: those of
the trained model again, or one of one layer for a closed-form component, whose u is a sum over the user's items, or
over social edges; |u| includes the standard deviation and the weight. With the last layer written out,

    u = a_0 x_u + sum_l a_l (text_gate_l text_u + sum_r gate_r,l sum_{e = (s, u) in r} edge_e source_scale_s h^{l-1}_s)

with layer weights a, the dot product of each term with v_i / |u| is its contribution, and contributions sum to the
score up to rounding. Every h splits further into a part from ID embeddings and a part from text.
"""

import typing
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Float32, Int, PyTree

from fused_rec.baselines.launch import PRIOR
from fused_rec.config import Config, ModelConfig, TrainedMethod
from fused_rec.explanation.branches import layers_of, linear_inputs
from fused_rec.graph.adjacency import Adjacency
from fused_rec.graph.device_graph import DeviceGraph
from fused_rec.graph.schema import INTERACTED_BY, ITEM, SIMILAR_TEXT, USER, Relation
from fused_rec.model.late_fusion import (
    GRAPH_BRANCH,
    MODEL,
    TEXT_BRANCH,
    ClosedForm,
    component_names,
    friends_scale,
    social_relations,
)
from fused_rec.model.model import Vectors
from fused_rec.model.propagation import PropagationWeights
from fused_rec.training.sharding import trained_on_one_device
from fused_rec.training.train_step import GraphInputs, components_of

Layers = list[dict[str, Float32[np.ndarray, "_ K"]]]  # h^0 to h^L, by node type

OWN_ID, OWN_TEXT, INTERACTION, SIMILAR_USERS, POPULARITY, LAUNCH, REVIEW = (
    "own_id",
    "own_text",
    "interaction",
    SIMILAR_TEXT,
    "popularity",
    "launch",
    "review",
)
TIE = "tie:"  # prefix of the social relations, whose names come from the tables
REVIEWED_BY = Relation(ITEM, "reviewed_by", USER)  # no edges of the graph: a review is text of both


def source_kind(relation: Relation) -> str:
    """Returns the kind of contributions whose sources are connected to the user by a relation."""
    named = {INTERACTED_BY: INTERACTION, REVIEWED_BY: REVIEW}
    return named.get(relation) or (SIMILAR_USERS if relation.name == SIMILAR_USERS else TIE + relation.name)


class BranchTerms(NamedTuple):
    """Embeddings of one branch by layer, split into parts from ID embeddings (`ids`) and from text (`text`).

    Of closed-form components, what is made of interactions counts as ID embeddings.
    """

    ids: Layers
    text: Layers
    weights: PropagationWeights
    user_norm: Float32[np.ndarray, "U"]  # |u|; 1 with model.score dot
    items: Float32[np.ndarray, "I K"]  # v_i


class ScoreDecomposition(NamedTuple):
    """Branches, adjacencies, embeddings and biases of a trained model on one graph, as NumPy arrays."""

    branches: list[BranchTerms]
    adjacencies: Mapping[Relation, Adjacency]
    users: Float32[np.ndarray, "U D"]  # as `embed_nodes` returns them
    items: Float32[np.ndarray, "I D"]
    bias_users: Float32[np.ndarray, "U P"]  # each score has the bias <bias_users_u, bias_items_i>
    bias_items: Float32[np.ndarray, "I P"]
    bias_kinds: list[str]  # P times `POPULARITY` or `LAUNCH`
    popularity: Float32[np.ndarray, "I"]


class Contributions(NamedTuple):
    """P contributions to the scores of n items for one user.

    Attributes:
      kind: `OWN_ID`, `OWN_TEXT`, `INTERACTION`, `SIMILAR_USERS` (text-kNN edges), `POPULARITY`, `LAUNCH` (launch
        prior of new items), or `TIE` + the name of the social relation.
      source: row of the item or neighboring user, -1 for the user's own contributions, popularity and launch prior.
      value: contribution to each score.
      ids: the part of it from ID embeddings.
      text: the part of it from text; `value` - `ids` - `text` is from neither, such as popularity.
    """

    kind: list[str]
    source: Int[np.ndarray, "P"]
    value: Float[np.ndarray, "P n"]
    ids: Float[np.ndarray, "P n"]
    text: Float[np.ndarray, "P n"]


def require_trained(config: Config) -> None:
    """Checks that the run has a trained model, whose scores can be explained.

    Args:
      config: settings of the run.

    Raises:
      ValueError: model.method is a baseline.
    """
    if not config.model.is_trained:
        raise ValueError(
            f"model.method is {config.model.method}, whose scores have no decomposition; explanations need a trained "
            f"model: a variant, or one of the methods {', '.join(typing.get_args(TrainedMethod))}"
        )


def decompose(config: Config, params: PyTree, graph_inputs: GraphInputs) -> ScoreDecomposition:
    """Computes the branch terms of a trained model for `contributions` and `best_paths`.

    Args:
      config: settings of the run.
      params: parameters, not sharded.
      graph_inputs: graph and item statistics.

    Returns:
      The terms of all users and items.

    Raises:
      ValueError: the model is a baseline.
    """
    require_trained(config)
    branches = _branch_terms(config.model, params, graph_inputs.graph)
    arrays = jax.device_get(_components(trained_on_one_device(config, params, graph_inputs), graph_inputs))
    fusion = graph_inputs.fusion
    names = [MODEL] if fusion is None else component_names(fusion)
    parts = [_HostComponent(name, *rows) for name, rows in zip(names, arrays, strict=True)]
    closed = {part.name: part for part in (fusion.closed if fusion else ())}
    terms, bias = [], []
    for part in parts:
        if part.name in closed:
            found = _closed_form_terms(graph_inputs, closed[part.name], part)
        else:
            found = _trained_terms(config, branches, part)
        terms += found.branches
        bias += found.bias
    users, items = (np.concatenate(columns, axis=1) for columns in _columns(parts))
    shape = len(users), len(items)
    return ScoreDecomposition(
        terms,
        graph_inputs.graph.adjacencies,
        users,
        items,
        np.stack([scale for _, scale, _ in bias], axis=1) if bias else np.zeros((shape[0], 0), np.float32),
        np.stack([values for _, _, values in bias], axis=1) if bias else np.zeros((shape[1], 0), np.float32),
        [kind for kind, _, _ in bias],
        np.asarray(graph_inputs.popularity),
    )


class _HostComponent(NamedTuple):
    """`fused_rec.model.late_fusion.Component` in NumPy."""

    name: str
    scale: Float32[np.ndarray, "U"]
    users: Float32[np.ndarray, "U R"]
    items: Float32[np.ndarray, "I R"]


class _ComponentTerms(NamedTuple):
    """The branches of one component, and (kind, scale of each user, value of each item) of its biases."""

    branches: list[BranchTerms]
    bias: list[tuple[str, np.ndarray, np.ndarray]]


def _columns(parts: list[_HostComponent]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The user and item columns of `embed_nodes`."""
    return [part.scale[:, None] * part.users for part in parts], [part.items for part in parts]


def _norm(length: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """|u| over the component's scale; infinite where the component has no part in the score."""
    return np.divide(length, scale, out=np.full(len(length), np.inf, np.float32), where=scale > 0)


def _trained_terms(config: Config, branches: list[tuple], part: _HostComponent) -> _ComponentTerms:
    """The branches of a trained component, and its popularity bias."""
    own = {MODEL: range(len(branches)), GRAPH_BRANCH: (0,), TEXT_BRANCH: (1,)}[part.name]
    dim, terms = config.model.dim, []
    for place, number in enumerate(own):
        ids, text, weights, length = branches[number]
        items = part.items[:, place * dim : (place + 1) * dim]
        terms.append(BranchTerms(ids, text, weights, _norm(length, part.scale), items))
    bias = [(POPULARITY, part.scale, part.items[:, -1])] if config.model.popularity_weight else []
    return _ComponentTerms(terms, bias)


def _closed_form_terms(graph_inputs: GraphInputs, closed: ClosedForm, part: _HostComponent) -> _ComponentTerms:
    """Expresses a closed-form component as a branch of at most one layer."""
    if closed.user_source == "constant":
        kind = LAUNCH if closed.name == PRIOR else POPULARITY
        return _ComponentTerms([], [(kind, part.scale, part.items[:, 0])])
    graph = graph_inputs.graph
    if closed.user_source == "text":
        norm = _norm(np.ones(len(part.users), np.float32), part.scale)
        zeros = {t: np.broadcast_to(np.float32(0), (n, part.users.shape[1])) for t, n in graph.node_types}
        weights = PropagationWeights({}, {}, {}, {}, np.ones(1, np.float32))
        return _ComponentTerms([BranchTerms([zeros], [zeros | {USER: part.users}], weights, norm, part.items)], [])
    found = [False] * (closed.source.shape[1] > 0) + [True] * (closed.friends is not None)
    return _ComponentTerms([_summed(graph, closed, part, friends) for friends in found], [])


def _summed(graph: DeviceGraph, closed: ClosedForm, part: _HostComponent, friends: bool) -> BranchTerms:
    """Expresses the columns that are sums over the user's items, or those that are sums over friends, as one layer."""
    width, scale = closed.source.shape[1], np.ones(len(part.users), np.float32)
    columns, relations, source = slice(0, width), [INTERACTED_BY], {ITEM: np.asarray(closed.source)}
    if friends:
        columns, relations, source = slice(width, None), social_relations(graph), {USER: np.asarray(closed.friends)}
        scale = np.asarray(_friends_scale(graph))
    weights = PropagationWeights(
        edge={r: (np.asarray(graph.adjacencies[r].weight) > 0).astype(np.float32) for r in relations},
        source_scale={r: np.ones(graph.count(r.source), np.float32) for r in relations},
        gate=dict.fromkeys(relations, scale[None, :]),
        text_gate={},
        layer_weights=np.array([0, 1], np.float32),
    )
    users, of_text = part.users[:, columns], np.arange(part.users.shape[1])[columns] < closed.text_columns
    zeros = {t: np.broadcast_to(np.float32(0), (n, users.shape[1])) for t, n in graph.node_types}
    layers = source, {USER: users}
    ids, text = ([zeros | _columns_of(layer, kept) for layer in layers] for kept in (~of_text, of_text))
    norm = _norm(np.ones(len(users), np.float32), part.scale)
    return BranchTerms(ids, text, weights, norm, part.items[:, columns])


_friends_scale = jax.jit(friends_scale)


def _columns_of(layer: dict[str, np.ndarray], kept: np.ndarray) -> dict[str, np.ndarray]:
    return {node_type: rows * kept for node_type, rows in layer.items()}


def _branch_terms(config: ModelConfig, params: PyTree, graph: DeviceGraph) -> list[tuple]:
    """(layers from IDs, layers from text, weights, |u|) of each trained branch."""
    found = []
    for ids, text, weights in linear_inputs(config, params, graph):
        zeros = {node_type: np.zeros_like(rows) for node_type, rows in text.items()}
        by_ids, of_ids = layers_of(graph, weights, ids, zeros)
        by_text, of_text = layers_of(graph, weights, text, text)
        out = of_ids[USER] + of_text[USER]
        cosine = config.score == "cosine"
        length = np.sqrt((out * out).sum(1) + np.float32(1e-12)) if cosine else np.ones(len(out), np.float32)
        found.append((by_ids, by_text, weights, length))  # the norm as in `unit`
    return found


@jax.jit
def _components(trained: dict[str, Vectors], graph_inputs: GraphInputs) -> list[tuple]:
    """The components of the score, without the names, which are no arrays."""
    return [tuple(part[1:]) for part in components_of(trained, graph_inputs)]


def scores(decomposition: ScoreDecomposition, user: int) -> Float32[np.ndarray, "I"]:
    """Computes one user's scores of all items, as `fused_rec.training.evaluate.scorer` does.

    Args:
      decomposition: of the model.
      user: user row.

    Returns:
      Float32 [I].
    """
    given = decomposition.items @ decomposition.users[user]
    return decomposition.popularity if given.max() == given.min() else given


def contributions(
    decomposition: ScoreDecomposition, user: int, items: Sequence[int] | Int[np.ndarray, "n"]
) -> Contributions:
    """Splits one user's scores of items into contributions that sum to `scores`.

    Args:
      decomposition: of the model.
      user: user row.
      items: n item rows.

    Returns:
      The contributions. A user without any input is ranked by popularity, which is then the only contribution.
    """
    rows = np.asarray(items)
    given = decomposition.items @ decomposition.users[user]
    nothing = np.zeros((1, len(rows)))
    if given.max() == given.min():
        return Contributions(
            [POPULARITY], np.array([-1]), decomposition.popularity[None, rows].astype(float), nothing, nothing
        )
    found: dict[tuple[str, int], Any] = {}
    for branch in decomposition.branches:
        into = branch.items[rows].T.astype(np.float64) / branch.user_norm[user]
        for key, ids, text in _terms(decomposition, branch, user):
            before = found.get(key, (0, 0))
            found[key] = before[0] + ids @ into, before[1] + text @ into
    kinds, sources = zip(*found, strict=True)
    ids, text = (np.stack(column) for column in zip(*found.values(), strict=True))
    bias = {POPULARITY: nothing}
    of_items = decomposition.bias_items[rows].astype(float) * decomposition.bias_users[user].astype(float)
    for kind, values in zip(decomposition.bias_kinds, of_items.T, strict=True):
        bias[kind] = bias.get(kind, nothing) + values
    neither = np.zeros((len(bias), len(rows)))
    return Contributions(
        [*kinds, *bias],
        np.array([*sources, *[-1] * len(bias)]),
        np.concatenate([ids + text, *bias.values()]),
        np.concatenate([ids, neither]),
        np.concatenate([text, neither]),
    )


def _terms(decomposition: ScoreDecomposition, branch: BranchTerms, user: int) -> Any:
    """Yields ((kind, source), vector from ID embeddings, vector from text): the terms of u, in float64."""
    layer_weights = branch.weights.layer_weights.astype(np.float64)
    own, gates = branch.text[0][USER][user].astype(np.float64), branch.weights.text_gate
    later = layer_weights[1:] @ gates[USER][:, user] if USER in gates else 0.0
    none = np.zeros_like(own)
    yield (OWN_ID, -1), layer_weights[0] * branch.ids[0][USER][user], none
    yield (OWN_TEXT, -1), none, (layer_weights[0] + later) * own
    for relation, edge in branch.weights.edge.items():
        if relation.target != USER or len(layer_weights) == 1:
            continue
        adjacency = decomposition.adjacencies[relation]
        at = slice(*adjacency.receiver_start[user : user + 2])
        senders = adjacency.senders[at]
        factors = layer_weights[1:] * branch.weights.gate[relation][:, user]
        ids, text = (
            (edge[at] * branch.weights.source_scale[relation][senders])[:, None]
            * sum(f * h[relation.source][senders] for f, h in zip(factors, every, strict=False))
            for every in (branch.ids, branch.text)
        )
        kind = source_kind(relation)
        for sender, from_ids, from_text in zip(senders.tolist(), ids, text, strict=True):
            yield (kind, sender), from_ids, from_text


def by_modality(decomposition: ScoreDecomposition, user: int, item: int) -> dict[str, float]:
    """Sums the contributions to one score by kind and modality.

    Args:
      decomposition: of the model.
      user: user row.
      item: item row.

    Returns:
      Contributions that sum to the score, by keys such as "own_id", "interaction/text" and "tie:friend/id".
    """
    contributed = contributions(decomposition, user, [item])
    found: dict[str, float] = {}
    for number, kind in enumerate(contributed.kind):
        if kind in (OWN_ID, OWN_TEXT, POPULARITY, LAUNCH):
            found[kind] = float(contributed.value[number, 0])
            continue
        for origin, values in (("id", contributed.ids), ("text", contributed.text)):
            found[f"{kind}/{origin}"] = found.get(f"{kind}/{origin}", 0.0) + float(values[number, 0])
    return found
