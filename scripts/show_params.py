"""The command ``apot-fat show-params``, run as a script."""

from apot_fat.command_line import run_main
from apot_fat.commands.show_params import main

if __name__ == "__main__":
    run_main(main)
