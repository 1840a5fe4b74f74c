"""The command `serve`, from the checkout: fused_rec/commands/serve.py."""

from fused_rec.commands.launch import start
from fused_rec.commands.serve import main

if __name__ == "__main__":
    start(main)
