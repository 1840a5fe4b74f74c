"""The command `compare`, from the checkout: fused_rec/commands/compare.py."""

from fused_rec.commands.compare import main
from fused_rec.commands.launch import start

if __name__ == "__main__":
    start(main)
