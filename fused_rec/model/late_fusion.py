"""Late fusion: the score of a user and an item as a weighted sum of standardized components.

    score(u, i) = sum_c w_c <x^c_u, y^c_i> / sigma_c(u)

sigma_c(u) is the standard deviation of component c's scores over all items. A weight thus means the same for every
user, and a component that says nothing about a user (sigma 0) has no part in their scores. Every component is an inner
product, and so is the sum: its vectors are the components' side by side.

Components: the trained model (`fused`), each of its branches (`graph`, `text`), and closed-form recommenders of
`fused_rec.baselines.factors`. Weights come from the validation split (`fused_rec.training.component_weights`).
"""

import jax.numpy as jnp
from jaxtyping import Array, Float32

from fused_rec.distributed.devices import AnyArray

# Of |u|^2 tr(C), a bound of the variance: less is rounding.
MIN_VARIANCE = 1e-8


def standardize(users: Float32[AnyArray, "V R"], items: Float32[AnyArray, "I R"]) -> Float32[Array, "V R"]:
    """Scales users so that their scores of the items have standard deviation 1.

    With C the covariance of the items' rows, the variance of <u, y_i> over the items is u'Cu.

    Args:
      users: rows of users.
      items: rows of all items.

    Returns:
      The rows over their standard deviations; zeros where all scores are equal.
    """
    centered = items - items.mean(0, keepdims=True)
    covariance = centered.T @ centered / len(items)
    variance = ((users @ covariance) * users).sum(1)
    bound = MIN_VARIANCE * (users * users).sum(1) * jnp.trace(covariance)
    varies = variance > bound
    return users * jnp.where(varies, 1 / jnp.sqrt(jnp.where(varies, variance, 1)), 0)[:, None]
