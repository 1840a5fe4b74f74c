"""Selection of the launch prior on validation: that it finds what pays, and nothing else."""

import numpy as np
import pytest

from fused_rec.evaluation.item_sets import item_sets
from fused_rec.training.component_weights import Candidate, ValidationUsers
from fused_rec.training.launch_weights import _Lists, best_launch

USERS, ITEMS, NEW = 60, 100, 10  # the last items are new
COST = 0.01
IS_NEW = np.arange(ITEMS) >= ITEMS - NEW
EXPECTED = np.where(IS_NEW, np.linspace(-1.5, 1.5, ITEMS), 0)  # expected popularity of new items, in any units


def _market(new_truth):
    """Scores that rank new items last, and two held-out items a user: a known one among the first ten, a new one."""
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(USERS, ITEMS)).astype(np.float32)
    scores[:, IS_NEW] = -4
    known = np.argsort(-scores, axis=1)[np.arange(USERS), rng.integers(10, size=USERS)]
    pairs = [*enumerate(known), *((user, item) for user, item in enumerate(new_truth) if item is not None)]
    user, item = np.array(pairs).T
    truth, seen = item_sets(user, item, USERS), item_sets(np.array([], int), np.array([], int), USERS)
    on = ValidationUsers(np.arange(USERS), truth, seen, np.ones(ITEMS, bool), np.zeros(ITEMS, np.float32))
    share, users = np.ones(USERS, np.float32), np.eye(USERS, dtype=np.float32)
    return Candidate("sum", {"share": share}, users, scores.T.copy(), trained=False), on


def test_popular_new_items_are_raised_by_expected_popularity():
    """Everybody takes the new item of the highest expectation: it costs a rank where nothing is held out."""
    score, on = _market([ITEMS - 1] * USERS)
    found = best_launch(score, None, IS_NEW, EXPECTED, on, COST)
    assert found is not None and found.slope > 0 and found.taste == 0
    lists = _Lists.of(score, None, IS_NEW, EXPECTED, on, [(0.0, 0.0), (found.slope, 0.0)])
    before, after = lists.quality(0, 0.0), lists.quality(1, found.level)
    assert before.new_recall == 0 and after.new_recall > 0.5
    assert after.known_ndcg >= (1 - COST) * before.known_ndcg
    assert after.ndcg > before.ndcg and after.recall > before.recall


def test_taste_tells_who_takes_which():
    rng = np.random.default_rng(1)
    taken = rng.integers(ITEMS - NEW, ITEMS, size=USERS)
    score, on = _market(taken)
    rows = np.zeros((USERS, ITEMS), np.float32)
    rows[:, IS_NEW] = rng.normal(size=(USERS, NEW)) * 0.3
    rows[np.arange(USERS), taken] += 3
    taste = Candidate("launch_taste", {"weight": 0.3}, np.eye(USERS, dtype=np.float32), rows.T.copy(), trained=False)
    found = best_launch(score, taste, IS_NEW, np.zeros(ITEMS), on, COST)
    assert found is not None and found.taste > 0 and found.slope == 0


def test_new_items_that_cost_more_than_they_bring_stay_where_they_are():
    """Only one user takes a new item: raised for all, it would push held-out known items from the first ten."""
    score, on = _market([ITEMS - 5] + [None] * (USERS - 1))
    assert best_launch(score, None, IS_NEW, np.zeros(ITEMS), on, COST) is None


@pytest.mark.parametrize("new", [IS_NEW, np.zeros(ITEMS, bool), np.ones(ITEMS, bool)])
def test_without_evidence_there_is_no_prior(new):
    """No held-out new item, no new item, or no other."""
    score, on = _market([None] * USERS)
    assert best_launch(score, None, new, EXPECTED, on, COST) is None


def test_the_lists_measure_as_a_ranking_of_the_catalogue():
    score, on = _market([ITEMS - 1 - user % NEW for user in range(USERS)])
    level, slope = 3.5, 1.0
    lists = _Lists.of(score, None, IS_NEW, EXPECTED, on, [(slope, 0.0)])
    total = (score.users @ score.items.T) + np.where(IS_NEW, level + slope * EXPECTED, 0)
    first = np.argsort(-total, axis=1)[:, :20]
    recalls = {"all": [], "known": [], "new": []}
    for user in range(USERS):
        truth = set(on.truth.items[on.truth.indptr[user] : on.truth.indptr[user + 1]].tolist())
        groups = {"all": truth, "known": {i for i in truth if not IS_NEW[i]}, "new": {i for i in truth if IS_NEW[i]}}
        for name, group in groups.items():
            recalls[name].append(len(group & set(first[user].tolist())) / len(group))
    found = lists.quality(0, level)
    assert 0 < found.new_recall < 1
    expected = [np.mean(recalls[name]) for name in ("all", "known", "new")]
    assert [found.recall, found.known_recall, found.new_recall] == pytest.approx(expected)
