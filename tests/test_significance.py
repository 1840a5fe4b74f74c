"""Differences against closed forms and SciPy; adjusted p values, slices and summaries by hand."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from fused_rec.evaluation.item_sets import item_sets
from fused_rec.evaluation.ranking import RankingSpec, UserMetrics
from fused_rec.evaluation.significance import (
    differences,
    holm,
    paired_bootstrap,
    paired_bootstraps,
    summarize,
)
from fused_rec.evaluation.slices import bands, item_slices, user_slices


def noise(*shape: int, seed: int = 0, scale: float = 1.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0.5, scale, shape)


def test_a_constant_difference_has_no_interval():
    base = noise(3, 40)
    found = paired_bootstrap(base + 0.25, base, draws=500)
    assert (found.difference, found.low, found.high) == pytest.approx((0.25, 0.25, 0.25), abs=1e-12)
    assert found.p == 1 / 501
    assert found.relative == pytest.approx(0.25 / base.mean())


def test_equal_models_differ_by_chance_only():
    base = noise(2, 30)
    found = paired_bootstrap(base, base, draws=200)
    assert (found.difference, found.low, found.high, found.relative, found.p) == (0, 0, 0, 0, 1)


def test_a_multiple_has_an_exact_relative_difference():
    """a = 1.2 b whatever is drawn, as pairs stay pairs and seeds are drawn together."""
    base = np.abs(noise(4, 50))
    found = paired_bootstrap(1.2 * base, base, draws=300)
    assert (found.relative, found.relative_low, found.relative_high) == pytest.approx((0.2, 0.2, 0.2))
    assert found.low < found.difference < found.high


def test_one_seed_agrees_with_scipy():
    a, b = noise(1, 400, seed=1), noise(1, 400, seed=2) - 0.1
    found = paired_bootstrap(a, b)
    expected = scipy.stats.bootstrap((a[0] - b[0],), np.mean, method="percentile", rng=np.random.default_rng(3))
    assert (found.low, found.high) == pytest.approx(tuple(expected.confidence_interval), abs=0.01)
    assert found.p == pytest.approx(scipy.stats.ttest_rel(a[0], b[0]).pvalue, abs=0.02)


@pytest.mark.parametrize("runs_of_b", [1, 4])
def test_where_only_seeds_vary_it_is_the_t_test(runs_of_b):
    """Users alike, seeds apart: Student's t of the seeds' means, against one run and in pairs."""
    rng = np.random.default_rng(1)
    a, b = np.array([0.1, 0.2, 0.3, 0.6]), rng.normal(0, 0.1, runs_of_b)
    found = paired_bootstrap(*(np.repeat(x[:, None], 30, axis=1) for x in (a, b)), draws=100_000)
    expected: Any = scipy.stats.ttest_1samp(a - b, 0)
    low, high = expected.confidence_interval(0.95)
    assert found.difference == pytest.approx((a - b).mean())
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.01)
    assert found.p == pytest.approx(expected.pvalue, abs=0.005)


def test_the_interaction_of_user_and_seed_counts_once():
    """Seeds differ by less than the interaction explains: the interval is that of one run, the mean over the seeds."""
    a = np.random.default_rng(8).normal(0, 1, (4, 300))
    a -= a.mean(1, keepdims=True) / 2
    found, of_means = (paired_bootstrap(x, np.zeros((1, 300))) for x in (a, a.mean(0, keepdims=True)))
    assert dataclasses.astuple(found)[1:3] == dataclasses.astuple(of_means)[1:3]


@pytest.mark.parametrize("seeds, runs_of_b", [(3, 3), (3, 1), (5, 5), (5, 1)])
@pytest.mark.parametrize("of_users", [10.0, 1.0, 0.25])
def test_intervals_cover_the_truth(of_users, seeds, runs_of_b):
    """Fresh users and seeds in each study, no true difference; the users' standard error is a multiple of the seeds'.

    In 1,500 such studies of each kind the intervals cover .94 to .97. Drawing the S seeds with replacement, without
    S / (S - 1) and t, covers .95 to .97 where users dominate, .91 to .93 where both are equal, and where seeds
    dominate .79 (3 against 3), .78 (3 against 1), .86 (5 against 5) and .87 (5 against 1).
    """
    rng, users, studies = np.random.default_rng(9), 80, 400
    of_seeds = 1 / of_users / math.sqrt(users * (1 / seeds + (runs_of_b > 1) / runs_of_b))
    covered = significant = 0
    for study in range(studies):
        b = rng.normal(3, 2, users) + np.zeros((runs_of_b, 1))
        a = b[:1] + rng.normal(0, 1, users) + np.zeros((seeds, 1))
        for runs in (a, b) if runs_of_b > 1 else (a,):  # one run is deterministic
            runs += rng.normal(0, of_seeds, (len(runs), 1)) + rng.normal(0, 0.5, runs.shape)
        found = paired_bootstrap(a, b, draws=200, seed=study)
        covered += found.low <= 0 <= found.high
        significant += found.p < 0.05
    assert 0.93 <= covered / studies <= 0.98
    assert 0.02 <= significant / studies <= 0.07  # as many as do not cover, but for intervals that are not symmetric


def test_more_runs_of_one_model_add_their_own_noise():
    """Five runs against three, users alike: the variances add up, each with its t distribution."""
    rng = np.random.default_rng(2)
    a, b = rng.normal(0, 0.1, (5, 1)), rng.normal(0, 0.3, (3, 1))
    found = paired_bootstrap(a + np.zeros(20), b + np.zeros(20), draws=100_000)
    noise = [x.std(ddof=1) / math.sqrt(len(x)) * rng.standard_t(len(x) - 1, 100_000) for x in (a, b)]
    assert np.array([found.low, found.high]) - found.difference == pytest.approx(
        np.quantile(noise[0] + noise[1], (0.025, 0.975)), rel=0.03
    )


def test_rounding_is_no_difference():
    """Equal lists whose sums of float32 were taken in another order, always a little lower."""
    base = np.abs(noise(5, 200)).astype(np.float32)
    found = paired_bootstrap(base * np.float32(1 - 1e-7), base, draws=200)
    assert dataclasses.astuple(found) == (0, 0, 0, 0, 0, 0, 1)
    assert paired_bootstrap(base * np.float32(1 - 1e-5), base, draws=200).p == 1 / 201


def test_users_without_a_value_are_left_out_of_both():
    a, b = np.array([[1.0, np.nan, 3.0, 9.0]]), np.array([[0.0, 1.0, 2.0, np.nan]])
    assert paired_bootstrap(a, b, draws=10).difference == 1.0
    with pytest.raises(ValueError, match="no user has a value"):
        paired_bootstrap(np.array([[np.nan]]), np.array([[1.0]]))
    with pytest.raises(ValueError, match="a has 4 users and b 3"):
        paired_bootstrap(a, b[:, :3])
    with pytest.raises(ValueError, match="draws is 0"):
        paired_bootstrap(a, b, draws=0)


def test_pairs_tested_together_are_tested_as_alone():
    """With other users without a value, with one run or several of either model, and of the same users."""
    holes = noise(3, 60, seed=4)
    holes[1, 7] = np.nan
    runs = [noise(3, 60, seed=1), noise(3, 60, seed=2) - 0.2, holes, noise(1, 60, seed=3), noise(4, 60, seed=5)]
    pairs = [(a, b) for a in runs for b in runs]
    together = [dataclasses.astuple(found) for found in paired_bootstraps(pairs, draws=200, seed=6)]
    alone = [dataclasses.astuple(paired_bootstrap(a, b, draws=200, seed=6)) for a, b in pairs]
    np.testing.assert_allclose(together, alone, rtol=1e-10)  # sums of products differ in the last bits
    assert len({found[1] for found in alone}) > len(runs)
    assert paired_bootstraps([]) == []


def test_blocks_of_draws_change_nothing(monkeypatch):
    a, b = noise(2, 50, seed=1), noise(2, 50, seed=2)
    whole = paired_bootstrap(a, b, draws=100)
    monkeypatch.setattr("fused_rec.evaluation.significance.BLOCK", 350)
    assert dataclasses.astuple(paired_bootstrap(a, b, draws=100)) == pytest.approx(dataclasses.astuple(whole))


def test_holm_by_hand():
    """Sorted .01 .02 .03 .04 times 4 3 2 1 = .04 .06 .06 .04, and never falling: .06 for the last."""
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.6, 0.5]) == [1.0, 1.0]
    assert holm([]) == []


def test_bands_by_hand():
    found = {name: np.flatnonzero(mask).tolist() for name, mask in bands(np.array([0, 1, 4, 5, 19, 20, 999])).items()}
    assert found == {"0": [0], "1-4": [1, 2], "5-19": [3, 4], "20+": [5, 6]}


def test_user_slices_by_hand():
    metrics = {
        "ndcg@10": np.array([1.0, 0.0, 0.5], np.float32),
        "recall@10": np.array([1.0, 0.5, 0.0], np.float32),
        "auc": np.array([np.nan, 0.5, 1.0], np.float32),
    }
    per_user = UserMetrics(np.array([1, 3, 4], np.int32), metrics, {})
    members = {"odd": np.array([0, 1, 0, 1, 0], bool), "none": np.array([1, 0, 1, 0, 0], bool)}
    assert user_slices(per_user, members) == {"odd": {"users": 2, "ndcg@10": 0.5, "recall@10": 0.75, "auc": 0.5}}


@pytest.mark.parametrize("partial", [False, True])
def test_item_slices_rank_against_everything(partial):
    """User 0 ranks items 3 1 2 0 and has seen 4; held out are 3 (warm) and 1 (cold). User 1 ranks 4 2 ...; held out 2.

    Cold: item 1 stands at rank 2, below 3, which stays in the list; it beats 2 and 0, not 3.
    Warm: item 3 leads; item 2 of user 1 stands behind 4. Item 0 is in the slice that nobody holds out.
    """
    scores = jnp.array([[1, 8, 4, 9, 99], [1, 2, 4, 3, 9]], jnp.float32)

    def scorer(users):
        return scores[users]

    found = item_slices(
        jax.tree_util.Partial(scorer) if partial else scorer,
        {
            "none": np.array([1, 0, 0, 0, 0], bool),
            "cold": np.array([0, 1, 0, 0, 1], bool),
            "warm": np.array([0, 0, 1, 1, 0], bool),
        },
        RankingSpec(item_sets(np.array([0]), np.array([4]), 2), 5),
        item_sets(np.array([0, 0, 1]), np.array([3, 1, 2]), 2),
    )
    second = 1 / math.log2(3)
    assert list(found) == ["cold", "warm"]
    assert found["cold"] == pytest.approx(
        {"items": 1, "users": 1, "ndcg@10": second, "recall@10": 1.0, "auc": 2 / 3, "recall@20": 1.0}, abs=1e-6
    )
    assert found["warm"] == pytest.approx(
        {
            "items": 2,
            "users": 2,
            "ndcg@10": (1 + second) / 2,
            "recall@10": 1.0,
            "auc": (1 + 3 / 4) / 2,
            "recall@20": 1.0,
        },
        abs=1e-6,
    )


def test_item_slices_leave_out_what_is_no_candidate():
    scores = jnp.array([[1.0, 2.0, 3.0]])
    found = item_slices(
        lambda users: scores[users],
        {"a": np.array([1, 0, 0], bool), "b": np.array([0, 1, 0], bool)},
        RankingSpec(item_sets(np.array([], int), np.array([], int), 1), 3, np.array([1, 2])),
        item_sets(np.array([0, 0]), np.array([0, 1]), 1),
    )
    assert list(found) == ["b"]
    assert found["b"]["ndcg@10"] == pytest.approx(1 / math.log2(3))


@pytest.fixture
def report() -> dict:
    values = {
        "fused": {"ndcg@10": np.array([[0.5, 0.6], [0.7, 0.8]])},
        "no_social_edges": {"ndcg@10": np.array([[0.4, 0.5], [0.6, 0.7]])},
        "popularity": {"ndcg@10": np.array([[0.0, 0.0]])},
    }
    rows = [
        {"variant": name, "seed": seed, "test": {"ndcg@10": mean}, "seconds": 10.0 + seed, "parameters": parameters}
        for name, seed, mean, parameters in [
            *[("fused", 0, 0.55, 1200), ("fused", 1, 0.75, 1200)],
            *[("no_social_edges", 0, 0.45, 1000), ("no_social_edges", 1, 0.65, 1000)],
            *[("popularity", 0, 0.0, None), ("bad", 1, 0.3, 7)],
        ]
    ]
    failures = [{"variant": "bad", "seed": 0, "message": "NonFiniteLossError: 100 % | of_it is\nnan & <worse>"}]
    return {
        "reference": "fused",
        "summary": summarize(["fused", "no_social_edges", "bad", "popularity"], rows, failures, values),
        "differences": differences(values, "fused"),
        "failures": failures,
    }


def test_a_summary_by_hand(report):
    fused, _, bad, popularity = report["summary"]
    assert fused["metrics"]["ndcg@10"]["mean"] == pytest.approx(0.65)
    assert fused["metrics"]["ndcg@10"]["sd"] == pytest.approx(0.2 / math.sqrt(2))
    assert (fused["seeds"], fused["seconds"], fused["parameters"]) == (2, 10.5, 1200)
    assert popularity["metrics"]["ndcg@10"] == {"mean": 0, "sd": None, "low": 0, "high": 0}
    assert (bad["failed"], bad["metrics"]) == (True, {})  # though one seed went well
    no_social_edges, against_popularity = report["differences"]
    assert no_social_edges["difference"] == pytest.approx(0.1)
    assert no_social_edges["p_holm"] == pytest.approx(2 * no_social_edges["p"])
    assert math.isnan(against_popularity["relative"])
