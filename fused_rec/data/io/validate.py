"""Tables with their source's ids -> Dataset: what can be wrong between tables, and whether it is mended or refused.

A reader of public data declares the faults its format is known for as `inherent`: they are mended without being
asked, and counted all the same.
"""

import dataclasses
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Int32, Int64

from fused_rec.data.dataset import DataError, Dataset, Problem, empty_ties, printable
from fused_rec.data.io import checks
from fused_rec.data.io.arrow import as_ids, distinct, flags, known, locate, pc, replace
from fused_rec.data.io.checks import Finding, Report

BETWEEN_TABLES = ("unknown id", "unknown tie")  # what a table that could not be read would set off


@dataclasses.dataclass(frozen=True)
class Tables:
    """What a reader hands over: ids as its source writes them, text or integers.

    interactions: `user_id`, `item_id`; optional `timestamp` (see `times.read_times`), `value`, `part`, and `text`,
      the user's words about the item, which become a row of `Dataset.reviews`.
    users, items: `user_id` / `item_id`; optional `text`, `name`, attributes. None: the ids of the interactions, in
      order of first appearance.
    reviews: `user_id`, `item_id`, `text`; optional `timestamp`: words about pairs that need not be interactions.
    ties: `source_id`, `target_id`; optional `kind` (default "tie"), `timestamp`, and `item_id`: the item of the act
      in which the tie was seen.
    """

    interactions: pa.Table
    users: pa.Table | None = None
    items: pa.Table | None = None
    reviews: pa.Table | None = None
    ties: pa.Table | None = None


def assemble(
    name: str,
    tables: Tables,
    *,
    repair: bool = False,
    min_value: int | float | None = None,
    auto_repair: Collection[str] = (),
    notes: Mapping[str, int] | None = None,
    problems: Sequence[Problem] = (),
    files: Mapping[str, str] | None = None,
) -> Dataset:
    """The checked dataset, its name, which may be that of a folder, made printable.

    min_value: rows whose `value` is below it are no interactions; their users, items and texts stay. None: all are.
    auto_repair: kinds of `Finding` that are mended whether or not `repair` is asked for.
    notes: what the reader itself left out, by description, with its count; joins `Dataset.notes`.
    problems: what went wrong in reading; faults that only follow from an unread table are then not reported.
    files: the file each table came from, for reports.
    Raises DataError with every problem where one cannot be mended or no repair was asked for.
    """
    findings: list[Finding] = []
    told = dict(notes or {})
    report = {field.name: Report(field.name, findings, told) for field in dataclasses.fields(Tables)}
    files = {field.name: field.name for field in dataclasses.fields(Tables)} | dict(files or {})

    tables = _known(tables)
    events = _events(tables.interactions, report["interactions"], min_value)
    users = _catalogue(tables.users, "user_id", events, report["users"])
    items = _catalogue(tables.items, "item_id", events, report["items"])
    users = _with_unknown(users, "user_id", files["users"], events, report["interactions"])
    items = _with_unknown(items, "item_id", files["items"], events, report["interactions"])
    user, item = locate(events["user_id"], users["user_id"]), locate(events["item_id"], items["item_id"])
    enough = _enough(events, report["interactions"], min_value)
    interactions = _pairs(events.filter(pa.array(enough)), user[enough], item[enough], report["interactions"])
    idle = users.num_rows - len(np.unique(user[enough]))
    report["users"].note("customers without an interaction, kept as new customers", idle)
    reviews = _pair_texts(events, user, item)
    if tables.reviews is not None:
        reviews = pa.concat_tables(
            [reviews, _reviews(tables.reviews, users, items, report["reviews"])], promote_options="default"
        )
    ties = empty_ties() if tables.ties is None else _ties(tables.ties, users, items, report["ties"])

    refused = list(problems)
    for finding in findings:
        mends = finding.repaired is not None and (repair or finding.kind in auto_repair)
        if not mends and not (problems and finding.kind in BETWEEN_TABLES):
            refused += finding.problems(files[finding.table])
    if not refused and not len(interactions):
        fault = "there is no usable interaction" + (f" of a value of {min_value} or more" if len(events) else "")
        refused.append(Problem(files["interactions"], None, fault, "give at least one row"))
    if refused:
        raise DataError(refused)
    repairs = {f"{finding.table}: {finding.repaired}": finding.count for finding in findings}
    users, items = users.drop_columns([checks.ROW]), items.drop_columns([checks.ROW])
    return Dataset(printable(name), users, items, interactions, reviews, ties, repairs, told)


def _known(tables: Tables) -> Tables:
    """Every missing value null, by one meaning for all columns of all tables."""
    there = {field.name: getattr(tables, field.name) for field in dataclasses.fields(Tables)}
    for table in [table for table, rows in there.items() if rows is not None]:
        columns = [known(column) for column in there[table].columns]
        there[table] = pa.Table.from_arrays(columns, there[table].column_names)
    return Tables(**there)


def _events(table: pa.Table, report: Report, min_value: int | float | None) -> pa.Table:
    table = checks.check_times(checks.check_ids(table, report, "user_id", "item_id"), report)
    table = checks.check_values(table, report, min_value)
    return checks.check_texts(checks.check_splits(table, report), report)


def _enough(events: pa.Table, report: Report, min_value: int | float | None) -> Bool[np.ndarray, "R"]:
    """Which rows are interactions: of at least the least value, or of none."""
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
    """The users or items: each id of the table once or, without a table, the ids of the interactions."""
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
    """The catalogue, and at its end the ids that only the interactions name."""
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
    """`Dataset.interactions`: of a pair's rows the earliest, in the order of the file."""
    keys = user.astype(np.int64) << 32 | item
    repeated = _repeated(keys, _times(events))

    def message(r: int) -> str:
        kept = int(np.flatnonzero((keys == keys[r]) & ~repeated)[0])
        pair = f"{events['user_id'][r].as_py()!r}, {events['item_id'][r].as_py()!r}"
        return f"the pair ({pair}) is also in row {events[checks.ROW][kept]}"

    remedy, mended = "keep one row for each pair", "rows that repeat a pair merged into its earliest"
    report.add("repeated interaction", events, repeated, message, remedy, mended)
    kept = {name: events[name] for name in ("timestamp", "value", "split") if name in events.column_names}
    if "value" in kept:
        kept["value"] = kept["value"].cast(pa.float32(), safe=False)
    return pa.table({"user": user, "item": item, **kept}).filter(pa.array(~repeated))


def _pair_texts(rows: pa.Table, user: Int32[np.ndarray, "R"], item: Int32[np.ndarray, "R"]) -> pa.Table:
    """`Dataset.reviews` of the rows that have a text."""
    text = rows["text"] if "text" in rows.column_names else pa.nulls(len(rows), pa.string())
    times = {"timestamp": rows["timestamp"]} if "timestamp" in rows.column_names else {}
    return pa.table({"user": user, "item": item, "text": text, **times}).filter(pc.is_valid(text))


def _reviews(table: pa.Table, users: pa.Table, items: pa.Table, report: Report) -> pa.Table:
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
    """`Dataset.ties`: between two known users, each (source, target, kind) once unless it was seen in an act."""
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
    mended = "ties to unknown users dropped"
    named = "user or item" if "item_id" in table.column_names else "user"
    report.add(
        "unknown tie", table, unknown, lambda r: f"{tie(r)} names an unknown {named}", f"add the {named}", mended
    )
    own = ~unknown & (ends["source"] == ends["target"])
    mended = "ties to oneself dropped"
    report.add("tie to oneself", table, own, lambda r: f"{tie(r)} joins a user to itself", "remove it", mended)

    given = table["kind"] if "kind" in table.column_names else pa.nulls(len(table), pa.string())
    kinds = as_ids(pa.chunked_array(pc.fill_null(given, "tie")))
    columns["kind"] = kinds.cast(pa.string())
    if "timestamp" in table.column_names:
        columns["timestamp"] = table["timestamp"]
    repeated = np.zeros(len(table), bool)
    if "item" not in columns:
        sound = ~unknown & ~own
        codes = kinds.combine_chunks().indices.to_numpy().astype(np.int64)
        keys = (codes * len(users) + ends["source"]) * len(users) + ends["target"]
        repeated[sound] = _repeated(keys[sound], _times(table)[sound])
    mended = "repeated ties dropped"
    report.add("repeated tie", table, repeated, lambda r: f"{tie(r)} is there already", "keep it once", mended)
    return pa.table(columns).filter(pa.array(~(unknown | own | repeated)))


def _times(table: pa.Table) -> Int64[np.ndarray, "R"]:
    """Seconds to order rows by; a row without a time comes last."""
    if "timestamp" not in table.column_names:
        return np.zeros(len(table), np.int64)
    return np.asarray(pc.fill_null(table["timestamp"], np.iinfo(np.int64).max))


def _repeated(keys: np.ndarray, times: Int64[np.ndarray, "R"] | None = None) -> Bool[np.ndarray, "R"]:
    """Which rows repeat a key: all but its earliest, or its first where times are equal or not given."""
    first = np.unique(keys, return_index=True)[1]
    repeated = np.ones(len(keys), bool)
    repeated[first] = False
    if times is not None and repeated.any():
        order = np.lexsort((times, keys))  # stable, so rows of one time keep their order
        starts = np.append(True, keys[order][1:] != keys[order][:-1])
        repeated[order] = ~starts
    return repeated
