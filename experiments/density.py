"""The command `density`, from the checkout: fused_rec/commands/density.py."""

from fused_rec.commands.density import main
from fused_rec.commands.launch import start

if __name__ == "__main__":
    start(main)
