"""Runs every notebook from a clean folder and tells how long it takes: python tests/campaigns/notebooks.py [NAME ...].

Texts are encoded and programs compiled anew each time, as for a newcomer. A cell that fails ends it with that cell.
"""

import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from test_notebooks import SOURCES, code, execute

if __name__ == "__main__":
    wanted = sys.argv[1:] or [source.stem for source in SOURCES]
    for source in [source for source in SOURCES if source.stem in wanted]:
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            execute(source, Path(folder))
        print(f"{source.stem}: {len(code(source))} cells in {time.perf_counter() - began:.0f} s", flush=True)
