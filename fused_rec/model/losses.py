"""What training minimises. Each returns (sum, count), so that devices may add them up before dividing.

A user's loss is the mean over their positives; users count by the square root of their number of positives,
between a mean over pairs, which the heaviest users rule, and a mean over users, which the noisiest do.

Vectors may be narrower than float32; scores and all that follows from them are float32.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32

from fused_rec.model.precision import matmul_f32

Sum = tuple[Float32[Array, ""], Float32[Array, ""]]


def softmax(
    user: Float[Array, "B K"],
    catalogue: Float[Array, "I K"],
    items: Int32[Array, "B P"],
    mask: Float32[Array, "B P"],
    trained_items: Bool[Array, "I"],
    temperature: float,
) -> Sum:
    """-log softmax over the whole catalogue at each positive (the multinomial likelihood of Liang et al., 2018).

    Items that are not `present` while training (nobody holds them yet) are no alternatives: to learn that nobody wants
    them would be to learn from the future.
    """
    scores = matmul_f32(user, catalogue.T) / temperature
    # Before the absent items are set to -inf: padding points at item 0, and 0 * inf is not a number.
    positive = jnp.take_along_axis(scores, items, axis=1)
    everything = jax.nn.logsumexp(jnp.where(trained_items[None, :], scores, -jnp.inf), axis=-1)
    return _over_users(everything[:, None] - positive, mask)


def sampled_softmax(
    user: Float[Array, "B K"],
    catalogue: Float[Array, "C K"],
    items: Int32[Array, "B P"],
    mask: Float32[Array, "B P"],
    trained_items: Bool[Array, "I"],
    negatives: Int32[Array, "S"],
    temperature: float,
) -> Sum:
    """Softmax over each positive and S shared uniform negatives, scaled up by log(I / S) to estimate the catalogue.

    The catalogue's rows may be those of some items only, by which positives and negatives are then numbered. I counts
    the items that are `present`, from which negatives are drawn; a negative of -1 is padding and not
    one of the S. Uniform sampling makes the log-q correction of Bengio and Senecal (2008) one constant.
    """
    positive = jnp.einsum("bk,bpk->bp", user, catalogue[items], preferred_element_type=jnp.float32) / temperature
    drawn = negatives >= 0
    scores = jnp.where(drawn[None, :], matmul_f32(user, catalogue[negatives].T) / temperature, -jnp.inf)
    rest = jax.nn.logsumexp(scores, axis=-1) + jnp.log(trained_items.sum() / drawn.sum())
    return _over_users(jax.nn.softplus(rest[:, None] - positive), mask)


def bpr(
    user: Float[Array, "B K"],
    catalogue: Float[Array, "I K"],
    items: Int32[Array, "B P"],
    mask: Float32[Array, "B P"],
    negatives: Int32[Array, "B P"],
    temperature: float,
) -> Sum:
    """-log sigmoid(positive - negative), one negative a positive (Rendle et al., 2009)."""
    other = catalogue[items] - catalogue[negatives]
    margin = jnp.einsum("bk,bpk->bp", user, other, preferred_element_type=jnp.float32)
    return _over_users(jax.nn.softplus(-margin / temperature), mask)


def info_nce(
    one: Float32[Array, "n K"],
    other: Float32[Array, "n K"],
    nodes: Int32[Array, "B"],
    mask: Float32[Array, "B"],
    everyone: Int32[Array, "A"],
    temperature: float,
) -> Sum:
    """-log softmax of a node's cosine with its other view among those with all nodes' (Oord et al., 2018).

    everyone: the nodes whose other views are told apart, this device's `nodes` among them; -1 is padding. A node named
    c times counts 1 / c each time, there and in the sum: the batch is a set.
    """
    there = everyone >= 0
    mine, theirs = unit(one[nodes]), unit(other[everyone])
    named = jnp.maximum((everyone[:, None] == everyone[None, :]).sum(axis=1), 1)
    scores = mine @ theirs.T / temperature - jnp.log(named)[None, :]
    rest = jax.nn.logsumexp(jnp.where(there[None, :], scores, -jnp.inf), axis=-1)
    positive = jnp.einsum("bk,bk->b", mine, unit(other[nodes])) / temperature
    weight = mask / jnp.maximum((nodes[:, None] == everyone[None, :]).sum(axis=1), 1)
    return (weight * (rest - positive)).sum(), weight.sum()


def unit(x: Float32[Array, "n K"]) -> Float32[Array, "n K"]:
    """Rows of length 1; a zero row stays zero."""
    # The small term keeps the derivative finite for a node that has neither id, words nor neighbours.
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-12)


def _over_users(loss: Float32[Array, "B P"], mask: Float32[Array, "B P"]) -> Sum:
    count = mask.sum(axis=1)
    weight = jnp.sqrt(count)
    per_user = (loss * mask).sum(axis=1) / jnp.maximum(count, 1)
    return (weight * per_user).sum(), weight.sum()
