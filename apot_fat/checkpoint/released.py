"""Released weights: torchvision's fp32 networks, the checkpoints of both papers, and our packed ones (the manifest)."""

from __future__ import annotations

import os
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from torch import Tensor
from torch.hub import download_url_to_file

from apot_fat.checkpoint.files import file_checksum
from apot_fat.models import find_architecture
from apot_fat.package_files import package_folder
from apot_fat.quant.spec import nearest

TORCHVISION = "torchvision"
MANIFEST = package_folder("checkpoints") / "manifest.toml"


@dataclass(frozen=True)
class Released:
    """One checkpoint of the manifest: published by the papers' authors, or packed here.

    Args:
        name: what ``--released`` takes.
        address: where it is published; empty where only a folder of several is (``page``).
        arch: its network, as spelled by its authors.
        preset, bits: how it is quantized.
        top1: published accuracy, %; of ours that on the test images of ``data``.
        sha256: of the file measured here; empty where none has been.
        page: where a person finds it.
        file: ours: the packed file beside the manifest.
        data: the images of ``top1``; empty for those of the papers.
        images: which of them, where ``top1`` is of fewer than all test images.
    """

    name: str
    address: str
    arch: str
    preset: str
    bits: int
    top1: float
    sha256: str = ""
    page: str = ""
    file: str = ""
    data: str = ""
    images: str = ""


def read_manifest(path: Path = MANIFEST) -> dict[str, Released]:
    """The checkpoints of the manifest by name.

    Raises:
        ValueError: no manifest there, an unknown key or a missing one.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"manifest {path}: not readable") from error
    known = {field.name for field in fields(Released)} - {"name"}
    entries = {}
    for name, values in content.items():
        if not isinstance(values, dict) or set(values) - known:
            raise ValueError(f"manifest {path}: [{name}]: expected the keys {', '.join(sorted(known))}")
        try:
            entries[name] = Released(name, **values)
        except TypeError as error:
            raise ValueError(f"manifest {path}: [{name}]: {error}") from error
    return entries


def fetch_released(name: str, cache: str | os.PathLike[str] | None = None) -> tuple[Released, Path]:
    """The file of a checkpoint of the manifest: ours, or from the cache, or downloaded into it with a bar; verified.

    Args:
        name: a name of the manifest.
        cache: folder of downloaded files; by default ``apot-fat`` in torch hub's folder.

    Returns:
        The manifest's entry and the file.

    Raises:
        ValueError: an unknown name; neither cached nor to be downloaded (says what to put where); a wrong checksum.
    """
    manifest = read_manifest()
    if name not in manifest:
        raise ValueError(f"no released checkpoint {name!r}{nearest(name, manifest)}: choose {', '.join(manifest)}")
    entry = manifest[name]
    folder = Path(cache) if cache else Path(torch.hub.get_dir()) / "apot-fat"
    path = MANIFEST.parent / entry.file if entry.file else folder / f"{name}.pth.tar"
    source = entry.address or entry.page
    if not path.is_file():
        if not entry.address:
            raise ValueError(
                f"{name} is not in {folder} and has no address of its own: put its file from {source} at {path}"
            )
        _download(entry.address, path, f"put the file from {source} at {path}")
    if entry.sha256 and (found := file_checksum(path)) != entry.sha256:
        raise ValueError(f"{path}: sha256 {found}, the manifest says {entry.sha256}; remove it to fetch it again")
    return entry, path


def torchvision_weights(arch: str) -> dict[str, Tensor]:
    """torchvision's fp32 ImageNet weights for an architecture, fetched by torchvision.

    Raises:
        ValueError: torchvision has none for it, or they are neither cached nor to be downloaded (says which file it
            looks for).
    """
    from torchvision.models import get_model_weights, list_models

    name = find_architecture(arch).name
    if find_architecture(arch).dataset != "imagenet" or name not in list_models():
        raise ValueError(f"torchvision has no weights for {arch!r}: name a checkpoint with --init")
    weights: Any = next(iter(get_model_weights(name)))  # the first version, which both papers start from
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(weights.url).path).name
    if not path.is_file():
        _download(weights.url, path, f"put {weights.url} at {path}")
    state: dict[str, Tensor] = weights.get_state_dict(progress=False, check_hash=True)
    return state


def _download(address: str, path: Path, remedy: str) -> None:
    made = not path.parent.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        download_url_to_file(address, str(path))  # to a temporary file, then moved, with a bar
    except (OSError, RuntimeError) as error:
        if made and not any(path.parent.iterdir()):
            path.parent.rmdir()
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path.name} could not be downloaded ({reason}): {remedy}") from error
