"""Reconstruction: a quantized network tuned, block by block, to give what the float network gives. No labels.

Legend: B a block, x its input and y its output in the float network, x_q its input behind the quantized blocks before
it; θ the block's weights, thresholds, biases and the scales of its normalisations.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar, get_args

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from tqdm.auto import tqdm

from apot_fat.quant.all_layers import keep_thresholds_positive, threshold_layers
from apot_fat.quant.convert.batches import Calibration, floating, read_batches, run_batch, split_batches
from apot_fat.quant.convert.blocks import Block, Inputs, cloned, find_blocks
from apot_fat.quant.convert.norms import BatchNorm, align_batch_norms, estimate_batch_norms
from apot_fat.quant.layers import AnyQuantized
from apot_fat.quant.watching import evaluation_mode, watch_outputs

_NORMS = (BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
T = TypeVar("T")
_SMALLEST = 1e-3  # size of parameters that are 0


@dataclass(frozen=True)
class Reconstruction:
    """How a quantized network is tuned to give what the float network gives.

    Args:
        steps: of each block alone; 0 leaves that out.
        joint_steps: of all blocks together after that; 0 leaves that out.
        batch_size: inputs a step, where the calibration inputs can be divided.
        drop: share of a block's input values taken from the float network, at random in each step: [0, 1].
        lr, joint_lr: Adam's step at the start, of each parameter relative to its root mean square; falls to 0 as a
            cosine.
        seed: of batches and of the mixing.
        memory: bytes of activations kept while a block is tuned; more are computed again in each step. None is half of
            what is free.

    Raises:
        ValueError: a value out of range.
    """

    steps: int = 150
    joint_steps: int = 1500
    batch_size: int = 32
    drop: float = 0.5
    lr: float = 0.01
    joint_lr: float = 0.006
    seed: int = 0
    memory: int | None = None

    def __post_init__(self) -> None:
        for name, low, high in (
            *(("steps", 0, 1e9), ("joint_steps", 0, 1e9), ("batch_size", 1, 1e9), ("drop", 0, 1)),
            *(("lr", 0, 1), ("joint_lr", 0, 1), ("seed", 0, 2**63), ("memory", 0, math.inf)),
        ):
            value = getattr(self, name)
            if not (name == "memory" and value is None) and not low <= value <= high:
                raise ValueError(f"{name} {value!r}: choose a number from {low} to {high:g}")


@torch.inference_mode(False)
def reconstruct(
    model: nn.Module, reference: nn.Module, calibration: Calibration, options: Reconstruction | None = None
) -> nn.Module:
    """Tune a quantized network, in place, until its blocks give what they give in another network.

    Equation: for each block, in order, minimise over θ the mean of ‖B_θ(x̃) − y‖² / ‖y‖², x̃ equal to x where a random
    mask says so (with probability ``drop``) and to x_q elsewhere; then over all θ together the mean of that over the
    blocks, x̃ = x_q. Weights take the gradients of training (straight-through, as the layer's ``QuantSpec`` says).

    Batch norms work on the statistics of each batch while they are tuned, and then take those of all calibration
    inputs: first γ and β are changed so that this leaves the reference's function as it is. A step that made a block
    worse than it was is undone.

    Args:
        model: the quantized network (``quantize`` does all of this with ``reconstruct=True``).
        reference: the network to come close to: modules of the same names, which need not be quantized.
        calibration: inputs without labels, see ``quantize``.
        options: how; by default ``Reconstruction()``.

    Returns:
        The model, in its own mode.

    Raises:
        ValueError: no quantized layer, or a batch that the network refuses.

    Paper: BRECQ, Li et al., ICLR 2021 (blocks); QDrop, Wei et al., ICLR 2022 (mixed inputs). Theirs learn the rounding
    (AdaRound); here weights and levels move, which measured better with levels that are not uniform.
    """
    if not any(isinstance(module, AnyQuantized) for module in model.modules()):
        raise ValueError(f"{type(model).__name__} holds no quantized layer: quantize it first")
    tune_blocks(model, reference, read_batches(calibration), options or Reconstruction())
    return model


def tune_blocks(model: nn.Module, reference: nn.Module, batches: list[Any], options: Reconstruction) -> None:
    """``reconstruct``, of batches already read."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, AnyQuantized)}
    with (
        _random_numbers(options.seed),
        torch.enable_grad(),
        evaluation_mode(model),
        evaluation_mode(reference),
        _tunable(model),
    ):
        parts = split_batches(batches, options.batch_size)
        blocks = find_blocks(model, layers, parts[0])
        norms = align_batch_norms(model, reference, parts)
        with tqdm(unit="step", leave=False, disable=None) as bar:
            tuner = _Tuner(model, reference, parts, norms, options, bar)
            tuner.estimate_norms()
            tuner.tune(blocks)
    keep_thresholds_positive(model)


class _Kept(Generic[T]):
    """A value for each part of the inputs, kept if all of them fit into memory, else computed again each time."""

    def __init__(self, compute: Callable[[int], T], parts: int, memory: int) -> None:
        self.compute = compute
        first = compute(0)
        size = sum(x.numel() * x.element_size() for x in tree_leaves(first) if isinstance(x, Tensor))
        self.fits = size * parts <= memory
        self.kept = {0: first} if self.fits else {}

    def __getitem__(self, place: int) -> T:
        if place in self.kept:
            return self.kept[place]
        value = self.compute(place)
        if self.fits:
            self.kept[place] = value
        return value


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    names = getattr(os, "sysconf_names", {})
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if "SC_AVPHYS_PAGES" in names else 4 << 30


class _Tuner:
    """Tunes the blocks of a network to give what those of the reference give, on the parts of the inputs."""

    def __init__(
        self,
        model: nn.Module,
        reference: nn.Module,
        parts: list[Any],
        norms: list[BatchNorm],
        options: Reconstruction,
        bar: tqdm[Any],
    ) -> None:
        self.model, self.reference, self.parts, self.norms = model, reference, parts, norms
        self.options, self.bar = options, bar

    def tune(self, blocks: list[Block]) -> None:
        """Each block alone, then all together."""
        options = self.options
        with_thresholds = {layer for _, layer in threshold_layers(self.model)}
        low = [block for block in blocks if not with_thresholds.isdisjoint(self._within(block))]
        self.bar.total = len(low) * options.steps + len(blocks) * options.joint_steps
        if options.steps:
            for place, block in enumerate(low):
                self.bar.set_description(f"block {place + 1} of {len(low)}, {block.name}")
                self._tune_block(block)
        if options.joint_steps:
            self.bar.set_description("all blocks together")
            self._tune_together(blocks)

    def _within(self, block: Block) -> set[nn.Module]:
        return {part for module in block.modules(self.model) for part in module.modules()}

    def _tune_block(self, block: Block) -> None:
        kept = self._kept(partial(self._around, block))
        within = self._within(block)
        norms = [norm for norm in self.norms if norm in within]

        def loss(place: int) -> Tensor:
            inputs, exact, target = kept[place]
            return _distance(block.run(self.model, _mixed(inputs, exact, self.options.drop)), target)

        def error() -> float:
            estimate_batch_norms(norms, lambda place: block.run(self.model, cloned(kept[place][0])), len(self.parts))
            given = (block.run(self.model, cloned(kept[place][0])) for place in range(len(self.parts)))
            return sum(_distance(y, kept[place][2]).item() for place, y in enumerate(given))

        self._minimize(loss, error, within, norms, self.options.steps, self.options.lr, 1)

    @torch.no_grad()
    def _around(self, block: Block, place: int) -> tuple[Inputs, Inputs, list[Tensor]]:
        # what it takes behind the quantized blocks and behind those of the reference, and what it gives there
        part = self.parts[place]
        quantized, exact = block.inputs(self.model, part), block.inputs(self.reference, part)
        return quantized, exact, block.run(self.reference, cloned(exact))

    def _kept(self, compute: Callable[[int], T]) -> _Kept[T]:
        memory = self.options.memory
        device = next(self.model.parameters()).device
        return _Kept(compute, len(self.parts), _free_memory(device) // 2 if memory is None else memory)

    def _tune_together(self, blocks: list[Block]) -> None:
        def outputs(network: nn.Module, place: int) -> list[list[Tensor]]:
            given: dict[nn.Module, list[Tensor]] = {}
            last = [block.modules(network)[-1] for block in blocks]
            with watch_outputs(last, lambda module, y: given.update({module: floating(y)})):
                run_batch(network, self.parts[place])
            return [given[module] for module in last]

        def loss(place: int) -> Tensor:
            pairs = zip(outputs(self.model, place), targets[place], strict=True)
            return torch.stack([_distance(y, target) for y, target in pairs]).mean()

        targets = self._kept(torch.no_grad()(partial(outputs, self.reference)))

        def error() -> float:
            self.estimate_norms()
            return sum(loss(place).item() for place in range(len(self.parts)))

        within = set(self.model.modules())
        self._minimize(loss, error, within, self.norms, self.options.joint_steps, self.options.joint_lr, len(blocks))

    def estimate_norms(self) -> None:
        """Give the batch norms the statistics of all inputs in the quantized network."""
        estimate_batch_norms(self.norms, lambda place: run_batch(self.model, self.parts[place]), len(self.parts))

    def _minimize(
        self,
        loss: Callable[[int], Tensor],
        error: Callable[[], float],
        within: set[nn.Module],
        norms: list[BatchNorm],
        steps: int,
        lr: float,
        cost: int,
    ) -> None:
        """Adam on the modules' parameters, its step falling as a cosine; undone where ``error`` has grown."""
        modules = [module for module in self.model.modules() if module in within]
        parameters = list(dict.fromkeys(p for module in modules for p in _tuned(module)))
        with torch.no_grad():
            before, worst = [p.clone() for p in parameters], error()
            sizes = parameter_sizes(parameters)
        groups = [{"params": [p], "lr": lr * size} for p, size in zip(parameters, sizes, strict=True)]
        optimizer = torch.optim.Adam(groups, fused=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1 + math.cos(math.pi * step / steps)) / 2)
        for norm in norms:
            norm.train()
        order: list[int] = []
        for _ in range(steps):
            order = order or torch.randperm(len(self.parts)).tolist()
            distance = loss(order.pop())
            if not distance.requires_grad:  # the network runs it without gradients
                break
            optimizer.zero_grad()
            distance.backward()
            optimizer.step()
            schedule.step()
            self.bar.update(cost)
        with torch.no_grad():
            if not error() <= worst:  # NaN too
                for p, value in zip(parameters, before, strict=True):
                    p.copy_(value)
                error()


def parameter_sizes(parameters: Sequence[Tensor]) -> list[float]:
    """The root mean square of each, at least ``_SMALLEST`` (a bias of zeros); read back from the device once."""
    return torch.stack([p.detach().float().square().mean().sqrt() for p in parameters]).clamp(min=_SMALLEST).tolist()


def _mixed(inputs: Inputs, exact: Inputs, share: float) -> Inputs:
    # a copy of inputs, with that share of the values of floating tensors taken from exact
    def mix(x: Any, other: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        if not x.is_floating_point() or not isinstance(other, Tensor) or x.shape != other.shape:
            return x.clone()
        return torch.where(torch.rand(x.shape, device=x.device) < share, other, x)

    return tree_map(mix, inputs, exact)


def _distance(given: list[Tensor], target: list[Tensor]) -> Tensor:
    # ‖y_q − y‖² / ‖y‖² over the outputs that have one shape in both
    pairs = [(y, t) for y, t in zip(given, target, strict=False) if y.shape == t.shape]
    noise = torch.stack([(y.float() - t.float()).square().sum() for y, t in pairs]).sum()
    return noise / torch.stack([t.float().square().sum() for _, t in pairs]).sum().clamp(min=1e-12)


def _tuned(module: nn.Module) -> list[nn.Parameter]:
    # the parameters of one module, not of those within it, that are tuned
    if not isinstance(module, get_args(AnyQuantized) + _NORMS):
        return []
    own = dict(module.named_parameters(recurse=False))
    if isinstance(module, AnyQuantized) and not module.spec.weight_alpha_learned:
        own.pop("weight_alpha", None)
    return list(own.values())


@contextmanager
def _tunable(model: nn.Module) -> Iterator[None]:
    # gradients for what is tuned and for nothing else; then those, and counts of training steps, as they were
    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    norms = [module for module in model.modules() if isinstance(module, BatchNorm)]
    counts = [(count, count.clone()) for norm in norms if (count := norm.num_batches_tracked) is not None]
    tuned = {p for module in model.modules() for p in _tuned(module)}
    for p, _, _ in before:
        p.requires_grad_(p in tuned)
        p.grad = None
    try:
        yield
    finally:
        for p, required, grad in before:
            p.requires_grad_(required)
            p.grad = grad
        for count, value in counts:
            count.copy_(value)


@contextmanager
def _random_numbers(seed: int) -> Iterator[None]:
    # of this seed within; then those that were to come
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield
