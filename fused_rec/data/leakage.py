"""Leakage audit before training: checks that the observed data contains nothing held out.

Everything is derived again from the dataset and the rows of the split, row by row and without `splits.observe`, so
that the audit also finds errors of `observe` and of tables built without it.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from fused_rec.data.dataset import Dataset, column
from fused_rec.data.node_texts import ITEM, USER, NodeTexts
from fused_rec.data.splits import SPLIT_NAMES, Observed, Split
from fused_rec.memory import require_memory

PASSAGE_WORDS = 5  # shorter texts recur by chance ("great product"); longer ones name their source
PAIR_BYTES = 160  # a pair of numbers in a Python set
SHOWN = 5  # rows listed of each finding


class LeakError(ValueError):
    """Error for observed data that leaks held-out data; the message lists rows and remedies."""


def audit(
    dataset: Dataset, split: Split, observed: Observed, texts: NodeTexts, splits: tuple[str, ...] = ("train",)
) -> dict[str, int]:
    """Checks that observed data and node texts leak nothing held out.

    Checked:

    - the splits and the dropped rows are disjoint, complete and consistent with the split's kind and new items;
    - every observed pair is an interaction of the known splits, never a dropped one;
    - every observed review and social edge is a row of the dataset that leaks no held-out pair (no held-out item or
      user for new_items and new_users) and is dated before the cut;
    - every text of a node is its own description or such a review;
    - no withheld review of at least 5 words occurs verbatim (up to case and spacing) in the strings, `name` excepted,
      of its user's or its item's row.

    Not detected: paraphrases, excerpts, and numbers computed from held-out rows. Controls that rewire social edges or
    shuffle texts are applied after the audit.

    Args:
      dataset: the data that was split.
      split: the split to check.
      observed: the observable data, from `fused_rec.data.splits.observe` or built otherwise.
      texts: the node texts, from `fused_rec.data.node_texts.node_texts` or built otherwise.
      splits: names of the known splits, as in `observe`.

    Returns:
      Number of rows checked or withheld, by description.

    Raises:
      LeakError: something held out is observed; lists all findings.
      MemoryError: the audit would not fit into memory.
    """
    rows = dataset.interactions.num_rows + len(observed.user) + dataset.reviews.num_rows + dataset.ties.num_rows
    require_memory(
        PAIR_BYTES * rows, f"the leak audit of {rows:,} rows", "raise data.k_core, or give fewer reviews and ties"
    )
    withheld = _withheld(dataset, split, splits)
    review_faults = _review_faults(dataset, withheld)
    tie_faults = _tie_faults(dataset, withheld)
    passages = _passages(dataset, review_faults)
    findings = [
        *_in_split(dataset, split),
        *_in_interactions(dataset, observed, withheld),
        *_in_table("review", dataset.reviews, review_faults, observed.reviews),
        *_in_table("tie", dataset.ties, tie_faults, observed.ties),
        *_in_node_texts(dataset, texts, review_faults),
        *_in_descriptions(dataset, passages),
    ]
    if findings:
        raise LeakError("\n".join(["held-out data is observed:", *(f"  {finding}" for finding in findings)]))
    return {
        "observed interactions": len(observed.user),
        "held-out interactions": len(withheld.pairs),
        "observed reviews": observed.reviews.num_rows,
        "withheld reviews": sum(map(bool, review_faults)),
        "observed ties": observed.ties.num_rows,
        "withheld tie rows": sum(map(bool, tie_faults)),
        "texts of nodes": sum(len(links.nodes) for links in texts.links.values()),
        "withheld passages searched for": sum(map(len, passages.values())),
    }


@dataclass(frozen=True)
class _Withheld:
    """Held-out pairs, nodes and time."""

    pairs: set[tuple[int, int]]
    users: set[int]
    items: set[int]
    cut: int | None

    def leaks(self, users: list[int], items: list[int | None]) -> list[str]:
        """Explains why each (user, item) is withheld; empty = it may be observed, as where item is None."""

        def why(user, item):
            if item is None:
                return ""
            if (user, item) in self.pairs:
                return "leaks a held-out interaction"
            if item in self.items:
                return "leaks a held-out item"
            return "is an act of a held-out user" if user in self.users else ""

        return list(map(why, users, items))

    def late(self, times: list[int | None]) -> list[str]:
        """Explains why each timestamp is withheld; empty = it comes before the cut."""

        def why(seconds):
            if seconds is None:
                return "has no timestamp, under a split by time"
            return f"is dated {seconds}, not before the cut at {self.cut}" if seconds >= self.cut else ""

        return [""] * len(times) if self.cut is None else list(map(why, times))


def _withheld(dataset: Dataset, split: Split, splits: tuple[str, ...]) -> _Withheld:
    """Collects what is held out when `splits` are known."""
    mask = np.ones(dataset.interactions.num_rows, bool)
    mask[np.concatenate([getattr(split, name) for name in splits])] = False
    users, items = (column(dataset.interactions, name)[mask].tolist() for name in ("user", "item"))
    pairs = set(zip(users, items, strict=True))
    mask[split.dropped] = False  # withheld pairs of users and items that are known
    users, items = (set(column(dataset.interactions, name)[mask].tolist()) for name in ("user", "item"))
    cut = split.valid_from if "valid" not in splits else split.test_from if "test" not in splits else None
    return _Withheld(
        pairs,
        users if split.kind == "new_users" else set(),
        (items if split.kind == "new_items" else set()) | set(split.new_items.tolist()),
        cut,
    )


def _cells(table: pa.Table, name: str) -> list:
    """Returns a column as a list, all None without it."""
    return table.column(name).to_pylist() if name in table.column_names else [None] * table.num_rows


def _rows(table: pa.Table, names: Collection[str]) -> list[tuple]:
    """Returns the rows of the named columns as tuples."""
    return list(zip(*(_cells(table, name) for name in names), strict=True))


def _review_faults(dataset: Dataset, withheld: _Withheld) -> list[str]:
    """Explains why each review is withheld; empty = it may be observed."""
    user, item, text, moment = (_cells(dataset.reviews, name) for name in ("user", "item", "text", "timestamp"))
    leaking = withheld.leaks(user, item)
    acts = list(zip(user, text, moment, strict=True))
    posts = {
        act for act, fault in zip(acts, leaking, strict=True) if fault and len((act[1] or "").split()) >= PASSAGE_WORDS
    }
    post = "is the same post as a review that leaks held-out data"
    late = withheld.late(moment)
    return [leaking[k] or (post if act in posts else "") or late[k] for k, act in enumerate(acts)]


def _tie_faults(dataset: Dataset, withheld: _Withheld) -> list[str]:
    """Explains why each social edge is withheld; empty = it may be observed."""
    acts, item = _rows(dataset.ties, ("source", "target", "kind", "timestamp")), _cells(dataset.ties, "item")
    by_source = withheld.leaks(_cells(dataset.ties, "source"), item)
    by_target = withheld.leaks(_cells(dataset.ties, "target"), item)
    leaking = [one or other for one, other in zip(by_source, by_target, strict=True)]
    leaking_acts = {act for act, fault in zip(acts, leaking, strict=True) if fault}
    late = withheld.late(_cells(dataset.ties, "timestamp"))
    sibling = "was observed in an act on something held out"
    return [leaking[k] or (sibling if act in leaking_acts else "") or late[k] for k, act in enumerate(acts)]


def _report(what: str, faults: list[str], remedy: str) -> Iterator[str]:
    """Formats one finding; nothing where there are no faults."""
    if faults:
        more = f" and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
        yield f"{len(faults)} {what}: {'; '.join(faults[:SHOWN])}{more}. {remedy}."


def _in_split(dataset: Dataset, split: Split) -> Iterator[str]:
    """Checks that splits are disjoint, complete and consistent with the kind."""
    rows = [getattr(split, name) for name in SPLIT_NAMES]
    everything = np.sort(np.concatenate([*rows, split.dropped]))
    if not np.array_equal(everything, np.arange(dataset.interactions.num_rows)):
        yield "the splits overlap or miss interactions. Take them from fused_rec.data.splits.split."
        return
    faults = []
    if split.kind == "time":
        times = [column(dataset.interactions, "timestamp")[r] for r in rows]
        for earlier, later, name in ((times[0], split.valid_from, "train"), (times[1], split.test_from, "valid")):
            if later is None or (earlier >= later).any():
                faults.append(f"the {name} split reaches beyond {later}")
    if split.kind in ("new_items", "new_users"):
        nodes = [set(column(dataset.interactions, split.kind[4:-1])[r].tolist()) for r in rows]
        shared = (nodes[0] & nodes[1]) | (nodes[0] & nodes[2]) | (nodes[1] & nodes[2])
        faults = [f"row {node} of {split.kind[4:]} is in more than one split" for node in sorted(shared)]
    trained = set(column(dataset.interactions, "item")[split.train].tolist())
    faults += [f"item {item} is new and in the train split" for item in split.new_items.tolist() if item in trained]
    yield from _report(f"fault(s) in the {split.kind} split", faults, "Take the split from fused_rec.data.splits.split")


def _in_interactions(dataset: Dataset, observed: Observed, withheld: _Withheld) -> Iterator[str]:
    """Checks that observed pairs are interactions of the known splits."""
    pairs = set(zip(*(column(dataset.interactions, name).tolist() for name in ("user", "item")), strict=True))
    faults = []
    for row, pair in enumerate(zip(observed.user.tolist(), observed.item.tolist(), strict=True)):
        if pair in withheld.pairs or pair not in pairs:
            why = "is held out" if pair in withheld.pairs else "is no interaction of the dataset"
            faults.append(f"row {row} (user {pair[0]}, item {pair[1]}) {why}")
    yield from _report("observed interaction(s) must be withheld", faults, "Take only rows of the known splits")


def _in_table(what: str, table: pa.Table, faults: list[str], observed: pa.Table) -> Iterator[str]:
    """Checks that observed rows are rows of the table without a fault."""
    names = observed.column_names
    rows = _rows(table, names)
    allowed = {row for row, fault in zip(rows, faults, strict=True) if not fault}
    why = {row: fault for row, fault in zip(rows, faults, strict=True) if fault}
    leaks = [
        f"row {k} ({', '.join(f'{n} {v!r:.60}' for n, v in zip(names, row, strict=True))}) "
        f"{why.get(row, 'is no row of the dataset')}"
        for k, row in enumerate(_rows(observed, names))
        if row not in allowed
    ]
    remedy = "Build the table with fused_rec.data.splits.observe, which withholds them"
    yield from _report(f"observed {what}(s) must be withheld", leaks, remedy)


def _in_node_texts(dataset: Dataset, texts: NodeTexts, review_faults: list[str]) -> Iterator[str]:
    """Checks that each text of a node is its description or an observable review of it."""
    review_texts = [text and text.strip() for text in _cells(dataset.reviews, "text")]
    for what, table in ((USER, dataset.users), (ITEM, dataset.items)):
        links = texts.links[what]
        allowed = {(node, text and text.strip()) for node, text in enumerate(_cells(table, "text"))}
        reviews = zip(_cells(dataset.reviews, what), review_texts, review_faults, strict=True)
        allowed |= {(node, text) for node, text, fault in reviews if not fault}
        leaks = [
            f"{what} {node} has {texts.texts[text]!r:.60}"
            for node, text in zip(links.nodes.tolist(), links.texts.tolist(), strict=True)
            if (node, texts.texts[text]) not in allowed
        ]
        remedy = "Build the texts with fused_rec.data.node_texts.node_texts from the observed reviews"
        yield from _report(f"text(s) of {what}s are neither their description nor an observed review", leaks, remedy)


def _normalized(texts: list[str | None]) -> list[str]:
    """Folds case and spacing."""
    return [" ".join((text or "").casefold().split()) for text in texts]


def _passages(dataset: Dataset, review_faults: list[str]) -> dict[str, list[tuple[int, int, str]]]:
    """Collects withheld reviews by "user" and "item": (review row, node, normalized text).

    Texts that the node also has in an observable review are left out, since they leak nothing.
    """
    texts = _normalized(_cells(dataset.reviews, "text"))
    texts = [text if text.count(" ") >= PASSAGE_WORDS - 1 else "" for text in texts]
    found = {}
    for what in ("user", "item"):
        reviews = list(zip(_cells(dataset.reviews, what), texts, review_faults, strict=True))
        observable = {(node, text) for node, text, fault in reviews if not fault}
        found[what] = [
            (row, node, text)
            for row, (node, text, fault) in enumerate(reviews)
            if text and fault and (node, text) not in observable
        ]
    return found


def _in_descriptions(dataset: Dataset, passages: dict[str, list[tuple[int, int, str]]]) -> Iterator[str]:
    """Checks that no withheld review stands in a text column of its user or item."""
    for what, table in (("user", dataset.users), ("item", dataset.items)):
        is_text = [pa.types.is_string(kind) or pa.types.is_large_string(kind) for kind in table.schema.types]
        strings = [c for c, text in zip(table.column_names, is_text, strict=True) if text and c != "name"]
        node_strings = _normalized([" ".join(filter(None, cells)) for cells in _rows(table, strings)])
        names = _normalized(_cells(table, "name"))
        leaks = [
            f"{what} {node} repeats review row {row} {text!r:.60}"
            for row, node, text in passages[what]
            if text in node_strings[node] and text not in names[node]  # a review may well name its item
        ]
        remedy = (
            f"Leave reviews out of the {what}s table, since node_texts adds the observed ones; or, where it is the "
            "review that quotes the description, leave out that review"
        )
        yield from _report(f"{what}(s) contain a withheld review in their own row", leaks, remedy)
