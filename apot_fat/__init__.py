"""apot-fat: train, evaluate and ship networks with 2- to 5-bit weights and activations (APoT and FAT)."""

from typing import TYPE_CHECKING, Any

from apot_fat.checkpoint import load_packed, load_weights, save_packed
from apot_fat.export import export_onnx
from apot_fat.integer import integer_program, integer_reference
from apot_fat.quant import (
    EIGHT_BIT,
    LevelSet,
    QuantConv2d,
    QuantLinear,
    QuantSpec,
    Reconstruction,
    allocate_bits,
    apot_levels,
    build_power_value,
    clipping_table,
    dequantize,
    pot_levels,
    preset,
    quantize,
    reconstruct,
    set_bits,
    show_params,
    uniform_levels,
    weight_deactivate_freq,
)

if TYPE_CHECKING:
    from apot_fat.report import cost_report

__version__ = "0.1.0"

__all__ = [
    "EIGHT_BIT",
    "LevelSet",
    "QuantConv2d",
    "QuantLinear",
    "QuantSpec",
    "Reconstruction",
    "allocate_bits",
    "apot_levels",
    "build_power_value",
    "clipping_table",
    "cost_report",
    "dequantize",
    "export_onnx",
    "integer_program",
    "integer_reference",
    "load_packed",
    "load_weights",
    "pot_levels",
    "preset",
    "quantize",
    "reconstruct",
    "save_packed",
    "set_bits",
    "show_params",
    "uniform_levels",
    "weight_deactivate_freq",
]


def __getattr__(name: str) -> Any:
    if name == "cost_report":  # its room loads TensorBoard and matplotlib
        from apot_fat.report import cost_report

        return cost_report
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
