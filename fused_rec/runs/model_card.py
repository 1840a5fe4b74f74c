"""A model card: what a trained run is, in words for people and in the front matter that model hubs read."""

import math
from collections.abc import Mapping
from typing import Any

from fused_rec.config import ModelConfig
from fused_rec.data.dataset import Dataset, printable
from fused_rec.data.splits import SPLIT_NAMES, Split
from fused_rec.evaluation.result_tables import in_markdown

LIBRARY = "library_name: fused_rec"  # a line of the front matter, by which a card is known for one of ours
METRICS = ("ndcg@10", "recall@10", "precision@10", "hitrate@10", "mrr@10", "map@10", "auc", "coverage@10")
NAMES = {"valid": "validation", "test": "test"}


def counts(dataset: Dataset, data_split: Split) -> dict[str, int]:
    """How much there is of what, by its name in words."""
    tables = {"holdings and purchases": dataset.interactions, "reviews": dataset.reviews, "ties": dataset.ties}
    return {
        "customers": dataset.n_users,
        "products": dataset.n_items,
        **{name: table.num_rows for name, table in tables.items()},
        **{f"in the {NAMES.get(part, 'training')} part": len(getattr(data_split, part)) for part in SPLIT_NAMES},
    }


def card(results: Mapping[str, Any], amounts: Mapping[str, int], digests: Mapping[str, str], checkpoint: str) -> str:
    """Markdown with YAML front matter (Hugging Face's model-index), to lie in the run's folder.

    results: as in `results.json`; its numbers stand in the front matter in full. digests: SHA-256 by what it is of.
    checkpoint: where in the folder the chosen state lies.
    """
    return _page(
        results,
        amounts,
        digests,
        "All metrics, and the test part by slices, are in `results.json`.",
        f"""\
The checkpoint is in `{checkpoint}` and ranks with the tables it was trained on, which `run.json` names; others
are refused.

```python
import fused_rec as fr

run = fr.load("path/to/this/folder")  # data_path=DIR where the tables lie elsewhere now
fr.recommend(run, k=10)  # all users; users=["..."] names some
```""",
    )


def export_card(
    results: Mapping[str, Any], amounts: Mapping[str, int], digests: Mapping[str, str], files: Mapping[str, str]
) -> str:
    """The same for a folder as `fused_rec.serving.export_bundle` writes it, which is read without this package.

    files: what each file of the folder holds, by its name.
    """
    listed = "\n".join(f"| `{name}` | {what} |" for name, what in files.items())
    return _page(
        results,
        amounts,
        digests,
        "All settings are in `config.json`.",
        f"""\
| file | |
|---|---|
{listed}

The score of a customer and a product, by which products are ranked, is the inner product of their two vectors.
What the customer holds already is ranked too, and no rule of who may get what is applied: leave out what must not be
shown. A customer or product that is not listed has no vector until the model is exported anew.

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

The same for many customers at once, on a CPU, GPU or TPU, with `jax` and `flatbuffers` (NaN for a row that is not
there):

```python
import numpy as np
from jax import export

with open("score.stablehlo", "rb") as file:
    score = export.deserialize(bytearray(file.read()))
all_scores = score.call(users, items, np.arange(min(100, len(users)), dtype=np.int32))  # float32 [100, products]
```

JAX promises that releases up to six months newer than the one that wrote `score.stablehlo` can run it.""",
    )


def _page(
    results: Mapping[str, Any], amounts: Mapping[str, int], digests: Mapping[str, str], further: str, loading: str
) -> str:
    """further: a sentence below the measurements. loading: Markdown."""
    config = results["config"]
    variant, dataset = results["variant"], in_markdown(results["dataset"])
    model = ModelConfig(**config["model"])
    basis = "texts and graph" if model.fuses_text else "texts alone" if model.uses_text else "the graph alone"
    beside = ", with EASE as a part of the score" if model.ease_weight else ""
    made_of = "trained anew on training and validation part" if config["train"]["refit"] else "as validation chose it"
    language = in_markdown(config["text"]["model"]) if model.uses_text else "none"
    amount = "\n".join(f"| {name} | {count:,} |" for name, count in amounts.items())
    measured = "\n".join(
        f"| {metric} | {_number(results['valid'][metric])} | {_number(results['test'][metric])} |" for metric in METRICS
    )
    sha = "\n".join(f"- {name}: `{digest}`" for name, digest in digests.items())
    versions = ", ".join(f"{name} {in_markdown(version)}" for name, version in results["versions"].items())
    return f"""---
{_front_matter(results)}
---

# {dataset}: {variant} model

Ranks financial products for customers by {basis}{beside}. {results["parameters"]:,} parameters, seed {results["seed"]};
the state of step {results["best_step"]}, {made_of}. Language model of the texts: {language}.

## Trained on

| {dataset}, split `{results["split"]}` | |
|---|---:|
{amount}

SHA-256:

{sha}

## Measured

The whole catalogue is ranked for every customer with held-out products, and what was known before is left out.
Validation chose the step; the test part was read once, at the end.

| | validation | test |
|---|---:|---:|
{measured}

{further}

## Use and limits

- For experiments with rankings of products. The model ranks: it does not judge whether a product suits a person, and
  its rankings are no investment advice. Rules of who may get what are applied when it ranks, not learned.
- It repeats what people held: what is popular, and for whom it works well, comes from the data. Nothing here was
  measured on other customers, products or times than those above.
- Parameters and vectors can tell of the people in the tables. Treat this folder as you treat them.
- The code is under Apache-2.0. Tables and language model keep their own licences.

## Loading

{loading}

## Versions

{versions}
"""


def _front_matter(results: Mapping[str, Any]) -> str:
    from huggingface_hub import EvalResult, ModelCardData  # takes a second

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
    data = ModelCardData(
        library_name=LIBRARY.partition(": ")[2],
        license="apache-2.0",
        tags=["recommendation", "graph", "finance", "jax"],
        model_name=f"{name}, {results['variant']}",
        eval_results=measured,
    )
    return data.to_yaml()


def _is_number(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _number(value: float | None) -> str:
    return f"{value:.4f}" if value is not None and math.isfinite(value) else "–"
