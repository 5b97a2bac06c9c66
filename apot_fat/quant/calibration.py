"""Looking at a network on a few inputs: what reaches each layer, in which order, and what it gives."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from apot_fat.quant.sampling import sample
from apot_fat.quant.thresholds import FIT_SAMPLES
from apot_fat.quant.watching import evaluation_mode, watch_inputs, watch_outputs
from apot_fat.text import one_line

_OUTPUT_SAMPLES = 1 << 14

Calibration = Tensor | Iterable[Any]
"""A batch; or batches, such as a ``DataLoader``: each a tensor, a tuple or list whose first entry is what the network
takes, or a mapping of its keywords."""


@dataclass
class Seen:
    """A layer on the calibration inputs.

    Args:
        lowest: smallest value of its input.
        values: of its input, about ``FIT_SAMPLES`` taken at random.
        output: of its first call on each batch, some values at places that depend on their number alone.
    """

    lowest: float
    values: Tensor
    output: list[Tensor] = field(default_factory=list)


@dataclass
class Passes:
    """A network on the calibration inputs.

    Args:
        layers: in the order of their first calls.
        output: some values of its outputs, or None where there are none.
        norms: mean and variance of each channel before each batch norm, on the first batch.
    """

    layers: dict[str, Seen]
    output: Tensor | None
    norms: dict[nn.Module, tuple[Tensor, Tensor]]


def read_batches(calibration: Calibration) -> list[Any]:
    """The inputs of each batch, read once and kept.

    Raises:
        ValueError: there is none.
    """
    items = [calibration] if isinstance(calibration, Tensor) else list(calibration)
    batches = [item[0] if isinstance(item, tuple | list) else item for item in items]
    if not batches:
        raise ValueError("calibration: no batch; give a tensor of inputs, or an iterable of batches")
    return batches


def run_batch(model: nn.Module, batch: Any) -> Any:
    """The network's output on a batch.

    Raises:
        ValueError: the network refuses it.
    """
    try:
        return model(**batch) if isinstance(batch, Mapping) else model(batch)
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
        shape = f"of shape {tuple(batch.shape)}" if isinstance(batch, Tensor) else f"(a {type(batch).__name__})"
        raise ValueError(f"calibration {shape}: the network refuses it ({one_line(error)})") from error


@torch.no_grad()
def watch_layers(model: nn.Module, layers: Mapping[str, nn.Module], batches: list[Any]) -> Passes:
    """What the layers take and give, in evaluation mode."""
    seen: dict[str, Seen] = {}
    names = {id(module): name for name, module in layers.items()}

    def note(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        x = inputs[0] if inputs else None
        if not isinstance(x, Tensor) or not x.numel():
            return
        x = F.relu(x) if getattr(module, "relu", False) else x
        values, lowest, name = sample(x, FIT_SAMPLES).float(), x.min().item(), names[id(module)]
        before = seen.get(name)
        if before is None:
            seen[name] = Seen(lowest, values)
        else:
            before.lowest, before.values = min(lowest, before.lowest), torch.cat([before.values, values])

    outputs = []
    norms: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def note_statistics(norm: nn.Module, inputs: tuple[Any, ...]) -> None:
        norms.setdefault(norm, _statistics(inputs[0]))

    with (
        evaluation_mode(model),
        watch_inputs(layers.values(), note),
        watch_inputs(_batch_norms(model), note_statistics),
    ):
        for batch in batches:
            given: dict[str, Tensor] = {}

            def note_output(module: nn.Module, output: Any, given: dict[str, Tensor] = given) -> None:
                if names[id(module)] not in given and isinstance(output, Tensor):
                    given[names[id(module)]] = sample(output, _OUTPUT_SAMPLES).clone()

            with watch_outputs(layers.values(), note_output):
                outputs.append(_some_of(run_batch(model, batch)))
            for name, output in given.items():
                if name in seen:
                    seen[name].output.append(output)
    for layer in seen.values():
        layer.values = sample(layer.values, FIT_SAMPLES)
    return Passes(seen, _joined(outputs), norms)


@torch.no_grad()
def move_batch_norms(model: nn.Module, before: Mapping[nn.Module, tuple[Tensor, Tensor]], batch: Any) -> None:
    """Move the statistics of batch norms by as much as quantization moved what reaches them, in place.

    Equation: running_mean ← running_mean + m_q − m, running_var ← running_var · v_q / v of each channel on the batch.
    In one pass: each norm is moved as it is reached, so that what follows sees it moved.

    Args:
        model: the converted network.
        before: m and v of the float network on the same batch.
        batch: the batch.
    """
    waiting = dict(before)

    def move(norm: nn.Module, inputs: tuple[Any, ...]) -> None:
        if norm not in waiting:
            return
        assert isinstance(norm.running_mean, Tensor)
        assert isinstance(norm.running_var, Tensor)
        mean, variance = waiting.pop(norm)
        mean_q, variance_q = _statistics(inputs[0])
        norm.running_mean += mean_q - mean
        norm.running_var *= torch.where((variance > 0) & (variance_q > 0), variance_q / variance, 1)

    with evaluation_mode(model), watch_inputs(before, move):
        run_batch(model, batch)


def _batch_norms(model: nn.Module) -> list[nn.Module]:
    # those that use statistics in evaluation
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    return [norm for norm in norms if norm.running_mean is not None]


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    values_CN = x.detach().float().transpose(0, 1).flatten(1)
    return values_CN.mean(1), values_CN.var(1, correction=0)


@torch.no_grad()
def run_quantized(
    model: nn.Module, kinds: tuple[type[nn.Module], ...], batches: list[Any]
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
                outputs.append(_some_of(run_batch(model, batch)))
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


def _some_of(output: Any) -> list[Tensor]:
    return [y.detach() for y in tree_leaves(output) if isinstance(y, Tensor) and y.is_floating_point()]


def _joined(outputs: list[list[Tensor]]) -> Tensor | None:
    parts = [sample(y, 1 << 18).double() for one in outputs for y in one if y.numel()]
    return torch.cat(parts) if parts else None
