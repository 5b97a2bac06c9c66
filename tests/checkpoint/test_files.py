from __future__ import annotations

import pickle
import resource
import zipfile
from pathlib import Path

import pytest
import torch

from apot_fat.checkpoint import (
    atomic_write,
    before,
    copy_checkpoint,
    read_checkpoint,
    read_newest,
    save_packed,
    write_checkpoint,
)
from apot_fat.models import create_model


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


def test_a_damaged_newest_file_gives_way_to_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pth.tar"
    for epoch in range(3):
        write_checkpoint({"w": torch.full((1000,), float(epoch)), "epoch": epoch}, path, keep_before=True)
    warnings: list[str] = []
    assert read_newest(path, warnings.append)["epoch"] == 2
    assert read_checkpoint(before(path))["epoch"] == 1
    assert {entry.name for entry in tmp_path.iterdir()} == {path.name, before(path).name}
    whole = path.read_bytes()
    middle = whole.index(torch.full((1000,), 2.0).numpy().tobytes()) + 1000
    path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])  # one bit of one weight
    with pytest.raises(ValueError, match="do not have their checksum"):
        read_checkpoint(path)
    assert not warnings
    assert read_newest(path, warnings.append)["epoch"] == 1
    assert "the one before it is used" in warnings[0]
    before(path).write_bytes(b"")
    with pytest.raises(ValueError, match="checksum"):
        read_newest(path, warnings.append)


def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path: Path) -> None:
    path, large = tmp_path / "run" / "checkpoint.pth.tar", tmp_path / "large.pth"
    write_checkpoint({"w": torch.zeros(10)}, path)
    write_checkpoint({"w": torch.zeros(10_000)}, large)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(OSError, match=rf"{path}: cannot be written .* takes \d{{5}} bytes"):
            write_checkpoint({"w": torch.zeros(10_000)}, path, keep_before=True)
        with pytest.raises(OSError, match=rf"{path}: cannot be written .* takes \d{{5}} bytes"):
            copy_checkpoint(large, path, keep_before=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert torch.equal(read_checkpoint(path)["w"], torch.zeros(10))
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    copy_checkpoint(large, path, keep_before=True)
    assert path.read_bytes() == large.read_bytes()
    assert torch.equal(read_checkpoint(before(path))["w"], torch.zeros(10))
    assert not path.samefile(large)  # whoever overwrites one of them has not overwritten the other


def test_code_in_a_checkpoint_does_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    torch.save({"state_dict": Payload(marker)}, tmp_path / "zip.pth")
    with (tmp_path / "plain.pth").open("wb") as file:
        pickle.dump(Payload(marker), file)
    for name in ("zip.pth", "plain.pth"):
        with pytest.raises(ValueError, match=name):
            read_checkpoint(tmp_path / name)
    assert not marker.exists()


def test_what_is_written_can_be_read_of_expanded_tensors_too(tmp_path: Path) -> None:
    content = {"w": torch.arange(3.0).expand(4, 3), "c": torch.tensor([1 + 1j])}
    write_checkpoint(content, tmp_path / "a.pth")
    read = read_checkpoint(tmp_path / "a.pth")
    assert all(torch.equal(read[name], tensor) for name, tensor in content.items())


def test_records_that_unpack_to_more_than_their_file_are_not_unpacked(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(100_000)}, tmp_path / "whole.pth")
    with (
        zipfile.ZipFile(tmp_path / "whole.pth") as whole,
        zipfile.ZipFile(tmp_path / "packed.pth", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for record in whole.infolist():
            packed.writestr(record.filename, whole.read(record))
    read_checkpoint(tmp_path / "whole.pth")
    with pytest.raises(ValueError, match=r"packed\.pth: not a PyTorch checkpoint, or damaged"):
        read_checkpoint(tmp_path / "packed.pth")


def test_files_have_the_rights_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    with atomic_write(tmp_path / "file") as temporary:
        temporary.unlink()  # as safetensors does
        temporary.touch(0o600)
    save_packed(create_model("resnet20", bits=4), tmp_path / "packed.safetensors")
    assert len({(tmp_path / name).stat().st_mode for name in ("plain", "file", "packed.safetensors")}) == 1
