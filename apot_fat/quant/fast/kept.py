"""What a layer computed of its parameters once in evaluation, kept while they stay.

Kept only in evaluation mode and where no gradient can flow; given up on ``train()``, ``eval()``, ``to()``, where a
gradient can flow, after any optimizer's step, and on any change that a tensor's version counter shows
(``load_state_dict``, in-place writes). A write through ``.data`` shows nowhere: call ``eval()`` after it. Neither
saved nor copied. Under PyTorch's ``fully_shard`` nothing is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from apot_fat.quant.fast.byte_product import ByteWeight, multiplies_bytes, pack_weight
from apot_fat.quant.fast.remade import conv_settings
from apot_fat.quant.layers import AnyQuantized, QuantConv2d
from apot_fat.quant.quantizer import UnsignedQuantizer
from apot_fat.quant.seam import MemoryLayer, get_kernels

T = TypeVar("T")


class _Entry(NamedTuple, Generic[T]):
    # a value, the tensors it was made of, and their state then
    value: T
    sources: tuple[Tensor, ...]
    state: tuple[object, ...]


@dataclass
class Kept:
    """What one layer keeps, in its ``_kept``.

    ``for_graphs`` is the weight that compiled graphs read: a CUDA graph finds it at the address it had; ``copied`` what
    was last copied there.
    """

    weight: _Entry[Tensor] | None = None
    byte_weight: _Entry[ByteWeight | None] | None = None
    for_graphs: Tensor | None = None
    copied: Tensor | None = None


_steps = 0  # of all optimizers: those of fused ones show in no version counter
_graphs_may_read = False  # torch.compile guards it: a graph cannot check whether what is kept is up to date


def _count_step(*_: object) -> None:
    global _steps
    _steps += 1


register_optimizer_step_post_hook(_count_step)


def _weight_sources(layer: Any) -> tuple[Tensor, ...]:
    return tuple(p for p in (layer.weight, layer.weight_alpha, layer.transform) if p is not None)


def kept_weight(layer: MemoryLayer, compute: Callable[[], Tensor]) -> Tensor:
    """The quantized weight of a layer, kept where it may be."""
    sources = _weight_sources(layer)
    needs_gradient = torch.is_grad_enabled() and any(source.requires_grad for source in sources)
    if needs_gradient and not torch.compiler.is_compiling():
        forget(layer)  # a compiled step, which calls no hook, may follow
    if layer.training or needs_gradient:
        return compute()
    if torch.compiler.is_compiling():
        kept = layer._kept if _graphs_may_read else None
        return compute() if kept is None or kept.for_graphs is None else kept.for_graphs
    return _keep(layer, "weight", sources, compute)


def _keep(layer: MemoryLayer, name: str, sources: tuple[Tensor, ...], compute: Callable[[], T]) -> T:
    # a field of Kept, computed again if a source has changed
    # fully_shard gathers changed weights into the same tensors, and no version counter shows it
    if getattr(layer, "_is_fsdp_managed_module", False) or not all(map(_shows_changes, sources)):
        return compute()
    state = (_steps, *(part for s in sources for part in (id(s), s._version, s.data_ptr(), s.dtype)))
    if layer._kept is None:
        layer._kept = Kept()
    entry: _Entry[T] | None = getattr(layer._kept, name)
    if entry is None or entry.state != state:
        with torch.inference_mode(False), torch.no_grad():  # an inference tensor could not be used with gradients
            # the sources are held so that no new tensor can take their place in memory
            entry = _Entry(compute(), tuple(part for s in sources for part in (s, s.detach())), state)
        setattr(layer._kept, name, entry)
    return entry.value


def forget(layer: MemoryLayer) -> None:
    """Give up what was kept."""
    kept: Kept | None = layer._kept
    if kept is not None:
        kept.weight = kept.byte_weight = kept.copied = None


def byte_weight(layer: AnyQuantized) -> ByteWeight | None:
    """The weight that a layer multiplies bytes with, kept; None where it multiplies floats."""
    if layer.training or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return None
    if torch.compiler.is_compiling():
        kept = layer._kept if _graphs_may_read else None
        return None if kept is None or kept.byte_weight is None else kept.byte_weight.value
    weight_alpha, act_alpha, act = layer.weight_alpha, layer.act_alpha, layer.act_quantizer
    if weight_alpha is None or act_alpha is None or not isinstance(act, UnsignedQuantizer) or act_alpha.dim():
        return None
    weights = layer.spec.weight_set
    sources = (*_weight_sources(layer), act_alpha)
    if get_kernels() == "eager" or not all(p.device.type == "cpu" and _is_plain(p) for p in sources):
        return None
    if layer.weight.dtype != torch.float32 or not multiplies_bytes(weights, act):
        return None
    conv = conv_settings(layer) if isinstance(layer, QuantConv2d) else None
    if conv is None and isinstance(layer, QuantConv2d):
        return None

    def compute() -> ByteWeight | None:
        w_q = layer.quantized_weight()
        return pack_weight(w_q, weight_alpha, weights, act_alpha, act.levels, conv) if w_q.isfinite().all() else None

    return _keep(layer, "byte_weight", sources, compute)


@contextmanager
def kept_weights(model: nn.Module) -> Iterator[None]:
    """Quantize in advance, for a compiled network in evaluation: graphs called inside take what is kept.

    Without it a compiled network quantizes its weights in every call.
    """
    global _graphs_may_read
    if model.training or torch.is_grad_enabled():
        yield
        return
    for layer in model.modules():
        if isinstance(layer, AnyQuantized) and byte_weight(layer) is None:
            _keep_for_graphs(layer)
    _graphs_may_read = True
    try:
        yield
    finally:
        _graphs_may_read = False


def _keep_for_graphs(layer: AnyQuantized) -> None:
    weight, kept = layer.quantized_weight(), layer._kept
    if kept is None:
        return
    if kept.weight is None:  # a float weight, or one whose changes do not show
        kept.for_graphs = None
        return
    if weight is kept.copied:
        return
    held = kept.for_graphs
    if held is None or (held.shape, held.dtype, held.device) != (weight.shape, weight.dtype, weight.device):
        with torch.inference_mode(False):
            held = kept.for_graphs = torch.empty_like(weight)
        torch._dynamo.mark_static_address(held)
    held.copy_(weight)
    kept.copied = weight


def _is_plain(tensor: Tensor) -> bool:
    # subclasses stand for tensors that are elsewhere or nowhere
    return type(tensor) in (Tensor, nn.Parameter)


def _shows_changes(tensor: Tensor) -> bool:
    # inference tensors have no version counter
    return _is_plain(tensor) and not tensor.is_inference()
