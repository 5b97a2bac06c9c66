"""Damaged and hostile files are read or refused with ValueError: no crash, no code, no hang, no flood of memory.

Every kind of file that the package reads is mutated in its bytes, and in what it holds behind its checksums.
"""

from __future__ import annotations

import base64
import io
import json
import random
import resource
import struct
import time
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load, save

from apot_fat import load_packed, load_weights, save_packed
from apot_fat.checkpoint import packed_normalization, write_checkpoint
from apot_fat.data import FileBatches, FileSet, load_dataset
from apot_fat.models import create_model
from apot_fat.quant.all_layers import clipping_table
from apot_fat.reporting.subject import load_subjects
from apot_fat.training import TrainConfig
from apot_fat.training.recipe import CONFIG_ROOT, read_recipe
from apot_fat.training.sweep import read_sweep

MOST_SECONDS, MOST_KIB = 5, 1 << 20
INF, NAN = float("inf"), float("nan")

SWEEP = """\
[sweep]
methods = {"apot-cifar" = [4, 3], "fat-cifar" = [3]}
seeds = [0, 1]
chain = true
baseline = "published"

[base]
arch = "resnet20"
data = "digits"
epochs = 2

[bits.3]
lr = 0.01

[methods.fat-cifar]
weight_decay = 1e-4

[recipes.published]

[recipes.ours]
config = "published"
methods = {"apot-cifar" = [4]}
bits = {4 = {lr = 0.02}}
"""

# Bytes


def flip(data: bytes, draw: random.Random) -> bytes:
    mutated = bytearray(data)
    for _ in range(draw.choice([1, 1, 3, 30])):
        mutated[draw.randrange(len(mutated))] ^= 1 << draw.randrange(8)
    return bytes(mutated)


def flip_header(data: bytes, draw: random.Random) -> bytes:
    mutated = bytearray(data)
    for _ in range(draw.choice([1, 2, 8])):
        mutated[draw.randrange(min(len(mutated), 6000))] = draw.randrange(256)
    return bytes(mutated)


def flip_end(data: bytes, draw: random.Random) -> bytes:
    mutated = bytearray(data)
    for _ in range(draw.choice([1, 2, 8])):
        mutated[-1 - draw.randrange(min(len(mutated), 6000))] = draw.randrange(256)
    return bytes(mutated)


def cut(data: bytes, draw: random.Random) -> bytes:
    start = draw.randrange(len(data))
    return draw.choice([data[:start], data[start:], data[:start] + data[start + draw.randrange(1, 500) :]])


def splice(data: bytes, draw: random.Random) -> bytes:
    size = draw.randrange(1, 3000)
    source, target = (draw.randrange(max(1, len(data) - size)) for _ in range(2))
    return data[:target] + data[source : source + size] + data[target + size * draw.randrange(2) :]


def swap(data: bytes, draw: random.Random) -> bytes:
    size = draw.choice([size for size in (4, 64, 1000) if size < len(data)])
    one, other = sorted(draw.randrange(len(data) - size) for _ in range(2))
    if other - one < size:
        return data[::-1]
    return (
        data[:one]
        + data[other : other + size]
        + data[one + size : other]
        + data[one : one + size]
        + data[other + size :]
    )


def claim(data: bytes, draw: random.Random) -> bytes:
    return struct.pack("<Q", draw.choice([0, 1, len(data), 1 << 40, (1 << 63) + 5])) + data[8:]


Change = Callable[[bytes, random.Random], bytes]
BYTES: tuple[Change, ...] = (flip, flip_header, flip_end, cut, splice, swap, claim)


# What is behind the checksums


def record(data: bytes, draw: random.Random) -> bytes:
    """A record of a zip archive, whose checksum is that of what it became."""
    written = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as before, zipfile.ZipFile(written, "w") as after:
        entries = before.infolist()
        changed = draw.choice([entries[0], draw.choice(entries)])  # the first describes the others
        for entry in entries:
            content = before.read(entry)
            if entry is changed and len(content) > 4:
                content = draw.choice(BYTES)(content, draw)
            after.writestr(entry.filename, content)
    return written.getvalue()


def chunk(data: bytes, draw: random.Random) -> bytes:
    """A chunk of a PNG, likewise."""
    chunks, at = [], 8
    while at < len(data):
        (size,) = struct.unpack(">I", data[at : at + 4])
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + size]))
        at += size + 12
    index = draw.choice([0, draw.randrange(len(chunks))])
    kind, content = chunks[index]
    if kind == b"IHDR" and draw.randrange(2):
        sides = [draw.choice([0, 1, 32, 20_000, 1_000_000, 1 << 31, (1 << 32) - 1]) for _ in range(2)]
        content = struct.pack(">II", *sides) + content[8:]
    elif len(content) > 4:
        content = draw.choice(BYTES)(content, draw)
    chunks[index] = kind, content
    crc = [struct.pack(">I", zlib.crc32(kind + content)) for kind, content in chunks]
    pairs = zip(chunks, crc, strict=True)
    return data[:8] + b"".join(struct.pack(">I", len(c)) + kind + c + end for (kind, c), end in pairs)


def nested(levels: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(levels):
        value = [value]
    return value


ODD: list[Any] = [None, {}, [], 0, 5, -1, 10**400, 1 << 63, 0.5, NAN, INF, True, "", "x", "\0\n", "9" * 5000, [[1]]]
ODD += [{"x": 1}, {"": {"": []}}, nested(200)]


def odd_tensors(like: torch.Tensor | None) -> list[Any]:
    given = torch.rand(3) if like is None else like
    changed = [given * NAN, given * -1, given.to(torch.complex64), given.to(torch.int64), given[None], given.T]
    changed += [given.to_sparse(), given.to("meta"), given.to(torch.float8_e4m3fn), torch.nn.Parameter(given.float())]
    return [*changed, torch.zeros(1).expand(10**12), torch.zeros(()).expand(given.shape), torch.empty(0), given.shape]


def change_inside(value: Any, draw: random.Random, odd: Callable[[Any, random.Random], Any]) -> Any:
    """Nested values with one of them, at any depth, another, gone, or under another name."""
    if not isinstance(value, dict | list) or not value or draw.random() < 0.05:
        return odd(value, draw)
    places = list(value) if isinstance(value, dict) else range(len(value))
    place, changed = draw.choice(places), value.copy()
    what = draw.random()
    if what < 0.1:
        del changed[place]
    elif what < 0.2 and isinstance(value, dict):
        changed[draw.choice([5, None, "", 2.5, "arch", *places])] = changed.pop(place)
    else:
        changed[place] = change_inside(value[place], draw, odd)
    return changed


def odd_value(value: Any, draw: random.Random) -> Any:
    if isinstance(value, str | int | float) and draw.randrange(2):
        return draw.choice([*ODD, value * 2, -1 if isinstance(value, str) else -value, str(value)])
    return draw.choice(ODD)


def odd_content(value: Any, draw: random.Random) -> Any:
    like = value if isinstance(value, torch.Tensor) else None
    return draw.choice(odd_tensors(like)) if like is not None or draw.randrange(4) == 0 else odd_value(value, draw)


def content(data: bytes, draw: random.Random) -> bytes:
    """What a checkpoint holds."""
    written = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what is about to be refused
        held = torch.load(io.BytesIO(data), weights_only=True)
        held.pop("checksum", None)
        torch.save(change_inside(held, draw, odd_content), written)
    return written.getvalue()


def index(data: bytes, draw: random.Random) -> bytes:
    """What a packed file says of itself."""
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    said = json.loads(zlib.decompress(base64.b85decode(header["__metadata__"]["index"])))
    packed = zlib.compress(json.dumps(change_inside(said, draw, odd_value), default=str).encode())
    header["__metadata__"]["index"] = base64.b85encode(packed).decode()
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data[8 + size :]


def tensor(data: bytes, draw: random.Random) -> bytes:
    """What a packed file holds."""
    header, held = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]]), load(data)
    name = draw.choice([*held, "float32"])
    own = held[name]
    changed = [own * 0 + 255, own * -1, own.flatten()[:-1], own.double() * NAN, own * INF, own[None], own * 1j]
    held[name] = draw.choice(changed)
    return save({name: value.contiguous() for name, value in held.items()}, header["__metadata__"])


def arrays(data: bytes, draw: random.Random) -> bytes:
    """What an .npz file holds."""
    held = dict(np.load(io.BytesIO(data)))
    name = draw.choice(list(held))
    changed: list[Any] = [held[name].astype(kind) for kind in ("i1", ">u8", "f4", "c8", "?", "U3", "M8[s]", "O")]
    changed += [held[name].astype("u8") + np.uint64(draw.choice([1 << 63, 1 << 33, 20_000_000, 65_535]))]
    changed += [held[name][..., None], held[name][:0], held[name][:3], held[name].T, np.zeros((8, 0, 9, 3), "u1")]
    held[name if draw.randrange(9) else "other"] = draw.choice(changed)
    written = io.BytesIO()
    np.savez(written, **held)
    return written.getvalue()


LITERALS = ["[]", "[[1]]", "{}", "{a = 1}", '"x"', '""', "nan", "-inf", "1e400", "-1", "0", "true", "[" * 300, "'''"]
LITERALS += [
    "[" * 100_000,
    "9" * 400,
    "9" * 5000,
    "1979-05-27",
    '"\\u0000"',
    f'"{"a" * 300}"',
    "[1, 'a']",
    "{a.b.c = 1}",
]
NAMES = ["arch", "bit", "chain", "bits", "seeds", "methods", "recipes", "config", "baseline", "x", '""', "lr.b.c"]
NAMES += [f"lr{'.a' * 9999}"]


def line(data: bytes, draw: random.Random) -> bytes:
    """A line of a TOML file."""
    lines = data.decode().splitlines()
    at = draw.choice([at for at, text in enumerate(lines) if text and text[0] != "#"])
    name, equals, value = lines[at].partition("=")
    if draw.randrange(4) == 0:
        lines[at] = draw.choice(
            ["", lines[at] * 2, f"{lines[at]}\n{lines[at]}", f"[{name}]", f"[[{name}]]", "[bits.²]"]
        )
    elif equals and draw.randrange(4):
        lines[at] = f"{name}= {draw.choice(LITERALS)}"
    else:
        lines[at] = f"{draw.choice(NAMES)} = {value or draw.choice(LITERALS)}"
    return "\n".join(lines).encode()


# The files


@dataclass(frozen=True)
class Kind:
    """Files of one kind: what they are, how they are changed, and what reads them."""

    files: dict[str, bytes]
    changes: tuple[Change, ...]
    read: Callable[[Path], None]


def weights(folder: Path) -> Kind:
    network = create_model("resnet20", "fat-cifar", 3, num_classes=4)
    shapes = {name: tensor.shape for name, tensor in network.state_dict().items()}
    write_checkpoint({"state_dict": network.state_dict(), "epoch": 3}, folder / "ours")
    torch.save({"state_dict": network.state_dict()}, folder / "published")  # without a checksum

    def read(path: Path) -> None:
        load_weights(network, path)
        assert {name: tensor.shape for name, tensor in network.state_dict().items()} == shapes
        assert all(tensor.isfinite().all() for tensor in network.state_dict().values())

    files = {f"{name}.pth": (folder / name).read_bytes() for name in ("ours", "published")}
    return Kind(files, (*BYTES, record, content, content, content), read)


def runs(folder: Path) -> Kind:
    network, config = create_model("res20", bits=3, num_classes=4), TrainConfig(arch="res20", bit=3)
    layers = {layer.name: asdict(layer) for layer in clipping_table(network)}
    scores = {f"{part}_{score}": 1.5 for part in ("train", "test") for score in ("loss", "top1")}
    history = [{"epoch": epoch, **scores, "lr": {"weights": 0.1}, "layers": layers, "seconds": 2.0} for epoch in (1, 2)]
    held: dict[str, Any] = {"arch": "res20", "epoch": 2, "best_prec": 1.5, "state_dict": network.state_dict()}
    torch.save(held | {"config": config.to_dict(), "history": history, "image_shape": (3, 8, 8)}, folder / "run")

    def read(path: Path) -> None:
        (subject,) = load_subjects(path, arch="res20", bit=3)
        assert subject.best is None or subject.best["test_top1"] is not None

    return Kind({"run.pth": (folder / "run").read_bytes()}, (record, content, content), read)


def packed(folder: Path) -> Kind:
    network = create_model("resnet20", "fat-cifar", 3, num_classes=4)
    save_packed(network, folder / "packed", mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    names = set(load_packed(folder / "packed").state_dict())

    def read(path: Path) -> None:
        state = load_packed(path).state_dict()
        assert set(state) >= {name for name in names if not name.endswith("_alpha")}
        assert all(tensor.isfinite().all() for tensor in state.values())
        packed_normalization(path)

    return Kind({"packed.safetensors": (folder / "packed").read_bytes()}, (*BYTES, index, index, tensor), read)


def recipes(folder: Path) -> Kind:
    def read(path: Path) -> None:
        recipe = read_recipe(path)
        for bits in recipe.chain:
            recipe.config(bits)

    path = CONFIG_ROOT / "digits/resnet20_apot.toml"
    return Kind({"recipe.toml": path.read_bytes()}, (*BYTES, line, line, line), read)


def sweeps(folder: Path) -> Kind:
    def read(path: Path) -> None:
        sweep = read_sweep(path)
        for cell in sweep.cells[:20]:
            sweep.config(cell, {"output": "out"})

    return Kind({"sweep.toml": SWEEP.encode()}, (*BYTES, line, line, line), read)


def images(folder: Path) -> Kind:
    for part in ("train", "test"):
        (folder / "images" / part / "a").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 48, 4), dtype=np.uint8)
    rgba, files = Image.fromarray(pixels, "RGBA"), {}
    rgba.convert("RGB").save(folder / "images/train/a/whole.png")
    rgba.convert("RGB").save(folder / "images/test/a/whole.png")
    for name, image in (
        ("rgb.png", rgba.convert("RGB")),
        ("grey16.png", Image.fromarray(pixels[..., 0].astype(np.uint16) << 8)),
        ("palette.png", rgba.convert("RGB").quantize(9)),
        ("cmyk.jpg", rgba.convert("CMYK")),
        ("rgb.jpg", rgba.convert("RGB")),
    ):
        image.save(folder / name, exif=b"Exif\0\0II*\0\x08\0\0\0\0\0\0\0\0\0")
        files[name] = (folder / name).read_bytes()

    def read(path: Path) -> None:
        placed = folder / "images/train/a" / f"1{path.suffix}"
        path.rename(placed)
        try:
            for stream in (False, True):
                dataset = load_dataset(str(folder / "images"), image_size=14, stream=stream, on_damaged="skip")
                assert (len(dataset.train or ()) == 2) or not stream
                if isinstance(dataset.train, FileSet):
                    options: dict[str, Any] = {"image_size": 14, "workers": 0, "on_damaged": "skip"}
                    batches = FileBatches(dataset.train, 2, torch.device("cpu"), (0,) * 3, (1,) * 3, **options)
                    assert sum(len(batch.x) for batch in batches) in (1, 2)
            load_dataset(str(folder / "images"), image_size=14)
        finally:
            placed.unlink()

    return Kind(files, (*BYTES, chunk, chunk), read)


def npz(folder: Path) -> Kind:
    rng = np.random.default_rng(0)
    held: dict[str, Any] = {"images": rng.integers(0, 256, (20, 3, 8, 9), dtype=np.uint8), "labels": np.arange(20) % 3}
    np.savez(folder / "a.npz", **held)
    np.savez_compressed(folder / "b.npz", **held)

    def read(path: Path) -> None:
        dataset = load_dataset(str(path), need_train=False)
        assert len(dataset.test) > 0

    files = {name: (folder / name).read_bytes() for name in ("a.npz", "b.npz")}
    return Kind(files, (*BYTES, record, arrays, arrays), read)


KINDS = (weights, runs, packed, recipes, sweeps, images, npz)


def mutate(make: Callable[[Path], Kind], count: int, folder: Path) -> Counter[str]:
    """Mutate so many files of a kind; how many were read and how many refused."""
    kind, outcomes, failures = make(folder), Counter[str](), list[str]()
    for name, data in kind.files.items():
        (folder / name).write_bytes(data)
        kind.read(folder / name)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for seed in range(count):
        draw = random.Random(seed)
        name = draw.choice(list(kind.files))
        change = draw.choice([change for change in kind.changes if change is not chunk or name.endswith(".png")])
        path = folder / f"mutated{Path(name).suffix}"
        path.write_bytes(change(kind.files[name], draw))
        start, outcome = time.process_time(), "read"
        try:
            kind.read(path)
        except ValueError:
            outcome = "refused"
        except Exception as error:
            failures.append(f"seed {seed}, {change.__name__} of {name}: {error!r:.300}")
        if (seconds := time.process_time() - start) > MOST_SECONDS:
            failures.append(f"seed {seed}, {change.__name__} of {name}: {seconds:.0f} s")
        outcomes[f"{change.__name__} {outcome}"] += 1
    assert not failures, "\n".join(failures)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < MOST_KIB
    return outcomes


@pytest.mark.parametrize("make", KINDS)
def test_mutated_files(make: Callable[[Path], Kind], tmp_path: Path) -> None:
    mutate(make, 40, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("make", "count"), list(zip(KINDS, (2000, 1000, 1500, 1500, 1500, 1000, 1500), strict=True)))
def test_many_mutated_files(make: Callable[[Path], Kind], count: int, tmp_path: Path) -> None:
    outcomes = mutate(make, count, tmp_path)
    print(f"\n{make.__name__}, seeds 0 to {count - 1}: {dict(sorted(outcomes.items()))}")
    assert any(name.endswith("refused") for name in outcomes)
    assert any(name.endswith("read") for name in outcomes)
