"""Tables of results cell by cell; hostile names are text in each of them."""

import csv
import io

import numpy as np
import pytest

from fused_rec.evaluation.result_tables import csv_text, latex, markdown
from fused_rec.evaluation.significance import differences, summarize


@pytest.fixture
def report() -> dict:
    values = {
        "fused": {"ndcg@10": np.array([[0.5, 0.6], [0.7, 0.8]])},
        "no_social_edges": {"ndcg@10": np.array([[0.4, 0.5], [0.6, 0.7]])},
        "popularity": {"ndcg@10": np.array([[0.0, 0.0]])},
    }
    rows = [
        {"variant": name, "seed": seed, "test": {"ndcg@10": mean}, "seconds": 10.0 + seed, "parameters": parameters}
        for name, seed, mean, parameters in [
            *[("fused", 0, 0.55, 1200), ("fused", 1, 0.75, 1200)],
            *[("no_social_edges", 0, 0.45, 1000), ("no_social_edges", 1, 0.65, 1000)],
            *[("popularity", 0, 0.0, None), ("bad", 1, 0.3, 7)],
        ]
    ]
    failures = [{"variant": "bad", "seed": 0, "message": "NonFiniteLossError: 100 % | of_it is\nnan & <worse>"}]
    return {
        "reference": "fused",
        "summary": summarize(["fused", "no_social_edges", "bad", "popularity"], rows, failures, values),
        "differences": differences(values, "fused"),
        "failures": failures,
        "rows": rows,
    }


def test_markdown_cell_by_cell(report):
    lines = markdown(report, ["ndcg@10"]).splitlines()
    assert lines[0] == "| variant | seeds | ndcg@10 | fused vs. row | seconds | parameters |"
    assert lines[1] == "| --- | ---: | ---: | ---: | ---: | ---: |"
    assert lines[2] == "| fused | 2 | 0.6500 ± 0.1414 | – | 10 | 1,200 |"
    assert lines[3].startswith("| no_social_edges | 2 | 0.5500 ± 0.1414 | +18.2 % [+16.7, +20.0], p < .001 |")
    assert lines[4] == "| bad | 1 | failed | – | 11 | 7 |"
    tested = report["differences"][1]
    interval = f"[{tested['low']:+.4f}, {tested['high']:+.4f}]"
    assert lines[5].startswith(f"| popularity | 1 | 0.0000 | +0.6500 {interval}, p = .")
    assert lines[5].endswith("| 10 | – |")
    assert lines[-1] == "Failed: bad, seed 0: NonFiniteLossError: 100 % \\| of_it is nan &amp; &lt;worse&gt;"


def test_rounding_is_shown_as_no_difference(report):
    """A control that changes nothing but the order of sums: p is 1, and no zero has a sign of its own."""
    base = np.linspace(0.1, 1, 300, dtype=np.float32).reshape(3, 100)
    values = {"fused": {"ndcg@10": base * np.float32(1 - 1e-7)}, "no_social_edges": {"ndcg@10": base}}
    report["differences"] = differences(values, "fused")
    assert "+0.0 % [+0.0, +0.0], p = 1.000" in markdown(report, ["ndcg@10"]).splitlines()[3]


def test_markdown_has_a_table_of_new_items_where_some_are_held_out(report):
    """Means over seeds; a variant of which a run measured none is left out."""
    for row, new in zip(report["rows"], (0.0, 0.5), strict=False):
        row["slices"] = {"item_interactions": {"0": {"recall@20": new}, "1+": {"recall@20": 0.4}}}
    lines = markdown(report, ["ndcg@10"]).splitlines()
    assert lines[7:10] == [
        "| variant | new items, recall@20 | known items, recall@20 |",
        "| --- | ---: | ---: |",
        "| fused | 0.2500 | 0.4000 |",
    ]
    assert lines[10] == ""


def test_latex_is_escaped(report):
    text = latex(report, ["ndcg@10"])
    assert r"\begin{tabular}{lrrrrr}" in text
    assert r"no\_social\_edges & 2 & 0.5500 $\pm$ 0.1414 & +18.2 \% [+16.7, +20.0], p $<$ .001 & 10 & 1,000 \\" in text
    assert r"100 \% \textbar{} of\_it is nan \& $<$worse$>$" in text
    assert text.count("\\\\\n") == 5
    report["failures"][0]["message"] = r"a\b~c^d{e}#$"
    assert r"a\textbackslash{}b\textasciitilde{}c\textasciicircum{}d\{e\}\#\$" in latex(report, ["ndcg@10"])


def test_csv_keeps_every_number(report):
    rows = list(csv.DictReader(io.StringIO(csv_text(report, ["ndcg@10"]))))
    assert [row["variant"] for row in rows] == ["fused", "no_social_edges", "bad", "popularity"]
    assert float(rows[1]["ndcg@10 fused vs. row: difference"]) == report["differences"][0]["difference"]
    assert rows[0]["ndcg@10 fused vs. row: p_holm"] == ""
    assert rows[2]["failed"].startswith("bad, seed 0: NonFiniteLossError")
    assert rows[3]["parameters"] == ""


HOSTILE = "a|b`c*_d_<i>&\\e${f}$ [x](y)\n=1\x1b[31m\u202e"


def test_hostile_names_are_text_in_every_table(report):
    """A name may come from a folder or a table: no cell, markup, command or formula comes of it."""
    for entry in (report["summary"][1], *report["differences"][:1], report["failures"][0]):
        entry["variant"] = HOSTILE
    cell = r"a\|b\`c\*\_d\_&lt;i&gt;&amp;\\e\$\{f\}\$ \[x\](y) =1\\x1b\[31m\\u202e"
    lines = markdown(report, ["ndcg@10"]).splitlines()
    assert lines[3].startswith(f"| {cell} | 2 | 0.5500")
    assert lines[-1].startswith(f"Failed: {cell}, seed 0: ") and len(lines) == 8

    tex = r"a\textbar{}b{`}c*\_d\_$<$i$>$\&\textbackslash{}e\$\{f\}\$ [x](y) =1\textbackslash{}x1b[31m"
    assert f"{tex}\\textbackslash{{}}u202e & 2 & 0.5500" in latex(report, ["ndcg@10"])

    [row] = [row for row in csv.DictReader(io.StringIO(csv_text(report, ["ndcg@10"]))) if row["variant"] == HOSTILE]
    assert row["seeds"] == "2" and row["failed"].startswith("a|b`c*_d_<i>")


@pytest.mark.parametrize("name", ["[3pt] x", "*x"])
def test_a_row_of_latex_begins_with_no_argument(report, name):
    report["summary"][1]["variant"] = report["summary"][0]["variant"] = name
    rows = latex(report, ["ndcg@10"]).splitlines()
    assert sum(row.startswith(("{}[3pt] x &", "{}*x &")) for row in rows) == 2


@pytest.mark.parametrize("name", ["=cmd|' /C calc'!A0", " @SUM(1)", "+1", "-1"])
def test_csv_computes_no_name(report, name):
    for entry in (report["summary"][1], report["failures"][0]):
        entry["variant"] = name
    report["reference"] = name
    cells = [cell for row in csv.reader(io.StringIO(csv_text(report, ["ndcg@10"]))) for cell in row]
    assert f"'{name}" in cells
    texts = [cell for cell in cells if cell and not cell.lstrip("-").replace(".", "").replace("e-", "").isdigit()]
    assert not [cell for cell in texts if cell.lstrip()[0] in "=+-@"]
