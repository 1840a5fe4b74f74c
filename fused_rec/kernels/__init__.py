"""C++ kernels for what XLA does slowly on a CPU, compiled at installation where a compiler is available.

`fused_rec.graph.spmm` calls `sparse_sum.cc`, `fused_rec.evaluation` calls `ranking.cc`, packed texts in
`fused_rec.text.encoders` call `attention.cc` and `layers.cc`, and `buffers.cc` has `in_place` and the receivers of an
adjacency. Where `has_tiles`, packed texts call `dense.cc` too, and `fused_rec.model` calls `products.cc` and
`cross_entropy.cc` in bfloat16. Each caller has a plain JAX version too: the reference, used on accelerators and where
no kernel was compiled.
"""

import ctypes
import functools
import importlib.util
import logging

import jax
from jaxtyping import Array

LIBRARY = "fused_rec.kernels._compiled"
TARGETS = tuple(
    f"fused_rec_{name}"
    for name in (
        *("neighbor_sum", "neighbor_sum_of", "spread_from", "best", "auc", "attention", "bias_gelu", "add_norm"),
        *("up_gelu", "in_place", "rows_of", "cross_entropy", "tile_product"),
        *("add_rms_norm", "gate_up", "dense", "gated"),
    )
)
NEIGHBOR_SUM, NEIGHBOR_SUM_OF, SPREAD_FROM, BEST, AUC, ATTENTION, BIAS_GELU, ADD_NORM, *_OTHERS = TARGETS
UP_GELU, IN_PLACE, ROWS_OF, CROSS_ENTROPY, TILE_PRODUCT, ADD_RMS_NORM, GATE_UP, DENSE, GATED = _OTHERS
LOG = logging.getLogger(__name__)


@functools.cache
def usable() -> bool:
    """Returns whether the default device is a CPU and the kernels are installed; registers them with XLA.

    Raises:
      ImportError: the library lacks a kernel, being older than this file.
    """
    if jax.default_backend() != "cpu":
        return False
    library = importlib.util.find_spec(LIBRARY)
    if library is None or library.origin is None:
        return False
    functions = ctypes.CDLL(library.origin)
    try:
        for target in TARGETS:
            jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(getattr(functions, target)), platform="cpu")
    except AttributeError as error:
        remedy = "build it anew: pip install -e ."
        raise ImportError(f"{library.origin} was built from other sources ({error}); {remedy}") from error
    except jax.errors.JaxRuntimeError as error:
        message = "the kernels were built for a newer JAX than %s; slower ones take their place until pip install"
        LOG.warning(f"{message} --no-build-isolation builds them anew: %s", jax.__version__, error)
        return False
    return True


@functools.cache
def has_tiles() -> bool:
    """Returns whether the kernels are usable and multiply bfloat16 by AMX, the tile registers of newer Xeons."""
    library = importlib.util.find_spec(LIBRARY) if usable() else None
    return library is not None and bool(ctypes.CDLL(library.origin).fused_rec_has_tiles())


def in_place(x: Array) -> Array:
    """Returns x, in its memory, so that what reads the result is not computed from what x was made of.

    XLA on a CPU would compute the new moments of an optimizer twice, once to store them and once in the update of the
    parameters, and copy the old ones for that. No derivative.
    """
    if not usable():
        return x
    return jax.ffi.ffi_call(IN_PLACE, jax.ShapeDtypeStruct(x.shape, x.dtype), input_output_aliases={0: 0})(x)
