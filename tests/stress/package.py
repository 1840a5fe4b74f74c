"""Builds the source distribution and, from it alone, the wheel; installs that elsewhere and runs it from elsewhere.

Python and the console script `fused-rec` run in a folder without the checkout.

    python tests/stress/package.py

Needs `build`, a C++ compiler and the network, from which the build takes its tools. The new environment borrows the
libraries of the one that runs this and has the wheel alone to itself.
"""

import os
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).parents[2]
SOURCES = (
    *("setup.py", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "requirements-minilm.txt"),
    *("fused_rec/py.typed", "fused_rec/explanation/locale/de.mo", "fused_rec/kernels/sparse_sum.cc"),
)
STORY = """
import sys
from pathlib import Path

import fused_rec as fr
from fused_rec.data.synthetic import make_synthetic
from fused_rec import kernels

assert Path(fr.__file__).is_relative_to(sys.prefix), fr.__file__
assert Path(fr.__file__).with_name("py.typed").is_file()
assert kernels.usable()
config = fr.configure(model={"variant": "graph", "dim": 8, "num_layers": 1}, train={"max_steps": 2, "eval_every": 1})
run = fr.train(config, "run", make_synthetic(0, 60, 30))
fr.save_dataset(make_synthetic(0, 60, 30), "tables", "tables")
[row] = run.explain("C0001", k=1, language="de")
assert abs(sum(part["value"] for part in row["parts"]) - row["score"]) < 1e-3, row
print("trained, ranked and explained from", fr.__file__, "with versions", run.results["versions"])
"""


def contents(archive: Path) -> set[str]:
    """Names of the files, those of a source distribution without its top folder."""
    if archive.suffix == ".whl":
        return set(zipfile.ZipFile(archive).namelist())
    with tarfile.open(archive) as file:
        return {str(PurePosixPath(*PurePosixPath(name).parts[1:])) for name in file.getnames()}


def run_script(script: str, folder: str, environment: dict[str, str]) -> None:
    """The console script as pip has written it: version, flags, a training on own tables, a ranking, and faults."""

    def ended(*arguments: str, status: int = 0) -> subprocess.CompletedProcess:
        done = subprocess.run([script, *arguments], cwd=folder, env=environment, capture_output=True, text=True)
        if done.returncode != status:
            sys.exit(f"fused-rec {' '.join(arguments)}: status {done.returncode}\n{done.stdout}{done.stderr}")
        return done

    version = ended("--version").stdout
    listed = ended("--help").stdout
    flags = ended("train", "--help").stdout
    assert version.startswith("fused-rec ") and "  recommend " in listed and "--workdir: " in flags, flags
    small = ("--config.model.variant=graph", "--config.model.dim=8", "--config.model.num_layers=1")
    steps = ("--config.train.max_steps=2", "--config.train.eval_every=2")
    done = ended("train", "--config=tables", "--config.data.path=tables", *small, *steps, "--workdir=script")
    assert "rank products: fused-rec recommend --workdir=script" in done.stdout, done.stdout
    ended("recommend", "--workdir=script", "--users=C0001", "--out=ranked.csv")
    unknown = ended("trian", status=1).stderr
    missing = ended("train", "--config=tables", status=1).stderr
    assert unknown.startswith("unknown command 'trian'") and missing == "--workdir is missing\n", unknown + missing
    print(f"{version.strip()} trained and ranked as a console script")


def main() -> None:
    """Ends with status 1 where anything is amiss."""
    with tempfile.TemporaryDirectory() as folder:
        out, home = Path(folder, "dist"), Path(folder, "environment")
        subprocess.run([sys.executable, "-m", "build", "--outdir", str(out), str(ROOT)], check=True)
        [source], [wheel] = out.glob("*.tar.gz"), out.glob("*.whl")
        if missing := set(SOURCES) - contents(source):
            sys.exit(f"{source.name} lacks {sorted(missing)}")
        inside = contents(wheel)
        modules = {file.relative_to(ROOT).as_posix() for file in (ROOT / "fused_rec").rglob("*.py")}
        if missing := modules - inside:
            sys.exit(f"{wheel.name} lacks {sorted(missing)}")
        if stray := {name for name in inside if not name.startswith(("fused_rec/", "fused_rec-"))}:
            sys.exit(f"{wheel.name} holds {sorted(stray)}")
        if not any(Path(name).match("fused_rec/kernels/_compiled.*.so") for name in inside):
            sys.exit(f"{wheel.name} has no compiled kernel; is there a C++ compiler?")
        venv.create(home, with_pip=True)
        python = str(home / "bin" / "python")
        [site] = home.glob("lib/python*/site-packages")
        (site / "libraries.pth").write_text(sysconfig.get_paths()["purelib"] + "\n", encoding="utf-8")
        subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", str(wheel)], check=True)
        clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
        subprocess.run([python, "-c", STORY], cwd=folder, env=clean, check=True)
        run_script(str(home / "bin" / "fused-rec"), folder, clean)
        print(f"{source.name} and {wheel.name} are sound ({len(inside)} files in the wheel)")


if __name__ == "__main__":
    main()
