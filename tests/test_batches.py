"""Batches of six users and 16 items: who is in them, what they hold, and what they surely do not."""

import numpy as np
import pytest

from fused_rec.config import TrainConfig
from fused_rec.data.batches import Batch, batch, steps_per_epoch, user_items
from fused_rec.training.batch_sources import batch_of

# user         items held        user 3 holds nothing; item 15 does not exist while training
HELD = {0: [0, 1, 2, 3, 4], 1: [5], 2: [0, 6], 4: [1, 3, 5], 5: [2, 4]}
PRESENT = np.array([True] * 15 + [False])


def held_of(held=None, present=PRESENT, n_users=6):
    pairs = [(user, item) for user, items in (HELD if held is None else held).items() for item in items]
    user, item = np.array(pairs, np.int32).reshape(-1, 2).T[:, np.random.default_rng(0).permutation(len(pairs))]
    return user_items(user, item, n_users, present)


def draw(step, held=None, **changes) -> Batch:
    arguments = {"seed": 0, "batch_size": 2, "positives_per_user": 3, "num_negatives": 4, **changes}
    return batch(held_of() if held is None else held, step, **arguments)


def rows(drawn: Batch) -> list[tuple[int, list[int], list[int]]]:
    """(user, items, negatives) of the users who are no padding."""
    real = zip(drawn.users, drawn.items, drawn.mask, drawn.negatives, strict=True)
    return [(int(u), i[m > 0].tolist(), n.tolist()) for u, i, m, n in real if m.any()]


def test_holdings_by_hand():
    held = held_of({0: [4, 1], 2: [0]}, n_users=4)
    assert held.start.tolist() == [0, 2, 2, 3, 3]
    assert held.items.tolist() == [1, 4, 0]
    assert held.pairs.tolist() == [1, 4, 32]  # user * 16 + item
    assert held.active.tolist() == [0, 2]
    assert held.trained_items.tolist() == list(range(15))
    assert held.n_items == 16
    assert [part.dtype.name for part in held[:5]] == ["int64", "int32", "int64", "int32", "int32"]


def test_nothing_held_is_refused():
    with pytest.raises(ValueError, match="the training split has no interactions"):
        held_of({})


def test_shapes_and_types():
    drawn = draw(0)
    assert [(part.shape, part.dtype.name) for part in drawn] == [
        ((2,), "int32"),
        ((2, 3), "int32"),
        ((2, 3), "float32"),
        ((2, 4), "int32"),
    ]


def test_a_function_of_seed_and_step():
    for step in (0, 1, 5, 1000):
        for one, same in zip(draw(step), draw(step), strict=True):
            np.testing.assert_array_equal(one, same)
    order = [[u for step in range(3) for u, *_ in rows(draw(step, seed=seed))] for seed in range(8)]
    assert len(set(map(tuple, order))) > 4
    one_user = held_of({0: range(10)})
    for part in ("items", "negatives"):
        drawn = [getattr(draw(0, one_user, batch_size=1, seed=seed), part).ravel() for seed in range(8)]
        assert len(set(map(tuple, drawn))) > 4
    assert any(not np.array_equal(a, b) for a, b in zip(draw(0), draw(3), strict=True))  # the next epoch


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 7])
def test_an_epoch_sees_every_active_user_once(batch_size):
    held = held_of()
    per_epoch = steps_per_epoch(held, batch_size)
    assert per_epoch == {1: 5, 2: 3, 3: 2, 5: 1, 7: 1}[batch_size]
    for epoch in range(3):
        steps = range(epoch * per_epoch, (epoch + 1) * per_epoch)
        seen = [user for step in steps for user, *_ in rows(draw(step, held, batch_size=batch_size))]
        assert sorted(seen) == [0, 1, 2, 4, 5]


def test_epochs_differ_in_order():
    orders = {tuple(u for u, *_ in rows(draw(epoch, batch_size=5))) for epoch in range(10)}
    assert len(orders) > 5


def test_the_last_batch_is_padded_by_mask():
    last = draw(2)  # 5 users by twos
    assert last.users.shape == (2,)
    assert len(rows(last)) == 1
    assert not last.mask[1].any()
    assert not last.items[1].any()


@pytest.mark.parametrize("positives", [1, 2, 3, 5, 9])
def test_items_are_held_and_drawn_without_replacement(positives):
    for step in range(20):
        for user, items, _ in rows(draw(step, positives_per_user=positives)):
            assert len(items) == len(set(items)) == min(positives, len(HELD[user]))
            assert set(items) <= set(HELD[user])


def test_mask_comes_first_and_says_how_many():
    drawn = draw(0, batch_size=5, positives_per_user=4)
    count = {int(user): mask.tolist() for user, mask in zip(drawn.users, drawn.mask, strict=True)}
    assert count == {0: [1, 1, 1, 1], 1: [1, 0, 0, 0], 2: [1, 1, 0, 0], 4: [1, 1, 1, 0], 5: [1, 1, 0, 0]}


def test_every_held_item_gets_its_turn():
    held = held_of({0: HELD[0]})
    drawn = [
        item for step in range(500) for _, items, _ in rows(draw(step, held, positives_per_user=1)) for item in items
    ]
    assert len(drawn) == 500
    # Five items, 100 draws expected of each, standard deviation 9.
    assert all(60 < count < 140 for count in np.bincount(drawn, minlength=5))


def test_negatives_are_neither_held_nor_absent():
    drawn = [row for step in range(60) for row in rows(draw(step, num_negatives=42))]
    for user, _, negatives in drawn:
        assert not set(negatives) & {*HELD[user], 15}
    # Uniform over the rest: user 1 holds item 5 alone, so each of the 14 others comes 20 * 42 / 14 = 60 times.
    of_1 = np.bincount([n for user, _, negatives in drawn if user == 1 for n in negatives], minlength=16)
    assert of_1.sum() == 20 * 42
    assert of_1[5] == of_1[15] == 0
    assert all(30 < count < 90 for count in np.delete(of_1, [5, 15]))


def test_a_user_who_holds_everything_still_gets_negatives():
    held = held_of({0: range(15)})
    drawn = draw(0, held, batch_size=1, num_negatives=50)
    assert set(drawn.negatives.ravel().tolist()) <= set(range(15))


def test_a_user_who_holds_half_the_catalogue_is_safe_but_for_a_few():
    held = held_of({0: range(500)}, present=np.ones(1000, bool))
    drawn = draw(0, held, batch_size=1, num_negatives=20_000).negatives
    # Eleven draws miss with probability 2 ** -11, so 10 of 20,000 are expected.
    assert (drawn < 500).sum() < 30


@pytest.mark.parametrize(("loss", "count"), [("softmax", 0), ("sampled_softmax", 4), ("bpr", 3)])
def test_a_loss_draws_the_negatives_that_it_reads(loss, count):
    drawn = batch_of(TrainConfig(loss=loss, batch_size=2, positives_per_user=3, num_negatives=4), held_of(), 0, 1)
    assert drawn.negatives.shape == (2, count)
    for part, whole in zip(drawn[:3], draw(1)[:3], strict=True):
        np.testing.assert_array_equal(part, whole)
