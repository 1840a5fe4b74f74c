"""Full-catalogue ranking and evaluation: every item is scored for every user, without sampled candidates.

U users, I items; B users per batch, k ranks. Dense [B, I] scores exist for one batch at a time, and only here.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int, Int32, Int64
from tqdm import tqdm

from fused_rec import kernels
from fused_rec.distributed.devices import (
    SHARDED,
    AnyArray,
    Shards,
    device_put,
    local_indices,
    pmap_over_devices,
    select_devices,
    shard_rows,
)
from fused_rec.evaluation import metrics
from fused_rec.memory import require_device_memory, require_memory

Scorer = Callable[[Int32[Array, "B"]], Float[Array, "B I"]]
"""Function from users [B] to scores of all items [B, I], traceable by JAX.

Prefer a `jax.tree_util.Partial` of a function and its arrays: it is an argument of the compiled step, so new parameters
need no new compilation. A closure compiles once per closure, and JAX's compilation cache keeps its arrays alive.
"""

# Scores per device and batch; a mask adds a quarter of their bytes. Measured on 2 CPU cores with 40,981 items: batches
# of 64 users (10 MB) are more than twice as fast as 256, whose memory the allocator returns to the system each time;
# after `devices.keep_memory` they differ by less than an eighth. The value for accelerators is not measured.
SCORES_PER_DEVICE, SCORES_PER_ACCELERATOR, MAX_USERS_PER_BATCH = 3 << 20, 1 << 27, 8192
COVERAGE_K = 10  # cutoff of coverage and novelty
MAX_K = 20  # the usual largest cutoff


def users_per_batch(n_items: int) -> int:
    """Returns the default batch size per device: a power of two from 16 to `MAX_USERS_PER_BATCH`."""
    at_once = SCORES_PER_DEVICE if jax.default_backend() == "cpu" else SCORES_PER_ACCELERATOR
    return min(1 << max(4, (at_once // max(n_items, 1)).bit_length() - 1), MAX_USERS_PER_BATCH)


def require_room(n_users: int, n_items: int, batch: int, bytes_a_user: int) -> None:
    """Checks, before the first batch, that the rankings fit in memory.

    Args:
      n_users: users to rank.
      n_items: I.
      batch: users per batch and device; each has two float32 scores and four masks per item.
      bytes_a_user: host memory of the results of one user.

    Raises:
      InsufficientMemoryError: a batch or the results do not fit.
    """
    batch = min(batch, max(n_users, 1))
    what = f"a ranking of {n_items:,} items for {batch:,} users at a time"
    require_device_memory(12 * batch * n_items, what, "rank fewer users at a time (batch), or raise data.k_core")
    what = f"the rankings of {n_users:,} users"
    require_memory(bytes_a_user * n_users, what, "ask for fewer users at a time, or a smaller k")


@dataclasses.dataclass(frozen=True)
class UserItemSets:
    """Set of items per user in CSR form: user u has `items[indptr[u]:indptr[u + 1]]`, ascending."""

    indptr: Int64[np.ndarray, "rows"]  # rows = U + 1
    items: Int32[np.ndarray, "E"]

    @property
    def n_users(self) -> int:
        return len(self.indptr) - 1

    @property
    def sizes(self) -> Int64[np.ndarray, "U"]:
        return np.diff(self.indptr)

    @property
    def users(self) -> Int64[np.ndarray, "E"]:
        """User row of each entry of `items`."""
        return np.repeat(np.arange(self.n_users), self.sizes)


@dataclasses.dataclass(frozen=True)
class CandidateFilter:
    """Filter of (user, item) candidates: a pair must pass every test and be in no excluded set.

    Attributes:
      names: of the tests, followed by those of the excluded sets.
      tests: functions from users [B] to Bool [B, I], True where the item passes; like `Scorer`, each is a
        `jax.tree_util.Partial` of a function and its arrays.
      excluded: sets of items that each user must not get, for rules about pairs rather than attributes.
    """

    names: tuple[str, ...] = ()
    tests: tuple[jax.tree_util.Partial, ...] = ()
    excluded: tuple[UserItemSets, ...] = ()

    def without(self, name: str) -> "CandidateFilter":
        """Returns the filter without the rule of that name."""
        kept = [index for index, other in enumerate(self.names) if other != name]
        n = len(self.tests)
        return CandidateFilter(
            tuple(self.names[index] for index in kept),
            tuple(self.tests[index] for index in kept if index < n),
            tuple(self.excluded[index - n] for index in kept if index >= n),
        )


def item_sets(user: Int[np.ndarray, "E"], item: Int[np.ndarray, "E"], n_users: int) -> UserItemSets:
    """Groups (user, item) pairs by user; a repeated pair counts once.

    Args:
      user: user row of each pair.
      item: item row of each pair.
      n_users: U.

    Returns:
      The item sets of all users.

    Raises:
      ValueError: a user outside 0..n_users-1 or a negative item.
    """
    if len(user) and not (0 <= user.min() and user.max() < n_users):
        raise ValueError(f"users span {user.min()}..{user.max()}; they must lie in 0..{n_users - 1}")
    if len(item) and item.min() < 0:
        raise ValueError(f"item {item.min()} is negative; items are rows from 0")
    order = np.lexsort((item, user))
    user, item = user[order], item[order]
    new = np.ones(len(user), bool)
    new[1:] = (user[1:] != user[:-1]) | (item[1:] != item[:-1])
    sizes = np.bincount(user[new], minlength=n_users)
    return UserItemSets(np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64), item[new].astype(np.int32))


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


class TieBreak(NamedTuple):
    """Random order of items with equal scores: first by column, then by row, in the orders of these arrays.

    Item i is in row i // C and column i % C. Item rows often follow popularity or time; the items of a column are far
    apart, and the order of the columns is random.
    """

    columns: Int32[AnyArray, "C"]
    rows: Int32[AnyArray, "R"]

    def items(self, n_items: int) -> Int32[np.ndarray, "I"]:
        """Returns all items in this order."""
        columns, rows = np.asarray(self.columns), np.asarray(self.rows)
        ordered = (columns[:, None] + len(columns) * rows).ravel()
        return ordered[ordered < n_items]

    def places(self, n_items: int) -> Int32[Array, "I"]:
        """Returns each item's position in this order, with gaps; traceable."""
        row, column = jnp.divmod(jnp.arange(n_items, dtype=jnp.int32), len(self.columns))
        return jnp.argsort(self.columns)[column] * len(self.rows) + jnp.argsort(self.rows)[row]


class PaddedSets(NamedTuple):
    """Item sets of a batch, padded to the same shape for all batches: row b has `items[starts[b]:starts[b + 1]]`."""

    starts: Int32[AnyArray, "rows"]
    items: Int32[AnyArray, "F"]

    def mask(self, n_items: int) -> Bool[Array, "B I"]:
        """Converts the sets to a dense mask."""
        n_rows = self.starts.shape[0] - 1
        slots = jnp.arange(self.items.shape[0])
        row = jnp.searchsorted(self.starts[1:], slots, side="right")  # padding gets row B and is dropped
        return jnp.zeros((n_rows, n_items), bool).at[row, self.items].set(True, mode="drop")


def _rows(sets: UserItemSets, batches: Int32[np.ndarray, "M B"], devices: int | None) -> Iterator[PaddedSets]:
    """Yields for each batch the padded sets of this process's devices, stacked."""
    count = len(select_devices(devices))
    sizes = sets.sizes[batches].reshape(len(batches), -1, count)
    # A power of two, so that calls for different chunks of users share compilations.
    width = 1 << max(0, int(sizes.sum(1).max()) - 1).bit_length()
    for users, size in zip(batches, sizes, strict=True):
        stacked = []
        for place in local_indices(devices):
            own, starts = size[:, place], np.concatenate([[0], np.cumsum(size[:, place])])
            items = np.zeros(width, np.int32)
            source = np.repeat(sets.indptr[users[place::count]] - starts[:-1], own) + np.arange(starts[-1])
            items[: starts[-1]] = sets.items[source]
            stacked.append((starts.astype(np.int32), items))
        yield PaddedSets(*map(np.stack, zip(*stacked, strict=True)))


def scored(scorer: Scorer, users: Int32[Array, "B"], n_items: int) -> Float32[Array, "B I"]:
    """Computes float32 scores and checks their shape; traceable.

    Args:
      scorer: see `Scorer`.
      users: user rows of the batch.
      n_items: I.

    Returns:
      The scores of all items.

    Raises:
      ValueError: the scorer returns another shape.
    """
    scores = scorer(users)
    if scores.shape != (users.shape[0], n_items):
        raise ValueError(f"the scorer returned shape {scores.shape}; it must be {(users.shape[0], n_items)}")
    return scores.astype(jnp.float32)


def top_k_filtered(
    scores: Float32[Array, "B I"], eligible: Bool[Array, "B I"], order: "TieBreak", k: int
) -> tuple[Int32[Array, "B k"], Float32[Array, "B k"], Bool[Array, "B"]]:
    """Selects the k best eligible items of each user; traceable.

    Args:
      scores: scores of all items.
      eligible: candidates.
      order: of equal scores.
      k: number of items.

    Returns:
      Items (-1 if fewer), their scores (-inf if fewer), and whether all scores of a row are finite; if they are not,
      the row's items and scores are undefined.
    """
    if not kernels.usable():
        return *_top_k_filtered(scores, eligible, order, k), jnp.isfinite(scores).all(1)
    lists = jax.ShapeDtypeStruct((len(scores), k), jnp.int32)
    results = (lists, lists.update(dtype=jnp.float32), jax.ShapeDtypeStruct((len(scores),), bool))
    items, top, finite = jax.ffi.ffi_call(kernels.BEST, results)(scores, eligible, order.places(scores.shape[1]))
    return items, top, finite


def _top_k_filtered(
    scores: Float32[Array, "B I"], eligible: Bool[Array, "B I"], order: "TieBreak", k: int
) -> tuple[Int32[Array, "B k"], Float32[Array, "B k"]]:
    """Selects the k columns of `order` with the largest maxima, which contain the k best items, then those items."""
    n_columns, n_rows = len(order.columns), len(order.rows)
    scores = jnp.where(scores == 0, 0.0, scores)  # top_k puts -0.0 below 0.0
    masked = jnp.where(eligible, scores, -jnp.inf)
    masked = jnp.pad(masked, ((0, 0), (0, n_rows * n_columns - scores.shape[1])), constant_values=-jnp.inf)
    maxima = masked.reshape(-1, n_rows, n_columns).max(1)[:, order.columns]
    _, positions = jax.lax.top_k(maxima, min(k, n_columns))
    columns = order.columns[jnp.sort(positions, axis=1)]  # sorted, so that equal scores follow the column order
    candidates = (columns[:, :, None] + n_columns * order.rows[None, None, :]).reshape(len(scores), -1)
    top, positions = jax.lax.top_k(jnp.take_along_axis(masked, candidates, axis=1), min(k, candidates.shape[1]))
    items = jnp.where(top == -jnp.inf, -1, jnp.take_along_axis(candidates, positions, axis=1))
    short = ((0, 0), (0, k - items.shape[1]))
    return jnp.pad(items, short, constant_values=-1), jnp.pad(top, short, constant_values=-jnp.inf)


def passed(
    tests: tuple[jax.tree_util.Partial, ...], excluded: tuple[PaddedSets, ...], users: Int32[Array, "B"], n_items: int
) -> tuple[Bool[Array, "B I"], ...]:
    """Computes one mask for each name of a `CandidateFilter`; traceable."""
    return *(test(users) for test in tests), *(~rows.mask(n_items) for rows in excluded)


def _candidate_mask(tests, excluded, users, seen: PaddedSets, allowed) -> Bool[Array, "B I"]:
    """Returns the candidates that the user has not seen and that pass the filter."""
    n_items = allowed.shape[0]
    unseen = allowed[None, :] & ~seen.mask(n_items)
    return functools.reduce(jnp.logical_and, passed(tests, excluded, users, n_items), unseen)


@functools.lru_cache(maxsize=16)
def _mapped(function: Callable, devices: int | None, **static: Any) -> Callable[..., Any]:
    """Maps `function` over devices: replicated arguments, then each device's users and their sets."""
    shards = Shards(len(select_devices(devices)))

    def whole(common, users, sets):
        return jax.tree.map(shards.all_gather, function(*common, users, *sets, **static))

    return pmap_over_devices(whole, devices, in_axes=(None, SHARDED, SHARDED), out_axes=None)


def over_batches(
    function: Callable[..., Any],
    common: tuple[Any, ...],
    users: Int[np.ndarray, "V"],
    sets: tuple[UserItemSets, ...],
    *,
    batch: int,
    devices: int | None,
    progress: str = "",
    **static: Any,
) -> Iterator[tuple[Int32[np.ndarray, "B"], Any]]:
    """Applies `function(*common, users, *sets, **static)` to batches of users, divided over devices.

    Args:
      function: pure and defined at module level, since its compilations are cached; the leading axis of its results is
        that of the users.
      common: pytrees that are replicated on every device.
      users: V user rows.
      sets: item sets; the function gets the `PaddedSets` of the batch.
      batch: users per device and batch.
      devices: number of devices; None = all.
      progress: label of the progress bar; empty = no bar.
      **static: further static arguments of the function.

    Yields:
      The users of each batch, the last batch padded, and the function's results on the host.
    """
    batches = _pad_to_batches(users, batch, devices)
    common = device_put(common, None, devices)
    mapped = _mapped(function, devices, **static)
    bar = tqdm(batches, desc=progress, unit="batch", disable=not progress)
    for rows, *of_rows in zip(bar, *(_rows(of_users, batches, devices) for of_users in sets), strict=True):
        yield rows, jax.device_get(mapped(common, shard_rows(rows, devices), tuple(of_rows)))


def _top_batch(scorer, tests, allowed, order, users, seen, *barred, k):
    scores = scored(scorer, users, allowed.shape[0])
    return top_k_filtered(scores, _candidate_mask(tests, barred, users, seen, allowed), order, k)


def _measure_batch(scorer, tests, allowed, order, item_counts, users, seen, truth, *barred, ks, n_users):
    n_items = allowed.shape[0]
    scores = scored(scorer, users, n_items)
    eligible = _candidate_mask(tests, barred, users, seen, allowed)
    items, _, finite = top_k_filtered(scores, eligible, order, max(*ks, COVERAGE_K))
    relevant = truth.mask(n_items)
    hits = jnp.take_along_axis(relevant, jnp.maximum(items, 0), axis=1) & (items >= 0)
    n_truth = jnp.diff(truth.starts)
    values = {f"{name}@{k}": measure(hits, n_truth, k) for name, measure in metrics.RANKED.items() for k in ks}
    values["auc"] = metrics.pairwise_auc(scores, eligible & ~relevant, truth.starts, truth.items)
    values[f"novelty@{COVERAGE_K}"] = metrics.novelty(items, item_counts, n_users, COVERAGE_K)
    return values, items[:, :COVERAGE_K], finite


def top_k(
    scorer: Scorer,
    users: Int[np.ndarray, "B"],
    *,
    seen: UserItemSets,
    n_items: int,
    k: int,
    candidates: Int[np.ndarray, "C"] | None = None,
    eligible: CandidateFilter = CandidateFilter(),
    batch: int | None = None,
    seed: int = 0,
    progress: bool = False,
    devices: int | None = None,
) -> tuple[Int32[np.ndarray, "B k"], Float32[np.ndarray, "B k"]]:
    """Ranks the k best unseen candidates of each user.

    Equal scores are ordered by a random `TieBreak`: `lax.top_k` alone would prefer low item rows, which often follow
    popularity or time, and a constant scorer would rank better than chance.

    Args:
      scorer: see `Scorer`.
      users: user rows in any order, repetitions allowed.
      seen: items that are never recommended to the user.
      n_items: I.
      k: number of ranks; may exceed the number of candidates.
      candidates: items that may be recommended; None = all.
      eligible: filter of (user, item) candidates.
      batch: users per batch and device; None = `users_per_batch`. The last batch is padded to the same shape.
      seed: random seed of the order of equal scores.
      progress: show a progress bar.
      devices: number of devices that share the users; None = all.

    Returns:
      Items, best first, and their scores; -1 and -inf where there are fewer than k candidates.

    Raises:
      InsufficientMemoryError: the results or a batch of scores do not fit.
      ValueError: a score is not finite (names the user), or users, items or k are out of bounds.
    """
    if k < 1:
        raise ValueError(f"k is {k}; it must be at least 1")
    allowed, order = catalogue(n_items, candidates, seed)
    check_sets(users, n_items, seen=seen, barred=eligible.excluded)
    require_room(len(users), n_items, batch or users_per_batch(n_items), 8 * k)
    items, scores = np.full((len(users), k), -1, np.int32), np.full((len(users), k), -np.inf, np.float32)
    if len(users) == 0:
        return items, scores
    done = 0
    for rows, found in over_batches(
        _top_batch,
        (as_argument(scorer), eligible.tests, allowed, order),
        users,
        (seen, *eligible.excluded),
        batch=users_per_batch(n_items) if batch is None else batch,
        devices=devices,
        progress="rank" if progress else "",
        k=k,
    ):
        check_finite(rows, found[2])
        n = min(len(rows), len(users) - done)
        items[done : done + n], scores[done : done + n] = found[0][:n], found[1][:n]
        done += n
    return items, scores


def evaluate(
    scorer: Scorer,
    *,
    truth: UserItemSets,
    seen: UserItemSets,
    n_items: int,
    item_counts: Int[np.ndarray, "I"],
    ks: Sequence[int] = (5, 10, 20, 50),
    candidates: Int[np.ndarray, "C"] | None = None,
    eligible: CandidateFilter = CandidateFilter(),
    batch: int | None = None,
    seed: int = 0,
    progress: bool = False,
    devices: int | None = None,
) -> UserMetrics:
    """Evaluates full-catalogue rankings of all users with held-out items among the candidates.

    Metrics: those of `metrics.RANKED` at each k; "auc" (pairwise, over all unseen candidates); "novelty@10"; and the
    aggregate "coverage@10", the share of candidates that are among the first 10 of at least one evaluated user (Ge et
    al., RecSys 2010). Equal scores are ordered as in `top_k`.

    Args:
      scorer: see `Scorer`.
      truth: held-out items. Those outside `candidates` are neither hits nor in denominators.
      seen: items that are never recommended to the user; must be disjoint from `truth`.
      n_items: I.
      item_counts: training users of each item, for novelty.
      ks: cutoffs.
      candidates: items that may be recommended; None = all.
      eligible: filter of (user, item) candidates. A held-out item that it excludes counts as missed.
      batch: users per batch and device; None = `users_per_batch`. The last batch is padded to the same shape.
      seed: random seed of the order of equal scores.
      progress: show a progress bar.
      devices: number of devices that share the users; None = all.

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
    allowed, order = catalogue(n_items, candidates, seed)
    if truth.n_users != seen.n_users:
        raise ValueError(f"truth is of {truth.n_users} users and seen of {seen.n_users}; they must be the same users")
    if len(item_counts) != n_items or item_counts.min() < 0 or item_counts.max() > seen.n_users:
        raise ValueError(
            f"item_counts has {len(item_counts)} entries in {item_counts.min()}..{item_counts.max()}; it must have "
            f"{n_items}, each the number of distinct users of an item, at most {seen.n_users}"
        )
    check_sets(truth.users, n_items, seen=seen, truth=truth, barred=eligible.excluded)
    _check_disjoint(truth, seen, n_items)
    kept = np.asarray(allowed)[truth.items]
    truth = item_sets(truth.users[kept], truth.items[kept], truth.n_users)
    users = np.flatnonzero(truth.sizes).astype(np.int32)
    if len(users) == 0:
        raise ValueError("no user has a held-out item among the candidates; nothing can be evaluated")
    # The metrics per batch, and concatenated.
    require_room(len(users), n_items, batch or users_per_batch(n_items), 8 * (len(metrics.RANKED) * len(ks) + 2))

    parts: list[dict[str, np.ndarray]] = []
    recommended = np.zeros(n_items, bool)
    for rows, (values, items, finite) in over_batches(
        _measure_batch,
        (as_argument(scorer), eligible.tests, allowed, order, item_counts.astype(np.int32)),
        users,
        (seen, truth, *eligible.excluded),
        batch=users_per_batch(n_items) if batch is None else batch,
        devices=devices,
        progress="evaluate" if progress else "",
        ks=ks,
        n_users=seen.n_users,
    ):
        check_finite(rows, finite)
        recommended[items[items >= 0]] = True
        parts.append(values)
    names = [*(f"{name}@{k}" for name in metrics.RANKED for k in ks), "auc", f"novelty@{COVERAGE_K}"]
    columns = {name: np.concatenate([part[name] for part in parts])[: len(users)] for name in names}
    return UserMetrics(users, columns, {f"coverage@{COVERAGE_K}": float(recommended.sum() / np.asarray(allowed).sum())})


def as_argument(scorer: Scorer) -> jax.tree_util.Partial:
    """Wraps a scorer so that it can be an argument of a compiled function."""
    return scorer if isinstance(scorer, jax.tree_util.Partial) else jax.tree_util.Partial(scorer)


def catalogue(n_items: int, candidates: np.ndarray | None, seed: int) -> tuple[Bool[Array, "I"], TieBreak]:
    """Returns the mask of candidate items and a random order of equal scores.

    Args:
      n_items: I.
      candidates: items that may be recommended; None = all.
      seed: random seed of the order.

    Returns:
      Bool [I] and the `TieBreak`.

    Raises:
      ValueError: no candidate, or one outside 0..n_items-1.
    """
    allowed = np.full(n_items, candidates is None)
    if candidates is not None:
        if len(candidates) == 0 or candidates.min() < 0 or candidates.max() >= n_items:
            raise ValueError(f"candidates must be one or more items in 0..{n_items - 1}; got {candidates}")
        allowed[candidates] = True
    rng = np.random.default_rng(seed)
    n_rows = max(1, math.isqrt(n_items // MAX_K))  # balances the search for MAX_K columns and for MAX_K items in them
    columns, rows = rng.permutation(-(-n_items // n_rows)), rng.permutation(n_rows)
    return jnp.asarray(allowed), TieBreak(jnp.asarray(columns, jnp.int32), jnp.asarray(rows, jnp.int32))


def _pad_to_batches(users: Int[np.ndarray, "V"], batch: int, devices: int | None) -> Int32[np.ndarray, "M B"]:
    if batch < 1:
        raise ValueError(f"batch is {batch}; it must be at least 1")
    count = len(select_devices(devices))
    batch = min(batch, -(-len(users) // count)) * count
    padding = np.full(-len(users) % batch, users[-1])  # repeats the last user; removed from the results
    return np.concatenate([users, padding]).astype(np.int32).reshape(-1, batch)


def check_sets(users: Int[np.ndarray, "V"], n_items: int, **sets: UserItemSets | tuple[UserItemSets, ...]) -> None:
    """Checks that sets have only items of the catalogue and a row for every user.

    Args:
      users: user rows to rank.
      n_items: I.
      **sets: item sets, or tuples of them, by the name that an error gives.

    Raises:
      ValueError: names the set, the item or users, and the bound.
    """
    for name, given in sets.items():
        for of_users in given if isinstance(given, tuple) else (given,):
            if len(of_users.items) and of_users.items.max() >= n_items:
                raise ValueError(f"{name} holds item {of_users.items.max()}; items must lie in 0..{n_items - 1}")
            if len(users) and not (0 <= users.min() and users.max() < of_users.n_users):
                span = f"{users.min()}..{users.max()}"
                raise ValueError(f"users span {span}; they must lie in 0..{of_users.n_users - 1}, those of {name}")


def _check_disjoint(truth: UserItemSets, seen: UserItemSets, n_items: int) -> None:
    held_out, known = (sets.users * n_items + sets.items for sets in (truth, seen))  # both ascend
    at = np.searchsorted(known, held_out)
    both = held_out[np.append(known, -1)[at] == held_out]
    if len(both):
        user, item = divmod(int(both[0]), n_items)
        raise ValueError(
            f"{len(both)} held-out pairs are seen as well, first user {user} with item {item}; a seen item is never "
            "recommended, so remove it from `truth` or `seen`"
        )


def check_finite(users: Int32[np.ndarray, "B"], finite: Bool[np.ndarray, "B"]) -> None:
    """Checks the flags of finite scores.

    Args:
      users: users of the batch.
      finite: whether all scores of a user are finite.

    Raises:
      ValueError: names the first user with a score that is not finite.
    """
    if not finite.all():
        raise ValueError(
            f"the scores of user {users[np.argmin(finite)]} hold NaN or infinity; scores must be finite "
            "(exclude items with `seen` or `candidates` instead)"
        )
