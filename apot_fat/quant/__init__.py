"""Quantization. Needs torch alone.

The method, each importing from those before it: ``levels``, ``spec``, ``units``, ``projection`` (the nearest level),
``seam``, ``fake_quant`` (forward and gradient), ``fitting`` (a threshold for given values), ``quantizer`` (these three
as one object a layer's side), ``frequency`` (FAT's transform), ``normalization``, ``layers``, ``all_layers`` (of a
network), ``thresholds`` (their start), ``integers``; on them build ``convert``, ``measure`` and ``diagnosis``.

Its speed: ``fast``, which may import all of these. None of them imports ``fast`` or knows what is in it: they ask
``seam.speed``, where the plain answers are and ``fast`` puts its own. Without that folder all is right and slower.
"""

import os

from apot_fat.quant.all_layers import (
    LayerClipping,
    clipping_table,
    keep_thresholds_positive,
    set_bits,
    show_params,
    threshold_layers,
)
from apot_fat.quant.convert import (
    Allocation,
    Conversion,
    ConvertedLayer,
    Reconstruction,
    allocate_bits,
    balance_filters,
    dequantize,
    quantize,
    reconstruct,
)
from apot_fat.quant.fake_quant import eight_bit_weight, quantize_activation, quantize_weight
from apot_fat.quant.fitting import fit_threshold
from apot_fat.quant.frequency import frequency_transform, weight_deactivate_freq
from apot_fat.quant.layers import QuantConv2d, QuantLinear
from apot_fat.quant.levels import LevelSet, apot_levels, build_power_value, level_set, pot_levels, uniform_levels
from apot_fat.quant.normalization import normalize_weight
from apot_fat.quant.projection import project
from apot_fat.quant.seam import get_kernels, set_kernels
from apot_fat.quant.spec import EIGHT_BIT, FLOAT_BITS, PRESETS, QuantSpec, preset
from apot_fat.quant.thresholds import initialize_thresholds
from apot_fat.quant.units import ALPHA_FLOOR

try:
    import apot_fat.quant.fast  # noqa: F401  # puts its answers into the seam
except ModuleNotFoundError as error:
    if error.name != "apot_fat.quant.fast":
        raise
set_kernels(os.environ.get("APOT_FAT_KERNELS", "auto"))

__all__ = [
    "ALPHA_FLOOR",
    "EIGHT_BIT",
    "FLOAT_BITS",
    "PRESETS",
    "Allocation",
    "Conversion",
    "ConvertedLayer",
    "LayerClipping",
    "LevelSet",
    "QuantConv2d",
    "QuantLinear",
    "QuantSpec",
    "Reconstruction",
    "allocate_bits",
    "apot_levels",
    "balance_filters",
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
    "quantize",
    "quantize_activation",
    "quantize_weight",
    "reconstruct",
    "set_bits",
    "set_kernels",
    "show_params",
    "threshold_layers",
    "uniform_levels",
    "weight_deactivate_freq",
]
