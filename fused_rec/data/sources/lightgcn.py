"""Reader of the text files of NGCF and LightGCN: a line per user."""

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from fused_rec.data.dataset import DataError, Dataset, Problem
from fused_rec.data.io.checks import EXAMPLES
from fused_rec.data.io.files import read_lines
from fused_rec.data.sources.integer_ids import SPLIT_NAMES, with_integer_ids

_INTEGER = re.compile("[+-]?[0-9]{1,18}")  # int() also takes 1_0, and digits of other scripts; 18 fit into 64 bits


def lightgcn_text(path: Path, repair: bool) -> Dataset:
    """Reads `train.txt` and `test.txt` with one line per user (`user item item ...`), the format of NGCF and LightGCN.

    Args:
      path: folder with both files.
      repair: as in `fused_rec.data.io.tables.read_tables`.

    Returns:
      The dataset with a predefined split.

    Raises:
      DataError: lists all faults.
    """
    problems: list[Problem] = []
    rows = [(split, ids) for split in SPLIT_NAMES for ids in _id_lines(path / f"{split}.txt", problems)]
    if problems:
        raise DataError(problems)
    first = np.array([ids[0] for _, ids in rows], np.int64)
    lengths = [len(ids) - 1 for _, ids in rows]
    events = pa.table(
        {
            "user_id": np.repeat(first, lengths),
            "item_id": np.concatenate([np.zeros(0, np.int64), *(ids[1:] for _, ids in rows)]),
            "split": np.repeat(np.array([split for split, _ in rows], np.str_), lengths),
        }
    )
    return with_integer_ids(path.name, events, first, None, repair)


def _id_lines(file: Path, problems: list[Problem]) -> Iterator[np.ndarray]:
    """Yields the integers of each non-empty line as int64, and reports lines with anything else."""
    bad = 0
    for row, line in enumerate(read_lines(file), start=1):
        words = line.split()
        if all(map(_INTEGER.fullmatch, words)):
            if words:
                yield np.array(words, np.int64)
            continue
        bad += 1
        if bad <= EXAMPLES:
            word = next(word for word in words if not _INTEGER.fullmatch(word))
            message = f"{word[:60]!r} is no integer of up to 18 digits"
            problems.append(Problem(file.name, row, message, "give a line a user, `user item item ...`, all integers"))
    if bad > EXAMPLES:
        message = f"{bad:,} lines hold other than integers, the first {EXAMPLES} listed"
        problems.append(Problem(file.name, None, message, "download it again", bad - EXAMPLES))
