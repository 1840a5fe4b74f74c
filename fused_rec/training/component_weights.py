"""Weights of the components of the fused score, by forward selection on the validation split.

The fused score is a weighted sum of components (`fused_rec.model.late_fusion`): the trained model, each of its
branches, and closed-form recommenders. Scores of a component are standardized per user, so one weight per component is
enough.

Selection is that of Caruana et al. (2004) with two changes. A step is taken only where its mean gain in NDCG@10 exceeds
`MIN_GAIN` standard errors of the gain over the users: on small or uninformative validation splits the sum stays where
it starts. And it starts from the best component alone only where that leads by as much, otherwise from the sum of the
best trained and the best closed-form one: where validation cannot tell them apart, the sum is better on average.
"""

import dataclasses
import functools
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float32, Int

from fused_rec.evaluation.item_sets import UserItemSets
from fused_rec.evaluation.top_k import TieBreak, random_order, top_k_filtered
from fused_rec.model.late_fusion import MIN_VARIANCE

LOG = logging.getLogger(__name__)

K = 10  # the cutoff of NDCG
MAX_USERS = 5000  # validation users that are ranked, at most
DEPTH = 100  # best items of each component among which a sum is ranked
MIN_GAIN = 1.5  # standard errors
FIRST_WEIGHTS = (0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 1.0, 1.5, 2.0)  # of a component that joins the sum
CHANGES = (0.0, 0.5, 0.75, 1.33, 2.0)  # factors of the weight of one that is in it
MAX_MOVES = 12
FALLBACK = 1e-5  # standard deviations of popularity, beside scores of standard deviation 1
ROUNDING = 1e-6  # of the largest score of a user: their standard deviation, where equal scores are computed in float32
CHUNK = 1 << 25  # scores that are held at once


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A component with one choice of settings: score(u, i) = <users_u, items_i>.

    Attributes:
      name: of the component; among candidates of one name validation chooses one.
      settings: plain values.
      users: float32 [V, R], of the ranked users.
      items: float32 [I, R].
      trained: whether it is the trained model or a branch of it; others are closed forms.
    """

    name: str
    settings: Mapping[str, Any]
    users: Float32[np.ndarray, "V R"]
    items: Float32[np.ndarray, "I R"]
    trained: bool

    @functools.cached_property
    def item_variance(self) -> float:
        """The sum of the variances of the columns of `items`."""
        return float(self.items.var(0).sum())


@dataclasses.dataclass(frozen=True)
class ValidationUsers:
    """The users of the selection and what is ranked for them.

    Attributes:
      users: user rows.
      truth: held-out items of all users.
      seen: items of all users that are not ranked.
      allowed: bool [I], the candidates of the split.
      popularity: float32 [I], by which items are ordered that a component does not order.
    """

    users: Int[np.ndarray, "V"]
    truth: UserItemSets
    seen: UserItemSets
    allowed: Bool[np.ndarray, "I"]
    popularity: Float32[np.ndarray, "I"]


@dataclasses.dataclass(frozen=True)
class Selection:
    """Weights of the components, and what they were chosen from.

    Attributes:
      weights: by name; components of weight 0 are left out.
      settings: by name, of the components in `weights`.
      single: validation NDCG@10 of each component alone, with its best settings.
      fused: validation NDCG@10 of the weighted sum.
      users: number of validation users.
      launch: weights of the launch prior (`fused_rec.baselines.launch.Launch`), which is selected afterwards; None: no
        prior.
    """

    weights: Mapping[str, float]
    settings: Mapping[str, Mapping[str, Any]]
    single: Mapping[str, float]
    fused: float
    users: int
    launch: Mapping[str, float] | None = None


def select_weights(candidates: Iterable[Candidate], on: ValidationUsers) -> Selection:
    """Chooses settings and weights of the components.

    Args:
      candidates: components with their settings; generated one by one, so that only the chosen ones are held.
      on: validation users.

    Returns:
      The selection. Its weights are those of standardized scores.
    """
    best: dict[str, tuple[np.ndarray, Candidate]] = {}
    for candidate in candidates:
        values = _ndcg_of(candidate, on)
        LOG.info("%s %s: validation ndcg@%d %.4f", candidate.name, dict(candidate.settings), K, values.mean())
        if candidate.name not in best or values.mean() > best[candidate.name][0].mean():
            best[candidate.name] = values, candidate
    single = {name: float(values.mean()) for name, (values, _) in best.items()}
    chosen = [candidate for _, candidate in best.values()]
    lists = _short_lists(chosen, on)
    start = start_of([(values, candidate.trained) for values, candidate in best.values()])
    LOG.info("late fusion starts from %s", " and ".join(chosen[number].name for number in start))
    weights, value = forward_selection(lists, start)
    used = {c.name: w for c, w in zip(chosen, weights, strict=True) if w}
    LOG.info("late fusion: %s, validation ndcg@%d %.4f", used, K, value)
    return Selection(used, {n: dict(best[n][1].settings) for n in used}, single, value, len(on.users))


def start_of(components: Sequence[tuple[Float32[np.ndarray, "V"], bool]]) -> list[int]:
    """Chooses the components from whose sum the selection starts.

    Args:
      components: for each component, the NDCG@10 of every user, and whether it is trained.

    Returns:
      The number of the best one; where it leads the best one of the other kind, trained or closed-form, by at most
      `MIN_GAIN` standard errors of the difference over the users, the numbers of both.
    """

    def best(numbers: Iterable[int]) -> int:
        return max(numbers, key=lambda number: float(components[number][0].mean()))

    first = best(range(len(components)))
    others = [number for number, (_, trained) in enumerate(components) if trained != components[first][1]]
    if not others:
        return [first]
    lead = components[first][0] - components[other := best(others)][0]
    return [first] if lead.mean() > MIN_GAIN * standard_error(lead) else [first, other]


def standard_error(values: Float32[np.ndarray, "V"]) -> float:
    """Computes the standard error of a mean over users, infinite for a single one."""
    return float(values.std()) / len(values) ** 0.5 if len(values) > 1 else math.inf


@dataclasses.dataclass(frozen=True)
class ShortLists:
    """Items that any component ranks high for V users, M a user, with the scores of all components.

    Attributes:
      scores: float32 [C, V, M], standardized; 0 where a list is shorter.
      listed: bool [V, M], False where a list is shorter.
      truth: bool [V, M], which of them are held out.
      n_truth: [V], held-out items of each user, listed or not.
      fallback: float32 [V, M], order of items with equal sums.
    """

    scores: Float32[np.ndarray, "C V M"]
    listed: Bool[np.ndarray, "V M"]
    truth: Bool[np.ndarray, "V M"]
    n_truth: Int[np.ndarray, "V"]
    fallback: Float32[np.ndarray, "V M"]

    def ndcg(self, total: Float32[np.ndarray, "V M"]) -> Float32[np.ndarray, "V"]:
        """Computes the NDCG@10 of each user by these scores of the listed items."""
        return ndcg_of_lists(np.where(self.listed, total + self.fallback, -np.inf), self.truth, self.n_truth)


def forward_selection(lists: ShortLists, start: Iterable[int]) -> tuple[list[float], float]:
    """Adds, changes and removes components while the gain exceeds its own noise.

    Args:
      lists: scores of the components.
      start: the components that the sum starts from, each with weight 1.

    Returns:
      The weight of each component, 0 where it is left out, and the mean NDCG@10 of the sum.
    """
    weights = [0.0] * len(lists.scores)
    total = np.zeros_like(lists.fallback)
    for number in start:
        weights[number] = 1.0
        total += lists.scores[number]
    values = lists.ndcg(total)
    for _ in range(MAX_MOVES):
        found = [move for number in range(len(weights)) for move in _moves(lists, weights, total, values, number)]
        if not found:
            break
        _, number, weight = max(found)
        total += np.float32(weight - weights[number]) * lists.scores[number]
        weights[number], values = weight, lists.ndcg(total)
    return weights, float(values.mean())


def _moves(lists: ShortLists, weights: list[float], total, values, number: int) -> Iterator[tuple[float, int, float]]:
    """Yields (gain, component, weight) of each other weight of a component whose gain exceeds its noise."""
    now = weights[number]
    for weight in [now * change for change in CHANGES] if now else FIRST_WEIGHTS:
        if sum(weights) - now + weight == 0:
            continue
        gain = lists.ndcg(total + np.float32(weight - now) * lists.scores[number]) - values
        if gain.mean() > max(MIN_GAIN * standard_error(gain), 1e-6):
            yield float(gain.mean()), number, weight


def ndcg_of_lists(
    scores: Float32[np.ndarray, "V M"], truth: Bool[np.ndarray, "V M"], n_truth: Int[np.ndarray, "V"]
) -> Float32[np.ndarray, "V"]:
    """Computes NDCG@K of each user's listed items, as `fused_rec.evaluation.metrics.ndcg` does.

    Args:
      scores: of the listed items; -inf where a list is shorter.
      truth: which of them are held out.
      n_truth: held-out items of each user, listed or not.

    Returns:
      Float32 [V].
    """
    first = best_items(scores, np.isfinite(scores), K)
    # Short lists are filled with items that are not listed, and these are no truth.
    hits = np.take_along_axis(truth & np.isfinite(scores), first, axis=1)
    hits = np.pad(hits, ((0, 0), (0, max(0, K - hits.shape[1]))))
    discount = 1 / np.log2(np.arange(2, K + 2))
    ideal = np.concatenate([[1], np.cumsum(discount)])[np.minimum(n_truth, K)]  # 1: no held-out item, no hit
    return ((hits * discount).sum(1) / ideal).astype(np.float32)


def best_items(scores: Float32[np.ndarray, "B I"], eligible: Bool[np.ndarray, "B I"], k: int) -> Int[np.ndarray, "B k"]:
    """Returns the best eligible items, best first; a list with fewer than k ends with items that are not eligible.

    Args:
      scores: of all items, finite where eligible.
      eligible: the candidates.
      k: length of the lists, at most I.
    """
    order = random_order(scores.shape[1], 0)
    found = np.array(_best_items(np.where(eligible, scores, 0), eligible, order, min(k, scores.shape[1])))
    first_other = np.argmin(eligible, axis=1)
    return np.where(found < 0, first_other[:, None], found)


@functools.partial(jax.jit, static_argnums=3)
def _best_items(scores: Any, eligible: Any, order: TieBreak, k: int) -> jax.Array:
    return top_k_filtered(scores, eligible, order, k)[0]


def _ndcg_of(candidate: Candidate, on: ValidationUsers) -> Float32[np.ndarray, "V"]:
    """NDCG@K of one component alone, over the whole catalogue."""
    parts = []
    for rows, masked, truth in user_batches(on, 1):
        scores = np.where(masked, -np.inf, standardized_scores(candidate, rows) + _fallback(on))
        parts.append(ndcg_of_lists(scores, truth, truth.sum(1)))
    return np.concatenate(parts)


def _fallback(on: ValidationUsers) -> Float32[np.ndarray, "I"]:
    """Popularity, so small that it orders only items which a component does not order, as in the final score."""
    spread = on.popularity.std()
    return np.float32(FALLBACK) * on.popularity / np.float32(spread if spread > 0 else 1)


def standardized_scores(candidate: Candidate, rows: slice) -> Float32[np.ndarray, "B I"]:
    """Computes standardized scores of some users, as `fused_rec.model.late_fusion` does on devices.

    In NumPy: candidates have many shapes, and each would be compiled.

    Args:
      candidate: the component.
      rows: B of its users.

    Returns:
      Float32 [B, I].

    Raises:
      FloatingPointError: scores that are not finite.
    """
    users = candidate.users[rows]
    scores = users @ candidate.items.T
    variance = scores.var(1)
    if not np.isfinite(variance).all() and not np.isfinite(scores).all():  # the variance of finite ones may overflow
        raise FloatingPointError(
            f"late fusion: component {candidate.name} with {dict(candidate.settings)} has scores that are not finite; "
            "train with model.late_fusion=False, or look for extreme values in the tables"
        )
    rounding = np.maximum(
        MIN_VARIANCE * (users * users).sum(1) * candidate.item_variance, (ROUNDING * np.abs(scores).max(1)) ** 2
    )
    varies = variance > rounding
    scores *= np.where(varies, 1 / np.sqrt(np.where(varies, variance, 1)), 0).astype(np.float32)[:, None]
    return scores


def user_batches(on: ValidationUsers, components: int):
    """Yields (rows of `on.users`, items that are not ranked, held-out items), for as many users as fit a chunk.

    Args:
      on: the ranked users.
      components: number of components whose scores are held at once.
    """
    n_items = len(on.allowed)
    step = max(1, CHUNK // (n_items * components))
    for first in range(0, len(on.users), step):
        rows = slice(first, first + step)
        seen, truth = (_mask(sets, on.users[rows], n_items) for sets in (on.seen, on.truth))
        masked = seen | ~on.allowed[None, :]
        yield rows, masked, truth & ~masked


def _mask(sets: UserItemSets, users: Int[np.ndarray, "B"], n_items: int) -> Bool[np.ndarray, "B I"]:
    mask = np.zeros((len(users), n_items), bool)
    for row, user in enumerate(users):
        mask[row, sets.items[sets.indptr[user] : sets.indptr[user + 1]]] = True
    return mask


def _short_lists(chosen: Sequence[Candidate], on: ValidationUsers) -> ShortLists:
    """Lists the items that any component ranks among its first `DEPTH`.

    An item that no component ranks so high reaches the first ten of a sum so rarely that the whole catalogue need not
    be ranked for each choice of weights. Held-out items are listed on the same terms as others: without the unlisted
    items that rank like them, they would have too few rivals.
    """
    parts = []
    for rows, masked, truth in user_batches(on, len(chosen)):
        found = np.stack([standardized_scores(candidate, rows) for candidate in chosen])
        listed = np.zeros_like(truth)
        for own in found:
            np.put_along_axis(listed, best_items(own + _fallback(on), ~masked, DEPTH), True, axis=1)
        listed &= ~masked
        row, item = np.nonzero(listed)
        place = np.arange(len(row)) - np.searchsorted(row, row)  # nonzero gives rows in order
        order = np.zeros((len(listed), max(1, int(listed.sum(1).max(initial=0)))), np.int64)
        kept = np.zeros(order.shape, bool)
        order[row, place], kept[row, place] = item, True
        scores = np.where(kept, np.take_along_axis(found, order[None], axis=2), 0)
        hits = np.take_along_axis(truth, order, axis=1) & kept
        parts.append((scores, kept, hits, _fallback(on)[order], truth.sum(1)))
    width = max(part[1].shape[1] for part in parts)
    scores, listed, truth, fallback = (
        np.concatenate([_padded(part[field], width) for part in parts], axis=-2) for field in range(4)
    )
    n_truth = np.concatenate([part[4] for part in parts])
    return ShortLists(scores.astype(np.float32), listed, truth, n_truth, fallback.astype(np.float32))


def _padded(values: np.ndarray, width: int) -> np.ndarray:
    return np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, width - values.shape[-1])])
