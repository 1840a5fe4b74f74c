"""What the removal of a user's reviews changes at the nodes of a branch: text inputs and gates of user and items.

A review is text of its user and of its item. Both features are those of tables without it
(`fused_rec.explanation.own_reviews`); text-kNN edges, whose weights were made of texts, stay.

P sets of m sources, N nodes (the user and each source), s = m + 1 nodes of a set, L layers, D features, K numbers a
row.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int, PyTree

from fused_rec.config import ModelConfig
from fused_rec.distributed.devices import AnyArray
from fused_rec.explanation.branches import Branch
from fused_rec.explanation.decomposition import REVIEWED_BY
from fused_rec.explanation.own_reviews import OwnReviews
from fused_rec.explanation.pair_score import projected
from fused_rec.explanation.sources import Sources
from fused_rec.graph.schema import INTERACTED_BY, ITEM, USER
from fused_rec.model.text_fusion import Gate, gate_values, project

LEAST_ROWS = 32  # to which rows are padded, then to powers of two: each number of rows is a compilation


class SetTexts(NamedTuple):
    """Texts in P sets: which of their nodes have another one, and the features of the user."""

    changed: Bool[np.ndarray, "P s"]
    user: Float32[np.ndarray, "P D"]


class RemovedTexts:
    """Features of a user and of reviewed items without reviews; sources are numbered as nodes, from 1.

    Args:
      reviews: those that can be removed.
      user: user row.
      text: the user's features with all reviews.
      groups: the user's sources by relation.
    """

    def __init__(self, reviews: OwnReviews, user: int, text: Float32[np.ndarray, "D"], groups: Sequence[Sources]):
        self.reviews, self.user, self.text, self.written = reviews, user, text, reviews.of_user(user)
        relations = [None, *(group.relation for group in groups for _ in group.rows)]
        rows = np.concatenate([[-1], *(group.rows for group in groups)]).astype(np.int64)
        self.is_review = np.array([relation == REVIEWED_BY for relation in relations])
        held = {int(rows[n]): n for n, relation in enumerate(relations) if relation == INTERACTED_BY}
        # The interaction with the same item, where it is a source too: -1 of all but reviews.
        twins = [held.get(int(row), -1) if own else -1 for own, row in zip(self.is_review, rows, strict=True)]
        self.twin = np.array(twins)
        self.review_of = np.where(self.is_review, np.searchsorted(self.written.items, rows), -1)
        self.item = {int(n): self._item(int(rows[n])) for n in np.flatnonzero(self.is_review)}
        self.item |= {int(self.twin[n]): row for n, row in self.item.items() if self.twin[n] >= 0}

    def _item(self, item: int) -> Float32[np.ndarray, "D"]:
        own = self.written.reviews[self.written.items[self.written.of] == item]
        return self.reviews.rows(ITEM, item, own, np.ones((1, len(own)), bool))[0]

    def of_sets(self, nodes: Int[np.ndarray, "P s"]) -> SetTexts | None:
        """Computes the features in sets of nodes, of which the first is the user.

        Where a set has an interaction and the review of its item, what the text changes counts at the interaction.

        Returns:
          The texts; None where no set has a review.
        """
        is_review = self.is_review[nodes]
        if not is_review.any():
            return None
        twins = np.where(is_review, self.twin[nodes], -1)
        same = (twins[:, :, None] == nodes[:, None, :]) & is_review[:, :, None]  # [P, review, interaction]
        changed = (is_review & ~same.any(2)) | same.any(1)
        changed[:, 0] = is_review.any(1)
        items = np.zeros((len(nodes), len(self.written.items) + 1), bool)
        np.put_along_axis(items, self.review_of[nodes], True, axis=1)  # of all other nodes the last column
        without = changed[:, 0]
        text = np.repeat(self.text[None], len(nodes), axis=0)
        text[without] = self.reviews.rows(USER, self.user, self.written.reviews, items[without][:, self.written.of])
        return SetTexts(changed, text)


class BranchTexts:
    """What other texts of a user and of items change in a branch.

    Args:
      branch: the branch.
      removed: features without reviews.
      nodes: types and rows of the N nodes.
    """

    def __init__(self, branch: Branch, removed: RemovedTexts, nodes: tuple[Sequence[str], Int[np.ndarray, "N"]]):
        self.branch, self.removed = branch, removed
        self.types, rows = nodes
        config = branch.config
        self.with_text = (USER, ITEM) if config.user_text_input else (ITEM,)
        self.in_gates = config.fuses_text and config.layer_combination == "learned" and config.relation_gates
        text = branch.graph.text
        self.before = np.stack([np.asarray(text[t])[row] for t, row in zip(self.types, rows, strict=True)])
        self.after = self.before.copy()
        for number, row in removed.item.items():
            self.after[number] = row
        self.inputs = [self._inputs(ITEM, of) for of in (self.before, self.after)]
        self.user_input = self._inputs(USER, self.before[:1])[0]

    def input_rows(self, of: SetTexts, nodes: Int[np.ndarray, "P s"]) -> Float32[np.ndarray, "P s K"]:
        """Computes what changes in h^0."""
        before, after = self.inputs
        found = (after - before)[nodes]
        found[:, 0] = self._inputs(USER, of.user) - self.user_input
        return found * of.changed[:, :, None]

    def layer_rows(self, of: SetTexts, nodes: Int[np.ndarray, "P s"]) -> Float32[np.ndarray, "L P s K"] | None:
        """Computes what the text inputs of all layers change by; None without such inputs."""
        if not self.branch.config.fuses_text:
            return None
        old, new = (self._text_gates(ITEM, text) for text in (self.before, self.after))
        before, after = self.inputs
        found = (new[:, :, None] * after - old[:, :, None] * before)[:, nodes]
        found[:, :, 0] = 0
        if USER in self.with_text:
            old, new = (self._text_gates(USER, text) for text in (self.before[:1], of.user))
            found[:, :, 0] = new[:, :, None] * self._inputs(USER, of.user) - old[:, :, None] * self.user_input
        return found * of.changed[None, :, :, None]

    def _text_gates(self, node_type: str, text: Float32[np.ndarray, "n D"]) -> Float32[np.ndarray, "L n"]:
        return gate_of(self.branch, f"gate_text_{node_type}", text, np.zeros(len(text), np.float32))

    def _inputs(self, node_type: str, text: Float32[np.ndarray, "n D"]) -> Float32[np.ndarray, "n K"]:
        """Text inputs of nodes of a type, zero for a type without."""
        config, name = self.branch.config, f"text_{node_type}"
        if node_type not in self.with_text or not config.uses_text:
            return np.zeros((len(text), config.dim), np.float32)
        params = {name: self.branch.params[name]}
        return np.asarray(_projected(config, node_type, params, _padded(text)))[: len(text)]


def gate_of(
    branch: Branch, name: str, text: Float32[np.ndarray, "n D"], log_degree: Float32[np.ndarray, "n"]
) -> Float32[np.ndarray, "L n"]:
    """Computes a gate of a branch for texts and standardized log degrees."""
    config = branch.config
    if config.layer_combination != "learned":
        return np.ones((config.effective_layers, len(log_degree)), np.float32)
    rows = _padded(np.concatenate([text, log_degree[:, None]], axis=1))
    return np.asarray(_gates(config, branch.params[name], rows))[:, : len(text)]


def _padded(rows: Float32[np.ndarray, "n D"]) -> Float32[np.ndarray, "N D"]:
    """Rows with further ones of zeros, so that few shapes are compiled."""
    size = max(LEAST_ROWS, 1 << (len(rows) - 1).bit_length()) if len(rows) else LEAST_ROWS
    return np.pad(rows, ((0, size - len(rows)), (0, 0)))


@functools.partial(jax.jit, static_argnums=0)
def _gates(config: ModelConfig, params: PyTree, rows: Float32[AnyArray, "n D_plus_1"]) -> Float32[Array, "L n"]:
    text, log_degree = rows[:, :-1], rows[:, -1]
    made = Gate(config.effective_layers, config.relation_gates)
    weights: Any = made.apply({"params": params}, text.shape[1], method="weights")
    logits = project(text, weights.by_text) if config.fuses_text and weights.by_text is not None else None
    return gate_values(weights, logits, jnp.abs(text).sum(axis=1) > 0, log_degree)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _projected(config: ModelConfig, side: str, params: PyTree, text: Float32[AnyArray, "n D"]) -> Float32[Array, "n K"]:
    return projected(config, params, side, text)
