"""What the figures show, read back from their artists."""

from typing import Any

import numpy as np
import pytest

from fused_rec.evaluation import plots

pytest.importorskip("matplotlib", reason="figures need the extra: pip install -e '.[plots]'")


def entry(name: str, mean: float) -> dict:
    return {"variant": name, "metrics": {"ndcg@10": {"mean": mean, "sd": None, "low": mean - 0.1, "high": mean + 0.2}}}


def test_variants_are_sorted_and_controls_grey():
    summary = [entry("fused", 0.5), entry("shuffled_text", 0.3), entry("graph", 0.4), {"variant": "bad", "metrics": {}}]
    figure = plots.by_variant(summary, "ndcg@10", "market", ["shuffled_text"])
    [axes] = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["shuffled_text", "graph", "fused"]
    intervals, dots = axes.lines[::2], axes.lines[1::2]
    assert [np.asarray(line.get_xdata()).item() for line in dots] == [0.3, 0.4, 0.5]
    assert np.asarray(intervals[2].get_xdata()) == pytest.approx([0.4, 0.7])
    assert [line.get_color() == plots.GREY for line in dots] == [True, False, False]


def test_slices_show_means_and_extremes(tmp_path):
    def row(name: str, seed: int, value: float) -> dict:
        found = {"users": 7, "ndcg@10": value}
        return {"variant": name, "seed": seed, "slices": {"user_social_degree": {"with": found, "without": found}}}

    rows = [row("fused", 0, 0.4), row("fused", 1, 0.6), row("graph", 0, 0.3), row("shuffled_text", 0, 0.1)]
    figure = plots.by_slice(rows, "ndcg@10", "market", ["fused", "graph"])
    [axes] = figure.axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["with\n7 users", "without\n7 users"]
    fused, graph = axes.containers
    assert fused[0].get_ydata() == pytest.approx([0.5, 0.5])
    assert (graph[0].get_xdata() > fused[0].get_xdata()).all()
    bottom, top = fused[2][0].get_segments()[0]
    assert (bottom[1], top[1]) == pytest.approx((0.4, 0.6))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["fused", "graph"]
    figure.savefig(tmp_path / "slices.png")
    assert (tmp_path / "slices.png").read_bytes().startswith(b"\x89PNG")


def test_many_variants_stay_apart():
    """No two of as many variants as there are share colour and marker."""
    marks = {(plots.COLOURS[n % len(plots.COLOURS)], plots.MARKERS[n % len(plots.MARKERS)]) for n in range(30)}
    assert len(marks) == 30


def test_density_shows_means_and_gains_by_history():
    means = {"text": [{"mean": 0.2, "low": 0.1, "high": 0.4}, None], "fused": [None, None]}
    gained = {"relative": 0.5, "relative_low": 0.25, "relative_high": 1.0}
    panel = {"new_items": 0.1, "histories": ["1", "all"], "means": means, "gains": {"the better": [None, gained]}}
    figure = plots.by_density([{**panel, "new_items": 0.0}, panel], "ndcg@10", "market")
    assert [axes.get_title(loc="left") for axes in figure.axes[:2]] == [f"{n}% of the items are new" for n in (0, 10)]
    for upper, lower in zip(figure.axes[:2], figure.axes[2:], strict=True):
        text, fused = upper.containers
        assert (text[0].get_ydata().tolist(), fused[0].get_ydata().tolist()) == ([0.2], [])
        [gain] = lower.containers
        assert gain[0].get_xdata() == pytest.approx([1])
        assert gain[2][0].get_segments()[0][:, 1] == pytest.approx([25, 100])
        assert [label.get_text() for label in lower.get_xticklabels()] == ["1", "all"]
        assert (text[0].get_xdata() < 0).all()  # beside the other variant


def test_periods_show_quality_and_seconds_by_strategy():
    def period(known: int, **means: float) -> dict:
        metrics = {name: {"ndcg@10": {"mean": mean, "low": mean - 0.1, "high": mean}} for name, mean in means.items()}
        trainings = [{"strategy": "retrain", "seconds": known / 10}, {"strategy": "retrain", "seconds": known / 5}]
        return {"known_interactions": known, "metrics": metrics, "trainings": trainings}

    figure = plots.by_period([period(1000, retrain=0.5), period(2000, retrain=0.4, stale=0.3)], "ndcg@10", "market")
    quality, cost = figure.axes
    retrain, stale = quality.containers
    assert (retrain[0].get_ydata().tolist(), stale[0].get_ydata().tolist()) == ([0.5, 0.4], [0.3])
    assert stale[2][0].get_segments()[0][:, 1] == pytest.approx([0.2, 0.3])
    [seconds] = cost.lines  # what is not trained has no line; the mean over seeds
    assert seconds.get_ydata() == pytest.approx([150, 300])
    assert [label.get_text() for label in quality.get_xticklabels()] == ["1,000", "2,000"]


def test_settings_of_trials_and_the_best_one():
    def trial(number: int, state: str, value: float | None, rate: float) -> dict:
        return {"trial": number, "state": state, "value": value, "train.learning_rate": rate, "model.dim": 64}

    trials = [trial(0, "complete", 0.2, 0.001), trial(1, "pruned", 0.9, 0.1), trial(2, "complete", 0.5, 0.01)]
    figure = plots.by_setting([*trials, trial(3, "pruned", None, 1.0)], "ndcg@10")
    rate, dim = figure.axes[:2]
    assert [axes.get_xlabel() for axes in (rate, dim)] == ["train.learning_rate", "model.dim"]
    assert (rate.get_xscale(), dim.get_xscale()) == ("log", "linear")
    *dots, star = rate.lines
    assert [tuple(np.concatenate(line.get_data())) for line in dots] == [(0.001, 0.2), (0.1, 0.9), (0.01, 0.5)]
    assert [line.get_markerfacecolor() == "none" for line in dots] == [False, True, False]
    assert tuple(np.concatenate(star.get_data())) == (0.01, 0.5)  # an early stop is not the best


def test_names_are_no_formulas(tmp_path):
    r"""$\frac{$ would end the drawing with an error, were it read as one."""
    name = r"$\frac{$ a_b"
    slices = {name: {name: {"users": 1, "ndcg@10": 0.5}}}
    figures = {
        "variants": plots.by_variant([entry(name, 0.5)], "ndcg@10", name, []),
        "slices": plots.by_slice([{"variant": name, "seed": 0, "slices": slices}], "ndcg@10", name, [name]),
    }
    for place, figure in figures.items():
        figure.savefig(tmp_path / f"{place}.png")
        assert (tmp_path / f"{place}.png").stat().st_size > 1000


def test_orders_of_sources_share_their_axes():
    row = {"area": 0.25, "curve": [1.0, 0.2, 0.0]}
    report = {"shares": [0, 0.5, 1], "users": 7, "data": "market"}
    report |= {
        kind: {"parts": row, "random": {"area": 0.5, "curve": [1, 0.5, 0]}} for kind in ("deletion", "insertion")
    }
    figure: Any = plots.by_share(report)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["deletion", "insertion"]
    parts, random = figure.axes[0].lines
    assert (list(parts.get_ydata()), list(random.get_ydata())) == ([1, 0.2, 0], [1, 0.5, 0])
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["parts 0.250", "random 0.500"]
