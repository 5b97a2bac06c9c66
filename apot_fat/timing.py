"""How long pieces of work take, on a CPU or a GPU; what the benchmarks share."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

Work = Callable[[], object]
Forward = Callable[[], Tensor]

MIN_ROUNDS, MAX_ROUNDS = 7, 51
_WARM_UP = {"cpu": 2, "cuda": 10}  # on CUDA one call compiles, two warm up and record a graph, the rest wake the clock


def median_milliseconds(
    works: Mapping[str, Work],
    device: torch.device,
    *,
    seconds: float = 60.0,
    calls: int = 1,
    flush_cache: bool = False,
) -> dict[str, float]:
    """Median time of a call of each, interleaved so that whatever else the machine does falls on all alike.

    Args:
        works: what to call, by name.
        device: where it runs; a GPU's time is its own, between two events.
        seconds: stop repeating after this long, but not before ``MIN_ROUNDS`` rounds.
        calls: made one after the other, timed together and divided: how a GPU is given work in practice, where the
            next call is prepared while it computes.
        flush_cache: on a GPU, displace what its L2 cache holds before each time is taken.
    """
    stopwatch = _GpuStopwatch(device, flush_cache) if device.type == "cuda" else _milliseconds
    times: dict[str, list[float]] = {name: [] for name in works}
    for work in tqdm(works.values(), desc="warm-up", leave=False, disable=None):
        for _ in range(_WARM_UP[device.type]):
            work()
    end = time.perf_counter() + seconds
    for done in tqdm(range(MAX_ROUNDS), desc="rounds", leave=False, disable=None):
        if done >= MIN_ROUNDS and time.perf_counter() > end:
            break
        for name, work in works.items():
            times[name].append(stopwatch(work, calls) / calls)
    return {name: statistics.median(values) for name, values in times.items()}


def forward_backward(forward: Forward, grad: Tensor, leaves: Sequence[Tensor]) -> Work:
    """A forward pass, and from ``grad`` the backward one; the leaves' gradients are new ones each time."""

    def work() -> None:
        for leaf in leaves:
            leaf.grad = None
        forward().backward(grad)

    return work


def training_step(network: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, labels: Tensor) -> Work:
    """A step on the same batch again and again."""

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(network(x), labels).backward()
        optimizer.step()

    return step


def kept_for_backward(forward: Forward) -> dict[int, int]:
    """What a forward pass keeps for its backward pass: the bytes of each storage, by address."""
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        y = forward()
    y.sum().backward()
    return kept


def passes_over(x: Tensor, forward: Forward) -> float:
    """Least traffic of a pointwise function of x and its gradient, in sizes of x; a copy has 2.

    Read x, write y; read the gradient of y and what was kept, write the gradient of x.
    """
    return 4 + sum(kept_for_backward(forward).values()) / x.untyped_storage().nbytes()


class _GpuStopwatch:
    """Milliseconds that a GPU takes for a number of calls."""

    def __init__(self, device: torch.device, flush_cache: bool) -> None:
        self.stream = torch.cuda.current_stream(device)
        size = 2 * torch.cuda.get_device_properties(device).L2_cache_size if flush_cache else 0
        self.flush = torch.empty(size, dtype=torch.uint8, device=device)

    def __call__(self, work: Work, calls: int) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self.flush.zero_()  # and while it is written, the work is put in the queue
        start.record(self.stream)
        for _ in range(calls):
            work()
        end.record(self.stream)
        end.synchronize()
        return start.elapsed_time(end)


def _milliseconds(work: Work, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        work()
    return 1e3 * (time.perf_counter() - start)
