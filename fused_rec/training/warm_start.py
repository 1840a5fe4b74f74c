"""Warm start: a training on newer tables that starts from the parameters of a finished run on earlier ones.

Parameters that read text features or degrees mean something only in the basis that they were trained in, so what the
earlier run fitted (TF-IDF, scales, whitening, standardization of degrees) is applied to the newer tables, not fitted
anew. Rows of ID embeddings are matched by id.

The earlier run must not have learned from what is held out now. Each run stores the pairs that it learned from and
those that its validation chose by, as hashes of ids (`PAIRS`); of the two models of a run, the served one is taken if
it passes, else that of step selection.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int64, UInt64

from fused_rec.config import Config
from fused_rec.data.dataset import Dataset, column
from fused_rec.data.splits import SPLIT_NAMES, Split
from fused_rec.graph.schema import ITEM, USER
from fused_rec.runs.run_dir import phase_of, read_arrays, read_finished, read_run, seen_splits, write_arrays
from fused_rec.training.checkpoint import Checkpoints
from fused_rec.training.fitted import FITTED, FITTED_SELECT, Fitted, node_ids, read_fitted, write_fitted

PAIRS = "pairs.npz"  # in the run directory
INIT, INIT_FITTED = "init.npz", "init_fitted.npz"  # in the run directory of a warm start
REMEDY = "train in a new workdir"
# Settings on which the shapes or the meaning of parameters depend; those of text where the model reads it.
FIXED = {
    "model": (
        *("variant", "dim", "num_layers", "score", "relation_gates", "layer_combination", "text_projection"),
        *("text_propagation", "user_id_embedding", "user_text_input"),
    ),
    "text": ("model", "prompt", "max_tokens", "tfidf_dim", "features", "finetune", "lora_rank"),
}


class Pairs(NamedTuple):
    """Hashes of (user id, item id), sorted: the pairs a model learned from, and those that its validation chose by."""

    learned: UInt64[np.ndarray, "_"]
    chosen_by: UInt64[np.ndarray, "_"]


@dataclasses.dataclass(frozen=True, eq=False)
class Initial:
    """What a training starts from.

    Attributes:
      source: of the earlier run: `workdir`, its absolute path; `model`, the SHA-256 of the checkpoint's manifest;
        `phase` and `step` of the checkpoint; `tables`, the digest of its tables.
      params: arrays by the names of the checkpoint, such as params/main/id_item.
      fitted: what the earlier run fitted.
      pairs: of the earlier run and of those that it started from.
    """

    source: Mapping[str, Any]
    params: Mapping[str, np.ndarray]
    fitted: Fitted
    pairs: Pairs


def read_initial(config: Config, init_from: Path, dataset: Dataset, data_split: Split) -> Initial:
    """Reads the model of a finished run to start from, the served one unless it learned from what is held out.

    Args:
      config: settings of the new training.
      init_from: folder of the finished run.
      dataset: tables of the new training.
      data_split: their split.

    Returns:
      Parameters, and what was fitted.

    Raises:
      ValueError: a setting differs that parameters depend on; or both models of the run learned from pairs that are
        held out, or validation chose by pairs of the test split.
      FileNotFoundError: the folder holds no finished run.
      CheckpointError: the checkpoint is damaged.
    """
    earlier, step, selected = read_finished(init_from)
    _check_settings(config, earlier, init_from)
    pairs = read_arrays(init_from / PAIRS, REMEDY)
    valid = pair_hashes(dataset, np.concatenate([data_split.valid, data_split.dropped]))
    test = pair_hashes(dataset, data_split.test)
    refit = earlier.train.refit
    # The newest model first: the served one has learned from more.
    for model, file in (("served", FITTED), ("valid", FITTED if refit == "none" else FITTED_SELECT)):
        learned = _joined(pairs["init_learned"], *(pairs[name] for name in seen_splits(refit, model)))
        found = Pairs(learned, _joined(pairs["init_chosen_by"], pairs["valid"]))
        if problem := _leak(found, valid, test):
            continue
        phase = phase_of(refit, selected, model)
        checkpoints = Checkpoints(init_from / phase / "checkpoints")
        source = {
            "workdir": str(init_from.expanduser().resolve()),
            "model": checkpoints.digest(step),
            "phase": phase,
            "step": step,
            "tables": read_run(init_from)["tables"],
        }
        params = {name: array for name, array in checkpoints.arrays(step).items() if name.startswith("params/")}
        return Initial(source, params, read_fitted(init_from / file), found)
    raise ValueError(
        f"{init_from} {problem}; its metrics here would be of pairs that it knows. Use a split whose held-out rows the "
        "earlier run did not have (split.kind time, or the same split of the same tables), or train without init_from"
    )


def _check_settings(config: Config, earlier: Config, init_from: Path) -> None:
    sections = FIXED if config.model.reads_text else {"model": FIXED["model"]}
    differ = [
        f"{section}.{name} is {there!r} there and {here!r} here"
        for section, names in sections.items()
        for name in names
        if (there := getattr(getattr(earlier, section), name)) != (here := getattr(getattr(config, section), name))
    ]
    if differ:
        raise ValueError(
            f"the parameters of {init_from} do not fit ({'; '.join(differ)}); use the same settings, or train without "
            "init_from"
        )


def _leak(pairs: Pairs, valid: UInt64[np.ndarray, "_"], test: UInt64[np.ndarray, "_"]) -> str:
    """Says which held-out pairs the earlier run knows; empty where it knows none."""
    for rows, known, what in (
        (np.concatenate([valid, test]), pairs.learned, "learned from"),
        (test, pairs.chosen_by, "chose its step by"),
    ):
        if count := int(np.isin(rows, known).sum()):
            return f"{what} {count:,} of the {len(rows):,} pairs that are held out now, and must know none of them"
    return ""


def pair_hashes(dataset: Dataset, rows: Int64[np.ndarray, "n"]) -> UInt64[np.ndarray, "n"]:
    """Hashes the ids of interactions, so that pairs are found in other tables; sorted.

    Args:
      dataset: the tables.
      rows: of `dataset.interactions`.

    Returns:
      64 bits of each pair. Of a million pairs, two in other tables share a hash by chance in one of 10^7 cases.
    """
    parts = []
    for node_type, salt in ((USER, b"user"), (ITEM, b"item")):
        used = column(dataset.interactions, node_type)[rows]
        nodes, places = np.unique(used, return_inverse=True)
        ids = node_ids(dataset, node_type).take(nodes).to_pylist()
        digests = b"".join(hashlib.blake2b(name.encode(), digest_size=8, salt=salt).digest() for name in ids)
        parts.append(np.frombuffer(digests, "<u8").astype(np.uint64)[places])
    of_user, of_item = parts
    return np.sort(of_user * np.uint64(0x9E3779B97F4A7C15) ^ of_item)


def write_pairs(file: Path, dataset: Dataset, data_split: Split, initial: Initial | None) -> None:
    """Writes the pairs of each split, and those of the runs that a training started from.

    Args:
      file: the path.
      dataset: the tables.
      data_split: their split.
      initial: what the training started from.

    Raises:
      SaveError: the file cannot be written.
    """
    none = np.zeros(0, np.uint64)
    init = Pairs(none, none) if initial is None else initial.pairs
    own = {name: pair_hashes(dataset, getattr(data_split, name)) for name in SPLIT_NAMES}
    write_arrays(file, {**own, "init_learned": init.learned, "init_chosen_by": init.chosen_by})


def write_initial(workdir: Path, initial: Initial) -> None:
    """Writes what a training starts from to its workdir, so that it resumes without the earlier run.

    Raises:
      SaveError: a file cannot be written.
    """
    write_fitted(workdir / INIT_FITTED, initial.fitted)
    source = np.frombuffer(json.dumps(dict(initial.source)).encode(), np.uint8)
    write_arrays(workdir / INIT, {"source": source, **initial.pairs._asdict(), **initial.params})


def stored_initial(workdir: Path) -> Initial | None:
    """Reads the files of `write_initial`; None for a run that started from nothing.

    Raises:
      FileNotFoundError: a file is missing, or workdir holds no run.
      ValueError: it is damaged.
    """
    if "init_from" not in read_run(workdir):
        return None
    arrays = read_arrays(workdir / INIT, REMEDY)
    source = json.loads(arrays.pop("source").tobytes())
    pairs = Pairs(*(arrays.pop(name) for name in Pairs._fields))
    return Initial(source, arrays, read_fitted(workdir / INIT_FITTED), pairs)


def _joined(*parts: UInt64[np.ndarray, "_"]) -> UInt64[np.ndarray, "_"]:
    return np.unique(np.concatenate(parts))
