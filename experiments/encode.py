"""The command `encode`, from the checkout: fused_rec/commands/encode.py."""

from fused_rec.commands.encode import main
from fused_rec.commands.launch import start

if __name__ == "__main__":
    start(main)
