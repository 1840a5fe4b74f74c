"""Atomic writes of files and folders, with one retry and errors that give the reason.

Content is written beside its target as `.NAME.PID.partial`, flushed to disk, and renamed. A killed process leaves only
such a partial file: readers ignore names that begin with a dot, and the next process that writes the same target
removes the partial files of processes that no longer run.
"""

import contextlib
import errno
import glob
import io
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

LOG = logging.getLogger(__name__)
PARTIAL = ".partial"
FULL = (errno.ENOSPC, errno.EDQUOT)
T = TypeVar("T")


class SaveError(OSError):
    """Error for a file, folder or checkpoint that could not be written; what existed before is unchanged.

    Attributes:
      need: bytes that it takes at least, 0 where not known.
    """

    need: int = 0


def write_file(file: Path, content: bytes) -> None:
    """Writes a file atomically, with one retry.

    Args:
      file: target, in an existing folder.
      content: its bytes.

    Raises:
      SaveError: it cannot be written; `file` is unchanged.
    """
    fill_file(file, lambda partial: partial.write_bytes(content), need=len(content))


def write_figure(file: Path, figure: Any) -> None:
    """Writes a Matplotlib figure atomically.

    Args:
      file: target; its suffix selects the format.
      figure: the figure.

    Raises:
      SaveError: it cannot be written; `file` is unchanged.
    """
    content = io.BytesIO()
    figure.savefig(content, format=file.suffix.removeprefix("."))
    write_file(file, content.getvalue())


def fill_file(file: Path, fill: Callable[[Path], T], *, kept: Callable[[], str] = lambda: "", need: int = 0) -> T:
    """Writes a file atomically by a function.

    Args:
      file: target, in an existing folder.
      fill: writes the file at the path it is given.
      kept: returns a sentence on what is saved nevertheless, for the error.
      need: bytes of the file, 0 where not known.

    Returns:
      The result of `fill`.

    Raises:
      SaveError: it cannot be written; `file` is unchanged. Other exceptions of `fill` are passed on.
    """
    return _placed(file, fill, kept, need)


def fill_folder(folder: Path, fill: Callable[[Path], T]) -> T:
    """Creates a folder atomically by a function.

    Args:
      folder: new or empty; parents are created.
      fill: writes into the folder it is given.

    Returns:
      The result of `fill`.

    Raises:
      FileExistsError: as in `check_new`.
      SaveError: it cannot be written; `folder` is unchanged. Other exceptions of `fill` are passed on.
    """
    check_new(folder)
    folder = folder.resolve()

    def made(partial: Path) -> T:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
        return fill(partial)

    return _placed(folder, made, lambda: "", 0)


@contextlib.contextmanager
def scratch(target: Path) -> Iterator[Path]:
    """Creates a temporary folder beside `target` and removes it when the block ends.

    After a kill, the next write of the same target removes it.

    Args:
      target: file or folder to work on.

    Yields:
      The temporary folder.
    """
    _clear(target)
    partial = _partial(target)
    partial.mkdir()
    try:
        yield partial
    finally:
        _remove(partial)


def check_new(folder: Path) -> None:
    """Checks that a folder can be created.

    Args:
      folder: target of `fill_folder`.

    Raises:
      FileExistsError: it contains files, is a file, or is a mount point.
    """
    if folder.is_dir() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} holds files already; name a new folder")
    if not folder.is_dir() and (folder.exists() or folder.is_symlink()):
        raise FileExistsError(f"{folder} is a file; name a new folder")
    if os.path.ismount(folder):
        raise FileExistsError(f"{folder} is a mount point and cannot be renamed; name a new folder in it")


def persist(
    attempt: Callable[[], T],
    target: Path,
    kept: Callable[[], str] = lambda: "",
    *,
    errors: type[Exception] = Exception,
    need: Callable[[], int] = lambda: 0,
) -> T:
    """Calls a function that writes `target`, and once more where it fails.

    Args:
      attempt: writes `target`, or cleans up and raises.
      target: for the error.
      kept: returns a sentence on what is saved nevertheless, for the error.
      errors: exceptions that mean it could not be written; TensorStore raises ValueError for a full disk.
      need: returns the bytes it takes at least, for the error of a full disk; 0 = not known.

    Returns:
      The result of `attempt`.

    Raises:
      SaveError: both attempts failed; has the target, the reason, and the free space where the disk is full.
    """
    try:
        return attempt()
    except errors as error:
        failed = error
        if not isinstance(error, SaveError):  # this one was already retried
            LOG.warning("%s could not be written, and is tried once more: %s", target, error)
            try:
                return attempt()
            except errors as second:
                failed = second
    reason = failed.__cause__ if isinstance(failed, SaveError) and failed.__cause__ else failed
    sentences = [f"{target} could not be written: {reason}{_space(reason, target.parent, need())}.", kept()]
    raised = SaveError(" ".join(filter(None, sentences)) + " Once it can be written, the same command goes on.")
    raised.need = need()
    raise raised from reason


def _placed(target: Path, fill: Callable[[Path], T], kept: Callable[[], str], need: int) -> T:
    """Writes a partial file or folder, flushes it to disk and renames it to `target`."""
    written = need

    def attempt() -> T:
        nonlocal written
        _clear(target)
        partial = _partial(target)
        try:
            result = fill(partial)
            for path in [*(partial.rglob("*") if partial.is_dir() else ()), partial]:
                _flush(path)
            partial.replace(target)
        except BaseException as error:
            missing = error.need if isinstance(error, SaveError) else 0
            written = max(written, _size(partial) + missing)
            _remove(partial)
            raise
        return result

    return persist(attempt, target, kept, errors=OSError, need=lambda: written)


def _partial(target: Path) -> Path:
    """Returns the path of this process's partial file of a target."""
    return target.with_name(f".{target.name}.{os.getpid()}{PARTIAL}")


def _clear(target: Path) -> None:
    """Removes partial files of processes that no longer run."""
    for left in target.parent.glob(f".{glob.escape(target.name)}.*{PARTIAL}"):
        number = left.name.removeprefix(f".{target.name}.").removesuffix(PARTIAL)
        if number.isascii() and number.isdigit() and not _runs(int(number)):
            _remove(left)


def _runs(pid: int) -> bool:
    """Returns whether another process has this id."""
    if pid == os.getpid():  # left by an earlier process with this id, since this one writes a target once at a time
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def _remove(path: Path) -> None:
    """Removes a file or folder where possible."""
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Flushes a file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot flush a folder
            raise
    finally:
        os.close(descriptor)


def _size(path: Path) -> int:
    """Returns the bytes of a file or of all files of a folder."""
    with contextlib.suppress(OSError):
        return sum(file.stat().st_size for file in [*path.rglob("*"), path] if file.is_file())
    return 0


def _space(error: BaseException, folder: Path, need: int) -> str:
    """Describes needed and free space where the disk is full."""
    if not any(os.strerror(code) in str(error) for code in FULL):
        return ""
    while not folder.exists():
        folder = folder.parent
    needed = f"; at least {need / 1e6:.1f} MB are needed" if need else ""
    return f"{needed}; {shutil.disk_usage(folder).free / 1e6:.1f} MB are free in {folder}"
