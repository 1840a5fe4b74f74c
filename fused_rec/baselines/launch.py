"""Launch prior: what is added to the scores of new items, those without interactions, so that they can be ranked.

Most components of the fused score (`fused_rec.model.late_fusion`) place an item without interactions below all others:
log(1 + 0) is 0, and nobody's history relates to it. A new item i therefore gets

    level + slope * p_i + taste * <mean item text of the user, text of i>

with its expected popularity p_i, which a ridge regression on text predicts from what items sold that were new at
earlier times. p_i and, for each user, the last product have mean 0 and standard deviation 1 over the new items with
text. Other items get nothing.
"""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from fused_rec.baselines.factors import Factors, UserSource
from fused_rec.baselines.neighbors import Interactions

L2 = 30.0  # ridge penalty of the regression on unit text vectors
REWINDS, PERIOD = 5, 0.1  # launches are read off the last half of the interactions, a tenth at a time
PRIOR, TASTE = "launch_prior", "launch_taste"  # names of the components
FLAT = 1e-6  # a smaller standard deviation is rounding


@dataclasses.dataclass(frozen=True)
class Launch:
    """Weights of the launch prior, in units of the fused score.

    Attributes:
      level: added to every new item.
      slope: weight of expected popularity.
      taste: weight of the user's text.
    """

    level: float
    slope: float = 0.0
    taste: float = 0.0


class LaunchPart(NamedTuple):
    """A part of the launch prior as a component of the fused score.

    Attributes:
      name: `PRIOR` or `TASTE`.
      weight: of standardized scores: where a component's scores are divided by their standard deviation over all items,
        this restores the units of `Launch`, whatever the share of new items.
      factors: rows, 0 for items with interactions.
      user_source: where the user vectors come from.
    """

    name: str
    weight: float
    factors: Factors
    user_source: UserSource


def new_items(interactions: Interactions) -> Bool[np.ndarray, "I"]:
    """Marks the items without interactions."""
    return np.bincount(interactions.item, minlength=interactions.n_items) == 0


def expected_popularity(interactions: Interactions) -> Float[np.ndarray, "I"]:
    """Predicts the number of interactions of new items from text, by ridge regression over past launches.

    Counts themselves, not their logarithms: a recommendation is a hit as often as the item is taken.

    Args:
      interactions: training interactions, with text features of items if there are any.

    Returns:
      Predicted numbers, standardized over the new items with text; 0 for other items, and where all predictions are
      equal.
    """
    found = np.zeros(interactions.n_items)
    new = _with_text(interactions, new_items(interactions))
    items, counts = _launches(interactions)
    if not new.any() or not len(items):
        return found
    text = interactions.require_item_text("the launch prior")
    mean = text[items].mean(0, dtype=np.float64)
    centered = text[items] - mean
    coefficients = np.linalg.solve(
        centered.T @ centered + L2 * np.eye(len(mean)), centered.T @ (counts - counts.mean())
    )
    predicted = (text[new] - mean) @ coefficients
    spread = predicted.std()
    found[new] = (predicted - predicted.mean()) / spread if spread > FLAT else 0
    return found


def _launches(interactions: Interactions) -> tuple[Int[np.ndarray, "n"], Int[np.ndarray, "n"]]:
    """Items with text that were new at a time inside the training interactions, and how many users then took them.

    There are `REWINDS` cuts; the period after each is `PERIOD` of the interactions, and items that nobody took in it
    count as well. Without times every item with interactions is one launch, with all of them.
    """
    item, n_items, age = interactions.item, interactions.n_items, interactions.age
    if age is None or not len(age) or np.ptp(age) == 0:
        counts = np.bincount(item, minlength=n_items)
        items = np.flatnonzero(_with_text(interactions, counts > 0))
        return items, counts[items]
    ordered = item[np.argsort(-age, kind="stable")]
    cuts = [round(len(item) * (1 - PERIOD * number)) for number in range(REWINDS + 1)]
    found = []
    for end, start in itertools.pairwise(cuts):
        new = _with_text(interactions, np.bincount(ordered[:start], minlength=n_items) == 0)
        found.append((np.flatnonzero(new), np.bincount(ordered[start:end], minlength=n_items)[new]))
    items, counts = zip(*found, strict=True)
    return np.concatenate(items), np.concatenate(counts)


def launch_parts(interactions: Interactions, launch: Launch) -> Iterator[LaunchPart]:
    """Yields the components of a launch prior.

    Args:
      interactions: training interactions, with text features of items if there are any.
      launch: its weights.

    Yields:
      `PRIOR`, and `TASTE` if it has a weight and new items have text; nothing if there are no new items or no others.
    """
    new = new_items(interactions)
    if not new.any() or new.all():
        return
    prior = np.where(new, launch.level + launch.slope * expected_popularity(interactions), 0).astype(np.float32)
    nothing = np.zeros((len(new), 0), np.float32)
    yield LaunchPart(PRIOR, float(prior.std()), Factors(nothing, prior[:, None]), "constant")
    described = _with_text(interactions, new)
    if launch.taste and described.any():
        text = interactions.require_item_text("the launch prior")
        rows = np.where(described[:, None], text - text[described].mean(0), 0).astype(np.float32)
        # Scores are 0 outside `described` and have mean 0 inside: inside, their variance is larger by 1 / share.
        share = float(described.mean())
        yield LaunchPart(TASTE, launch.taste * share**0.5, Factors(text, rows, rows.shape[1]), "items")


def _with_text(interactions: Interactions, items: Bool[np.ndarray, "I"]) -> Bool[np.ndarray, "I"]:
    text = interactions.item_text
    return items & (False if text is None else text.any(1))
