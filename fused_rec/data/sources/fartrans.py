"""FAR-Trans (Sanz-Cruzado, Droukas and McCreadie, Fin-RecSys at IJCAI 2024): customers, assets, trades and prices.

Folder: `customer_information.csv`, `asset_information.csv`, `transactions.csv`, `close_prices.csv`, as published
(doi:10.5525/gla.researchdata.1658, CC BY 4.0). An interaction is a customer and an asset of one of their purchases, at
the earliest time; sales are counted and not read. The tables of customers and assets have a row per update. The last
update is read, so a result that depends on an attribute (a suitability rule, a group) reflects its latest value and
not the one at the time of the trade.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pyarrow as pa
from jaxtyping import Int64

from fused_rec.data.dataset import DataError, Dataset, Problem
from fused_rec.data.io.arrow import flags, join_texts, known, pc, replace
from fused_rec.data.io.checks import EXAMPLES
from fused_rec.data.io.files import read_cells, read_delimited
from fused_rec.data.io.times import read_times
from fused_rec.data.io.validate import ReaderLog, Tables, assemble

LOG = logging.getLogger(__name__)
CUSTOMERS = ("customerType", "riskLevel", "investmentCapacity", "lastQuestionnaireDate")
ASSETS = ("assetCategory", "assetSubCategory", "marketID", "sector", "industry")
UNKNOWN = ("Not_Available",)  # how the publisher writes that a customer's answer is not there


def fartrans(path: Path, repair: bool) -> Dataset:
    """Reads customers (type, risk level, capacity), assets (category, sector, market) and purchases with their times.

    Args:
      path: folder of the files.
      repair: as in `fused_rec.data.io.tables.read_tables`.

    Returns:
      The dataset; `value` is the total of the purchase. Risk levels and capacities that the publisher predicted keep
      their prefix "Predicted_".

    Raises:
      DataError: lists all faults.
    """
    notes: dict[str, int] = {}
    trades = _read(path, "transactions.csv", ("customerID", "ISIN", "transactionType", "timestamp", "totalValue"))
    bought = pc.equal(trades["transactionType"], "Buy")
    strange = ~flags(pc.is_in(trades["transactionType"], value_set=pa.array(["Buy", "Sell"])))
    _refuse("transactions.csv", strange, trades["transactionType"], "transactionType", "write Buy or Sell")
    if sold := len(trades) - int(flags(bought).sum()):
        notes["interactions: sales not read"] = sold
    buys = trades.filter(bought)
    events = pa.table(
        {
            "user_id": buys["customerID"],
            "item_id": buys["ISIN"],
            "timestamp": buys["timestamp"],
            "value": buys["totalValue"],
        }
    )
    users = _latest(path, "customer_information.csv", "customerID", CUSTOMERS, "users", notes)
    for name in CUSTOMERS:
        gone = pc.is_in(users[name], value_set=pa.array(UNKNOWN))
        users = replace(users, name, pc.if_else(gone, pa.scalar(None, pa.string()), users[name]))
    names = ("assetName", "assetShortName", *ASSETS)
    items = _latest(path, "asset_information.csv", "ISIN", names, "items", notes)
    text = join_texts(
        *(items[name] for name in ("assetName", "assetCategory", "assetSubCategory", "sector", "industry"))
    )
    items = items.select(["ISIN", "assetName", *ASSETS]).rename_columns({"ISIN": "item_id", "assetName": "name"})
    tables = Tables(
        events, users=users.rename_columns({"customerID": "user_id"}), items=items.append_column("text", text)
    )
    files = {"interactions": "transactions.csv", "users": "customer_information.csv", "items": "asset_information.csv"}
    inherent = ("repeated interaction", "unknown id")
    return assemble("fartrans", tables, repair=repair, auto_repair=inherent, log=ReaderLog(notes, files=files))


def read_prices(file: Path) -> pa.Table:
    """Reads `close_prices.csv`, or a file of that format, with a row per asset and day.

    Args:
      file: the CSV file.

    Returns:
      Columns `item_id` string, `timestamp` int64 (unix seconds), `price` float64.

    Raises:
      DataError: a time cannot be read, or a price is no number of 0 or more.
    """
    needed = ("ISIN", "timestamp", "closePrice")
    rows, note = read_cells(file, needed[:2], needed[2:])  # the user's own file, as a spreadsheet writes it
    if note:
        LOG.info("%s", note)
    there = rows.column_names
    if wrong := [name for name in needed if there.count(name) != 1]:
        faults = [f"column {name} occurs {there.count(name)} times (there: {', '.join(there)})" for name in wrong]
        raise DataError([Problem(file.name, None, fault, f"name the columns {', '.join(needed)}") for fault in faults])
    rows = _known(rows.select(needed))
    _refuse(file.name, np.asarray(rows["ISIN"].is_null()), rows["ISIN"], "ISIN", "give each row its id")
    times = _times(rows, file.name)
    sound = flags(pc.match_substring_regex(rows["closePrice"], r"\A[0-9]{1,18}(\.[0-9]*)?([eE][+-]?[0-9]{1,2})?\z"))
    _refuse(file.name, ~sound, rows["closePrice"], "closePrice", "give a price as 12.5")
    return pa.table({"item_id": rows["ISIN"], "timestamp": times, "price": rows["closePrice"].cast(pa.float64())})


def _read(path: Path, name: str, needed: tuple[str, ...]) -> pa.Table:
    return _known(read_delimited(path / name, ",", needed=needed, quoted=True))


def _known(table: pa.Table) -> pa.Table:
    return pa.Table.from_arrays([known(column) for column in table.columns], table.column_names)


def _latest(path: Path, file: str, key: str, columns: tuple[str, ...], table: str, notes: dict[str, int]) -> pa.Table:
    """Selects the last row of each key by `timestamp`, for equal times by position in the file, ordered by key."""
    rows = _read(path, file, (key, "timestamp", *columns))
    times = _times(rows, file)
    _refuse(file, np.asarray(rows[key].is_null()), rows[key], key, "give each row its id")
    codes = pc.dictionary_encode(rows[key]).combine_chunks().indices.to_numpy()
    order = np.lexsort((times, codes))
    last = np.flatnonzero(np.append(codes[order][1:] != codes[order][:-1], True)) if len(order) else order
    if earlier := len(rows) - len(last):
        notes[f"{table}: earlier rows of one {key}, of which the last is read"] = earlier
    return rows.select([key, *columns]).take(order[last])


def _times(rows: pa.Table, file: str) -> Int64[np.ndarray, "R"]:
    """Returns the unix seconds of all rows; raises DataError for rows without a valid time."""
    times = read_times(rows["timestamp"])
    faults = {row: times.says(row) for row in np.flatnonzero(times.faults)[:EXAMPLES].tolist()}
    _refuse(file, ~times.good, rows["timestamp"], "timestamp", "give a date as 2020-01-31", faults)
    return times.seconds


def _refuse(
    file: str,
    bad: np.ndarray,
    column: pa.ChunkedArray,
    name: str,
    remedy: str,
    faults: Mapping[int, str] = MappingProxyType({}),
) -> None:
    """Raises DataError for the rows that are bad; `faults` describes some of them."""
    found = np.flatnonzero(bad)
    problems = [
        Problem(
            file,
            row + 2,
            (f"{name} is {str(column[row])[:60]!r}" if column[row].is_valid else f"{name} is missing")
            + (f", which {faults[row]}" if row in faults else ""),
            remedy,
        )
        for row in found[:EXAMPLES].tolist()
    ]
    if len(found) > EXAMPLES:
        problems.append(Problem(file, None, f"{len(found):,} rows in all have no {name} that can be read", remedy))
    if problems:
        raise DataError(problems)
