"""Coverage-guided fuzzing of every reader of tests/malformed_inputs.py: documented errors, bounded time and memory.

    pip install atheris
    python tests/stress/fuzz.py --seconds=1200                         # shared out among all targets
    python tests/stress/fuzz.py --seconds=60 --targets=zip,tar --out=findings

Prints inputs, seconds, peak memory and findings of each target; every input that led to another error than the
documented ones, to a hang of 20 s or beyond the memory limit lies in the folder of findings. Ends with status 1 where
there is one. Atheris wraps libFuzzer; it is no dependency of the tests and has builds for Python 3.11 and 3.12.
"""

import argparse
import hashlib
import importlib
import logging
import re
import resource
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
MEMORY_MB = 3072
HANG_SECONDS = 20


def main() -> None:
    """Starts one process a target, and prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=int, default=1200, help="in all, shared out evenly")
    parser.add_argument("--targets", default="", help="names of tests/malformed_inputs.py, with commas; all without it")
    parser.add_argument("--out", default="", help="folder of findings; a temporary one without it")
    parser.add_argument("--one", default="", help=argparse.SUPPRESS)
    arguments, rest = parser.parse_known_args()
    if arguments.one:
        fuzz(arguments.one, Path(arguments.out), rest)
        return
    sys.path.insert(0, str(HERE.parent))
    from malformed_inputs import TARGETS

    names = arguments.targets.split(",") if arguments.targets else list(TARGETS)
    if unknown := set(names) - set(TARGETS):
        parser.error(f"--targets has {sorted(unknown)}; they must be of {', '.join(TARGETS)}")
    out = Path(arguments.out or tempfile.mkdtemp(prefix="findings_"))
    print(f"{'target':18}{'inputs':>10}{'seconds':>9}{'a second':>10}{'peak MB':>9}  findings", flush=True)
    total = found = 0
    for name in names:
        runs, line, findings = _campaign(name, max(1, arguments.seconds // len(names)), out / name)
        print(f"{name:18}{line}  {findings}", flush=True)
        total, found = total + runs, found + findings
    print(f"{'all':18}{total:10,}{'':28}  {found}" + (f"  (in {out})" if found else ""))
    sys.exit(bool(found))


def _campaign(name: str, seconds: int, out: Path) -> tuple[int, str, int]:
    out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as corpus:
        command = [sys.executable, __file__, f"--one={name}", f"--out={out}", corpus]
        command += [f"-max_total_time={seconds}", f"-timeout={HANG_SECONDS}", f"-rss_limit_mb={MEMORY_MB}"]
        command += ["-max_len=4096", "-print_final_stats=1", f"-artifact_prefix={out}/fatal-"]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    took = time.monotonic() - began
    stats = {key: int(value) for key, value in re.findall(r"stat::(\w+):\s+(\d+)", done.stderr)}
    runs, peak = stats.get("number_of_executed_units", 0), stats.get("peak_rss_mb", 0)
    findings = len(list(out.glob("*.input"))) + len(list(out.glob("fatal-*")))
    if done.returncode or not runs:  # libFuzzer ends at a hang, a crash or too much memory; so does a broken target
        (out / "log.txt").write_text(done.stdout + done.stderr, encoding="utf-8")
        findings = max(findings, 1)
    return runs, f"{runs:10,}{took:9.0f}{runs / took:10,.0f}{peak:9,}", findings


def fuzz(name: str, out: Path, arguments: list[str]) -> None:
    """Runs libFuzzer on one target in this process; does not return."""
    atheris: Any = importlib.import_module("atheris")  # where it is not installed, type checkers need not find it
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    warnings.simplefilter("ignore")
    sys.path.insert(0, str(HERE.parent))
    with atheris.instrument_imports(include=["fused_rec", "zipfile", "tarfile", "json", "csv", "gzip"]):
        from malformed_inputs import TARGETS, try_one
    logging.getLogger("fused_rec.text.cache").setLevel(logging.ERROR)  # a warning for every spoiled shard
    target = TARGETS[name]
    seen: set[str] = set()

    def one(data: bytes) -> None:
        try:
            try_one(target, data)
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)
            where = [f"{frame.filename}:{frame.lineno}" for frame in frames if "fused_rec" in frame.filename]
            kind = hashlib.sha256(f"{type(error)}{where[-1:]}".encode()).hexdigest()[:12]
            if kind not in seen:
                seen.add(kind)
                (out / f"{kind}.input").write_bytes(data)
                (out / f"{kind}.txt").write_text(traceback.format_exc(), encoding="utf-8", errors="replace")

    [corpus, *flags] = arguments
    for number, seed in enumerate(target.seeds):
        Path(corpus, f"seed{number}").write_bytes(seed)
    dictionary = out / "words.dict"
    if target.words:
        quoted = ("".join(f"\\x{byte:02x}" for byte in word) for word in target.words)
        dictionary.write_text("".join(f'"{word}"\n' for word in quoted), encoding="utf-8")
        flags.append(f"-dict={dictionary}")
    atheris.Setup([sys.argv[0], corpus, *flags], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
