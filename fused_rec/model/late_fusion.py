"""Late fusion: the score of a user and an item as a weighted sum of standardized components.

    score(u, i) = sum_c w_c <x^c_u, y^c_i> / sigma_c(u)

sigma_c(u) is the standard deviation of component c's scores over all items. A weight thus means the same for every
user, and a component that says nothing about a user (sigma 0) has no part in their scores. Every component is an inner
product, and so is the sum: its vectors are the components' side by side.

Components: the trained model, each of its branches, and closed-form recommenders (`fused_rec.baselines.factors`), whose
user vectors are computed from the graph. Weights come from the validation split
(`fused_rec.training.component_weights`).
"""

from collections.abc import Mapping
from typing import NamedTuple, no_type_check

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32

from fused_rec.baselines.factors import UserSource
from fused_rec.baselines.launch import PRIOR, TASTE
from fused_rec.distributed.devices import AnyArray
from fused_rec.graph.device_graph import DeviceGraph
from fused_rec.graph.schema import INTERACTED_BY, SIMILAR_TEXT, USER, Relation
from fused_rec.graph.spmm import neighbor_sum

Vectors = tuple[Float32[Array, "U _"], Float32[Array, "I _"]]
LAUNCH = (PRIOR, TASTE)
MODEL, GRAPH_BRANCH, TEXT_BRANCH = "model", "graph_branch", "text_branch"  # trained components
MIN_SHARE = 1e-3
MIN_VARIANCE = 1e-8  # of |u|^2 tr(C), a bound of the variance: less is rounding


@no_type_check  # as of `Adjacency`
@flax.struct.dataclass
class ClosedForm:
    """A closed-form component.

    Attributes:
      weight: float32, w_c.
      source: float32 [I, S], rows that are summed over items; [I, 0] with another source of user vectors.
      target: float32 [I, R], rows y_i.
      name: of the component.
      user_source: where user vectors come from.
      text_columns: how many of the first columns are made of text features; the others are of interactions.
      friends: float32 [U, F], rows that are summed over friends times `friends_scale`, the last columns; or None.
    """

    weight: Float32[AnyArray, ""]
    source: Float32[AnyArray, "I S"]
    target: Float32[AnyArray, "I R"]
    name: str = flax.struct.field(pytree_node=False)
    user_source: UserSource = flax.struct.field(pytree_node=False)
    text_columns: int = flax.struct.field(pytree_node=False, default=0)
    friends: Float32[AnyArray, "U F"] | None = None


@no_type_check  # as of `Adjacency`
@flax.struct.dataclass
class LateFusion:
    """The components of a score.

    Attributes:
      trained: float32, w_c of `MODEL`, `GRAPH_BRANCH` and `TEXT_BRANCH`; those left out are not in the score.
      closed: closed-form components.
    """

    trained: Mapping[str, Float32[AnyArray, ""]]
    closed: tuple[ClosedForm, ...] = ()


def component_names(fusion: LateFusion) -> list[str]:
    """Lists the names of the components, in the order of `components`."""
    return [*sorted(fusion.trained), *(part.name for part in fusion.closed)]


class Component(NamedTuple):
    """One component of a score: scale_u <users_u, items_i>.

    Attributes:
      name: of the component.
      scale: float32 [U], w_c / sigma_c(u), 0 where the component says nothing about the user.
      users: float32 [U, R].
      items: float32 [I, R].
    """

    name: str
    scale: Float32[AnyArray, "U"]
    users: Float32[AnyArray, "U R"]
    items: Float32[AnyArray, "I R"]


def components(fusion: LateFusion, trained: Mapping[str, Vectors], graph: DeviceGraph) -> list[Component]:
    """Computes the vectors of each component, and how they are standardized and weighted.

    Args:
      fusion: weights, and the closed-form components.
      trained: vectors of the trained components by name; only those with a weight are used.
      graph: the graph, whole or one device's share of it.

    Returns:
      The components; the sum of their scores is the score.
    """
    found = [(name, fusion.trained[name], *trained[name]) for name in sorted(fusion.trained)]  # as JAX orders them
    for closed in fusion.closed:
        found.append((closed.name, closed.weight, user_vectors(closed, graph), jnp.asarray(closed.target)))
    scales = [weight * inverse_deviation(users, items) for _, weight, users, items in found]
    share = active_share(
        [(weight, scale > 0) for (name, weight, *_), scale in zip(found, scales, strict=True) if name not in LAUNCH]
    )
    return [
        Component(name, scale * share if name in LAUNCH else scale, users, items)
        for (name, _, users, items), scale in zip(found, scales, strict=True)
    ]


def active_share(parts: list[tuple[Float32[AnyArray, ""], Bool[AnyArray, "U"]]]) -> Float32[Array, "U"]:
    """Computes how much of the weights is of components that say something about the user.

    The launch prior counts by it: of a user without any signal nothing is known that new items could compete with, and
    they get what is popular.

    Args:
      parts: the weight of each component, and for which users its scores vary.

    Returns:
      The shares; 0 below `MIN_SHARE`, the popularity that only breaks ties.
    """
    total = sum(weight for weight, _ in parts)
    share = sum(weight * active for weight, active in parts) / total
    return jnp.where(share < MIN_SHARE, 0, share)


def concat_components(found: list[Component]) -> Vectors:
    """Concatenates components, so that one dot product gives the score.

    Args:
      found: of `components`.

    Returns:
      User vectors [U, D] and item vectors [I, D].
    """
    users = jnp.concatenate([part.scale[:, None] * part.users for part in found], axis=1)
    return users, jnp.concatenate([part.items for part in found], axis=1)


def inverse_deviation(users: Float32[AnyArray, "V R"], items: Float32[AnyArray, "I R"]) -> Float32[Array, "V"]:
    """Computes one over the standard deviation of each user's scores of the items.

    With C the covariance of the items' rows, the variance of <u, y_i> over the items is u'Cu.

    Args:
      users: rows of users.
      items: rows of all items.

    Returns:
      The factors; 0 where all scores are equal.
    """
    centered = items - items.mean(0, keepdims=True)
    covariance = centered.T @ centered / len(items)
    variance = ((users @ covariance) * users).sum(1)
    varies = variance > MIN_VARIANCE * (users * users).sum(1) * jnp.trace(covariance)
    return jnp.where(varies, 1 / jnp.sqrt(jnp.where(varies, variance, 1)), 0)


def social_relations(graph: DeviceGraph) -> list[Relation]:
    """Lists the relations of social edges."""
    return [r for r, _ in graph.relations if r.source == r.target == USER and r.name != SIMILAR_TEXT]


def user_vectors(component: ClosedForm, graph: DeviceGraph) -> Float32[Array, "U R"]:
    """Computes the user vectors of a closed-form component, neither standardized nor weighted.

    Args:
      component: with its source of user vectors.
      graph: interactions, social edges and text features.

    Returns:
      The vectors of all users, on every device.
    """
    if component.user_source == "constant":
        return jnp.ones((graph.count(USER), 1))
    if component.user_source == "text":
        return graph.all_gather(USER, jnp.asarray(graph.text[USER]))
    sums = []
    if component.source.shape[1]:
        sums.append(_sum_over(graph, INTERACTED_BY, jnp.asarray(component.source)))
    if component.friends is not None:
        sums.append(_sum_over_friends(graph, jnp.asarray(component.friends)) * friends_scale(graph)[:, None])
    return jnp.concatenate(sums, axis=1)


def friends_scale(graph: DeviceGraph) -> Float32[Array, "U"]:
    """Computes one over the square root of the number of social edges into each user; 1 without any."""
    return jax.lax.rsqrt(jnp.maximum(_sum_over_friends(graph, jnp.ones((graph.count(USER), 1)))[:, 0], 1))


def _sum_over_friends(graph: DeviceGraph, rows: Float32[Array, "U F"]) -> Float32[Array, "U F"]:
    """Sums rows of users over all social edges into each user."""
    return sum((_sum_over(graph, relation, rows) for relation in social_relations(graph)), jnp.zeros_like(rows))


def _sum_over(graph: DeviceGraph, relation: Relation, rows: Float32[Array, "n R"]) -> Float32[Array, "U R"]:
    """Sums rows of all source nodes over the edges into each user, each edge counting once."""
    adjacency = graph.adjacencies[relation]
    padding = graph.rows(relation.source) * graph.shards.count - len(rows)
    padded = jnp.pad(rows, ((0, padding), (0, 0)))
    return graph.all_gather(USER, neighbor_sum(adjacency, _ones(adjacency.weight), padded))


def _ones(weight: Float32[AnyArray, "E"]) -> Float32[Array, "E"]:
    """1 for each edge and 0 for padding; the derivative is that of a factor of 1 on each weight (gradient x input)."""
    is_edge = jnp.asarray(weight) > 0
    return jnp.where(is_edge, weight / jax.lax.stop_gradient(jnp.where(is_edge, weight, 1)), 0)
