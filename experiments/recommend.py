"""The command `recommend`, from the checkout: fused_rec/commands/recommend.py."""

from fused_rec.commands.launch import start
from fused_rec.commands.recommend import main

if __name__ == "__main__":
    start(main)
