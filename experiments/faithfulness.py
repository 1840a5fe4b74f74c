"""The command `faithfulness`, from the checkout: fused_rec/commands/faithfulness.py."""

from fused_rec.commands.faithfulness import main
from fused_rec.commands.launch import start

if __name__ == "__main__":
    start(main)
