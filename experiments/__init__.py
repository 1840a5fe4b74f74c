"""Experiments from the checkout: `python -m experiments.train` and the other commands, configs and the benchmark.

The commands are those of fused_rec/commands, which `fused-rec` runs where the package is installed.
"""

import sys

from fused_rec.commands.exits import exit_on_interrupt

if sys.argv[:1] == ["-m"]:  # as Python has it while it looks for the module to run
    exit_on_interrupt()
