"""Data parallelism over all devices of all processes: the only use of `jax.pmap`, and the sharding of arrays.

Arrays are sharded by rows: with k devices, row v is on device v mod k as its row v // k. Adjacent rows of the tables,
which are often similar in degree or age, are thus on different devices. An array [n, ...] is passed to k devices as
[k, rows, ...] with rows = ceil(n / k), padded with zeros; each device sees [rows, ...].
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
from jaxtyping import Array, Float, Int32, PyTree

AnyArray = jax.Array | np.ndarray  # on a device, or on the host until a program asks for it

AXIS = "devices"
P = ParamSpec("P")
T = TypeVar("T")
SHARDED = 0  # where a divided array has its devices on the way to them: [devices, rows, ...]


# Of glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -3, -4, -8
LARGE = 2**25  # bytes; the largest M_MMAP_THRESHOLD that glibc takes


def keep_memory() -> None:
    """Lets the process keep freed memory for later allocations; must be called before the first thread starts.

    A step on a CPU frees its buffers and allocates the same sizes again. glibc would return them to the system each
    time, and page faults would take up to a fourth of a step. Other C libraries are unchanged.
    """
    _set_malloc((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_ARENA_MAX, 1))


def return_large() -> None:
    """Lets the process return freed memory in pieces of `LARGE` bytes and more again, after `keep_memory`.

    For large graphs: the buffers of a step are aligned, which leaves a few bytes of each in use, so that a freed one
    does not hold the next of its size, and the heap grows to several times the memory of a step. Page faults are then
    a few hundredths of a step.
    """
    _set_malloc((M_MMAP_THRESHOLD, LARGE), (M_MMAP_MAX, 2**16), (M_TRIM_THRESHOLD, LARGE))
    if (trim := _libc("malloc_trim")) is not None:
        trim(0)


def _set_malloc(*options: tuple[int, int]) -> None:
    """Sets options of glibc's allocator."""
    if (mallopt := _libc("mallopt")) is not None:
        for option, value in options:
            mallopt(option, value)


def _libc(function: str) -> Any:
    """Looks up a function of glibc, None elsewhere."""
    return getattr(ctypes.CDLL(None), function, None) if sys.platform == "linux" else None


class DeviceError(RuntimeError):
    """Error for JAX without a device; the message names the setting that prevents it."""


def check_devices() -> None:
    """Initializes the devices, before any work that would be lost.

    Raises:
      DeviceError: there is no device.
    """
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
    """Decorates a public function that computes with JAX: checks devices first, and disables 64-bit types inside.

    All arrays here are float32 or int32, and the compiled kernels take no other types. `jax_enable_x64`, common in
    notebooks, would make literals 64 bits wide; it stays enabled for the rest of the process.

    Args:
      function: the function.

    Returns:
      The decorated function.
    """

    @functools.wraps(function)
    def called(*arguments: P.args, **settings: P.kwargs) -> T:
        check_devices()
        if not jax.enable_x64.value:
            return function(*arguments, **settings)
        with jax.enable_x64(False):
            return function(*arguments, **settings)

    return called


def scatter_sum(x: Array, axis: int) -> Array:
    """Sums over devices, and keeps on each device its own part: a reduce-scatter.

    Between processes on CPUs the parts are exchanged and added. XLA has Gloo do the reduce-scatter there, which sends
    from memory that it overwrites: sums are wrong at times without an error (jax issue 40830; seen with jaxlib 0.10).

    Args:
      x: of which `axis` is as long as there are devices.
      axis: the axis.

    Returns:
      The sum of this device's parts, without `axis`.
    """
    if jax.default_backend() == "cpu" and jax.distributed.is_initialized():
        return jax.lax.all_to_all(x, AXIS, axis, axis, tiled=True).sum(axis)
    return jax.lax.psum_scatter(x, AXIS, scatter_dimension=axis)


def all_gather(x: AnyArray, axis: int) -> Array:
    """Gathers arrays of all devices along a new axis; derivatives come back by `scatter_sum`.

    Args:
      x: an array.
      axis: the new axis.

    Returns:
      The arrays of all devices.
    """
    return _all_gather(jnp.asarray(x), axis)


def _gathered(x: Array, axis: int) -> Array:
    return jax.lax.all_gather(x, AXIS, axis=axis)


def _gathered_back(axis: int, _: None, derivative: Array) -> tuple[Array]:
    return (scatter_sum(derivative, axis),)


_all_gather: Any = jax.custom_vjp(_gathered, nondiff_argnums=(1,))
_all_gather.defvjp(lambda x, axis: (_gathered(x, axis), None), _gathered_back)


@dataclasses.dataclass(frozen=True)
class Shards:
    """Sharding of rows over devices. All methods except `rows` are for use inside a mapped function.

    Attributes:
      count: number of devices.
    """

    count: int = 1

    def rows(self, n: int) -> int:
        """Returns the number of rows per device for n rows, rounded up."""
        return -(-n // self.count)

    def all_gather(self, x: AnyArray) -> Array:
        """Gathers [rows, ...] of all devices to [rows * count, ...] on each, in the order of the global rows."""
        if self.count == 1:
            return jnp.asarray(x)
        return all_gather(x, 1).reshape(-1, *x.shape[1:])

    def global_ids(self, rows: Int32[AnyArray, "m"]) -> Int32[Array, "m"]:
        """Maps local rows of this device to global rows."""
        rows = jnp.asarray(rows)
        return rows if self.count == 1 else rows * self.count + jax.lax.axis_index(AXIS)

    def psum(self, x: Array) -> Array:
        """Sums over devices."""
        return x if self.count == 1 else jax.lax.psum(x, AXIS)

    def varying(self, x: Array) -> Array:
        """Marks an array that is the same on all devices as a device's own: its gradient is then not summed."""
        return x if self.count == 1 else jax.lax.pcast(x, AXIS, to="varying")

    def scatter_sums(self, x: Array) -> Array:
        """Sums [rows * count, ...], in the order of the global rows, over devices; each gets its own [rows, ...]."""
        if self.count == 1:
            return x
        return scatter_sum(x.reshape(-1, self.count, *x.shape[1:]), 1)

    def take(self, x: Float[AnyArray, "rows ..."], rows: Int32[AnyArray, "m"]) -> Float[Array, "m ..."]:
        """Takes global rows of a sharded array; only these m rows of each device travel.

        Args:
          x: [rows, ...], this device's rows.
          rows: int32 [m], global rows, others on each device.

        Returns:
          [m, ...], those rows.
        """
        if self.count == 1:
            return jnp.asarray(x)[rows]
        wanted = all_gather(rows, 0)
        own = wanted % self.count == jax.lax.axis_index(AXIS)
        found = jnp.asarray(x)[wanted // self.count]
        found = jnp.where(own.reshape(*own.shape, *[1] * (found.ndim - 2)), found, 0)
        return scatter_sum(found, 0)


def select_devices(devices: int | None) -> list[Any]:
    """Returns the first `devices` devices of all processes; None: all."""
    return jax.devices()[:devices]


def local_indices(devices: int | None) -> list[int]:
    """Returns the indices of this process's devices among `select_devices`."""
    return [
        place for place, device in enumerate(select_devices(devices)) if device.process_index == jax.process_index()
    ]


def shard_rows(x: np.ndarray, devices: int | None) -> np.ndarray:
    """Shards an array by rows.

    Args:
      x: [n, ...].
      devices: number of devices, None = all.

    Returns:
      This process's part of [devices, rows, ...], padded with zeros.
    """
    count = len(select_devices(devices))
    if count == 1:
        return x[None]  # the same memory
    padded = np.pad(x, [(0, -len(x) % count)] + [(0, 0)] * (x.ndim - 1))
    return padded.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1)[local_indices(devices)]


def device_put(tree: PyTree, axes: PyTree, devices: int | None = None, *, own: bool = False) -> PyTree:
    """Places arrays on devices as `pmap_over_devices` expects them, which avoids a copy per call.

    Args:
      tree: arrays.
      axes: tree like `tree`, or a prefix of it: the device axis of each array; None = replicated. An axis longer than
        the number of this process's devices is divided into blocks.
      devices: number of devices, None = all.
      own: copy also what a CPU device could read in place, in memory of the host: only a copy can be donated.

    Returns:
      The tree of placed arrays.
    """
    mesh = Mesh(np.array([select_devices(devices)[place] for place in local_indices(devices)]), (AXIS,))

    def sharding(axis: int | None) -> NamedSharding:
        return NamedSharding(mesh, PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, AXIS))

    def put(axis: int | None, part: PyTree) -> PyTree:
        placed = jax.device_put(part, sharding(axis))
        return jax.tree.map(jnp.copy, placed) if own and jax.default_backend() == "cpu" else placed

    return map_with_axes(put, axes, tree)


def map_with_axes(function: Callable[..., Any], axes: PyTree, *trees: PyTree) -> PyTree:
    """Maps a function over axes, including None, and the corresponding subtrees.

    Args:
      function: called with an axis and the subtrees at its position.
      axes: tree of axes, a prefix of the trees.
      *trees: trees of arrays.

    Returns:
      The tree of results.
    """
    return jax.tree.map(function, axes, *trees, is_leaf=_is_none)


class PmappedFn:
    """Function that is compiled for one device and runs on each; see `pmap_over_devices`."""

    def __init__(
        self, function: Callable[..., Any], devices: int | None, in_axes: Any, out_axes: Any, donate: tuple[int, ...]
    ):
        # Flat, because pmap over several processes takes no axes in dictionaries.
        at, self._in = jax.tree.flatten(in_axes, is_leaf=_is_none)
        to, self._out = jax.tree.flatten(out_axes, is_leaf=_is_none)
        argument = [i for i, axes in enumerate(in_axes) for _ in jax.tree.leaves(axes, is_leaf=_is_none)]
        # jax.pmap takes the axes for those of the leaves, not of the arguments, where there happen to be as many leaves
        # as arguments (None has no leaf, a batch has four). A tuple among the axes keeps it from that.

        def flat(_: tuple, *parts: Any) -> tuple:
            return tuple(self._out.flatten_up_to(function(*self._in.unflatten(parts))))

        self._mapped = jax.pmap(
            flat,
            axis_name=AXIS,
            # pmap takes none for those of several processes
            devices=None if devices is None else select_devices(devices),
            in_axes=((), *at),
            out_axes=tuple(to),
            donate_argnums=tuple(place for place, i in enumerate(argument, 1) if i in donate),
        )

    def __call__(self, *arguments: Any) -> Any:
        return self._out.unflatten(self._mapped((), *self._in.flatten_up_to(arguments)))

    def lower(self, *arguments: Any) -> Any:
        """Lowers the function for arguments, like a jitted function."""
        return self._mapped.lower((), *self._in.flatten_up_to(arguments))


def _is_none(axis: object) -> bool:
    return axis is None


def pmap_over_devices(
    function: Callable[..., Any], devices: int | None, *, in_axes: tuple, out_axes: Any, donate: tuple[int, ...] = ()
) -> PmappedFn:
    """Maps a function over devices.

    Args:
      function: for one device; collectives use the axis name `AXIS`.
      devices: number of devices, None = all.
      in_axes: as of `jax.pmap`; None = replicated.
      out_axes: as of `jax.pmap`; None = replicated.
      donate: indices of donated arguments.

    Returns:
      The mapped function.
    """
    return PmappedFn(function, devices, in_axes, out_axes, donate)
