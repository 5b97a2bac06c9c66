"""What is read from a file, made plain before anything looks at it: no surprise is left in its nesting or tensors."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

DEEPEST = 100
"""Levels of nesting that are read: far more than any file of ours or published has."""
MOST_VALUES = 10_000_000
"""Values that are read, a tensor counted as one: lists that hold one another many times stand for more than memory."""


def plain(content: Any, where: str) -> Any:
    """A copy of dicts, lists, tuples and sets as Python's own kinds, and of tensors without attributes or gradient.

    Args:
        content: tensors and plain values, nested.
        where: what errors call it.

    Raises:
        ValueError: more than ``DEEPEST`` levels or ``MOST_VALUES`` values, or a tensor that does not hold each of its
            values in memory; names the place.
    """
    return _plain(content, (where,), count(1))


def missing_values(tensor: Tensor) -> str | None:
    """What keeps a tensor from holding its values, as words; None where it does hold them."""
    if tensor.is_nested or tensor.layout != torch.strided:
        return "sparse or ragged"
    if tensor.is_meta:
        return "without values (meta)"
    return "quantized by PyTorch" if tensor.is_quantized else None


def is_expanded(tensor: Tensor) -> bool:
    """Whether a dense tensor's shape has more values than its memory: ``expand`` makes billions of one."""
    return tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size()


def _plain(value: Any, place: tuple[Any, ...], counter: Iterator[int]) -> Any:
    if next(counter) > MOST_VALUES:
        raise ValueError(f"{place[0]}: holds more than {MOST_VALUES:,} values; the file is damaged, take another")
    if isinstance(value, Tensor):
        return _plain_tensor(value, place)
    if not isinstance(value, dict | list | set) and type(value) is not tuple:
        return value
    if len(place) > DEEPEST:
        raise ValueError(f"{place[0]}: nested more than {DEEPEST} levels deep; the file is damaged, take another")
    if isinstance(value, dict):
        items = dict.items(value)  # an instance may have attributes in place of its methods
        return {_plain(key, (*place, "key"), counter): _plain(item, (*place, key), counter) for key, item in items}
    if isinstance(value, set):
        return {_plain(item, place, counter) for item in value}
    copied = [_plain(item, (*place, index), counter) for index, item in enumerate(value)]
    return copied if isinstance(value, list) else tuple(copied)


def _plain_tensor(tensor: Tensor, place: tuple[Any, ...]) -> Tensor:
    what = missing_values(tensor) if type(tensor) in (Tensor, nn.Parameter) else f"of class {type(tensor).__name__}"
    if what is None and is_expanded(tensor):
        what = f"expanded to {tuple(tensor.shape)} from fewer values"
    if what is not None:
        name = ".".join(f"{part!s:.80}" for part in place[1:])
        raise ValueError(f"{place[0]}: {name}: a tensor {what}; expected one that holds each of its values in memory")
    return tensor.detach().resolve_conj().resolve_neg()
