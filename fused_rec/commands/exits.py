"""Early ends of a command's process. Imports no library, so that it is active while libraries are imported."""

import os
import signal
import sys
from typing import NoReturn

BROKEN_PIPE = 141  # as shells report SIGPIPE


def exit_on_interrupt() -> None:
    """Makes Ctrl-C end the process at once during the imports, which take seconds."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, lambda signum, frame: os._exit(128 + signum))


def open_missing_streams() -> None:
    """Gives a process that was started without output streams, as by `>&-`, streams to the null device."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))


def exit_broken_pipe() -> NoReturn:
    """Ends a process whose output is no longer read, as in `command | head -1`, without a message."""
    unread = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):  # what is still in their buffers goes nowhere
        try:
            os.dup2(unread, stream.fileno())
        except (AttributeError, OSError, ValueError):
            continue
    sys.exit(BROKEN_PIPE)
