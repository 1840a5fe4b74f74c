"""What the pages name is there: links, headings, files, commands and their flags."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = ("fused_rec", "experiments", "tests", "docs", "notebooks")


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings; those of a page that is included are the page's own."""
    included = re.findall(r"^```{include} (\S+)$", text_of(page), re.MULTILINE)
    text = "\n".join(map(text_of, [page, *(page.parent / name for name in included)]))
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.fixture(params=PAGES, ids=lambda page: page.name)
def page(request) -> Path:
    return request.param


def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        led = (page.parent / path) if path else page
        assert led.exists(), f"{page.name} links to {target}, which is not there"
        assert not anchor or anchor in anchors(led), f"{page.name} links to {target}; {led.name} has no such heading"


def test_named_files_exist(page):
    named = re.findall(rf"`((?:{'|'.join(FOLDERS)})/[\w./-]+)`", text_of(page))
    assert [name for name in named if not (ROOT / name).exists()] == []


def shared_flags() -> dict[str, list[str]]:
    """The flags that each `DEFINE_x` of fused_rec/commands/places.py defines."""
    source = text_of(ROOT / "fused_rec" / "commands" / "places.py")
    defined = {}
    for found in ast.walk(ast.parse(source)):
        if isinstance(found, ast.FunctionDef) and found.name.startswith("DEFINE_"):
            defined[found.name] = re.findall(r'DEFINE_\w+\(\s*"(\w+)"', ast.get_source_segment(source, found) or "")
    return defined


def test_commands_have_their_flags(page):
    """Each `python -m experiments.X` and `fused-rec X` is there, and each of its flags is defined, or is a setting."""
    joined = text_of(page).replace("\\\n", " ")
    for command, rest in re.findall(r"(?:python -m experiments\.|fused-rec )([a-z]\w*)([^`\n#|]*)", joined):
        file = ROOT / "experiments" / f"{command}.py"
        assert file.exists(), f"{page.name} names {command}, which is not there"
        installed = ROOT / "fused_rec" / "commands" / f"{command}.py"
        source = text_of(installed if installed.exists() else file)
        defined = set(re.findall(r'DEFINE_\w+\(\s*"(\w+)"', source)) | {"help", "verbosity"}
        defined |= {flag for name, flags in shared_flags().items() if f"{name}(" in source for flag in flags}
        for flag in re.findall(r"--([\w.]+)", rest):
            known = flag.removeprefix("no") in defined or flag in defined or flag.partition(".")[0] in defined
            assert known, f"{page.name} gives {command} --{flag}; it knows {', '.join(sorted(defined))}"


def test_every_page_is_in_the_contents():
    contents = text_of(ROOT / "docs" / "index.md")
    pages = {page.stem for page in (ROOT / "docs").glob("*.md")} - {"index"}
    assert [page for page in sorted(pages) if not re.search(rf"^{page}$", contents, re.MULTILINE)] == []


def test_the_python_of_the_readme_runs(tmp_path):
    """As it stands, but on a smaller dataset and for two steps."""
    [code] = re.findall(r"^```python\n(.*?)^```", text_of(ROOT / "README.md"), re.MULTILINE | re.DOTALL)
    smaller = "__import__('fused_rec.data.synthetic', fromlist=['_']).make_synthetic(0, 60, 25)"
    for size, less in {'fr.load_dataset("synthetic")': smaller, '"max_steps": 100': '"max_steps": 2'}.items():
        assert size in code
        code = code.replace(size, less)
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "HOME": str(tmp_path), "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "item_id" in done.stdout and "'code'" in done.stdout
