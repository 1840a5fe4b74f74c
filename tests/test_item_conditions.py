"""Conditions on columns of items: what matches, what a missing value does, and what is refused."""

import datetime

import numpy as np
import pyarrow as pa
import pytest

from fused_rec.serving.item_conditions import matching_rows

ITEMS = pa.table(
    {
        "item_id": ["a", "b", "c", "d"],
        "type": ["fund", None, "bond", ""],
        "sector": pa.array(["it", "it", None, "oil"]).dictionary_encode(),
        "band": pa.array([1, 2, 3, None], pa.int8()),
        "fee": [0.5, float("nan"), 1.5, 2.0],
        "open": [True, False, None, True],
        "closes": pa.array([datetime.date(2026, 1, 1), datetime.date(2027, 1, 1), None, None]),
        "nothing": pa.nulls(4),
    }
)


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("type == 'fund'", [0]),
        ("type != 'fund'", [2]),
        ("not type == 'fund'", [2]),
        ("type in ['fund', 'share']", [0]),
        ("type not in ['fund', 'share']", [2]),
        ("not (type in ['fund'])", [2]),
        ("sector == 'it' and band >= 2", [1]),
        ("sector == 'it' or band == 3", [0, 1, 2]),
        ("type == 'fund' or band <= 2", [0, 1]),
        ("1 < band <= 3", [1, 2]),
        ("2 >= band", [0, 1]),
        ("band in (1, 2.0)", [0, 1]),
        ("band > -1", [0, 1, 2]),
        ("fee > band", []),
        ("fee < band", [0, 2]),
        ("fee >= 1", [2, 3]),
        ("open == True", [0, 3]),
        ("closes < '2026-06-30'", [0]),
        ("nothing == 1", []),
        ("not nothing == 'x'", []),
        ("  item_id > 'b' ", [2, 3]),
    ],
)
def test_what_matches(where, expected):
    assert matching_rows(ITEMS, where).tolist() == expected


@pytest.mark.parametrize(
    ("where", "message"),
    [
        (
            "kind == 'fund'",
            "where has kind, which is no column of the items; they have item_id, type, ",
        ),
        ("band == '1'", "where compares band, a column of int8, with '1'; it must be a number"),
        ("band == True", "it must be a number"),
        ("type == 1", "where compares type, a column of string, with 1; it must be text in quotes"),
        ("open == 1", "it must be True or False"),
        ("closes < 'soon'", "it must be a date or time as text"),
        ("type == fee", "where compares type with fee: string and double cannot be compared"),
        ("", "where is '', which cannot be read"),
        ("type = 'fund'", "cannot be read .*; compare columns with values"),
        ("band", r"where is 'band', which cannot be read \(band is not part of it\)"),
        ("band + 1 == 2", r"band \+ 1 == 2 is not part of it|band \+ 1 is not part of it"),
        ("f(band) == 2", "not part of it"),
        ("1 == 1", "1 == 1 is not part of it"),
        ("band in []", r"\[\] is not part of it"),
        ("band in 'fund'", "'fund' is not part of it"),
        ("band is 1", "band is 1 is not part of it"),
        ("__import__('os').system('true') == 0", "not part of it"),
        ("[x for x in band] == 1", "not part of it"),
        ("band == " + "-" * 9000 + "1", "cannot be read|must be a number"),
        ("(" * 9000, "cannot be read"),
        ("band == 1" + "0" * 400, "cannot be compared|must be a number"),
        ("band == 1 or " * 1000, "where has 13,000 characters; it must have 10,000 at most"),
        ("band == 1\0", "cannot be read"),
    ],
)
def test_what_is_refused(where, message):
    with pytest.raises(ValueError, match=message):
        matching_rows(ITEMS, where)


def test_rows_are_those_of_the_whole_table():
    chunked = pa.concat_tables([ITEMS.slice(0, 1), ITEMS.slice(1)])
    assert matching_rows(chunked, "band == 3").tolist() == [2]
    assert matching_rows(ITEMS, "band == 3").dtype == np.int64
