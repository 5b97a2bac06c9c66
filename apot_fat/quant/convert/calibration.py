"""Looking at a network on a few inputs: what reaches each layer, in which order, and what it gives."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from tqdm.auto import tqdm

from apot_fat.quant.convert.batches import first_batches, floating, run_batch
from apot_fat.quant.convert.norms import Statistics, batch_norms, channel_statistics
from apot_fat.quant.fitting import FIT_SAMPLES
from apot_fat.quant.sampling import sample
from apot_fat.quant.watching import evaluation_mode, watch_inputs, watch_outputs

NORM_INPUTS = 64
"""Calibration inputs that batch norms are moved by, or the first batch where that holds more."""
_OUTPUT_SAMPLES = 1 << 14


@dataclass
class Seen:
    """A layer on the calibration inputs.

    Args:
        lowest: smallest value of its input.
        values: of its input, about ``FIT_SAMPLES`` taken at random.
        count: how many values its input has.
        output: of its first call on each batch, some values at places that depend on their number alone.
    """

    lowest: float
    values: Tensor
    count: int
    output: list[Tensor] = field(default_factory=list)


@dataclass
class Passes:
    """A network on the calibration inputs.

    Args:
        layers: in the order of their first calls.
        output: some values of its outputs, or None where there are none.
        norms: statistics of what reaches each batch norm, one mapping for each of the first batches.
    """

    layers: dict[str, Seen]
    output: Tensor | None
    norms: list[dict[nn.Module, Statistics]]


@torch.no_grad()
def watch_layers(model: nn.Module, layers: Mapping[str, nn.Module], batches: list[Any]) -> Passes:
    """What the layers take and give, in evaluation mode.

    Raises:
        ValueError: the network refuses a batch, or computes NaN or infinity on it.
    """
    seen: dict[str, Seen] = {}
    names = {id(module): name for name, module in layers.items()}

    def note(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        x = inputs[0] if inputs else None
        if not isinstance(x, Tensor) or not x.numel():
            return
        x = F.relu(x) if getattr(module, "relu", False) else x
        values, name = sample(x, FIT_SAMPLES).float(), names[id(module)]
        lowest, highest = torch.stack(x.aminmax()).tolist()
        if not (math.isfinite(lowest) and math.isfinite(highest)):
            broken.append(f"layer {name!r} takes")
        before = seen.get(name)
        if before is None:
            seen[name] = Seen(lowest, values, x.numel())
        else:
            before.count += x.numel()
            before.lowest, before.values = min(lowest, before.lowest), torch.cat([before.values, values])

    outputs = []
    broken: list[str] = []
    norms: list[dict[nn.Module, Statistics]] = [{} for _ in first_batches(batches, NORM_INPUTS)]

    def note_statistics(norm: nn.Module, inputs: tuple[Any, ...]) -> None:
        if place <= len(norms):
            norms[place - 1].setdefault(norm, channel_statistics(inputs[0]))

    with (
        evaluation_mode(model),
        watch_inputs(layers.values(), note),
        watch_inputs(batch_norms(model), note_statistics),
    ):
        for place, batch in enumerate(tqdm(batches, desc="calibrate", unit="batch", leave=False, disable=None), 1):
            given: dict[str, Tensor] = {}

            def note_output(module: nn.Module, output: Any, given: dict[str, Tensor] = given) -> None:
                if names[id(module)] not in given and isinstance(output, Tensor):
                    given[names[id(module)]] = sample(output, _OUTPUT_SAMPLES).clone()

            with watch_outputs(layers.values(), note_output):
                outputs.append(floating(run_batch(model, batch)))
            if any(y.isnan().any() for y in outputs[-1]):
                broken.append("it gives")
            if broken:
                raise ValueError(
                    f"{type(model).__name__}: {broken[0]} NaN or infinity on batch {place} of {len(batches)} of "
                    "calibration, before anything is quantized: mend its weights, or leave the batch out"
                )
            for name, output in given.items():
                if name in seen:
                    seen[name].output.append(output)
    for layer in seen.values():
        layer.values = sample(layer.values, FIT_SAMPLES)
    return Passes(seen, _joined(outputs), norms)


@torch.no_grad()
def run_quantized(
    model: nn.Module, kinds: tuple[type[nn.Module], ...], batches: Iterable[Any]
) -> tuple[dict[nn.Module, list[Tensor]], Tensor | None]:
    """What the quantized layers give, in evaluation mode, and some of the network's outputs.

    No hook is set: attention has a path of its own without them, which reads weights and calls no layer. A layer that
    is not there did not run as a quantized one.

    Args:
        kinds: the classes of quantized layers.
    """
    ran: dict[nn.Module, list[Tensor]] = {}
    outputs = []
    forwards = {kind: kind.forward for kind in kinds}

    def noting(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def noted(layer: nn.Module, *args: Any, **keywords: Any) -> Tensor:
            y = forward(layer, *args, **keywords)
            called.setdefault(layer, sample(y, _OUTPUT_SAMPLES).clone())
            return y

        return noted

    try:
        for kind, forward in forwards.items():
            kind.forward = noting(forward)
        with evaluation_mode(model):
            for batch in batches:
                called: dict[nn.Module, Tensor] = {}
                outputs.append(floating(run_batch(model, batch)))
                for layer, y in called.items():
                    ran.setdefault(layer, []).append(y)
    finally:
        for kind, forward in forwards.items():
            kind.forward = forward
    return ran, _joined(outputs)


def first_and_last(model: nn.Module, layers: Mapping[str, nn.Module], batch: Any) -> tuple[set[str], set[str]] | None:
    """The layers that no layer comes before, and those that none comes after; None where that does not show.

    A network may have several stems and heads. Found by autograd: each layer's output is marked, and the marks behind
    each layer's input are those before it.
    """
    few = batch[:2] if isinstance(batch, Tensor) else batch
    names = {id(module): name for name, module in layers.items()}
    before: dict[str, set[str]] = {}
    anchor = torch.zeros((), requires_grad=True)

    def look(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        found = before.setdefault(names[id(module)], set())
        for x in tree_leaves(inputs):
            if isinstance(x, Tensor):
                found |= _marks_behind(x)

    def mark(module: nn.Module, output: Any) -> Any:
        return _Mark.apply(output, anchor, names[id(module)]) if isinstance(output, Tensor) else None

    with (
        torch.enable_grad(),
        evaluation_mode(model),
        watch_inputs(layers.values(), look),
        watch_outputs(layers.values(), mark),
    ):
        run_batch(model, few)
    first = {name for name, marks in before.items() if not marks}
    last = before.keys() - set().union(*before.values())
    # a network, or a part of it, that runs without gradients shows layers with none before and none after
    return None if first & last and len(before) > 1 else (first, last)


def _marks_behind(x: Tensor) -> set[str]:
    found: set[str] = set()
    visited: set[Any] = set()
    waiting = [x.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in visited:
            continue
        visited.add(node)
        name = getattr(node, "layer_name", None)
        if name is not None:
            found.add(name)
        else:
            waiting += [following for following, _ in node.next_functions]
    return found


class _Mark(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, anchor: Tensor, name: str) -> Tensor:
        ctx.layer_name = name
        return y.clone()  # an activation after it may work in place

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        raise NotImplementedError


def _joined(outputs: list[list[Tensor]]) -> Tensor | None:
    parts = [sample(y, 1 << 18).double() for one in outputs for y in one if y.numel()]
    return torch.cat(parts) if parts else None
