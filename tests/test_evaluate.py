"""One evaluation of a run and of baselines beside it, whoever asks for it."""

from pathlib import Path

import numpy as np
import preloaded
import pytest
from market import write_tables

import fused_rec as fr
from fused_rec import api
from fused_rec.data.dataset import column
from fused_rec.evaluation.ranking import mean, rank
from fused_rec.serving.recommender import load_measured
from fused_rec.training.evaluate import (
    baseline,
    choose_settings,
    evaluate_slices,
    evaluate_users,
    evaluate_validation,
    held_out,
)
from fused_rec.training.inputs import prepare, read, with_pretrained_text

TINY = str(Path(__file__).parent / "golden" / "tiny_bert")
BASELINES = ("text_mean", "text_ease", "item_knn")


@pytest.fixture(scope="module")
def finetuned(tmp_path_factory) -> fr.Run:
    """A run whose language model has moved far from the pretrained one, refitted on validation."""
    folder = tmp_path_factory.mktemp("finetuned")
    data = {"name": "tables", "path": str(write_tables(folder / "tables", n_users=40, n_items=20))}
    text = {"model": TINY, "cache": str(folder / "cache"), "finetune": "lora", "finetune_texts_per_step": 8}
    config = fr.configure(
        data=data,
        text=text | {"finetune_learning_rate": 0.1, "tfidf_dim": 0, "max_tokens": 12},
        model={"dim": 4, "num_layers": 1},
        train={"batch_size": 16, "max_steps": 6, "eval_every": 3, "refit": "valid"},
    )
    return fr.train(config, folder / "run")


@pytest.mark.parametrize("split", ["valid", "test"])
def test_command_api_and_report_agree_on_a_finetuned_run(finetuned, split, monkeypatch, tmp_path):
    """Baselines get the text embeddings of the pretrained encoder, as they would without the fine-tuned model."""
    run = fr.load(finetuned.workdir)
    config, prepared, _ = load_measured(finetuned.workdir, split)
    alone = prepare(config, prepared.dataset, prepared.split)
    pretrained = with_pretrained_text(prepared)
    expected = {}
    for name in BASELINES:
        fitted = baseline(name, pretrained, choose_settings(name, alone))
        expected[name] = mean(evaluate_users(prepared, fitted, split))

    by_api = run.evaluate(split, BASELINES)
    assert {name: by_api[name] for name in BASELINES} == expected
    assert by_api["fused"]["ndcg@10"] == pytest.approx(run.results[split]["ndcg@10"], abs=1e-6)

    pages = []
    monkeypatch.setattr(api, "render_page", lambda facts: pages.append(facts) or "")
    fr.report(finetuned.workdir, tmp_path / "page.html", split=split, baselines=BASELINES, num_users=0)
    shown = ("ndcg@10", "recall@10", "auc")
    for model in pages[0].models:
        for metric in shown:
            assert model.metrics[metric][0] == pytest.approx(by_api[model.name][metric], abs=1e-6), (model, metric)

    flags = f"--workdir={finetuned.workdir}", f"--split={split}", f"--baselines={','.join(BASELINES)}"
    done = preloaded.run("experiments.evaluate", *flags, f"--metrics={','.join(shown)}", JAX_NUM_CPU_DEVICES="1")
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()[-1 - len(BASELINES) :]]
    assert rows == [[name, *(f"{by_api[name][metric]:.4f}" for metric in shown)] for name in (*BASELINES, "fused")]


@pytest.fixture(scope="module")
def popular(tmp_path_factory):
    """Inputs of the training split of the small market, and the scorer by popularity."""
    data = {"name": "tables", "path": str(write_tables(tmp_path_factory.mktemp("popular")))}
    config = fr.configure(data=data, model={"variant": "graph"})
    prepared = prepare(config, *read(config))
    return prepared, baseline("popularity", prepared, {"half_life": 0.0})


def test_novelty_counts_the_interactions_of_training(popular):
    """Also where the last split is evaluated, before which there are others."""
    prepared, scorer = popular
    found = evaluate_users(prepared, scorer, "test")
    items = rank(scorer, found.users, held_out(prepared, "test")[0], k=10).items
    trained = column(prepared.dataset.interactions, "item")[prepared.split.train]
    counts = np.maximum(np.bincount(trained, minlength=prepared.dataset.n_items), 1)
    expected = np.log2(prepared.dataset.n_users / counts)[items].mean(1)
    np.testing.assert_allclose(found.metrics["novelty@10"], expected, rtol=1e-5)


def test_a_small_validation_split_says_what_it_cannot_tell(popular, caplog):
    prepared, scorer = popular
    values = evaluate_users(prepared, scorer, "valid").metrics["recall@10"]
    found = evaluate_validation(prepared, scorer, "recall@10")
    assert found["recall@10"] == pytest.approx(values.mean())
    (record,) = caplog.records
    error = np.std(values, ddof=1) / len(values) ** 0.5
    assert error > 0.05 * values.mean()
    assert record.levelname == "WARNING"
    assert f"a standard error of {error:.4f} over {len(values)} users" in record.getMessage()
    assert "more validation users" in record.getMessage()


def test_slices_of_items_are_those_of_the_test_split(popular):
    prepared, scorer = popular
    slices = evaluate_slices(prepared, scorer, evaluate_users(prepared, scorer, "test"))["item_interactions"]
    interactions, split = prepared.dataset.interactions, prepared.split
    test, valid = (np.unique(column(interactions, "item")[rows]) for rows in (split.test, split.valid))
    assert sum(found["items"] for name, found in slices.items() if name != "1+") == len(test) != len(valid)


@pytest.mark.parametrize("split", ["valid", "test"])
def test_items_of_dropped_rows_are_neither_ranked_nor_true(split, tmp_path):
    """The user has them: ranking one first is no error, and finding one no success."""
    data = {"name": "tables", "path": str(write_tables(tmp_path))}
    found = {}
    for history in (0, 1):
        config = fr.configure(data=data, split={"history": history}, model={"variant": "graph"})
        prepared = prepare(config, *read(config))
        found[history] = held_out(prepared, split)
        assert len(prepared.observed.user) == len(prepared.split.train)
    assert len(prepared.split.dropped) > len(prepared.split.train) == len(np.unique(prepared.observed.user))
    assert (prepared.graph_inputs.popularity.sum()) == len(prepared.split.train)
    (spec, truth), (limited_spec, limited_truth) = found[0], found[1]
    for whole, limited in ((spec.seen, limited_spec.seen), (truth, limited_truth)):
        assert np.array_equal(whole.items, limited.items) and np.array_equal(whole.indptr, limited.indptr)
    dropped = column(prepared.dataset.interactions, "item")[prepared.split.dropped]
    assert set(dropped.tolist()) <= set(limited_spec.seen.items.tolist())
