"""Every public function and method has an example in its docstring, which runs as it stands there.

Only sizes are smaller. `run` is a finished run in runs/first, `config` its config, path/to/tables its tables.
"""

import inspect
import re
import shutil
from pathlib import Path

import pytest
from market import write_tables

import fused_rec as fr

MODEL = str(Path(__file__).parent / "golden" / "tiny_bert")
SMALLER = {
    'fr.train(fr.configure(data={"name": "synthetic"}), "runs/first")': 'fr.train(config, "runs/first")',
    '["fused", "graph", "ease"], seeds=range(3)': '["popularity", "ease"], seeds=range(1)',
    "trials=30": "trials=1",
    "num_users=3, k=5": "num_users=1, k=1",
    '"Covered bond"])': f'"Covered bond"], {MODEL!r}, cache=None)',
}
NOT_HERE = {"fetch_dataset": "it downloads", "tune": "tests/test_tune.py runs it, and it needs the extra sweeps"}


def documented() -> dict[str, str]:
    """Docstrings of the public names and of the methods and properties of `Run`, by name."""
    found = {name: inspect.getdoc(getattr(fr, name)) or "" for name in fr.__all__}
    methods = {name for name in vars(fr.Run) if not name.startswith("_")} - set(fr.Run.__dataclass_fields__)
    return found | {f"Run.{name}": inspect.getdoc(getattr(fr.Run, name)) or "" for name in methods}


def example(docstring: str) -> str:
    """The block below `Example:`, which ends the docstring."""
    return inspect.cleandoc(docstring.partition("\nExample:\n")[2])


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> dict:
    """The names that examples use, in a folder with the files that they use."""
    folder = tmp_path_factory.mktemp("examples")
    tables = write_tables(folder / "path" / "to" / "tables", n_users=40, n_items=30)
    shutil.copytree(tables, folder / "path" / "to" / "newer" / "tables")
    config = fr.configure(
        data={"name": "tables", "path": str(tables)},
        text={"model": MODEL, "cache": str(folder / "cache")},
        model={"dim": 4, "num_layers": 1},
        train={"batch_size": 32, "max_steps": 2, "eval_every": 1},
    )
    return {"folder": folder, "config": config, "run": fr.train(config, folder / "runs" / "first")}


@pytest.mark.parametrize("name", sorted(documented()))
def test_the_example_runs(place, name, monkeypatch):
    code = example(documented()[name])
    assert code, f"{name} has no example"
    for size, less in SMALLER.items():
        code = code.replace(size, less)
    compiled = compile(code, f"{name}, example", "exec")
    if name in NOT_HERE:
        return
    monkeypatch.chdir(place["folder"])
    exec(compiled, {"fr": fr, "run": place["run"], "config": place["config"]})


def test_sizes_are_of_examples():
    code = "\n".join(example(docstring) for docstring in documented().values())
    assert all(size in code for size in SMALLER), "an example has changed"
    assert set(NOT_HERE) <= set(documented())
    assert not re.search(r"Example:\n.*\n\n", "\n".join(documented().values())), "an example ends its docstring"
