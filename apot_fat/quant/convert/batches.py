"""The inputs that a conversion looks at: read, run and divided."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from apot_fat.text import one_line

Calibration = Tensor | Iterable[Any]
"""A batch; or batches, such as a ``DataLoader``: each a tensor, a tuple or list whose first entry is what the network
takes, or a mapping of its keywords."""


def read_batches(calibration: Calibration) -> list[Any]:
    """The inputs of each batch, read once and kept.

    Raises:
        ValueError: there is none, or one holds nothing, NaN, or an infinity that is no keyword's (which masks may
            have).
    """
    try:
        items = [calibration] if isinstance(calibration, Tensor) else list(calibration)
    except TypeError as error:
        raise ValueError(
            f"calibration {calibration!r}: give a tensor of inputs, or an iterable of batches ({one_line(error)})"
        ) from error
    batches = [item[0] if isinstance(item, tuple | list) else item for item in items]
    if not batches:
        raise ValueError("calibration: no batch; give a tensor of inputs, or an iterable of batches")
    batches = tree_map_only(Tensor, lambda x: x.clone() if x.is_inference() else x, batches)
    for place, batch in enumerate(batches, 1):
        if not count_inputs(batch):
            raise ValueError(f"calibration: batch {place} of {len(batches)} holds no inputs: leave it out")
        for x in floating(batch):
            if x.isnan().any() or (isinstance(batch, Tensor) and x.isinf().any()):
                raise ValueError(f"calibration: batch {place} of {len(batches)} holds NaN or infinity: leave it out")
    return batches


def count_inputs(batch: Any) -> int:
    """How many inputs a batch holds: the length of its first tensor."""
    return next((len(x) for x in tree_leaves(batch) if isinstance(x, Tensor) and x.dim()), 1)


def first_batches(batches: list[Any], inputs: int) -> list[Any]:
    """The first that hold so many inputs between them; all of them where they hold fewer."""
    before = accumulate(map(count_inputs, batches[:-1]), initial=0)
    return [batch for batch, count in zip(batches, before, strict=True) if count < inputs]


def run_batch(model: nn.Module, batch: Any) -> Any:
    """The network's output on a batch.

    Raises:
        ValueError: the network refuses it.
    """
    try:
        return model(**batch) if isinstance(batch, Mapping) else model(batch)
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError) as error:
        shape = f"of shape {tuple(batch.shape)}" if isinstance(batch, Tensor) else f"(a {type(batch).__name__})"
        raise ValueError(
            f"calibration {shape}: the network refuses it ({one_line(error) or type(error).__name__})"
        ) from error


def floating(output: Any) -> list[Tensor]:
    """The floating tensors of what a module gives."""
    return [y for y in tree_leaves(output) if isinstance(y, Tensor) and y.is_floating_point()]


def split_batches(batches: list[Any], size: int) -> list[Any]:
    """The inputs of batches in a random order, ``size`` at a time; batches as they are where that cannot be.

    Batches can be divided if they are tensors, or mappings of tensors, that differ in their first dimension alone.
    """
    keys = [sorted(batch) if isinstance(batch, Mapping) else None for batch in batches]
    columns = [list(batch.values()) if isinstance(batch, Mapping) else [batch] for batch in batches]
    shapes = [[x.shape[1:] if isinstance(x, Tensor) and x.dim() else None for x in column] for column in columns]
    lengths = [{len(x) for x in column if isinstance(x, Tensor) and x.dim()} for column in columns]
    alike = all(k == keys[0] for k in keys) and all(s == shapes[0] for s in shapes)
    if not alike or None in shapes[0] or any(len(length) != 1 for length in lengths):
        return batches

    def divided(tensors: list[Tensor]) -> list[Tensor]:
        return list(torch.cat(tensors)[order.to(tensors[0].device)].tensor_split(math.ceil(len(order) / size)))

    order = torch.randperm(sum(length.pop() for length in lengths))
    if keys[0] is None:
        return divided(batches)
    of_key = {key: divided([batch[key] for batch in batches]) for key in batches[0]}
    return [dict(zip(of_key, values, strict=True)) for values in zip(*of_key.values(), strict=True)]
