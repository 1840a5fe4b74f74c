"""The only `jax.pmap`: one program over all devices of all processes, and how arrays are sharded.

Arrays are sharded by rows: of k devices, row v is on device v mod k as its row v // k. Adjacent rows of the tables,
which are often similar in degree or age, are thus on different devices. An array [n, ...] on its way to
k devices is [k, rows, ...], rows = ceil(n / k), and zero where n falls short; each device sees [rows, ...].
"""

import ctypes
import dataclasses
import functools
import sys
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int32, PyTree

AnyArray = jax.Array | np.ndarray  # on a device, or on the host until a program asks for it

AXIS = "devices"
P = ParamSpec("P")
T = TypeVar("T")
SHARDED = 0  # where a divided array has its devices on the way to them: [devices, rows, ...]


# Of glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8


def keep_memory() -> None:
    """Lets the process keep what it frees, for what it asks for next; called before the first thread is started.

    A step on a CPU frees its buffers and asks for the same ones again. glibc would hand them back to the system each
    time, and to get them page by page takes up to a fourth of a step. Other C libraries are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_ARENA_MAX, 1)):
            mallopt(option, value)


class DeviceError(RuntimeError):
    """JAX has no device to compute on; the message names the setting that keeps it from one."""


def check_devices() -> None:
    """Finds the devices, before any work is done that would be lost. Raises DeviceError where there is none."""
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # an empty JAX_PLATFORMS fails an assertion of JAX
        asked = jax.config.values.get("jax_platforms")
        remedy = "see the installation of JAX for this machine"
        if asked is not None:
            remedy = f"JAX_PLATFORMS is {asked!r}; unset it, or name one that is installed, such as cpu"
        reason = "".join(f" ({line})" for line in str(error).splitlines()[:1])
        raise DeviceError(f"JAX finds no device{reason}; {remedy}") from error


def computes(function: Callable[P, T]) -> Callable[P, T]:
    """Decorates what a user calls and JAX computes: devices are checked first, and 64-bit types are off within.

    Every array here is float32 or int32, and the compiled kernels take no other. `jax_enable_x64`, usual in notebooks,
    makes literals 64 bits wide; it stays on for everything else in the process.
    """

    @functools.wraps(function)
    def called(*arguments: P.args, **settings: P.kwargs) -> T:
        check_devices()
        if not jax.enable_x64.value:
            return function(*arguments, **settings)
        with jax.enable_x64(False):
            return function(*arguments, **settings)

    return called


@dataclasses.dataclass(frozen=True)
class Shards:
    """How many devices share the rows. The methods but `rows` are for use inside a program that runs on them."""

    count: int = 1

    def rows(self, n: int) -> int:
        """Returns the number of rows per device for n rows, rounded up."""
        return -(-n // self.count)

    def all_gather(self, x: AnyArray) -> Array:
        """Gathers [rows, ...] of all devices to [rows * count, ...] on each, in the order of the global rows."""
        if self.count == 1:
            return jnp.asarray(x)
        gathered = jax.lax.all_gather(x, AXIS, axis=1)
        return gathered.reshape(-1, *x.shape[1:])

    def global_ids(self, rows: Int32[AnyArray, "m"]) -> Int32[Array, "m"]:
        """Maps local rows of this device to global rows."""
        rows = jnp.asarray(rows)
        return rows if self.count == 1 else rows * self.count + jax.lax.axis_index(AXIS)

    def psum(self, x: Array) -> Array:
        """Sums over devices."""
        return x if self.count == 1 else jax.lax.psum(x, AXIS)


def select_devices(devices: int | None) -> list[Any]:
    """Returns the first `devices` devices of all processes; None: all."""
    return jax.devices()[:devices]


def local_indices(devices: int | None) -> list[int]:
    """Returns the indices of this process's devices among `select_devices`."""
    return [
        place for place, device in enumerate(select_devices(devices)) if device.process_index == jax.process_index()
    ]


def shard_rows(x: np.ndarray, devices: int | None) -> np.ndarray:
    """Shards [n, ...] by rows; returns this process's part of [devices, rows, ...], padded with zeros."""
    count = len(select_devices(devices))
    padded = np.pad(x, [(0, -len(x) % count)] + [(0, 0)] * (x.ndim - 1))
    return padded.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1)[local_indices(devices)]


def device_put(tree: PyTree, axes: PyTree, devices: int | None = None) -> PyTree:
    """Places arrays as `pmap_over_devices` expects them, which would copy them at each call otherwise.

    axes: a tree like `tree`, or a prefix of it: where each array has its devices; None: every device gets it whole. An
    axis longer than this process's devices are many goes to them in blocks.
    """
    mesh = Mesh(np.array([select_devices(devices)[place] for place in local_indices(devices)]), (AXIS,))

    def sharding(axis: int | None) -> NamedSharding:
        return NamedSharding(mesh, PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, AXIS))

    return map_with_axes(lambda axis, part: jax.device_put(part, sharding(axis)), axes, tree)


def map_with_axes(function: Callable[..., Any], axes: PyTree, *trees: PyTree) -> PyTree:
    """`function` of each axis, None among them, and of what the trees have there."""
    return jax.tree.map(function, axes, *trees, is_leaf=_is_none)


class PmappedFn:
    """A function compiled for one device and run on each; see `pmap_over_devices`."""

    def __init__(
        self, function: Callable[..., Any], devices: int | None, in_axes: Any, out_axes: Any, donate: tuple[int, ...]
    ):
        # Flat, because pmap over several processes takes no axes in dictionaries.
        at, self._in = jax.tree.flatten(in_axes, is_leaf=_is_none)
        to, self._out = jax.tree.flatten(out_axes, is_leaf=_is_none)
        argument = [i for i, axes in enumerate(in_axes) for _ in jax.tree.leaves(axes, is_leaf=_is_none)]

        def flat(*parts: Any) -> tuple:
            return tuple(self._out.flatten_up_to(function(*self._in.unflatten(parts))))

        self._mapped = jax.pmap(
            flat,
            axis_name=AXIS,
            # pmap takes none for those of several processes
            devices=None if devices is None else select_devices(devices),
            in_axes=tuple(at),
            out_axes=tuple(to),
            donate_argnums=tuple(place for place, i in enumerate(argument) if i in donate),
        )

    def __call__(self, *arguments: Any) -> Any:
        return self._out.unflatten(self._mapped(*self._in.flatten_up_to(arguments)))

    def lower(self, *arguments: Any) -> Any:
        """As of a jitted function: the program before its compilation."""
        return self._mapped.lower(*self._in.flatten_up_to(arguments))


def _is_none(axis: object) -> bool:
    return axis is None


def pmap_over_devices(
    function: Callable[..., Any], devices: int | None, *, in_axes: tuple, out_axes: Any, donate: tuple[int, ...] = ()
) -> PmappedFn:
    """`function` for one device, with `AXIS` as the name of their numbers, over the first `devices`, None for all.

    in_axes, out_axes: as of `jax.pmap`; None where every device has the same. donate: arguments that are given up.
    """
    return PmappedFn(function, devices, in_axes, out_axes, donate)
