"""Texts of every user and item: their own description and their observed reviews, with weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Float32, Int32

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


@dataclass(frozen=True)
class NodeTexts:
    """Texts of the nodes as sparse weights over T distinct texts.

    Attributes:
      texts: T texts, stripped and not blank, in order of first appearance: user descriptions, item descriptions,
        reviews.
      links: which nodes have which texts, for the node types `USER` and `ITEM`.
    """

    texts: list[str]
    links: Mapping[str, NodeTextLinks]


def node_texts(dataset: Dataset, observed: Observed) -> NodeTexts:
    """Collects the texts of all nodes.

    A node's description (`text`) has weight 1/2 and its observed reviews share 1/2 equally; where a node has only one
    of the two kinds, that kind has weight 1.

    Args:
      dataset: users and items, with optional `text`.
      observed: its `reviews` are used.

    Returns:
      The distinct texts and their weights for users and items.
    """
    texts_of_tables = [_texts(dataset.users), _texts(dataset.items), _texts(observed.reviews)]
    encoded = pa.array([text for texts in texts_of_tables for text in texts], pa.string()).dictionary_encode()
    codes = encoded.indices.fill_null(-1).to_numpy()
    users, items, reviews = np.split(codes, np.cumsum([len(texts) for texts in texts_of_tables])[:-1])
    writer, about = column(observed.reviews, "user"), column(observed.reviews, "item")
    links = {USER: _weighted(users, writer, reviews), ITEM: _weighted(items, about, reviews)}
    return NodeTexts(encoded.dictionary.to_pylist(), links)


def _texts(table: pa.Table) -> list[str | None]:
    """Returns the column `text`, stripped, None where blank; all None without the column."""
    if "text" not in table.column_names:
        return [None] * table.num_rows
    return [(text or "").strip() or None for text in table.column("text").to_pylist()]


def _weighted(
    description: Int32[np.ndarray, "n"], reviewed: Int32[np.ndarray, "R"], review: Int32[np.ndarray, "R"]
) -> NodeTextLinks:
    """Computes the links of n nodes from their descriptions and R reviews; -1 = no text."""
    described = np.flatnonzero(description >= 0)
    reviewed, review = reviewed[review >= 0], review[review >= 0]
    count = np.bincount(reviewed, minlength=len(description))
    share = np.where(description >= 0, 0.5, 1.0)
    node = np.concatenate([described, reviewed]).astype(np.int64)
    text = np.concatenate([description[described], review])
    weight = np.concatenate([np.where(count[described] > 0, 0.5, 1.0), share[reviewed] / count[reviewed]])
    n_texts = int(text.max(initial=0)) + 1
    pairs, position = np.unique(node * n_texts + text, return_inverse=True)
    weights = np.bincount(position, weight, minlength=len(pairs))
    nodes, texts = (pairs // n_texts).astype(np.int32), (pairs % n_texts).astype(np.int32)
    return NodeTextLinks(nodes, texts, weights.astype(np.float32), len(description))
