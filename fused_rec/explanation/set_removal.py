"""Embeddings of a trained branch without several sources of a user at a time, for many sets of sources and exactly.

Propagation is linear, h^l = M_l h^{l-1} + text (`fused_rec.model.propagation`), and M_l changes little. The removal of
edges of a relation scales the columns of its matrix A at their senders a (by the normalization with fewer edges and by
the source scale) and changes the rows at their receivers b (by the normalization and by the gate), and so does another
text, which has other gates and another text input:

    (M'_l - M_l) h = sum_a A_:a (s_a - 1) h_a + sum_b e_b r_b

with s_a the factor of a column and r_b what row b changes besides. Hence the change of all embeddings after l layers is
a sum of few products of a column over the nodes and a row of K entries. A column takes one number a node in place of K.
The columns start at the user and at the sources and depend on no set: they are propagated once for all sets. The rows
of a set follow from the embeddings of the user and of its sources alone.

P sets of m sources, N nodes (the user and each source), B columns, L layers, K numbers a row.
"""

from collections.abc import Sequence
from typing import NamedTuple

import flax.linen as nn
import numpy as np
from jaxtyping import Bool, Float32, Int

from fused_rec.explanation.branches import Branch
from fused_rec.explanation.removed_texts import BranchTexts, RemovedTexts, SetTexts, gate_of
from fused_rec.explanation.sources import Sources, senders_of
from fused_rec.graph.schema import INTERACTED_BY, INTERACTS, ITEM, SIMILAR_TEXT, USER, Relation
from fused_rec.model.text_fusion import TextInput, TextMLP

CHUNK = 1 << 25  # entries of the columns that are propagated together
ROUNDING = 3e-6  # of the norm of a sum of float32 rows


class Term(NamedTuple):
    """A part of the change of items: by set a sum of b products of a column over the items and a row."""

    rows: Float32[np.ndarray, "P b K"]
    items: Float32[np.ndarray, "I P b"]


class Change(NamedTuple):
    """Embeddings of a branch without each of P sets: of the user [P, K], and what changes those of items."""

    user: Float32[np.ndarray, "P K"]
    terms: list[Term]


class _Columns(NamedTuple):
    """Columns that start in one layer, in the layers from there on: at the N nodes, as messages, and of the items."""

    at_nodes: dict[int, Float32[np.ndarray, "N B"]]
    received: dict[tuple[Relation, int], Float32[np.ndarray, "N B"]]  # sums of the neighbors, without gates
    items: Float32[np.ndarray, "I B"]  # weighted over layers


class _Rows(NamedTuple):
    """The rows of columns that start in a layer: number of the column [P, b] and row [P, b, K]."""

    start: int
    column: Int[np.ndarray, "P b"]
    row: Float32[np.ndarray, "P b K"]


class _Edited(NamedTuple):
    """A relation whose edges or gates change in P sets of s nodes.

    Attributes:
      relation: the relation.
      between: weights [P, s, s] of its edges between nodes, from the second to the first.
      removed: of these the removed ones.
      growth: by how much [P, s, 1] what the nodes send grows.
      before: gates [L, P, s] of the nodes.
      after: their gates times the normalization.
      changed: nodes [P, s] that lose an edge or have another gate.
    """

    relation: Relation
    between: Float32[np.ndarray, "P s s"]
    removed: Float32[np.ndarray, "P s s"]
    growth: Float32[np.ndarray, "P s 1"]
    before: Float32[np.ndarray, "L P s"]
    after: Float32[np.ndarray, "L P s"]
    changed: Bool[np.ndarray, "P s"]


class SetRemoval:
    """A branch without sets of sources of one user.

    Columns are numbered: the unit columns of the N nodes, what each source sends in its relation, and what the user
    sends in each reverse relation.

    Args:
      branch: of `fused_rec.explanation.branches.branches`.
      user: user row.
      groups: the user's sources by relation; a source's place is its position in all of them.
      texts: features without reviews; None where no source is a review.
    """

    def __init__(self, branch: Branch, user: int, groups: Sequence[Sources], texts: RemovedTexts | None):
        self.branch, self.user, self.groups = branch, user, groups
        self.types = [USER] + [group.relation.source for group in groups for _ in group.rows]
        self.rows = np.concatenate([[user], *(group.rows for group in groups)]).astype(np.int64)
        self.group = np.repeat(np.arange(len(groups)), [len(group.rows) for group in groups])
        ends = np.cumsum([0, *(len(group.rows) for group in groups)])
        self.places = [slice(a, b) for a, b in zip(ends[:-1], ends[1:], strict=True)]
        self.of_type = {t: np.array([one == t for one in self.types]) for t in set(self.types)}
        self.same = np.unique([f"{t} {r}" for t, r in zip(self.types, self.rows, strict=True)], return_inverse=True)[1]
        self.mix = np.asarray(branch.weights.layer_weights)
        self.backs = [g.back for g in groups if g.back is not None and g.back in branch.matrices]
        own = [g.relation for g in groups if g.relation in branch.matrices]
        self.texts = texts and BranchTexts(branch, texts, (self.types, self.rows))
        gated = [r for r in branch.matrices if r.target in (USER, ITEM)] if self.texts and self.texts.in_gates else []
        self.edited = list(dict.fromkeys([*own, *self.backs, *gated]))
        self.levels = [self._at_nodes(layer) for layer in branch.layers]
        self.matrices = {r: self._between(r) for r in self.edited}
        self.messages = {
            (r, level): self._at_nodes({r.target: branch.matrices[r] @ layer[r.source]})
            for r in self.edited
            for level, layer in enumerate(branch.layers[:-1])
        }
        self.receivers = {r: _Receivers(self, r) for r in self.edited}
        self.scale = self._source_scale()
        self.n_columns = 2 * len(self.rows) - 1 + len(self.backs)
        self.columns = [self._propagated(start) for start in range(len(branch.layers))]

    # --- once for all sets ---------------------------------------------------------------------------------------

    def _at_nodes(self, values: dict[str, np.ndarray]) -> np.ndarray:
        """Rows of the N nodes; zero where there are none."""
        [width] = {value.shape[1] for value in values.values()}
        found = np.zeros((len(self.rows), width), np.float32)
        for node_type, value in values.items():
            own = self.of_type.get(node_type, np.zeros(len(self.rows), bool))
            found[own] = value[self.rows[own]]
        return found

    def _between(self, relation: Relation) -> np.ndarray:
        """The weights [N, N] of a relation from nodes (second) to nodes."""
        none = np.zeros(len(self.rows), bool)
        target, source = (self.of_type.get(side, none) for side in (relation.target, relation.source))
        found = np.zeros((len(self.rows), len(self.rows)), np.float32)
        part = self.branch.matrices[relation][self.rows[target]][:, self.rows[source]].toarray()
        found[np.ix_(target, source)] = part
        return found

    def _source_scale(self) -> np.ndarray:
        """By how much [n] what each source sends grows without its edge."""
        found = np.ones(len(self.rows) - 1, np.float32)
        for group, at in zip(self.groups, self.places, strict=True):
            if group.relation in self.branch.matrices:
                of = self.branch.less.source_scale[group.relation] / self.branch.weights.source_scale[group.relation]
                found[at] = np.asarray(of)[group.rows]
                if group.relation.name != SIMILAR_TEXT:
                    found[at] *= grown(np.diff(self.branch.graph.adjacencies[group.relation].sender_start)[group.rows])
        return found

    def _starts(self, start: int, these: slice) -> dict[str, np.ndarray]:
        """Columns as they start in a layer."""
        branch, count = self.branch, len(self.rows)
        wanted = np.arange(self.n_columns)[these]
        found = {t: np.zeros((size, len(wanted)), np.float32) for t, size in branch.graph.node_types}
        for place in np.flatnonzero(wanted < count).tolist():
            number = int(wanted[place])
            found[self.types[number]][self.rows[number], place] = 1
        of_group = np.concatenate([np.full(count, -1), self.group, np.full(len(self.backs), -1)])[wanted]
        senders = [(group.relation, of_group == number) for number, group in enumerate(self.groups)]
        senders += [(back, wanted == 2 * count - 1 + number) for number, back in enumerate(self.backs)]
        for relation, at in senders:
            if start and at.any() and relation in branch.matrices:
                nodes = np.where(wanted < 2 * count - 1, wanted - count + 1, 0)[at]
                gate = np.asarray(branch.weights.gate[relation])[start - 1][:, None]
                found[relation.target][:, at] = gate * branch.columns[relation][:, self.rows[nodes]].toarray()
        return found

    def _propagated(self, start: int) -> _Columns:
        """The columns that start in a layer, in all later ones."""
        branch, parts = self.branch, []
        step = max(1, CHUNK // sum(size for _, size in branch.graph.node_types))
        for first in range(0, self.n_columns, step):
            columns, part = self._starts(start, slice(first, first + step)), _Columns({}, {}, np.zeros(0))
            items = np.zeros_like(columns[ITEM])
            for level in range(start, len(branch.layers)):
                part.at_nodes[level] = self._at_nodes(columns)
                items += self.mix[level] * columns[ITEM]
                sums = {node_type: np.zeros_like(column) for node_type, column in columns.items()}
                for relation, matrix in branch.matrices.items() if level + 1 < len(branch.layers) else ():
                    message = matrix @ columns[relation.source]
                    if relation in self.edited:
                        part.received[relation, level] = self._at_nodes({relation.target: message})
                    sums[relation.target] += np.asarray(branch.weights.gate[relation])[level][:, None] * message
                columns = sums
            parts.append(part._replace(items=items))
        joined, received = (
            {key: np.concatenate([getattr(part, name)[key] for part in parts], 1) for key in getattr(parts[0], name)}
            for name in ("at_nodes", "received")
        )
        return _Columns(joined, received, np.concatenate([part.items for part in parts], 1))

    # --- for sets --------------------------------------------------------------------------------------------------

    def without(self, nodes: Int[np.ndarray, "P s"], texts: SetTexts | None) -> Change:
        """Computes the embeddings without sets of sources.

        Args:
          nodes: of each set the user, 0, then the sources, from 1, all different.
          texts: their texts without the reviews among the sources; None where there are none.

        Returns:
          The user's embeddings [P, K] and what changes those of items.
        """
        whole = self.branch.out[USER][[self.user]]
        rows, by_text = self._input_rows(nodes), None
        if self.texts and texts is not None:
            rows, by_text = rows + self.texts.input_rows(texts, nodes), self.texts.layer_rows(texts, nodes)
        edited = [receivers.edited(self, nodes, texts) for receivers in self.receivers.values()]
        terms, user = [_Rows(0, nodes, rows)], whole
        for level, share in enumerate(self.mix):
            if level:
                ends = self.levels[level - 1][nodes] + self._changes(terms, level - 1, nodes)
                new = self._new_rows(terms, level, ends, edited)
                if by_text is not None:
                    new.row[:, : nodes.shape[1]] += by_text[level - 1]
                terms = [*terms, new]
            user = user + share * self._changes(terms, level, nodes[:, :1])[:, 0]
        found = []
        for term in terms:
            if (there := term.row.any((0, 2))).any():
                columns = self.columns[term.start].items[:, term.column[:, there]]
                found.append(Term(term.row[:, there], columns))
        return Change(without_rounding(user, whole), found)

    def _changes(self, terms: list[_Rows], level: int, nodes: np.ndarray) -> np.ndarray:
        """By how much [P, s, K] these nodes [P, s] change in a layer."""
        return sum(
            self.columns[term.start].at_nodes[level][nodes[:, :, None], term.column[:, None]] @ term.row
            for term in terms
        )  # pyright: ignore

    def _input_rows(self, nodes: np.ndarray) -> np.ndarray:
        """What changes in h^0: a node without edges has no ID embedding, and a user may start as their items."""
        branch, graph = self.branch, self.branch.graph
        row = np.zeros((*nodes.shape, branch.config.dim), np.float32)
        into = {USER: [r for r in branch.matrices if r.target == USER], ITEM: [INTERACTS]}
        of_source = [group for group in self.groups for _ in group.rows]
        lost_by_user = np.array([False] + [group.relation in into[USER] for group in of_source])[nodes]
        lost_by_source = np.array([False] + [group.back in into[group.relation.source] for group in of_source])[nodes]
        same = self.same[nodes][:, :, None] == self.same[nodes][:, None, :]
        lost = (same & lost_by_source[:, None, :]).sum(2)
        lost[:, 0] = lost_by_user.sum(1)
        again = np.tril(same, -1).any(2)  # a node that is a source twice counts once
        for node_type, own in self.of_type.items():
            degrees = sum(
                (np.diff(graph.adjacencies[r].receiver_start) for r in into[node_type]),
                np.zeros(graph.count(node_type), int),
            )
            degree = np.where(own, degrees[np.where(own, self.rows, 0)], -1)
            gone = own[nodes] & (lost == degree[nodes]) & ~again
            row[gone] = -branch.ids[node_type][self.rows[nodes[gone]]]
        if branch.config.users_start_as_items:
            row[:, 0] += self._other_start(nodes[:, 1:])
        return row

    def _other_start(self, nodes: np.ndarray) -> np.ndarray:
        """By how much [P, K] the start of a user who starts as their items changes."""
        config, text = self.branch.config, np.asarray(self.branch.graph.text[ITEM])
        items = senders_of(self.branch.graph, INTERACTED_BY, self.user)
        held = np.array([g.relation == INTERACTED_BY for g in self.groups for _ in g.rows])[nodes - 1]
        count = len(items) - held.sum(1, keepdims=True)
        lost = (text[np.where(held, self.rows[nodes], 0)] * held[:, :, None]).sum(1)
        rows = (text[items].sum(0) - lost) / np.maximum(count, 1) * (count > 0)
        made: nn.Module = TextMLP(config.dim) if config.text_projection == "mlp" else TextInput(config.dim, 1.0)
        start = np.asarray(made.apply({"params": self.branch.params[f"text_{ITEM}"]}, rows.astype(np.float32)))
        return (start - self.branch.layers[0][USER][self.user]) * held.any(1, keepdims=True)

    def _new_rows(self, terms: list[_Rows], level: int, ends: np.ndarray, edited: list[_Edited]) -> _Rows:
        """The rows of the columns that start in a layer, of the embeddings [P, s, K] of the layer before."""
        nodes, count = terms[0].column, len(self.rows)
        grows = self.scale[nodes[:, 1:] - 1, None] - 1  # what sources send grows by
        units, sent = np.zeros_like(ends), []
        for own in edited:
            relation = own.relation
            if relation in self.backs:
                sent.append((2 * count - 1 + self.backs.index(relation), own.growth[:, 0] * ends[:, 0]))
            message = self.messages[relation, level - 1][nodes] + sum(
                self.columns[t.start].received[relation, level - 1][nodes[:, :, None], t.column[:, None]] @ t.row
                for t in terms
            )
            message = message + own.between @ (own.growth * ends)
            before, after = own.before[level - 1][:, :, None], own.after[level - 1][:, :, None]
            change = (after - before) * message - after * (own.removed @ ((own.growth + 1) * ends))
            units += change * own.changed[:, :, None]
        rows = [units, grows * ends[:, 1:], *(row[:, None] for _, row in sent)]
        column = [nodes, nodes[:, 1:] + count - 1, *(np.full((len(nodes), 1), number) for number, _ in sent)]
        return _Rows(level, np.concatenate(column, 1), np.concatenate(rows, 1).astype(np.float32))


class _Receivers:
    """The gates and normalizations of the nodes in one relation, before and after edges are removed."""

    def __init__(self, of: SetRemoval, relation: Relation):
        branch, graph = of.branch, of.branch.graph
        self.branch, self.relation, self.user = branch, relation, of.user
        self.sends = np.array([group.relation == relation for group in of.groups])
        self.receives = np.array([group.back == relation for group in of.groups])
        adjacency = graph.adjacencies[relation]
        self.out_degree = int(np.diff(adjacency.sender_start)[of.user]) if relation.source == USER else 0
        self.in_degree = int(np.diff(adjacency.receiver_start)[of.user]) if relation.target == USER else 0
        self.sum = 0.0
        self.of_similar = relation.name == SIMILAR_TEXT and relation.target == USER
        if self.of_similar:
            matrix = branch.matrices[relation][[of.user]]
            self.scales = np.asarray(branch.weights.source_scale[relation])
            self.sum = float((matrix.data / self.scales[matrix.indices]).sum(dtype=np.float64))
            self.raw = _unscaled(of, self.scales)
        is_target = of.of_type.get(relation.target, np.zeros(len(of.rows), bool))
        rows = np.where(is_target, of.rows, 0)
        self.gate, less = (np.asarray(w.gate[relation])[:, rows] for w in (branch.weights, branch.less))
        degree = np.diff(adjacency.receiver_start)[rows]
        loses = is_target & np.concatenate([[False], self.receives[of.group]])
        growth = np.where(loses, grown(degree), 1).astype(np.float32)
        self.after = np.where(loses, less, self.gate) * growth
        self.with_text = self.after
        if of.texts and of.texts.in_gates:
            gate = self._gates(of.texts.after, degree - loses)
            self.with_text = np.where(is_target, gate * growth, self.after)

    def _gates(self, text: np.ndarray, degree: np.ndarray) -> np.ndarray:
        """Gates [L, n] of nodes with other texts and degrees."""
        config, scale = self.branch.config, self.branch.graph.adjacencies[self.relation].scale
        if config.layer_combination != "learned":
            return np.ones((config.effective_layers, len(degree)), np.float32)
        assert scale is not None
        log_degree = ((np.log1p(degree) - scale.in_mean) / (scale.in_deviation + 1e-6)).astype(np.float32)
        return gate_of(self.branch, f"gate_{self.relation}", text, log_degree)

    def edited(self, of: SetRemoval, nodes: Int[np.ndarray, "P s"], texts: SetTexts | None) -> _Edited:
        """Computes what changes in sets of nodes, of which the first is the user."""
        group = of.group[nodes[:, 1:] - 1]
        sends, receives = self.sends[group], self.receives[group]
        growth = np.zeros((*nodes.shape, 1), np.float32)
        growth[:, 0, 0] = self._user_scale(receives.sum(1)) - 1
        growth[:, 1:, 0] = (of.scale[nodes[:, 1:] - 1] - 1) * sends
        between = of.matrices[self.relation][nodes[:, :, None], nodes[:, None]]
        removed = np.zeros_like(between)
        removed[:, 0, 1:] = between[:, 0, 1:] * sends
        removed[:, 1:, 0] = between[:, 1:, 0] * receives
        after = self.after[:, nodes]
        changed = np.concatenate([sends.any(1, keepdims=True), receives], 1)
        read = texts if of.texts is not None and of.texts.in_gates else None
        if read is not None:
            after = np.where(read.changed, self.with_text[:, nodes], after)
            changed = changed | read.changed
        if self.in_degree and (read is not None or sends.any()):
            text = read.user if read is not None else np.asarray(self.branch.graph.text[USER])[[self.user]]
            text = np.broadcast_to(text, (len(nodes), text.shape[1]))
            after[:, :, 0] = self._gates(text, self.in_degree - sends.sum(1)) * self._normal(nodes, sends)
        return _Edited(self.relation, between, removed, growth, self.gate[:, nodes], after, changed)

    def _user_scale(self, removed: np.ndarray) -> np.ndarray:
        """By how much [P] what the user sends grows with so many edges less."""
        left = self.out_degree - removed
        if not self.out_degree or not self.receives.any():
            return np.ones(len(removed), np.float32)
        exponent = self.branch.params.get(f"source_scale_{self.relation}", 0.0)
        scaled = np.exp(float(exponent) * (np.log1p(left) - np.log1p(self.out_degree)))
        return (scaled * np.sqrt(self.out_degree / np.maximum(left, 1))).astype(np.float32)

    def _normal(self, nodes: np.ndarray, sends: np.ndarray) -> np.ndarray:
        """By how much [P] the weights of what the user still receives grow."""
        count = sends.sum(1)
        left = np.maximum(self.in_degree - count, 0)
        if self.of_similar:
            weight = (self.raw[nodes[:, 1:]] * sends).sum(1)
            normal = np.where(left > 0, 1 / np.maximum(self.sum - weight, 1e-12), 0)
        else:
            normal = np.sqrt(self.in_degree / np.maximum(left, 1)) * (left > 0)
        return np.where(count, normal, 1).astype(np.float32)


def _unscaled(of: SetRemoval, scales: np.ndarray) -> np.ndarray:
    """The normalized cosine [N] of each node as a text-kNN neighbor of the user."""
    found = np.zeros(len(of.rows))
    for group, at in zip(of.groups, of.places, strict=True):
        if group.relation.name == SIMILAR_TEXT:
            found[1:][at] = of.branch.matrices[group.relation].data[group.edges] / scales[group.rows]
    return found


def grown(degree: np.ndarray) -> np.ndarray:
    """Returns sqrt(d / (d - 1)), by which 1 / sqrt(d) grows with an edge less; 0 where none is left."""
    return np.sqrt(degree / np.maximum(degree - 1, 1)) * (degree > 1)


def without_rounding(left: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Rows [P, K] of which nothing is left of `whole` [1, K] but rounding become 0: a cosine would be one of noise."""
    is_left = (left * left).sum(1) > ROUNDING**2 * (whole * whole).sum(1)
    return left * is_left[:, None]
