"""How much memory there is, and a refusal before a step that does not fit into it.

A step states its need from the sizes of its arrays, before it makes the first of them. A need counts the arrays whose
size is a product of two sizes of the data, and leaves out what is small beside them.
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
ENOUGH = 64 * MEBIBYTE  # nobody is refused so little


class InsufficientMemoryError(MemoryError):
    """A step needs more memory than there is; the message names both, and what needs less."""


def require_memory(need: int, what: str, remedy: str) -> None:
    """Returns where `need` bytes are available in this process, or where nobody can tell.

    what: the step, before a colon. remedy: what to do instead, at the end.

    Raises:
      InsufficientMemoryError: less is available. Swap space does not count.
    """
    if need <= ENOUGH:
        return
    there = available_memory()
    if there is None or need <= there:
        return
    _give_back()
    there = available_memory()
    if there is not None and need > there:
        raise InsufficientMemoryError(_told(need, there, what, remedy))


def require_device_memory(need: int, what: str, remedy: str) -> None:
    """The same of `need` bytes on each device of this process. CPU devices share the memory of the process.

    Raises:
      InsufficientMemoryError: as `require_memory`, or a device has less.
    """
    if need <= ENOUGH:
        return
    import jax  # takes a while, and most of this module goes without

    devices = jax.local_devices()
    if devices[0].platform == "cpu":
        require_memory(need * len(devices), what, remedy)
        return
    free = [stats["bytes_limit"] - stats["bytes_in_use"] for stats in map(_stats, devices) if "bytes_limit" in stats]
    if free and need > min(free):
        raise InsufficientMemoryError(_told(need, min(free), f"{what}, on each device", remedy))


def _stats(device: Any) -> dict[str, int]:
    return device.memory_stats() or {}


def _told(need: int, there: int, what: str, remedy: str) -> str:
    return f"{what}: needs {size(need)} of memory, {size(there)} available; {remedy}"


def size(count: int) -> str:
    """Bytes in MB below a GB, else in GB: "14.4 GB"."""
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.0f} MB"


def available_memory(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes that this process can still have: the least of what machine, container and process limits leave.

    On Linux: MemAvailable, the limits of the process's control groups (version 1 and 2) and their parents, RLIMIT_AS
    and RLIMIT_DATA. Elsewhere: all memory of the machine where the system tells it (macOS), else None (Windows).
    """
    left = [*_of_machine(proc), *_of_groups(proc, cgroups), *_of_limits(proc)]
    return max(0, min(left)) if left else None


def _of_machine(proc: Path) -> Iterator[int]:
    known = _numbers(proc / "meminfo")
    if "MemAvailable" in known:
        yield known["MemAvailable"] * 1024
    elif not sys.platform.startswith(("linux", "win")):
        with contextlib.suppress(AttributeError, ValueError, OSError):
            yield os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _of_groups(proc: Path, cgroups: Path) -> Iterator[int]:
    """Of each control group with a limit what it leaves; pages of files do not count, the kernel takes them back."""
    for line in _text(proc / "self" / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root = cgroups / "memory" if controllers else cgroups
        names = ("memory.limit_in_bytes",) if controllers else ("memory.max", "memory.high")
        usage = "memory.usage_in_bytes" if controllers else "memory.current"
        prefix = "total_" if controllers else ""
        # In a container the path may be the host's, and the group stands at the root.
        inside = PurePosixPath(path.lstrip("/"))
        for folder in dict.fromkeys([root / inside, *(root / parent for parent in inside.parents)]):
            files = _numbers(folder / "memory.stat")
            pages = sum(files.get(f"{prefix}{kind}_file", 0) for kind in ("active", "inactive"))
            used = _text(folder / usage).strip()
            for limit in (_text(folder / name).strip() for name in names):
                if limit.isdecimal() and used.isdecimal():
                    yield int(limit) - int(used) + pages


def _of_limits(proc: Path) -> Iterator[int]:
    """What RLIMIT_AS and RLIMIT_DATA leave, the free part of the heap included."""
    try:
        import resource  # not on Windows
    except ImportError:
        return
    taken = _numbers(proc / "self" / "status")
    for limit, name in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
        most, _ = resource.getrlimit(limit)
        if most != resource.RLIM_INFINITY and name in taken:
            yield most - taken[name] * 1024 + _free_heap()


def _numbers(file: Path) -> dict[str, int]:
    """The first number of each line by the name before it."""
    return {name: int(value) for name, value in re.findall(r"^(\w+):?\s+(\d+)", _text(file), re.MULTILINE)}


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""


def _libc(function: str) -> Any:
    """A function of glibc, None elsewhere."""
    return getattr(ctypes.CDLL(None), function, None) if sys.platform == "linux" else None


def _give_back() -> None:
    """Hands freed memory back to the system: `fused_rec.distributed.devices.keep_memory` lets the process keep it."""
    gc.collect()
    if (trim := _libc("malloc_trim")) is not None:
        trim(0)


class _HeapInfo(ctypes.Structure):
    """`struct mallinfo2` of glibc's malloc.h; fordblks: bytes of the heap that are free."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    ]


def _free_heap() -> int:
    if (info := _libc("mallinfo2")) is None:
        return 0
    info.restype = _HeapInfo
    return info().fordblks
