"""What a training run does with its device, a piece at a time: each gives what it found, to compare between devices."""

from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from apot_fat import (
    Reconstruction,
    allocate_bits,
    balance_filters,
    clipping_table,
    cost_report,
    dequantize,
    export_onnx,
    integer_reference,
    load_packed,
    load_weights,
    quantize,
    save_packed,
    set_bits,
    weight_deactivate_freq,
)
from apot_fat.checkpoint import read_checkpoint, write_checkpoint
from apot_fat.command_line import Request
from apot_fat.commands.evaluate import evaluate_request
from apot_fat.data import Batches, FileBatches, FileSet, ImageSet, load_dataset
from apot_fat.integer import simulated_accumulator
from apot_fat.models import create_model
from apot_fat.quant.all_layers import keep_thresholds_positive, threshold_layers
from apot_fat.quant.diagnosis import odd_layers
from apot_fat.quant.layers import QuantConv2d, QuantLinear
from apot_fat.quant.measure import measure_layers
from apot_fat.reporting.bits import network_bits
from apot_fat.training import Result, TrainConfig, evaluate, train, train_epoch
from apot_fat.training.averaging import WeightAverage
from apot_fat.training.batch_norm import estimate_batch_norm
from apot_fat.training.board import Board
from apot_fat.training.build import make_batches, unlabelled_images
from apot_fat.training.finite import FiniteGuard, NonFiniteError
from apot_fat.training.folder import BEST, METRICS
from apot_fat.training.loop import autocast
from apot_fat.training.network import create_network
from apot_fat.training.objective import Objective
from apot_fat.training.optim import make_optimizer, make_schedule
from apot_fat.training.start import load_initial_weights, reconstruct_start, set_initial_thresholds

Found = dict[str, Any]
CLASSES = 3
# one network a family and the smallest of all, and the smallest images that suit each
SIZES = {"vgg_tiny": 8, "resnet20": 8, "vgg_small": 8, "resnet18": 32, "mobilenet_v2_x0_35": 32}


def config(arch: str, preset: str, **values: Any) -> TrainConfig:
    """A run of two epochs of two steps."""
    small = {"batch_size": 6, "test_batch_size": 5, "epochs": 2, "lr": 0.02, "crop_padding": 1, "workers": 0}
    return TrainConfig(arch=arch, preset=preset, **{**small, **values})


def images(arch: str) -> ImageSet:
    """Twelve random ones."""
    size, generator = SIZES[arch], torch.Generator().manual_seed(1)
    pixels = torch.randint(256, (12, size, size, 3), generator=generator, dtype=torch.uint8)
    return ImageSet(pixels, torch.arange(12) % CLASSES)


def network(device: torch.device, arch: str, preset: str, bits: int = 4, **overrides: Any) -> nn.Module:
    """A new one on the device."""
    torch.manual_seed(0)
    return create_model(arch, preset, bits, CLASSES, **overrides).to(device).to(memory_format=torch.channels_last)


def on_cpu(state: dict[str, Tensor]) -> Found:
    """Copies of tensors."""
    return {name: tensor.detach().cpu().clone() for name, tensor in state.items()}


def training(device: torch.device, arch: str, preset: str, **values: Any) -> Found:
    """Thresholds, an epoch with all that a run can switch on, the average's batch norm, and evaluation."""
    torch.manual_seed(0)
    run, few = config(arch, preset, **{"threshold_init": "lsq", **values}), images(arch)
    batches = make_batches(run, few, device, training=True)
    model = create_network(run, CLASSES).to(device)
    set_initial_thresholds(model, run, batches, device)
    optimizer = make_optimizer(model, run)
    average = WeightAverage(model, 0.9, optimizer)
    trained = epoch(model, run, batches, optimizer)
    keep_thresholds_positive(model)
    with autocast(device, run.amp):
        average.follow_buffers()
        estimate_batch_norm(average.model, batches, 2)
    tested = evaluate(average.model, make_batches(run, few, device))
    return {
        "results": [(result.loss, result.correct, result.total) for result in (trained, tested)],
        "steps": average.steps,
        "weights": on_cpu(model.state_dict()),
        "average": on_cpu(average.state_dict()),
        "momentum": [state["momentum_buffer"].detach().cpu() for state in optimizer.state.values()],
    }


def epoch(
    model: nn.Module,
    run: TrainConfig,
    batches: Batches,
    optimizer: torch.optim.Optimizer,
    *,
    allowed: int = 1,
    every: int | None = None,
) -> Result:
    """Train for one; ``allowed`` and ``every`` as in ``FiniteGuard``."""
    device = next(model.parameters()).device
    teacher = network(device, run.arch, run.preset_name, 32).eval().requires_grad_(False)
    options = {"label_smoothing": 0.1, "distill_weight": 0.5, "distill_temperature": 4.0}
    schedule = make_schedule(optimizer, run, batches.steps)
    scaler = torch.amp.GradScaler(device.type, enabled=run.amp == "fp16")
    guard = FiniteGuard(model, optimizer, scaler, allowed, every=every)
    objective = Objective(teacher=teacher, **options)
    return train_epoch(model, batches, optimizer, schedule, scaler, objective=objective, amp=run.amp, guard=guard)


def looks(device: torch.device, folder: Path, arch: str, preset: str, **overrides: Any) -> Found:
    """What is measured and written of a network between epochs."""
    model = network(device, arch, preset, **overrides)
    run = config(arch, preset, histogram_every=1)
    x = next(iter(make_batches(run, images(arch), device))).x
    with torch.no_grad():
        next(layer for _, layer in threshold_layers(model)).weight.fill_(1.0)
    table = {row.name: asdict(row) for row in clipping_table(model)}
    board = Board(folder, run, 0)
    board.write({"lr": {"weights": 0.1}, "layers": table, "test_loss": 1.0, "test_top1": 50.0}, model, x, 0)
    board.close()
    return {
        "table": table,
        "bits": network_bits(model),
        "curves": curves(folder),
        "layers": [asdict(measure) for measure in measure_layers(model, x)],
        "costs": cost_report(model, x.shape[1:]).to_csv(),
        "odd": odd_layers(model, x),
    }


def curves(folder: Path) -> Found:
    """The numbers of a folder's TensorBoard events."""
    events = EventAccumulator(str(folder)).Reload()
    return {name: [point.value for point in events.Scalars(name)] for name in sorted(events.Tags()["scalars"])}


def files(device: torch.device, folder: Path, arch: str, preset: str, **overrides: Any) -> Found:
    """Checkpoints and packed files, written from the device and read back onto it."""
    model = network(device, arch, preset, **overrides).eval()
    x = next(iter(make_batches(config(arch, preset), images(arch), device))).x
    write_checkpoint({"state_dict": model.state_dict()}, folder / "checkpoint")
    save_packed(model, folder / "packed.safetensors")
    with torch.no_grad():
        expected = model(x)
        again = load_weights(network(device, arch, preset, **overrides), folder / "checkpoint").eval()
        filled = load_packed(folder / "packed.safetensors", network(device, arch, preset, **overrides))
        made = load_packed(folder / "packed.safetensors").to(device).to(memory_format=torch.channels_last)
        for other in (again, filled, made):
            assert torch.equal(other(x), expected)
        folded, lower = dequantize(model)(x), set_bits(model, 3)(x)
    float_weights = network(device, arch, preset, 32).state_dict()
    started = load_weights(network(device, arch, preset, **overrides), float_weights, other_bits=True)
    return {
        "logits": expected.cpu(),
        "folded": folded.cpu(),
        "lower": lower.cpu(),
        "packed": load_file(folder / "packed.safetensors"),
        "checkpoint": read_checkpoint(folder / "checkpoint")["state_dict"],
        "started": on_cpu(started.state_dict()),
    }


def conversion(device: torch.device, folder: Path, method: str) -> Found:
    """A network of one's own on the device: quantized on images there, folded back, in integers, exported."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 8, 3, stride=2), nn.ReLU()]
    layers += [nn.Conv2d(8, 8, 1), nn.Hardswish(), nn.Conv2d(8, 8, 3, groups=2), nn.ReLU(), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(32, 8), nn.ReLU(), nn.Linear(8, CLASSES)).to(device).eval()
    x = torch.rand(4, 3, 11, 11).to(device)
    overrides: dict[str, dict[str, Any]] = {"3": {"weight_per_channel": True}, "7": {"bits": 3}}
    rows = quantize(model, 4, method, calibration=x, overrides=overrides).table()
    first, linear = model[3], model[10]
    assert isinstance(first, QuantConv2d)
    assert isinstance(linear, QuantLinear)
    mask = None if first.transform is None else weight_deactivate_freq(first.weight, first.transform)[1]
    linear.relu = True
    model(x).square().sum().backward()
    with torch.no_grad():
        logits, folded, accumulated = (
            model(x),
            dequantize(model)(x),
            simulated_accumulator(linear, x.flatten(1)[:, :32]),
        )
    found = {
        "rows": rows,
        "mask": mask,
        "gradients": [parameter.grad.cpu() for parameter in model.parameters() if parameter.grad is not None],
        "logits": logits.cpu(),
        "folded": folded.cpu(),
        "accumulated": accumulated.cpu(),
        "integers": integer_reference(model)(x.cpu()),
        "weights": on_cpu(model.state_dict()),
    }
    if method == "apot":
        report = export_onnx(model, folder / "file.onnx", (3, 11, 11), verify_with=x)
        found["exported"] = report.error, report.agreement
    return found


def reconstruction(device: torch.device, folder: Path, method: str) -> Found:
    """Bits chosen, a network quantized and tuned to the float one, and a run that begins so."""
    model = balance_filters(network(device, "resnet20", "apot-cifar", 32).eval())
    write_checkpoint({"state_dict": on_cpu(model.state_dict())}, folder / "fp32.pth.tar")
    run = config("resnet20", "apot-cifar", bit=3, init=str(folder / "fp32.pth.tar"), reconstruct=8)
    few = images(run.arch)
    batches = unlabelled_images(run, few, 10, device)
    tuned = Reconstruction(steps=1, joint_steps=1, batch_size=5, lr=1e-3, joint_lr=1e-3)
    float_layers = ["layer[12].*"]
    bits = allocate_bits(model, batches, 3.5, (3, 4), method=method, exclude=float_layers)
    rows = quantize(model, 4, method, exclude=float_layers, overrides=bits, calibration=batches, reconstruct=tuned)
    started = create_network(run, CLASSES).to(device)
    load_initial_weights(started, run)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("apot_fat.training.start.Reconstruction", lambda seed: tuned)
        reconstruct_start(started, run, few, CLASSES, device)
    return {
        "bits": [(row.name, row.bits, row.macs, row.losses) for row in bits.rows],
        "rows": rows.table(),
        "weights": on_cpu(model.state_dict()),
        "started": on_cpu(started.state_dict()),
    }


def streamed(device: torch.device, folder: Path) -> Found:
    """Batches of image files."""
    rng = np.random.default_rng(0)
    for part in ("train", "test"):
        for label in range(CLASSES):
            (folder / part / str(label)).mkdir(parents=True)
            for number in range(3):
                pixels = rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / part / str(label) / f"{number}.png")
    files = load_dataset(str(folder), stream=True).train
    assert isinstance(files, FileSet)
    options: dict[str, Any] = {"image_size": 16, "workers": 0, "training": True}
    batches = FileBatches(files, 4, device, (0.5,) * 3, (0.2,) * 3, **options)
    assert all(batch.x.device == device and batch.labels.device == device for batch in batches)
    return {"batches": [[part.cpu() for part in batch if isinstance(part, Tensor)] for batch in batches]}


def non_finite(device: torch.device) -> Found:
    """A step that cannot be made: where the run says that it broke."""
    run = config("resnet20", "apot-cifar")
    model = network(device, run.arch, run.preset_name)
    with torch.no_grad():
        model.get_submodule("layer2.0.conv1").get_parameter("weight")[0] = torch.inf
    batches = make_batches(run, images(run.arch), device, training=True)
    with pytest.raises(NonFiniteError) as raised:
        epoch(model, run, batches, make_optimizer(model, run), allowed=0)
    return {"said": str(raised.value)}


def whole_run(device: torch.device, folder: Path, **values: Any) -> Found:
    """A run that starts from fp32 and is distilled from it, goes on for an epoch more, and is evaluated from files."""
    digits, some = load_dataset("digits"), torch.arange(48)
    assert digits.train is not None
    few = replace(digits, train=digits.train.subset(some), test=digits.test.subset(some))
    common: dict[str, Any] = {"arch": "vgg_tiny", "batch_size": 16, "lr": 0.05, "crop_padding": 1, "epochs": 1}
    common |= {"device": str(device), "numerics": "deterministic", "compile": "off"}
    common |= {"output": str(folder), "checkpoint_every": 2}
    first = train(TrainConfig(bit=32, mean=(0.5, 0.5, 0.5), **common), dataset=few).folder / BEST
    common |= {"ema_decay": 0.5, "bn_batches": 2, "teacher": "fp32", "distill_weight": 0.5, "init": str(first)}
    common |= {"threshold_init": "lsq", "histogram_every": 1, **values}
    train(TrainConfig(**common), dataset=few)
    path = train(TrainConfig(**{**common, "epochs": 2}), resume="auto", dataset=few).folder
    best, packed = path / BEST, folder / "best.safetensors"
    save_packed(load_weights(create_model(common["arch"], values.get("preset"), 4), best), packed)
    evaluated = []
    for file in (best, packed):
        given = {"init": str(file), "device": str(device), "compile": "off", "data": "digits", "test_batch_size": 360}
        evaluated.append(evaluate_request(Request(given, {}, None, Namespace(released=None, model=None))).correct)
    rows = [json.loads(line) for line in (path / METRICS).read_text(encoding="utf-8").splitlines()]
    for row in rows:
        del row["seconds"]
    return {"rows": rows, "best": read_checkpoint(best)["state_dict"], "evaluated": evaluated, "curves": curves(path)}
