"""The environment every test runs in. JAX reads it once, so it is set before anything imports JAX."""

import ctypes
import gc
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tempfile

import preloaded
import pytest

if "jax" in sys.modules:
    raise RuntimeError(
        "a pytest plugin imported JAX before tests/conftest.py could choose its devices; disable it with -p no:NAME"
    )

# Four devices on one host, so that multi-device code runs everywhere the tests do; a test may start a child with more.
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "4")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# [U] + [U, K] is a forgotten axis far more often than a wish.
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
# A test that needs the network is a broken test.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# What tests compile runs for microseconds: it is compiled quickly, and once for all files and processes of a worker.
# XLA takes half the time with these two flags, of which later versions have the second alone and end a process that
# gives an unknown one. Each worker has a folder of its own, since JAX does not write programs atomically. The first
# process removes all.
QUICK_COMPILATION = "--xla_cpu_parallel_codegen_split_count=1"
if importlib.metadata.version("jaxlib").startswith("0.10."):
    QUICK_COMPILATION = f"--xla_cpu_use_fusion_emitters=false {QUICK_COMPILATION}"
if os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1") == "1":
    if QUICK_COMPILATION not in (flags := os.environ.get("XLA_FLAGS", "")):
        os.environ["XLA_FLAGS"] = f"{QUICK_COMPILATION} {flags}".strip()
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
PROGRAMS = "JAX_COMPILATION_CACHE_DIR"
MADE = "" if PROGRAMS in os.environ else tempfile.mkdtemp(prefix="fused_rec-tests-")
os.environ[PROGRAMS] = os.path.join(MADE or os.environ[PROGRAMS], os.environ.get("PYTEST_XDIST_WORKER", ""))
# As of commands (fused_rec/commands/launch.py); `release_compiled_programs` collects all after each file.
gc.set_threshold(10_000, 20, 10)


def pytest_unconfigure() -> None:
    """Ends the processes of `preloaded`, and removes the folder of compiled programs where this process has made it."""
    preloaded.close()
    if MADE:
        shutil.rmtree(MADE, ignore_errors=True)


# The files that take longest, longest first. Workers take whole files in this order, so that none is left with a long
# one at the end (`make test`).
LONGEST = (
    *("trainer", "processes", "tour", "notebooks", "serving", "commands", "train_step", "wandb", "backtest", "density"),
    *("token_attribution", "finetune", "evaluate", "compare", "neighbor_sampling", "leave_one_out", "pages_in_browser"),
    *("sources", "benchmark", "init_from", "tune", "approximate", "write_rankings", "late_pairs", "packaging"),
    *("memory", "anonymity", "counterfactual", "late_fusion", "run", "model", "docs", "lazy_adam", "doctor", "serve"),
    *("storage", "review_dropout", "baseline_runs", "tasks", "diff", "pair_score", "encode", "examples"),
    *("decomposition", "leakage", "export_bundle", "api", "malformed_inputs", "spmm", "reference"),
)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Moves the tests of `LONGEST` to the front."""
    places = {f"test_{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


def pytest_collection_finish() -> None:
    """Leaves what the test files imported out of later garbage collections: it stays to the end."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def release_compiled_programs():
    """Frees the compiled programs of a file: no other file runs them, and a worker would grow to several GB."""
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()
    gc.collect()
    if sys.platform == "linux":
        getattr(ctypes.CDLL(None), "malloc_trim", int)(0)  # glibc returns freed memory to the system only when asked


@pytest.fixture
def full_disk(tmp_path):
    """A file system of 2 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)
