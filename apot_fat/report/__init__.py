"""Reports: tables and figures of runs."""

from apot_fat.report.figures import draw_runs
from apot_fat.report.table import find_runs, runs_table
from apot_fat.text import aligned

__all__ = ["aligned", "draw_runs", "find_runs", "runs_table"]
