"""The launch prior by hand, and its laws."""

import jax.numpy as jnp
import numpy as np
import pytest

from fused_rec.baselines.launch import PRIOR, TASTE, Launch, _launches, expected_popularity, launch_parts, new_items
from fused_rec.baselines.neighbors import Interactions
from fused_rec.model.late_fusion import inverse_deviation

# Items 0 and 1 have three and one interactions. New: 2 reads like 0, 3 like 1, and 4 has no text.
TEXT = np.array([[1, 0], [0, 1], [1, 0], [0, 1], [0, 0]], np.float32)
MARKET = Interactions(np.array([0, 1, 2, 3]), np.array([0, 0, 0, 1]), 4, 5, item_text=TEXT)
HISTORY = np.array([[1, 0, 0, 0, 0]] * 3 + [[0, 1, 0, 0, 0]], np.float32)


def _added(interactions: Interactions, launch: Launch) -> dict[str, np.ndarray]:
    """What each component adds to the scores of all users, standardized and weighted as late fusion does."""
    found = {}
    for part in launch_parts(interactions, launch):
        users = np.ones((4, 1), np.float32) if part.user_source == "constant" else HISTORY @ part.factors.source
        scale = part.weight * np.asarray(inverse_deviation(jnp.asarray(users), jnp.asarray(part.factors.target)))
        found[part.name] = scale[:, None] * (users @ part.factors.target.T)
    return found


def test_launches_are_read_off_the_past():
    """Ten interactions, one a day. Item 1 is new at each cut but the last two, and item 0 at none; 4 has no text."""
    item = np.array([0, 0, 0, 0, 0, 0, 0, 1, 1, 4])
    timed = MARKET._replace(user=np.arange(10), item=item, n_users=10, age=np.arange(10, 0, -1).astype(np.float32))
    items, counts = _launches(timed)
    cuts = {9: [2, 3], 8: [2, 3], 7: [1, 2, 3], 6: [1, 2, 3], 5: [1, 2, 3]}  # interactions before, new items with text
    assert items.tolist() == [item for new in cuts.values() for item in new]
    assert counts.tolist() == [0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0]  # at cut 7 item 1 sells the next one
    found = expected_popularity(timed)
    np.testing.assert_allclose(found, [0, 0, -1, 1, 0], atol=1e-6)  # what reads like item 1 sells


def test_without_times_the_counts_of_all_items_are_their_launches():
    items, counts = _launches(MARKET)
    assert (items.tolist(), counts.tolist()) == ([0, 1], [3, 1])


def test_expected_popularity_by_hand():
    """New items that read like the popular one are expected to be popular; without text the expectation is the mean."""
    assert new_items(MARKET).tolist() == [False, False, True, True, True]
    np.testing.assert_allclose(expected_popularity(MARKET), [0, 0, 1, -1, 0], atol=1e-6)


def test_the_prior_by_hand():
    found = _added(MARKET, Launch(level=2.0, slope=0.5, taste=3.0))
    np.testing.assert_allclose(found[PRIOR], [[0, 0, 2.5, 1.5, 2]] * 4, rtol=1e-5)
    np.testing.assert_allclose(found[TASTE], [[0, 0, 3, -3, 0]] * 3 + [[0, 0, -3, 3, 0]], rtol=1e-5)


def test_its_units_do_not_depend_on_the_number_of_other_items():
    """With refit some items are no longer new: the same weights raise the others as before."""
    more = MARKET._replace(n_items=50, item_text=np.concatenate([TEXT[:2], np.ones((45, 2), np.float32), TEXT[2:]]))
    more = more._replace(user=np.arange(47) % 4, item=np.arange(47))
    [part] = launch_parts(more, Launch(level=2.0))
    scale = part.weight * np.asarray(inverse_deviation(jnp.ones((1, 1)), jnp.asarray(part.factors.target)))
    np.testing.assert_allclose(scale * part.factors.target[:, 0], [0] * 47 + [2] * 3, rtol=1e-5)


@pytest.mark.parametrize("item", [np.arange(5), np.array([], int)])
def test_without_new_items_or_without_others_nothing_is_added(item):
    interactions = MARKET._replace(user=np.zeros(len(item), int), item=item)
    assert list(launch_parts(interactions, Launch(level=2.0, slope=0.5, taste=3.0))) == []


@pytest.mark.parametrize("text", [None, np.zeros((5, 2), np.float32)])
def test_without_text_all_new_items_are_raised_alike(text):
    [part] = launch_parts(MARKET._replace(item_text=text), Launch(level=2.0, slope=0.5, taste=3.0))
    np.testing.assert_allclose(part.factors.target[:, 0], [0, 0, 2, 2, 2])


def test_items_with_interactions_get_nothing():
    for part in launch_parts(MARKET, Launch(level=1.0, slope=1.0, taste=1.0)):
        assert not part.factors.target[~new_items(MARKET)].any()
