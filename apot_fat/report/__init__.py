"""Reports: what a network costs, tables and figures of runs, and one page of all that is known of a network."""

from apot_fat.report.contents import Report, build_report
from apot_fat.report.cost import CostReport, LayerCost, cost_report
from apot_fat.report.figures import draw_runs
from apot_fat.report.subject import Subject, load_subjects
from apot_fat.report.sweep import draw_sweep, seeds_table, sweep_table
from apot_fat.report.table import find_runs, runs_table

__all__ = [
    "CostReport",
    "LayerCost",
    "Report",
    "Subject",
    "build_report",
    "cost_report",
    "draw_runs",
    "draw_sweep",
    "find_runs",
    "load_subjects",
    "runs_table",
    "seeds_table",
    "sweep_table",
]
