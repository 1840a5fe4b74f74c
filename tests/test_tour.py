"""What the tour and the page of explanations show runs as it stands there, from top to bottom, as a newcomer runs it.

Only sizes are smaller. `runs/bank`, `bank` and `rules.json` of the other pages are those of the tour.
"""

import csv
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOUR, EXPLANATIONS = (ROOT / "docs" / f"{name}.md" for name in ("TOUR", "EXPLANATIONS"))
# What a page says, and what is run in its place.
SIZES = {
    "n_users=400, n_items=80": "n_users=60, n_items=25",
    '"dim": 64': '"dim": 8',
    '"max_steps": 100, "eval_every": 20': '"max_steps": 2, "eval_every": 1',
    "seeds=range(3)": "seeds=range(1)",
    "trials=10": "trials=1",
    "--config.train.max_steps=100": "--config.train.max_steps=2",
}
INSTALLS = ("make", "source", "pip")  # how the environment that runs this came to be
NOT_HERE = ("experiments.doctor",)  # tests/test_doctor.py; its self-test takes as long as all others
# What tests/conftest.py chooses for tests is not what a reader has.
OURS = {"JAX_NUM_CPU_DEVICES", "JAX_PLATFORMS", "JAX_NUMPY_RANK_PROMOTION", "FUSED_REC_DATA"}


def blocks(page: Path, language: str) -> str:
    """The page's blocks of one language, every other line empty, so that a traceback names the page's line."""
    inside, lines = False, []
    for line in page.read_text(encoding="utf-8").splitlines():
        fence = line.startswith("```")
        inside = line == f"```{language}" if fence else inside
        lines.append(line if inside and not fence else "")
    return "\n".join(lines) + "\n"


def smaller(text: str) -> str:
    for size, less in SIZES.items():
        text = text.replace(size, less)
    return text


def run(folder: Path, *arguments: str) -> str:
    """What `python ARGUMENTS` prints in `folder`, the reader's home too."""
    environment = {name: value for name, value in os.environ.items() if name not in OURS}
    environment |= {"HOME": str(folder), "JAX_PLATFORMS": "cpu"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{shlex.join(arguments)}\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
    assert "Warning" not in done.stderr, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """Where the Python of the tour, and then that of the explanations, have run."""
    pytest.importorskip("matplotlib", reason='the tour draws: pip install -e ".[plots,sweeps]"')
    pytest.importorskip("optuna", reason='the tour searches: pip install -e ".[plots,sweeps]"')
    folder = tmp_path_factory.mktemp("tour")
    (folder / "experiments").symlink_to(ROOT / "experiments")
    pages = [folder / f"{page.stem}.py" for page in (TOUR, EXPLANATIONS)]
    for page, script in zip((TOUR, EXPLANATIONS), pages, strict=True):
        script.write_text(smaller(blocks(page, "python")), encoding="utf-8")
    printed = run(folder, "-c", f"import runpy; {'; '.join(f'runpy.run_path({script.name!r})' for script in pages)}")
    assert "| shuffled_text |" in printed
    return folder


def test_sizes_are_those_of_the_pages():
    reported = TOUR.read_text(encoding="utf-8")
    assert [size for size in SIZES if size not in reported] == []


def test_a_block_keeps_its_line(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A\n\n```python\na = 1\n```\n\n```bash\nb\n```\n")
    assert blocks(page, "python") == "\n\n\na = 1\n" + "\n" * 5
    assert blocks(page, "bash").split() == ["b"]


def test_the_python_of_the_pages_runs(checkout):
    assert "C0001" in (checkout / "runs" / "bank" / "report.html").read_text(encoding="utf-8")
    for run_of in ("bank", "bank_best"):
        assert json.loads((checkout / "runs" / run_of / "results.json").read_text())["test"]["ndcg@10"] > 0


def test_the_commands_of_the_tour_run(checkout):
    joined = smaller(blocks(TOUR, "bash")).replace("\\\n", " ")
    lines = [shlex.split(line, comments=True) for line in joined.splitlines() if line.strip()]
    commands = [line for line in lines if line[0] not in INSTALLS and line[2] not in NOT_HERE]
    assert {line[2] for line in commands} == {f"experiments.{name}" for name in ("convert", "train", "recommend")}
    for python, *arguments in commands:
        assert python == "python"
        run(checkout, *arguments)
    assert (checkout / "dataset" / "bank" / "bank.inter").exists()
    assert (checkout / "runs" / "bank_by_command" / "results.json").exists()
    with (checkout / "ranked.csv").open(newline="") as file:
        ranked = list(csv.DictReader(file))
    reasons = (checkout / "reasons.jsonl").read_text().splitlines()
    assert len(ranked) == len(reasons) > 60
    assert json.loads((checkout / "ranked.csv.audit.json").read_text())["exclusions"]["rules"]["risk"]["excluded"] > 0


@pytest.mark.parametrize("page", [TOUR, EXPLANATIONS], ids=lambda page: page.stem)
def test_what_is_not_run_is_none_of_a_readers_languages(page):
    languages = set(re.findall(r"^```(\w+)", page.read_text(encoding="utf-8"), re.MULTILINE))
    assert languages <= {"python", "bash"}
