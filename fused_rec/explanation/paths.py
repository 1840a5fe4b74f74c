"""Exact search for the graph paths that contribute most to a score.

Fully expanded, a user's embedding is a sum over paths from a source node, with its ID embedding or text, over relations
to the user. The contribution of a path is the product of edge weights, gates and layer weights along it, summed over
the layers at which it can start and over branches, times the dot product of the source embedding with the item. All
paths sum to the score without popularity and launch prior.

There are too many to enumerate. Each factor is a product along the path, so dynamic programming gives the best
continuation from each node. Used as an upper bound, it makes a best-first search visit paths in the order of their
contributions.
"""

import heapq
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from fused_rec.explanation.decomposition import BranchTerms, ScoreDecomposition
from fused_rec.graph.adjacency import Adjacency
from fused_rec.graph.schema import USER, Relation

UNREACHABLE = -1e100  # below any value; infinity times a gate of 0 would be NaN


class Path(NamedTuple):
    """Path from the user back to a source node.

    Attributes:
      nodes: (node type, row); nodes[0] is the user, the last one the source.
      steps: steps[i] is the relation of the edge from nodes[i + 1] to nodes[i].
      value: contribution to the score, `ids` + `text`.
      ids: the part of it from the source's ID embedding.
      text: the part of it from the source's text.
    """

    nodes: tuple[tuple[str, int], ...]
    steps: tuple[Relation, ...]
    value: float
    ids: float
    text: float


class _Entry(NamedTuple):
    """Source terms of a branch and node type times the item: ID embedding, text, and text gates by layer (1 at 0)."""

    ids: Float[np.ndarray, "n"]
    text: Float[np.ndarray, "n"]
    again: Float[np.ndarray, "L_plus_1 n"]


class _Search:
    """Graph, source terms and bounds of one (user, item) pair; `sign` -1 searches for negative contributions."""

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
        """Returns the contributions of ID embedding and text of the path with this source."""
        node_type, row = node
        ids = text = 0.0
        for (t, level), factor in zip(self.channels, factors, strict=True):
            entry, m = self.entries[t][node_type], level - depth
            if m >= 0:
                ids += factor * entry.ids[row] * (m == 0)
                text += factor * entry.text[row] * entry.again[m, row]
        return ids, text

    def longer(self, node: tuple[str, int], depth: int, factors: np.ndarray) -> Iterator[tuple]:
        """Yields (bound, node, relation, factors) of each extension by one edge, the largest bound first."""
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
            # By remaining steps and branch: layers with the same number of remaining steps share paths, while a path
            # of one branch need not exist in another.
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
        """Yields all paths with a positive contribution, largest first."""
        order = itertools.count()  # breaks ties, so that paths are never compared
        heap: list[tuple] = []

        def reach(nodes: tuple, steps: tuple, factors: np.ndarray) -> None:
            depth = len(steps)
            ids, text = self.value(nodes[-1], depth, factors)
            heapq.heappush(heap, (-(ids + text), next(order), Path(nodes, steps, ids + text, ids, text), None))
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
    """Finds the paths with the largest contributions to a score, exactly.

    Args:
      decomposition: of the model.
      user: user row.
      item: item row.
      count: number of paths.
      against: find the most negative contributions instead.

    Returns:
      Paths, the largest absolute contribution first; fewer than `count` if fewer have that sign.
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
    """Computes [layer][remaining steps][node type]: the largest (or smallest) continuation from each node.

    Factors before the node are excluded; `UNREACHABLE`, or its negative, where no path exists.
    """
    none = UNREACHABLE if best is np.maximum else -UNREACHABLE
    bounds = [[{t: entry.ids + entry.text for t, entry in entries.items()}]]
    for level in range(1, len(branch.ids)):
        bounds.append([{t: entry.text * entry.again[level] for t, entry in entries.items()}])
        for before in bounds[level - 1]:
            bound = {t: np.full(len(entry.ids), none) for t, entry in entries.items()}
            for relation, edge in branch.weights.edge.items():
                adjacency, target = decomposition.adjacencies[relation], relation.target
                scaled = branch.weights.source_scale[relation] * before[relation.source]
                best_received = _over_edges(adjacency, np.asarray(edge * scaled[adjacency.senders]), best, none)
                bound[target] = best(bound[target], branch.weights.gate[relation][level - 1] * best_received)
            bounds[level].append(bound)
    return bounds


def _over_edges(
    adjacency: Adjacency, values: Float[np.ndarray, "E"], best: np.ufunc, none: float
) -> Float[np.ndarray, "targets"]:
    """Returns the best value over each node's incoming edges, `none` without edges."""
    start = np.asarray(adjacency.receiver_start)
    connected = np.flatnonzero(np.diff(start))
    out = np.full(len(start) - 1, none)
    if len(connected):
        out[connected] = best.reduceat(values, start[connected])
    return out
