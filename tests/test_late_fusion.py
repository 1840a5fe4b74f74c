"""Late fusion: what it computes by hand, on devices, and in a run from training to serving."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import fused_rec as fr
from fused_rec.baselines import factors
from fused_rec.baselines.factors import COMPONENTS, singular_vectors
from fused_rec.baselines.launch import Launch
from fused_rec.config import Config, ModelConfig, TrainConfig
from fused_rec.data.synthetic import make_synthetic
from fused_rec.explanation.decomposition import contributions, decompose, scores
from fused_rec.graph.schema import INTERACTED_BY
from fused_rec.model.late_fusion import (
    MODEL,
    LateFusion,
    active_share,
    component_names,
    components,
    inverse_deviation,
    user_vectors,
)
from fused_rec.model.model import item_degree
from fused_rec.serving.recommender import load, load_measured
from fused_rec.training import late_fusion, sharding
from fused_rec.training.component_weights import select_weights
from fused_rec.training.evaluate import evaluate_mean, scorer, user_item_vectors
from fused_rec.training.inputs import init_state, prepare, read
from fused_rec.training.sharding import parallel_embed_nodes, shard_graph_inputs, shard_state
from fused_rec.training.train_step import GraphInputs, embed_nodes, init, score_components, trained_vectors

CONFIG = Config(model=ModelConfig(dim=3, num_layers=2, id_init_std=1.0), train=TrainConfig(temperature=0.5))
HISTORY = np.zeros((7, 6), np.float32)
HISTORY[tiny.HOLDER, tiny.HELD] = 1
FRIENDS = np.zeros((7, 7), np.float32)
FRIENDS[[0, 0, 4], [1, 2, 0]] = 1  # receivers of tiny.TRUSTS, and senders

EMBED = jax.jit(embed_nodes, static_argnums=0)


def inputs(fusion: LateFusion | None = None) -> GraphInputs:
    graph = tiny.whole()
    return GraphInputs(graph, np.arange(6) < 5, np.asarray(item_degree(graph)), fusion)


def params():
    return init(CONFIG, inputs()).params


@pytest.mark.parametrize("name", COMPONENTS)
def test_user_vectors_by_hand(name):
    """Sums over the user's items and friends, the user's text, or one."""
    part = tiny.closed_form(name, 1.0)
    expected = {
        "items": HISTORY @ part.source if part.source.shape[1] else None,
        "text": tiny.words()[:7],
        "constant": np.ones((7, 1)),
    }[part.user_source]
    if part.friends is not None:
        of_friends = FRIENDS @ part.friends / np.sqrt([[2], [1], [1], [1], [1], [1], [1]])  # user 0 has two
        expected = of_friends if expected is None else np.concatenate([expected, of_friends], axis=1)
    assert (part.friends is not None) == (name in ("friends_mean", "social_ease"))
    np.testing.assert_allclose(user_vectors(part, tiny.whole()), expected, atol=1e-5)
    some = np.array([4, 0, 6])
    np.testing.assert_allclose(late_fusion.user_rows(part, tiny.whole(), some), np.asarray(expected)[some], atol=1e-5)


def test_a_score_is_the_weighted_sum_of_standardized_components():
    fusion = tiny.late_fusion()
    users, items = EMBED(CONFIG, params(), inputs(fusion))
    weights = [fusion.trained[name] for name in sorted(fusion.trained)] + [part.weight for part in fusion.closed]
    parts = jax.jit(lambda *given: [part[1:] for part in score_components(CONFIG, *given)])(params(), inputs(fusion))
    expected, prior, active = np.zeros((7, 6)), np.zeros((7, 6)), np.zeros((7, 1))
    for name, weight, (_, of_users, of_items) in zip(component_names(fusion), weights, parts, strict=True):
        raw = np.asarray(of_users @ of_items.T, np.float64)
        deviation = raw.std(1, keepdims=True)
        part = np.where(deviation > 1e-4, weight * raw / np.maximum(deviation, 1e-4), 0)
        if name.startswith("launch"):
            prior += part
        else:
            expected, active = expected + part, active + weight * (deviation > 1e-4)
    # A launch prior counts as much as the components that say something about the user.
    total = sum(w for name, w in zip(component_names(fusion), weights, strict=True) if not name.startswith("launch"))
    expected += prior * active / total
    np.testing.assert_allclose(np.asarray(users @ items.T), expected, rtol=1e-3, atol=1e-3)


def test_the_model_alone_ranks_as_without_late_fusion():
    alone = [np.asarray(x) for x in EMBED(CONFIG, params(), inputs())]
    fused = [np.asarray(x) for x in EMBED(CONFIG, params(), inputs(LateFusion({MODEL: np.ones((), np.float32)})))]
    raw, scaled = alone[0] @ alone[1].T, fused[0] @ fused[1].T
    np.testing.assert_allclose(scaled, raw / raw.std(1, keepdims=True), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("devices", [2, 4])
def test_devices_agree(devices):
    """Four share 6 items and 7 users only with padding."""
    count, given = min(devices, jax.device_count()), inputs(tiny.late_fusion())
    users, items = parallel_embed_nodes(CONFIG, count)(shard_state(params(), count), shard_graph_inputs(given, count))
    one, other = EMBED(CONFIG, params(), given)
    np.testing.assert_allclose(np.asarray(users @ items.T), np.asarray(one @ other.T), rtol=1e-4, atol=1e-4)


def test_other_components_need_no_other_program_of_the_model(monkeypatch):
    """Nor do explanations on one device."""
    traced = []

    def counted(*arguments):
        traced.append(arguments)
        return trained_vectors(*arguments)

    monkeypatch.setattr(sharding, "trained_vectors", counted)
    whole = tiny.late_fusion()
    for fusion in (whole, LateFusion(whole.trained, whole.closed[:1])):
        found = sharding.embed_on_one_device(CONFIG, params(), inputs(fusion))
        for one, other in zip(found, EMBED(CONFIG, params(), inputs(fusion)), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    sharding.trained_on_one_device(CONFIG, params(), inputs(whole))
    assert len(traced) == 1


def test_a_component_that_says_nothing_of_a_user_has_no_part():
    deviation = np.asarray(inverse_deviation(jnp.zeros((2, 3)), jnp.ones((4, 3))))
    assert deviation.tolist() == [0, 0]
    assert np.asarray(inverse_deviation(jnp.ones((1, 1)), jnp.array([[1.0], [3.0]]))).tolist() == [1]


def test_gradient_times_weight_of_an_edge_is_what_the_interaction_adds():
    """However the weight of the edge came about: the sum counts interactions, not their weights."""
    part, graph = tiny.closed_form("ease", 1.0), tiny.whole()
    adjacency = graph.adjacencies[INTERACTED_BY]

    def score(weight):
        changed = graph.with_adjacencies({INTERACTED_BY: dataclasses.replace(adjacency, weight=weight)})
        return user_vectors(part, changed)[0] @ part.target[3]

    found = np.asarray(adjacency.weight * jax.grad(score)(jnp.asarray(adjacency.weight)))
    expected = part.source[np.asarray(adjacency.senders)] @ part.target[3]
    np.testing.assert_allclose(found, np.where(np.asarray(adjacency.receivers) == 0, expected, 0), rtol=1e-4, atol=1e-6)


def test_the_part_of_a_friend_by_hand():
    """User 0 follows 1 and 2: each adds their row over the root of two, over the deviation of the score."""
    part = tiny.closed_form("social_ease", 1.0)
    fusion = LateFusion({MODEL: np.zeros((), np.float32)}, (part,))
    found = contributions(decompose(CONFIG, params(), inputs(fusion)), 0, [3, 4])
    own = part.source.shape[1]
    assert part.friends is not None
    of_friends = {f: part.friends[f] @ part.target[:, own:].T / 2**0.5 for f in (1, 2)}
    raw = HISTORY[0] @ part.source @ part.target[:, :own].T + of_friends[1] + of_friends[2]
    for friend, values in of_friends.items():
        [at] = [n for n, kind in enumerate(found.kind) if kind == "tie:trusts" and found.source[n] == friend]
        np.testing.assert_allclose(found.value[at], (values / raw.std())[[3, 4]], rtol=1e-3, atol=1e-6)
        np.testing.assert_allclose(found.ids[at], found.value[at])
    np.testing.assert_allclose(found.value.sum(0), (raw / raw.std())[[3, 4]], rtol=1e-3, atol=1e-4)


def test_the_launch_prior_counts_by_what_is_known_of_the_user():
    """Of a user about whom no component says anything but the one that breaks ties, new items are not raised."""
    known = [np.array(of) for of in ([1, 0, 0], [1, 1, 0], [1, 1, 1])]
    share = active_share([(np.array(w, np.float32), of > 0) for w, of in zip((1, 0.5, 1e-5), known, strict=True)])
    np.testing.assert_allclose(share, [1, 1 / 3, 0], rtol=1e-4)
    part, prior = tiny.closed_form("ease", 1.0), tiny.launch_prior()[0]
    graph = tiny.whole()
    _, raised = components(LateFusion({}, (part, prior)), {}, graph)
    [alone] = components(LateFusion({}, (part,)), {}, graph)
    unknown = np.asarray(alone.scale) == 0
    assert unknown.any() and not unknown.all()
    np.testing.assert_array_equal(np.asarray(raised.scale) == 0, unknown)


# --- a run ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def market():
    return make_synthetic(0, 300, 80)


@pytest.fixture(scope="module")
def finished(market, tmp_path_factory):
    """A refitted run on 300 users and 80 items, with late fusion."""
    folder = tmp_path_factory.mktemp("late")
    config = fr.configure(
        text={"model": "tests/golden/tiny_bert", "tfidf_dim": 16, "cache": str(folder / "cache")},
        model={"dim": 8, "num_layers": 2, "late_fusion": True},
        train={"max_steps": 20, "eval_every": 10, "batch_size": 64, "positives_per_user": 8, "refit": "valid"},
    )
    return fr.train(config, folder / "run", market)


def test_results_tell_the_components(finished):
    results = json.loads((finished.workdir / "results.json").read_text())
    found = results["late_fusion"]
    assert set(found["weights"]) == set(found["settings"]) <= set(found["single"])
    expected = {"model", "graph_branch", "text_branch", "popularity", "ease", "item_knn", "tfidf_mean", "social_ease"}
    assert expected <= set(found["single"])
    assert found["fused"] == pytest.approx(results["valid"]["ndcg@10"], abs=2e-3)
    assert "by late fusion of components" in (finished.workdir / "README.md").read_text()


def test_the_selected_sum_is_what_validation_measured(finished):
    """The selection ranks on the host from short lists; evaluation ranks the catalogue on the devices."""
    config, prepared, state = load_measured(finished.workdir, "valid")
    again = evaluate_mean(prepared, scorer(config, prepared, state), "valid")["ndcg@10"]
    assert again == pytest.approx(finished.results["late_fusion"]["fused"], abs=2e-3)
    assert again == pytest.approx(finished.results["valid"]["ndcg@10"], abs=1e-6)


def test_a_loaded_run_scores_as_the_trained_one(finished):
    config, prepared, state = load_measured(finished.workdir, "test")
    assert prepared.graph_inputs.fusion is not None
    again = evaluate_mean(prepared, scorer(config, prepared, state), "test")
    assert again["ndcg@10"] == pytest.approx(finished.results["test"]["ndcg@10"], abs=1e-6)


def test_contributions_sum_to_the_score(finished):
    config, prepared, state = load(finished.workdir)
    given = dataclasses.replace(prepared.graph_inputs, fusion=_every_component(prepared))
    decomposition = decompose(config, state.params, given)
    users, items = EMBED(config, state.params, given)
    for user in (0, 7, 33):
        expected = np.asarray(users[user] @ items.T)
        np.testing.assert_allclose(scores(decomposition, user), expected, rtol=1e-3, atol=1e-3)
        found = contributions(decomposition, user, [1, 5, 9])
        np.testing.assert_allclose(found.value.sum(0), expected[[1, 5, 9]], rtol=1e-3, atol=1e-3)


def _every_component(prepared) -> LateFusion:
    """All components with weights of one and the first of their settings."""
    weights = dict.fromkeys(("model", "graph_branch", "text_branch", *COMPONENTS), 1.0)
    settings = {name: COMPONENTS[name].grid[-1] if name in COMPONENTS else {} for name in weights}
    selection = late_fusion.Selection(weights, settings, {}, 0.0, 0)
    fusion = late_fusion.with_late_fusion(prepared, selection).graph_inputs.fusion
    assert fusion is not None
    return fusion


def test_the_launch_prior_changes_the_scores_of_new_items_alone(finished):
    """Of a market in which the first three items had no interaction yet."""
    config, prepared, state = load(finished.workdir)
    observed = prepared.observed
    old = observed.item >= 3
    columns = {name: getattr(observed, name)[old] for name in ("user", "item", "age")}
    earlier = dataclasses.replace(prepared, observed=dataclasses.replace(observed, **columns))
    raised = late_fusion.with_launch(earlier, Launch(level=2.0, slope=0.5, taste=0.5))
    before, after = (np.asarray(scorer(config, p, state)(jnp.arange(20))) for p in (prepared, raised))
    assert np.abs(after - before)[:, :3].min() > 0.01
    np.testing.assert_allclose(after[:, 3:], before[:, 3:], rtol=1e-3, atol=1e-3)
    selection = late_fusion.Selection({"model": 1.0}, {"model": {}}, {}, 0.0, 0, {"level": 2.0})
    fusion = late_fusion.with_late_fusion(earlier, selection).graph_inputs.fusion
    assert fusion is not None and component_names(fusion) == ["model", "popularity", "launch_prior"]
    assert late_fusion.with_launch(prepared, Launch(2.0)).graph_inputs.fusion == prepared.graph_inputs.fusion


def test_where_the_tables_need_a_larger_l2_the_next_of_the_grid_is_taken(finished, caplog):
    """Friends are weighted by 7 in no setting of the grid, so that no other l2 is known to fit."""
    _, prepared, _ = load(finished.workdir)

    def fused(**settings):
        selection = late_fusion.Selection(dict.fromkeys(settings, 1.0), settings, {}, 0.0, 0)
        made = late_fusion.with_late_fusion(prepared, selection).graph_inputs.fusion
        assert made is not None
        return made

    found = fused(model={}, ease={"l2": 1e-6}, social_ease={"l2": 1e-6, "weight": 7.0})
    expected = fused(model={}, ease={"l2": 10.0})
    assert component_names(found) == component_names(expected) == ["model", "popularity", "ease"]
    np.testing.assert_array_equal(found.closed[-1].target, expected.closed[-1].target)
    taken, left_out = [record.getMessage() for record in caplog.records if record.name == late_fusion.__name__]
    assert taken.startswith("ease {'l2': 1e-06} does not apply to these tables, {'l2': 10.0} is used: l2 is 1e-06")
    assert left_out.startswith("social_ease {'l2': 1e-06, 'weight': 7.0} is left out of the score: l2 is 1e-06")


def test_exported_vectors_have_the_scores(finished):
    config, prepared, state = load(finished.workdir)
    users, items = user_item_vectors(config, prepared, state)
    expected = np.asarray(scorer(config, prepared, state)(jnp.arange(20)))
    np.testing.assert_allclose(users[:20] @ items.T, expected, rtol=1e-3, atol=1e-3)


def test_explanations_and_counterfactuals_follow(finished):
    [row] = finished.recommend(k=1).slice(0, 1).to_pylist()
    found = finished.explain(row["user_id"])
    assert found[0]["score"] == pytest.approx(sum(part["value"] for part in found[0]["parts"]), rel=1e-3)


def test_selection_needs_inputs_of_the_training_split(finished):
    config, prepared, state = load_measured(finished.workdir, "test")
    with pytest.raises(ValueError, match="late fusion is selected on data prepared from train, valid"):
        late_fusion.select_late_fusion(config, prepared, state)


def test_a_market_without_text_and_ties_has_fewer_components(market, tmp_path):
    config = fr.configure(model={"variant": "graph", "dim": 4, "late_fusion": True}, graph={"social_edges": "none"})
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, name="synthetic"))
    dataset, data_split = read(config)
    prepared = prepare(config, dataset, data_split)
    _, found = late_fusion.select_late_fusion(config, prepared, init_state(config, prepared))
    assert set(found.single) == {"model", "popularity", "recent_popularity", "ease", "gf_cf", "item_knn"}


def test_item_knn_is_not_selected_of_many_items_but_stays_when_tables_grow(finished, monkeypatch):
    config, prepared, state = load_measured(finished.workdir, "valid")
    monkeypatch.setattr(factors, "MIN_RANK", 4)
    monkeypatch.setattr(factors, "MAX_RANK", 4)
    _, found = late_fusion.select_late_fusion(config, prepared, state)
    assert "ease" in found.single and "item_knn" not in found.single
    chosen = {"item_knn": COMPONENTS["item_knn"].grid[0]}
    selection = late_fusion.Selection(dict.fromkeys(chosen, 1.0), chosen, {}, 0.0, 0)
    fusion = late_fusion.with_late_fusion(prepared, selection).graph_inputs.fusion
    assert fusion is not None and component_names(fusion)[-1] == "item_knn"


def test_components_of_the_model_are_marked_as_trained(finished, monkeypatch):
    """The selection starts from the best one of both kinds where validation cannot tell them apart."""
    config, prepared, state = load_measured(finished.workdir, "valid")
    trained = {}

    def recorded(candidates, on):
        candidates = list(candidates)
        trained.update((candidate.name, candidate.trained) for candidate in candidates)
        return select_weights(candidates, on)

    monkeypatch.setattr(late_fusion, "select_weights", recorded)
    late_fusion.select_late_fusion(config, prepared, state)
    assert {name for name, of in trained.items() if of} == {"model", "graph_branch", "text_branch"}
    assert len(trained) > 8


def test_what_is_selected_is_added_without_computing_singular_vectors_again(finished, monkeypatch):
    config, prepared, state = load_measured(finished.workdir, "valid")
    computed = []

    def counted(interactions, rank):
        computed.append(rank)
        return singular_vectors(interactions, rank)

    monkeypatch.setattr(factors, "singular_vectors", counted)
    selected, selection = late_fusion.select_late_fusion(config, prepared, state)
    assert len(computed) == 1
    again = late_fusion.with_late_fusion(prepared, selection)
    expected, found = (jax.tree.leaves(inputs.graph_inputs.fusion) for inputs in (again, selected))
    assert len(expected) == len(found) > 2
    for one, other in zip(expected, found, strict=True):
        np.testing.assert_array_equal(one, other)
