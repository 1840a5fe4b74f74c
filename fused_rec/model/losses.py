"""Training losses. Each returns (sum, count), so that devices can add them before dividing.

A user's loss is the mean over their positives. Users are weighted by the square root of their number of positives: a
compromise between a mean over pairs, which active users dominate, and a mean over users, which the noisiest ones do.

Embeddings may be bfloat16 or float16; scores and losses are float32.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from fused_rec.model.cross_entropy import Targets, cross_entropy
from fused_rec.model.precision import matmul_f32

Sum = tuple[Float32[Array, ""], Float32[Array, ""]]


class Negatives(NamedTuple):
    """Items drawn at random.

    Attributes:
      items: int32 [S], indices into the catalogue; -1 is padding and does not count in S.
      drawn_from: number I of items they are drawn from.
    """

    items: Int32[Array, "S"]
    drawn_from: Int32[Array, ""] | int


def softmax(
    user: Float[Array, "B K"],
    catalogue: Float[Array, "I K"],
    items: Int32[Array, "B P"],
    mask: Float32[Array, "B P"],
    bias: Float32[Array, "I"],
    temperature: float,
) -> Sum:
    """Computes the full softmax cross-entropy of each positive (multinomial likelihood, Liang et al., 2018).

    Items without training interactions are to be excluded from the denominator: ranking them below the positives would
    leak the split.

    Args:
      user: [B, K], user embeddings of the batch.
      catalogue: [I, K], item embeddings.
      items: int32 [B, P], positives of each user, indices into `catalogue`; 0 where padded.
      mask: float32 [B, P], 1 for positives and 0 for padding.
      bias: float32 [I], added to the logits, -inf for an item without training interactions; no derivative.
      temperature: divisor of the scores, above 0.

    Returns:
      float32 scalars (sum of weighted losses, sum of weights); their ratio is the loss.
    """
    count = mask.sum(axis=1)
    weight = mask * (jnp.sqrt(count) / jnp.maximum(count, 1))[:, None]
    total: Any = cross_entropy(temperature, user, catalogue, Targets(items, weight, bias))
    return total, jnp.sqrt(count).sum()


def sampled_softmax(
    user: Float[Array, "B K"],
    catalogue: Float[Array, "C K"],
    items: Int32[Array, "B P"],
    mask: Float32[Array, "B P"],
    bias: Float32[Array, "C"],
    negatives: Negatives,
    temperature: float,
) -> Sum:
    """Computes a softmax cross-entropy of each positive against S shared uniform negatives.

    The negatives' sum is scaled by I / S, I being the number of items with training interactions, from which they are
    drawn. With uniform sampling the log-q correction of Bengio and Senecal (2008) is this constant.

    Args:
      user: [B, K], user embeddings of the batch.
      catalogue: [C, K], item embeddings.
      items: int32 [B, P], positives of each user, indices into `catalogue`; 0 where padded.
      mask: float32 [B, P], 1 for positives and 0 for padding.
      bias: float32 [C], added to the logits.
      negatives: S items, and how many they stand for.
      temperature: divisor of the scores, above 0.

    Returns:
      float32 scalars (sum of weighted losses, sum of weights); their ratio is the loss.
    """
    positive = jnp.einsum("bk,bpk->bp", user, catalogue[items], preferred_element_type=jnp.float32) / temperature
    positive, drawn = positive + bias[items], negatives.items
    valid = drawn >= 0
    scores = matmul_f32(user, catalogue[drawn].T) / temperature + bias[drawn][None, :]
    scores = jnp.where(valid[None, :], scores, -jnp.inf)
    others = jax.nn.logsumexp(scores, axis=-1) + jnp.log(negatives.drawn_from / valid.sum())
    return _over_users(jax.nn.softplus(others[:, None] - positive), mask)


def bpr(
    user: Float[Array, "B K"],
    catalogue: Float[Array, "I K"],
    items: Int32[Array, "B P"],
    mask: Float32[Array, "B P"],
    bias: Float32[Array, "I"],
    negatives: Int32[Array, "B P"],
    temperature: float,
) -> Sum:
    """Computes Bayesian personalized ranking: -log sigmoid(difference of the logits) (Rendle et al., 2009).

    Args:
      user: [B, K], user embeddings of the batch.
      catalogue: [I, K], item embeddings.
      items: int32 [B, P], positives of each user, indices into `catalogue`; 0 where padded.
      mask: float32 [B, P], 1 for positives and 0 for padding.
      bias: float32 [I], added to the logits.
      negatives: int32 [B, P], one negative per positive, indices into `catalogue`.
      temperature: divisor of the scores, above 0.

    Returns:
      float32 scalars (sum of weighted losses, sum of weights); their ratio is the loss.
    """
    difference = catalogue[items] - catalogue[negatives]
    margin = jnp.einsum("bk,bpk->bp", user, difference, preferred_element_type=jnp.float32)
    margin = margin / temperature + bias[items] - bias[negatives]
    return _over_users(jax.nn.softplus(-margin), mask)


class Candidates(NamedTuple):
    """Nodes in a denominator, and their view.

    Attributes:
      nodes: int32 [A], IDs; -1 is padding.
      view: float32 [A, K].
    """

    nodes: Int32[Array, "A"]
    view: Float32[Array, "A K"]


def info_nce(
    one: Float32[Array, "B K"],
    other: Float32[Array, "B K"],
    nodes: Int32[Array, "B"],
    mask: Float32[Array, "B"],
    everyone: Candidates,
    temperature: float,
) -> Sum:
    """Computes InfoNCE between two views of nodes, with cosine similarity (Oord et al., 2018, arXiv 1807.03748).

    The batch is a set: a node that occurs c times counts 1 / c each time, in the denominator and in the sum.

    Args:
      one: float32 [B, K], this device's nodes in the first view.
      other: float32 [B, K], the same nodes in the second view.
      nodes: int32 [B], their IDs.
      mask: float32 [B], 0 where `nodes` is padded.
      everyone: the nodes of all devices, whose second views form the denominator.
      temperature: divisor of the cosines, above 0.

    Returns:
      float32 scalars (sum of weighted losses, sum of weights).
    """
    ids, valid = everyone.nodes, everyone.nodes >= 0
    anchors, candidates = unit(one), unit(everyone.view)
    count = jnp.maximum((ids[:, None] == ids[None, :]).sum(axis=1), 1)
    scores = anchors @ candidates.T / temperature - jnp.log(count)[None, :]
    # Not -inf, whose derivative is NaN where no node is valid.
    log_normalizer = jax.nn.logsumexp(jnp.where(valid[None, :], scores, -1e30), axis=-1)
    positive = jnp.einsum("bk,bk->b", anchors, unit(other)) / temperature
    weight = mask / jnp.maximum((nodes[:, None] == ids[None, :]).sum(axis=1), 1)
    return (weight * (log_normalizer - positive)).sum(), weight.sum()


def unit(x: Float32[Array, "n K"]) -> Float32[Array, "n K"]:
    """Normalizes rows to length 1; a zero row stays zero.

    Args:
      x: float32 [n, K].

    Returns:
      float32 [n, K].
    """
    # The small term keeps the derivative finite for a node without ID embedding, text and neighbors.
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-12)


def _over_users(loss: Float32[Array, "B P"], mask: Float32[Array, "B P"]) -> Sum:
    """Averages over each user's positives and weights users by the root of their number of positives."""
    count = mask.sum(axis=1)
    weight = jnp.sqrt(count)
    per_user = (loss * mask).sum(axis=1) / jnp.maximum(count, 1)
    return (weight * per_user).sum(), weight.sum()
