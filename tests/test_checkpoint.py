"""Checkpoints survive kills, report damage by name, and give back exactly what was saved."""

import json
import logging
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import absl.logging
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from stress import corrupt

from fused_rec.storage import SaveError
from fused_rec.training.checkpoint import MANIFEST, RECORD, CheckpointError, Checkpoints

ROOT = Path(__file__).parents[1]


def make_state(step=0):
    """A small state of every kind of leaf a run has, all values a function of `step`."""
    params = {"embedding": {"id": jnp.arange(12.0).reshape(3, 4) + step}, "gate": jnp.full(3, step, jnp.bfloat16)}
    return {
        "step": jnp.int32(step),
        "params": params,
        "opt_state": optax.adamw(0.1).init(params),
        "no_edges": jnp.zeros((0, 4)),
        "seen": np.array([True, step % 2 == 0]),
    }


def assert_equal(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.fixture
def saved(tmp_path):
    """Steps 10, 20 and 30; 10 is the best."""
    checkpoints = Checkpoints(tmp_path / "run", keep_last=2)
    for step in (10, 20, 30):
        checkpoints.save(step, make_state(step), {"epoch": step // 10}, best=step == 10)
    return checkpoints, tmp_path / "run"


def largest(folder):
    return max((file for file in (folder / "state").rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)


def test_what_is_saved_comes_back(saved):
    checkpoints, _ = saved
    state, extras = checkpoints.restore(30, make_state())
    assert_equal(state, make_state(30))
    assert extras == {"epoch": 3}
    assert isinstance(state["seen"], np.ndarray) and isinstance(state["step"], jax.Array)


def test_an_abstract_state_is_enough(saved):
    checkpoints, _ = saved
    abstract = jax.eval_shape(make_state)
    assert_equal(checkpoints.restore(20, abstract)[0], make_state(20))


def test_best_and_last_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path / "run", keep_last=2)
    assert checkpoints.steps() == [] and max(checkpoints.steps(), default=None) is None
    assert checkpoints.best_step() is None and checkpoints.last_good() is None
    kept = []
    for step, best in [(1, True), (2, False), (3, True), (4, False), (5, False), (6, False)]:
        checkpoints.save(step, make_state(step), {}, best=best)
        kept.append(checkpoints.steps())
    assert kept == [[1], [1, 2], [2, 3], [3, 4], [3, 4, 5], [3, 5, 6]]
    assert (max(checkpoints.steps(), default=None), checkpoints.best_step(), checkpoints.last_good()) == (6, 3, 6)
    assert sorted(os.listdir(tmp_path / "run")) == ["3", "5", "6"]


def test_the_manifest_is_one_that_sha256sum_reads(saved):
    _, folder = saved
    checked = subprocess.run(["sha256sum", "--check", "--strict", MANIFEST], cwd=folder / "30", capture_output=True)
    assert checked.returncode == 0, checked.stderr


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda s: s["params"] | {"gate": s["params"]["gate"].astype(jnp.float32)}, r"bfloat16\[3\].*float32\[3\]"),
        (lambda s: s["params"] | {"gate": s["params"]["gate"][:2]}, r"bfloat16\[3\].*bfloat16\[2\]"),
        (lambda s: {"embedding": s["params"]["embedding"]}, r"bfloat16\[3\] in the checkpoint and absent in the model"),
    ],
)
def test_another_model_is_refused_by_leaf(saved, change, expected):
    checkpoints, _ = saved
    like = make_state()
    like["params"] = change(like)
    with pytest.raises(CheckpointError, match=f"params/gate is {expected}"):
        checkpoints.restore(30, like)


def test_a_leaf_the_checkpoint_lacks_is_named(saved):
    checkpoints, _ = saved
    with pytest.raises(CheckpointError, match=r"late is absent in the checkpoint and float32\[2\] in the model"):
        checkpoints.restore(30, make_state() | {"late": jnp.zeros(2)})


def test_64_bits_are_not_narrowed(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"x": np.array([1.0 + 1e-12])}, {}, best=True)
    assert checkpoints.restore(1, {"x": np.zeros(1)})[0]["x"][0] == 1.0 + 1e-12
    with pytest.raises(CheckpointError, match="x came back as float32"):
        checkpoints.restore(1, {"x": jax.ShapeDtypeStruct((1,), np.float64)})


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_a_state_that_is_not_finite_is_refused(saved, bad, dtype):
    checkpoints, folder = saved
    with pytest.raises(CheckpointError, match="w/k has 1 of 4 values that are not finite"):
        checkpoints.save(40, {"w": {"k": jnp.array([0, 1, bad, 2], dtype)}}, {}, best=True)
    assert sorted(os.listdir(folder)) == ["10", "20", "30"]


def test_what_is_no_state_is_refused(tmp_path):
    checkpoints = Checkpoints(tmp_path / "run")
    with pytest.raises(CheckpointError, match="a is a float; every leaf of a state must be an array"):
        checkpoints.save(1, {"a": 1.0}, {}, best=True)
    with pytest.raises(CheckpointError, match="share one name"):
        checkpoints.save(1, {"a/b": jnp.ones(1), "a": {"b": jnp.ones(1)}}, {}, best=True)
    with pytest.raises(CheckpointError, match="extras cannot be written as JSON"):
        checkpoints.save(1, {"a": jnp.ones(1)}, {"loss": float("nan")}, best=True)
    with pytest.raises(CheckpointError, match="step is -1"):
        checkpoints.save(-1, {"a": jnp.ones(1)}, {}, best=True)
    with pytest.raises(ValueError, match="keep_last is 0"):
        Checkpoints(tmp_path, keep_last=0)
    assert not (tmp_path / "run").exists()


def test_every_flipped_bit_is_seen(saved, caplog):
    """One bit in each file in turn, at its start, middle and end, manifest and record included."""
    checkpoints, folder = saved
    generator = random.Random(0)
    files = [file for file in (folder / "30").rglob("*") if file.is_file() and file.stat().st_size]
    assert {file.name for file in files} >= {MANIFEST, RECORD} and len(files) > 5
    for file in files:
        whole = file.read_bytes()
        for place in {0, len(whole) // 2, len(whole) - 1}:
            changed = bytearray(whole)
            changed[place] ^= 1 << generator.randrange(8)
            file.write_bytes(changed)
            with pytest.raises(CheckpointError, match="30 is damaged"):
                checkpoints.restore(30, make_state())
            assert checkpoints.last_good() == 20
        file.write_bytes(whole)
    assert checkpoints.last_good() == 30


def test_damage_is_reported_by_name_and_the_newest_good_step_is_used(saved, caplog):
    checkpoints, folder = saved
    file = largest(folder / "30")
    file.write_bytes(file.read_bytes()[:-1])
    name = file.relative_to(folder / "30").as_posix()
    with caplog.at_level(logging.WARNING):
        assert checkpoints.last_good() == 20
    assert f"{folder / '30'} is damaged: {name} differs" in caplog.text
    assert max(checkpoints.steps(), default=None) == 30
    assert_equal(checkpoints.restore(20, make_state())[0], make_state(20))


@pytest.mark.parametrize("harm", [lambda d: largest(d).unlink(), lambda d: (d / "state" / "extra").write_text("x")])
def test_missing_and_added_files_are_damage(saved, harm):
    checkpoints, folder = saved
    harm(folder / "30")
    with pytest.raises(CheckpointError, match="30 is damaged: state/"):
        checkpoints.restore(30, make_state())


def test_empty_and_incomplete_folders_are_no_checkpoints(saved, caplog):
    checkpoints, folder = saved
    (folder / "40").mkdir()
    (folder / "50" / "state").mkdir(parents=True)
    (folder / "007").mkdir()
    (folder / "notes").mkdir()
    with caplog.at_level(logging.WARNING):
        assert checkpoints.steps() == [10, 20, 30]
    assert f"{folder / '40'} has no {MANIFEST}" in caplog.text and f"{folder / '50'} has no" in caplog.text
    assert checkpoints.last_good() == 30
    with pytest.raises(CheckpointError, match=r"40 holds no checkpoint; this run has the steps \[10, 20, 30\]"):
        checkpoints.restore(40, make_state())


def test_a_run_taken_up_before_damage_replaces_it(saved, caplog):
    checkpoints, folder = saved
    largest(folder / "30").unlink()
    (folder / "40").mkdir()
    with caplog.at_level(logging.WARNING):
        checkpoints.save(25, make_state(25), {}, best=False)
    assert checkpoints.steps() == [10, 20, 25]
    assert f"{folder / '30'} is damaged" in caplog.text and "now saves step 25" in caplog.text
    assert sorted(os.listdir(folder)) == ["10", "20", "25"]


@pytest.mark.parametrize("step", [15, 30])
def test_a_sound_later_checkpoint_is_never_replaced(saved, step):
    checkpoints, folder = saved
    with pytest.raises(CheckpointError, match=f"step {step} is not saved: .* holds a sound step"):
        checkpoints.save(step, make_state(step), {}, best=False)
    assert checkpoints.steps() == [10, 20, 30]


def test_a_damaged_record_is_not_the_best(saved, caplog):
    checkpoints, folder = saved
    record = folder / "10" / RECORD
    record.write_text(record.read_text().replace('"epoch": 1', '"epoch": 9'))
    assert checkpoints.best_step() is None
    assert f"{folder / '10'} is damaged: {RECORD}" in caplog.text


def test_orbax_stays_isolated_when_the_run_logs_much(tmp_path, caplog):
    before = absl.logging.get_verbosity()
    absl.logging.set_verbosity(absl.logging.INFO)
    try:
        checkpoints = Checkpoints(tmp_path)
        checkpoints.save(1, make_state(1), {}, best=True)
        checkpoints.restore(1, make_state())
        assert caplog.records == []
        assert absl.logging.get_verbosity() == absl.logging.INFO
    finally:
        absl.logging.set_verbosity(before)


@pytest.fixture
def read_only():
    """A folder with the checkpoint 1 that this process may read but not write, be it root's."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        Checkpoints(folder).save(1, make_state(1), {}, best=True)
        entries = [folder, *folder.rglob("*")]
        for entry in entries:
            entry.chmod(0o555 if entry.is_dir() else 0o444)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)
        yield folder
        os.seteuid(user)
        for entry in entries:
            entry.chmod(0o755)


def test_a_read_only_folder_can_be_read_but_not_written(read_only):
    checkpoints = Checkpoints(read_only)
    before = sorted((str(path), path.stat().st_mtime_ns) for path in read_only.rglob("*"))
    assert_equal(checkpoints.restore(1, make_state())[0], make_state(1))
    assert (checkpoints.last_good(), max(checkpoints.steps(), default=None), checkpoints.best_step()) == (1, 1, 1)
    with pytest.raises(SaveError, match=f"{read_only}/2 could not .*Permission.*The last good checkpoint is step 1"):
        checkpoints.save(2, make_state(2), {}, best=True)
    assert before == sorted((str(path), path.stat().st_mtime_ns) for path in read_only.rglob("*"))


CHILD = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import jax
from test_checkpoint import make_state
from fused_rec.training.checkpoint import Checkpoints
checkpoints = Checkpoints(sys.argv[1])
"""


def child(code, folder, **environment):
    variables = {name: value for name, value in os.environ.items() if name != "JAX_NUM_CPU_DEVICES"} | environment
    return subprocess.Popen(
        [sys.executable, "-c", CHILD + code, str(folder)], env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def test_a_kill_during_a_save_costs_at_most_that_save(tmp_path):
    """Each process takes the run up where the last one was killed, and is killed at a random moment of its saves."""
    code = """
step = checkpoints.last_good() or 0
if step:
    checkpoints.restore(step, make_state())
while True:
    step += 1
    checkpoints.save(step, make_state(step), {"step": step}, best=step % 7 == 0)
    print(step, flush=True)
"""
    generator, reached = random.Random(0), 0
    for _ in range(4):
        process = child(code, tmp_path)
        assert process.stdout is not None and process.stderr is not None
        reported = [int(process.stdout.readline() or process.stderr.read())]
        time.sleep(generator.uniform(0, 0.2))
        process.send_signal(signal.SIGKILL)
        output, errors = process.communicate()
        assert process.returncode == -signal.SIGKILL, errors
        reported += [int(line) for line in output.split()]

        checkpoints = Checkpoints(tmp_path)
        step = checkpoints.last_good()
        assert step == max(checkpoints.steps(), default=None)
        assert step is not None and step >= max(reported) > reached, "a completed save was lost"
        for kept in checkpoints.steps():
            state, extras = checkpoints.restore(kept, make_state())
            assert_equal(state, make_state(kept))
            assert extras == {"step": kept}
        reached = step


def test_device_counts_may_differ(tmp_path):
    """Four devices save, one restores and saves on, four restore that."""
    assert jax.device_count() == 4
    replicated = NamedSharding(Mesh(np.array(jax.devices()), ("devices",)), PartitionSpec())
    place = lambda step: jax.device_put(make_state(step), replicated)  # noqa: E731
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, place(1), {}, best=True)
    code = """
assert jax.device_count() == 1
state, _ = checkpoints.restore(1, make_state())
assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), state, make_state(1)))
checkpoints.save(2, make_state(2), {}, best=True)
"""
    process = child(code, tmp_path)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, output, errors) == (0, b"", b"")
    state, _ = checkpoints.restore(2, place(0))
    assert_equal(state, place(2))
    assert all(len(leaf.addressable_shards) == 4 for leaf in jax.tree.leaves(state))


def test_the_record_says_what_is_inside_without_orbax(saved):
    _, folder = saved
    record = json.loads((folder / "20" / RECORD).read_text())
    assert record["leaves"]["params/gate"] == {"shape": [3], "dtype": "bfloat16"}
    assert (record["step"], record["best"]) == (20, False)


@pytest.fixture(scope="module")
def to_damage(tmp_path_factory):
    folder = tmp_path_factory.mktemp("to_damage") / "checkpoints"
    corrupt.save(folder)
    return folder


@pytest.mark.parametrize("damage", corrupt.KINDS, ids=lambda damage: damage.__name__)
def test_nothing_that_was_not_saved_comes_back(to_damage, damage):
    """A dozen of each kind; tests/stress/corrupt.py makes more."""
    for number in range(12):
        corrupt.trial(to_damage, damage, random.Random(number))


def test_a_step_that_was_saved_as_the_run_stopped_gives_way_on_demand_only(saved):
    checkpoints, folder = saved
    checkpoints.save(30, make_state(31), {"epoch": 4}, best=True, replace=True)
    state, extras = checkpoints.restore(30, make_state())
    assert_equal(state, make_state(31))
    assert (extras, checkpoints.best_step()) == ({"epoch": 4}, 30)
    assert sorted(os.listdir(folder)) == ["20", "30"]
    with pytest.raises(CheckpointError, match="step 20 is not saved: .* holds a sound step 30"):
        checkpoints.save(20, make_state(20), {}, best=False, replace=True)
