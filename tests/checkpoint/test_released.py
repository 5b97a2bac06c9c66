from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from apot_fat.checkpoint import fetch_released, load_packed, load_weights, read_manifest, torchvision_weights
from apot_fat.checkpoint import released as room
from apot_fat.data import ImageSet, load_dataset
from apot_fat.data.images import normalize
from apot_fat.data.normalization import normalization
from apot_fat.models import create_model, default_preset
from apot_fat.quant import PRESETS


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    def refuse(*args: object, **options: object) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr(room, "download_url_to_file", refuse)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_manifest_builds_every_network() -> None:
    manifest = read_manifest()
    assert len(manifest) >= 20
    for entry in manifest.values():
        assert entry.preset in PRESETS
        assert default_preset(entry.arch) == entry.preset
        assert entry.address or entry.page or entry.file
        assert 50 < entry.top1 < 100
    assert sum(bool(entry.sha256) for entry in manifest.values() if not entry.file) == 3


@pytest.mark.parametrize("name", [entry.name for entry in read_manifest().values() if entry.file])
def test_our_packed_checkpoints_have_their_accuracy(name: str, offline: Path, request: pytest.FixtureRequest) -> None:
    entry, path = fetch_released(name)
    assert path.stat().st_size < 160_000
    images = entry.data
    if entry.images:  # some of CIFAR-10's
        images = str(request.getfixturevalue("reference") / "data/cifar10_lossless_test.npz")
    dataset = load_dataset(images, need_train=False)
    assert isinstance(dataset.test, ImageSet)
    mean, std = normalization(entry.data, "cifar10", entry.preset)
    x = normalize(dataset.test.images_NHWC, torch.tensor(mean), torch.tensor(std)).permute(0, 3, 1, 2)
    with torch.no_grad():
        correct = (load_packed(path)(x).argmax(1) == dataset.test.labels_N).sum().item()
    assert 100 * correct / len(dataset.test) == pytest.approx(entry.top1, abs=0.3)  # one image of 360, three of 1,017


def test_offline_and_not_cached_says_what_to_put_where(offline: Path) -> None:
    with pytest.raises(ValueError, match=r"put the file from https://.* at .*apot-fat/apot_res20_3bit\.pth\.tar"):
        fetch_released("apot_res20_3bit")
    with pytest.raises(ValueError, match="has no address of its own"):
        fetch_released("fat_vgg_7_bn_4bit")
    with pytest.raises(ValueError, match="did you mean 'apot_res20_3bit'"):
        fetch_released("apot_res20_3bits")
    assert not (offline / "apot-fat").exists()


def test_cached_files_are_verified_and_used_offline(reference: Path, offline: Path) -> None:
    content = (reference / "reference/released/res20_3bit/model_best.pth.tar").read_bytes()
    cached = offline / "apot-fat/apot_res20_3bit.pth.tar"
    cached.parent.mkdir(parents=True)
    cached.write_bytes(content)
    entry, path = fetch_released("apot_res20_3bit")
    assert (path, entry.bits) == (cached, 3)
    cached.write_bytes(content[:-1])
    with pytest.raises(ValueError, match="remove it to fetch it again"):
        fetch_released("apot_res20_3bit")


def test_a_download_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = []

    def download(address: str, path: str) -> None:
        calls.append(address)
        Path(path).write_bytes(b"file")

    monkeypatch.setattr(room, "download_url_to_file", download)
    digest = hashlib.sha256(b"file").hexdigest()
    manifest = {"x": room.Released("x", "https://example.org/x", "res20", "apot-cifar", 3, 90.0, digest)}
    monkeypatch.setattr(room, "read_manifest", lambda: manifest)
    for _ in range(2):
        assert fetch_released("x", tmp_path)[1].read_bytes() == b"file"
    assert calls == ["https://example.org/x"]


@pytest.mark.parametrize("arch", ["resnet18", "mobilenet_v2"])
def test_torchvision_weights_fill_quantized_networks(offline: Path, arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=rf"put https://.*{arch}.*\.pth at .*hub/checkpoints/{arch}"):
        torchvision_weights(arch)
    from torchvision.models import get_model, get_model_weights

    reference = get_model(arch).eval()
    weights: Any = next(iter(get_model_weights(arch)))
    path = offline / "checkpoints" / weights.url.rsplit("/", 1)[1]
    path.parent.mkdir(parents=True)
    torch.save(reference.state_dict(), path)
    load: Callable[..., Any] = lambda *args, **options: torch.load(path, weights_only=True)  # noqa: E731
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", load)
    state = torchvision_weights(arch)
    full = load_weights(create_model(arch, bits=32), state).eval()
    x = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(full(x), reference(x))
    load_weights(create_model(arch, bits=5), state, other_bits=True)


def test_networks_torchvision_does_not_have() -> None:
    with pytest.raises(ValueError, match="torchvision has no weights for 'res20'"):
        torchvision_weights("res20")
