"""Public Python interface: thin functions over those of the commands; `import fused_rec as fr` offers these names.

Users are the customers of a bank, items its products. U users, I items, T texts, D dimensions.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32

from fused_rec.baselines.registry import BASELINES
from fused_rec.config import Config, DataConfig, TextConfig, to_dict
from fused_rec.data.dataset import Dataset, changes, contents, digest
from fused_rec.data.io.tables import read_tables
from fused_rec.data.io.writers import save_dataset
from fused_rec.data.sources import registry
from fused_rec.distributed.devices import computes
from fused_rec.evaluation.filters import Rule
from fused_rec.evaluation.suitability import check_groups
from fused_rec.explanation.catalogs import SOURCE, Catalog, open_catalog
from fused_rec.reporting.changes import in_words, render_changes
from fused_rec.reporting.data import (
    Explain,
    ReportData,
    compared,
    passages,
    recommended,
    sample,
    sliced,
)
from fused_rec.reporting.diff import ComparedRun, explained, stability
from fused_rec.reporting.diff import diff as compare_runs
from fused_rec.reporting.page import render_page
from fused_rec.reporting.review import measured
from fused_rec.run import Run
from fused_rec.runs.loggers import read_curves
from fused_rec.runs.run_dir import RUN, TABLES, TablesChangedError, read_results, read_run, record_review, write_json
from fused_rec.serving import recommender
from fused_rec.serving.recommender import candidate_filter, model_digest, user_rows
from fused_rec.serving.write_rankings import Rules, read_rules
from fused_rec.storage import check_new, fill_folder, write_file
from fused_rec.studies.compare import compare_variants
from fused_rec.studies.variants import VARIANTS, configured
from fused_rec.text.encode import encode_texts
from fused_rec.text.pretrained import open_model
from fused_rec.training.evaluate import evaluate_with_baselines, scorer
from fused_rec.training.evaluate_rules import evaluate_rules
from fused_rec.training.inputs import Prepared
from fused_rec.training.train_step import TrainState
from fused_rec.training.trainer import run_training, update_card


def configure(base: Config | None = None, /, **sections: Any) -> Config:
    """Returns a config with some settings changed.

    Args:
      base: the config to start from; None = all defaults.
      **sections: dictionaries of settings, by section of `Config`. A `model.method` among them, such as "lightgcn" or
        "ease", applies the settings of that published method; the others given are applied after them.

    Returns:
      A new, validated config.

    Raises:
      ValueError: an unknown section or setting, a setting outside of its section, or a value out of bounds.

    Example:
      config = fr.configure(data={"name": "synthetic"}, model={"dim": 32}, train={"max_steps": 200})
    """
    values = to_dict(base or Config())
    for name, given in sections.items():
        owners = [section for section, settings in values.items() if name in settings and name not in values]
        if isinstance(given, Mapping) and not owners:
            continue  # `from_dict` refuses an unknown section
        if owners:
            right = " or ".join(f'{section}={{"{name}": {given!r:.60}}}' for section in owners)
            raise ValueError(f"{name} is no section of the config but a setting; write {right}")
        raise ValueError(
            f'{name} is {given!r:.60}; give a dictionary of settings by section, such as model={{"dim": 32}}; the '
            f"sections are {', '.join(values)}"
        )
    return configured(base or Config(), sections)


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
    """Loads a named dataset or a folder of your own tables.

    Args:
      source: a key of `fused_rec.data.sources.registry.READERS`, or a folder.
      path: folder of a named dataset; empty = its default folder under $FUSED_REC_DATA.
      repair: repair faulty rows, and log how many, instead of refusing the tables.
      k_core: keep users and items with at least this many interactions, applied until stable.
      min_value: drop interactions whose `value` is lower; None = keep all.
      delimiter: of your own tables as text; empty = detect it from the header.
      encoding: of your own tables as text, where it is neither UTF-8 nor declared by the file.

    Returns:
      The checked tables.

    Raises:
      ValueError: `source` is neither a known name nor a folder, or a setting is out of bounds.
      FileNotFoundError: the files do not exist.
      DataError: the tables are invalid; lists every problem.

    Example:
      dataset = fr.load_dataset("synthetic")
      dataset = fr.load_dataset("path/to/tables", repair=True, k_core=2)
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
    """Encodes texts with a language model.

    Args:
      texts: T texts.
      model: name of an installed model, folder of a Hugging Face model, or ORG/NAME@COMMIT.
      cache: folder of cached text embeddings; None = no cache.
      offline: use local files only; False downloads a missing model.

    Returns:
      Float32 [T, D]: the embedding of each text, in their order.

    Raises:
      ValueError: the model cannot be used.
      OSError: the model's files cannot be read, or the cache cannot be used.

    Example:
      vectors = fr.encode(["Global equity fund", "Covered bond"])
    """
    return encode_texts(texts, open_model(model, offline=offline), cache=cache)


@computes
def train(
    config: Config,
    workdir: str | os.PathLike[str],
    dataset: Dataset | None = None,
    *,
    init_from: str | os.PathLike[str] | None = None,
) -> Run:
    """Trains a model, resumes an interrupted training, or opens the run if it is finished.

    Args:
      config: settings of the run.
      workdir: folder of the run; made if needed.
      dataset: tables in memory instead of those that `config.data` names. They are saved as Parquet in the workdir, so
        that `load` and the commands find them; `config.data.k_core` and `config.data.min_value` apply to them.
      init_from: folder of a finished run on earlier tables, whose parameters the training starts from
        (`docs/DAILY.md`); it must have learned from none of the rows that are held out now.

    Returns:
      The finished run, which ranks with all rows of the tables (`load`); if they have moved, set `config.data.path`.

    Raises:
      ValueError: the workdir holds a run of another config or with another start, or `init_from` does not fit.
      TablesChangedError: the workdir holds a run of other tables; names the changes. It is a ValueError.
      NonFiniteLossError: the loss or the parameters are not finite.

    Example:
      run = fr.train(fr.configure(data={"name": "synthetic"}), "runs/first")
    """
    config = _reading(config, dataset, Path(workdir))
    run_training(config, Path(workdir), None if init_from is None else Path(init_from))
    return load(workdir, data_path=config.data.path or None, cache=config.text.cache)


def _reading(config: Config, dataset: Dataset | None, workdir: Path) -> Config:
    """Returns the config with an absolute data path, and saves a dataset in memory to the workdir first."""
    if dataset is None:
        path = config.data.path
        return configure(config, data={"path": str(Path(path).expanduser().resolve())}) if path else config
    folder = (workdir / TABLES).resolve()
    if not folder.exists():
        if (workdir / RUN).exists():
            raise ValueError(
                f"{workdir} holds a run, but {folder}, the folder of its tables, is missing; restore it, or use "
                "another workdir"
            )
        save_dataset(dataset, folder)
    saved = read_tables(folder, repair=True)  # the dataset was checked when it was made
    if digest(saved) != digest(dataset):
        differences = "; ".join(changes(contents(saved), contents(dataset)))
        raise TablesChangedError(f"{folder} holds other tables than these ({differences}); use another workdir")
    return configure(config, data={"name": "tables", "path": str(folder), "repair": True})


@computes
def load(
    workdir: str | os.PathLike[str],
    *,
    history: str = "all",
    dataset: Dataset | None = None,
    data_path: str | os.PathLike[str] | None = None,
    cache: str | os.PathLike[str] | None = None,
) -> Run:
    """Opens a finished run.

    Args:
      workdir: folder of the run.
      history: the interactions, reviews and ties by which the run ranks and explains: "all" that the tables have, or
        those of the splits that the model was trained on ("train"). `evaluate` withholds held-out rows with either.
      dataset: tables to serve in place of those of the training, such as newer ones. Users and items are matched by id;
        new users are known by their interactions, text and ties, new items by text and attributes.
      data_path: current folder of the tables of the training, if they have moved.
      cache: current folder of cached text embeddings, if it has changed.

    Returns:
      The run.

    Raises:
      FileNotFoundError: the workdir holds no finished run.
      TablesChangedError: the tables differ from those of the training; pass them as `dataset`.
      CheckpointError: the selected checkpoint is damaged.
      ValueError: `history` is neither, or "train" with another `dataset`.

    Example:
      run = fr.load("runs/first")
      today = fr.load("runs/first", dataset=fr.load_dataset("path/to/newer/tables"))
    """
    workdir = Path(workdir)
    found = recommender.load(workdir, history, dataset=dataset, **_folders(data_path, cache))
    return Run(workdir, *found, read_results(workdir))


def _folders(data_path: str | os.PathLike[str] | None, cache: str | os.PathLike[str] | None) -> dict[str, Any]:
    places = {"data_path": data_path, "cache": cache}
    return {name: None if place is None else Path(place) for name, place in places.items()}


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
    """Compares variants, controls and baselines over several seeds.

    The same call resumes an interrupted comparison; more variants or seeds reuse the finished runs.

    Args:
      config: settings that all variants share.
      out: folder of the runs, tables and figures.
      variants: names in `VARIANTS` and `BASELINES`.
      seeds: training seeds of each variant.
      dataset: tables in memory, as for `train`.
      trials: trials of hyperparameter tuning per trained variant, on the validation split; 0 = none.

    Returns:
      The content of `compare.json`: means with confidence intervals, paired differences, failures and all runs.

    Raises:
      ValueError: an unknown variant, no applicable one, no seed, or `out` holds runs of another config.
      TablesChangedError: `out` holds runs of other tables.
      BusyError: another process uses `out`.

    Example:
      found = fr.compare(config, "runs/compare", ["fused", "graph", "ease"], seeds=range(3))
    """
    out = Path(out)
    return compare_variants(_reading(config, dataset, out), list(variants), list(seeds), out, trials=trials)


@computes
def tune(config: Config, out: str | os.PathLike[str], trials: int, dataset: Dataset | None = None) -> Config:
    """Tunes hyperparameters on the validation split; needs the extra `sweeps`.

    Several processes may work on the same folder. The test split is never read.

    Args:
      config: settings to start from; its model variant decides which are tuned.
      out: folder of the trials and of the best config.
      trials: finished trials, over all processes.
      dataset: tables in memory, as for `train`.

    Returns:
      The config of the best trial.

    Raises:
      ImportError: Optuna is not installed.
      ValueError: no trial was completed, or `out` holds trials of another config.

    Example:
      best = fr.tune(config, "runs/tuned", trials=30)
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
    rules: Rules | None = None,
    groups: Sequence[str] = (),
    names: bool = False,
    previous: str | os.PathLike[str] | None = None,
    compared_runs: Sequence[str | os.PathLike[str]] = (),
    card: bool = False,
    language: str | os.PathLike[str] = SOURCE,
    history: str = "all",
    dataset: Dataset | None = None,
    data_path: str | os.PathLike[str] | None = None,
    cache: str | os.PathLike[str] | None = None,
) -> Path:
    """Writes an HTML report of a finished run: metrics, group differences, recommendations and their explanations.

    Args:
      workdir: folder of the run.
      out: file to write; None = report.html in the workdir.
      split: held-out split to evaluate, "valid" or "test".
      baselines: names in `fused_rec.baselines.registry.BASELINES` to compare with.
      users: ids of the users to show, as text or integers; None = a random sample.
      num_users: size of the random sample.
      k: recommended items per user.
      rules: suitability rules, as of `Run.recommend`.
      groups: user attributes whose groups are compared.
      names: show the names of users, and not their ids alone.
      previous: folder of the run before, from which changes are shown.
      compared_runs: folders of other runs, in which reasons survive or not.
      card: also write what was found about rules, groups, stability and changes into the model card.
      language: of the reasons, as of `Run.explain`.
      history: as of `load`, for the recommendations; metrics withhold held-out rows.
      dataset: as of `load`, for the recommendations.
      data_path: as of `load`.
      cache: as of `load`.

    Returns:
      The file.

    Raises:
      ValueError: an unknown id, baseline, attribute or language.
      FileNotFoundError, TablesChangedError: as `load`.

    Example:
      fr.report("runs/first", num_users=3, k=5)
    """
    shown = _Shown(users, num_users, k, names, previous, tuple(compared_runs), open_catalog(language))
    measure, served = _Measure(split, tuple(baselines), rules, tuple(groups)), {"history": history, "dataset": dataset}
    facts = _report_data(Path(workdir), measure, shown, served, _folders(data_path, cache))
    out = Path(workdir) / "report.html" if out is None else Path(out)
    _write_review(facts, out, Path(workdir) if card else None)
    return out


def _write_review(facts: ReportData, page: Path, workdir: Path | None) -> None:
    """Writes the page, and what was found into the model card of `workdir`, if it is given."""
    write_file(page, render_page(facts).encode())
    if workdir is not None:
        update_card(workdir, record_review(workdir, measured(facts)))


class _Measure(NamedTuple):
    """What `report` measures, as its arguments."""

    split: str
    baselines: Sequence[str]
    rules: Rules | None
    groups: Sequence[str]


class _Shown(NamedTuple):
    """What `report` shows, as its arguments."""

    users: Any
    num_users: int
    k: int
    names: bool
    previous: str | os.PathLike[str] | None
    compared_runs: Sequence[str | os.PathLike[str]]
    catalog: Catalog


def _report_data(
    workdir: Path, measure: _Measure, shown: _Shown, served: dict[str, Any], folders: dict[str, Any]
) -> ReportData:
    given, rules_digest = read_rules(measure.rules) if measure.rules is not None else (None, None)
    measured_model = recommender.load_measured(workdir, measure.split, **folders)
    evaluation = _evaluation(measured_model, measure.split, measure.baselines, given, measure.groups)
    run, cache = load(workdir, **served, **folders), folders["cache"]
    others = [_compared(load(other, **served, cache=cache)) for other in shown.compared_runs]
    explained_others = [explained(other) for other in others if other.config.model.is_trained]
    dataset = run.prepared.dataset
    rows = sample(run.prepared, shown.num_users) if shown.users is None else user_rows(dataset, shown.users)
    explain = Explain(shown.k, passages(*run.model), explained_others, shown.names, shown.catalog)
    changed = None
    if shown.previous is not None:
        changed = compare_runs(_compared(load(shown.previous, cache=cache)), _compared(run))
    return ReportData(
        digests=_digests(workdir, served["dataset"]) | ({"rules": rules_digest} if rules_digest else {}),
        customers=recommended(run.model, candidate_filter(dataset, given or ()), rows, explain),
        selection="drawn at random" if shown.users is None else "as named",
        changed=changed,
        stability=tuple(compare_runs(_compared(run), other) for other in others),
        **_facts(run),
        **evaluation,
    )


@computes
def diff(
    before: Run | str | os.PathLike[str],
    after: Any,
    out: str | os.PathLike[str] | None = None,
    *,
    k: int = 10,
    num_users: int = 200,
) -> dict[str, Any]:
    """Compares runs: data, settings, test metrics, top lists and reasons (`docs/EXPLANATIONS.md`).

    Args:
      before: a run, or the folder of a finished one.
      after: the run that is compared with it, or several: runs, such as that of `Run.update`, or folders.
      out: new folder for `diff.json`, `diff.md` and `diff.html`; None = write nothing.
      k: items per list.
      num_users: users drawn at random whose reasons and scores are compared.

    Returns:
      `differences`, of each run of `after` the differences from `before` (`fused_rec.reporting.diff.diff`), and
      `stability`, means over them: how much of lists, scores and reasons stays.

    Raises:
      ValueError: two runs have no user or no item in common, or `after` is empty.
      FileExistsError: `out` is there and not empty.
      FileNotFoundError: a folder holds no finished run.

    Example:
      changed = fr.diff(run, run.update({"user_id": ["C0001"], "item_id": ["P007"]}), num_users=3)
      changed["differences"][0]["lists"]["overlap"]["mean"]
    """
    if out is not None:
        check_new(Path(out))
    first = _compared(before)
    others = [after] if isinstance(after, Run | str | os.PathLike) else after
    differences = [compare_runs(first, _compared(other), k=k, num_users=num_users) for other in others]
    if not differences:
        raise ValueError("after is empty; give a run, a folder or a list of them")
    found = {"differences": differences, "stability": stability(differences)}

    def write(folder: Path) -> None:
        write_json(folder / "diff.json", found)
        write_file(folder / "diff.md", in_words(differences).encode())
        write_file(folder / "diff.html", render_changes(differences, first.results).encode())

    if out is not None:
        fill_folder(Path(out), write)
    return found


def _compared(given: Run | str | os.PathLike[str]) -> ComparedRun:
    run = given if isinstance(given, Run) else load(given)
    return ComparedRun(run.workdir, *run.model, run.results)


def _digests(workdir: Path, served: Dataset | None) -> dict[str, str]:
    found = {"tables": read_run(workdir)["tables"], "model": model_digest(workdir)}
    return found if served is None else found | {"served tables": digest(served)}


def _facts(run: Run) -> dict[str, Any]:
    """Returns the fields of `ReportData` about training and serving."""
    return {
        "results": run.results,
        "counts": run.results["counts"],
        "curve": tuple(read_curves(run.workdir / run.results.get("phase", ""))),
        "served": run.prepared.served(),
    }


def _evaluation(
    measured: tuple[Config, Prepared, TrainState],
    split: str,
    baselines: Sequence[str],
    rules: Sequence[Rule] | None,
    groups: Sequence[str],
) -> dict[str, Any]:
    """Returns the fields of `ReportData` about the evaluation."""
    config, prepared, _ = measured
    check_groups(prepared.dataset.users, groups)
    per_user, own = evaluate_with_baselines(*measured, split, baselines), config.model.name
    of_rules = None
    if rules is not None:
        of_rules = evaluate_rules(prepared, scorer(*measured), split, rules, groups=groups)
    slices = sliced(prepared, per_user[own], groups)
    return {"split": split, "models": compared(per_user, own), "slices": slices, "rules": of_rules}
