"""Files that go in and out of encoding: texts a line each, and vectors as safetensors with the ids of their rows."""

import collections
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import safetensors.numpy
from jaxtyping import Float32

from fused_rec.storage import write_file

ENDING = ".safetensors"
IDS = "ids"  # in the file's metadata: the ids of the rows, JSON


def read_lines(file: Path) -> list[str]:
    r"""The file's lines without their ends (\n or \r\n). Raises ValueError that names the first line not in UTF-8."""
    texts = []
    content = file.read_bytes()
    for number, line in enumerate(content.removesuffix(b"\n").split(b"\n") if content else [], start=1):
        try:
            texts.append(line.removesuffix(b"\r").decode("utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(f"{file}, line {number}: not UTF-8 ({error}); convert the file to UTF-8") from error
    return texts


def check_name(file: Path) -> None:
    """Raises ValueError where the name of a file of vectors would say that it is of another format."""
    if file.suffix != ENDING:
        raise ValueError(
            f"the file is {file.name}; vectors are written as safetensors, so its name must end in {ENDING}"
        )


def save_vectors(file: Path, vectors: Float32[np.ndarray, "N D"], ids: Sequence[str] = ()) -> None:
    """The tensor `vectors` as a safetensors file, the whole of it or, where this fails, none; the folder is made.

    ids: of the rows, kept as JSON under `ids` of the file's metadata; none = rows are known by their position.

    Raises ValueError where the name does not end in .safetensors, and where there are ids and not one a row, the same
    twice, or more than a header holds (100 MB); SaveError where it cannot be written.
    """
    check_name(file)
    if len(ids) and len(ids) != len(vectors):
        raise ValueError(f"{len(ids)} ids for {len(vectors)} vectors; give one a row")
    if len(set(ids)) != len(ids):
        twice = next(name for name, count in collections.Counter(ids).items() if count > 1)
        raise ValueError(f"id {twice!r} stands at two rows; ids must differ")
    metadata = {IDS: json.dumps(list(ids), ensure_ascii=False)} if len(ids) else None
    try:
        content = safetensors.numpy.save({"vectors": vectors}, metadata)
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{file.name} cannot be written ({error}): its header takes 100 MB, and {len(ids):,} ids need more; "
            "write the rows into several files"
        ) from error
    file.parent.mkdir(parents=True, exist_ok=True)
    write_file(file, content)


def load_vectors(file: Path) -> tuple[Float32[np.ndarray, "N D"], list[str]]:
    """What `save_vectors` wrote; no ids where none were given. Raises ValueError where it is no such file."""
    try:
        with safetensors.safe_open(file, framework="np") as opened:
            return opened.get_tensor("vectors"), json.loads((opened.metadata() or {}).get(IDS, "[]"))
    except (safetensors.SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{file} is no file of vectors ({error}); experiments.encode writes such files") from error
