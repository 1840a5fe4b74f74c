"""Latency of the HTTP server: single-user recommendations to real clients, each over a connection of its own.

    python tests/stress/serve.py --workdir=runs/mine --connections=1,4,16 --seconds=20

Starts `experiments.serve` on the run, asks for random users, and prints per number of connections the answers, the
answers per second, the median and 99th percentile of what a client waits, and the CPU time of the server per answer,
which depends less on what else the machine does. `--rules` serves with rules.
"""

import argparse
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import numpy as np

import fused_rec as fr

ROOT = Path(__file__).parents[2]


def asked(url: str, users: list[str], seed: int, until: float) -> list[float]:
    """Asks one request after the other, and returns the seconds of each."""
    rng, waited = np.random.default_rng(seed), []
    with httpx.Client(base_url=url, timeout=60) as client:
        while (start := time.perf_counter()) < until:
            answer = client.get("/v1/recommend", params={"user": users[rng.integers(len(users))], "k": 10})
            answer.raise_for_status()
            waited.append(time.perf_counter() - start)
    return waited


def cpu_seconds(url: str) -> float:
    """Returns what the server has used so far."""
    [seconds] = re.findall(r"^process_cpu_seconds_total (\S+)$", httpx.get(f"{url}/metrics").text, re.MULTILINE)
    return float(seconds)


def measured(url: str, users: list[str], connections: int, seconds: float) -> str:
    """Asks over so many connections at once; returns a line of the table."""
    waited: list[float] = []
    used = cpu_seconds(url)
    until = time.perf_counter() + seconds
    threads = [
        threading.Thread(target=lambda seed=seed: waited.extend(asked(url, users, seed, until)))
        for seed in range(connections)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    used = (cpu_seconds(url) - used) / len(waited) * 1000
    half, most = np.percentile(waited, [50, 99]) * 1000
    return f"| {connections} | {len(waited):,} | {len(waited) / seconds:,.0f} | {half:.1f} | {most:.1f} | {used:.1f} |"


def main() -> None:
    """Starts the server, measures, and ends it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--connections", default="1,4,16")
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--rules")
    flags = parser.parse_args()
    dataset = fr.load(flags.workdir).prepared.dataset
    users = dataset.users["user_id"].to_pylist()
    command = [sys.executable, "-m", "experiments.serve", f"--workdir={flags.workdir}", "--port=0"]
    command += [f"--rules={flags.rules}"] if flags.rules else []
    server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        [url] = re.findall(r"http://\S+", server.stdout.readline())
        print(f"{dataset.n_users:,} users, {dataset.n_items:,} items")
        print("| connections | answers | per second | median ms | p99 ms | CPU ms per answer |")
        print("|---:|---:|---:|---:|---:|---:|")
        for connections in map(int, flags.connections.split(",")):
            print(measured(url, users, connections, flags.seconds), flush=True)
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
