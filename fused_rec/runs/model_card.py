"""Model card of a trained run: Markdown for people, front matter for model hubs."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from fused_rec.config import ModelConfig
from fused_rec.data.dataset import Dataset, digest, period, printable
from fused_rec.data.splits import SPLIT_NAMES, Split
from fused_rec.evaluation.result_tables import in_markdown
from fused_rec.text.coverage import MOST

LIBRARY = "library_name: fused_rec"  # line of the front matter that identifies our cards
METRICS = ("ndcg@10", "recall@10", "precision@10", "hitrate@10", "mrr@10", "map@10", "auc", "coverage@10")
NAMES = {"valid": "validation", "test": "test"}
LIMITS = """\
## Use and limits

- For experiments with rankings of products. The model does not judge whether a product suits a person, and its rankings
  are no investment advice. Suitability rules are applied when it ranks, not learned.
- It reproduces the popularity and the differences between groups of its data. It was not evaluated on other customers,
  products or periods than those above.
- Parameters and vectors contain information about the people in the tables. Protect this folder as the tables.
- The license of fused_rec is that of its code, not of this model. Tables and language model have their own licenses."""
NOT_STATED = "not stated"
# Identifiers that the Hugging Face Hub takes as `license`; any other license is "other" there, with its name beside it.
HUB_LICENSES = frozenset(
    "apache-2.0 mit bsd-2-clause bsd-3-clause mpl-2.0 gpl-2.0 gpl-3.0 lgpl-3.0 agpl-3.0 cc0-1.0 cc-by-4.0 cc-by-sa-4.0 "
    "cc-by-nc-4.0 cc-by-nc-sa-4.0 cc-by-nc-nd-4.0 openrail unknown other".split()
)


def counts(dataset: Dataset, data_split: Split) -> dict[str, int]:
    """Counts users, items, rows of the tables and of the splits.

    Args:
      dataset: the tables.
      data_split: their split.

    Returns:
      Numbers by their description in the card.
    """
    tables = {"interactions": dataset.interactions, "reviews": dataset.reviews, "social edges": dataset.ties}
    return {
        "customers": dataset.n_users,
        "products": dataset.n_items,
        **{name: table.num_rows for name, table in tables.items()},
        **{f"in the {NAMES.get(part, 'training')} split": len(getattr(data_split, part)) for part in SPLIT_NAMES},
        **({"dropped from training": len(data_split.dropped)} if len(data_split.dropped) else {}),
    }


def describe_sources(source: str, dataset: Dataset, trained: pa.Table) -> dict[str, Any]:
    """Describes the data of a training for cards, pages and exports.

    Args:
      source: data.name.
      dataset: the tables.
      trained: the interactions that the served model was trained on.

    Returns:
      `source`, `sha256` of the tables, first and last date of the interactions of the tables and of those trained on
      (`period`, `trained_period`; None without timestamps), and counts of `repairs` by the reader.
    """
    return {
        "source": source,
        "sha256": digest(dataset),
        "period": period(dataset.interactions),
        "trained_period": period(trained),
        "repairs": dict(dataset.repairs),
    }


def describe_origin(results: Mapping[str, Any]) -> dict[str, str]:
    """Says whose model it is, what it is for, what it was trained on and when, as texts without markup.

    Args:
      results: content of `results.json`.

    Returns:
      Texts by what they are about.
    """
    stated, data = results["config"]["card"], results["data"]
    foreign, encoder = data["foreign_texts"], results["config"]["text"]["model"]
    return {
        **{what.capitalize(): stated[what] or NOT_STATED for what in ("owner", "purpose", "license")},
        "Trained": results["finished"],
        "Data": f"{results['dataset']} (data.name={data['source']})",
        "Interactions trained on": describe_dates(data["trained_period"]),
        "Interactions of the tables": describe_dates(data["period"]),
        "Repairs by the reader": describe_repairs(data["repairs"]),
        **({"Texts": f"{foreign:.0%} are of another language than {encoder} reads"} if foreign > MOST else {}),
    }


def describe_dates(found: Sequence[str] | None) -> str:
    """Says the first and the last date of `fused_rec.data.dataset.period`."""
    return "without timestamps" if found is None else " to ".join(found)


def describe_repairs(found: Mapping[str, int]) -> str:
    """Says what the reader repaired, with counts."""
    return ", ".join(f"{what}: {count:,}" for what, count in found.items()) or "none"


def card(results: Mapping[str, Any], digests: Mapping[str, str], checkpoint: str = "") -> str:
    """Writes the card of a run's folder, as Markdown with YAML front matter (model-index of Hugging Face).

    Args:
      results: content of `results.json`; the front matter has its numbers in full precision.
      digests: SHA-256 by the name of the object.
      checkpoint: path of the selected checkpoint in the folder; empty: of a baseline, which has none.

    Returns:
      The card.
    """
    where = f"The checkpoint is in `{checkpoint}`." if checkpoint else "The model is fitted when the run is loaded."
    return _page(
        results,
        digests,
        "All metrics, and those of slices of the test split, are in `results.json`.",
        f"""\
{where} It ranks by all rows of the tables it was trained on, which `run.json` identifies,
held-out rows included; `history="train"` leaves these out. `dataset=` serves other tables.

```python
import fused_rec as fr

run = fr.load("path/to/this/folder")  # data_path=DIR if the tables were moved
run.recommend(k=10)  # all users; users=["..."] names some
```""",
    )


def export_card(
    results: Mapping[str, Any], served: Mapping[str, Any], digests: Mapping[str, str], files: Mapping[str, str]
) -> str:
    """Writes the card of a folder of `fused_rec.serving.export_bundle`, which is read without this package.

    Args:
      results: content of `results.json`.
      served: what the vectors use, as `describe_served` takes it.
      digests: SHA-256 by the name of the object.
      files: description of each file by its name.

    Returns:
      The card.
    """
    listed = "\n".join(f"| `{name}` | {what} |" for name, what in files.items())
    loading = f"""\
| file | |
|---|---|
{listed}

The vectors use {in_markdown(describe_served(served))}.

Products are ranked by the inner product of the customer's and the product's vector. Products that the customer already
holds are included, and no suitability rule is applied: exclude products that must not be shown. New customers and
products have no vector until the run is exported again, with the tables that have them.

```python
import json

from safetensors import safe_open


def read(file):
    with safe_open(file, framework="np") as opened:
        return opened.get_tensor("vectors"), json.loads(opened.metadata()["ids"])


users, user_ids = read("users.safetensors")
items, item_ids = read("items.safetensors")
scores = items @ users[0]  # of the customer user_ids[0]
best = [item_ids[row] for row in (-scores).argsort()[:10]]
```

The same for many customers at once, on a CPU, GPU or TPU, with `jax` and `flatbuffers` (NaN for a row outside the
table):

```python
import numpy as np
from jax import export

with open("score.stablehlo", "rb") as file:
    score = export.deserialize(bytearray(file.read()))
all_scores = score.call(users, items, np.arange(min(100, len(users)), dtype=np.int32))  # float32 [100, products]
```

JAX guarantees that releases up to six months newer than the one that wrote `score.stablehlo` can run it."""
    return _page(results, digests, "All settings are in `config.json`.", loading)


def describe_model(results: Mapping[str, Any]) -> str:
    """Says in words how large a run's model is, and what validation selected.

    Args:
      results: content of `results.json`.
    """
    if (settings := results.get("settings")) is not None:
        chosen = ", ".join(f"{name} {value}" for name, value in settings.items())
        return f"A baseline with {chosen}, chosen on validation" if chosen else "A baseline without settings"
    return f"{results['parameters']:,} parameters, seed {results['seed']}; the state of step {results['best_step']}"


def describe_training(results: Mapping[str, Any]) -> str:
    """Says in words what the served model of a run was trained on, and which model was measured.

    Args:
      results: content of `results.json`.
    """
    if "settings" in results:
        return "fitted to the rows that it ranks with; the metrics are of the model without held-out rows"
    trained = {
        "none": "selected on validation and trained on the training split",
        "valid": "refitted on training and validation",
        "all": "retrained on all interactions once it was measured; the metrics are of the training split's model",
    }[results["config"]["train"]["refit"]]
    if (source := results.get("init_from")) is None:
        return trained
    return f"{trained}; it started from the parameters of {printable(source['run'])} (model {source['model'][:12]})"


def describe_served(served: Mapping[str, Any]) -> str:
    """Says in words what a ranking uses.

    Args:
      served: `history`, numbers of customers, products, interactions, reviews and social edges, `period` of the
        interactions, and `unknown`, counts of what the model cannot use.
    """
    numbers = [f"{served[name]:,} {name}" for name in ("interactions", "reviews", "social edges")]
    numbers[0] += f" ({describe_dates(served['period'])})"
    of = f"of {served['customers']:,} customers and {served['products']:,} products"
    which = "all rows of the tables" if served["history"] == "all" else "the rows that the model was trained on"
    unknown = "".join(f"; {count:,} {what}" for what, count in served["unknown"].items())
    return f"{which} (history={served['history']}): {', '.join(numbers)} {of}{unknown}"


def _basis(model: ModelConfig, variant: str) -> str:
    if model.method:
        return f"the method {variant}"
    return "texts and graph" if model.fuses_text else "texts alone" if model.uses_text else "the graph alone"


def _page(results: Mapping[str, Any], digests: Mapping[str, str], further: str, loading: str) -> str:
    """Fills the template; `further` is a sentence below the metrics, `loading` Markdown of a section."""
    config = results["config"]
    variant, dataset = results["variant"], in_markdown(results["dataset"])
    model = ModelConfig(**config["model"])
    beside = describe_late_fusion(results.get("late_fusion"))
    origin = _rows(describe_origin(results) | results.get("review", {}))
    language = in_markdown(config["text"]["model"]) if model.reads_text else "none"
    amount = "\n".join(f"| {name} | {count:,} |" for name, count in results["counts"].items())
    measured = "\n".join(
        f"| {metric} | {_number(results['valid'][metric])} | {_number(results['test'][metric])} |" for metric in METRICS
    )
    sha = "\n".join(f"- {name}: `{digest}`" for name, digest in digests.items())
    trained = in_markdown(describe_training(results))
    versions = ", ".join(f"{name} {in_markdown(version)}" for name, version in results["versions"].items())
    return f"""---
{_front_matter(results)}
---

# {dataset}: {variant} model

Ranks financial products for customers by {_basis(model, variant)}{beside}. {describe_model(results)}, {trained}.
Language model of the texts: {language}.

| | |
|---|---|
{origin}

## Trained on

| {dataset}, split `{results["split"]}` | |
|---|---:|
{amount}

SHA-256:

{sha}

## Measured

The whole catalogue is ranked for every customer with held-out products, without the products seen before.
{"The step was" if model.is_trained else "The settings were"} selected on validation; the test split was evaluated once,
at the end.

| | validation | test |
|---|---:|---:|
{measured}

{further}

{LIMITS}

## Loading

{loading}

## Versions

{versions}
"""


def _rows(texts: Mapping[str, str]) -> str:
    return "\n".join(f"| {what} | {in_markdown(text)} |" for what, text in texts.items())


def _front_matter(results: Mapping[str, Any]) -> str:
    from huggingface_hub import EvalResult, ModelCardData  # slow import

    name = printable(results["dataset"])
    measured = [
        EvalResult(
            task_type="recommendation",
            task_name="Ranking of the whole catalogue",
            dataset_type=printable(results["config"]["data"]["name"]),
            dataset_name=name,
            dataset_split=NAMES[part],
            metric_type=metric,
            metric_value=results[part][metric],
        )
        for part in ("test", "valid")
        for metric in METRICS
        if _is_number(results[part][metric])
    ]
    license_id, license_name = _license(results["config"]["card"]["license"])
    data = ModelCardData(
        library_name=LIBRARY.partition(": ")[2],
        license=license_id,
        license_name=license_name,
        tags=["recommendation", "graph", "finance", "jax"],
        model_name=f"{name}, {results['variant']}",
        eval_results=measured,
    )
    return data.to_yaml()


def _license(stated: str) -> tuple[str | None, str | None]:
    """Returns `license` and `license_name` of the front matter, None for what is left out."""
    if not stated or stated.lower() in HUB_LICENSES:
        return stated.lower() or None, None
    return "other", printable(" ".join(stated.split()))


def _is_number(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def describe_late_fusion(selection: Mapping[str, Any] | None) -> str:
    """Names the components of the score with their weights, and the launch prior, as the end of a sentence.

    Args:
      selection: `late_fusion` of `results.json`; None: the trained model scores alone.
    """
    if selection is None:
        return ""
    weights = ", ".join(f"{name.replace('_', ' ')} {weight:.2g}" for name, weight in selection["weights"].items())
    launch = selection.get("launch")
    prior = launch and ", ".join(f"{name} {weight:.2g}" for name, weight in launch.items())
    raised = f" and a launch prior that raises products without interactions ({prior})" if prior else ""
    return f", by late fusion of components with weights that validation chose ({weights}){raised}"


def _number(value: float | None) -> str:
    return f"{value:.4f}" if value is not None and math.isfinite(value) else "–"
