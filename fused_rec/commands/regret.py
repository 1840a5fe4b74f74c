"""Tabulates fused against the best single method of finished comparisons, a row per task. Nothing is trained.

    python -m experiments.regret --compared=runs/compare_lastfm,runs/compare_amazon --out=runs/regret

Single methods are baselines, published models and the variants text and graph. The best by test mean is one that nobody
can choose in advance; the one that validation chooses stands beside it.
"""

from pathlib import Path

from absl import app, flags

from fused_rec.commands.launch import absolute
from fused_rec.commands.places import DEFINE_path, existing_folder, written_folder
from fused_rec.config import SLICE_METRICS

COMPARED = flags.DEFINE_list("compared", None, "Folders of finished comparisons, one per task.", required=True)
METRIC = flags.DEFINE_enum("metric", SLICE_METRICS[0], SLICE_METRICS, "Metric of the choices and of the comparison.")
OUT = DEFINE_path("out", written_folder, "Folder of the tables and the figure.", required=True)


def main(argv: list[str]) -> None:
    """Writes the table, and prints it and the paths."""
    from fused_rec.studies.regret import markdown, regret, write_regret

    folders = [Path(name).expanduser() for name in COMPARED.value]
    if not folders or len({absolute(str(folder)) for folder in folders}) < len(folders):
        raise app.UsageError(f"--compared has {COMPARED.value}; it must be one or more folders, each once")
    for folder in folders:
        if problem := existing_folder(folder):
            raise app.UsageError(f"--compared has {str(folder)!r}: {problem}")
    report = regret(folders, METRIC.value)
    OUT.value.mkdir(parents=True, exist_ok=True)
    write_regret(report, OUT.value)
    print(f"test {report['metric']}; intervals 95 %\n\n{markdown(report)}")
    for file in sorted(OUT.value.glob("regret.*")):
        print(f"written: {file}")
