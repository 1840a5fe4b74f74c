"""The command `tune`, from the checkout: fused_rec/commands/tune.py."""

from fused_rec.commands.launch import start
from fused_rec.commands.tune import main

if __name__ == "__main__":
    start(main)
