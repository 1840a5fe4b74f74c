"""Scores of vectors on the host: the best items, pairs of users and items, and who or what is scored alike.

U users, I items, D columns of a vector, P pairs, B users per batch, N rows of either side.
"""

import functools
from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool, Float32, Int32, Int64

from fused_rec.evaluation.filters import Side

ROWS = 4096  # at once, so that no copy of all vectors is needed


def best_items(
    scores: Float32[np.ndarray, "B I"], eligible: Bool[np.ndarray, "B I"], places: Int32[np.ndarray, "I"], k: int
) -> tuple[Int32[np.ndarray, "B k"], Float32[np.ndarray, "B k"]]:
    """Selects the k best eligible items of each user, as `fused_rec.evaluation.top_k.top_k_filtered` does.

    Args:
      scores: finite scores of all items.
      eligible: candidates.
      places: of each item in the order of equal scores.
      k: number of items.

    Returns:
      Items (-1 if fewer), and their scores (-inf if fewer).
    """
    items, top = np.full((len(scores), k), -1, np.int32), np.full((len(scores), k), -np.inf, np.float32)
    for user, row in enumerate(np.where(eligible, scores + 0.0, -np.inf)):  # + 0: 0 for -0
        least = np.partition(row, -k)[-k] if k < len(row) else -np.inf
        found = np.flatnonzero((row >= least) & (row > -np.inf))
        best = found[np.lexsort((places[found], -row[found]))[:k]]
        items[user, : len(best)], top[user, : len(best)] = best, row[best]
    return items, top


def pair_scores(
    users: Float32[np.ndarray, "U D"],
    items: Float32[np.ndarray, "I D"],
    user: Int64[np.ndarray, "P"],
    item: Int64[np.ndarray, "P"],
) -> Float32[np.ndarray, "P"]:
    """Computes inner products of pairs of rows.

    Args:
      users: vectors of all users.
      items: vectors of all items.
      user: user row of each pair.
      item: item row of each pair.

    Returns:
      The scores.
    """
    scores = np.empty(len(user), np.float32)
    for rows in _blocks(len(user)):
        scores[rows] = np.einsum("pd,pd->p", users[user[rows]], items[item[rows]])
    return scores


def _blocks(n: int) -> Iterator[slice]:
    return (slice(start, start + ROWS) for start in range(0, n, ROWS))


class ScoreCorrelation:
    """Cosines of rows and of columns of the scores X = U Y', each row less its mean, without computing X.

    With the item vectors centered, of two users it is the correlation of their scores over the items,
    u'(Y'Y)v / sqrt(u'(Y'Y)u v'(Y'Y)v), and of two items the adjusted cosine over the users (Sarwar et al., WWW 2001),
    with U'U in the place of Y'Y. A row without any variation has cosine 0 with all others.

    Args:
      users: vectors of all users.
      items: vectors of all items.
    """

    def __init__(self, users: Float32[np.ndarray, "U D"], items: Float32[np.ndarray, "I D"]):
        self._mean = items.mean(0)
        self._rows: dict[Side, np.ndarray] = {"user": users, "item": items}

    @functools.cached_property
    def _of_user(self) -> tuple[np.ndarray, np.ndarray]:
        return self._products("user", self._gram("item"))

    @functools.cached_property
    def _of_item(self) -> tuple[np.ndarray, np.ndarray]:
        return self._products("item", self._gram("user"))

    def nearest(self, side: Side, row: int, k: int) -> tuple[Int64[np.ndarray, "k"], Float32[np.ndarray, "k"]]:
        """Finds the rows with the largest cosines with a row.

        Args:
          side: "user" or "item".
          row: the row.
          k: number of other rows; fewer if there are fewer.

        Returns:
          The other rows, best first, equal ones by row, and their cosines.
        """
        gram, norms = self._of_user if side == "user" else self._of_item
        direction = gram @ self._centered(side, slice(row, row + 1))[0]
        products = np.concatenate([self._centered(side, rows) @ direction for rows in _blocks(len(norms))])
        scale = norms * norms[row]
        cosines = np.where(scale > 0, products / np.where(scale > 0, scale, 1), 0).clip(-1, 1)
        order = np.argsort(-cosines, kind="stable")
        best = order[order != row][:k]
        return best, cosines[best].astype(np.float32)

    def _centered(self, side: Side, rows: slice) -> Float32[np.ndarray, "N D"]:
        return self._rows[side][rows] - self._mean if side == "item" else self._rows[side][rows]

    def _gram(self, side: Side) -> Float32[np.ndarray, "D D"]:
        parts = (self._centered(side, rows) for rows in _blocks(len(self._rows[side])))
        return sum((part.T @ part for part in parts), np.zeros((len(self._mean),) * 2, np.float32))

    def _products(self, side: Side, gram: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the matrix of the inner product, and the norm of each row by it."""
        parts = (self._centered(side, rows) for rows in _blocks(len(self._rows[side])))
        squares = np.concatenate([((part @ gram) * part).sum(1) for part in parts])
        return gram, np.sqrt(np.maximum(squares, 0))
