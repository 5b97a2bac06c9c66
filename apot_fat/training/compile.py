"""What of a network is compiled: nothing, its quantizers, or all of it."""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from tqdm.auto import tqdm

from apot_fat.quant import seam
from apot_fat.quant.seam import set_kernels
from apot_fat.quant.spec import KernelChoice
from apot_fat.text import one_line

_KERNELS: dict[str, KernelChoice] = {"off": "eager", "quantizers": "compiled", "model": "compiled"}
AUTO_BATCHES = 3500
"""``auto`` compiles a whole network that is to see at least this many batches: fewer do not earn back the compilation.
That of ResNet-20 took 45 s on an H100's host, where a compiled step took 4 ms, and 85 s on two cores, where it saves 40
ms a step of 128 CIFAR images, 16 ms of 128 digits."""
_GRAPHS = 64  # of one network: training and evaluation, each size of a batch

log = logging.getLogger("apot_fat")


def choose_kernels(mode: str) -> None:
    """Set how quantizers are computed, as ``compile_network`` does: what is measured before it is then the same."""
    if mode in _KERNELS:
        set_kernels(_KERNELS[mode])


def compile_network(
    model: nn.Module, mode: str, device: torch.device, *, cuda_graphs: bool = True, batches: int | None = None
) -> nn.Module:
    """The network to call in training and evaluation; ``model`` keeps the state.

    Args:
        model: on its device.
        mode: ``off``; ``quantizers``; ``model`` for one graph a size of batch; ``auto``: ``model`` where it compiles
            and is worth it, else the choice of ``set_kernels``, which by default compiles quantizers where that is
            faster.
        device: the model's.
        cuda_graphs: whether a compiled network is replayed as a CUDA graph. Its results, gradients too, are then good
            until it is called again.
        batches: how many the network is to see in training, if that is known; ``auto`` leaves a network of fewer than
            ``AUTO_BATCHES`` uncompiled, and on a CPU one of which it is not known.

    Raises:
        ValueError: ``quantizers`` or ``model`` without a working compiler.
    """
    choose_kernels(mode)
    if mode in ("quantizers", "model") and not seam.speed.compiler_works(device.type):
        raise ValueError(f"compile {mode!r}: no working compiler for {device.type}: install one, or choose off")
    worth_it = device.type == "cuda" if batches is None else batches >= AUTO_BATCHES
    whole = mode == "model" or (mode == "auto" and worth_it and seam.speed.compiler_works(device.type))
    if not whole:
        return model
    # FAT's Fourier transforms are library calls in any case
    warnings.filterwarnings("ignore", message="Torchinductor does not support code generation for complex operators")
    torch.compiler.reset()  # graphs of the networks before count towards the compiler's limit
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _GRAPHS)
    return _CompiledNetwork(model, device, cuda_graphs and device.type == "cuda", may_fall_back=mode == "auto")


class _CompiledNetwork(nn.Module):
    def __init__(self, model: nn.Module, device: torch.device, cuda_graphs: bool, *, may_fall_back: bool) -> None:
        super().__init__()
        self.model, self.cuda_graphs, self.may_fall_back = model, cuda_graphs, may_fall_back
        options = {**seam.speed.inductor_options(device.type), **({"triton.cudagraphs": True} if cuda_graphs else {})}
        # a size of its own for the short last batch, or all batches after it would run a slower graph for any size
        self.graph = torch.compile(model, fullgraph=True, dynamic=False, options=options)
        self.announced: set[tuple[bool, torch.Size]] = set()

    def forward(self, x: Tensor) -> Tensor:
        if self.cuda_graphs:
            torch.compiler.cudagraph_mark_step_begin()
        try:
            with self._announced(x), seam.speed.kept_weights(self.model):
                return cast(Tensor, self.graph(x))
        except TorchDynamoException as error:
            if not self.may_fall_back:
                raise
            log.warning("the network is not compiled, its quantizers alone are (%s)", one_line(error)[:200])
            self.cuda_graphs, self.graph = False, self.model
            return cast(Tensor, self.model(x))

    @contextmanager
    def _announced(self, x: Tensor) -> Iterator[None]:
        # a minute without a sign of life is long; PyTorch keeps what it compiled on disk
        graph = self.model.training, x.shape
        if graph in self.announced or self.graph is self.model:
            yield
            return
        self.announced.add(graph)
        purpose, shape = "training" if self.model.training else "evaluation", " × ".join(map(str, x.shape))
        log.info("compiling the network for %s on %s: up to minutes the first time, less the next", purpose, shape)
        with _clock(f"compiling for {purpose}"):
            yield


@contextmanager
def _clock(what: str, every: float = 1.0) -> Iterator[None]:
    # on a terminal counts the seconds of a call that says nothing itself
    ended = threading.Event()
    with tqdm(desc=what, bar_format="{desc}: {elapsed}", leave=False, disable=None) as bar:

        def tick() -> None:
            while not ended.wait(every):
                bar.refresh()

        ticking = None if bar.disable else threading.Thread(target=tick, daemon=True)
        if ticking is not None:
            ticking.start()
        try:
            yield
        finally:
            ended.set()
            if ticking is not None:
                ticking.join()
