"""A model on one graph with everything that explains its scores, prepared once for many users."""

import dataclasses
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, PyTree

from fused_rec.config import Config
from fused_rec.explanation.decomposition import Contributions, ScoreDecomposition, contributions, decompose
from fused_rec.explanation.leave_one_out import Effects, LeaveOneOut, effects, leave_one_out
from fused_rec.explanation.own_reviews import own_reviews
from fused_rec.training.inputs import ModelInputs


class ExplainedModel(NamedTuple):
    """A model on one graph; see `explained_model`.

    Attributes:
      config: settings of the run.
      params: parameters.
      inputs: tables and graph.
      decomposition: of the model.
      leave_one_out: of the model.
    """

    config: Config
    params: PyTree
    inputs: ModelInputs
    decomposition: ScoreDecomposition
    leave_one_out: LeaveOneOut


def explained_model(
    config: Config, params: PyTree, inputs: ModelInputs, *, with_reviews: bool = True
) -> ExplainedModel:
    """Prepares contributions and effects.

    Args:
      config: settings of the run.
      params: parameters, not sharded.
      inputs: tables and graph, on the host.
      with_reviews: whether reviews are sources that can be removed, besides edges of the graph.

    Returns:
      The model for `contributions_and_effects`.

    Raises:
      ValueError: the model is a baseline.
    """
    decomposition = decompose(config, params, inputs.graph_inputs)
    reviews = own_reviews(config, inputs) if with_reviews else None
    left_out = leave_one_out(config, params, inputs.observed, inputs.graph_inputs, reviews)
    return ExplainedModel(config, params, inputs, decomposition, left_out)


def contributions_and_effects(
    model: ExplainedModel, user: int, items: Int[np.ndarray, "n"] | list[int]
) -> tuple[Contributions, Float[np.ndarray, "P n"]]:
    """Computes the contributions to the scores of items and the effects of their sources.

    Args:
      model: of `explained_model`.
      user: user row.
      items: n item rows.

    Returns:
      P contributions, and the leave-one-out effect of the source of each; NaN for contributions without a source: own
      text and ID embedding, popularity and launch prior.
    """
    contributed = contributions(model.decomposition, user, items)
    edges = dataclasses.replace(model.leave_one_out, reviews=None)  # no contribution has a review as its source
    return contributed, _aligned(effects(edges, user, items), contributed)


def _aligned(found: Effects, contributed: Contributions) -> np.ndarray:
    of = dict(zip(zip(found.kind, found.source.tolist(), strict=True), found.value, strict=True))
    nothing = np.full(contributed.value.shape[1], np.nan)
    keys = zip(contributed.kind, contributed.source.tolist(), strict=True)
    return np.stack([of.get(key, nothing) for key in keys])
