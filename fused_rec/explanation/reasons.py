"""Reasons for a recommendation: stable codes, sentences for people, records.

Contributions sum to the score, and their shares are stated. Order is by effect: by how much the score falls without the
source (`fused_rec.explanation.leave_one_out`); a contribution without a source counts as itself.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Float

from fused_rec.data.dataset import Dataset
from fused_rec.evaluation.ranking import CandidateFilter
from fused_rec.evaluation.suitability import suitable
from fused_rec.explanation.catalogs import ENGLISH, Catalog
from fused_rec.explanation.counterfactual import CounterfactualSet, counterfactual_sets
from fused_rec.explanation.decomposition import (
    INTERACTION,
    LAUNCH,
    OWN_ID,
    OWN_TEXT,
    POPULARITY,
    REVIEW,
    SIMILAR_USERS,
    TIE,
    Contributions,
    scores,
)
from fused_rec.explanation.explained_model import ExplainedModel, contributions_and_effects
from fused_rec.explanation.token_attribution import Attributor, attribute_tokens, largest_words

NAMED = 2  # items that a sentence names
LISTED = 20  # contributions that a record lists by source, largest effect first; the others are summed by kind
WORD_TEXTS = 2  # of the user and of the item whose words are listed
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


class Content(NamedTuple):
    """What rows of reasons.jsonl have.

    Attributes:
      catalog: sentences of a language.
      user_ids: whether parts name other users by their ids.
      k: length of the list whose counterfactual sets the rows have; 0 without.
      candidates: of that list.
    """

    catalog: Catalog = ENGLISH
    user_ids: bool = False
    k: int = 0
    candidates: CandidateFilter = CandidateFilter()


PLAIN = Content()


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
    dataset: Dataset,
    contributed: Contributions,
    effect: Float[np.ndarray, "P n"],
    column: int = 0,
    catalog: Catalog = ENGLISH,
) -> list[Reason]:
    """Lists the kinds of contributions with at least `LEAST_SHARE` of the positive ones, largest effect first.

    Args:
      dataset: tables, for display names.
      contributed: contributions of one user.
      effect: of `contributions_and_effects`.
      column: which of the items.
      catalog: sentences of a language.

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
            sentence = _sentence(dataset, kind, contributed.source[mine], ranked_by[mine], catalog)
            percent = catalog.say("percent", round(100 * part / in_favour))
            text = catalog.say("share", sentence=sentence, percent=percent)
            found.append(Reason(CODES.get(kind, OTHER_TIE), text, part / in_favour))
    return found or [Reason(NO_POSITIVE_CONTRIBUTION, catalog.say("nothing"), 0.0)]


def _weights(contributed: Contributions, effect: np.ndarray) -> np.ndarray:
    """By what contributions are ordered: effects, and the value of a contribution without a source."""
    return np.where(np.isnan(effect), contributed.value, effect)


def _sentence(dataset: Dataset, kind: str, source: np.ndarray, weight: np.ndarray, catalog: Catalog) -> str:
    if kind == INTERACTION:
        best = names(dataset.items.take(source[np.argsort(-weight, kind="stable")][:NAMED]), "item_id")
        more = len(source) - len(best)
        return catalog.say(kind, items=catalog.joined([*best, catalog.say("more", more)] if more else best))
    if kind.startswith(TIE):
        return catalog.say("tie", len(source), tie=kind.removeprefix(TIE))
    return catalog.say(kind)


def set_sentence(dataset: Dataset, found: CounterfactualSet, catalog: Catalog = ENGLISH) -> str:
    """Says to a user without what they would see another product; no other user is named.

    Args:
      dataset: tables, for display names.
      found: of `fused_rec.explanation.counterfactual.counterfactual_set`.
      catalog: sentences of a language.
    """
    of_items = ([source.row for source in found.sources if source.kind == kind] for kind in (INTERACTION, REVIEW))
    held, reviewed = (names(dataset.items.take(np.array(rows, np.int64)), "item_id") for rows in of_items)
    parts = held + [catalog.say("review", item=item) for item in reviewed]
    others = (source.kind for source in found.sources if source.kind not in (INTERACTION, REVIEW))
    for kind, count in Counter(others).items():
        said = "similar customers" if kind == SIMILAR_USERS else "tied customers"
        parts.append(catalog.say(said, count, **({} if kind == SIMILAR_USERS else {"tie": kind.removeprefix(TIE)})))
    sources, count = catalog.joined(parts), len(found.sources)
    leaves = found.rank < found.rank_after
    other = found.entering if leaves else found.leaving
    if other < 0:
        return catalog.say("leaves for nothing", count, sources=sources)
    [item] = names(dataset.items.take([other]), "item_id")
    return catalog.say("leaves" if leaves else "enters", count, sources=sources, item=item)


def set_record(dataset: Dataset, found: CounterfactualSet, catalog: Catalog = ENGLISH) -> dict[str, Any]:
    """Returns a counterfactual set as JSON values, as `fused_rec.run.Run.counterfactual_set` describes them."""
    ids = dataset.items["item_id"]
    named = [
        {"kind": source.kind, "item_id": ids[source.row].as_py() if source.kind in (INTERACTION, REVIEW) else None}
        for source in found.sources
    ]
    return {
        "sources": named,
        "smallest": found.smallest,
        "rank": found.rank,
        "rank_after": found.rank_after,
        "entering": ids[found.entering].as_py() if found.entering >= 0 else None,
        "leaving": ids[found.leaving].as_py(),
        "text": set_sentence(dataset, found, catalog),
    }


def record(model: ExplainedModel, user: int, items: list[int], content: Content = PLAIN) -> list[dict[str, Any]]:
    """Builds the rows of reasons.jsonl.

    Args:
      model: of `fused_rec.explanation.explained_model.explained_model`.
      user: user row.
      items: item rows.
      content: what the rows have.

    Returns:
      For each item a dictionary with user_id, item_id, score, parts (kind, source, value, effect) and reasons (code,
      text). The values of the parts sum to the score. `effect` is the score minus the score without the source.
      `source` is the id of the item, or with `user_ids` of the other user. Both are None for the user's own
      contributions, for popularity and launch prior, and for the sum of a kind beyond the `LISTED` largest. With `k`
      also `set`, of `set_record`; None where there is none.
    """
    dataset = model.inputs.dataset
    contributed, effect = contributions_and_effects(model, user, items)
    given, ranked_by = scores(model.decomposition, user), _weights(contributed, effect)
    user_id, item_ids = dataset.users["user_id"][user].as_py(), dataset.items["item_id"]
    source_ids = _source_ids(dataset, contributed, content.user_ids)
    rows = []
    for column, item in enumerate(items):
        value, order = contributed.value[:, column], np.argsort(-np.abs(ranked_by[:, column]), kind="stable")
        parts = [
            {
                "kind": contributed.kind[part],
                "source": source_ids[part],
                "value": float(value[part]),
                "effect": None if np.isnan(effect[part, column]) else float(effect[part, column]),
            }
            for part in order[:LISTED].tolist()
        ]
        rest: dict[str, float] = {}
        for part in order[LISTED:]:
            rest[contributed.kind[part]] = rest.get(contributed.kind[part], 0.0) + float(value[part])
        parts += [{"kind": kind, "source": None, "value": part, "effect": None} for kind, part in rest.items()]
        found = reasons(dataset, contributed, effect, column, content.catalog)
        rows.append(
            {
                "user_id": user_id,
                "item_id": item_ids[item].as_py(),
                "score": float(given[item]),
                "parts": parts,
                "reasons": [{"code": reason.code, "text": reason.text} for reason in found],
            }
        )
    if content.k:
        for row, found in zip(rows, _sets(model, user, items, content), strict=True):
            row["set"] = found and set_record(dataset, found, content.catalog)
    return rows


def _source_ids(dataset: Dataset, contributed: Contributions, user_ids: bool) -> list[str | None]:
    """The id of each source; None for other users, unless they are asked for."""
    ids = {INTERACTION: dataset.items["item_id"]}
    return [
        ids.get(kind, dataset.users["user_id"])[source].as_py()
        if source >= 0 and (kind == INTERACTION or user_ids)
        else None
        for kind, source in zip(contributed.kind, contributed.source.tolist(), strict=True)
    ]


def _sets(model: ExplainedModel, user: int, items: list[int], content: Content) -> list[CounterfactualSet | None]:
    """The counterfactual set of each item that is a candidate."""
    everything = np.arange(model.inputs.dataset.n_items)
    [eligible] = suitable(content.candidates, np.array([user]), everything[None])
    ranked = [item for item in items if eligible[item]]
    found = counterfactual_sets(model.leave_one_out, model.inputs, user, ranked, content.k, eligible)
    by_item = dict(zip(ranked, found, strict=True))
    return [by_item.get(item) for item in items]


def add_words(
    rows: list[dict[str, Any]],
    read: Attributor,
    pairs: list[tuple[int, int]],
    done: Callable[[int], Any] | None = None,
) -> None:
    """Adds `words` to rows of `record`: the words of both nodes' own texts with the largest attributions.

    Args:
      rows: rows, which are changed; `words` is of `largest_words`, or None where attributions do not sum to the score.
      read: of `fused_rec.explanation.token_attribution.attributor`.
      pairs: user and item row of each.
      done: called with 1 after each pair.
    """
    for row, found in zip(rows, attribute_tokens(read, pairs, limit=WORD_TEXTS, done=done), strict=True):
        row["words"] = found and largest_words(found)
