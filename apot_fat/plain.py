"""What is read from a file, made plain before anything looks at it: no surprise is left in its nesting or tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

DEEPEST = 100
"""Levels of nesting that are read: far more than any file of ours or published has."""
MOST_VALUES = 10_000_000
"""Values that are read, a tensor counted as one: lists that hold one another many times stand for more than memory."""
_LEAVES = frozenset({str, int, float, bool, bytes, type(None)})


def plain(content: Any, where: str) -> Any:
    """A copy of dicts, lists, tuples and sets as Python's own kinds, and of tensors without attributes or gradient.

    Args:
        content: tensors and plain values, nested.
        where: what errors call it.

    Raises:
        ValueError: more than ``DEEPEST`` levels or ``MOST_VALUES`` values, or a tensor that does not hold each of its
            values in memory; names the place.
    """
    return _Copier().copy(content, (where,))


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


class _Copier:
    def __init__(self) -> None:
        self.values = 0

    def copy(self, value: Any, place: tuple[Any, ...]) -> Any:
        if type(value) in _LEAVES:
            return value
        if isinstance(value, Tensor):
            return _plain_tensor(value, place)
        if not isinstance(value, dict | list | set) and type(value) is not tuple:
            return value
        self.values += len(value)
        if self.values > MOST_VALUES:
            raise ValueError(f"{place[0]}: holds more than {MOST_VALUES:,} values; the file is damaged, take another")
        if len(place) > DEEPEST:
            raise ValueError(f"{place[0]}: nested more than {DEEPEST} levels deep; the file is damaged, take another")
        if isinstance(value, dict):
            items = dict.items(value)  # an instance may have attributes in place of its methods
            return {self.copy(key, (*place, "key")): self.copy(item, (*place, key)) for key, item in items}
        if isinstance(value, set):
            return {self.copy(item, (*place, "item")) for item in value}
        copied = [self.copy(item, (*place, index)) for index, item in enumerate(value)]
        return copied if isinstance(value, list) else tuple(copied)


def _plain_tensor(tensor: Tensor, place: tuple[Any, ...]) -> Tensor:
    what = missing_values(tensor) if type(tensor) in (Tensor, nn.Parameter) else f"of class {type(tensor).__name__}"
    if what is None and is_expanded(tensor):
        what = f"expanded to {tuple(tensor.shape)} from fewer values"
    if what is not None:
        name = ".".join(f"{part!s:.80}" for part in place[1:])
        raise ValueError(f"{place[0]}: {name}: a tensor {what}; expected one that holds each of its values in memory")
    return tensor.detach().resolve_conj().resolve_neg()
