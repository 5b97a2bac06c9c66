"""Checks and times of a GPU, the sections of ``apot-fat gpu-check``."""

from apot_fat.gpu_check.check import FAILED, MISSED, OK, Check, Row, Section, run_section, table
from apot_fat.gpu_check.layers import check_layers
from apot_fat.gpu_check.runs import check_chain, check_runs, check_speed_run, check_torchrun
from apot_fat.gpu_check.speed import check_files, check_speed
from apot_fat.gpu_check.waits import check_waits

SECTIONS: dict[str, Section] = {
    "a": check_layers,
    "b": check_runs,
    "c": check_waits,
    "d": check_chain,
    "e": check_torchrun,
    "f": check_files,
    "g": check_speed,
    "h": check_speed_run,
}

__all__ = ["FAILED", "MISSED", "OK", "SECTIONS", "Check", "Row", "run_section", "table"]
