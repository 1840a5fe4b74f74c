"""Launch prior: what is added to the scores of new items, those without interactions, so that they can be ranked.

Most components of the fused score (`fused_rec.model.late_fusion`) place an item without interactions below all others:
log(1 + 0) is 0, and nobody's history relates to it. A new item i therefore gets

    level + slope * p_i + taste * <mean item text of the user, text of i>

with its expected popularity p_i, which a ridge regression on text predicts from the items with interactions. p_i and,
for each user, the last product have mean 0 and standard deviation 1 over the new items. Other items get nothing.
"""

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from fused_rec.baselines.factors import Factors, UserSource
from fused_rec.baselines.neighbors import Interactions

L2 = 30.0  # ridge penalty of the regression of log(1 + interactions) on unit text vectors
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
    """Predicts popularity from text, by ridge regression over the items with interactions.

    Args:
      interactions: training interactions, with text features of items if there are any.

    Returns:
      Predicted log(1 + number of interactions), standardized over the new items with text; 0 for other items, and where
      all predictions are equal.
    """
    found = np.zeros(interactions.n_items)
    new = _with_text(interactions, new_items(interactions))
    known = _with_text(interactions, ~new_items(interactions))
    if not new.any() or not known.any():
        return found
    text = interactions.require_item_text("the launch prior")
    counts = np.log1p(np.bincount(interactions.item, minlength=interactions.n_items)[known])
    mean = text[known].mean(0, dtype=np.float64)
    centered = text[known] - mean
    coefficients = np.linalg.solve(
        centered.T @ centered + L2 * np.eye(len(mean)), centered.T @ (counts - counts.mean())
    )
    predicted = (text[new] - mean) @ coefficients
    spread = predicted.std()
    found[new] = (predicted - predicted.mean()) / spread if spread > FLAT else 0
    return found


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
    told = _with_text(interactions, new)
    if launch.taste and told.any():
        text = interactions.require_item_text("the launch prior")
        rows = np.where(told[:, None], text - text[told].mean(0), 0).astype(np.float32)
        # Scores are 0 outside `told` and have mean 0 inside: their variance over all items is that inside, times this.
        yield LaunchPart(TASTE, launch.taste * float(told.mean()) ** 0.5, Factors(text, rows, rows.shape[1]), "items")


def _with_text(interactions: Interactions, items: Bool[np.ndarray, "I"]) -> Bool[np.ndarray, "I"]:
    text = interactions.item_text
    return items & (False if text is None else text.any(1))
