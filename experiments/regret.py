"""The command `regret`, from the checkout: fused_rec/commands/regret.py."""

from fused_rec.commands.launch import start
from fused_rec.commands.regret import main

if __name__ == "__main__":
    start(main)
