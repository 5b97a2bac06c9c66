"""Reading and writing checkpoint files: nothing unpickled but tensors and plain values, nothing half-written."""

from __future__ import annotations

import os
import pickle
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Load a checkpoint onto the CPU with ``weights_only=True``.

    Args:
        path: a file written by ``torch.save``.

    Returns:
        Its dict.

    Raises:
        ValueError: no such file, a file that is no checkpoint or is damaged, or one that holds more than tensors and
            plain values.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"checkpoint {path}: no such file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about files that are refused below anyway
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "Unsupported global" in str(error) or "Unsupported class" in str(error):
            raise ValueError(
                f"checkpoint {path}: holds Python objects besides tensors and plain values, which are never loaded"
            ) from error
        raise ValueError(f"checkpoint {path}: not a PyTorch checkpoint, or damaged") from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, AttributeError, TypeError) as error:
        raise ValueError(f"checkpoint {path}: not a PyTorch checkpoint, or damaged") from error
    if not isinstance(content, dict):
        raise ValueError(f"checkpoint {path}: holds a {type(content).__name__}, a dict is expected")
    return content


def write_checkpoint(content: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Write a checkpoint atomically: to a temporary file beside it, flushed to disk, then renamed."""
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its place if the block succeeds and is removed if it does not."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    temporary.chmod(0o666 & ~_umask())
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
