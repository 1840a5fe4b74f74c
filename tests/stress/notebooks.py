"""Runs every notebook from a clean folder and tells how long it takes.

    python tests/stress/notebooks.py [--out=DIR] [NAME ...]

Texts are encoded and programs compiled anew each time, as for a newcomer. A cell that fails ends it with that cell. DIR
gets the notebooks with what they showed, to look at.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import jupytext
import nbformat
from test_notebooks import SOURCES, code, execute

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--out", type=Path, metavar="DIR")
    asked = parser.parse_args()
    for source in [source for source in SOURCES if source.stem in (asked.names or [source.stem])]:
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            done = execute(jupytext.read(source), Path(folder))
        if asked.out:
            asked.out.mkdir(parents=True, exist_ok=True)
            nbformat.write(done, asked.out / f"{source.stem}.ipynb")
        print(f"{source.stem}: {len(code(source))} cells in {time.perf_counter() - began:.0f} s", flush=True)
