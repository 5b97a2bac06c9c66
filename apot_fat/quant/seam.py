"""What quantizers and layers ask for that may be had faster, and how it is done plainly.

They ask ``seam.speed``: ``Plain``, until ``apot_fat.quant.fast`` puts its own answers there. Neither knows more of the
other, and without that folder all is right and slower.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Self

import torch
from torch import Tensor, nn

from apot_fat.quant import projection
from apot_fat.quant.spec import KernelChoice
from apot_fat.quant.units import along_rows


class Plain:
    """The plain answers."""

    choices: tuple[KernelChoice, ...] = ("auto", "eager")
    """What ``set_kernels`` takes."""

    @staticmethod
    def pointwise(
        function: Callable[..., Any],
        tensors: Sequence[Tensor],
        scalars: Sequence[Tensor],
        *settings: Any,
        into: Tensor | torch.dtype | None = None,
    ) -> tuple[Tensor, ...]:
        """The results of a pointwise function, always as a tuple.

        Args:
            function: (tensors, scalars, settings) → tensors of the shape of the tensors, and 0-d ones. No gradient.
            tensors: of one shape; the memory format of the last comes back.
            scalars: 0-d tensors; or (C,), one value for each row of tensors of shape (C, …).
            settings: hashable constants.
            into: where the first result may be written: ``tensors[0]``; or, given its type, memory of this thread that
                the next such call overwrites.
        """
        results = function(*tensors, *(along_rows(scalar, tensors[-1].dim()) for scalar in scalars), *settings)
        return results if isinstance(results, tuple) else (results,)

    project = staticmethod(projection.project)
    """With a u that may be overwritten."""

    @staticmethod
    def total(parts: Tensor) -> Tensor:
        """The sum of all, 0-d."""
        return parts.sum()

    @staticmethod
    def weight(layer: MemoryLayer, compute: Callable[[], Tensor]) -> Tensor:
        """The quantized weight of a layer: what ``compute`` makes of its parameters."""
        return compute()

    @staticmethod
    def output(layer: Any, x: Tensor) -> Tensor | None:
        """The output of a ``QuantConv2d`` or ``QuantLinear``; None where its plain forward is to give it."""
        return None

    @staticmethod
    def forget(layer: MemoryLayer) -> None:
        """Give up what was kept of a layer's parameters: they may change."""

    @staticmethod
    def kept_weights(model: nn.Module) -> AbstractContextManager[None]:
        """Within it a compiled network in evaluation may take weights that were quantized before."""
        return nullcontext()

    @staticmethod
    def uncompiled() -> AbstractContextManager[None]:
        """Within it nothing is compiled: for work that is done before the compiler is."""
        return nullcontext()

    @staticmethod
    def compiler_works(device_type: str) -> bool:
        """Whether networks and quantizers can be compiled for a device type."""
        return False

    @staticmethod
    def inductor_options(device_type: str) -> dict[str, Any]:
        """The ``options`` of ``torch.compile`` that let compiled code choose the levels eager code chooses."""
        return {}


speed: Plain = Plain()

_kernels: KernelChoice = "auto"


def set_kernels(choice: str) -> None:
    """Choose how quantizers run, for this process.

    Args:
        choice: ``compiled`` always, ``eager`` never compiles; ``auto``, the default, compiles where a compiler works
            and that is faster, and says once in the log which it is. But for ``eager`` layers in evaluation multiply
            8-bit integers where they can. See ``apot_fat.quant.fast.kernels`` and ``byte_product``.

    Raises:
        ValueError: another choice, or ``compiled`` without ``apot_fat.quant.fast``.
    """
    global _kernels
    if choice not in speed.choices:
        raise ValueError(f"kernels {choice!r}: choose one of {', '.join(speed.choices)}")
    _kernels = choice


def get_kernels() -> KernelChoice:
    """The choice in force."""
    return _kernels


class MemoryLayer(nn.Module):
    """A layer of whose parameters something may be kept in ``_kept``: given up when they may change, never copied."""

    _kept: Any = None

    def train(self, mode: bool = True) -> Self:
        """Set the mode; what was kept is given up."""
        speed.forget(self)
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        speed.forget(self)
        return super()._apply(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}
