"""The container of a packed file: safetensors, with what describes the tensors in its metadata, compressed."""

from __future__ import annotations

import base64
import json
import os
import zlib
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apot_fat.checkpoint.files import atomic_write
from apot_fat.optional import needed_for

FORMAT = "apot-fat packed"
VERSION = 1
_PURPOSE = "a packed file"
_FLOATS = "float32"
_MAX_INDEX_BYTES = 1 << 26


def write_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], left: Mapping[str, Tensor], index: Mapping[str, Any]
) -> int:
    """Write a file, atomically, the same bytes for the same content; its size in bytes.

    Args:
        tensors: each with a place of its own in the file.
        left: those of float32 lie one after the other, the others as ``tensors``.
        index: JSON values that describe them, ``layers`` among them; ``floats`` is added, the shapes of what lies so.
    """
    with needed_for(_PURPOSE):
        from safetensors.torch import save
    floats = {name: tensor for name, tensor in left.items() if tensor.dtype == torch.float32}
    own = {**tensors, **{name: tensor.contiguous() for name, tensor in left.items() if name not in floats}}
    own[_FLOATS] = torch.cat([torch.empty(0), *(tensor.flatten() for tensor in floats.values())])
    shapes = {name: list(tensor.shape) for name, tensor in floats.items()}
    text = json.dumps({"layers": index["layers"], "floats": shapes, **index}, separators=(",", ":"))
    packed = base64.b85encode(zlib.compress(text.encode(), 9)).decode()
    metadata = {"format": FORMAT, "version": str(VERSION), "index": packed}
    data = save({name: tensor.cpu() for name, tensor in own.items()}, metadata)
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start]) | {"__metadata__": metadata}  # which it writes in an order drawn anew
    head = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        return file.write(len(head).to_bytes(8, "little")) + file.write(head) + file.write(memoryview(data)[start:])


def read_tensors(path: Path, *, whole: bool = True) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a file, with what ``take_floats`` takes, and its index; without ``whole`` the index alone.

    Raises:
        ValueError: no such file, or no packed file, or a damaged one.
        MissingPackageError: safetensors.
    """
    if not path.is_file():
        raise ValueError(f"packed file {path}: no such file")
    with needed_for(_PURPOSE):
        from safetensors import SafetensorError, safe_open
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(f"packed file {path}: not written by save_packed")
            if metadata.get("version") != str(VERSION):
                raise ValueError(f"packed file {path}: version {metadata.get('version')}, this package reads {VERSION}")
            names = list(file.keys())
            tensors = {name: file.get_tensor(name) for name in names} if whole else {}
    except (SafetensorError, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"packed file {path}: not a safetensors file, or damaged ({error})") from error
    try:
        inflate = zlib.decompressobj()
        text = inflate.decompress(base64.b85decode(metadata["index"]), _MAX_INDEX_BYTES)
        index = json.loads(text)
        if inflate.unconsumed_tail or not isinstance(index, dict):
            raise ValueError
    except (KeyError, ValueError, zlib.error, RecursionError) as error:
        raise ValueError(f"packed file {path}: its metadata are damaged") from error
    if not isinstance(index.get("layers"), dict) or not isinstance(index.get("floats"), dict) or _FLOATS not in names:
        raise ValueError(f"packed file {path}: its metadata are damaged")
    return tensors, index


def take_floats(tensors: dict[str, Tensor], index: Mapping[str, Any]) -> dict[str, Tensor]:
    """Take the float32 leftovers out of the tensors of a file, by name.

    Raises:
        TypeError, RuntimeError, ValueError: the index does not fit.
    """
    blob, shapes = tensors.pop(_FLOATS), index["floats"]
    sizes = [prod(shape) for shape in shapes.values()]
    if blob.dtype != torch.float32 or blob.dim() != 1 or sum(sizes) != blob.numel() or any(size < 0 for size in sizes):
        raise ValueError(f"{blob.numel()} float values for {sum(sizes)} in its metadata")
    parts = blob.split(sizes)
    return {name: part.view(tuple(shape)) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
