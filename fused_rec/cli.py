"""Console script `fused-rec` with all commands of the installed package.

    fused-rec train --config=tables --config.data.path=DIR --workdir=runs/mine

The list of commands and the version need no library; only the module of the given command is imported.
"""

import importlib
import sys

import fused_rec
from fused_rec.commands.exits import exit_broken_pipe, exit_on_interrupt, open_missing_streams

PROGRAM = "fused-rec"
HELP, VERSION = ("--help", "-help", "-h", "-?", "help"), ("--version", "-version")  # absl takes one dash as two
COMMANDS = {
    "train": "Train one model on one dataset and evaluate it on the test split.",
    "evaluate": "Evaluate a finished run again, beside baselines or under rules.",
    "recommend": "Rank items for users with a finished run, as CSV or Parquet.",
    "report": "Write one HTML page about a finished run.",
    "diff": "Show what changed between two finished runs: data, settings, metrics, top lists, reasons.",
    "export": "Write a finished run as a folder of vectors, parameters, program and card.",
    "serve": "Serve a finished run over HTTP: recommend, explain, similar items, health, metrics.",
    "faithfulness": "Measure whether explanations name what the scores rest on.",
    "compare": "Compare variants and baselines over seeds: means, intervals, tests, figures.",
    "density": "Measure when fusion pays: by training interactions per user and share of new items.",
    "backtest": "Measure retraining, warm start and a stale model, period after period.",
    "regret": "Tabulate fused against the best single method of finished comparisons.",
    "tune": "Choose the settings of a config on the validation split.",
    "encode": "Encode the lines of a file as text vectors; delete cached ones.",
    "convert": "Write a dataset in another layout.",
    "doctor": "Check the installation: versions, devices, data, language model.",
    "demo": "Train, compare and show three models on the synthetic dataset.",
}


def main() -> None:
    """Runs the command named by the first argument, with the rest as its flags."""
    exit_on_interrupt()
    open_missing_streams()
    try:
        _answer(sys.argv[1:])
    except BrokenPipeError:
        exit_broken_pipe()
    name = sys.argv[1]
    sys.argv = [f"{PROGRAM} {name}", *sys.argv[2:]]  # before the import: flags are defined by what is given
    command = importlib.import_module(f"fused_rec.commands.{name}")
    launch = importlib.import_module("fused_rec.commands.launch")
    launch.start(command.main, PROGRAM)


def _answer(arguments: list[str]) -> None:
    """Returns if a command is given; else prints the help, the version or an error, and exits."""
    first = arguments[0] if arguments else ""
    if first in COMMANDS:
        return
    if first in HELP:
        print(_listing())
    elif first in VERSION:
        print(f"{PROGRAM} {fused_rec.__version__}")
    elif not first:
        print(_listing(), file=sys.stderr)
    elif first.startswith("-"):
        print(f"{first!r} comes before a command; the first argument is one of {', '.join(COMMANDS)}", file=sys.stderr)
    else:
        print(f"unknown command {first!r}; it must be one of {', '.join(COMMANDS)}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(0 if first in (*HELP, *VERSION) else 1)


def _listing() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {about}" for name, about in COMMANDS.items()]
    usage = [f"usage: {PROGRAM} COMMAND [--FLAG=VALUE ...]", "", "Commands:", *lines, ""]
    more = f"{PROGRAM} COMMAND --help shows the flags of a command, {PROGRAM} --version the version."
    return "\n".join([*usage, more])


if __name__ == "__main__":
    main()
