"""fused_rec's side of the benchmark: the functions that training and serving call, nothing else."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from protocol import Arrays, Job, answer, learning

from fused_rec.distributed.devices import keep_memory


def step(job: Job, arrays: Arrays) -> Callable[[int], float]:
    """A training step of the variant `lightgcn`; a row of the batch is a user with one positive and one negative."""
    import dataclasses

    import jax

    from fused_rec.config import Config
    from fused_rec.data.batches import Batch
    from fused_rec.studies.variants import variant
    from fused_rec.training.sharding import parallel_train_step, shard_graph_inputs, shard_state
    from fused_rec.training.train_step import GraphInputs, init

    n_users, n_items = map(int, arrays["shape"])
    held = np.bincount(arrays["item"], minlength=n_items)
    graph_inputs = GraphInputs(_graph(arrays), held > 0, held.astype(np.float32))

    config = variant(Config(), "lightgcn")
    n_pairs = arrays["batch_user"].shape[1]
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, dim=arrays["rows"].shape[1], num_layers=job["num_layers"]),
        train=dataclasses.replace(
            config.train, batch_size=n_pairs, positives_per_user=1, learning_rate=job["learning_rate"]
        ),
    )
    whole = init(config, graph_inputs)
    rows = {"id_user": arrays["rows"][:n_users], "id_item": arrays["rows"][n_users:]}
    state = shard_state(dataclasses.replace(whole, params={"main": {**whole.params["main"], **rows}}))
    graph_inputs, once = shard_graph_inputs(graph_inputs), parallel_train_step(config)
    parts = (arrays[f"batch_{name}"] for name in ("user", "item", "other"))
    batches = [
        Batch(user, item[:, None], np.ones((n_pairs, 1), np.float32), other[:, None])
        for user, item, other in zip(*parts, strict=True)
    ]

    def call(number: int) -> float:
        nonlocal state
        state, metrics = once(state, graph_inputs, batches[number % len(batches)])
        jax.block_until_ready(state)
        return float(metrics["loss"])

    return call


def propagate(job: Job, arrays: Arrays) -> Callable[[int], np.ndarray]:
    """The rows of all neighbors summed by their weights, to users and to items: one layer of LightGCN."""
    import jax

    from fused_rec.graph.schema import INTERACTED_BY, INTERACTS
    from fused_rec.graph.spmm import neighbor_sum

    adjacencies, n_users = _graph(arrays).adjacencies, int(arrays["shape"][0])
    given = jax.device_put((adjacencies[INTERACTED_BY], adjacencies[INTERACTS], *np.split(arrays["rows"], [n_users])))

    @jax.jit
    def layer(to_users, to_items, users, items):
        return neighbor_sum(to_users, to_users.weight, items), neighbor_sum(to_items, to_items.weight, users)

    def call(number: int) -> np.ndarray:
        to_users, to_items = jax.block_until_ready(layer(*given))
        return np.concatenate([to_users[:SHOWN], to_items[:SHOWN]]) if number == 0 else np.zeros(0)

    return call


def fused_step(job: Job, arrays: Arrays) -> Callable[[int], float]:
    """A training step of the variant `fused`, as the config `tables` has it, on generated text."""
    import jax

    from fused_rec.commands.configs.tables import get_config
    from fused_rec.config import from_dict, with_compute_dtype, with_temperature
    from fused_rec.data.batches import user_items
    from fused_rec.graph.build import bidirectional_edges
    from fused_rec.graph.device_graph import device_graph
    from fused_rec.graph.hetero import hetero_graph
    from fused_rec.graph.schema import INTERACTED_BY, INTERACTS, ITEM, SIMILAR_TEXT, USER, Edges, Relation
    from fused_rec.training.batch_sources import batch_of
    from fused_rec.training.sharding import parallel_train_step, shard_graph_inputs, shard_state
    from fused_rec.training.train_step import GraphInputs, init

    counts: dict[str, int] = dict(zip((USER, ITEM), map(int, arrays["shape"]), strict=True))
    config, rng = with_temperature(from_dict(get_config().to_dict()), 0.15), np.random.default_rng(0)
    config = with_compute_dtype(config, job["compute_dtype"])
    relations = bidirectional_edges(INTERACTS, INTERACTED_BY, arrays["user"], arrays["item"], counts)
    for node_type, count in counts.items():
        near = min(config.graph.text_knn, count - 1)
        order, offsets = rng.permutation(count), 1 + rng.choice(count - 1, near, replace=False)
        neighbors = order[(np.argsort(order)[:, None] + offsets) % count].ravel()
        edges = Edges(neighbors, np.repeat(np.arange(count), near), np.full(count * near, 1 / near, np.float32))
        relations[Relation(node_type, SIMILAR_TEXT, node_type)] = edges
    text = rng.standard_normal((sum(counts.values()), 640), np.float32)
    graph = hetero_graph(counts, relations, text / np.linalg.norm(text, axis=1, keepdims=True))
    held = np.bincount(arrays["item"], minlength=counts[ITEM])
    graph_inputs = GraphInputs(device_graph(graph), held > 0, held.astype(np.float32))
    state = shard_state(init(config, graph_inputs))
    graph_inputs, once = shard_graph_inputs(graph_inputs), parallel_train_step(config)
    users = user_items(arrays["user"], arrays["item"], counts[USER], held > 0)

    def call(number: int) -> float:
        nonlocal state
        drawn = batch_of(config.train, users, 0, number)
        state, metrics = once(state, graph_inputs, drawn)
        jax.block_until_ready(state)
        return float(metrics["loss"])

    return call


def learn(job: Job, arrays: Arrays) -> Callable[[int], float]:
    """Training steps of a config, with its batches, until the time is over."""
    import jax

    from fused_rec.config import from_dict
    from fused_rec.data.batches import user_items
    from fused_rec.training.batch_sources import batch_of
    from fused_rec.training.sharding import (
        parallel_embed_nodes,
        parallel_train_step,
        shard_graph_inputs,
        shard_state,
    )
    from fused_rec.training.train_step import GraphInputs, init

    config, (n_users, n_items) = from_dict(job["config"]), map(int, arrays["shape"])
    held = np.bincount(arrays["item"], minlength=n_items)
    graph_inputs = GraphInputs(_graph(arrays), held > 0, held.astype(np.float32))
    state, number = shard_state(init(config, graph_inputs)), 0
    graph_inputs, once = shard_graph_inputs(graph_inputs), parallel_train_step(config)
    users = user_items(arrays["user"], arrays["item"], n_users, held > 0)

    def advance() -> None:
        nonlocal state, number
        state, _ = once(state, graph_inputs, batch_of(config.train, users, 0, number))
        jax.block_until_ready(state)
        number += 1

    def vectors() -> np.ndarray:
        return np.concatenate(jax.device_get(parallel_embed_nodes(config)(state.params, graph_inputs)))

    return learning(job, advance, vectors)


def rank(job: Job, arrays: Arrays) -> Callable[[int], np.ndarray]:
    """The k best unseen items of every user."""
    import jax

    from fused_rec.evaluation.item_sets import item_sets
    from fused_rec.evaluation.ranking import RankingSpec, rank

    n_users, n_items = map(int, arrays["shape"])
    spec = RankingSpec(item_sets(arrays["user"], arrays["item"], n_users), n_items)
    scorer, everyone = jax.tree_util.Partial(_dot, *_vectors(arrays)), np.arange(n_users, dtype=np.int32)
    return lambda number: rank(scorer, everyone, spec, job["k"]).items


def rank_index(job: Job, arrays: Arrays) -> Callable[[int], np.ndarray]:
    """The k best unseen items of every user, of those in the lists of an inverted file that are read."""
    import jax

    from fused_rec.evaluation.item_sets import item_sets
    from fused_rec.evaluation.ranking import CandidateFilter
    from fused_rec.serving.approximate import build_index, set_probes

    users, items = np.split(arrays["rows"], [int(arrays["shape"][0])])
    seen = item_sets(arrays["user"], arrays["item"], len(users))
    scorer = jax.tree_util.Partial(_dot, *_vectors(arrays))
    index = set_probes(build_index(scorer, users, items, CandidateFilter(("seen",), excluded=(seen,))), job["probes"])
    everyone = np.arange(len(users), dtype=np.int32)
    return lambda number: index.rank(everyone, job["k"])[0].items


def recommend(job: Job, arrays: Arrays) -> Callable[[int], np.ndarray]:
    """The k best unseen items of one user, another one in each call: `run.recommend` of a model that is its vectors."""
    import dataclasses

    import fused_rec as fr
    from fused_rec.config import Config
    from fused_rec.data.splits import split
    from fused_rec.studies.variants import variant
    from fused_rec.training.inputs import init_state, prepare

    n_users, n_items, width, held = job["n_users"], job["n_items"], job["width"], 10
    rng = np.random.default_rng(0)
    user, item = np.repeat(np.arange(n_users), held), rng.integers(0, n_items, n_users * held)
    ids = np.arange(n_items)
    tables = {"items": {"item_id": ids, "name": [f"Product {row}" for row in ids]}, "repair": True}
    dataset = fr.dataset_from_tables({"user_id": user, "item_id": item}, **tables)
    config = fr.configure(variant(Config(), "lightgcn"), model={"dim": width, "num_layers": 0})
    prepared = prepare(config, dataset, split(dataset, config.split))
    state = init_state(config, prepared)
    rows = {
        f"id_{side}": rng.normal(size=(n, width)).astype(np.float32)
        for side, n in (("user", n_users), ("item", n_items))
    }
    state = dataclasses.replace(state, params={"main": {**state.params["main"], **rows}})
    run = fr.Run(Path(), config, prepared, state, {})
    return lambda number: np.array(run.recommend([number % n_users], k=job["k"])["item_id"].to_pylist(), np.int64)


def measure(job: Job, arrays: Arrays) -> Callable[[int], float]:
    """Recall at k of every user with held-out items; all other metrics are computed with it."""
    import jax

    from fused_rec.evaluation.item_sets import item_sets
    from fused_rec.evaluation.ranking import RankingSpec, evaluate, mean

    n_users, n_items = map(int, arrays["shape"])
    spec = RankingSpec(item_sets(arrays["user"], arrays["item"], n_users), n_items)
    truth = item_sets(arrays["test_user"], arrays["test_item"], n_users)
    counts = np.bincount(arrays["item"], minlength=n_items)
    scorer, k = jax.tree_util.Partial(_dot, *_vectors(arrays)), job["k"]

    def call(number: int) -> float:
        found = evaluate(scorer, spec, truth, item_counts=counts, ks=(k,))
        return mean(found)[f"recall@{k}"]

    return call


def encode(job: Job, arrays: Arrays) -> Callable[[int], np.ndarray]:
    """Vectors of all texts, none from a cache."""
    from fused_rec.text.encode import encode_texts
    from fused_rec.text.pretrained import open_model

    texts = json.loads(Path(job["texts"]).read_text(encoding="utf-8"))
    model = open_model(job["model"], compute_dtype=job["compute_dtype"])
    return lambda number: encode_texts(texts, model, cache=None, progress=False)


def copy(job: Job, arrays: Arrays) -> Callable[[int], float]:
    """An array of so many bytes is read and written, in place: what memory moves at most."""
    import jax
    import jax.numpy as jnp

    x, add = jnp.zeros(job["bytes"] // 4), jax.jit(lambda x: x + 1, donate_argnums=0)

    def call(number: int) -> float:
        nonlocal x
        x = jax.block_until_ready(add(x))
        return 0.0

    return call


def multiply(job: Job, arrays: Arrays) -> Callable[[int], float]:
    """A product of square matrices with float32 sums: what the device multiplies at most."""
    import jax
    import jax.numpy as jnp

    shape = job["size"], job["size"]
    pair = [jax.random.normal(jax.random.key(seed), shape, job["dtype"]) for seed in range(2)]
    product = jax.jit(lambda x, y: jnp.matmul(x, y, precision=job["precision"], preferred_element_type=jnp.float32))
    return lambda number: float(jax.block_until_ready(product(*pair))[0, 0])


def encode_shape(job: Job, arrays: Arrays) -> Callable[[int], np.ndarray]:
    """Vectors of texts of one length in a model of this config.json with random weights, without a tokenizer."""
    import dataclasses

    import jax
    import jax.numpy as jnp

    from fused_rec.text.encoders.layers import as_bits
    from fused_rec.text.encoders.registry import apply_encoder, apply_packed, encoder, family, packs

    kind, dtype = family(job["config"]), jnp.dtype(job["compute_dtype"])
    config = dataclasses.replace(kind.read(job["config"]), compute_dtype=job["compute_dtype"])
    sample = jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), bool)
    shapes = jax.eval_shape(encoder(config).init, jax.random.key(0), *sample)["params"]
    some = (0.02 * np.random.default_rng(0).standard_normal(1 << 20, np.float32)).astype(dtype)

    def weights(path, leaf):  # repeats a million numbers: billions take minutes to draw
        return np.ones(leaf.shape, dtype) if path[-1].key == "scale" else np.resize(some, leaf.shape)

    params = jax.device_put(as_bits(jax.tree_util.tree_map_with_path(weights, shapes)))
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (job["texts"], job["length"]), np.int32)
    if packs(config):
        starts = np.arange(0, ids.size + 1, job["length"], dtype=np.int32)
        given = jax.device_put((ids.ravel(), starts))
        return lambda number: np.asarray(apply_packed(params, *given, config, kind.pooling, True))
    given = jax.device_put((ids, np.ones(ids.shape, bool)))
    return lambda number: np.asarray(apply_encoder(params, *given, config, kind.pooling, True))


def device(job: Job) -> dict[str, object]:
    """The default device of JAX."""
    import jax

    first = jax.devices()[0]
    backend = first.platform
    if backend == "gpu":  # which JAX_PLATFORMS does not name
        backend = "rocm" if "rocm" in first.client.platform_version.lower() else "cuda"
    return {
        **{"platform": first.platform, "kind": first.device_kind, "count": jax.device_count()},
        "jax_platforms": "cpu" if backend == "cpu" else f"{backend},cpu",
    }


def _graph(arrays: Arrays):
    """The interactions in both directions, without text."""
    from fused_rec.graph.build import bidirectional_edges
    from fused_rec.graph.device_graph import device_graph
    from fused_rec.graph.hetero import hetero_graph
    from fused_rec.graph.schema import INTERACTED_BY, INTERACTS, ITEM, NO_TEXT_DIM, USER

    n_users, n_items = map(int, arrays["shape"])
    counts = {USER: n_users, ITEM: n_items}
    relations = bidirectional_edges(INTERACTS, INTERACTED_BY, arrays["user"], arrays["item"], counts)
    return device_graph(hetero_graph(counts, relations, np.zeros((n_users + n_items, NO_TEXT_DIM), np.float32)))


def _vectors(arrays: Arrays):
    import jax.numpy as jnp

    n_users = int(arrays["shape"][0])
    return jnp.asarray(arrays["rows"][:n_users]), jnp.asarray(arrays["rows"][n_users:])


def _dot(users, items, batch):
    return users[batch] @ items.T


SHOWN = 1000  # users, and items, whose sums are compared

TASKS = {
    "step": (("fused_rec.training.sharding", "fused_rec.studies.variants"), step),
    "learn": (("fused_rec.training.sharding",), learn),
    "fused_step": (("fused_rec.training.sharding",), fused_step),
    "rank": (("fused_rec.evaluation.ranking",), rank),
    "rank_index": (("faiss", "fused_rec.serving.approximate"), rank_index),
    "recommend": (("fused_rec.run",), recommend),
    "measure": (("fused_rec.evaluation.ranking",), measure),
    "encode": (("fused_rec.text.encode",), encode),
    "propagate": (("fused_rec.graph.spmm", "fused_rec.graph.build"), propagate),
    "copy": (("jax",), copy),
    "multiply": (("jax",), multiply),
    "encode_shape": (("fused_rec.text.encoders.registry",), encode_shape),
}

if __name__ == "__main__":
    keep_memory()  # as every command does
    answer(TASKS, ("jax", "jaxlib", "flax", "optax", "numpy"), device)
