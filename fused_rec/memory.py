"""Available memory, and an error before a step that would not fit.

A step computes its need from array shapes before it allocates. The need counts arrays whose size is a product of two
sizes of the data; smaller ones are ignored.
"""

import contextlib
import ctypes
import gc
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

MEBIBYTE = 2**20
ALWAYS_ALLOWED = 64 * MEBIBYTE  # needs up to this are not checked


class InsufficientMemoryError(MemoryError):
    """Error for a step that needs more memory than available; the message has both sizes and a remedy."""


def require_memory(need: int, what: str, remedy: str) -> None:
    """Checks that `need` bytes are available in this process; passes where this is not known.

    Args:
      need: bytes.
      what: name of the step, for the message.
      remedy: what to do instead, for the message.

    Raises:
      InsufficientMemoryError: less is available. Swap space does not count.
    """
    if need <= ALWAYS_ALLOWED:
        return
    available = available_memory()
    if available is None or need <= available:
        return
    _trim_heap()
    available = available_memory()
    if available is not None and need > available:
        raise InsufficientMemoryError(_message(need, available, what, remedy))


def require_device_memory(need: int, what: str, remedy: str) -> None:
    """Checks that `need` bytes are available on each device of this process; CPU devices share its memory.

    Args:
      need: bytes per device.
      what: name of the step, for the message.
      remedy: what to do instead, for the message.

    Raises:
      InsufficientMemoryError: a device has less, or, on CPU, the process has less for all devices together.
    """
    if need <= ALWAYS_ALLOWED:
        return
    import jax  # slow to import, and needed only here

    devices = jax.local_devices()
    if devices[0].platform == "cpu":
        require_memory(need * len(devices), what, remedy)
        return
    free = [stats["bytes_limit"] - stats["bytes_in_use"] for stats in map(_stats, devices) if "bytes_limit" in stats]
    if free and need > min(free):
        raise InsufficientMemoryError(_message(need, min(free), f"{what}, on each device", remedy))


def _stats(device: Any) -> dict[str, int]:
    """Returns the memory statistics of a device, empty where it has none."""
    return device.memory_stats() or {}


def _message(need: int, available: int, what: str, remedy: str) -> str:
    """Formats the error message."""
    return f"{what}: needs {size(need)} of memory, {size(available)} available; {remedy}"


def size(count: int) -> str:
    """Formats bytes in MB below 1 GB, else in GB: "14.4 GB"."""
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.0f} MB"


def available_memory(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Computes the memory this process can still allocate: the minimum over machine, container and process limits.

    On Linux: MemAvailable, the limits of the process's control groups (version 1 and 2) and their parents, RLIMIT_AS
    and RLIMIT_DATA. On macOS: the physical memory of the machine.

    Args:
      proc: root of the proc file system.
      cgroups: root of the control group file system.

    Returns:
      Bytes; None where not known (Windows).
    """
    left = [*_of_machine(proc), *_of_groups(proc, cgroups), *_of_limits(proc)]
    return max(0, min(left)) if left else None


def _of_machine(proc: Path) -> Iterator[int]:
    """Yields the available memory of the machine."""
    meminfo = _numbers(proc / "meminfo")
    if "MemAvailable" in meminfo:
        yield meminfo["MemAvailable"] * 1024
    elif not sys.platform.startswith(("linux", "win")):
        with contextlib.suppress(AttributeError, ValueError, OSError):
            yield os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _of_groups(proc: Path, cgroups: Path) -> Iterator[int]:
    """Yields the free memory of each control group with a limit; page cache counts as free, as it is reclaimable."""
    for line in _text(proc / "self" / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root = cgroups / "memory" if controllers else cgroups
        names = ("memory.limit_in_bytes",) if controllers else ("memory.max", "memory.high")
        usage = "memory.usage_in_bytes" if controllers else "memory.current"
        prefix = "total_" if controllers else ""
        # In a container the path may be the host's, while the group is mounted at the root.
        inside = PurePosixPath(path.lstrip("/"))
        for folder in dict.fromkeys([root / inside, *(root / parent for parent in inside.parents)]):
            files = _numbers(folder / "memory.stat")
            pages = sum(files.get(f"{prefix}{kind}_file", 0) for kind in ("active", "inactive"))
            used = _text(folder / usage).strip()
            for limit in (_text(folder / name).strip() for name in names):
                if limit.isdecimal() and used.isdecimal():
                    yield int(limit) - int(used) + pages


def _of_limits(proc: Path) -> Iterator[int]:
    """Yields what RLIMIT_AS and RLIMIT_DATA allow, including free heap."""
    try:
        import resource  # not on Windows
    except ImportError:
        return
    used = _numbers(proc / "self" / "status")
    for limit, name in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
        bound, _ = resource.getrlimit(limit)
        if bound != resource.RLIM_INFINITY and name in used:
            yield bound - used[name] * 1024 + _free_heap()


def _numbers(file: Path) -> dict[str, int]:
    """Parses the first number of each line by the name before it."""
    return {name: int(value) for name, value in re.findall(r"^(\w+):?\s+(\d+)", _text(file), re.MULTILINE)}


def _text(file: Path) -> str:
    """Reads a text file, empty where it cannot be read."""
    try:
        return file.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""


def _libc(function: str) -> Any:
    """Looks up a function of glibc, None elsewhere."""
    return getattr(ctypes.CDLL(None), function, None) if sys.platform == "linux" else None


def _trim_heap() -> None:
    """Returns freed memory to the system, which `fused_rec.distributed.devices.keep_memory` makes the process keep."""
    gc.collect()
    if (trim := _libc("malloc_trim")) is not None:
        trim(0)


class _HeapInfo(ctypes.Structure):
    """`struct mallinfo2` of glibc's malloc.h; fordblks: free bytes of the heap."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    ]


def _free_heap() -> int:
    """Returns the free bytes of the heap, 0 where not known."""
    if (info := _libc("mallinfo2")) is None:
        return 0
    info.restype = _HeapInfo
    return info().fordblks
