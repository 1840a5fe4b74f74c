"""Full-catalogue ranking and evaluation: every item is scored for every user, without sampled candidates.

U users, I items, R rules; B users per batch, k ranks; V users that are ranked. Dense [B, I] scores exist for one batch
at a time, and only here.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float, Float32, Int, Int32, Shaped
from tqdm import tqdm

from fused_rec.config import KS
from fused_rec.distributed.devices import (
    SHARDED,
    AnyArray,
    Shards,
    device_put,
    pmap_over_devices,
    select_devices,
    shard_rows,
)
from fused_rec.evaluation import metrics
from fused_rec.evaluation.item_sets import (
    PaddedSets,
    UserItemSets,
    check_disjoint,
    check_sets,
    item_sets,
    padded_batches,
)
from fused_rec.evaluation.top_k import TieBreak, random_order, top_k_filtered
from fused_rec.memory import require_device_memory, require_memory

Scorer = Callable[[Int32[Array, "B"]], Float[Array, "B I"]]
"""Function from users [B] to scores of all items [B, I], traceable by JAX.

Prefer a `jax.tree_util.Partial` of a function and its arrays: it is an argument of the compiled step, so new parameters
need no new compilation. A closure compiles once per closure, and JAX's compilation cache keeps its arrays alive.
"""

# Scores per device and batch; a mask adds a quarter of their bytes. Measured on 2 CPU cores with 40,981 items: batches
# of 64 users (10 MB) are more than twice as fast as 256, whose memory the allocator returns to the system each time;
# after `devices.keep_memory` they differ by less than an eighth. Each batch reads all item vectors: with a million
# items 64 users at a time are 1.6 times as fast as 16. The value for accelerators is not measured.
SCORES_PER_DEVICE, SCORES_PER_ACCELERATOR = 3 << 20, 1 << 27
MIN_USERS_PER_BATCH, MAX_USERS_PER_BATCH = 64, 8192
COVERAGE_K = 10  # cutoff of coverage and novelty
LISTS = 4096  # whose metrics are computed together; of one shape, they are compiled once for all scorers and splits


def users_per_batch(n_items: int) -> int:
    """Returns the default batch size per device: a power of two from 64 to 8192."""
    at_once = SCORES_PER_DEVICE if jax.default_backend() == "cpu" else SCORES_PER_ACCELERATOR
    fitting = at_once // max(n_items, 1)
    return min(max(1 << max(fitting.bit_length() - 1, 0), MIN_USERS_PER_BATCH), MAX_USERS_PER_BATCH)


@dataclasses.dataclass(frozen=True)
class CandidateFilter:
    """Filter of (user, item) candidates: a pair must pass every test and be in no excluded set.

    Attributes:
      names: of the tests, followed by those of the excluded sets.
      tests: functions from users [B] to Bool [B, I], True where the item passes; like `Scorer`, each is a
        `Partial` of a function and its arrays.
      excluded: sets of items that each user must not get, for rules about pairs rather than attributes.
      items: rows of the items that are candidates of any user; None = all.
    """

    names: tuple[str, ...] = ()
    tests: tuple[Partial, ...] = ()
    excluded: tuple[UserItemSets, ...] = ()
    items: Int[np.ndarray, "C"] | None = None

    def without(self, name: str) -> "CandidateFilter":
        """Returns the filter without the rule of that name."""
        kept = [index for index, other in enumerate(self.names) if other != name]
        n = len(self.tests)
        return CandidateFilter(
            tuple(self.names[index] for index in kept),
            tuple(self.tests[index] for index in kept if index < n),
            tuple(self.excluded[index - n] for index in kept if index >= n),
            self.items,
        )


@dataclasses.dataclass(frozen=True)
class RankingSpec:
    """What may be recommended to whom, and how rankings are computed.

    Attributes:
      seen: items that are never recommended to the user.
      n_items: I.
      candidates: items that may be recommended; None = all.
      filter: filter of (user, item) candidates.
      batch_size: users per batch and device, of which the last batch is padded; None = `users_per_batch`.
      devices: number of devices that share the users; None = all.
      seed: random seed of the order of equal scores (`TieBreak`).
      progress: label of the progress bar; empty = no bar.

    Raises:
      ValueError: no candidate, or one outside 0..n_items-1; a batch size below 1.
    """

    seen: UserItemSets
    n_items: int
    candidates: Int[np.ndarray, "C"] | None = None
    filter: CandidateFilter = CandidateFilter()
    batch_size: int | None = None
    devices: int | None = None
    seed: int = 0
    progress: str = ""

    def __post_init__(self):
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}; it must be at least 1")
        if (given := self.candidates) is not None and (
            len(given) == 0 or given.min() < 0 or given.max() >= self.n_items
        ):
            raise ValueError(f"candidates must be one or more items in 0..{self.n_items - 1}; got {given}")

    @property
    def users_at_once(self) -> int:
        """Users per batch and device."""
        return self.batch_size or users_per_batch(self.n_items)

    def candidate_mask(self) -> Bool[np.ndarray, "I"]:
        """Returns which items are candidates."""
        mask = np.full(self.n_items, self.candidates is None)
        if self.candidates is not None:
            mask[self.candidates] = True
        if self.filter.items is not None:
            mask &= np.isin(np.arange(self.n_items), self.filter.items)
        return mask


@dataclasses.dataclass(frozen=True)
class UserMetrics:
    """Metrics of V evaluated users.

    Attributes:
      users: user rows.
      metrics: by name ("recall@10", "auc", ...), a value per user; NaN where it is undefined (AUC without a pair).
      aggregate: metrics of all users together ("coverage@10").
    """

    users: Int32[np.ndarray, "V"]
    metrics: Mapping[str, Float32[np.ndarray, "V"]]
    aggregate: Mapping[str, float]


def mean(per_user: UserMetrics) -> dict[str, float]:
    """Averages each metric over users in float64, ignoring NaN, and adds the aggregate metrics."""
    means = {}
    for name, values in per_user.metrics.items():
        known = values[~np.isnan(values)]
        means[name] = float(known.mean(dtype=np.float64)) if len(known) else math.nan
    return means | dict(per_user.aggregate)


class FilteredRanking(NamedTuple):
    """Rankings of V users with and without R rules, and the number of excluded candidates.

    Attributes:
      items: the k best items that pass every rule; -1 if fewer do.
      scores: their scores; -inf if fewer.
      before: the k best items without rules; -1 if fewer.
      passes: whether each item of `before` passes each rule, in the order of `CandidateFilter.names`; False at empty
        ranks.
      excluded: number of candidates that each rule refuses.
      excluded_alone: number of those that no other rule refuses.
    """

    items: Int32[np.ndarray, "V k"]
    scores: Float32[np.ndarray, "V k"]
    before: Int32[np.ndarray, "V k"]
    passes: Bool[np.ndarray, "V k R"]
    excluded: Int32[np.ndarray, "V R"]
    excluded_alone: Int32[np.ndarray, "V R"]


def rank(scorer: Scorer, users: Int[np.ndarray, "V"], spec: RankingSpec, k: int) -> FilteredRanking:
    """Ranks the k best unseen candidates of each user, with and without the filter.

    Args:
      scorer: see `Scorer`.
      users: user rows in any order, repetitions allowed.
      spec: what may be recommended.
      k: number of ranks; may exceed the number of candidates.

    Returns:
      The rankings of all users, best first.

    Raises:
      InsufficientMemoryError: the results or a batch of scores do not fit.
      ValueError: a score is not finite (names the user), or users, items or k are out of bounds.
    """
    if k < 1:
        raise ValueError(f"k is {k}; it must be at least 1")
    check_sets(users, spec.n_items, seen=spec.seen, barred=spec.filter.excluded)
    n, rules = len(users), len(spec.filter.names)
    _require_room(n, spec, (12 + rules) * k + 8 * rules)
    found = FilteredRanking(
        np.full((n, k), -1, np.int32),
        np.full((n, k), -np.inf, np.float32),
        np.full((n, k), -1, np.int32),
        np.zeros((n, k, rules), bool),
        np.zeros((n, rules), np.int32),
        np.zeros((n, rules), np.int32),
    )
    sets = spec.seen, *spec.filter.excluded
    for rows, (ranked, of_rules) in _over_batches(_rank_batch, scorer, users, sets, spec, k=k):
        for whole, part in zip(found[:3], ranked, strict=True):
            whole[rows] = part
        for rule, of_rule in enumerate(of_rules):
            for whole, part in zip(found[3:], of_rule, strict=True):
                whole[rows, ..., rule] = part
    return found


def evaluate(
    scorer: Scorer,
    spec: RankingSpec,
    truth: UserItemSets,
    *,
    item_counts: Int[np.ndarray, "I"] | None = None,
    ks: Sequence[int] = KS,
) -> UserMetrics:
    """Evaluates full-catalogue rankings of all users with held-out items among the candidates.

    Metrics: those of `metrics.RANKED` at each k; "auc" (pairwise, over all unseen candidates); with `item_counts`
    "novelty@10"; and the aggregate "coverage@10", the share of candidates that are among the first 10 of at least one
    evaluated user (Ge et al., RecSys 2010).

    Args:
      scorer: see `Scorer`.
      spec: what may be recommended. A held-out item that its filter excludes counts as missed.
      truth: held-out items, disjoint from `spec.seen`. Those outside the candidates are neither hits nor in
        denominators.
      item_counts: training users of each item, for novelty.
      ks: cutoffs.

    Returns:
      Metrics per user and aggregates.

    Raises:
      InsufficientMemoryError: the metrics or a batch of scores do not fit.
      ValueError: a score is not finite (names the user), an item is both seen and held out, no user can be evaluated,
        or an argument is out of bounds.
    """
    ks = tuple(sorted(set(ks)))
    if not ks or ks[0] < 1:
        raise ValueError(f"ks is {ks}; it must hold cutoffs of at least 1")
    _check_truth(spec, truth, item_counts)
    allowed = spec.candidate_mask()
    kept = allowed[truth.items]
    truth = item_sets(truth.users[kept], truth.items[kept], truth.n_users)
    users = np.flatnonzero(truth.sizes).astype(np.int32)
    if len(users) == 0:
        raise ValueError("no user has a held-out item among the candidates; nothing can be evaluated")
    # The metrics per block of lists, and concatenated; hits.
    _require_room(len(users), spec, 8 * (len(metrics.RANKED) * len(ks) + 2) + 2 * max(*ks, COVERAGE_K) + 4 * COVERAGE_K)

    hits = np.zeros((len(users), max(*ks, COVERAGE_K)), bool)
    auc = np.zeros(len(users), np.float32)
    first = np.zeros((len(users), COVERAGE_K), np.int32)
    sets = spec.seen, truth, *spec.filter.excluded
    for rows, found in _over_batches(_evaluate_batch, scorer, users, sets, spec, k=hits.shape[1]):
        hits[rows], auc[rows], first[rows] = found
    columns = _list_metrics(hits, truth.sizes[users].astype(np.int32), ks) | {"auc": auc}
    if item_counts is not None:
        columns[f"novelty@{COVERAGE_K}"] = _novelty(first, item_counts, spec.seen.n_users)
    coverage = np.isin(np.arange(spec.n_items), first).sum() / allowed.sum()
    return UserMetrics(users, columns, {f"coverage@{COVERAGE_K}": float(coverage)})


def _check_truth(spec: RankingSpec, truth: UserItemSets, item_counts: Int[np.ndarray, "I"] | None) -> None:
    n_users, n_items = spec.seen.n_users, spec.n_items
    if truth.n_users != n_users:
        raise ValueError(f"truth is of {truth.n_users} users and seen of {n_users}; they must be the same users")
    if item_counts is not None and (
        len(item_counts) != n_items or item_counts.min() < 0 or item_counts.max() > n_users
    ):
        raise ValueError(
            f"item_counts has {len(item_counts)} entries in {item_counts.min()}..{item_counts.max()}; it must have "
            f"{n_items}, each the number of distinct users of an item, at most {n_users}"
        )
    check_sets(truth.users, n_items, seen=spec.seen, truth=truth, barred=spec.filter.excluded)
    check_disjoint(truth, spec.seen, n_items)


def _require_room(n_users: int, spec: RankingSpec, bytes_a_user: int) -> None:
    """Raises InsufficientMemoryError, before the first batch, if a batch or the results do not fit.

    Of each user in a batch there are two float32 scores and four masks per item.
    """
    batch = min(spec.users_at_once, _padded_users(n_users))
    what = f"a ranking of {spec.n_items:,} items for {batch:,} users at a time"
    remedy = "rank fewer users at a time (batch_size), or raise data.k_core"
    require_device_memory(12 * batch * spec.n_items, what, remedy)
    what = f"the rankings of {n_users:,} users"
    require_memory(bytes_a_user * n_users, what, "ask for fewer users at a time, or a smaller k")


class _Replicated(NamedTuple):
    """Arguments of a batch that every device has whole."""

    tests: tuple[Partial, ...]
    candidates: Bool[AnyArray, "I"]
    order: TieBreak


def _over_batches(
    function: Callable[..., Any],
    scorer: Scorer,
    users: Int[np.ndarray, "V"],
    sets: tuple[UserItemSets, ...],
    spec: RankingSpec,
    **static: Any,
) -> Iterator[tuple[slice, Any]]:
    """Applies a function to the scores of batches of users, divided over devices.

    Scores are computed by a program of their own: the other one, which takes longer to compile, is the same for all
    scorers.

    Args:
      function: (`_Replicated`, scores [B, I], users [B], `PaddedSets` of each of `sets`, **static) to results, whose
        leading axis is that of the users, and Bool [B], whether all scores of a user are finite; defined at module
        level, since its compilations are cached.
      scorer: see `Scorer`.
      users: V user rows.
      sets: item sets.
      spec: batch size, devices and progress bar.
      **static: static arguments of the function.

    Yields:
      The places of each batch in `users`, and the function's results on the host.

    Raises:
      ValueError: names the first user with a score that is not finite.
    """
    if not len(users):
        return
    batches = _pad_to_batches(users, spec.users_at_once, spec.devices)
    arrays = _Replicated(spec.filter.tests, spec.candidate_mask(), random_order(spec.n_items, spec.seed))
    arrays, scorer = device_put((arrays, as_argument(scorer)), None, spec.devices)
    score, mapped = _mapped_scorer(spec.n_items, spec.devices), _mapped(function, spec.devices, **static)
    bar = tqdm(batches, desc=spec.progress, unit="batch", disable=not spec.progress)
    done = 0
    for rows, of_rows in zip(bar, padded_batches(sets, batches, spec.devices), strict=True):
        own = shard_rows(rows, spec.devices)
        found, finite = jax.device_get(mapped(arrays, score(scorer, own), own, of_rows))
        if not finite.all():
            raise ValueError(
                f"the scores of user {rows[np.argmin(finite)]} hold NaN or infinity; scores must be finite "
                "(exclude items with `seen` or `candidates` instead)"
            )
        n = min(len(rows), len(users) - done)
        yield slice(done, done + n), jax.tree.map(lambda part, n=n: part[:n], found)
        done += n


def _pad_to_batches(users: Int[np.ndarray, "V"], batch: int, devices: int | None) -> Int32[np.ndarray, "M B"]:
    count = len(select_devices(devices))
    batch = min(batch, _padded_users(-(-len(users) // count))) * count
    padding = np.full(-len(users) % batch, users[-1])  # repeats the last user; removed from the results
    return np.concatenate([users, padding]).astype(np.int32).reshape(-1, batch)


def _padded_users(count: int) -> int:
    """The next power of two, so that splits of about as many users share compilations."""
    return 1 << max(0, count - 1).bit_length()


@functools.lru_cache(maxsize=16)
def _mapped(function: Callable, devices: int | None, **static: Any) -> Callable[..., Any]:
    """Maps `function` over devices: replicated arrays, then each device's scores, users and their sets."""
    shards = Shards(len(select_devices(devices)))

    def whole(arrays, scores, users, sets):
        return jax.tree.map(shards.all_gather, function(arrays, scores, users, sets, **static))

    return pmap_over_devices(whole, devices, in_axes=(None, SHARDED, SHARDED, SHARDED), out_axes=None)


@functools.lru_cache(maxsize=16)
def _mapped_scorer(n_items: int, devices: int | None) -> Callable[..., Any]:
    """Maps a scorer over devices: the scorer, then each device's users."""
    scored = functools.partial(_scored, n_items)
    return pmap_over_devices(scored, devices, in_axes=(None, SHARDED), out_axes=SHARDED)


def _rank_batch(arrays, scores, users, sets, *, k):
    n_items = len(arrays.candidates)
    unseen, masks = _unseen(arrays, sets[0]), _passed(arrays.tests, sets[1:], users, n_items)
    refused = sum((~mask).astype(jnp.int32) for mask in masks) if masks else jnp.zeros(unseen.shape, jnp.int32)
    items, top, finite = top_k_filtered(scores, unseen & (refused == 0), arrays.order, k)
    before = top_k_filtered(scores, unseen, arrays.order, k)[0] if masks else items

    filled = before >= 0
    of_rules = tuple(
        (
            jnp.take_along_axis(mask, jnp.maximum(before, 0), axis=1) & filled,
            (unseen & ~mask).sum(1, dtype=jnp.int32),
            (unseen & ~mask & (refused == 1)).sum(1, dtype=jnp.int32),
        )
        for mask in masks
    )
    return ((items, top, before), of_rules), finite


def _evaluate_batch(arrays, scores, users, sets, *, k):
    seen, truth, *barred = sets
    n_items = len(arrays.candidates)
    masks = _passed(arrays.tests, barred, users, n_items)
    eligible = functools.reduce(jnp.logical_and, masks, _unseen(arrays, seen))
    items, _, finite = top_k_filtered(scores, eligible, arrays.order, k)
    relevant = truth.mask(n_items)
    hits = jnp.take_along_axis(relevant, jnp.maximum(items, 0), axis=1) & (items >= 0)
    auc = metrics.pairwise_auc(scores, eligible & ~relevant, truth.starts, truth.items)
    return (hits, auc, items[:, :COVERAGE_K]), finite


def _list_metrics(
    hits: Bool[np.ndarray, "V K"], n_truth: Int32[np.ndarray, "V"], ks: tuple[int, ...]
) -> dict[str, Float32[np.ndarray, "V"]]:
    """Computes the metrics of lists: those of `metrics.RANKED` at each cutoff."""
    computed = KS if {*ks} <= {*KS} else ks  # one compilation for all subsets of the usual cutoffs
    hits = np.pad(hits, ((0, 0), (0, max(*computed, COVERAGE_K) - hits.shape[1])))
    parts = [_metrics_of_lists(*block, computed) for block in _blocks(hits, n_truth)]
    names = [f"{name}@{k}" for name in metrics.RANKED for k in ks]
    return {name: np.concatenate([part[name] for part in parts])[: len(hits)] for name in names}


def _novelty(
    items: Int32[np.ndarray, "V K"], item_counts: Int[np.ndarray, "I"], n_users: int
) -> Float32[np.ndarray, "V"]:
    """Computes the novelty of lists."""
    counts, total = item_counts.astype(np.int32), np.int32(n_users)
    return np.concatenate([_novelty_of_lists(*block, counts, total) for block in _blocks(items)])[: len(items)]


def _blocks(*arrays: Shaped[np.ndarray, "V ..."]) -> Iterator[tuple[np.ndarray, ...]]:
    """Divides arrays of lists into blocks of `LISTS`, the last one padded with ones."""
    for start in range(0, len(arrays[0]), LISTS):
        parts = (part[start : start + LISTS] for part in arrays)
        yield tuple(
            np.pad(part, [(0, LISTS - len(part))] + [(0, 0)] * (part.ndim - 1), constant_values=1) for part in parts
        )


@jax.jit
def _novelty_of_lists(
    items: Int32[AnyArray, "V K"], item_counts: Int32[AnyArray, "I"], n_users: Int32[AnyArray, ""]
) -> Float32[Array, "V"]:
    return metrics.novelty(items, item_counts, n_users, COVERAGE_K)


@functools.partial(jax.jit, static_argnums=2)
def _metrics_of_lists(
    hits: Bool[AnyArray, "V K"], n_truth: Int32[AnyArray, "V"], ks: tuple[int, ...]
) -> dict[str, Float32[Array, "V"]]:
    return {f"{name}@{k}": metric(hits, n_truth, k) for name, metric in metrics.RANKED.items() for k in ks}


def _scored(n_items: int, scorer: Scorer, users: Int32[Array, "B"]) -> Float32[Array, "B I"]:
    scores = scorer(users)
    if scores.shape != (users.shape[0], n_items):
        raise ValueError(f"the scorer returned shape {scores.shape}; it must be {(users.shape[0], n_items)}")
    return scores.astype(jnp.float32)


def _unseen(arrays: _Replicated, seen: PaddedSets) -> Bool[Array, "B I"]:
    return jnp.asarray(arrays.candidates)[None, :] & ~seen.mask(len(arrays.candidates))


def _passed(
    tests: tuple[Partial, ...], excluded: Sequence[PaddedSets], users: Int32[Array, "B"], n_items: int
) -> tuple[Bool[Array, "B I"], ...]:
    """Computes one mask for each name of a `CandidateFilter`."""
    return *(test(users) for test in tests), *(~rows.mask(n_items) for rows in excluded)


def as_argument(scorer: Scorer) -> Partial:
    """Wraps a scorer so that it can be an argument of a compiled function."""
    return scorer if isinstance(scorer, Partial) else Partial(scorer)
