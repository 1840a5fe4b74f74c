"""The model card: what it says is what was measured, and no name of a dataset is taken for markup or YAML."""

import logging
import math
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from fused_rec.config import Config, ModelConfig, Variant, to_dict
from fused_rec.runs.model_card import METRICS, card
from fused_rec.runs.run_dir import write_card

AMOUNTS = {"customers": 12345, "products": 10, "in the training split": 7}
DIGESTS = {"tables": "ab" * 32, "model": "cd" * 32}


def results(dataset: str = "market", variant: Variant = "fused", **changes: float | None) -> dict:
    config = to_dict(Config(model=ModelConfig(variant=variant)))
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
    assert (matter["library_name"], matter["license"]) == ("fused_rec", "apache-2.0")
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
    assert set(matter) == {"library_name", "license", "tags", "model-index"}
    assert matter["license"] == "apache-2.0"
    title = below.strip().splitlines()[0]
    assert title.startswith("# ") and title.endswith(": fused model")
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
