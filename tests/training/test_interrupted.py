"""Runs that are interrupted anywhere and resumed end with the bits of the run that was not."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from apot_fat.checkpoint import before, read_checkpoint, write_checkpoint
from apot_fat.data.decoding import read_image
from apot_fat.models import create_model
from apot_fat.training import TrainConfig, train
from apot_fat.training import loop as training_loop
from apot_fat.training.folder import LAST, METRICS
from apot_fat.training.interruption import InterruptedRunError
from tests.training.same_run import assert_same_run

ROOT = Path(__file__).resolve().parents[2]


def config(tiny_npz: tuple[Path, Path], output: Path, **values: Any) -> TrainConfig:
    train_path, test_path = map(str, tiny_npz)
    settings: dict[str, Any] = {"arch": "vgg_tiny", "bit": 4, "epochs": 2, "batch_size": 16, "lr": 0.05}
    settings |= {"crop_padding": 1, "test_batch_size": 8}
    settings |= {"data": train_path, "test_data": test_path, "output": str(output)}
    return TrainConfig(**{**settings, **values})


@pytest.mark.parametrize(
    ("arch", "amp"),
    [("resnet20", "off"), pytest.param("vgg_7_bn", "off", marks=pytest.mark.slow), ("resnet_20", "bf16")],
)
def test_a_resumed_run_ends_with_the_same_bits(
    tiny_npz: tuple[Path, Path], tmp_path: Path, arch: str, amp: str
) -> None:
    options = {"arch": arch, "amp": amp, "histogram_every": 2}
    whole = config(tiny_npz, tmp_path / "whole", **options)
    train(whole)
    parts = config(tiny_npz, tmp_path / "parts", **options)
    train(config(tiny_npz, tmp_path / "parts", epochs=1, **options))
    torch.rand(5)  # whatever happens in between
    train(parts, resume="auto")
    assert_same_run(tmp_path / "whole" / whole.run_name, tmp_path / "parts" / parts.run_name)
    assert len((tmp_path / "whole" / whole.run_name / METRICS).read_text().splitlines()) == whole.epochs


ALL_SWITCHES: dict[str, Any] = {"threshold_init": "mse", "distill_weight": 1.0, "distill_temperature": 2.0}
ALL_SWITCHES |= {"label_smoothing": 0.1, "distill_mixup": 0.5, "optimizer": "adam", "lr": 0.001}
ALL_SWITCHES |= {
    "ema_decay": 0.8,
    "bn_batches": 2,
    "final_bn_batches": 5,
    "schedule": "cosine",
    "warmup": 0.5,
    "accumulate": 2,
}
SIGINT, SIGTERM = signal.SIGINT, signal.SIGTERM


@pytest.mark.parametrize(
    ("number", "arch", "options"),
    [(SIGTERM, "resnet20", {}), (SIGINT, "resnet_20", ALL_SWITCHES)]
    + [pytest.param(*way, {}, marks=pytest.mark.slow) for way in ((SIGINT, "resnet20"), (SIGTERM, "resnet_20"))],
)
def test_a_signal_ends_a_run_after_its_step(
    number: signal.Signals,
    arch: str,
    options: dict[str, Any],
    tiny_npz: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if options:
        teacher = tmp_path / "teacher.pth"
        write_checkpoint({"state_dict": create_model(arch, bits=32, num_classes=3).state_dict()}, teacher)
        options = {**options, "teacher": str(teacher)}
    whole = config(tiny_npz, tmp_path / "whole", arch=arch, **options)
    train(whole)
    parts = config(tiny_npz, tmp_path / "parts", arch=arch, **options)
    updates = 0
    update = training_loop.Meter.update

    def signalling(meter: training_loop.Meter, *args: Any) -> None:
        nonlocal updates
        updates += 1
        if updates in (2, 5, 7):  # within an epoch, at a test batch, at an epoch's last step
            os.kill(os.getpid(), number)
        update(meter, *args)

    monkeypatch.setattr(training_loop.Meter, "update", signalling)
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    for _ in range(3):
        with pytest.raises(InterruptedRunError, match="go on with --resume auto") as stopped:
            train(parts, resume="auto")
        assert stopped.value.exit_code == 128 + number
    train(parts, resume="auto")
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert_same_run(tmp_path / "whole" / whole.run_name, tmp_path / "parts" / parts.run_name)


def test_a_second_interrupt_stops_at_once(
    tiny_npz: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def signalling(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(training_loop.Meter, "update", signalling)
    run = config(tiny_npz, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        train(run)
    monkeypatch.undo()
    train(run, resume="auto")


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """The images of three classes as files: 36 for training, 12 to test on."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 36), ("test", 12)):
        for i in range(count):
            folder = tmp_path / "images" / part / f"class{i % 3}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray((rng.integers(0, 60, (12, 12, 3)) + 90 * (i % 3)).astype(np.uint8)).save(
                folder / f"{i}.png"
            )
    return tmp_path / "images"


def test_a_resumed_streamed_run_decodes_nothing_before_its_position(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"data": str(image_folder), "test_data": None, "loader": "stream", "image_size": 8}
    options |= {"workers": 0, "batch_size": 4}
    whole, parts = (config((Path(), Path()), tmp_path / name, **options) for name in ("whole", "parts"))
    train(whole)
    updates = 0
    update = training_loop.Meter.update
    decoded: list[str] = []

    def signalling(meter: training_loop.Meter, *args: Any) -> None:
        nonlocal updates
        updates += 1
        if updates == 7:
            os.kill(os.getpid(), signal.SIGINT)
        update(meter, *args)

    def counting(path: Path, shorter_side: int) -> Image.Image:
        decoded.append(path.parts[-3])
        return read_image(path, shorter_side)

    monkeypatch.setattr(training_loop.Meter, "update", signalling)
    with pytest.raises(InterruptedRunError):
        train(parts, resume="auto")
    monkeypatch.setattr("apot_fat.data.stream.read_image", counting)
    train(parts, resume="auto")
    assert decoded.count("train") == 2 * 36 - 7 * 4
    assert_same_run(tmp_path / "whole" / whole.run_name, tmp_path / "parts" / parts.run_name)


class StreamedRun(subprocess.Popen[str]):
    """A run of one epoch of nine steps, leader of a process group and session of its own; what is left is killed."""

    def __init__(self, image_folder: Path, output: Path, workers: int) -> None:
        line = "scripts/train.py --loader stream --arch res20 --bit 4 --image-size 8 --batch-size 4 --epochs 1"
        line += f" --compile off --print-freq 1 --workers {workers} --data {image_folder} --output {output}"
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        command = [sys.executable, *line.split(), "--resume", "auto"]
        super().__init__(command, cwd=ROOT, start_new_session=True, **pipes)

    def __exit__(self, *error: Any) -> None:
        if living(self.pid):
            os.killpg(self.pid, signal.SIGKILL)
        super().__exit__(*error)


def living(session: int) -> int:
    """Processes of a session, without those that only wait to be asked how they ended."""
    count = 0
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, number = file.read_text().rpartition(")")[2].split()[:4]
        except (FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
            continue
        count += int(number) == session and state != "Z"
    return count


def wait_for_processes(session: int, *, at_least: int = 0, at_most: int = 1 << 30) -> None:
    end = time.monotonic() + 120
    while not at_least <= living(session) <= at_most:
        assert time.monotonic() < end, f"{living(session)} processes"
        time.sleep(0.01)


def wait_for_line(process: subprocess.Popen[str], start: str) -> None:
    assert process.stdout is not None
    assert any(line.startswith(start) for line in process.stdout), f"no line {start}"


@pytest.mark.slow  # tests/faults do as much, at random
def test_a_signal_to_the_whole_group_of_a_streamed_run_saves_it(image_folder: Path, tmp_path: Path) -> None:
    def ended(process: StreamedRun, exit_code: int) -> None:
        said, _ = process.communicate(timeout=120)
        assert process.returncode == exit_code, said
        assert ("go on with --resume auto" in said) == (exit_code != 0), said
        assert "Traceback" not in said, said
        wait_for_processes(process.pid, at_most=0)

    with StreamedRun(image_folder, tmp_path / "whole", workers=0) as whole:
        ended(whole, 0)
    with StreamedRun(image_folder, tmp_path / "parts", workers=2) as starting:
        wait_for_processes(starting.pid, at_least=5)  # with resource tracker, fork server and workers that still import
        os.killpg(starting.pid, signal.SIGINT)
        ended(starting, 130)
    assert read_checkpoint(tmp_path / "parts/res20_4bit" / LAST)["positions"]
    with StreamedRun(image_folder, tmp_path / "parts", workers=2) as training:
        wait_for_line(training, "Epoch: [0][")
        os.killpg(training.pid, signal.SIGTERM)
        ended(training, 143)
    with StreamedRun(image_folder, tmp_path / "parts", workers=2) as rest:
        ended(rest, 0)
    assert_same_run(tmp_path / "whole/res20_4bit", tmp_path / "parts/res20_4bit")


def test_the_workers_of_a_killed_run_end_with_it(image_folder: Path, tmp_path: Path) -> None:
    with StreamedRun(image_folder, tmp_path, workers=2) as process:
        wait_for_line(process, "Epoch: [0][")
        process.kill()
        wait_for_processes(process.pid, at_most=0)


def killed_and_resumed(line: list[str], last: Path, draw: random.Random) -> list[int]:
    """Run a command again and again, twice killed at a random moment; the checkpoints it had written each time."""
    kills: list[int] = []
    while True:
        process = subprocess.Popen(
            line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT, text=True, start_new_session=True
        )
        written, stamp = 0, last.stat().st_mtime_ns if last.exists() else 0
        wanted = draw.randrange(10) if len(kills) < 2 else 10**6
        while process.poll() is None and written < wanted:
            now = last.stat().st_mtime_ns if last.exists() else 0
            written, stamp = written + (now != stamp), now
            time.sleep(0.005)
        if process.poll() is None:
            time.sleep(draw.uniform(0, 0.3) if wanted else draw.uniform(0, 5))
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # torchrun's workers too
            process.communicate()
            kills.append(written)
            continue
        out, err = process.communicate()
        assert process.returncode == 0, out + err
        return kills


def kill_runs(cases: int, tiny_npz: tuple[Path, Path], tmp_path: Path, launcher: list[str]) -> None:
    line = "scripts/train.py --bit 4 --epochs 3 --batch-size 8 --crop-padding 1 --compile off"
    images = ["--data", str(tiny_npz[0]), "--test-data", str(tiny_npz[1])]
    base = [*launcher, *line.split(), *images, "--checkpoint-every", "1", "--resume", "auto"]
    subprocess.run([*base, "--output", str(tmp_path / "whole")], check=True, cwd=ROOT, capture_output=True)
    total = 0
    for seed in range(cases):
        folder = tmp_path / f"killed{seed}" / "resnet20_4bit"
        kills = killed_and_resumed([*base, "--output", str(folder.parent)], folder / LAST, random.Random(seed))
        assert_same_run(tmp_path / "whole/resnet20_4bit", folder)
        assert not list(folder.glob("*.tmp"))
        assert before(folder / LAST).exists()
        total += len(kills)
        print(f"seed {seed}: killed {' and '.join(map(str, kills))} checkpoints on; the same bits ({total} kills)")
    assert total


@pytest.mark.slow
def test_many_killed_runs(tiny_npz: tuple[Path, Path], tmp_path: Path) -> None:
    kill_runs(15, tiny_npz, tmp_path, [sys.executable])


@pytest.mark.slow
def test_many_killed_runs_of_two_processes(tiny_npz: tuple[Path, Path], tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    kill_runs(9, tiny_npz, tmp_path, launcher)
