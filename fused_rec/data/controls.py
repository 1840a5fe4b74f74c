"""Negative controls: shuffled or random texts and rewired social edges, to train on in place of the real ones.

A model that is no better with the real data does not use it. Each control has its own random stream of the seed.
"""

import numpy as np
import pyarrow as pa
from jaxtyping import Float32, Int64

from fused_rec.data.dataset import column
from fused_rec.data.node_texts import NodeTextLinks, NodeTexts
from fused_rec.data.nodes import ITEM, USER
from fused_rec.rng import Stream, numpy_rng

ROUNDS = 40  # each edge is in one proposal per round, and in about 20 swaps in total


def shuffle_texts(texts: NodeTexts, seed: int) -> NodeTexts:
    """Permutes texts among the users with text, and among the items with text.

    The permutation is one random cycle (Sattolo, 1986), so no node keeps its own texts unless it is the only one. The
    texts of a node stay together with their weights; nodes without text stay without.

    Args:
      texts: the real node texts.
      seed: seed of the permutation.

    Returns:
      The same texts assigned to other nodes.
    """
    rng = numpy_rng(seed, 0, Stream.SHUFFLED_TEXTS)
    return NodeTexts(texts.texts, {node_type: _permuted(texts.links[node_type], rng) for node_type in (USER, ITEM)})


def random_texts(texts: NodeTexts, width: int, seed: int) -> tuple[NodeTexts, Float32[np.ndarray, "T D"]]:
    """Samples a random unit vector for every node with text.

    Vectors belong to nodes, not to texts: a text shared by a user and an item would otherwise link the pair.

    Args:
      texts: the real node texts, which decide the nodes that get a vector.
      width: dimensions D.
      seed: seed of the vectors.

    Returns:
      Node texts with one placeholder text per node, and the vectors of these T placeholders, uniform on the unit
      sphere.
    """
    with_text = {node_type: np.unique(texts.links[node_type].nodes) for node_type in (USER, ITEM)}
    count = sum(map(len, with_text.values()))
    vectors = numpy_rng(seed, 0, Stream.RANDOM_TEXTS).standard_normal((count, width))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    links, start = {}, 0
    for node_type, nodes in with_text.items():
        placeholders = np.arange(start, start + len(nodes), dtype=np.int32)
        weights = np.ones(len(nodes), np.float32)
        links[node_type] = NodeTextLinks(nodes, placeholders, weights, texts.links[node_type].n_nodes)
        start += len(nodes)
    return NodeTexts([f"random vector {index}" for index in range(count)], links), vectors.astype(np.float32)


def rewire(ties: pa.Table, seed: int) -> pa.Table:
    """Rewires social edges, keeping every user's in- and out-degree of each kind.

    Double-edge swaps within a kind (Maslov and Sneppen, 2002) turn a -> b, c -> d into a -> d, c -> b. Mutual edges are
    swapped among themselves as undirected edges and stay mutual; one-way edges stay one-way. A swap that would create
    a self-loop or connect two users already connected is rejected; where the degrees allow hardly any other graph (a
    star), edges stay as they are.

    Each round pairs all edges at random and accepts half of the swaps at random (accepting all, two edges would be back
    in place after an even number of rounds). Swaps of one round that would create the same edge are rejected, so each
    accepted swap is valid on its own.

    Args:
      ties: `Observed.ties`: distinct edges without self-loops.
      seed: seed of the swaps.

    Returns:
      The table with other `source` and `target` and all other columns unchanged.
    """
    rng = numpy_rng(seed, 0, Stream.REWIRED_TIES)
    kinds = np.asarray(ties.column("kind").to_pylist(), dtype=object)
    source, target = column(ties, "source").astype(np.int64), column(ties, "target").astype(np.int64)
    n_users = int(max(source.max(initial=0), target.max(initial=0))) + 1
    for kind in sorted(set(kinds)):
        at = np.flatnonzero(kinds == kind)
        forward, backward = source[at] * n_users + target[at], target[at] * n_users + source[at]
        # Edges are distinct, so the reverse of a mutual one has exactly one row.
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
    for index, name in enumerate(ties.column_names):
        if name in ends:
            ties = ties.set_column(index, name, pa.array(ends[name].astype(np.int32)))
    return ties


def _permuted(links: NodeTextLinks, rng: np.random.Generator) -> NodeTextLinks:
    """Moves the texts of each node to the next one of a random cycle through all nodes with text."""
    nodes = np.unique(links.nodes)
    cycle = rng.permutation(nodes)
    receiver = np.empty(len(nodes), np.int32)
    receiver[np.searchsorted(nodes, cycle)] = np.roll(cycle, 1)
    new = receiver[np.searchsorted(nodes, links.nodes)]
    order = np.lexsort((links.texts, new))
    return NodeTextLinks(new[order], links.texts[order], links.weights[order], links.n_nodes)


def _keys(pairs: Int64[np.ndarray, "E 2"], n_users: int) -> Int64[np.ndarray, "E"]:
    """Encodes unordered pairs of users as one number each."""
    return pairs.min(1) * n_users + pairs.max(1)


def _swapped(
    pairs: Int64[np.ndarray, "E 2"], fixed: Int64[np.ndarray, "_"], n_users: int, rng, *, undirected: bool
) -> Int64[np.ndarray, "E 2"]:
    """Runs `ROUNDS` rounds of swaps; `fixed` are keys of users connected by edges that are not swapped here."""
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
        bad = (count[which] > 1) | np.isin(keys, fixed) | np.isin(keys, _keys(pairs, n_users))
        bad |= np.concatenate([new_one[:, 0] == new_one[:, 1], new_other[:, 0] == new_other[:, 1]])
        good = ~(bad[:half] | bad[half:]) & (rng.random(half) < 0.5)
        pairs[one[good]], pairs[other[good]] = new_one[good], new_other[good]
    return pairs
