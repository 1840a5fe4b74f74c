"""The model card: what it says is what was measured, and no name of a dataset is taken for markup or YAML."""

import dataclasses
import logging
import math
from typing import Any

import pyarrow as pa
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from fused_rec.config import CardConfig, Config, ModelConfig, Variant, to_dict
from fused_rec.data.dataset import digest, period
from fused_rec.data.synthetic import make_synthetic
from fused_rec.runs.model_card import METRICS, card, describe_sources, export_card
from fused_rec.runs.run_dir import write_card

AMOUNTS = {"customers": 12345, "products": 10, "in the training split": 7}
DIGESTS = {"tables": "ab" * 32, "model": "cd" * 32}


SERVED = {
    **{"history": "all", "customers": 3, "products": 10, "interactions": 98, "reviews": 0, "social edges": 4},
    **{"period": ["2024-01-02", "2024-03-31"], "unknown": {}},
}


def results(
    dataset: str = "market", variant: Variant = "fused", stated: CardConfig | None = None, **changes: float | None
) -> dict:
    config = to_dict(Config(model=ModelConfig(variant=variant), card=stated or CardConfig()))
    valid, test = ({metric: (place + 1) / part for place, metric in enumerate(METRICS)} for part in (30, 70))
    return {
        **{
            "dataset": dataset,
            "split": "random",
            "variant": variant,
            "seed": 3,
            "best_step": 40,
            "parameters": 1234,
            "counts": AMOUNTS,
            "finished": "2024-04-01T09:30:00+00:00",
            "data": {
                **{"source": "tables", "sha256": "ab" * 32, "repairs": {"unknown id": 1234}},
                **{
                    "period": ["2024-01-02", "2024-03-31"],
                    "trained_period": ["2024-01-02", "2024-02-28"],
                    "foreign_texts": 0.25,
                },
            },
        },
        **{"valid": valid | changes, "test": test, "config": config, "versions": {"python": "3.11", "jax": "0.10"}},
    }


def front_matter(made: str) -> tuple[dict, str]:
    """The front matter as a hub reads it, and the Markdown below."""
    first, matter, below = made.split("---\n", 2)
    assert first == ""
    return yaml.safe_load(matter), below


def test_the_front_matter_has_the_numbers_in_full():
    given = results()
    matter, _ = front_matter(card(given, DIGESTS, "select/checkpoints/40"))
    assert matter["library_name"] == "fused_rec" and "license" not in matter
    [entry] = matter["model-index"]
    assert entry["name"] == "market, fused"
    found = {
        (result["dataset"]["split"], metric["type"]): metric["value"]
        for result in entry["results"]
        for metric in result["metrics"]
    }
    expected = {("validation", metric): value for metric, value in given["valid"].items()}
    assert found == expected | {("test", metric): value for metric, value in given["test"].items()}
    assert {result["task"]["type"] for result in entry["results"]} == {"recommendation"}


def test_late_fusion_is_reported():
    given = results(variant="graph")
    assert "by the graph alone. 1,234 parameters" in card(given, DIGESTS, "x")
    given["late_fusion"] = {"weights": {"model": 1.0, "text_ease": 0.35}}
    text = (
        "by the graph alone, by late fusion of components with weights that validation chose (model 1, text ease 0.35)."
    )
    assert text in card(given, DIGESTS, "x")
    given["late_fusion"]["launch"] = {"level": 1.5, "slope": 0.25, "taste": 0.0}
    text = "0.35) and a launch prior that raises products without interactions (level 1.5, slope 0.25, taste 0)."
    assert text in card(given, DIGESTS, "x")


def test_an_empty_license_is_not_claimed():
    made = card(results(), DIGESTS, "x")
    for what in ("Owner", "Purpose", "License"):
        assert f"| {what} | not stated |" in made
    assert "apache" not in made.lower()


def test_origin_is_in_both_cards():
    stated = CardConfig(owner="Retail | Risk", purpose="Trial of *funds*", license="CC-BY-4.0")
    given = results(stated=stated)
    for made in (card(given, DIGESTS, "x"), export_card(given, SERVED, DIGESTS, {})):
        matter, below = front_matter(made)
        assert matter["license"] == "cc-by-4.0" and "license_name" not in matter
        for said in (
            *(r"| Owner | Retail \| Risk |", r"| Purpose | Trial of \*funds\* |", "| License | CC-BY-4.0 |"),
            *("| Trained | 2024-04-01T09:30:00+00:00 |", "| Data | market (data.name=tables) |"),
            "| Interactions trained on | 2024-01-02 to 2024-02-28 |",
            "| Interactions of the tables | 2024-01-02 to 2024-03-31 |",
            "| Repairs by the reader | unknown id: 1,234 |",
        ):
            assert said in below, said
    assert "98 interactions (2024-01-02 to 2024-03-31)" in below
    given["data"] |= {"repairs": {}, "period": None}
    made = card(given, DIGESTS, "x")
    assert "| Repairs by the reader | none |" in made and "| Interactions of the tables | without timestamps |" in made


def test_a_review_is_in_both_cards():
    found = results() | {"review": {"Reviewed": "2024-05-01T09:30:00+00:00", "Stability": "seed1 keeps 0.9 | of it"}}
    for made in (card(found, DIGESTS), export_card(found, SERVED, DIGESTS, {})):
        assert "| Reviewed | 2024-05-01T09:30:00+00:00 |" in made
        assert "| Stability | seed1 keeps 0.9 \\| of it |" in made
    assert "Stability" not in card(results(), DIGESTS)


def test_foreign_texts_are_reported_where_they_are_most():
    given = results()
    assert "another language" not in card(given, DIGESTS, "x")
    given["data"]["foreign_texts"] = 0.83
    assert "| Texts | 83% are of another language than all-MiniLM-L6-v2 reads |" in card(given, DIGESTS, "x")


def test_another_license_is_named_beside_other():
    matter, _ = front_matter(card(results(stated=CardConfig(license="Bank AG: internal\nonly")), DIGESTS, "x"))
    assert (matter["license"], matter["license_name"]) == ("other", "Bank AG: internal only")


def test_dates_of_a_table():
    assert period(pa.table({"user": [1]})) is None
    times = pa.array([None], pa.int64())
    assert period(pa.table({"timestamp": times})) is None
    times = pa.array([86_399, None, -1, 1_700_000_000], pa.int64())
    assert period(pa.table({"timestamp": times})) == ["1969-12-31", "2023-11-14"]
    assert period(pa.table({"timestamp": pa.array([2**40], pa.int64())})) == ["36812-02-20"] * 2


def test_sources_say_what_was_repaired_and_trained_on():
    dataset = make_synthetic(0, n_users=20, n_items=20)
    dataset = dataclasses.replace(dataset, repairs={"unknown id": 2})
    rows = dataset.interactions.sort_by("timestamp").slice(0, 1)
    found = describe_sources("tables", dataset, rows)
    assert found["sha256"] == digest(dataset) and found["repairs"] == {"unknown id": 2}
    assert found["period"][0] == found["trained_period"][0] == found["trained_period"][1] < found["period"][1]


def test_a_hub_reads_it():
    from huggingface_hub import ModelCard

    read = ModelCard(card(results("a: 'b' #1"), DIGESTS, "select/checkpoints/40"))
    data: Any = read.data
    assert data.library_name == "fused_rec"
    assert data.model_name == "a: 'b' #1, fused"
    assert {result.metric_value for result in data.eval_results} == {
        *results()["valid"].values(),
        *results()["test"].values(),
    }


def test_what_it_says():
    made = card(results(), DIGESTS, "select/checkpoints/40")
    for said in (
        *("# market: fused model", "texts and graph", "1,234 parameters, seed 3", "step 40, selected on validation"),
        *(
            "| customers | 12,345 |",
            "| ndcg@10 | 0.0333 | 0.0143 |",
            f"- tables: `{'ab' * 32}`",
            "python 3.11, jax 0.10",
        ),
        *("no investment advice", "does not judge whether a product suits a person", "`select/checkpoints/40`"),
    ):
        assert said in made, said
    assert "Language model of the texts: none." in card(results(variant="graph"), DIGESTS, "x")


@pytest.mark.parametrize("none", [math.nan, None])
def test_a_metric_without_a_value_is_left_out(none):
    matter, below = front_matter(card(results(auc=none), DIGESTS, "x"))
    [entry] = matter["model-index"]
    types = [(r["dataset"]["split"], m["type"]) for r in entry["results"] for m in r["metrics"]]
    assert ("validation", "auc") not in types and ("test", "auc") in types
    assert "| auc | – | 0.1000 |" in below


HOSTILE = [
    "---\nlicense: mit\n---\n",
    "a: [b",
    "<script>alert(1)</script>",
    "![x](https://example.com)",
    "`|` # *x*",
    "\0",
]


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(HOSTILE) | st.text(max_size=30))
def test_a_name_stays_a_name(name):
    matter, below = front_matter(card(results(name), DIGESTS, "x"))
    assert set(matter) == {"library_name", "tags", "model-index"}
    title = below.strip().splitlines()[0]
    assert title.startswith("# ") and title.endswith(": fused model")
    assert below.count("\n") == front_matter(card(results(), DIGESTS, "x"))[1].count("\n")
    for markup in ("<script", "![x]", "\n---\n"):
        assert markup not in below


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(HOSTILE) | st.text(min_size=1, max_size=30))
def test_statements_stay_text(text):
    given = results()
    given["config"]["card"] = {"owner": text, "purpose": text, "license": text}
    given["data"]["repairs"] = {text: 1}
    matter, below = front_matter(card(given, DIGESTS, "x"))
    assert set(matter) <= {"library_name", "license", "license_name", "tags", "model-index"}
    assert below.count("\n") == front_matter(card(results(), DIGESTS, "x"))[1].count("\n")
    for markup in ("<script", "![x]", "\n---\n"):
        assert markup not in below


def test_somebody_elses_readme_stays(tmp_path, caplog):
    file = tmp_path / "README.md"
    file.write_text("# My notes\n")
    with caplog.at_level(logging.WARNING):
        write_card(file, card(results(), DIGESTS, "x"))
    assert file.read_text() == "# My notes\n"
    assert "is not a model card and is kept" in caplog.text
    file.unlink()
    for seed in (1, 2):  # a card is replaced by the next
        write_card(file, card(results() | {"seed": seed}, DIGESTS, "x"))
        assert f"seed {seed}" in file.read_text()
