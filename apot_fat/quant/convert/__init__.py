"""Conversion: a network of the user's own quantized in place, tuned to what it computed, and turned back."""

from apot_fat.quant.convert.allocation import AllocatedLayer, Allocation, allocate_bits
from apot_fat.quant.convert.conversion import Conversion, ConvertedLayer
from apot_fat.quant.convert.filters import balance_filters
from apot_fat.quant.convert.layer import convert_layer, dequantize, fold_weight, leave_fast_paths
from apot_fat.quant.convert.network import quantize
from apot_fat.quant.convert.plan import METHODS
from apot_fat.quant.convert.reconstruction import Reconstruction, reconstruct

__all__ = [
    "METHODS",
    "AllocatedLayer",
    "Allocation",
    "Conversion",
    "ConvertedLayer",
    "Reconstruction",
    "allocate_bits",
    "balance_filters",
    "convert_layer",
    "dequantize",
    "fold_weight",
    "leave_fast_paths",
    "quantize",
    "reconstruct",
]
