"""Files and folders that are written whole or not at all, and errors that say why they could not be written.

What is being written lies beside its target as `.NAME.PID.partial`, goes onto the disk, and is then renamed. A killed
process leaves such a neighbor and nothing else: readers ignore names that begin with a dot, and the next process that
writes the same target removes the neighbors of processes that are gone.
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
    """A file, folder or checkpoint could not be written; what was there before is as it was.

    need: bytes that it takes at least, 0 where they are not known.
    """

    need: int = 0


def write_file(file: Path, content: bytes) -> None:
    """Writes all or nothing, and twice if need be. Raises SaveError where it cannot; `file` is as it was before."""
    fill_file(file, lambda partial: partial.write_bytes(content), need=len(content))


def write_figure(file: Path, figure: Any) -> None:
    """Writes a figure of Matplotlib, all or nothing, in the format of the file's ending. Raises SaveError."""
    content = io.BytesIO()
    figure.savefig(content, format=file.suffix.removeprefix("."))
    write_file(file, content.getvalue())


def fill_file(file: Path, fill: Callable[[Path], T], *, kept: Callable[[], str] = lambda: "", need: int = 0) -> T:
    """Writes a file by `fill`, all or nothing, and returns what `fill` does.

    Args:
      file: in a folder that is there.
      fill: writes the file of the name that it is given.
      kept: a sentence on what is left all the same, for the error.
      need: bytes that it takes, where they are known.

    Raises:
      SaveError: it cannot be written; `file` is as it was before. What else `fill` raises is passed on.
    """
    return _placed(file, fill, kept, need)


def fill_folder(folder: Path, fill: Callable[[Path], T]) -> T:
    """Makes a folder by `fill`, all or nothing, and returns what `fill` does.

    Args:
      folder: new or empty; those above it are made.
      fill: writes into the folder that it is given.

    Raises:
      FileExistsError: as `check_new` does.
      SaveError: it cannot be written; `folder` is as it was before. What else `fill` raises is passed on.
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
    """A new folder beside `target`, removed when the block ends; the next one for `target` removes it after a kill."""
    _clear(target)
    partial = _neighbor(target)
    partial.mkdir()
    try:
        yield partial
    finally:
        _remove(partial)


def check_new(folder: Path) -> None:
    """Raises FileExistsError where `folder` cannot be made: it holds files, is none, or is where a disk is mounted."""
    if folder.is_dir() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} holds files already; name a new folder")
    if not folder.is_dir() and (folder.exists() or folder.is_symlink()):
        raise FileExistsError(f"{folder} is a file; name a new folder")
    if os.path.ismount(folder):
        raise FileExistsError(f"{folder} is where a disk is mounted, and cannot be renamed; name a new folder in it")


def persist(
    attempt: Callable[[], T],
    target: Path,
    kept: Callable[[], str] = lambda: "",
    *,
    errors: type[Exception] = Exception,
    need: Callable[[], int] = lambda: 0,
) -> T:
    """What `attempt` returns, which writes `target` or cleans up and raises; tried once more where it fails.

    Args:
      attempt: is called once or twice.
      target: for the error.
      kept: a sentence on what is left all the same, for the error.
      errors: those that mean that it could not be written; TensorStore reports a full disk by a ValueError.
      need: bytes that it takes at least, for the error where the disk is full; 0 = not known.

    Raises:
      SaveError: both attempts failed; names the target, the reason, and the free space where the disk is full.
    """
    try:
        return attempt()
    except errors as error:
        failed = error
        if not isinstance(error, SaveError):  # which was tried twice already
            LOG.warning("%s could not be written, and is tried once more: %s", target, error)
            try:
                return attempt()
            except errors as second:
                failed = second
    reason = failed.__cause__ if isinstance(failed, SaveError) and failed.__cause__ else failed
    parts = [f"{target} could not be written: {reason}{_space(reason, target.parent, need())}.", kept()]
    raised = SaveError(" ".join(filter(None, parts)) + " Once it can be written, the same command goes on.")
    raised.need = need()
    raise raised from reason


def _placed(target: Path, fill: Callable[[Path], T], kept: Callable[[], str], need: int) -> T:
    """Fills a neighbor, brings it onto the disk and renames it to `target`."""
    written = need

    def attempt() -> T:
        nonlocal written
        _clear(target)
        partial = _neighbor(target)
        try:
            result = fill(partial)
            for path in [*(partial.rglob("*") if partial.is_dir() else ()), partial]:
                _flush(path)
            partial.replace(target)
        except BaseException as error:
            of_part = error.need if isinstance(error, SaveError) else 0
            written = max(written, _size(partial) + of_part)
            _remove(partial)
            raise
        return result

    return persist(attempt, target, kept, errors=OSError, need=lambda: written)


def _neighbor(target: Path) -> Path:
    return target.with_name(f".{target.name}.{os.getpid()}{PARTIAL}")


def _clear(target: Path) -> None:
    """Removes the neighbors that killed processes left; those of running ones stay."""
    for left in target.parent.glob(f".{glob.escape(target.name)}.*{PARTIAL}"):
        number = left.name.removeprefix(f".{target.name}.").removesuffix(PARTIAL)
        if number.isascii() and number.isdigit() and not _runs(int(number)):
            _remove(left)


def _runs(pid: int) -> bool:
    if pid == os.getpid():  # of an earlier process of the same number: this one writes one target once at a time
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot do it for a folder
            raise
    finally:
        os.close(descriptor)


def _size(path: Path) -> int:
    with contextlib.suppress(OSError):
        return sum(part.stat().st_size for part in [*path.rglob("*"), path] if part.is_file())
    return 0


def _space(error: BaseException, folder: Path, need: int) -> str:
    if not any(os.strerror(code) in str(error) for code in FULL):
        return ""
    while not folder.exists():
        folder = folder.parent
    needed = f"; at least {need / 1e6:.1f} MB are needed" if need else ""
    return f"{needed}; {shutil.disk_usage(folder).free / 1e6:.1f} MB are free in {folder}"
