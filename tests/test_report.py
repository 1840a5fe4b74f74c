"""The page: what it says is what was found, nothing on it is taken for markup, and a browser shows it well."""

import dataclasses
import math
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from webpage import BROWSER, DARK, LIGHT, Page, browse, console, needs_browser

from fused_rec.config import Config, to_dict
from fused_rec.evaluation.ranking import UserMetrics
from fused_rec.evaluation.significance import Difference
from fused_rec.evaluation.suitability import Gaps, Group
from fused_rec.explanation.counterfactual import CounterfactualEffect
from fused_rec.explanation.reasons import Reason
from fused_rec.reporting import data as finding
from fused_rec.reporting import layout
from fused_rec.reporting.changes import LISTS, REASONS, render_changes
from fused_rec.reporting.changes import in_words as changes_in_words
from fused_rec.reporting.data import (
    Customer,
    Hop,
    Model,
    Passage,
    Recommended,
    ReportData,
    Route,
    Sliced,
    Span,
    compared,
)
from fused_rec.reporting.figures import Bar, PathDiagram, Step, bars, curve, in_words, interval, path_diagrams
from fused_rec.reporting.markup import cut, document, element, visible
from fused_rec.reporting.page import render_page
from fused_rec.reporting.review import review
from fused_rec.reporting.style import DARK as DARK_PALETTE
from fused_rec.reporting.style import LIGHT as LIGHT_PALETTE
from fused_rec.reporting.style import READ, SEEN, contrast, stylesheet

HOSTILE = (
    "<img src=x onerror=\"document.title='taken'\">",
    "</text></svg><script>document.title='taken'</script>",
    "\"><svg onload=document.title='taken'>",
    "</title></style><script src=https://example.com/x.js></script>",
    "Fund & Co. <b>bold</b> &lt;i&gt; \u202egnol\u202c \0 'quoted'",
    "nothing" * 300,
)


def hostile_changes() -> dict[str, Any]:
    """Differences of two runs, made by hand, as of `fused_rec.reporting.diff.diff`."""
    img, svg, attribute, title, mixed, long = HOSTILE
    mean = {"mean": 0.75, "low": 0.7, "high": 0.8, "users": 34}
    served = {"history": "all", "customers": 3, "products": 10, "interactions": 98, "reviews": 0, "social edges": 4}
    side = {
        **{
            "workdir": attribute,
            "dataset": title,
            "variant": "fused",
            "seed": 0,
            "finished": "2024-04-01T09:30:00+00:00",
        },
        **{"model": "cd" * 32, "tables": "ab" * 32, "other_tables": True, "trained_period": None, "repairs": {img: 3}},
        "served": served | {"period": None, "unknown": {mixed: 2}},
    }
    change = {
        "difference": 0.01,
        "low": -0.01,
        "high": 0.03,
        "relative": 0.1,
        "relative_low": -0.1,
        "relative_high": 0.3,
    }
    return {
        **{"before": side, "after": side, "change": f"data.path {svg}"},
        "data": {"interactions": {"before": 90, "after": 98, "common": 88, "new": 10, "gone": 2}},
        "settings": {"data.path": [img, svg], "train.seed": [0, 1]},
        "metrics": {
            **{"users": 34, "same_held_out": False},
            "metrics": {"ndcg@10": {"before": 0.1, "after": 0.11, **change, "p": 0.3}},
        },
        "lists": {
            **{"k": 10, "users": 34, "taken": {"left": 7, "now_held": 3}},
            **dict.fromkeys(LISTS, mean),
            "gained": [{"item_id": "1", "name": svg, "before": 0.1, "after": 0.2}],
            "lost": [{"item_id": "2", "name": long, "before": 0.2, "after": 0.1}],
        },
        "reasons": {
            **{"users": 34, "pairs": 340, "codes": {"INTERACTIONS": {"survives": 0.25, "given": 300}}},
            **dict.fromkeys(REASONS, mean),
        },
    }


def hostile_facts() -> ReportData:
    """Made by hand; every text that tables could hold is one of `HOSTILE`."""
    img, svg, attribute, title, mixed, long = HOSTILE
    metrics = {"ndcg@10": (0.25, 0.2, 0.3), "recall@10": (0.5, 0.4, 0.6), "auc": (0.875, 0.8, 0.9)}
    lower = {"ndcg@10": (0.125, 0.1, 0.15), "recall@10": (0.3, 0.2, 0.4), "auc": (math.nan, math.nan, math.nan)}
    gain = Difference(0.125, 0.1, 0.15, 1.0, 0.8, 1.2, 0.001)
    groups = {svg: Group(12, 0.2, 0.1, 0.3), long: Group(20, 0.3, 0.25, 0.35), "unknown": Group(2, 0.0, 0.0, 0.0)}
    routes = (
        Route((Hop(("user", 0), "the customer", ""),), False, True, 0.4),
        Route((Hop(("user", 0), "the customer", ""), Hop(("item", 1), svg, "holds")), False, False, 0.3),
        Route(
            (
                Hop(("user", 0), "the customer", ""),
                Hop(("item", 1), svg, "holds"),
                Hop(("user", 3), "another customer", attribute),
                Hop(("item", 9), img, "holds"),
            ),
            True,
            True,
            0.1,
        ),
    )
    item = Recommended(
        *(1, attribute, img, 0.75),
        (
            Reason("INTERACTIONS", f"The customer holds {svg} (60% of what speaks for it).", 0.6),
            Reason("POPULAR", "How many customers hold it (40% of what speaks for it).", 0.4),
        ),
        ((1, 3), (3, 3)),
        routes,
        (mixed, CounterfactualEffect(0.75, 1, 0.5, 4)),
        (Passage(title, mixed, (Span(0, 4, 0.5), Span(7, 9, -0.25))), Passage("Long", "word " * 2000)),
    )
    second = item._replace(rank=2, name=long, routes=(), effect=None, passages=())
    config = to_dict(Config())
    config["data"]["path"] = img
    config["text"]["model"] = svg
    config["card"] = {"owner": img, "purpose": mixed, "license": ""}
    return ReportData(
        results={
            "dataset": title,
            "split": "random",
            "variant": "fused",
            "seed": 0,
            "valid": {"ndcg@10": 0.2409},
            "test": {"ndcg@10": 0.288},
            "slices": {"item_interactions": {"5-19": {"items": 7, "users": 3, "ndcg@10": 0.04}}},
            "best_step": 20,
            "seconds": 61.25,
            "parameters": 12345,
            "config": config,
            "finished": "2024-04-01T09:30:00+00:00",
            "data": {
                **{"source": "tables", "sha256": "ab" * 32, "repairs": {img: 1234}},
                **{
                    "period": ["2024-01-02", "2024-03-31"],
                    "trained_period": ["2024-01-02", "2024-02-28"],
                    "foreign_texts": 0.25,
                },
            },
            "versions": {"python": "3.11", "jax": "0.10", "flax": "0.12"},
        },
        counts={
            **{"customers": 3, "products": 10, "interactions": 99, "reviews": 0, "social edges": 4},
            **{"in the training split": 66, "in the validation split": 11, "in the test split": 22},
        },
        served={
            **{"history": "all", "customers": 3, "products": 10, "interactions": 98, "reviews": 0, "social edges": 4},
            **{"period": ["2024-01-02", "2024-03-31"], "unknown": {img: 2}},
        },
        digests={"tables": "ab" * 32, "model": "cd" * 32},
        split="valid",
        models=(
            Model(svg, lower, {"ndcg@10": gain, "recall@10": gain, "auc": gain}),
            Model("fused", metrics, None),
        ),
        curve=(
            {"step": 10, "loss": 2.0, "valid/ndcg@10": 0.1},
            {"step": 20, "loss": None, "valid/ndcg@10": 0.25},
            {"step": 30, "loss": 1.0, "valid/ndcg@10": 0.2},
        ),
        slices=(Sliced(attribute, "ndcg@10", Gaps(groups, long, svg, 0.1, 0.05, 0.15, 0.02)),),
        rules={
            "users": 34,
            "k": 10,
            "suitable": {"without": 0.5, "under": 1.0},
            "exclusions": {
                "users_without_recommendations": 2,
                "rules": {img: {"excluded": 40, "excluded_only_by_rule": 3, "excluded_from_topk": 1}},
            },
            "costs": {
                "": {"difference": 0.01, "low": -0.005, "high": 0.02},
                img: {"difference": -0.01, "low": -0.02, "high": 0.0},
            },
            "groups": {
                attribute: {
                    "ndcg@10": {
                        **{"best": "", "worst": "", "gap": None, "low": None, "high": None, "p": None},
                        "groups": {mixed: {"users": 3, "mean": 0.1, "low": None, "high": None}},
                    }
                }
            },
        },
        changed=hostile_changes(),
        stability=(hostile_changes(),),
        customers=(Customer(title, img, (svg, *("one",) * 20), 2, (item, second)), Customer("7", "7", (), 0, ())),
        selection="drawn at random",
    )


@pytest.fixture(scope="module")
def made() -> str:
    return render_page(hostile_facts())


@pytest.fixture(scope="module")
def read(made) -> Page:
    return Page(made)


# --- markup --------------------------------------------------------------------------------------------------------


def test_the_page_is_well_formed_and_needs_nothing_else(made, read):
    assert read.faults == []
    assert made.startswith('<!DOCTYPE html>\n<html lang="en">')
    assert not re.search(r"url\(|@import|https?:", stylesheet())
    policy = next(given["content"] for tag, given in read.elements if tag == "meta" and "http-equiv" in given)
    assert policy is not None and "default-src 'none'" in policy and "script" not in policy
    assert len(made) < 100_000


def test_hostile_names_stay_text(read):
    shown = "\n".join(read.texts)
    for text in HOSTILE[:4]:
        assert text in shown
    assert "Fund & Co. <b>bold</b> &lt;i&gt; \\u202egnol\\u202c \\x00 'quoted'" in "".join(read.texts)
    assert not {"b", "i", "img"} & {tag for tag, _ in read.elements}
    assert HOSTILE[5] not in shown and HOSTILE[5][:119] + "…" in shown


def test_nothing_to_show_is_a_page_as_well():
    facts = dataclasses.replace(
        hostile_facts(), models=hostile_facts().models[1:], curve=(), slices=(), rules=None, customers=()
    )
    read = Page(render_page(facts))
    assert read.faults == []
    shown = " ".join(read.texts)
    assert "No rules were given" in shown and "No customer was asked for." in shown and "No curves were kept." in shown


def test_a_page_that_is_too_large_is_refused(monkeypatch):
    monkeypatch.setattr(layout, "LARGEST", 10_000)
    with pytest.raises(ValueError, match="bytes, at most 10,000; ask for fewer customers or products"):
        render_page(hostile_facts())


TEXT = st.text(max_size=40) | st.sampled_from(HOSTILE)


@settings(max_examples=200, deadline=None)
@given(TEXT, TEXT, TEXT)
def test_whatever_is_written_is_read_back_as_text(one, attribute, after):
    root = element("p", one, element("b", "in"), after, title=attribute)
    read = Page(document(root))
    assert [tag for tag, _ in read.elements] == ["p", "b"]
    assert read.elements[0][1] == {"title": visible(attribute)}
    assert read.named("p") == [visible(one) + visible(after)]
    assert read.named("b") == ["in"]
    document(root).encode()


def test_values_of_attributes():
    made = document(element("a", class_="x", aria_label="y", open=True, hidden=False, title=None, x=1 / 3, y=2.0))
    assert '<a class="x" aria-label="y" open="" x="0.33" y="2"></a>' in made
    assert cut("abcdef", 6) == "abcdef" and cut("abcdefg", 6) == "abcde…"


# --- what it says --------------------------------------------------------------------------------------------------


def test_the_page_says_what_was_found(read):
    shown = " ".join(read.texts)
    for said in (
        *("0.288", "0.241", "+100.0%", "95 % interval +80.0% to +120.0%", "12,345 parameters", "61 s"),
        *("0.250 [0.200, 0.300]", "0.125 [0.100, 0.150]", "ab" * 32, "cd" * 32),
        *("it falls from rank 1 to 4.", "40", "2 customers are left without any product."),
        *("holds 21 products, 2 ties", "and 9 more", "score 0.750", "Fund +0.500; Co -0.250"),
        "Trained on 66 interactions of 3 customers and 10 products",
        "as wide by chance alone with p = 0.020",
        *(
            "2024-01-02 to 2024-02-28",
            "2024-04-01T09:30:00+00:00",
            ": 1,234",
            "98 interactions (2024-01-02 to 2024-03-31)",
        ),
    ):
        assert said in shown, said
    cells = read.named("td")
    assert {HOSTILE[0], "not stated"} <= set(cells)


def test_a_review_is_answered(read):
    shown = " ".join(read.texts)
    for said in (
        "excludes 40 pairs, costs -0.0100 [-0.0200, 0] of NDCG@10",
        "of NDCG@10 on the validation split: ",
        "keeps 0.750 [0.700, 0.800] of the first 10 products",
        "weak, surviving in less than half: INTERACTIONS",
        "since 2024-04-01T09:30:00+00:00: data.path",
        "all rows of the tables (history=all): 98 interactions",
    ):
        assert said in shown, said
    nothing = dataclasses.replace(hostile_facts(), rules=None, slices=(), changed=None, stability=())
    answers = review(nothing)
    for flag in ("--rules=FILE", "--compared_runs=DIR", "--previous=DIR"):
        assert any(flag in answer for answer in answers.values()), flag
    assert Page(render_page(nothing)).faults == []


def test_weak_reasons_are_marked(read):
    assert read.named("strong") == [" Weak: it holds in 1 of 3 other runs."] * 2  # one for each of two products


def test_changes_are_a_page_and_words():
    read = Page(render_changes([hostile_changes()] * 2, hostile_facts().results))
    assert read.faults == []
    shown = " ".join(read.texts)
    words = changes_in_words([hostile_changes()] * 2)
    for said in (
        "+10.0%",
        "-10.0% to +30.0%",
        "10.0 points",
        "3 of them held by the customer now",
        "25.0%",
        "not the same",
    ):
        assert said in shown and said in words, said
    assert "<img" not in words and HOSTILE[0] in shown


def test_late_fusion_is_on_the_page():
    facts = hostile_facts()
    fusion = {"weights": {"model": 1.0}, "launch": {"level": 1.5, "slope": 0.0, "taste": 0.0}}
    shown = " ".join(
        Page(render_page(dataclasses.replace(facts, results={**facts.results, "late_fusion": fusion}))).texts
    )
    for said in (
        "validation chose (model 1) and a launch prior that raises products without interactions (level 1.5,",
    ):
        assert said in shown, said


def test_headings_go_down_one_level_at_a_time(read):
    levels = [int(tag[1]) for tag, _ in read.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(below - above <= 1 for above, below in zip(levels, levels[1:], strict=False))


def test_tables_have_captions_and_headed_rows(read):
    tags = [tag for tag, _ in read.elements]
    assert tags.count("table") == tags.count("caption") > 4
    assert all(given.get("scope") in ("row", "col") for tag, given in read.elements if tag == "th")
    boxes = [given for _, given in read.elements if given.get("class") == "scroll"]
    assert len(boxes) == tags.count("table")
    assert all(box["tabindex"] == "0" and box["role"] == "region" and box["aria-label"] for box in boxes)


def test_highlights_are_not_reported_by_colour_alone(read):
    marks = [given for tag, given in read.elements if tag == "mark"]
    assert [mark["class"] for mark in marks] == ["plus mark-4", "minus minus-2"]
    assert [mark["title"] for mark in marks] == ["+0.5000", "-0.2500"]
    assert read.named("mark") == [HOSTILE[4][0:4], HOSTILE[4][7:9]]
    assert any("Words that count most: Fund +0.500; Co -0.250." in text for text in read.texts)


# --- colours -------------------------------------------------------------------------------------------------------


def test_contrast_by_hand():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.005)  # the textbook near miss
    assert contrast("#123456", "#123456") == 1


@pytest.mark.parametrize("palette", [LIGHT_PALETTE, DARK_PALETTE], ids=["light", "dark"])
def test_colours_have_contrast(palette):
    for ink, ground in READ:
        assert contrast(palette[ink], palette[ground]) >= 4.5, (ink, ground)
    for ink, ground in SEEN:
        assert contrast(palette[ink], palette[ground]) >= 3, (ink, ground)


def test_every_colour_is_of_the_palette():
    used = set(re.findall(r"var\(--([a-z0-9-]+)\)", stylesheet()))
    assert used == set(LIGHT_PALETTE) == set(DARK_PALETTE)
    assert len(re.findall("#[0-9a-f]{6}", stylesheet())) == 2 * len(LIGHT_PALETTE)


# --- drawings ------------------------------------------------------------------------------------------------------


def drawn(svg) -> list[tuple[str, dict[str, str], str]]:
    """(tag, attributes, text) of all that a drawing is made of."""
    return [(part.tag, dict(part.attrib), "".join(part.itertext())) for part in svg.iter()]


def test_bars_are_as_long_as_their_values():
    parts = drawn(bars("b", "T", [Bar("a", 0.1, 0.05, 0.15), Bar("b", 0.2, own=True), Bar("c", math.nan)], "NDCG"))
    widths = [float(given["width"]) for tag, given, _ in parts if tag == "rect"]
    assert widths[1] == pytest.approx(2 * widths[0], abs=0.02)
    assert [given["class"] for tag, given, _ in parts if tag == "rect"] == ["other", "own"]
    [whisker] = [given["d"] for _, given, _ in parts if given.get("class") == "whisker"]
    low, high = (float(x) for x in re.match(r"M([\d.]+) [\d.]+H([\d.]+)", whisker).groups())  # pyright: ignore[reportOptionalMemberAccess]
    assert (low - 4, high - 4) == (pytest.approx(widths[0] / 2, abs=0.1), pytest.approx(1.5 * widths[0], abs=0.1))
    texts = [text for tag, _, text in parts if tag == "text"]
    assert {"0.100", "0.200", "no value"} <= set(texts)
    assert "a: 0.100 [0.0500, 0.150]" in [text for tag, _, text in parts if tag == "desc"][0]


def test_bars_to_the_left_of_zero():
    parts = drawn(bars("b", "T", [Bar("a", -0.1), Bar("b", 0.1)], "cost"))
    left, right = [(float(given["x"]), float(given["width"])) for tag, given, _ in parts if tag == "rect"]
    assert left[0] + left[1] == pytest.approx(right[0], abs=0.02)
    assert left[1] == pytest.approx(right[1], abs=0.02)


@pytest.mark.parametrize("value", [1e-9, 0.0, 1.0, 12345.0, -3.0])
def test_axes_span_what_they_show(value):
    ticks = [
        text
        for tag, given, text in drawn(bars("b", "T", [Bar("a", value)], "u"))
        if given.get("class") == "axis middle"
    ]
    numbers = [float(text) for text in ticks[:-1]]
    assert min(numbers) <= min(value, 0) and max(value, 0) <= max(numbers)
    assert 2 <= len(numbers) <= 7


def test_a_curve_has_a_gap_where_a_value_is_missing():
    parts = drawn(curve("c", "T", [(10, 3.0), (20, 2.0), (30, None), (40, 1.0)], "loss", 20))
    [line] = [given["d"] for _, given, _ in parts if given.get("class") == "line"]
    assert re.findall("[ML]", line) == ["M", "L", "M"]
    heights = [float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", line)]
    assert heights[1] - heights[0] == pytest.approx(heights[2] - heights[1], abs=0.2) and heights[0] < heights[1]
    assert "chosen: step 20" in [text for tag, _, text in parts if tag == "text"]
    assert all(math.isfinite(y) for y in heights)


def test_paths_share_the_nodes_with_which_they_begin():
    start, bond = Step("u", "The customer"), Step("i1", "Bond", "holds")
    found = [
        PathDiagram([start, bond], "alike in words", True, 0.2),
        PathDiagram([start, Step("t", "another customer", "tie: friend")], "holds", False, 0.1),
        PathDiagram([start, bond, Step("u2", "another customer", "held by")], "holds", False, 0.05),
    ]
    parts = drawn(path_diagrams("w", "T", found, "Gold"))
    nodes = [given for tag, given, _ in parts if tag == "circle"]
    assert len(nodes) == 5  # customer, bond, two others, gold
    assert [node["cx"] for node in nodes if node["class"] == "node goal"] == ["168"]
    lines = [given for _, given, _ in parts if given.get("class", "").startswith("way")]
    assert {line["class"] for line in lines} == {"way", "way alike"}
    widths = sorted({float(line["stroke-width"]) for line in lines})
    assert len(widths) > 2 and widths[-1] == 6
    reported = [text for tag, _, text in parts if tag == "text"]
    assert {"alike in words+0.200", "holds+0.100", "holds+0.050"} <= set(reported)
    assert (
        in_words(found[2])
        == "The customer → holds: Bond → held by: another customer → holds → the product: adds 0.050 to the score."
    )


def test_numbers_as_they_are_written():
    assert [interval(x, None, None) for x in (0.0, 0.01234, 1.2345, 123.4, -0.5)] == [
        "0",
        "0.0123",
        "1.23",
        "123",
        "-0.500",
    ]
    assert interval(0.5, 0.25, 0.75) == "0.500 [0.250, 0.750]"
    assert interval(math.nan, None, None) == "–"


# --- what is found -------------------------------------------------------------------------------------------------


def per_user(values: list[float]) -> UserMetrics:
    array = np.array(values, np.float32)
    return UserMetrics(np.arange(len(values), dtype=np.int32), dict.fromkeys(finding.METRICS, array), {})


def test_models_are_compared_on_the_same_users():
    low, high = compared({"own": per_user([0.5, 0.5, 0.7, 0.7]), "other": per_user([0.4, 0.4, 0.6, 0.6])}, "own")
    assert (low.name, high.name, high.against) == ("other", "own", None)
    assert low.against is not None
    assert high.metrics["ndcg@10"] == (pytest.approx(0.6), pytest.approx(0.5), pytest.approx(0.7))
    gain = low.against["ndcg@10"]
    assert (gain.difference, gain.low, gain.high) == (pytest.approx(0.1),) * 3


# --- in a browser --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def file(made, tmp_path_factory):
    file = tmp_path_factory.mktemp("page") / "report.html"
    file.write_text(made, encoding="utf-8")
    return file


@needs_browser
@pytest.mark.parametrize("scheme", [LIGHT, DARK], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_draws_the_page(file, tmp_path, width, scheme):
    image = pytest.importorskip("PIL.Image", reason="Pillow reads the screenshot; it comes with the plots extra")
    shot = tmp_path / "shot.png"
    done = browse(file, f"--screenshot={shot}", width=width, scheme=scheme, profile=tmp_path / "profile")
    assert console(done) == []
    with image.open(shot) as drawn:
        pixels = drawn.convert("RGB")
    assert pixels.size == (width, 1600)
    palette = LIGHT_PALETTE if scheme == LIGHT else DARK_PALETTE
    colours = {"#{:02x}{:02x}{:02x}".format(*colour) for _, colour in pixels.getcolors(2**20)}
    assert "#{:02x}{:02x}{:02x}".format(*pixels.getpixel((2, 2))) == palette["page"]
    assert {palette[name] for name in ("card", "own", "ink")} <= colours


@needs_browser
def test_names_stay_text_in_a_browser(file, tmp_path):
    done = browse(file, "--dump-dom", profile=tmp_path / "profile")
    assert console(done) == []
    read = Page(done.stdout)
    assert read.faults == []
    assert HOSTILE[3][:100] in read.named("title")[0]  # and not 'taken'
    shown = "\n".join(read.texts)
    assert all(text in shown for text in HOSTILE[:4])


PROBE = """<script>addEventListener("load", () => {
document.querySelectorAll("details").forEach(folded => folded.open = true);
const wide = [...document.querySelectorAll("body *")].filter(part => !part.closest(".scroll, svg, .skip")
&& part.getBoundingClientRect().right > innerWidth + .5).map(part => part.tagName + "." + part.className);
const small = [...document.querySelectorAll("svg text")].map(text => text.getBoundingClientRect().height)
.filter(height => height > 0 && height < 10).length;
parent.postMessage(JSON.stringify([innerWidth, document.documentElement.scrollWidth, wide.slice(0, 5), small]), "*");
});</script>"""
FRAME = """<!DOCTYPE html><title>none</title><script>addEventListener("message", said => document.title = said.data);
</script><iframe src="probe.html" style="border:0;width:WIDTHpx;height:900px"></iframe>"""


@needs_browser
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_does_not_scroll_sideways(made, tmp_path, width):
    """Everything unfolded, in a frame, as no window is as narrow as a phone; and no letters are too small to read.

    Measured by a script, which the page's own policy would not let run.
    """
    unlocked = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', lambda _: PROBE, made, count=1)
    (tmp_path / "probe.html").write_text(unlocked, encoding="utf-8")
    (tmp_path / "frame.html").write_text(FRAME.replace("WIDTH", str(width)), encoding="utf-8")
    done = browse(tmp_path / "frame.html", "--dump-dom", profile=tmp_path / "profile")
    assert re.findall("<title>(.*?)</title>", done.stdout) == [f"[{width},{width},[],0]"]


@needs_browser
def test_the_policy_stops_what_the_page_has_not(made, tmp_path):
    """The second lock holds where the first is broken, and the console tells of it: `console` sees what it should."""
    broken = made.replace("<main", "<img src=x onerror=\"document.title='taken'\"><main", 1)
    (tmp_path / "broken.html").write_text(broken, encoding="utf-8")
    done = browse(tmp_path / "broken.html", "--dump-dom", profile=tmp_path / "profile")
    assert any("Content Security Policy" in line for line in console(done))
    assert "taken" not in Page(done.stdout).named("title")[0].replace(HOSTILE[3], "")


def test_the_browser_is_named():
    """Tests in a browser are skipped, with the reason, where none is installed."""
    assert BROWSER is None or BROWSER.startswith("/")
