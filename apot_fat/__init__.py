"""apot-fat: train, evaluate and ship networks with 2- to 5-bit weights and activations (APoT and FAT)."""

from apot_fat.checkpoint import load_packed, load_weights, save_packed
from apot_fat.quant import (
    LevelSet,
    QuantConv2d,
    QuantLinear,
    QuantSpec,
    apot_levels,
    build_power_value,
    clipping_table,
    dequantize,
    pot_levels,
    preset,
    quantize,
    set_bits,
    show_params,
    uniform_levels,
    weight_deactivate_freq,
)

__version__ = "0.1.0"

__all__ = [
    "LevelSet",
    "QuantConv2d",
    "QuantLinear",
    "QuantSpec",
    "apot_levels",
    "build_power_value",
    "clipping_table",
    "dequantize",
    "load_packed",
    "load_weights",
    "pot_levels",
    "preset",
    "quantize",
    "save_packed",
    "set_bits",
    "show_params",
    "uniform_levels",
    "weight_deactivate_freq",
]
