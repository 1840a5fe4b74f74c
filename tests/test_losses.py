"""Losses on two users and three items with every number written out, and the laws that devices rely on."""

from math import exp, log, log1p, sqrt

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fused_rec.model import losses
from fused_rec.model.losses import Negatives

# Scores / temperature (.5): user 0 gives items 0 1 2 the scores 2 0 2, user 1 gives them 0 4 4.
USER = jnp.array([[1.0, 0.0], [0.0, 2.0]])
CATALOGUE = jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
TEMPERATURE = 0.5
# User 0 holds items 0 and 2, user 1 holds item 1; the last place is padding.
ITEMS = jnp.array([[0, 2], [1, 0]], jnp.int32)
MASK = jnp.array([[1.0, 1.0], [1.0, 0.0]])
COUNT = sqrt(2) + 1  # users count by the root of their positives: 1.4142 and 1
NONE = jnp.zeros(3)  # bias
NO_2 = jnp.array([0.0, 0.0, -jnp.inf])

# Compiled: operation by operation these tests take ten times as long.
softmax, sampled_softmax, bpr = (
    jax.jit(loss, static_argnames="temperature") for loss in (losses.softmax, losses.sampled_softmax, losses.bpr)
)


def close(result, total, count=COUNT):
    assert [float(part) for part in result] == pytest.approx([total, count], rel=1e-5)


def test_softmax_by_hand():
    # User 0: log(2 e^2 + 1) - 2 = .7586 at both; user 1: log(1 + 2 e^4) - 4 = .7023.
    user_0, user_1 = log(2 * exp(2) + 1) - 2, log(1 + 2 * exp(4)) - 4
    assert (user_0, user_1) == pytest.approx((0.75862, 0.70226), abs=1e-5)
    close(softmax(USER, CATALOGUE, ITEMS, MASK, NONE, temperature=TEMPERATURE), sqrt(2) * user_0 + user_1)


def test_a_bias_is_added_to_the_logits():
    # Scores 2 0 2 and 0 4 4 become 2 1 5 and 0 5 7.
    user_0 = log(exp(2) + exp(1) + exp(5)) - (2 + 5) / 2
    user_1 = log(exp(0) + exp(5) + exp(7)) - 5
    bias = jnp.array([0.0, 1.0, 3.0])
    close(softmax(USER, CATALOGUE, ITEMS, MASK, bias, temperature=TEMPERATURE), sqrt(2) * user_0 + user_1)
    # Of one negative, item 1 or 2, which stands for all three items.
    user_0 = (log1p(3 * exp(1 - 2)) + log1p(3 * exp(1 - 5))) / 2
    arguments = USER, CATALOGUE, ITEMS, MASK, bias
    close(sampled_softmax(*arguments, Negatives(jnp.array([1]), 3), temperature=TEMPERATURE), sqrt(2) * user_0 + log(4))
    negatives = jnp.array([[1, 1], [0, 2]], jnp.int32)
    user_0 = (log1p(exp(1 - 2)) + log1p(exp(1 - 5))) / 2
    expected = sqrt(2) * user_0 + log1p(exp(0 - 5))
    close(bpr(USER, CATALOGUE, ITEMS, MASK, bias, negatives, temperature=TEMPERATURE), expected)


def test_softmax_without_an_absent_item():
    # Item 2 is no alternative, and user 0 holds item 0 alone: log(e^2 + 1) - 2 = .1269 and log(1 + e^4) - 4 = .0181.
    mask = jnp.array([[1.0, 0.0], [1.0, 0.0]])
    expected = log1p(exp(-2)) + log1p(exp(-4))
    close(softmax(USER, CATALOGUE, ITEMS, mask, NO_2, temperature=TEMPERATURE), expected, 2)


def test_padding_may_point_at_an_absent_item():
    """Padding points at item 0; were its score -inf, 0 * inf would make the loss and its gradient NaN."""
    no_0 = jnp.array([-jnp.inf, 0.0, 0.0])
    items, mask = jnp.array([[2, 0], [1, 0]], jnp.int32), jnp.array([[1.0, 0.0], [1.0, 0.0]])
    # User 0: log(1 + e^2) - 2 = .1269 at item 2; user 1: log(2 e^4) - 4 = .6931.
    close(softmax(USER, CATALOGUE, items, mask, no_0, temperature=TEMPERATURE), log1p(exp(-2)) + log(2), 2)
    slope = jax.grad(lambda c: softmax(USER, c, items, mask, no_0, temperature=TEMPERATURE)[0])(CATALOGUE)
    assert jnp.isfinite(slope).all()


def test_sampled_softmax_by_hand():
    # Negatives 1 and 2 stand for all three items: their sum of exp counts 3 / 2.
    # User 0: rest = 1.5 (1 + e^2); loss log(1 + rest / e^2) at both. User 1: rest = 1.5 (2 e^4); log(1 + 3).
    user_0, user_1 = log1p(1.5 * (1 + exp(2)) / exp(2)), log(4)
    assert (user_0, user_1) == pytest.approx((0.99436, 1.38629), abs=1e-5)
    arguments = USER, CATALOGUE, ITEMS, MASK, NONE
    negatives = Negatives(jnp.array([1, 2]), 3)
    close(sampled_softmax(*arguments, negatives, temperature=TEMPERATURE), sqrt(2) * user_0 + user_1)


def test_sampled_softmax_does_not_count_padding_or_absent_items():
    # Two items exist, so negative 1 stands for two: user 0, who holds item 0 alone, log(1 + 2 / e^2), user 1
    # log(1 + 2 e^4 / e^4).
    expected = log1p(2 * exp(-2)) + log(3)
    arguments = USER, CATALOGUE, ITEMS, jnp.array([[1.0, 0.0], [1.0, 0.0]]), NONE
    close(sampled_softmax(*arguments, Negatives(jnp.array([1]), 2), temperature=TEMPERATURE), expected, 2)
    padded = Negatives(jnp.array([-1, 1, -1]), 2)
    close(sampled_softmax(*arguments, padded, temperature=TEMPERATURE), expected, 2)


def test_bpr_by_hand():
    # User 0: item 0 over 1, margin 2, log(1 + e^-2) = .1269; item 2 over 0, margin 0, log 2 = .6931.
    # User 1: item 1 over 0, margin 4, log(1 + e^-4) = .0181; the second place is padding.
    negatives = jnp.array([[1, 0], [0, 2]], jnp.int32)
    expected = sqrt(2) * (log1p(exp(-2)) + log(2)) / 2 + log1p(exp(-4))
    close(bpr(USER, CATALOGUE, ITEMS, MASK, NONE, negatives, temperature=TEMPERATURE), expected)


def test_info_nce_by_hand():
    # Cosines of node 0's readout (1, 0) with the first rounds (2, 0) and (0, 3): 1 and 0; node 1's (.6, .8): .6 and .8.
    one, other = jnp.array([[5.0, 0.0], [0.3, 0.4], [9.0, 9.0]]), jnp.array([[2.0, 0.0], [0.0, 3.0], [9.0, 9.0]])
    node_0, node_1 = log1p(exp(-2)), log1p(exp(-0.4))  # differences over the temperature .5

    def check(nodes, mask, everyone, expected, count):
        candidates = losses.Candidates(everyone, other[everyone])
        close(losses.info_nce(one[nodes], other[nodes], nodes, mask, candidates, TEMPERATURE), expected, count)

    both = jnp.array([0, 1])
    check(both, jnp.ones(2), both, node_0 + node_1, 2)
    # Named twice, padded, and masked: the batch is a set.
    nodes, mask = jnp.array([0, 1, 0, 2]), jnp.array([1.0, 1.0, 1.0, 0.0])
    everyone = jnp.array([0, 1, 0, -1])
    check(nodes, mask, everyone, node_0 + node_1, 2)
    # Two devices' shares of the same: one has both, the other node 0 alone, which is half of it.
    check(nodes[:2], mask[:2], everyone, node_0 / 2 + node_1, 1.5)
    check(nodes[2:], mask[2:], everyone, node_0 / 2, 0.5)


def test_no_user_in_the_batch():
    none = jnp.zeros((2, 2))
    close(softmax(USER, CATALOGUE, ITEMS, none, NONE, temperature=TEMPERATURE), 0, 0)


def test_absent_items_get_no_gradient():
    mask = jnp.array([[1.0, 0.0], [1.0, 0.0]])
    slope = jax.grad(lambda c: softmax(USER, c, ITEMS, mask, NO_2, temperature=TEMPERATURE)[0])(CATALOGUE)
    assert not slope[2].any()
    assert slope[:2].any(axis=1).all()


# --- laws ----------------------------------------------------------------------------------------------------------

LAW_ITEMS = 200


def draw(loss, n_users=6):
    """A loss of (user, catalogue, items, mask, negatives) alone, and a random batch for it."""
    rng = np.random.default_rng(0)
    user, catalogue = (jnp.asarray(rng.normal(size=(n, 4)), jnp.float32) for n in (n_users, LAW_ITEMS))
    items = jnp.asarray(rng.integers(LAW_ITEMS, size=(n_users, 3)), jnp.int32)
    mask = jnp.asarray(np.arange(3)[None, :] < rng.integers(0, 4, size=(n_users, 1)), jnp.float32)
    negatives = jnp.asarray(rng.integers(LAW_ITEMS, size=(n_users, 3)), jnp.int32)
    bias = jnp.asarray(rng.normal(size=LAW_ITEMS), jnp.float32)
    there = jnp.where(jnp.arange(LAW_ITEMS) != 7, bias, -jnp.inf)

    def of_batch(user, catalogue, items, mask, negatives):
        batch = user, catalogue, items, mask
        if loss == "softmax":
            return losses.softmax(*batch, there, TEMPERATURE)
        if loss == "sampled_softmax":
            drawn = Negatives(jnp.arange(0, LAW_ITEMS, 9), LAW_ITEMS - 1)
            return losses.sampled_softmax(*batch, bias, drawn, TEMPERATURE)
        return losses.bpr(*batch, bias, negatives, TEMPERATURE)

    return jax.jit(of_batch), (user, catalogue, items, mask, negatives)


BY_LOSS = pytest.mark.parametrize("loss", ["softmax", "sampled_softmax", "bpr"])


@BY_LOSS
def test_sum_and_count_add_up_over_a_split_batch(loss):
    function, (user, catalogue, *batch) = draw(loss)
    whole = function(user, catalogue, *batch)
    parts = [function(user[part], catalogue, *(x[part] for x in batch)) for part in (slice(3), slice(3, None))]
    assert parts[0][1] != parts[1][1]
    np.testing.assert_allclose(np.sum(parts, axis=0), whole, rtol=1e-5)


@BY_LOSS
def test_masked_rows_and_places_contribute_nothing(loss):
    function, (user, catalogue, items, mask, negatives) = draw(loss)
    mask = mask.at[2].set(0)
    changed = items.at[2].set(0) * (mask > 0) + 5 * (mask == 0)
    one, other = (function(user, catalogue, of, mask, negatives) for of in (items, changed.astype(jnp.int32)))
    np.testing.assert_array_equal(one, other)
    slope = jax.grad(lambda user: function(user, catalogue, items, mask, negatives)[0])(user)
    assert not slope[2].any()
    assert slope[np.asarray(mask.any(axis=1))].any(axis=1).all()


@BY_LOSS
def test_a_higher_score_of_a_positive_lowers_the_loss(loss):
    function, (user, catalogue, items, mask, negatives) = draw(loss)
    items = items.at[:, 0].set(jnp.arange(6) + 1)  # nobody's negative or other positive
    mask = jnp.zeros_like(mask).at[:, 0].set(1)
    negatives = jnp.full_like(negatives, 100)
    slope = jax.grad(lambda c: function(user, c, items, mask, negatives)[0])(catalogue)
    for row in range(6):
        assert slope[row + 1] @ user[row] < 0


def test_sampled_softmax_with_every_item_approaches_softmax():
    """It counts the positive twice: log(1 + Z / e^s) for log(Z / e^s), which differ by log(1 + the softmax of s)."""
    _, (user, catalogue, items, _, _) = draw("softmax")
    mask, every = jnp.array([[1.0, 0.0, 0.0]]), jnp.zeros(LAW_ITEMS)
    for row in range(3):
        batch = user[row, None], catalogue, items[row, None], mask, every
        full = float(softmax(*batch, temperature=4.0)[0])
        negatives = Negatives(jnp.arange(LAW_ITEMS), LAW_ITEMS)
        sampled = float(sampled_softmax(*batch, negatives, temperature=4.0)[0])
        assert sampled == pytest.approx(log1p(exp(full)), rel=1e-5)
        assert sampled == pytest.approx(full, rel=5e-3)


def test_sampled_softmax_estimates_the_catalogue():
    """The mean of its sum of exp over many draws is that of the catalogue: corrected once, not twice or never."""
    _, (user, catalogue, items, _, _) = draw("softmax")
    mask, every = jnp.array([[1.0, 0.0, 0.0]]), jnp.zeros(LAW_ITEMS)

    @jax.jit
    def rest(negatives):
        drawn = Negatives(negatives, LAW_ITEMS)
        loss, _ = losses.sampled_softmax(user[:1], catalogue, items[:1], mask, every, drawn, 4.0)
        return jnp.expm1(loss)  # Z / e^s

    draws = jax.random.randint(jax.random.key(0), (500, 40), 0, LAW_ITEMS)
    full = softmax(user[:1], catalogue, items[:1], mask, every, temperature=4.0)[0]
    assert float(jnp.mean(jax.lax.map(rest, draws))) == pytest.approx(exp(float(full)), rel=0.02)
