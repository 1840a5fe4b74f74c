"""Scores taken apart: the parts sum to the score, and each is what changing its source would say."""

import dataclasses
import functools
import itertools

import jax
import numpy as np
import pyarrow as pa
import pytest
import tiny

from fused_rec.config import Config, ModelConfig, TrainConfig
from fused_rec.data.dataset import Dataset, empty_reviews, empty_ties
from fused_rec.explanation import paths
from fused_rec.explanation.decomposition import (
    INTERACTION,
    LAUNCH,
    POPULARITY,
    Contributions,
    by_modality,
    contributions,
    decompose,
    scores,
)
from fused_rec.explanation.paths import Path, best_paths
from fused_rec.explanation.reasons import reasons
from fused_rec.graph.schema import INTERACTED_BY, USER
from fused_rec.model.model import item_degree
from fused_rec.studies.variants import VARIANTS, variant
from fused_rec.training.train_step import GraphInputs, embed_nodes, init

FUSED = Config(model=ModelConfig(dim=3, num_layers=2, id_init_std=1.0), train=TrainConfig(temperature=0.5))
DISTINCT = {variant(FUSED, name).model: name for name in reversed(VARIANTS)}  # others differ in words or ties alone
CONFIGS = {
    **{name: variant(FUSED, name) for name in DISTINCT.values()},
    "no_rounds": dataclasses.replace(FUSED, model=dataclasses.replace(FUSED.model, num_layers=0)),
    "dot": dataclasses.replace(FUSED, model=dataclasses.replace(FUSED.model, score="dot")),
    "no_user_rows": dataclasses.replace(FUSED, model=dataclasses.replace(FUSED.model, user_id_embedding=False)),
    "late_fusion": dataclasses.replace(FUSED, model=dataclasses.replace(FUSED.model, late_fusion=True)),
}


@functools.cache
def graph_inputs(name: str = "fused") -> GraphInputs:
    graph = tiny.whole()
    fusion = tiny.late_fusion() if CONFIGS[name].model.late_fusion else None
    return GraphInputs(graph, np.arange(6) < 5, np.asarray(item_degree(graph)), fusion)


@functools.cache
def opened(name: str):
    """A model with parameters as after some training, and its books."""
    config = CONFIGS[name]
    leaves, tree = jax.tree.flatten(init(config, graph_inputs()).params)
    rng = np.random.default_rng(0)
    leaves = [leaf + rng.normal(size=leaf.shape).astype(np.float32) / 3 for leaf in leaves]
    params = jax.tree.unflatten(tree, leaves)
    users, items = jax.jit(embed_nodes, static_argnums=0)(config, params, graph_inputs(name))
    return decompose(config, params, graph_inputs(name)), np.asarray(users @ items.T)


EVERY = pytest.mark.parametrize("name", CONFIGS)


@EVERY
def test_parts_sum_to_the_score(name):
    decomposition, expected = opened(name)
    for user in range(7):
        split = contributions(decomposition, user, range(6))
        given = scores(decomposition, user)
        if len(split.kind) > 1:
            np.testing.assert_allclose(given, expected[user], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(split.value.sum(0), given, rtol=1e-4, atol=1e-6)
        own = split.value - split.ids - split.text
        assert np.abs(own[[kind not in (POPULARITY, LAUNCH) for kind in split.kind]]).max(initial=0) < 1e-12


@EVERY
def test_modalities_sum_to_the_score(name):
    decomposition, _ = opened(name)
    for user, item in ((0, 3), (4, 1), (6, 0)):
        assert sum(by_modality(decomposition, user, item).values()) == pytest.approx(
            scores(decomposition, user)[item], rel=1e-4, abs=1e-6
        )


def test_every_holding_and_tie_has_its_part():
    decomposition, _ = opened("fused")
    split = contributions(decomposition, 0, [3])
    named = set(zip(split.kind, split.source.tolist(), strict=True))
    assert {(INTERACTION, item) for item in (0, 1, 2)} | {("tie:trusts", 1), ("tie:trusts", 2)} <= named
    assert len(named) == len(split.kind)
    assert {kind for kind, source in named if source < 0} == {"own_id", "own_text", "popularity"}


def test_a_launch_prior_is_no_popularity():
    """Item 5 has no interactions; to the launch prior items 3 and 4 are new as well."""
    decomposition, _ = opened("late_fusion")
    split = contributions(decomposition, 0, range(6))
    value = dict(zip(split.kind, split.value, strict=True))
    assert value[LAUNCH][3:].all() and not value[LAUNCH][:3].any()
    assert value[POPULARITY][5] == 0 and value[POPULARITY][:5].all()
    assert by_modality(decomposition, 0, 5)[LAUNCH] == value[LAUNCH][5]


def test_a_user_of_whom_nothing_is_known_gets_what_is_popular():
    decomposition, _ = opened("no_user_rows")
    blank = dataclasses.replace(CONFIGS["no_user_rows"].model, popularity_weight=0.0)
    config = Config(model=blank)
    decomposition = decompose(config, init(config, graph_inputs()).params, graph_inputs())
    split = contributions(decomposition, 6, [0, 4])  # user 6 has neither words nor edges
    assert split.kind == ["popularity"]
    assert split.value.tolist() == [[3, 3]]  # holders
    assert scores(decomposition, 6).tolist() == np.asarray(graph_inputs().popularity).tolist()


def test_without_words_nothing_began_as_words():
    decomposition, _ = opened("graph")
    assert not contributions(decomposition, 0, range(6)).text.any()
    decomposition, _ = opened("text")
    assert not contributions(decomposition, 0, range(6)).ids.any()


@pytest.mark.parametrize("name", ["fused", "dot", "no_user_rows", "graph", "text", "late_fusion"])
def test_a_part_is_linear_in_what_it_is_part_of(name):
    """Silencing an edge into the user changes the user's unscaled vector by that part, and nothing else of it."""
    decomposition, _ = opened(name)
    user, items = 0, range(6)
    split = contributions(decomposition, user, items)
    for relation in [r for r in decomposition.branches[0].weights.edge if r.target == USER]:
        adjacency = decomposition.adjacencies[relation]
        for edge in range(*adjacency.receiver_start[user : user + 2]):
            silenced = []
            for branch in decomposition.branches:
                weight = {r: np.array(w) for r, w in branch.weights.edge.items()}
                if relation in weight:
                    weight[relation][edge] = 0
                coefficients = dataclasses.replace(branch.weights, edge=weight)
                silenced.append(branch._replace(weights=coefficients))
            without = contributions(decomposition._replace(branches=silenced), user, items)
            kind = (
                INTERACTION
                if relation == INTERACTED_BY
                else f"tie:{relation.name}"
                if relation.name == "trusts"
                else relation.name
            )
            row = list(zip(split.kind, split.source.tolist(), strict=True)).index((kind, int(adjacency.senders[edge])))
            expected = split.value.sum(0) - split.value[row]
            np.testing.assert_allclose(without.value.sum(0), expected, rtol=1e-6, atol=1e-9)


# --- paths ---------------------------------------------------------------------------------------------------------


def all_paths(decomposition, user: int, item: int) -> dict[tuple, float]:
    """Every path by brute force, straight from the recursion of h: the oracle of the search."""
    found: dict[tuple, float] = {}
    for branch in decomposition.branches:
        given, into = branch.weights, branch.items[item].astype(float) / branch.user_norm[user]

        def walk(node, level, factor, path, branch=branch, given=given, into=into):
            node_type, row = node
            x = branch.text[0][node_type][row] @ into
            if level == 0:
                x = x + branch.ids[0][node_type][row] @ into
            else:
                x = x * (given.text_gate[node_type][level - 1, row] if node_type in given.text_gate else 0)
            found[path] = found.get(path, 0.0) + factor * x
            for relation, weight in given.edge.items() if level else ():
                if relation.target == node_type:
                    adjacency = decomposition.adjacencies[relation]
                    for edge in range(*adjacency.receiver_start[row : row + 2]):
                        sender = (relation.source, int(adjacency.senders[edge]))
                        f = factor * given.gate[relation][level - 1, row] * weight[edge]
                        f *= given.source_scale[relation][sender[1]]
                        walk(sender, level - 1, f, (*path, (relation, sender)))

        for level, mix in enumerate(given.layer_weights):
            walk((USER, user), level, float(mix), ())
    return found


def key(path: Path) -> tuple:
    return tuple(zip(path.steps, path.nodes[1:], strict=True))


@EVERY
def test_all_paths_sum_to_the_score(name):
    decomposition, _ = opened(name)
    every = all_paths(decomposition, 0, 3)
    bias = float(decomposition.bias_items[3] @ decomposition.bias_users[0])
    assert sum(every.values()) + bias == pytest.approx(scores(decomposition, 0)[3], rel=1e-4, abs=1e-6)


@EVERY
@pytest.mark.parametrize("against", [False, True])
def test_the_best_paths_are_the_best_of_all(name, against):
    decomposition, _ = opened(name)
    for user, item in ((0, 3), (3, 0), (6, 2)):
        every = all_paths(decomposition, user, item)
        sign = -1 if against else 1
        expected = sorted((value for value in every.values() if sign * value > 1e-9), reverse=not against)[:12]
        found = [path for path in best_paths(decomposition, user, item, 12, against=against) if abs(path.value) > 1e-9]
        np.testing.assert_allclose([path.value for path in found], expected, rtol=1e-5, atol=1e-8)
        for path in found:
            assert every[key(path)] == pytest.approx(path.value, rel=1e-5, abs=1e-8)
            assert path.ids + path.text == pytest.approx(path.value)
            assert path.nodes[0] == (USER, user)


def test_a_closed_gate_hides_no_other_path():
    """Gates of exactly 0, which float32 gives far down a sigmoid, at a user without neighbors in some relations."""
    decomposition, _ = opened("graph")
    branch = decomposition.branches[0]
    gate = {relation: np.array(values) for relation, values in branch.weights.gate.items()}
    for values in gate.values():
        values[:, 1] = 0
    coefficients = dataclasses.replace(branch.weights, gate=gate)
    closed = decomposition._replace(branches=[branch._replace(weights=coefficients)])
    for user, item, against in itertools.product(range(7), range(6), (False, True)):
        sign = -1 if against else 1
        values = [value for value in all_paths(closed, user, item).values() if sign * value > 1e-9]
        expected = sorted(values, reverse=not against)[:3]
        found = [path.value for path in best_paths(closed, user, item, 3, against=against) if abs(path.value) > 1e-9]
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-8)


def test_where_no_path_adds_anything_the_search_ends_at_once(monkeypatch):
    decomposition, _ = opened("fused")
    branches = []
    for branch in decomposition.branches:
        text_gate = {t: np.abs(gate) for t, gate in branch.weights.text_gate.items()}
        coefficients = dataclasses.replace(
            branch.weights, layer_weights=np.abs(branch.weights.layer_weights), text_gate=text_gate
        )
        ids, words = ([{t: -np.abs(x) for t, x in h.items()} for h in every] for every in (branch.ids, branch.text))
        branches.append(branch._replace(weights=coefficients, ids=ids, text=words, items=np.abs(branch.items)))
    reached, longer = itertools.count(), paths._Search.longer

    def counted(self, *arguments):
        next(reached)
        return longer(self, *arguments)

    monkeypatch.setattr(paths._Search, "longer", counted)
    assert best_paths(decomposition._replace(branches=branches), 0, 3, 5) == []
    assert next(reached) == 1  # the user's own steps, of which none is promising


def test_the_search_looks_at_few_paths(monkeypatch):
    """The bound is worth its trouble: far fewer nodes are reached than there are paths."""
    decomposition, _ = opened("fused")
    reached, value = itertools.count(), paths._Search.value

    def counted(self, *arguments):
        next(reached)
        return value(self, *arguments)

    monkeypatch.setattr(paths._Search, "value", counted)
    assert len(best_paths(decomposition, 0, 3, 1)) == 1
    assert next(reached) < len(all_paths(decomposition, 0, 3)) / 3


# --- reasons -------------------------------------------------------------------------------------------------------

PEOPLE = pa.table({"user_id": ["u0", "u1", "u2"]})
THINGS = pa.table({"item_id": ["i0", "i1", "i2", "i3"], "name": ["Cash", None, "Bond fund", "Gold"]})
MARKET = Dataset("market", PEOPLE, THINGS, pa.table({}), empty_reviews(), empty_ties())


def data_split(*found: tuple[str, int, float]) -> Contributions:
    kinds, sources, values = zip(*found, strict=True)
    value = np.array(values)[:, None]
    return Contributions(list(kinds), np.array(sources), value, value, 0 * value)


def test_reasons_by_hand():
    split = data_split(
        *((INTERACTION, 0, 0.2), (INTERACTION, 1, 0.1), (INTERACTION, 2, 0.3), (INTERACTION, 3, -0.1)),
        *(
            ("tie:referral", 1, 0.3),
            ("tie:referral", 2, -0.1),
            ("own_text", -1, -0.4),
            (POPULARITY, -1, 0.29),
            ("own_id", -1, 0.01),
        ),
    )
    # In favour: holdings .5, popularity .29, referrals .2, the own id .01: 1 together.
    assert [(reason.code, round(reason.share, 6)) for reason in reasons(MARKET, split, split.value)] == [
        ("INTERACTIONS", 0.5),
        ("POPULAR", 0.29),
        ("TIES", 0.2),
    ]
    assert [reason.text for reason in reasons(MARKET, split, split.value)] == [
        "The customer holds Bond fund, Cash and 1 more (50% of what speaks for it).",
        "How many customers hold it (29% of what speaks for it).",
        "1 customer tied to this one (referral) leans towards it (20% of what speaks for it).",
    ]


def test_reasons_are_ordered_by_effects():
    """Without a source the score changes by another amount than its part; a part without a source counts as itself."""
    split = data_split((INTERACTION, 0, 0.3), (INTERACTION, 2, 0.2), ("tie:referral", 1, 0.1), ("own_text", -1, 0.4))
    found = reasons(MARKET, split, np.array([[0.1], [0.15], [0.5], [np.nan]]))
    assert [(reason.code, round(reason.share, 6)) for reason in found] == [
        ("TIES", 0.1),
        ("OWN_TEXT", 0.4),
        ("INTERACTIONS", 0.5),
    ]
    assert found[2].text.startswith("The customer holds Bond fund and Cash (")


def test_no_customer_is_said_to_hold_a_new_item():
    split = data_split((POPULARITY, -1, 0.0), (LAUNCH, -1, 0.3))
    [reason] = reasons(MARKET, split, np.full((2, 1), np.nan))
    assert reason[:2] == ("NEW", "It is new, and customers are expected to take it (100% of what speaks for it).")


def test_where_nothing_speaks_for_an_item():
    split = data_split((INTERACTION, 0, -0.2), (POPULARITY, -1, 0.0))
    [reason] = reasons(MARKET, split, split.value)
    assert (reason.code, reason.share) == ("NO_POSITIVE_CONTRIBUTION", 0.0)
