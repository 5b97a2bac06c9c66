"""Looking at what reaches a network's layers in one pass, and leaving the network as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode within the block; each module then has its own mode again, frozen batch norms too."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def watch_inputs(layers: Iterable[nn.Module], look: Callable[[Any, tuple[Any, ...]], None]) -> Iterator[None]:
    """Within the block ``look(layer, inputs)`` is called before every call of one of the layers.

    Inputs given by name follow those given by place.
    """

    def before(layer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        look(layer, (*inputs, *named.values()))

    handles = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
