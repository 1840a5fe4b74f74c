"""Full-catalogue ranking: every item is scored for every user, nothing is sampled.

U users, I items; B users a batch, k ranks. Only here do a scorer's dense rows exist, one batch at a time.
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
"""Scores of the whole catalogue for a batch of users, traceable by JAX.

Best a `jax.tree_util.Partial` of a function and its arrays: it passes into the compiled step as an argument,
so new parameters need no new compilation. A closure works too, compiles once for each closure and is kept
alive, arrays included, by JAX's compilation cache.
"""

# Scores that a device holds at once; their mask beside them has a quarter of the bytes. Measured on 2 CPU cores with
# 40,981 items: 64 users together (10 MB) are ranked more than twice as fast as 256, whose arrays the allocator hands
# back each time; after `devices.keep_memory` the two take the same within an eighth. On accelerators: a guess.
SCORES_PER_DEVICE, SCORES_PER_ACCELERATOR, MAX_USERS_PER_BATCH = 3 << 20, 1 << 27, 8192
COVERAGE_K = 10  # ranks that coverage and novelty look at
MAX_K = 20  # ranks that are asked for most


def users_per_batch(n_items: int) -> int:
    """How many users each device ranks together: a power of two from 16 to `MAX_USERS_PER_BATCH`."""
    at_once = SCORES_PER_DEVICE if jax.default_backend() == "cpu" else SCORES_PER_ACCELERATOR
    return min(1 << max(4, (at_once // max(n_items, 1)).bit_length() - 1), MAX_USERS_PER_BATCH)


def require_room(n_users: int, n_items: int, batch: int, bytes_a_user: int) -> None:
    """Raises InsufficientMemoryError where rankings do not fit, before the first user is ranked.

    batch: users a device ranks together. Of each pair of these and the items there are scores twice (as the scorer and
    as the ranking has them) and four masks. bytes_a_user: of what is kept of every user.
    """
    batch = min(batch, max(n_users, 1))
    what = f"a ranking of {n_items:,} items for {batch:,} users at a time"
    require_device_memory(12 * batch * n_items, what, "rank fewer users at a time (batch), or raise data.k_core")
    what = f"what is kept of the rankings of {n_users:,} users"
    require_memory(bytes_a_user * n_users, what, "ask for fewer users at a time, or a smaller k")


@dataclasses.dataclass(frozen=True)
class UserItemSets:
    """A set of items for each user, in compressed rows: user u has `items[indptr[u]:indptr[u + 1]]`, ascending."""

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
        """The user of each entry of `items`."""
        return np.repeat(np.arange(self.n_users), self.sizes)


@dataclasses.dataclass(frozen=True)
class CandidateFilter:
    """What may be recommended to whom: an item must pass every test, and none may name the pair as barred.

    tests: each Bool [B, I] of a batch of users, True where the item passes; like `Scorer`, best a
      `jax.tree_util.Partial` of a function and its arrays.
    excluded: items each user may not get, where they are pairs rather than attributes.
    names: of the tests, then of the barred sets.
    """

    names: tuple[str, ...] = ()
    tests: tuple[jax.tree_util.Partial, ...] = ()
    excluded: tuple[UserItemSets, ...] = ()

    def without(self, name: str) -> "CandidateFilter":
        """All but the one of that name."""
        kept = [place for place, other in enumerate(self.names) if other != name]
        n = len(self.tests)
        return CandidateFilter(
            tuple(self.names[place] for place in kept),
            tuple(self.tests[place] for place in kept if place < n),
            tuple(self.excluded[place - n] for place in kept if place >= n),
        )


def item_sets(user: Int[np.ndarray, "E"], item: Int[np.ndarray, "E"], n_users: int) -> UserItemSets:
    """The items paired with each user; a repeated pair counts once.

    Raises:
        ValueError: a user outside 0..n_users-1 or a negative item.
    """
    if len(user) and not (0 <= user.min() and user.max() < n_users):
        raise ValueError(f"users span {user.min()}..{user.max()}; they must lie in 0..{n_users - 1}")
    if len(item) and item.min() < 0:
        raise ValueError(f"item {item.min()} is negative; items are positions from 0")
    order = np.lexsort((item, user))
    user, item = user[order], item[order]
    new = np.ones(len(user), bool)
    new[1:] = (user[1:] != user[:-1]) | (item[1:] != item[:-1])
    sizes = np.bincount(user[new], minlength=n_users)
    return UserItemSets(np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64), item[new].astype(np.int32))


@dataclasses.dataclass(frozen=True)
class UserMetrics:
    """Metrics of V evaluated users.

    metrics: by name ("recall@10", "accuracy", ...), one value a user; NaN where the user has no pair to compare.
    aggregate: what exists only over all users together ("coverage@10").
    """

    users: Int32[np.ndarray, "V"]
    metrics: Mapping[str, Float32[np.ndarray, "V"]]
    aggregate: Mapping[str, float]


def mean(per_user: UserMetrics) -> dict[str, float]:
    """The mean of each metric over users, in float64, then the aggregates. Users with NaN are left out of that mean."""
    means = {}
    for name, values in per_user.metrics.items():
        known = values[~np.isnan(values)]
        means[name] = float(known.mean(dtype=np.float64)) if len(known) else math.nan
    return means | dict(per_user.aggregate)


class TieBreak(NamedTuple):
    """How equal scores are ordered: by columns, as they stand here, and inside a column by rows, as they stand here.

    Item i stands in row i // C and column i % C. Numbers often follow popularity or time: items of one column lie far
    apart in them, and which column comes first is drawn.
    """

    columns: Int32[AnyArray, "C"]
    rows: Int32[AnyArray, "R"]

    def items(self, n_items: int) -> Int32[np.ndarray, "I"]:
        """All items in this order."""
        columns, rows = np.asarray(self.columns), np.asarray(self.rows)
        every = (columns[:, None] + len(columns) * rows).ravel()
        return every[every < n_items]

    def places(self, n_items: int) -> Int32[Array, "I"]:
        """Where each item stands in this order, numbers left out in between, inside a compiled program."""
        row, column = jnp.divmod(jnp.arange(n_items, dtype=jnp.int32), len(self.columns))
        return jnp.argsort(self.columns)[column] * len(self.rows) + jnp.argsort(self.rows)[row]


class PaddedSets(NamedTuple):
    """The item sets of one batch, padded to a shape all batches share: row b has items[starts[b]:starts[b + 1]]."""

    starts: Int32[AnyArray, "rows"]
    items: Int32[AnyArray, "F"]

    def mask(self, n_items: int) -> Bool[Array, "B I"]:
        n_rows = self.starts.shape[0] - 1
        slots = jnp.arange(self.items.shape[0])
        row = jnp.searchsorted(self.starts[1:], slots, side="right")  # padding falls to row B, and is dropped
        return jnp.zeros((n_rows, n_items), bool).at[row, self.items].set(True, mode="drop")


def _rows(sets: UserItemSets, batches: Int32[np.ndarray, "M B"], devices: int | None) -> Iterator[PaddedSets]:
    """Of each batch the rows of this process's devices, stacked."""
    count = len(select_devices(devices))
    sizes = sets.sizes[batches].reshape(len(batches), -1, count)
    # A power of two: calls for one part of the users after another then share their compilations.
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
    """Scores that `top_k_filtered` can order, inside a compiled program."""
    scores = scorer(users)
    if scores.shape != (users.shape[0], n_items):
        raise ValueError(f"the scorer returned shape {scores.shape}; it must be {(users.shape[0], n_items)}")
    return scores.astype(jnp.float32)


def top_k_filtered(
    scores: Float32[Array, "B I"], eligible: Bool[Array, "B I"], order: "TieBreak", k: int
) -> tuple[Int32[Array, "B k"], Float32[Array, "B k"], Bool[Array, "B"]]:
    """The k best eligible items and their scores, -1 and -inf where there are fewer, inside a compiled program.

    Also whether all scores of a row are finite; where they are not, the rest of the row means nothing.
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
    """The best score of each column of `order` comes first: outside the k best columns is none of the k best items."""
    n_columns, n_rows = len(order.columns), len(order.rows)
    scores = jnp.where(scores == 0, 0.0, scores)  # top_k puts -0.0 below 0.0
    there = jnp.where(eligible, scores, -jnp.inf)
    there = jnp.pad(there, ((0, 0), (0, n_rows * n_columns - scores.shape[1])), constant_values=-jnp.inf)
    of_columns = there.reshape(-1, n_rows, n_columns).max(1)[:, order.columns]
    _, places = jax.lax.top_k(of_columns, min(k, n_columns))
    columns = order.columns[jnp.sort(places, axis=1)]  # sorted: equal scores stand in the order of their columns
    candidates = (columns[:, :, None] + n_columns * order.rows[None, None, :]).reshape(len(scores), -1)
    top, places = jax.lax.top_k(jnp.take_along_axis(there, candidates, axis=1), min(k, candidates.shape[1]))
    items = jnp.where(top == -jnp.inf, -1, jnp.take_along_axis(candidates, places, axis=1))
    short = ((0, 0), (0, k - items.shape[1]))
    return jnp.pad(items, short, constant_values=-1), jnp.pad(top, short, constant_values=-jnp.inf)


def passed(
    tests: tuple[jax.tree_util.Partial, ...], excluded: tuple[PaddedSets, ...], users: Int32[Array, "B"], n_items: int
) -> tuple[Bool[Array, "B I"], ...]:
    """One mask for each name of an `CandidateFilter`, inside a compiled program."""
    return *(test(users) for test in tests), *(~rows.mask(n_items) for rows in excluded)


def _candidate_mask(tests, excluded, users, seen: PaddedSets, allowed) -> Bool[Array, "B I"]:
    """Candidates that the user has not seen and that pass every test."""
    n_items = allowed.shape[0]
    unseen = allowed[None, :] & ~seen.mask(n_items)
    return functools.reduce(jnp.logical_and, passed(tests, excluded, users, n_items), unseen)


@functools.lru_cache(maxsize=16)
def _mapped(function: Callable, devices: int | None, **static: Any) -> Callable[..., Any]:
    """`function` of (what every device has, users and their sets), each device with its rows of the batch."""
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
    """Batches of users, the last one padded, and `function(*common, users, *sets, **static)` of each on the host.

    function: pure, of this module's or another's top level, as its compilations are kept; its results begin with the
      axis of the users. common: trees that every device gets whole. sets: it gets them as `PaddedSets` of the batch.
    progress: of the bar; no bar without it.
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
    """The k best unseen candidates of each user, best first, and their scores.

    Equal scores stand in one `TieBreak` of the items, drawn from `seed`: `lax.top_k` alone would prefer low
    ids, which often follow popularity or time, and a constant scorer would look better than chance.

    Args:
        scorer: see `Scorer`.
        users: any users, in any order, repeated or not.
        seen: items never recommended to the user.
        n_items: I.
        k: ranks wanted; may exceed what remains.
        candidates: items that may be recommended; None means all.
        eligible: which of them may be recommended to whom.
        batch: users that a device ranks together; None means `users_per_batch`. The last batch is padded, so one
            compilation serves all.
        seed: of the order of equal scores.
        progress: show a bar.
        devices: the first so many share the users; None means all.

    Returns:
        Items and scores; -1 and -inf where fewer than k remain.

    Raises:
        InsufficientMemoryError: the lists or a batch of scores do not fit.
        ValueError: a score that is not finite (naming the user), or users, items or k outside their bounds.
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
    """Rank the catalogue for every user who has held-out items among the candidates, and measure each list.

    Metrics: those of `metrics.RANKED` at each k; "accuracy" (pairwise, over all unseen candidates);
    "novelty@10"; in the aggregate "coverage@10", the share of candidates that at least one of these users
    finds among the first 10 (Ge et al., RecSys 2010). Equal scores are ordered as in `top_k`.

    Args:
        scorer: see `Scorer`.
        truth: held-out items. Those outside `candidates` count neither as hits nor in denominators.
        seen: items never recommended to the user; they must not be held out as well.
        n_items: I.
        item_counts: users who have the item in training (for novelty).
        ks: cuts, in ranks.
        candidates: items that may be recommended; None means all.
        eligible: which of them may be recommended to whom. A held-out item that is not counts as missed.
        batch: users that a device ranks together; None means `users_per_batch`. The last batch is padded, so one
            compilation serves all.
        seed: of the order of equal scores.
        progress: show a bar.
        devices: the first so many share the users; None means all.

    Raises:
        InsufficientMemoryError: the metrics or a batch of scores do not fit.
        ValueError: a score that is not finite (naming the user), an item both seen and held out, no user to
            evaluate, or arguments outside their bounds.
    """
    ks = tuple(sorted(set(ks)))
    if not ks or ks[0] < 1:
        raise ValueError(f"ks is {ks}; it must hold cuts of at least 1")
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
    # The metrics in parts and joined.
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
    """The scorer as it passes into a compiled function."""
    return scorer if isinstance(scorer, jax.tree_util.Partial) else jax.tree_util.Partial(scorer)


def catalogue(n_items: int, candidates: np.ndarray | None, seed: int) -> tuple[Bool[Array, "I"], TieBreak]:
    """Which items are candidates, and the order in which equal scores stand."""
    allowed = np.full(n_items, candidates is None)
    if candidates is not None:
        if len(candidates) == 0 or candidates.min() < 0 or candidates.max() >= n_items:
            raise ValueError(f"candidates must be one or more items in 0..{n_items - 1}; got {candidates}")
        allowed[candidates] = True
    drawn = np.random.default_rng(seed)
    n_rows = max(1, math.isqrt(n_items // MAX_K))  # makes finding FEW columns as quick as finding FEW items in them
    columns, rows = drawn.permutation(-(-n_items // n_rows)), drawn.permutation(n_rows)
    return jnp.asarray(allowed), TieBreak(jnp.asarray(columns, jnp.int32), jnp.asarray(rows, jnp.int32))


def _pad_to_batches(users: Int[np.ndarray, "V"], batch: int, devices: int | None) -> Int32[np.ndarray, "M B"]:
    if batch < 1:
        raise ValueError(f"batch is {batch}; it must be at least 1")
    count = len(select_devices(devices))
    batch = min(batch, -(-len(users) // count)) * count
    padding = np.full(-len(users) % batch, users[-1])  # the last user again: harmless, and cut off the results
    return np.concatenate([users, padding]).astype(np.int32).reshape(-1, batch)


def check_sets(users: Int[np.ndarray, "V"], n_items: int, **sets: UserItemSets | tuple[UserItemSets, ...]) -> None:
    """Raises ValueError, naming the set, where it holds an item that is none or has no row for one of the users."""
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
            "recommended, so take it out of one of the two"
        )


def check_finite(users: Int32[np.ndarray, "B"], finite: Bool[np.ndarray, "B"]) -> None:
    """Raises ValueError naming the first user whose scores are not."""
    if not finite.all():
        raise ValueError(
            f"the scores of user {users[np.argmin(finite)]} hold NaN or infinity; scores must be finite "
            "(leave items out with `seen` or `candidates` instead)"
        )
