"""Learning curves: one JSON line per step, the same as TensorBoard event files, and optionally Weights & Biases."""

import contextlib
import hashlib
import json
import math
import os
import platform
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from absl import logging
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]

from fused_rec.config import LOW_TEMPERATURE, TEMPERATURES, Config, portable
from fused_rec.runs.run_dir import REFIT, REFIT_ALL
from fused_rec.storage import persist, write_file

LINES, TENSORBOARD, WANDB = "curves.jsonl", "tensorboard", "wandb.json"


def read_curves(folder: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Reads <folder>/curves.jsonl.

    Args:
      folder: folder of the curves.

    Returns:
      A record per line; empty if the file is missing.

    Raises:
      ValueError: a line is no record of a step; names the line.
    """
    file, found = Path(folder) / LINES, []
    if not file.exists():
        return []
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        _step(file, number, line)
        found.append(json.loads(line))
    return found


def wandb_library() -> Any:
    """Imports Weights & Biases.

    Returns:
      The module.

    Raises:
      ImportError: it is not installed; names the extra.
    """
    try:
        import wandb
    except ImportError as error:
        raise ImportError(
            "train.wandb needs the library wandb: pip install -e '.[wandb]', or leave the setting empty"
        ) from error
    return wandb


class MetricWriter:
    """Writer of the values of a run to Weights & Biases."""

    def __init__(self, run: Any):
        self._run = run

    def write(self, phase: str, step: int, values: Mapping[str, float]) -> None:
        """Logs the values of a step.

        Args:
          phase: prefix of their names.
          step: the step; a resumed run logs repeated steps twice.
          values: values by name.
        """
        self._run.log({f"{phase}/step": step, **{f"{phase}/{name}": value for name, value in values.items()}})

    def write_results(self, results: Mapping[str, Any]) -> None:
        """Logs the metrics of validation and test and the other numbers of `results.json` as the summary of the run."""
        found = {f"{part}/{name}": value for part in ("valid", "test") for name, value in results[part].items()}
        found |= {name: value for name, value in results.items() if isinstance(value, int | float)}
        self._run.summary.update(found)


@contextlib.contextmanager
def metric_writer(config: Config, workdir: Path) -> Iterator[MetricWriter | None]:
    """Opens a Weights & Biases run, which is finished at the end of the block.

    Its id is a hash of host and folder, kept in <workdir>/wandb.json, so a resumed run continues it even if its folder
    was moved. Curves, results and settings without local paths are sent; no code, console output or machine data. With
    WANDB_MODE=offline, everything stays in <workdir>/wandb.

    Args:
      config: settings of the run; an empty train.wandb disables it.
      workdir: folder of the run.

    Yields:
      The writer, or None if disabled.

    Raises:
      ImportError: the library is not installed.
      ValueError: Weights & Biases refuses the run, for example without an API key; or wandb.json is damaged.
    """
    if not config.train.wandb:
        yield None
        return
    wandb = wandb_library()
    options = wandb.Settings(
        console="off",
        disable_code=True,
        disable_git=True,
        disable_job_creation=True,
        x_disable_machine_info=True,
        x_disable_meta=True,
        x_disable_stats=True,
    )
    name = workdir.resolve().name
    of_run = {"project": config.train.wandb, "id": _wandb_id(workdir), "name": name, "dir": str(workdir)}
    try:
        run = wandb.init(**of_run, config=portable(config), resume="allow", settings=options)
    except wandb.errors.Error as error:
        remedy = "run `wandb login`, set WANDB_MODE=offline, or leave train.wandb empty"
        raise ValueError(f"Weights & Biases does not start a run: {error}; {remedy}") from error
    failed = True
    try:
        further = (*TEMPERATURES[1:], LOW_TEMPERATURE)
        phases = "select", *(f"select_{temperature:g}" for temperature in further), REFIT, REFIT_ALL
        for phase in phases:  # steps of its own: W&B's count would drop what a resumed run repeats
            run.define_metric(f"{phase}/*", step_metric=f"{phase}/step")
        yield MetricWriter(run)
        failed = False
    finally:
        run.finish(exit_code=int(failed))


def _wandb_id(workdir: Path) -> str:
    file = workdir / WANDB
    if not file.exists():
        made = hashlib.sha256(f"{platform.node()}:{workdir.resolve()}".encode()).hexdigest()[:16]
        write_file(file, json.dumps({"id": made}).encode())
    try:
        found = json.loads(file.read_bytes())["id"]
    except (ValueError, KeyError, TypeError):
        found = None
    if not isinstance(found, str) or not found.isalnum():
        raise ValueError(f'{file} is damaged; it must hold {{"id": "..."}}. Remove it to begin another run there')
    return found


class CurveLogger:
    """Logger to <workdir>/curves.jsonl and <workdir>/tensorboard, for one process at a time.

    An incomplete last line of a killed process is removed with a warning when the file is opened. A `with` statement
    always closes both files.

    Args:
      workdir: folder of the files.
      board: also gets the values, with the name of the folder as their phase.
    """

    def __init__(self, workdir: str | os.PathLike[str], board: MetricWriter | None = None):
        self._workdir = Path(workdir)
        self._lines = self._workdir / LINES
        self._workdir.mkdir(parents=True, exist_ok=True)
        self._file = self._lines.open("a+b", buffering=0)
        self._mend()
        self._board = self._open_board()
        self._sent = board

    def write(self, step: int, values: Mapping[str, float | int]) -> None:
        """Appends one line {"step": step, name: value, ...} and flushes it.

        A nonfinite value is null in JSON and itself in TensorBoard.

        Args:
          step: the step.
          values: values by name.

        Raises:
          ValueError: a value is named "step".
          SaveError: the values could not be written; nothing of the line remains.
        """
        if "step" in values:
            raise ValueError('a value is named "step", which names the step itself; rename it')
        numbers = {name: float(value) for name, value in values.items()}
        line = {"step": step, **{name: number if math.isfinite(number) else None for name, number in numbers.items()}}
        content = json.dumps(line).encode() + b"\n"
        summary = Summary(value=[Summary.Value(tag=name, simple_value=number) for name, number in numbers.items()])
        event = Event(step=step, wall_time=time.time(), summary=summary)
        persist(lambda: self._append(content), self._lines)
        persist(lambda: self._show(event), self._workdir / TENSORBOARD)
        if self._sent is not None:
            self._sent.write(self._workdir.name, step, numbers)

    def rewind(self, step: int) -> None:
        """Removes the values after a step; a killed run may have logged values after its last checkpoint.

        The JSON file is replaced atomically. TensorBoard files only grow; an event in them hides later steps.

        Args:
          step: last step to keep.

        Raises:
          ValueError: a line is no record of a step; names the line. Nothing is removed then.
          SaveError: the files could not be written; the lines are unchanged.
        """
        lines = self._lines.read_bytes().splitlines(keepends=True)
        kept = [line for number, line in enumerate(lines, 1) if _step(self._lines, number, line) <= step]
        write_file(self._lines, b"".join(kept))
        self.close()
        self._file = self._lines.open("a+b", buffering=0)
        self._board = self._open_board(hide_from=step + 1)

    def __enter__(self) -> "CurveLogger":
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        # If writing failed, closing fails too; the first error is the one to report.
        with contextlib.suppress(OSError) if kind else contextlib.nullcontext():
            self.close()

    def close(self) -> None:
        """Closes both files."""
        try:
            self._file.close()
        finally:
            self._board.close()

    def _mend(self) -> None:
        self._file.seek(0)
        content = self._file.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            logging.warning("%s: the incomplete last line %r is removed.", self._lines, content[whole:])
            self._file.truncate(whole)

    def _append(self, content: bytes) -> None:
        end = self._file.seek(0, os.SEEK_END)
        try:
            written = 0
            while written < len(content):  # on a nearly full disk a write may be partial before it fails
                written += self._file.write(content[written:])
        except OSError:
            self._file.truncate(end)
            raise

    def _show(self, event: Event) -> None:
        try:
            self._board.write_event(event)
            self._board.flush()
        except OSError:
            self._board = (
                self._open_board()
            )  # TensorBoard stops at an incomplete record, and continues with the next file
            raise

    def _open_board(self, hide_from: int | None = None) -> EventsWriter:
        # Not SummaryWriter: its queue is not empty after flush(), so a killed process would lose values.
        # The suffix makes names unique: with whole seconds, a second writer could truncate the first one's file.
        def attempt() -> EventsWriter:
            (self._workdir / TENSORBOARD).mkdir(exist_ok=True)
            board = EventsWriter(str(self._workdir / TENSORBOARD / "events"), f".{time.time_ns()}")
            if hide_from is not None:
                board.write_event(
                    Event(step=hide_from, wall_time=time.time(), session_log=SessionLog(status=SessionLog.START))
                )
            board.flush()
            return board

        return persist(attempt, self._workdir / TENSORBOARD)


def _step(file: Path, number: int, line: bytes) -> int:
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        step = None
    if not isinstance(step, int):
        raise ValueError(f"{file}, line {number} is no record of a step: {line!r}; repair or remove it")
    return step
