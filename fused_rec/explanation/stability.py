"""Stability of reasons: which of them another run gives for the same customer and product.

Reasons and sources are compared by codes and ids, since the rows of two runs may differ.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from fused_rec.data.dataset import Dataset
from fused_rec.evaluation.list_changes import rank_correlation
from fused_rec.explanation.decomposition import INTERACTION, Contributions
from fused_rec.explanation.explained_model import ExplainedModel, contributions_and_effects
from fused_rec.explanation.reasons import CODES, reasons

TOP = 3  # sources, and interactions of a reason, that count as the first ones
LEAST_COMMON = 5  # fewest sources of which effects are correlated

Source = tuple[str, str]  # kind, and id of the item or neighboring user


class ExplainedItem(NamedTuple):
    """The reasons of one run for one product of one customer.

    Attributes:
      item_id: id of the product.
      codes: of the reasons, in their order.
      effects: leave-one-out effect of each source.
    """

    item_id: str
    codes: tuple[str, ...]
    effects: Mapping[Source, float]

    def first(self, kind: str | None = None) -> list[Source]:
        """Returns up to `TOP` sources, of one kind or of all, in descending order of effect."""
        own = [source for source in self.effects if kind in (None, source[0])]
        return sorted(own, key=lambda source: (-self.effects[source], source))[:TOP]


class ReasonAgreement(NamedTuple):
    """How far the reasons of a second run agree with those of a first, for one product of one customer, from 0 to 1.

    Attributes:
      first_reason: whether the first reason has the same code.
      reasons: share of the first run's reasons that survive (`survives`).
      sources: share of the `TOP` sources with the largest effects that are among the second run's; NaN for a customer
        with no more sources than that.
      chance: what a random choice of sources would give.
      effects: rank correlation of the effects of common sources; NaN with fewer than `LEAST_COMMON`.
    """

    first_reason: float
    reasons: float
    sources: float
    chance: float
    effects: float


def explained_item(
    dataset: Dataset, contributed: Contributions, effect: Float[np.ndarray, "P n"], column: int, item: int
) -> ExplainedItem:
    """Collects what is compared of the explanation of an item.

    Args:
      dataset: tables.
      contributed: of `contributions_and_effects`.
      effect: of `contributions_and_effects`.
      column: which of the items of both.
      item: row of that item.
    """
    item_ids, user_ids = dataset.items["item_id"], dataset.users["user_id"]
    effects = {}
    for kind, source, value in zip(contributed.kind, contributed.source.tolist(), effect[:, column], strict=True):
        if not np.isnan(value):
            ids = item_ids if kind == INTERACTION else user_ids
            effects[kind, ids[source].as_py()] = float(value)
    codes = tuple(reason.code for reason in reasons(dataset, contributed, effect, column))
    return ExplainedItem(item_ids[item].as_py(), codes, effects)


def explained_items(model: ExplainedModel, user: int, items: Sequence[int]) -> list[ExplainedItem]:
    """Explains items of a user.

    Args:
      model: of `fused_rec.explanation.explained_model.explained_model`.
      user: user row.
      items: item rows.
    """
    contributed, effect = contributions_and_effects(model, user, list(items))
    return [explained_item(model.inputs.dataset, contributed, effect, place, item) for place, item in enumerate(items)]


def survives(code: str, before: ExplainedItem, after: ExplainedItem) -> bool:
    """Tells whether a reason holds in another run.

    It does if the other run gives a reason with the same code and, where it names interactions, if the one with the
    largest effect is among the first `TOP` there.

    Args:
      code: code of a reason in `before`.
      before: the run that gives the reason.
      after: the other run, for the same customer and product.
    """
    if code not in after.codes:
        return False
    named = before.first(INTERACTION)[:1] if code == CODES[INTERACTION] else []
    return all(source in after.first(INTERACTION) for source in named)


def agreement(before: ExplainedItem, after: ExplainedItem) -> ReasonAgreement:
    """Compares the reasons of two runs for the same customer and product."""
    kept = [survives(code, before, after) for code in before.codes]
    sources = chance = correlation = np.nan
    if len(before.effects) > TOP:
        second = after.first()
        sources = np.mean([source in second for source in before.first()])
        common_share = len(before.effects.keys() & after.effects.keys()) / len(before.effects)
        chance = common_share * min(1.0, TOP / max(len(after.effects), 1))
    if len(common := sorted(before.effects.keys() & after.effects.keys())) >= LEAST_COMMON:
        values = [np.array([[run.effects[source] for source in common]]) for run in (before, after)]
        correlation = rank_correlation(*values)[0]
    first = before.codes[:1] == after.codes[:1]
    return ReasonAgreement(float(first), float(np.mean(kept)), float(sources), float(chance), float(correlation))
