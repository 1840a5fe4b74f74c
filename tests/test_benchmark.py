"""The harness of the benchmark: real processes, and a peer that needs NumPy alone."""

import dataclasses
import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import benchmark, competitors
from experiments.competitors import OURS, Side, accelerator
from fused_rec.evaluation import plots
from fused_rec.text.encoders import registry

ROOT = Path(__file__).parents[1]
NUMPY = Side("NumPy", ROOT / "tests" / "numpy_reference.py", "numpy")
PYTHONS = {OURS: Path(sys.executable), NUMPY: Path(sys.executable)}
UNCACHED = {"JAX_ENABLE_COMPILATION_CACHE": "0"}  # compilation is timed
COLUMNS = {"name", "ours", "peer", "peer_name", "ratio", "unit", "hardware", "versions"}


@pytest.fixture(scope="module")
def pairs():
    return benchmark.generated(2_000)


def job(folder, pairs, graph_inputs, **settings):
    arrays = benchmark.write_arrays(pairs, folder, final=graph_inputs == "rank")
    common = {"arrays": str(arrays), "folder": str(folder), "repeats": 1, "warmup": 0, "threads": 1}
    return {**common, "task": graph_inputs, "num_layers": 3, "learning_rate": 1e-3, "k": 20, "batch": 50, **settings}


def results(folder):
    return [np.load(folder / f"result_{number}.npy") for number in range(2)]


def test_the_command_without_any_peer(tmp_path):
    """Everything runs, rows are whole, and each peer that is missing is told with its remedy."""
    out = tmp_path / "new" / "rows.json"
    flags = ("--suite=evaluate", "--data=generated:2000", "--repeats=1", "--warmup=0", "--threads=1", f"--out={out}")
    command = [sys.executable, "-W", "error", "-m", "experiments.benchmark", *flags]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())
    assert all(row.keys() >= COLUMNS for row in rows)
    assert {row["name"].split(":")[0] for row in rows} == {"ranking, generated", "ranking with metrics, generated"}
    assert all(row["ours"] > 0 and row["peer"] is None and row["ratio"] is None for row in rows)
    assert {row["peer_name"] for row in rows} == {"PyTorch, tuned", "implicit ALS", "RecBole", None}
    assert all(row["versions"]["ours"]["jax"] for row in rows)
    [reported] = [line for line in done.stdout.splitlines() if "RecBole left out" in line]
    assert (
        "python3 -m venv DIR/recbole && DIR/recbole/bin/pip install -r experiments/competitors/recbole.txt" in reported
    )
    assert "figure: none" in done.stdout and not out.with_suffix(".png").exists()


def test_curves_of_quality(tmp_path):
    """Ours alone; a side that fails or is missing is told, and the metrics are those of vectors at growing times."""
    out, broken = tmp_path / "rows.json", tmp_path / "envs" / "torch" / "bin" / "python"
    broken.parent.mkdir(parents=True)
    broken.write_text("#!/bin/sh\nexit 3\n")
    broken.chmod(0o755)
    flags = ("--suite=quality", "--data=generated:200x100x4e3", "--seconds=3", "--threads=1", f"--out={out}")
    flags = (*flags, f"--competitors={tmp_path / 'envs'}")
    command = [sys.executable, "-W", "error", "-m", "experiments.benchmark", *flags]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())
    assert [row["peer_name"] for row in rows] == ["PyTorch Geometric", "PyTorch, tuned", "implicit ALS"]
    assert all(row.keys() >= COLUMNS and row["ratio"] is None and row["versions"]["ours"]["jax"] for row in rows)
    reported = ("status 3", "status 3", "not there")
    assert all(why in row["note"] for why, row in zip(reported, rows, strict=True))
    curve = rows[0]["curve"]
    assert len(curve) == benchmark.POINTS and rows[0]["ours"] == curve[-1]["recall@20"]
    assert np.all(np.diff([point["seconds"] for point in curve]) > 0.25 * 0.99)  # a twelfth of three seconds each
    assert all(0 < point["ndcg@20"] < point["recall@20"] < 1 for point in curve)


def test_the_held_out_tenth(pairs):
    held_out = benchmark.validation(pairs)
    parts = [
        set(zip(*ends, strict=True))
        for ends in ((held_out.user, held_out.item), (held_out.test_user, held_out.test_item))
    ]
    assert parts[0] | parts[1] == set(zip(pairs.user, pairs.item, strict=True)) and not parts[0] & parts[1]
    assert len(parts[1]) == pytest.approx(len(pairs.user) / 10, rel=0.2)


def test_triples_hold_what_they_say(pairs):
    """As batches of the other suites: who holds what, and does not hold what."""
    sys_path = str(competitors.HERE)
    sys.path.insert(0, sys_path)
    try:
        triples = importlib.import_module("protocol").triples
    finally:
        sys.path.remove(sys_path)
    arrays = {"shape": np.array([pairs.n_users, pairs.n_items]), "user": pairs.user, "item": pairs.item}
    draw = triples({"pairs": 500}, arrays)
    (user, item, other), again = draw(), draw()
    held = set(zip(pairs.user.tolist(), pairs.item.tolist(), strict=True))
    assert held.issuperset(zip(user.tolist(), item.tolist(), strict=True))
    assert held.isdisjoint(zip(user.tolist(), other.tolist(), strict=True)) and not np.array_equal(user, again[0])


def test_both_sides_take_the_same_step(tmp_path, pairs):
    """Ours and the published equations, written out over dense matrices, start from the same loss."""
    answers, failed = competitors.alternate(PYTHONS, job(tmp_path, pairs, "step", repeats=2), UNCACHED)
    assert not failed and [len(of) for of in answers.values()] == [2, 2]
    ours, theirs = results(tmp_path)
    assert ours == pytest.approx(float(theirs), rel=1e-4) and abs(ours - np.log(2)) > 0.02
    for side in PYTHONS:
        reported = competitors.figures(answers[side])
        assert len(reported["seconds"]) == 4 and min(reported["seconds"]) > 0
        assert reported["first_s"][0] > reported["load_s"][0] > 0 and reported["peak_mb"][0] > 10
        assert reported["versions"]["numpy"] == np.__version__
    assert min(answers[OURS][0]["compile_s"], answers[OURS][1]["compile_s"]) > 0.1


def test_a_fused_step_on_generated_text(tmp_path, pairs):
    result = tmp_path / "result.npy"
    settings = job(tmp_path, pairs, "fused_step", compute_dtype="float32", result=str(result))
    assert min(competitors.visit(OURS, Path(sys.executable), settings, {})["seconds"]) > 0
    # Two branches, each at first near the log of the number of items.
    assert 0.5 < float(np.load(result)) / (2 * np.log(pairs.n_items)) < 1.5


def test_generated_pairs_of_given_sizes():
    pairs = benchmark.generated(30, 50, 400)
    assert (pairs.n_users, pairs.n_items) == (30, 50) and 200 < len(pairs.user) < 400
    assert benchmark.read_pairs("generated:30x50x4e2").n_items == 50


def test_both_sides_rank_the_same(tmp_path, pairs):
    answers, failed = competitors.alternate(PYTHONS, job(tmp_path, pairs, "rank"), {})
    assert not failed and len(answers[NUMPY]) == 2
    ours, theirs = results(tmp_path)
    assert ours.shape == theirs.shape == (pairs.n_users, 20)
    known = set(zip(pairs.user.tolist(), pairs.item.tolist(), strict=True))
    free = pairs.n_items - np.bincount(pairs.user, minlength=pairs.n_users)
    enough = free >= 20  # the others' lists end in seen items, each side in its own way
    assert enough.sum() > 20
    assert np.mean(ours[enough] == theirs[enough]) > 0.999
    assert not any((user, item) in known for user in np.flatnonzero(enough) for item in ours[user].tolist())


def test_a_visit_there_and_back(tmp_path, pairs, monkeypatch):
    """A B C C B A: the order in which the processes were started, by what they were told of the clock."""
    order = []
    visit = competitors.visit

    def watched(side, *arguments):
        order.append(side.name)
        return visit(side, *arguments)

    monkeypatch.setattr(competitors, "visit", watched)
    sides = {Side(name, NUMPY.script, "numpy"): Path(sys.executable) for name in "ABC"}
    competitors.alternate(sides, job(tmp_path, pairs, "rank"), {}, rounds=2)
    assert "".join(order) == "ABCCBA" * 2


def test_a_peer_that_fails_is_left_out_and_ours_is_not(tmp_path, pairs):
    settings = job(tmp_path, pairs, "fails")
    with pytest.raises(competitors.PeerError, match="KeyError: 'fails'"):
        competitors.alternate({OURS: Path(sys.executable)}, settings, {})
    answers, failed = competitors.alternate({NUMPY: Path(sys.executable)}, settings, {})
    assert answers == {} and "it does not take the data" in failed[NUMPY]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_peer_that_is_killed_is_left_out_for_want_of_memory(tmp_path, pairs):
    answers, failed = competitors.alternate({NUMPY: Path(sys.executable)}, job(tmp_path, pairs, "is_killed"), {})
    assert answers == {} and "memory was not enough" in failed[NUMPY]


def test_the_clock_runs_from_the_start_of_the_process(tmp_path, pairs):
    began = time.time()
    answer = competitors.visit(
        NUMPY, Path(sys.executable), {**job(tmp_path, pairs, "rank"), "result": str(tmp_path / "r.npy")}, {}
    )
    assert answer["load_s"] < answer["first_s"] < time.time() - began


def test_ratios_say_how_far_ours_is_ahead():
    """Twice as fast is 2, whether time is told or a rate; memory the same."""
    own = {"seconds": [1.0, 3.0, 2.0], "peak_mb": [50], "versions": {}}
    other = {"seconds": [4.0, 4.0, 9.0], "peak_mb": [25], "versions": {}}
    benchmark.flags.FLAGS(["x", "--suite=train", "--out=x"])
    shown = {"figures": {OURS: own, NUMPY: other}, "left_out": {}, "checks": {NUMPY: ""}, "setting": "all of it"}
    step, memory = benchmark.all_rows(benchmark.Measured("step", **shown), "peak_mb")
    assert (step["ours"], step["peer"], step["ratio"], step["unit"]) == (2000, 4000, 2, "ms")
    assert (step["ours_range"], step["peer_range"], step["samples"]) == ([1000, 3000], [4000, 9000], 3)
    assert (memory["ratio"], memory["unit"]) == (0.5, "MiB")
    [rate] = benchmark.all_rows(benchmark.Measured("rank", **shown, work=8, unit="users/s"))
    assert (rate["ours"], rate["peer"], rate["ratio"]) == (4, 2, 2)


def test_batches_hold_what_they_say(pairs):
    drawn = benchmark.batches_of(pairs, np.random.default_rng(3))
    user, item, other = (drawn[f"batch_{name}"].ravel().tolist() for name in ("user", "item", "other"))
    held = set(zip(pairs.user.tolist(), pairs.item.tolist(), strict=True))
    assert held.issuperset(zip(user, item, strict=True)) and held.isdisjoint(zip(user, other, strict=True))
    assert len(user) == benchmark.BATCHES * benchmark.BATCH


def test_the_figure_shows_what_is_behind_in_another_colour():
    pytest.importorskip("matplotlib", reason="figures need the extra: pip install -e '.[plots]'")
    rows = [{"name": "a", "peer_name": "p", "ratio": 2.0}, {"name": "b", "peer_name": "q", "ratio": 0.5}]
    figure = plots.by_ratio([*rows, {"name": "c", "peer_name": None, "ratio": None}], "here")
    [axes] = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["b | q  0.5 x", "a | p  2 x"]
    behind, ahead = axes.patches
    ends = [bar.get_path().get_extents(bar.get_patch_transform()) for bar in (behind, ahead)]
    assert [(end.x0, end.x1) for end in ends] == [(0.5, 1), (1, 2)]
    assert behind.get_facecolor() != ahead.get_facecolor()


def test_curves_are_a_line_a_side():
    pytest.importorskip("matplotlib", reason="figures need the extra: pip install -e '.[plots]'")
    curves = {
        name: [{"seconds": 1.0, "recall@20": value}, {"seconds": 3.0, "recall@20": 2 * value}]
        for name, value in (("ours", 0.2), ("peer", 0.1))
    }
    [axes] = plots.by_time(curves, "recall@20", "here").axes
    drawn = {
        line.get_label(): (np.asarray(line.get_xdata()).tolist(), np.asarray(line.get_ydata()).tolist())
        for line in axes.lines
    }
    assert drawn == {"ours": ([1, 3], [0.2, 0.4]), "peer": ([1, 3], [0.1, 0.2])}
    assert axes.get_ylim()[0] == axes.get_xlim()[0] == 0


@pytest.mark.parametrize(
    "side",
    [getattr(competitors, name) for name in ("PYG", "TORCH", "SDPA", "RECBOLE", "ALS", "SENTENCES")],
)
def test_every_peer_has_a_script_and_pinned_requirements(side):
    assert side.script.exists()
    lines = (competitors.HERE / f"{side.environment}.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert pins and all("==" in line for line in pins)


def test_several_jobs_in_one_process(tmp_path, pairs):
    """Each case has the answers of its sides; one that fails says why, and the others are done all the same."""
    arrays = benchmark.write_arrays(pairs, tmp_path, final=False)
    settings = job(tmp_path, pairs, "", device="cpu")
    cases = [accelerator.Case("a", task, {}, "", (NUMPY,)) for task in ("rank", "fails", "step")]
    answers = accelerator.answers_of(cases, [arrays] * 3, settings, {NUMPY: Path(sys.executable)})
    assert answers[1] == {NUMPY: "RuntimeError: it does not take the data"}
    assert all(len(answers[case][NUMPY]["seconds"]) == 1 for case in (0, 2))
    assert answers[0][NUMPY]["versions"]["numpy"] == np.__version__
    assert np.load(tmp_path / "result_0_0.npy").shape == (pairs.n_users, 20)
    gone = dataclasses.replace(NUMPY, script=tmp_path / "none.py")
    [answer] = accelerator.answers_of(
        [dataclasses.replace(cases[0], sides=(gone,))], [arrays], settings, {gone: Path(sys.executable)}
    )
    assert "NumPy" in answer[gone] and "ended with status 2" in answer[gone]


@pytest.fixture
def in_this_process(monkeypatch):
    """Our side of the suite `accelerator` without processes, with narrow models and steps that do nothing."""
    monkeypatch.syspath_prepend(str(competitors.HERE))
    protocol, ours = importlib.import_module("protocol"), importlib.import_module("ours")

    def visit(side, python, settings, variables):
        assert side == OURS
        answers = [protocol._attempted(ours.TASKS, {**settings, **one, "started": 0.0}) for one in settings["jobs"]]
        return {"answers": answers, "device": ours.device(settings), "peak_mb": 1, "versions": {"jax": jax.__version__}}

    monkeypatch.setattr(competitors, "visit", visit)
    monkeypatch.setattr(accelerator, "visit", visit)
    for task in ("step", "fused_step"):  # each has a test above
        monkeypatch.setitem(ours.TASKS, task, ((), lambda job, arrays: lambda number: 0.5))
    narrow = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 48, "vocab_size": 50}
    monkeypatch.setattr(accelerator, "MINILM", {**accelerator.MINILM, **narrow})
    monkeypatch.setattr(accelerator, "SMOLLM2", {**accelerator.SMOLLM2, **narrow, "num_key_value_heads": 1})
    monkeypatch.setattr(accelerator, "BY_LAYER", {"Qwen2.5-7B": accelerator.qwen2(32, 28, 4, 2, 48)})
    monkeypatch.setattr(accelerator, "LENGTH", 8)
    monkeypatch.setattr(accelerator, "LONG", 12)
    monkeypatch.setattr(accelerator, "GRAPHS", dict([*accelerator.GRAPHS.items()][:1]))


def test_every_row_of_the_accelerator(tmp_path, in_this_process):
    """The peaks come first; every other row has a floor in its unit, and each missing competitor its reason."""
    flags = ("--suite=accelerator", f"--out={tmp_path}/x.json", "--size=.0005", "--repeats=1", "--warmup=0")
    benchmark.flags.FLAGS(["x", *flags])
    rows = [*benchmark.measure_device(["propagation", "step", "ranking", "encode"])]
    assert all(row["ours"] > 0 and row["device"]["platform"] == "cpu" and row["size"] == 0.0005 for row in rows)
    peaks, others = rows[:4], rows[4:]
    assert [row["unit"] for row in peaks] == ["GB/s", *["TFLOP/s"] * 3]
    assert {row["name"].split(",")[0] for row in others} == {"propagation", "step", "fused step", "ranking", "encode"}
    assert [row["name"] for row in others if row["peer_name"] in (None, "PyTorch with SDPA")][-7:] == [
        *("encode, MiniLM-L6 in float32", "encode, MiniLM-L6 in bfloat16"),
        *("encode, SmolLM2-135M in float32", "encode, SmolLM2-135M in bfloat16"),
        *("encode, SmolLM2-135M in float32, long texts", "encode, SmolLM2-135M in bfloat16, long texts"),
        "encode, Qwen2.5-7B in bfloat16",
    ]
    for row in others:
        better = row["ours"] / row["floor"] if row["higher_is_better"] else row["floor"] / row["ours"]
        assert row["of_floor"] == pytest.approx(better) and row["note"].startswith(f"the floor is {better:.2f} of")
        assert row["peer"] is None and (row["peer_name"] is None) == row["name"].startswith("fused step")
        assert row["peer_name"] is None or "left out" in row["note"]
    [layer] = [row for row in others if "Qwen" in row["name"]]
    assert "one layer measured, counted 28 times" in layer["setting"]
    assert "Qwen" in benchmark.shown(rows)
    with pytest.raises(ValueError, match="--data names 'gowalla'"):
        next(benchmark.measure_device(["gowalla"]))


def test_floors_by_hand():
    """Bytes at the bandwidth or operations at the rate, whichever takes longer; a tenth of the work of matrices."""
    peaks = accelerator.Peaks(100, {"float32": 10, "bfloat16": 20})
    assert accelerator.Case("a", "", {}, "", moved=200, flops=10).floor(peaks) == 2
    assert accelerator.Case("a", "", {}, "", moved=200, flops=60, product="bfloat16").floor(peaks) == 3
    layer, step = accelerator.graph_cases("a", 2, 3, 4, {"dim": 8, "num_layers": 3, "step": ""})
    assert layer.moved == 64 + 28 + 320  # 8 edges, row starts of 2 + 3 rows, 5 rows of 8 columns twice
    assert step.moved == 6 * layer.moved + 7 * 160
    whole, tenth = (accelerator.peak_cases(size)["bfloat16"].work for size in (1, 0.1))
    assert tenth / whole == pytest.approx(0.1, rel=0.03)  # rows are a multiple of 64
    assert accelerator.sizes((100, 2000, 50_000), 0.1) == "generated:64x200x5000"
    assert [accelerator.torch_device(name) for name in ("gpu", "tpu")] == ["cuda", None]


@pytest.mark.parametrize("config", [accelerator.MINILM, accelerator.SMOLLM2, *accelerator.BY_LAYER.values()])
def test_operations_of_a_model_are_those_of_the_encoder(config):
    read = registry.family(config).read(config)
    expected = registry.flops(read, np.array([128], np.int32))[0]
    assert 128 * accelerator.flops_per_token(config, 128) == pytest.approx(expected, rel=1e-6)


def test_the_tests_on_a_device(tmp_path):
    """A failing test is counted and named; what pytest cannot run is no number."""
    (tmp_path / "test_two.py").write_text(
        "import os\ndef test_device(): assert os.environ['JAX_PLATFORMS'] == 'cpu'\ndef test_wrong(): assert 1 == 2\n"
    )
    found = accelerator.tested((str(tmp_path / "test_two.py"),), "cpu")
    assert found["value"] == 1 and "1 failed, 1 passed" in found["note"] and "test_wrong" in found["note"]
    assert accelerator.tested((str(tmp_path / "none.py"),), "cpu")["value"] is None
    for named in accelerator.TESTS:
        file, _, test = named.removeprefix("--deselect=").partition("::")
        assert f"def {test}" in (ROOT / file).read_text(encoding="utf-8")
