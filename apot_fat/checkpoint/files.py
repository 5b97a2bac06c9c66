"""Reading and writing checkpoint files: nothing unpickled but tensors and plain values, nothing half-written."""

from __future__ import annotations

import copy
import hashlib
import io
import os
import pickle
import re
import shutil
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from apot_fat.plain import is_expanded, plain

_CHECKSUM = "checksum"


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Load a checkpoint onto the CPU with ``weights_only=True``.

    Args:
        path: a file written by ``torch.save``.

    Returns:
        Its dict.

    Raises:
        ValueError: no such file, a file that is no checkpoint or is damaged, or one that holds more than tensors and
            plain values (``plain``).
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"checkpoint {path}: no such file")
    try:
        _check_unpacked_size(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about files that are refused below anyway
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes make the unpickler call anything with anything
        if isinstance(error, pickle.UnpicklingError) and re.search("Unsupported (global|class)", str(error)):
            raise ValueError(
                f"checkpoint {path}: holds Python objects besides tensors and plain values, which are never loaded"
            ) from error
        raise ValueError(f"checkpoint {path}: not a PyTorch checkpoint, or damaged") from error
    if not isinstance(content, dict):
        raise ValueError(f"checkpoint {path}: holds a {type(content).__name__}, a dict is expected")
    content = plain(content, f"checkpoint {path}")
    written = content.pop(_CHECKSUM, None)
    if written is not None and written != checksum(content):
        raise ValueError(f"checkpoint {path}: damaged, its contents do not have their checksum")
    return content


def write_checkpoint(content: dict[str, Any], path: str | os.PathLike[str], *, keep_before: bool = False) -> None:
    """Write a checkpoint with its checksum atomically: to a temporary file beside it, read back, then renamed.

    Its tensors are written as those of a CPU, so that ``torch.load`` reads it on any machine.

    Args:
        content: tensors and plain values.
        path: the file.
        keep_before: keep what was there under ``before(path)``.

    Raises:
        OSError: it cannot be written; what was there stays.
    """
    path = Path(path)
    content = _on_cpu(content)
    buffer = io.BytesIO()
    torch.save({**content, _CHECKSUM: checksum(content)}, buffer)
    with _replacing(path, buffer.tell(), keep_before) as temporary:
        temporary.write_bytes(buffer.getbuffer())
        if temporary.read_bytes() != buffer.getbuffer():
            raise OSError("what was written reads back differently")


def copy_checkpoint(source: str | os.PathLike[str], path: str | os.PathLike[str], *, keep_before: bool = False) -> None:
    """Copy a checkpoint just written: as ``write_checkpoint`` would write it again, but neither serialised nor summed.

    Raises:
        OSError: it cannot be written; what was there stays.
    """
    with _replacing(Path(path), Path(source).stat().st_size, keep_before) as temporary:
        shutil.copyfile(source, temporary)


@contextmanager
def _replacing(path: Path, size: int, keep_before: bool) -> Iterator[Path]:
    try:
        with atomic_write(path) as temporary:
            yield temporary
            if keep_before and path.exists():
                _link_over(path, before(path))
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(error.errno, f"checkpoint {path}: cannot be written ({reason}); it takes {size} bytes") from error


def before(path: str | os.PathLike[str]) -> Path:
    """Where the checkpoint before the one at ``path`` is kept."""
    path = Path(path)
    return path.with_name(f"{path.name}.before")


def read_newest(path: str | os.PathLike[str], warn: Callable[[str], None]) -> dict[str, Any]:
    """The checkpoint at ``path``, or where that is damaged the one before it.

    Args:
        path: the newest.
        warn: told of a damaged one.

    Raises:
        ValueError: neither can be read; what is wrong with the newest.
    """
    try:
        return read_checkpoint(path)
    except ValueError as damaged:
        try:
            content = read_checkpoint(before(path))
        except ValueError:
            raise damaged from None
        warn(f"{damaged}; the one before it is used")
        return content


def drop_damaged(path: str | os.PathLike[str]) -> None:
    """Remove a damaged checkpoint that has one before it: the next to be written would keep it in the place of that."""
    path = Path(path)
    if path.exists() and before(path).exists():
        try:
            read_checkpoint(path)
        except ValueError:
            path.unlink()


def checksum(content: Any) -> str:
    """SHA-256 of tensors and plain values, whatever they are nested in: 64 hexadecimal digits."""
    digest = hashlib.sha256()
    _digest(content, digest.update)
    return digest.hexdigest()


def file_checksum(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's bytes: 64 hexadecimal digits.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error


def _check_unpacked_size(path: Path) -> None:
    # torch.save stores its records as they are: those that unpack to more than the file were made to fill the memory
    with path.open("rb") as file:
        if file.read(2) != b"PK":
            return
    with zipfile.ZipFile(path) as archive:
        if sum(record.file_size for record in archive.infolist()) > path.stat().st_size:
            raise ValueError("compressed records")


def _on_cpu(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        value = value if value.device.type == "cpu" else value.detach().cpu()
        return value.clone() if is_expanded(value) else value
    if isinstance(value, dict):
        moved = copy.copy(value)  # a state dict remembers the versions of its modules
        moved.update((key, _on_cpu(item)) for key, item in value.items())
        return moved
    return type(value)(map(_on_cpu, value)) if type(value) in (list, tuple) else value


def _digest(value: Any, update: Callable[[Any], None]) -> None:
    if isinstance(value, torch.Tensor):
        update(f"tensor {value.dtype} {tuple(value.shape)}\n".encode())
        update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    elif isinstance(value, Mapping):
        update(f"dict {len(value)}\n".encode())
        for key, item in value.items():
            _digest(key, update)
            _digest(item, update)
    elif isinstance(value, list | tuple):
        update(f"list {len(value)}\n".encode())
        for item in value:
            _digest(item, update)
    else:
        update(f"{type(value).__name__} {value!r}\n".encode())


def _link_over(source: Path, target: Path) -> None:
    # a second name, made aside: at no moment is either of the two missing
    aside = target.with_name(f".{target.name}.tmp")
    aside.unlink(missing_ok=True)
    try:
        aside.hardlink_to(source)
    except OSError:  # a file system without links
        shutil.copyfile(source, aside)
    aside.replace(target)


def output_file(path: str | os.PathLike[str], suffix: str, *inputs: str | os.PathLike[str]) -> Path:
    """The file that is about to be written, checked before the work is done.

    Args:
        path: its path.
        suffix: of its kind.
        inputs: what the work reads.

    Raises:
        ValueError: one of the inputs, a file of another kind that is there, or no file.
    """
    path = Path(path)
    if path.exists():
        if not path.is_file():
            raise ValueError(f"{path}: a folder, a device or a pipe; name a file to write")
        if any(Path(given).exists() and path.samefile(given) for given in inputs):
            raise ValueError(f"{path}: is read here, and would be overwritten; name another file to write")
        if path.suffix != suffix:
            raise ValueError(f"{path}: is there, and no {suffix} file; name another file to write, or remove it")
    return path


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside ``path``: flushed and renamed to it if the block succeeds, removed if it does not.

    Through a symbolic link the file that it leads to is written.

    Raises:
        ValueError: something other than a file is there.
    """
    path = Path(path).resolve()
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: a folder, a device or a pipe; name a file to write")
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())  # as any new file: some writers make a file of their own in its place
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files that killed writers left in a folder."""
    for leftover in folder.glob(".*.tmp"):
        leftover.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
