"""Quantize any network in place, and fold the quantized weights back into a plain one.

>>> from torch import nn
>>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
>>> print(quantize(model, bits=4, signed=False))
name  type    weight  input   note
────  ──────  ──────  ──────  ────────────────────────────
0     Conv2d  8 bits  float   first layer
2     Conv2d  apot/4  apot/4  input: unsigned, set by hand
4     Conv2d  8 bits  float   last layer
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apot_fat.quant.calibration import (
    Calibration,
    Passes,
    Seen,
    first_and_last,
    move_batch_norms,
    read_batches,
    run_quantized,
    watch_layers,
)
from apot_fat.quant.layers import AnyQuantized, EightBitConv2d, EightBitLinear, QuantConv2d, QuantLinear
from apot_fat.quant.spec import FLOAT_BITS, PRESETS, QuantSpec, check_bits, nearest, preset
from apot_fat.quant.thresholds import fit_threshold, fit_weight_threshold
from apot_fat.text import aligned

_AS_IT_IS = {"weight_norm": "none", "weight_norm_gradient": False, "weight_per_channel": True, "act_clip": "both"}
METHODS: dict[str, dict[str, Any]] = {
    "apot": {"name": "apot-imagenet", **_AS_IT_IS},
    "pot": {"name": "apot-imagenet-pot", **_AS_IT_IS},
    "uniform": {"name": "apot-imagenet-uniform", **_AS_IT_IS},
    "fat": {"name": "fat-cifar", **_AS_IT_IS},
    "fat-log": {"name": "fat-cifar-log", **_AS_IT_IS},
}
"""The methods for networks of the user's own, which go on computing what they did: weights are not normalised, which
only a network that was trained so takes, and each output channel has a threshold. Any preset's name does as well."""

EDGE_BITS = (8, FLOAT_BITS)
_READ_WEIGHTS_THEMSELVES = ("MultiheadAttention", "ShiftedWindowAttention", "ShiftedWindowAttentionV2")


@dataclass(frozen=True)
class ConvertedLayer:
    """One row of a ``Conversion``: a layer, what its weight and input became (``float`` where left), and why.

    ``error`` is that of its output on the calibration inputs beside the float network's, ‖y_q − y‖ / ‖y‖, the errors of
    the layers before it included; None where it is not known.
    """

    name: str
    type: str
    weight: str
    input: str
    error: float | None
    note: str

    @property
    def is_quantized(self) -> bool:
        """Whether anything of it is quantized."""
        return self.weight != "float" or self.input != "float"


@dataclass(frozen=True)
class Conversion:
    """What ``quantize`` did: one row a layer. Printed, an aligned table.

    ``error`` is that of the network's output on the calibration inputs, ‖y_q − y‖ / ‖y‖; None without them, or where
    the outputs have other shapes, as a detector's boxes do.
    """

    rows: tuple[ConvertedLayer, ...]
    error: float | None = None

    @property
    def sqnr(self) -> float | None:
        """Signal-to-quantization-noise ratio of the network's output, dB: −20 log10 of ``error``."""
        return _decibel(self.error)

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
        names = [field.name for field in fields(ConvertedLayer) if field.name not in ("error", "note")]
        measured = any(row.error is not None for row in self.rows)
        cells = [
            [
                *(getattr(row, name) for name in names),
                *((_shown(row.error), _shown(_decibel(row.error))) if measured else ()),
                row.note,
            ]
            for row in self.rows
        ]
        head = [*names, *(("error", "SQNR, dB") if measured else ()), "note"]
        return aligned(head, cells, left=[*names, "note"])

    def __str__(self) -> str:
        if self.error is None:
            return self.table()
        return f"{self.table()}\nthe network's output: error {_shown(self.error)}, SQNR {_shown(self.sqnr)} dB"


def _decibel(error: float | None) -> float | None:
    return -20 * math.log10(error) if error else None


def _shown(number: float | None) -> str:
    return "–" if number is None else f"{number:.3g}"


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
    calibration: Calibration | None = None,
) -> Conversion:
    """Turn the convolutions and linear layers of a network into quantized ones, in place.

    Every ``Conv2d`` (grouped and depthwise too) and ``Linear`` becomes a ``QuantConv2d`` or ``QuantLinear``: the same
    module, with the same parameters, hooks and places in the network, and thresholds added. Make the optimiser
    afterwards. First and last layers get 8-bit weights and float inputs, as published: with calibration those that no
    layer comes before, or after (a detector has several), else the first and the last in the order of definition.

    The network goes on computing what it did, but for rounding: weights are not normalised, and the thresholds of
    weights, one an output channel, and with calibration of inputs, are those of least squared error; the statistics of
    batch norms move by as much as quantization moved what reaches them. After that one more pass shows how far each
    layer's output, and the network's, is from the float network's, and that each converted layer runs as a quantized
    one.

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
        calibration: inputs to run, without labels: a batch, or batches such as a ``DataLoader``'s (each a tensor, a
            tuple whose first entry is what the network takes, or a mapping of its keywords), read once and kept.
            Without it the thresholds of inputs start at the method's constants, which fit no particular network.

    Returns:
        What was converted, what was left float, and why; with calibration the errors.

    Raises:
        ValueError: unknown method, bits or field; a pattern that matches no layer; nothing to convert; a network that
            is quantized already or refuses a batch; a layer that would not run as a quantized one. The network is then
            unchanged.
    """
    base = _base_spec(method, bits, weight_bits, act_bits)
    if isinstance(edge_bits, bool) or edge_bits not in EDGE_BITS:
        raise ValueError(f"edge_bits {edge_bits!r}: choose 8, or 32 to leave first and last layer float")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}
    already = [name for name, module in layers.items() if _is_quantized(module)]
    if already:
        raise ValueError(f"layer {already[0]!r} is quantized already: use set_bits, or dequantize the network first")
    if not layers:
        raise ValueError(f"{type(model).__name__} holds no Conv2d or Linear: there is nothing to convert")
    excluded = _matching(exclude, layers, "exclude")
    given = {pattern: dict(values) for pattern, values in (overrides or {}).items()}
    _matching(list(given), layers, "overrides")
    reasons = {name: reason for name, module in layers.items() if (reason := _why_not(name, module, model))}
    batches = None if calibration is None else read_batches(calibration)
    passes = None if batches is None else watch_layers(model, layers, batches)
    seen = None if passes is None else passes.layers
    for name in layers:
        if seen is not None and name not in reasons and name not in seen:
            reasons[name] = "never called on the batch: unused, or its weight is read by another module"
    order = [name for name in (layers if seen is None else seen) if name not in reasons]
    if not order:
        raise ValueError(f"{type(model).__name__} holds no layer that can be converted: {next(iter(reasons.values()))}")
    edges = _edges(model, layers, order, batches)

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
    with _unchanged_if_it_fails(model):
        for name, (spec, _) in plans.items():
            convert_layer(layers[name], spec)
            if spec is not None:
                _fit(layers[name], spec, None if seen is None else seen[name].values)
                if name in fixed:
                    layers[name].fixed_bits = True  # type: ignore[assignment]
        _leave_fast_paths(model)
        if passes is not None and batches is not None:
            move_batch_norms(model, passes.norms, batches[0])
        errors, error = (
            ({}, None) if passes is None or batches is None else _errors(model, layers, plans, passes, batches)
        )
    rows = []
    for name, module in layers.items():
        kind = "Conv2d" if isinstance(module, nn.Conv2d) else "Linear"
        kind = type(module).__name__ if name not in plans else kind
        if name not in plans:
            rows.append(ConvertedLayer(name, kind, "float", "float", None, reasons[name]))
            continue
        spec, note = plans[name]
        if spec is None:
            rows.append(ConvertedLayer(name, kind, "8 bits", "float", errors.get(name), note))
            continue
        weight = "float" if spec.weight_bits == FLOAT_BITS else f"{spec.weight_levels}/{spec.weight_bits}"
        taken = "float" if spec.act_bits == FLOAT_BITS else f"{spec.act_levels}/{spec.act_bits}"
        weight += ", fat" if spec.transform else ""
        rows.append(ConvertedLayer(name, kind, weight, taken, errors.get(name), note))
    return Conversion((*rows, *_other_weights(model, layers)), error)


def _is_quantized(module: nn.Module) -> bool:
    # our own 32-bit networks hold layers that could be, and 8-bit ends
    return isinstance(module, QuantConv2d | QuantLinear) and not (
        module.spec.weight_bits == module.spec.act_bits == FLOAT_BITS
    )


def _edges(
    model: nn.Module, layers: Mapping[str, nn.Module], order: Sequence[str], batches: list[Any] | None
) -> dict[str, str]:
    # first and last layers, and which they are
    found = None if batches is None else first_and_last(model, layers, batches[0])
    if found is None:
        return {order[0]: "first layer", order[-1]: "last layer"}
    return {name: f"{side} layer" for side, names in zip(("first", "last"), found, strict=True) for name in names}


@contextmanager
def _unchanged_if_it_fails(model: nn.Module) -> Iterator[None]:
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    before = [(module, module.__class__, dict(module.__dict__), dict(module._parameters)) for module in model.modules()]
    try:
        yield
    except BaseException:
        for module, kind, attributes, parameters in before:
            module.__class__ = kind
            module.__dict__.clear()
            module.__dict__.update(attributes)
            module._parameters.clear()
            module._parameters.update(parameters)
        for buffer, value in buffers:
            buffer.copy_(value)
        raise


def _leave_fast_paths(model: nn.Module) -> None:
    # PyTorch's encoder layer has a path for evaluation that reads the weights of its linear layers and calls none
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and any(map(_is_ours, module.modules())):
            module.activation_relu_or_gelu = 0


def _is_ours(module: nn.Module) -> bool:
    return isinstance(module, AnyQuantized)


def _errors(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    plans: Mapping[str, tuple[QuantSpec | None, str]],
    passes: Passes,
    batches: list[Any],
) -> tuple[dict[str, float], float | None]:
    """How far outputs are from the float network's, of the layers and of the network.

    Raises:
        ValueError: a converted layer that does not run as a quantized one.
    """
    ran, output = run_quantized(model, get_args(AnyQuantized), batches)
    idle = [name for name in plans if layers[name] not in ran]
    if idle:
        raise ValueError(
            f"{type(model).__name__}: layer {', '.join(map(repr, idle[:3]))} would not run as a quantized one, since "
            f"another module reads its weight or calls a forward of its own: leave it float with exclude={idle[:3]}"
        )
    errors = {}
    for name in plans:
        pair = [torch.cat([y.flatten().double() for y in ys]) for ys in (passes.layers[name].output, ran[layers[name]])]
        if (error := _relative_error(*pair)) is not None:
            errors[name] = error
    whole = None if passes.output is None or output is None else _relative_error(passes.output, output)
    return errors, whole


def _relative_error(y: Tensor, y_q: Tensor) -> float | None:
    if y.shape != y_q.shape or not y.any():
        return None
    return ((y_q - y).norm() / y.norm()).item()


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
    if type(module) not in (nn.Conv2d, nn.Linear, QuantConv2d, QuantLinear, EightBitConv2d, EightBitLinear):
        base = "Conv2d" if isinstance(module, nn.Conv2d) else "Linear"
        return f"a subclass of {base} with a meaning of its own"
    if not isinstance(module._parameters.get("weight"), nn.Parameter):
        return "its weight is computed, not a parameter"
    if isinstance(module.weight, nn.UninitializedParameter):
        return "lazy: run the network once first"
    if "forward" in module.__dict__:
        return "its forward was replaced by another: quantize before, or put its own back"
    parent = model.get_submodule(name.rpartition(".")[0]) if name else model
    if type(parent).__name__ in _READ_WEIGHTS_THEMSELVES:
        return f"{type(parent).__name__} reads its weight itself"
    return ""


def _plan(base: QuantSpec, given: dict[str, Any], signed: bool | None, seen: Seen | None) -> tuple[QuantSpec, str]:
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


def _fit(module: nn.Module, spec: QuantSpec, values: Tensor | None) -> None:
    assert isinstance(module, QuantConv2d | QuantLinear)
    if module.act_alpha is not None and values is not None:
        module.act_alpha.fill_(fit_threshold(values, spec.act_set, signed=spec.act_signed))
    fit_weight_threshold(module)


def _other_weights(model: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[ConvertedLayer]:
    """Parameters of two or more dimensions that no convolution or linear layer owns."""
    owned = {id(parameter) for module in layers.values() for parameter in module.parameters(recurse=False)}
    for name, parameter in model.named_parameters():
        if id(parameter) not in owned and not isinstance(parameter, nn.UninitializedParameter) and parameter.dim() > 1:
            owner = type(model.get_submodule(name.rpartition(".")[0])).__name__
            yield ConvertedLayer(name, owner, "float", "float", None, "neither a Conv2d's nor a Linear's weight")
