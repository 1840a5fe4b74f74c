"""The command `evaluate`, from the checkout: fused_rec/commands/evaluate.py."""

from fused_rec.commands.evaluate import main
from fused_rec.commands.launch import start

if __name__ == "__main__":
    start(main)
