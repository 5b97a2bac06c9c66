"""Times beside their goals."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from apot_fat.data import FILE_SIZE, Batches, ImageSet
from apot_fat.gpu_check.check import Check, Found, Item
from apot_fat.gpu_check.runs import small_network
from apot_fat.quant.fake_quant import quantize_activation
from apot_fat.quant.seam import set_kernels
from apot_fat.quant.spec import QuantSpec, preset
from apot_fat.timing import forward_backward, median_milliseconds, passes_over, training_step
from apot_fat.training import Result, TrainConfig, train_epoch
from apot_fat.training.build import default_workers, load_config_dataset, make_batches
from apot_fat.training.compile import compile_network
from apot_fat.training.device import set_numerics
from apot_fat.training.network import create_network
from apot_fat.training.optim import make_optimizer, make_schedule


def check_files(check: Check) -> Iterator[Item]:
    """Images decoded by worker processes, alone and in training."""
    set_numerics("fast", check.device)
    count, side = (16, 40) if check.quick else (8192, 256)
    values: dict[str, Any] = {"arch": "resnet18", "bit": 4, "amp": "bf16", "batch_size": 256, "lr": 0.01}
    if check.quick:
        values |= {"arch": small_network(), "image_size": 32, "batch_size": 8, "workers": 1, "compile": "off"}
    write_images(check.folder / "images", count, side)
    config = TrainConfig.from_dict({"data": str(check.folder / "images"), "loader": "stream", **values})
    train_set = load_config_dataset(config).train
    assert train_set is not None
    files = make_batches(config, train_set, check.device, training=True)
    size = config.image_size or FILE_SIZE

    def load() -> Found:
        for _ in files:  # starts the workers
            pass
        start = time.perf_counter()
        for _ in files:
            pass
        if check.device.type == "cuda":
            torch.cuda.synchronize(check.device)
        rate = count / (time.perf_counter() - start)
        return Found(f"{rate:,.0f} images/s", numbers={"images_per_s": rate})

    def train_on_them() -> Found:
        pixels = torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8, device=check.device)
        in_memory = make_batches(config, ImageSet(pixels, train_set.labels_N), check.device, training=True)
        epoch = epoch_of(config, check.device, files.steps)
        epoch(in_memory)  # compiles
        ready, streamed = epoch(in_memory).seconds, epoch(files).seconds
        waiting = max(0.0, 1 - ready / streamed)
        rates = f"{count / streamed:,.0f} images/s, {count / ready:,.0f} from memory"
        numbers = {"images_per_s": count / streamed, "from_memory": count / ready, "waiting": waiting}
        return Found(f"{rates}: waits for data {waiting:.0%} of the time", numbers=numbers)

    workers = default_workers() if config.workers is None else config.workers
    yield f"{workers} workers alone, {side} × {side} JPEG", load
    yield f"{config.arch}, {config.bit} bits, {config.amp}, {config.batch_size} images a step", train_on_them


def write_images(folder: Path, count: int, side: int) -> None:
    """A folder of JPEGs with smooth contents, in ten classes; a few different ones, again and again."""
    rng = np.random.default_rng(0)
    encoded = []
    for _ in range(64):
        image = Image.fromarray(rng.integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8))
        file = io.BytesIO()
        image.resize((side, side), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        encoded.append(file.getvalue())
    for part, images in (("train", count), ("test", 10)):
        for index in range(images):
            path = folder / part / str(index % 10) / f"{index}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded[index % len(encoded)])


def epoch_of(config: TrainConfig, device: torch.device, steps: int) -> Callable[[Batches], Result]:
    """Trains a new network of ten classes an epoch, of so many steps, with every call."""
    model = create_network(config, 10).to(device).to(memory_format=torch.channels_last)
    optimizer = make_optimizer(model, config)
    schedule = make_schedule(optimizer, config, steps)
    network = compile_network(model, config.compile, device)
    scaler = torch.amp.GradScaler(device.type, enabled=config.amp == "fp16")
    return lambda batches: train_epoch(network, batches, optimizer, schedule, scaler, amp=config.amp)


def check_speed(check: Check) -> Iterator[Item]:
    """Quantizers, training steps and epochs."""
    set_numerics("fast", check.device)
    quantizers = [("apot-cifar", bits, torch.float32) for bits in (2, 3, 4, 5)]
    quantizers += [("fat-cifar", 4, torch.float32), ("apot-cifar", 4, torch.bfloat16)]
    mode, batches, amps, arch = "model", [128, 1024], ["off", "auto"], "resnet20"
    if check.quick:
        quantizers, mode, batches, amps, arch = quantizers[:1], "off", [8], ["off"], small_network()
    for name, bits, dtype in quantizers:
        what = f"quantizer {name}, {bits} bits, {str(dtype).removeprefix('torch.')}, compiled"
        yield what, partial(_bandwidth, check, preset(name, bits=bits), dtype)
    for batch in batches:
        yield f"step of {arch}, 4 bits / fp32, {batch} images, compile {mode}", partial(_step, check, arch, mode, batch)
    for amp in amps:
        yield f"epoch of {arch}, 4 bits, amp {amp}", partial(_epoch, check, arch, amp)


def _bandwidth(check: Check, spec: QuantSpec, dtype: torch.dtype) -> Found:
    set_kernels("compiled")
    shape = (2, 8, 16, 16) if check.quick else (256, 64, 112, 112)
    x = torch.randn(shape, device=check.device).relu_().to(dtype).requires_grad_()
    alpha = torch.full((), 1.5, device=check.device, requires_grad=True)
    grad, out = torch.randn_like(x), torch.empty_like(x)

    def forward() -> Tensor:
        return quantize_activation(x, alpha, spec.act_set, clip=spec.act_clip, alpha_gradient=spec.act_alpha_gradient)

    works = {"copy": lambda: out.copy_(x.detach()), "both": forward_backward(forward, grad, (x, alpha))}
    times = median_milliseconds(works, check.device, seconds=0.1 if check.quick else 2, flush_cache=True)
    passes = passes_over(x, forward)
    share = passes / 2 * times["copy"] / times["both"]
    terabytes = passes * x.untyped_storage().nbytes() / times["both"] / 1e9
    said = f"{times['both']:.3f} ms, {terabytes:.2f} TB/s, {share:.0%} of a copy's bandwidth"
    return Found(said, ">= 80 %", check.verdict(share >= 0.8), {**times, "passes": passes, "share": share})


def _step(check: Check, arch: str, mode: str, batch: int) -> Found:
    device, side = check.device, 8 if check.quick else 32
    x = torch.randn(batch, 3, side, side, device=device).to(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (batch,), device=device)
    works = {}
    for bits in (32, 4):
        config = TrainConfig(arch=arch, bit=bits, lr=1e-3)
        model = create_network(config, 10).to(device).to(memory_format=torch.channels_last)
        works[str(bits)] = training_step(compile_network(model, mode, device), make_optimizer(model, config), x, labels)
    seconds, calls = (0.1, 1) if check.quick else (5, 20)
    times = median_milliseconds(works, device, seconds=seconds, calls=calls)
    ratio = times["4"] / times["32"]
    said = f"{times['4']:.2f} ms / {times['32']:.2f} ms = {ratio:.2f}"
    return Found(said, "<= 1.10", check.verdict(ratio <= 1.1), {**times, "ratio": ratio})


def _epoch(check: Check, arch: str, amp: str) -> Found:
    count, side = (64, 8) if check.quick else (50_000, 32)
    config = TrainConfig(arch=arch, bit=4, amp=amp, lr=0.01, batch_size=min(128, count))
    images = ImageSet(torch.randint(0, 256, (count, side, side, 3), dtype=torch.uint8), torch.arange(count) % 10)
    batches = make_batches(config, images, check.device, training=True)
    epoch = epoch_of(config, check.device, batches.steps)
    epoch(batches)  # compiles
    batches.set_epoch(1)
    seconds = epoch(batches).seconds
    return Found(f"{count:,} images in {seconds:.2f} s", "< 2 s", check.verdict(seconds < 2), {"epoch_s": seconds})
