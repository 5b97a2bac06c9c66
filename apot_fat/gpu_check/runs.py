"""Whole runs: stopped and resumed, chains, several processes."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from apot_fat.checkpoint import read_checkpoint
from apot_fat.evaluation import evaluate
from apot_fat.gpu_check.check import FAILED, OK, Check, Found, Item
from apot_fat.models import list_models
from apot_fat.models.registry import LayerMaker, register
from apot_fat.package_files import PACKAGE
from apot_fat.training import Recipe, Result, TrainConfig, read_recipe, train, train_chain
from apot_fat.training.build import load_config_dataset
from apot_fat.training.folder import LAST, METRICS
from apot_fat.training.interruption import InterruptedRunError


def small_network() -> str:
    """The name of a network of three layers, for what is about the machinery around it."""
    name = "gpu_check"
    if name not in list_models():

        @register(name, "cifar10")
        def build(layers: LayerMaker, num_classes: int) -> nn.Module:
            relu, conv = layers.relu_conv(16, 32, 3, padding=1)
            first = layers.first_conv(3, 16, 3, padding=1), nn.BatchNorm2d(16)
            last = nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), layers.last_linear(32, num_classes)
            return nn.Sequential(*first, relu, conv, nn.BatchNorm2d(32), *last)

    return name


def small_config(check: Check, **values: Any) -> TrainConfig:
    """A run of the small network."""
    common = {"arch": small_network(), "device": str(check.device), "histogram_every": 0, "crop_padding": 1, "lr": 0.05}
    return TrainConfig.from_dict({**common, "lr_steps": [], **values})


def colors_in_noise(check: Check, size: int, count: int = 1440) -> dict[str, Any]:
    """Images to train on: ten classes, each a colour."""
    rng = np.random.default_rng(0)
    colors = rng.integers(0, 256, (10, 3, 1, 1))
    paths = []
    for part, images_of_it in (("colors", 64 if check.quick else count), ("test", 20 if check.quick else count // 4)):
        labels = rng.integers(0, 10, images_of_it)
        images = 0.6 * colors[labels] + rng.normal(50, 40, (images_of_it, 3, size, size))
        paths.append(check.folder / f"{part}{size}.npz")
        np.savez(paths[-1], images=images.clip(0, 255).astype(np.uint8), labels=labels)
    return {"data": str(paths[0]), "test_data": str(paths[1]), "test_batch_size": 360}


def check_runs(check: Check) -> Iterator[Item]:
    """Runs that a signal stops within an epoch, and that go on, end with the bits of the run that none stopped.

    On the digits, or without scikit-learn on colours in noise.
    """
    has_digits = importlib.util.find_spec("sklearn") is not None and not check.quick
    data = {"data": "digits", "test_batch_size": 360} if has_digits else colors_in_noise(check, 8)
    combinations = list(product(("off", "auto", "model"), ("off", "bf16", "fp16"), (1, 2)))
    if check.quick:
        combinations = [("off", "off", 1), ("off", "bf16", 2), ("off", "fp16", 1)]
    for compile, amp, accumulate in combinations:
        values = {"compile": compile, "amp": amp, "accumulate": accumulate, "batch_size": 16 * accumulate, **data}
        what = f"{Path(str(data['data'])).stem}, compile {compile}, amp {amp}, accumulate {accumulate}"
        yield what, partial(_stop_and_resume, check, values, what.replace(" ", "_"))


def _stop_and_resume(check: Check, values: dict[str, Any], name: str) -> Found:
    configs = [
        small_config(check, epochs=2, numerics="deterministic", output=str(check.folder / name / part), **values)
        for part in ("whole", "parts")
    ]
    dataset = load_config_dataset(configs[0])
    assert dataset.train is not None
    left_over = len(dataset.train) % configs[0].batch_size  # a last step of another size takes a compilation
    dataset = replace(dataset, train=dataset.train.subset(torch.arange(len(dataset.train) - left_over)))
    start = time.perf_counter()
    whole = train(configs[0], dataset=dataset)
    seconds = time.perf_counter() - start
    steps = 0

    def stop(*_: object) -> None:
        nonlocal steps
        steps += 1
        if steps == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    hook = register_optimizer_step_post_hook(stop)
    last = Path(configs[1].output) / configs[1].run_name / LAST
    try:
        train(configs[1], dataset=dataset)
        raise RuntimeError("SIGTERM did not end the run")
    except InterruptedRunError:
        stopped = read_checkpoint(last)
    finally:
        hook.remove()
    train(configs[1], resume="auto", dataset=dataset)
    differing = list(_differences(read_checkpoint(whole.folder / LAST), read_checkpoint(last)))
    bits = f"bits differ: {', '.join(differing)}" if differing else "the same bits"
    at = f"stopped after batch {stopped['positions'][0]['batches']}" if "positions" in stopped else "stopped too late"
    verdict = OK if not differing and "positions" in stopped else FAILED
    return Found(f"{bits}, {at}, {whole.last:.1f} %, {seconds:.1f} s", "the same bits", verdict, {"top1": whole.last})


def _differences(one: Any, other: Any, where: str = "") -> Iterator[str]:
    if isinstance(one, Tensor):
        if not torch.equal(one, other):
            yield where
    elif isinstance(one, dict):
        parts = one if where else ("state_dict", "optimizer", "schedule", "scaler", "rng")  # and nothing about times
        for key in parts:
            yield from _differences(one[key], other[key], f"{where}.{key}" if where else key)
    elif isinstance(one, list | tuple):
        for index, (a, b) in enumerate(zip(one, other, strict=True)):
            yield from _differences(a, b, f"{where}.{index}")
    elif one != other:
        yield where


def check_chain(check: Check) -> Iterator[Item]:
    """Progressive bit-width, every network compiled whole."""
    chain = (4, 3) if check.quick else (32, 4, 3, 2)
    arch = small_network() if check.quick else "resnet20"
    compile = "off" if check.quick else "model"
    batch, size = (16, 8) if check.quick else (32, 32)

    def measure() -> Found:
        values = {"arch": arch, "compile": compile, "epochs": 1, "batch_size": batch, "lr": 0.01, "lr_steps": []}
        values |= {"weight_alpha_lr": 0.001, "act_alpha_lr": 0.01, "histogram_every": 0, **colors_in_noise(check, size)}
        overrides = {"device": str(check.device), "output": str(check.folder / "chain")}
        runs = train_chain(Recipe(Path("gpu_check"), chain, values, {}), chain, overrides)
        top1 = [run.last for run in runs]
        said = ", ".join(f"{run.bits}: {run.last:.1f} %" for run in runs)
        return Found(said, "> 25 %, chance is 10", check.verdict(min(top1) > 25), {"top1": top1})

    yield f"{arch}, {', '.join(map(str, chain))} bits, compile {compile}", measure


def check_speed_run(check: Check) -> Iterator[Item]:
    """The stages of the speed run, three epochs each, on as many images: where its time goes.

    Of each stage the wall's seconds of each epoch: the first with start and compilation, the others with the saving of
    the one before.
    """
    epochs = 3
    recipe = read_recipe("speedrun/resnet20_apot")
    size, count, values = 32, 50_000, {}
    if check.quick:
        size, count = 8, 64
        values = {"arch": small_network(), "batch_size": 16, "compile": "off", "device": "cpu"}

    def measure() -> Found:
        output = check.folder / "speedrun"
        given = {"epochs": epochs, "output": str(output), "device": str(check.device), **values}
        runs = train_chain(recipe, recipe.chain, given | colors_in_noise(check, size, count))
        rows = {run.bits: (run.folder / METRICS).read_text().splitlines() for run in runs}
        seconds = {bits: [json.loads(line)["seconds"] for line in lines] for bits, lines in rows.items()}
        said = "; ".join(f"{bits}: " + " + ".join(f"{s:.1f}" for s in each) for bits, each in seconds.items())
        slowest = max(s for each in seconds.values() for s in each[1:])
        numbers = {str(bits): each for bits, each in seconds.items()}
        return Found(said, "<= 1 s an epoch but for the first", check.verdict(slowest <= 1), numbers)

    yield f"speed run, {', '.join(map(str, recipe.chain))} bits, {epochs} epochs each", measure


def check_torchrun(check: Check) -> Iterator[Item]:
    """Training on all GPUs in bf16; what it recorded of its checkpoint is what evaluation finds, there and on a CPU."""
    on_gpus = check.device.type == "cuda"
    processes = torch.cuda.device_count() if on_gpus else 2

    def measure() -> Found:
        output = check.folder / "torchrun"
        options = {"arch": "res20", "bit": 4, "preset": "apot-cifar", "epochs": 1, "numerics": "deterministic"}
        options |= {"batch_size": 16 * processes, "lr": 0.02, "device": check.device.type, "output": output}
        options |= {"amp": "bf16"} | colors_in_noise(check, 8)
        line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes]
        line += ["-m", "apot_fat", "train"]
        line += [part for key, value in options.items() for part in (f"--{key}", value)]
        paths = [str(PACKAGE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        done = subprocess.run(
            list(map(str, line)),
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        if done.returncode:
            print(done.stderr, file=sys.stderr)
            reason = re.search(r"^\S*Error: .*|^.*: error: .*", done.stderr, re.MULTILINE)
            raise RuntimeError(f"exit code {done.returncode}: {reason[0] if reason else done.stderr[-200:]}")
        run = output / "res20_4bit"
        recorded = json.loads((run / METRICS).read_text().splitlines()[-1])["test_top1"]
        found, on_cpu = _evaluated(run / LAST, check.device), _evaluated(run / LAST, torch.device("cpu"))
        said = f"{recorded * found.total / 100:.2f} recorded, {found.correct} evaluated of {found.total} images"
        said += f", {on_cpu.correct} on the CPU"
        equal = abs(recorded - found.top1) < 1e-6 and abs(found.correct - on_cpu.correct) <= 1
        return Found(said, "equal, the CPU's by 1", OK if equal else FAILED)

    yield f"{processes} processes, {'nccl' if on_gpus else 'gloo'}" if processes > 1 else "1 process", measure


def _evaluated(checkpoint: Path, device: torch.device) -> Result:
    return evaluate(checkpoint, device=str(device))
