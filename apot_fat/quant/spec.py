"""What a quantized layer does, as one frozen value; and the published variants by name."""

from __future__ import annotations

import difflib
import itertools
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

from apot_fat.quant.levels import LEVEL_FAMILIES, SIGNED_FAMILIES, LevelSet, level_set

FLOAT_BITS = 32
LOW_BITS = (2, 3, 4, 5, 6, 7, 8)

WeightScale = Literal["threshold", "max"]
WeightNorm = Literal["standardize", "center", "tanh", "none"]
WeightGradient = Literal["calibrated", "clipped"]
ActClip = Literal["above", "both"]
ActAlphaGradient = Literal["full", "clipped-only"]
InputClip = Literal["above", "both", "relu"]
"""``ActClip``, or the ReLU before it in the same pass."""
KernelChoice = Literal["auto", "compiled", "eager"]


def check_bits(bits: int, name: str = "bits") -> None:
    """Raise ``ValueError`` unless ``bits`` is 2 to 8 or 32."""
    if not isinstance(bits, int) or isinstance(bits, bool) or bits not in (*LOW_BITS, FLOAT_BITS):
        raise ValueError(f"{name} {bits!r}: choose an integer from {LOW_BITS[0]} to {LOW_BITS[-1]}, or {FLOAT_BITS}")


@dataclass(frozen=True)
class QuantSpec:
    """How a layer quantizes its weight and its input.

    The defaults are those of ``QuantConv2d`` and ``QuantLinear``: ``preset("apot-imagenet", 5)``.

    Args:
        weight_bits, act_bits: 2 to 8, or 32 for float. A weight of b bits spends one on the sign.
        weight_levels, act_levels: level family, ``apot``, ``pot`` or ``uniform``; a weight's also ``twos-complement``
            (−2^(b−1) … 2^(b−1) − 1 over the largest) or ``odd`` (2^b levels without 0), which hold their negatives.
        weight_norm: ``standardize`` (w − mean) / std, ``center`` w − mean, ``tanh`` tanh(w) / max |tanh(w)|, or
            ``none``.
        weight_norm_gradient: whether the gradient flows through mean, std and maximum; otherwise they are constants.
        transform: FAT's frequency transform of the normalised weight; of one that is not, in units of its standard
            deviation, which it then gets back.
        weight_gradient: ``calibrated`` passes ∂L/∂ŵ whole, ``clipped`` only where u is inside the levels. 2-bit weights
            {−1, 0, 1} are always calibrated.
        weight_per_channel: one weight threshold an output channel, ``weight_alpha`` of shape (C_out,) with a gradient
            each, instead of one a layer.
        act_per_channel: the same for the input: ``act_alpha`` of shape (C_in,). Such a layer's sums are not those of
            integers.
        weight_alpha_learned: False keeps the weight's threshold as it is: a parameter without a gradient.
        weight_scale: what a weight's level of 1 stands for: ``threshold``, the parameter ``weight_alpha``; ``max``, the
            largest weight, without a parameter (``eight_bit_weight``): only as in ``EIGHT_BIT``.
        act_signed: whether inputs may be negative: levels then stand for magnitudes, one bit is spent on the sign, and
            the input is quantized as a weight is, with the ``clipped`` gradient. Not with ``clipped-only``.
        act_clip: ``both`` clips the input to [0, 1] · α; ``above`` only at α, and passes the gradient of negatives.
        act_alpha_gradient: ``full`` Σ g (1[u > 1] + (q − u) 1[u ≤ 1]); ``clipped-only`` Σ g 1[u > 1].
        grad_scale: factor on both threshold gradients, > 0; None is 1. ``lsq`` is Q_P² / √(N Q_P), N the weights of
            the threshold or the features of one input, Q_P the levels above 0: SGD on α = Q_P s then takes the steps
            that it takes on s with LSQ's gradient scale g = 1 / √(N Q_P), learning rate, momentum and decay alike,
            since ∂L/∂α = ∂L/∂s / Q_P and a step of α is Q_P steps of s.
        weight_alpha, act_alpha: initial clipping thresholds, > 0; the weight's in units of the normalised weight, the
            activation's in units of the input. None for the weight's: LSQ's 2 mean |ŵ| √Q_P of the weight that the
            layer has when it is made (``initialize_thresholds`` does so for other weights, and for activations).

    Raises:
        ValueError: a field outside its range, naming it.
    """

    weight_bits: int = 5
    act_bits: int = 5
    weight_levels: str = "apot"
    act_levels: str = "apot"
    weight_norm: WeightNorm = "standardize"
    weight_norm_gradient: bool = True
    transform: bool = False
    weight_gradient: WeightGradient = "clipped"
    act_signed: bool = False
    act_clip: ActClip = "both"
    act_alpha_gradient: ActAlphaGradient = "full"
    grad_scale: float | Literal["lsq"] | None = None
    weight_alpha: float | None = 3.0
    act_alpha: float = 6.0
    weight_per_channel: bool = False
    weight_alpha_learned: bool = True
    weight_scale: WeightScale = "threshold"
    act_per_channel: bool = False

    def __post_init__(self) -> None:
        check_bits(self.weight_bits, "weight_bits")
        check_bits(self.act_bits, "act_bits")
        choices = {
            "weight_levels": (*LEVEL_FAMILIES, *SIGNED_FAMILIES),
            "act_levels": tuple(LEVEL_FAMILIES),
            "weight_scale": get_args(WeightScale),
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
        for name in (field.name for field in fields(self) if field.type == "bool"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} {getattr(self, name)!r}: choose True or False")
        for name in ("weight_alpha", "act_alpha", "grad_scale"):
            value = getattr(self, name)
            if name == "grad_scale" and isinstance(value, str):
                if value != "lsq":
                    raise ValueError(f"grad_scale {value!r}: choose a positive number, 'lsq' or None")
            elif value is None and name != "act_alpha":
                continue
            elif value is None or not 0 < value < float("inf"):
                raise ValueError(f"{name} {value!r}: must be positive and finite")
        for name, needed in _BY_MAX.items() if self.weight_scale == "max" else ():
            if getattr(self, name) != needed:
                given = f"weight_scale 'max' with {name} {getattr(self, name)!r}"
                raise ValueError(f"{given}: choose {name} {needed!r}, or weight_scale 'threshold'")

    @property
    def weight_set(self) -> LevelSet:
        """Levels of the weight: b bits of a signed family, or b − 1 of its magnitude's ({0, 1} at 2 bits)."""
        return level_set(self.weight_levels, self.weight_bits - (self.weight_levels not in SIGNED_FAMILIES))

    @property
    def act_set(self) -> LevelSet:
        """Levels of the activation: b bits of its family; of its magnitude b − 1 bits, if it is signed."""
        return level_set(self.act_levels, self.act_bits - self.act_signed)

    @property
    def has_weight_threshold(self) -> bool:
        """Whether the weight is quantized by a threshold."""
        return self.weight_bits != FLOAT_BITS and self.weight_scale == "threshold"

    @property
    def clips_weight_gradient(self) -> bool:
        """Whether ∂L/∂ŵ is 0 outside the levels: the ``clipped`` gradient, above 2 bits or with signed levels."""
        return self.weight_gradient == "clipped" and (self.weight_bits > 2 or self.weight_levels in SIGNED_FAMILIES)

    def with_bits(self, bits: int) -> QuantSpec:
        """The same variant at other bits, for weight and activation alike."""
        return replace(self, weight_bits=bits, act_bits=bits)


# what the scale by the maximum is for
_BY_MAX: dict[str, Any] = {
    "weight_bits": 8,
    "act_bits": FLOAT_BITS,
    "weight_levels": "uniform",
    "weight_norm": "none",
    "transform": False,
    "weight_per_channel": False,
}
EIGHT_BIT = QuantSpec(**_BY_MAX, act_levels="uniform", weight_scale="max")
"""The published first and last layer: 8-bit weight, float input. ``set_bits`` leaves such layers alone."""

_UNIFORM = {"weight_levels": "uniform", "act_levels": "uniform"}
_POT = {"weight_levels": "pot", "act_levels": "pot"}
_APOT_CIFAR = {
    "weight_norm_gradient": False,
    "weight_gradient": "calibrated",
    "act_clip": "above",
    "act_alpha": 8.0,
}
_FAT_CIFAR = _APOT_CIFAR | {"transform": True, "act_alpha": 5.0}
_FAT_IMAGENET = _APOT_CIFAR | {"transform": True, "act_alpha_gradient": "clipped-only"}
_MOBILENET = _APOT_CIFAR | {"weight_norm": "center", "act_alpha_gradient": "clipped-only", "act_alpha": 5.0}

# Learned Step Size Quantization (Esser et al., 2020), exact but for values on a bound, which count as inside here, and
# for signed inputs, whose levels are symmetric. The step is s = α / Q_P. As in the paper train thresholds like weights
# (threshold_groups = false) from an fp32 network, after initialize_thresholds(model, batch, "lsq").
_LSQ = {
    "weight_levels": "twos-complement",
    "act_levels": "uniform",
    "weight_norm": "none",
    "weight_norm_gradient": False,
    "grad_scale": "lsq",
    "weight_alpha": None,
    "act_alpha": 3.0,
}
# PACT (Choi et al., 2018): equations 1 to 3 for activations, again with the bound inside, and DoReFa-Net's weights. Its
# decay of the threshold is the optimiser's alpha_weight_decay; the initial threshold is ours, large as the paper asks.
_PACT = {
    "weight_levels": "odd",
    "act_levels": "uniform",
    "weight_norm": "tanh",
    "weight_gradient": "calibrated",
    "act_alpha_gradient": "clipped-only",
    "weight_alpha": 1.0,
    "weight_alpha_learned": False,
    "act_alpha": 8.0,
}

PRESETS: dict[str, dict[str, Any]] = {
    "apot-cifar": _APOT_CIFAR,
    "apot-imagenet": {},
    "apot-imagenet-pot": _POT,
    "apot-imagenet-uniform": _UNIFORM,
    "fat-cifar": _FAT_CIFAR | _UNIFORM,
    "fat-cifar-log": _FAT_CIFAR | _POT,
    "fat-imagenet": _FAT_IMAGENET | _UNIFORM,
    "fat-imagenet-log": _FAT_IMAGENET | _POT,
    "uniform-mobilenet": _MOBILENET | _UNIFORM,
    "lsq": _LSQ,
    "pact": _PACT,
}


def preset(name: str, bits: int = 4, **overrides: Any) -> QuantSpec:
    """The ``QuantSpec`` of a published variant.

    Args:
        name: one of ``PRESETS``: APoT's and FAT's, and for comparison ``lsq`` and ``pact``.
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


def nearest(name: str, known: Any) -> str:
    """`` (did you mean 'x'?)`` for the known name most like ``name``, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=5)
    if not close:
        return ""

    def likeness(candidate: str) -> tuple[float, int]:
        ratio = difflib.SequenceMatcher(a=name, b=candidate).ratio()
        return ratio, sum(itertools.takewhile(bool, map(str.__eq__, name, candidate)))

    return f" (did you mean {max(close, key=likeness)!r}?)"
