"""Trainable parameters of a language model: LoRA adapters, or all weights.

Pure functions of parameter trees. They assume only that the matrices of an encoder are leaves named `kernel`,
[..., in, out]; each index of leading axes, such as that of scanned layers, has its own adapter.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import PyTree

from fused_rec.rng import numbered_rng

Trainable = Literal["lora", "full"]
SCALE = 2.0  # of adapters: alpha / r with the usual alpha = 2 r


def init_trainable(training: Trainable, params: PyTree, rank: int, seed: int) -> PyTree:
    """Initializes the trainable parameters so that `with_adapters` returns the weights of `params`.

    Args:
      training: "lora" or "full".
      params: parameters of the encoder.
      rank: rank of the adapters.
      seed: seed of the adapters.

    Returns:
      lora: for each kernel [..., in, out] a matrix `down` [..., in, rank], normal with variance 1 / in, and `up`
      [..., rank, out] of zeros (Hu et al., 2021, arXiv 2106.09685, section 4.1), on the host. full: `params`.

    Raises:
      ValueError: no leaf is a kernel, or the rank is not below the smaller side of every kernel.
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
        drawn = numbered_rng(seed, number).standard_normal((*before, size, rank), np.float32)
        down, up = drawn / np.float32(size) ** 0.5, np.zeros((*before, rank, out), np.float32)
        adapters |= {(*path, "down"): down.astype(np.float32), (*path, "up"): up}
    return unflatten_dict(adapters)


def with_adapters(training: Trainable, params: PyTree, trained: PyTree) -> PyTree:
    """Computes the parameters of the fine-tuned language model: W + SCALE * down @ up, or all trained weights.

    Args:
      training: "lora" or "full".
      params: the pretrained parameters; not used where all are trained.
      trained: the trainable parameters, as from `init_trainable`.

    Returns:
      Parameters of the encoder.
    """
    if training == "full":
        return trained
    weights: dict[Any, Any] = flatten_dict(params)
    adapters: dict[Any, Any] = flatten_dict(trained)
    for path in {path[:-1] for path in adapters}:
        down, up = adapters[*path, "down"], adapters[*path, "up"]
        weights[path] = weights[path] + SCALE * jnp.matmul(down, up, precision=jax.lax.Precision.HIGHEST)
    return unflatten_dict(weights)
