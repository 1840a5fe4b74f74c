"""Real processes on one machine, joined by JAX's own runtime: one run, and nothing lost when one of them ends."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from market import arrays, write_tables

from fused_rec.distributed import processes as processes_module
from fused_rec.training.checkpoint import Checkpoints

ROOT = Path(__file__).parents[1]
TINY = Path(__file__).parent / "golden" / "tiny_bert"
STOP_SECONDS = 60  # promised: a process whose neighbour died ends after so many at most
SETTINGS = (
    *("model.dim=8", "model.num_layers=1", "train.eval_every=5", "train.patience=100000", "train.temperature=0.15"),
    # Without rows of users a cosine does not see how long they are: some factors would have no gradient but rounding
    # errors, which AdamW makes as large as any other.
    "model.user_id_embedding=True",
    f"text.model={TINY}",
)
ENDLESS = 100_000  # steps
LATE = float(os.environ.get("FUSED_REC_LATE", "3"))  # seconds


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    return write_tables(tmp_path_factory.mktemp("tables"))


def launch(
    tables: Path,
    workdir: Path,
    process: int,
    processes: int,
    port: int,
    steps: int,
    devices: int = 2,
    variant: str = "graph",
    late_fusion: bool = False,
    refit: str = "all",
) -> subprocess.Popen:
    """devices: of all processes together. Each process has a cache of text vectors of its own."""
    own = f"model.variant={variant}", f"model.late_fusion={late_fusion}", f"train.refit={refit}"
    settings = [f"--config.{setting}" for setting in (*SETTINGS, *own, f"train.max_steps={steps}")]
    several = [f"--coordinator=localhost:{port}", f"--num_processes={processes}", f"--process_id={process}"]
    with workdir.with_name(f"{workdir.name}.{process}.log").open("w") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "experiments.train", "--config=experiments/configs/tables.py", *settings]
            + [f"--config.data.path={tables}", f"--workdir={workdir}", *(several if processes > 1 else [])],
            cwd=ROOT,
            env=os.environ | {"HOME": str(home(workdir, process))} | {"JAX_NUM_CPU_DEVICES": str(devices // processes)},
            stdout=log,
            stderr=log,
        )


def cached(workdir: Path, process: int = 0) -> set[bytes]:
    """Keys of the text vectors that a process has kept, each once."""
    shards = list(home(workdir, process).rglob("*.safetensors"))
    keys = [key.tobytes() for shard in shards for key in safetensors.numpy.load_file(shard)["keys"]]
    assert len(keys) == len(set(keys))
    return set(keys)


def text_batch(workdir: Path, process: int = 0) -> str:
    return workdir.with_name(f"{workdir.name}.{process}.log").read_text()


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return one.getsockname()[1]


def run(tables: Path, workdir: Path, processes: int, late: float = 0, **settings: Any) -> list[int]:
    """Exit statuses; the last process starts `late` seconds after the others."""
    port, started = free_port(), []
    for process in range(processes):
        if process == processes - 1:
            time.sleep(late)
        started.append(launch(tables, workdir, process, processes, port, steps=10, **settings))
    return [process.wait(timeout=300) for process in started]


def wait_for_step(workdir: Path, started: list[subprocess.Popen]) -> None:
    """Until the first checkpoint is there."""
    until = time.monotonic() + 200
    while not Checkpoints(workdir / "select" / "checkpoints").steps():
        assert all(process.poll() is None for process in started), text_batch(workdir)
        assert time.monotonic() < until, text_batch(workdir)
        time.sleep(0.1)


@pytest.fixture(scope="module")
def together(tables, tmp_path_factory) -> Path:
    """The workdir of two processes without text vectors, one of which comes late."""
    workdir = tmp_path_factory.mktemp("together") / "run"
    assert run(tables, workdir, 2, late=LATE, variant="text") == [0, 0], text_batch(workdir) + text_batch(workdir, 1)
    return workdir


@pytest.fixture(scope="module")
def alone(tables, together, tmp_path_factory) -> Path:
    """The workdir of one process that has the text vectors of the two.

    Some processors round those of a text differently in batches of another shape, and ten steps of AdamW make 1e-5 of
    1e-7 where a gradient is nearly zero.
    """
    workdir = tmp_path_factory.mktemp("alone") / "run"
    shutil.copytree(home(together), home(workdir))
    assert run(tables, workdir, 1, variant="text") == [0], text_batch(workdir)
    return workdir


def check_metrics(workdir: Path, alone: Path) -> None:
    one, other = (json.loads((folder / "results.json").read_text()) for folder in (alone, workdir))
    assert other["best_step"] == one["best_step"]
    for part in ("valid", "test"):
        assert other[part] == pytest.approx(one[part], rel=1e-6, nan_ok=True)


def check_parameters(workdir: Path, alone: Path) -> None:
    mine, theirs = (arrays(folder / "select" / "checkpoints", 10) for folder in (workdir, alone))
    assert mine.keys() == theirs.keys() != set()
    for name, array in theirs.items():
        # Of the largest entry: a processor may round the vectors of a text differently in batches of another shape.
        np.testing.assert_allclose(
            mine[name], array, rtol=1e-5, atol=max(1e-7, 1e-5 * np.abs(array).max()), err_msg=name
        )


def home(workdir: Path, process: int = 0) -> Path:
    return workdir.with_name(f"{workdir.name}.{process}.home")


def test_two_processes_give_what_one_gives(together, alone):
    """Only the first writes. Sums of two devices are the same in any order."""
    check_metrics(together, alone)
    check_parameters(together, alone)
    assert "ndcg@10" in text_batch(together)
    assert "results:" not in text_batch(together, 1)


GATHERS = """
import jax, numpy as np
from fused_rec.distributed.devices import AXIS, all_gather, scatter_sum

jax.distributed.initialize("localhost:PORT", 1, 0)
x = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
factors = np.random.default_rng(0).normal(size=(2, 3, 2, 4)).astype(np.float32)
gathered = jax.pmap(jax.value_and_grad(lambda x, of: (all_gather(x, 1) * of).sum()), axis_name=AXIS)
values, slopes = gathered(x, factors)
np.testing.assert_allclose(values, [(np.stack(x, 1) * of).sum() for of in factors], rtol=1e-5)
np.testing.assert_allclose(slopes, factors.sum(0).swapaxes(0, 1), rtol=1e-5)
summed = jax.pmap(lambda of: scatter_sum(of, 1), axis_name=AXIS)
np.testing.assert_allclose(summed(factors), factors.sum(0).swapaxes(0, 1), rtol=1e-5)
for compiled in (gathered.lower(x, factors).compile(), summed.lower(factors).compile()):
    assert "reduce-scatter" not in compiled.as_text()
"""


def test_no_reduce_scatter_runs_between_processes():
    """On CPUs it would be Gloo's, whose sums are wrong at times (`fused_rec.distributed.devices.scatter_sum`)."""
    command = [sys.executable, "-c", GATHERS.replace("PORT", str(free_port()))]
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "2", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_two_processes_divide_the_texts(together, alone):
    """Each encodes half of the texts, and has the vectors of all in its cache afterwards: one process finds no more."""
    caches = [cached(alone), cached(together), cached(together, 1)]
    assert len(caches[0]) > 30
    assert caches[0] == caches[1] == caches[2]
    encoded = [int(re.findall(r" (\d+)/\1 texts, ", text_batch(together, process))[-1]) for process in range(2)]
    assert sum(encoded) == len(caches[0])
    assert abs(encoded[0] - encoded[1]) <= 1


def test_four_processes_give_what_one_gives(tables, tmp_path):
    """Of four devices each: sums of four depend on their order in the last digits."""
    alone, workdir = tmp_path / "alone", tmp_path / "run"
    settings = {"devices": 4, "late_fusion": True, "refit": "none"}  # two processes train on all rows too
    assert run(tables, alone, 1, **settings) == [0], text_batch(alone)
    assert run(tables, workdir, 4, **settings) == [0] * 4, text_batch(workdir)
    check_metrics(workdir, alone)
    check_parameters(workdir, alone)


def test_a_killed_process_stops_the_others_and_one_alone_goes_on(tables, tmp_path):
    workdir, port = tmp_path / "run", free_port()
    started = [launch(tables, workdir, process, 2, port, ENDLESS) for process in range(2)]
    wait_for_step(workdir, started)
    started[1].kill()
    began = time.monotonic()
    assert started[0].wait(timeout=STOP_SECONDS) not in (0, None)
    print(f"the other ended after {time.monotonic() - began:.1f} s")
    assert started[1].wait() == -signal.SIGKILL
    assert "start all processes again" in text_batch(workdir)
    step = Checkpoints(workdir / "select" / "checkpoints").last_good()
    rerun = launch(tables, workdir, 0, 1, port, ENDLESS)
    while f"resumes from the checkpoint of step {step}" not in text_batch(workdir):
        assert rerun.poll() is None, text_batch(workdir)
        time.sleep(0.1)
    rerun.send_signal(signal.SIGTERM)
    assert rerun.wait(timeout=STOP_SECONDS) == 143


def test_what_tells_of_others_is_no_fault_of_the_input(monkeypatch):
    """As reported of killed processes: which of the two it is depends on where the others were lost."""
    lost = "Gloo AllGather failed: [external/gloo/gloo/transport/tcp/pair.cc:538] Read error: Connection reset by peer"
    reported = [RuntimeError(lost), ValueError(f"UNKNOWN: {lost}")]
    own = [ValueError("train.seed is -1"), OSError("no space left on device"), ImportError("no module")]
    assert not any(map(processes_module.is_collective_failure, reported + own))  # a run of one process has no others
    monkeypatch.setattr(processes_module, "is_single_process", lambda: False)
    assert all(map(processes_module.is_collective_failure, reported))
    assert not any(map(processes_module.is_collective_failure, own))


def test_a_request_to_one_stops_all_at_the_same_step(tables, tmp_path):
    workdir, port = tmp_path / "run", free_port()
    started = [launch(tables, workdir, process, 2, port, ENDLESS) for process in range(2)]
    wait_for_step(workdir, started)
    started[1].send_signal(signal.SIGTERM)
    assert [process.wait(timeout=STOP_SECONDS) for process in started] == [143, 143]
    for process in range(2):
        assert "is saved in" in text_batch(workdir, process)
        assert "same command again" in text_batch(workdir, process)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("localhost:1", None, 0), "give all three"),
        (("localhost:1", 2, 2), "it must be from 0 to 1"),
    ],
)
def test_connect_refuses(given, message):
    with pytest.raises(ValueError, match=message):
        processes_module.connect(*given)
