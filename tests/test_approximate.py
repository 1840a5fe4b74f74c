"""Approximate ranking: what the inverted file finds, exclusions, recall as measured, and the command."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from jax.tree_util import Partial

import fused_rec as fr
from fused_rec.commands import written_reasons
from fused_rec.data.synthetic import make_synthetic
from fused_rec.evaluation.item_sets import item_sets
from fused_rec.evaluation.ranking import CandidateFilter
from fused_rec.explanation.explained_model import ExplainedModel
from fused_rec.explanation.reasons import Content
from fused_rec.serving import approximate
from fused_rec.serving.approximate import build_index, recalls, set_probes, with_recall

pytest.importorskip("faiss", reason="the extra faiss is not installed")
ROOT = Path(__file__).parents[1]
N_USERS, N_ITEMS, K = 60, 2000, 10


def _dot(users, items, batch):
    return users[batch] @ items.T


def _riskless(allowed, batch):
    return jax.numpy.broadcast_to(allowed, (len(batch), len(allowed)))


@pytest.fixture(scope="module")
def made():
    """A scorer, its vectors in 20 groups, and a filter: three quarters of the items pass a rule, and 5 are seen."""
    rng = np.random.default_rng(0)
    centers = 2 * rng.standard_normal((20, 8), np.float32)
    users, items = (
        centers[rng.integers(0, 20, n)] + rng.standard_normal((n, 8), np.float32) for n in (N_USERS, N_ITEMS)
    )
    scores = users @ items.T
    seen = item_sets(np.repeat(np.arange(N_USERS), 5), np.argsort(-scores, 1)[:, :5].ravel(), N_USERS)
    rule = Partial(_riskless, jax.numpy.asarray(np.arange(N_ITEMS) % 4 > 0))
    candidates = CandidateFilter(("rule", "seen"), (rule,), (seen,))
    return Partial(_dot, users, items), users, items, candidates


def test_all_lists_give_the_exact_ranking(made):
    """Also which rule refuses what of the list without rules; fewer lists find less, and nothing that is refused."""
    index = build_index(*made)
    everyone = np.arange(N_USERS)
    exact = index.exact(everyone, K)
    whole, short = set_probes(index, index.lists.nlist).rank(everyone, K)
    assert short == 0
    for name in ("items", "before", "passes"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(exact, name), err_msg=name)
    np.testing.assert_allclose(whole.scores, exact.scores, rtol=1e-5)
    assert whole.passes[:, :5, 1].sum() == 0 and whole.excluded[:, 1].tolist() == [5] * N_USERS
    assert (whole.excluded_alone.sum(1) < whole.excluded.sum(1)).any()

    little, _ = set_probes(index, 1).rank(everyone, K)
    assert 0.3 < recalls(little.items, exact.items).mean() < 1
    assert (little.items % 4 > 0).all() and (little.items >= 0).all()


def test_users_with_too_few_candidates_are_ranked_exactly(made, monkeypatch):
    monkeypatch.setattr(approximate, "MOST", K)  # of which a rule refuses some
    index = build_index(*made)
    found, short = set_probes(index, index.lists.nlist).rank(np.arange(N_USERS), K)
    assert short == N_USERS
    np.testing.assert_array_equal(found.items, index.exact(np.arange(N_USERS), K).items)


def test_only_candidates_are_indexed(made):
    scorer, users, items, candidates = made
    few = dataclasses.replace(candidates, items=np.arange(1, N_ITEMS, 2))
    index = build_index(scorer, users, items, few)
    found, _ = set_probes(index, index.lists.nlist).rank(np.arange(N_USERS), K)
    assert index.lists.ntotal == N_ITEMS // 2 and (found.items % 2 == 1).all()
    np.testing.assert_array_equal(found.items, index.exact(np.arange(N_USERS), K).items)


def test_an_index_of_nothing_is_refused(made):
    scorer, users, items, candidates = made
    none = dataclasses.replace(candidates, items=np.zeros(0, np.int64))
    with pytest.raises(ValueError, match="0 items may be recommended"):
        build_index(scorer, users, items, none)


def test_lists_are_read_until_the_recall_is_reached(made):
    """What is reported is of users on whom the number was not chosen."""
    index = build_index(*made)
    some, about = with_recall(index, np.arange(N_USERS), K, 0.6)
    assert 0.6 <= about["recall"] + 0.2 and about["lists_read"] == some.probes < about["lists"]
    assert about["sample"] == N_USERS // 2 and about["complete_lists"] < about["recall"]
    whole, about = with_recall(index, np.arange(N_USERS), K, 1.0)
    assert about["recall"] == about["complete_lists"] == 1 and whole.probes > some.probes
    assert "1.0000 is found" in approximate.describe_recall(about)


def test_recall_by_hand():
    exact = np.array([[1, 2, 3, 4], [5, 6, -1, -1], [-1, -1, -1, -1]], np.int32)
    found = np.array([[4, 2, 9, 8], [6, -1, -1, -1], [-1, -1, -1, -1]], np.int32)
    assert recalls(found, exact).tolist() == [0.5, 0.5, 1]


def test_items_that_the_exact_list_lacks_have_no_set(tmp_path, monkeypatch):
    """Their sets are those without which they would enter it: "you would see this", of an item that is in the file."""
    dataset = make_synthetic(0, 20, 20)
    ids = {"user_id": dataset.users["user_id"][:1].to_pylist() * 2, "item_id": dataset.items["item_id"][:2].to_pylist()}
    pyarrow.parquet.write_table(pa.table(ids), tmp_path / "ranked.parquet")
    monkeypatch.setattr(written_reasons, "record", lambda *_: [{"set": {"rank": rank}} for rank in (3, 4)])
    inputs = SimpleNamespace(dataset=dataset)
    model = ExplainedModel._make(inputs if name == "inputs" else None for name in ExplainedModel._fields)
    file = written_reasons.write_reasons(model, tmp_path / "ranked.parquet", 2, Content(k=3))
    assert [json.loads(line)["set"] for line in file.read_text().splitlines()] == [{"rank": 3}, None]


def test_the_command(tmp_path):
    """With recall 1 the file is the exact ranking; the audit file and the terminal tell what was measured."""
    train = {"max_steps": 2, "eval_every": 2, "refit": "none"}
    config = fr.configure(model={"method": "lightgcn", "dim": 8, "num_layers": 1}, train=train)
    run = fr.train(config, tmp_path / "run", make_synthetic(0, 80, 200))
    command = [sys.executable, "-W", "error", "-m", "experiments.recommend", f"--workdir={tmp_path}/run"]
    command += [f"--out={tmp_path}/found.csv", "--recall=1", "--k=5"]
    refused = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert refused.returncode == 1 and "--recall without --index" in refused.stderr

    done = subprocess.run([*command, "--index=ivf"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    exact = run.recommend(k=5, progress=False)
    lines = [line.split(",") for line in (tmp_path / "found.csv").read_text().splitlines()[1:]]
    assert [line[2].strip('"') for line in lines] == exact["item_id"].to_pylist()
    index = json.loads((tmp_path / "found.csv.audit.json").read_text())["inputs"]["index"]
    assert index["kind"] == "ivf" and index["recall"] == index["complete_lists"] == 1
    assert f"{index['lists_read']} of {index['lists']} lists" in done.stdout
    assert "pairs among the products that were compared" in done.stdout
