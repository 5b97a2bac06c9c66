"""What of a network is compiled: nothing, its quantizers, or all of it."""

from __future__ import annotations

import warnings
from typing import cast

import torch
from torch import Tensor, nn

from apot_fat.quant.kernels import compiler_works, set_kernels
from apot_fat.quant.layers import kept_weights
from apot_fat.quant.spec import KernelChoice

_KERNELS: dict[str, KernelChoice] = {"off": "eager", "quantizers": "compiled", "model": "compiled"}


def compile_network(model: nn.Module, mode: str, device: torch.device) -> nn.Module:
    """The network to call in training and evaluation; ``model`` keeps the state.

    Args:
        model: on its device.
        mode: ``off``; ``quantizers``; ``model`` for one graph, on CUDA replayed as a CUDA graph; ``auto`` leaves
            the choice of ``set_kernels``, which by default compiles for large tensors where a compiler works.
        device: the model's.

    Raises:
        ValueError: ``quantizers`` or ``model`` without a working compiler.
    """
    if mode in _KERNELS:
        set_kernels(_KERNELS[mode])
    if mode in ("quantizers", "model") and not compiler_works(device.type):
        raise ValueError(f"compile {mode!r}: no working compiler for {device.type}: install one, or choose off")
    if mode != "model":
        return model
    # FAT's Fourier transforms are library calls in any case
    warnings.filterwarnings("ignore", message="Torchinductor does not support code generation for complex operators")
    return _CompiledNetwork(model, "reduce-overhead" if device.type == "cuda" else None)


class _CompiledNetwork(nn.Module):
    def __init__(self, model: nn.Module, mode: str | None) -> None:
        super().__init__()
        self.model = model
        self.graph = torch.compile(model, fullgraph=True, mode=mode)

    def forward(self, x: Tensor) -> Tensor:
        with kept_weights(self.model):
            return cast(Tensor, self.graph(x))
