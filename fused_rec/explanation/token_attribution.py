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
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Float64, Int, PyTree

from fused_rec.config import Config
from fused_rec.data.controls import shuffle_texts
from fused_rec.data.node_texts import NodeTexts, node_texts
from fused_rec.distributed.devices import AnyArray
from fused_rec.graph.build import Whitening, node_means, whitening
from fused_rec.graph.schema import ITEM, USER
from fused_rec.text.encode import Tokens, encode_texts, tokens
from fused_rec.text.encoders.registry import apply_encoder
from fused_rec.text.pretrained import PretrainedModel, open_model
from fused_rec.text.tfidf import TfidfModel, concat_normalized, fit_tfidf, rms_norm
from fused_rec.training.inputs import Prepared
from fused_rec.training.train_step import GraphInputs, compile_key
from fused_rec.training.train_step import embed_nodes as embed_nodes

SIDES = (USER, ITEM)
POINTS = (
    24,
    48,
    96,
    192,
)  # Gauss-Legendre points, tried in order until `TOLERANCE` holds; 16 miss MiniLM by up to 14 %
TOGETHER = 8  # points per encoder call
TOLERANCE = 0.01  # largest relative error of the sum of attributions
LEAST = 1e-3  # smallest denominator of that error relative to the score, near the precision of float32
LIMIT = 4  # texts per node that are attributed
AGREES = 1e-3  # largest deviation of a recomputed unit vector from the graph's


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
    """Encoder, text vectors and whitening of a run. means: mean text vector of each node, by side."""

    config: Config
    params: PyTree
    graph_inputs: GraphInputs
    model: PretrainedModel
    weights: PyTree  # the encoder's, on the device
    texts: NodeTexts
    vectors: Float32[np.ndarray, "T D"]
    scale: tuple[float, float]  # of the encoder's and of the TF-IDF columns of `vectors`
    tfidf: TfidfModel | None
    means: dict[str, Float32[np.ndarray, "_ D"]]
    whitenings: dict[str, Whitening]


def attributor(config: Config, params: PyTree, prepared: Prepared) -> Attributor:
    """Prepares token attribution for a trained model: encodes all texts (cached) and fits TF-IDF.

    Args:
      config: settings of the run.
      params: parameters.
      prepared: tables, split and graph.

    Returns:
      The input of `attribute_tokens`.

    Raises:
      ValueError: the model uses no text (variant graph, features random, or no texts), or its encoder is fine-tuned.
    """
    if config.model.variant == "graph" or config.text.features == "random":
        why = f"model.variant is {config.model.variant} and text.features {config.text.features}"
        raise ValueError(
            f"{why}; token attribution needs a variant that uses text (fused or text) with real text features"
        )
    if config.text.finetune != "frozen":
        why = f"text.finetune is {config.text.finetune}"
        raise ValueError(f"{why}; token attribution needs a frozen encoder, a run with text.finetune frozen")
    texts = node_texts(prepared.dataset, prepared.observed)
    if not texts.texts:
        raise ValueError(f"{prepared.dataset.name} has no texts; token attribution needs texts")
    model, limits = open_model(config.text.model, offline=config.text.offline), config.text
    encoded = encode_texts(
        texts.texts, model, cache=limits.cache, batch_tokens=limits.batch_tokens, max_tokens=limits.max_tokens
    )
    counted = fit_tfidf(texts.texts, limits.tfidf_dim)
    if limits.features == "shuffled":
        texts = shuffle_texts(texts, config.train.seed)
    vectors, scale = encoded, (1.0, 1.0)
    if counted is not None:
        vectors, scale = concat_normalized(encoded, counted.vectors), (rms_norm(encoded), rms_norm(counted.vectors))
    means, spaces = {}, {}
    for side, count in zip(SIDES, (prepared.dataset.n_users, prepared.dataset.n_items), strict=True):
        means[side], named = node_means(*_links_of(texts, side), vectors, count)
        if named.sum() >= 2:
            spaces[side] = whitening(means[side][named])
    on_device: Any = jax.device_put((params, prepared.graph_inputs, model.params))
    params, graph_inputs, weights = on_device
    return Attributor(config, params, graph_inputs, model, weights, texts, vectors, scale, counted, means, spaces)


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
      ValueError: the texts no longer give the vectors that the graph has.
    """
    rows = user, item
    spaces = [read.whitenings.get(side) for side in SIDES]
    width = read.vectors.shape[1]
    own = np.stack([read.means[side][row] for side, row in zip(SIDES, rows, strict=True)])
    with_text = np.array([space is not None and bool(mean.any()) for space, mean in zip(spaces, own, strict=True)])
    centre = np.stack([np.zeros(width) if space is None else space.center for space in spaces])
    matrix = np.stack([np.zeros((width, width)) if space is None else space.matrix for space in spaces])
    space: Any = jax.device_put((with_text, centre.astype(np.float32), matrix.astype(np.float32)))
    settings, at = compile_key(read.config), np.array(rows, np.int32)

    def scored(means: Float[np.ndarray, "2 D"]) -> tuple[float, Float32[np.ndarray, "2 D"]]:
        value, slope = _score(settings, read.params, read.graph_inputs, at, means.astype(np.float32), *space)
        return float(value), np.asarray(slope)

    _check_vectors(read, rows, np.asarray(_vectors(own, *space)))
    score, slope = scored(own)
    sides, texts, shares = _chosen(read, rows, with_text, slope, centre, limit)
    count = sum(int((_links_of(read.texts, side)[0] == row).sum()) for side, row in zip(SIDES, rows, strict=True))
    moved = _embed_tokens(read, texts)
    # The mean of each node without the attributed texts.
    weight = (sides[None, :] == np.arange(2)[:, None]) * shares[None, :].astype(np.float64)
    rest = own - weight @ read.vectors[texts]
    baseline_vectors = np.zeros((len(moved), read.model.config.hidden_size), np.float32)
    for place, text in enumerate(moved):
        baseline_vectors[place] = _encoded(read, text, np.zeros(1))[0]
    baseline, _ = scored(rest + weight @ _joined(read, baseline_vectors, 0.0 * _counted(read, texts)))
    difference = score - baseline
    for points in POINTS if len(texts) else (0,):
        by_token, by_term = _integrated(read, moved, texts, weight, rest, points, scored)
        total = sum(float(values.sum()) for values in (*by_token, *by_term))
        error = abs(total - difference) / max(abs(difference), LEAST * abs(score), 1e-12)
        if error <= TOLERANCE:
            break
    else:
        raise ArithmeticError(
            f"{POINTS[-1]} points leave the words' values {error:.1%} from the difference of scores, {difference:.2e}; "
            f"it must be {TOLERANCE:.0%} at most. Split fewer texts: limit is {limit}"
        )
    found = []
    for place, text in enumerate(texts):
        written = read.texts.texts[text]
        spans = _spans(moved[place].tokens, by_token[place])
        if read.tfidf is not None:
            spans = _with_terms(spans, read.tfidf, written, by_term[place])
        side = SIDES[sides[place]]
        found += [TokenValue(side, place, start, end, written[start:end], value) for start, end, value in spans]
    named = [
        Text(SIDES[side], read.texts.texts[text], float(share))
        for side, text, share in zip(sides, texts, shares, strict=True)
    ]
    return TokenAttribution(found, named, count - len(texts), score, baseline, error, points)


def _links_of(texts: NodeTexts, side: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    if side == USER:
        return texts.user_rows, texts.user_texts, texts.user_weights
    return texts.item_rows, texts.item_texts, texts.item_weights


def _check_vectors(read: Attributor, rows: tuple[int, int], made: Float32[np.ndarray, "2 D"]) -> None:
    for side, row, vector in zip(SIDES, rows, made, strict=True):
        strays = float(np.abs(np.asarray(read.graph_inputs.graph.text[side][row]) - vector).max())
        if strays > AGREES:
            raise ValueError(
                f"{side} {row}: the texts give another vector than the graph has, by {strays:.1e} and at most "
                f"{AGREES:.0e}; open config, parameters and tables of one and the same run"
            )


def _chosen(
    read: Attributor,
    rows: tuple[int, int],
    with_text: Bool[np.ndarray, "2"],
    slope: Float32[np.ndarray, "2 D"],
    centre: Float64[np.ndarray, "2 D"],
    limit: int,
) -> tuple[Int[np.ndarray, "B"], Int[np.ndarray, "B"], Float32[np.ndarray, "B"]]:
    """(0 for the user's and 1 for the item's, text, weight) of the texts that are split."""
    found = []
    for number, (side, row) in enumerate(zip(SIDES, rows, strict=True)):
        at, texts, weights = _links_of(read.texts, side)
        mine = np.flatnonzero(at == row)[: None if with_text[number] else 0]
        texts, weights = texts[mine], weights[mine]
        effect = np.abs(weights * ((read.vectors[texts] - centre[number]) @ slope[number]))
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


def _embed_tokens(read: Attributor, texts: Int[np.ndarray, "B"]) -> list[_EmbeddedTokens]:
    table, found = read.model.params["word"]["embedding"], []
    written = [read.texts.texts[text] for text in texts]
    for cut in tokens(written, read.model, max_tokens=read.config.text.max_tokens) if written else ():
        # Powers of two limit the number of compilations.
        length = min(max(16, 1 << (len(cut.ids) - 1).bit_length()), read.model.config.max_position_embeddings)
        fill = (0, length - len(cut.ids))
        ids, mask = np.pad(cut.ids, fill), np.arange(length) < len(cut.ids)
        found.append(_EmbeddedTokens(cut, table[ids].astype(np.float32), mask, mask & ~np.pad(cut.special, fill)))
    return found


def _counted(read: Attributor, texts: Int[np.ndarray, "B"]) -> Float32[np.ndarray, "B _"]:
    return np.zeros((len(texts), 0), np.float32) if read.tfidf is None else read.tfidf.vectors[texts]


def _joined(
    read: Attributor, encoded: Float[np.ndarray, "B H"], counted: Float[np.ndarray, "B _"]
) -> Float[np.ndarray, "B D"]:
    """Concatenates vectors as `concat_normalized` does, with the scales of all texts."""
    return np.concatenate([encoded / read.scale[0], counted / read.scale[1]], axis=1)


def _encoded(read: Attributor, text: _EmbeddedTokens, shares: Float64[np.ndarray, "n"]) -> Float32[np.ndarray, "n H"]:
    """Encodes a text at these positions of the path."""
    model = read.model
    made = [
        _encode(read.weights, _at(text, some), text.mask, model.config, model.pooling, model.normalize)
        for some in _together(shares)
    ]
    return np.concatenate([np.asarray(x) for x in made])[: len(shares)]


def _token_gradients(
    read: Attributor, text: _EmbeddedTokens, shares: Float64[np.ndarray, "n"], slope: Float[np.ndarray, "n H"]
) -> Float32[np.ndarray, "n L"]:
    """Computes the dot product of each token embedding with its gradient, by point and token."""
    model, own = read.model, np.where(text.moves[:, None], text.embeddings, 0)
    slopes = _together(slope.astype(np.float32))
    made = [
        np.asarray(
            _embedding_gradient(read.weights, _at(text, some), text.mask, back, own, model.config, *_pooling(model))
        )
        for some, back in zip(_together(shares), slopes, strict=True)
    ]
    return np.concatenate(made)[: len(shares)]


def _pooling(model: PretrainedModel) -> tuple[str, bool]:
    return model.pooling, model.normalize


def _together(x: Float[np.ndarray, "n ..."]) -> list[np.ndarray]:
    """Splits rows into chunks of `TOGETHER`, the last padded with zeros, for one compiled shape."""
    fill = [(0, -len(x) % TOGETHER)] + [(0, 0)] * (x.ndim - 1)
    return np.split(np.pad(x, fill), range(TOGETHER, len(x), TOGETHER))


def _at(text: _EmbeddedTokens, shares: Float[np.ndarray, "n"]) -> Float32[np.ndarray, "n L H"]:
    factor = np.where(text.moves[None, :], shares[:, None], 1.0)
    return (factor[:, :, None] * text.embeddings[None]).astype(np.float32)


def _integrated(
    read: Attributor,
    moved: Sequence[_EmbeddedTokens],
    texts: Int[np.ndarray, "B"],
    weight: Float64[np.ndarray, "2 B"],
    rest: Float[np.ndarray, "2 D"],
    points: int,
    scored: Any,
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Integrates the attributions of tokens [L] and of TF-IDF terms [V] of each text."""
    if not points:
        return [], []
    nodes, parts = np.polynomial.legendre.leggauss(points)
    shares, parts = (nodes + 1) / 2, parts / 2
    encoded = np.stack([_encoded(read, text, shares) for text in moved], axis=1)
    counted, hidden = _counted(read, texts), encoded.shape[2]
    slopes = []
    for share, vectors in zip(shares, encoded, strict=True):
        _, slope = scored(rest + weight @ _joined(read, vectors, share * counted))
        slopes.append(weight.T @ slope)
    slope = np.stack(slopes)  # [n, B, D]
    of_encoder, of_terms = slope[:, :, :hidden] / read.scale[0], slope[:, :, hidden:] / read.scale[1]
    by_token = [
        parts @ _token_gradients(read, text, shares, of_encoder[:, place]).astype(np.float64)
        for place, text in enumerate(moved)
    ]
    if read.tfidf is None:
        return by_token, [np.zeros(0) for _ in moved]
    mean = np.einsum("n,nbd->bd", parts, of_terms)
    by_term = [
        read.tfidf.weights[int(text)].toarray()[0] * (read.tfidf.directions @ mean[place])
        for place, text in enumerate(texts)
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


@functools.partial(jax.jit, static_argnames=("config", "pooling", "normalize"))
def _encode(
    weights: PyTree,
    embeddings: Float32[AnyArray, "n L H"],
    mask: Bool[AnyArray, "L"],
    config: Any,
    pooling: Any,
    normalize: bool,
) -> Float32[Array, "n H"]:
    """Encodes from token embeddings, which form a temporary vocabulary."""
    count, length, width = embeddings.shape
    own = dataclasses.replace(config, vocab_size=count * length)
    weights = {**weights, "word": {"embedding": jnp.reshape(embeddings, (-1, width))}}
    ids = jnp.arange(count * length, dtype=jnp.int32).reshape(count, length)
    return apply_encoder(weights, ids, jnp.broadcast_to(mask, (count, length)), own, pooling, normalize)


@functools.partial(jax.jit, static_argnames=("config", "pooling", "normalize"))
def _embedding_gradient(
    weights: PyTree,
    embeddings: Float32[AnyArray, "n L H"],
    mask: Bool[AnyArray, "L"],
    slope: Float32[AnyArray, "n H"],
    own: Float32[AnyArray, "L H"],
    config: Any,
    pooling: Any,
    normalize: bool,
) -> Float32[Array, "n L"]:
    _, back = jax.vjp(lambda x: _encode(weights, x, mask, config, pooling, normalize), jnp.asarray(embeddings))
    return jnp.einsum("nlh,lh->nl", back(slope)[0], own, precision=jax.lax.Precision.HIGHEST)


def _vectors(
    means: Float32[AnyArray, "2 D"],
    with_text: Bool[AnyArray, "2"],
    centre: Float32[AnyArray, "2 D"],
    matrix: Float32[AnyArray, "2 D D"],
) -> Float32[Array, "2 D"]:
    """Computes the text features of the two nodes, as `node_vectors` does."""
    out = jnp.einsum("sd,sde->se", means - centre, matrix, precision=jax.lax.Precision.HIGHEST)
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
