"""Each metric against numbers worked out by hand, and pairwise AUC against counting every pair."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fused_rec.evaluation import metrics

# Three users, five ranks. x = hit:   user 0: . x . . x (2 of 2 held out found)
#                                     user 1: x . . . . (1 of 4)
#                                     user 2: . . . . . (0 of 1)
HITS = jnp.array([[0, 1, 0, 0, 1], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]], bool)
N_TRUTH = jnp.array([2, 4, 1], jnp.int32)

AT_2, AT_5 = 1 / math.log2(3), 1 / math.log2(6)  # discounts of ranks 2 and 5


@pytest.mark.parametrize(
    ("name", "k", "expected"),
    [
        ("recall", 1, [0, 1 / 4, 0]),
        ("recall", 2, [1 / 2, 1 / 4, 0]),
        ("recall", 5, [1, 1 / 4, 0]),
        ("precision", 2, [1 / 2, 1 / 2, 0]),
        ("precision", 5, [2 / 5, 1 / 5, 0]),
        ("hitrate", 1, [0, 1, 0]),
        ("hitrate", 5, [1, 1, 0]),
        ("mrr", 1, [0, 1, 0]),
        ("mrr", 5, [1 / 2, 1, 0]),
        ("map", 2, [1 / 2 / 2, 1 / 4, 0]),
        ("map", 5, [(1 / 2 + 2 / 5) / 2, 1 / 4, 0]),
        ("ndcg", 1, [0, 1, 0]),
        # The ideal list is cut at k: user 1 has four held-out items, and two ranks to put them.
        ("ndcg", 2, [AT_2 / (1 + AT_2), 1 / (1 + AT_2), 0]),
        ("ndcg", 5, [(AT_2 + AT_5) / (1 + AT_2), 1 / (1 + AT_2 + 1 / 2 + 1 / math.log2(5)), 0]),
    ],
)
def test_ranked_metrics_by_hand(name, k, expected):
    got = jax.jit(metrics.RANKED[name], static_argnums=2)(HITS, N_TRUTH, k)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def _csr(lists):
    starts = np.concatenate([[0], np.cumsum([len(x) for x in lists])])
    return jnp.asarray(starts, jnp.int32), jnp.asarray([i for x in lists for i in x] + [0, 0], jnp.int32)  # and padding


def _mask(lists, n_items):
    mask = np.zeros((len(lists), n_items), bool)
    for row, items in enumerate(lists):
        mask[row, items] = True
    return jnp.asarray(mask)


# With the kernel, where it is built, and in plain JAX.
ACCURACIES = pytest.mark.parametrize("auc", [metrics.pairwise_auc, metrics._pairwise_auc])


@ACCURACIES
def test_auc_by_hand(auc):
    # User 0 holds out items 0 and 3 (scores 3 and 1) against items 1, 2, 4 (scores 2, 1, 0):
    # item 0 beats all three; item 3 ties with 2 and beats 4: (3 + 1.5) / 6.
    # User 1 holds out item 4, the lowest of all. User 2 holds out item 1 and has nothing to compare it with.
    scores = jnp.array([[3, 2, 1, 1, 0], [3, 2, 1, 1, 0], [0, 0, 0, 0, 0]], jnp.float32)
    truth = [[0, 3], [4], [1]]
    negative = _mask([[1, 2, 4], [0, 1, 2, 3], []], 5)
    got = jax.jit(auc)(scores, negative, *_csr(truth))
    np.testing.assert_allclose(got, [4.5 / 6, 0, np.nan], rtol=1e-6)


@ACCURACIES
def test_auc_equals_counting_every_pair(auc):
    rng = np.random.default_rng(1)
    n_users, n_items = 37, 211
    scores = rng.integers(-6, 6, (n_users, n_items)).astype(np.float32)  # ties everywhere
    kind = rng.choice(3, (n_users, n_items), p=[0.1, 0.6, 0.3])  # held out, negative, seen
    kind[:, :2] = [0, 1]
    expected = []
    for user in range(n_users):
        positive, negative = scores[user, kind[user] == 0], scores[user, kind[user] == 1]
        pairs = [(p > n) + 0.5 * (p == n) for p in positive for n in negative]
        expected.append(sum(pairs) / len(pairs))
    lists = [list(np.flatnonzero(kind[user] == 0)) for user in range(n_users)]
    args = (jnp.asarray(scores), jnp.asarray(kind == 1), *_csr(lists))
    np.testing.assert_allclose(auc(*args), expected, rtol=1e-6)


def test_auc_is_the_same_with_all_rows_at_once(monkeypatch):
    """What an accelerator runs: `map_rows` is `jax.vmap`; rows with fewer held-out items wait for the rest."""
    truth = [[0, 3], [4], [1, 2, 3, 4]]
    scores = jnp.asarray(np.random.default_rng(0).normal(size=(3, 5)), jnp.float32)
    args = (scores, ~_mask(truth, 5), *_csr(truth))
    by_row = metrics._pairwise_auc(*args)
    monkeypatch.setattr(metrics, "map_rows", lambda function, *arrays: jax.vmap(function)(*arrays))
    np.testing.assert_array_equal(metrics._pairwise_auc(*args), by_row)


def test_novelty_by_hand():
    items = jnp.array([[0, 1, 2], [2, -1, -1]], jnp.int32)
    counts = jnp.array([8, 2, 0])  # of 16 users: 1 bit, 3 bits, and (as if one user had it) 4 bits
    np.testing.assert_allclose(metrics.novelty(items, counts, 16, 2), [2, 4], rtol=1e-6)
    np.testing.assert_allclose(metrics.novelty(items, counts, 16, 3), [8 / 3, 4], rtol=1e-6)
