"""What the host waits for in a training step."""

from __future__ import annotations

import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from apot_fat.checkpoint import write_checkpoint
from apot_fat.data import Dataset, ImageSet
from apot_fat.gpu_check.check import Check, Found, Item
from apot_fat.gpu_check.runs import small_config, small_network
from apot_fat.models import create_model
from apot_fat.training import train
from apot_fat.training.device import set_numerics


def check_waits(check: Check) -> Iterator[Item]:
    """What the host waits for in a step, between two log lines: the difference of a long and a short epoch."""
    set_numerics("fast", check.device)
    teacher = check.folder / "teacher.pth.tar"
    write_checkpoint({"state_dict": create_model(small_network(), bits=32).state_dict()}, teacher)
    averaging = {"ema_decay": 0.9, "bn_batches": 2, "teacher": str(teacher), "distill_weight": 0.5}
    variants: dict[str, dict[str, Any]] = {
        "plain": {},
        "accumulate 2": {"accumulate": 2},
        "fp16": {"amp": "fp16"},
        "average and teacher": averaging,
    }
    for name, values in variants.items():
        yield name, partial(_waits_a_step, check, {"compile": "off", **values} if check.quick else values)


def _waits_a_step(check: Check, values: dict[str, Any]) -> Found:
    batch, short, long = (16, 3, 6) if check.quick else (128, 30, 90)

    def run(steps: int) -> Counter[str]:
        images = torch.randint(0, 256, (steps * batch, 8, 8, 3), dtype=torch.uint8)
        train_set = ImageSet(images, torch.arange(len(images)) % 10)
        dataset = Dataset("random", tuple("0123456789"), train_set, train_set.subset(torch.arange(10)))
        with tempfile.TemporaryDirectory(dir=check.folder) as output, waits(check.device) as found:
            train(
                small_config(check, epochs=1, batch_size=batch, output=output, print_freq=10**6, **values),
                dataset=dataset,
            )
        return found

    run(short)  # compiles, and tries out algorithms
    counts = {steps: run(steps) for steps in (short, long)}
    more = counts[long] - counts[short]
    number = (counts[long].total() - counts[short].total()) / (long - short)
    where = f" ({more.most_common(1)[0][0]})" if more else ""
    return Found(
        f"{number:.2f} waits a step{where}", "0", check.verdict(number == 0), {"waits": number, "where": dict(more)}
    )


@contextmanager
def waits(device: torch.device) -> Iterator[Counter[str]]:
    """Counts what makes the host wait for a device, by place; on a CPU what would, on a GPU."""
    found: Counter[str] = Counter()
    if device.type != "cuda":
        with _WaitingOperators(found):
            yield found
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for warning in caught:
        if "synchronizing CUDA operation" in str(warning.message):
            found[f"{Path(warning.filename).name}:{warning.lineno}"] += 1


class _WaitingOperators(TorchDispatchMode):
    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.data_dependent_output in func.tags:  # a number read from a tensor
            self.found[str(func)] += 1
        return func(*args, **(kwargs or {}))
