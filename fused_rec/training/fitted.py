"""What a training fitted besides parameters, stored with the run, so that other tables can be served by the same model.

A node gets the same text features, whatever else the tables have, and a relation's degrees are standardized as in the
training. ID embeddings belong to ids: nodes that were not trained have none.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow as pa
from jaxtyping import Int, PyTree

from fused_rec.config import ModelConfig
from fused_rec.data.dataset import Dataset
from fused_rec.data.io.arrow import pc
from fused_rec.graph.adjacency import DegreeScale, degree_scale
from fused_rec.graph.build import attribute_values
from fused_rec.graph.schema import ITEM, USER, Relation
from fused_rec.model.model import ID_EMBEDDING, active_relations
from fused_rec.runs.run_dir import read_arrays, write_arrays
from fused_rec.text.features import ColumnScales, FittedFeatures
from fused_rec.text.tfidf import TfidfModel
from fused_rec.text.whitening import Whitening
from fused_rec.training.checkpoint import CheckpointError
from fused_rec.training.train_step import GraphInputs

# In the run directory: of the served model; and, with a refit, of the one that validation selected.
FITTED, FITTED_SELECT = "fitted.npz", "fitted_select.npz"


@dataclasses.dataclass(frozen=True, eq=False)
class Fitted:
    """What is fitted on the tables of a training.

    Attributes:
      text: terms and directions of TF-IDF, scales and whitening.
      scales: what standardizes degrees, of each relation with edges; the model reads no other relation.
      trained: by node type with ID embeddings, the row of the embedding by the id of each node that was trained. The
        ids of attribute nodes are their values as text.
      tie_kinds: kinds of the observed ties, sorted.
    """

    text: FittedFeatures
    scales: Mapping[Relation, DegreeScale]
    trained: Mapping[str, Mapping[str, int]]
    tie_kinds: tuple[str, ...]


def fitted_of(
    config: ModelConfig, dataset: Dataset, text: FittedFeatures, graph_inputs: GraphInputs, ties: pa.Table
) -> Fitted:
    """Collects what a training fits.

    Args:
      config: the model's settings.
      dataset: the tables.
      text: fitted on the observed texts.
      graph_inputs: of the observed splits, on the host.
      ties: the observed ties, as in the graph.
    """
    graph = graph_inputs.graph
    relations = [relation for relation, count in graph.relations if count]
    scales = {}
    for relation in relations:
        adjacency = graph.adjacencies[relation]
        scales[relation] = degree_scale(np.diff(adjacency.receiver_start), np.diff(adjacency.sender_start))
    trained = {}
    for node_type in id_types(config, [name for name, _ in graph.node_types]):
        rows = np.arange(graph.count(node_type))
        if node_type == ITEM:
            rows = np.flatnonzero(graph_inputs.trained_items)
        elif node_type == USER:
            into = [r for r in active_relations(config, graph) if r.target == USER]
            rows = np.flatnonzero(sum((np.asarray(graph.adjacencies[r].degrees.in_degree) for r in into), 0 * rows))
        ids = node_ids(dataset, node_type)
        trained[node_type] = {ids[row].as_py(): row for row in rows.tolist()}
    return Fitted(text, scales, trained, tuple(sorted(ties.column("kind").unique().to_pylist())))


def id_types(config: ModelConfig, node_types: list[str]) -> list[str]:
    """Lists the node types that have ID embeddings."""
    return [name for name in node_types if config.uses_ids and (name != USER or config.user_id_embedding)]


def node_ids(dataset: Dataset, node_type: str) -> pa.Array:
    """Returns the ids of the nodes of a type as text, of attribute nodes their values, in the order of the graph."""
    if node_type in (USER, ITEM):
        return getattr(dataset, f"{node_type}s")[f"{node_type}_id"].combine_chunks().cast(pa.string())
    return pa.array(map(str, attribute_values(dataset.items, node_type)), pa.string())


def id_rows(fitted: Fitted, dataset: Dataset, node_type: str) -> Int[np.ndarray, "n"]:
    """Looks up the rows of ID embeddings of the nodes of any tables.

    Args:
      fitted: of the training.
      dataset: the tables.
      node_type: with ID embeddings.

    Returns:
      The row of each node, -1 for a node that was not trained.
    """
    known = fitted.trained[node_type]
    place = pc.index_in(node_ids(dataset, node_type), value_set=pa.array(known, pa.string()))
    rows = np.fromiter(known.values(), np.int64, len(known))
    return np.append(rows, -1)[pc.fill_null(place, len(rows)).to_numpy(zero_copy_only=False)]


def trained_parameters(
    arrays: Mapping[str, np.ndarray], like: PyTree, fitted: Fitted, dataset: Dataset, *, keep_new: bool = False
) -> PyTree:
    """Takes the parameters of a trained model for the nodes of any tables.

    Args:
      arrays: of its checkpoint, by name.
      like: initial parameters for the tables.
      fitted: of its training, with the ids of the nodes that were trained.
      dataset: the tables.
      keep_new: nodes and relations that were not trained keep the values of `like`; else the rows of ID embeddings of
        such nodes are zero, and no parameter may be missing.

    Returns:
      The parameters, shaped as `like`. Rows of ID embeddings belong to ids.

    Raises:
      CheckpointError: a parameter is missing or of another shape or dtype; names it.
    """

    def trained(path: tuple, leaf: Any) -> np.ndarray:
        name = "/".join(("params", jax.tree_util.keystr(path, simple=True, separator="/")))
        if name not in arrays:
            if keep_new:
                return leaf
            raise CheckpointError(f"{name} is not in the checkpoint; train in a new workdir")
        array, own = arrays[name], str(getattr(path[-1], "key", ""))
        if own.startswith(ID_EMBEDDING):
            rows = id_rows(fitted, dataset, own.removeprefix(ID_EMBEDDING))
            array = np.concatenate([array, np.zeros_like(array[:1])])[rows]
            if keep_new and array.shape == leaf.shape:
                array = np.where(rows[:, None] < 0, leaf, array)
        if (array.shape, array.dtype) != (leaf.shape, leaf.dtype):
            raise CheckpointError(
                f"{name} is {array.dtype}{array.shape} in the checkpoint and {leaf.dtype}{leaf.shape} in the model; "
                "train in a new workdir"
            )
        return array

    return jax.tree_util.tree_map_with_path(trained, like)


def write_fitted(file: Path, fitted: Fitted) -> None:
    """Writes what was fitted, atomically.

    Args:
      file: the path.
      fitted: the values; TF-IDF directions are stored in float32.

    Raises:
      SaveError: the file cannot be written.
    """
    text = fitted.text
    record: dict[str, Any] = {
        "terms": sorted(text.tfidf.terms, key=lambda term: text.tfidf.terms[term]),
        "column_scales": text.scales,
        "lm_width": text.lm_width,
        "degree_scales": [[relation, scale] for relation, scale in fitted.scales.items()],
        "trained": fitted.trained,
        "tie_kinds": fitted.tie_kinds,
        "whitened": [name for name, found in text.whitening.items() if found is not None],
    }
    arrays = {
        "record": np.frombuffer(json.dumps(record).encode(), np.uint8),
        "directions": text.tfidf.directions.astype(np.float32),
        "idf": text.tfidf.idf,
    }
    for name, found in text.whitening.items():
        if found is not None:
            arrays |= {f"center_{name}": found.center, f"matrix_{name}": found.matrix}
    write_arrays(file, arrays)


def read_fitted(file: Path) -> Fitted:
    """Reads a file of `write_fitted`.

    Args:
      file: the path.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it is damaged.
    """
    if not file.exists():
        raise FileNotFoundError(f"{file} is missing; rank with history 'train', or train in a new workdir")
    arrays = read_arrays(file, "train in a new workdir")
    try:
        record = json.loads(arrays["record"].tobytes())
        terms = {term: row for row, term in enumerate(record["terms"])}
        tfidf = TfidfModel(terms, arrays["directions"].astype(np.float64), arrays["idf"])
        whitening: dict[str, Whitening | None] = dict.fromkeys((USER, ITEM))
        for name in record["whitened"]:
            whitening[name] = Whitening(arrays[f"center_{name}"], arrays[f"matrix_{name}"])
        text = FittedFeatures(tfidf, ColumnScales(*record["column_scales"]), whitening, record["lm_width"])
        scales = {Relation(*relation): DegreeScale(*scale) for relation, scale in record["degree_scales"]}
        return Fitted(text, scales, record["trained"], tuple(record["tie_kinds"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} is damaged ({error!r}); train in a new workdir") from error
