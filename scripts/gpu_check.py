"""The command ``apot-fat gpu-check``, run as a script."""

from apot_fat.command_line import run_main
from apot_fat.commands.gpu_check import main

if __name__ == "__main__":
    run_main(main)
