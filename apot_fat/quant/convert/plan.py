"""Which layers of a network are quantized, how, and why others are not; the network stays as it is."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from apot_fat.quant.convert.batches import Calibration, read_batches
from apot_fat.quant.convert.calibration import Passes, Seen, first_and_last, watch_layers
from apot_fat.quant.layers import AnyQuantized, QuantConv2d, QuantLinear
from apot_fat.quant.spec import EIGHT_BIT, FLOAT_BITS, PRESETS, QuantSpec, check_bits, nearest, preset

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
class LayerPlan:
    """What a layer becomes.

    Args:
        spec: what it is to do.
        note: why.
        has_own_bits: whether its bits were given for it by name.
    """

    spec: QuantSpec
    note: str
    has_own_bits: bool = False


@dataclass(frozen=True)
class NetworkPlan:
    """What becomes of a network.

    Args:
        layers: its convolutions and linear layers by name.
        plans: of those that are quantized, in the order in which they run, or without calibration of definition.
        left: why the others are not.
        batches: the calibration inputs, or None.
        passes: the float network on them, or None.
    """

    layers: dict[str, nn.Module]
    plans: dict[str, LayerPlan]
    left: dict[str, str]
    batches: list[Any] | None
    passes: Passes | None

    def seen(self, name: str) -> Seen | None:
        """A layer on the calibration inputs."""
        return None if self.passes is None else self.passes.layers[name]


def plan_network(
    model: nn.Module,
    base: QuantSpec,
    *,
    edge_bits: int,
    exclude: Sequence[str],
    overrides: Mapping[str, Mapping[str, Any]] | None,
    signed: bool | None,
    calibration: Calibration | None,
) -> NetworkPlan:
    """Plan ``quantize``; arguments and errors are its own, but for ``base``: what every layer is that none names."""
    layers = _layers_to_convert(model)
    if isinstance(edge_bits, bool) or edge_bits not in EDGE_BITS:
        raise ValueError(f"edge_bits {edge_bits!r}: choose 8, or 32 to leave first and last layer float")
    excluded = _matching(exclude, layers, "exclude")
    overrides = {} if overrides is None else overrides
    if not isinstance(overrides, Mapping) or not all(isinstance(values, Mapping) for values in overrides.values()):
        raise ValueError(f"overrides {overrides!r}: give fields by pattern, such as {{'layer1.*': {{'bits': 8}}}}")
    given = {pattern: dict(values) for pattern, values in overrides.items()}
    _matching(list(given), layers, "overrides")
    batches = None if calibration is None else read_batches(calibration)
    passes = None if batches is None else watch_layers(model, layers, batches)
    seen = None if passes is None else passes.layers
    left = _left_float(model, layers, seen)
    order = [name for name in (layers if seen is None else seen) if name not in left]
    if not order:
        raise ValueError(f"{type(model).__name__} holds no layer that can be converted: {next(iter(left.values()))}")
    edges = _edges(model, layers, order, batches)
    plans: dict[str, LayerPlan] = {}
    for name in order:
        wanted = {k: v for pattern, values in given.items() if fnmatchcase(name, pattern) for k, v in values.items()}
        if name in excluded:
            left[name] = "excluded"
        elif name not in edges or wanted:
            plans[name] = _plan(base, wanted, signed, None if seen is None else seen[name])
        elif edge_bits == FLOAT_BITS:
            left[name] = edges[name]
        else:
            plans[name] = LayerPlan(EIGHT_BIT, edges[name])
    return NetworkPlan(layers, plans, left, batches, passes)


def base_spec(method: str, bits: int, weight_bits: int | None = None, act_bits: int | None = None) -> QuantSpec:
    """What a method does at these bits.

    Raises:
        ValueError: unknown method, or bits out of range.
    """
    check_bits(bits)
    known = (*METHODS, *PRESETS)
    if method not in known:
        raise ValueError(f"unknown method {method!r}{nearest(method, known)}: choose one of {', '.join(known)}")
    given = {"weight_bits": weight_bits, "act_bits": act_bits}
    options = METHODS.get(method, {"name": method}) | {k: v for k, v in given.items() if v is not None}
    return preset(options.pop("name"), bits, **options)


def _layers_to_convert(model: nn.Module) -> dict[str, nn.Module]:
    layers: dict[str, nn.Module] = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)
    }
    already = [name for name, module in layers.items() if _is_quantized(module)]
    if already:
        raise ValueError(f"layer {already[0]!r} is quantized already: use set_bits, or dequantize the network first")
    if any(tensor.is_inference() for tensor in (*model.parameters(), *model.buffers())):
        raise ValueError(
            f"{type(model).__name__} was made within torch.inference_mode() and cannot change: make it outside"
        )
    if not layers:
        raise ValueError(f"{type(model).__name__} holds no Conv2d or Linear: there is nothing to convert")
    return layers


def _left_float(model: nn.Module, layers: Mapping[str, nn.Module], seen: Mapping[str, Seen] | None) -> dict[str, str]:
    # layers that cannot be converted, and why
    left = {name: reason for name, module in layers.items() if (reason := _why_not(name, module, model))}
    for name in layers:
        if seen is not None and name not in left and name not in seen:
            left[name] = "never called on the batch: unused, or its weight is read by another module"
    return left


def _is_quantized(module: nn.Module) -> bool:
    # our own 32-bit networks hold layers that could be, and 8-bit ends
    return isinstance(module, AnyQuantized) and (module.weight_alpha is not None or module.act_alpha is not None)


def _edges(
    model: nn.Module, layers: Mapping[str, nn.Module], order: Sequence[str], batches: list[Any] | None
) -> dict[str, str]:
    # first and last layers, and which they are
    found = None if batches is None else first_and_last(model, layers, batches[0])
    if found is None:
        return {order[0]: "first layer", order[-1]: "last layer"}
    return {name: f"{side} layer" for side, names in zip(("first", "last"), found, strict=True) for name in names}


def _matching(patterns: Sequence[str], layers: Mapping[str, nn.Module], label: str) -> set[str]:
    matched = set()
    is_list = isinstance(patterns, Collection) and not isinstance(patterns, str)
    if not is_list or not all(isinstance(pattern, str) for pattern in patterns):
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
    if type(module) not in (nn.Conv2d, nn.Linear, QuantConv2d, QuantLinear):
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


def _plan(base: QuantSpec, given: dict[str, Any], signed: bool | None, seen: Seen | None) -> LayerPlan:
    has_own_bits = not given.keys().isdisjoint(("bits", "weight_bits", "act_bits"))
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
    return LayerPlan(replace(spec, **given), note, has_own_bits)
