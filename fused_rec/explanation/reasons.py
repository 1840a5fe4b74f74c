"""Reasons for a recommendation: stable codes, sentences for people, records.

Contributions sum to the score, and their shares are stated. Order is by effect: by how much the score falls without the
source (`fused_rec.explanation.leave_one_out`); a contribution without a source counts as itself.
"""

from collections import Counter
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Float

from fused_rec.data.dataset import Dataset
from fused_rec.explanation.counterfactual import CounterfactualSet
from fused_rec.explanation.decomposition import (
    INTERACTION,
    LAUNCH,
    OWN_ID,
    OWN_TEXT,
    POPULARITY,
    SIMILAR_USERS,
    TIE,
    Contributions,
    scores,
)
from fused_rec.explanation.explained_model import ExplainedModel, contributions_and_effects

NAMED = 2  # items that a sentence names
LISTED = 20  # contributions that a record lists by source, largest effect first; the others are summed by kind
LEAST_SHARE = 0.05  # smallest share of the positive contributions that counts as a reason

# Codes are stable, since other systems count and filter by them. No sentence names another customer.
OTHER_TIE = "TIES"
CODES = {
    INTERACTION: "INTERACTIONS",
    OWN_TEXT: "OWN_TEXT",
    OWN_ID: "USER_EMBEDDING",
    SIMILAR_USERS: "SIMILAR_USERS",
    POPULARITY: "POPULAR",
    LAUNCH: "NEW",
}
NO_POSITIVE_CONTRIBUTION = "NO_POSITIVE_CONTRIBUTION"


class Reason(NamedTuple):
    """Reason with its code, its sentence and its share of the positive contributions, from 0 to 1."""

    code: str
    text: str
    share: float


def names(table: pa.Table, id_column: str) -> list[str]:
    """Returns display names of the rows: `name` if present, else the id.

    Args:
      table: user or item table.
      id_column: column of the ids.
    """
    ids = table.column(id_column).to_pylist()
    if "name" not in table.column_names:
        return ids
    return [name or own for name, own in zip(table.column("name").to_pylist(), ids, strict=True)]


def reasons(
    dataset: Dataset, contributed: Contributions, effect: Float[np.ndarray, "P n"], column: int = 0
) -> list[Reason]:
    """Lists the kinds of contributions with at least `LEAST_SHARE` of the positive ones, largest effect first.

    Args:
      dataset: tables, for display names.
      contributed: contributions of one user.
      effect: of `contributions_and_effects`.
      column: which of the items.

    Returns:
      At least one reason; `NO_POSITIVE_CONTRIBUTION` if no contribution is positive.
    """
    by_kind: dict[str, float] = {}
    weight: dict[str, float] = {}
    value, ranked_by = contributed.value[:, column], _weights(contributed, effect)[:, column]
    for kind, part, own in zip(contributed.kind, value.tolist(), ranked_by.tolist(), strict=True):
        by_kind[kind] = by_kind.get(kind, 0.0) + part
        weight[kind] = weight.get(kind, 0.0) + own
    in_favour = sum(part for part in by_kind.values() if part > 0)
    found = []
    for kind, part in sorted(by_kind.items(), key=lambda pair: -weight[pair[0]]):
        if part > 0 and part >= LEAST_SHARE * in_favour:
            mine = np.array([own == kind for own in contributed.kind]) & (value > 0)
            sentence = _sentence(dataset, kind, contributed.source[mine], ranked_by[mine])
            text = f"{sentence} ({part / in_favour:.0%} of what speaks for it)."
            found.append(Reason(CODES.get(kind, OTHER_TIE), text, part / in_favour))
    return found or [
        Reason(
            NO_POSITIVE_CONTRIBUTION,
            "Nothing known of the customer speaks for it; it is ranked by what speaks least against it.",
            0.0,
        )
    ]


def _weights(contributed: Contributions, effect: np.ndarray) -> np.ndarray:
    """By what contributions are ordered: effects, and the value of a contribution without a source."""
    return np.where(np.isnan(effect), contributed.value, effect)


def _sentence(dataset: Dataset, kind: str, source: np.ndarray, weight: np.ndarray) -> str:
    if kind == INTERACTION:
        best = names(dataset.items.take(source[np.argsort(-weight, kind="stable")][:NAMED]), "item_id")
        more = len(source) - len(best)
        return f"The customer holds {' and '.join(best)}" + (f" and {more} more" if more else "")
    if kind == OWN_TEXT:
        return "It fits what the customer says and is described as"
    if kind == OWN_ID:
        return "It fits what the customer has chosen so far as a whole"
    if kind == POPULARITY:
        return "How many customers hold it"
    if kind == LAUNCH:
        return "It is new, and customers are expected to take it"
    if kind == SIMILAR_USERS:
        return "Customers who say much the same lean towards it"
    tie = kind.removeprefix(TIE)
    if len(source) == 1:
        return f"1 customer tied to this one ({tie}) leans towards it"
    return f"{len(source)} customers tied to this one ({tie}) lean towards it"


def set_sentence(dataset: Dataset, found: CounterfactualSet) -> str:
    """Says without what another product would take an item's place; no other customer is named.

    Args:
      dataset: tables, for display names.
      found: of `fused_rec.explanation.counterfactual.counterfactual_set`.
    """
    items = np.array([source.row for source in found.sources if source.kind == INTERACTION], np.int64)
    parts = names(dataset.items.take(items), "item_id")
    for kind, count in Counter(source.kind for source in found.sources if source.kind != INTERACTION).items():
        customers = "1 customer" if count == 1 else f"{count} customers"
        said = "with much the same text" if kind == SIMILAR_USERS else f"tied to this one ({kind.removeprefix(TIE)})"
        parts.append(f"{customers} {said}")
    listed = " and ".join([", ".join(parts[:-1]), parts[-1]]) if len(parts) > 1 else parts[0]
    if found.entering < 0:
        return f"Without {listed} it would not be listed."
    [entering] = names(dataset.items.take([found.entering]), "item_id")
    return f"Without {listed} it would be {entering}."


def record(model: ExplainedModel, user: int, items: list[int]) -> list[dict[str, Any]]:
    """Builds the rows of reasons.jsonl.

    Args:
      model: of `fused_rec.explanation.explained_model.explained_model`.
      user: user row.
      items: item rows.

    Returns:
      For each item a dictionary with user_id, item_id, score, parts (kind, source, value, effect) and reasons (code,
      text). The values of the parts sum to the score. `effect` is the score minus the score without the source.
      `source` is the id of the item or neighboring user. Both are None for the user's own contributions, for popularity
      and launch prior, and for the sum of a kind beyond the `LISTED` largest.
    """
    dataset = model.inputs.dataset
    contributed, effect = contributions_and_effects(model, user, items)
    given, ranked_by = scores(model.decomposition, user), _weights(contributed, effect)
    ids = {INTERACTION: dataset.items.column("item_id")}
    user_ids = dataset.users.column("user_id")
    rows = []
    for column, item in enumerate(items):
        value, order = contributed.value[:, column], np.argsort(-np.abs(ranked_by[:, column]), kind="stable")
        listed = []
        for part in order[:LISTED].tolist():
            kind, source = contributed.kind[part], int(contributed.source[part])
            has_effect = not np.isnan(effect[part, column])
            listed.append(
                {
                    "kind": kind,
                    "source": ids.get(kind, user_ids)[source].as_py() if source >= 0 else None,
                    "value": float(value[part]),
                    "effect": float(effect[part, column]) if has_effect else None,
                }
            )
        rest: dict[str, float] = {}
        for part in order[LISTED:]:
            rest[contributed.kind[part]] = rest.get(contributed.kind[part], 0.0) + float(value[part])
        others = [{"kind": kind, "source": None, "value": part, "effect": None} for kind, part in rest.items()]
        rows.append(
            {
                "user_id": user_ids[user].as_py(),
                "item_id": ids[INTERACTION][item].as_py(),
                "score": float(given[item]),
                "parts": listed + others,
                "reasons": [
                    {"code": reason.code, "text": reason.text}
                    for reason in reasons(dataset, contributed, effect, column)
                ],
            }
        )
    return rows
