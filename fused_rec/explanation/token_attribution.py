"""Which words count: what a user's and an item's own texts add to a score, split over their words.

Integrated gradients (Sundararajan, Taly and Yan, 2017, arXiv 1703.01365) from texts that are mute to the texts as they
are, through the language model, the whitening, gates, affinities and every round of the propagation at once. At a share
a of the way every word's embedding is a times its own, and so are the texts' TF-IDF vectors; special tokens, positions
and the mask stay. A word's value is its embedding's dot product with the gradient of the score, averaged over the way,
and the values sum to the score less that of the mute texts.

What moves are the vectors of these two nodes. Held fixed: other nodes' words, which nodes hear each other for similar
words and with which weight, the whitening, and those of the two nodes' own texts that are not split.
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
from fused_rec.graph.build import ITEM, USER, Whitening, node_means, whitening
from fused_rec.text.encode import Tokens, encode_texts, tokens
from fused_rec.text.encoders.registry import apply_encoder
from fused_rec.text.pretrained import PretrainedModel, open_model
from fused_rec.text.tfidf import TfidfModel, concat_normalized, fit_tfidf, rms_norm
from fused_rec.training.inputs import Prepared
from fused_rec.training.train_step import GraphInputs, compile_key
from fused_rec.training.train_step import embed_nodes as embed_nodes

SIDES = (USER, ITEM)
POINTS = (24, 48, 96, 192)  # of a Gauss-Legendre rule, until one is good enough; 16 leave some of MiniLM 14 % off
TOGETHER = 8  # points that the encoder takes at once
TOLERANCE = 0.01  # of the difference of scores: by so much the values may miss it
LEAST = 1e-3  # of the score: a smaller difference is measured by this, since float32 hardly tells it from none
LIMIT = 4  # texts of a node that are split
AGREES = 1e-3  # by so much a unit vector made anew may stray from the graph's


class Text(NamedTuple):
    """A text of the pair: side "user" or "item", and its weight in the mean of its node's texts."""

    side: str
    text: str
    weight: float


class TokenValue(NamedTuple):
    """`token` is `texts[text].text[start:end]` of its `TokenAttribution`; value: what it adds to the score."""

    side: str
    text: int
    start: int
    end: int
    token: str
    value: float


class TokenAttribution(NamedTuple):
    """One score over words, in the order of texts and places.

    texts: those that are split, the user's first. left_out: how many more the two have, which are held as they are.
    score, baseline: with these texts and with them mute. error: |sum of values - (score - baseline)| over
    |score - baseline|, at most `TOLERANCE`. points: of the rule that reached it.
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
    """What has to be known of all texts to split any pair's. means: of each node's texts, by side."""

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
    """Opens the texts of a trained model: encodes them, or takes their vectors from the cache, and counts terms.

    Raises ValueError where there are no words to split (variant graph, control random, no texts on either side), or
    where they led through a language model that was trained along.
    """
    if config.model.variant == "graph" or config.text.features == "random":
        why = f"model.variant is {config.model.variant} and text.features {config.text.features}"
        raise ValueError(f"{why}; this model hears no words, so ask one of variant fused or text with true words")
    if config.text.finetune != "frozen":
        why = f"text.finetune is {config.text.finetune}"
        raise ValueError(
            f"{why}; words are told of a language model as published, so ask a model of text.finetune frozen"
        )
    texts = node_texts(prepared.dataset, prepared.observed)
    if not texts.texts:
        raise ValueError(f"{prepared.dataset.name} has no texts; there are no words to split a score over")
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
    """What each word of the user's and of the item's own texts adds to the score of the pair.

    limit: of each node so many texts are split, those that change the score most, to first order, if the mean of all
    texts took their place. A point costs one pass through the graph and back and one through the encoder and back for
    each text.

    Raises:
      ArithmeticError: 192 points miss the difference of scores by more than `TOLERANCE`.
      ValueError: the texts no longer give the vectors that the graph has.
    """
    rows = user, item
    spaces = [read.whitenings.get(side) for side in SIDES]
    width = read.vectors.shape[1]
    own = np.stack([read.means[side][row] for side, row in zip(SIDES, rows, strict=True)])
    worded = np.array([space is not None and bool(mean.any()) for space, mean in zip(spaces, own, strict=True)])
    centre = np.stack([np.zeros(width) if space is None else space.center for space in spaces])
    matrix = np.stack([np.zeros((width, width)) if space is None else space.matrix for space in spaces])
    space: Any = jax.device_put((worded, centre.astype(np.float32), matrix.astype(np.float32)))
    settings, at = compile_key(read.config), np.array(rows, np.int32)

    def scored(means: Float[np.ndarray, "2 D"]) -> tuple[float, Float32[np.ndarray, "2 D"]]:
        value, slope = _score(settings, read.params, read.graph_inputs, at, means.astype(np.float32), *space)
        return float(value), np.asarray(slope)

    _check_vectors(read, rows, np.asarray(_vectors(own, *space)))
    score, slope = scored(own)
    sides, texts, shares = _chosen(read, rows, worded, slope, centre, limit)
    count = sum(int((_links_of(read.texts, side)[0] == row).sum()) for side, row in zip(SIDES, rows, strict=True))
    moved = _embed_tokens(read, texts)
    # What the texts that are split leave of each mean.
    weight = (sides[None, :] == np.arange(2)[:, None]) * shares[None, :].astype(np.float64)
    rest = own - weight @ read.vectors[texts]
    mute = np.zeros((len(moved), read.model.config.hidden_size), np.float32)
    for place, text in enumerate(moved):
        mute[place] = _encoded(read, text, np.zeros(1))[0]
    baseline, _ = scored(rest + weight @ _joined(read, mute, 0.0 * _counted(read, texts)))
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
        strays = float(np.abs(np.asarray(read.graph_inputs.graph.text(side)[row]) - vector).max())
        if strays > AGREES:
            raise ValueError(
                f"{side} {row}: the texts give another vector than the graph has, by {strays:.1e} and at most "
                f"{AGREES:.0e}; open config, parameters and tables of one and the same run"
            )


def _chosen(
    read: Attributor,
    rows: tuple[int, int],
    worded: Bool[np.ndarray, "2"],
    slope: Float32[np.ndarray, "2 D"],
    centre: Float64[np.ndarray, "2 D"],
    limit: int,
) -> tuple[Int[np.ndarray, "B"], Int[np.ndarray, "B"], Float32[np.ndarray, "B"]]:
    """(0 for the user's and 1 for the item's, text, weight) of the texts that are split."""
    found = []
    for number, (side, row) in enumerate(zip(SIDES, rows, strict=True)):
        at, texts, weights = _links_of(read.texts, side)
        mine = np.flatnonzero(at == row)[: None if worded[number] else 0]
        texts, weights = texts[mine], weights[mine]
        effect = np.abs(weights * ((read.vectors[texts] - centre[number]) @ slope[number]))
        first = np.sort(np.argsort(-effect, kind="stable")[:limit])
        found.append((np.full(len(first), number), texts[first], weights[first]))
    sides, texts, weights = (np.concatenate(part) for part in zip(*found, strict=True))
    return sides, texts, weights


class _EmbeddedTokens(NamedTuple):
    """A text on its way: its tokens, their embeddings [L, H], padded, the mask, and which of them move."""

    tokens: Tokens
    embeddings: Float32[np.ndarray, "L H"]
    mask: Bool[np.ndarray, "L"]
    moves: Bool[np.ndarray, "L"]


def _embed_tokens(read: Attributor, texts: Int[np.ndarray, "B"]) -> list[_EmbeddedTokens]:
    table, found = read.model.params["word"]["embedding"], []
    written = [read.texts.texts[text] for text in texts]
    for cut in tokens(written, read.model, max_tokens=read.config.text.max_tokens) if written else ():
        # Powers of two: few lengths are compiled.
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
    """Vectors of texts as `concat_normalized` makes them, by the scales of all texts."""
    return np.concatenate([encoded / read.scale[0], counted / read.scale[1]], axis=1)


def _encoded(read: Attributor, text: _EmbeddedTokens, shares: Float64[np.ndarray, "n"]) -> Float32[np.ndarray, "n H"]:
    """The encoder's vectors of a text at these shares of the way."""
    model = read.model
    made = [
        _encode(read.weights, _at(text, some), text.mask, model.config, model.pooling, model.normalize)
        for some in _together(shares)
    ]
    return np.concatenate([np.asarray(x) for x in made])[: len(shares)]


def _token_gradients(
    read: Attributor, text: _EmbeddedTokens, shares: Float64[np.ndarray, "n"], slope: Float[np.ndarray, "n H"]
) -> Float32[np.ndarray, "n L"]:
    """By points and tokens: the dot product of each embedding with its gradient, given that of the text's vector."""
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
    """Parts of `TOGETHER` rows each, the last filled up with zeros: one shape is compiled."""
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
    """Values of the tokens [L] of each text and of its terms, by the terms' rows of the lexicon [V]."""
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
    """(start, end, value) of the words that the tokens are parts of, in their order."""
    found: dict[int, tuple[int, int, float]] = {}
    for word, (start, end), value in zip(cut.words, cut.spans, values.tolist(), strict=False):
        if word is not None:
            first, last, before = found.get(word, (start, end, 0.0))
            found[word] = min(first, start), max(last, end), before + value
    return sorted(found.values())


def _with_terms(
    spans: list[tuple[int, int, float]], counted: TfidfModel, text: str, values: Float64[np.ndarray, "V"]
) -> list[tuple[int, int, float]]:
    """The values of terms added to the words they stand in, by characters in common; elsewhere as words of their own.

    All occurrences of a term share its value evenly. What the encoder's limit cuts off is counted all the same.
    """
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
    """`encode` from word embeddings: the tokens at hand are a vocabulary of their own."""
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
    worded: Bool[AnyArray, "2"],
    centre: Float32[AnyArray, "2 D"],
    matrix: Float32[AnyArray, "2 D D"],
) -> Float32[Array, "2 D"]:
    """The two nodes' vectors, as `node_vectors` makes them."""
    out = jnp.einsum("sd,sde->se", means - centre, matrix, precision=jax.lax.Precision.HIGHEST)
    length = jnp.sqrt(jnp.maximum((out * out).sum(1, keepdims=True), 1e-24))
    return jnp.where(worded[:, None], out / length, 0)


@functools.partial(jax.jit, static_argnums=0)
def _score(
    config: Config,
    params: PyTree,
    graph_inputs: GraphInputs,
    rows: Int[AnyArray, "2"],
    means: Float32[AnyArray, "2 D"],
    *space: AnyArray,
) -> tuple[Float32[Array, ""], Float32[Array, "2 D"]]:
    """The score of a pair whose texts have these means, and its gradient in them."""
    graph: Any = graph_inputs.graph
    places = jnp.stack([graph.node_slice(side).start + row for side, row in zip(SIDES, rows, strict=True)])

    def score(means: Array) -> Array:
        text = jnp.asarray(graph.graph.nodes["text"]).at[places].set(_vectors(means, *space))
        changed = graph.replace(graph=graph.graph._replace(nodes={"text": text}))
        users, items = embed_nodes(config, params, dataclasses.replace(graph_inputs, graph=changed))
        return users[rows[0]] @ items[rows[1]]

    return jax.value_and_grad(score)(means)
