"""The command `diff`, from the checkout: fused_rec/commands/diff.py."""

from fused_rec.commands.diff import main
from fused_rec.commands.launch import start

if __name__ == "__main__":
    start(main)
