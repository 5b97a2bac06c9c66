"""Quantize any network in place.

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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, get_args

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from apot_fat.quant import seam
from apot_fat.quant.convert.batches import Calibration
from apot_fat.quant.convert.calibration import Passes, run_quantized
from apot_fat.quant.convert.conversion import Conversion, ConvertedLayer
from apot_fat.quant.convert.layer import convert_layer, leave_fast_paths
from apot_fat.quant.convert.norms import move_batch_norms
from apot_fat.quant.convert.plan import NetworkPlan, base_spec, plan_network
from apot_fat.quant.convert.reconstruction import Reconstruction, tune_blocks
from apot_fat.quant.layers import AnyQuantized
from apot_fat.quant.spec import FLOAT_BITS

COMPILED_FROM = 1 << 28
"""Values of all layers' inputs, on the calibration inputs, from which quantizers are compiled to run on them twice."""


@torch.inference_mode(False)
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
    reconstruct: bool | Reconstruction = False,
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
        reconstruct: whether to tune weights, thresholds, biases and batch norms on the calibration inputs until each
            block gives what it gave in the float network (``reconstruct``), without labels; or how.

    Returns:
        What was converted, what was left float, and why; with calibration the errors.

    Raises:
        ValueError: unknown method, bits or field; a pattern that matches no layer; nothing to convert; a network that
            is quantized already, refuses a batch, or gives NaN on it; inputs that are NaN or infinite; a layer that
            would not run as a quantized one. The network is then unchanged.
    """
    base = base_spec(method, bits, weight_bits, act_bits)
    tuning = _tuning(reconstruct, calibration)
    plan = plan_network(
        model,
        base,
        edge_bits=edge_bits,
        exclude=exclude,
        overrides=overrides,
        signed=signed,
        calibration=calibration,
    )
    reference = copy.deepcopy(model) if tuning else None
    errors: dict[str, float] = {}
    error = None
    with unchanged(model, reference, only_if_it_fails=True):
        for name in tqdm(plan.plans, desc="fit thresholds", unit="layer", leave=False, disable=None):
            convert_planned(plan, name)
        leave_fast_paths(model)
        if plan.passes is not None and plan.batches is not None:
            # the first compilation takes half a minute: two passes over few inputs take seconds without
            few = tuning is None and sum(seen.count for seen in plan.passes.layers.values()) < COMPILED_FROM
            with seam.speed.uncompiled() if few else nullcontext():
                move_batch_norms(model, plan.passes.norms, plan.batches)
                if tuning is not None and reference is not None:
                    refuse_idle(model, plan, run_quantized(model, get_args(AnyQuantized), plan.batches[:1])[0])
                    tune_blocks(model, reference, plan.batches, tuning)
                errors, error = _errors(model, plan, plan.passes, plan.batches)
    return Conversion((*_rows(plan, errors), *_other_weights(model, plan.layers)), error)


def convert_planned(plan: NetworkPlan, name: str) -> None:
    """Make of one layer what is planned, and fit its thresholds, in place."""
    planned, seen = plan.plans[name], plan.seen(name)
    layer = convert_layer(plan.layers[name], planned.spec)
    if layer.act_alpha is not None and layer.act_quantizer is not None and seen is not None:
        layer.act_alpha.copy_(layer.act_quantizer.fit(seen.values, per_channel=False))
    layer.fit_weight_alpha()
    layer.fixed_bits = layer.fixed_bits or planned.has_own_bits


def _rows(plan: NetworkPlan, errors: Mapping[str, float]) -> Iterator[ConvertedLayer]:
    for name, module in plan.layers.items():
        if name not in plan.plans:
            yield ConvertedLayer(name, type(module).__name__, "float", "float", None, plan.left[name])
            continue
        kind = "Conv2d" if isinstance(module, nn.Conv2d) else "Linear"
        spec = plan.plans[name].spec
        weight = f"{spec.weight_levels}/{spec.weight_bits}" + (", fat" if spec.transform else "")
        if spec.weight_bits == FLOAT_BITS:
            weight = "float"
        elif spec.weight_scale == "max":
            weight = "8 bits"
        taken = "float" if spec.act_bits == FLOAT_BITS else f"{spec.act_levels}/{spec.act_bits}"
        yield ConvertedLayer(name, kind, weight, taken, errors.get(name), plan.plans[name].note)


@contextmanager
def unchanged(
    model: nn.Module, reference: nn.Module | None = None, *, only_if_it_fails: bool = False
) -> Iterator[None]:
    """Put a network back as it was after the block: classes, parameters, buffers, and what modules hold else.

    Args:
        reference: a copy of the network, where values of parameters change too.
        only_if_it_fails: or else leave it as it has become.
    """
    values = () if reference is None else tuple(zip(model.parameters(), reference.parameters(), strict=True))
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    before = [(module, module.__class__, dict(module.__dict__), dict(module._parameters)) for module in model.modules()]
    done = False
    try:
        yield
        done = only_if_it_fails
    finally:
        if not done:
            for module, kind, attributes, parameters in before:
                module.__class__ = kind
                module.__dict__.clear()
                module.__dict__.update(attributes)
                module._parameters.clear()
                module._parameters.update(parameters)
            with torch.no_grad():
                for tensor, value in (*buffers, *values):
                    tensor.copy_(value)


def _errors(
    model: nn.Module, plan: NetworkPlan, passes: Passes, batches: list[Any]
) -> tuple[dict[str, float], float | None]:
    """How far outputs are from the float network's, of the layers and of the network.

    Raises:
        ValueError: a converted layer that does not run as a quantized one.
    """
    compared = tqdm(batches, desc="compare", unit="batch", leave=False, disable=None)
    ran, output = run_quantized(model, get_args(AnyQuantized), compared)
    refuse_idle(model, plan, ran)
    errors = {}
    for name in plan.plans:
        pair = [
            torch.cat([y.flatten().double() for y in ys]) for ys in (passes.layers[name].output, ran[plan.layers[name]])
        ]
        if (error := relative_error(*pair)) is not None:
            errors[name] = error
    whole = None if passes.output is None or output is None else relative_error(passes.output, output)
    return errors, whole


def refuse_idle(model: nn.Module, plan: NetworkPlan, ran: Mapping[nn.Module, Any]) -> None:
    """Raise ``ValueError`` where a layer of the plan did not run as a quantized one."""
    idle = [name for name in plan.plans if plan.layers[name] not in ran]
    if idle:
        raise ValueError(
            f"{type(model).__name__}: layer {', '.join(map(repr, idle[:3]))} would not run as a quantized one, since "
            f"another module reads its weight or calls a forward of its own: leave it float with exclude={idle[:3]}"
        )


def relative_error(y: Tensor, y_q: Tensor) -> float | None:
    """‖y_q − y‖ / ‖y‖; None where the shapes differ or y is 0."""
    if y.shape != y_q.shape or not y.any():
        return None
    return ((y_q - y).norm() / y.norm()).item()


def _tuning(reconstruct: bool | Reconstruction, calibration: Calibration | None) -> Reconstruction | None:
    if not isinstance(reconstruct, bool | Reconstruction):
        raise ValueError(f"reconstruct {reconstruct!r}: choose True, False, or a Reconstruction(steps=…, seed=…)")
    if reconstruct is not False and calibration is None:
        raise ValueError("reconstruct without calibration: give calibration, some hundreds of inputs without labels")
    return Reconstruction() if reconstruct is True else reconstruct or None


def _other_weights(model: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[ConvertedLayer]:
    """Parameters of two or more dimensions that no convolution or linear layer owns."""
    owned = {id(parameter) for module in layers.values() for parameter in module.parameters(recurse=False)}
    for name, parameter in model.named_parameters():
        if id(parameter) not in owned and not isinstance(parameter, nn.UninitializedParameter) and parameter.dim() > 1:
            owner = type(model.get_submodule(name.rpartition(".")[0])).__name__
            yield ConvertedLayer(name, owner, "float", "float", None, "neither a Conv2d's nor a Linear's weight")
