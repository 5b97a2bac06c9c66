"""The parts of a network that are tuned one after another, found by its module tree."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from apot_fat.quant.convert.batches import floating, run_batch
from apot_fat.quant.watching import evaluation_mode, watch_inputs, watch_outputs

MOST_LAYERS = 10
"""Layers of a block; a module that holds more is opened. A residual block has 2 to 4, one of a transformer 4 to 7."""

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
"""What a module is called with, by place and by name."""


@dataclass(frozen=True)
class Block:
    """Modules that run one after another: the first takes the block's input, the last gives its output.

    One module that holds several layers, such as a residual block; or a layer and what comes right behind it, such as
    normalisation and activation.

    Args:
        names: of the modules, in the network.
    """

    names: tuple[str, ...]

    @property
    def name(self) -> str:
        """The first module's name."""
        return self.names[0]

    def modules(self, model: nn.Module) -> list[nn.Module]:
        """The modules, of a network that has these names."""
        return [model.get_submodule(name) for name in self.names]

    def run(self, model: nn.Module, inputs: Inputs) -> list[Tensor]:
        """What the block of a network gives: its floating tensors."""
        first, *others = self.modules(model)
        y = first(*inputs[0], **inputs[1])
        for module in others:
            y = module(y)
        return floating(y)

    @torch.no_grad()
    def inputs(self, model: nn.Module, batch: Any) -> Inputs:
        """What the block takes when a network runs on a batch; the network runs no further."""
        reached: list[Inputs] = []

        def stop(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
            reached.append((args, named))
            raise _ReachedError

        handle = self.modules(model)[0].register_forward_pre_hook(stop, with_kwargs=True)
        try:
            run_batch(model, batch)
        except _ReachedError:
            pass
        finally:
            handle.remove()
        return reached[0]


class _ReachedError(Exception):
    # a network has run as far as it had to
    pass


def cloned(inputs: Inputs) -> Inputs:
    """A copy that a block may overwrite."""
    return tree_map_only(Tensor, Tensor.clone, inputs)


@torch.no_grad()
def find_blocks(model: nn.Module, layers: Mapping[str, nn.Module], batch: Any) -> list[Block]:
    """The blocks of a network, in the order in which they run.

    From the network down, a module is a block if it holds no more than ``MOST_LAYERS`` of the layers, runs once and
    gives floating tensors; ``Sequential`` and other containers that hold several are opened, and so is the network
    itself. What remains are single layers.

    Args:
        layers: those to be tuned, by name.
        batch: on which order and number of calls are seen, in evaluation mode.
    """
    names = {module: name for name, module in model.named_modules()}
    calls: dict[nn.Module, int] = {}
    behind: dict[nn.Module, list[nn.Module]] = {layer: [] for layer in layers.values()}
    given: dict[int, tuple[Tensor, nn.Module]] = {}  # outputs at the end of a layer and what is behind it

    def before(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        calls[module] = calls.get(module, 0) + 1
        found = given.pop(id(inputs[0]), None) if inputs and not any(module.children()) else None
        if found is not None and module not in behind:
            behind[found[1]].append(module)
            ends[module] = found[1]

    def after(module: nn.Module, output: Any) -> None:
        if floating(output):
            gives.add(module)
        layer = module if module in behind else ends.pop(module, None)
        if layer is not None and isinstance(output, Tensor):
            given[id(output)] = output, layer

    ends: dict[nn.Module, nn.Module] = {}
    gives: set[nn.Module] = set()  # floating tensors
    with evaluation_mode(model), watch_inputs(names, before), watch_outputs(names, after):
        run_batch(model, batch)

    def find(name: str, module: nn.Module) -> Iterator[Block]:
        within = set(module.modules())
        held = [layer for layer in layers.values() if layer in within]
        if module in behind:
            chain = [module]
            for following in behind[module]:
                if calls[following] > 1:
                    break
                chain.append(following)
            yield Block(tuple(names[one] for one in chain))
        elif held and name and module in gives and _is_block(module, held) and calls.get(module) == 1:
            yield Block((name,))
        elif held:
            for child_name, child in module.named_children():
                yield from find(f"{name}.{child_name}" if name else child_name, child)

    order = {module: place for place, module in enumerate(calls)}
    found = [block for block in find("", model) if calls.get(block.modules(model)[0]) == 1]
    return sorted(found, key=lambda block: order[block.modules(model)[0]])


def _is_block(module: nn.Module, held: list[nn.Module]) -> bool:
    is_container = type(module) in (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    return len(held) == 1 if is_container else len(held) <= MOST_LAYERS
