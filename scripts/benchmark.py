"""Time and memory beside the baselines: benchmark.py quantizer | step | evaluate | onnx | input | memory."""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from apot_fat.command_line import OneLineParser, run_main
from apot_fat.data import Augmentation, ImageBatches, ImageSet
from apot_fat.export import export_onnx
from apot_fat.export.onnx import ExportMode
from apot_fat.models import create_model
from apot_fat.quant.fake_quant import quantize_activation
from apot_fat.quant.kernels import set_kernels
from apot_fat.quant.spec import PRESETS, preset
from apot_fat.text import aligned
from apot_fat.training.compile import compile_network
from apot_fat.training.config import COMPILE_MODES
from apot_fat.training.device import choose_device

SHAPE = (128, 16, 32, 32)  # the largest activation of ResNet-20, 128 images
NETWORKS = (("fp32", "apot-cifar", 32), ("apot-cifar", "apot-cifar", 4), ("fat-cifar", "fat-cifar", 4))
BITS = (2, 3, 4, 5)
WARM_UP, MIN_ROUNDS, MAX_ROUNDS = 2, 7, 51

Row = dict[str, Any]
Work = Callable[[], object]


def main(argv: list[str] | None = None) -> None:
    """Run one benchmark, print its table."""
    parser = OneLineParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("what", choices=sorted(BENCHMARKS), help="what to measure")
    parser.add_argument("--seconds", type=float, default=60.0, help="stop repeating after this long (default: 60)")
    parser.add_argument("--json", metavar="FILE", help="write the rows there too")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N")
    parser.add_argument("--threads", type=int, default=2, help="on the CPU (default: 2)")
    parser.add_argument("--compile", choices=COMPILE_MODES, default="quantizers", help="of the networks")
    parser.add_argument("--batch-size", type=int, default=128, help="images (default: 128)")
    options = parser.parse_args(argv)
    if options.seconds <= 0 or options.threads < 1 or options.batch_size < 1:
        raise ValueError("seconds, threads and batch-size must be positive")
    options.device = choose_device(options.device)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    rows = BENCHMARKS[options.what](options)
    head = list(rows[0])
    print(aligned(head, [[_shown(row[name]) for name in head] for row in rows], left=head[:1]))
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def quantizer(options: argparse.Namespace) -> list[Row]:
    """Forward and backward of one activation: every preset, compiled and eager, and the baselines."""
    device = options.device
    shape = (options.batch_size, *SHAPE[1:])
    x = torch.randn(shape, device=device).relu_().requires_grad_()
    grad, out = torch.randn_like(x), torch.empty_like(x)
    scale = torch.full((1,), 0.1, device=device, requires_grad=True)
    zero = torch.zeros(1, device=device, requires_grad=True)
    alpha = torch.full((), 1.5, device=device, requires_grad=True)

    def learnable(bits: int) -> Work:
        function = torch._fake_quantize_learnable_per_tensor_affine
        return lambda: _forward_backward(function(x, scale, zero, 0, 2**bits - 1, 1.0), grad, (x, scale, zero))

    def ours(name: str, bits: int, kernels: str) -> Work:
        spec = preset(name, bits=bits)

        def work() -> None:
            set_kernels(kernels)
            y = quantize_activation(x, alpha, spec.act_set, clip=spec.act_clip, alpha_gradient=spec.act_alpha_gradient)
            _forward_backward(y, grad, (x, alpha))

        return work

    def distance(bits: int) -> Work:
        levels = preset("apot-cifar", bits=bits).act_set.tensor(device=device)
        return lambda: _forward_backward(distance_matrix_quantizer(x, alpha, levels), grad, (x, alpha))

    works: dict[str, Work] = {
        "copy": lambda: out.copy_(x.detach()),
        "relu": lambda: _forward_backward(F.relu(x), grad, (x,)),
        "torch learnable uniform, 4 bits": learnable(4),
    }
    works |= {f"distance matrix, {bits} bits": distance(bits) for bits in BITS}
    for name in PRESETS:
        for bits in BITS:
            works[f"{name}, {bits} bits"] = ours(name, bits, "compiled")
            works[f"{name}, {bits} bits, eager"] = ours(name, bits, "eager")
    rows = _rows(_medians(works, options), "relu", "torch learnable uniform, 4 bits")
    for row in rows:
        bits = next((bits for bits in BITS if f"{bits} bits" in row["what"]), 4)
        slow = next(other["ms"] for other in rows if other["what"] == f"distance matrix, {bits} bits")
        row["distance matrix / this"] = slow / row["ms"]
    if device.type == "cuda":
        # least traffic: read x, write x_q; read g, x and x_q, write the gradient: 6 passes, and 2 for a copy
        copied = next(row["ms"] for row in rows if row["what"] == "copy")
        for row in rows:
            row["bandwidth / copy"] = (1 if row["what"] == "copy" else 3) * copied / row["ms"]
    return rows


def step(options: argparse.Namespace) -> list[Row]:
    """A training step of ResNet-20."""
    x, labels = _images(options.batch_size, options.device)

    def work(model: nn.Module, network: nn.Module) -> Work:
        optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)

        def one_step() -> None:
            optimizer.zero_grad()
            F.cross_entropy(network(x), labels).backward()
            optimizer.step()

        return one_step

    works = {name: work(*_network(choice, bits, options)) for name, choice, bits in NETWORKS}
    return _rows(_medians(works, options), "fp32")


def evaluate(options: argparse.Namespace) -> list[Row]:
    """1,000 images through ResNet-20, in batches of 100."""
    x, _ = _images(1000, options.device)

    def work(network: nn.Module) -> Work:
        @torch.inference_mode()
        def one_pass() -> None:
            for part in x.split(100):
                network(part)

        return one_pass

    works = {}
    for name, choice, bits in NETWORKS:
        model, network = _network(choice, bits, options)
        model.eval()
        works[name] = work(network.eval())
    return _rows(_medians(works, options), "fp32")


def onnx(options: argparse.Namespace) -> list[Row]:
    """100 images through ResNet-20's ONNX files in onnxruntime."""
    try:
        import onnxruntime as runtime
    except ImportError as error:
        raise ValueError("benchmark onnx needs onnxruntime: pip install apot-fat[export]") from error
    session_options = runtime.SessionOptions()
    session_options.intra_op_num_threads = options.threads
    # a session's threads would go on spinning for a while after each run, on the cores of the next one
    session_options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    x = _images(100, torch.device("cpu"))[0].contiguous()
    files: tuple[tuple[str, int, ExportMode], ...] = (
        ("fp32", 32, "float"),
        ("apot-cifar, 4 bits, int8", 4, "int8"),
        ("apot-cifar, 3 bits, int8", 3, "int8"),
        ("apot-cifar, 3 bits, float", 3, "float"),
    )
    works: dict[str, Work] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, bits, mode in tqdm(files, desc="exports", leave=False, disable=None):
            path = Path(folder) / "network.onnx"
            model = create_model("resnet20", "apot-cifar", bits).eval()
            export_onnx(model, path, (3, 32, 32), mode, verify_with=x, max_error=math.inf, min_agreement=0)  # untrained
            session = runtime.InferenceSession(path, session_options, providers=["CPUExecutionProvider"])
            works[name] = partial(session.run, None, {"input": x.numpy()})
    rows = _rows(_medians(works, options), "fp32")
    for row in rows:
        row["fp32 / this"] = 1 / row["/ fp32"]
    return rows


def input_batches(options: argparse.Namespace) -> list[Row]:
    """Batches of 32 × 32 images made on the device, beside moving one that is ready."""
    count = 20 * options.batch_size
    images = ImageSet(torch.randint(0, 256, (count, 32, 32, 3), dtype=torch.uint8), torch.zeros(count).long())
    mean, std = (0.5,) * 3, (0.25,) * 3
    ready = torch.randn(options.batch_size, 3, 32, 32)

    def epoch(augmentation: Augmentation | None) -> Work:
        batches = ImageBatches(
            images, options.batch_size, options.device, mean, std, augmentation=augmentation, training=True
        )
        return lambda: [batch.x for batch in batches]

    works: dict[str, Work] = {
        "copy, 20 batches": lambda: [ready.to(options.device, copy=True) for _ in range(20)],
        "20 batches": epoch(None),
        "20 batches, cropped and flipped": epoch(Augmentation()),
    }
    return _rows(_medians(works, options), "copy, 20 batches")


def memory(options: argparse.Namespace) -> list[Row]:
    """What a training step of ResNet-20 keeps for backward: storages of saved tensors, parameters not counted."""
    x, labels = _images(options.batch_size, options.device)
    rows: list[Row] = []
    for name, choice, bits in NETWORKS:
        model, network = _network(choice, bits, options)
        own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        kept: dict[int, int] = {}

        def note(tensor: Tensor, own: set[int] = own, kept: dict[int, int] = kept) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = F.cross_entropy(network(x), labels)
        loss.backward()
        rows.append({"what": name, "MiB": sum(kept.values()) / 2**20})
    for row in rows:
        row["/ fp32"] = row["MiB"] / rows[0]["MiB"]
    return rows


BENCHMARKS: dict[str, Callable[[argparse.Namespace], list[Row]]] = {
    "quantizer": quantizer,
    "step": step,
    "evaluate": evaluate,
    "onnx": onnx,
    "input": input_batches,
    "memory": memory,
}


def distance_matrix_quantizer(x: Tensor, alpha: Tensor, levels_L: Tensor) -> Tensor:
    """The published way: distances of every element to every level, an argmin, gradients by autograd.

    Equation: q = argmin over l of |u − l|, u = min(x / α, 1); x_q = α (u + (q − u) held constant).
    """
    u = (x / alpha).clamp(max=1)
    q = levels_L[(u.detach()[..., None] - levels_L).abs().argmin(-1)]
    return alpha * (u + (q - u).detach())


def _forward_backward(y: Tensor, grad: Tensor, leaves: tuple[Tensor, ...]) -> None:
    for leaf in leaves:
        leaf.grad = None
    y.backward(grad)


def _images(count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    x = torch.randn(count, 3, 32, 32, device=device).to(memory_format=torch.channels_last)
    return x, torch.randint(0, 10, (count,), device=device)


def _network(choice: str, bits: int, options: argparse.Namespace) -> tuple[nn.Module, nn.Module]:
    # channels last and one compile mode for all, fp32 included
    model = create_model("resnet20", choice, bits).to(options.device).to(memory_format=torch.channels_last)
    return model, compile_network(model, options.compile, options.device)


def _medians(works: dict[str, Work], options: argparse.Namespace) -> dict[str, float]:
    """Median milliseconds of each, interleaved so that whatever else the machine does falls on all alike."""
    timer = _cuda_milliseconds if options.device.type == "cuda" else _milliseconds
    times: dict[str, list[float]] = {name: [] for name in works}
    for work in tqdm(works.values(), desc="warm-up", leave=False, disable=None):
        for _ in range(WARM_UP):
            work()
    end = time.perf_counter() + options.seconds
    for done in tqdm(range(MAX_ROUNDS), desc="rounds", leave=False, disable=None):
        if done >= MIN_ROUNDS and time.perf_counter() > end:
            break
        for name, work in works.items():
            times[name].append(timer(work))
    return {name: statistics.median(values) for name, values in times.items()}


def _milliseconds(work: Work) -> float:
    start = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - start)


def _cuda_milliseconds(work: Work) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def _rows(medians: dict[str, float], *baselines: str) -> list[Row]:
    return [
        {"what": name, "ms": value, **{f"/ {base}": value / medians[base] for base in baselines}}
        for name, value in medians.items()
    ]


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else f"{value:.2f}"


if __name__ == "__main__":
    run_main(main)
