"""C++ kernels for what XLA does slowly on a CPU, compiled at installation where a compiler is available.

`fused_rec.graph.spmm` calls `sparse_sum.cc`, `fused_rec.evaluation` calls `ranking.cc`, and
`fused_rec.text.encoders.packed` calls `attention.cc`. Each caller has a
plain JAX version too: the reference, used on accelerators and where no kernel was compiled.
"""

import ctypes
import functools
import importlib.util
import logging

import jax

LIBRARY = "fused_rec.kernels._compiled"
NEIGHBOR_SUM, BEST, AUC, ATTENTION = TARGETS = (
    *("fused_rec_neighbor_sum", "fused_rec_best", "fused_rec_auc"),
    "fused_rec_attention",
)
LOG = logging.getLogger(__name__)


@functools.cache
def usable() -> bool:
    """Returns whether the default device is a CPU and the kernels are installed; registers them with XLA."""
    if jax.default_backend() != "cpu":
        return False
    library = importlib.util.find_spec(LIBRARY)
    if library is None or library.origin is None:
        return False
    functions = ctypes.CDLL(library.origin)
    try:
        for target in TARGETS:
            jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(getattr(functions, target)), platform="cpu")
    except jax.errors.JaxRuntimeError as error:
        message = "the kernels were built for a newer JAX than %s; slower ones take their place until pip install"
        LOG.warning(f"{message} --no-build-isolation builds them anew: %s", jax.__version__, error)
        return False
    return True
