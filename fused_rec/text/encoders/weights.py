"""Weights of pretrained models on disk: finds the safetensors files and reads rows on demand.

Headers are checked by the safetensors library; rows are read directly into their target. A memory map would need up to
twice the memory of the model, its pages and the copy.
"""

import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import safetensors

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle", "*.joblib")  # or files that contain some
OTHER_FORMATS = (
    "*.onnx",
    "*.gguf",
    "*.h5",
    "*.msgpack",
    "openvino_model.xml",
    "consolidated*.safetensors",
    "*.safetensors",
)
DTYPES = {  # NumPy and JAX dtypes by name in a header
    **{f"{kind}{8 * size}": np.dtype(f"{kind.lower()}{size}") for kind in "IU" for size in (1, 2, 4, 8)},
    **{f"F{8 * size}": np.dtype(f"f{size}") for size in (2, 4, 8)},
    "BF16": np.dtype(jnp.bfloat16),
    "BOOL": np.dtype(bool),
    "F8_E4M3": np.dtype(jnp.float8_e4m3fn),
    "F8_E5M2": np.dtype(jnp.float8_e5m2),
}


@dataclasses.dataclass(frozen=True)
class StoredWeight:
    """Weight in a file, from byte `offset`."""

    file: Path
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype

    def __getitem__(self, rows: slice) -> np.ndarray:
        """Reads rows from the file; raises ValueError where the file has become shorter."""
        start, stop, _ = rows.indices(self.shape[0])
        size = self.dtype.itemsize * int(np.prod(self.shape[1:], dtype=np.int64))
        content = np.fromfile(self.file, np.uint8, (stop - start) * size, offset=self.offset + start * size)
        if len(content) != (stop - start) * size:
            raise ValueError(f"{self.file} has become shorter while it was read; fetch the file again")
        return content.view(self.dtype).reshape(stop - start, *self.shape[1:])


def weight_files(folder: Path, index_of: object) -> list[Path]:
    """Finds the safetensors files of a model: model.safetensors, or those of the index.

    Args:
      folder: folder of the model.
      index_of: content of model.safetensors.index.json, None where it does not exist.

    Returns:
      The files.

    Raises:
      FileNotFoundError: there are none, or one of them is missing.
      ValueError: the index is malformed.
    """
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.is_file():
        return [whole]
    if index_of is None:
        raise FileNotFoundError(f"{folder} has no model.safetensors{_other_weights(folder)}")
    try:
        files = [folder / name for name in sorted(set(index_of["weight_map"].values()))]  # pyright: ignore
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{index} must map each weight to a file (weight_map); fetch the file again") from error
    for file in files:
        if file.parent != folder or not file.is_file():
            raise FileNotFoundError(f"{index} names {file}, which is not in the folder; fetch all shards again")
    return files


def _other_weights(folder: Path) -> str:
    """Describes weights in other formats and how to convert them."""
    pickles = sorted({file.name for pattern in PICKLES for file in folder.glob(pattern)})
    if pickles:
        return (
            f", only {', '.join(pickles)}, which can run code when read; if you trust it, convert it to safetensors, "
            'where torch is installed, with: python -c "from transformers import AutoModel; '
            f"AutoModel.from_pretrained('{folder}').save_pretrained('{folder}')\""
        )
    for names in OTHER_FORMATS:
        found = sorted(
            file.relative_to(folder).as_posix() for place in (".", "*") for file in folder.glob(f"{place}/{names}")
        )
        if found:
            return (
                f", only {', '.join(found[:3])}, which is not read; fetch model.safetensors from where it was published"
            )
    return "; fetch it from where the model was published"


def stored_weights(files: list[Path]) -> dict[str, StoredWeight]:
    """Reads the headers of weight files.

    Args:
      files: safetensors files.

    Returns:
      The weights of all files by name, read on demand.

    Raises:
      ValueError: a file is incomplete, or a dtype is not supported.
    """
    weights: dict[str, StoredWeight] = {}
    for file in files:
        try:
            with safetensors.safe_open(file, framework="numpy") as checked, file.open("rb") as stream:
                names = checked.keys()
                length = int.from_bytes(stream.read(8), "little")
                header = json.loads(stream.read(length))
            for name in names:
                entry = header[name]
                if entry["dtype"] not in DTYPES:
                    raise ValueError(f"{name} is of {entry['dtype']}")
                offset = 8 + length + entry["data_offsets"][0]
                weights[name] = StoredWeight(file, offset, tuple(entry["shape"]), DTYPES[entry["dtype"]])
        except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{file} is no whole safetensors file ({error}); fetch the file again") from error
    return weights
