"""The folder of compiled programs: what a later process reads, and where none is kept."""

import os
import subprocess
import sys

PROGRAM = """
import logging, sys
from pathlib import Path
import jax, jax.numpy as jnp
from fused_rec.commands import launch

launch.PROGRAM_SECONDS = 0.0
launch.keep_programs(Path(sys.argv[1]))
logging.getLogger("jax._src.compiler").setLevel(logging.DEBUG)
logging.basicConfig(stream=sys.stdout)
print(jax.jit(lambda x: jnp.tanh(x) @ x)(jnp.ones((8, 8))).sum())
print("FOLDER", jax.config.jax_compilation_cache_dir)
"""


def computed(folder, **environment) -> str:
    """What the program above prints."""
    inherited = {key: value for key, value in os.environ.items() if key != "JAX_COMPILATION_CACHE_DIR"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder)], capture_output=True, text=True, env=inherited | environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_later_process_reads_the_compiled_programs(tmp_path):
    folder = tmp_path / "compiled"
    first = computed(folder)
    assert "Persistent compilation cache hit for 'jit" not in first
    kept = [path for path in folder.rglob("*") if path.is_file() and path.name.startswith("jit_")]
    assert kept and f"FOLDER {kept[0].parent}" in first
    assert kept[0].parent.stat().st_mode & 0o077 == 0  # nobody else may write a program there
    assert "Persistent compilation cache hit for 'jit" in computed(folder)


def test_a_folder_that_jax_has_already_stays(tmp_path):
    own = tmp_path / "own"
    assert f"FOLDER {own}" in computed(tmp_path / "compiled", JAX_COMPILATION_CACHE_DIR=str(own))
    assert not (tmp_path / "compiled").exists()


def test_without_a_folder_nothing_is_kept(tmp_path):
    (tmp_path / "file").write_text("")
    assert "FOLDER None" in computed(tmp_path / "file" / "compiled")
