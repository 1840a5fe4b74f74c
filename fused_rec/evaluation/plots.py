"""Figures of a comparison. Matplotlib is an extra (`pip install -e ".[plots]"`); saving is left to the caller."""

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's palette (2008), told apart with any kind of colour vision; yellow is left out as too pale on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = "osD^vPX*"
GREY = "#8C8C8C"
INK: dict[Any, Any] = {"axes.spines.top": False, "axes.spines.right": False, "font.size": 9.0, "text.usetex": False}
# Names of datasets and variants are shown as they are: a $ in one begins no formula.
PLAIN: dict[str, Any] = {"parse_math": False}


def by_variant(summary: Sequence[Mapping[str, Any]], metric: str, title: str, controls: Collection[str]) -> "Figure":
    """Plots mean and 95 % interval of each variant, best on top; controls in grey, failed variants omitted.

    summary: of `fused_rec.evaluation.significance.summarize`.
    """
    import matplotlib
    from matplotlib.figure import Figure

    shown = [entry for entry in summary if metric in entry["metrics"]]
    shown.sort(key=lambda entry: entry["metrics"][metric]["mean"])
    with matplotlib.rc_context(INK):
        figure = Figure(figsize=(6.4, 1.3 + 0.3 * len(shown)), dpi=150, layout="constrained")
        axes = figure.subplots()
        for place, entry in enumerate(shown):
            found = entry["metrics"][metric]
            colour = GREY if entry["variant"] in controls else COLOURS[0]
            axes.plot([found["low"], found["high"]], [place, place], color=colour, linewidth=1.5, solid_capstyle="butt")
            axes.plot(found["mean"], place, "o", color=colour, markersize=5)
        axes.set_yticks(range(len(shown)), [entry["variant"] for entry in shown], **PLAIN)
        axes.set_xlabel(f"{metric}, mean and 95 % interval over users and seeds")
        axes.set_title(title + (" (grey: controls)" if controls else ""), loc="left", fontsize=9, **PLAIN)
        axes.grid(axis="x", color="#E5E5E5", linewidth=0.6)
        axes.set_axisbelow(True)
    return figure


def by_slice(rows: Sequence[Mapping[str, Any]], metric: str, title: str, names: Sequence[str]) -> "Figure":
    """Plots a panel per kind of slice: mean over seeds of each variant, bars from the worst to the best seed.

    rows: as in a report, each with its "slices"; names: the variants shown, in the legend's order.
    """
    import matplotlib
    from matplotlib.figure import Figure

    kinds = list(dict.fromkeys(kind for row in rows for kind in row["slices"]))
    with matplotlib.rc_context(INK):
        figure = Figure(figsize=(9.0, 0.5 + 2.4 * len(kinds)), dpi=150, layout="constrained")
        panels = figure.subplots(len(kinds), 1, squeeze=False)[:, 0]
        for axes, kind in zip(panels, kinds, strict=True):
            slices: dict[str, Any] = {}
            for row in rows:
                slices |= row["slices"][kind]
            offsets = (np.arange(len(names)) - (len(names) - 1) / 2) * 0.8 / len(names)
            for order, (name, offset) in enumerate(zip(names, offsets, strict=True)):
                own = [row["slices"][kind] for row in rows if row["variant"] == name]
                values = [[of_row[label][metric] for of_row in own if label in of_row] for label in slices]
                known = [(place, found) for place, found in enumerate(values) if found and None not in found]
                means = np.array([np.mean(found) for _, found in known])
                ends = np.array([(min(found), max(found)) for _, found in known]).reshape(-1, 2)
                axes.errorbar(
                    [place + offset for place, _ in known],
                    means,
                    yerr=np.abs(ends - means[:, None]).T,
                    fmt=MARKERS[order % len(MARKERS)],
                    color=COLOURS[order % len(COLOURS)],
                    markersize=4.5,
                    linewidth=1.2,
                    label=name,
                )
            axes.set_xticks(
                range(len(slices)), [f"{label}\n{found['users']:,} users" for label, found in slices.items()], **PLAIN
            )
            axes.set_title(kind.replace("_", " "), loc="left", fontsize=9, **PLAIN)
            axes.set_xlim(-0.5, len(slices) - 0.5)
            axes.set_ylabel(metric)
            for place in range(1, len(slices)):
                axes.axvline(place - 0.5, color=GREY, linewidth=0.6)
            axes.grid(axis="y", color="#E5E5E5", linewidth=0.6)
            axes.set_axisbelow(True)
        lines = panels[0].get_legend_handles_labels()
        for text in figure.legend(*lines, loc="outside right upper", frameon=False, fontsize=8).get_texts():
            text.set(**PLAIN)
        title = f"{title}: mean of seeds, bars from the worst to the best"
        figure.suptitle(title, x=0.01, ha="left", fontsize=9, **PLAIN)
    return figure


def by_setting(trials: Sequence[Mapping[str, Any]], metric: str) -> "Figure":
    """Plots a panel per tuned setting: the value of each trial, the best one marked, pruned ones hollow.

    trials: of `fused_rec.studies.tune.history`; those without a value (diverged) are left out.
    """
    import matplotlib
    from matplotlib.figure import Figure

    shown = [trial for trial in trials if trial["value"] is not None]
    settings = [name for name in shown[0] if "." in name]
    best = max(shown, key=lambda trial: (trial["state"] == "complete", trial["value"]))
    with matplotlib.rc_context(INK):
        figure = Figure(figsize=(9.0, 2.4 * -(-len(settings) // 3)), dpi=150, layout="constrained")
        panels = figure.subplots(-(-len(settings) // 3), min(3, len(settings)), squeeze=False, sharey=True)
        for axes in panels.flat[len(settings) :]:
            axes.set_axis_off()
        for axes, name in zip(panels.flat, settings, strict=False):
            for trial in shown:
                face = COLOURS[0] if trial["state"] == "complete" else "none"
                axes.plot(trial[name], trial["value"], "o", color=COLOURS[0], markerfacecolor=face, markersize=4)
            axes.plot(best[name], best["value"], "*", color=COLOURS[1], markersize=11)
            values = [trial[name] for trial in shown]
            if min(values) > 0 and max(values) > 20 * min(values):
                axes.set_xscale("log")
            axes.set_xlabel(name)
            axes.grid(color="#E5E5E5", linewidth=0.6)
            axes.set_axisbelow(True)
        for axes in panels[:, 0]:
            axes.set_ylabel(metric)
        figure.suptitle(f"{len(shown)} trials on validation (star: best; hollow: stopped early)", x=0.01, ha="left")
    return figure


def by_share(report: Mapping[str, Any]) -> "Figure":
    """Plots deletion and insertion: the mean curve of each order of sources, with its area in the legend.

    report: `fused_rec.explanation.faithfulness.summary` with the "shares", "users" and "data" that it is of.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(INK):
        figure = Figure(figsize=(8.0, 3.2), dpi=150, layout="constrained")
        for axes, (kind, what) in zip(
            figure.subplots(1, 2, sharey=True),
            (("deletion", "sources taken away, first of the order first"), ("insertion", "sources that are back")),
            strict=True,
        ):
            for order, (name, row) in enumerate(report[kind].items()):
                mark = MARKERS[order % len(MARKERS)]
                label = f"{name} {row['area']:.3f}"
                colour = COLOURS[order % len(COLOURS)]
                axes.plot(report["shares"], row["curve"], marker=mark, markersize=4, color=colour, label=label)
            axes.set_title(kind, loc="left", fontsize=9)
            axes.set_xlabel(f"share of {what}")
            axes.grid(color="#E5E5E5", linewidth=0.6)
            axes.set_axisbelow(True)
            axes.legend(frameon=False, fontsize=8, title="area under the curve", title_fontsize=8)
        figure.axes[0].set_ylabel("score: 1 with all sources, 0 with none")
        title = f"{report['data']}: mean of {report['users']:,} users"
        figure.suptitle(title, x=0.01, ha="left", fontsize=9, **PLAIN)
    return figure


def by_density(panels: Sequence[Mapping[str, Any]], metric: str, title: str) -> "Figure":
    """Plots a column of two panels per share of new items: means by history length, and what fused gains.

    panels: of `fused_rec.studies.density`, each with "new_items", "histories" (labels), and by history length "means"
      ("mean", "low", "high", or None) of each variant and "gains" (fields of a `Difference`, or None) of fused.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(INK):
        figure = Figure(figsize=(2.0 + 3.6 * len(panels), 5.6), dpi=150, layout="constrained")
        upper, lower = figure.subplots(2, len(panels), squeeze=False, sharex="col", sharey="row", height_ratios=(3, 2))
        for axes, gains, panel in zip(upper, lower, panels, strict=True):
            _intervals(axes, panel["means"], ("mean", "low", "high"), 1.0)
            _intervals(gains, panel["gains"], ("relative", "relative_low", "relative_high"), 100.0)
            axes.set_title(f"{panel['new_items']:.0%} of the items are new", loc="left", fontsize=9)
            gains.axhline(0, color=COLOURS[-1], linewidth=0.8)
            gains.set_xticks(range(len(panel["histories"])), panel["histories"])
            gains.set_xlabel("training interactions per user, at most")
        upper[0].set_ylabel(f"{metric}, 95 % interval")
        lower[0].set_ylabel("gain of fused, %")
        upper[0].legend(frameon=False, fontsize=8)
        lower[0].legend(frameon=False, fontsize=8, title="over", title_fontsize=8)
        figure.suptitle(title, x=0.01, ha="left", fontsize=9, **PLAIN)
    return figure


def by_period(periods: Sequence[Mapping[str, Any]], metric: str, title: str) -> "Figure":
    """Plots the quality of each strategy by period with 95 % intervals, and the seconds of its trainings beside it.

    periods: of a report of `fused_rec.studies.backtest`.
    """
    import matplotlib
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for period in periods for name in period["metrics"]))
    means = {name: [period["metrics"].get(name, {}).get(metric) for period in periods] for name in names}
    with matplotlib.rc_context(INK):
        figure = Figure(figsize=(9.0, 3.4), dpi=150, layout="constrained")
        quality, cost = figure.subplots(1, 2, width_ratios=(3, 2))
        _intervals(quality, means, ("mean", "low", "high"), 1.0)
        for order, name in enumerate(names):
            seconds = [[one["seconds"] for one in period["trainings"] if one["strategy"] == name] for period in periods]
            known = [(place, float(np.mean(found))) for place, found in enumerate(seconds) if found]
            if known:
                places, values = zip(*known, strict=True)
                cost.plot(places, values, marker=MARKERS[order], color=COLOURS[order], markersize=4.5, label=name)
        for axes, what in ((quality, f"{metric} of the next period, 95 % interval"), (cost, "seconds of training")):
            axes.set_xticks(range(len(periods)), [f"{period['known_interactions']:,}" for period in periods])
            axes.tick_params("x", rotation=45 if len(periods) > 5 else 0)
            axes.set_xlabel("interactions until then")
            axes.set_ylabel(what)
            axes.set_ylim(bottom=0)
            axes.grid(axis="y", color="#E5E5E5", linewidth=0.6)
            axes.set_axisbelow(True)
        quality.legend(frameon=False, fontsize=8)
        figure.suptitle(title, x=0.01, ha="left", fontsize=9, **PLAIN)
    return figure


def _intervals(
    axes: Any, series: Mapping[str, Sequence[Mapping[str, float] | None]], fields: tuple[str, str, str], scale: float
) -> None:
    """Plots values with their intervals by place, a line per series, beside each other; what is None is left out."""
    for order, (name, values) in enumerate(series.items()):
        known = [(place, *(found[field] for field in fields)) for place, found in enumerate(values) if found]
        place, mean, low, high = np.array(known, float).reshape(-1, 4).T
        offset = (order - (len(series) - 1) / 2) * 0.4 / len(series)
        axes.errorbar(
            place + offset,
            scale * mean,
            yerr=scale * np.stack([mean - low, high - mean]).clip(0),
            marker=MARKERS[order % len(MARKERS)],
            color=COLOURS[order % len(COLOURS)],
            markersize=4.5,
            linewidth=1.2,
            label=name,
        )
    axes.grid(axis="y", color="#E5E5E5", linewidth=0.6)
    axes.set_axisbelow(True)


def by_task(rows: Sequence[Mapping[str, Any]], metric: str) -> "Figure":
    """Plots what fused gains over the best single method of each task, with 95 % intervals, the first task on top.

    rows: of `fused_rec.studies.regret.regret`.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(INK):
        figure = Figure(figsize=(7.2, 1.5 + 0.5 * len(rows)), dpi=150, layout="constrained")
        axes = figure.subplots()
        for order, (on, what) in enumerate((("test", "best by test mean"), ("valid", "chosen by validation"))):
            for row, place in zip(rows, range(len(rows) - 1, -1, -1), strict=True):
                found, height = row[on], place + 0.12 - 0.24 * order
                ends = [100 * found["relative_low"], 100 * found["relative_high"]]
                axes.plot(ends, [height, height], color=COLOURS[order], linewidth=1.5, solid_capstyle="butt")
                label = what if row is rows[0] else None
                mean = 100 * found["relative"]
                axes.plot(mean, height, MARKERS[order], color=COLOURS[order], markersize=5, label=label)
        axes.axvline(0, color=COLOURS[-1], linewidth=0.8)
        names = [" / ".join(dict.fromkeys(row[on]["variant"] for on in ("test", "valid"))) for row in rows]
        labels = [f"{row['task']}\n{name}" for row, name in zip(rows, names, strict=True)]
        axes.set_yticks(range(len(rows) - 1, -1, -1), labels, **PLAIN)
        axes.set_xlabel(f"fused vs. the single method, test {metric}, %")
        figure.legend(loc="outside upper right", ncols=2, frameon=False, fontsize=8)
        axes.grid(axis="x", color="#E5E5E5", linewidth=0.6)
        axes.set_axisbelow(True)
    return figure


def by_time(curves: Mapping[str, Sequence[Mapping[str, float]]], metric: str, title: str) -> "Figure":
    """Plots a metric against the seconds since the start of the process, a line per side.

    curves: by side, points with "seconds" and the metric.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(INK):
        figure = Figure(figsize=(6.4, 4.0), dpi=150, layout="constrained")
        axes = figure.subplots()
        for (name, points), colour, marker in zip(curves.items(), COLOURS, MARKERS, strict=False):
            seconds, values = ([point[key] for point in points] for key in ("seconds", metric))
            axes.plot(seconds, values, color=colour, marker=marker, markersize=4, linewidth=1.4, label=name)
        axes.set_xlabel("seconds since the start of the process")
        axes.set_ylabel(metric)
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False, fontsize=8, loc="lower right")
        figure.suptitle(title, x=0.01, ha="left", fontsize=9, **PLAIN)
    return figure


def by_ratio(rows: Sequence[Mapping[str, Any]], title: str) -> "Figure":
    """How many times ours is ahead of each peer, a bar a row, in the rows' order; behind in another colour.

    rows: of a benchmark, each with "name", "peer_name" and "ratio"; those without a ratio are left out.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullFormatter

    shown = [row for row in rows if row["ratio"]]
    with matplotlib.rc_context(INK):
        figure = Figure(figsize=(8.0, 1.3 + 0.26 * len(shown)), dpi=150, layout="constrained")
        axes = figure.subplots()
        for place, row in enumerate(reversed(shown)):
            ahead = row["ratio"] >= 1
            # From 1 outwards, on a scale where twice as fast is as long as half as fast.
            left, width = min(1, row["ratio"]), abs(row["ratio"] - 1)
            axes.barh(place, width, left=left, height=0.7, color=COLOURS[0] if ahead else COLOURS[1])
        labels = [f"{row['name']} | {row['peer_name']}  {row['ratio']:.3g} x" for row in reversed(shown)]
        axes.set_yticks(range(len(shown)), labels, **PLAIN)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.axvline(1, color=COLOURS[-1], linewidth=0.8)
        axes.set_xlabel("times ahead of the peer (medians)")
        figure.suptitle(title, x=0.01, ha="left", fontsize=9, **PLAIN)
        axes.grid(axis="x", color="#E5E5E5", linewidth=0.6)
        axes.set_axisbelow(True)
    return figure
