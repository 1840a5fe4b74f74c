"""SIGINT and SIGTERM as a request to stop, answered where nothing is lost by it.

Python runs a handler between any two instructions. Most of a run may end there: what it writes is written in whole
files, and the rest is computed again. Where work in memory must be saved first, `deferred` lets the request wait for a
safe point. Signals belong to the whole process, and so does what this module remembers of them.
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
# A person takes a tenth of a second to press Ctrl-C again.
ONE_REQUEST = 0.05


REPEAT_SECONDS = 0.005


class Stopped(BaseException):
    """The process was asked to end, which is no failure: `except Exception` lets it pass, as it does Ctrl-C.

    Notes (`add_note`) say what was saved on the way out.
    """

    def __init__(self, signum: int):
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.exit_status = 128 + signum  # as shells report it


class _Request:
    """What was asked so far, and how many `deferred` blocks the main thread is in."""

    signum: int | None = None
    deferred: int = 0
    repeats: int = 0  # signals that this module sent itself, and the listener has not seen yet


_REQUEST = _Request()


@contextlib.contextmanager
def handle_signals() -> Iterator[None]:
    """Within the block the first SIGINT or SIGTERM raises Stopped: at once, or at the end of a `deferred` block.

    A second one ends the process at once, also while the main thread compiles or waits for a device; handlers in
    Python would have to wait with it, so a thread listens. The earlier handlers are put back after the block. A signal
    that the process was started to ignore stays ignored. Outside the main thread, where Python allows no handlers, the
    block changes nothing.
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
    """Within the block a request waits: for `raise_if_requested`, a `immediate` block or the end of the block."""
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
    """Within the block, inside a `deferred` one, a request is answered at once."""
    holds, _REQUEST.deferred = _REQUEST.deferred, 0
    try:
        raise_if_requested()
        yield
    finally:
        _REQUEST.deferred = holds


def raise_if_requested(agree: Callable[[bool], bool] = bool) -> None:
    """Raises Stopped where the process was asked to stop; a safe point of a `deferred` block.

    agree: what all processes of a run make of one's having been asked.
    """
    if agree(_REQUEST.signum is not None):
        raise Stopped(_REQUEST.signum or signal.SIGTERM)


def _request_stop(signum: int, frame: FrameType | None) -> None:
    if _REQUEST.signum is None:
        _REQUEST.signum = signum
        if not _REQUEST.deferred:
            raise Stopped(signum)


def _unraisable(unraisable: "sys.UnraisableHookArgs") -> None:
    """Asks again where Stopped was raised in a place that cannot pass it on, as a finalizer or a callback of C code."""
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
                f"\n{signal.Signals(received[0]).name}: stopping as soon as nothing is lost by it; again stops at once"
            )
            print(message, file=sys.stderr, flush=True)
        elif time.monotonic() - first > ONE_REQUEST:
            os._exit(128 + received[0])
    os.close(reader)
