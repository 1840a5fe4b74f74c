"""Benchmarks fused_rec against third-party packages, in one run.

    FUSED_REC_DATA=DIR python -m experiments.benchmark --suite=train --competitors=ENVIRONMENTS --out=train.json

Suites: train (a LightGCN step, memory, import to first step), evaluate (ranking of all items), encode (texts per second
of a language model), scale (a step with 1e5 to 1e7 edges), serve (recommendations to one user, by items and width),
index (users per second and recall of approximate ranking), quality (validation metrics by wall time),
accelerator (all of these on the default device of JAX, a GPU if it has one, against the floors of the device).
Each side runs in its own process, competitors in environments of their own (experiments/competitors/*.txt). Sides
alternate, and medians are reported. Run nothing else on the machine. docs/SPEED.md describes what is measured and how.
"""

import contextlib
import dataclasses
import importlib.util
import json
import os
import platform
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from experiments import competitors
from experiments.competitors import ALS, OURS, PYG, RECBOLE, SENTENCES, TORCH, Side, accelerator
from experiments.competitors.protocol import not_held
from fused_rec.commands.launch import start
from fused_rec.commands.places import DEFINE_path, existing_folder, written_file_anywhere
from fused_rec.storage import write_figure, write_file

SUITES = ("train", "encode", "evaluate", "scale", "serve", "index", "quality", "accelerator")
DATA = {
    "train": ["lastfm", "gowalla", "generated:7947x25975x1e5"],  # the last has the shape of CiteULike-t
    "evaluate": ["lastfm", "gowalla"],
    "encode": ["amazon", "stocknet"],
    "scale": ["generated:1e5", "generated:1e6", "generated:1e7"],
    "serve": ["generated:1e4", "generated:1e5"],
    "index": ["generated:1e4x1e5x1e6"],
    "quality": ["gowalla"],
    "accelerator": list(accelerator.GROUPS),
}
SUITE = flags.DEFINE_enum("suite", None, SUITES, "What is measured.", required=True)
OUT = DEFINE_path("out", written_file_anywhere, "JSON file of the rows; a plot comes beside it.", required=True)
NAMES = flags.DEFINE_list(
    "data",
    None,
    "Datasets: lastfm, gowalla, generated:EDGES or generated:USERSxITEMSxEDGES; of encode amazon or stocknet; of serve "
    "generated:ITEMS; of index also the folder of an export; of accelerator some of "
    f"{', '.join(accelerator.GROUPS)}. None: those of the suite.",
)
PEERS = DEFINE_path(
    "competitors", existing_folder, "Folder of the peers' environments: DIR/torch/bin/python and so on."
)
REPEATS = flags.DEFINE_integer(
    "repeats", 10, "Measured calls in each visit; each side is visited twice.", lower_bound=1
)
WARMUP = flags.DEFINE_integer("warmup", 3, "Calls after the first that are not counted.", lower_bound=0)
THREADS = flags.DEFINE_integer("threads", 2, "Cores that every side may use.", lower_bound=1)
SIZE = flags.DEFINE_float(
    "size",
    None,
    "Of accelerator: share of users, items, interactions, texts and bytes. None: 1, and .1 on a CPU.",
    lower_bound=1e-4,
    upper_bound=1,
)
SECONDS = flags.DEFINE_float("seconds", 180.0, "Of quality: training time of each side.", lower_bound=0.1)
TEXTS = flags.DEFINE_integer("texts", 2000, "Texts that are encoded.", lower_bound=1)

DIM, ROUNDS, BATCH, LEARNING_RATE = 64, 3, 2048, 1e-3
STEP = (
    f"{BATCH:,} pairs (ours: as many rows of one user, one positive, one negative), {ROUNDS} rounds, {DIM} dimensions"
)
FUSED = "512 users, all their positives, softmax over all items, two branches of 128 dimensions, 640 columns of text"
RANKING = f"every customer, the whole catalogue, {DIM} dimensions, known items left out"
TYPES = "float32", "bfloat16"  # of products, of a fused step and of encoding
K, RANKED = 20, 1000  # ranks; users whose scores a peer holds at a time
SERVED, WIDTHS = 10_000, (64, 256, 1024)  # users and columns of a vector, of serve
PROBES = (1, 4, 16, 64)  # lists that the index reads
POINTS = 12  # of a curve of quality
LIGHTGCN_DEVIATION = 0.1  # of the first embeddings of LightGCN's authors
LEARNED = {  # settings of each peer in the suite `quality` (docs/SPEED.md tells what was tried)
    PYG: {"learning_rate": 1e-2, "pairs": BATCH},
    TORCH: {"learning_rate": 1e-2, "pairs": BATCH},
    ALS: {"regularization": 1.0, "alpha": 50.0},
}
BATCHES = 32  # distinct batches, taken in turns
SUFFIXES = {"seconds": "", "peak_mb": ": peak memory", "compile_s": ": compilation", "load_s": ": loading"}
CACHE = "JAX_COMPILATION_CACHE_DIR"
UNCACHED = {"JAX_ENABLE_COMPILATION_CACHE": "0"}
EVERYTHING = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Interactions: the training split, sorted by (user, item), and the test split.

    Attributes:
      n_users: number of users.
      n_items: number of items.
      user: users of the training interactions.
      item: their items.
      test_user: users of the test interactions.
      test_item: their items.
    """

    n_users: int
    n_items: int
    user: np.ndarray
    item: np.ndarray
    test_user: np.ndarray
    test_item: np.ndarray


@dataclasses.dataclass(frozen=True)
class Measured:
    """Result of one comparison.

    Attributes:
      name: name of the comparison.
      figures: measured values by side.
      left_out: reason by side that was not measured.
      checks: what each side's result has in common with ours, in words.
      setting: description of the setting.
      work: work per call, to compute a rate; 0 = report the time.
      unit: of the rate or time.
    """

    name: str
    figures: Mapping[Side, Mapping[str, Any]]
    left_out: Mapping[Side, str]
    checks: Mapping[Side, str]
    setting: str  # what a call does, alike on all sides
    work: float = 0
    unit: str = "ms"


def read_pairs(name: str) -> Pairs:
    """Reads the published split of a dataset.

    Args:
      name: `data.name`.

    Returns:
      The interactions.

    Raises:
      ValueError: the name is unknown.
    """
    if name.startswith("generated:"):
        return generated(*(int(float(part)) for part in name.removeprefix("generated:").split("x")))
    readers = {"lastfm": "lastfm_lightgcn", "gowalla": "lightgcn_text"}
    if name not in readers:
        raise ValueError(f"--data names {name!r}; it must be {', '.join(readers)} or generated:SIZES")
    from fused_rec.config import DataConfig
    from fused_rec.data.dataset import column
    from fused_rec.data.sources.registry import load

    dataset = load(DataConfig(name=readers[name]))
    held_out = np.array(dataset.interactions.column("split").to_pylist()) == "test"
    user, item = (column(dataset.interactions, end) for end in ("user", "item"))
    order = np.lexsort((item[~held_out], user[~held_out]))
    train = user[~held_out][order], item[~held_out][order]
    return Pairs(dataset.n_users, dataset.n_items, *train, user[held_out], item[held_out])


def generated(*sizes: int) -> Pairs:
    """Generates distinct pairs with a fixed seed, without other sizes on average 30 per user and 60 per item.

    Another pair in ten is held out. Items are sampled by a power of a uniform number, so that the most popular tenth
    has half of the pairs.

    Args:
      *sizes: number of pairs, about; or users, items and pairs.

    Returns:
      The interactions.
    """
    rng = np.random.default_rng(0)
    *nodes, edges = sizes
    n_users, n_items = nodes or (max(edges // 30, 8), max(edges // 60, 8))
    user = rng.integers(0, n_users, edges)
    item = (n_items * rng.random(edges) ** 3.3).astype(np.int64)
    user, item = np.divmod(np.unique(user * n_items + item), n_items)
    held_out = rng.random(len(user)) < 1 / 11
    ends = (end[part].astype(np.int32) for part in (~held_out, held_out) for end in (user, item))
    return Pairs(n_users, n_items, *ends)


def batches_of(pairs: Pairs, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Samples S batches of B (user, positive item, negative item), users uniformly among those with interactions.

    A user may occur twice in a batch, as in the published training; all sides get the same batches.

    Args:
      pairs: the interactions.
      rng: the random generator.

    Returns:
      Arrays [S, B] by name.
    """
    start = np.searchsorted(pairs.user, np.arange(pairs.n_users + 1))
    active = np.flatnonzero(np.diff(start))
    user = rng.choice(active, (BATCHES, BATCH))
    count = np.diff(start)[user]
    item = pairs.item[start[user] + (rng.random(user.shape) * count).astype(np.int64)]
    keys = pairs.user.astype(np.int64) * pairs.n_items + pairs.item
    other = not_held(user, keys, pairs.n_items, rng)
    return {f"batch_{name}": part.astype(np.int32) for name, part in (("user", user), ("item", item), ("other", other))}


def smoothed(pairs: Pairs, rows: np.ndarray) -> np.ndarray:
    """Averages random embeddings over the layers of LightGCN, without the input layer.

    These untrained embeddings rank better than chance, so a metric differs if two packages compute it differently.

    Args:
      pairs: the interactions.
      rows: random embeddings of users and items.

    Returns:
      The averaged embeddings.
    """
    from scipy import sparse

    ends, n_nodes = (pairs.user, pairs.item + pairs.n_users), len(rows)
    held = sparse.coo_matrix((np.ones(len(pairs.user), np.float32), ends), shape=(n_nodes, n_nodes)).tocsr()
    scale = sparse.diags(np.maximum(np.asarray((held + held.T).sum(1)).ravel(), 1) ** -0.5)
    matrix = (scale @ (held + held.T) @ scale).astype(np.float32).tocsr()
    every = [rows]
    for _ in range(ROUNDS):
        every.append(matrix @ every[-1])
    return np.stack(every[1:]).mean(axis=0, dtype=np.float32)


def write_arrays(pairs: Pairs, folder: Path, *, final: bool, deviation: float = 1.0) -> Path:
    """Writes the arrays of a job, as `experiments/competitors/protocol.py` describes them.

    Args:
      pairs: the interactions.
      folder: output folder.
      final: whether the embeddings are for ranking instead of training.
      deviation: standard deviation of the embeddings.

    Returns:
      The file.
    """
    rng = np.random.default_rng(0)
    rows = np.float32(deviation) * rng.standard_normal((pairs.n_users + pairs.n_items, DIM), np.float32)
    file = folder / "arrays.npz"
    arrays: dict[str, Any] = {
        "shape": np.array([pairs.n_users, pairs.n_items]),
        "rows": smoothed(pairs, rows) if final else rows,
        **{name: getattr(pairs, name) for name in ("user", "item", "test_user", "test_item")},
        **batches_of(pairs, rng),
    }
    np.savez(file, **arrays)
    return file


def write_atomic(pairs: Pairs, folder: Path) -> None:
    """Writes the interactions as RecBole's atomic files."""
    (folder / "pairs").mkdir()
    for part, ends in (("train", (pairs.user, pairs.item)), ("test", (pairs.test_user, pairs.test_item))):
        file = folder / "pairs" / f"pairs.{part}.inter"
        np.savetxt(file, np.stack(ends, 1), "%d", "\t", header="user_id:token\titem_id:token", comments="")


@contextlib.contextmanager
def workplace() -> Iterator[Path]:
    """Yields a temporary folder for jobs and results."""
    with tempfile.TemporaryDirectory(prefix="fused_rec_benchmark_") as folder:
        yield Path(folder)


def job_of(folder: Path, graph_inputs: str, arrays: Path, **settings: Any) -> dict[str, Any]:
    """Returns a job with the settings of the flags and of the task."""
    return {
        **{"task": graph_inputs, "folder": str(folder), "arrays": str(arrays), "atomic": str(folder)},
        **{"repeats": REPEATS.value, "warmup": WARMUP.value, "threads": THREADS.value},
        **{"num_layers": ROUNDS, "learning_rate": LEARNING_RATE, "k": K, "batch": RANKED},
        **settings,
    }


def compared(
    name: str,
    sides: Sequence[Side],
    job: Mapping[str, Any],
    check,
    setting: str,
    *,
    variables: Mapping[str, str] | None = None,
    visits: int = 1,
    **shown: Any,
) -> Measured:
    """Runs our side and the installed competitors; missing or failed ones are reported in the rows.

    Args:
      name: name of the comparison.
      sides: the competitors.
      job: settings of the job.
      check: called with our result and that of a side; describes in words what they have in common.
      setting: description of the setting.
      variables: environment variables of the processes.
      visits: number of processes per side.
      **shown: further fields of `Measured`.

    Returns:
      The measurements.
    """
    folder = None if PEERS.value is None else Path(PEERS.value)
    found = {side: competitors.python_of(side, folder) for side in (OURS, *sides)}
    left_out = {
        side: f"left out: its environment is not there; {competitors.remedy(side, folder)}"
        for side, python in found.items()
        if python is None
    }
    there = {side: python for side, python in found.items() if python is not None}
    print(f"{name}: {', '.join(side.name for side in there)}", flush=True)
    answers, failed = competitors.alternate(there, job, variables or {}, visits)
    left_out |= {side: f"left out: {why}" for side, why in failed.items()}
    for side, why in left_out.items():
        print(f"  {side.name} {why}", flush=True)
    results = {
        side: np.load(Path(job["folder"], f"result_{number}.npy"), allow_pickle=False)
        for number, side in enumerate(there)
        if side in answers
    }
    checks = {side: check(results[OURS], result) for side, result in results.items() if side != OURS}
    return Measured(
        name, {side: competitors.figures(of) for side, of in answers.items()}, left_out, checks, setting, **shown
    )


def rows_of(measured: Measured, what: str, of_sample=None, unit: str = "", *, higher: bool = False) -> Iterator[dict]:
    """Yields a row per competitor of one figure (or one row without competitors).

    Args:
      measured: the measurements.
      what: name of the figure.
      of_sample: converts a sample to the figure.
      unit: of the figure.
      higher: whether larger is better; the ratio says how many times better our side is.

    Yields:
      The rows.
    """
    figures, convert = measured.figures, of_sample or (lambda value: value)
    ours = competitors.spread([convert(sample) for sample in figures[OURS][what]])
    common = {
        "name": measured.name + SUFFIXES[what],
        "ours": ours[1],
        "unit": unit or measured.unit,
        "setting": measured.setting,
        "higher_is_better": higher,
    }
    own = {"ours_range": [ours[0], ours[2]], "samples": len(figures[OURS][what]), **machine()}
    for side in [side for side in figures if side != OURS]:
        theirs = competitors.spread([convert(sample) for sample in figures[side][what]])
        ratio = ours[1] / theirs[1] if higher else theirs[1] / ours[1] if ours[1] else None
        versions = {"ours": figures[OURS]["versions"], "peer": figures[side]["versions"]}
        details = {"peer_range": [theirs[0], theirs[2]], "note": measured.checks[side], "versions": versions}
        yield {**common, "peer": theirs[1], "peer_name": side.name, "ratio": ratio, **own, **details}
    for side in measured.left_out if what == "seconds" else ():
        absent = {"note": measured.left_out[side], "versions": {"ours": figures[OURS]["versions"]}}
        yield {**common, "peer": None, "peer_name": side.name, "ratio": None, **own, **absent}
    if len(figures) == 1 and (what != "seconds" or not measured.left_out):
        alone = {"note": "no peer", "versions": {"ours": figures[OURS]["versions"]}}
        yield {**common, "peer": None, "peer_name": None, "ratio": None, **own, **alone}


def all_rows(measured: Measured, *also: str) -> list[dict[str, Any]]:
    """Returns the rows of the call times, and of the other figures in `also`: compile_s, peak_mb, load_s."""
    work = measured.work
    convert = (lambda second: work / second) if work else (lambda second: 1e3 * second)
    rows = [*rows_of(measured, "seconds", convert, higher=bool(work))]
    for what in also:
        rows += rows_of(measured, what, unit="MiB" if what == "peak_mb" else "s")
    return rows


def machine() -> dict[str, Any]:
    """Describes the hardware and its load (one-minute average, including this run)."""
    names = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    total = [int(line.split()[1]) / 2**20 for line in _lines("/proc/meminfo") if line.startswith("MemTotal")]
    processor = names[0] if names else platform.processor() or platform.machine()
    memory = f", {total[0]:.0f} GiB" if total else ""
    hardware = f"{THREADS.value} of {os.cpu_count()} cores of {processor}{memory}, {platform.system()}"
    return {"hardware": hardware, "load": round(os.getloadavg()[0], 2)}


def _lines(file: str) -> list[str]:
    return Path(file).read_text(encoding="utf-8").splitlines() if Path(file).exists() else []


def same_loss(ours: np.ndarray, theirs: np.ndarray) -> str:
    """Compares the losses of the first step, from equal embeddings and pairs; the loss of some packages includes L2."""
    if np.isnan(theirs):
        return "one pass over all pairs; it has another loss"
    return f"first loss {float(ours):.4f} and {float(theirs):.4f}"


def same_lists(ours: np.ndarray, theirs: np.ndarray) -> str:
    """Compares the ranked lists rank by rank."""
    return f"{np.mean(ours == theirs):.2%} of ranks hold the same item"


def same_value(ours: np.ndarray, theirs: np.ndarray) -> str:
    """Compares the metric as both sides compute it."""
    return f"recall@{K} {float(ours):.5f} and {float(theirs):.5f}"


def same_rows(ours: np.ndarray, theirs: np.ndarray) -> str:
    """Returns the largest difference of two arrays, relative to the largest number."""
    return f"differ by {abs(ours - theirs).max() / abs(ours).max():.1e} of the largest"


def same_vectors(ours: np.ndarray, theirs: np.ndarray) -> str:
    """Returns the smallest cosine between the two vectors of a text."""
    lengths = np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
    return f"cosine at least {((ours * theirs).sum(1) / lengths).min():.5f}"


CHECKS = {  # by task of the suite `accelerator`
    "propagate": same_rows,
    "step": same_loss,
    "rank": same_lists,
    "encode_shape": lambda ours, theirs: "random weights, others on each side",
}


def train(names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Measures LightGCN: step, compilation, memory, loading, import to first step, and an epoch; and the fused step."""
    for name in names:
        with workplace() as folder:
            pairs = read_pairs(name)
            arrays = write_arrays(pairs, folder, final=False)
            write_atomic(pairs, folder)
            sides, job = (PYG, TORCH, RECBOLE), job_of(folder, "step", arrays)
            measured = compared(f"step, {name}", sides, job, same_loss, STEP)
            yield from all_rows(measured, "compile_s", "peak_mb", "load_s")
            for dtype in TYPES:
                fused_job = job_of(folder, "fused_step", arrays, compute_dtype=dtype)
                fused = compared(f"fused step in {dtype}, {name}", (), fused_job, same_loss, FUSED)
                yield from all_rows(fused, "compile_s", "peak_mb", "load_s")

            once = {**job, "repeats": 1, "warmup": 0}
            warm = {CACHE: str(folder / "cache"), **EVERYTHING}
            competitors.visit(OURS, Path(sys.executable), {**once, "result": str(folder / "warm.npy")}, warm)
            visits = -(-REPEATS.value // 2)
            first = compared(
                f"import to first step, {name}", sides, once, same_loss, STEP, variables=warm, visits=visits
            )
            begun = {side: {**of, "seconds": of["first_s"]} for side, of in first.figures.items()}
            yield from rows_of(dataclasses.replace(first, figures=begun, unit="s"), "seconds")

            steps = -(-len(pairs.user) // BATCH)
            passes = compared(f"a pass over all pairs, {name}", (ALS,), job, same_loss, STEP)
            every = {**passes.figures, OURS: {**passes.figures[OURS]}}
            every[OURS]["seconds"] = [steps * second for second in every[OURS]["seconds"]]
            for row in rows_of(dataclasses.replace(passes, figures=every, unit="s"), "seconds"):
                yield {**row, "note": f"{row['note']}; ours: {steps} steps at the time of one"}


def evaluate(names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Measures users per second: their top 20 of all items, without and with metrics."""
    for name in names:
        with workplace() as folder:
            pairs = read_pairs(name)
            arrays = write_arrays(pairs, folder, final=True)
            write_atomic(pairs, folder)
            job = job_of(folder, "rank", arrays)
            rate = {"work": pairs.n_users, "unit": "users/s"}
            ranked = compared(f"ranking, {name}", (TORCH, ALS), job, same_lists, RANKING, **rate)
            yield from all_rows(ranked, "compile_s", "peak_mb")
            job = job_of(folder, "measure", arrays)
            rate["work"] = len(np.unique(pairs.test_user))
            valued = compared(f"ranking with metrics, {name}", (RECBOLE,), job, same_value, RANKING, **rate)
            yield from all_rows(valued, "compile_s", "peak_mb")


def encode(names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Measures tokens per second of real texts in MiniLM with its tokenizer; counts special tokens, no padding."""
    from fused_rec.config import DataConfig, TextConfig
    from fused_rec.data.sources.registry import load
    from fused_rec.text.encode import count_tokens
    from fused_rec.text.pretrained import MINILM_PACKAGE, open_model

    spec = importlib.util.find_spec(MINILM_PACKAGE)
    model = TextConfig().model
    tokenizer = open_model(model)  # names the remedy where the package is missing
    folder_of_model = str(Path(spec.submodule_search_locations[0]) / "model") if spec else ""  # pyright: ignore
    for name in names:
        with workplace() as folder:
            review_texts = load(DataConfig(name=name)).reviews.column("text").to_pylist()
            texts = sorted(set(review_texts))
            texts = [texts[i] for i in np.random.default_rng(0).permutation(len(texts))[: TEXTS.value]]
            (folder / "texts.json").write_text(json.dumps(texts), encoding="utf-8")
            np.savez(folder / "arrays.npz")
            files = {"texts": str(folder / "texts.json"), "model": model, "model_folder": folder_of_model, "warmup": 0}
            tokens = int(count_tokens(texts, tokenizer).sum())
            for dtype in TYPES:
                job = job_of(folder, "encode", folder / "arrays.npz", **files, compute_dtype=dtype)
                title = f"MiniLM in {dtype}, {name} ({len(texts):,} texts, {tokens / len(texts):.0f} tokens each)"
                rate = {"work": tokens, "unit": "tokens/s"}
                measured = compared(title, (SENTENCES,), job, same_vectors, "all texts once", **rate)
                yield from all_rows(measured, "compile_s", "peak_mb")


def scale(names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Measures step time, memory, and time from arrays on disk to the first step on growing graphs."""
    for name in names:
        with workplace() as folder:
            pairs = read_pairs(name)
            arrays = write_arrays(pairs, folder, final=False)
            title = f"step, {len(pairs.user):,} pairs"
            del pairs  # memory is for the sides
            measured = compared(title, (PYG, TORCH), job_of(folder, "step", arrays), same_loss, STEP)
            yield from all_rows(measured, "peak_mb", "load_s", "compile_s")


def serve(names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Measures a call that recommends to one user, with generated vectors; a name has the number of items."""
    for name in names:
        n_items = int(float(name.removeprefix("generated:")))
        for width in WIDTHS:
            with workplace() as folder:
                np.savez(folder / "arrays.npz")
                sizes = {"n_users": SERVED, "n_items": n_items, "width": width}
                job = {**job_of(folder, "recommend", folder / "arrays.npz", **sizes), "k": 10}
                title = f"one customer, {n_items:,} items, {width} columns"
                measured = compared(title, (), job, same_lists, "10 unseen items of one customer")
                yield from all_rows(measured, "peak_mb", "load_s")


def index(names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Measures approximate ranking by the lists that are read: users per second, time to build it, and recall."""
    from fused_rec.serving.approximate import recalls

    for name in names:
        with workplace() as folder:
            arrays = exported_arrays(Path(name), folder) if Path(name).is_dir() else None
            arrays = arrays or write_arrays(read_pairs(name), folder, final=True)
            with np.load(arrays, allow_pickle=False) as there:
                (n_users, n_items), width = map(int, there["shape"]), there["rows"].shape[1]
            setting = f"every customer, the whole catalogue, {width} columns, known items left out"
            title, rate = f"{n_users:,} users x {n_items:,} items, {name}", {"work": n_users, "unit": "users/s"}
            ranked = compared(f"exact, {title}", (), job_of(folder, "rank", arrays), same_lists, setting, **rate)
            [exact] = all_rows(ranked)
            yield exact
            lists = np.load(folder / "result_0.npy", allow_pickle=False)
            for probes in PROBES:
                job = job_of(folder, "rank_index", arrays, probes=probes)
                found = compared(f"{probes} lists, {title}", (), job, same_lists, setting, **rate)
                recall = recalls(np.load(folder / "result_0.npy", allow_pickle=False), lists)
                note = f"recall@{K} {recall.mean():.4f}, {np.mean(recall == 1):.1%} complete"
                for row in all_rows(found, "load_s"):
                    gain = {"recall": float(recall.mean()), "exact": exact["ours"]} if row["unit"] == "users/s" else {}
                    yield {**row, **gain, "note": note}


def quality(names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Measures validation metrics by wall time since the start of the process, a tenth of the training pairs held out.

    Ours trains as `experiments/configs/gowalla.py` says, the peers by `LEARNED`. Each side is visited once. Evaluation
    is no part of the time; writing vectors is.
    """
    from experiments.configs.gowalla import get_config

    for name in names:
        with workplace() as folder:
            pairs = validation(read_pairs(name))
            arrays = write_arrays(pairs, folder, final=False, deviation=LIGHTGCN_DEVIATION)
            job = job_of(folder, "learn", arrays, warmup=0, repeats=POINTS - 1)
            job |= {"segment": SECONDS.value / POINTS, "config": get_config().to_dict()}
            curves, versions, left_out = {}, {}, {}
            for side in (OURS, *LEARNED):
                python = competitors.python_of(side, None if PEERS.value is None else Path(PEERS.value))
                if python is None:
                    left_out[side] = "left out: its environment is not there"
                    continue
                print(f"{name}: {side.name}", flush=True)
                files = {"snapshots": str(folder / side.name), "result": str(folder / "result.npy")}
                try:
                    answer = competitors.visit(side, python, {**job, **LEARNED.get(side, {}), **files}, UNCACHED)
                    points = [_quality(pairs, folder / f"{side.name}_{number}.npz") for number in range(POINTS)]
                except (competitors.PeerError, ValueError) as error:  # scores of a peer may not be finite
                    if side == OURS:
                        raise
                    left_out[side] = f"left out: {error}"
                    continue
                curves[side], versions[side] = points, answer["versions"]
            yield from _of_curves(name, curves, versions, left_out)


def validation(pairs: Pairs) -> Pairs:
    """Holds out a random tenth of the training pairs, in place of the test pairs."""
    held_out = np.random.default_rng(0).random(len(pairs.user)) < 0.1
    ends = (end[part] for part in (~held_out, held_out) for end in (pairs.user, pairs.item))
    return Pairs(pairs.n_users, pairs.n_items, *ends)


def _quality(pairs: Pairs, file: Path) -> dict[str, float]:
    """Evaluates the vectors of a file: metrics of the held-out pairs, and the seconds at which they were there."""
    import jax

    from fused_rec.evaluation.item_sets import item_sets
    from fused_rec.evaluation.ranking import RankingSpec, evaluate, mean

    with np.load(file, allow_pickle=False) as there:
        users, items = np.split(jax.numpy.asarray(there["rows"]), [pairs.n_users])
        seconds = float(there["seconds"])
    seen, truth = item_sets(pairs.user, pairs.item, pairs.n_users), (pairs.test_user, pairs.test_item)
    scorer = jax.tree_util.Partial(_inner_products, users, items)
    found = mean(evaluate(scorer, RankingSpec(seen, pairs.n_items), item_sets(*truth, pairs.n_users), ks=(K,)))
    return {"seconds": seconds, f"recall@{K}": found[f"recall@{K}"], f"ndcg@{K}": found[f"ndcg@{K}"]}


def _inner_products(users, items, batch):
    return users[batch] @ items.T


def _of_curves(
    name: str, curves: Mapping[Side, list], versions: Mapping[Side, Any], left_out: Mapping[Side, str]
) -> Iterator[dict[str, Any]]:
    """Yields a row per peer: our last value against its last, and both curves."""
    metric, own = f"recall@{K}", curves[OURS]
    common = {"name": f"{metric} on validation, {name}, {SECONDS.value:g} s of training", "unit": metric, **machine()}
    common |= {"higher_is_better": True, "ours": own[-1][metric], "curve": own}
    none = {"peer": None, "peer_name": None, "ratio": None, "peer_curve": None}
    for side in LEARNED:
        if side in left_out:
            absent = {"peer_name": side.name, "note": left_out[side], "versions": {"ours": versions[OURS]}}
            yield {**common, **none, **absent}
            continue
        theirs = curves[side]
        ahead = next((point["seconds"] for point in own if point[metric] >= theirs[-1][metric]), None)
        note = "ours never has as much" if ahead is None else f"ours has as much at {ahead:.0f} s"
        found = {"peer": theirs[-1][metric], "peer_name": side.name, "peer_curve": theirs, "note": note}
        found["versions"] = {"ours": versions[OURS], "peer": versions[side]}
        yield {**common, **found, "ratio": own[-1][metric] / theirs[-1][metric]}


def exported_arrays(bundle: Path, folder: Path) -> Path:
    """Writes the vectors of an exported run as arrays of a job, without seen items."""
    from fused_rec.text.vectors import load_vectors

    users, items = (load_vectors(bundle / f"{side}.safetensors")[0] for side in ("users", "items"))
    file, none = folder / "arrays.npz", np.zeros(0, np.int32)
    np.savez(file, shape=np.array([len(users), len(items)]), rows=np.concatenate([users, items]), user=none, item=none)
    return file


def measure_device(groups: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Measures the default device of JAX: its peaks, the tests on it, and each group of cases against their floors."""
    if unknown := set(groups) - set(accelerator.GROUPS):
        possible = ", ".join(accelerator.GROUPS)
        raise ValueError(f"--data names {min(unknown)!r}; of the suite accelerator it must be some of {possible}")
    with workplace() as folder:
        np.savez(folder / "empty.npz")
        job = {**job_of(folder, "", folder / "empty.npz", jobs=[]), "device": "default"}
        device = competitors.visit(OURS, Path(sys.executable), job, {})["device"]
        size = SIZE.value or (0.1 if device["platform"] == "cpu" else 1.0)
        job["device"] = accelerator.torch_device(device["platform"])
        about = {"device": device, "size": size}
        print(f"{device['count']} x {device['kind']} ({device['platform']}), size {size:g}", flush=True)

        named = accelerator.peak_cases(size)
        found = _of_cases([(case, folder / "empty.npz") for case in named.values()], job, None, about)
        best = {name: max(row["ours_range"]) for name, row in zip(named, found, strict=True)}
        peaks = accelerator.Peaks(1e9 * best.pop("bandwidth"), {name: 1e12 * rate for name, rate in best.items()})
        yield from found
        for group in groups:
            print(group, flush=True)
            if group == "tests":
                found = accelerator.tested(accelerator.TESTS, device["jax_platforms"])
                own = {"name": "tests of kernels and parity", "ours": found.pop("value"), "unit": "failed"}
                yield {**_ROW, **own, **found, **machine(), **about}
            else:
                yield from _of_cases(device_cases(group, size, folder), job, peaks, about)


def device_cases(group: str, size: float, folder: Path) -> list[tuple[accelerator.Case, Path]]:
    """Returns the cases of a group with the files of their arrays, which are written.

    Args:
      group: one of `accelerator.GROUPS` but the tests.
      size: share of the full size.
      folder: where arrays are written.
    """

    def written(full: tuple[int, int, int]) -> tuple[Pairs, Path]:
        pairs = read_pairs(accelerator.sizes(full, size))
        place = Path(tempfile.mkdtemp(dir=folder))
        return pairs, write_arrays(pairs, place, final=False)

    if group == "encode":
        return [(case, folder / "empty.npz") for case in accelerator.encode_cases(size)]
    if group == "ranking":
        pairs, file = written(accelerator.RANKED_GRAPH)
        return [(accelerator.ranking_case(pairs.n_users, pairs.n_items, DIM), file)]
    cases, settings = [], {"dim": DIM, "num_layers": ROUNDS, "step": STEP}
    for title, full in accelerator.GRAPHS.items():
        pairs, file = written(full)
        layer, step = accelerator.graph_cases(title, pairs.n_users, pairs.n_items, len(pairs.user), settings)
        cases.append((layer if group == "propagation" else step, file))
    if group == "step":
        pairs, file = written(accelerator.FUSED_GRAPH)
        cases.append((accelerator.fused_case(pairs.n_users, pairs.n_items, FUSED), file))
    return cases


_ROW = {"ours": None, "peer": None, "peer_name": None, "ratio": None, "unit": "", "floor": None, "of_floor": None}


def _of_cases(
    cases: Sequence[tuple[accelerator.Case, Path]],
    job: Mapping[str, Any],
    peaks: accelerator.Peaks | None,
    about: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """Measures cases and returns their rows; a side that is missing or fails is told."""
    wanted = dict.fromkeys(side for case, _ in cases for side in case.sides)
    folder = None if PEERS.value is None else Path(PEERS.value)
    found = {side: competitors.python_of(side, folder) if job["device"] else None for side in (OURS, *wanted)}
    found[OURS] = Path(sys.executable)
    absent = f"left out: its environment is not there; {competitors.remedy(TORCH, folder)}"
    there = {side: python for side, python in found.items() if python is not None}
    chosen, files = [case for case, _ in cases], [file for _, file in cases]
    rows = []
    for number, answers in enumerate(accelerator.answers_of(chosen, files, job, there)):
        case, results = chosen[number], {}
        for place, side in enumerate(there):
            file = Path(job["folder"], f"result_{number}_{place}.npy")
            if isinstance(answers.get(side), dict):
                results[side] = np.load(file, allow_pickle=False)
            file.unlink(missing_ok=True)  # the next group has results of these names too
        missing = absent if job["device"] else accelerator.NO_TORCH
        failed = {side: f"left out: {why}" for side, why in answers.items() if isinstance(why, str)}
        left_out = {side: failed.get(side, missing) for side in case.sides if side not in results}
        if OURS not in results:
            rows.append({**_ROW, "name": case.name, "unit": case.unit, "note": failed[OURS], **machine(), **about})
            continue
        checks = {side: CHECKS[case.task](results[OURS], of) for side, of in results.items() if side != OURS}
        figures = {side: competitors.figures([answers[side]]) for side in results}
        measured = Measured(case.name, figures, left_out, checks, case.setting, case.work, case.unit)
        rows += [{**row, **_floor(case, peaks, row), **about} for row in all_rows(measured)]
    return rows


def _floor(case: accelerator.Case, peaks: accelerator.Peaks | None, row: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the floor of a row in its unit, and the share of the time that is the floor."""
    if peaks is None:
        return {"floor": None, "of_floor": None, "floor_of": "a peak of the device, the fastest call"}
    seconds = case.floor(peaks)
    floor = case.work / seconds if case.work else 1e3 * seconds
    share = row["ours"] / floor if case.work else floor / row["ours"]
    note = f"the floor is {share:.2f} of the time; {row['note']}"
    return {"floor": floor, "of_floor": share, "floor_of": case.floor_of, "note": note}


def shown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Formats the rows as a table of medians and ratios."""
    heading = ("", "ours", "peer", "", "unit", "ahead", "")
    cells: list[tuple[str, ...]] = [heading]
    for row in rows:
        values = ["–" if row[side] is None else f"{row[side]:,.4g}" for side in ("ours", "peer")]
        ratio = "–" if row["ratio"] is None else f"{row['ratio']:.3g} x"
        cells.append((row["name"], *values, row["peer_name"] or "", row["unit"], ratio, row["note"].splitlines()[0]))
    widths = [max(len(line[i]) for line in cells) for i in range(len(heading) - 1)]
    sides = "<>><<>"
    lines = []
    for line in cells:
        parts = [f"{cell:{side}{width}}" for cell, side, width in zip(line, sides, widths, strict=False)]
        lines.append("  ".join([*parts, line[-1][:60]]).rstrip())
    return "\n".join(lines)


def keep_to_threads() -> None:
    """Binds this process and its children to the first --threads cores; XLA uses as many threads as cores.

    Raises:
      ValueError: there are too few cores, or the system cannot bind a process and has more.
    """
    there = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_setaffinity") else list(range(os.cpu_count() or 1))
    if THREADS.value > len(there):
        raise ValueError(f"--threads is {THREADS.value}; this process may use {len(there)} cores")
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, there[: THREADS.value])
    elif THREADS.value < len(there):
        raise ValueError(f"--threads is {THREADS.value}; this system cannot bind a process, so it must be {len(there)}")


def draw(rows: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Plots the curves of quality, or the ratios, if there are any and Matplotlib is installed."""
    # A peer that compiles nothing has no time to be divided by; the table has both.
    rows = [row for row in rows if row["ratio"] and not row["name"].endswith(SUFFIXES["compile_s"])]
    if not rows:
        print("figure: none, there is no peer to compare with (--competitors)")
    elif importlib.util.find_spec("matplotlib") is None:
        print('figure: needs Matplotlib: pip install -e ".[plots]"')
    else:
        from fused_rec.evaluation import plots

        by_time = "curve" in rows[0]
        figure = _curves_of(rows) if by_time else plots.by_ratio(rows, rows[0]["hardware"])
        write_figure(file, figure)
        print(f"figure: {file}")


def _curves_of(rows: Sequence[Mapping[str, Any]]):
    """Plots the curves of all sides of the first data set."""
    from fused_rec.evaluation import plots

    first = rows[0]
    sides = {OURS.name: first["curve"]} | {
        row["peer_name"]: row["peer_curve"] for row in rows if row["name"] == first["name"]
    }
    return plots.by_time(sides, first["unit"], f"{first['name']}\n{first['hardware']}")


def main(argv: list[str]) -> None:
    """Parses flags, measures, and prints the table and the paths."""
    keep_to_threads()
    named = {"train": train, "encode": encode, "evaluate": evaluate, "scale": scale, "serve": serve}
    named |= {"index": index, "quality": quality, "accelerator": measure_device}
    out, suite = Path(OUT.value), named[SUITE.value]
    busy = os.getloadavg()[0]
    if busy > 0.3:
        print(f"the machine is not alone: load {busy:.1f}; times will be too long, and not evenly", file=sys.stderr)
    out.parent.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for row in suite(NAMES.value or DATA[SUITE.value]):
        rows.append(row)
        write_file(out, (json.dumps(rows, indent=1, allow_nan=False) + "\n").encode())  # what is there is kept
    print(f"\n{shown(rows)}\n\nrows:   {out}")
    draw(rows, out.with_suffix(".png"))


if __name__ == "__main__":
    start(main)
