"""Reports: what a network costs, tables and figures of runs, and one page of all that is known of a network."""

from apot_fat.reporting.contents import Report, build_report
from apot_fat.reporting.cost import CostReport, LayerCost, cost_report
from apot_fat.reporting.figures import draw_runs
from apot_fat.reporting.subject import Subject, load_subjects
from apot_fat.reporting.sweep import draw_against_seconds, draw_sweep, seeds_table, sweep_table
from apot_fat.reporting.table import find_runs, runs_table
from apot_fat.reporting.write import report

__all__ = [
    "CostReport",
    "LayerCost",
    "Report",
    "Subject",
    "build_report",
    "cost_report",
    "draw_against_seconds",
    "draw_runs",
    "draw_sweep",
    "find_runs",
    "load_subjects",
    "report",
    "runs_table",
    "seeds_table",
    "sweep_table",
]
