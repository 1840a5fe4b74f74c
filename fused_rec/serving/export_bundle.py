"""Export of a finished run: a folder readable without this package, in the layout of the Hugging Face Hub.

OUT/
  users.safetensors    `vectors` float32 [U, D] and, in the metadata, `ids`: JSON, one per row
  items.safetensors    the same of items; the score is the inner product of a user's and an item's row
  score.stablehlo      scoring function as exported by `jax.export`: see `score_program`
  model.safetensors    the parameters, by their path in the tree; a baseline has none
  config.json          `model_type`, the run's settings without local paths, versions; `trained`: data, dates and step
                       of the training; `served`: which rows of which tables the vectors use; `exported`: UTC time
  README.md            the model card, with metadata and loading code
  items.faiss          optional: an exact inner-product index of Faiss, whose numbers are the rows of the items

The vectors contain information about the users, and ids are included: protect the folder as the tables.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from jaxtyping import Array, Float32, Int32

from fused_rec.config import Config, portable
from fused_rec.data.dataset import digest
from fused_rec.memory import require_memory
from fused_rec.runs.model_card import export_card
from fused_rec.runs.run_dir import now, versions, write_json
from fused_rec.serving.approximate import open_faiss
from fused_rec.storage import check_new, fill_folder, write_file
from fused_rec.text.vectors import save_vectors
from fused_rec.training.checkpoint import named_leaves
from fused_rec.training.evaluate import user_item_vectors
from fused_rec.training.inputs import ModelInputs
from fused_rec.training.train_step import TrainState

USERS, ITEMS, PARAMETERS, SETTINGS = "users.safetensors", "items.safetensors", "model.safetensors", "config.json"
PROGRAM, CARD, INDEX = "score.stablehlo", "README.md", "items.faiss"
PLATFORMS = ("cpu", "cuda", "tpu")
FILES = {  # descriptions for the card
    USERS: "`vectors` float32, a row a customer; `ids` in the metadata",
    ITEMS: "`vectors` float32, a row a product; `ids` in the metadata",
    PROGRAM: "the program that scores, for CPU, CUDA and TPU (`jax.export`)",
    PARAMETERS: "the parameters by their path",
    SETTINGS: "settings and versions; `trained`: the data of the training; `served`: what the vectors use",
    INDEX: "a Faiss index of the products, exact, by inner product",
}


def check(out: Path, *, faiss: bool = False) -> None:
    """Checks the output folder and libraries before a run is loaded.

    Args:
      out: folder to write.
      faiss: whether an index is requested.

    Raises:
      FileExistsError: `out` is a file, a mount point, or a folder that is not empty.
      ImportError: an index is requested and Faiss is not installed.
    """
    check_new(out)
    if faiss:
        open_faiss(INDEX)


def export_bundle(
    out: Path,
    config: Config,
    inputs: ModelInputs,
    state: TrainState,
    results: Mapping[str, Any],
    *,
    faiss: bool = False,
) -> None:
    """Writes the folder atomically.

    Args:
      out: a new or empty folder.
      config: settings of the run.
      inputs: tables and graph.
      state: of the selected step.
      results: content of `results.json`.
      faiss: also write a Faiss index.

    Raises:
      FileExistsError, ImportError: as `check` does.
      ValueError: a vector is not finite, those of a baseline are too wide, or there are more ids than a safetensors
        file holds.
      InsufficientMemoryError: vectors or a file do not fit.
      SaveError: the folder cannot be written; names it and the reason, on a full disk also required and free space.
    """
    check(out, faiss=faiss)
    dataset = inputs.dataset
    users, items = user_item_vectors(config, inputs, state)
    # Each file is built in memory; the index is there twice, as Faiss object and as bytes.
    need = max(users.nbytes, (3 if faiss else 1) * items.nbytes)
    require_memory(
        need, "the folder's largest file", "lower model.dim, set model.late_fusion to False, or leave out --faiss"
    )

    served = inputs.served() | {"sha256": digest(dataset)}

    def fill(partial: Path) -> None:
        save_vectors(partial / USERS, users, dataset.users["user_id"].to_pylist())
        save_vectors(partial / ITEMS, items, dataset.items["item_id"].to_pylist())
        write_file(partial / PROGRAM, score_program(users.shape[1]))
        if config.model.is_trained:  # the vectors are all that a baseline has
            parameters = {name: np.asarray(leaf) for name, leaf in named_leaves(state.params).items()}
            write_file(partial / PARAMETERS, safetensors.numpy.save(parameters, {"format": "flax"}))
        write_json(partial / SETTINGS, _settings(config, results, served))
        if faiss:
            write_file(partial / INDEX, _index(items))
        there = {name: what for name, what in FILES.items() if (partial / name).exists()}
        digests = {name: _sha256(partial / name) for name in there}
        made = export_card(results, served, {"tables": served["sha256"], **digests}, there)
        write_file(partial / CARD, made.encode())

    fill_folder(out, fill)


def _settings(config: Config, results: Mapping[str, Any], served: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the contents of `config.json`."""
    chosen = ("best_step", "late_fusion") if config.model.is_trained else ("settings",)
    names = "dataset", "split", "variant", "seed", *chosen, "finished", "data", "counts"
    made = {"versions": versions(), "exported": now()}
    trained = {name: results[name] for name in names}
    return {"model_type": "fused_rec", **portable(config), **made, "trained": trained, "served": dict(served)}


def score_program(width: int) -> bytes:
    """Exports the scoring function with `jax.export`.

    The function maps (users float32 [u, width], items float32 [i, width], rows int32 [b]) to scores float32 [b, i];
    u, i and b are symbolic, and a row outside the table gives NaN. The vectors are arguments: as constants they
    would be in the folder twice, and a program is limited to 2 GB. It runs on `PLATFORMS` with float32 products, and
    needs only `jax` and `flatbuffers`.

    JAX guarantees (docs.jax.dev, "Exporting and serializing", compatibility guarantees) that an exported function runs
    on releases up to six months newer and up to three weeks older.

    Args:
      width: dimension of the vectors.

    Returns:
      The serialized function.
    """
    u, i, b = jax.export.symbolic_shape("u, i, b")
    arguments = (
        jax.ShapeDtypeStruct((u, width), jnp.float32),
        jax.ShapeDtypeStruct((i, width), jnp.float32),
        jax.ShapeDtypeStruct((b,), jnp.int32),
    )
    return bytes(jax.export.export(jax.jit(_score), platforms=PLATFORMS)(*arguments).serialize())


def _score(
    users: Float32[Array, "u D"], items: Float32[Array, "i D"], rows: Int32[Array, "b"]
) -> Float32[Array, "b i"]:
    scores = jnp.dot(users[rows], items.T, precision=jax.lax.Precision.HIGHEST)
    there = (rows >= 0) & (rows < users.shape[0])  # JAX would clamp an index outside to the last row
    return jnp.where(there[:, None], scores, jnp.nan)


def _index(items: Float32[np.ndarray, "I D"]) -> bytes:
    faiss = open_faiss(INDEX)
    index = faiss.IndexFlatIP(items.shape[1])
    index.add(items)
    return faiss.serialize_index(index).tobytes()


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
