"""Time and memory beside the baselines: apot-fat benchmark quantizer | step | evaluate | onnx | input | memory."""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from apot_fat.checkpoint import atomic_write, output_file
from apot_fat.command_line import OneLineParser
from apot_fat.data import Augmentation, ImageBatches, ImageSet
from apot_fat.export import export_onnx
from apot_fat.export.onnx import ExportMode
from apot_fat.models import create_model
from apot_fat.optional import needed_for
from apot_fat.quant.fake_quant import quantize_activation
from apot_fat.quant.seam import set_kernels
from apot_fat.quant.spec import PRESETS, preset
from apot_fat.text import aligned
from apot_fat.timing import (
    Forward,
    Work,
    forward_backward,
    kept_for_backward,
    median_milliseconds,
    passes_over,
    training_step,
)
from apot_fat.training.compile import compile_network
from apot_fat.training.config import COMPILE_MODES
from apot_fat.training.device import choose_device, float32_products, set_numerics

FEATURES = (16, 32, 32)  # the largest activation of ResNet-20, of an image
LARGE_FEATURES = (64, 112, 112)  # that of ResNet-18: 392 MiB at 128 images, which no GPU's cache holds
NETWORKS = (("fp32", "apot-cifar", 32), ("apot-cifar", "apot-cifar", 4), ("fat-cifar", "fat-cifar", 4))
BITS = (2, 3, 4, 5)
MATRIX_ELEMENTS = 1 << 24
"""The published (levels × elements) matrix of more elements may not fit into memory."""

Row = dict[str, Any]


def main(argv: list[str] | None = None) -> None:
    """Run one benchmark, print its table."""
    parser = OneLineParser(description=__doc__)
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
    if options.json:
        output_file(options.json, ".json")
    options.device = choose_device(options.device)
    set_numerics("fast", options.device)  # as training does
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    rows = BENCHMARKS[options.what](options)
    head = list(rows[0])
    print(aligned(head, [[_shown(row[name]) for name in head] for row in rows], left=head[:1]))
    if options.json:
        with atomic_write(output_file(options.json, ".json")) as temporary:
            temporary.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def quantizer(options: argparse.Namespace) -> list[Row]:
    """Forward and backward of one activation: every preset, compiled and eager, and the baselines."""
    device = options.device
    shape = (options.batch_size, *(LARGE_FEATURES if device.type == "cuda" else FEATURES))
    x = torch.randn(shape, device=device).relu_().requires_grad_()
    grad, out = torch.randn_like(x), torch.empty_like(x)
    scale = torch.full((1,), 0.1, device=device, requires_grad=True)
    zero = torch.zeros(1, device=device, requires_grad=True)
    alpha = torch.full((), 1.5, device=device, requires_grad=True)

    def learnable(bits: int) -> Forward:
        function = torch._fake_quantize_learnable_per_tensor_affine
        return lambda: function(x, scale, zero, 0, 2**bits - 1, 1.0)

    def ours(name: str, bits: int, kernels: str) -> Forward:
        spec = preset(name, bits=bits)

        def forward() -> Tensor:
            set_kernels(kernels)
            return quantize_activation(
                x, alpha, spec.act_set, clip=spec.act_clip, alpha_gradient=spec.act_alpha_gradient
            )

        return forward

    def distance(bits: int) -> Forward:
        levels = preset("apot-cifar", bits=bits).act_set.tensor(device=device)
        return lambda: distance_matrix_quantizer(x, alpha, levels)

    forwards: dict[str, Forward] = {"relu": lambda: F.relu(x), "torch learnable uniform, 4 bits": learnable(4)}
    if x.numel() <= MATRIX_ELEMENTS:
        forwards |= {f"distance matrix, {bits} bits": distance(bits) for bits in BITS}
    for name in PRESETS:
        for bits in BITS:
            forwards[f"{name}, {bits} bits"] = ours(name, bits, "compiled")
            forwards[f"{name}, {bits} bits, eager"] = ours(name, bits, "eager")
    works: dict[str, Work] = {"copy": lambda: out.copy_(x.detach())}
    works |= {what: forward_backward(forward, grad, (x, scale, zero, alpha)) for what, forward in forwards.items()}
    medians = median_milliseconds(works, device, seconds=options.seconds, flush_cache=True)
    rows = _rows(medians, "relu", "torch learnable uniform, 4 bits")
    for row in rows:
        bits = next((bits for bits in BITS if f"{bits} bits" in row["what"]), 4)
        if slow := medians.get(f"distance matrix, {bits} bits"):
            row["distance matrix / this"] = slow / row["ms"]
        if device.type == "cuda":
            passes = passes_over(x, forwards[row["what"]]) if row["what"] in forwards else 2
            row["bandwidth / copy"] = passes / 2 * medians["copy"] / row["ms"]
    return rows


def step(options: argparse.Namespace) -> list[Row]:
    """A training step of ResNet-20."""
    x, labels = _images(options.batch_size, options.device)

    def work(model: nn.Module, network: nn.Module) -> Work:
        return training_step(network, torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9, fused=True), x, labels)

    works = {name: work(*_network(choice, bits, options)) for name, choice, bits in NETWORKS}
    return _rows(_medians(works, options), "fp32")


def evaluate(options: argparse.Namespace) -> list[Row]:
    """1,000 images through ResNet-20, in batches of 100."""
    x, _ = _images(1000, options.device)

    def work(network: nn.Module) -> Work:
        @torch.inference_mode()
        def one_pass() -> None:
            with float32_products(options.device):  # as evaluation multiplies
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
    with needed_for("benchmark onnx"):
        import onnxruntime as runtime
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

    def loss(network: nn.Module) -> Tensor:
        return F.cross_entropy(network(x), labels)

    rows: list[Row] = []
    for name, choice, bits in NETWORKS:
        model, network = _network(choice, bits, options)
        own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        kept = kept_for_backward(partial(loss, network))
        rows.append({"what": name, "MiB": sum(size for at, size in kept.items() if at not in own) / 2**20})
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


def _images(count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    x = torch.randn(count, 3, 32, 32, device=device).to(memory_format=torch.channels_last)
    return x, torch.randint(0, 10, (count,), device=device)


def _network(choice: str, bits: int, options: argparse.Namespace) -> tuple[nn.Module, nn.Module]:
    # channels last and one compile mode for all, fp32 included
    model = create_model("resnet20", choice, bits).to(options.device).to(memory_format=torch.channels_last)
    return model, compile_network(model, options.compile, options.device)


def _medians(works: dict[str, Work], options: argparse.Namespace) -> dict[str, float]:
    return median_milliseconds(works, options.device, seconds=options.seconds)


def _rows(medians: dict[str, float], *baselines: str) -> list[Row]:
    return [
        {"what": name, "ms": value, **{f"/ {base}": value / medians[base] for base in baselines}}
        for name, value in medians.items()
    ]


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else f"{value:.2f}"
