"""Token attribution: integrated gradients of scores over the words of the users' and the items' own texts.

Integrated gradients (Sundararajan, Taly and Yan, 2017, arXiv 1703.01365) run from baseline texts to the real texts,
through the language model, whitening, gates and all propagation layers. At position a of the path, token embeddings and
TF-IDF vectors are scaled by a; special tokens, position embeddings and the mask are constant, so that the baseline has
zero token embeddings. The attribution of a token is the dot product of its embedding with the gradient, averaged over
the path; attributions sum to the score minus the baseline score.

Only the text features of the two nodes change. Constant: text of other nodes, text-kNN edges and their weights, the
whitening, and those texts of the two nodes that are not attributed.

The path is divided into panels of few quadrature points. What the words of a panel add up to is known from the scores
at its ends, so that only panels with large errors are divided further. A text is encoded once for its vectors and for
the gradients of all pairs of a group that shares texts.
"""

import dataclasses
import functools
import itertools
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Float64, Int, PyTree

from fused_rec.config import Config
from fused_rec.distributed.devices import AnyArray
from fused_rec.explanation.decomposition import require_trained
from fused_rec.explanation.pair_score import POINTS, SIDES, PairScorer
from fused_rec.text.coverage import foreign_texts
from fused_rec.text.encode import Tokens, tokens
from fused_rec.text.encoders.lora import with_adapters
from fused_rec.text.encoders.registry import apply_encoder
from fused_rec.text.features import TextFeatures, node_means, open_language_model
from fused_rec.text.pretrained import PretrainedModel
from fused_rec.text.tfidf import TfidfModel
from fused_rec.training import finetune
from fused_rec.training.inputs import ModelInputs
from fused_rec.training.sharding import embed_on_one_device
from fused_rec.training.train_step import GraphInputs, compile_key, embed_nodes

LOG = logging.getLogger(__name__)
# The score changes most between 0.05 and 0.5; 16 points for the whole path miss MiniLM by up to 16 %.
PANELS = (0.0, 0.125, 0.25, 0.375, 0.5, 1.0)  # the first panels of the path
NODES = POINTS  # Gauss-Legendre points of a panel
MOST_POINTS = 192
GROUP_TOKENS = 640  # tokens of the texts of the pairs that are integrated together, for the memory of all layers
LENGTHS = (32, 64, 96, 128, 192, 256, 384, 512)  # to which texts are padded: each is a compilation
TOLERANCE = 0.01  # largest relative error of the sum of attributions
LEAST = 1e-4  # smallest denominator of that error relative to the score, near the precision of float32
LIMIT = 4  # texts per node that are attributed
WORDS = 10  # that `largest_words` lists


class Text(NamedTuple):
    """Text of a pair: its side ("user" or "item"), and its weight in the mean of its node's texts.

    foreign: of another language than the encoder reads (`fused_rec.text.coverage`).
    """

    side: str
    text: str
    weight: float
    foreign: bool = False


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
      points: points at which gradients were taken.
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
      model: the language model, fine-tuned where the run is.
      weights: its parameters, on the device.
      features: texts, their vectors, and the fitted transforms.
      vectors: vectors of all texts, as of `TextFeatures.vectors`.
      means: mean text vector of each node, by side.
      embeddings: of all users and of all items.
      scorer: of pairs, None without `model.local_text`.
    """

    config: Config
    params: PyTree
    graph_inputs: GraphInputs
    model: PretrainedModel
    weights: PyTree
    features: TextFeatures
    vectors: Float32[np.ndarray, "T D"]
    means: Mapping[str, Float32[np.ndarray, "_ D"]]
    embeddings: tuple[Float32[np.ndarray, "U _"], Float32[np.ndarray, "I _"]]
    scorer: PairScorer | None

    def slopes(self, rows: tuple[int, int]) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]:
        """Returns the function from text features [n, 2, D] of a pair to scores [n] and gradients."""
        if self.scorer is not None:
            pair = self.scorer.pair(*rows, self.score(rows))
            return functools.partial(self.scorer.scores_and_slopes, pair)
        settings, at = compile_key(self.config), np.array(rows, np.int32)

        def found(text: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            each = [jax.device_get(_score(settings, self.params, self.graph_inputs, at, own)) for own in text]
            return np.stack([value for value, _ in each]), np.stack([slope for _, slope in each])

        return found

    def score(self, rows: tuple[int, int]) -> float:
        """Returns the score of a pair."""
        users, items = self.embeddings
        return float(users[rows[0]] @ items[rows[1]])


def require_text(config: Config) -> None:
    """Checks that the run has a trained model that uses text.

    Args:
      config: settings of the run.

    Raises:
      ValueError: it has not.
    """
    require_trained(config)
    if not config.encodes_text:
        why = f"model.variant is {config.model.variant} and text.features {config.text.features}"
        raise ValueError(
            f"{why}; token attribution needs a variant that uses text (fused or text) with real text features"
        )


def attributor(config: Config, params: PyTree, prepared: ModelInputs) -> Attributor:
    """Prepares token attribution for a trained model.

    Args:
      config: settings of the run.
      params: parameters.
      prepared: tables, split, text features and graph.

    Returns:
      The input of `attribute_tokens`.

    Raises:
      ValueError: the model is a baseline or uses no text (variant graph, features random, or no texts), or the language
        model has a prompt.
    """
    require_text(config)
    features = prepared.text
    if not features.texts.texts:
        raise ValueError(f"{prepared.dataset.name} has no texts; token attribution needs texts")
    model = open_language_model(config.text)
    if model.prompt:
        raise ValueError(
            f"{config.text.model} prepends the prompt {model.prompt!r} to each text; token attribution needs a "
            "language model without a prompt"
        )
    if prepared.encoder_data is not None:
        trained = params[finetune.ENCODER]
        encoded = finetune.encode_all_texts(config, prepared.encoder_data, prepared.graph_inputs, trained, keep=True)
        training: Any = config.text.finetune
        weights = jax.device_get(with_adapters(training, model.params, trained))
        model, features = dataclasses.replace(model, params=weights), features.with_lm(encoded.vectors)
    vectors = features.vectors()
    means = {side: node_means(features.texts.links[side], vectors)[0] for side in SIDES}
    embeddings = jax.device_get(embed_on_one_device(config, params, prepared.graph_inputs))
    scorer = PairScorer(config, params, prepared.graph_inputs) if config.model.local_text else None
    on_device: Any = jax.device_put((params, prepared.graph_inputs, model.params))
    params, graph_inputs, weights = on_device
    return Attributor(config, params, graph_inputs, model, weights, features, vectors, means, embeddings, scorer)


def attribute_tokens(
    read: Attributor,
    pairs: Sequence[tuple[int, int]],
    *,
    limit: int = LIMIT,
    done: Callable[[int], Any] | None = None,
) -> list[TokenAttribution | None]:
    """Attributes the scores of pairs to the words of the users' and the items' own texts.

    Each point of the path costs a backward pass of the encoder per pair and text, and a forward pass per text of a
    group of pairs that share texts.

    Args:
      read: of `attributor`.
      pairs: rows of users and items; those that share texts are best given together.
      limit: texts per node to attribute: those whose replacement by the mean text changes the score most, to first
        order.
      done: called with 1 after each pair.

    Returns:
      The attribution of each pair; None, and a warning, where no number of points leaves an error of `TOLERANCE`.
    """
    paths = [_path(read, rows, limit) for rows in pairs]
    texts = {int(text) for path in paths for text in path.texts}
    embedded, foreign = _embed_tokens(read, sorted(texts)), _foreign(read, sorted(texts))
    found: list[TokenAttribution | None] = [None] * len(pairs)
    for group in _groups(paths, embedded):
        integrals = _integrated(read, [paths[place] for place in group], embedded)
        for place, part in zip(group, integrals, strict=True):
            path = paths[place]
            if part is None:
                LOG.warning("words of user %d and item %d miss the score by more than %g", *pairs[place], TOLERANCE)
            else:
                found[place] = _attribution(read, path, part, embedded, foreign)
            if done is not None:
                done(1)
    return found


def _attribution(
    read: Attributor,
    path: "_Path",
    part: "_Integral",
    embedded: Mapping[int, "_EmbeddedTokens"],
    foreign: Mapping[int, bool],
) -> TokenAttribution:
    values = _values(read, path, part, embedded)
    total = sum(float(own.sum()) for own in (*part.by_token, *part.by_term))
    shown = [
        Text(SIDES[side], read.features.texts.texts[text], float(share), foreign[int(text)])
        for side, text, share in zip(path.sides, path.texts, path.shares, strict=True)
    ]
    error = _error(path, part.baseline, total - (path.score - part.baseline))
    return TokenAttribution(values, shown, path.count - len(shown), path.score, part.baseline, error, part.points)


def _error(path: "_Path", baseline: float, missed: float) -> float:
    """The relative error of a sum of attributions that misses the difference of scores by `missed`."""
    return abs(missed) / max(abs(path.score - baseline), LEAST * abs(path.score), 1e-12)


def largest_words(found: TokenAttribution) -> list[dict[str, Any]]:
    """Lists the `WORDS` words with the largest attributions, as JSON values.

    Args:
      found: of `attribute_tokens`.

    Returns:
      `side` ("user" or "item"), `word` and `value`, summed over the occurrences of a word; without texts of languages
      that the encoder does not read.
    """
    total: dict[tuple[str, str], float] = {}
    for word in found.tokens:
        if not found.texts[word.text].foreign and any(map(str.isalnum, word.token)):
            key = word.side, word.token.lower()
            total[key] = total.get(key, 0.0) + word.value
    largest = sorted(total.items(), key=lambda pair: -abs(pair[1]))[:WORDS]
    return [{"side": side, "word": word, "value": value} for (side, word), value in largest]


def _foreign(read: Attributor, texts: list[int]) -> dict[int, bool]:
    written = [read.features.texts.texts[text] for text in texts]
    return dict(zip(texts, foreign_texts(written, read.model.tokenizer), strict=True))


class _EmbeddedTokens(NamedTuple):
    """Tokens of a text, padded: embeddings [L, H], mask, and which of them are scaled along the path."""

    tokens: Tokens
    embeddings: Float32[np.ndarray, "L H"]
    mask: Bool[np.ndarray, "L"]
    moves: Bool[np.ndarray, "L"]


class _Path(NamedTuple):
    """The straight line from baseline texts to the B attributed texts of a pair.

    Attributes:
      rows: the user's and the item's.
      slopes: scores and gradients at text features [n, 2, D].
      score: at the end.
      texts: the texts.
      sides: index into `SIDES` of each text.
      shares: weight of each text in the mean of its node.
      weight: the shares as a matrix, from texts to nodes.
      rest: mean of each node without the attributed texts.
      count: texts of both nodes.
    """

    rows: tuple[int, int]
    slopes: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
    score: float
    texts: Int[np.ndarray, "B"]
    sides: Int[np.ndarray, "B"]
    shares: Float32[np.ndarray, "B"]
    weight: Float64[np.ndarray, "2 B"]
    rest: Float64[np.ndarray, "2 D"]
    count: int


class _Part(NamedTuple):
    """Attributions of the tokens [L] and of the TF-IDF terms of each text in one panel of a path."""

    by_token: list[np.ndarray]
    by_term: list[np.ndarray]

    def total(self) -> float:
        """Their sum."""
        return sum(float(values.sum()) for values in (*self.by_token, *self.by_term))


class _Integral(NamedTuple):
    """The same of a whole path, the score at its start, and the number of points."""

    by_token: list[np.ndarray]
    by_term: list[np.ndarray]
    baseline: float
    points: int


def _path(read: Attributor, rows: tuple[int, int], limit: int) -> _Path:
    own = np.stack([read.means[side][row] for side, row in zip(SIDES, rows, strict=True)]).astype(np.float64)
    slopes = read.slopes(rows)
    _, [slope] = _scored(read, rows, slopes, own[None])
    found, count = [], 0
    for number, (side, row) in enumerate(zip(SIDES, rows, strict=True)):
        links = read.features.texts.links[side]
        mine = np.flatnonzero(links.nodes == row)
        by, count = read.features.fitted.whitening[side], count + len(mine)
        mine = mine[: None if by is not None and own[number].any() else 0]
        texts, weights = links.texts[mine], links.weights[mine]
        center = 0 if by is None else by.center
        effect = np.abs(weights * ((read.vectors[texts] - center) @ slope[number]))
        first = np.sort(np.argsort(-effect, kind="stable")[:limit])
        found.append((np.full(len(first), number), texts[first], weights[first]))
    sides, texts, shares = (np.concatenate(part) for part in zip(*found, strict=True))
    weight = (sides[None, :] == np.arange(2)[:, None]) * shares[None, :].astype(np.float64)
    rest = own - weight @ read.vectors[texts]
    return _Path(rows, slopes, read.score(rows), texts, sides, shares, weight, rest, count)


def _scored(
    read: Attributor, rows: tuple[int, int], slopes: Callable, means: Float64[np.ndarray, "n 2 D"]
) -> tuple[Float[np.ndarray, "n"], Float[np.ndarray, "n 2 D"]]:
    """Scores with these mean text vectors of the two nodes, and gradients with respect to them."""
    text, whitened = np.zeros(means.shape, np.float32), []
    for number, (side, row) in enumerate(zip(SIDES, rows, strict=True)):
        by = read.features.fitted.whitening[side]
        if by is None or not read.means[side][row].any():
            continue
        out = (means[:, number] - by.center) @ by.matrix
        length = np.sqrt(np.maximum((out * out).sum(1, keepdims=True), 1e-24))
        text[:, number] = out / length
        whitened.append((number, by.matrix, out / length, length))
    score, slope = slopes(text)
    back = np.zeros(means.shape)
    for number, matrix, unit, length in whitened:
        own = slope[:, number].astype(np.float64)
        back[:, number] = ((own - (own * unit).sum(1, keepdims=True) * unit) / length) @ matrix.T
    return score, back


def _groups(paths: Sequence[_Path], embedded: Mapping[int, _EmbeddedTokens]) -> list[list[int]]:
    """Divides pairs into groups of few tokens, of pairs that share the user or the item where they share more."""
    users, items = (len({path.rows[side] for path in paths}) for side in (0, 1))
    by = int(users > items)
    groups: list[list[int]] = []
    texts: set[int] = set()
    for place in sorted(range(len(paths)), key=lambda place: paths[place].rows[by]):
        mine = texts.union(paths[place].texts.tolist())
        if not groups or sum(len(embedded[text].mask) for text in mine) > GROUP_TOKENS:
            groups.append([])
            mine = set(paths[place].texts.tolist())
        groups[-1].append(place)
        texts = mine
    return groups


class _PathSum:
    """The panels of a path so far."""

    def __init__(self, path: _Path):
        self.path, self.points = path, 0
        self.parts: dict[tuple[float, float], _Part] = {}
        self.scores = {1.0: path.score}  # by position

    def errors(self) -> dict[tuple[float, float], float]:
        """By panel, what its attributions miss the difference of scores by."""
        return {
            (low, high): part.total() - (self.scores[high] - self.scores[low])
            for (low, high), part in self.parts.items()
        }

    def wanted(self) -> list[tuple[float, float]]:
        """The panels to compute: at first all, then the halves of the one with the largest error, until none."""
        if not len(self.path.texts):
            return []
        if not self.parts:
            return list(itertools.pairwise(PANELS))
        errors = self.errors()
        if self.precise() or self.points + 2 * NODES > MOST_POINTS:
            return []
        low, high = max(errors, key=lambda panel: abs(errors[panel]))
        del self.parts[low, high]
        return [(low, (low + high) / 2), ((low + high) / 2, high)]

    def precise(self) -> bool:
        """Whether the errors are small."""
        missed = sum(map(abs, self.errors().values()))
        return _error(self.path, self.scores[0.0], missed) <= TOLERANCE

    def integral(self) -> _Integral | None:
        """The sums over panels; None where they are not precise."""
        if not len(self.path.texts):
            return _Integral([], [], self.path.score, 0)
        if not self.precise():
            return None
        by_token, by_term = (
            [np.sum(own, axis=0) for own in zip(*(part[kind] for part in self.parts.values()), strict=True)]
            for kind in (0, 1)
        )
        return _Integral(by_token, by_term, self.scores[0.0], self.points)


def _integrated(
    read: Attributor, paths: Sequence[_Path], embedded: Mapping[int, _EmbeddedTokens]
) -> list[_Integral | None]:
    """Integrates the attributions along each path of a group; None where no number of points suffices."""
    sums = [_PathSum(path) for path in paths]
    while True:
        asked: dict[tuple[float, float], list[_PathSum]] = {}
        for one in sums:
            for panel in one.wanted():
                asked.setdefault(panel, []).append(one)
        if not asked:
            return [one.integral() for one in sums]
        _add_scores(read, sums, embedded, asked)
        for (low, high), members in asked.items():
            parts = _panel(read, [one.path for one in members], embedded, low, high)
            for one, part in zip(members, parts, strict=True):
                one.parts[low, high] = part
                one.points += NODES


def _add_scores(
    read: Attributor,
    sums: Sequence[_PathSum],
    embedded: Mapping[int, _EmbeddedTokens],
    asked: Mapping[tuple[float, float], Sequence[_PathSum]],
) -> None:
    """Adds the scores at the ends of panels."""
    ends = {id(one): sorted({end for panel, of in asked.items() if one in of for end in panel} - {*one.scores})
            for one in sums}  # fmt: skip
    for shares in {tuple(own) for own in ends.values() if own}:
        members = [one for one in sums if tuple(ends[id(one)]) == shares]
        step = _step([one.path for one in members], embedded)
        for start in range(0, len(shares), step):
            some = np.array(shares[start : start + step])
            padded = np.pad(some, (0, step - len(some)), mode="edge")
            pulls = _pulls(read, [one.path for one in members], embedded, padded)
            for one in members:
                scored, _ = _scored_at(read, one.path, pulls, padded)
                one.scores.update(zip(some.tolist(), scored.tolist(), strict=False))


def _step(paths: Sequence[_Path], embedded: Mapping[int, _EmbeddedTokens]) -> int:
    """Points per call of the encoder: the backward pass keeps all layers, of long texts at one point."""
    texts = {int(text) for path in paths for text in path.texts}
    return NODES if sum(len(embedded[text].mask) for text in texts) <= GROUP_TOKENS else 1


def _pulls(
    read: Attributor, paths: Sequence[_Path], embedded: Mapping[int, _EmbeddedTokens], shares: Float64[np.ndarray, "n"]
) -> dict[int, tuple[np.ndarray, Any]]:
    """Encodes the texts of paths at these positions: vectors [n, H], and what their derivatives take."""
    found = {}
    for text in sorted({int(text) for path in paths for text in path.texts}):
        one = embedded[text]
        vectors, back = _encode_and_pull(read.weights, _at(one, shares), one.mask, _encoder(read.model))
        found[text] = np.asarray(vectors), back
    return found


def _scored_at(
    read: Attributor, path: _Path, pulls: Mapping[int, tuple[np.ndarray, Any]], shares: Float64[np.ndarray, "n"]
) -> tuple[Float[np.ndarray, "n"], Float[np.ndarray, "n B D"]]:
    """Scores at these positions, and their gradients with respect to the vectors of the texts."""
    own = np.stack([pulls[int(text)][0] for text in path.texts], axis=1)
    means = np.repeat(path.rest[None], len(shares), axis=0)
    for point, share in enumerate(shares):
        counted = share * read.features.tfidf.vectors[path.texts]
        means[point] += path.weight @ read.features.fitted.scales.concat(own[point], counted)
    score, slope = _scored(read, path.rows, path.slopes, means)
    return score, np.einsum("sb,nsd->nbd", path.weight, slope)


def _panel(
    read: Attributor, paths: Sequence[_Path], embedded: Mapping[int, _EmbeddedTokens], low: float, high: float
) -> list[_Part]:
    """Integrates the attributions of each path over one panel."""
    nodes, parts = np.polynomial.legendre.leggauss(NODES)
    shares, parts = low + (high - low) * (nodes + 1) / 2, (high - low) * parts / 2
    fitted, tfidf, hidden = read.features.fitted, read.features.tfidf, read.features.fitted.lm_width
    found = [_Part([np.zeros(len(embedded[int(text)].mask)) for text in path.texts], []) for path in paths]
    means = [np.zeros((len(path.texts), tfidf.vectors.shape[1])) for path in paths]
    step = _step(paths, embedded)
    for start in range(0, NODES, step):
        some = slice(start, start + step)
        pulls = _pulls(read, paths, embedded, shares[some])
        for path, part, mean in zip(paths, found, means, strict=True):
            _, slope = _scored_at(read, path, pulls, shares[some])
            slope = slope * parts[some, None, None]
            mean += slope[:, :, hidden:].sum(0) / fitted.scales.tfidf
            for place, text in enumerate(path.texts.tolist()):
                one, own = embedded[text], (slope[:, place, :hidden] / fitted.scales.lm).astype(np.float32)
                moving = np.where(one.moves[:, None], one.embeddings, 0)
                part.by_token[place] += np.asarray(_pulled(pulls[text][1], own, moving))
    for path, part, mean in zip(paths, found, means, strict=True):
        for place, text in enumerate(path.texts.tolist()):
            row = tfidf.weights[[text]]
            part.by_term.append(row.data * (fitted.tfidf.directions[row.indices] @ mean[place]))
    return found


def _values(
    read: Attributor, path: _Path, part: _Integral, embedded: Mapping[int, _EmbeddedTokens]
) -> list[TokenValue]:
    """Merges the attributions of tokens and terms into words, in the order of texts and positions."""
    found = []
    for place, text in enumerate(path.texts):
        written, side = read.features.texts.texts[text], SIDES[path.sides[place]]
        terms = read.features.tfidf.weights[[int(text)]].indices.tolist()
        by_term = dict(zip(terms, part.by_term[place].tolist(), strict=True))
        spans = _spans(embedded[int(text)].tokens, part.by_token[place])
        spans = _with_terms(spans, read.features.fitted.tfidf, written, by_term)
        found += [TokenValue(side, place, start, end, written[start:end], value) for start, end, value in spans]
    return found


def _embed_tokens(read: Attributor, texts: Sequence[int]) -> dict[int, _EmbeddedTokens]:
    table, found = read.model.params["word"]["embedding"], {}
    written = [read.features.texts.texts[text] for text in texts]
    every = tokens(written, read.model, max_tokens=read.config.text.max_tokens) if written else ()
    for text, cut in zip(texts, every, strict=True):
        length = next((length for length in LENGTHS if length >= len(cut.ids)), -(-len(cut.ids) // 512) * 512)
        length = min(length, read.model.config.max_position_embeddings)
        fill = (0, length - len(cut.ids))
        ids, mask = np.pad(cut.ids, fill), np.arange(length) < len(cut.ids)
        embeddings = np.asarray(table[ids]).astype(np.float32)
        found[text] = _EmbeddedTokens(cut, embeddings, mask, mask & ~np.pad(cut.special, fill))
    return found


def _encoder(model: PretrainedModel) -> tuple:
    """The static arguments of `apply_encoder`."""
    return model.config, model.pooling, model.normalize


def _at(text: _EmbeddedTokens, shares: Float[np.ndarray, "n"]) -> Float32[np.ndarray, "n L H"]:
    factor = np.where(text.moves[None, :], shares[:, None], 1.0)
    return (factor[:, :, None] * text.embeddings[None]).astype(np.float32)


def _spans(cut: Tokens, values: Float64[np.ndarray, "L"]) -> list[tuple[int, int, float]]:
    """Sums token attributions by word: (start, end, value) in order."""
    found: dict[int, tuple[int, int, float]] = {}
    for word, (start, end), value in zip(cut.words, cut.spans, values.tolist(), strict=False):
        if word is not None:
            first, last, before = found.get(word, (start, end, 0.0))
            found[word] = min(first, start), max(last, end), before + value
    return sorted(found.values())


def _with_terms(
    spans: list[tuple[int, int, float]], counted: TfidfModel, text: str, values: Mapping[int, float]
) -> list[tuple[int, int, float]]:
    """Adds term attributions, divided over their occurrences, to the words they overlap, else as separate spans."""
    places = list(counted.occurrences(text))
    often = Counter(row for *_, row in places)
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
def _encode_and_pull(
    weights: PyTree, embeddings: Float32[AnyArray, "n L H"], mask: Bool[AnyArray, "L"], encoder: tuple
) -> Any:
    """Encodes, and returns the function from gradients of the vectors to those of the token embeddings too."""
    return jax.vjp(lambda x: _encode(weights, x, mask, encoder), jnp.asarray(embeddings))


@jax.jit
def _pulled(back: Any, slopes: Float32[AnyArray, "n H"], own: Float32[AnyArray, "L H"]) -> Float32[Array, "L"]:
    """Gradients of the token embeddings times `own`, summed over points."""
    return jnp.einsum("nlh,lh->l", back(jnp.asarray(slopes))[0], own)


@functools.partial(jax.jit, static_argnums=0)
def _score(
    config: Config, params: PyTree, graph_inputs: GraphInputs, rows: Int[AnyArray, "2"], text: Float32[AnyArray, "2 D"]
) -> tuple[Float32[Array, ""], Float32[Array, "2 D"]]:
    """Returns the score of a pair with these text features, and its gradient."""
    graph = graph_inputs.graph

    def score(text: Array) -> Array:
        vectors = zip(SIDES, rows, text, strict=True)
        changed = graph.with_text({side: jnp.asarray(graph.text[side]).at[row].set(x) for side, row, x in vectors})
        users, items = embed_nodes(config, params, dataclasses.replace(graph_inputs, graph=changed))
        return users[rows[0]] @ items[rows[1]]

    return jax.value_and_grad(score)(text)
