"""Commands in processes that do not spend seconds on imports: forks of a process that has imported the libraries.

Each is a process of its own with its arguments, environment, output and status, as if `python -m` or `python -c` had
started it; its id is its own, and signals stop and kill it like any other. Tests of what happens before or during the
imports, of standard input and of closed pipes start Python itself.
"""

import gc
import importlib
import json
import math
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
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
LONGEST = 600  # seconds that a command may take
PAUSE = 0.02  # seconds between two looks at whether a process has ended


class _Parent:
    """A process that has imported the libraries. It forks, and waits for a fork, when asked."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            cwd=ROOT,
            env=environment | {NO_ADVICE: "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._folder = tempfile.TemporaryDirectory(prefix="fused_rec-output-")
        self._commands = 0

    def start(self, arguments: list[str]) -> "Process":
        """Forks for a command, whose output goes to files of its own."""
        self._commands += 1
        out, err = (Path(self._folder.name) / f"{self._commands}.{name}" for name in ("out", "err"))
        for file in (out, err):
            file.touch()  # it is there even if a signal comes before the fork opens it
        pid = self.ask("start", str(out), str(err), *arguments)
        assert pid is not None
        return Process(self, pid, arguments, out, err)

    def ask(self, *question: str | int) -> int | None:
        """Sends one line, and returns what the line that answers it holds."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            print(json.dumps(question), file=self._process.stdin, flush=True)
            return json.loads(self._process.stdout.readline())
        except BaseException:  # what comes later is not the answer to another question
            self._process.kill()
            self._process.wait()
            raise

    def runs(self) -> bool:
        """Tells whether the process still answers."""
        return self._process.poll() is None

    def close(self) -> None:
        """Ends the process, and all commands that still run."""
        self._process.communicate()
        self._folder.cleanup()


class Process:
    """A command that runs or ran, with some of the methods of `subprocess.Popen`.

    Attributes:
      args: the command line, from the name of the module on.
      pid: the id of the process. No other one gets it before `returncode` is known.
      returncode: the status; below 0, the signal that ended the process; None while it is not known to have ended.
      out: file of what it writes to standard output; `communicate` removes it.
      err: likewise, to standard error.
    """

    def __init__(self, parent: _Parent, pid: int, args: list[str], out: Path, err: Path) -> None:
        self.args, self.pid, self.out, self.err = args, pid, out, err
        self.returncode: int | None = None
        self._parent = parent

    def poll(self) -> int | None:
        """Returns the status, None while the process runs."""
        if self.returncode is None:
            self.returncode = self._parent.ask("wait", self.pid, os.WNOHANG)
        return self.returncode

    def wait(self, timeout: float = math.inf) -> int:
        """Waits for the end of the process.

        Args:
          timeout: after how many seconds `subprocess.TimeoutExpired` is raised.

        Returns:
          The status.
        """
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(self.args, timeout)
            time.sleep(PAUSE)
        assert self.returncode is not None
        return self.returncode

    def communicate(self, timeout: float = math.inf) -> tuple[str, str]:
        """Waits as `wait` does, and returns all that was written to standard output and standard error. Once only."""
        self.wait(timeout)
        out, err = self.out.read_text(), self.err.read_text()
        self.out.unlink()
        self.err.unlink()
        return out, err

    def send_signal(self, signum: int) -> None:
        """Sends a signal, unless the process has ended."""
        if self.poll() is None:
            os.kill(self.pid, signum)


# JAX reads its variables when it is imported, so each environment has a process of its own.
_parents: dict[frozenset[tuple[str, str]], _Parent] = {}


def start(module: str, *arguments: str, **changes: str) -> Process:
    """Starts `python -m module arguments` from the checkout.

    Args:
      module: such as experiments.train; or -c, and the first of the arguments is code.
      arguments: of the command line.
      changes: variables of the environment that differ from those of this process.

    Returns:
      The process, which runs.
    """
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"} | changes
    key = frozenset(environment.items())
    if key in _parents and not _parents[key].runs():
        _parents.pop(key).close()
    if key not in _parents:
        _parents[key] = _Parent(environment)
    return _parents[key].start([module, *arguments])


def run(module: str, *arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
    """Runs to its end what `start` starts with the same arguments.

    Returns:
      The status and all output.

    Raises:
      subprocess.TimeoutExpired: it took longer than `LONGEST`, and was killed.
    """
    process = start(module, *arguments, **changes)
    try:
        out, err = process.communicate(LONGEST)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        raise
    return subprocess.CompletedProcess(process.args, process.wait(), out, err)


def close() -> None:
    """Ends the processes that have imported the libraries."""
    for parent in _parents.values():
        parent.close()
    _parents.clear()


def _serve() -> None:
    """Imports the libraries, and does what each line that comes in asks for, until there is no more."""
    sys.path[0] = str(ROOT)
    for module in LIBRARIES:
        importlib.import_module(module)
    del os.environ[NO_ADVICE]
    gc.collect()
    gc.freeze()  # forks share it
    running = set()
    while line := sys.stdin.readline():
        asked, *given = json.loads(line)
        if asked == "start":
            with warnings.catch_warnings(action="ignore"):  # Python 3.12 warns of threads; jemalloc's outlives a fork
                answer = os.fork()
            if not answer:
                return _run(*given)
            running.add(answer)
        else:
            ended, status = os.waitpid(*given)
            answer = os.waitstatus_to_exitcode(status) if ended else None
            running.discard(ended)
        print(json.dumps(answer), flush=True)
    for pid in running:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _run(out: str, err: str, module: str, *arguments: str) -> None:
    """Runs a module as a process that was just forked, which then ends as usual."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, name in ((1, out), (2, err)):
        os.dup2(os.open(name, os.O_WRONLY), number)
    if module == "-c":
        sys.argv = [module, *arguments[1:]]
        exec(compile(arguments[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = [module, *arguments]
        runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _serve()
