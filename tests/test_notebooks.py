"""The notebooks: pairs in step, nothing defined and nothing stored in them; the first two run from clean folders."""

import ast
import os
import re
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason='notebooks need pip install -e ".[notebooks]"')
jupytext = pytest.importorskip("jupytext", reason='notebooks need pip install -e ".[notebooks]"')

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "notebooks").glob("*.py"))
MOST = 90  # lines of code
SECONDS = 900  # a cell may take; far more than it does
# What the first two notebooks say, and what the tests run in its place; `make notebooks` runs what they say.
SIZES = {
    "n_users=300, n_items=80": "n_users=60, n_items=25",
    "n_users=250, n_items=60": "n_users=60, n_items=25",
    '"dim": 64': '"dim": 8',
    '"max_steps": 60, "eval_every": 10': '"max_steps": 2, "eval_every": 1',
    '"max_steps": 40, "eval_every": 10': '"max_steps": 2, "eval_every": 1',
}
# What tests/conftest.py chooses for tests is not what a reader has.
OURS = {"JAX_NUM_CPU_DEVICES", "JAX_PLATFORMS", "JAX_NUMPY_RANK_PROMOTION", "FUSED_REC_DATA"}

every = pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)


def code(source: Path) -> list[str]:
    return [cell.source for cell in jupytext.read(source).cells if cell.cell_type == "code"]


def smaller(text: str) -> str:
    for size, less in SIZES.items():
        text = text.replace(size, less)
    return text


def execute(notebook, folder: Path):
    """Runs the notebook in a kernel of this interpreter, in `folder`, which is its home too; returns it."""
    pytest.importorskip("ipykernel", reason='notebooks need pip install -e ".[notebooks]"')
    nbclient = pytest.importorskip("nbclient", reason='notebooks need pip install -e ".[notebooks]"')
    environment = {name: value for name, value in os.environ.items() if name not in OURS}
    environment |= {"HOME": str(folder), "JAX_PLATFORMS": "cpu", "IPYTHONDIR": str(folder / ".ipython")}
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(path)
    limits = {"timeout": SECONDS, "startup_timeout": SECONDS}
    where = {"metadata": {"path": str(folder)}}
    client = nbclient.NotebookClient(notebook, kernel_name="python3", resources=where, **limits)
    return client.execute(env=environment)


def test_there_are_four():
    assert [source.stem[:2] for source in SOURCES] == ["01", "02", "03", "04"]


@every
def test_pairs_are_in_step(source):
    """`make notebooks` writes the .ipynb from the .py."""
    stored = nbformat.read(source.with_suffix(".ipynb"), as_version=4)
    made = jupytext.read(source)
    assert [(cell.cell_type, cell.source) for cell in stored.cells] == [
        (cell.cell_type, cell.source) for cell in made.cells
    ], f"run `make notebooks`: {source.stem}.ipynb is not what {source.name} says"
    assert stored.metadata.kernelspec.name == "python3"
    for cell in stored.cells:
        assert not cell.get("outputs") and cell.get("execution_count") is None, f"{source.stem}.ipynb holds outputs"


@every
def test_notebooks_call_and_define_nothing(source):
    cells = code(source)
    lines = [line for cell in cells for line in cell.splitlines() if line.strip() and not line.strip().startswith("#")]
    assert len(lines) <= MOST, f"{len(lines)} lines of code"
    for cell in cells:
        for node in ast.walk(ast.parse(cell)):
            assert not isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Lambda), ast.unparse(node)


@every
def test_badge_and_installation_name_one_repository(source):
    text = source.read_text(encoding="utf-8")
    assert f"notebooks/{source.stem}.ipynb)" in text, "the badge opens another notebook"
    [published] = re.findall(
        r"^repository-code: https://github.com/(.+)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE
    )
    named = set(re.findall(r"github(?:\.com)?/([\w.-]+/[\w.-]+)", text))
    assert named == {published}, "run `make notebooks`, which writes the address of CITATION.cff"


@pytest.mark.parametrize("name", ["01_quickstart", "02_your_own_tables"])
def test_it_runs_from_a_clean_folder(name, tmp_path):
    """On a smaller dataset and for two steps; as they stand, all four run with `make notebooks`."""
    text = (ROOT / "notebooks" / f"{name}.py").read_text(encoding="utf-8")
    assert sum(size in text for size in SIZES) == 3
    done = execute(jupytext.reads(smaller(text), fmt="py:percent"), tmp_path)
    outputs = [output for cell in done.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs), "no picture was drawn"
    assert any("text/html" in output.get("data", {}) for output in outputs), "no table was shown"
    warned = [output.text for output in outputs if output.output_type == "stream" and "Warning:" in output.text]
    assert not warned, warned
