"""Texts of every user and item: their own description and their observed reviews, with weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Float32, Float64, Int32

from fused_rec.data.dataset import Dataset, column
from fused_rec.data.nodes import ITEM, USER
from fused_rec.data.splits import Observed


class NodeTextLinks(NamedTuple):
    """Weighted links between the nodes of one type and their texts: node `nodes[k]` has text `texts[k]`.

    Sorted by (node, text), each pair once; the weights of a node sum to 1; nodes without text have no link.
    """

    nodes: Int32[np.ndarray, "K"]
    texts: Int32[np.ndarray, "K"]
    weights: Float32[np.ndarray, "K"]
    n_nodes: int  # nodes of the type, with or without text


class ReviewTexts(NamedTuple):
    """R observed reviews with text."""

    user: Int32[np.ndarray, "R"]
    item: Int32[np.ndarray, "R"]
    text: Int32[np.ndarray, "R"]  # index into `NodeTexts.texts`
    weights: Mapping[str, Float32[np.ndarray, "R"]]  # share of the text of the user and of the item, by node type


@dataclass(frozen=True)
class NodeTexts:
    """Texts of the nodes as sparse weights over T distinct texts.

    Attributes:
      texts: T texts, stripped and not blank, in order of first appearance: user descriptions, item descriptions,
        reviews.
      links: which nodes have which texts, for the node types `USER` and `ITEM`.
      reviews: the part of the links that comes from reviews of observed interactions; None for a control.
      other_reviews: the part that comes from reviews of other pairs; None for a control.
    """

    texts: list[str]
    links: Mapping[str, NodeTextLinks]
    reviews: ReviewTexts | None = None
    other_reviews: ReviewTexts | None = None


def node_texts(dataset: Dataset, observed: Observed) -> NodeTexts:
    """Collects the texts of all nodes.

    A node's description (`text`) has weight 1/2 and its observed reviews share 1/2 equally; where a node has only one
    of the two kinds, that kind has weight 1.

    Args:
      dataset: users and items, with optional `text`.
      observed: its `reviews` are used, and its interactions, to which they belong.

    Returns:
      The distinct texts and their weights for users and items.
    """
    texts_of_tables = [_texts(dataset.users), _texts(dataset.items), _texts(observed.reviews)]
    encoded = pa.array([text for texts in texts_of_tables for text in texts], pa.string()).dictionary_encode()
    codes = encoded.indices.fill_null(-1).to_numpy()
    users, items, reviews = np.split(codes, np.cumsum([len(texts) for texts in texts_of_tables])[:-1])
    written = reviews >= 0
    reviews = reviews[written]
    nodes = {name: column(observed.reviews, name)[written] for name in (USER, ITEM)}
    described = {USER: users, ITEM: items}
    links = {name: _weighted(described[name], nodes[name], reviews) for name in nodes}
    weights = {name: _review_weights(described[name], nodes[name]).astype(np.float32) for name in nodes}
    pairs, interactions = (
        user.astype(np.int64) * dataset.n_items + item
        for user, item in ((nodes[USER], nodes[ITEM]), (observed.user, observed.item))
    )
    interacted = np.isin(pairs, interactions)
    found = [
        ReviewTexts(nodes[USER][at], nodes[ITEM][at], reviews[at], {name: of[at] for name, of in weights.items()})
        for at in (interacted, ~interacted)
    ]
    return NodeTexts(encoded.dictionary.to_pylist(), links, *found)


def _texts(table: pa.Table) -> list[str | None]:
    """Returns the column `text`, stripped, None where blank; all None without the column."""
    if "text" not in table.column_names:
        return [None] * table.num_rows
    return [(text or "").strip() or None for text in table.column("text").to_pylist()]


def _weighted(
    description: Int32[np.ndarray, "n"], reviewed: Int32[np.ndarray, "R"], review: Int32[np.ndarray, "R"]
) -> NodeTextLinks:
    """Computes the links of n nodes from their descriptions, -1 = none, and R reviews."""
    described = np.flatnonzero(description >= 0)
    count = np.bincount(reviewed, minlength=len(description))
    node = np.concatenate([described, reviewed]).astype(np.int64)
    text = np.concatenate([description[described], review])
    weight = np.concatenate([np.where(count[described] > 0, 0.5, 1.0), _review_weights(description, reviewed)])
    n_texts = int(text.max(initial=0)) + 1
    pairs, position = np.unique(node * n_texts + text, return_inverse=True)
    weights = np.bincount(position, weight, minlength=len(pairs))
    nodes, texts = (pairs // n_texts).astype(np.int32), (pairs % n_texts).astype(np.int32)
    return NodeTextLinks(nodes, texts, weights.astype(np.float32), len(description))


def _review_weights(description: Int32[np.ndarray, "n"], reviewed: Int32[np.ndarray, "R"]) -> Float64[np.ndarray, "R"]:
    """Computes the weight of each review in the text of the node that it belongs to."""
    count = np.bincount(reviewed, minlength=len(description))
    return np.where(description >= 0, 0.5, 1.0)[reviewed] / count[reviewed]
