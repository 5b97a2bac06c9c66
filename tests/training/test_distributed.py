from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from apot_fat.checkpoint import load_weights, read_checkpoint, write_checkpoint
from apot_fat.data import ImageBatches, ImageSet, Sharding
from apot_fat.models import create_model
from apot_fat.training import TrainConfig, evaluate, train, train_epoch
from apot_fat.training.build import load_config_dataset, make_batches
from apot_fat.training.distributed import Processes, process_group, synchronize_batch_norm
from apot_fat.training.folder import run_config
from apot_fat.training.network import create_network
from apot_fat.training.readback import CHECK_EVERY
from tests.training.distributed_worker import losses_and_count

ROOT = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).with_name("distributed_worker.py")
SINGLE = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}


def torchrun(processes: int, *command: object) -> list[str]:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [*launch, *map(str, command)]


def run(command: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**SINGLE, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=240, check=False)


@pytest.mark.slow  # test_the_switches_under_two_processes_are_those_of_one has the same and more
@pytest.mark.parametrize("processes", [2, 4])
def test_several_processes_equal_one(tmp_path: Path, processes: int) -> None:
    losses, correct, total = losses_and_count()
    assert total == 37
    done = run([*torchrun(processes, WORKER), str(tmp_path / "outcome.json")], ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    other, *counts = json.loads((tmp_path / "outcome.json").read_text())
    # a sum in another order can move a value across a threshold, and a quantizer turns that into a jump
    assert other == pytest.approx(losses, rel=1e-4)
    assert counts == [correct, 37]


@pytest.mark.parametrize("processes", [3, pytest.param(4, marks=pytest.mark.slow)])
def test_a_resumed_run_of_several_processes_sums_gradients_in_the_same_order(processes: int) -> None:
    done = run(torchrun(processes, WORKER.with_name("rewrapped_worker.py")), ROOT)
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_taken_port_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for name, value in (("RANK", 0), ("WORLD_SIZE", 2), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", port)):
            monkeypatch.setenv(name, str(value))
        monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
        with (
            pytest.raises(OSError, match=rf"0 of 2 cannot join the others at 127\.0\.0\.1:{port} .*free --master-port"),
            process_group(Processes(0, 0, 2), torch.device("cpu"), 5.0),
        ):
            pass


@pytest.mark.parametrize("processes", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("count", [1, 10, 37, 40])
def test_every_image_is_seen_once(count: int, processes: int) -> None:
    images = ImageSet(torch.zeros(count, 4, 4, 3, dtype=torch.uint8), torch.arange(count))

    def labels(training: bool, batch_size: int) -> list[int]:
        seen = []
        for rank in range(processes):
            batches = ImageBatches(
                images,
                batch_size,
                torch.device("cpu"),
                (0,) * 3,
                (1,) * 3,
                training=training,
                sharding=Sharding(rank, processes),
            )
            parts = list(batches)
            assert len(parts) == batches.num_batches
            seen += [label for batch in parts for label in batch.labels.tolist()]
        return sorted(seen)

    assert labels(training=False, batch_size=5) == list(range(count))
    whole = 4 * processes  # a last batch with fewer images than processes is left out
    kept = count if count % whole >= processes or count % whole == 0 else count - count % whole
    seen = labels(training=True, batch_size=whole)
    assert len(seen) == len(set(seen)) == kept


def test_accumulated_gradients_are_those_of_the_whole_batch() -> None:
    images = ImageSet(torch.randint(0, 256, (10, 4, 4, 3), dtype=torch.uint8), torch.arange(10) % 3)

    def trained(accumulate: int) -> nn.Module:
        torch.manual_seed(1)
        model = nn.Sequential(nn.Flatten(), nn.Linear(48, 3)).double()
        model.insert(0, _ToDouble())
        batches = ImageBatches(
            images,
            8,
            torch.device("cpu"),
            (0.5,) * 3,
            (0.2,) * 3,
            training=True,
            channels_last=False,
            sharding=Sharding(accumulate=accumulate),
        )
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        train_epoch(model, batches, optimizer, schedule, scaler)
        return model

    once, twice = trained(1), trained(2)
    for a, b in zip(once.parameters(), twice.parameters(), strict=True):
        torch.testing.assert_close(a, b)


class _ToDouble(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.double()


def test_sync_batch_norm_alone_equals_batch_norm() -> None:
    plain = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    names = list(plain.state_dict())
    synchronized = synchronize_batch_norm(plain, torch.device("cpu"))
    assert list(synchronized.state_dict()) == names
    x = torch.randn(5, 3, 4, 4)
    expected = F.batch_norm(plain[0](x), None, None, torch.ones(4), torch.zeros(4), training=True)
    torch.testing.assert_close(synchronized(x), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sync_batch_norm_has_statistics_of_single_precision(dtype: torch.dtype) -> None:
    norm = nn.BatchNorm2d(4)
    synchronize_batch_norm(nn.Sequential(norm), torch.device("cpu"))
    x = (300 * torch.randn(8, 4, 16, 16)).to(dtype)  # squares that float16 does not hold
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    try:
        y = norm(x)
    finally:
        dist.destroy_process_group()
    expected = nn.BatchNorm2d(4)
    torch.testing.assert_close(y, expected(x))
    torch.testing.assert_close(norm.running_var, expected.running_var)


def test_a_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="batch_size 10: does not divide among 2 processes × 3 accumulation steps"):
        Sharding(world=2, accumulate=3).check(10)


def command_line(output: Path, **options: Any) -> list[object]:
    settings = {"bit": 4, "epochs": 2, "batch_size": 64, "crop_padding": 1, "output": output, **options}
    flags = [part for name, value in settings.items() for part in (f"--{name}", value)]
    return [ROOT / "scripts/train.py", "--data", "digits", "--arch", "vgg_tiny", *flags]


def test_torchrun_trains_a_chain_and_writes_once(tmp_path: Path) -> None:
    recipe = ROOT / "configs/digits/vggtiny_apot.toml"
    options = ["--bits", "32,4", "--epochs", "1", "--output", tmp_path / "out"]
    done = run(torchrun(2, ROOT / "scripts/progressive.py", "--config", recipe, *options), tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("best acc:") == 2
    assert done.stdout.count("2 processes, 64 images a step") == 2
    assert done.stdout.count("figure:") == 1
    content = read_checkpoint(tmp_path / "out/vgg_tiny_4bit/checkpoint.pth.tar")
    assert len(content["rng"]) == 2
    assert not torch.equal(*(rng["cpu"] for rng in content["rng"]))  # dropout of its own
    assert not any(name.startswith("module.") for name in content["state_dict"])
    # what is recorded is what the checkpoint gives: processes have batch statistics of their own images
    config = run_config(content, tmp_path)
    model = load_weights(create_network(config, 10), content)
    test = load_config_dataset(config, need_train=False).test
    alone = evaluate(model, make_batches(config, test, torch.device("cpu")))
    assert alone.top1 == content["history"][0]["test_top1"]
    assert alone.loss == pytest.approx(content["history"][0]["test_loss"], rel=1e-4)


@contextmanager
def two_processes(line: list[object], until: str, cwd: Path) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """A run of two processes that has printed a line so far, and the numbers of its processes; ended with the block."""
    with subprocess.Popen(
        torchrun(2, *line),
        cwd=cwd,
        env={**SINGLE, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    ) as launched:
        try:
            assert launched.stdout is not None
            next(printed for printed in launched.stdout if printed.startswith(until))
            children = subprocess.run(["pgrep", "-P", str(launched.pid)], capture_output=True, text=True, check=True)
            yield launched, [int(number) for number in children.stdout.split()]
        finally:
            if launched.poll() is None:
                os.killpg(launched.pid, signal.SIGKILL)


@pytest.mark.slow
def test_a_signal_to_one_process_ends_all_within_a_few_steps(tmp_path: Path) -> None:
    line = command_line(tmp_path / "out", epochs=300, batch_size=16, print_freq=1)
    with two_processes(line, "Epoch: [0][3/", tmp_path) as (launched, children):
        os.kill(children[0], signal.SIGTERM)  # the first, which logs
        assert launched.stdout is not None
        rest = launched.stdout.read()
        launched.wait(timeout=60)
    assert "SIGTERM: saved in" in rest
    after = rest[rest.index("SIGTERM: finishing this step") :]
    assert after.count("Epoch: [") <= 2 * CHECK_EVERY
    positions = read_checkpoint(tmp_path / "out/vgg_tiny_4bit/checkpoint.pth.tar")["positions"]
    assert {position["batches"] for position in positions} == {positions[0]["batches"]}
    assert len(positions) == 2


@pytest.mark.slow
def test_the_run_ends_when_a_process_is_killed(tmp_path: Path) -> None:
    with two_processes(command_line(tmp_path / "out", epochs=500), "best acc", tmp_path) as (launched, children):
        start = time.monotonic()
        os.kill(children[-1], signal.SIGKILL)
        assert launched.wait(timeout=60) != 0
        assert time.monotonic() - start < 60


def test_the_switches_under_two_processes_are_those_of_one(tmp_path: Path, tiny_npz: tuple[Path, Path]) -> None:
    teacher = tmp_path / "teacher.pth"
    write_checkpoint({"state_dict": create_model("vgg_tiny", bits=32, num_classes=3).state_dict()}, teacher)
    options: dict[str, Any] = {"data": tiny_npz[0], "test_data": tiny_npz[1], "bit": 4, "epochs": 1, "batch_size": 16}
    options |= {"arch": "vgg_tiny", "crop_padding": 1, "lr": 0.001, "teacher": teacher, "distill_weight": 0.5}
    options |= {"label_smoothing": 0.1, "ema_decay": 0.5, "bn_batches": 2, "final_bn_batches": 4, "compile": "off"}
    options["output"] = tmp_path / "1"
    flags = [part for name, value in options.items() for part in (f"--{name}", value)]
    train(TrainConfig.from_dict({name: str(v) if isinstance(v, Path) else v for name, v in options.items()}))
    line = [WORKER.with_name("ended_worker.py"), *flags, "--sync_bn", "--output", tmp_path / "2"]
    done = run(torchrun(2, *line), tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    states, losses = [], []
    for processes in (1, 2):
        content = read_checkpoint(tmp_path / f"{processes}/vgg_tiny_4bit/checkpoint.pth.tar")
        states.append(content["state_dict"])
        losses.append(content["history"][0]["train_loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)
    for name in ("norm0.running_mean", "norm0.running_var", "conv0.weight", "conv1.act_alpha", "conv3.weight"):
        torch.testing.assert_close(states[1][f"features.{name}"], states[0][f"features.{name}"], rtol=1e-2, atol=1e-3)


def test_no_graph_is_asked_to_hold_sums_over_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="compile 'model': no graph holds sync_bn's sums over processes; choose auto"):
        train(TrainConfig(sync_bn=True, compile="model"))
