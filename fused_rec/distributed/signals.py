"""SIGINT and SIGTERM as requests to stop, answered where no work is lost.

Python runs a signal handler between any two instructions. Most of a run may stop there: files are written atomically,
and the rest is recomputed. Where work in memory must be saved first, `deferred` delays the request to a safe point.
Signals belong to the whole process, and so does the state of this module.
"""

import _thread
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Seconds in which further signals are the same request: `timeout` and shells may send one twice, within a millisecond.
# Pressing Ctrl-C again takes a tenth of a second.
ONE_REQUEST = 0.05


REPEAT_SECONDS = 0.005


class Stopped(BaseException):
    """Exception for a requested stop. It is no failure: like Ctrl-C, it passes `except Exception`.

    Notes (`add_note`) list what was saved before the stop.
    """

    def __init__(self, signum: int):
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.exit_status = 128 + signum  # as shells report it


class _Request:
    """State of the process.

    Attributes:
      signum: the signal received first, None without any.
      deferred: number of nested `deferred` blocks of the main thread.
      repeats: signals that this module sent itself and the listener has not processed yet.
    """

    signum: int | None = None
    deferred: int = 0
    repeats: int = 0  # signals that this module sent itself, and the listener has not seen yet


_REQUEST = _Request()


@contextlib.contextmanager
def handle_signals() -> Iterator[None]:
    """Raises Stopped at the first SIGINT or SIGTERM inside the block: at once, or at the end of a `deferred` block.

    A second signal ends the process at once, also while the main thread compiles or waits for a device: a Python
    handler would wait too, so a thread handles it. Earlier handlers are restored after the block. Signals that the
    process was started to ignore stay ignored. Outside the main thread, where Python allows no handlers, the block has
    no effect.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _REQUEST.signum, _REQUEST.deferred, _REQUEST.repeats = None, 0, 0
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    threading.Thread(target=_listen, args=(reader,), name="signals", daemon=True).start()
    reported_before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    before = {signum: signal.getsignal(signum) for signum in SIGNALS}
    hook, sys.unraisablehook = sys.unraisablehook, _unraisable
    handled = [signum for signum in SIGNALS if before[signum] is not signal.SIG_IGN]
    try:
        for signum in handled:
            signal.signal(signum, _request_stop)
        yield
    finally:
        for signum in handled:
            signal.signal(signum, before[signum])
        signal.set_wakeup_fd(reported_before)
        sys.unraisablehook = hook
        os.close(writer)  # ends the thread
        _REQUEST.signum = None


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Delays requests inside the block to `raise_if_requested`, an `immediate` block or the end of the block."""
    raise_if_requested()
    _REQUEST.deferred += 1
    try:
        yield
    finally:
        _REQUEST.deferred -= 1
    if not _REQUEST.deferred:
        raise_if_requested()


@contextlib.contextmanager
def immediate() -> Iterator[None]:
    """Answers requests at once inside the block, which lies in a `deferred` block."""
    holds, _REQUEST.deferred = _REQUEST.deferred, 0
    try:
        raise_if_requested()
        yield
    finally:
        _REQUEST.deferred = holds


def raise_if_requested(agree: Callable[[bool], bool] = bool) -> None:
    """Raises Stopped if a stop was requested; marks a safe point of a `deferred` block.

    Args:
      agree: combines the request of this process with those of the other processes of a run.

    Raises:
      Stopped: a stop was requested.
    """
    if agree(_REQUEST.signum is not None):
        raise Stopped(_REQUEST.signum or signal.SIGTERM)


def _request_stop(signum: int, frame: FrameType | None) -> None:
    if _REQUEST.signum is None:
        _REQUEST.signum = signum
        if not _REQUEST.deferred:
            raise Stopped(signum)


def _unraisable(unraisable: "sys.UnraisableHookArgs") -> None:
    """Repeats the request if Stopped was raised where it cannot propagate, as in a finalizer or a callback from C."""
    if isinstance(unraisable.exc_value, Stopped):
        threading.Timer(REPEAT_SECONDS, _repeat, [_REQUEST.signum or signal.SIGTERM]).start()
    else:
        sys.__unraisablehook__(unraisable)


def _repeat(signum: int) -> None:
    _REQUEST.signum = None
    _REQUEST.repeats += 1
    _thread.interrupt_main(signal.Signals(signum))


def _listen(reader: int) -> None:
    first = None
    while received := os.read(reader, 1):
        if received[0] not in SIGNALS:
            continue
        if _REQUEST.repeats:
            _REQUEST.repeats -= 1
            continue
        if first is None:
            first = time.monotonic()
            message = (
                f"\n{signal.Signals(received[0]).name}: stopping at the next safe point; another signal stops at once"
            )
            print(message, file=sys.stderr, flush=True)
        elif time.monotonic() - first > ONE_REQUEST:
            os._exit(128 + received[0])
    os.close(reader)
