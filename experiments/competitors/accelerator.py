"""The suite `accelerator` of the benchmark: what is measured on one device, and the least time that each could take.

A floor is the larger of two times: that of the bytes that have to be moved at the measured bandwidth of the device, and
that of the operations at its measured rate of matrix products of the same type. Bytes count every array once, as if all
that is read again were in a cache.

U users, I items, E interactions, K columns.
"""

import dataclasses
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.competitors import OURS, PYG, ROOT, SDPA, TORCH, PeerError, Side, visit

GROUPS = ("tests", "propagation", "step", "ranking", "encode")
TESTS = (  # arguments of pytest
    *(f"tests/test_{name}.py" for name in ("spmm", "propagation", "reference", "cross_entropy")),
    *(f"tests/test_{name}.py" for name in ("precision", "metrics")),
    *(
        f"tests/test_bert.py::test_{name}"
        for name in ("hidden_states_are_those_of_pytorch", "padding_and_neighbors_change_nothing")
    ),
    *(
        f"tests/test_encoders.py::test_{name}"
        for name in (
            *("hidden_states_are_those_of_pytorch", "other_settings_give_what_pytorch_gives"),
            *("vectors_of_texts_are_those_of_pytorch", "half_precision_is_kept_and_computed_in_float32"),
        )
    ),
    "--deselect=tests/test_spmm.py::test_on_four_devices",
)
TEST_SECONDS = 200  # after which the tests are stopped
# Users, items and interactions (about: pairs that are drawn twice count once) at full size.
GRAPHS = {"Gowalla's shape": (29_858, 40_981, 890_000), "a larger graph": (333_333, 166_666, 10_000_000)}
FUSED_GRAPH, RANKED_GRAPH = (7_947, 25_975, 110_000), (20_000, 1_000_000, 1_000_000)
LEAST = 64  # users and items of a graph that is made smaller
COPIED, MULTIPLIED = 2 << 30, 8192  # bytes; rows of square matrices
FUSED_USERS, FUSED_DIM, FUSED_TEXT, BRANCHES = 512, 128, 640, 2  # of the task `fused_step`
LENGTH, LONG = 128, 2500  # tokens of a text
BY_DEFAULT = "float32 as JAX multiplies it by default"  # what training and ranking use
NO_TORCH = "left out: PyTorch has no name for this kind of device"


@dataclasses.dataclass(frozen=True)
class Peaks:
    """What the device does at most.

    Attributes:
      bandwidth: bytes per second, read and written.
      products: FLOP per second of matrix products, by type.
    """

    bandwidth: float
    products: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Case:
    """One measured call and its floor.

    Attributes:
      name: name of the row.
      task: task of the scripts.
      settings: of the job.
      setting: what a call does, in words.
      sides: competitors.
      work: work per call, to compute a rate; 0 = report the time.
      unit: of the rate or time.
      moved: bytes that a call has to move.
      flops: operations of its matrix products.
      product: their type, a key of `Peaks.products`.
    """

    name: str
    task: str
    settings: Mapping[str, Any]
    setting: str
    sides: tuple[Side, ...] = ()
    work: float = 0
    unit: str = "ms"
    moved: float = 0
    flops: float = 0
    product: str = "float32"

    def floor(self, peaks: Peaks) -> float:
        """Returns the least seconds of a call."""
        return max(self.moved / peaks.bandwidth, self.flops / peaks.products[self.product])

    @property
    def floor_of(self) -> str:
        """Says what the floor is computed from."""
        parts = [f"{self.moved:.4g} bytes"] if self.moved else []
        return " or ".join([*parts, *([f"{self.flops:.4g} FLOP in {self.product}"] if self.flops else [])])


# Published config.json files, what the encoders read of them.
MINILM = {
    **{"model_type": "bert", "hidden_act": "gelu", "layer_norm_eps": 1e-12, "type_vocab_size": 2},
    **{"vocab_size": 30_522, "hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12},
    **{"intermediate_size": 1536, "max_position_embeddings": 512},
}
SMOLLM2 = {
    **{"model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 100_000.0},
    **{"vocab_size": 49_152, "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9},
    **{"num_key_value_heads": 3, "intermediate_size": 1536, "max_position_embeddings": 8192},
    "tie_word_embeddings": True,
}


def qwen2(hidden_size: int, layers: int, heads: int, key_heads: int, intermediate_size: int) -> dict[str, Any]:
    """Returns the config.json of a model of the Qwen2.5 family, without its vocabulary.

    Args:
      hidden_size: width of a token.
      layers: number of layers.
      heads: query heads.
      key_heads: key and value heads.
      intermediate_size: width of the feed-forward layer.
    """
    return {
        **{"model_type": "qwen2", "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1_000_000.0},
        **{"vocab_size": 1000, "hidden_size": hidden_size, "num_hidden_layers": layers, "num_attention_heads": heads},
        **{"num_key_value_heads": key_heads, "intermediate_size": intermediate_size, "max_position_embeddings": 32_768},
    }


BY_LAYER = {
    "Qwen2.5-0.5B": qwen2(896, 24, 14, 2, 4864),
    "Qwen2.5-1.5B": qwen2(1536, 28, 12, 2, 8960),
    "Qwen2.5-3B": qwen2(2048, 36, 16, 2, 11_008),
    "Qwen2.5-7B": qwen2(3584, 28, 28, 4, 18_944),
}


def sizes(full: tuple[int, int, int], size: float) -> str:
    """Returns the name of a generated graph whose users, items and interactions are this share of the full ones."""
    users, items, pairs = (round(count * size) for count in full)
    return f"generated:{max(users, LEAST)}x{max(items, LEAST)}x{max(pairs, LEAST)}"


def peak_cases(size: float) -> dict[str, Case]:
    """Returns the cases whose fastest call is a peak of the device, by the key of `Peaks`.

    Args:
      size: share of the full size; matrices have so much less work.
    """
    moved, rows = 2 * round(COPIED * size) // 8 * 8, 64 * max(round(MULTIPLIED / 64 * size ** (1 / 3)), 1)
    types = {
        "float32": ("float32", "highest"),
        BY_DEFAULT: ("float32", "default"),
        "bfloat16": ("bfloat16", "default"),
    }
    read = Case("memory bandwidth", "copy", {"bytes": moved // 2}, "x + 1 in place", work=moved / 1e9, unit="GB/s")
    return {"bandwidth": read} | {
        name: Case(
            f"matrix products, {name}",
            "multiply",
            {"size": rows, "dtype": dtype, "precision": precision},
            f"square matrices of {rows:,} rows, float32 sums",
            work=2 * rows**3 / 1e12,
            unit="TFLOP/s",
        )
        for name, (dtype, precision) in types.items()
    }


def graph_cases(title: str, n_users: int, n_items: int, n_pairs: int, shown: Mapping[str, Any]) -> list[Case]:
    """Returns a layer of LightGCN and a training step on one graph.

    Args:
      title: of the graph.
      n_users: U.
      n_items: I.
      n_pairs: E.
      shown: `dim` K, `num_layers`, and `step`, the setting of a step in words.
    """
    rows, dim = n_users + n_items, shown["dim"]
    layer = 8 * 2 * n_pairs + 4 * (rows + 2) + 2 * 4 * rows * dim  # senders and weights, row starts, rows in and out
    step = 2 * shown["num_layers"] * layer + 7 * 4 * rows * dim  # and parameters, gradient and moments, three written
    where = f"{title} ({n_pairs:,} pairs)"
    words = f"sums over all neighbors, both directions, {dim} columns"
    return [
        Case(f"propagation, {where}", "propagate", {}, words, (TORCH, PYG), moved=layer),
        Case(f"step, {where}", "step", {}, shown["step"], (PYG, TORCH), moved=step),
    ]


def fused_case(n_users: int, n_items: int, setting: str) -> Case:
    """Returns a step of the fused model: projections of texts, and the softmax, forward and back.

    Args:
      n_users: U.
      n_items: I.
      setting: a step in words.
    """
    texts = 2 * 2 * (n_users + n_items) * FUSED_TEXT * FUSED_DIM
    softmax = 3 * 2 * FUSED_USERS * n_items * FUSED_DIM
    flops = BRANCHES * (texts + softmax)
    given = {"compute_dtype": "float32"}
    return Case("fused step, CiteULike-t's shape", "fused_step", given, setting, flops=flops, product=BY_DEFAULT)


def ranking_case(n_users: int, n_items: int, dim: int) -> Case:
    """Returns the ranking of all items for all users.

    Args:
      n_users: U.
      n_items: I.
      dim: K.
    """
    return Case(
        f"ranking, {n_users:,} users x {n_items:,} items",
        "rank",
        {},
        f"every user, all items, {dim} columns, seen items left out",
        (TORCH,),
        work=n_users,
        unit="users/s",
        flops=2 * n_users * n_items * dim,
        product=BY_DEFAULT,
    )


def encode_cases(size: float) -> list[Case]:
    """Returns the encoding of texts of `LENGTH` or `LONG` random tokens in models with random weights.

    Of the models of `BY_LAYER` one layer is measured with a vocabulary of 1,000 and counted as often as the model has
    layers: the whole one would not fit into every memory.

    Args:
      size: share of the full number of texts.
    """
    whole = [("MiniLM-L6", MINILM, dtype, 512, LENGTH) for dtype in ("float32", "bfloat16")]
    whole += [("SmolLM2-135M", SMOLLM2, dtype, 128, LENGTH) for dtype in ("float32", "bfloat16")]
    whole += [("SmolLM2-135M", SMOLLM2, dtype, 8, LONG) for dtype in ("float32", "bfloat16")]
    by_layer = [(name, config, "bfloat16", 64, LENGTH) for name, config in BY_LAYER.items()]
    found = []
    for name, config, dtype, texts, length in (*whole, *by_layer):
        layers = config["num_hidden_layers"] if name in BY_LAYER else 1
        measured = {**config, "num_hidden_layers": config["num_hidden_layers"] // layers}
        texts = max(round(texts * size), 1)
        tokens = texts * length
        found.append(
            Case(
                f"encode, {name} in {dtype}" + (", long texts" if length == LONG else ""),
                "encode_shape",
                {"config": measured, "compute_dtype": dtype, "texts": texts, "length": length},
                f"{texts} texts of {length:,} tokens, random weights, no tokenizer"
                + (f"; one layer measured, counted {layers} times" if layers > 1 else ""),
                (SDPA,),
                work=tokens / layers,
                unit="tokens/s",
                flops=tokens * flops_per_token(measured, length),
                product=dtype,
            )
        )
    return found


def flops_per_token(config: Mapping[str, Any], length: int) -> float:
    """Counts the operations of a token in all layers: two per matrix entry, and attention over the whole text.

    Args:
      config: content of config.json.
      length: tokens of a text.
    """
    width, heads = config["hidden_size"], config["num_attention_heads"]
    keys = width * config.get("num_key_value_heads", heads) // heads
    inner = (2 if config["model_type"] == "bert" else 3) * config["intermediate_size"]
    return config["num_hidden_layers"] * (2 * width * (2 * width + 2 * keys + inner) + 4 * width * length)


def tested(tests: tuple[str, ...], platform: str) -> dict[str, Any]:
    """Runs tests on the device in a process of its own.

    Args:
      tests: arguments of pytest, files relative to the checkout.
      platform: what JAX_PLATFORMS names; the tests see one device.

    Returns:
      `value`, the number of tests that failed (None: they did not end); `seconds`; and `note`, the summary of pytest
      and the names of failed tests.
    """
    own = {"JAX_PLATFORMS": platform, "JAX_NUM_CPU_DEVICES": "1"}
    # GPUs otherwise multiply float32 with 10 bits of its fraction, which no bound of these tests allows.
    own |= {"JAX_DEFAULT_MATMUL_PRECISION": "highest"}
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", *tests]
    began = time.perf_counter()
    try:
        done = subprocess.run(
            command, cwd=ROOT, env={**os.environ, **own}, capture_output=True, text=True, timeout=TEST_SECONDS
        )
    except subprocess.TimeoutExpired:
        return {"value": None, "seconds": TEST_SECONDS, "note": f"stopped after {TEST_SECONDS} s"}
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    failed = [line.split(" - ")[0] for line in lines if re.match(r"(FAILED|ERROR) ", line)]
    ran = done.returncode in (0, 1) and bool(lines)
    last = lines[-1] if lines else "\n".join(done.stderr.splitlines()[-1:])
    seconds = time.perf_counter() - began
    return {"value": len(failed) if ran else None, "seconds": seconds, "note": "; ".join([last.strip("= "), *failed])}


def torch_device(platform: str) -> str | None:
    """Returns PyTorch's name of the kind of device; None: it has none."""
    return {"cpu": "cpu", "gpu": "cuda", "cuda": "cuda", "rocm": "cuda"}.get(platform)


def answers_of(
    cases: Sequence[Case], files: Sequence[Path], job: Mapping[str, Any], pythons: Mapping[Side, Path]
) -> list[dict[Side, Any]]:
    """Lets every side do all its cases, each side in one process.

    Args:
      cases: the cases.
      files: the arrays of each case.
      job: settings of all jobs; `folder` gets the results, `result_CASE_SIDE.npy`, sides in the order of `pythons`.
      pythons: interpreters of the sides.

    Returns:
      For each case the answers of its sides, with versions; a text where a side failed.
    """
    found: list[dict[Side, Any]] = [{} for _ in cases]
    for place, (side, python) in enumerate(pythons.items()):
        own = [number for number, case in enumerate(cases) if side == OURS or side in case.sides]
        jobs = [
            {
                **cases[number].settings,
                "task": cases[number].task,
                "arrays": str(files[number]),
                "result": str(Path(job["folder"], f"result_{number}_{place}.npy")),
            }
            for number in own
        ]
        try:
            answer = visit(side, python, {**job, "jobs": jobs}, {})
            answers = [
                one.get("error") or {**one, "peak_mb": answer["peak_mb"], "versions": answer["versions"]}
                for one in answer["answers"]
            ]
        except PeerError as error:
            answers = [str(error)] * len(own)
        for number, one in zip(own, answers, strict=True):
            found[number][side] = one
    return found
