"""Token attribution: integrated gradients of a score over the words of the user's and the item's own texts.

Integrated gradients (Sundararajan, Taly and Yan, 2017, arXiv 1703.01365) run from baseline texts to the real texts,
through the language model, whitening, gates and all propagation layers. At position a of the path, token embeddings and
TF-IDF vectors are scaled by a; special tokens, position embeddings and the mask are constant, so that the baseline has
zero token embeddings. The attribution of a token is the dot product of its embedding with the gradient, averaged over
the path; attributions sum to the score minus the baseline score.

Only the text features of the two nodes change. Constant: text of other nodes, text-kNN edges and their weights, the
whitening, and those texts of the two nodes that are not attributed.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Float64, Int, PyTree

from fused_rec.config import Config
from fused_rec.data.node_texts import ITEM, USER
from fused_rec.distributed.devices import AnyArray
from fused_rec.explanation.decomposition import require_trained
from fused_rec.text.encode import Tokens, tokens
from fused_rec.text.encoders.registry import apply_encoder
from fused_rec.text.features import TextFeatures, node_means, open_language_model
from fused_rec.text.pretrained import PretrainedModel
from fused_rec.text.tfidf import TfidfModel
from fused_rec.training.inputs import ModelInputs
from fused_rec.training.train_step import GraphInputs, compile_key, embed_nodes

SIDES = (USER, ITEM)
# Gauss-Legendre points, tried in order until `TOLERANCE` holds; 16 miss MiniLM by up to 14 %.
POINTS = (24, 48, 96, 192)
TOGETHER = 8  # points per encoder call
TOLERANCE = 0.01  # largest relative error of the sum of attributions
LEAST = 1e-3  # smallest denominator of that error relative to the score, near the precision of float32
LIMIT = 4  # texts per node that are attributed


class Text(NamedTuple):
    """Text of the pair: its side ("user" or "item") and its weight in the mean of its node's texts."""

    side: str
    text: str
    weight: float


class TokenValue(NamedTuple):
    """Attribution `value` of a word; `token` is `texts[text].text[start:end]` of its `TokenAttribution`."""

    side: str
    text: int
    start: int
    end: int
    token: str
    value: float


class TokenAttribution(NamedTuple):
    """Attribution of one score to words.

    Attributes:
      tokens: words in the order of texts and positions.
      texts: the attributed texts, the user's first.
      left_out: number of the pair's other texts, which stay constant.
      score: score with these texts.
      baseline: score with baseline texts.
      error: |sum of values - (score - baseline)| / |score - baseline|, at most `TOLERANCE`.
      points: points of the quadrature rule.
    """

    tokens: list[TokenValue]
    texts: list[Text]
    left_out: int
    score: float
    baseline: float
    error: float
    points: int


@dataclasses.dataclass(frozen=True, eq=False)
class Attributor:
    """A trained model and the text features of its graph.

    Attributes:
      config: settings of the run.
      params: parameters, on the device.
      graph_inputs: the graph, on the device.
      model: the language model.
      weights: its parameters, on the device.
      features: texts, their vectors, and the fitted transforms.
      vectors: vectors of all texts, as of `TextFeatures.vectors`.
      means: mean text vector of each node, by side.
    """

    config: Config
    params: PyTree
    graph_inputs: GraphInputs
    model: PretrainedModel
    weights: PyTree
    features: TextFeatures
    vectors: Float32[np.ndarray, "T D"]
    means: Mapping[str, Float32[np.ndarray, "_ D"]]


def attributor(config: Config, params: PyTree, prepared: ModelInputs) -> Attributor:
    """Prepares token attribution for a trained model.

    Args:
      config: settings of the run.
      params: parameters.
      prepared: tables, split, text features and graph.

    Returns:
      The input of `attribute_tokens`.

    Raises:
      ValueError: the model is a baseline or uses no text (variant graph, features random, or no texts), its encoder is
        fine-tuned, or the language model has a prompt.
    """
    require_trained(config)
    if not config.encodes_text:
        why = f"model.variant is {config.model.variant} and text.features {config.text.features}"
        raise ValueError(
            f"{why}; token attribution needs a variant that uses text (fused or text) with real text features"
        )
    if config.text.finetune != "frozen":
        why = f"text.finetune is {config.text.finetune}"
        raise ValueError(f"{why}; token attribution needs a frozen encoder, a run with text.finetune frozen")
    features = prepared.text
    if not features.texts.texts:
        raise ValueError(f"{prepared.dataset.name} has no texts; token attribution needs texts")
    model = open_language_model(config.text)
    if model.prompt:
        raise ValueError(
            f"{config.text.model} prepends the prompt {model.prompt!r} to each text; token attribution needs a "
            "language model without a prompt"
        )
    vectors = features.vectors()
    means = {side: node_means(features.texts.links[side], vectors)[0] for side in SIDES}
    on_device: Any = jax.device_put((params, prepared.graph_inputs, model.params))
    params, graph_inputs, weights = on_device
    return Attributor(config, params, graph_inputs, model, weights, features, vectors, means)


def attribute_tokens(read: Attributor, user: int, item: int, *, limit: int = LIMIT) -> TokenAttribution:
    """Attributes the score of a pair to the words of the user's and the item's own texts.

    Each point of the path costs a forward and backward pass of the graph model, and one of the encoder per text.

    Args:
      read: of `attributor`.
      user: user row.
      item: item row.
      limit: texts per node to attribute: those whose replacement by the mean text changes the score most, to first
        order.

    Returns:
      The attribution.

    Raises:
      ArithmeticError: 192 points miss the score difference by more than `TOLERANCE`.
    """
    rows = user, item
    own = np.stack([read.means[side][row] for side, row in zip(SIDES, rows, strict=True)])
    with_text, center, matrix = _whitening(read, own)
    space: Any = jax.device_put((with_text, center.astype(np.float32), matrix.astype(np.float32)))
    settings, at = compile_key(read.config), np.array(rows, np.int32)

    def scored(means: Float[np.ndarray, "2 D"]) -> tuple[float, Float32[np.ndarray, "2 D"]]:
        value, slope = _score(settings, read.params, read.graph_inputs, at, means.astype(np.float32), *space)
        return float(value), np.asarray(slope)

    score, slope = scored(own)
    path = _path(read, own, *_chosen(read, rows, with_text, slope, center, limit))
    baseline_vectors = np.zeros((len(path.texts), read.model.config.hidden_size), np.float32)
    for place, text in enumerate(path.embedded):
        baseline_vectors[place] = _encoded(read, text, np.zeros(1))[0]
    baseline, _ = scored(_means(read, path, baseline_vectors, 0.0))
    difference = score - baseline
    for points in POINTS if len(path.texts) else (0,):
        by_token, by_term = _integrated(read, path, points, scored)
        total = sum(float(values.sum()) for values in (*by_token, *by_term))
        error = abs(total - difference) / max(abs(difference), LEAST * abs(score), 1e-12)
        if error <= TOLERANCE:
            break
    else:
        raise ArithmeticError(
            f"{POINTS[-1]} points leave the words' values {error:.1%} from the difference of scores, {difference:.2e}; "
            f"it must be {TOLERANCE:.0%} at most. Split fewer texts: limit is {limit}"
        )
    count = sum(
        int((read.features.texts.links[side].nodes == row).sum()) for side, row in zip(SIDES, rows, strict=True)
    )
    found, texts = _values(read, path, by_token, by_term), _texts(read, path)
    return TokenAttribution(found, texts, count - len(texts), score, baseline, error, points)


def _whitening(
    read: Attributor, own: Float32[np.ndarray, "2 D"]
) -> tuple[Bool[np.ndarray, "2"], Float64[np.ndarray, "2 D"], Float64[np.ndarray, "2 D D"]]:
    """Which of the two nodes have text, and center and matrix of their whitening, zero where there is none."""
    found, width = [read.features.fitted.whitening[side] for side in SIDES], own.shape[1]
    return (
        np.array([by is not None and bool(mean.any()) for by, mean in zip(found, own, strict=True)]),
        np.stack([np.zeros(width) if by is None else by.center for by in found]),
        np.stack([np.zeros((width, width)) if by is None else by.matrix for by in found]),
    )


def _chosen(
    read: Attributor,
    rows: tuple[int, int],
    with_text: Bool[np.ndarray, "2"],
    slope: Float32[np.ndarray, "2 D"],
    center: Float64[np.ndarray, "2 D"],
    limit: int,
) -> tuple[Int[np.ndarray, "B"], Int[np.ndarray, "B"], Float32[np.ndarray, "B"]]:
    """(0 for the user's and 1 for the item's, text, weight) of the texts that are attributed."""
    found = []
    for number, (side, row) in enumerate(zip(SIDES, rows, strict=True)):
        links = read.features.texts.links[side]
        mine = np.flatnonzero(links.nodes == row)[: None if with_text[number] else 0]
        texts, weights = links.texts[mine], links.weights[mine]
        effect = np.abs(weights * ((read.vectors[texts] - center[number]) @ slope[number]))
        first = np.sort(np.argsort(-effect, kind="stable")[:limit])
        found.append((np.full(len(first), number), texts[first], weights[first]))
    sides, texts, weights = (np.concatenate(part) for part in zip(*found, strict=True))
    return sides, texts, weights


class _EmbeddedTokens(NamedTuple):
    """Tokens of a text, padded: embeddings [L, H], mask, and which of them are scaled along the path."""

    tokens: Tokens
    embeddings: Float32[np.ndarray, "L H"]
    mask: Bool[np.ndarray, "L"]
    moves: Bool[np.ndarray, "L"]


class _Path(NamedTuple):
    """The straight line from baseline texts to the B attributed texts.

    Attributes:
      texts: the texts.
      sides: index into `SIDES` of each text.
      shares: weight of each text in the mean of its node.
      embedded: their token embeddings.
      weight: the shares as a matrix, from texts to nodes.
      rest: mean of each node without the attributed texts.
    """

    texts: Int[np.ndarray, "B"]
    sides: Int[np.ndarray, "B"]
    shares: Float32[np.ndarray, "B"]
    embedded: list[_EmbeddedTokens]
    weight: Float64[np.ndarray, "2 B"]
    rest: Float64[np.ndarray, "2 D"]


def _path(
    read: Attributor,
    own: Float32[np.ndarray, "2 D"],
    sides: Int[np.ndarray, "B"],
    texts: Int[np.ndarray, "B"],
    shares: Float32[np.ndarray, "B"],
) -> _Path:
    weight = (sides[None, :] == np.arange(2)[:, None]) * shares[None, :].astype(np.float64)
    rest = own - weight @ read.vectors[texts]
    return _Path(texts, sides, shares, _embed_tokens(read, texts), weight, rest)


def _means(
    read: Attributor, path: _Path, encoded: Float32[np.ndarray, "B H"], share: float
) -> Float64[np.ndarray, "2 D"]:
    """Computes the mean vectors of the two nodes at a position of the path, given the encoder's vectors there."""
    counted = share * read.features.tfidf.vectors[path.texts]
    return path.rest + path.weight @ read.features.fitted.scales.concat(encoded, counted)


def _texts(read: Attributor, path: _Path) -> list[Text]:
    each = zip(path.sides, path.texts, path.shares, strict=True)
    return [Text(SIDES[side], read.features.texts.texts[text], float(share)) for side, text, share in each]


def _values(
    read: Attributor, path: _Path, by_token: Sequence[np.ndarray], by_term: Sequence[np.ndarray]
) -> list[TokenValue]:
    """Merges the attributions of tokens and terms into words, in the order of texts and positions."""
    found = []
    for place, text in enumerate(path.texts):
        written, side = read.features.texts.texts[text], SIDES[path.sides[place]]
        spans = _spans(path.embedded[place].tokens, by_token[place])
        spans = _with_terms(spans, read.features.fitted.tfidf, written, by_term[place])
        found += [TokenValue(side, place, start, end, written[start:end], value) for start, end, value in spans]
    return found


def _embed_tokens(read: Attributor, texts: Int[np.ndarray, "B"]) -> list[_EmbeddedTokens]:
    table, found = read.model.params["word"]["embedding"], []
    written = [read.features.texts.texts[text] for text in texts]
    for cut in tokens(written, read.model, max_tokens=read.config.text.max_tokens) if written else ():
        # Powers of two limit the number of compilations.
        length = min(max(16, 1 << (len(cut.ids) - 1).bit_length()), read.model.config.max_position_embeddings)
        fill = (0, length - len(cut.ids))
        ids, mask = np.pad(cut.ids, fill), np.arange(length) < len(cut.ids)
        found.append(_EmbeddedTokens(cut, table[ids].astype(np.float32), mask, mask & ~np.pad(cut.special, fill)))
    return found


def _encoded(read: Attributor, text: _EmbeddedTokens, shares: Float64[np.ndarray, "n"]) -> Float32[np.ndarray, "n H"]:
    """Encodes a text at these positions of the path."""
    made = [_encode(read.weights, _at(text, some), text.mask, _encoder(read.model)) for some in _together(shares)]
    return np.concatenate([np.asarray(x) for x in made])[: len(shares)]


def _token_gradients(
    read: Attributor, text: _EmbeddedTokens, shares: Float64[np.ndarray, "n"], slope: Float[np.ndarray, "n H"]
) -> Float32[np.ndarray, "n L"]:
    """Computes the dot product of each token embedding with its gradient, by point and token."""
    own = np.where(text.moves[:, None], text.embeddings, 0)
    slopes = _together(slope.astype(np.float32))
    made = [
        np.asarray(_embedding_gradient(read.weights, _at(text, some), text.mask, back, own, _encoder(read.model)))
        for some, back in zip(_together(shares), slopes, strict=True)
    ]
    return np.concatenate(made)[: len(shares)]


def _encoder(model: PretrainedModel) -> tuple:
    """The static arguments of `apply_encoder`."""
    return model.config, model.pooling, model.normalize


def _together(x: Float[np.ndarray, "n ..."]) -> list[np.ndarray]:
    """Splits rows into chunks of `TOGETHER`, the last padded with zeros, for one compiled shape."""
    fill = [(0, -len(x) % TOGETHER)] + [(0, 0)] * (x.ndim - 1)
    return np.split(np.pad(x, fill), range(TOGETHER, len(x), TOGETHER))


def _at(text: _EmbeddedTokens, shares: Float[np.ndarray, "n"]) -> Float32[np.ndarray, "n L H"]:
    factor = np.where(text.moves[None, :], shares[:, None], 1.0)
    return (factor[:, :, None] * text.embeddings[None]).astype(np.float32)


def _integrated(
    read: Attributor, path: _Path, points: int, scored: Callable[[np.ndarray], tuple[float, np.ndarray]]
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Integrates the attributions of tokens [L] and of TF-IDF terms [V] of each text."""
    if not points:
        return [], []
    nodes, parts = np.polynomial.legendre.leggauss(points)
    shares, parts = (nodes + 1) / 2, parts / 2
    encoded = np.stack([_encoded(read, text, shares) for text in path.embedded], axis=1)
    slopes = []
    for share, vectors in zip(shares, encoded, strict=True):
        _, slope = scored(_means(read, path, vectors, share))
        slopes.append(path.weight.T @ slope)
    slope, hidden = np.stack(slopes), encoded.shape[2]  # [n, B, D]
    scales, fitted, tfidf = read.features.fitted.scales, read.features.fitted.tfidf, read.features.tfidf
    of_encoder, of_terms = slope[:, :, :hidden] / scales.lm, slope[:, :, hidden:] / scales.tfidf
    by_token = [
        parts @ _token_gradients(read, text, shares, of_encoder[:, place]).astype(np.float64)
        for place, text in enumerate(path.embedded)
    ]
    mean = np.einsum("n,nbd->bd", parts, of_terms)
    by_term = [
        tfidf.weights[int(text)].toarray()[0] * (fitted.directions @ mean[place])
        for place, text in enumerate(path.texts)
    ]
    return by_token, by_term


def _spans(cut: Tokens, values: Float64[np.ndarray, "L"]) -> list[tuple[int, int, float]]:
    """Sums token attributions by word: (start, end, value) in order."""
    found: dict[int, tuple[int, int, float]] = {}
    for word, (start, end), value in zip(cut.words, cut.spans, values.tolist(), strict=False):
        if word is not None:
            first, last, before = found.get(word, (start, end, 0.0))
            found[word] = min(first, start), max(last, end), before + value
    return sorted(found.values())


def _with_terms(
    spans: list[tuple[int, int, float]], counted: TfidfModel, text: str, values: Float64[np.ndarray, "V"]
) -> list[tuple[int, int, float]]:
    """Adds term attributions, divided over their occurrences, to the words they overlap, else as separate spans."""
    places = list(counted.occurrences(text))
    often = np.bincount([row for *_, row in places], minlength=len(values))
    starts, ends = (np.array([span[side] for span in spans], np.int64) for side in (0, 1))
    total, more = np.array([value for *_, value in spans], np.float64), []
    for start, end, row in places:
        value = float(values[row]) / often[row]
        over = slice(np.searchsorted(ends, start, "right"), np.searchsorted(starts, end, "left"))
        common = np.minimum(ends[over], end) - np.maximum(starts[over], start)
        if common.sum() > 0:
            total[over] += value * common / common.sum()
        else:
            more.append((start, end, value))
    return sorted([*zip(starts.tolist(), ends.tolist(), total.tolist(), strict=True), *more])


@functools.partial(jax.jit, static_argnames="encoder")
def _encode(
    weights: PyTree, embeddings: Float32[AnyArray, "n L H"], mask: Bool[AnyArray, "L"], encoder: tuple
) -> Float32[Array, "n H"]:
    """Encodes from token embeddings, which form a temporary vocabulary."""
    config, *pooling = encoder
    count, length, width = embeddings.shape
    own = dataclasses.replace(config, vocab_size=count * length)
    weights = {**weights, "word": {"embedding": jnp.reshape(embeddings, (-1, width))}}
    ids = jnp.arange(count * length, dtype=jnp.int32).reshape(count, length)
    return apply_encoder(weights, ids, jnp.broadcast_to(mask, (count, length)), own, *pooling)


@functools.partial(jax.jit, static_argnames="encoder")
def _embedding_gradient(
    weights: PyTree,
    embeddings: Float32[AnyArray, "n L H"],
    mask: Bool[AnyArray, "L"],
    slope: Float32[AnyArray, "n H"],
    own: Float32[AnyArray, "L H"],
    encoder: tuple,
) -> Float32[Array, "n L"]:
    _, back = jax.vjp(lambda x: _encode(weights, x, mask, encoder), jnp.asarray(embeddings))
    return jnp.einsum("nlh,lh->nl", back(slope)[0], own, precision=jax.lax.Precision.HIGHEST)


def _vectors(
    means: Float32[AnyArray, "2 D"],
    with_text: Bool[AnyArray, "2"],
    center: Float32[AnyArray, "2 D"],
    matrix: Float32[AnyArray, "2 D D"],
) -> Float32[Array, "2 D"]:
    """Computes the text features of the two nodes, as `TextFeatures.node_rows` does."""
    out = jnp.einsum("sd,sde->se", means - center, matrix, precision=jax.lax.Precision.HIGHEST)
    length = jnp.sqrt(jnp.maximum((out * out).sum(1, keepdims=True), 1e-24))
    return jnp.where(with_text[:, None], out / length, 0)


@functools.partial(jax.jit, static_argnums=0)
def _score(
    config: Config,
    params: PyTree,
    graph_inputs: GraphInputs,
    rows: Int[AnyArray, "2"],
    means: Float32[AnyArray, "2 D"],
    *space: AnyArray,
) -> tuple[Float32[Array, ""], Float32[Array, "2 D"]]:
    """Returns the score of a pair with these mean text vectors, and its gradient."""
    graph = graph_inputs.graph

    def score(means: Array) -> Array:
        vectors = zip(SIDES, rows, _vectors(means, *space), strict=True)
        changed = graph.with_text({side: jnp.asarray(graph.text[side]).at[row].set(x) for side, row, x in vectors})
        users, items = embed_nodes(config, params, dataclasses.replace(graph_inputs, graph=changed))
        return users[rows[0]] @ items[rows[1]]

    return jax.value_and_grad(score)(means)
