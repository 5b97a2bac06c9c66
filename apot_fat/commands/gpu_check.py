"""Check and time a GPU, in minutes: apot-fat gpu-check [--only a,c] [--match TEXT] [--json FILE] [--quick].

Sections: (a) layers beside their fixtures, (b) runs stopped and resumed, to the bit, (c) what the host waits for in a
step, (d) a chain of bit-widths, compiled, (e) torchrun on all GPUs, (f) image files, (g) quantizers, steps and epochs
beside their goals, (h) where the time of the speed run goes. Every two minutes it says where it stands, on stderr.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from apot_fat.checkpoint import atomic_write, output_file
from apot_fat.command_line import OneLineParser
from apot_fat.gpu_check import FAILED, SECTIONS, Check, Row, run_section, table
from apot_fat.training.device import choose_device
from apot_fat.training.environment import environment

_STILL_THERE = 120.0  # seconds between two looks at what it does: a GPU that hangs raises nothing


def main(argv: list[str] | None = None) -> None:
    """Run the sections, say each row as it is found, print the table; exit with 1 if a row failed."""
    parser = OneLineParser(description=__doc__)
    parser.add_argument("--only", metavar="A,B,…", help=f"sections to run, of {', '.join(SECTIONS)} (default: all)")
    parser.add_argument("--match", metavar="TEXT", default="", help="of these the rows in whose name this is")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N")
    parser.add_argument("--json", metavar="FILE", help="write the rows there too, as they are found")
    parser.add_argument("--quick", action="store_true", help="everything tiny: checks the checks, judges no goal")
    options = parser.parse_args(argv)
    wanted = list(SECTIONS) if options.only is None else options.only.split(",")
    for name in wanted:
        if name not in SECTIONS:
            raise ValueError(f"--only {name!r}: choose of {', '.join(SECTIONS)}")
    if options.json:
        output_file(options.json, ".json")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at the first product, deterministic or not
    device = choose_device(options.device)
    where = environment(device)
    faulthandler.dump_traceback_later(_STILL_THERE, repeat=True, file=2)
    logging.getLogger("apot_fat").setLevel(logging.WARNING)  # the runs' own lines
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        check = Check(device, options.quick, Path(folder))
        for name in wanted:
            for row in run_section(name, SECTIONS[name], check, options.match):
                rows.append(row)
                said = f"{name} {row.what}: {row.value} {row.verdict}\n{row.traceback}"
                print(said, end="", file=sys.stderr, flush=True)
                if options.json:
                    content = json.dumps({"environment": where, "rows": [asdict(row) for row in rows]}, indent=1)
                    with atomic_write(options.json) as temporary:
                        temporary.write_text(content + "\n", encoding="utf-8")
    faulthandler.cancel_dump_traceback_later()
    print(", ".join(f"{name} {value}" for name, value in where.items()))
    print(table(rows))
    if any(row.verdict == FAILED for row in rows):
        sys.exit(1)
