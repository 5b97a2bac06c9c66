"""Quantization: levels → fake quantization → frequency transform → layers. Needs torch alone."""

from apot_fat.quant.convert import (
    Allocation,
    Conversion,
    ConvertedLayer,
    Reconstruction,
    allocate_bits,
    dequantize,
    quantize,
    reconstruct,
)
from apot_fat.quant.fake_quant import ALPHA_FLOOR, eight_bit_weight, project, quantize_activation, quantize_weight
from apot_fat.quant.frequency import frequency_transform, weight_deactivate_freq
from apot_fat.quant.kernels import get_kernels, set_kernels
from apot_fat.quant.layers import (
    EightBitConv2d,
    EightBitLinear,
    LayerClipping,
    QuantConv2d,
    QuantLinear,
    clipping_table,
    keep_thresholds_positive,
    normalize_weight,
    quant_layers,
    set_bits,
    show_params,
)
from apot_fat.quant.levels import (
    LevelSet,
    apot_levels,
    build_power_value,
    level_set,
    pot_levels,
    uniform_levels,
)
from apot_fat.quant.spec import FLOAT_BITS, PRESETS, QuantSpec, preset
from apot_fat.quant.thresholds import fit_threshold, initialize_thresholds

__all__ = [
    "ALPHA_FLOOR",
    "FLOAT_BITS",
    "PRESETS",
    "Allocation",
    "Conversion",
    "ConvertedLayer",
    "EightBitConv2d",
    "EightBitLinear",
    "LayerClipping",
    "LevelSet",
    "QuantConv2d",
    "QuantLinear",
    "QuantSpec",
    "Reconstruction",
    "allocate_bits",
    "apot_levels",
    "build_power_value",
    "clipping_table",
    "dequantize",
    "eight_bit_weight",
    "fit_threshold",
    "frequency_transform",
    "get_kernels",
    "initialize_thresholds",
    "keep_thresholds_positive",
    "level_set",
    "normalize_weight",
    "pot_levels",
    "preset",
    "project",
    "quant_layers",
    "quantize",
    "quantize_activation",
    "quantize_weight",
    "reconstruct",
    "set_bits",
    "set_kernels",
    "show_params",
    "uniform_levels",
    "weight_deactivate_freq",
]
