"""Tables with the ids of their source -> Dataset: checks between tables, and repair or rejection of all faults.

Readers of public data sets pass the known faults of their format as `auto_repair`: these are always repaired, and
counted.
"""

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Int32, Int64

from fused_rec.data.dataset import DataError, Dataset, Problem, column, empty_ties, printable
from fused_rec.data.io import checks
from fused_rec.data.io.arrow import as_ids, distinct, flags, known, locate, pc, replace
from fused_rec.data.io.checks import Finding, Report

BETWEEN_TABLES = ("unknown id", "unknown tie")  # faults that an unreadable table would cause


@dataclasses.dataclass(frozen=True)
class Tables:
    """Tables from a reader, with ids as in their source (text or integers).

    Attributes:
      interactions: `user_id`, `item_id`; optional `timestamp` (see `times.read_times`), `value`, `split`, and `text`,
        the user's text about the item, which becomes a row of `Dataset.reviews`.
      users, items: `user_id` or `item_id`; optional `text`, `name`, attributes. None: the ids of the interactions, in
        order of first appearance.
      reviews: `user_id`, `item_id`, `text`; optional `timestamp`. Pairs need not be interactions.
      ties: `source_id`, `target_id`; optional `kind` (default "tie"), `timestamp`, and `item_id`: the item of the act
        in which the edge was observed.
    """

    interactions: pa.Table
    users: pa.Table | None = None
    items: pa.Table | None = None
    reviews: pa.Table | None = None
    ties: pa.Table | None = None


@dataclasses.dataclass(frozen=True)
class ReaderLog:
    """Reports of a reader about its tables.

    Attributes:
      notes: counts by description of what the reader excluded; added to `Dataset.notes`.
      problems: faults found while reading; faults that only follow from an unreadable table are then not reported.
      files: file name by table, for messages; tables without one are named by themselves.
    """

    notes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    problems: Sequence[Problem] = ()
    files: Mapping[str, str] = dataclasses.field(default_factory=dict)


def assemble(
    name: str,
    tables: Tables,
    *,
    repair: bool = False,
    min_value: int | float | None = None,
    auto_repair: Collection[str] = (),
    log: ReaderLog = ReaderLog(),
) -> Dataset:
    """Checks tables and builds the dataset.

    Args:
      name: name of the dataset; made printable.
      tables: the tables as read.
      repair: repairs all faults that can be repaired.
      min_value: minimum `value` of an interaction; users, items and texts of rows below it are kept. None: all rows.
      auto_repair: kinds of `Finding` that are repaired even without `repair`.
      log: reports of the reader.

    Returns:
      The dataset, with counts of repairs and notes.

    Raises:
      DataError: lists all faults, where one cannot be repaired or `repair` is False.
    """
    findings: list[Finding] = []
    notes = dict(log.notes)
    report = {field.name: Report(field.name, findings, notes) for field in dataclasses.fields(Tables)}
    files = {field.name: field.name for field in dataclasses.fields(Tables)} | dict(log.files)

    tables = _with_nulls(tables)
    events = _events(tables.interactions, report["interactions"], min_value)
    users = _catalogue(tables.users, "user_id", events, report["users"])
    items = _catalogue(tables.items, "item_id", events, report["items"])
    users = _with_unknown(users, "user_id", files["users"], events, report["interactions"])
    items = _with_unknown(items, "item_id", files["items"], events, report["interactions"])
    user, item = locate(events["user_id"], users["user_id"]), locate(events["item_id"], items["item_id"])
    reviews = _pair_texts(events, user, item)
    kept = _is_interaction(events, report["interactions"], min_value)
    if not kept.all():
        events, user, item = events.filter(pa.array(kept)), user[kept], item[kept]
    interactions = _pairs(events, user, item, report["interactions"])
    active = np.zeros(users.num_rows, bool)
    active[user] = True
    report["users"].note("users without an interaction, kept as new users", int((~active).sum()))
    if tables.reviews is not None:
        reviews = pa.concat_tables(
            [reviews, _reviews(tables.reviews, users, items, report["reviews"])], promote_options="default"
        )
    ties = empty_ties() if tables.ties is None else _ties(tables.ties, users, items, report["ties"])

    refused = [*log.problems, *_refused(findings, files, repair, auto_repair, bool(log.problems))]
    if not refused and not len(interactions):
        fault = "there is no usable interaction" + (f" of a value of {min_value} or more" if len(kept) else "")
        refused.append(Problem(files["interactions"], None, fault, "give at least one row"))
    if refused:
        raise DataError(refused)
    repairs = {f"{finding.table}: {finding.repaired}": finding.count for finding in findings}
    users, items = users.drop_columns([checks.ROW]), items.drop_columns([checks.ROW])
    return Dataset(printable(name), users, items, interactions, reviews, ties, repairs, notes)


def append_interactions(dataset: Dataset, table: pa.Table, min_value: int | float | None = None) -> Dataset:
    """Appends interactions of known users and items, as if their rows stood at the end of the table.

    Args:
      dataset: the tables.
      table: as `Tables.interactions`, without texts.
      min_value: as of `assemble`.

    Returns:
      Tables with other interactions. Of rows with the same pair, old ones among them, the earliest is kept.

    Raises:
      DataError: lists all faults, unknown ids and texts among them.
    """
    findings: list[Finding] = []
    report = Report("interactions", findings, {})
    events = _events(_with_nulls(Tables(table)).interactions, report, min_value)
    rows = {name: locate(events[name], getattr(dataset, f"{name[:4]}s")[name]) for name in ("user_id", "item_id")}
    for name, found in rows.items():
        remedy = f"correct it, or serve tables that have this {name}: fr.load(workdir, dataset=...)"
        report.add(
            "unknown id",
            events,
            found < 0,
            lambda r, name=name: f"{name} {events[name][r].as_py()!r} is unknown",
            remedy,
        )
    if "text" in events.column_names and events["text"].null_count < len(events):
        report.column("text has to be encoded", "leave the column out, or serve tables: fr.load(workdir, dataset=...)")
    if findings:
        raise DataError([problem for finding in findings for problem in finding.problems("interactions")])
    columns = {name: events[name] for name in ("timestamp", "value", "split") if name in events.column_names}
    if "value" in columns:
        columns["value"] = columns["value"].cast(pa.float32(), safe=False)
    new = pa.table({"user": rows["user_id"], "item": rows["item_id"], **columns})
    new = new.filter(pa.array(_is_interaction(events, report, min_value)))
    joined = pa.concat_tables([dataset.interactions, new], promote_options="default")
    keys = column(joined, "user").astype(np.int64) << 32 | column(joined, "item")
    return dataclasses.replace(dataset, interactions=joined.filter(pa.array(~_repeated(keys, _times(joined)))))


def _refused(
    findings: Sequence[Finding], files: Mapping[str, str], repair: bool, auto_repair: Collection[str], unreadable: bool
) -> Iterator[Problem]:
    """Yields the faults that are not repaired; unreadable: some table could not be read."""
    for finding in findings:
        repaired = finding.repaired is not None and (repair or finding.kind in auto_repair)
        if not repaired and not (unreadable and finding.kind in BETWEEN_TABLES):
            yield from finding.problems(files[finding.table])


def _with_nulls(tables: Tables) -> Tables:
    """Replaces missing values by null in all columns of all tables."""
    by_name = {field.name: getattr(tables, field.name) for field in dataclasses.fields(Tables)}
    for name, table in [(name, table) for name, table in by_name.items() if table is not None]:
        by_name[name] = pa.Table.from_arrays([known(column) for column in table.columns], table.column_names)
    return Tables(**by_name)


def _events(table: pa.Table, report: Report, min_value: int | float | None) -> pa.Table:
    """Checks the columns of the interactions."""
    table = checks.check_times(checks.check_ids(table, report, "user_id", "item_id"), report)
    table = checks.check_values(table, report, min_value)
    return checks.check_texts(checks.check_splits(table, report), report)


def _is_interaction(events: pa.Table, report: Report, min_value: int | float | None) -> Bool[np.ndarray, "R"]:
    """Returns which rows are interactions: those with a value of at least `min_value`, or without a value."""
    if "value" not in events.column_names:
        return np.ones(len(events), bool)
    given = flags(pc.is_valid(events["value"]))
    if min_value is None:
        report.note("values kept, which the model does not use (data.min_value makes use of them)", int(given.sum()))
        return np.ones(len(events), bool)
    values = np.asarray(pc.fill_null(events["value"], 0))
    below = given & (values < values.dtype.type(min_value))
    report.note(f"rows of a value below {min_value}, which are no interactions", int(below.sum()))
    report.note("rows without a value, which stay interactions", int((~given).sum()))
    return ~below


def _catalogue(table: pa.Table | None, name: str, events: pa.Table, report: Report) -> pa.Table:
    """Checks users or items: each id of the table once or, without a table, the ids of the interactions."""
    if table is None:
        ids = distinct(events[name])
        return pa.table({name: ids, checks.ROW: pa.nulls(len(ids), pa.int64())})
    rows = checks.check_ids(table, report, name)
    codes = rows[name].combine_chunks().indices.to_numpy()
    repeated = _repeated(codes)

    def message(r: int) -> str:
        first = int(np.flatnonzero(codes == codes[r])[0])
        return f"{name} {rows[name][r].as_py()!r} is already in row {rows[checks.ROW][first]}"

    report.add("duplicate id", rows, repeated, message, "keep one row for each id")
    rows = replace(rows, name, rows[name].cast(pa.string())).filter(pa.array(~repeated))
    return checks.check_attributes(checks.check_texts(rows, report), report)


def _with_unknown(catalogue: pa.Table, name: str, file: str, events: pa.Table, report: Report) -> pa.Table:
    """Appends the ids that only the interactions have to the users or items."""
    unknown = locate(events[name], catalogue[name]) < 0
    report.add(
        "unknown id",
        events,
        unknown,
        lambda r: f"{name} {events[name][r].as_py()!r} is not in {file}",
        f"add it to {file} or remove the row",
        f"rows with an unknown {name}, which was added without attributes",
    )
    if not unknown.any():
        return catalogue
    new = pa.table({name: distinct(events[name].filter(pa.array(unknown)))})
    return pa.concat_tables([catalogue, new], promote_options="default")


def _pairs(events: pa.Table, user: Int32[np.ndarray, "R"], item: Int32[np.ndarray, "R"], report: Report) -> pa.Table:
    """Builds `Dataset.interactions`: the earliest row of each pair, in the order of the file."""
    if _are_distinct(user, item):
        repeated = np.zeros(len(user), bool)
    else:
        keys = user.astype(np.int64) << 32 | item
        repeated = _repeated(keys, _times(events))

    def message(r: int) -> str:
        kept = int(np.flatnonzero((keys == keys[r]) & ~repeated)[0])
        pair = f"{events['user_id'][r].as_py()!r}, {events['item_id'][r].as_py()!r}"
        return f"the pair ({pair}) is also in row {events[checks.ROW][kept]}"

    remedy, repair = "keep one row for each pair", "rows that repeat a pair merged into its earliest"
    report.add("repeated interaction", events, repeated, message, remedy, repair)
    kept = {name: events[name] for name in ("timestamp", "value", "split") if name in events.column_names}
    if "value" in kept:
        kept["value"] = kept["value"].cast(pa.float32(), safe=False)
    pairs = pa.table({"user": user, "item": item, **kept})
    return pairs.filter(pa.array(~repeated)) if repeated.any() else pairs


def _are_distinct(user: Int32[np.ndarray, "R"], item: Int32[np.ndarray, "R"]) -> bool:
    """Returns whether no pair occurs twice: a sort in place, without the order that `_repeated` needs."""
    keys = user.astype(np.int64)
    keys <<= 32
    keys |= item
    keys.sort()
    return not (keys[1:] == keys[:-1]).any()


def _pair_texts(rows: pa.Table, user: Int32[np.ndarray, "R"], item: Int32[np.ndarray, "R"]) -> pa.Table:
    """Builds `Dataset.reviews` from the rows that have a text."""
    if "text" not in rows.column_names:
        rows, user, item = rows.slice(0, 0), user[:0], item[:0]
    text = rows["text"] if "text" in rows.column_names else pa.array([], pa.string())
    times = {"timestamp": rows["timestamp"]} if "timestamp" in rows.column_names else {}
    return pa.table({"user": user, "item": item, "text": text, **times}).filter(pc.is_valid(text))


def _reviews(table: pa.Table, users: pa.Table, items: pa.Table, report: Report) -> pa.Table:
    """Checks the reviews and builds `Dataset.reviews`."""
    rows = checks.check_ids(table, report, "user_id", "item_id")
    rows = checks.check_texts(checks.check_times(rows, report), report)
    user, item = locate(rows["user_id"], users["user_id"]), locate(rows["item_id"], items["item_id"])
    unknown = (user < 0) | (item < 0)
    report.add(
        "unknown review",
        rows,
        unknown,
        lambda r: f"no user {rows['user_id'][r].as_py()!r} or no item {rows['item_id'][r].as_py()!r} is known",
        "add it, or remove the review",
        "reviews of unknown users or items dropped",
    )
    return _pair_texts(rows.filter(pa.array(~unknown)), user[~unknown], item[~unknown])


def _ties(table: pa.Table, users: pa.Table, items: pa.Table, report: Report) -> pa.Table:
    """Builds `Dataset.ties`: edges between known users, each (source, target, kind) once unless it has an item."""
    table = checks.check_times(checks.check_ids(table, report, "source_id", "target_id"), report)
    table = checks.check_acts(checks.check_kinds(table, report), report)
    ends = {end: locate(table[f"{end}_id"], users["user_id"]) for end in ("source", "target")}

    def tie(r: int) -> str:
        return f"the tie from {table['source_id'][r].as_py()!r} to {table['target_id'][r].as_py()!r}"

    columns: dict = dict(ends)
    unknown = (ends["source"] < 0) | (ends["target"] < 0)
    if "item_id" in table.column_names:
        item = locate(table["item_id"], items["item_id"])
        unknown |= (item < 0) & flags(pc.is_valid(table["item_id"]))
        columns["item"] = pa.array(item, mask=item < 0)
    repair = "ties to unknown users dropped"
    node = "user or item" if "item_id" in table.column_names else "user"
    report.add("unknown tie", table, unknown, lambda r: f"{tie(r)} names an unknown {node}", f"add the {node}", repair)
    own = ~unknown & (ends["source"] == ends["target"])
    repair = "ties to oneself dropped"
    report.add("tie to oneself", table, own, lambda r: f"{tie(r)} joins a user to itself", "remove it", repair)

    given = table["kind"] if "kind" in table.column_names else pa.nulls(len(table), pa.string())
    kinds = as_ids(pa.chunked_array(pc.fill_null(given, "tie")))
    columns["kind"] = kinds.cast(pa.string())
    if "timestamp" in table.column_names:
        columns["timestamp"] = table["timestamp"]
    repeated = np.zeros(len(table), bool)
    if "item" not in columns:
        valid = ~unknown & ~own
        codes = kinds.combine_chunks().indices.to_numpy().astype(np.int64)
        keys = (codes * len(users) + ends["source"]) * len(users) + ends["target"]
        repeated[valid] = _repeated(keys[valid], _times(table)[valid])
    repair = "repeated ties dropped"
    report.add("repeated tie", table, repeated, lambda r: f"{tie(r)} is repeated", "keep it once", repair)
    return pa.table(columns).filter(pa.array(~(unknown | own | repeated)))


def _times(table: pa.Table) -> Int64[np.ndarray, "R"]:
    """Returns the seconds to order rows by; rows without a time come last."""
    if "timestamp" not in table.column_names:
        return np.zeros(len(table), np.int64)
    return np.asarray(pc.fill_null(table["timestamp"], np.iinfo(np.int64).max))


def _repeated(keys: np.ndarray, times: Int64[np.ndarray, "R"] | None = None) -> Bool[np.ndarray, "R"]:
    """Returns which rows repeat a key: all but its earliest, or its first where times are equal or not given."""
    first = np.unique(keys, return_index=True)[1]
    repeated = np.ones(len(keys), bool)
    repeated[first] = False
    if times is not None and repeated.any():
        order = np.lexsort((times, keys))  # stable, so rows of one time keep their order
        starts = np.append(True, keys[order][1:] != keys[order][:-1])
        repeated[order] = ~starts
    return repeated
