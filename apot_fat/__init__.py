"""apot-fat: train, evaluate and ship networks with 2- to 5-bit weights and activations (APoT and FAT)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from apot_fat.package_files import PACKAGE

if TYPE_CHECKING:
    from apot_fat.checkpoint import load_packed, load_weights, save_packed
    from apot_fat.evaluation import evaluate
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
        balance_filters,
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
    from apot_fat.reporting import cost_report, report
    from apot_fat.training import TrainConfig, list_recipes, read_recipe, train, train_chain

__version__ = "0.1.0"

__all__ = [
    "EIGHT_BIT",
    "LevelSet",
    "QuantConv2d",
    "QuantLinear",
    "QuantSpec",
    "Reconstruction",
    "TrainConfig",
    "allocate_bits",
    "apot_levels",
    "balance_filters",
    "build_power_value",
    "clipping_table",
    "cost_report",
    "dequantize",
    "evaluate",
    "export_onnx",
    "integer_program",
    "integer_reference",
    "list_recipes",
    "load_packed",
    "load_weights",
    "pot_levels",
    "preset",
    "quantize",
    "read_recipe",
    "reconstruct",
    "report",
    "save_packed",
    "set_bits",
    "show_params",
    "train",
    "train_chain",
    "uniform_levels",
    "weight_deactivate_freq",
]

_HOMES = {  # of what is not in quant
    "TrainConfig": "training",
    "cost_report": "reporting",
    "evaluate": "evaluation",
    "export_onnx": "export",
    "integer_program": "integer",
    "integer_reference": "integer",
    "list_recipes": "training",
    "load_packed": "checkpoint",
    "load_weights": "checkpoint",
    "read_recipe": "training",
    "report": "reporting",
    "save_packed": "checkpoint",
    "train": "training",
    "train_chain": "training",
}
_ROOMS = ("checkpoint", "data", "export", "integer", "models", "quant", "reporting", "training")

if not (PACKAGE / "models").is_dir():  # git made no link (Windows), or an sdist, which has none
    __path__.append(str(PACKAGE.parent))


def __getattr__(name: str) -> Any:
    # PyTorch takes seconds to load: a name is imported when it is first asked for
    if name in __all__:
        value = getattr(import_module(f"apot_fat.{_HOMES.get(name, 'quant')}"), name)
    elif name in _ROOMS:
        return import_module(f"apot_fat.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_ROOMS})
