"""Controls: words and ties that look like the true ones and say nothing, to be trained on in their place.

A model that is no better with the true ones has not used them. Every draw is a function of the seed, one stream each.
"""

import numpy as np
import pyarrow as pa
from jaxtyping import Float32, Int32, Int64

from fused_rec.data.dataset import column
from fused_rec.data.node_texts import NodeTexts

SHUFFLE, RANDOM, REWIRE = 2, 3, 4  # third numbers of the seeds; batches draw with 0 and 1
ROUNDS = 40  # each tie takes part in one proposal a round, and in about 20 swaps in all


def shuffle_texts(texts: NodeTexts, seed: int) -> NodeTexts:
    """The words of each user go to another user that has words, and those of items likewise.

    One random cycle runs through all of them (Sattolo, 1986), so that no node keeps its own words unless it alone has
    any; a node's texts stay together with their weights, and who is without words stays so.
    """
    rng = np.random.default_rng((seed, 0, SHUFFLE))
    users = _passed_on(texts.user_rows, texts.user_texts, texts.user_weights, rng)
    items = _passed_on(texts.item_rows, texts.item_texts, texts.item_weights, rng)
    return NodeTexts(texts.texts, *users, *items)


def random_texts(texts: NodeTexts, width: int, seed: int) -> tuple[NodeTexts, Float32[np.ndarray, "T D"]]:
    """A direction of its own, drawn evenly from the unit sphere, for every node that has words.

    One a node and not one a text: a text that a user and an item share would tell of the pair without being read.
    """
    users, items = np.unique(texts.user_rows), np.unique(texts.item_rows)
    count = len(users) + len(items)
    vectors = np.random.default_rng((seed, 0, RANDOM)).standard_normal((count, width))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    places = np.arange(count, dtype=np.int32)
    of_users, of_items = places[: len(users)], places[len(users) :]
    named = NodeTexts(
        [f"random vector {place}" for place in places],
        *(users, of_users, np.ones(len(users), np.float32)),
        *(items, of_items, np.ones(len(items), np.float32)),
    )
    return named, vectors.astype(np.float32)


def rewire(ties: pa.Table, seed: int) -> pa.Table:
    """Other ties with the same degrees: as many ties of each kind go out of, and come in at, every user as before.

    ties: `Observed.ties`, distinct, none from a user to itself. Kind by kind, double-edge swaps (Maslov and Sneppen,
    2002) turn a -> b, c -> d into a -> d, c -> b. Mutual ties swap among themselves as undirected ones and stay
    mutual, one-way ties stay one-way. A swap that would tie a user to itself, or two users who are tied already, is
    passed over; where the degrees leave hardly another graph (all tied to one), ties stay as they were.

    A round pairs all ties at random and makes half of the swaps, drawn evenly (always making them, two ties would be
    back where they were after an even number of rounds), without those of which two would make the same tie: each
    swap is as if it were made alone.
    """
    rng = np.random.default_rng((seed, 0, REWIRE))
    kinds = np.asarray(ties.column("kind").to_pylist(), dtype=object)
    source, target = column(ties, "source").astype(np.int64), column(ties, "target").astype(np.int64)
    n_users = int(max(source.max(initial=0), target.max(initial=0))) + 1
    for kind in sorted(set(kinds)):
        at = np.flatnonzero(kinds == kind)
        forward, backward = source[at] * n_users + target[at], target[at] * n_users + source[at]
        # Ties are distinct, so the way back of a mutual one has exactly one row.
        order = np.argsort(forward)
        back = order[np.minimum(np.searchsorted(forward[order], backward), len(order) - 1)]
        mutual = forward[back] == backward
        first = mutual & (source[at] < target[at])
        one, other = at[first], at[back[first]]
        single = at[~mutual]
        pairs = np.stack([source, target], 1)
        pairs[one] = _swapped(pairs[one], _keys(pairs[single], n_users), n_users, rng, undirected=True)
        pairs[other] = pairs[one][:, ::-1]
        pairs[single] = _swapped(pairs[single], _keys(pairs[one], n_users), n_users, rng, undirected=False)
        source, target = pairs.T
    ends = {"source": source, "target": target}
    for place, name in enumerate(ties.column_names):
        if name in ends:
            ties = ties.set_column(place, name, pa.array(ends[name].astype(np.int32)))
    return ties


def _passed_on(
    rows: Int32[np.ndarray, "K"], texts: Int32[np.ndarray, "K"], weights: Float32[np.ndarray, "K"], rng
) -> tuple[Int32[np.ndarray, "K"], Int32[np.ndarray, "K"], Float32[np.ndarray, "K"]]:
    named = np.unique(rows)
    cycle = rng.permutation(named)
    heir = np.empty(len(named), np.int32)
    heir[np.searchsorted(named, cycle)] = np.roll(cycle, 1)
    new = heir[np.searchsorted(named, rows)]
    order = np.lexsort((texts, new))
    return new[order], texts[order], weights[order]


def _keys(pairs: Int64[np.ndarray, "E 2"], n_users: int) -> Int64[np.ndarray, "E"]:
    """One number for two users, whichever comes first."""
    return pairs.min(1) * n_users + pairs.max(1)


def _swapped(
    pairs: Int64[np.ndarray, "E 2"], taken: Int64[np.ndarray, "_"], n_users: int, rng, *, undirected: bool
) -> Int64[np.ndarray, "E 2"]:
    """`ROUNDS` rounds of swaps; `taken` are keys of users who are tied already by ties that stay."""
    pairs = pairs.copy()
    half = len(pairs) // 2
    for _ in range(ROUNDS if half else 0):
        order = rng.permutation(len(pairs))
        one, other = order[:half], order[half : 2 * half]
        ends = pairs[other]
        if undirected:  # a - b, c - d can become a - d, c - b or a - c, d - b
            flip = rng.random(half) < 0.5
            ends[flip] = ends[flip, ::-1]
        new_one, new_other = np.stack([pairs[one, 0], ends[:, 1]], 1), np.stack([ends[:, 0], pairs[one, 1]], 1)
        keys = np.concatenate([_keys(new_one, n_users), _keys(new_other, n_users)])
        _, which, count = np.unique(keys, return_inverse=True, return_counts=True)
        bad = (count[which] > 1) | np.isin(keys, taken) | np.isin(keys, _keys(pairs, n_users))
        bad |= np.concatenate([new_one[:, 0] == new_one[:, 1], new_other[:, 0] == new_other[:, 1]])
        good = ~(bad[:half] | bad[half:]) & (rng.random(half) < 0.5)
        pairs[one[good]], pairs[other[good]] = new_one[good], new_other[good]
    return pairs
