"""The command `export`, from the checkout: fused_rec/commands/export.py."""

from fused_rec.commands.export import main
from fused_rec.commands.launch import start

if __name__ == "__main__":
    start(main)
