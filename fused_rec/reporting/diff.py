"""What changed between two runs: data, settings, metrics, lists of recommendations, reasons.

Stability is the same over several runs: how much of what one run says stays in another one.
"""

import dataclasses
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import pyarrow as pa
from jaxtyping import Float64, Int32, Int64
from tqdm import tqdm

from fused_rec.config import Config, differing, from_dict
from fused_rec.data.dataset import Dataset, digest
from fused_rec.data.io.arrow import pc
from fused_rec.evaluation.list_changes import (
    exposure,
    first_unchanged,
    jaccard,
    overlap,
    rank_biased_overlap,
    rank_correlation,
)
from fused_rec.evaluation.ranking import users_per_batch
from fused_rec.evaluation.significance import mean_intervals, paired_bootstrap
from fused_rec.explanation.explained_model import ExplainedModel, explained_model
from fused_rec.explanation.reasons import names
from fused_rec.explanation.stability import ReasonAgreement, agreement, explained_items, survives
from fused_rec.rng import numbered_rng
from fused_rec.runs.run_dir import TEST_METRICS_PER_USER, read_run, read_users
from fused_rec.serving.recommender import candidate_filter, held_items, model_digest, rank_chunks, training_tables
from fused_rec.training.evaluate import scorer
from fused_rec.training.inputs import ModelInputs
from fused_rec.training.train_step import TrainState

LOG = logging.getLogger(__name__)
METRICS = ("ndcg@10", "recall@10", "mrr@10", "auc")
MOST_LISTS = 20_000  # users whose lists are compared; of more, so many are drawn at random
SHOWN = 5  # items that gained and lost most exposure
DRAWS = 2000  # resamples of an interval


class ComparedRun(NamedTuple):
    """A run with the tables that it ranks with."""

    workdir: Path
    config: Config
    inputs: ModelInputs
    state: TrainState
    results: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class _Pairing:
    """Users and items of two runs, matched by id.

    Attributes:
      users: rows of the common users in both runs, [V, 2].
      items: rows of the common items in both runs, [C, 2].
      numbers: of each item of the second run, its number: the row in the first run, or one of its own.
    """

    users: Int64[np.ndarray, "V 2"]
    items: Int64[np.ndarray, "C 2"]
    numbers: Int64[np.ndarray, "J"]


def diff(before: ComparedRun, after: ComparedRun, *, k: int = 10, num_users: int = 200) -> dict[str, Any]:
    """Compares two runs, or a run with other tables or new interactions.

    Args:
      before: the first run.
      after: the second one.
      k: items per list.
      num_users: users drawn at random whose reasons and scores are compared.

    Returns:
      `before` and `after` (name, date, what they rank with), `change` (in short), `data` (numbers of users, items and
      interactions that are common, new and gone), `settings` that differ, with both values, `metrics` (means and paired
      difference over the common users), `lists` and `reasons` (means with 95 % intervals over users; None for a
      baseline).

    Raises:
      ValueError: no user or no item is in both.
    """
    pairing = _paired(before.inputs.dataset, after.inputs.dataset)
    rng = numbered_rng(0, 0)
    rows = np.sort(rng.permutation(len(pairing.users))[:MOST_LISTS])
    lists, found = _lists(before, after, pairing, rows, k)
    chosen = np.sort(rng.permutation(len(rows))[:num_users])
    explained = pairing.users[rows[chosen]]
    found["score_correlation"] = _mean(_score_correlation(before, after, pairing, explained))
    data, settings = _data(before, after, pairing), _settings(before, after)
    return {
        "before": _described(before),
        "after": _described(after),
        "change": _change(data, settings),
        "data": data,
        "settings": {name: list(values) for name, values in settings.items()},
        "metrics": _metrics(before, after),
        "lists": found,
        "reasons": _reasons(before, after, pairing, explained, lists[0][chosen]),
    }


def stability(differences: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Averages the stability of lists, scores and reasons over several results of `diff`."""
    parts = [
        {f"{part}.{name}": value["mean"] for part in ("lists", "reasons") for name, value in _means(found[part])}
        for found in differences
    ]
    return {name: float(np.mean([part[name] for part in parts])) for name in parts[0] if all(name in p for p in parts)}


def _means(part: Mapping[str, Any] | None) -> list[tuple[str, Mapping[str, float]]]:
    return [
        (name, value)
        for name, value in (part or {}).items()
        if isinstance(value, Mapping) and value.get("mean") is not None
    ]


def _paired(before: Dataset, after: Dataset) -> _Pairing:
    users, _ = _matched(before.users["user_id"], after.users["user_id"])
    items, numbers = _matched(before.items["item_id"], after.items["item_id"])
    for what, found, ids in (("user", users, "users"), ("item", items, "items")):
        tables = [getattr(dataset, ids) for dataset in (before, after)]
        if not len(found):
            firsts = [table[f"{what}_id"][0].as_py() if table.num_rows else "none" for table in tables]
            raise ValueError(
                f"0 of {tables[0].num_rows:,} and {tables[1].num_rows:,} {ids} are in both runs (the first ids are "
                f"{firsts[0]!r} and {firsts[1]!r}); compare runs on tables with the same ids"
            )
        if 2 * len(found) < min(table.num_rows for table in tables):
            LOG.warning("only %d of %d and %d %s are in both runs", len(found), *(t.num_rows for t in tables), ids)
    return _Pairing(users, items, numbers)


def _matched(
    before: pa.ChunkedArray, after: pa.ChunkedArray
) -> tuple[Int64[np.ndarray, "n 2"], Int64[np.ndarray, "J"]]:
    place = pc.fill_null(pc.index_in(after, value_set=before.combine_chunks()), -1).to_numpy().astype(np.int64)
    common = np.flatnonzero(place >= 0)
    order = np.argsort(place[common])
    numbers = np.where(place >= 0, place, len(before) + np.cumsum(place < 0) - 1)
    return np.stack([place[common], common], axis=1)[order], numbers


def _described(run: ComparedRun) -> dict[str, Any]:
    results, stated = run.results, read_run(run.workdir)
    served = digest(run.inputs.dataset)
    return {
        "workdir": str(run.workdir),
        "dataset": results["dataset"],
        "variant": results["variant"],
        "seed": results["seed"],
        "finished": results["finished"],
        "model": model_digest(run.workdir),
        "tables": served,
        "other_tables": served != stated["tables"],
        "served": run.inputs.served(),
        "trained_period": results["data"]["trained_period"],
        "repairs": dict(results["data"]["repairs"]),
    }


def _data(before: ComparedRun, after: ComparedRun, pairing: _Pairing) -> dict[str, Any]:
    """Counts what is in both runs, new and gone."""
    old, new = before.inputs, after.inputs
    to_before = np.full(new.dataset.n_users, -1, np.int64)
    to_before[pairing.users[:, 1]] = pairing.users[:, 0]
    unknown = to_before < 0
    to_before[unknown] = old.dataset.n_users + np.arange(unknown.sum())
    width = 1 + max(int(pairing.numbers.max(initial=0)), old.dataset.n_items)
    pairs = old.observed.user.astype(np.int64) * width + old.observed.item
    later = to_before[new.observed.user] * width + pairing.numbers[new.observed.item]
    common = len(np.intersect1d(pairs, later))
    sizes = {
        "customers": (old.dataset.n_users, new.dataset.n_users, len(pairing.users)),
        "products": (old.dataset.n_items, new.dataset.n_items, len(pairing.items)),
        "interactions": (len(pairs), len(later), common),
    }
    return {
        name: {"before": first, "after": second, "common": both, "new": second - both, "gone": first - both}
        for name, (first, second, both) in sizes.items()
    }


def _change(data: Mapping[str, Any], settings: Mapping[str, tuple[Any, Any]]) -> str:
    """Says in short what differs: settings, then interactions."""
    parts = [f"{name} {value!r}" for name, (_, value) in settings.items()]
    of = data["interactions"]
    if of["new"] or of["gone"]:
        parts.append(f"{of['new']:,} new and {of['gone']:,} gone interactions")
    return ", ".join(parts) or "same settings and interactions"


def _settings(before: ComparedRun, after: ComparedRun) -> dict[str, tuple[Any, Any]]:
    """Returns the settings of the trainings that differ, except those of local folders."""
    found = differing(from_dict(after.results["config"]), before.results["config"])
    return {name: values for name, values in found.items() if name not in ("data.path", "text.cache")}


def _metrics(before: ComparedRun, after: ComparedRun) -> dict[str, Any] | None:
    """Compares the test metrics of the users with held-out items in both; None for two times the same run."""
    if before.workdir.resolve() == after.workdir.resolve():
        return None
    per_user, ids = [], []
    for run in (before, after):
        per_user.append(read_users(run.workdir / TEST_METRICS_PER_USER))
        tables = run.inputs.dataset
        if digest(tables) != read_run(run.workdir)["tables"]:
            tables = training_tables(run.config, run.workdir)
        ids.append(tables.users["user_id"].combine_chunks().take(pa.array(per_user[-1].users)))
    common, _ = _matched(pa.chunked_array([ids[0]]), pa.chunked_array([ids[1]]))
    same = all(before.results[name] == after.results[name] for name in ("dataset", "split")) and (
        before.results["data"]["sha256"] == after.results["data"]["sha256"]
        and before.results["config"]["split"] == after.results["config"]["split"]
    )
    found: dict[str, Any] = {"users": len(common), "same_held_out": same, "metrics": {}}
    for metric in METRICS if len(common) else ():
        old, new = (run.metrics[metric][common[:, side]][None] for side, run in enumerate(per_user))
        known = ~(np.isnan(old) | np.isnan(new))[0]
        if not known.any():
            continue
        gain = paired_bootstrap(new[:, known], old[:, known], draws=DRAWS)
        found["metrics"][metric] = {
            "before": float(old[0, known].mean()),
            "after": float(new[0, known].mean()),
            **dataclasses.asdict(gain),
        }
    return found


def _lists(
    before: ComparedRun, after: ComparedRun, pairing: _Pairing, rows: Int64[np.ndarray, "V"], k: int
) -> tuple[tuple[Int32[np.ndarray, "V k"], np.ndarray], dict[str, Any]]:
    """Compares the lists of common users; returns both lists, items numbered alike, and what was found."""
    old = _ranked(before, pairing.users[rows, 0], k)
    new = _ranked(after, pairing.users[rows, 1], k)
    width = min(old.shape[1], new.shape[1])
    new = np.where(new >= 0, pairing.numbers[new], -1)
    one, other = old[:, :width].astype(np.int64), new[:, :width]
    n_items = 1 + max(int(pairing.numbers.max(initial=0)), before.inputs.dataset.n_items)
    by_user = {
        "overlap": overlap(one, other),
        "jaccard": jaccard(one, other),
        "rank_biased_overlap": rank_biased_overlap(one, other),
        "first_unchanged": first_unchanged(one, other),
        "unchanged": np.where((one >= 0).any(1), (one == other).all(1), np.nan),
    }
    found: dict[str, Any] = {"k": width, "users": len(rows)} | {name: _mean(v) for name, v in by_user.items()}
    found["taken"] = _taken(after.inputs.dataset, pairing, rows, one, other)
    found |= _exposed(
        before.inputs.dataset, after.inputs.dataset, pairing, exposure(one, n_items), exposure(other, n_items)
    )
    return (old, new), found


def _ranked(run: ComparedRun, users: Int64[np.ndarray, "V"], k: int) -> Int32[np.ndarray, "V k"]:
    dataset = run.inputs.dataset
    model = scorer(run.config, run.inputs, run.state)
    parts = rank_chunks(model, dataset, candidate_filter(dataset), users, k, progress=False)
    return np.concatenate([part.ranking.items for part in parts])


def _taken(after: Dataset, pairing: _Pairing, rows: np.ndarray, one: np.ndarray, other: np.ndarray) -> dict[str, int]:
    """Counts the items that left the lists, and those of them that the user now has, which are not recommended."""
    left = (one >= 0) & ~(one[:, :, None] == other[:, None, :]).any(2)
    place, rank = np.nonzero(left)
    held, row_after = held_items(after), np.full(1 + one.max(initial=0), -1, np.int64)
    in_both = pairing.items[pairing.items[:, 0] < len(row_after)]
    row_after[in_both[:, 0]] = in_both[:, 1]
    users, items = pairing.users[rows[place], 1], row_after[one[place, rank]]
    keys = held.users.astype(np.int64) * after.n_items + held.items
    has = np.isin(users * after.n_items + items, keys) & (items >= 0)
    return {"left": int(left.sum()), "now_held": int(has.sum())}


def _exposed(
    before: Dataset,
    after: Dataset,
    pairing: _Pairing,
    old: Float64[np.ndarray, "I"],
    new: Float64[np.ndarray, "I"],
) -> dict[str, list[dict[str, Any]]]:
    """Lists the items that gained and lost most exposure."""
    order = np.argsort(old - new, kind="stable")
    gained = [place for place in order[:SHOWN].tolist() if new[place] > old[place]]
    lost = [place for place in order[::-1][:SHOWN].tolist() if new[place] < old[place]]

    def described(number: int) -> dict[str, Any]:
        row, items = number, before.items
        if number >= before.n_items:
            row, items = int(np.flatnonzero(pairing.numbers == number)[0]), after.items
        one = items.slice(row, 1)
        shares = {"before": float(old[number]), "after": float(new[number])}
        return {"item_id": one["item_id"][0].as_py(), "name": names(one, "item_id")[0]} | shares

    return {"gained": [described(number) for number in gained], "lost": [described(number) for number in lost]}


def _score_correlation(
    before: ComparedRun, after: ComparedRun, pairing: _Pairing, users: Int64[np.ndarray, "V 2"]
) -> Float64[np.ndarray, "V"]:
    """Correlates the ranks of all common items of each user."""
    models = [scorer(run.config, run.inputs, run.state) for run in (before, after)]
    step = users_per_batch(max(run.inputs.dataset.n_items for run in (before, after)))
    found = []
    for first in range(0, len(users), step):
        batch = jnp.asarray(users[first : first + step], jnp.int32)
        values = [np.asarray(model(batch[:, side]))[:, pairing.items[:, side]] for side, model in enumerate(models)]
        found.append(rank_correlation(*values))
    return np.concatenate(found)


def _reasons(
    before: ComparedRun,
    after: ComparedRun,
    pairing: _Pairing,
    users: Int64[np.ndarray, "V 2"],
    lists: Int32[np.ndarray, "V k"],
) -> dict[str, Any] | None:
    """Compares the reasons for the first run's recommendations, as both runs explain them."""
    if not (before.config.model.is_trained and after.config.model.is_trained):
        return None
    models = [explained(run) for run in (before, after)]
    row_after = np.full(before.inputs.dataset.n_items, -1, np.int64)
    row_after[pairing.items[:, 0]] = pairing.items[:, 1]
    by_user, pairs, codes = [], 0, Counter()
    for (user, later), listed in zip(tqdm(users.tolist(), desc="reasons", unit="customer"), lists, strict=True):
        items = [item for item in listed.tolist() if item >= 0 and row_after[item] >= 0]
        if not items:
            continue
        old, new = explained_items(models[0], user, items), explained_items(models[1], later, row_after[items].tolist())
        rows = np.array([agreement(one, other) for one, other in zip(old, new, strict=True)])
        for one, other in zip(old, new, strict=True):
            codes.update((code, survives(code, one, other)) for code in one.codes)
        known = ~np.isnan(rows)
        by_user.append(np.where(known.any(0), np.where(known, rows, 0).sum(0) / np.maximum(known.sum(0), 1), np.nan))
        pairs += len(items)
    columns = np.array(by_user).T if by_user else np.full((len(ReasonAgreement._fields), 1), np.nan)
    found = {name: _mean(values) for name, values in zip(ReasonAgreement._fields, columns, strict=True)}
    by_code = {}
    for code in sorted({code for code, _ in codes}):
        given = codes[code, True] + codes[code, False]
        by_code[code] = {"survives": codes[code, True] / given, "given": given}
    return {"users": len(by_user), "pairs": pairs, "codes": by_code} | found


def explained(run: ComparedRun) -> ExplainedModel:
    """Prepares the explanations of a run."""
    return explained_model(run.config, run.state.params, run.inputs)


def _mean(values: Float64[np.ndarray, "V"]) -> dict[str, Any]:
    """Returns the mean over users with a value, its 95 % interval, and their number."""
    known = values[~np.isnan(values)]
    if not len(known):
        return {"mean": None, "low": None, "high": None, "users": 0}
    ((mean, low, high),) = mean_intervals([known[None]], draws=DRAWS)
    return {"mean": mean, "low": low, "high": high, "users": len(known)}
