"""Ends a small real training at random moments, and compares what it comes to with a run that nothing disturbed.

    python tests/stress/kill.py --kills=50 --minutes=20
    python tests/stress/kill.py --signal=TERM --kills=20

Each run is ended up to five times and then left to finish. Moments are drawn over the whole run, while a checkpoint
is being written, soon after one was, and at the end of the second phase. Checkpoints, results.json without its
seconds, test_metrics_per_user.npz and both phases' curves must be equal bit for bit. Exits with 1 where a run differs.
"""

import argparse
import collections
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from market import differences, write_tables

ROOT = Path(__file__).parents[2]
SETTINGS = {
    "model.variant": "graph",  # no language model, so that processes begin quickly
    "model.dim": 8,
    "train.batch_size": 32,
    "train.max_steps": 60,
    "train.eval_every": 3,
    "train.patience": 100,
    "train.learning_rate": 0.02,
    "train.temperature": 0.15,
    "train.refit": "valid",
}
KINDS = ("any time", "any time", "while saving", "while saving", "after a save", "second phase")
KILLS_A_RUN = 5
SAVES = SETTINGS["train.max_steps"] // SETTINGS["train.eval_every"]


def begin(work: Path, workdir: Path) -> subprocess.Popen:
    """The training, in a process of its own."""
    settings = SETTINGS | {"data.path": work / "tables", "text.cache": work / "cache"}
    command = [sys.executable, "-m", "experiments.train", "--config=experiments/configs/tables.py"]
    command += [f"--workdir={workdir}", *(f"--config.{name}={value}" for name, value in settings.items())]
    variables = {
        "JAX_COMPILATION_CACHE_DIR": str(work / "cache" / "xla"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }
    return subprocess.Popen(
        command, cwd=ROOT, env=os.environ | variables, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


def finish(work: Path, workdir: Path) -> float:
    """Trains to the end and returns the seconds that took."""
    began = time.monotonic()
    process = begin(work, workdir)
    _, stderr = process.communicate()
    if process.returncode:
        raise SystemExit(f"the run in {workdir} failed:\n{stderr.decode()}")
    return time.monotonic() - began


def wait(kind: str, process: subprocess.Popen, workdir: Path, whole: float, generator: random.Random) -> None:
    """Until the moment to end the process, or until it has ended by itself."""

    def until(happened) -> None:
        while process.poll() is None and not happened():
            time.sleep(0.0005)

    def saved() -> int:
        return sum(len(os.listdir(folder)) for folder in workdir.glob("*/checkpoints"))

    if kind == "any time":
        deadline = time.monotonic() + generator.uniform(0, whole)
        until(lambda: time.monotonic() > deadline)
        return
    if kind == "second phase":
        until((workdir / "refit" / "checkpoints").exists)
        deadline = time.monotonic() + generator.uniform(0, 0.3 * whole)
        until(lambda: time.monotonic() > deadline)
        return
    for _ in range(generator.randint(1, SAVES)):
        until(lambda: any(workdir.glob("*/checkpoints/.*.partial")))
        if kind == "after a save":
            until(lambda: not any(workdir.glob("*/checkpoints/.*.partial")))
        else:
            time.sleep(generator.uniform(0, 0.03))


def left(workdir: Path) -> str:
    """Where the run was when it ended."""
    if any(workdir.glob("*/checkpoints/.*.partial")):
        return "a checkpoint half written"
    if any(workdir.glob("*/checkpoints/.*.discarded")):
        return "an old checkpoint half removed"
    for place in ("results.json", "test_metrics_per_user.npz", "refit", "select", "run.json", "run.lock"):
        if (workdir / place).exists():
            return f"{place} was there"
    return "nothing was there"


def main() -> None:
    """Runs the campaign and prints its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--signal", choices=("KILL", "TERM"), default="KILL")
    asked = parser.parse_args()
    generator, signum = random.Random(asked.seed), signal.Signals[f"SIG{asked.signal}"]
    began, kills, runs, faults = time.monotonic(), collections.Counter(), 0, []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        write_tables(work / "tables")
        finish(work, work / "compiled")  # fills the caches
        whole = finish(work, work / "undisturbed")
        print(f"undisturbed: {whole:.1f} s", flush=True)
        while kills.total() < asked.kills and time.monotonic() - began < 60 * asked.minutes:
            workdir = work / f"run{runs}"
            for _ in range(generator.randint(1, KILLS_A_RUN)):
                kind = generator.choice(KINDS)
                process = begin(work, workdir)
                wait(kind, process, workdir, whole, generator)
                process.send_signal(signum)
                _, stderr = process.communicate()
                if process.returncode == 0:
                    break
                if process.returncode not in (-signum, 128 + signum):
                    faults.append(f"run {runs} ended with status {process.returncode}: {stderr.decode()}")
                    break
                where = left(workdir)
                kills[where] += 1
                print(f"run {runs}: ended ({kind}): {where}, status {process.returncode}", flush=True)
            finish(work, workdir)
            faults += [f"run {runs}: {found}" for found in differences(workdir, work / "undisturbed")]
            runs += 1
            print(f"{kills.total()} kills, {runs} runs, {len(faults)} faults", flush=True)
    minutes = (time.monotonic() - began) / 60
    print(f"SIG{asked.signal}: {kills.total()} kills in {runs} runs, {minutes:.1f} minutes, {len(faults)} faults")
    for where, count in kills.most_common():
        print(f"  {count:3} {where}")
    for fault in faults:
        print(fault)
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
