"""AdamW for ID rows that a sampled step does not reach: they are brought up to date when a step reaches them again.

A row without gradient still moves: by its first moment m, which fades, and by weight decay. With b1 and b2 the decay
rates of the moments, a = train.learning_rate * train.weight_decay and c(n) = sqrt(1 - b2^n) / (1 - b1^n), k such steps
after step s, up to step t = s + k, make of the row p

    (1 - a)^k p - learning_rate S m / (sqrt(v) + e),     r = b1 / sqrt(b2)
    S = sum_{j=1}^{k} (1 - a)^(k-j) r^j c(s + j) = (1 - a)^k B(s) - r^k B(t)
    B(n) = sum_{i>=1} (r / (1 - a))^i c(n + i)

and of the moments b1^k m and b2^k v. B is a table by step, so the cost does not grow with k. The epsilon of Adam, which
counts differently in each of the k steps, is their weighted mean e, from a second such table. Rows are those of dense
AdamW up to rounding and terms of (epsilon / sqrt(v))^2.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int32, PyTree

from fused_rec.config import TrainConfig
from fused_rec.distributed.devices import AnyArray

B1, B2, EPSILON = 0.9, 0.999, 1e-8  # of Adam
STEPS = 2**14  # after which c(n) is 1 in float32


class Rows(NamedTuple):
    """ID rows of one node type, all of them or some.

    Attributes:
      embedding: float32 [n, K].
      mean: float32 [n, K], the first moment.
      square: float32 [n, K], the second moment.
      step: int32 [n], the step up to which a row has its updates.
    """

    embedding: Float32[AnyArray, "n K"]
    mean: Float32[AnyArray, "n K"]
    square: Float32[AnyArray, "n K"]
    step: Int32[AnyArray, "n"]


class LazyState(NamedTuple):
    """The state of the optimizer.

    Attributes:
      adam: state of `fused_rec.training.train_step.make_optimizer`.
      steps: by branch and parameter, `Rows.step` of the ID embeddings.
    """

    adam: PyTree
    steps: Mapping[str, Mapping[str, Int32[AnyArray, "_"]]]


def start(adam: PyTree, params: PyTree, prefix: str) -> LazyState:
    """Builds the state at step 0.

    Args:
      adam: state of the dense optimizer.
      params: by branch and name.
      prefix: of the names of ID embeddings.

    Returns:
      The state.
    """
    rows = {branch: [name for name in leaves if name.startswith(prefix)] for branch, leaves in params.items()}
    steps = {
        branch: {name: jnp.zeros(len(params[branch][name]), jnp.int32) for name in names}
        for branch, names in rows.items()
        if names
    }
    return LazyState(adam, steps)


def map_rows(function: Callable[..., Rows], state: Any, *others: Any) -> Any:
    """Replaces the ID rows of a training state.

    Args:
      function: called with the name of a parameter, its rows in `state` and in each of the others.
      state: a `TrainState` whose optimizer state is a `LazyState`.
      *others: states like it, maybe of other rows.

    Returns:
      The state with the rows that the function returns.
    """
    first, *rest = state.opt_state.adam
    trees = [dict(tree) for tree in (state.params, first.mu, first.nu, state.opt_state.steps)]
    for branch, names in state.opt_state.steps.items():
        found = {name: function(name, *(_rows(each, branch, name) for each in (state, *others))) for name in names}
        for tree, part in zip(trees, zip(*found.values(), strict=True), strict=True):
            tree[branch] = {**tree[branch], **dict(zip(found, part, strict=True))}
    params, mu, nu, steps = trees
    return dataclasses.replace(state, params=params, opt_state=LazyState((first._replace(mu=mu, nu=nu), *rest), steps))


def _rows(state: Any, branch: str, name: str) -> Rows:
    first = state.opt_state.adam[0]
    return Rows(*(tree[branch][name] for tree in (state.params, first.mu, first.nu, state.opt_state.steps)))


def caught_up(config: TrainConfig, state: Any) -> Any:
    """Brings all ID rows up to date.

    Args:
      config: of which learning_rate and weight_decay count.
      state: a `TrainState` whose optimizer state is a `LazyState`.

    Returns:
      The state whose ID rows have the updates of all steps taken, those without gradient too.
    """
    return map_rows(lambda _, rows: catch_up(config, rows, state.opt_state.adam[0].count), state)


def catch_up(config: TrainConfig, rows: Rows, step: Int32[Array, ""]) -> Rows:
    """Applies the updates of the steps from `rows.step` to `step`, in which the rows had no gradient.

    Args:
      config: of which learning_rate and weight_decay count.
      rows: the rows.
      step: int32, steps taken, at most 2^31 / 128.

    Returns:
      The rows after that step.
    """
    kept, skipped = 1 - config.learning_rate * config.weight_decay, (step - rows.step)[:, None]

    def power(base: float) -> Array:  # a base close to 1 has fewer digits than its logarithm
        return jnp.exp(skipped.astype(jnp.float32) * math.log(base))

    sums, of_epsilon = (
        power(kept) * jnp.asarray(table)[jnp.minimum(rows.step, STEPS)][:, None]
        - power(rate) * jnp.asarray(table)[jnp.minimum(step, STEPS)]
        for rate, table in (_table(kept, B2**0.5, 0.5), _table(kept, B2, 1.0))
    )
    epsilon = jnp.where(skipped > 0, EPSILON * of_epsilon / jnp.where(skipped > 0, sums, 1), EPSILON)
    moved = power(kept) * rows.embedding - config.learning_rate * sums * rows.mean / (jnp.sqrt(rows.square) + epsilon)
    return Rows(moved, power(B1) * rows.mean, power(B2) * rows.square, jnp.full_like(rows.step, step))


@functools.lru_cache(maxsize=8)
def _table(kept: float, root: float, power: float) -> tuple[float, Float32[np.ndarray, "_"]]:
    """Tabulates B of the module's formula by step, with r = b1 / root and c = (1 - b2^n)^power / (1 - b1^n).

    Returns:
      r, and B(0) to B(STEPS); beyond, c is 1.
    """
    rate = B1 / root
    ratio, last = rate / kept, np.arange(1, STEPS + 1, dtype=np.float64)
    factor = (1 - B2**last) ** power / (1 - B1**last)
    table = np.full(STEPS + 1, ratio / (1 - ratio))
    for step in range(STEPS, 0, -1):
        table[step - 1] = ratio * (factor[step - 1] + table[step])
    return rate, table.astype(np.float32)
