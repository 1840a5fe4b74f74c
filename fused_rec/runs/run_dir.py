"""Lock of a run directory: one process at a time writes to it."""

import contextlib
import datetime
import errno
import fcntl
import json
import logging
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

LOG = logging.getLogger(__name__)
LOCK = "run.lock"
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}  # of some network file systems


class BusyError(OSError):
    """Another process writes in the folder; the message says which, where and since when."""


@contextlib.contextmanager
def lock_run_dir(workdir: Path) -> Iterator[None]:
    """Creates `workdir` if needed and locks it against other processes until the block ends.

    The system releases the lock when the process ends, in any way. Readers need no lock. A new folder that is empty
    after the block is removed.

    Raises:
      BusyError: another process holds it.
      OSError: the folder cannot be written.
    """
    made = not workdir.exists()
    file = workdir / LOCK
    stream = _lock(file)
    try:
        stream.truncate(0)
        began = datetime.datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
        json.dump({"pid": os.getpid(), "host": platform.node(), "since": began}, stream)
        stream.flush()
        yield
    finally:
        file.unlink(missing_ok=True)  # before the lock goes: what another process locks then is a file of its own
        stream.close()
        if made:
            with contextlib.suppress(OSError):
                workdir.rmdir()


def _lock(file: Path) -> TextIO:
    for attempts_left in reversed(range(100)):
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            stream = file.open("a+", encoding="utf-8")
        except (FileExistsError, FileNotFoundError):
            if not attempts_left:
                raise
            continue  # its last holder removed the empty folder meanwhile
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in NO_LOCKS:
                LOG.warning("%s: %s; see to it that no other process uses this folder", file, error)
                return stream
            with stream:
                if not isinstance(error, BlockingIOError):
                    raise
                raise BusyError(_who_holds(file, stream)) from None
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(stream.fileno()), file.stat()):
                return stream
        stream.close()  # its last holder removed it between the opening and the locking
    raise BusyError(
        f"{file.parent} is taken and left by other processes all the time; give this run a workdir of its own"
    )


def _who_holds(file: Path, stream: TextIO) -> str:
    stream.seek(0)
    try:
        holder = json.loads(stream.read())
        who = f"process {holder['pid']} on {holder['host']} since {holder['since']}"
    except (ValueError, KeyError, TypeError):  # caught between locking and writing
        who = "another process"
    return f"{file.parent} is in use by {who}; wait for it, stop it, or give this run a workdir of its own"
