"""Approximate ranking: an inverted file of the item vectors (IVF), whose recall is measured each time it is used.

The score is an inner product of vectors (`user_item_vectors`). Items are divided into lists by spherical k-means, and a
user is compared with the items of the lists whose centers have the largest inner products with the user's vector. Their
scores are exact. Then seen items and those that rules refuse are taken out; users left with fewer than k are ranked
exactly. The number of lists that are read is the smallest power of two whose recall on a sample reaches the bound that
is asked for, and the recall that is reported is of another sample.

U users, I items, D columns; V users that are ranked, C candidates of each, k ranks, R rules.
"""

import dataclasses
import logging
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Int, Int32, Int64

from fused_rec.data.dataset import Dataset
from fused_rec.evaluation.item_sets import item_sets
from fused_rec.evaluation.ranking import CandidateFilter, FilteredRanking, RankingSpec, Scorer, rank, users_per_batch
from fused_rec.evaluation.suitability import suitable
from fused_rec.evaluation.top_k import random_order
from fused_rec.memory import require_memory
from fused_rec.rng import numbered_rng
from fused_rec.serving.recommender import CHUNK_USERS, RankedChunk, count_chunks, ranking_table

LOG = logging.getLogger(__name__)
SAMPLE = 500  # users on whom the number of lists is chosen, and as many others on whom recall is measured
LISTS_PER_ROOT = 4  # lists for each of the square root of I
POINTS, ROUNDS = 64, 10  # items per list that k-means reads, and its rounds
SPARE = 2  # candidates for each rank, beside those that the user has seen
MOST = 2000  # candidates of a user
AT_ONCE = 4096  # users whose candidates are tested together


@dataclasses.dataclass(frozen=True)
class ItemIndex:
    """Inverted file of the items that may be recommended, and what ranks exactly.

    Attributes:
      scorer: of the exact ranking.
      users: vectors of all users.
      candidates: what may be recommended to whom.
      rows: item rows in the order of the index.
      lists: Faiss index of their vectors.
      places: of each item in the order of equal scores.
      probes: lists that are read for a user.
    """

    scorer: Scorer
    users: Float32[np.ndarray, "U D"]
    candidates: CandidateFilter
    rows: Int64[np.ndarray, "C"]
    lists: Any
    places: Int32[np.ndarray, "I"]
    probes: int = 1

    @property
    def n_items(self) -> int:
        """I."""
        return len(self.places)

    def exact(self, users: Int[np.ndarray, "V"], k: int, progress: str = "") -> FilteredRanking:
        """Ranks users without the index; users: user rows, k: items per user, progress: label of the bar."""
        nothing = item_sets(np.zeros(0, np.int32), np.zeros(0, np.int32), len(self.users))
        batch = min(users_per_batch(self.n_items), max(1, len(users)))
        spec = RankingSpec(nothing, self.n_items, filter=self.candidates, batch_size=batch, progress=progress)
        return rank(self.scorer, users, spec, k)

    def rank(self, users: Int[np.ndarray, "V"], k: int) -> tuple[FilteredRanking, int]:
        """Ranks users with the index.

        Exclusions are counted among the candidates that the index returns, not among all items.

        Args:
          users: user rows.
          k: items per user.

        Returns:
          The rankings, and the number of users that were ranked exactly, having fewer than k candidates.
        """
        parts = [self._rank(users[start : start + AT_ONCE], k) for start in range(0, len(users), AT_ONCE)]
        found = FilteredRanking(*(np.concatenate(of_parts) for of_parts in zip(*parts, strict=True)))
        short = np.flatnonzero((found.items < 0).any(1))
        if len(short):
            for whole, part in zip(found, self.exact(users[short], k), strict=True):
                whole[short] = part
        return found, len(short)

    def _rank(self, users: Int[np.ndarray, "V"], k: int) -> FilteredRanking:
        wanted = min(SPARE * k + self._most_seen(users), MOST, len(self.rows))
        scores, places = self.lists.search(self.users[users], wanted)
        there = places >= 0
        items = np.where(there, self.rows[np.maximum(places, 0)], -1).astype(np.int32)
        items, scores = _in_order(items, np.where(there, scores + 0.0, -np.inf), self.places)
        there = items >= 0
        batch = min(256, users_per_batch(self.n_items))
        tests = [suitable(one, users, items, batch=batch) for one in _rules_of(self.candidates)]
        passes = np.stack(tests, 2) if tests else np.ones((*items.shape, 0), bool)
        refused = (~passes & there[:, :, None]).sum(2)
        alone = ~passes & there[:, :, None] & (refused == 1)[:, :, None]
        kept, top = _first(items, scores, there & (refused == 0), k)
        filled = min(k, items.shape[1])
        before = np.pad(items[:, :k], ((0, 0), (0, k - filled)), constant_values=-1)
        of_before = np.pad(passes[:, :k] & there[:, :k, None], ((0, 0), (0, k - filled), (0, 0)))
        counts = ((~passes & there[:, :, None]).sum(1).astype(np.int32), alone.sum(1).astype(np.int32))
        return FilteredRanking(kept, top, before, of_before, *counts)

    def _most_seen(self, users: Int[np.ndarray, "V"]) -> int:
        """Returns the number of items, in sets of single users, that 95 % of these users do not exceed."""
        sizes = sum((sets.sizes[users] for sets in self.candidates.excluded), np.zeros(len(users), np.int64))
        return int(np.quantile(sizes, 0.95, method="higher"))


def build_index(
    scorer: Scorer,
    users: Float32[np.ndarray, "U D"],
    items: Float32[np.ndarray, "I D"],
    candidates: CandidateFilter,
    seed: int = 0,
) -> ItemIndex:
    """Divides the items that may be recommended into lists.

    Args:
      scorer: of the exact ranking.
      users: vectors of all users.
      items: vectors of all items.
      candidates: what may be recommended to whom.
      seed: of the sample that k-means reads.

    Returns:
      The index; it reads one list.

    Raises:
      ImportError: Faiss is not installed.
      ValueError: no item may be recommended.
      InsufficientMemoryError: the index does not fit.
    """
    faiss = open_faiss("--index=ivf")
    rows = np.arange(len(items)) if candidates.items is None else np.asarray(candidates.items, np.int64)
    if not len(rows):
        raise ValueError("0 items may be recommended, and an index needs at least 1; allow others, or rank without it")
    require_memory(3 * 4 * len(rows) * items.shape[1], "the index of the products", "rank without --index")
    n_lists = max(1, min(round(LISTS_PER_ROOT * math.sqrt(len(rows))), len(rows) // 40))
    quantizer = faiss.IndexFlatIP(items.shape[1])
    lists = faiss.IndexIVFFlat(quantizer, items.shape[1], n_lists, faiss.METRIC_INNER_PRODUCT)
    lists.cp.spherical, lists.cp.niter, lists.cp.seed = True, ROUNDS, seed
    lists.cp.min_points_per_centroid, lists.cp.max_points_per_centroid = 1, POINTS
    vectors = np.ascontiguousarray(items[rows], np.float32)
    lists.train(vectors)
    lists.add(vectors)
    places = np.asarray(random_order(len(items), RankingSpec.seed).places(len(items)))
    return ItemIndex(scorer, users, candidates, rows, lists, places)


def with_recall(
    index: ItemIndex, users: Int[np.ndarray, "V"], k: int, least: float, seed: int = 0
) -> tuple[ItemIndex, dict[str, Any]]:
    """Chooses the number of lists to read, and measures the recall.

    Args:
      index: the index.
      users: rows of the users that will be ranked; two samples of `SAMPLE` of them are ranked exactly.
      k: items per user.
      least: smallest recall of the first sample; 1 may need all lists.
      seed: of the samples.

    Returns:
      The index, and what the audit file says of it: kind, lists, lists read, the recall asked for, that of the second
      sample (mean over users of the share of the exact list that is found), the share of its users whose list is
      complete, and its size.
    """
    drawn = numbered_rng(seed, 0).permutation(users)[: 2 * SAMPLE]
    choosing, judging = (drawn[::2], drawn[1::2]) if len(drawn) > 1 else (drawn, drawn)
    exact = index.exact(choosing, k).items
    probes = 1
    while True:
        chosen = set_probes(index, min(probes, index.lists.nlist))
        if recalls(chosen.rank(choosing, k)[0].items, exact).mean() >= least or probes >= index.lists.nlist:
            break
        probes *= 2
    found = recalls(chosen.rank(judging, k)[0].items, chosen.exact(judging, k).items)
    about = {"kind": "ivf", "lists": index.lists.nlist, "lists_read": chosen.probes, "recall_asked": least}
    return chosen, about | {
        "recall": float(found.mean()),
        "complete_lists": float((found == 1).mean()),
        "sample": len(judging),
    }


def rank_chunks_with(
    index: ItemIndex, dataset: Dataset, users: Int64[np.ndarray, "V"], k: int, *, first: int = 0
) -> Iterator[RankedChunk]:
    """Ranks users with the index, in the chunks of `recommender.rank_chunks`.

    Args:
      index: the index.
      dataset: tables.
      users: user rows.
      k: items per user.
      first: number of the first chunk.

    Yields:
      The rankings of each chunk.
    """
    for part in range(first, count_chunks(len(users))):
        own = users[part * CHUNK_USERS : (part + 1) * CHUNK_USERS]
        ranking, short = index.rank(own, k)
        LOG.info("part %d: %d of %d users were ranked exactly", part + 1, short, len(own))
        yield RankedChunk(ranking_table(dataset, own, ranking.items, ranking.scores), own, ranking)


def describe_recall(about: Mapping[str, Any]) -> str:
    """Says in words what `with_recall` measured."""
    customers = "1 customer" if about["sample"] == 1 else f"{about['sample']} customers"
    return (
        f"approximate: {about['lists_read']} of {about['lists']} lists of products are read; of the exact lists of "
        f"{customers} {about['recall']:.4f} is found, and {about['complete_lists']:.1%} are complete"
    )


def set_probes(index: ItemIndex, probes: int) -> ItemIndex:
    """Returns an index of the same lists that reads so many for each user; the earlier one reads as many."""
    index.lists.nprobe = probes
    return dataclasses.replace(index, probes=probes)


def recalls(found: Int32[np.ndarray, "V k"], exact: Int32[np.ndarray, "V k"]) -> Float32[np.ndarray, "V"]:
    """Returns each user's share of the exact list that was found; 1 for an empty list.

    Args:
      found: ranked items, -1 at empty ranks.
      exact: those of the exact ranking.
    """
    there = exact >= 0
    hits = np.array([np.isin(one[one >= 0], part).sum() for one, part in zip(exact, found, strict=True)])
    return np.where(there.any(1), hits / np.maximum(there.sum(1), 1), 1).astype(np.float32)


def open_faiss(what: str) -> Any:
    """Imports Faiss; raises ImportError, saying that `what` needs it."""
    logging.getLogger("faiss.loader").setLevel(logging.WARNING)  # it logs each build that it tries, as a failure
    try:
        import faiss
    except ImportError as error:
        raise ImportError(f"{what} needs the library faiss: pip install -e '.[faiss]'") from error
    return faiss


def _rules_of(candidates: CandidateFilter) -> Iterator[CandidateFilter]:
    """Yields a filter for each rule, in the order of the names."""
    for test in candidates.tests:
        yield CandidateFilter(("",), tests=(test,))
    for excluded in candidates.excluded:
        yield CandidateFilter(("",), excluded=(excluded,))


def _in_order(
    items: Int32[np.ndarray, "V C"], scores: Float32[np.ndarray, "V C"], places: Int32[np.ndarray, "I"]
) -> tuple[Int32[np.ndarray, "V C"], Float32[np.ndarray, "V C"]]:
    """Sorts candidates by score, equal ones by their places, as the exact ranking does."""
    order = np.lexsort((places[np.maximum(items, 0)], -scores), axis=1)  # empty places have -inf
    return np.take_along_axis(items, order, 1), np.take_along_axis(scores, order, 1)


def _first(
    items: Int32[np.ndarray, "V C"], scores: Float32[np.ndarray, "V C"], fine: Bool[np.ndarray, "V C"], k: int
) -> tuple[Int32[np.ndarray, "V k"], Float32[np.ndarray, "V k"]]:
    """Returns the first k fine candidates and their scores; -1 and -inf where there are fewer."""
    user, place = np.nonzero(fine)
    rank = np.cumsum(fine, 1)[user, place] - 1
    user, place, rank = (part[rank < k] for part in (user, place, rank))
    kept, top = np.full((len(items), k), -1, np.int32), np.full((len(items), k), -np.inf, np.float32)
    kept[user, rank], top[user, rank] = items[user, place], scores[user, place]
    return kept, top
