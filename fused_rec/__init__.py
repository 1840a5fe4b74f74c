"""Text-and-graph recommendation of financial products in JAX.

    import fused_rec as fr

    run = fr.train(fr.configure(data={"name": "synthetic"}), "runs/first")
    run.evaluate("test")
    run.recommend(["C0001"], k=5)
    run.explain("C0001")

The names below are the whole public interface; each is imported when it is first asked for, so that `import fused_rec`
costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fused_rec.api import (
        compare,
        configure,
        diff,
        encode,
        load,
        load_dataset,
        report,
        train,
        tune,
    )
    from fused_rec.config import Config
    from fused_rec.data.dataset import DataError, Dataset
    from fused_rec.data.io.tables import dataset_from_tables
    from fused_rec.data.io.writers import save_dataset
    from fused_rec.data.sources.download import fetch_dataset
    from fused_rec.run import Run

__version__ = "0.1.0"
__all__ = [
    "Config",
    "DataError",
    "Dataset",
    "Run",
    "compare",
    "configure",
    "dataset_from_tables",
    "diff",
    "encode",
    "fetch_dataset",
    "load",
    "load_dataset",
    "report",
    "save_dataset",
    "train",
    "tune",
]

# Where a name does not live in `fused_rec.api`.
_HOMES = {
    "Config": "config",
    "DataError": "data.dataset",
    "Dataset": "data.dataset",
    "Run": "run",
    "dataset_from_tables": "data.io.tables",
    "fetch_dataset": "data.sources.download",
    "save_dataset": "data.io.writers",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    found = getattr(importlib.import_module(f"{__name__}.{_HOMES.get(name, 'api')}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
