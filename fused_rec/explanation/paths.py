"""The paths that a score came by, the weightiest first, found exactly.

Written out to its end, a user's vector is a sum over paths through the graph: from a node whose id row or words start
it, over relations, to the user. The value of a path is its share of the score: the product of the edges, gates and the
readout's factors along it, summed over the rounds in which it can be walked and over towers, times the dot product of
what stands at its start with the item. All paths of all lengths sum to the score without its popularity.

They are far too many to list, but each factor is a product along the path, so the best continuation from any node is
found by dynamic programming; with it as a bound that never underestimates, a best-first search meets paths in the order
of their values and looks at few of the others.
"""

import heapq
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from fused_rec.explanation.decomposition import BranchTerms, ScoreDecomposition
from fused_rec.graph.adjacency import Adjacency
from fused_rec.graph.build import USER
from fused_rec.graph.hetero import Relation

UNREACHABLE = -1e100  # below any value, and 0 times it is 0: of infinity, a closed gate would make NaN


class Path(NamedTuple):
    """From the user backwards: nodes[0] is the user, and steps[i] is the relation by which nodes[i] hears nodes[i + 1].

    nodes: (node type, row). value: what it adds to the score, ids + words by what stands at its start.
    """

    nodes: tuple[tuple[str, int], ...]
    steps: tuple[Relation, ...]
    value: float
    ids: float
    text: float


class _Entry(NamedTuple):
    """What may start a path at each node of a type, times the item, for a tower: id row, words, factor of each round.

    `again[m]` is by how much words enter at round m; at round 0 all do.
    """

    ids: Float[np.ndarray, "n"]
    text: Float[np.ndarray, "n"]
    again: Float[np.ndarray, "L_plus_1 n"]


class _Search:
    """The graph, entries and bounds of one (user, item); `sign` -1 looks for what speaks most against the item."""

    def __init__(self, decomposition: ScoreDecomposition, user: int, item: int, sign: int):
        self.decomposition, self.user = decomposition, user
        self.channels = [
            (t, level) for t, branch in enumerate(decomposition.branches) for level in range(len(branch.ids))
        ]
        self.longest = max(len(branch.ids) for branch in decomposition.branches)
        self.start = np.array(
            [decomposition.branches[t].weights.layer_weights[level] for t, level in self.channels], np.float64
        )
        self.entries = [_entries(branch, user, item, sign) for branch in decomposition.branches]
        self.bounds = [
            [_bounds(decomposition, branch, entries, best) for best in (np.maximum, np.minimum)]
            for branch, entries in zip(decomposition.branches, self.entries, strict=True)
        ]

    def value(self, node: tuple[str, int], depth: int, factors: np.ndarray) -> tuple[float, float]:
        """Of the path that starts here, the part of its id row and that of its words."""
        node_type, row = node
        ids = words = 0.0
        for (t, level), factor in zip(self.channels, factors, strict=True):
            entry, m = self.entries[t][node_type], level - depth
            if m >= 0:
                ids += factor * entry.ids[row] * (m == 0)
                words += factor * entry.text[row] * entry.again[m, row]
        return ids, words

    def longer(self, node: tuple[str, int], depth: int, factors: np.ndarray) -> Iterator[tuple]:
        """(bound, node, relation, factors) of each step further back, the most promising first."""
        node_type, row = node
        found = []
        relations = {
            r: None for branch in self.decomposition.branches for r in branch.weights.edge if r.target == node_type
        }
        for relation in relations:
            adjacency = self.decomposition.adjacencies[relation]
            at = slice(*adjacency.receiver_start[row : row + 2])
            senders = adjacency.senders[at]
            ahead = np.zeros((len(senders), len(self.channels)))
            # By how many steps a path still takes and by tower: all rounds that have so many left walk the same paths,
            # while a path of one tower need not be one of another's.
            bound = np.zeros((self.longest, len(self.decomposition.branches), len(senders)))
            walked = np.zeros(self.longest, bool)
            for c, (t, level) in enumerate(self.channels):
                given, m = self.decomposition.branches[t].weights, level - depth
                if m < 1 or relation not in given.edge or not factors[c]:
                    continue
                ahead[:, c] = factors[c] * given.gate[relation][m - 1, row] * given.edge[relation][at]
                ahead[:, c] *= given.source_scale[relation][senders]
                best = self.bounds[t][0 if factors[c] > 0 else 1]
                walked[:m] = True
                for left in range(m):
                    bound[left, t] += ahead[:, c] * best[m - 1][left][relation.source][senders]
            if len(self.decomposition.branches) > 1:
                bound = np.maximum(bound, 0)
            if walked.any():
                most = bound.sum(1)[walked].max(0).tolist()
                nodes = [(relation.source, sender) for sender in senders.tolist()]
                found += zip(most, nodes, itertools.repeat(relation), ahead, strict=False)
        return iter(sorted(found, key=lambda step: -step[0]))

    def paths(self) -> Iterator[Path]:
        """Every path of positive value, from the largest down."""
        order = itertools.count()  # breaks ties, so that nothing else is compared
        heap: list[tuple] = []

        def reach(nodes: tuple, steps: tuple, factors: np.ndarray) -> None:
            depth = len(steps)
            ids, words = self.value(nodes[-1], depth, factors)
            heapq.heappush(heap, (-(ids + words), next(order), Path(nodes, steps, ids + words, ids, words), None))
            go_on(nodes, steps, self.longer(nodes[-1], depth, factors))

        def go_on(nodes: tuple, steps: tuple, ahead: Iterator[tuple]) -> None:
            if (step := next(ahead, None)) is not None:
                heapq.heappush(heap, (-step[0], next(order), step, (nodes, steps, ahead)))

        reach(((USER, self.user),), (), self.start)
        while heap and heap[0][0] < 0:
            _, _, found, rest = heapq.heappop(heap)
            if rest is None:
                yield found
                continue
            nodes, steps, ahead = rest
            _, node, relation, factors = found
            go_on(nodes, steps, ahead)
            reach((*nodes, node), (*steps, relation), factors)


def best_paths(
    decomposition: ScoreDecomposition, user: int, item: int, count: int, *, against: bool = False
) -> list[Path]:
    """The `count` paths that add most to the score of the item, the largest first; fewer where fewer add anything.

    against: those that take most away, the most negative first. Exact: no path is left out for being unlikely.
    """
    sign = -1 if against else 1
    paths = _Search(decomposition, user, item, sign).paths()
    return [
        path._replace(value=sign * path.value, ids=sign * path.ids, text=sign * path.text)
        for path in itertools.islice(paths, count)
    ]


def _entries(branch: BranchTerms, user: int, item: int, sign: int) -> dict[str, _Entry]:
    into = sign * branch.items[item].astype(np.float64) / branch.user_norm[user]
    gates, levels = branch.weights.text_gate, len(branch.ids)
    entries = {}
    for node_type, rows in branch.ids[0].items():
        again = np.zeros((levels, len(rows)))
        again[0] = 1
        if node_type in gates:
            again[1:] = gates[node_type]
        entries[node_type] = _Entry(rows @ into, branch.text[0][node_type] @ into, again)
    return entries


def _bounds(
    decomposition: ScoreDecomposition, branch: BranchTerms, entries: dict[str, _Entry], best: np.ufunc
) -> list[list[dict[str, np.ndarray]]]:
    """[round][steps left][node type]: the largest (or smallest) value of such a path on from each node.

    Without the factors before the node; `UNREACHABLE`, or its negative, where there is no such path.
    """
    none = UNREACHABLE if best is np.maximum else -UNREACHABLE
    bounds = [[{t: entry.ids + entry.text for t, entry in entries.items()}]]
    for level in range(1, len(branch.ids)):
        bounds.append([{t: entry.text * entry.again[level] for t, entry in entries.items()}])
        for before in bounds[level - 1]:
            here = {t: np.full(len(entry.ids), none) for t, entry in entries.items()}
            for relation, edge in branch.weights.edge.items():
                adjacency, target = decomposition.adjacencies[relation], relation.target
                scaled = branch.weights.source_scale[relation] * before[relation.source]
                best_received = _over_edges(adjacency, np.asarray(edge * scaled[adjacency.senders]), best, none)
                here[target] = best(here[target], branch.weights.gate[relation][level - 1] * best_received)
            bounds[level].append(here)
    return bounds


def _over_edges(
    adjacency: Adjacency, values: Float[np.ndarray, "E"], best: np.ufunc, none: float
) -> Float[np.ndarray, "targets"]:
    """The best of what each node is told, `none` for one that hears nobody."""
    start = np.asarray(adjacency.receiver_start)
    there = np.flatnonzero(np.diff(start))
    out = np.full(len(start) - 1, none)
    if len(there):
        out[there] = best.reduceat(values, start[there])
    return out
