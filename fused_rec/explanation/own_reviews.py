"""Text features of users and items without reviews that a user wrote, as built from tables without these reviews.

Transforms that were fitted on the texts stay: scales of the columns, TF-IDF directions, whitening.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float32, Float64, Int

from fused_rec.config import Config
from fused_rec.data.dataset import Dataset
from fused_rec.data.node_texts import NodeTexts, ReviewTexts
from fused_rec.distributed.devices import AnyArray
from fused_rec.graph.schema import ITEM, USER
from fused_rec.text.features import TextFeatures
from fused_rec.text.whitening import apply_whitening
from fused_rec.training.inputs import ModelInputs

CHUNK = 4096  # texts whose vectors are copied together


class Written(NamedTuple):
    """What a user wrote: rows of the P items, ascending, and of each review the place of its item."""

    items: Int[np.ndarray, "P"]
    reviews: Int[np.ndarray, "R"]
    of: Int[np.ndarray, "R"]


class OwnReviews:
    """The observed reviews, and the text features of their users and items without some of them.

    Args:
      dataset: whose users and items may have a description.
      features: vectors and links of the texts of the graph; with reviews.
    """

    def __init__(self, dataset: Dataset, features: TextFeatures):
        self.features, self.reviews = features, _all_reviews(features.texts)
        self.tables: Mapping[str, pa.Table] = {USER: dataset.users, ITEM: dataset.items}
        self.by_user = np.argsort(self.reviews.user, kind="stable")
        self.users = self.reviews.user[self.by_user]

    def of_user(self, user: int) -> Written:
        """Returns what a user wrote; `reviews` are rows of `self.reviews`."""
        own = self.by_user[slice(*np.searchsorted(self.users, [user, user + 1]).tolist())]
        items, of = np.unique(self.reviews.item[own], return_inverse=True)
        return Written(items.astype(np.int64), own, of)

    def rows(
        self, node_type: str, node: int, reviews: Int[np.ndarray, "R"], gone: Bool[np.ndarray, "P R"]
    ) -> Float32[np.ndarray, "P D"]:
        """Computes the features of a node without sets of its reviews.

        A description has half of the weight of a node with reviews and the reviews share the other half
        (`fused_rec.data.node_texts`): what remains is weighted anew.

        Args:
          node_type: users or items.
          node: row of the node.
          reviews: rows of `self.reviews` that belong to the node.
          gone: which of them each of P sets removes.

        Returns:
          Rows of unit length, zero where no text is left.
        """
        links = self.features.texts.links[node_type]
        at = slice(*np.searchsorted(links.nodes, [node, node + 1]).tolist())
        description, share = self._description(node_type, node, links.texts[at])
        weight = self.reviews.weights[node_type][reviews].astype(np.float64)
        [count] = np.unique(np.round(share / weight)).tolist()
        written = weight[:, None] * self._vectors(self.reviews.text[reviews])
        reviewed = self._mean(links.texts[at], links.weights[at]) - (1 - share) * description
        left = count - gone.sum(1, keepdims=True)
        kept = (reviewed - gone @ written) * count / np.maximum(left, 1)
        means = np.where(left > 0, (1 - share) * description + kept, description)
        has_text = ((left > 0) | (share < 1))[:, 0]
        return apply_whitening(self.features.fitted.whitening[node_type], means.astype(np.float32), has_text)[0]

    def edited(
        self, text: Mapping[str, Float32[AnyArray, "_ D"]], user: int, items: list[int]
    ) -> dict[str, Float32[np.ndarray, "_ D"]]:
        """Replaces the features of a user and of items by those without the user's reviews of these items.

        Args:
          text: features of all nodes.
          user: user row.
          items: item rows.

        Returns:
          Other features.
        """
        found, written = {side: np.array(rows) for side, rows in text.items()}, self.of_user(user)
        gone = np.isin(written.items[written.of], items)
        found[USER][user] = self.rows(USER, user, written.reviews, gone[None])[0]
        for item in items:
            own = written.reviews[written.items[written.of] == item]
            found[ITEM][item] = self.rows(ITEM, item, own, np.ones((1, len(own)), bool))[0]
        return found

    def _description(
        self, node_type: str, node: int, texts: Int[np.ndarray, "K"]
    ) -> tuple[Float64[np.ndarray, "D"], float]:
        """The vector of a node's description, zero without one, and the share of its reviews."""
        table = self.tables[node_type]
        written = (table["text"][node].as_py() or "").strip() if "text" in table.column_names else ""
        if not written:
            return np.zeros(self._vectors(texts[:1]).shape[1]), 1.0
        [own] = [text for text in texts.tolist() if self.features.texts.texts[text] == written]
        return self._vectors(np.array([own]))[0], 0.5

    def _mean(self, texts: Int[np.ndarray, "K"], weights: Float32[np.ndarray, "K"]) -> Float64[np.ndarray, "D"]:
        """The mean vector of a node, of few texts at a time: an item may have very many."""
        parts = (slice(start, start + CHUNK) for start in range(0, len(texts), CHUNK))
        return sum(weights[part].astype(np.float64) @ self._vectors(texts[part]) for part in parts)  # pyright: ignore

    def _vectors(self, texts: Int[np.ndarray, "K"]) -> Float64[np.ndarray, "K D"]:
        features = self.features
        rows = features.fitted.scales.concat(features.lm[texts], features.tfidf.vectors[texts])
        return rows.astype(np.float64)


def own_reviews(config: Config, inputs: ModelInputs) -> OwnReviews | None:
    """Finds the reviews that can be removed from a model's inputs one by one.

    Args:
      config: settings of the run.
      inputs: tables, texts and graph.

    Returns:
      The reviews; None without any, for controls of the text, where no text is read (variant graph), with a trained
      text encoder, and where a text enters elsewhere than at its nodes (model.text_propagation both_ways).
    """
    fusion, texts = inputs.graph_inputs.fusion, inputs.text.texts
    is_read = config.model.uses_text or any(part.user_source == "text" for part in (fusion.closed if fusion else ()))
    if not is_read or not config.model.local_text or config.text.finetune != "frozen" or texts.reviews is None:
        return None
    found = OwnReviews(inputs.dataset, inputs.text)
    return found if len(found.users) else None


def _all_reviews(texts: NodeTexts) -> ReviewTexts:
    """The reviews of all pairs; those without an interaction are text of their user and item as well."""
    assert texts.reviews is not None and texts.other_reviews is not None
    both = texts.reviews, texts.other_reviews
    return ReviewTexts(
        np.concatenate([of.user for of in both]),
        np.concatenate([of.item for of in both]),
        np.concatenate([of.text for of in both]),
        {side: np.concatenate([of.weights[side] for of in both]) for side in (USER, ITEM)},
    )
