"""Damaged and hostile files load to a network of the right shapes or raise ValueError: no crash, no code, no flood."""

from __future__ import annotations

import random
import resource
import struct
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from apot_fat import load_packed, load_weights, save_packed
from apot_fat.checkpoint import write_checkpoint
from apot_fat.models import create_model


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
    size = draw.choice([4, 64, 1000])
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


MUTATIONS: tuple[Callable[[bytes, random.Random], bytes], ...] = (flip, flip_header, flip_end, cut, splice, swap, claim)


def mutate(count: int, tmp_path: Path) -> None:
    network = create_model("resnet20", "fat-cifar", 3, num_classes=4)
    shapes = {name: tensor.shape for name, tensor in network.state_dict().items()}
    checkpoint, packed, mutated = tmp_path / "a.pth.tar", tmp_path / "a.safetensors", tmp_path / "mutated"
    write_checkpoint({"state_dict": network.state_dict(), "epoch": 3}, checkpoint)
    published = tmp_path / "published.pth.tar"  # without a checksum
    torch.save({"state_dict": network.state_dict()}, published)
    save_packed(network, packed)
    plain = {name: tensor.shape for name, tensor in load_packed(packed).state_dict().items()}

    def check(model: nn.Module, expected: dict[str, torch.Size]) -> None:
        assert {name: tensor.shape for name, tensor in model.state_dict().items()} == expected

    outcomes: Counter[str] = Counter()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for seed in range(count):
        draw = random.Random(seed)
        source = draw.choice([checkpoint, published, packed])
        change = draw.choice(MUTATIONS)
        mutated.write_bytes(change(source.read_bytes(), draw))
        start = time.perf_counter()
        try:
            if source is packed:
                check(load_packed(mutated), plain)
            else:
                check(load_weights(network, mutated), shapes)
            outcome = "loaded"
        except ValueError:
            outcome = "refused"
        except Exception as error:
            raise AssertionError(f"seed {seed}, {change.__name__} of {source.name}: {error!r}") from error
        assert time.perf_counter() - start < 5, seed
        outcomes[f"{source.name} {outcome}"] += 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 1 << 20  # KiB
    print(f"\nseeds 0 to {count - 1}: {dict(sorted(outcomes.items()))}")
    assert outcomes["a.pth.tar refused"] > outcomes["a.pth.tar loaded"]


def test_mutated_files(tmp_path: Path) -> None:
    mutate(60, tmp_path)


@pytest.mark.slow
def test_many_mutated_files(tmp_path: Path) -> None:
    mutate(2000, tmp_path)
