"""The command `doctor`, from the checkout: fused_rec/commands/doctor.py."""

from fused_rec.commands.doctor import main
from fused_rec.commands.launch import start

if __name__ == "__main__":
    start(main)
