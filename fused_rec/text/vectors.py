"""Input and output files of text encoding: text files with one text per line, safetensors files of vectors with ids."""

import collections
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import safetensors.numpy
from jaxtyping import Float32

from fused_rec.storage import write_file

ENDING = ".safetensors"
IDS = "ids"  # key of the file's metadata: ids of the rows as JSON


def read_lines(file: Path) -> list[str]:
    r"""Reads the lines of a text file.

    Args:
      file: a UTF-8 file.

    Returns:
      Its lines without their ends (\n or \r\n).

    Raises:
      ValueError: a line is not UTF-8; names the first one.
    """
    texts = []
    content = file.read_bytes()
    for number, line in enumerate(content.removesuffix(b"\n").split(b"\n") if content else [], start=1):
        try:
            texts.append(line.removesuffix(b"\r").decode("utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(f"{file}, line {number}: not UTF-8 ({error}); convert the file to UTF-8") from error
    return texts


def check_name(file: Path) -> None:
    """Checks the file name of vectors.

    Args:
      file: the file to write.

    Raises:
      ValueError: its suffix is not .safetensors.
    """
    if file.suffix != ENDING:
        raise ValueError(
            f"the file is {file.name}; vectors are written as safetensors, so its name must end in {ENDING}"
        )


def save_vectors(file: Path, vectors: Float32[np.ndarray, "N D"], ids: Sequence[str] = ()) -> None:
    """Writes vectors atomically as the tensor `vectors` of a safetensors file; creates its folder.

    Args:
      file: name that ends in .safetensors.
      vectors: N vectors of D dimensions.
      ids: ids of the rows, stored as JSON under `ids` of the file's metadata; empty = rows have no ids.

    Raises:
      ValueError: the name has another suffix; or ids are not one per row, not distinct, or larger than the header of a
        file (100 MB).
      SaveError: the file cannot be written.
    """
    check_name(file)
    if len(ids) and len(ids) != len(vectors):
        raise ValueError(f"{len(ids)} ids for {len(vectors)} vectors; give one per row")
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
    """Reads a file of `save_vectors`.

    Args:
      file: the file.

    Returns:
      The vectors, and the ids of their rows, empty where none were given.

    Raises:
      ValueError: it is no such file.
    """
    try:
        with safetensors.safe_open(file, framework="np") as opened:
            return opened.get_tensor("vectors"), json.loads((opened.metadata() or {}).get(IDS, "[]"))
    except (safetensors.SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{file} is no file of vectors ({error}); `fused-rec encode` writes such files") from error
