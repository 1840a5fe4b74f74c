"""Review dropout: in a training step, the reviews of dropped interactions leave the text of their users and items.

A node's text embedding is the whitened weighted mean of its texts, unit((sum_e w_e v_e - c) W) with weights of sum 1
(`fused_rec.text.features`). The review of a training interaction is a share of it, and that of a held-out one is not,
so a model that predicts interactions from it relies on what is missing at the evaluation. Edge dropout already hides a
part of the interactions in every step; here their reviews d leave too:

    t' = unit(norm t - sum_d w_d (v_d - c) W), zero where no weight remains,    norm = |(sum_e w_e v_e - c) W|
"""

from collections.abc import Mapping
from typing import no_type_check

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32, Int32, PRNGKeyArray

from fused_rec.data.node_texts import ReviewTexts
from fused_rec.distributed.devices import AnyArray
from fused_rec.graph.adjacency import Adjacency, Backend, build_adjacency
from fused_rec.graph.device_graph import DeviceGraph
from fused_rec.graph.schema import ITEM, USER, Edges
from fused_rec.graph.spmm import neighbor_sum
from fused_rec.memory import require_memory
from fused_rec.model.losses import unit
from fused_rec.model.model import edge_keep_mask
from fused_rec.text.features import TextFeatures

LEAST_WEIGHT = 1e-5  # less is the rounding error of a sum of weights, and means that no text remains


@no_type_check  # as of `Adjacency`
@flax.struct.dataclass
class DeviceReviews:
    """What a step needs to take reviews out of text embeddings; links and norms are sharded by node.

    Attributes:
      user: int32 [R], the users of the reviews.
      item: int32 [R], their items.
      vectors: float32 [R, D + 1], text vectors less their mean, and a column of ones, whose sum is that of the weights.
      whitening: by node type, float32 [D + 1, D]: whitens a weighted sum of such rows.
      links: by node type, edges from reviews to nodes, with the weight of the review in the node's text.
      norms: by node type, float32 [rows], norms of the whitened means.
    """

    user: Int32[AnyArray, "R"]
    item: Int32[AnyArray, "R"]
    vectors: Float32[AnyArray, "R D_plus_1"]
    whitening: Mapping[str, Float32[AnyArray, "D_plus_1 D"]]
    links: Mapping[str, Adjacency]
    norms: Mapping[str, Float32[AnyArray, "_"]]


def device_reviews(features: TextFeatures, reviews: ReviewTexts, backend: Backend | None = None) -> DeviceReviews:
    """Builds the inputs of review dropout for one device, of NumPy arrays.

    Args:
      features: vectors of the texts, and their whitening.
      reviews: the reviews, indices into these texts.
      backend: implementation of the sparse sum; None: `default_backend()`.

    Returns:
      The inputs, of the node types that have a whitening.

    Raises:
      InsufficientMemoryError: they do not fit in memory.
    """
    texts, width = features.lm.shape[0], features.lm.shape[1] + features.tfidf.vectors.shape[1]
    need = 4 * (texts + 4 * len(reviews.text)) * width  # copies in float32, one of float64
    require_memory(need, f"review dropout of {len(reviews.text):,} reviews", "set model.review_dropout to False")
    vectors = features.vectors()[reviews.text]
    mean = vectors.mean(0, dtype=np.float64)
    whitening, links, norms = {}, {}, {}
    rows = features.node_rows()
    for node_type, nodes in ((USER, reviews.user), (ITEM, reviews.item)):
        fitted = features.fitted.whitening[node_type]
        if fitted is None:
            continue
        offset = (mean - fitted.center) @ fitted.matrix
        whitening[node_type] = np.concatenate([fitted.matrix, offset[None]]).astype(np.float32)
        order = np.argsort(nodes, kind="stable")
        edges = Edges(order, nodes[order], reviews.weights[node_type][order])
        norms[node_type] = rows[node_type].norms
        links[node_type] = build_adjacency(edges, len(nodes), len(norms[node_type]), backend)
    ones = np.ones((len(vectors), 1))
    vectors = np.concatenate([vectors - mean, ones], axis=1, dtype=np.float32, casting="same_kind")
    return DeviceReviews(reviews.user, reviews.item, vectors, whitening, links, norms)


def drop_reviews(reviews: DeviceReviews, graph: DeviceGraph, share: float, dropout: PRNGKeyArray) -> DeviceGraph:
    """Takes the reviews of the interactions that edge dropout drops out of the text embeddings.

    Args:
      reviews: of the same graph, sharded alike.
      graph: the graph with the text embeddings of all texts.
      share: model.edge_dropout.
      dropout: the random key of the step.

    Returns:
      The graph with the text embeddings of the remaining texts, zero for a node that keeps none.
    """
    dropped = edge_keep_mask(dropout, share, reviews.user, reviews.item) == 0
    text = {}
    for node_type, links in reviews.links.items():
        sums = neighbor_sum(links, links.weight * dropped[links.senders], reviews.vectors)
        # TF32 and bfloat16 would leave a rest of a text that is taken out as a whole.
        lost = jnp.matmul(sums, reviews.whitening[node_type], precision=jax.lax.Precision.HIGHEST)
        rest = jnp.asarray(graph.text[node_type]) * jnp.asarray(reviews.norms[node_type])[:, None] - lost
        text[node_type] = unit(rest) * (1 - sums[:, -1:] > LEAST_WEIGHT)
    return graph.with_text(text)
