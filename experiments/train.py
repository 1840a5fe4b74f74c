"""The command `train`, from the checkout: fused_rec/commands/train.py."""

from fused_rec.commands.launch import start
from fused_rec.commands.train import main

if __name__ == "__main__":
    start(main)
