"""The command `convert`, from the checkout: fused_rec/commands/convert.py."""

from fused_rec.commands.convert import main
from fused_rec.commands.launch import start

if __name__ == "__main__":
    start(main)
