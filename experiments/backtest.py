"""The command `backtest`, from the checkout: fused_rec/commands/backtest.py."""

from fused_rec.commands.backtest import main
from fused_rec.commands.launch import start

if __name__ == "__main__":
    start(main)
