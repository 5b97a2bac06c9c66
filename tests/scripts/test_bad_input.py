"""Every option and TOML key with a wrong value, every kind of wrong file: pytest -s prints the table."""

from __future__ import annotations

import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from apot_fat import save_packed
from apot_fat.checkpoint import write_checkpoint
from apot_fat.models import create_model
from apot_fat.training import TrainConfig
from apot_fat.training.config import field_type

Run = Callable[..., tuple[int, str, str]]

FREE_TEXT = {"arch", "preset", "data", "test_data", "data_root", "init", "device", "gpu", "output", "teacher"}


def bad_values(option: Any) -> Iterator[Any]:
    """Values of the wrong type and out of range."""
    element, many, _ = field_type(option)
    limits = option.metadata
    if element is bool or option.name in FREE_TEXT:
        return
    yield "nonsense"
    if element in (int, float):
        if limits["low"] is not None:
            yield limits["low"] - 1
        if limits["above"] is not None:
            yield limits["above"]
        if limits["high"] is not None:
            yield limits["high"] + 1
        yield float("nan")
    if element is int and not many:
        yield 1.5


def toml(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)


class Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return Path.write_text, (self.marker, "ran")  # type: ignore[return-value]


def bad_files(folder: Path) -> dict[str, Path]:
    """One checkpoint of every wrong kind."""
    good = folder / "good.pth"
    write_checkpoint({"state_dict": create_model("res20", bits=4).state_dict()}, good)
    contents = {
        "empty": b"",
        "text": b"hello\n",
        "cut": good.read_bytes()[:20_000],
        "zeros": bytes(5000),
        "flipped": good.read_bytes()[:30_000] + b"\xff" + good.read_bytes()[30_001:],
        "pickle that runs code": pickle.dumps(Payload(folder / "ran")),
        "petabytes": struct.pack("<Q", 1 << 50)
        + b'{"a":{"dtype":"F32","shape":[1125899906842624],"data_offsets":[0,4]}}',
    }
    paths = {}
    for name, content in contents.items():
        paths[name] = folder / f"{name.replace(' ', '_')}.pth"
        paths[name].write_bytes(content)
    bomb = folder / "bomb.pth"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * 50_000_000)
    paths["decompression bomb"] = bomb
    torch.save([1, 2], folder / "list.pth")
    paths["a list"] = folder / "list.pth"
    save_packed(create_model("res20", bits=4), folder / "packed.safetensors")
    paths["a packed file"] = folder / "packed.safetensors"
    paths["missing"] = folder / "missing.pth"
    paths["a folder"] = folder
    loop = folder / "loop.pth"
    loop.symlink_to(loop)
    paths["a link to itself"] = loop
    os.mkfifo(folder / "pipe.pth")
    paths["a pipe"] = folder / "pipe.pth"
    paths["an endless device"] = Path("/dev/zero")
    paths["unreadable even to root"] = Path("/proc/self/mem")
    return paths


def bad_folders(folder: Path) -> Iterator[Path]:
    """Folders of images, each with one that is wrong."""
    for kind in ("link", "bomb", "text", "cut", "no classes"):
        for part in ("train", "test"):
            (folder / kind / part).mkdir(parents=True)
            if kind == "no classes":
                continue
            (folder / kind / part / "a").mkdir()
            Image.effect_noise((64, 64), 50).convert("RGB").save(folder / kind / part / "a/0.png")
        yield folder / kind
    wrong = [folder / kind / "train/a/1.png" for kind in ("link", "bomb", "text", "cut")]
    wrong[0].symlink_to("/etc/hostname")
    Image.new("1", (20_000, 20_000)).save(wrong[1])
    wrong[2].write_text("no image\n")
    wrong[3].write_bytes(wrong[3].with_name("0.png").read_bytes()[:500])


def test_bad_input_is_one_line_with_its_exit_code(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    digits = ("--data", "digits", "--epochs", 1)
    cases: list[tuple[str, tuple[object, ...], int]] = []
    for option in fields(TrainConfig):
        for value in bad_values(option):
            flag = f"--{option.name.replace('_', '-')}"
            cases.append(("train.py", (flag, value), 2))
            recipe = tmp_path / f"{option.name}_{len(cases)}.toml"
            recipe.write_text(f"{option.name} = {toml(value)}\n")
            cases.append(("train.py", ("--config", recipe), 2))
    for text in ("unknown_key = 1\n", "arch = \n", "arch = [1]\n", "flip = 3\n", "\x00", "lr = 1\nlr = 2\n"):
        recipe = tmp_path / f"bad{len(cases)}.toml"
        recipe.write_text(text)
        cases.append(("train.py", ("--config", recipe), 2))
    for kind, path in bad_files(tmp_path).items():
        if kind != "a packed file":
            cases.append(("show_params.py", (path,), 2))
            cases.append(("report.py", (path, "--arch", "res20", "--bit", 4, "--output", "r.html"), 2))
            cases.append(("evaluate.py", ("--init", path, "--bit", 4, "--data", "digits"), 2))
        cases.append(("train.py", ("--init", path, *digits), 2))
    images = tmp_path / "images.npz"
    for content in ({}, {"images": np.zeros((2, 3, 8, 8), np.uint8)}, {"images": np.zeros(3), "labels": np.zeros(3)}):
        np.savez(images.with_name(f"i{len(content)}{len(cases)}.npz"), **content)
        cases.append(("train.py", ("--data", images.with_name(f"i{len(content)}{len(cases)}.npz")), 2))
    bad: list[tuple[object, ...]] = [("--arch", "res21"), ("--preset", "apot"), ("--device", "cuda:99")]
    bad += [("--gpu", "x"), ("--data", "absent"), ("--data", tmp_path / "images.txt")]
    bad += [("--test-data", "absent"), ("--no-such", 1)]
    cases.extend(("train.py", argv, 2) for argv in bad)
    cases.extend(("train.py", ("--data", path, "--arch", "res20"), 2) for path in bad_folders(tmp_path))
    cases.extend(("train.py", ("--data", path), 2) for path in ("/dev/zero", "/proc/self/mem"))
    cases.extend(("train.py", ("--config", path), 2) for path in (tmp_path, "/dev/zero", "/proc/self/mem"))
    good = tmp_path / "good.pth"
    to = ("--output", "out")
    cases.extend(
        ("export.py", (good, *argv), 2)
        for argv in (
            ("--to", "int3", *to),
            ("--to", "onnx", "--mode", "int3", *to),
            ("--to", "packed", *to),
            ("--arch", "res20", "--bit", 3, "--to", "onnx", "--mode", "int8", "--data", "absent", *to),
        )
    )
    cases.extend(
        ("progressive.py", argv, 2)
        for argv in (
            ("--bits", "4,x"),
            ("--bits", ""),
            ("--bits", "1"),
            ("--config", "absent"),
            ("--resume", "absent"),
        )
    )
    cases.extend(
        ("benchmark.py", argv, 2) for argv in (("nothing",), ("step", "--rounds", "x"), ("step", "--compile", "x"))
    )
    cases.extend(("show_params.py", argv, 2) for argv in ((), (good, "--bit", 9)))
    cases.extend(("evaluate.py", argv, 2) for argv in ((), ("--released", "absent"), ("--init", good, "--bit", 9)))
    taken = tmp_path / "taken"
    taken.write_text("a file\n")
    cases.append(("train.py", ("--output", taken, *digits), 4))
    if os.geteuid() == 0:
        cases.append(("train.py", ("--output", "/proc/nowhere", *digits), 4))
    rows = []
    for script, argv, expected in cases:
        code, out, err = run(script, *argv)
        shown = " ".join(str(a).replace(str(tmp_path), "DIR") for a in argv)
        assert code == expected, (script, shown, out, err)
        assert err.count("\n") == 1, (shown, err)
        assert err.startswith(f"{script}: error: "), (shown, err)
        assert "Traceback" not in err + out, shown
        assert not list(Path.cwd().iterdir()), shown
        rows.append(f"| `{script} {shown}` | {err.strip().replace(str(tmp_path), 'DIR')[:160]} | {code} |")
    assert not (tmp_path / "ran").exists()
    assert len(rows) >= 300
    print("\n" + "\n".join(["| command | prints | exit code |", "| --- | --- | --- |", *rows]))
