"""What does not fit is refused before it begins: real limits of real processes, and control groups as files."""

import importlib.util
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import numpy as np
import pytest

from fused_rec.memory import InsufficientMemoryError, available_memory, require_memory, size

# Imports come first, as they take address space too; then so many bytes more are allowed.
LIMITED = """
import re, resource, sys, time
import numpy as np
from fused_rec.memory import InsufficientMemoryError
from fused_rec.baselines import factors, neighbors, linear
from fused_rec.baselines.neighbors import Interactions
import jax; jax.devices()

def limit(more):
    taken = int(re.search(r"VmSize:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
    resource.setrlimit(resource.RLIMIT_AS, (taken + more, resource.RLIM_INFINITY))

def seen(n_users, n_items, n=1000):
    rng = np.random.default_rng(0)
    words = np.ones((n_items, 2), np.float32)
    return Interactions(rng.integers(0, n_users, n), rng.integers(0, n_items, n), n_users, n_items, None, words)
"""
LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits as Linux has them")


def limited(code: str) -> str:
    """What the code prints in a process of its own."""
    program = [sys.executable, "-c", LIMITED + textwrap.dedent(code)]
    # One heap for all threads: a thread of JAX's that first allocates after `limit` would take 64 MB of it for its own.
    environment = os.environ | {"MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(program, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


# Computations, and the GB that each needs.
TOO_LARGE = {
    "linear.ease(seen(60_000, 60_000), l2=100.0)": 28.8,  # 8 bytes an element: weights, and on the device
    "linear.ease(seen(30_000, 60_000), l2=100.0)": 14.4,  # the same of scores, users being fewer
    "linear.text_ease(seen(60_000, 60_000), l2=100.0, l2_text=30.0, l2_words=10.0)": 28.8,
    "linear.text_ease(seen(30_000, 60_000), l2=100.0, l2_text=30.0, l2_words=10.0)": 18.0,
    "linear.gf_cf(seen(60_000, 60_000), rank=16, alpha=1.0)": 28.8,
    "factors.singular_vectors(seen(60_000, 60_000), 1024)": 3.1,
}
if importlib.util.find_spec("implicit"):
    TOO_LARGE["neighbors.als(seen(3_000_000, 60_000), factors=64, regularization=1.0, alpha=10.0, seed=0)"] = 1.6


@LINUX
def test_what_does_not_fit_is_refused_before_it_begins():
    said = limited(
        f"""
        limit(1_500_000_000)
        for call in {list(TOO_LARGE)}:
            began = time.monotonic()
            try:
                eval(call)
            except InsufficientMemoryError as error:
                print(error)
            print(time.monotonic() - began)
        """
    ).splitlines()
    assert len(said) == 2 * len(TOO_LARGE), said
    for (call, need), line, seconds in zip(TOO_LARGE.items(), said[::2], said[1::2], strict=True):
        assert f": needs {need} GB of memory, " in line and " available; " in line, (call, line)
        assert float(seconds) < 2, call


@LINUX
def test_what_fits_is_computed_under_the_same_limit():
    said = limited(
        """
        data = seen(3000, 2500, 20_000)
        whole = linear.ease(data, l2=100.0)(np.arange(3))
        limit(600_000_000)
        for _ in range(4):  # what one has freed is there for the next
            assert np.array_equal(whole, linear.ease(data, l2=100.0)(np.arange(3)))
        print("the same")
        """
    )
    assert said == "the same\n"


@LINUX
def test_what_the_heap_keeps_counts_as_available():
    said = limited(
        """
        from fused_rec.distributed.devices import keep_memory
        from fused_rec.memory import require_memory
        keep_memory()
        limit(1_200_000_000)
        blocks = [np.ones(100_000_000, np.uint8) for _ in range(8)]
        last = np.ones(50_000_000, np.uint8)  # on top of the heap, which cannot shrink below
        try:
            require_memory(800_000_000, "it", "wait")
        except InsufficientMemoryError as error:
            print("refused")
        del blocks
        require_memory(800_000_000, "it", "wait")
        print("granted")
        """
    )
    assert said == "refused\ngranted\n"


def _write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(content)


def _proc(folder: Path, groups: str, available: int = 8_000_000) -> Path:
    _write(folder, meminfo=f"MemTotal: 16000000 kB\nMemFree: 1000 kB\nMemAvailable: {available} kB\n")
    _write(folder / "self", cgroup=groups)
    return folder


def test_the_least_of_machine_and_control_groups_counts(tmp_path):
    proc, groups = _proc(tmp_path / "proc", "0::/a/b\n"), tmp_path / "cgroup"
    assert available_memory(proc, groups) == 8_192_000_000  # no group sets a limit
    _write(groups / "a" / "b", memory__max="max\n", memory__high="max\n", memory__current="9\n")
    assert available_memory(proc, groups) == 8_192_000_000
    stat = "anon 1\nactive_file 300\ninactive_file 500\n"
    _write(groups / "a", memory__max="3000000000\n", memory__current="1000000800\n", memory__stat=stat)
    assert available_memory(proc, groups) == 2_000_000_000  # of the parent, whose pages of files can be taken back
    _write(groups / "a" / "b", memory__high="1000\n", memory__current="5000\n")
    assert available_memory(proc, groups) == 0


def test_control_groups_of_version_1_in_a_container(tmp_path):
    proc, groups = _proc(tmp_path / "proc", "5:cpu:/docker/1\n4:memory:/docker/1\n0::/\n"), tmp_path / "cgroup"
    unlimited = {"memory__limit_in_bytes": "9223372036854771712\n", "memory__usage_in_bytes": "5\n"}
    _write(groups / "memory", **unlimited)
    assert available_memory(proc, groups) == 8_192_000_000
    # The path is the host's: inside the container its own group stands at the root.
    stat = "cache 7\nactive_file 1\ntotal_active_file 100\ntotal_inactive_file 100\n"
    limited = {"memory__limit_in_bytes": "2000000000\n", "memory__usage_in_bytes": "500000200\n", "memory__stat": stat}
    _write(groups / "memory", **limited)
    assert available_memory(proc, groups) == 1_500_000_000


def test_the_message_says_need_and_remedy():
    with pytest.raises(InsufficientMemoryError, match=r"^it: needs 1,000,000.0 GB of memory, .* available; wait$"):
        require_memory(10**15, "it", "wait")
    require_memory(0, "nothing", "")
    assert [size(999_999_999), size(14_400_000_000)] == ["1,000 MB", "14.4 GB"]


@LINUX
def test_a_comparison_leaves_out_what_does_not_fit(tmp_path):
    """20,000 customers with three of 20,000 products each: 3.2 GB for EASE, of the 2.5 GB that are allowed."""
    tables = tmp_path / "tables"
    rows = "".join(f"u{u},i{(u * step) % 20_000}\n" for u in range(20_000) for step in (1, 3, 7))
    _write(tables, interactions__csv="user_id,item_id\n" + "".join(sorted(set(rows.splitlines(keepends=True)))))
    program = """
    import sys
    from experiments import compare
    limit(2_500_000_000)
    sys.argv = sys.argv[1:]
    compare.start(compare.main)
    """
    out = tmp_path / "out"
    flags = [
        f"--config.data.path={tables}",
        "--config.model.variant=graph",
        "--variants=popularity,ease",
        "--num_seeds=1",
    ]
    command = [sys.executable, "-c", LIMITED + textwrap.dedent(program), "compare"]
    command += ["--config=experiments/configs/tables.py", f"--out={out}", "--config.graph.text_knn=0", *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((out / "compare.json").read_text())
    assert [entry["variant"] for entry in report["summary"]] == ["popularity"]
    assert "GB of memory" in report["skipped"]["ease"] and "data.k_core" in report["skipped"]["ease"]
    assert not report["failures"]


@LINUX
def test_other_steps_are_refused_before_they_begin():
    """What each says stands in the order of the calls; none of them takes memory that it has not got."""
    said = limited(
        """
        import numpy as np
        from fused_rec.config import Config, ModelConfig
        from fused_rec.data.dataset import Dataset, empty_reviews, empty_ties
        from fused_rec.evaluation.item_sets import item_sets
        from fused_rec.evaluation.ranking import RankingSpec, rank
        from fused_rec.evaluation.significance import paired_bootstrap
        from fused_rec.graph.schema import INTERACTED_BY, INTERACTS
        from fused_rec.graph.build import bidirectional_edges, text_knn_edges
        from fused_rec.graph.device_graph import device_graph
        from fused_rec.graph.hetero import hetero_graph
        from fused_rec.training.footprint import require_embedding, require_step
        from fused_rec.serving.recommender import require_table
        from fused_rec.training.train_step import GraphInputs
        import pyarrow as pa
        import jax.numpy as jnp

        def refused(call):
            began = time.monotonic()
            try:
                call()
            except InsufficientMemoryError as error:
                print(error)
            assert time.monotonic() - began < 2

        counts = {"user": 400_000, "item": 100_000}
        one = np.zeros(1, np.int64)
        edges = bidirectional_edges(INTERACTS, INTERACTED_BY, one, one, counts)
        whole = device_graph(hetero_graph(counts, edges, np.zeros((500_000, 1), np.float32)))
        inputs = GraphInputs(whole, np.ones(100_000, bool), np.ones(100_000, np.float32))
        config = Config(model=ModelConfig(variant="graph", dim=1024))
        words = np.broadcast_to(np.float32(1), (3_000_000, 2))
        nobody = item_sets(one[:0], one[:0], 3_000_000)
        scorer = jax.tree_util.Partial(lambda users: jnp.zeros((len(users), 10)))
        ids = pa.table({"user_id": ["u"] * 10, "item_id": ["i"] * 10})
        items = pa.table({"item_id": [str(number) for number in range(1000)]})
        data = Dataset("x", ids, items, ids, empty_reviews(), empty_ties())
        limit(1_500_000_000)
        refused(lambda: require_step(config, inputs))
        refused(lambda: require_embedding(config, inputs))
        refused(lambda: text_knn_edges(words, 100))
        refused(lambda: rank(scorer, np.arange(3_000_000), RankingSpec(nobody, 10), 100))
        refused(lambda: rank(scorer, np.arange(3), RankingSpec(nobody, 100_000_000, batch_size=16), 1))
        refused(lambda: paired_bootstrap(*[np.broadcast_to(np.float32(1), (20, 3_000_000))] * 2))
        refused(lambda: require_table(data, 10_000_000, 1000))
        """
    ).splitlines()
    begin = [
        "training over 500,000 nodes with 1024 dimensions",
        "the embeddings of 400,000 users and 100,000 items",
        "graph.text_knn, 100 neighbors of each of 3,000,000 nodes",
        "the rankings of 3,000,000 users",
        "a ranking of 100,000,000 items for 4 users at a time",  # a power of two
        "a bootstrap of 40 runs over 3,000,000 users",
        "a table of 1,000 products for 10,000,000 customers",
    ]
    assert len(said) == len(begin), said
    for line, first in zip(said, begin, strict=True):
        assert line.startswith(f"{first}: needs ") and " available; " in line, line


@LINUX
def test_neighbors_in_a_small_catalog_need_little():
    """Late fusion tries them after training: a block of the size that large catalogs need would be refused here."""
    shape = limited("""
        small = seen(200, 100)
        limit(300_000_000)
        print(neighbors.nearest_items(small, 20, 0.0).shape)
    """)
    assert shape == "(100, 100)\n"


def test_blocks_of_neighbors_change_nothing(monkeypatch):
    from fused_rec.baselines import neighbors

    rng = np.random.default_rng(0)
    seen = neighbors.Interactions(rng.integers(0, 40, 400), rng.integers(0, 30, 400), 40, 30)
    users = jax.numpy.arange(40, dtype=np.int32)
    whole = np.asarray(neighbors.item_knn(seen, num_neighbors=5, shrink=1.0)(users))
    monkeypatch.setattr(neighbors, "SIMILARITIES", 50)
    assert np.array_equal(whole, neighbors.item_knn(seen, num_neighbors=5, shrink=1.0)(users))
