"""Forward selection of component weights: by hand, its laws, and that noise moves nothing."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from fused_rec.evaluation.item_sets import item_sets
from fused_rec.evaluation.metrics import ndcg
from fused_rec.model.late_fusion import inverse_deviation
from fused_rec.training import component_weights as cw


def _users(truth, n_items, seen=((), ()), allowed=None):
    """Validation users 0.. of the pairs (user, item)."""
    user, item = np.array(truth).T
    n_users = int(user.max()) + 1
    seen_user, seen_item = (np.array(column, int) for column in seen)
    allowed = np.ones(n_items, bool) if allowed is None else allowed
    held = item_sets(user, item, n_users), item_sets(seen_user, seen_item, n_users)
    return cw.ValidationUsers(np.unique(user), *held, allowed, np.zeros(n_items, np.float32))


def _candidate(name, scores, **settings):
    """A component with exactly these scores."""
    scores = np.asarray(scores, np.float32)
    return cw.Candidate(name, settings, scores, np.eye(scores.shape[1], dtype=np.float32), trained=False)


def test_standardized_scores_have_deviation_one():
    rng = np.random.default_rng(0)
    users, items = rng.normal(size=(5, 4)).astype(np.float32), rng.normal(size=(30, 4)).astype(np.float32)
    users[2] = 0
    items[:, 3] = 2  # the same for all items: ranks nothing
    users[3] = [0, 0, 0, 1]
    found = np.asarray(inverse_deviation(users, items))[:, None] * (users @ items.T)
    np.testing.assert_allclose(found.std(1), [1, 1, 0, 0, 1], atol=1e-5)
    expected = (users @ items.T)[[0, 1, 4]]
    np.testing.assert_allclose(found[[0, 1, 4]], expected / expected.std(1, keepdims=True), rtol=1e-4)


def test_two_components_that_know_different_users_are_joined():
    """Component a ranks the held-out items of even users first, b those of odd users; the other is noise."""
    rng = np.random.default_rng(0)
    n_users, n_items = 200, 40
    truth = [(u, int(rng.integers(n_items))) for u in range(n_users)]
    a, b, noise = rng.normal(size=(3, n_users, n_items)) * 0.3
    for user, item in truth:
        (a if user % 2 else b)[user, item] += 3
    on = _users(truth, n_items=n_items)
    found = cw.select_weights([_candidate("a", a), _candidate("b", b), _candidate("noise", noise)], on)
    assert set(found.weights) == {"a", "b"}
    assert found.fused > max(found.single.values()) + 0.2
    assert found.users == n_users


def test_noise_does_not_move_the_sum():
    """Of 8 draws with a single good component and three of noise, on few users."""
    moved = 0
    for seed in range(8):
        rng = np.random.default_rng(seed)
        truth = [(u, int(rng.integers(30))) for u in range(25)]
        good = rng.normal(size=(25, 30))
        for user, item in truth:
            good[user, item] += 1.5
        others = [_candidate(f"noise{i}", rng.normal(size=(25, 30))) for i in range(3)]
        found = cw.select_weights([_candidate("good", good), *others], _users(truth, n_items=30))
        assert found.fused >= max(found.single.values()) - 1e-6
        moved += set(found.weights) != {"good"}
    assert moved <= 3


@pytest.mark.parametrize(
    ("lead", "trained", "start"),
    [
        (0.07, True, [0, 1]),  # less than 1.5 standard errors of .5 / sqrt(100)
        (0.08, True, [0]),
        (-0.07, True, [1, 0]),
        (-0.08, True, [1]),
        (0.01, False, [0]),  # no two of a kind
    ],
)
def test_where_validation_cannot_tell_the_sum_starts_from_the_best_of_both_kinds(lead, trained, start):
    """The differences of 100 users are `lead` ± .5; the last component is worse than both."""
    noise = np.tile(np.array([0.5, -0.5], np.float32), 50)
    closed = np.full(100, 0.6, np.float32)
    components = [(closed + np.float32(lead) + noise, trained), (closed, False), (closed - 0.5, False)]
    assert cw.start_of(components) == start


def test_two_components_that_are_as_good_are_summed_where_no_step_gains_enough():
    """Each ranks the held-out item of other 2 of 100 users first, which is too few for a step from either."""
    model, ease = np.zeros((2, 100, 30), np.float32)
    model[:2, 3], ease[2:4, 3] = 1, 1
    model[2:, 4:], ease[:2, 4:], ease[4:, 4:] = 1, 1, 1
    candidates, on = [_candidate("model", model), _candidate("ease", ease)], _users([(u, 3) for u in range(100)], 30)
    trained = [dataclasses.replace(candidates[0], trained=True), candidates[1]]
    assert cw.select_weights(trained, on).weights == {"model": 1.0, "ease": 1.0}


def test_validation_chooses_the_settings_of_a_component():
    scores = np.zeros((2, 12), np.float32)
    scores[0, 3] = scores[1, 5] = 1
    on = _users([(0, 3), (1, 5)], n_items=12)
    found = cw.select_weights([_candidate("x", -scores, l2=1.0), _candidate("x", scores, l2=3.0)], on)
    assert found.settings == {"x": {"l2": 3.0}}
    assert found.weights == {"x": 1.0}
    assert found.single == {"x": pytest.approx(1)}


def test_seen_items_and_items_outside_the_split_are_not_ranked():
    scores = np.arange(12, 0, -1, dtype=np.float32)[None].repeat(1, 0)  # item 0 first
    on = _users([(0, 2)], seen=([0], [0]), n_items=12, allowed=np.arange(12) != 1)
    assert cw.select_weights([_candidate("x", scores)], on).fused == pytest.approx(1)


def test_short_lists_rank_as_the_catalogue_does():
    rng = np.random.default_rng(0)
    truth = [(u, int(i)) for u in range(30) for i in rng.choice(400, 3, replace=False)]
    on = _users(truth, n_items=400)
    components = [_candidate(name, rng.normal(size=(30, 400))) for name in "ab"]
    found = cw.select_weights(components, on)
    total = sum(found.weights.get(c.name, 0) * (c.users / c.users.std(1, keepdims=True)) for c in components)
    alone = cw.select_weights([_candidate("sum", total)], on)
    assert found.fused == pytest.approx(alone.fused, abs=1e-6)


def test_users_of_whom_a_component_says_nothing_are_ranked_by_popularity():
    """Alone, the component is worth for them what popularity is, which has a small weight in the final score."""
    scores = np.zeros((2, 12), np.float32)
    scores[0, 3] = 1
    on = dataclasses.replace(_users([(0, 3), (1, 5)], n_items=12), popularity=np.eye(12, dtype=np.float32)[5])
    assert cw.select_weights([_candidate("x", scores)], on).single == {"x": pytest.approx(1)}


def test_the_selection_standardizes_and_measures_as_the_devices_do():
    rng = np.random.default_rng(0)
    users, items = rng.normal(size=(6, 3)).astype(np.float32), rng.normal(size=(40, 3)).astype(np.float32)
    users[1] = 0
    expected = np.asarray(inverse_deviation(users, items))[:, None] * (users @ items.T)
    found = cw.standardized_scores(cw.Candidate("x", {}, users, items, trained=False), slice(0, 6))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    truth = rng.random((6, 40)) < 0.2
    hits = np.take_along_axis(truth, np.argsort(-found, axis=1, kind="stable"), axis=1)
    by_metrics = ndcg(jnp.asarray(hits), jnp.asarray(truth.sum(1), jnp.int32), 10)
    measured = cw.ndcg_of_lists(found, truth, truth.sum(1))
    np.testing.assert_allclose(np.delete(measured, 1), np.delete(by_metrics, 1), rtol=1e-5)  # 1: equal scores


def test_held_out_items_are_listed_on_the_same_terms_as_others():
    """Item 120 is none of the component's first `DEPTH`: alone in the list, it would lack the rivals before it."""
    on = _users([(0, 5), (0, 120)], n_items=150)
    lists = cw._short_lists([_candidate("x", -np.arange(150, dtype=np.float32)[None])], on)
    assert lists.listed.sum() == cw.DEPTH and lists.truth.sum() == 1 and lists.n_truth.tolist() == [2]


def test_a_component_whose_scores_are_not_finite_is_refused():
    scores = np.ones((3, 4), np.float32)
    scores[1, 2] = np.nan
    on = _users([(0, 0), (1, 1), (2, 2)], n_items=4)
    with pytest.raises(FloatingPointError, match=r"component odd with \{'l2': 3\} has scores that are not"):
        cw.select_weights([_candidate("odd", scores, l2=3)], on)


def test_one_validation_user_moves_nothing():
    """The best component is not left, and the start is the sum, as a single user has no noise to compare with."""
    worse, better = np.array([[1.0, 2, 3, 4]]), np.array([[4.0, 3, 2, 1]])
    on = _users([(0, 0)], n_items=4)
    assert cw.select_weights([_candidate("worse", worse), _candidate("better", better)], on).weights == {"better": 1.0}
    values = np.ones(1, np.float32)
    assert cw.start_of([(values, True), (0 * values, False)]) == [0, 1]
