"""What of a language model is trained: low-rank adapters beside its weights, or the weights themselves.

A pure transformation of parameter trees, which asks of an encoder only that its matrices are leaves named `kernel`,
[..., in, out]; axes before the last two, such as that of scanned layers, each have adapters of their own.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import PyTree

Trainable = Literal["lora", "full"]
SCALE = 2.0  # of what adapters add: alpha / r with alpha = 2 r, as is usual


def init_trainable(training: Trainable, params: PyTree, rank: int, seed: int) -> PyTree:
    """What is trained, before the first step: `with_adapters` gives the very weights of `params`.

    lora: for each kernel [..., in, out] a matrix `down` [..., in, rank], normal of variance 1 / in, and `up`
    [..., rank, out] of zeros (Hu et al., 2021, arXiv 2106.09685, section 4.1), on the host. full: the weights.
    Raises ValueError where no leaf is a kernel, and where the rank reaches a kernel's smaller side.
    """
    if training == "full":
        return params
    weights: dict[Any, Any] = flatten_dict(params)
    found = {path: leaf for path, leaf in weights.items() if path[-1] == "kernel" and leaf.ndim > 1}
    if not found:
        raise ValueError("no weight of this language model is named kernel; text.finetune must be frozen or full")
    least = min(min(leaf.shape[-2:]) for leaf in found.values())
    if rank >= least:
        raise ValueError(
            f"text.lora_rank is {rank}; it must be below {least}, the smaller side of a weight of the model"
        )
    adapters = {}
    for number, (path, leaf) in enumerate(sorted(found.items())):
        *before, size, out = leaf.shape
        drawn = np.random.default_rng((seed, number)).standard_normal((*before, size, rank), np.float32)
        down, up = drawn / np.float32(size) ** 0.5, np.zeros((*before, rank, out), np.float32)
        adapters |= {(*path, "down"): down.astype(np.float32), (*path, "up"): up}
    return unflatten_dict(adapters)


def with_adapters(training: Trainable, params: PyTree, trained: PyTree) -> PyTree:
    """The language model's parameters with what was trained: W + SCALE * down @ up, or `encoder_params` in their place.

    params: the published ones; not looked at where all are trained.
    """
    if training == "full":
        return trained
    weights: dict[Any, Any] = flatten_dict(params)
    adapters: dict[Any, Any] = flatten_dict(trained)
    for path in {path[:-1] for path in adapters}:
        down, up = adapters[*path, "down"], adapters[*path, "up"]
        weights[path] = weights[path] + SCALE * jnp.matmul(down, up, precision=jax.lax.Precision.HIGHEST)
    return unflatten_dict(weights)
