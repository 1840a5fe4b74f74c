"""Fine-tuning of the text encoder with the graph model: embeddings of all texts by the current encoder, cached.

A node's text embedding is the weighted mean of its texts' embeddings, whitened and of unit length
(`fused_rec.text.features`). A step encodes some texts with gradient (`fused_rec.training.finetune_step`); all others
come from embeddings cached at the last evaluation. Whitening, text-kNN edges and TF-IDF stay those of the pretrained
model.

A state's params have one more entry, `ENCODER`: LoRA adapters, or all weights with full fine-tuning. With adapters the
pretrained weights are in no state and no checkpoint.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jaxtyping import Float32, Int32, Int64, PyTree

from fused_rec.config import Config, TextConfig
from fused_rec.data.node_texts import NodeTextLinks
from fused_rec.text.encode import token_ids
from fused_rec.text.encoders.lora import init_trainable, with_adapters
from fused_rec.text.features import TextFeatures, encode_by, open_language_model
from fused_rec.text.pretrained import PretrainedModel
from fused_rec.training.train_step import GraphInputs, TrainState, make_optimizer

ENCODER = "encoder"
LENGTH_BUCKETS = 3  # a step's texts are from one length bucket, so that padding is small; one program per bucket
LENGTH_MULTIPLE = 8  # padded lengths are multiples of it
DECAY = 0.01  # decoupled weight decay of the encoder's matrices, as in the training of BERT


@dataclasses.dataclass(frozen=True, eq=False)
class EncoderData:
    """The texts of a graph and the pretrained encoder, ready for encoding.

    Attributes:
      model: the pretrained encoder.
      features: texts, their links to nodes, and their features by the pretrained encoder.
      tokens: token IDs of each text.
      bucket_length: int64 [C], the padded length of each bucket, in tokens.
      bucket_of_text: int64 [T], the bucket of each text.
    """

    model: PretrainedModel
    features: TextFeatures
    tokens: list[Int32[np.ndarray, "_"]]
    bucket_length: Int64[np.ndarray, "C"]
    bucket_of_text: Int64[np.ndarray, "T"]

    def texts_of(self, node_type: str) -> NodeTextLinks:
        """Returns the links of one node type, ascending by node."""
        return self.features.texts.links[node_type]

    @functools.cached_property
    def order_by_text(self) -> dict[str, np.ndarray]:
        """The permutation of each node type's links that sorts them by text."""
        links = self.features.texts.links.items()
        return {node_type: np.argsort(linked.texts, kind="stable") for node_type, linked in links}


class TextCache(NamedTuple):
    """Embeddings of all texts and nodes by one state of the encoder.

    Attributes:
      encoder_data: texts and pretrained encoder.
      encoder_params: that state, adapters or all weights.
      graph_inputs: with these text embeddings.
      norms: norm of each node's whitened mean before normalization, by node type.
      vectors: float32 [T, H], embeddings of the texts.
    """

    encoder_data: EncoderData
    encoder_params: PyTree
    graph_inputs: GraphInputs
    norms: Mapping[str, Float32[np.ndarray, "n"]]
    vectors: Float32[np.ndarray, "T H"]


def encoder_data(config: TextConfig, features: TextFeatures) -> EncoderData:
    """Prepares texts and encoder for fine-tuning: tokens and length buckets.

    Args:
      config: settings of the text encoder.
      features: of one text or more, by the pretrained encoder.

    Returns:
      The data, on the host.
    """
    model = open_language_model(config)
    tokens = token_ids(features.texts.texts, model, max_tokens=config.max_tokens)
    count = np.array([len(ids) for ids in tokens])
    bounds = np.quantile(count, np.arange(1, LENGTH_BUCKETS + 1) / LENGTH_BUCKETS, method="inverted_cdf")
    length = np.unique(-(-bounds.astype(np.int64) // LENGTH_MULTIPLE) * LENGTH_MULTIPLE).clip(
        max=config.max_tokens or model.max_tokens
    )
    return EncoderData(model, features, tokens, bucket_length=length, bucket_of_text=np.searchsorted(length, count))


def init_state(config: Config, encoder_data: EncoderData, state: TrainState) -> TrainState:
    """Adds the encoder's trainable parameters to an initial state.

    Args:
      config: all settings; train.seed decides the initial adapters.
      encoder_data: with the pretrained encoder.
      state: an initial state of the graph model, on the host.

    Returns:
      The state with `ENCODER` among its params, unsharded, on the host.
    """
    encoder = init_trainable(_training(config), encoder_data.model.params, config.text.lora_rank, config.train.seed)
    params = {**state.params, ENCODER: encoder}
    opt_state = jax.device_get(jax.jit(optimizer(config).init)(params))
    return dataclasses.replace(state, params=params, opt_state=opt_state, encoder_snapshot=encoder)


def _training(config: Config) -> Any:
    """How the encoder is trained: text.finetune."""
    return config.text.finetune


def optimizer(config: Config) -> optax.GradientTransformation:
    """Builds the graph model's optimizer, and AdamW with its own learning rate for the encoder.

    Args:
      config: of which train and text.finetune_learning_rate count.

    Returns:
      The gradient transformation.
    """

    def matrices(params: PyTree) -> PyTree:
        return jax.tree.map(lambda leaf: leaf.ndim > 1, params)

    def labels(params: PyTree) -> PyTree:
        return {name: jax.tree.map(lambda _, own=name == ENCODER: own, part) for name, part in params.items()}

    encoder = optax.adamw(config.text.finetune_learning_rate, weight_decay=DECAY, mask=matrices)
    return optax.partition({True: encoder, False: make_optimizer(config.train)}, labels)


# --- all texts at once ---------------------------------------------------------------------------------------------


def encode_all_texts(
    config: Config, encoder_data: EncoderData, graph_inputs: GraphInputs, encoder_params: PyTree, *, keep: bool = False
) -> TextCache:
    """Encodes all texts by the current encoder and updates the text embeddings of all nodes.

    Before the first update the pretrained embeddings are reused.

    Args:
      config: all settings.
      encoder_data: texts and pretrained encoder.
      graph_inputs: of the whole graph, with any text embeddings.
      encoder_params: adapters or all weights.
      keep: write the embeddings to the cache on disk too (fused_rec/text/cache.py).

    Returns:
      Embeddings of texts and nodes.
    """
    encoder_params = jax.device_get(encoder_params)
    params = jax.device_get(with_adapters(_training(config), encoder_data.model.params, encoder_params))
    features = encoder_data.features
    if not jax.tree.all(jax.tree.map(np.array_equal, params, encoder_data.model.params)):
        model = dataclasses.replace(
            encoder_data.model, params=params, digest=_digest(encoder_data.model.digest, encoder_params)
        )
        cache = config.text.cache if keep else None
        features = features.with_lm(encode_by(model, config.text, features.texts.texts, cache=cache))
    return TextCache(encoder_data, encoder_params, *with_text_features(graph_inputs, features), features.lm)


def with_text_features(
    graph_inputs: GraphInputs, features: TextFeatures
) -> tuple[GraphInputs, dict[str, Float32[np.ndarray, "n"]]]:
    """Replaces the text embeddings of all users and items.

    Args:
      graph_inputs: of the whole graph, with any text embeddings.
      features: of the same texts and nodes.

    Returns:
      The graph inputs, and the norms of whitened means by node type (`TextCache.norms`).
    """
    nodes = features.node_rows()
    graph = graph_inputs.graph.with_text({node_type: of_type.rows for node_type, of_type in nodes.items()})
    norms = {node_type: of_type.norms for node_type, of_type in nodes.items()}
    return dataclasses.replace(graph_inputs, graph=graph), norms


def _digest(pretrained: str, trained: PyTree) -> str:
    """A digest of the fine-tuned encoder, for the keys of the cache."""
    digest = hashlib.sha256(pretrained.encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(trained):
        digest.update(jax.tree_util.keystr(path).encode() + str(leaf.shape).encode() + np.asarray(leaf).tobytes())
    return digest.hexdigest()
