"""The command `report`, from the checkout: fused_rec/commands/report.py."""

from fused_rec.commands.launch import start
from fused_rec.commands.report import main

if __name__ == "__main__":
    start(main)
