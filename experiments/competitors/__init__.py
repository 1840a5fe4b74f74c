"""Who is measured: each side is a script that runs in a process, and a virtual environment, of its own.

The harness's half of the protocol in `protocol.py`; scripts import that file and nothing else of this project.
"""

import dataclasses
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")


@dataclasses.dataclass(frozen=True)
class Side:
    """Third-party package.

    Attributes:
      name: name in the table.
      script: script that measures it.
      environment: name of its environment below --competitors and of its requirements file; empty = this Python.
    """

    name: str
    script: Path
    environment: str = ""


OURS = Side("fused_rec", HERE / "ours.py")
PYG = Side("PyTorch Geometric", HERE / "pyg_lightgcn.py", "torch")
TORCH = Side("PyTorch, tuned", HERE / "torch_lightgcn.py", "torch")
SDPA = Side("PyTorch with SDPA", HERE / "torch_sdpa.py", "torch")
SENTENCES = Side("sentence-transformers", HERE / "sentences.py", "torch")
RECBOLE = Side("RecBole", HERE / "recbole_lightgcn.py", "recbole")
ALS = Side("implicit ALS", HERE / "implicit_als.py", "als")


class PeerError(RuntimeError):
    """A side's process failed or answered nothing readable; the message ends with what it said last."""


def python_of(side: Side, peers: Path | None) -> Path | None:
    """The interpreter that runs the side; None where its environment is not there."""
    if not side.environment:
        return Path(sys.executable)
    found = None if peers is None else peers.expanduser().absolute() / side.environment / "bin" / "python"
    return found if found is not None and found.exists() else None


def remedy(side: Side, peers: Path | None) -> str:
    """How to make the environment that is missing."""
    folder = f"{peers or 'DIR'}/{side.environment}"
    return (
        f"python3 -m venv {folder} && {folder}/bin/pip install -r experiments/competitors/{side.environment}.txt, "
        f"then --competitors={peers or 'DIR'}"
    )


def visit(side: Side, python: Path, job: Mapping[str, Any], variables: Mapping[str, str]) -> dict[str, Any]:
    """One process of a side, from its start to its answer. Raises PeerError."""
    # The peers' environments are for a CPU, and so are all comparisons but those of one suite.
    on_cpu = {} if job.get("device", "cpu") != "cpu" else {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    environment = {
        **os.environ,
        **dict.fromkeys(THREAD_VARIABLES, str(job["threads"])),
        **on_cpu,
        "TOKENIZERS_PARALLELISM": "true",
        "PYTHONPATH": "" if side.environment else os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        **variables,
    }
    sent = json.dumps({**job, "started": time.time()})
    done = subprocess.run(
        [python, side.script],
        input=sent,
        cwd=job["folder"],  # RecBole writes logs wherever it is started
        env=environment,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
    )
    lines = done.stdout.splitlines()
    try:
        answer = json.loads(lines[-1]) if done.returncode == 0 and lines else None
    except json.JSONDecodeError:
        answer = None
    if done.returncode == -signal.SIGKILL:
        raise PeerError(f"{side.name} was killed (SIGKILL): the machine's memory was not enough for it")
    if not isinstance(answer, dict):
        stderr_tail = "\n".join(done.stderr.splitlines()[-8:])
        raise PeerError(f"{side.name} ({python} {side.script}) ended with status {done.returncode}:\n{stderr_tail}")
    return answer


def alternate(
    pythons: Mapping[Side, Path], job: Mapping[str, Any], variables: Mapping[str, str], rounds: int = 1
) -> tuple[dict[Side, list[dict[str, Any]]], dict[Side, str]]:
    """Every side in order and then in reverse (A B B A), `rounds` times; (answers, why a side has none).

    What drifts steadily meanwhile, as a processor's temperature does, then weighs on all sides alike. A side that
    fails is left out from there on; where ours fails, PeerError is raised.
    """
    answers: dict[Side, list[dict[str, Any]]] = {side: [] for side in pythons}
    failed: dict[Side, str] = {}
    for side in [*pythons, *reversed(list(pythons))] * rounds:
        if side in failed:
            continue
        try:
            result = str(Path(job["folder"], f"result_{list(pythons).index(side)}.npy"))
            own = variables if not side.environment else {}
            answers[side].append(visit(side, pythons[side], {**job, "result": result}, own))
        except PeerError as error:
            if side == OURS:
                raise
            failed[side] = str(error)
            del answers[side]
    return answers, failed


def figures(answers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What several visits of a side say together: all samples of what is timed, the highest of memory."""
    return {
        "seconds": [second for answer in answers for second in answer["seconds"]],
        **{name: [answer[name] for answer in answers] for name in ("compile_s", "load_s", "first_s")},
        "peak_mb": [max(answer["peak_mb"] for answer in answers)],
        "versions": answers[0]["versions"],
    }


def spread(samples: Sequence[float]) -> tuple[float, float, float]:
    """Lowest, median, highest."""
    return min(samples), statistics.median(samples), max(samples)
