"""Text features of users and items: language model and TF-IDF vectors of their texts, averaged and whitened.

A node's feature row is the weighted mean of the vectors of its texts, whitened per node type and of unit length. What
is fitted (`FittedFeatures`) is apart from the vectors of the texts, to which it is applied (`TextFeatures`).

Dimensions: T texts, H width of the language model, L TF-IDF directions, D = H + L, n nodes of one type.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float32

from fused_rec.config import TextConfig
from fused_rec.data.controls import random_texts, shuffle_texts
from fused_rec.data.node_texts import NodeTextLinks, NodeTexts
from fused_rec.data.nodes import ITEM
from fused_rec.memory import require_memory
from fused_rec.text.coverage import Coverage, measure_coverage
from fused_rec.text.encode import encode_texts
from fused_rec.text.pretrained import PretrainedModel, open_model
from fused_rec.text.tfidf import TfidfModel, TfidfVectors, apply_tfidf, fit_tfidf
from fused_rec.text.whitening import Whitening, apply_whitening, fit_whitening

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix


class ColumnScales(NamedTuple):
    """Divisors of the language model's and of the TF-IDF columns, by which both spread equally."""

    lm: float
    tfidf: float

    def concat(self, lm: Float[np.ndarray, "T H"], tfidf: Float[np.ndarray, "T L"]) -> Float[np.ndarray, "T D"]:
        """Concatenates the language model's and the TF-IDF columns, scaled; without TF-IDF columns, returns `lm`."""
        return np.concatenate([lm / self.lm, tfidf / self.tfidf], axis=1) if tfidf.shape[1] else lm


@dataclasses.dataclass(frozen=True, eq=False)
class FittedFeatures:
    """All that is fitted on the texts of the observed splits.

    Attributes:
      tfidf: terms and directions.
      scales: divisors of the columns.
      whitening: the transform of each node type, None where fewer than two nodes have text.
      lm_width: H.
    """

    tfidf: TfidfModel
    scales: ColumnScales
    whitening: Mapping[str, Whitening | None]
    lm_width: int


class NodeRows(NamedTuple):
    """Features of the nodes of one type: float32 rows of unit length or zero, and their norms before normalization."""

    rows: Float32[np.ndarray, "n D"]
    norms: Float32[np.ndarray, "n"]


@dataclasses.dataclass(frozen=True, eq=False)
class TextFeatures:
    """Vectors of the observed texts, their links to nodes, and what is fitted on them.

    Attributes:
      texts: texts and their links to nodes, permuted or replaced by a control.
      lm: float32 [T, H], the language model's vectors; random ones of a control.
      tfidf: TF-IDF vectors of the texts.
      fitted: scales, whitening and the TF-IDF model.
      coverage: counts of texts of other languages than the encoder's, where texts were encoded for a training.
    """

    texts: NodeTexts
    lm: Float32[np.ndarray, "T H"]
    tfidf: TfidfVectors
    fitted: FittedFeatures
    coverage: Coverage = Coverage(0, 0)

    def vectors(self) -> Float32[np.ndarray, "T D"]:
        """Returns the vectors of all texts: the language model's columns, then those of TF-IDF."""
        return self.fitted.scales.concat(self.lm, self.tfidf.vectors)

    def node_rows(self) -> dict[str, NodeRows]:
        """Returns the features of all users and items, by node type."""
        vectors, found = self.vectors(), {}
        for node_type, links in self.texts.links.items():
            means, has_text = node_means(links, vectors)
            found[node_type] = NodeRows(*apply_whitening(self.fitted.whitening[node_type], means, has_text))
        return found

    @functools.cached_property
    def item_terms(self) -> "csr_matrix":
        """The mean TF-IDF rows of items over all terms, sparse [I, V], of unit length or zero."""
        rows: Any = _link_weights(self.texts.links[ITEM], len(self.lm)) @ self.tfidf.weights
        norms = np.sqrt(rows.power(2).sum(1))
        return rows.multiply(1 / np.where(norms > 0, norms, 1)).tocsr()

    def with_lm(self, lm: Float32[np.ndarray, "T H"]) -> "TextFeatures":
        """Returns these features with other vectors of the language model; all that is fitted stays."""
        return dataclasses.replace(self, lm=lm)


def encode_features(config: TextConfig, texts: NodeTexts, seed: int) -> TextFeatures:
    """Encodes texts by the language model and TF-IDF, or as a control (text.features) says, and fits the transforms.

    Args:
      config: settings of the text features.
      texts: one text or more, with links to nodes.
      seed: seed of the controls.

    Returns:
      The features.

    Raises:
      InsufficientMemoryError: text features do not fit in memory.
      FileNotFoundError, ModuleNotFoundError, ValueError: as `open_model`.
      CacheError, ValueError: as `encode_texts`.
    """
    model = open_language_model(config)
    _require_room(texts, model.config.hidden_size + config.tfidf_dim)
    tfidf_model, tfidf = fit_tfidf(texts.texts, config.tfidf_dim)
    if config.features == "random":
        return without_tfidf(*random_texts(texts, model.config.hidden_size + tfidf.vectors.shape[1], seed))
    lm = encode_by(model, config, texts.texts, cache=config.cache)
    coverage = measure_coverage(texts.texts, model.tokenizer)
    texts = shuffle_texts(texts, seed) if config.features == "shuffled" else texts
    return dataclasses.replace(fit_features(texts, lm, tfidf_model, tfidf), coverage=coverage)


def apply_features(config: TextConfig, texts: NodeTexts, fitted: FittedFeatures, seed: int) -> TextFeatures:
    """Encodes texts and applies what was fitted on others, so that a text gets the same vector whatever else there is.

    Controls (text.features) are drawn anew, for the nodes of these texts.

    Args:
      config: settings of the text features.
      texts: one text or more, with links to nodes.
      fitted: of `encode_features` or `without_tfidf`, of these settings.
      seed: seed of the controls.

    Returns:
      The features, as wide as those that were fitted.

    Raises:
      InsufficientMemoryError, FileNotFoundError, ModuleNotFoundError, CacheError, ValueError: as `encode_features`.
    """
    _require_room(texts, fitted.lm_width + fitted.tfidf.directions.shape[1])
    if config.features == "random":
        texts, lm = random_texts(texts, fitted.lm_width, seed)
        return TextFeatures(texts, lm, apply_tfidf(fitted.tfidf, texts.texts), fitted)
    lm = encode_by(open_language_model(config), config, texts.texts, cache=config.cache)
    texts = shuffle_texts(texts, seed) if config.features == "shuffled" else texts
    return TextFeatures(texts, lm, apply_tfidf(fitted.tfidf, texts.texts), fitted)


def without_tfidf(texts: NodeTexts, lm: Float32[np.ndarray, "T H"]) -> TextFeatures:
    """Returns `fit_features` of the language model's vectors alone."""
    return fit_features(texts, lm, *fit_tfidf(texts.texts, 0))


def fit_features(
    texts: NodeTexts, lm: Float32[np.ndarray, "T H"], tfidf_model: TfidfModel, tfidf: TfidfVectors
) -> TextFeatures:
    """Fits scales and whitening.

    Args:
      texts: texts and their links to nodes.
      lm: float32 [T, H], the language model's vectors of the texts.
      tfidf_model: the TF-IDF model.
      tfidf: its vectors of the texts.

    Returns:
      The features.
    """
    scales = ColumnScales(rms_norm(lm), rms_norm(tfidf.vectors)) if tfidf.vectors.shape[1] else ColumnScales(1.0, 1.0)
    vectors, whitening = scales.concat(lm, tfidf.vectors), {}
    for node_type, links in texts.links.items():
        means, has_text = node_means(links, vectors)
        whitening[node_type] = fit_whitening(means[has_text])
    return TextFeatures(texts, lm, tfidf, FittedFeatures(tfidf_model, scales, whitening, lm.shape[1]))


def rms_norm(view: Float32[np.ndarray, "T D"]) -> float:
    """Computes the root mean square distance of rows from their mean.

    Args:
      view: features of T texts.

    Returns:
      The distance; 1 where all rows are equal.
    """
    found = np.sqrt(np.square(view - view.mean(0)).sum(1).mean())
    size = np.sqrt(np.square(view).sum(1).mean())
    # Where all rows are equal, only the rounding of their mean would be scaled up.
    return float(found) if found > 1e-6 * size else 1.0


def node_means(
    links: NodeTextLinks, vectors: Float32[np.ndarray, "T D"]
) -> tuple[Float32[np.ndarray, "n D"], Bool[np.ndarray, "n"]]:
    """Averages the vectors of each node's texts.

    Args:
      links: weighted links between n nodes and T texts.
      vectors: float32 [T, D], vectors of the texts.

    Returns:
      float32 [n, D], weighted means, zero for a node without text; and bool [n], whether a node has text.
    """
    has_text = np.zeros(links.n_nodes, bool)
    has_text[links.nodes] = True
    return _link_weights(links, len(vectors)) @ vectors, has_text


def _link_weights(links: NodeTextLinks, n_texts: int) -> "csr_matrix":
    """Weights of the texts of each node, [n, T]."""
    # Imported here: importing scipy takes 0.2 s, which `import fused_rec.text` should not.
    from scipy.sparse import csr_matrix

    weights = links.weights, (links.nodes, links.texts)
    return csr_matrix(weights, shape=(links.n_nodes, n_texts), dtype=np.float32)


def open_language_model(config: TextConfig) -> PretrainedModel:
    """Opens the language model of a config; raises as `open_model`."""
    return open_model(config.model, offline=config.offline, prompt=config.prompt, compute_dtype=config.compute_dtype)


def encode_by(
    model: PretrainedModel, config: TextConfig, texts: list[str], *, cache: str | None
) -> Float32[np.ndarray, "T H"]:
    """Returns `encode_texts` with the limits of a config.

    Args:
      model: a language model, that of the config or a fine-tuned one.
      config: settings of the text features.
      texts: T texts.
      cache: folder of cached vectors, None for none.
    """
    return encode_texts(texts, model, cache=cache, batch_tokens=config.batch_tokens, max_tokens=config.max_tokens)


def _require_room(texts: NodeTexts, width: int) -> None:
    """Raises InsufficientMemoryError where text features of all nodes do not fit, before the first text is encoded.

    Counts the texts' vectors in blocks and joined, and the nodes' means in float32 and, for whitening, float64.
    """
    n_nodes = max(links.n_nodes for links in texts.links.values())
    what = f"text embeddings of width {width} for {len(texts.texts):,} texts and {n_nodes:,} nodes"
    instead = "raise data.k_core, lower text.tfidf_dim, take a smaller text.model, or set model.variant to graph"
    require_memory(8 * len(texts.texts) * width + 24 * n_nodes * width, what, instead)
