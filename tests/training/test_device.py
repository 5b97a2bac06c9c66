"""Devices and how they compute, as far as that shows without a GPU; the rest is ``tests/test_gpu.py``'s."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from apot_fat.training import TrainConfig
from apot_fat.training.build import default_workers
from apot_fat.training.device import amp_dtype, choose_device, float32_products, set_numerics
from apot_fat.training.distributed import Processes, in_turns
from apot_fat.training.readback import LateRead
from apot_fat.training.state import rng_state

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is asked of a machine with two GPUs, in order."""
    asked: list[Any] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: asked.append(("set_device", device)))

    def get_rng_state(*device: Any) -> str:
        asked.append(("get_rng_state", *device))
        return "bits"

    monkeypatch.setattr(torch.cuda, "get_rng_state", get_rng_state)
    return asked


@pytest.mark.parametrize(
    ("options", "index"),
    [
        ({}, 0),
        ({"gpu": "1"}, 1),
        ({"device": "cuda:1"}, 1),
        ({"local_rank": 1}, 1),
        ({"gpu": "1,0", "local_rank": 1}, 0),
    ],
)
def test_the_device_of_a_run_is_the_current_one_before_anything_else(
    cuda: list[Any], options: dict[str, Any], index: int
) -> None:
    device = choose_device(**options)
    assert device == torch.device("cuda", index)
    assert rng_state(device)["cuda"] == "bits"
    assert cuda == [("set_device", device), ("get_rng_state", device)]


def test_processes_of_one_machine_do_not_share_a_gpu(cuda: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="device 'cuda:1': every process of this machine would take it; give cuda"):
        choose_device("cuda:1", local_rank=1)
    assert choose_device("cuda", local_rank=1) == torch.device("cuda:1")


def test_a_run_on_the_cpu_asks_nothing_of_a_gpu(cuda: list[Any]) -> None:
    assert rng_state(choose_device("cpu")).keys() == {"cpu"}
    set_numerics("deterministic", CPU)
    assert not torch.are_deterministic_algorithms_enabled()
    assert amp_dtype("auto", CPU) is None
    assert cuda == []


@pytest.fixture
def _same_numerics(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    yield
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
    set_numerics("fast", GPU)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.benchmark = False


@pytest.mark.usefixtures("_same_numerics")
def test_numerics_is_one_setting() -> None:
    def settings() -> tuple[bool, ...]:
        return (
            torch.backends.cuda.matmul.allow_tf32,
            torch.backends.cudnn.allow_tf32,
            torch.backends.cudnn.benchmark,
            not torch.backends.cudnn.deterministic,
            not torch.are_deterministic_algorithms_enabled(),
        )

    set_numerics("deterministic", GPU)
    assert settings() == (False,) * 5
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    set_numerics("fast", GPU)
    assert settings() == (True,) * 5
    with pytest.raises(ValueError, match="numerics 'exact': choose one of fast, deterministic"):
        set_numerics("exact", GPU)
    with pytest.raises(ValueError, match="numerics 'exact': choose one of fast, deterministic"):
        TrainConfig(numerics="exact")
    assert TrainConfig().to_dict()["numerics"] == "fast"  # so every checkpoint records it


@pytest.mark.usefixtures("_same_numerics")
def test_evaluation_is_without_tf32_and_training_with_it() -> None:
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    set_numerics("fast", GPU)
    for device, inside in ((GPU, (False, False)), (CPU, (True, True))):
        with float32_products(device):
            assert (matmul.allow_tf32, cudnn.allow_tf32) == inside
        assert (matmul.allow_tf32, cudnn.allow_tf32) == (True, True)


@pytest.mark.usefixtures("_same_numerics")
def test_evaluation_is_without_tf32_where_fp32_precision_was_set() -> None:
    matmul: Any = torch.backends.cuda.matmul
    conv: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    matmul.fp32_precision = "tf32"
    with pytest.raises(RuntimeError, match="mix of the legacy and new APIs"):
        _ = matmul.allow_tf32
    before = matmul.fp32_precision, conv.fp32_precision
    with float32_products(GPU):
        assert (matmul.fp32_precision, conv.fp32_precision) == ("ieee", "ieee")
    assert (matmul.fp32_precision, conv.fp32_precision) == before


def test_auto_is_bfloat16_where_a_gpu_multiplies_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for fast in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, fast=fast: fast)
        assert amp_dtype("auto", GPU) == (torch.bfloat16 if fast else None)
    assert amp_dtype("fp16", GPU) == torch.float16


def test_decoding_processes_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    for local_world, workers in ((None, 16), ("4", 4), ("5", 3), ("32", 1)):
        if local_world:
            monkeypatch.setenv("LOCAL_WORLD_SIZE", local_world)
        assert default_workers() == workers


def test_what_comes_out_of_a_late_read_was_put_in_one_exchange_before(monkeypatch: pytest.MonkeyPatch) -> None:
    assert LateRead().exchange(torch.tensor([1, 2])) == [1, 2]  # a CPU has it at once

    class Copied:
        def synchronize(self) -> None:
            pass

    monkeypatch.setattr("apot_fat.training.readback._start_copy", lambda values: (torch.full((2,), 7.0), Copied()))
    late = LateRead()
    on_a_gpu: Any = type("OnGpu", (), {"device": GPU})()
    assert late.exchange(on_a_gpu) is None
    assert late.exchange(on_a_gpu) == [7, 7]
    late.forget()
    assert late.exchange(on_a_gpu) is None


@pytest.mark.parametrize(("processes", "turn"), [((0, 0, 4), 0), ((2, 0, 4), 1), ((1, 1, 4), 2)])
def test_one_process_loads_before_the_others(
    processes: tuple[int, int, int], turn: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds: list[Any] = []

    def gather(value: Any) -> list[Any]:
        rounds.append(value)
        return [value]

    monkeypatch.setattr("apot_fat.training.distributed.gather_objects", gather)
    assert in_turns(Processes(*processes), lambda: len(rounds)) == turn
    assert rounds == [None] * 3
    monkeypatch.setattr("apot_fat.training.distributed.gather_objects", lambda value: ["no network", value])
    with pytest.raises(ValueError, match="no network"):
        in_turns(Processes(*processes), lambda: 1)
