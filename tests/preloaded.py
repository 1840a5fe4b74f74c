"""Commands in processes that do not spend seconds on imports: forks of a process that has imported the libraries.

Each is a process of its own with its arguments, environment, output and status, as if `python -m` had started it. Tests
of signals, of killed processes and of what happens before the imports start Python itself.
"""

import gc
import importlib
import json
import os
import runpy
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

ROOT = Path(__file__).parents[1]
# No module of `fused_rec.commands`: each defines its flags when it is imported.
LIBRARIES = (
    "fused_rec.api",
    "ml_collections.config_flags",
    "sklearn.decomposition",
    "sklearn.feature_extraction.text",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.bert.tokenization_bert",
)
NO_ADVICE = "TRANSFORMERS_NO_ADVISORY_WARNINGS"  # to install PyTorch; of the import alone
# JAX reads its variables when it is imported, so each environment has a process of its own.
_started: dict[frozenset[tuple[str, str]], subprocess.Popen[str]] = {}


def run(module: str, *arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
    """Runs `python -m module arguments` from the checkout to its end.

    Args:
      module: such as experiments.train.
      arguments: of the command line.
      changes: variables of the environment that differ from those of this process.

    Returns:
      The status and all output.
    """
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"} | changes
    key = frozenset(environment.items())
    if key not in _started:
        _started[key] = subprocess.Popen(
            [sys.executable, __file__],
            cwd=ROOT,
            env=environment | {NO_ADVICE: "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
    process = _started[key]
    assert process.stdin is not None and process.stdout is not None
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps([folder, module, *arguments]), file=process.stdin, flush=True)
        status = os.waitstatus_to_exitcode(int(process.stdout.readline()))
        out, err = ((Path(folder) / name).read_text() for name in ("out", "err"))
    return subprocess.CompletedProcess([module, *arguments], status, out, err)


def close() -> None:
    """Ends the processes that have imported the libraries."""
    for process in _started.values():
        process.communicate()
    _started.clear()


def _serve() -> None:
    """Imports the libraries, and forks for each line that comes in, until there is no more."""
    sys.path[0] = str(ROOT)
    for module in LIBRARIES:
        importlib.import_module(module)
    del os.environ[NO_ADVICE]
    gc.collect()
    gc.freeze()  # forks share it
    while line := sys.stdin.readline():
        with warnings.catch_warnings(action="ignore"):  # Python 3.12 warns of threads; jemalloc's outlives a fork
            pid = os.fork()
        if not pid:
            return _run(*json.loads(line))
        print(os.waitpid(pid, 0)[1], flush=True)


def _run(folder: str, module: str, *arguments: str) -> None:
    """Runs a module as a process that was just forked, which then ends as usual."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT), number)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _serve()
