"""House rules that a reviewer would otherwise check by eye. Every list is data: a change says why beside it."""

import ast
import fnmatch
from collections.abc import Iterator
from pathlib import Path

import jaxtyping
import pytest

from fused_rec.config import DataConfig

ROOT = Path(__file__).parents[1]
PACKAGE = "fused_rec"

# Each package imports only from itself and from those before it. `evaluate` comes before `train` because the training
# loop ranks the validation part to choose its epoch; metrics never need the loop.
LAYERS = (
    "config",
    "rng",
    "memory",
    "storage",
    "distributed",
    "kernels",
    "data",
    "text",
    "graph",
    "baselines",
    "model",
    "evaluation",
    "runs",
    "training",
    "serving",
    "studies",
    "explanation",
    "reporting",
    "run",
    "api",
    "http",
    "commands",  # parse flags and delegate
    "cli",  # imports the module of the chosen command alone
)

# Layers that print, and read and write what flags name.
IO_LAYERS = ("commands", "cli")
# Below them, the only places that touch files, the network, other processes or the terminal.
IO_ALLOWED = (
    "memory.py",  # asks the system how much there is
    "storage.py",  # the one place where files and folders are written beside their targets and renamed
    "data/io/files.py",
    "data/io/dialect.py",  # looks into text files for their encoding and delimiter
    "data/sources/download.py",
    "data/sources/fetch.py",
    "data/io/writers.py",
    "text/pretrained.py",
    "text/encoders/weights.py",
    "text/cache.py",
    "text/vectors.py",
    "training/checkpoint.py",
    "runs/loggers.py",
    "serving/write_rankings.py",  # rankings of all customers, part by part
    "serving/export_bundle.py",  # writes the folder of an exported run
    "explanation/catalogs.py",  # reads message catalogs
    "distributed/signals.py",  # says that a signal was received
    "studies/tune.py",
    "runs/run_dir.py",
)
IO_BUILTINS = {"open", "print", "input"}
IO_METHODS = {
    *("read_text", "read_bytes", "write_text", "write_bytes", "mkdir", "unlink", "rename", "rmdir", "touch"),
    *("read_table", "write_table", "read_csv", "write_csv", "read_json", "open_csv", "open_json", "memory_map"),
    *("OSFile", "open_input_stream", "open_output_stream", "safe_open", "save_file", "load_file", "urlopen", "tofile"),
    "savefig",
}
# Called on the module (np.load, os.replace): the bare method names are too common to forbid.
IO_MODULE_CALLS = {
    "np": {"load", "save", "savez", "savez_compressed", "loadtxt", "savetxt", "genfromtxt", "fromfile", "memmap"},
    "numpy": {"load", "save", "savez", "savez_compressed", "loadtxt", "savetxt", "genfromtxt", "fromfile", "memmap"},
    "jnp": {"load", "save", "savez"},
    "os": {"replace", "remove", "rename", "makedirs", "mkdir", "unlink", "open", "system", "listdir", "scandir"},
    "gzip": {"open"},
    "io": {"open"},
}
IO_IMPORTS = {
    *("subprocess", "urllib", "http", "socket", "requests", "shutil", "tempfile", "sqlite3"),
    *("pyarrow.csv", "pyarrow.json", "pyarrow.parquet", "pyarrow.dataset", "pyarrow.feather", "pyarrow.fs"),
    *("safetensors", "tensorboardX"),
}

# A library with traps, and the one file that knows them; an empty tuple means nowhere.
ONLY_IN = {
    "jraph": ("graph/hetero.py", "model/reference.py"),  # the conversion, and the model in plain jraph
    # imports tables and splits; the model knows the graph by graph/schema.py
    "fused_rec.graph.build": ("graph/*", "training/*", "explanation/*", "reporting/*", "experiments/*"),
    "orbax": ("training/checkpoint.py",),
    "transformers": ("text/pretrained.py", "experiments/competitors/torch_sdpa.py"),
    "optuna": ("studies/tune.py",),
    # An extra, imported where used; it warns about the threads it finds. As a peer it has an environment of its own.
    "implicit": ("baselines/neighbors.py", "experiments/competitors/*"),
    "sklearn": ("text/tfidf.py", "baselines/linear.py"),  # imported where used: it takes a second
    "faiss": ("serving/approximate.py",),  # an extra, imported where used
    "wandb": ("runs/loggers.py",),  # an extra, imported where used: it may speak to the network
    "starlette": ("http/app.py",),  # an extra; commands/serve.py imports this file where it is used
    "prometheus_client": ("http/metrics.py",),  # the same extra
    "uvicorn": ("commands/serve.py",),  # the same extra, imported where used
    "matplotlib": ("evaluation/plots.py",),  # an extra, imported where used; its global state (pyplot) nowhere
    **dict.fromkeys(("torch", "torch_geometric", "recbole", "sentence_transformers"), ("experiments/competitors/*",)),
    **dict.fromkeys(("pickle", "cloudpickle", "dill", "shelve", "marshal", "joblib"), ()),
    "experiments": ("experiments/*",),
}
PMAP_ONLY_IN = ("distributed/devices.py",)
FORBIDDEN_BUILTINS = {"eval", "exec"}
# Arguments by which a library runs what a file holds, and the values that keep it from it.
SAFE_ARGUMENTS = {"allow_pickle": False, "trust_remote_code": False, "weights_only": True}
LOADERS = {"np.load": "allow_pickle", "numpy.load": "allow_pickle"}  # they have to say so
MAX_LINES, MAX_PARAMETERS = 60, 7  # of a function, with its docstring and without `self`
# Public functions of `fused_rec` whose further parameters are keywords, one per choice of the caller.
MANY_PARAMETERS = {
    "api.py": ("report",),  # one keyword per flag of the command
    "data/io/tables.py": ("dataset_from_tables",),  # one keyword per table, and the settings of `read_tables`
}
FORBIDDEN_NAMES = {"utils", "util", "helpers", "helper", "common", "misc", "manager"}


def _allowed(path: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatch(path, pattern) for pattern in patterns)


def _within(module: str, parent: str) -> bool:
    return module == parent or module.startswith(parent + ".")


def _imports(tree: ast.AST, path: str) -> Iterator[tuple[int, str]]:
    """Every module named in an import, absolute: `from fused_rec import data` names fused_rec.data."""
    here = [PACKAGE, *Path(path).with_suffix("").parts]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [*here[: len(here) - node.level], node.module or ""] if node.level else [node.module or ""]
            module = ".".join(part for part in base if part)
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def _layer_violations(tree: ast.AST, path: str) -> Iterator[tuple[int, str]]:
    layer = Path(path).with_suffix("").parts[0]
    if layer == "__init__":  # the public names; imported when they are asked for (tests/test_api.py)
        allowed = LAYERS
    elif layer in LAYERS:
        allowed = LAYERS[: LAYERS.index(layer) + 1]
    else:
        yield 1, f"{layer} is no layer; place it in LAYERS"
        return
    for line, module in _imports(tree, path):
        parts = module.split(".")
        if parts[0] == PACKAGE and len(parts) > 1 and parts[1] not in allowed:
            yield line, f"imports {PACKAGE}.{parts[1]}; {layer} may import only from {', '.join(allowed)}"


def _io_violations(tree: ast.AST, path: str) -> Iterator[tuple[int, str]]:
    if Path(path).with_suffix("").parts[0] not in IO_LAYERS and not _allowed(path, IO_ALLOWED):
        yield from _io(tree, path)


def _io(tree: ast.AST, path: str) -> Iterator[tuple[int, str]]:
    for line, module in _imports(tree, path):
        if any(_within(module, banned) for banned in IO_IMPORTS):
            yield line, f"imports {module}; only the files of IO_ALLOWED do"
        parent, _, name = module.rpartition(".")
        if name in IO_MODULE_CALLS.get(parent, ()):
            yield line, f"imports {module}; only the files of IO_ALLOWED do"
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        match node.func:
            case ast.Name(name) if name in IO_BUILTINS | IO_METHODS:
                yield node.lineno, f"calls {name}(); only the files of IO_ALLOWED do"
            case ast.Attribute(ast.Name(module), name) if name in IO_MODULE_CALLS.get(module, ()):
                yield node.lineno, f"calls {module}.{name}(); only the files of IO_ALLOWED do"
            case ast.Attribute(_, name) if name in IO_METHODS | {"open"}:
                yield node.lineno, f"calls .{name}(); only the files of IO_ALLOWED do"


def _library_violations(tree: ast.AST, path: str) -> Iterator[tuple[int, str]]:
    for line, module in _imports(tree, path):
        for library, files in ONLY_IN.items():
            if _within(module, library) and not _allowed(path, files):
                yield line, f"imports {module}; {library} belongs {'in ' + ', '.join(files) if files else 'nowhere'}"
        if module == "jax.pmap" and not _allowed(path, PMAP_ONLY_IN):
            yield line, f"imports jax.pmap; it belongs in {', '.join(PMAP_ONLY_IN)}"
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(_, "pmap" | "psum_scatter" as name) if not _allowed(path, PMAP_ONLY_IN):
                yield node.lineno, f"uses {name}; it belongs in {', '.join(PMAP_ONLY_IN)}"
            # its derivative is a psum_scatter
            case ast.Attribute(ast.Attribute(_, "lax"), "all_gather") if not _allowed(path, PMAP_ONLY_IN):
                yield node.lineno, f"uses all_gather of jax.lax; that of {', '.join(PMAP_ONLY_IN)} is exact"
            case ast.Call(ast.Name(name)) if name in FORBIDDEN_BUILTINS:
                yield node.lineno, f"calls {name}(); nothing that was read may run"
            case ast.Call(function, _, keywords):
                given = {keyword.arg: keyword.value for keyword in keywords}
                for argument in SAFE_ARGUMENTS.keys() & ({*given, LOADERS.get(ast.unparse(function))}):
                    value = given.get(argument)
                    if not isinstance(value, ast.Constant) or value.value is not SAFE_ARGUMENTS[argument]:
                        safe = f"{argument}={SAFE_ARGUMENTS[argument]}"
                        yield node.lineno, f"calls without {safe}; nothing that was read may run"


def _naming_violations(tree: ast.AST, path: str) -> Iterator[tuple[int, str]]:
    for part in Path(path).with_suffix("").parts:
        if part in FORBIDDEN_NAMES:
            yield 1, f"{part} names no subject; name the module after what it holds"


def _docstring_violations(tree: ast.Module, path: str) -> Iterator[tuple[int, str]]:
    if not ast.get_docstring(tree):
        yield 1, "the module has no docstring"
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            if not ast.get_docstring(node):
                yield node.lineno, f"{node.name} has no docstring"


def _size_violations(tree: ast.AST, path: str) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > MAX_LINES:
                yield node.lineno, f"{node.name} has {lines} lines; {MAX_LINES} at most, so split it"
            names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            count = len(names) - (names[:1] in (["self"], ["cls"]))
            if count > MAX_PARAMETERS and node.name not in MANY_PARAMETERS.get(path, ()):
                yield node.lineno, f"{node.name} has {count} parameters; {MAX_PARAMETERS} at most, or a dataclass"


EVERYWHERE = (_library_violations, _naming_violations, _docstring_violations, _size_violations)
IN_PACKAGE = (_layer_violations, _io_violations, *EVERYWHERE)


def violations(source: str, path: str) -> list[str]:
    """What `source` does against the house rules, one line each. path: below fused_rec/, or experiments/..."""
    tree = ast.parse(source)
    rules = EVERYWHERE if path.startswith("experiments/") else IN_PACKAGE
    return [f"{path}:{line}: {what}" for rule in rules for line, what in rule(tree, path)]


@pytest.mark.parametrize(("folder", "base"), [(ROOT / PACKAGE, ROOT / PACKAGE), (ROOT / "experiments", ROOT)])
def test_the_house_rules_hold(folder, base):
    found = [
        problem
        for file in sorted(folder.rglob("*.py"))
        for problem in violations(file.read_text(encoding="utf-8"), file.relative_to(base).as_posix())
    ]
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize("file", IO_ALLOWED)
def test_no_allowance_is_stale(file):
    source = (ROOT / PACKAGE / file).read_text(encoding="utf-8")
    assert list(_io(ast.parse(source), file)), f"{file} does no IO any more; take it out of IO_ALLOWED"


CLEAN = '"""Doc."""\n'


@pytest.mark.parametrize(
    ("source", "path", "expected"),
    [
        (
            "import fused_rec.training.trainer",
            "model/losses.py",
            "imports fused_rec.training; model may import only from",
        ),
        ("from fused_rec import explanation", "evaluation/metrics.py", "imports fused_rec.explanation"),
        ("from ..training import train_step", "graph/build.py", "imports fused_rec.training"),
        ("def f():\n    'd'\n    import fused_rec.text.encode", "data/io/tables.py", "imports fused_rec.text"),
        ("import fused_rec.data", "shared/x.py", "shared is no layer"),
        ("open('x')", "model/losses.py", "calls open()"),
        ("print('x')", "reporting/page.py", "calls print()"),
        ("path.write_text('x')", "reporting/page.py", "calls .write_text()"),
        ("path.open()", "reporting/page.py", "calls .open()"),
        ("np.save('x', y)", "graph/build.py", "calls np.save()"),
        ("from pyarrow import csv", "data/splits.py", "imports pyarrow.csv"),
        ("import safetensors.flax", "model/model.py", "imports safetensors.flax"),
        ("import subprocess", "training/train_step.py", "imports subprocess"),
        ("from os import replace", "training/train_step.py", "imports os.replace"),
        ("import jax\njax.pmap(f)", "training/train_step.py", "uses pmap"),
        ("from jax import pmap", "training/train_step.py", "imports jax.pmap"),
        ("import jax\njax.lax.psum_scatter(x, 'a')", "training/train_step.py", "uses psum_scatter"),
        ("import jax\njax.lax.all_gather(x, 'a')", "training/train_step.py", "uses all_gather of jax.lax"),
        ("import orbax.checkpoint as ocp", "training/trainer.py", "imports orbax.checkpoint"),
        ("import jraph", "graph/build.py", "imports jraph"),
        ("from fused_rec.graph.build import x", "model/model.py", "fused_rec.graph.build belongs in graph/*"),
        ("from transformers import AutoTokenizer", "text/encode.py", "transformers belongs in text/pretrained.py"),
        ("from implicit.als import x", "baselines/linear.py", "implicit belongs in baselines/neighbors.py"),
        (
            "import sklearn.decomposition",
            "baselines/neighbors.py",
            "sklearn belongs in text/tfidf.py, baselines/linear.py",
        ),
        ("import torch", "text/pretrained.py", "torch belongs in experiments/competitors/*"),
        ("import pickle", "training/checkpoint.py", "pickle belongs nowhere"),
        ("import experiments.train", "training/trainer.py", "experiments belongs in experiments/*"),
        ("import experiments.train", "commands/train.py", "experiments belongs in experiments/*"),
        ("import fused_rec.commands.launch", "api.py", "imports fused_rec.commands; api may import only from"),
        ("import fused_rec.cli", "commands/launch.py", "imports fused_rec.cli"),
        ("eval('1')", "config.py", "calls eval()"),
        ("np.load('x')", "runs/run_dir.py", "calls without allow_pickle=False"),
        ("np.load('x', allow_pickle=True)", "runs/run_dir.py", "calls without allow_pickle=False"),
        ("np.load('x', allow_pickle=y)", "runs/run_dir.py", "calls without allow_pickle=False"),
        ("f('x', trust_remote_code=True)", "text/pretrained.py", "calls without trust_remote_code=False"),
        ("import pickle", "experiments/tune.py", "pickle belongs nowhere"),
        ("", "text/utils.py", "utils names no subject"),
        ("def f(): pass", "graph/build.py", "f has no docstring"),
        ("def _f():\n    pass" + "\n    pass" * 59, "graph/build.py", "_f has 61 lines"),
        ("class _C:\n    def f(self, a, b, c, d, *, e, f, g, h): pass", "graph/build.py", "f has 8 parameters"),
        ("def _f(a, b, c, d, e, f, g, h): pass", "experiments/tune.py", "_f has 8 parameters"),
        ("class C: pass", "graph/build.py", "C has no docstring"),
    ],
)
def test_each_rule_can_fail(source, path, expected):
    [problem] = violations(CLEAN + source, path)
    assert expected in problem


@pytest.mark.parametrize(
    ("source", "path"),
    [
        ("from fused_rec.data import dataset", "training/trainer.py"),
        ("from fused_rec.graph.build import x", "graph/adjacency.py"),
        ("open('x')", "runs/loggers.py"),
        ("import pyarrow.parquet", "data/io/files.py"),
        ("import jraph", "graph/hetero.py"),
        ("np.load('x', allow_pickle=False); f(trust_remote_code=False)", "runs/run_dir.py"),
        ("def _private(): pass", "graph/build.py"),
        ("def _f():\n    pass" + "\n    pass" * 58, "graph/build.py"),
        ("class _C:\n    def f(self, a, b, c, d, *, e, f, g): pass", "graph/build.py"),
        ("table.load(x); replace(y); text.replace('a', 'b')", "graph/build.py"),
        ("import orbaxlike", "graph/build.py"),
        ("import experiments.train; print(open('x'))", "experiments/tune.py"),
        ("from fused_rec.commands import places; print(open('x'))", "commands/train.py"),
    ],
)
def test_what_is_allowed_passes(source, path):
    assert violations(CLEAN + source, path) == []


def test_types_are_checked():
    """The pytest option in pyproject.toml really instruments fused_rec: without it this call would pass."""
    with pytest.raises(jaxtyping.TypeCheckError):
        DataConfig(name=3)  # pyright: ignore[reportArgumentType]


def test_a_module_needs_a_docstring():
    assert violations("x = 1", "config.py") == ["config.py:1: the module has no docstring"]
