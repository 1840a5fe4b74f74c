"""Damages real checkpoints in every way it can think of: nothing that was not saved may ever come back.

    python tests/stress/corrupt.py --trials=600

Each trial copies the three checkpoints of a small run, damages one or two of them, and asks for the newest good one.
That must come back bit for bit, and a damaged one be refused by a CheckpointError. Exits with 1 where one is not.
"""

import argparse
import collections
import hashlib
import json
import random
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging

from fused_rec.training.checkpoint import MANIFEST, RECORD, CheckpointError, Checkpoints

STEPS = (10, 20, 30)
DTYPES = ("float32", "bfloat16", "int32", "uint32", "float16", "bool", "float64", "int8")


def make_state(step: int) -> dict:
    """A small state of every kind of leaf a run has, all values a function of `step`."""
    drawn = np.random.default_rng(step)
    params = {"user": jnp.asarray(drawn.normal(size=(9, 4)), jnp.float32), "gate": jnp.full(3, step, jnp.bfloat16)}
    moments = jax.tree.map(lambda leaf: leaf + step, optax.adamw(0.1).init(params))
    return {"step": jnp.int32(step), "params": params, "opt_state": moments, "no_edges": jnp.zeros((0, 4))}


def save(folder: Path) -> None:
    """The checkpoints that trials damage."""
    checkpoints = Checkpoints(folder)
    for step in STEPS:
        checkpoints.save(step, make_state(step), {"progress": {"best": step / 7}}, best=step == STEPS[0])


def _any_file(step: Path, generator: random.Random, *, empty: bool = True) -> Path:
    files = sorted(file for file in step.rglob("*") if file.is_file() and (empty or file.stat().st_size))
    return generator.choice(files)


def flip(step: Path, generator: random.Random) -> None:
    """One to three bits of a file."""
    file = _any_file(step, generator, empty=False)
    content = bytearray(file.read_bytes())
    for bit in generator.sample(range(8 * len(content)), generator.randint(1, 3)):
        content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)


def truncate(step: Path, generator: random.Random) -> None:
    """A file loses its end, or all."""
    file = _any_file(step, generator, empty=False)
    file.write_bytes(file.read_bytes()[: generator.randrange(file.stat().st_size)])


def remove(step: Path, generator: random.Random) -> None:
    """A file is gone."""
    _any_file(step, generator).unlink()


def empty(step: Path, generator: random.Random) -> None:
    """The folder is there, and nothing in it, or folders without files."""
    keep = generator.random() < 0.5
    for file in [file for file in step.rglob("*") if file.is_file()]:
        file.unlink()
    if not keep:
        shutil.rmtree(step)
        step.mkdir()


def add(step: Path, generator: random.Random) -> None:
    """A file that nobody saved, in a folder of the checkpoint, perhaps without content."""
    folder = generator.choice(sorted([step, *(path for path in step.rglob("*") if path.is_dir())]))
    (folder / f"left_over_{generator.randrange(99)}").write_bytes(bytes(generator.randrange(3)))


def retype(step: Path, generator: random.Random) -> None:
    """The record gives a leaf another dtype."""
    record = json.loads((step / RECORD).read_text())
    leaf = record["leaves"][generator.choice(sorted(record["leaves"]))]
    leaf["dtype"] = generator.choice([dtype for dtype in DTYPES if dtype != leaf["dtype"]])
    (step / RECORD).write_text(json.dumps(record, indent=1))


def retype_consistently(step: Path, generator: random.Random) -> None:
    """The same, and the manifest is made to agree."""
    listed = (step / MANIFEST).read_text()
    before = hashlib.sha256((step / RECORD).read_bytes()).hexdigest()
    retype(step, generator)
    (step / MANIFEST).write_text(listed.replace(before, hashlib.sha256((step / RECORD).read_bytes()).hexdigest()))


def swap_files(step: Path, generator: random.Random) -> None:
    """A file and one of another step change places."""
    other = generator.choice([step.parent / str(number) for number in STEPS if str(number) != step.name])
    for _ in range(100):
        one = _any_file(step, generator)
        there = other / one.relative_to(step)
        two = there if there.is_file() and generator.random() < 0.5 else _any_file(other, generator)
        contents = one.read_bytes(), two.read_bytes()
        if contents[0] != contents[1]:
            one.write_bytes(contents[1])
            two.write_bytes(contents[0])
            return


def swap_steps(step: Path, generator: random.Random) -> None:
    """Two whole checkpoints change names."""
    other = generator.choice([step.parent / str(number) for number in STEPS if str(number) != step.name])
    aside = step.with_name("aside")
    step.rename(aside)
    other.rename(step)
    aside.rename(other)


Damage = Callable[[Path, random.Random], None]
KINDS: tuple[Damage, ...] = (
    flip,
    truncate,
    remove,
    empty,
    add,
    retype,
    retype_consistently,
    swap_files,
    swap_steps,
)


def _contents(step: Path) -> dict[str, bytes]:
    return {str(path.relative_to(step)): path.read_bytes() for path in step.rglob("*") if path.is_file()}


def trial(saved: Path, damage: Damage, generator: random.Random) -> str:
    """Damages a copy of `saved` and returns what became of it. Raises AssertionError where anything wrong came back."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "checkpoints"
        shutil.copytree(saved, folder)
        damage(folder / str(generator.choice([*STEPS, STEPS[-1]])), generator)
        sound = [step for step in STEPS if _contents(folder / str(step)) == _contents(saved / str(step))]
        assert len(sound) < len(STEPS), "nothing was damaged"
        checkpoints, like = Checkpoints(folder), jax.eval_shape(lambda: make_state(0))
        for step in STEPS:
            if step not in sound:
                try:
                    checkpoints.restore(step, like)
                except CheckpointError:
                    continue
                raise AssertionError(f"step {step} came back")
        good = checkpoints.last_good()
        if damage is retype_consistently and good is not None and good not in sound:
            return "refused"  # its bytes are in order: only the model tells, as `restore` did above
        assert good == max(sound, default=None), f"{good} is not the newest of {sound}"
        if good is None:
            return "none left"
        state, extras = checkpoints.restore(good, like)
        assert extras == {"progress": {"best": good / 7}}
        for one, other in zip(jax.tree.leaves(state), jax.tree.leaves(make_state(good)), strict=True):
            assert one.dtype == other.dtype and one.shape == other.shape
            assert np.asarray(one).tobytes() == np.asarray(other).tobytes()
        return "fell back" if good < STEPS[-1] else "newest is good"


def main() -> None:
    """Runs the campaign and prints its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    logging.set_verbosity(logging.ERROR)
    outcomes: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    with tempfile.TemporaryDirectory() as folder:
        saved = Path(folder) / "checkpoints"
        save(saved)
        for number in range(asked.trials):
            damage = KINDS[number % len(KINDS)]
            try:
                outcome = trial(saved, damage, random.Random(f"{asked.seed} {number}"))
            except Exception as error:
                outcome = "FAULT"
                print(f"trial {number}, {damage.__name__}: {type(error).__name__}: {error}", flush=True)
            outcomes[damage.__name__][outcome] += 1
    for name, counts in outcomes.items():
        print(f"{name:20} {counts.total():4}: " + ", ".join(f"{what} {n}" for what, n in sorted(counts.items())))
    faults = sum(counts["FAULT"] for counts in outcomes.values())
    print(f"{asked.trials} trials, {faults} faults")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
