from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch

from apot_fat.checkpoint import atomic_write, read_checkpoint, write_checkpoint


class Payload:
    """A pickle that would run code."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return Path.write_text, (self.marker, "ran")  # type: ignore[return-value]


def test_round_trip_leaves_no_temporary_file(tmp_path: Path) -> None:
    path = tmp_path / "run/checkpoint.pth.tar"
    write_checkpoint({"state_dict": {"w": torch.arange(3)}, "epoch": 2}, path)
    content = read_checkpoint(path)
    assert content["epoch"] == 2
    assert [entry.name for entry in path.parent.iterdir()] == ["checkpoint.pth.tar"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def write_half() -> None:
        with atomic_write(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_half()
    assert path.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    whole = tmp_path / "whole.pth"
    write_checkpoint({"w": torch.arange(1000)}, whole)
    files = {
        "text.pth": b"hello\n",
        "empty.pth": b"",
        "cut.pth": whole.read_bytes()[:900],
        "list.pth": None,
    }
    torch.save([torch.ones(2)], tmp_path / "list.pth")
    for name, content in files.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=name):
            read_checkpoint(tmp_path / name)
    with pytest.raises(ValueError, match="no such file"):
        read_checkpoint(tmp_path / "absent.pth")
    with pytest.raises(ValueError, match="no such file"):
        read_checkpoint(tmp_path)


def test_code_in_a_checkpoint_does_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    torch.save({"state_dict": Payload(marker)}, tmp_path / "zip.pth")
    with (tmp_path / "plain.pth").open("wb") as file:
        pickle.dump(Payload(marker), file)
    for name in ("zip.pth", "plain.pth"):
        with pytest.raises(ValueError, match=name):
            read_checkpoint(tmp_path / name)
    assert not marker.exists()
