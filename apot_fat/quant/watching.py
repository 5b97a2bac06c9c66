"""Looking at what reaches a network's layers in one pass, and leaving the network as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle


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

    with _removed([layer.register_forward_pre_hook(before, with_kwargs=True) for layer in layers]):
        yield


@contextmanager
def watch_outputs(layers: Iterable[nn.Module], look: Callable[[Any, Any], Any]) -> Iterator[None]:
    """Within the block ``look(layer, output)`` is called after every call of one of the layers.

    What it returns, unless None, takes the output's place.
    """
    with _removed([layer.register_forward_hook(lambda layer, _, output: look(layer, output)) for layer in layers]):
        yield


@contextmanager
def _removed(handles: list[RemovableHandle]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
