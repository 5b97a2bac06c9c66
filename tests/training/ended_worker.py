"""Trains as ``scripts/train.py`` does; then no thread of the process group is left to meet the interpreter's end."""

from __future__ import annotations

import sys
from pathlib import Path

from apot_fat.commands.train import main

if __name__ == "__main__":
    main(sys.argv[1:])
    threads = [name.read_text().strip() for name in Path("/proc/self/task").glob("*/comm")]
    assert not [name for name in threads if "gloo" in name], threads
