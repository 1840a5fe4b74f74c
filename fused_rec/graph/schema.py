"""Names of node types and relations, and the edges of one relation as they are before a graph has them."""

from typing import NamedTuple

import numpy as np

from fused_rec.data.nodes import ITEM, USER


class Relation(NamedTuple):
    """An edge type; messages flow from nodes of type `source` to nodes of type `target`."""

    source: str
    name: str
    target: str

    def __str__(self) -> str:
        return f"{self.source}-{self.name}-{self.target}"

    @property
    def by_sender(self) -> bool:
        """Whether devices divide the edges by sender: edges from users to other nodes, so that user rows stay."""
        return self.source == USER != self.target


class Edges(NamedTuple):
    """The edges of one relation, with node IDs local to the node types."""

    senders: np.ndarray  # int [E], rows of the source type
    receivers: np.ndarray  # int [E], rows of the target type
    weight: np.ndarray  # float [E], the fixed factor of a message


INTERACTS = Relation(USER, "holds", ITEM)
INTERACTED_BY = Relation(ITEM, "held_by", USER)
SIMILAR_TEXT = "similar_text"  # name of the text-kNN relations, of users and of items
NO_TEXT_DIM = 1  # width of text embeddings where no text is used: dense layers need a column
