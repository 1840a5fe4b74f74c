"""Embeddings of a trained branch without an edge, for many edges of a user at once and exactly.

Propagation is linear, h^l = M_l h^{l-1} + text (`fused_rec.model.propagation`), and M_l changes little. The removal of
the edge from a to b of a relation scales column a of its matrix A (by the normalization with one edge less and by the
source scale), and row b (by the normalization and by the gate), and takes out one entry. So

    (M'_l - M_l) h = A_:a (s_a - 1) h_a + e_b r_b

with s_a the factor of the column and r_b what row b changes besides. Hence the change of all embeddings after l layers
is a sum of few products of a column over the nodes and a row of K entries. Columns are propagated like embeddings, one
number a node in place of K, and those that start at the user are the same for all of the user's sources.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
import scipy.sparse
from jaxtyping import Int, PyTree

from fused_rec.config import Config, ModelConfig
from fused_rec.explanation.sources import Sources, senders_of
from fused_rec.graph.adjacency import Adjacency, degrees_of
from fused_rec.graph.device_graph import DeviceGraph
from fused_rec.graph.schema import INTERACTED_BY, INTERACTS, ITEM, SIMILAR_TEXT, USER, Relation
from fused_rec.model.model import LINEAR, FusedModel
from fused_rec.model.propagation import PropagationWeights, combine_layers, propagate_layers
from fused_rec.model.text_fusion import TextInput, TextMLP
from fused_rec.training.train_step import BRANCHES

OWN, OTHER = 0, 1  # the two ends of a removed edge: the user and the source
ROUNDING = 3e-6  # of the norm of a sum of float32 rows


class _Edit(NamedTuple):
    """Removal of one edge per source: its relation, and which end sends and which receives."""

    relation: Relation
    sender: int
    receiver: int
    edges: Int[np.ndarray, "P"]


class Term(NamedTuple):
    """A part of the change of all embeddings of a layer: the product of a column over nodes and a row.

    Attributes:
      columns: by node type [n, 1], or [n, P] where the column depends on the source.
      row: [P, K].
      items: the columns of items, summed over the layers so far with the layer weights.
    """

    columns: dict[str, np.ndarray]
    row: np.ndarray
    items: np.ndarray | None = None


class Change(NamedTuple):
    """Embeddings of a branch without each of P sources: of the user [P, K], and what changes those of items."""

    user: np.ndarray
    terms: list[Term]


@dataclasses.dataclass(frozen=True)
class Branch:
    """A trained branch on the whole graph, and what its factors would be with all degrees less by one."""

    config: ModelConfig
    graph: DeviceGraph
    params: PyTree
    ids: dict[str, np.ndarray]
    layers: list[dict[str, np.ndarray]]  # h^0 to h^L
    out: dict[str, np.ndarray]
    weights: PropagationWeights
    less: PropagationWeights  # gates and source scales count
    matrices: dict[Relation, scipy.sparse.csr_matrix]  # edge weights times source scales, receivers by senders
    columns: dict[Relation, scipy.sparse.csc_matrix]


def branches(config: Config, params: PyTree, graph: DeviceGraph) -> tuple[Branch, ...]:
    """Computes the embeddings and matrices of each trained branch.

    Args:
      config: settings of model and training.
      params: parameters, not sharded.
      graph: the whole graph, on the host.

    Returns:
      The graph branch, and the text branch where the model has one.
    """
    static = Config(model=config.model, train=config.train)
    captured, fewer = jax.device_get(_captured(static, params, graph, _with_fewer_edges(graph)))
    settings = [config.model] if len(captured) == 1 else [config.model, config.model.text_branch()]
    return tuple(
        _branch(own, graph, params.get(name, {}), found, less)
        for own, name, found, less in zip(settings, BRANCHES, captured, fewer, strict=False)
    )


def _with_fewer_edges(graph: DeviceGraph) -> DeviceGraph:
    """The graph with every degree less by one, as the two ends of a removed edge have it; edges stay."""

    def fewer(adjacency: Adjacency) -> Adjacency:
        into, out = (np.diff(start) - 1 for start in (adjacency.receiver_start, adjacency.sender_start))
        degrees = degrees_of(np.maximum(into, 0), np.maximum(out, 0), adjacency.scale)
        return dataclasses.replace(adjacency, degrees=degrees)

    return graph.with_adjacencies({relation: fewer(a) for relation, a in graph.adjacencies.items()})


@functools.partial(jax.jit, static_argnums=0)
def _captured(config: Config, params: PyTree, graph: DeviceGraph, fewer: DeviceGraph) -> Any:
    """(ID embeddings, layers, output, weights) of each branch, and the weights with fewer edges."""
    found = []
    for given in (graph, fewer):
        captured: Any
        vectors, captured = FusedModel(config.model).apply({"params": params}, given, mutable=["intermediates"])
        found.append([captured["intermediates"][name][LINEAR][0] for name in BRANCHES[: len(vectors)]])
    whole = []
    for ids, text, weights in found[0]:
        layers = propagate_layers(graph, weights, {t: ids[t] + text[t] for t in ids}, text)
        whole.append((ids, layers, combine_layers(weights, layers), weights))
    return whole, [weights for _, _, weights in found[1]]


def _branch(config: ModelConfig, graph: DeviceGraph, params: PyTree, found: tuple, less: PropagationWeights) -> Branch:
    """Builds the matrices of a branch."""
    ids, layers, out, weights = found
    matrices = {}
    for relation, edge in weights.edge.items():
        adjacency = graph.adjacencies[relation]
        n_edges = int(adjacency.receiver_start[-1])
        senders = np.asarray(adjacency.senders)[:n_edges]
        data = np.asarray(edge)[:n_edges] * weights.source_scale[relation][senders]
        shape = graph.count(relation.target), graph.count(relation.source)
        matrices[relation] = scipy.sparse.csr_matrix((data, senders, np.asarray(adjacency.receiver_start)), shape)
    columns = {relation: matrix.tocsc() for relation, matrix in matrices.items()}
    return Branch(config, graph, params, ids, layers, out, weights, less, matrices, columns)


def embeddings_without(branch: Branch, user: int, gone: Sources) -> Change:
    """Computes the embeddings of a branch without each of the sources of one relation.

    Args:
      branch: of `branches`.
      user: user row.
      gone: P sources of the user, of which one at a time is removed.

    Returns:
      The embeddings.
    """
    return _Removal(branch, user, gone).run()


class _Removal:
    """The layers of a branch without each of P sources of a user."""

    def __init__(self, branch: Branch, user: int, gone: Sources):
        self.branch, self.gone = branch, gone
        count = len(gone.rows)
        self.type = USER, gone.relation.source
        self.row = np.full(count, user), gone.rows  # of each end
        edits = [_Edit(gone.relation, OTHER, OWN, gone.edges)]
        if gone.back is not None:
            edits.append(_Edit(gone.back, OWN, OTHER, gone.back_edges))
        self.edits = [edit for edit in edits if edit.relation in branch.matrices]
        self.mix = branch.weights.layer_weights

    def run(self) -> Change:
        """Goes through the layers."""
        layers, whole = self.branch.layers, self.branch.out[USER][self.row[OWN]]
        terms, user = self.input_terms(), whole
        for level, share in enumerate(self.mix):
            if level:
                ends = [layers[level - 1][self.type[end]][self.row[end]] + changes[end] for end in (OWN, OTHER)]
                terms = self.next_terms(terms, level - 1, ends)
            changes = [self.at_end(terms, end) for end in (OWN, OTHER)]
            user = user + share * changes[OWN]
            terms = [
                term._replace(items=_plus(term.items, share * term.columns[ITEM])) if ITEM in term.columns else term
                for term in terms
            ]
        return Change(without_rounding(user, whole), terms)

    def at_end(self, terms: list[Term], end: int) -> np.ndarray:
        """The change [P, K] of the embeddings of one end."""
        changed = np.zeros((len(self.row[end]), self.branch.out[USER].shape[1]), np.float32)
        for term in terms:
            if self.type[end] in term.columns:
                changed += _entries(term.columns[self.type[end]], self.row[end])[:, None] * term.row
        return changed

    def unit(self, end: int) -> dict[str, np.ndarray]:
        """The column that is 1 at one end."""
        count, rows = self.branch.graph.count(self.type[end]), self.row[end]
        rows = rows[:1] if end == OWN else rows
        column = np.zeros((count, len(rows)), np.float32)
        column[rows, np.arange(len(rows))] = 1
        return {self.type[end]: column}

    def input_terms(self) -> list[Term]:
        """What changes in h^0: an end without edges has no ID embedding, and a user may start as their items."""
        branch, graph, found = self.branch, self.branch.graph, []
        for end in (OWN, OTHER):
            node_type, rows = self.type[end], self.row[end]
            into = [INTERACTS] if node_type == ITEM else [r for r in branch.matrices if r.target == USER]
            degrees = [np.diff(graph.adjacencies[r].receiver_start)[rows] for r in into]
            edits = [edit for edit in self.all_edits if edit.receiver == end and edit.relation in into]
            lost = sum(degrees, np.zeros(len(rows), int)) == len(edits)
            row = -branch.ids[node_type][rows] * lost[:, None]
            if end == OWN and branch.config.users_start_as_items and self.gone.relation == INTERACTED_BY:
                row = row + self.other_start() - branch.layers[0][USER][rows]
            if row.any():
                found.append(Term(self.unit(end), row))
        return found

    @property
    def all_edits(self) -> list[_Edit]:
        """Removed edges, also of relations that the branch does not read."""
        gone = self.gone
        found = [_Edit(gone.relation, OTHER, OWN, gone.edges)]
        return found if gone.back is None else [*found, _Edit(gone.back, OWN, OTHER, gone.back_edges)]

    def other_start(self) -> np.ndarray:
        """The projected mean text [P, K] of the user's items without each."""
        config, text = self.branch.config, np.asarray(self.branch.graph.text[ITEM])
        items = senders_of(self.branch.graph, INTERACTED_BY, int(self.row[OWN][0]))
        rows = (text[items].sum(0) - text[self.gone.rows]) / max(len(items) - 1, 1) * (len(items) > 1)
        project: nn.Module = TextInput(config.dim, config.id_init_std)
        if config.text_projection == "mlp":
            project = TextMLP(config.dim)
        return np.asarray(project.apply({"params": self.branch.params[f"text_{ITEM}"]}, rows))

    def next_terms(self, terms: list[Term], level: int, ends: list[np.ndarray]) -> list[Term]:
        """Propagates the terms through a layer and adds those that start in it."""
        branch = self.branch
        columns: list[dict[str, np.ndarray]] = [{} for _ in terms]
        received = {edit: np.zeros_like(ends[OWN]) for edit in range(len(self.edits))}
        for relation, matrix in branch.matrices.items():
            present = [number for number, term in enumerate(terms) if relation.source in term.columns]
            if not present:
                continue
            stacked = [terms[number].columns[relation.source] for number in present]
            sums = matrix @ np.concatenate(stacked, axis=1)
            gate = np.asarray(branch.weights.gate[relation])[level][:, None]
            borders = np.cumsum([column.shape[1] for column in stacked])[:-1]
            for number, column in zip(present, np.split(sums, borders, axis=1), strict=True):
                for place, edit in enumerate(self.edits):
                    if edit.relation == relation:
                        entries = _entries(column, self.row[edit.receiver])
                        received[place] += entries[:, None] * terms[number].row
                columns[number][relation.target] = _plus(columns[number].get(relation.target), gate * column)
        found = [term._replace(columns=new) for term, new in zip(terms, columns, strict=True)]
        return found + self.new_terms(level, ends, received)

    def new_terms(self, level: int, ends: list[np.ndarray], received: dict[int, np.ndarray]) -> list[Term]:
        """The columns of the removed edges' senders, and the rows of their receivers.

        Args:
          level: layer, from 0.
          ends: embeddings of the ends in the layer before, without the sources.
          received: by edit, what the receiver gets of the change of the layer before, without its gate.
        """
        branch, found = self.branch, []
        rows: dict[int, np.ndarray] = {}
        for place, edit in enumerate(self.edits):
            relation, senders, receivers = edit.relation, self.row[edit.sender], self.row[edit.receiver]
            matrix, sender = branch.matrices[relation], ends[edit.sender]
            scale, normal = self.factors(edit)
            gate, other = (w.gate[relation][level][receivers][:, None] for w in (branch.weights, branch.less))
            weight = matrix.data[edit.edges][:, None]
            changed = other * normal
            message = matrix[receivers] @ branch.layers[level][relation.source] + received[place]
            message = message + weight * (scale - 1) * sender
            row = (changed - gate) * message - changed * weight * scale * sender
            rows[edit.receiver] = rows.get(edit.receiver, 0) + row
            column = branch.columns[relation][:, senders[:1] if edit.sender == OWN else senders].toarray()
            column = branch.weights.gate[relation][level][:, None] * column
            found.append(Term({relation.target: column}, (scale - 1) * sender))
        return found + [Term(self.unit(end), row) for end, row in rows.items()]

    def factors(self, edit: _Edit) -> tuple[np.ndarray, np.ndarray]:
        """How the sender's column and the receiver's row are scaled, [P, 1] each, without gates."""
        branch, relation = self.branch, edit.relation
        adjacency = branch.graph.adjacencies[relation]
        out_degree, in_degree = np.diff(adjacency.sender_start), np.diff(adjacency.receiver_start)
        senders, receivers = self.row[edit.sender], self.row[edit.receiver]
        scale = np.asarray(branch.less.source_scale[relation] / branch.weights.source_scale[relation])[senders]
        if relation.name == SIMILAR_TEXT:
            into_user = slice(*np.asarray(adjacency.receiver_start[receivers[0] :][:2]).tolist())
            weight = np.asarray(adjacency.weight, np.float64)
            left = weight[into_user].sum() - weight[edit.edges]
            normal = np.where(in_degree[receivers] > 1, 1 / np.maximum(left, 1e-12), 0)
        else:
            scale, normal = scale * grown(out_degree[senders]), grown(in_degree[receivers])
        return scale.astype(np.float32)[:, None], normal.astype(np.float32)[:, None]


def grown(degree: np.ndarray) -> np.ndarray:
    """Returns sqrt(d / (d - 1)), by which 1 / sqrt(d) grows with an edge less; 0 where none is left."""
    return np.sqrt(degree / np.maximum(degree - 1, 1)) * (degree > 1)


def _entries(column: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The entries [P] of a column at one node per source."""
    return column[rows, 0 if column.shape[1] == 1 else np.arange(len(rows))]


def _plus(one: np.ndarray | None, other: np.ndarray) -> np.ndarray:
    """The sum of columns that may be the same for all sources."""
    return other if one is None else one + other


def without_rounding(left: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Rows [P, K] of which nothing is left of `whole` [1, K] but rounding become 0: a cosine would be one of noise."""
    is_left = (left * left).sum(1) > ROUNDING**2 * (whole * whole).sum(1)
    return left * is_left[:, None]
