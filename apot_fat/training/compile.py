"""What of a network is compiled: nothing, its quantizers, or all of it."""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn
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
BatchKind = tuple[bool, int]
"""Whether it is a training batch, and its images."""

_GRAPHS = 64  # of one network: training and evaluation, each size of a batch
_NETWORKS = 8  # whose graphs are kept: the seeds of a sweep share them
_Graph = tuple[bool, torch.Size, torch.dtype | None]  # training or evaluation, the batch, mixed precision
_announced: dict[str, set[_Graph]] = {}  # by network: what is compiled already

log = logging.getLogger("apot_fat")


def choose_kernels(mode: str) -> None:
    """Set how quantizers are computed, as ``compile_network`` does: what is measured before it is then the same."""
    if mode in _KERNELS:
        set_kernels(_KERNELS[mode])


def compile_network(
    model: nn.Module,
    mode: str,
    device: torch.device,
    *,
    cuda_graphs: bool = True,
    batches: Mapping[BatchKind, int] | None = None,
) -> nn.Module:
    """The network to call in training and evaluation; ``model`` keeps the state.

    Graphs are kept for networks of the same layers, so that the seeds of a sweep are compiled once.

    Args:
        model: on its device.
        mode: ``off``; ``quantizers``; ``model``; ``auto``: ``model`` where it compiles and is worth it, else the choice
            of ``set_kernels``, which by default compiles quantizers where that is faster.
        device: the model's.
        cuda_graphs: whether a compiled network is replayed as a CUDA graph. Its results, gradients too, are then good
            until it is called again.
        batches: how many of each kind the network is to see, if that is known. A graph is compiled for a kind of which
            there are ``AUTO_BATCHES``, and with ``model`` for the most frequent of training; others, such as the short
            last batch of an epoch, take compiled quantizers. If it is not known, each kind has a graph, but with
            ``auto`` on a CPU none.

    Raises:
        ValueError: ``quantizers`` or ``model`` without a working compiler.
    """
    choose_kernels(mode)
    if mode in ("quantizers", "model") and not seam.speed.compiler_works(device.type):
        raise ValueError(f"compile {mode!r}: no working compiler for {device.type}: install one, or choose off")
    kinds = None if batches is None else _compiled_kinds(batches, at_least_one=mode == "model")
    worth_it = device.type == "cuda" if kinds is None else any(training for training, _ in kinds)
    whole = mode == "model" or (mode == "auto" and worth_it and seam.speed.compiler_works(device.type))
    if not whole:
        return model
    # FAT's Fourier transforms are library calls in any case
    warnings.filterwarnings("ignore", message="Torchinductor does not support code generation for complex operators")
    cuda_graphs = cuda_graphs and device.type == "cuda"
    return _CompiledNetwork(model, device, kinds, cuda_graphs, may_fall_back=mode == "auto")


def _compiled_kinds(batches: Mapping[BatchKind, int], *, at_least_one: bool) -> set[BatchKind]:
    often = {kind for kind, count in batches.items() if count >= AUTO_BATCHES}
    trained = [kind for kind in batches if kind[0]]
    return often | {max(trained, key=batches.__getitem__)} if at_least_one and trained else often


def _kept_graphs(model: nn.Module, device: torch.device) -> set[_Graph]:
    """Which graphs of a network there are already, to add to; old networks make room for a new one."""
    name = f"{device} {model}"
    if name not in _announced and len(_announced) >= _NETWORKS:
        torch.compiler.reset()
        _announced.clear()
    limit = _GRAPHS * _NETWORKS  # the compiler's own counts the graphs of all networks of a class
    for what in ("recompile_limit", "accumulated_recompile_limit"):
        setattr(torch._dynamo.config, what, max(getattr(torch._dynamo.config, what), limit))
    return _announced.setdefault(name, set())


class _CompiledNetwork(nn.Module):
    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        kinds: set[BatchKind] | None,
        cuda_graphs: bool,
        *,
        may_fall_back: bool,
    ) -> None:
        super().__init__()
        self.model, self.kinds, self.cuda_graphs, self.may_fall_back = model, kinds, cuda_graphs, may_fall_back
        self.announced = _kept_graphs(model, device)
        options = {**seam.speed.inductor_options(device.type), **({"triton.cudagraphs": True} if cuda_graphs else {})}
        # each size has its own, or all batches after a short one would run a slower graph for any size
        self.graph = torch.compile(model, fullgraph=True, dynamic=False, options=options)

    def forward(self, x: Tensor) -> Tensor:
        if self.kinds is not None and (self.model.training, len(x)) not in self.kinds:
            return cast(Tensor, self.model(x))
        if self.cuda_graphs:
            torch.compiler.cudagraph_mark_step_begin()
        try:
            with self._announced(x), seam.speed.kept_weights(self.model):
                return cast(Tensor, self.graph(x))
        except Exception as error:
            if not (self.may_fall_back and isinstance(error, torch._dynamo.exc.TorchDynamoException)):
                raise
            log.warning("the network is not compiled, its quantizers alone are (%s)", one_line(error)[:200])
            self.cuda_graphs, self.graph = False, self.model
            return cast(Tensor, self.model(x))

    @contextmanager
    def _announced(self, x: Tensor) -> Iterator[None]:
        # a minute without a sign of life is long; PyTorch keeps what it compiled on disk
        kind = x.device.type
        mixed = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        graph = self.model.training, x.shape, mixed
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
