from __future__ import annotations

import logging
import pickle
import struct
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets

from apot_fat.data import FileBatches, FileSet, ImageSet, load_dataset
from apot_fat.training import TrainConfig
from apot_fat.training.build import load_config_dataset


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    for part, count in (("train", 4), ("val", 2)):
        for name in ("cat", "dog"):
            (tmp_path / "set" / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = torch.randint(0, 256, (12, 12, 3), dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(tmp_path / "set" / part / name / f"{i}.png")
    return tmp_path / "set"


def write_images(folder: Path, count: int = 1, size: tuple[int, int] = (12, 12)) -> None:
    """A class folder of a few images of random pixels."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        made = torch.randint(0, 256, (size[1], size[0], 3), dtype=torch.uint8)
        Image.fromarray(made.numpy()).save(folder / f"{index}.png")


def test_digits_are_embedded_and_split_by_class() -> None:
    dataset = load_dataset("digits")
    assert isinstance(dataset.train, ImageSet)
    assert isinstance(dataset.test, ImageSet)
    assert (len(dataset.train), len(dataset.test), dataset.train.size) == (1437, 360, (8, 8))
    assert (torch.bincount(dataset.test.labels_N) - 36).abs().max() <= 1
    assert dataset.train.images_NHWC.max() == 255
    pixels = dataset.train.images_NHWC.float() / 255
    assert abs(pixels.mean() - 0.305) < 0.001
    assert abs(pixels.std() - 0.376) < 0.001


def test_folder_of_class_folders(image_folder: Path) -> None:
    dataset = load_dataset(str(image_folder))
    assert isinstance(dataset.train, ImageSet)
    assert isinstance(dataset.test, ImageSet)
    assert dataset.classes == ("cat", "dog")
    assert (len(dataset.train), len(dataset.test), dataset.train.size) == (8, 4, (12, 12))
    assert dataset.train.labels_N.tolist() == [0] * 4 + [1] * 4
    resized = load_dataset(str(image_folder), image_size=8)
    assert isinstance(resized.test, ImageSet)
    assert resized.test.size == (8, 8)


def test_folder_mistakes(image_folder: Path) -> None:
    odd = image_folder / "train/dog/3.png"
    Image.new("RGB", (9, 12)).save(odd)
    with pytest.raises(ValueError, match="give --image-size"):
        load_dataset(str(image_folder))
    load_dataset(str(image_folder), image_size=8)
    odd.write_text("no image")
    with pytest.raises(ValueError, match=r"3\.png: not a readable image"):
        load_dataset(str(image_folder))
    odd.unlink()
    (image_folder / "val/bird").mkdir()
    with pytest.raises(ValueError, match="class folder 'bird' is not among the training classes"):
        load_dataset(str(image_folder))
    with pytest.raises(ValueError, match="holds no class folders"):
        load_dataset(str(image_folder / "train/cat"), test_source=str(image_folder / "val"))


@pytest.mark.parametrize("stream", [False, True])
def test_a_training_class_without_images_is_refused_and_a_hidden_folder_is_none(
    image_folder: Path, stream: bool
) -> None:
    for part in ("train", "val"):
        write_images(image_folder / part / ".ipynb_checkpoints")
    (image_folder / "val/.broken").symlink_to("nowhere")
    for file in (image_folder / "val/dog").iterdir():
        file.unlink()  # a test folder may lack images of a class
    dataset = load_dataset(str(image_folder), stream=stream)
    assert (dataset.classes, dataset.test.labels_N.tolist()) == (("cat", "dog"), [0, 0])
    for file in (image_folder / "train/dog").iterdir():
        file.rename(file.with_suffix(".bmp"))
    one_line = r"train/dog: a class without images \(\.jpeg, \.jpg, \.png, \.webp are read\); [^\n]*remove the folder$"
    with pytest.raises(ValueError, match=one_line):
        load_dataset(str(image_folder), stream=stream)
    assert load_dataset(str(image_folder), stream=stream, need_train=False).classes == ("cat", "dog")


def test_test_images_of_another_size_than_the_training_images_are_refused(image_folder: Path, tmp_path: Path) -> None:
    other = str(tmp_path / "other.npz")
    np.savez(other, images=np.zeros((2, 3, 32, 16), np.uint8), labels=[0, 1])
    more = str(tmp_path / "more.npz")
    np.savez(more, images=np.zeros((2, 3, 8, 8), np.uint8), labels=[0, 1])
    cases: list[tuple[str, str, bool, str]] = [
        ("digits", other, False, "8 × 8 pixels, test images 32 × 16"),
        (str(image_folder), other, False, "12 × 12 pixels, test images 32 × 16"),
        (str(image_folder), other, True, "224 × 224 pixels, test images 32 × 16"),
        (other, more, False, "32 × 16 pixels, test images 8 × 8"),
    ]
    for source, test_source, stream, sizes in cases:
        with pytest.raises(ValueError, match=rf"^{source}: training images are {sizes}; give --image-size$"):
            load_dataset(source, test_source=test_source, stream=stream)
        load_dataset(source, test_source=test_source, stream=stream, image_size=16)
        load_dataset(source, test_source=test_source, stream=stream, need_train=False)


@pytest.mark.parametrize("damaged", ["train/cat/0.png", "train/cat/2.png", "train/dog/3.png"])
@pytest.mark.parametrize("side", [12, 70])  # decoded one by one, or by threads
def test_damaged_images_are_left_out_and_counted(
    image_folder: Path, damaged: str, side: int, caplog: pytest.LogCaptureFixture
) -> None:
    whole = load_dataset(str(image_folder), image_size=side).train
    assert isinstance(whole, ImageSet)
    for name in (damaged, "val/dog/1.png"):
        (image_folder / name).write_bytes((image_folder / name).read_bytes()[:60])
    with pytest.raises(ValueError, match=rf"{damaged}: not a readable image .*leave such images out with --on-damaged"):
        load_dataset(str(image_folder), image_size=side)
    config = TrainConfig(data=str(image_folder), image_size=side, on_damaged="skip")
    with caplog.at_level(logging.WARNING, logger="apot_fat"):
        dataset = load_config_dataset(config)
    kept = [i for i in range(8) if i != ["cat", "dog"].index(damaged[6:9]) * 4 + int(damaged[10])]
    assert isinstance(dataset.train, ImageSet)
    assert torch.equal(dataset.train.images_NHWC, whole.images_NHWC[kept])
    assert torch.equal(dataset.train.labels_N, whole.labels_N[kept])
    assert dataset.test.labels_N.tolist() == [0, 0, 1]
    assert [record.getMessage().split(", ")[-1] for record in caplog.records] == ["left out (1 so far)"] * 2
    assert damaged in caplog.text
    for file in (image_folder / "train").glob("*/*"):
        file.write_text("no image")
    with pytest.raises(ValueError, match="train: none of its 8 images can be read"):
        load_config_dataset(config)


def linked(source: Path, folder: Path, levels: int) -> Path:
    """A copy of an image folder whose entries are symbolic links so many levels down; 0: it is one itself."""
    if not levels:
        folder.symlink_to(source)
        return folder
    folder.mkdir()
    for entry in source.iterdir():
        linked(entry, folder / entry.name, levels - 1)
    return folder


def pixels(images: ImageSet | FileSet | None) -> torch.Tensor:
    assert images is not None
    if isinstance(images, ImageSet):
        return images.images_NHWC
    batches = FileBatches(images, 4, torch.device("cpu"), (0,) * 3, (1,) * 3, image_size=12, workers=0)
    return torch.cat([batch.x for batch in batches])


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("levels", [0, 1, 2, 3])  # the whole, train and val, the classes, the images
def test_links_are_followed_wherever_they_lead(image_folder: Path, tmp_path: Path, levels: int, stream: bool) -> None:
    direct = load_dataset(str(image_folder), stream=stream)
    through = load_dataset(str(linked(image_folder, tmp_path / "links", levels)), stream=stream)
    assert through.classes == direct.classes
    for found, expected in ((through.train, direct.train), (through.test, direct.test)):
        assert torch.equal(pixels(found), pixels(expected))
        assert torch.equal(found.labels_N, expected.labels_N)  # type: ignore[union-attr]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("place", ["train", "val", "train/cat", "val/dog", "train/cat/0.png", "val/dog/1.png", "."])
def test_a_broken_link_is_named_with_its_target(image_folder: Path, place: str, stream: bool) -> None:
    link = image_folder / place
    link.rename(image_folder.parent / "moved")
    link.symlink_to("nowhere/at-all")
    for target, reason in (("nowhere/at-all", "No such file"), (link.name, "Too many levels")):  # and one to itself
        link.unlink()
        link.symlink_to(target)
        message = rf"^{link}: a broken symbolic link to {target} \({reason}[^\n]*\); mend or remove it$"
        with pytest.raises(ValueError, match=message):
            load_dataset(str(image_folder), stream=stream)


def test_a_test_folder_that_lacks_a_class_keeps_the_numbers_of_training(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        write_images(tmp_path / "train" / name)
    for name in ("b", "c"):
        write_images(tmp_path / "test" / name)
    train, test = str(tmp_path / "train"), str(tmp_path / "test")
    for source, test_source in ((str(tmp_path), None), (str(tmp_path), test), (train, test)):
        for need_train in (True, False):
            for stream in (True, False):
                dataset = load_dataset(source, test_source=test_source, need_train=need_train, stream=stream)
                assert (dataset.classes, dataset.test.labels_N.tolist()) == (("a", "b", "c"), [1, 2])
    write_images(tmp_path / "numbered/1")
    numbers = str(tmp_path / "numbers.npz")
    np.savez(numbers, images=np.zeros((2, 3, 12, 12), np.uint8), labels=[0, 1])
    dataset = load_dataset(numbers, test_source=str(tmp_path / "numbered"), need_train=False)
    assert (dataset.classes, dataset.test.labels_N.tolist()) == (("0", "1"), [1])


def test_links_in_a_circle(image_folder: Path) -> None:
    (image_folder / "train/cat/all").symlink_to(image_folder)
    (image_folder / "val/dog/again").symlink_to(".")
    dataset = load_dataset(str(image_folder), stream=True)
    assert len(dataset.train or ()) == 8
    (image_folder / "train/round").symlink_to("..")
    with pytest.raises(ValueError, match="train/round: a symbolic link to a folder that holds it, no class"):
        load_dataset(str(image_folder), stream=True)


def test_a_hostile_image(image_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 143)  # Pillow itself warns up to twice that
    with pytest.raises(ValueError, match="more than 143 pixels"):
        load_dataset(str(image_folder))


def test_hostile_npz(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def written(name: str, shape: str, size: int) -> str:
        with zipfile.ZipFile(tmp_path / name, "w", zipfile.ZIP_DEFLATED) as archive:
            for array, own in (("images", shape), ("labels", "(1000,)")):
                text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {own}}}\n".encode()
                header = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text
                archive.writestr(f"{array}.npy", header + bytes(size))
        return str(tmp_path / name)

    huge = written("huge.npz", "(1000, 3, 1000000, 1000000)", 100)
    bomb = written("bomb.npz", "(1000, 3, 32, 32)", 3_072_000)
    cut = written("cut.npz", "(1000, 3, 8, 8)", 3000)
    monkeypatch.setattr("apot_fat.data.sources.MAX_BYTES_IN_MEMORY", 1 << 20)
    for path in (huge, bomb):
        with pytest.raises(ValueError, match=r"of images and labels, at most 0 are read; make it a folder"):
            load_dataset(path, need_train=False)
    deep = written("deep.npz", "(" * 4000, 0)
    negative = written("negative.npz", "(1000, 3, -8, 8)", 100)
    for path in (cut, deep, negative, "/dev/zero"):
        with pytest.raises(ValueError, match=r"not an \.npz file"):
            load_dataset(path, need_train=False)


def test_labels_of_an_npz_are_checked_before_anything_is_as_long_as_they_are_large(tmp_path: Path) -> None:
    images = np.zeros((2, 3, 8, 8), np.uint8)
    path = str(tmp_path / "a.npz")
    for label, dtype in ((1 << 33, "i8"), ((1 << 63) + 5, "u8"), (20_000_000, "i4"), (65_536, ">u4"), (-1, "i1")):
        np.savez(path, images=images, labels=np.array([0, label], dtype))
        with pytest.raises(ValueError, match=rf"^{path}: label {label}, expected integers from 0 to 65,535$"):
            load_dataset(path, need_train=False)
    wrong: list[Any] = [np.array([0, value]) for value in (np.nan, 0.5, None, "1", np.timedelta64(1))]
    for labels in (*wrong, np.array([False, True]), np.zeros((2, 1), int), np.int64(0)):
        np.savez(path, images=images, labels=labels)
        with pytest.raises(ValueError, match=r"labels [^ ]* \(.*\), expected 2 integers from 0 to 65,535$"):
            load_dataset(path, need_train=False)
    for shape in ((2, 3, 0, 8), (2, 0, 0, 3), (0, 3, 8, 8)):
        np.savez(path, images=np.zeros(shape, np.uint8), labels=np.zeros(shape[0], int))
        with pytest.raises(ValueError, match="at least one"):
            load_dataset(path, need_train=False)
    np.savez(path, images=images, labels=np.array([7, 65_535], ">u2"))
    dataset = load_dataset(path, need_train=False)
    assert dataset.test.labels_N.tolist() == [7, 65_535]
    assert len(dataset.classes) == 65_536


def test_jpeg_pixels_are_the_decoded_ones(tmp_path: Path) -> None:
    for part in ("train", "test"):
        (tmp_path / part / "a").mkdir(parents=True)
        Image.new("L", (70, 70), 77).save(tmp_path / part / "a/0.jpg")
    dataset = load_dataset(str(tmp_path))  # 70 × 70: the threaded path
    assert isinstance(dataset.test, ImageSet)
    assert (dataset.test.images_NHWC.float() - 77).abs().max() <= 1


def test_npz(tiny_npz: tuple[Path, Path], tmp_path: Path) -> None:
    train, test = (str(path) for path in tiny_npz)
    dataset = load_dataset(train, test_source=test)
    assert isinstance(dataset.train, ImageSet)
    assert isinstance(dataset.test, ImageSet)
    assert (len(dataset.train), len(dataset.test)) == (48, 21)
    assert load_dataset(test, need_train=False).train is None
    with pytest.raises(ValueError, match="name the test images with --test-data"):
        load_dataset(train)
    broken = tmp_path / "broken.npz"
    broken.write_bytes(b"PK nonsense")
    with pytest.raises(ValueError, match=r"not an \.npz file"):
        load_dataset(str(broken), need_train=False)
    np.savez(tmp_path / "float.npz", images=np.zeros((2, 3, 8, 8)), labels=np.zeros(2, int))
    with pytest.raises(ValueError, match="expected uint8"):
        load_dataset(str(tmp_path / "float.npz"), need_train=False)
    np.savez(tmp_path / "few.npz", images=np.zeros((2, 3, 8, 8), np.uint8), labels=np.zeros(3, int))
    with pytest.raises(ValueError, match="expected 2 integers"):
        load_dataset(str(tmp_path / "few.npz"), need_train=False)


def test_cifar_through_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    pixels = rng.integers(0, 256, (6, 10, 3072), dtype=np.uint8)
    for i, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        content: dict[str, Any] = {"data": pixels[i], "labels": list(range(10))}
        (folder / name).write_bytes(pickle.dumps(content))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"class{i}" for i in range(10)]}))
    with tarfile.open(tmp_path / "cifar-10-python.tar.gz", "w:gz") as archive:
        archive.add(folder, folder.name)
    monkeypatch.setattr(datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *args: True)
    dataset = load_dataset("cifar10", root=tmp_path)
    assert isinstance(dataset.train, ImageSet)
    assert isinstance(dataset.test, ImageSet)
    assert (len(dataset.train), len(dataset.test), dataset.classes[1]) == (50, 10, "class1")
    expected = torch.from_numpy(pixels[5, 3].reshape(3, 32, 32)).permute(1, 2, 0)
    assert torch.equal(dataset.test.images_NHWC[3], expected)


def test_cifar_offline_says_what_to_put_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: object, **kwargs: object) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", offline)
    root = tmp_path / "data"
    with pytest.raises(ValueError, match=r"put cifar-100-python\.tar\.gz from https.* into .*data/"):
        load_dataset("cifar100", root=root)
    assert not root.exists()


def test_a_streamed_folder_is_a_list_of_files(image_folder: Path) -> None:
    dataset = load_dataset(str(image_folder), stream=True, val_split=0.25)
    assert isinstance(dataset.train, FileSet)
    assert isinstance(dataset.val, FileSet)
    assert (len(dataset.train), len(dataset.val), len(dataset.test)) == (6, 2, 4)
    assert dataset.test.labels_N.tolist() == [0, 0, 1, 1]
    assert isinstance(dataset.test, FileSet)
    assert dataset.test.path(3) == image_folder / "val/dog/1.png"
    with pytest.raises(ValueError, match="put or link its folder"):
        load_dataset("imagenet", root=image_folder)


def test_unknown_sources() -> None:
    with pytest.raises(ValueError, match="did you mean 'digits'"):
        load_dataset("digit")
    with pytest.raises(ValueError, match="choose 4 to 1024"):
        load_dataset("digits", image_size=2)
