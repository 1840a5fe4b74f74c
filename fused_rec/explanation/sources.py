"""Sources of a user: neighbors in the graph, with the edges that they take, and items that the user reviewed."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from fused_rec.explanation.decomposition import REVIEWED_BY, SIMILAR_USERS, source_kind
from fused_rec.explanation.own_reviews import OwnReviews
from fused_rec.graph.adjacency import Adjacency
from fused_rec.graph.device_graph import DeviceGraph
from fused_rec.graph.schema import INTERACTED_BY, INTERACTS, USER, Relation

SIMILAR = Relation(USER, SIMILAR_USERS, USER)


class Source(NamedTuple):
    """Neighbor or reviewed item of the user, and the edges removed with it: (relation, index of the edge)."""

    kind: str
    row: int
    edges: tuple[tuple[Relation, int], ...]


class Sources(NamedTuple):
    """The P sources of a user in one relation.

    Attributes:
      relation: from the sources to the user; `REVIEWED_BY` of reviews, which have no edges.
      back: the relation with the reverse edges, or None.
      rows: the neighbors, ascending.
      edges: index of the edge from each source to the user; empty of reviews.
      back_edges: index of the edge from the user to each source, in `back`; empty without one.
    """

    relation: Relation
    back: Relation | None
    rows: Int[np.ndarray, "P"]
    edges: Int[np.ndarray, "E"]
    back_edges: Int[np.ndarray, "B"]


def reverse_relations(graph: DeviceGraph) -> dict[Relation, Relation | None]:
    """Finds the relation with the reverse edges of each relation into users.

    Args:
      graph: the whole graph, on the host.

    Returns:
      By relation: the reverse, the relation itself where it is symmetric; None for text-kNN edges, and for social edges
      of a kind that was mutual in training and is not in these tables.
    """
    into_users = [relation for relation in graph.adjacencies if relation.target == USER]
    return {r: None if r == SIMILAR else _reverse(graph.adjacencies, r) for r in into_users}


def _reverse(adjacencies: Mapping[Relation, Adjacency], relation: Relation) -> Relation | None:
    if relation == INTERACTED_BY:
        return INTERACTS
    names = relation.name, f"{relation.name}_of", relation.name.removesuffix("_of")
    one = adjacencies[relation]
    turned = np.stack([one.senders, one.receivers])[:, one.by_sender]
    for other in (Relation(USER, name, USER) for name in names):
        back = adjacencies.get(other)
        if back is not None and np.array_equal(turned, np.stack([back.receivers, back.senders])):
            return other
    return None


def sources_by_relation(
    graph: DeviceGraph, reverse: Mapping[Relation, Relation | None], user: int, reviews: OwnReviews | None = None
) -> list[Sources]:
    """Lists the in-neighbors of a user by relation, and the items that the user reviewed.

    Args:
      graph: the whole graph, on the host.
      reverse: of `reverse_relations`.
      user: user row.
      reviews: those that can be removed; None: reviews are no sources.

    Returns:
      One entry per relation with edges into the user, then one of reviews if there are any.
    """
    found = []
    for relation, back in reverse.items():
        adjacency = graph.adjacencies[relation]
        start, end = np.asarray(adjacency.receiver_start[user : user + 2]).tolist()
        back_edges = np.zeros(0, np.int64)
        if back is not None:
            other = graph.adjacencies[back]
            back_edges = np.asarray(other.by_sender[slice(*np.asarray(other.sender_start[user : user + 2]).tolist())])
        if end > start:  # both directions ascend by the neighbor
            rows = np.asarray(adjacency.senders[start:end])
            found.append(Sources(relation, back, rows, np.arange(start, end), back_edges))
    if reviews is not None and len(items := reviews.of_user(user).items):
        found.append(Sources(REVIEWED_BY, None, items, np.zeros(0, np.int64), np.zeros(0, np.int64)))
    return found


def sources(
    graph: DeviceGraph, reverse: Mapping[Relation, Relation | None], user: int, reviews: OwnReviews | None = None
) -> list[Source]:
    """Lists the sources of a user, named as in `decomposition.contributions`.

    Args:
      graph: the whole graph, on the host.
      reverse: of `reverse_relations`.
      user: user row.
      reviews: as in `sources_by_relation`.

    Returns:
      The sources. An interaction or social edge includes its reverse edge; a text-kNN edge has none. A review is all
      that the user wrote about an item, without the interaction.
    """
    found = []
    for group in sources_by_relation(graph, reverse, user, reviews):
        of_both = [(group.relation, group.edges), (group.back, group.back_edges)]
        for place, row in enumerate(group.rows.tolist()):
            edges = tuple((relation, int(of[place])) for relation, of in of_both if relation is not None and len(of))
            found.append(Source(source_kind(group.relation), row, edges))
    return found


def senders_of(graph: DeviceGraph, relation: Relation, user: int) -> Int[np.ndarray, "P"]:
    """Returns the sources of a user in one relation."""
    adjacency = graph.adjacencies[relation]
    return np.asarray(adjacency.senders[slice(*np.asarray(adjacency.receiver_start[user : user + 2]).tolist())])
