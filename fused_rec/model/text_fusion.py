"""Where words enter: as inputs, as gates of a node's relations, as weights of the edges between two texts."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

from fused_rec.config import ComputeDtype
from fused_rec.distributed.devices import AnyArray, Shards
from fused_rec.graph.adjacency import Adjacency, edge_dot
from fused_rec.model.precision import matmul_f32

RANK = 16  # width of the views that gates and affinities take of a text vector


class TextInput(nn.Module):
    """Projected words: text @ W, as long at the start as id rows of standard deviation `scale`.

    W starts orthogonal: with `dim` as wide as the text the projection changes no cosine, and what the language model
    knows of likeness is there before the first step.
    """

    dim: int
    scale: float
    compute_dtype: ComputeDtype = "float32"

    @nn.compact
    def __call__(self, text: Float32[AnyArray, "n D"]) -> Float32[Array, "n K"]:
        start = nn.initializers.orthogonal(self.scale * max(text.shape[1], self.dim) ** 0.5)
        kernel = self.param("kernel", start, (text.shape[1], self.dim))
        return matmul_f32(jnp.asarray(text, self.compute_dtype), kernel.astype(self.compute_dtype))


class Gate(nn.Module):
    """exp(b_l) * 2 sigmoid(w_l . view(node)): how much each round lets a relation in; 1 at the start.

    The view is the node's words at rank `RANK`, whether it has any, and the log of its degree in the relation,
    standardised over the nodes of the type. Without `by_node` only the factor of the round remains.
    """

    num_layers: int
    by_node: bool

    @nn.compact
    def __call__(self, text: Float32[AnyArray, "n D"], log_degree: Float32[AnyArray, "n"]) -> Float32[Array, "L n"]:
        level = jnp.exp(self.param("level", nn.initializers.zeros, (self.num_layers,)))
        if not self.by_node:
            return jnp.broadcast_to(level[:, None], (self.num_layers, len(text)))
        words = nn.Dense(RANK, use_bias=False, name="view")(text)
        named = (jnp.abs(text).sum(-1) > 0).astype(text.dtype)
        view = jnp.concatenate([words, named[:, None], log_degree[:, None]], axis=-1)
        node = nn.Dense(self.num_layers, use_bias=False, kernel_init=nn.initializers.zeros, name="weight")(view)
        return level[:, None] * 2 * jax.nn.sigmoid(node.T)


class Affinity(nn.Module):
    """2 sigmoid(<Q text_target, K text_source>) a message's factor by the words at both ends; 1 at the start."""

    @nn.compact
    def __call__(
        self, adjacency: Adjacency, source: Float32[AnyArray, "s D"], target: Float32[AnyArray, "t D"], shards: Shards
    ) -> Float32[Array, "E"]:
        # Only one side starts at zero: with both, neither would ever get a gradient.
        query = nn.Dense(RANK, use_bias=False, kernel_init=nn.initializers.zeros, name="query")(target)
        key = nn.Dense(RANK, use_bias=False, name="key")(source)
        return 2 * jax.nn.sigmoid(edge_dot(adjacency, query, shards.all_gather(key)))
