"""How the quantizers' pointwise functions are run: compiled into one pass over memory, or eagerly.

``pointwise`` brings every tensor to one dimension in the order of its storage, or on a GPU to rows of one length, so
that a function is compiled once for all shapes and memory formats. ``seam.set_kernels`` chooses.
"""

from __future__ import annotations

import logging
import threading
import types
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

from apot_fat.quant.seam import Plain, get_kernels
from apot_fat.quant.units import along_rows
from apot_fat.text import one_line

AUTO_ELEMENTS = 1 << 18
"""``auto`` compiles for tensors of at least this many elements on a CPU: smaller ones do not earn the compilation."""

# Inductor builds something of the first size it sees into a kernel for any size: sizes up to a bound and above it are
# given a kernel each.
_CPU_BOUNDS = (1 << 12,)  # up to here serial code
# Up to 2^13 elements are summed by one block of threads, more by one for each 2^13, whose number is then fixed: enough
# for eight times as many elements, and from 2^22 on for any. From 2^31 on an index takes 64 bits; in a sum from a few
# elements less on, since all blocks have parts of one size.
_GPU_BOUNDS = (1 << 13, 1 << 16, 1 << 19, 1 << 22, 1 << 25, 1 << 28, (1 << 31) - (1 << 15), (1 << 31) - 1)
_GPU_ROW = 1024  # a GPU's kernel sums a row of this length while it writes what else is made of it

_ROUNDED_DIVISION = "eager_numerics.division_rounding"

_kernels: dict[tuple[Any, ...], Callable[..., Any]] = {}  # compiled so far, by the arguments of _compiled

_may_compile = True

log = logging.getLogger("apot_fat")


@contextmanager
def uncompiled() -> Iterator[None]:
    """``seam.Plain.uncompiled``."""
    global _may_compile
    before, _may_compile = _may_compile, False
    try:
        yield
    finally:
        _may_compile = before


def pointwise(
    function: Callable[..., Any],
    tensors: Sequence[Tensor],
    scalars: Sequence[Tensor],
    *settings: Any,
    into: Tensor | torch.dtype | None = None,
) -> tuple[Tensor, ...]:
    """``seam.Plain.pointwise``, compiled where that is chosen.

    Only a compiled kernel writes ``into``: fresh memory costs more than the pass itself on a CPU.
    """
    like = tensors[-1]
    if torch.compiler.is_compiling():
        return Plain.pointwise(function, tensors, scalars, *settings)
    rows = any(scalar.dim() for scalar in scalars)
    layout = _Layout(like, rows=rows)
    operands = [layout.flatten(tensor) for tensor in tensors]
    operands += [along_rows(scalar.data, 2) for scalar in scalars]
    scratch = into if isinstance(into, torch.dtype) and like.device.type == "cpu" else None  # others' allocators do
    overwrites = scratch is not None or isinstance(into, Tensor)
    types = (scratch, *(tensor.dtype for tensor in operands))
    key = (like.device, _size_class(like), _modes(), types, layout.special_sizes)
    wanted = (function, settings, scratch is not None, overwrites, layout.in_gpu_rows, key)
    # what was compiled for a large tensor does for a small one too; but no sum, whose bits would tell who came before
    kernel = _kernels.get(wanted)
    if _compiles(like):
        kernel = _kernels[wanted] = kernel or _compiled(*wanted)
    elif len(tensors) > 1 or like.numel() < 2 or get_kernels() == "eager":
        kernel = None
    if kernel is not None:
        if scratch is not None:
            operands.insert(0, _scratch.of(scratch, like.numel()))
        results = _as_tuple(kernel(*operands))
        if overwrites:
            results = (operands[0], *results)
    else:
        results = _as_tuple(function(*operands, *settings))
    shaped = tuple(layout.restore(result) if result.dim() == len(layout.flat) else result for result in results)
    if isinstance(into, Tensor) and into.data_ptr() == shaped[0].data_ptr():
        return into, *shaped[1:]  # not a view of it: autograd adds to a gradient in place that nobody else holds
    return shaped


class _Layout:
    """One dimension in the order of a tensor's storage, or two, with ``rows`` the first its own; and back."""

    def __init__(self, like: Tensor, *, rows: bool) -> None:
        self.shape, self.strides = like.shape, like.stride()
        self.is_dense = like.is_contiguous() or (
            like.dim() == 4 and like.is_contiguous(memory_format=torch.channels_last)
        )
        # a dense tensor's rows lie one after the other in either format
        order = sorted(range(rows, like.dim()), key=like.stride, reverse=True)
        self.order = [] if self.is_dense else [0, *order] if rows else order
        self.in_gpu_rows = like.is_cuda and like.numel() > 0 and like.numel() % _GPU_ROW == 0 and not rows
        self.flat: tuple[int, ...] = (like.numel(),)
        if self.in_gpu_rows:
            self.flat = (like.numel() // _GPU_ROW, _GPU_ROW)
        elif rows:
            self.flat = (len(like), like.numel() // max(len(like), 1))

    @property
    def special_sizes(self) -> tuple[bool, ...]:
        """What a compiler takes for granted about two dimensions: which are 1, and whether they are equal."""
        return () if len(self.flat) == 1 else (self.flat[0] == 1, self.flat[1] == 1, self.flat[0] == self.flat[1])

    def flatten(self, tensor: Tensor) -> Tensor:
        # .data has neither a graph nor, unlike detach(), a base: a graph compiled for a view is guarded by its base
        if not self.is_dense:
            return tensor.permute(self.order).reshape(self.flat).contiguous().data  # a view may have another stride
        if tensor.stride() != self.strides:
            alike = torch.empty_strided(self.shape, self.strides, dtype=tensor.dtype, device=tensor.device)
            tensor = alike.copy_(tensor)
        return tensor.as_strided(self.flat, (self.flat[-1], 1)[-len(self.flat) :]).data

    def restore(self, flat: Tensor) -> Tensor:
        if self.is_dense:
            return flat.as_strided(self.shape, self.strides)
        back = [self.order.index(axis) for axis in range(len(self.order))]
        return flat.view([self.shape[axis] for axis in self.order]).permute(back)


class _Scratch(threading.local):
    """Memory that is used again and again: it stays in the caches, and spares page faults. Grows to the largest use."""

    def __init__(self) -> None:
        self.tensors: dict[torch.dtype, Tensor] = {}

    def of(self, dtype: torch.dtype, elements: int) -> Tensor:
        held = self.tensors.get(dtype)
        if held is None or held.numel() < elements:
            with torch.inference_mode(False):
                held = self.tensors[dtype] = torch.empty(elements, dtype=dtype)
        return held[:elements].data


_scratch = _Scratch()


@cache
def compiler_works(device_type: str) -> bool:
    """Whether ``torch.compile`` gives working code for a device type: tried once, and said in the log."""
    try:
        torch.compile(_probe, fullgraph=True)(torch.ones(2, device=device_type))
    except Exception as error:
        log.info("quantizers run eagerly on %s: no working compiler (%s)", device_type, one_line(error)[:200])
        return False
    log.info("quantizers are compiled on %s", device_type)
    return True


def _probe(x: Tensor) -> Tensor:
    return x + 1


def total(parts: Tensor) -> Tensor:
    """``seam.Plain.total``; compiled, of rows or channels first, so that what reads the same reads it once."""
    if torch.compiler.is_compiling():
        if parts.dim() == 2:
            return parts.sum(1).sum()
        if parts.dim() == 4:  # as the batch norm before sums its gradients
            return parts.sum((0, 2, 3)).sum()
    return parts.sum()


def _modes() -> tuple[bool, bool]:
    return torch.is_inference_mode_enabled(), torch.are_deterministic_algorithms_enabled()


def _compiles(x: Tensor) -> bool:
    if get_kernels() == "eager" or not _may_compile or x.numel() < 2:  # sizes 0 and 1 are never dynamic
        return False
    if get_kernels() == "compiled":
        return True
    # on a GPU small tensors cost launches, and a quantizer that is not compiled is a dozen of them
    return (x.device.type == "cuda" or x.numel() >= AUTO_ELEMENTS) and compiler_works(x.device.type)


def _size_class(x: Tensor) -> int:
    return bisect_left(_CPU_BOUNDS if x.device.type == "cpu" else _GPU_BOUNDS, x.numel())


def inductor_options(device_type: str) -> dict[str, Any]:
    """The ``options`` of ``torch.compile`` that let compiled code choose the levels eager code chooses, and run at all.

    On a GPU quotients must be asked to be correctly rounded: Triton's own are approximate, and a value beside a
    threshold would fall to either side. C++ rounds correctly; but PyTorch's cache on disk does not tell processors
    apart, and code for shorter vectors than it is then compiled for writes beyond its end: their length is said.
    """
    if device_type == "cpu":
        bits = torch._inductor.cpu_vec_isa.pick_vec_isa().bit_width()
        return {"cpp.simdlen": bits} if bits else {}
    # PyTorch refuses options that it does not know; 2.11 to 2.14 know the first
    wanted = {_ROUNDED_DIVISION: True}
    if torch.are_deterministic_algorithms_enabled():  # no block size by a stopwatch: sums would differ from run to run
        wanted["deterministic"] = True
    known = torch._inductor.list_options()
    return {name: value for name, value in wanted.items() if name in known}


def _compiled(
    function: Callable[..., Any],
    settings: tuple[Any, ...],
    has_scratch: bool,
    overwrites: bool,
    in_gpu_rows: bool,
    key: tuple[Any, ...],
) -> Callable[..., Any]:
    def kernel(*tensors: Tensor) -> Any:
        if in_gpu_rows:
            torch._check(tensors[0].shape[1] == _GPU_ROW)  # to the compiler a number, not a variable
        results = function(*tensors[1 if has_scratch else 0 :], *settings)
        if not overwrites:
            return results
        first, *rest = _as_tuple(results)
        tensors[0].copy_(first)
        return tuple(rest)

    # Dynamo limits recompilations by code object, and all kernels would share this one
    code = kernel.__code__.replace(co_name=function.__name__)
    own = types.FunctionType(code, kernel.__globals__, function.__name__, None, kernel.__closure__)
    # what is asserted is so by construction, and takes a third of the call of a small kernel
    options: dict[str, Any] = {"size_asserts": False, "alignment_asserts": False, "guard_filter_fn": _no_guards}
    return torch.compile(own, fullgraph=True, dynamic=True, options=options | inductor_options(key[0].type))


def _no_guards(guards: Sequence[Any]) -> list[bool]:
    # everything a kernel depends on is in the key it is found by; checking it again takes half of a small call
    return [False] * len(guards)


def _as_tuple(results: Any) -> tuple[Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)
