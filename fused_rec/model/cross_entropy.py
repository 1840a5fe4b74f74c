"""Full softmax cross-entropy over a catalogue, with its derivative, in blocks of users.

Automatic differentiation would read and write the logits some eight times, and keep them. Here the derivative is
computed with the loss, while the logits of a block of users are at hand:

    loss = sum_u W_u logsumexp_i s_ui - sum_p w_up s_up,       s_ui = <x_u, y_i> / temperature + bias_i
    d loss / d s_ui = W_u softmax_i(s_u) - sum_p w_up [item of p = i],       W_u = sum_p w_up

Dimensions: B users, P positives of a user, I items, K columns.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32

from fused_rec import kernels

# Logits in memory at a time: on a CPU 64 MB of them, of which blocks of half or a quarter are no faster.
CPU_LOGITS, LOGITS = 1 << 24, 1 << 28


class Targets(NamedTuple):
    """What a cross-entropy reads besides embeddings; none of it has a derivative.

    Attributes:
      items: int32 [B, P], positives of each user, indices into the catalogue.
      weight: float32 [B, P], the weight of each positive in the sum; 0 for padding.
      bias: float32 [I], added to the logits; -inf excludes an item from the denominator.
    """

    items: Int32[Array, "B P"]
    weight: Float32[Array, "B P"]
    bias: Float32[Array, "I"]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def cross_entropy(
    temperature: float, user: Float[Array, "B K"], catalogue: Float[Array, "I K"], targets: Targets
) -> Float32[Array, ""]:
    """Computes the weighted sum of the cross-entropies of all positives.

    Args:
      temperature: divisor of the scores, above 0.
      user: [B, K], embeddings of users.
      catalogue: [I, K], embeddings of items.
      targets: positives, their weights, and what is added to logits.

    Returns:
      A float32 scalar. Its derivatives have the types of the embeddings, sums are float32.
    """
    return _sums(temperature, user, catalogue, targets, slopes=False)[0]


def _forward(temperature: float, user: Array, catalogue: Array, targets: Targets) -> tuple[Array, tuple]:
    narrow = user.dtype == catalogue.dtype == jnp.bfloat16
    sums = _compiled if narrow and kernels.has_tiles() else functools.partial(_sums, slopes=True)
    total, *slopes = sums(temperature, user, catalogue, targets)
    return total, (*slopes, user, catalogue)


def _backward(temperature: float, residuals: tuple, g: Array) -> tuple:
    by_user, by_catalogue, user, catalogue = residuals
    return (g * by_user).astype(user.dtype), (g * by_catalogue).astype(catalogue.dtype), None


cross_entropy.defvjp(_forward, _backward)


def _sums(temperature: float, user: Array, catalogue: Array, targets: Targets, slopes: bool) -> tuple[Any, ...]:
    """The loss, and with `slopes` its derivatives in user and catalogue, float32."""
    rows = _rows_of_block(len(user), len(catalogue))

    def block(by_catalogue: Any, part: tuple) -> tuple[Any, tuple]:
        x, items, weight = part
        logits = _product(x, catalogue, (1, 1)) / temperature + targets.bias[None, :]
        # Padding points at item 0, whose logit may be -inf, and 0 * inf is NaN.
        positive = jnp.where(weight > 0, jnp.take_along_axis(logits, items, axis=1), 0)
        whole = weight.sum(axis=1, keepdims=True)
        highest = logits.max(axis=1, keepdims=True)
        shares = jnp.exp(logits - highest)
        normalizer = shares.sum(axis=1, keepdims=True)
        loss = (whole * (jnp.log(normalizer) + highest)).sum() - (weight * positive).sum()
        if not slopes:
            return by_catalogue, (loss,)
        slope = shares * (whole / normalizer / temperature)
        users = jnp.arange(len(x))[:, None]
        slope = slope.at[users, items].add(weight / -temperature).astype(catalogue.dtype)
        by_user = _product(slope, catalogue, (1, 0))
        added = _product(slope, x, (0, 0))
        return added if by_catalogue is None else by_catalogue + added, (loss, by_user)

    parts = user, targets.items, targets.weight
    if rows == len(user):
        by_catalogue, found = block(None, parts)
        return found[0], *found[1:], by_catalogue
    blocks = -(-len(user) // rows)
    padded = [jnp.pad(part, [(0, blocks * rows - len(user)), (0, 0)]) for part in parts]
    blocked = tuple(part.reshape(blocks, rows, -1) for part in padded)
    # Not a constant: the first value of a scan has to differ between devices where later ones do.
    start = jnp.full(catalogue.shape, 0 * user[0, 0], jnp.float32) if slopes else None
    by_catalogue, found = jax.lax.scan(block, start, blocked)
    return found[0].sum(), *(part.reshape(blocks * rows, -1)[: len(user)] for part in found[1:]), by_catalogue


def _compiled(temperature: float, user: Array, catalogue: Array, targets: Targets) -> tuple[Any, ...]:
    """As `_sums` of bfloat16 with derivatives, by a kernel that keeps no logits."""
    of = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((), user.shape, catalogue.shape))
    call = jax.ffi.ffi_call(kernels.CROSS_ENTROPY, tuple(of))
    total, *slopes = call(user, catalogue, *targets, temperature=np.float32(temperature))
    # JAX takes the result of a call for the same on all devices; a term of the factors tells that it is not.
    return total + 0 * (user[0, 0] + catalogue[0, 0]).astype(jnp.float32), *slopes


def _rows_of_block(users: int, items: int) -> int:
    """Divides users into blocks of about equal size, whose logits are at most those of the constants."""
    most = CPU_LOGITS if jax.default_backend() == "cpu" else LOGITS
    blocks = -(-users * items // most)
    return -(-users // min(max(blocks, 1), users))


def _product(a: Array, b: Array, over: tuple[int, int]) -> Float32[Array, "n m"]:
    """Multiplies matrices over these two axes with float32 sums."""
    axes = ((over[0],), (over[1],)), ((), ())
    return jax.lax.dot_general(a, b, axes, preferred_element_type=jnp.float32)
