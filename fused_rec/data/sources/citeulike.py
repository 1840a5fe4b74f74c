"""CiteULike-t (Wang, Chen and Li, IJCAI 2013): users and the papers they saved, with abstracts and tags.

Folder: `users.dat`, `mult.dat`, `vocabulary.dat`, `tags.dat`, `tag-item.dat`; for the published splits also
`cf-train-P-users.dat` and `cf-test-P-users.dat`, P = 1 or 10. Each may be .gz. A line of ids is a user (a paper of
`mult.dat`, a tag of `tag-item.dat`): the number of ids, then the ids, which count from 0. Papers have no titles.

An abstract is published as words with counts, in no order. Its text has the words by descending count, then once more
those that occur at least twice, and so on up to `MAX_REPEATS` times: TF-IDF sees counts, and an encoder that truncates
loses repetitions first.

The published splits have no validation split, and users of P = 1 keep no paper beside one held out of train. So the
test papers of every tenth user (`VALID_USERS`) are the validation split, and these users have no test papers.

Tags were typed by users who saved the paper, but the files do not say by whom: the tags of a held-out pair cannot be
removed, neither here nor in published results. Compare with `tags=False` (`citeulike_t_words` and its splits).

Citations between papers (`citations.dat`) are not read: a dataset has no edges between items.
"""

import re
from pathlib import Path

import numpy as np
import pyarrow as pa
from jaxtyping import Int64

from fused_rec.data.dataset import DataError, Dataset, Problem
from fused_rec.data.io.arrow import join_texts
from fused_rec.data.io.checks import EXAMPLES
from fused_rec.data.io.files import plain_or_gz, read_lines
from fused_rec.data.io.validate import Tables, assemble

MAX_REPEATS = 4  # of a word in a text; 92 % of the words of an abstract occur fewer times
VALID_USERS = 10  # one user in so many is for validation
REMEDY = "download it again, with the other files of the dataset"
_ID = "[0-9]{1,9}"  # as many digits fit into 32 bits
_COUNTED = f"{_ID}:{_ID}"


def citeulike_t(path: Path, repair: bool, *, train_size: int | None = None, tags: bool = True) -> Dataset:
    """Reads CiteULike-t: 7,947 users, 25,975 papers, 134,860 pairs.

    Args:
      path: folder with the files.
      repair: as in `fused_rec.data.io.tables.read_tables`.
      train_size: P of a published split, 1 or 10: each user has up to P papers in train and the others in test, or in
        validation. None: all pairs, without a predefined split.
      tags: whether a paper's text ends with its tags, the most frequent first, and the items have them as a list
        column `tags`.

    Returns:
      The dataset, users and items in the order of the files. Papers without words or tags have no text.

    Raises:
      DataError: lists the faults of the first faulty file.
    """
    texts = pa.chunked_array([_texts(path)])
    items = {"item_id": np.arange(len(texts)), "text": texts}
    if tags:
        listed = _tags(path, len(texts))
        items["tags"] = pa.array(listed, pa.list_(pa.string()))
        items["text"] = join_texts(texts, pa.chunked_array([pa.array([", ".join(own) or None for own in listed])]))
    files = {"": "users.dat"}
    if train_size is not None:
        files = {split: f"cf-{split}-{train_size}-users.dat" for split in ("train", "test")}
    papers = {split: _lists(plain_or_gz(path / file), len(texts)) for split, file in files.items()}
    n_users = [len(lists) for lists in papers.values()]
    if len(set(n_users)) > 1:
        fault = f"has {n_users[1]:,} lines, and {files['train']} has {n_users[0]:,}"
        raise DataError([Problem(files["test"], None, fault, REMEDY)])
    tables = Tables(
        pa.concat_tables([_pairs(lists, split) for split, lists in papers.items()]),
        users=pa.table({"user_id": np.arange(n_users[0])}),
        items=pa.table(items),
    )
    name = f"citeulike_t{'' if train_size is None else f'_p{train_size}'}{'' if tags else '_words'}"
    return assemble(name, tables, repair=repair, auto_repair=("repeated interaction",))


def _pairs(papers: list[Int64[np.ndarray, "_"]], split: str) -> pa.Table:
    """Builds the interactions of one file; `split` is empty for none, and some users of test are for validation."""
    users = np.repeat(np.arange(len(papers)), [len(ids) for ids in papers])
    pairs = pa.table({"user_id": users, "item_id": np.concatenate([np.zeros(0, np.int64), *papers])})
    if not split:
        return pairs
    names = np.where((users % VALID_USERS == 0) & (split == "test"), "valid", split)
    return pairs.append_column("split", pa.array(names, pa.string()))


def _texts(path: Path) -> pa.Array:
    """Writes the words of each paper as a text; null without words."""
    vocabulary = np.array([line.strip() for line in read_lines(plain_or_gz(path / "vocabulary.dat"))], object)
    texts = []
    for entries in _lists(plain_or_gz(path / "mult.dat"), len(vocabulary), _COUNTED):
        words, counts = entries[::2], entries[1::2]
        order = np.argsort(-counts, kind="stable")
        rounds = [vocabulary[words[order][counts[order] > repeat]] for repeat in range(MAX_REPEATS)]
        texts.append(" ".join(filter(None, np.concatenate(rounds))) or None)  # one word of the vocabulary is blank
    return pa.array(texts, pa.string())


def _tags(path: Path, n_items: int) -> list[list[str]]:
    """Reads the tags of each paper, those of most papers first."""
    names = [line.strip() for line in read_lines(plain_or_gz(path / "tags.dat"))]
    file = plain_or_gz(path / "tag-item.dat")
    papers = _lists(file, n_items)
    if len(names) != len(papers):
        fault = f"has {len(papers):,} lines, and tags.dat has {len(names):,}"
        raise DataError([Problem(file.name, None, fault, REMEDY)])
    tags: list[list[str]] = [[] for _ in range(n_items)]
    for tag in sorted(range(len(names)), key=lambda tag: -len(papers[tag])):
        for paper in papers[tag].tolist():
            tags[paper].append(names[tag])
    return [list(filter(None, own)) for own in tags]


def _lists(file: Path, limit: int, entry: str = _ID) -> list[Int64[np.ndarray, "_"]]:
    """Reads a file of lists.

    Args:
      file: a line a list: the number of entries, then the entries.
      limit: number of papers or words; ids are below it.
      entry: pattern of an entry, `_ID` or `_COUNTED`.

    Returns:
      The integers of each line after the first; of `_COUNTED` ids and counts by turns.

    Raises:
      DataError: lines are something else, have another number of entries, or ids of `limit` or more.
    """
    pattern, step = re.compile(rf"\s*({_ID})((?:\s+{entry})*)\s*"), 1 if entry == _ID else 2
    lists, faults = [], {}
    for row, line in enumerate(read_lines(file), start=1):
        if not (found := pattern.fullmatch(line)):
            example = "'2 10 11'" if entry == _ID else "'2 10:1 11:4'"
            faults[row] = f"{line.strip()[:60]!r} is not the number of entries and the entries, as {example}"
            continue
        numbers = np.array(found[2].replace(":", " ").split(), np.int64)
        if len(numbers) != int(found[1]) * step:
            faults[row] = f"{found[1]} entries are announced, and {len(numbers) // step} follow"
        elif (largest := numbers[::step].max(initial=-1)) >= limit:
            faults[row] = f"id {largest} is not below {limit}, the number of {'papers' if entry == _ID else 'words'}"
        lists.append(numbers)
    problems = [Problem(file.name, row, fault, REMEDY) for row, fault in list(faults.items())[:EXAMPLES]]
    if (rest := len(faults) - len(problems)) > 0:
        problems.append(Problem(file.name, None, f"{len(faults):,} lines are faulty in all", REMEDY, rest))
    if problems:
        raise DataError(problems)
    return lists
