"""A score taken apart: what each thing that a user is, says, holds or is tied to adds to it.

A score is prior_i + sum over towers of <u / |u|, v_i>, where u is linear in id rows and words once the coefficients are
given (fused_rec/model/propagation.py) and v_i already carries its own length and the tower's share; the closed-form
part, where there is one, is a tower of its own. So with the user's last hop written out,

    u = mix_0 x_u + sum_l mix_l (text_gate_l text_u + sum_r gate_r,l sum_{e = (s, u) in r} edge_e voice_s h^{l-1}_s)

each term's dot product with v_i over |u| is its part of the score, and the parts sum to it. Every h splits again into
what began as an id row and what began as words. Nothing is approximated: the parts differ from the score by rounding.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float32, Int, PyTree

from fused_rec.baselines.linear import LowRankEase
from fused_rec.config import Config
from fused_rec.graph.adjacency import Adjacency
from fused_rec.graph.build import INTERACTED_BY, ITEM, USER
from fused_rec.graph.hetero import Relation
from fused_rec.model.model import LINEAR, FusedModel
from fused_rec.model.propagation import PropagationWeights, combine_layers, propagate_layers
from fused_rec.training.train_step import GraphInputs, embed_nodes

BRANCHES = ("main", "words")  # names of the parts of `FusedModel`, in the order of its results
Layers = list[dict[str, Float32[np.ndarray, "_ K"]]]  # h^0 to h^L, by node type

OWN_ID, OWN_TEXT, INTERACTION, SIMILAR_USERS, POPULARITY = (
    "own_id",
    "own_words",
    "holding",
    "similar_text",
    "popularity",
)
TIE = "tie:"  # before the names of the tables' own kinds of ties, which may be any


class BranchTerms(NamedTuple):
    """One of the vectors that a score is a sum of. ids, text: what began as id rows, and what began as words.

    Rows of the spectrum are id rows too: they are all that it knows of an item, and come from who holds it.
    """

    ids: Layers
    text: Layers
    weights: PropagationWeights
    user_norm: Float32[np.ndarray, "U"]  # |u|, 1 for dot products
    items: Float32[np.ndarray, "I K"]  # v_i


class ScoreDecomposition(NamedTuple):
    """All that the scores of one trained model on one graph are made of, on the host."""

    branches: list[BranchTerms]
    adjacencies: Mapping[Relation, Adjacency]
    users: Float32[np.ndarray, "U D"]  # as `embed` gives them
    items: Float32[np.ndarray, "I D"]
    prior: Float32[np.ndarray, "I"]
    popularity: Float32[np.ndarray, "I"]


class Contributions(NamedTuple):
    """P parts of the scores of n items for one user. What `ids` and `text` lack of `value` began as neither.

    kind: `OWN_ID`, `OWN_TEXT`, `INTERACTION`, `SIMILAR_USERS` (heard for similar words), `POPULARITY`, or `TIE` and the
    kind
      of tie by which the user hears another.
    source: row of the item or user that is held or heard, -1 for the user's own and for popularity.
    """

    kind: list[str]
    source: Int[np.ndarray, "P"]
    value: Float[np.ndarray, "P n"]
    ids: Float[np.ndarray, "P n"]
    text: Float[np.ndarray, "P n"]


def decompose(config: Config, params: PyTree, graph_inputs: GraphInputs) -> ScoreDecomposition:
    """Opens the books of a model: parameters, whole, and the task it is asked about."""
    branches, (users, items) = jax.device_get(
        _branch_terms(Config(model=config.model, train=config.train), params, graph_inputs)
    )
    prior = items[:, -1] if config.model.popularity_weight else np.zeros(len(items), np.float32)
    branch_terms = [BranchTerms(*branch) for branch in branches]
    if graph_inputs.ease is not None and config.model.ease_weight:
        branch_terms.append(
            _ease_branch(graph_inputs, graph_inputs.ease, users, items, len(branches) * config.model.dim)
        )
    return ScoreDecomposition(
        branch_terms, graph_inputs.adjacencies, users, items, prior, np.asarray(graph_inputs.popularity)
    )


def _ease_branch(
    graph_inputs: GraphInputs, ease: LowRankEase, users: np.ndarray, items: np.ndarray, first: int
) -> BranchTerms:
    """The closed-form part as a tower of one round, in which a user is the sum of what they hold."""
    rows = np.asarray(ease.rows)
    columns = slice(first, first + rows.shape[1])
    zeros = {t: np.broadcast_to(np.float32(0), (n, rows.shape[1])) for t, n in graph_inputs.graph.node_types}
    plain = PropagationWeights(
        edge={INTERACTED_BY: (np.asarray(graph_inputs.adjacencies[INTERACTED_BY].weight) > 0).astype(np.float32)},
        source_scale={INTERACTED_BY: np.ones(len(items), np.float32)},
        gate={INTERACTED_BY: np.ones((1, len(users)), np.float32)},
        text_gate={},
        layer_weights=np.array([0, 1], np.float32),
    )
    held = [zeros | {ITEM: rows}, zeros | {USER: users[:, columns]}]
    return BranchTerms(held, [zeros, zeros], plain, np.ones(len(users), np.float32), items[:, columns])


@functools.partial(jax.jit, static_argnums=0)
def _branch_terms(config: Config, params: PyTree, graph_inputs: GraphInputs) -> Any:
    seen: Any
    vectors, seen = FusedModel(config.model).apply(
        {"params": params}, graph_inputs.graph, graph_inputs.adjacencies, mutable=["intermediates"]
    )
    users, items = embed_nodes(config, params, graph_inputs)
    branches = []
    for number, name in enumerate(BRANCHES[: len(vectors)]):
        [(ids, text, coefficients)] = seen["intermediates"][name][LINEAR]
        zeros = {node_type: 0 * x for node_type, x in text.items()}
        by_ids = propagate_layers(graph_inputs.adjacencies, coefficients, ids, zeros)
        by_text = propagate_layers(graph_inputs.adjacencies, coefficients, text, text)
        out = combine_layers(coefficients, by_ids)[USER] + combine_layers(coefficients, by_text)[USER]
        cosine = config.model.score == "cosine"
        length = jnp.sqrt((out * out).sum(1) + 1e-12) if cosine else jnp.ones(len(out))  # as in `unit`
        columns = slice(number * config.model.dim, (number + 1) * config.model.dim)
        branches.append((by_ids, by_text, coefficients, length, items[:, columns]))
    return branches, (users, items)


def scores(decomposition: ScoreDecomposition, user: int) -> Float32[np.ndarray, "I"]:
    """What the model gives every item for one user, as `fused_rec.training.evaluate.scorer` does."""
    given = decomposition.items @ decomposition.users[user]
    return decomposition.popularity if given.max() == given.min() else given


def contributions(
    decomposition: ScoreDecomposition, user: int, items: Sequence[int] | Int[np.ndarray, "n"]
) -> Contributions:
    """The parts of these items' scores for one user; over the parts they sum to `scores`.

    A user of whom the model knows nothing gets what is popular, and that is the only part.
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
        for key, ids, words in _terms(decomposition, branch, user):
            before = found.get(key, (0, 0))
            found[key] = before[0] + ids @ into, before[1] + words @ into
    kinds, sources = zip(*found, strict=True)
    ids, words = (np.stack(column) for column in zip(*found.values(), strict=True))
    prior = decomposition.prior[None, rows].astype(float)
    return Contributions(
        [*kinds, POPULARITY],
        np.array([*sources, -1]),
        np.concatenate([ids + words, prior]),
        np.concatenate([ids, nothing]),
        np.concatenate([words, nothing]),
    )


def _terms(decomposition: ScoreDecomposition, branch: BranchTerms, user: int) -> Any:
    """((kind, source), vector from ids, vector from words): the terms of u, in float64."""
    mix = branch.weights.layer_weights.astype(np.float64)
    own, gates = branch.text[0][USER][user].astype(np.float64), branch.weights.text_gate
    again = mix[1:] @ gates[USER][:, user] if USER in gates else 0.0
    none = np.zeros_like(own)
    yield (OWN_ID, -1), mix[0] * branch.ids[0][USER][user], none
    yield (OWN_TEXT, -1), none, (mix[0] + again) * own
    for relation, edge in branch.weights.edge.items():
        if relation.target != USER or len(mix) == 1:
            continue
        adjacency = decomposition.adjacencies[relation]
        at = slice(*adjacency.receiver_start[user : user + 2])
        senders = adjacency.senders[at]
        factors = mix[1:] * branch.weights.gate[relation][:, user]
        ids, words = (
            (edge[at] * branch.weights.source_scale[relation][senders])[:, None]
            * sum(f * h[relation.source][senders] for f, h in zip(factors, every, strict=False))
            for every in (branch.ids, branch.text)
        )
        kind = (
            INTERACTION
            if relation == INTERACTED_BY
            else relation.name
            if relation.name == SIMILAR_USERS
            else TIE + relation.name
        )
        for sender, by_ids, by_words in zip(senders.tolist(), ids, words, strict=True):
            yield (kind, sender), by_ids, by_words


def by_modality(decomposition: ScoreDecomposition, user: int, item: int) -> dict[str, float]:
    """One score over how it came: the user's own id and words, popularity, and by each relation ids and words apart.

    Keys such as "own_id", "holding/words", "tie:friend/id", "popularity"; the values sum to the score.
    """
    contributed = contributions(decomposition, user, [item])
    found: dict[str, float] = {}
    for number, kind in enumerate(contributed.kind):
        if kind in (OWN_ID, OWN_TEXT, POPULARITY):
            found[kind] = float(contributed.value[number, 0])
            continue
        for origin, values in (("id", contributed.ids), ("words", contributed.text)):
            found[f"{kind}/{origin}"] = found.get(f"{kind}/{origin}", 0.0) + float(values[number, 0])
    return found
