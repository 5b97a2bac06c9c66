"""Which device a run uses, and how exactly it computes there."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

NUMERICS = ("fast", "deterministic")
AMP_TYPES = ("off", "auto", "bf16", "fp16")

log = logging.getLogger("apot_fat")


def choose_device(device: str = "auto", gpu: str | None = None, local_rank: int = 0) -> torch.device:
    """The device to run on; a CUDA device becomes the current one, before anything else is asked of CUDA.

    Without that a process opens a context, hundreds of MiB, on the first GPU too, and takes its random numbers.

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
    elif device.startswith("cuda:") and os.environ.get("LOCAL_WORLD_SIZE", "1") != "1":
        raise ValueError(f"device {device!r}: every process of this machine would take it; give cuda, each has its own")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d{1,2})?", device):
        raise ValueError(f"device {device!r}: choose auto, cpu, cuda or cuda:N")
    chosen = torch.device("cuda", local_rank) if device == "cuda" else torch.device(device)
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device {device!r}: this machine has {torch.cuda.device_count()} CUDA devices; choose cpu or auto"
        )
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    return chosen


def set_numerics(choice: str, device: torch.device) -> None:
    """Choose how a CUDA device computes, for this process; CPUs always compute as ``deterministic`` says.

    Args:
        choice: ``fast``: training's float32 products on matrix units (TF32, 10 bits of mantissa), cuDNN takes the
            algorithms that it measures to be fastest. ``deterministic``: float32 products throughout and only
            algorithms that give the same bits every time; an operator without one says so in a warning.
        device: where the run is.

    Raises:
        ValueError: another choice.
    """
    if choice not in NUMERICS:
        raise ValueError(f"numerics {choice!r}: choose one of {', '.join(NUMERICS)}")
    if device.type != "cuda":
        return
    fast = choice == "fast"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = fast
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = fast, not fast
    if not fast:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it at its first product
    torch.use_deterministic_algorithms(not fast, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # every element that we allocate is written


@contextmanager
def float32_products(device: torch.device) -> Iterator[None]:
    """Within it a CUDA device multiplies float32 without TF32.

    A rounded product that crosses the middle between two levels becomes the other level, and the next layers make more
    of it: with TF32 the logits of a 4-bit ResNet-20 are off by 9 % and those of 2 bits by 19 % (root mean square), and
    6 % of its test images change class.
    """
    if device.type != "cuda":
        yield
        return
    matmul: Any = torch.backends.cuda.matmul
    cudnn: Any = torch.backends.cudnn
    flags: list[tuple[Any, str, Any, Any]]
    try:
        flags = [(part, "allow_tf32", part.allow_tf32, False) for part in (matmul, cudnn)]
    except RuntimeError:  # somebody has set fp32_precision, after which PyTorch refuses to read these
        flags = [(part, "fp32_precision", part.fp32_precision, "ieee") for part in (matmul, cudnn.conv)]
    for part, name, _, exact in flags:
        setattr(part, name, exact)
    try:
        yield
    finally:
        for part, name, before, _ in flags:
            setattr(part, name, before)


def amp_dtype(choice: str, device: torch.device) -> torch.dtype | None:
    """The type of mixed precision, None for none; ``auto``: bfloat16 where a GPU multiplies it fast, else none.

    Args:
        choice: ``off``, ``auto``, ``bf16`` or ``fp16``.
        device: where the run is.
    """
    if choice == "auto":
        choice = "bf16" if device.type == "cuda" and has_fast_bfloat16(device) else "off"
    return {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[choice]


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether a GPU, or a CPU's AVX-512 or AMX, multiplies bfloat16 faster than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16"))
