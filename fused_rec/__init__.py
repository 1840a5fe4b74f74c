"""Text-and-graph recommendation of financial products in JAX.

    import fused_rec as fr

    run = fr.fit(fr.configure(data={"name": "synthetic"}), "runs/first")
    fr.measure(run, "test")
    fr.recommend(run, ["C0001"], k=5)
    fr.reasons(run, "C0001")

The names below are the whole public interface; each is imported when it is first asked for, so that `import fused_rec`
costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fused_rec.api import (
        Run,
        compare,
        configure,
        encode,
        export,
        fit,
        load,
        load_dataset,
        measure,
        reasons,
        recommend,
        report,
        sweep,
        what_if,
    )
    from fused_rec.config import Config
    from fused_rec.data.dataset import DataError, Dataset
    from fused_rec.data.download import fetch_dataset
    from fused_rec.data.tables import dataset_from_tables
    from fused_rec.data.writers import save_dataset

__all__ = [
    "Config",
    "DataError",
    "Dataset",
    "Run",
    "compare",
    "configure",
    "dataset_from_tables",
    "encode",
    "export",
    "fetch_dataset",
    "fit",
    "load",
    "load_dataset",
    "measure",
    "reasons",
    "recommend",
    "report",
    "save_dataset",
    "sweep",
    "what_if",
]

# Where a name does not live in `fused_rec.api`.
_HOMES = {
    "Config": "config",
    "DataError": "data.dataset",
    "Dataset": "data.dataset",
    "dataset_from_tables": "data.tables",
    "fetch_dataset": "data.download",
    "save_dataset": "data.writers",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    found = getattr(importlib.import_module(f"{__name__}.{_HOMES.get(name, 'api')}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
