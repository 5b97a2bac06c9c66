"""Reports: tables and figures of runs, and what a network costs."""

from apot_fat.report.cost import CostReport, LayerCost, cost_report
from apot_fat.report.figures import draw_runs
from apot_fat.report.sweep import draw_sweep, seeds_table, sweep_table
from apot_fat.report.table import find_runs, runs_table

__all__ = [
    "CostReport",
    "LayerCost",
    "cost_report",
    "draw_runs",
    "draw_sweep",
    "find_runs",
    "runs_table",
    "seeds_table",
    "sweep_table",
]
