"""Shapes of a network's input, given with the batch or without; and whether the network takes them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

_BATCHED = 4


def split_batch(input_shape: Sequence[int], *, images: bool = False) -> tuple[int, tuple[int, ...]]:
    """The number of inputs, and the shape of one.

    Args:
        input_shape: (C, H, W) of one image, or (N, C, H, W); else fewer dimensions, those of one input.
        images: allow the first two alone.

    Raises:
        ValueError: another shape.

    >>> split_batch((3, 32, 32)), split_batch([8, 3, 32, 32])
    ((1, (3, 32, 32)), (8, (3, 32, 32)))
    """
    shape = tuple(input_shape)
    fewest = _BATCHED - 1 if images else 1
    if not fewest <= len(shape) <= _BATCHED or not all(isinstance(n, int) and n > 0 for n in shape):
        raise ValueError(f"input_shape {shape}: give (C, H, W) or (N, C, H, W), positive integers, such as (3, 32, 32)")
    return (shape[0], shape[1:]) if len(shape) == _BATCHED else (1, shape)


def zeros_for(model: nn.Module, shape: tuple[int, ...]) -> Tensor:
    """Zeros of a shape, batch included, of a network's own type and on its device."""
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))
    return torch.zeros(shape, dtype=like.dtype, device=like.device)


@torch.no_grad()
def run_on(model: nn.Module, x: Tensor) -> None:
    """Run a network on an input.

    Raises:
        ValueError: it refuses it.
    """
    try:
        model(x)
    except (RuntimeError, ValueError, IndexError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        shape, network = tuple(x.shape), type(model).__name__
        raise ValueError(f"input_shape {shape}: {network} refuses it ({reason}); give that of its images") from error
