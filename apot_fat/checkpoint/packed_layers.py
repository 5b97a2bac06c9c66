"""A quantized layer in a packed file: its weight as codes, what is said of it, and the layer made from both."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from apot_fat.checkpoint.bit_packing import MOST_BITS, pack_bits, unpack_bits
from apot_fat.checkpoint.network_state import unique_state
from apot_fat.checkpoint.weights import check_type
from apot_fat.quant.convert import convert_layer, fold_weight, leave_fast_paths
from apot_fat.quant.integers import integer_weight
from apot_fat.quant.layers import AnyQuantized
from apot_fat.quant.quantizer import PARAMETERS, THRESHOLDS, parameter_shapes
from apot_fat.quant.spec import EIGHT_BIT, FLOAT_BITS, QuantSpec
from apot_fat.quant.units import along_rows


class LayerPlan(NamedTuple):
    """A layer of a packed file; no weight means that it lies among the leftovers."""

    spec: QuantSpec
    relu: bool
    fixed_bits: bool
    shape: tuple[int, ...]
    weight: Tensor | None


def parameter_name(layer: str, parameter: str) -> str:
    """The name of a layer's parameter in its network; the layer is ``""`` if it is the network itself."""
    return f"{layer}.{parameter}" if layer else parameter


def pack_layer(module: AnyQuantized) -> tuple[Tensor | None, dict[str, Any]]:
    """Packed codes, or None for a float weight; and what to say of the layer: no spec is ``EIGHT_BIT``."""
    integers = integer_weight(module)
    dtype = str(module.weight.dtype).removeprefix("torch.")
    entry: dict[str, Any] = {"shape": list(module.weight.shape), "dtype": dtype}
    if module.spec.weight_scale == "max":
        lowest, highest = (0, 0) if integers is None else map(int, integers.numerators.aminmax())
        bits = max(1, (highest - lowest).bit_length())
        if module.relu:
            entry["relu"] = True
        if integers is None or bits > MOST_BITS:  # the scale is max(w), and some weight is far below -max(w)
            return None, entry
        entry |= {"offset": lowest, "bits": bits, "scale": float(integers.scale)}
        return pack_bits(integers.numerators - lowest, bits), entry
    spec = replace(module.spec, weight_norm="none", weight_norm_gradient=False, transform=False)
    fields = asdict(spec)
    del fields["weight_scale"]  # implied, and unknown to earlier versions
    if not spec.act_per_channel:
        del fields["act_per_channel"]
    entry |= {"spec": fields, "relu": module.relu, "fixed_bits": module.fixed_bits}
    if integers is None:
        return None, entry
    signed = torch.tensor(spec.weight_set.signed_numerators, device=integers.numerators.device)
    return pack_bits(torch.bucketize(integers.numerators.contiguous(), signed), spec.weight_bits), entry


def unpack_layer(entry: dict[str, Any], codes: Tensor | None, alpha: Tensor | None) -> LayerPlan:
    """What the file says of a layer, its weight remade.

    Args:
        entry: of ``pack_layer``, as read.
        codes, alpha: its packed weight and weight threshold, where there are.

    Raises:
        KeyError, TypeError, ValueError: they do not fit each other.
    """
    shape = tuple(entry["shape"])
    count = prod(shape)
    spec = QuantSpec(**entry["spec"]) if "spec" in entry else EIGHT_BIT
    plan = LayerPlan(spec, entry.get("relu") is True, entry.get("fixed_bits") is True, shape, None)
    by_max = spec.weight_scale == "max"
    if "offset" not in entry if by_max else spec.weight_bits == FLOAT_BITS:
        return plan
    bits = int(entry["bits"]) if by_max else spec.weight_bits
    dtype = {"float32": torch.float32, "float64": torch.float64, "float16": torch.float16, "bfloat16": torch.bfloat16}[
        entry["dtype"]
    ]
    if codes is None or codes.dtype != torch.uint8 or codes.dim() != 1 or not 1 <= bits <= MOST_BITS:
        raise ValueError("a layer has no packed weight")
    if not all(isinstance(size, int) and size >= 0 for size in shape) or codes.numel() != -(-count * bits // 8):
        raise ValueError(f"{codes.numel()} bytes for a weight of shape {shape} and {bits} bits")
    values, exact = unpack_bits(codes, bits, count), torch.promote_types(dtype, torch.float32)
    if by_max:
        weight = (values + int(entry["offset"])).to(exact) / spec.weight_set.denominator * float(entry["scale"])
        return plan._replace(weight=weight.view(shape).to(dtype))
    if alpha is None or tuple(alpha.shape) != (shape[:1] if spec.weight_per_channel else ()) or alpha.is_complex():
        raise ValueError("a layer has no threshold")
    signed = spec.weight_set.signed_tensor(exact)
    if count and int(values.max()) >= len(signed):
        raise ValueError(f"code {int(values.max())} of {len(signed)} levels")
    levels = signed[values].view(shape)
    return plan._replace(weight=(levels * along_rows(alpha.to(signed.dtype), len(shape))).to(dtype))


def check_fit(where: str, model: nn.Module, plans: Mapping[str, LayerPlan], state: Mapping[str, Tensor]) -> None:
    """Raise ``ValueError`` unless the layers and leftovers of a file are those of a network.

    Args:
        where: the file, for the message.
        model: the network.
        plans: of its quantized layers, by name.
        state: the leftovers, by name.
    """
    modules = dict(model.named_modules())
    for name, plan in plans.items():
        module = modules.get(name)
        if not isinstance(module, nn.Conv2d | nn.Linear) or tuple(module.weight.shape) != plan.shape:
            found = "nothing" if module is None else type(module).__name__
            if isinstance(module, nn.Conv2d | nn.Linear):
                found += f" of shape {tuple(module.weight.shape)}"
            raise ValueError(f"{where}: layer {name!r} has the shape {plan.shape}, the network has {found} there")
    own = _thresholds(name for name, module in modules.items() if isinstance(module, AnyQuantized))
    thresholds = _thresholds(plans)
    unique = unique_state(model)
    expected = {name: tensor.shape for name, tensor in unique.items() if name not in own}
    for name, plan in plans.items():
        if plan.weight is not None:
            expected.pop(parameter_name(name, "weight"), None)
    given = {name: tensor.shape for name, tensor in state.items() if name not in thresholds}
    for name in (*expected, *given):
        if expected.get(name) != given.get(name):
            raise ValueError(f"{where}: {name!r} is {_shape(given, name)}, in the network {_shape(expected, name)}")
        check_type(name, state[name], unique[name].dtype, where)
    for name, plan in plans.items():
        shapes = parameter_shapes(plan.spec, plan.shape[0], plan.shape[1] * getattr(modules[name], "groups", 1))
        for kind in THRESHOLDS:
            key = parameter_name(name, kind)
            if (kind in shapes) != (key in state):
                raise ValueError(f"{where}: {key} is {'missing' if kind in shapes else 'left over'}")
            if kind in shapes:
                check_type(key, state[key], torch.float32, where)
                if state[key].shape != shapes[kind]:
                    raise ValueError(f"{where}: {key} is not of shape {shapes[kind]}")


def _thresholds(layers: Iterable[str]) -> set[str]:
    return {parameter_name(name, kind) for name in layers for kind in PARAMETERS}


def _shape(shapes: Mapping[str, torch.Size], name: str) -> str:
    return f"of shape {tuple(shapes[name])}" if name in shapes else "missing"


def set_layers(model: nn.Module, plans: Mapping[str, LayerPlan]) -> None:
    """Make every layer what the file says, whatever the model quantizes."""
    for name, module in list(model.named_modules()):
        if name in plans or isinstance(module, AnyQuantized):
            _set_layer(module, plans.get(name))
    leave_fast_paths(model)


def _set_layer(module: nn.Module, plan: LayerPlan | None) -> None:
    # without a plan the layer is a plain one
    if plan is not None:
        layer = convert_layer(module, plan.spec)
        layer.relu, layer.fixed_bits = plan.relu, plan.fixed_bits
        if plan.weight is not None:
            with torch.no_grad():
                layer.weight.copy_(plan.weight)
        return
    assert isinstance(module, AnyQuantized)
    if module.relu:  # no plain layer does that
        module.spec = replace(module.spec, weight_bits=FLOAT_BITS, act_bits=FLOAT_BITS, weight_scale="threshold")
        module.fixed_bits = True
        return
    weight = module.weight
    fold_weight(module, nn.Conv2d if isinstance(module, nn.Conv2d) else nn.Linear)
    module.weight = weight  # which others may share
