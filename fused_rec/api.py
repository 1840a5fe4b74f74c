"""What a notebook calls, thin over the functions that the commands use; `fused_rec` itself offers these names."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float32

from fused_rec.config import Config, DataConfig, TextConfig, from_dict, to_dict
from fused_rec.data.dataset import Dataset, changes, contents, digest
from fused_rec.data.io.arrow import pc
from fused_rec.data.io.tables import read_tables
from fused_rec.data.io.writers import save_dataset
from fused_rec.data.sources import registry
from fused_rec.distributed.devices import computes
from fused_rec.evaluation.ranking import mean
from fused_rec.evaluation.suitability import check_groups, suitable
from fused_rec.explanation.counterfactual import CounterfactualEffect, counterfactual_effect
from fused_rec.explanation.decomposition import decompose
from fused_rec.explanation.reasons import record
from fused_rec.reporting.data import (
    ReportData,
    compared,
    evaluate_models,
    passages,
    recommended,
    sample,
    sliced,
)
from fused_rec.reporting.page import render_page
from fused_rec.runs.loggers import read_curves
from fused_rec.runs.model_card import counts
from fused_rec.serving import export_bundle, recommender
from fused_rec.serving.recommender import SCHEMA, as_texts, candidate_filter, model_digest, user_rows
from fused_rec.serving.write_rankings import read_rules
from fused_rec.storage import write_file
from fused_rec.studies.compare import compare_variants
from fused_rec.studies.variants import VARIANTS
from fused_rec.text.encode import encode_texts
from fused_rec.text.pretrained import open_model
from fused_rec.training.evaluate import BASELINES, evaluate_rules, scorer
from fused_rec.training.inputs import Prepared
from fused_rec.training.train_step import TrainState
from fused_rec.training.trainer import (
    RUN,
    TABLES,
    TablesChangedError,
    read_results,
    read_run,
    run_training,
)


@dataclasses.dataclass(frozen=True, repr=False)
class Run:
    """A finished run, ready to rank.

    workdir: its folder. config: what it was trained with. prepared: its tables, split and graph. state: the parameters
    that were chosen. results: of `results.json`, metrics by part among them: `run.results["test"]["ndcg@10"]`.
    """

    workdir: Path
    config: Config
    prepared: Prepared
    state: TrainState
    results: Mapping[str, Any]

    def __repr__(self) -> str:
        metric = self.config.train.metric
        measured = ", ".join(f"{part} {metric} {self.results[part][metric]:.4f}" for part in ("valid", "test"))
        return f"Run({str(self.workdir)!r}: {self.prepared.dataset.name}, {self.config.model.variant}, {measured})"


def configure(base: Config | None = None, /, **sections: Any) -> Config:
    """A config with some settings changed: `configure(model={"dim": 32}, train={"max_steps": 200})`.

    base: the config that is changed; None = all defaults. Raises ValueError for an unknown section or setting, for one
    that stands outside of its section, and for a value out of its bounds.
    """
    values = to_dict(base or Config())
    for name, given in sections.items():
        homes = [section for section, settings in values.items() if name in settings and name not in values]
        if isinstance(given, Mapping) and not homes:
            continue  # an unknown section is told below
        if homes:
            right = " or ".join(f'{section}={{"{name}": {given!r:.60}}}' for section in homes)
            raise ValueError(f"{name} is no section of the config but a setting; write {right}")
        raise ValueError(
            f'{name} is {given!r:.60}; give a dictionary of settings by section, such as model={{"dim": 32}}; the '
            f"sections are {', '.join(values)}"
        )
    return from_dict({**values, **{name: {**values.get(name, {}), **given} for name, given in sections.items()}})


def load_dataset(
    source: str | os.PathLike[str] = "synthetic",
    *,
    path: str | os.PathLike[str] = "",
    repair: bool = False,
    k_core: int = 1,
    min_value: int | float | None = None,
    delimiter: str = "",
    encoding: str = "",
) -> Dataset:
    """The dataset of a name (`fused_rec.data.sources.registry.READERS`), or of a folder of your own tables.

    path: the folder of a named one; empty = its own under $FUSED_REC_DATA. repair, core, min_value, and for your own
    tables delimiter and encoding: as in `DataConfig`.

    Raises ValueError for what is neither, FileNotFoundError where the files are not there, DataError (which lists every
    problem) where they must not be used.
    """
    settings: dict[str, Any] = {"repair": repair, "k_core": k_core, "delimiter": delimiter, "encoding": encoding}
    settings["min_value"] = None if min_value is None else float(min_value)
    if isinstance(source, str) and source in registry.READERS:
        return registry.load(DataConfig(source, os.fspath(path), **settings))
    if not Path(source).expanduser().is_dir():
        raise ValueError(
            f"{str(source)!r} is no folder, and no dataset of that name; there are {', '.join(registry.READERS)}"
        )
    return registry.load(DataConfig("tables", os.fspath(source), **settings))


@computes
def encode(
    texts: Sequence[str], model: str = TextConfig.model, *, cache: str | None = TextConfig.cache, offline: bool = True
) -> Float32[np.ndarray, "T D"]:
    """One vector a text by a language model, kept in `cache` (None: nowhere) and found there again.

    model, offline: as in `TextConfig`. Raises as `fused_rec.text.pretrained.open_model` and `embed` do.
    """
    return encode_texts(texts, open_model(model, offline=offline), cache=cache)


@computes
def train(config: Config, workdir: str | os.PathLike[str], dataset: Dataset | None = None) -> Run:
    """Trains, or goes on where the same call was stopped; of a finished run, opens it.

    dataset: tables in memory, in place of those that config.data names. They are kept as Parquet in the workdir, so
    that `load` and the commands find them again; config.data.k_core and config.data.min_value apply to them.

    A finished run is opened only when the tables are still its own. Those that moved are found by `config.data.path`.

    Raises ValueError where the workdir holds a run of another config, TablesChangedError (a ValueError, which says what
    changed) where it holds one of other tables, and as `fused_rec.training.trainer.run_training` does.
    """
    config = _reading(config, dataset, Path(workdir))
    run_training(config, Path(workdir))
    return load(workdir, data_path=config.data.path or None, cache=config.text.cache)


def _reading(config: Config, dataset: Dataset | None, workdir: Path) -> Config:
    """The config with an absolute path of its data, since runs keep it and are opened from elsewhere.

    A dataset is kept in the workdir first, and read with `repair`: it was checked when it was made.
    """
    if dataset is None:
        path = config.data.path
        return configure(config, data={"path": str(Path(path).expanduser().resolve())}) if path else config
    folder = (workdir / TABLES).resolve()
    if not folder.exists():
        if (workdir / RUN).exists():
            raise ValueError(
                f"{workdir} holds a run, and {folder}, where the tables of a dataset in memory are kept, is not there; "
                "put it back, or give this run a workdir of its own"
            )
        save_dataset(dataset, folder)
    kept = read_tables(folder, repair=True)
    if digest(kept) != digest(dataset):
        told = "; ".join(changes(contents(kept), contents(dataset)))
        raise TablesChangedError(f"{folder} holds other tables than these ({told}); give this run a workdir of its own")
    return configure(config, data={"name": "tables", "path": str(folder), "repair": True})


@computes
def load(
    workdir: str | os.PathLike[str],
    split: str = "test",
    *,
    data_path: str | os.PathLike[str] | None = None,
    cache: str | os.PathLike[str] | None = None,
) -> Run:
    """Opens a finished run. split: "valid" for the model that chose its step, where the run was refitted.

    data_path: where its tables lie now, if not where they were at training; others than those are refused. cache: the
    folder of text vectors, if it is another one now.

    Raises as `fused_rec.serving.recommender.load` does.
    """
    workdir = Path(workdir)
    places = {
        "data_path": None if data_path is None else Path(data_path),
        "cache": None if cache is None else Path(cache),
    }
    return Run(workdir, *recommender.load(workdir, split, **places), read_results(workdir))


def _reload(run: Run, part: str) -> Run:
    return load(run.workdir, part, data_path=run.config.data.path or None, cache=run.config.text.cache)


@computes
def evaluate(run: Run, split: str = "valid", baselines: Sequence[str] = ()) -> dict[str, dict[str, float]]:
    """Metrics of the run on a held-out part, the whole catalogue ranked, beside recommenders that need no training.

    baselines: of `fused_rec.training.evaluate.BASELINES`, each tuned on validation. Keep the test part for the end.
    Returns metric by name of the recommender, the run's own under its variant.

    Raises ValueError for an unknown part or baseline, NotApplicableError where the tables lack what one needs.
    """
    if split not in ("valid", "test"):
        raise ValueError(f"part is {split!r}; it must be valid or test")
    if split == "valid" and run.config.train.refit:
        run = _reload(run, split)
    own = run.config.model.variant
    found = evaluate_models(run.config, run.prepared, run.state, split, baselines, own)
    return {name: mean(per_user) for name, per_user in found.items()}


@computes
def recommend(
    run: Run,
    users: Any = None,
    k: int = 10,
    *,
    rules: str | os.PathLike[str] | None = None,
    include_seen: bool = False,
) -> pa.Table:
    """The k best products of each customer: user_id, rank (from 1), item_id, score, and `name` where items have one.

    users: ids, as text or integers: a list, an array, a column of a frame. None = all customers; without any id the
    table is empty. rules: a file of rules of who may get what (`docs/SUITABILITY.md`). What a
    customer holds is left out unless include_held.

    Raises ValueError naming an id that is unknown, empty or no id, for no list but one id, and as
    `fused_rec.serving.write_rankings.read_rules` does.
    """
    dataset = run.prepared.dataset
    given = read_rules(rules)[0] if rules is not None else ()
    may = candidate_filter(dataset, given, include_seen=include_seen)
    rows = user_rows(dataset, users)
    recommender.require_table(dataset, len(rows), k)
    found = recommender.rank_chunks(scorer(run.config, run.prepared, run.state), dataset, may, rows, k)
    table = pa.concat_tables([SCHEMA.empty_table(), *(part.table for part in found)])
    if "name" not in dataset.items.column_names:
        return table
    named = pc.index_in(table["item_id"], value_set=dataset.items["item_id"].combine_chunks())
    return table.append_column("name", dataset.items["name"].combine_chunks().take(named.combine_chunks()))


@computes
def export(run: Run, out: str | os.PathLike[str], *, faiss: bool = False) -> Path:
    """Writes a folder that others read without this package, as the Hugging Face Hub shows models; returns where.

    Vectors whose inner products are the scores, the program that scores, parameters, settings, and a card that tells
    how to load them (docs/INTEROP.md). out: new, or empty. faiss: a Faiss index of the products too (extra `faiss`).

    Raises as `fused_rec.serving.export_bundle.export_bundle` does.
    """
    export_bundle.export_bundle(Path(out), *_model(run), run.results, faiss=faiss)
    return Path(out)


@computes
def explain(run: Run, user: Any, items: Any = None, k: int = 5) -> list[dict[str, Any]]:
    """Why: of each item its score, the parts that sum to it, and reasons in words, the weightiest first.

    items: ids, as text or integers; None = the k that are recommended. docs/EXPLANATIONS.md says what the parts are.
    Raises ValueError naming an id that is unknown, empty or no id.
    """
    dataset = run.prepared.dataset
    row = int(user_rows(dataset, [user])[0])
    wanted = recommend(run, [user], k)["item_id"].to_pylist() if items is None else as_texts(items, "items")
    if not wanted:
        return []
    decomposition = decompose(run.config, run.state.params, run.prepared.graph_inputs)
    return record(decomposition, dataset, row, [_item_row(dataset, item) for item in wanted])


@computes
def counterfactual(run: Run, user: Any, item: Any, without: Any) -> CounterfactualEffect:
    """What becomes of an item's score and rank for a customer who did not hold another one, computed anew.

    Ranks are among what the customer does not hold. Raises ValueError naming an unknown id or a holding that the model
    has not seen.
    """
    dataset = run.prepared.dataset
    row, holding = int(user_rows(dataset, [user])[0]), _item_row(dataset, without)
    open_to = suitable(candidate_filter(dataset), np.array([row]), np.arange(dataset.n_items)[None])[0]
    of = _item_row(dataset, item)
    open_to[of] = True
    return counterfactual_effect(run.config, run.state.params, run.prepared, row, of, holding, open_to)


def _item_row(dataset: Dataset, item: Any) -> int:
    [item] = as_texts([item], "items")
    row = pc.index(dataset.items["item_id"], item).as_py()
    if row < 0:
        raise ValueError(f"unknown product id {item!r}; {dataset.name} has {dataset.n_items} products")
    return row


@computes
def compare(
    config: Config,
    out: str | os.PathLike[str],
    variants: Sequence[str] = (*VARIANTS, *BASELINES),
    seeds: Sequence[int] = (0, 1, 2, 3, 4),
    *,
    dataset: Dataset | None = None,
    trials: int = 0,
) -> dict[str, Any]:
    """Variants, controls and baselines over seeds: what `compare.json` holds; tables and figures come to lie in `out`.

    Resumes; more variants or seeds add to what is there. dataset: as for `train`. trials: of tuning each learned
    variant on validation. Raises as `fused_rec.studies.compare.study` does.
    """
    out = Path(out)
    return compare_variants(_reading(config, dataset, out), list(variants), list(seeds), out, trials=trials)


@computes
def tune(config: Config, out: str | os.PathLike[str], trials: int, dataset: Dataset | None = None) -> Config:
    """The best config of so many trials, chosen on validation; needs the extra `sweeps`.

    Any number of processes may work on the same folder. dataset: as for `train`. Raises as
    `fused_rec.studies.tune.tune` does.
    """
    from fused_rec.studies.tune import tune as search  # needs Optuna

    return search(_reading(config, dataset, Path(out)), Path(out), trials)


@computes
def report(
    workdir: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    split: str = "valid",
    baselines: Sequence[str] = ("popularity", "item_knn"),
    users: Any = None,
    num_users: int = 5,
    k: int = 5,
    rules: str | os.PathLike[str] | None = None,
    groups: Sequence[str] = (),
    data_path: str | os.PathLike[str] | None = None,
    cache: str | os.PathLike[str] | None = None,
) -> Path:
    """Writes one HTML page about a finished run and returns where: how well it ranks, for whom, and why.

    out: report.html in the workdir unless given. split: the held-out part that is ranked anew, beside `baselines`.
    users: ids of the customers who are shown, as text or integers, with `k` products each; None = so many
    `sample_in_edges` at random. rules: a file of rules (docs/SUITABILITY.md). groups: attributes of customers whose
    groups are compared.
    data_path, cache: as for `load`.

    Raises ValueError for unknown ids, baselines and attributes, and as `load` does.
    """
    workdir = Path(workdir)
    out = workdir / "report.html" if out is None else Path(out)
    given, rules_digest = read_rules(rules) if rules is not None else ((), None)
    run = load(workdir, split, data_path=data_path, cache=cache)
    check_groups(run.prepared.dataset.users, groups)
    own = run.config.model.variant
    measured = evaluate_models(run.config, run.prepared, run.state, split, baselines, own)
    found = None
    if rules is not None:
        found = evaluate_rules(run.prepared, scorer(*_model(run)), split, given, groups=groups)
    slices = sliced(run.prepared, measured[own], groups)
    if run.config.train.refit and split == "valid":  # what is recommended comes from the model that saw more
        run = _reload(run, "test")
    dataset = run.prepared.dataset
    rows = sample(run.prepared, num_users) if users is None else user_rows(dataset, users)
    digests = {"tables": read_run(workdir)["tables"], "model": model_digest(workdir)}
    facts = ReportData(
        run.results,
        counts=counts(dataset, run.prepared.split),
        digests=digests | ({"rules": rules_digest} if rules_digest else {}),
        split=split,
        models=compared(measured, own),
        curve=tuple(read_curves(workdir / "select")),
        slices=slices,
        rules=found,
        customers=recommended(*_model(run), candidate_filter(dataset, given), rows, k, passages(*_model(run))),
        selection="drawn at random" if users is None else "as named",
    )
    write_file(out, render_page(facts).encode())
    return out


def _model(run: Run) -> tuple[Config, Prepared, TrainState]:
    return run.config, run.prepared, run.state
