"""The command ``apot-fat train``, run as a script."""

from apot_fat.command_line import run_main
from apot_fat.commands.train import main

if __name__ == "__main__":
    run_main(main)
