"""How the quantizers' pointwise functions are run: compiled into one pass over memory, or eagerly.

``run`` brings every tensor to one dimension in the order of its storage, so that a function is compiled once for all
shapes and memory formats. ``set_kernels`` chooses; until then the environment variable ``APOT_FAT_KERNELS`` does.
"""

from __future__ import annotations

import logging
import os
import types
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, get_args

import torch
from torch import Tensor

from apot_fat.quant.spec import KernelChoice

AUTO_ELEMENTS = 1 << 18
"""``auto`` compiles for tensors of at least this many elements; smaller ones do not earn back the compilation."""
_SERIAL_ELEMENTS = 1 << 12  # up to here Inductor writes serial code; such tensors get a graph of their own

log = logging.getLogger("apot_fat")

_choice: KernelChoice = "auto"


def set_kernels(choice: str) -> None:
    """Choose how quantizers run, for this process.

    Args:
        choice: ``compiled`` always, ``eager`` never compiles; ``auto``, the default, compiles for tensors of at least
            ``AUTO_ELEMENTS`` elements where a compiler works, and says once in the log which it is.

    Raises:
        ValueError: another choice.
    """
    global _choice
    if choice not in get_args(KernelChoice):
        raise ValueError(f"kernels {choice!r}: choose one of {', '.join(get_args(KernelChoice))}")
    _choice = choice  # type: ignore[assignment]


def get_kernels() -> KernelChoice:
    """The choice in force."""
    return _choice


set_kernels(os.environ.get("APOT_FAT_KERNELS", "auto"))


def run(
    function: Callable[..., Any], tensors: Sequence[Tensor], scalars: Sequence[Tensor], *settings: Any
) -> tuple[Tensor, ...]:
    """Call a pointwise function, compiled or not.

    Args:
        function: (tensors, scalars, settings) → tensors of the shape of the tensors, and 0-d ones. No gradient.
        tensors: of one shape; the memory format of the last comes back.
        scalars: 0-d tensors.
        settings: hashable constants.

    Returns:
        The results, always as a tuple.
    """
    if torch.compiler.is_compiling():
        return _as_tuple(function(*tensors, *scalars, *settings))
    order = _storage_order(tensors[-1])
    # .data has neither a graph nor, unlike detach(), a base: a graph compiled for a view is guarded by its base's shape
    flat = [tensor.permute(order).reshape(-1).data for tensor in tensors]
    scalars = [scalar.data for scalar in scalars]
    if _compiles(flat[-1]):
        operands = (*flat, *scalars)
        key = (flat[-1].device, flat[-1].numel() <= _SERIAL_ELEMENTS, torch.is_inference_mode_enabled())
        kernel = _compiled(function, settings, (*key, *(tensor.dtype for tensor in operands)))
        results = _as_tuple(kernel(*operands))
    else:
        results = _as_tuple(function(*flat, *scalars, *settings))
    shape = [tensors[-1].shape[axis] for axis in order]
    back = [order.index(axis) for axis in range(len(order))]
    return tuple(result.view(shape).permute(back) if result.dim() else result for result in results)


@cache
def compiler_works(device_type: str) -> bool:
    """Whether ``torch.compile`` gives working code for a device type: tried once, and said in the log."""
    try:
        torch.compile(_probe, fullgraph=True)(torch.ones(2, device=device_type))
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        log.info("quantizers run eagerly on %s: no working compiler (%s)", device_type, reason)
        return False
    log.info("quantizers are compiled on %s", device_type)
    return True


def _probe(x: Tensor) -> Tensor:
    return x + 1


def _compiles(x: Tensor) -> bool:
    if _choice == "eager" or x.numel() < 2:  # sizes 0 and 1 are never dynamic
        return False
    return _choice == "compiled" or (x.numel() >= AUTO_ELEMENTS and compiler_works(x.device.type))


@cache
def _compiled(function: Callable[..., Any], settings: tuple[Any, ...], key: tuple[Any, ...]) -> Callable[..., Any]:
    def kernel(*tensors: Tensor) -> Any:
        return function(*tensors, *settings)

    # Dynamo limits recompilations by code object, and all kernels would share this one
    code = kernel.__code__.replace(co_name=function.__name__)
    own = types.FunctionType(code, kernel.__globals__, function.__name__, None, kernel.__closure__)
    # what is asserted is so by construction, and takes a third of the call of a small kernel
    options: dict[str, Any] = {"size_asserts": False, "alignment_asserts": False, "guard_filter_fn": _no_guards}
    return torch.compile(own, fullgraph=True, dynamic=True, options=options)


def _no_guards(guards: Sequence[Any]) -> list[bool]:
    # everything a kernel depends on is in the key it is found by; checking it again takes half of a small call
    return [False] * len(guards)


def _storage_order(x: Tensor) -> list[int]:
    # axes from the slowest to the fastest in memory
    if x.is_contiguous():
        return list(range(x.dim()))
    return sorted(range(x.dim()), key=x.stride, reverse=True)


def _as_tuple(results: Any) -> tuple[Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)
