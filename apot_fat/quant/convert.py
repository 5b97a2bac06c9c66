"""Quantize any network in place, and fold the quantized weights back into a plain one.

>>> from torch import nn
>>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
>>> print(quantize(model, bits=4, calibration=torch.rand(2, 3, 16, 16)))
name  type    weight  input   note
────  ──────  ──────  ──────  ─────────────────────────────────────────
0     Conv2d  8 bits  float   first layer
2     Conv2d  apot/4  apot/4  input from 0: unsigned; thresholds fitted
4     Conv2d  8 bits  float   last layer
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apot_fat.quant.layers import AnyQuantized, EightBitConv2d, EightBitLinear, QuantConv2d, QuantLinear
from apot_fat.quant.spec import FLOAT_BITS, PRESETS, QuantSpec, check_bits, nearest, preset
from apot_fat.quant.thresholds import FIT_SAMPLES, fit_threshold, fit_weight_threshold
from apot_fat.quant.watching import evaluation_mode, watch_inputs
from apot_fat.text import aligned, one_line

METHODS: dict[str, dict[str, Any]] = {
    "apot": {"name": "apot-imagenet"},
    "pot": {"name": "apot-imagenet-pot"},
    "uniform": {"name": "apot-imagenet-uniform"},
    "fat": {"name": "fat-cifar", "act_clip": "both"},
    "fat-log": {"name": "fat-cifar-log", "act_clip": "both"},
}
"""Short names of the presets that suit networks of the user's own; any preset's name does as well."""

EDGE_BITS = (8, FLOAT_BITS)
_READ_WEIGHTS_THEMSELVES = ("MultiheadAttention", "ShiftedWindowAttention", "ShiftedWindowAttentionV2")


@dataclass(frozen=True)
class ConvertedLayer:
    """One row of a ``Conversion``: a layer, what its weight and input became (``float`` where left), and why."""

    name: str
    type: str
    weight: str
    input: str
    note: str

    @property
    def is_quantized(self) -> bool:
        """Whether anything of it is quantized."""
        return self.weight != "float" or self.input != "float"


@dataclass(frozen=True)
class Conversion:
    """What ``quantize`` did: one row a layer. Printed, an aligned table."""

    rows: tuple[ConvertedLayer, ...]

    @property
    def converted(self) -> list[str]:
        """Names of the layers that were quantized."""
        return [row.name for row in self.rows if row.is_quantized]

    @property
    def left(self) -> list[str]:
        """Names of the layers and parameters that stay float."""
        return [row.name for row in self.rows if not row.is_quantized]

    def table(self) -> str:
        """The rows as an aligned table."""
        head = [field.name for field in fields(ConvertedLayer)]
        return aligned(head, [[getattr(row, name) for name in head] for row in self.rows], left=head)

    def __str__(self) -> str:
        return self.table()


@torch.no_grad()
def quantize(
    model: nn.Module,
    bits: int = 4,
    method: str = "apot",
    *,
    weight_bits: int | None = None,
    act_bits: int | None = None,
    edge_bits: int = 8,
    exclude: Sequence[str] = (),
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    signed: bool | None = None,
    calibration: Tensor | None = None,
) -> Conversion:
    """Turn the convolutions and linear layers of a network into quantized ones, in place.

    Every ``Conv2d`` (grouped and depthwise too) and ``Linear`` becomes a ``QuantConv2d`` or ``QuantLinear``: the same
    module, with the same parameters, hooks and places in the network, and thresholds added. Make the optimiser
    afterwards. First and last layer (in the order they run in with a calibration batch, else in that of definition)
    get 8-bit weights and float inputs, as published.

    Args:
        model: the network; it keeps every parameter it has.
        bits: 2 to 8, for weights and inputs.
        method: ``apot``, ``pot``, ``uniform``, ``fat``, ``fat-log``, or a preset's name (``lsq``, ``pact``, …).
        weight_bits, act_bits: in place of ``bits`` for one of the two; 32 is float.
        edge_bits: 8, or 32 to leave first and last layer float.
        exclude: patterns of layer names (``fnmatch``: ``*.downsample.*``) that stay float.
        overrides: fields of ``QuantSpec``, or ``bits``, by pattern of layer names; later patterns win. They also apply
            to first and last layer. ``set_bits`` leaves the bits given here alone.
        signed: whether inputs may be negative (GELU, hard-swish, normalised tokens). None looks at the calibration
            batch; without one every input is taken as signed, which costs a bit where it is not.
        calibration: a batch to run: it shows which inputs are negative, and the thresholds of weights and inputs are
            set to those of least squared error on it. Without it they start at the method's constants.

    Returns:
        What was converted, what was left float, and why.

    Raises:
        ValueError: unknown method, bits or field; a pattern that matches no layer; nothing to convert; a network that
            is quantized already or refuses the batch. The network is then unchanged.
    """
    base = _base_spec(method, bits, weight_bits, act_bits)
    if isinstance(edge_bits, bool) or edge_bits not in EDGE_BITS:
        raise ValueError(f"edge_bits {edge_bits!r}: choose 8, or 32 to leave first and last layer float")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}
    already = [name for name, module in layers.items() if isinstance(module, AnyQuantized)]
    if already:
        raise ValueError(f"layer {already[0]!r} is quantized already: use set_bits, or dequantize the network first")
    if not layers:
        raise ValueError(f"{type(model).__name__} holds no Conv2d or Linear: there is nothing to convert")
    excluded = _matching(exclude, layers, "exclude")
    given = {pattern: dict(values) for pattern, values in (overrides or {}).items()}
    _matching(list(given), layers, "overrides")
    reasons = {name: reason for name, module in layers.items() if (reason := _why_not(name, module, model))}
    seen = _watch(model, layers, calibration)
    for name in layers:
        if seen is not None and name not in reasons and name not in seen:
            reasons[name] = "never called on the batch: unused, or its weight is read by another module"
    order = [name for name in (layers if seen is None else seen) if name not in reasons]
    if not order:
        raise ValueError(f"{type(model).__name__} holds no layer that can be converted: {next(iter(reasons.values()))}")
    edges = {order[0]: "first layer", order[-1]: "last layer"}

    plans: dict[str, tuple[QuantSpec | None, str]] = {}  # None is an 8-bit weight
    fixed = set()
    for name in order:
        fields_given = {
            k: v for pattern, values in given.items() if fnmatchcase(name, pattern) for k, v in values.items()
        }
        if {"bits", "weight_bits", "act_bits"} & set(fields_given):
            fixed.add(name)
        if name in excluded:
            reasons[name] = "excluded"
        elif name in edges and not fields_given:
            if edge_bits == FLOAT_BITS:
                reasons[name] = edges[name]
            else:
                plans[name] = None, edges[name]
        else:
            plans[name] = _plan(base, fields_given, signed, None if seen is None else seen[name])
    rows = []
    for name, module in layers.items():
        kind = type(module).__name__
        if name not in plans:
            rows.append(ConvertedLayer(name, kind, "float", "float", reasons[name]))
            continue
        spec, note = plans[name]
        convert_layer(module, spec)
        if spec is None:
            rows.append(ConvertedLayer(name, kind, "8 bits", "float", note))
            continue
        if seen is not None:
            _fit(module, spec, seen[name].values)
        if name in fixed:
            module.fixed_bits = True  # type: ignore[assignment]
        weight = "float" if spec.weight_bits == FLOAT_BITS else f"{spec.weight_levels}/{spec.weight_bits}"
        taken = "float" if spec.act_bits == FLOAT_BITS else f"{spec.act_levels}/{spec.act_bits}"
        rows.append(ConvertedLayer(name, kind, weight + (", fat" if spec.transform else ""), taken, note))
    return Conversion((*rows, *_other_weights(model, layers)))


def dequantize(model: nn.Module) -> nn.Module:
    """A copy of a network with plain layers that hold the quantized weights; inputs are no longer quantized.

    Args:
        model: any network that holds quantized layers; unchanged.

    Returns:
        The copy, without thresholds and transforms. A layer that takes the ReLU of its input goes on doing so.
    """
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, AnyQuantized):
            takes_relu = getattr(module, "relu", False)
            plain = (_ReluConv2d, _ReluLinear) if takes_relu else (nn.Conv2d, nn.Linear)
            fold_weight(module, plain[0] if isinstance(module, nn.Conv2d) else plain[1])
    return model


def fold_weight(module: nn.Module, plain: type[nn.Module]) -> None:
    """Turn one quantized layer into a plain one with the quantized weight as its weight, in place.

    Args:
        module: a ``QuantConv2d``, ``QuantLinear``, ``EightBitConv2d`` or ``EightBitLinear``.
        plain: ``nn.Conv2d``, ``nn.Linear``, or a class derived from it; the module's class from now on.
    """
    assert isinstance(module, AnyQuantized)
    with torch.no_grad():
        weight = nn.Parameter(module.quantized_weight().detach().clone(), requires_grad=module.weight.requires_grad)
    for name in ("weight_alpha", "act_alpha", "transform"):
        module._parameters.pop(name, None)
    for name in (
        "relu",
        "fixed_bits",
        "_spec",
        "_weight_set",
        "_act_set",
        "_kept",
        "_kept_bytes",
        "_graph_weight",
        "_graph_source",
    ):
        module.__dict__.pop(name, None)
    module.weight = weight
    module.__class__ = plain  # type: ignore[assignment]


class _ReluConv2d(nn.Conv2d):
    """A convolution of its input's ReLU."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.relu(x))


class _ReluLinear(nn.Linear):
    """A linear layer of its input's ReLU."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.relu(x))


@dataclass
class _Seen:
    """What a layer's input looked like in the calibration batch."""

    lowest: float
    values: Tensor


def _base_spec(method: str, bits: int, weight_bits: int | None, act_bits: int | None) -> QuantSpec:
    check_bits(bits)
    known = (*METHODS, *PRESETS)
    if method not in known:
        raise ValueError(f"unknown method {method!r}{nearest(method, known)}: choose one of {', '.join(known)}")
    given = {"weight_bits": weight_bits, "act_bits": act_bits}
    options = METHODS.get(method, {"name": method}) | {k: v for k, v in given.items() if v is not None}
    return preset(options.pop("name"), bits, **options)


def _matching(patterns: Sequence[str], layers: Mapping[str, nn.Module], label: str) -> set[str]:
    matched = set()
    if isinstance(patterns, str):
        raise ValueError(f"{label} {patterns!r}: give a list of patterns")
    for pattern in patterns:
        hits = {name for name in layers if fnmatchcase(name, pattern)}
        if not hits:
            raise ValueError(
                f"{label}: pattern {pattern!r} matches no convolution or linear layer{nearest(pattern, layers)}"
            )
        matched |= hits
    return matched


def _why_not(name: str, module: nn.Module, model: nn.Module) -> str:
    """Why a layer cannot be converted; empty if it can."""
    if type(module) not in (nn.Conv2d, nn.Linear):
        base = "Conv2d" if isinstance(module, nn.Conv2d) else "Linear"
        return f"a subclass of {base} with a meaning of its own"
    if not isinstance(module._parameters.get("weight"), nn.Parameter):
        return "its weight is computed, not a parameter"
    if isinstance(module.weight, nn.UninitializedParameter):
        return "lazy: run the network once first"
    parent = model.get_submodule(name.rpartition(".")[0]) if name else model
    if type(parent).__name__ in _READ_WEIGHTS_THEMSELVES:
        return f"{type(parent).__name__} reads its weight itself"
    return ""


def _watch(model: nn.Module, layers: Mapping[str, nn.Module], batch: Tensor | None) -> dict[str, _Seen] | None:
    """Inputs of the layers on a batch, in the order of the first call."""
    if batch is None:
        return None
    seen: dict[str, _Seen] = {}
    names = {id(module): name for name, module in layers.items()}

    def note(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if not inputs or not isinstance(inputs[0], Tensor) or not inputs[0].numel():
            return
        x = inputs[0].detach().flatten()
        values = x[:: max(1, x.numel() // FIT_SAMPLES)].float()
        name = names[id(module)]
        if name in seen:
            before = seen[name]
            seen[name] = _Seen(min(before.lowest, x.min().item()), torch.cat([before.values, values]))
        else:
            seen[name] = _Seen(x.min().item(), values)

    try:
        with evaluation_mode(model), watch_inputs(layers.values(), note):
            model(batch)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        shape = tuple(batch.shape)
        raise ValueError(f"calibration of shape {shape}: the network refuses it ({one_line(error)})") from error
    return seen


def _plan(base: QuantSpec, given: dict[str, Any], signed: bool | None, seen: _Seen | None) -> tuple[QuantSpec, str]:
    given = dict(given)
    allowed = ("bits", *(field.name for field in fields(QuantSpec)))
    for key in given:
        if key not in allowed:
            raise ValueError(f"overrides: unknown field {key!r} of QuantSpec{nearest(key, allowed)}")
    spec = base
    if "bits" in given:
        bits = given.pop("bits")
        check_bits(bits)
        spec = spec.with_bits(bits)
    if "act_signed" in given:
        note = "input: set by hand"
    elif signed is not None:
        given["act_signed"], note = signed, f"input: {'signed' if signed else 'unsigned'}, set by hand"
    elif seen is None:
        given["act_signed"], note = True, "input: signed, no calibration batch tells"
    else:
        given["act_signed"] = seen.lowest < 0
        note = f"input from {seen.lowest:.3g}: {'signed' if seen.lowest < 0 else 'unsigned'}; thresholds fitted"
    if given["act_signed"] and spec.act_alpha_gradient == "clipped-only":
        given.setdefault("act_alpha_gradient", "full")  # the only one that signed inputs have
    return replace(spec, **given), note


def convert_layer(module: nn.Module, spec: QuantSpec | None) -> None:
    """Turn one layer into a quantized one, in place: the same module and parameters, another class.

    Args:
        module: a ``Conv2d`` or ``Linear``, or a quantized layer already.
        spec: what it is to do; None for an 8-bit weight and a float input (``EightBitConv2d``).
    """
    is_conv = isinstance(module, nn.Conv2d)
    if spec is None:
        module.__class__ = EightBitConv2d if is_conv else EightBitLinear
    elif isinstance(module, QuantConv2d | QuantLinear):
        module.spec = spec
    else:
        module.__class__ = QuantConv2d if is_conv else QuantLinear
        assert isinstance(module, QuantConv2d | QuantLinear)
        module._init_quantizers(spec, relu=False)


def _fit(module: nn.Module, spec: QuantSpec, values: Tensor) -> None:
    assert isinstance(module, QuantConv2d | QuantLinear)
    if module.act_alpha is not None:
        module.act_alpha.fill_(fit_threshold(values, spec.act_set, signed=spec.act_signed))
    fit_weight_threshold(module)


def _other_weights(model: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[ConvertedLayer]:
    """Parameters of two or more dimensions that no convolution or linear layer owns."""
    owned = {id(parameter) for module in layers.values() for parameter in module.parameters(recurse=False)}
    for name, parameter in model.named_parameters():
        if id(parameter) not in owned and not isinstance(parameter, nn.UninitializedParameter) and parameter.dim() > 1:
            owner = type(model.get_submodule(name.rpartition(".")[0])).__name__
            yield ConvertedLayer(name, owner, "float", "float", "neither a Conv2d's nor a Linear's weight")
