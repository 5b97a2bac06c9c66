"""Reports: tables and figures of runs."""

from apot_fat.report.figures import draw_runs
from apot_fat.report.table import aligned, find_runs, runs_table

__all__ = ["aligned", "draw_runs", "find_runs", "runs_table"]
