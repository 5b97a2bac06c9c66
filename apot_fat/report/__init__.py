"""Reports: tables and figures of runs, and what a network costs."""

from apot_fat.report.cost import CostReport, LayerCost, cost_report
from apot_fat.report.figures import draw_runs
from apot_fat.report.table import find_runs, runs_table

__all__ = ["CostReport", "LayerCost", "cost_report", "draw_runs", "find_runs", "runs_table"]
