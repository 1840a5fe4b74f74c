"""The rounds by hand, LightGCN as a special case, and the linearity that explanations rest on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from fused_rec.graph.device_graph import device_graph
from fused_rec.graph.hetero import hetero_graph
from fused_rec.graph.schema import INTERACTED_BY, INTERACTS, Edges
from fused_rec.model.propagation import Noise, PropagationWeights, noise_like, propagate, propagate_layers

#   users    0        1        inputs 1, 2;      words 1, 1
#         1 / \ .5  / 2
#   items  0    1      2       inputs 3, 4, 5;   words 0, 1, 2;    nobody holds item 2
GRAPH = hetero_graph(
    {"user": 2, "item": 3},
    {
        INTERACTS: Edges(np.array([0, 0, 1]), np.array([0, 1, 1]), np.array([1, 0.5, 2], np.float32)),
        INTERACTED_BY: Edges(np.array([0, 1, 1]), np.array([0, 0, 1]), np.array([1, 0.5, 2], np.float32)),
    },
    np.zeros((5, 1), np.float32),
)
WHOLE = device_graph(GRAPH)
INPUTS = {"user": jnp.array([[1.0], [2.0]]), "item": jnp.array([[3.0], [4.0], [5.0]])}
WORDS = {"user": jnp.array([[1.0], [1.0]]), "item": jnp.array([[0.0], [1.0], [2.0]])}


def hand_coefficients(rounds):
    """Two rounds of gates, of which the first `rounds` are taken; readout 1, 10, 100."""
    return PropagationWeights(
        edge={relation: adjacency.weight for relation, adjacency in WHOLE.adjacencies.items()},
        source_scale={INTERACTS: jnp.ones(2), INTERACTED_BY: jnp.ones(3)},
        gate={
            INTERACTS: jnp.array([[1.0, 1.0, 1.0], [1.0, 2.0, 1.0]])[:rounds],
            INTERACTED_BY: jnp.array([[1.0, 0.5], [1.0, 1.0]])[:rounds],
        },
        text_gate={"user": jnp.array([[0.0, 1.0], [2.0, 0.0]])[:rounds]},
        layer_weights=jnp.array([1.0, 10.0, 100.0])[: rounds + 1],
    )


@pytest.mark.parametrize(
    ("rounds", "users", "items"),
    [
        (0, [1, 2], [3, 4, 5]),
        # user 0: 0 * 1 + 1 * (1 * 3 + .5 * 4) = 5       user 1: 1 * 1 + .5 * (2 * 4) = 5
        # item 0: 1 * 1 = 1     item 1: .5 * 1 + 2 * 2 = 4.5     item 2: no neighbors, 0
        (1, [1 + 50, 2 + 50], [3 + 10, 4 + 45, 5]),
        # user 0: 2 * 1 + 1 * (1 * 1 + .5 * 4.5) = 5.25   user 1: 0 * 1 + 1 * (2 * 4.5) = 9
        # item 0: 1 * 5 = 5     item 1: 2 * (.5 * 5 + 2 * 5) = 25
        (2, [1 + 50 + 525, 2 + 50 + 900], [3 + 10 + 500, 4 + 45 + 2500, 5]),
    ],
)
def test_rounds_by_hand(rounds, users, items):
    out = propagate(WHOLE, hand_coefficients(rounds), INPUTS, WORDS)
    assert (out["user"].ravel().tolist(), out["item"].ravel().tolist()) == (users, items)


def test_a_type_that_receives_nothing_falls_isolated():
    every = hand_coefficients(2)
    edge, source_scale, gate = (
        {INTERACTED_BY: part[INTERACTED_BY]} for part in (every.edge, every.source_scale, every.gate)
    )
    only = PropagationWeights(edge, source_scale, gate, {}, every.layer_weights)
    out = propagate(WHOLE, only, INPUTS, WORDS)
    # Items keep their input; users aggregate it once: user 0 1 * 3 + .5 * 4 = 5, user 1 .5 * 8 = 4, then nothing.
    assert out["item"].ravel().tolist() == [3, 4, 5]
    assert out["user"].ravel().tolist() == [1 + 50, 2 + 40]


# --- laws on the tiny market ---------------------------------------------------------------------------------------

TINY = tiny.whole()
NUMBERS = {node_type: jnp.arange(count) for node_type, count in tiny.COUNTS.items()}
ROUNDS, WIDTH = 3, 4


def random_nodes(seed):
    keys = jax.random.split(jax.random.key(seed), len(tiny.COUNTS))
    return {t: jax.random.normal(key, (n, WIDTH)) for key, (t, n) in zip(keys, tiny.COUNTS.items(), strict=True)}


def random_coefficients(seed=0):
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    return PropagationWeights(
        {relation: normal(count) for relation, count in TINY.relations},
        {relation: normal(tiny.COUNTS[relation.source]) for relation, _ in TINY.relations},
        {relation: normal(ROUNDS, tiny.COUNTS[relation.target]) for relation, _ in TINY.relations},
        {t: normal(ROUNDS, tiny.COUNTS[t]) for t in ("user", "item")},
        normal(ROUNDS + 1),
    )


@jax.jit
def run(coefficients, inputs, words):
    return propagate(TINY, coefficients, inputs, words)


def close(one, other, **tolerance):
    for node_type in tiny.COUNTS:
        np.testing.assert_allclose(one[node_type], other[node_type], **{"rtol": 1e-5, "atol": 1e-5, **tolerance})


def test_lightgcn_is_a_special_case():
    """Even mix, gates of 1, no text, holdings only: the mean of A^l x (He et al., 2020, equations 7 and 8)."""
    users, items = tiny.COUNTS["user"], tiny.COUNTS["item"]
    held = np.zeros((users, items))
    held[tiny.HOLDER, tiny.HELD] = 1
    degree = [np.maximum(held.sum(axis), 1) for axis in (1, 0)]
    normal = held / np.sqrt(degree[0][:, None] * degree[1][None, :])
    a = np.block([[np.zeros((users, users)), normal], [normal.T, np.zeros((items, items))]])

    inputs = random_nodes(0)
    x = np.concatenate([inputs["user"], inputs["item"]])
    expected = sum(np.linalg.matrix_power(a, level) @ x for level in range(ROUNDS + 1)) / (ROUNDS + 1)

    light = PropagationWeights(
        {relation: TINY.adjacencies[relation].weight for relation in (INTERACTS, INTERACTED_BY)},
        {INTERACTS: jnp.ones(users), INTERACTED_BY: jnp.ones(items)},
        {INTERACTS: jnp.ones((ROUNDS, items)), INTERACTED_BY: jnp.ones((ROUNDS, users))},
        {},
        jnp.full(ROUNDS + 1, 1 / (ROUNDS + 1)),
    )
    out = run(light, inputs, {})
    np.testing.assert_allclose(np.concatenate([out["user"], out["item"]]), expected, rtol=1e-5, atol=1e-6)


def test_a_source_scale_is_a_factor_of_all_edges_from_its_node():
    coefficients = random_coefficients()
    edge = {
        relation: weight * coefficients.source_scale[relation][TINY.adjacencies[relation].senders]
        for relation, weight in coefficients.edge.items()
    }
    blank = {relation: jnp.ones_like(source_scale) for relation, source_scale in coefficients.source_scale.items()}
    nodes = random_nodes(0), random_nodes(1)
    close(run(coefficients, *nodes), run(dataclasses.replace(coefficients, edge=edge, source_scale=blank), *nodes))


def test_it_is_linear():
    coefficients = random_coefficients()
    one, other = (random_nodes(0), random_nodes(1)), (random_nodes(2), random_nodes(3))
    mixed = jax.tree.map(lambda x, y: 2 * x - 0.5 * y, one, other)
    expected = jax.tree.map(lambda x, y: 2 * x - 0.5 * y, run(coefficients, *one), run(coefficients, *other))
    close(run(coefficients, *mixed), expected, atol=1e-4)


def test_contributions_sum_to_the_whole():
    """What each node and each of its words give, alone, adds up to the output."""
    coefficients = random_coefficients()
    parts = random_nodes(0), random_nodes(1)
    nothing = jax.tree.map(jnp.zeros_like, parts)
    total = run(coefficients, *nothing)
    for part in range(2):
        for node_type, count in tiny.COUNTS.items():
            for node in range(count):
                alone = [dict(nodes) for nodes in nothing]
                alone[part][node_type] = alone[part][node_type].at[node].set(parts[part][node_type][node])
                total = jax.tree.map(jnp.add, total, run(coefficients, *alone))
    close(total, run(coefficients, *parts), atol=1e-4)


def test_both_backends_agree():
    segment = device_graph(tiny.graph(), "segment")
    coefficients, inputs, words = random_coefficients(), random_nodes(0), random_nodes(1)
    close(jax.jit(propagate)(segment, coefficients, inputs, words), run(coefficients, inputs, words))


# --- noise ---------------------------------------------------------------------------------------------------------


def test_noise_has_its_length_and_the_signs_of_the_row():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(50, 8)), jnp.float32)
    step = np.asarray(noise_like(x, 0.2, jax.random.key(0), jnp.arange(50)))
    np.testing.assert_allclose(np.linalg.norm(step, axis=1), 0.2, rtol=1e-5)
    np.testing.assert_array_equal(np.sign(step), np.sign(x))
    assert len(np.unique(step)) == step.size  # not one draw for all rows
    assert not np.asarray(noise_like(jnp.zeros((2, 8)), 0.2, jax.random.key(0), jnp.arange(2))).any()
    some = noise_like(x[3::7], 0.2, jax.random.key(0), jnp.arange(3, 50, 7))
    np.testing.assert_array_equal(some, step[3::7])  # a row's draw is its own, whichever device makes it


def test_every_round_gets_its_own_noise_and_passes_it_on():
    """Each round is the noiseless round of what came before it, and a step of length .2 of its own."""
    coefficients, inputs = random_coefficients(), random_nodes(0)
    noisy = propagate_layers(TINY, coefficients, inputs, random_nodes(1), Noise(0.2, jax.random.key(0), NUMBERS))
    close(noisy[0], inputs)
    steps = []
    for level in range(ROUNDS):
        gates = {r: gate[level, None] for r, gate in coefficients.gate.items()}
        texts = {t: gate[level, None] for t, gate in coefficients.text_gate.items()}
        one = PropagationWeights(coefficients.edge, coefficients.source_scale, gates, texts, jnp.ones(2))
        clean = propagate_layers(TINY, one, noisy[level], random_nodes(1))[1]
        for node_type, x in clean.items():
            step = np.asarray(noisy[level + 1][node_type] - x)
            received = np.asarray(x).any(axis=1)
            np.testing.assert_allclose(np.linalg.norm(step[received], axis=1), 0.2, rtol=1e-3)
            np.testing.assert_array_equal(np.sign(step[received]), np.sign(x)[received])
            assert not step[~received].any()
            steps += [*np.round(np.abs(step[received]), 4)]
    assert len({tuple(step) for step in steps}) == len(steps)


@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("rounds", [0, 1, ROUNDS])
def test_the_rows_of_some_users_are_those_of_all(rounds, noisy):
    """In every layer, and so are the derivatives of all inputs; a user may be wanted twice."""
    every, users = random_coefficients(), jnp.array([4, 0, 6, 4])
    gates, texts = ({k: gate[:rounds] for k, gate in part.items()} for part in (every.gate, every.text_gate))
    coefficients = dataclasses.replace(
        every, gate=gates, text_gate=texts, layer_weights=every.layer_weights[: rounds + 1]
    )
    noise = Noise(0.2, jax.random.key(0), NUMBERS) if noisy else None

    def of_all(inputs, text):
        layers = propagate_layers(TINY, coefficients, inputs, text, noise)
        return [{**h, "user": h["user"][users]} for h in layers]

    def of_some(inputs, text):
        return propagate_layers(TINY, coefficients, inputs, text, noise, users=users)

    (found, back), (expected, back_of_all) = (jax.vjp(f, random_nodes(0), random_nodes(1)) for f in (of_some, of_all))
    assert len(found) == rounds + 1
    for one, other in zip(found, expected, strict=True):
        close(one, other)
    for one, other in zip(back(expected), back_of_all(expected), strict=True):
        close(one, other)
