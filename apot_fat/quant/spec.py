"""What a quantized layer does, as one frozen value; and the published variants by name."""

from __future__ import annotations

import difflib
import itertools
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

from apot_fat.quant.levels import LEVEL_FAMILIES, LevelSet, level_set

FLOAT_BITS = 32
LOW_BITS = (2, 3, 4, 5, 6, 7, 8)

WeightNorm = Literal["standardize", "center", "none"]
WeightGradient = Literal["calibrated", "clipped"]
ActClip = Literal["above", "both"]
ActAlphaGradient = Literal["full", "clipped-only"]
InputClip = Literal["above", "both", "relu"]
"""``ActClip``, or the ReLU before it in the same pass."""
KernelChoice = Literal["auto", "compiled", "eager"]


@dataclass(frozen=True)
class QuantSpec:
    """How a layer quantizes its weight and its input.

    Args:
        weight_bits, act_bits: 2 to 8, or 32 for float. A weight of b bits spends one on the sign.
        weight_levels, act_levels: level family, ``apot``, ``pot`` or ``uniform``.
        weight_norm: ``standardize`` (w − mean) / std, ``center`` w − mean, or ``none``.
        weight_norm_gradient: whether the gradient flows through mean and std; otherwise they are constants.
        transform: FAT's frequency transform of the normalised weight.
        weight_gradient: ``calibrated`` passes ∂L/∂ŵ whole, ``clipped`` only where |u| ≤ 1. 2-bit weights are always
            calibrated.
        act_signed: whether inputs may be negative: levels then stand for magnitudes, one bit is spent on the sign, and
            the input is quantized as a weight is, with the ``clipped`` gradient. Not with ``clipped-only``.
        act_clip: ``both`` clips the input to [0, 1] · α; ``above`` only at α, and passes the gradient of negatives.
        act_alpha_gradient: ``full`` Σ g (1[u > 1] + (q − u) 1[u ≤ 1]); ``clipped-only`` Σ g 1[u > 1].
        grad_scale: factor on both threshold gradients, > 0; None is 1.
        weight_alpha, act_alpha: initial clipping thresholds, > 0; the weight's in units of the normalised weight, the
            activation's in units of the input.

    Raises:
        ValueError: a field outside its range, naming it.
    """

    weight_bits: int = 4
    act_bits: int = 4
    weight_levels: str = "apot"
    act_levels: str = "apot"
    weight_norm: WeightNorm = "standardize"
    weight_norm_gradient: bool = False
    transform: bool = False
    weight_gradient: WeightGradient = "calibrated"
    act_signed: bool = False
    act_clip: ActClip = "above"
    act_alpha_gradient: ActAlphaGradient = "full"
    grad_scale: float | None = None
    weight_alpha: float = 3.0
    act_alpha: float = 8.0

    def __post_init__(self) -> None:
        check_bits(self.weight_bits, "weight_bits")
        check_bits(self.act_bits, "act_bits")
        choices = {
            "weight_levels": tuple(LEVEL_FAMILIES),
            "act_levels": tuple(LEVEL_FAMILIES),
            "weight_norm": get_args(WeightNorm),
            "weight_gradient": get_args(WeightGradient),
            "act_clip": get_args(ActClip),
            "act_alpha_gradient": get_args(ActAlphaGradient),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} {getattr(self, name)!r}: choose one of {', '.join(allowed)}")
        if self.act_signed and self.act_alpha_gradient == "clipped-only":
            raise ValueError("act_signed with act_alpha_gradient 'clipped-only': choose 'full' for signed inputs")
        for name in ("weight_alpha", "act_alpha", "grad_scale"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{name} {value!r}: must be positive and finite")

    @property
    def weight_set(self) -> LevelSet:
        """Magnitude levels of the weight: b − 1 bits of its family ({0, 1} at 2 bits, whatever the family)."""
        return level_set(self.weight_levels, self.weight_bits - 1)

    @property
    def act_set(self) -> LevelSet:
        """Levels of the activation: b bits of its family; of its magnitude b − 1 bits, if it is signed."""
        return level_set(self.act_levels, self.act_bits - self.act_signed)

    @property
    def clips_weight_gradient(self) -> bool:
        """Whether ∂L/∂ŵ is 0 outside the threshold: the ``clipped`` gradient, above 2 bits."""
        return self.weight_gradient == "clipped" and self.weight_bits > 2

    def with_bits(self, bits: int) -> QuantSpec:
        """The same variant at other bits, for weight and activation alike."""
        return replace(self, weight_bits=bits, act_bits=bits)


_UNIFORM = {"weight_levels": "uniform", "act_levels": "uniform"}
_POT = {"weight_levels": "pot", "act_levels": "pot"}
_APOT_IMAGENET = {
    "weight_norm_gradient": True,
    "weight_gradient": "clipped",
    "act_clip": "both",
    "act_alpha": 6.0,
}
_FAT_CIFAR = {"transform": True, "act_alpha": 5.0}
_FAT_IMAGENET = {"transform": True, "act_alpha_gradient": "clipped-only"}

PRESETS: dict[str, dict[str, Any]] = {
    "apot-cifar": {},
    "apot-imagenet": _APOT_IMAGENET,
    "apot-imagenet-pot": _APOT_IMAGENET | _POT,
    "apot-imagenet-uniform": _APOT_IMAGENET | _UNIFORM,
    "fat-cifar": _FAT_CIFAR | _UNIFORM,
    "fat-cifar-log": _FAT_CIFAR | _POT,
    "fat-imagenet": _FAT_IMAGENET | _UNIFORM,
    "fat-imagenet-log": _FAT_IMAGENET | _POT,
    "uniform-mobilenet": {"weight_norm": "center", "act_alpha_gradient": "clipped-only", "act_alpha": 5.0} | _UNIFORM,
}


def preset(name: str, bits: int = 4, **overrides: Any) -> QuantSpec:
    """The ``QuantSpec`` of a published variant.

    Args:
        name: one of ``PRESETS``.
        bits: for weight and activation, 2 to 8, or 32 for the full-precision layer.
        overrides: any field of ``QuantSpec``.

    Raises:
        ValueError: an unknown name (with the nearest one), unknown field, or value out of range.

    >>> preset("fat-cifar", bits=3).transform
    True
    """
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}{nearest(name, PRESETS)}: choose one of {', '.join(PRESETS)}")
    allowed = {field.name for field in fields(QuantSpec)}
    for key in overrides:
        if key not in allowed:
            raise ValueError(f"unknown field {key!r} of QuantSpec{nearest(key, allowed)}")
    return QuantSpec(**{"weight_bits": bits, "act_bits": bits, **PRESETS[name], **overrides})


def check_bits(bits: int, name: str = "bits") -> None:
    """Raise ``ValueError`` unless ``bits`` is 2 to 8 or 32."""
    if not isinstance(bits, int) or isinstance(bits, bool) or bits not in (*LOW_BITS, FLOAT_BITS):
        raise ValueError(f"{name} {bits!r}: choose an integer from {LOW_BITS[0]} to {LOW_BITS[-1]}, or {FLOAT_BITS}")


def nearest(name: str, known: Any) -> str:
    """`` (did you mean 'x'?)`` for the known name most like ``name``, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=5)
    if not close:
        return ""

    def likeness(candidate: str) -> tuple[float, int]:
        ratio = difflib.SequenceMatcher(a=name, b=candidate).ratio()
        return ratio, sum(itertools.takewhile(bool, map(str.__eq__, name, candidate)))

    return f" (did you mean {max(close, key=likeness)!r}?)"
