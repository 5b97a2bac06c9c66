"""Which device a run uses."""

from __future__ import annotations

import logging
import os
import re

import torch

log = logging.getLogger("apot_fat")


def choose_device(device: str = "auto", gpu: str | None = None, local_rank: int = 0) -> torch.device:
    """The device to run on.

    Args:
        device: ``auto`` (CUDA where there is one, else the CPU), ``cpu``, ``cuda`` or ``cuda:N``.
        gpu: the published ``-id``, such as ``0`` or ``0,1``: process number ``local_rank`` takes the one in its place.
            On a machine without CUDA it is ignored, with a warning, so that published command lines run there.
        local_rank: number of this process on its machine; under torchrun each takes a GPU of its own.

    Raises:
        ValueError: a malformed value, or a CUDA device that is not there.
    """
    if gpu is not None:
        if not re.fullmatch(r"\d+(,\d+)*", gpu):
            raise ValueError(f"gpu {gpu!r}: expected device numbers, such as 0 or 0,1")
        if not torch.cuda.is_available():
            log.warning("no CUDA device on this machine: -id %s is ignored, running on the CPU", gpu)
            return torch.device("cpu")
        numbers = gpu.split(",")
        if local_rank >= len(numbers):
            raise ValueError(f"gpu {gpu!r}: names {len(numbers)} devices, process {local_rank + 1} has none")
        if local_rank == 0 and len(numbers) > 1 and "LOCAL_RANK" not in os.environ:
            log.warning("-id %s: one process uses one GPU, %s; torchrun --nproc-per-node uses all", gpu, numbers[0])
        device = f"cuda:{numbers[local_rank]}"
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise ValueError(f"device {device!r}: choose auto, cpu, cuda or cuda:N")
    chosen = torch.device("cuda", local_rank) if device == "cuda" else torch.device(device)
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device {device!r}: this machine has {torch.cuda.device_count()} CUDA devices; choose cpu or auto"
        )
    return chosen
