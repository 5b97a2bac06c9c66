"""Single layers: forward and every gradient."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from apot_fat.gpu_check.check import FAILED, OK, Check, Found, Item
from apot_fat.package_files import PACKAGE
from apot_fat.quant.layers import QuantConv2d, QuantLinear
from apot_fat.quant.spec import EIGHT_BIT, PRESETS, QuantSpec, preset
from apot_fat.training.compile import compile_network
from apot_fat.training.device import set_numerics

MODES = ("off", "quantizers", "model")
CASE_BITS = (2, 3, 4, 5)
FIXTURE_LIMIT, RANDOM_LIMIT = 1e-5, 1e-4
"""Largest relative error; against float64 sums of many summands lose a digit more."""
SMALL, LARGE = (2, 4, 8, 8), (4, 4, 128, 128)
"""Inputs of the fixtures; and one so large that a layer keeps one byte a value of it for backward."""


class Case(NamedTuple):
    """A layer, what it is given, and what may come out as ``y``, ``grad_x``, ``grad_weight``, …

    The fixtures were computed in float32, and where a sum cancels they are off by 8e-6 themselves: what float64 gives
    is right too.
    """

    name: str
    layer: nn.Module
    x: Tensor
    grad_out: Tensor
    wanted: dict[str, list[Tensor]]


def check_layers(check: Check) -> Iterator[Item]:
    """Every variant beside its fixtures, or where they are not beside float64 on the CPU; and large random inputs.

    Without compilation, with compiled quantizers, and whole layers compiled; float32 throughout.
    """
    set_numerics("deterministic", check.device)
    path = fixtures()
    if path is None or check.quick:
        small, names, source, limit = random_cases, list(PRESETS), "random", RANDOM_LIMIT
    else:
        arrays = dict(np.load(path))
        small, source, limit = partial(fixture_cases, arrays), "fixtures", FIXTURE_LIMIT
        names = list(dict.fromkeys(key.split("/")[0] for key in arrays))
    if check.quick:
        yield "apot-cifar, random, compile off", lambda: compare(small("apot-cifar"), "off", check.device, limit)
        return
    for mode in MODES:
        for name in names:

            def measure(mode: str = mode, name: str = name) -> Found:
                return compare(small(name), mode, check.device, limit)

            yield f"{name}, {source}, compile {mode}", measure
    for mode in MODES:

        def measure_large(mode: str = mode) -> Found:
            cases = [random_case(name, preset(name, bits=4), LARGE) for name in PRESETS]
            return compare(cases, mode, check.device, RANDOM_LIMIT)

        yield f"all presets, 4 bits, random {LARGE}, compile {mode}", measure_large


def fixtures() -> Path | None:
    """``layers.npz``, where the reference data lies; None without."""
    folders = [Path(os.environ.get("APOT_FAT_REFERENCE", "")), PACKAGE.parents[1] / "shared", PACKAGE.parent / "shared"]
    paths = [folder / "reference" / "layers.npz" for folder in folders]
    return next((path for path in paths if path.is_file()), None)


def fixture_cases(arrays: dict[str, np.ndarray], name: str) -> list[Case]:
    """The cases of a variant, a seed and bit-width each; all of the same shapes."""
    groups: dict[str, dict[str, Tensor]] = {}
    for key, values in arrays.items():
        if key.startswith(f"{name}/"):
            place, array = key.rsplit("/", 1)
            groups.setdefault(place, {})[array] = torch.from_numpy(values)
    cases = []
    for place, given in groups.items():
        layer = _fixture_layer(name, place)
        layer.load_state_dict({key: given[key] for key in layer.state_dict()})
        inputs = {"x", "grad_out", *layer.state_dict()}
        case = Case(place, layer, given["x"], given["grad_out"], {})
        exact = _in_float64(case)
        for key in given.keys() - inputs:
            case.wanted[key] = [given[key], *([exact[key]] if key in exact else [])]
        cases.append(case)
    return cases


def _fixture_layer(name: str, place: str) -> nn.Module:
    if name == "first-conv":
        return QuantConv2d(3, 8, 3, padding=1, spec=EIGHT_BIT)
    if name == "last-fc":
        return QuantLinear(16, 10, spec=EIGHT_BIT)
    options = {"grad_scale": 0.05} if name.endswith("-gradscale") else {}
    base = name.removesuffix("-gradscale").removesuffix("-signed")
    return QuantConv2d(4, 6, 3, padding=1, spec=preset(base, bits=int(place.split("/bit")[1][0]), **options))


def random_cases(name: str) -> list[Case]:
    """Cases of a preset, one a bit-width."""
    return [random_case(name, preset(name, bits=bits), SMALL) for bits in CASE_BITS]


@cache
def random_case(name: str, spec: QuantSpec, shape: tuple[int, ...]) -> Case:
    """Random operands, and what float64 makes of them on the CPU; rounding decides none."""
    generator = torch.Generator().manual_seed(0)
    while True:
        layer = QuantConv2d(shape[1], 6, 3, padding=1, spec=spec)
        with torch.no_grad():
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) / 6)
            if spec.weight_alpha is None:
                layer.set_weight_alpha_from_step()
        x = 1.3 * spec.act_alpha * torch.rand(*shape[:2], 8, 8, generator=generator)
        x = x.repeat(1, 1, shape[2] // 8, shape[3] // 8)  # of too many values one lies at a threshold
        case = Case(f"{name}, {spec.weight_bits} bits", layer, x, torch.randn(shape[0], 6, *shape[2:]), {})
        exact, shaken = _in_float64(case), _in_float64(case, shake=5e-7)
        if max(_relative_error(shaken[key], value) for key, value in exact.items()) < RANDOM_LIMIT / 10:
            return case._replace(wanted={key: [value] for key, value in exact.items()})


def _in_float64(case: Case, shake: float = 0.0) -> dict[str, Tensor]:
    def shaken(tensor: Tensor) -> Tensor:
        return tensor * (1 + shake * (2 * torch.rand_like(tensor) - 1))

    layer = copy.deepcopy(case.layer).double()
    with torch.no_grad():
        layer.weight.copy_(shaken(layer.weight))  # type: ignore[operator, arg-type]
    x = shaken(case.x.double()).requires_grad_()
    y = layer(x)
    y.backward(case.grad_out.double())
    return _outcome(layer, y, x.grad)


def _outcome(layer: nn.Module, y: Tensor, grad_x: Tensor | None) -> dict[str, Tensor]:
    assert grad_x is not None
    grads = {f"grad_{name}": p.grad for name, p in layer.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "grad_x": grad_x, **grads}


class _SideBySide(nn.Module):
    # layers that each take their part of a tensor: compiled they are one graph

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([layer(part) for layer, part in zip(self.layers, x, strict=True)])


def compare(cases: Sequence[Case], mode: str, device: torch.device, limit: float) -> Found:
    """The largest relative error of any output and gradient of the layers, run side by side on a device.

    Args:
        cases: of inputs of one shape.
        mode: as ``compile_network`` takes it.
        device: where.
        limit: an error from this on is a failure.
    """
    side = _SideBySide([copy.deepcopy(case.layer) for case in cases]).to(device)
    side.to(memory_format=torch.channels_last)
    network = compile_network(side, mode, device)
    x = torch.stack([case.x for case in cases]).to(device)
    if x.dim() == 5:  # in the memory format of training
        x = x.movedim(2, -1).contiguous().movedim(-1, 2)
    x.requires_grad_()
    grad_out = torch.stack([case.grad_out for case in cases]).to(device)
    for _ in range(3):  # the third time a CUDA graph is replayed
        side.zero_grad(set_to_none=True)
        x.grad = None
        y = network(x)
        y.backward(grad_out)
    assert x.grad is not None
    worst = (0.0, "")
    for case, layer, part, of_y, of_x in zip(cases, side.layers, x.detach(), y, x.grad, strict=True):
        got = _outcome(layer, of_y, of_x)
        if mode != "model" and isinstance(layer, QuantConv2d):
            got |= {"weight_q": layer.quantized_weight().detach(), "act_q": layer.quantized_input(part)}
        for name in case.wanted.keys() & got.keys():
            error = min(_relative_error(got[name].cpu(), value) for value in case.wanted[name])
            worst = max(worst, (error, f"{case.name} {name}"))
    verdict = OK if worst[0] < limit else FAILED
    return Found(f"{worst[0]:.1e} ({worst[1]})", f"< {limit:.0e}", verdict, {"error": worst[0]})


def _relative_error(got: Tensor, wanted: Tensor) -> float:
    error = (got.double() - wanted.double()).abs().max() / wanted.double().abs().max().clamp(min=1e-30)
    return error.nan_to_num(nan=torch.inf).item()
