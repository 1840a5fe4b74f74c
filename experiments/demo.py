"""The command `demo`, from the checkout: fused_rec/commands/demo.py."""

from fused_rec.commands.demo import main
from fused_rec.commands.launch import start

if __name__ == "__main__":
    start(main)
