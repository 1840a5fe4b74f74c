"""What each variant listens to, where it starts, and the laws of the whole model."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from fused_rec.config import ModelConfig
from fused_rec.graph.build import bidirectional_edges, text_knn_edges
from fused_rec.graph.device_graph import device_graph
from fused_rec.graph.hetero import hetero_graph
from fused_rec.graph.schema import INTERACTED_BY, INTERACTS, ITEM, USER, Edges, Relation
from fused_rec.model.model import (
    FIRST_LAYER,
    Branch,
    FusedModel,
    active_relations,
    append_popularity_bias,
    concat_branches,
    item_degree,
)
from fused_rec.model.propagation import PropagationWeights, propagate
from fused_rec.model.text_fusion import Gate

DIM = 3
FUSED = ModelConfig(variant="fused", dim=DIM, num_layers=2, id_embedding_dropout=0.5)
GRAPH_ONLY = dataclasses.replace(FUSED, variant="graph")
TEXT_ONLY = dataclasses.replace(FUSED, variant="text")
EVERY = pytest.mark.parametrize("config", [FUSED, GRAPH_ONLY, TEXT_ONLY], ids=lambda config: config.variant)


def start(config):
    """Parameters as they are initialised."""
    return _start(config.variant, config.num_layers)


@functools.cache
def _start(variant, rounds):
    # What else these tests change makes no parameters.
    model = Branch(dataclasses.replace(FUSED, variant=variant, num_layers=rounds))
    return jax.jit(model.init)(jax.random.key(0), tiny.whole())["params"]


@functools.cache
def anywhere(config):
    """Parameters after some training: nothing is exactly 0 or 1 any more."""
    leaves, tree = jax.tree.flatten(start(config))
    rng = np.random.default_rng(0)
    return jax.tree.unflatten(tree, [leaf + rng.normal(size=leaf.shape).astype(np.float32) / 3 for leaf in leaves])


@functools.partial(jax.jit, static_argnums=0)
def run(config, params, graph, dropout=None):
    return Branch(config).apply({"params": params}, graph, dropout)


def out(config, params, graph=None, dropout=None) -> tuple[np.ndarray, np.ndarray]:
    graph = tiny.graph() if graph is None else graph
    users, items = run(config, params, device_graph(graph), dropout)
    return np.asarray(users), np.asarray(items)


def id_rows(params, node_type):
    """Id rows as they enter: item 5, which nobody holds, and user 6, who has no neighbors, have none."""
    rows = np.array(params[f"id_{node_type}"])
    rows[{USER: [6], ITEM: [5]}.get(node_type, [])] = 0
    return rows


def same(one, other, atol=1e-5):
    for mine, theirs in zip(one, other, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=atol)


# --- what a variant listens to -------------------------------------------------------------------------------------


def test_active_relations():
    every = [INTERACTS, INTERACTED_BY, tiny.TRUSTS, tiny.SIMILAR, *tiny.IN_SECTOR]
    assert active_relations(FUSED, tiny.graph()) == every
    assert active_relations(GRAPH_ONLY, tiny.graph()) == [relation for relation in every if relation != tiny.SIMILAR]
    assert active_relations(TEXT_ONLY, tiny.graph()) == [INTERACTED_BY]


def test_parameters_of_the_text_variant():
    assert set(start(TEXT_ONLY)) == {
        "text_user",
        "text_item",
        "gate_item-held_by-user",
        "source_scale_item-held_by-user",
        "layer_weights",
    }
    assert start(TEXT_ONLY)["layer_weights"].shape == (2,)  # one round: a user is the mean text of their items


def test_parameters_of_the_graph_variant():
    names = set(start(GRAPH_ONLY))
    gates = {f"gate_{relation}" for relation in active_relations(GRAPH_ONLY, tiny.graph())}
    source_scales = {name.replace("gate_", "source_scale_") for name in gates}
    assert names == {"id_user", "id_item", "id_sector", "layer_weights", *gates, *source_scales}


def test_parameters_of_the_fused_variant():
    names = set(start(FUSED))
    assert {"id_user", "text_user", "text_item", "gate_text_item"} <= names
    # Sectors have no text: nothing projects them.
    assert not names & {"text_sector", "gate_text_sector"}


def test_the_text_variant_by_hand():
    """At the start: user = (own words + words of held items) / 2, item = own words / 2, all by the same projections.

    What is held speaks by the root of its degree + 1, over the geometric mean of these roots: of degrees
    3, 2, 2, 2, 3 and 0 that is (4 * 3 * 3 * 3 * 4 * 1)^(1 / 12) = 1.658146.
    """
    config = dataclasses.replace(TEXT_ONLY, score="dot")
    params, graph = start(config), tiny.graph()
    own = {t: np.asarray(graph.text_of(t) @ params[f"text_{t}"]["kernel"]) for t in (USER, ITEM)}
    matrix = np.zeros((tiny.COUNTS[USER], tiny.COUNTS[ITEM]))
    matrix[graph.edges[INTERACTED_BY].receivers, graph.edges[INTERACTED_BY].senders] = graph.edges[INTERACTED_BY].weight
    matrix *= np.sqrt([4, 3, 3, 3, 4, 1]) / 1.658146
    same(out(config, params), ((own[USER] + matrix @ own[ITEM]) / 2, own[ITEM] / 2))


@pytest.mark.parametrize(("config", "uses_text_edges"), [(FUSED, True), (GRAPH_ONLY, False), (TEXT_ONLY, True)])
def test_whose_output_follows_the_words(config, uses_text_edges):
    params = anywhere(config)
    one, other = out(config, params), out(config, params, tiny.graph(tiny.words(seed=1)))
    for mine, theirs in zip(one, other, strict=True):
        assert (abs(mine - theirs).max() > 0.1) == uses_text_edges
        assert uses_text_edges or np.array_equal(mine, theirs)


# --- where it starts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by_node", [True, False])
def test_gates_start_at_one(by_node):
    text, degree = tiny.graph().text_of(USER), jnp.array([0.0, 1, 2, 3, 5, 8, 0])
    gate, params = Gate(2, by_node).init_with_output(jax.random.key(0), text, jnp.log1p(degree))
    assert (gate == jnp.ones((2, 7))).all()
    assert set(params["params"]) == ({"level", "view", "weight"} if by_node else {"level"})


def test_gates_by_hand():
    text, log_degree = jnp.array([[1.0], [0.0]]), jnp.array([-1.0, 1.0])
    params = Gate(1, True).init(jax.random.key(0), text, log_degree)["params"]
    # The view is 16 numbers of the words, whether there are any, and the log degree.
    weight = jnp.zeros((18, 1)).at[16].set(2).at[17].set(-3)
    gate: Any = Gate(1, True).apply(
        {"params": {**params, "level": jnp.log(jnp.array([5.0])), "weight": {"kernel": weight}}}, text, log_degree
    )
    # 5 * 2 sigmoid(2 * 1 - 3 * -1) and 5 * 2 sigmoid(2 * 0 - 3 * 1)
    np.testing.assert_allclose(gate, [[10 / (1 + np.exp(-5)), 10 / (1 + np.exp(3))]], rtol=1e-4)


def test_at_the_start_it_is_plain_propagation():
    """Ids and words in, every gate 1, words again in each round, an even mix."""
    config = dataclasses.replace(FUSED, score="dot")
    params, graph = start(config), tiny.graph()
    words = {t: graph.text_of(t) @ params[f"text_{t}"]["kernel"] for t in (USER, ITEM)}
    words["sector"] = jnp.zeros((2, DIM))
    inputs = {t: id_rows(params, t) + words[t] for t in tiny.COUNTS}
    ones = PropagationWeights(
        {relation: adjacency.weight for relation, adjacency in tiny.whole().adjacencies.items()},
        {relation: jnp.ones(tiny.COUNTS[relation.source]) for relation in tiny.whole().adjacencies},
        {relation: jnp.ones((2, tiny.COUNTS[relation.target])) for relation in tiny.whole().adjacencies},
        {t: jnp.ones((2, tiny.COUNTS[t])) for t in (USER, ITEM)},
        jnp.full(3, 1 / 3),
    )
    expected = propagate(tiny.whole(), ones, inputs, words)
    same(out(config, params), (expected[USER], expected[ITEM]))


def test_a_projection_as_wide_as_the_text_keeps_every_cosine():
    config = dataclasses.replace(TEXT_ONLY, dim=tiny.WIDTH, num_layers=0)
    params = jax.jit(Branch(config).init)(jax.random.key(0), tiny.whole())["params"]
    text = tiny.graph().text_of(ITEM)
    items = out(config, params)[1]
    np.testing.assert_allclose(items @ items.T, text @ text.T, atol=1e-6)


def test_users_without_words_of_their_own():
    config = dataclasses.replace(FUSED, user_text_input=False)
    params = anywhere(FUSED)
    made = jax.eval_shape(Branch(config).init, jax.random.key(0), tiny.whole())["params"]
    expected = set(params) - {"text_user", "gate_text_user"}
    assert set(made) == expected
    isolated = tiny.words()
    isolated[:7] = 0
    ours, without = out(config, params), out(dataclasses.replace(config, relation_gates=False), params)
    # Their words still open gates; where gates do not ask for words, none of them is left.
    assert not np.array_equal(ours[0], out(config, params, tiny.graph(isolated))[0])
    same(without, out(dataclasses.replace(config, relation_gates=False), params, tiny.graph(isolated)))


def test_cosine_is_the_dot_product_of_unit_rows():
    params = anywhere(FUSED)
    plain = out(dataclasses.replace(FUSED, score="dot"), params)
    assert not plain[1][5].any()  # neither held nor told of in words, item 5 has no direction
    same(out(FUSED, params), [x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-9) for x in plain])


# --- dropout -------------------------------------------------------------------------------------------------------


def test_dropout_leaves_out_whole_id_rows():
    """With no rounds and no words a user's vector is their id row: left out, or made up for the rows left out."""
    config = ModelConfig(variant="graph", dim=DIM, num_layers=0, score="dot", id_embedding_dropout=0.25)
    params = start(config)
    users, items = out(config, params)
    same((users, items), (id_rows(params, USER), id_rows(params, ITEM)))
    users, items = users[:6], items[:5]
    kept = []
    for seed in range(20):
        dropped = out(config, params, dropout=jax.random.key(seed))
        dropped = dropped[0][:6], dropped[1][:5]  # the last of each have no rows
        for rows, ids in zip(dropped, (users, items), strict=True):
            there = np.any(rows, axis=1)
            np.testing.assert_allclose(rows, there[:, None] * ids / 0.75, rtol=1e-5)
            kept.append(there)
    assert 0.65 < np.concatenate(kept).mean() < 0.85  # of 220 rows, standard deviation .029
    assert len({tuple(there) for there in kept}) > 10
    again = out(config, params, dropout=jax.random.key(19))
    same(dropped, (again[0][:6], again[1][:5]), atol=0)
    never = dataclasses.replace(config, id_embedding_dropout=0.0)
    same(out(never, params, dropout=jax.random.key(0)), out(config, params), atol=0)


def test_a_step_leaves_the_same_holdings_out_both_ways():
    """Dim 8 lets the messages be solved for the weights they came with: 0, or made up for those left out."""
    config = ModelConfig(
        variant="graph",
        dim=8,
        num_layers=1,
        score="dot",
        relation_gates=False,
        id_embedding_dropout=0.0,
        edge_dropout=0.25,
    )
    counts = {name: tiny.COUNTS[name] for name in (USER, ITEM)}
    graph = hetero_graph(
        counts, bidirectional_edges(INTERACTS, INTERACTED_BY, tiny.HOLDER, tiny.HELD, counts), tiny.words()[:13]
    )
    params = Branch(config).init(jax.random.key(0), device_graph(graph))["params"]
    user, item = id_rows(params, USER), id_rows(params, ITEM)

    def weights(dropout=None):
        """Users x items as users aggregate items, and items users; a layer combination of half input, half message."""
        users, items = out(config, params, graph, dropout)
        return (2 * users - user) @ np.linalg.pinv(item), ((2 * items - item) @ np.linalg.pinv(user)).T

    by_item, by_user = weights()
    np.testing.assert_allclose(by_item, by_user, atol=1e-4)
    assert (np.abs(by_item) > 0.1).sum() == len(tiny.HELD)
    shares = []
    for seed in range(20):
        in_degree_now, out_degree_now = weights(jax.random.key(seed))
        np.testing.assert_allclose(in_degree_now, out_degree_now, atol=1e-4)
        kept = np.abs(in_degree_now) > 0.1
        np.testing.assert_allclose(in_degree_now, kept * by_item / 0.75, atol=1e-4)
        shares.append(kept[tiny.HOLDER, tiny.HELD])
    assert 0.65 < np.mean(shares) < 0.85  # of 240 holdings, standard deviation .028
    assert len({tuple(kept) for kept in shares}) > 10


def test_users_without_id_rows():
    config = dataclasses.replace(GRAPH_ONLY, user_id_embedding=False, num_layers=1, score="dot")
    with_ids = start(dataclasses.replace(GRAPH_ONLY, num_layers=1))
    params = {name: leaf for name, leaf in with_ids.items() if name != "id_user"}
    made = jax.eval_shape(Branch(config).init, jax.random.key(0), tiny.whole())["params"]
    assert set(made) == set(params)
    # As if the rows were there and zero: user 6, of whom nothing is known, stays at zero.
    nowhere = {**with_ids, "id_user": jnp.zeros((7, DIM))}
    users, items = out(config, params)
    same((users, items), out(dataclasses.replace(config, user_id_embedding=True), nowhere))
    assert np.any(users, axis=1).tolist() == [True] * 6 + [False]


# --- gradients -----------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=0)
def slope(config, params):
    def some_scores(params):
        users, items = run(config, params, tiny.whole())
        # Of isolated nodes too: the last user and the last item are theirs.
        return (users @ items.T)[(*tiny.HOLDER, 6), (*tiny.HELD, 5)].sum()

    return jax.grad(some_scores)(params)


@EVERY
def test_every_parameter_that_matters_gets_a_gradient(config):
    for path, leaf in jax.tree.leaves_with_path(slope(config, anywhere(config))):
        name = jax.tree_util.keystr(path)
        # A view of words that a variant does not see is all that may stay put.
        blind = config.variant != "fused" and "view" in name or "sector" in name and ("view" in name or "id" in name)
        assert leaf.any() or blind, name


@EVERY
def test_isolated_nodes_have_finite_gradients(config):
    """User 6 and item 5 have neither words nor edges; without the user's id too, their vectors are zero."""
    params = anywhere(config)
    if "id_user" in params:
        params = {**params, "id_user": params["id_user"].at[6].set(0)}
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(slope(config, params)))
    users, items = out(config, params)
    assert not users[6].any() and not items[5].any()


# --- laws ----------------------------------------------------------------------------------------------------------


@EVERY
def test_permuting_the_nodes_permutes_the_output(config):
    """Every node takes its words, its edges and its id row along to its new place inside its type."""
    params, graph = anywhere(config), tiny.graph()
    rng = np.random.default_rng(0)
    at = {t: rng.permutation(count) for t, count in tiny.COUNTS.items()}
    moved = {}
    for relation, _ in graph.relations:
        senders, receivers, weight = map(np.asarray, graph.edges[relation])
        moved[relation] = Edges(at[relation.source][senders], at[relation.target][receivers], weight)
    back = {t: np.argsort(places) for t, places in at.items()}
    text = np.concatenate([np.asarray(graph.text_of(t))[back[t]] for t in tiny.COUNTS])
    there = {**params, **{f"id_{t}": params[f"id_{t}"][back[t]] for t in tiny.COUNTS if f"id_{t}" in params}}
    users, items = out(config, there, hetero_graph(tiny.COUNTS, moved, text))
    same((users[at[USER]], items[at[ITEM]]), out(config, params))


@EVERY
def test_types_and_relations_without_members_change_nothing(config):
    params = anywhere(config)
    no_user = Edges(np.zeros(0, int), np.zeros(0, int), np.zeros(0, np.float32))
    more = {Relation("issuer", "issuer_of", ITEM): no_user, Relation(USER, "blocks", USER): no_user}
    text = np.concatenate([tiny.words(), np.zeros((0, tiny.WIDTH), np.float32)])
    graph = hetero_graph({**tiny.COUNTS, "issuer": 0}, {**tiny.relations(tiny.words()), **more}, text)
    empty = {} if config.variant == "text" else {"id_issuer": jnp.zeros((0, DIM))}
    if config.variant == "fused":  # which has all that the others have
        same(out(config, {**params, **empty}, graph), out(config, params), atol=0)
    made = jax.eval_shape(Branch(config).init, jax.random.key(0), device_graph(graph))["params"]
    assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, {**params, **empty})


def test_no_rounds_no_messages():
    config = dataclasses.replace(FUSED, num_layers=0, score="dot")
    params, graph = start(config), tiny.graph()
    assert params["layer_weights"].tolist() == [0]
    expected = (id_rows(params, t) + graph.text_of(t) @ params[f"text_{t}"]["kernel"] for t in (USER, ITEM))
    same(out(config, params), tuple(expected))


# --- items that nobody holds ---------------------------------------------------------------------------------------


def test_interactions_are_counted_by_item():
    assert item_degree(tiny.whole()).tolist() == [3, 2, 2, 2, 3, 0]


@pytest.mark.parametrize("config", [FUSED, GRAPH_ONLY], ids=lambda config: config.variant)
@pytest.mark.parametrize(("place", "rows", "unknown", "known"), [(0, "id_user", 6, 5), (1, "id_item", 5, 4)])
def test_the_id_row_of_whom_no_user_tells_counts_for_nothing(config, place, rows, unknown, known):
    """User 6 has no neighbors, item 5 no users."""
    params = anywhere(config)
    before, other = (out(config, tree) for tree in (params, {**params, rows: params[rows].at[unknown].add(10.0)}))
    for mine, theirs in zip(before, other, strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert not slope(config, params)[rows][unknown].any()
    after = out(config, {**params, rows: params[rows].at[known].add(10.0)})
    assert np.abs(after[place][known] - before[place][known]).max() > 0.1


# --- two branches --------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=0)
def run_branches(config, params, graph, dropout=None) -> Any:
    return FusedModel(config).apply({"params": params}, graph, dropout)


def branches_anywhere(config):
    """Parameters of the branches by name, none exactly 0 or 1."""
    names = ("main", "words") if config.variant == "fused" else ("main",)
    return {name: anywhere(TEXT_ONLY if name == "words" else config) for name in names}


def test_only_the_fused_variant_has_a_second_branch():
    made = {}
    for config in (FUSED, GRAPH_ONLY, TEXT_ONLY):
        params = jax.eval_shape(FusedModel(config).init, jax.random.key(0), tiny.whole())["params"]
        made[config.variant] = {name: set(branch) for name, branch in params.items()}
    assert made == {
        "fused": {"main": set(start(FUSED)), "words": set(start(TEXT_ONLY))},
        "graph": {"main": set(start(GRAPH_ONLY))},
        "text": {"main": set(start(TEXT_ONLY))},
    }


@EVERY
def test_branches_are_the_variants_side_by_side(config):
    params, key = branches_anywhere(config), jax.random.key(3)
    for dropout in (None, key):
        branches = run_branches(config, params, tiny.whole(), dropout)
        assert len(branches) == len(params)
        same(branches[0], out(config, params["main"], dropout=dropout))
        if "words" in params:
            same(branches[1], out(TEXT_ONLY, params["words"], dropout=dropout))


def test_joined_by_hand():
    main = jnp.array([[1.0, 2.0]]), jnp.array([[3.0, 4.0], [5.0, 6.0], [7.0, 8.0]])  # scores 11, 17, 23
    words = jnp.array([[-1.0]]), jnp.array([[2.0], [4.0], [6.0]])  # scores -2, -4, -6
    users, items = concat_branches([main, words], jnp.array([0.0, 1.0, 3.0]))
    # 0 holders: words alone; 1: half and half; 3: three quarters of 23 and one of -6
    assert (users @ items.T).tolist() == [[-2, (17 - 4) / 2, 0.75 * 23 - 0.25 * 6]]
    alone = concat_branches([main], jnp.array([0.0, 1.0, 3.0]))
    assert alone[0] is main[0] and alone[1] is main[1]


def test_joined_is_the_mean_of_scores_weighed_by_interactions():
    branches = run_branches(FUSED, branches_anywhere(FUSED), tiny.whole())
    main, words = (np.asarray(users) @ np.asarray(items).T for users, items in branches)
    count = np.array([3, 2, 2, 2, 3, 0])
    users, items = concat_branches(branches, item_degree(tiny.whole()))
    np.testing.assert_allclose(users @ items.T, (count * main + words) / (count + 1), atol=1e-6)


def test_a_prior_raises_every_score_of_its_item_by_as_much():
    users, items = jnp.array([[1.0, 2.0], [0.0, -1.0]]), jnp.array([[3.0, 4.0], [5.0, 6.0], [7.0, 8.0]])
    wider = append_popularity_bias((users, items), jnp.array([0.5, 0.0, -2.0]))
    assert (users @ items.T).tolist() == [[11, 17, 23], [-4, -6, -8]]
    assert (wider[0] @ wider[1].T).tolist() == [[11.5, 17, 21], [-3.5, -6, -10]]


def market_with_new_items(swapped=False):
    """The tiny market, items 6 and 7 added: words that may be swapped, nearest texts, 6 in a sector, no holders."""
    text = np.random.default_rng(5).normal(size=(17, tiny.WIDTH)).astype(np.float32)
    text[15:] = 0  # of the sectors
    if swapped:
        text[[13, 14]] = text[[14, 13]]
    counts = {**tiny.COUNTS, ITEM: 8}
    relations = {
        **bidirectional_edges(INTERACTS, INTERACTED_BY, tiny.HOLDER, tiny.HELD, counts),
        tiny.TRUSTS: tiny.relations(tiny.words())[tiny.TRUSTS],
        tiny.SIMILAR: text_knn_edges(text[7:15], 3),
        **bidirectional_edges(*tiny.IN_SECTOR, np.array([0, 1, 3, 6]), np.array([0, 0, 0, 1]), counts),
    }
    return hetero_graph(counts, relations, text)


def test_a_new_item_is_scored_by_its_words_alone():
    """As the text branch does; sectors, text neighbors and ID rows of new items do not change it."""
    params = branches_anywhere(FUSED)
    rows = np.random.default_rng(1).normal(size=(2, DIM)).astype(np.float32)
    params["main"] = {**params["main"], "id_item": jnp.concatenate([params["main"]["id_item"], rows])}

    def scores(graph):
        branches = run_branches(FUSED, params, device_graph(graph))
        users, items = concat_branches(branches, item_degree(device_graph(graph)))
        return np.asarray(users @ items.T), np.asarray(branches[1][0] @ branches[1][1].T)

    fused, by_words = scores(market_with_new_items())
    np.testing.assert_allclose(fused[:, 5:], by_words[:, 5:], atol=1e-6)
    assert (np.abs(fused[:, :5] - by_words[:, :5]).max(0) > 0.05).all()  # the others have holders
    assert np.abs(fused[:, 6] - fused[:, 7]).max() > 0.1
    swapped, _ = scores(market_with_new_items(swapped=True))
    np.testing.assert_allclose(swapped[:, [7, 6]], fused[:, [6, 7]], atol=1e-6)
    np.testing.assert_allclose(swapped[:, 5], fused[:, 5], atol=1e-6)


@pytest.mark.parametrize("config", [FUSED, TEXT_ONLY], ids=lambda config: config.variant)
def test_products_with_the_text_of_users_without_text_are_left_out(config):
    """Parameters, embeddings and derivatives are those of a product with zeros; texts given later are read."""
    blank = tiny.words()
    blank[: tiny.COUNTS[USER]] = 0
    skipped = tiny.whole(blank)
    assert skipped.textless == (USER, "sector")
    multiplied, params = dataclasses.replace(skipped, textless=()), anywhere(config)

    def found(graph):
        return jax.value_and_grad(lambda params: sum((x * x[:, :1]).sum() for x in run(config, params, graph)))(params)

    assert jax.tree.structure(Branch(config).init(jax.random.key(0), skipped)["params"]) == jax.tree.structure(params)
    for one, other in zip(jax.tree.leaves(found(skipped)), jax.tree.leaves(found(multiplied)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    again = skipped.with_text({USER: tiny.words()[: tiny.COUNTS[USER]]})
    assert again.textless == ("sector",)
    np.testing.assert_array_equal(run(config, params, again)[0], out(config, params)[0])


@pytest.mark.parametrize("users", [None, [0, 0, 6]])
@pytest.mark.parametrize("blank", [slice(7, 13), slice(None)], ids=["items", "all"])
@pytest.mark.parametrize("config", [FUSED, TEXT_ONLY], ids=lambda config: config.variant)
def test_items_without_text_are_zeros(config, blank, users):
    """Embeddings, of the first layer too, are those of a product with zeros."""
    text, users = tiny.words(), None if users is None else jnp.asarray(users)
    text[blank] = 0
    skipped, params, found = tiny.whole(text), anywhere(config), []
    for graph in skipped, dataclasses.replace(skipped, textless=()):
        apply = functools.partial(Branch(config).apply, mutable=["intermediates"])
        found.append(jax.jit(apply)({"params": params}, graph, None, users))
    (ours, seen), (wanted, expected) = found
    first, first_expected = (of["intermediates"][FIRST_LAYER][0] for of in (seen, expected))
    for one, other in zip((*ours, *first), (*wanted, *first_expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
