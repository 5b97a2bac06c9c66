"""Where images come from: the embedded digits, CIFAR, a folder of images, an ``.npz`` file.

A new data set: a function that returns a ``Dataset``, and its entry in ``NAMED``.
"""

from __future__ import annotations

import contextlib
import io
import os
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.format import read_array, read_array_header_1_0, read_array_header_2_0, read_magic
from torch import Tensor
from tqdm.auto import tqdm

from apot_fat.data.decoding import IMAGE_SUFFIXES, UnreadableImageError, UnreadableImages, read_image
from apot_fat.data.images import FILE_SIZE, Dataset, FileSet, ImageSet
from apot_fat.optional import needed_for
from apot_fat.quant.spec import nearest
from apot_fat.text import printable

MAX_BYTES_IN_MEMORY = 8 << 30
MOST_LABEL = 65_535
"""Largest label of an ``.npz`` file: a network has one output a label up to it."""
_SUFFIXES = ", ".join(sorted(IMAGE_SUFFIXES))
_ARRAYS = ("images", "labels")
_THREADS_FROM_PIXELS = 64 * 64  # below, decoding is so short that threads wait on the interpreter: 6.8k images/s with
# one thread against 3.9k with two at 32 × 32 (2 cores)

CIFAR_ARCHIVES = {
    "cifar10": ("CIFAR10", "cifar-10-python.tar.gz", "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"),
    "cifar100": ("CIFAR100", "cifar-100-python.tar.gz", "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz"),
}


def load_dataset(
    source: str,
    *,
    test_source: str | None = None,
    root: str | os.PathLike[str] = "data",
    image_size: int | None = None,
    val_split: float = 0.0,
    seed: int = 0,
    need_train: bool = True,
    stream: bool = False,
    on_damaged: str = "error",
) -> Dataset:
    """Load a data set: into memory, or as a list of files to decode as they are needed.

    Args:
        source: ``digits``, ``cifar10``, ``cifar100``; a folder with ``train/CLASS/*`` and ``test/CLASS/*`` (or
            ``val``), where folders and images may be symbolic links; ``imagenet``, such a folder under ``root``; or an
            ``.npz`` file with ``images`` uint8 (N, 3, H, W) or (N, H, W, 3) and ``labels``, integers from 0 to 65,535.
        test_source: a folder of class folders or an ``.npz`` with the test images, instead of the source's.
        root: where CIFAR is, or is downloaded to.
        image_size: height and width that images are brought to (shorter side resized, centre cropped), pixels.
        val_split: fraction of the training images to hold out, [0, 1).
        seed: chooses the held-out images.
        need_train: False where only the test images are wanted; classes are still named after the training images'
            folders, if there are any.
        stream: leave a folder's images on disk; they are then cropped to size as they are decoded.
        on_damaged: what becomes of a folder's unreadable images that are read into memory: ``error``, or ``skip``
            leaves them out and counts them.

    Returns:
        The ``Dataset``; its ``train`` may be None when not needed.

    Raises:
        ValueError: an unknown name, a missing or damaged file, a broken link, a training class without images, images
            of several sizes without ``image_size``.
    """
    if image_size is not None and not 4 <= image_size <= 1024:
        raise ValueError(f"image_size {image_size}: choose 4 to 1024 pixels")
    if source in NAMED:
        dataset = NAMED[source](Path(root))
        if image_size is not None:
            dataset = _resized(dataset, image_size)
        if test_source is not None:
            test, _ = _read_set(Path(test_source), image_size, dataset.classes, stream, on_damaged)
            dataset = replace(dataset, test=test)
    else:
        path = Path(root) / "imagenet" if source == "imagenet" else Path(source)
        _check_link(path)
        if source == "imagenet" and not path.exists():
            raise ValueError(
                f"ImageNet is not at {path}: put or link its folder (train/ and val/) there, or name it with --data"
            )
        dataset = _from_path(path, test_source, image_size, need_train, stream, on_damaged)
    for part in (dataset.train, dataset.test):
        if part is not None and int(part.labels_N.max()) >= len(dataset.classes):
            raise ValueError(f"{source}: label {int(part.labels_N.max())} of {len(dataset.classes)} classes")
    if need_train:
        _check_sizes(source, dataset, image_size or FILE_SIZE)
    return dataset.with_val_split(val_split, seed)


def load_digits(root: Path) -> Dataset:
    """scikit-learn's 1,797 handwritten digits (8 × 8), 1,437 for training and 360 for testing, split by class."""
    with needed_for("the data set 'digits'"):
        from sklearn.datasets import load_digits as read
        from sklearn.model_selection import train_test_split

    bunch = read()
    pixels = np.rint(bunch.images * (255 / 16)).astype(np.uint8)  # 0 … 16 in the file
    split = train_test_split(pixels, bunch.target, test_size=360, stratify=bunch.target, random_state=0)
    train_x, test_x, train_y, test_y = split
    sets = [
        ImageSet(torch.from_numpy(np.repeat(x[..., None], 3, axis=3)), torch.from_numpy(y.astype(np.int64)))
        for x, y in ((train_x, train_y), (test_x, test_y))
    ]
    return Dataset("digits", tuple(str(d) for d in range(10)), *sets)


def load_cifar(name: str, root: Path) -> Dataset:
    """CIFAR-10 or CIFAR-100 through torchvision, downloaded into ``root`` where it is not there yet.

    Raises:
        ValueError: neither there nor to be downloaded; says which file to put where.
    """
    from torchvision import datasets

    class_name, archive, url = CIFAR_ARCHIVES[name]
    root_existed = root.exists()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            parts = [getattr(datasets, class_name)(root, train=train, download=True) for train in (True, False)]
    except (OSError, RuntimeError, EOFError) as error:
        if not root_existed and root.is_dir() and not any(root.iterdir()):
            root.rmdir()
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{name} is not in {root} and could not be downloaded ({reason}): put {archive} from {url} into {root}/"
        ) from error
    sets = [ImageSet(torch.from_numpy(part.data), torch.tensor(part.targets)) for part in parts]
    return Dataset(name, tuple(parts[0].classes), *sets)


NAMED: dict[str, Callable[[Path], Dataset]] = {
    "digits": load_digits,
    "cifar10": lambda root: load_cifar("cifar10", root),
    "cifar100": lambda root: load_cifar("cifar100", root),
}


def _from_path(
    path: Path, test_source: str | None, image_size: int | None, need_train: bool, stream: bool, on_damaged: str
) -> Dataset:
    if not path.exists():
        raise ValueError(
            f"no data set {str(path)!r}{nearest(str(path), NAMED)}: "
            f"choose {', '.join(NAMED)}, a folder, or an .npz file"
        )
    train_path, test_path = path, Path(test_source) if test_source else None
    for name in ("train", "test", "val"):
        _check_link(path / name)
    if path.is_dir() and (path / "train").is_dir():
        train_path = path / "train"
        held = [path / name for name in ("test", "val") if (path / name).is_dir()]
        if test_path is None and not held:
            raise ValueError(f"{path}: has train/ but neither test/ nor val/")
        test_path = test_path or held[0]
    if test_path is None:
        if need_train:
            raise ValueError(f"{path}: holds one set of images; name the test images with --test-data")
        test_path = path
    train, classes = None, None
    if need_train:
        train, classes = _read_set(train_path, image_size, None, stream, on_damaged)
    elif test_path.is_dir():  # its folders are numbered among those of training, which it may lack some of
        classes = _class_names(train_path) if train_path.is_dir() else _read_npz(train_path, None, None)[1]
    test, classes = _read_set(test_path, image_size, classes, stream, on_damaged)
    return Dataset(str(path), classes, train, test)


def _check_sizes(source: str, dataset: Dataset, streamed: int) -> None:
    parts = (dataset.train, dataset.test)
    train, test = (part.size if isinstance(part, ImageSet) else (streamed, streamed) for part in parts)
    if train != test:
        shown = "training images are {} × {} pixels, test images {} × {}".format(*train, *test)
        raise ValueError(f"{source}: {shown}; give --image-size")


def _read_set(
    path: Path, image_size: int | None, classes: tuple[str, ...] | None, stream: bool, on_damaged: str
) -> tuple[ImageSet | FileSet, tuple[str, ...]]:
    _check_link(path)
    if not path.exists():
        raise ValueError(f"no images at {path}")
    if not path.is_dir():
        return _read_npz(path, image_size, classes)
    files, classes = _list_folder(path, classes)
    return (files if stream else _decode_all(files, path, image_size, on_damaged)), classes


def _read_npz(path: Path, image_size: int | None, classes: tuple[str, ...] | None) -> tuple[ImageSet, tuple[str, ...]]:
    with _open_npz(path) as archive:
        (images_shape, images_type), (labels_shape, labels_type) = (_header(archive, name) for name in _ARRAYS)
    channels_first = len(images_shape) == 4 and images_shape[1] == 3 and images_shape[3] != 3
    if images_type != np.uint8 or len(images_shape) != 4 or images_shape[1 if channels_first else 3] != 3:
        raise ValueError(f"{path}: images {images_type} {images_shape}, expected uint8 (N, 3, H, W) or (N, H, W, 3)")
    if labels_shape != images_shape[:1] or labels_type.kind not in "iu":
        raise ValueError(
            f"{path}: labels {labels_type} {labels_shape}, expected {images_shape[0]} integers from 0 to {MOST_LABEL:,}"
        )
    if (needed := prod(images_shape) + prod(labels_shape) * labels_type.itemsize) > MAX_BYTES_IN_MEMORY:
        raise ValueError(
            f"{path}: {needed >> 30} GiB of images and labels, at most {MAX_BYTES_IN_MEMORY >> 30} are read; "
            "make it a folder of images, which --loader stream leaves on disk"
        )
    with _open_npz(path) as archive:
        images, labels = (_array(archive, name) for name in _ARRAYS)
    for label in (labels.min(initial=0), labels.max(initial=0)):
        if not 0 <= label <= MOST_LABEL:
            raise ValueError(f"{path}: label {label}, expected integers from 0 to {MOST_LABEL:,}")
    images = images.transpose(0, 2, 3, 1) if channels_first else images
    found = ImageSet(torch.from_numpy(np.ascontiguousarray(images)), torch.from_numpy(labels.astype(np.int64)))
    names = classes or tuple(str(label) for label in range(int(labels.max()) + 1))
    return (_resize(found, image_size) if image_size else found), names


@contextlib.contextmanager
def _open_npz(path: Path) -> Iterator[zipfile.ZipFile]:
    try:
        if not path.is_file():
            raise ValueError("a device or a pipe")
        with zipfile.ZipFile(path) as archive:
            yield archive
    except Exception as error:  # damaged bytes make the readers of archives and headers stumble in many ways
        raise ValueError(f"{path}: not an .npz file with arrays `images` and `labels`") from error


def _header(archive: zipfile.ZipFile, name: str) -> tuple[tuple[int, ...], np.dtype]:
    # shape and type, before anything of that size is allocated
    with archive.open(f"{name}.npy") as file:
        read = {(1, 0): read_array_header_1_0, (2, 0): read_array_header_2_0}[read_magic(file)]
        shape, _, dtype = read(file)
    return shape, dtype


def _array(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    with archive.open(f"{name}.npy") as file:
        return read_array(file, allow_pickle=False)


def _list_folder(path: Path, classes: tuple[str, ...] | None) -> tuple[FileSet, tuple[str, ...]]:
    found = _class_names(path)
    unknown = sorted(set(found) - set(classes or found))
    if unknown:
        raise ValueError(f"{path}: class folder {unknown[0]!r} is not among the training classes")
    is_training = classes is None
    classes = classes or found
    index = {name: label for label, name in enumerate(classes)}
    files, labels = [], []
    for name in found:
        inside = sorted(_image_files(path / name))
        if is_training and not inside:
            raise ValueError(
                f"{path / name}: a class without images ({_SUFFIXES} are read); add some, or remove the folder"
            )
        files += [os.fsencode(file) for file in inside]
        labels += [index[name]] * len(inside)
    if not files:
        raise ValueError(f"{path}: its class folders hold no images ({_SUFFIXES})")
    return FileSet(np.array(files), torch.tensor(labels)), classes


def _class_names(path: Path) -> tuple[str, ...]:
    found = tuple(sorted(_class_folders(path)))
    if not found:
        raise ValueError(f"{path}: holds no class folders")
    return found


def _class_folders(path: Path) -> Iterator[str]:
    with os.scandir(path) as entries:
        for entry in entries:
            if entry.name.startswith("."):  # .ipynb_checkpoints and the like
                continue
            if entry.is_symlink():
                _check_link(Path(entry.path))
                if path.resolve().is_relative_to(Path(entry.path).resolve()):
                    raise ValueError(f"{entry.path}: a symbolic link to a folder that holds it, no class; remove it")
            if entry.is_dir():
                yield entry.name


def _image_files(folder: Path) -> Iterator[str]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if Path(entry.name).suffix.lower() in IMAGE_SUFFIXES:
                if entry.is_symlink():
                    _check_link(Path(entry.path))
                yield entry.path


def _check_link(path: Path) -> None:
    # links are followed, wherever they lead: clusters hold ImageNet, and people make subsets, as folders of links
    if not path.is_symlink():
        return
    try:
        path.stat()
    except OSError as error:
        reason = f"a broken symbolic link to {os.readlink(path)} ({error.strerror})"
        raise ValueError(f"{path}: {reason}; mend or remove it") from error


def _decode_all(files: FileSet, path: Path, image_size: int | None, on_damaged: str) -> ImageSet:
    fit = _fit_to(image_size) if image_size else None
    unreadable = UnreadableImages(on_damaged)

    def decode(index: int) -> Tensor | str:
        # its pixels, or what is wrong with the file
        try:
            rgb = read_image(files.path(index), image_size)
        except UnreadableImageError as error:
            return str(error)
        return torch.from_numpy(np.array(fit(rgb) if fit else rgb))

    for index in range(len(files)):
        first = decode(index)
        if isinstance(first, Tensor):
            break
        unreadable.add(first)
    else:
        raise ValueError(f"{path}: none of its {len(files)} images can be read")
    height, width = first.shape[:2]
    if (needed := len(files) * first.numel()) > MAX_BYTES_IN_MEMORY:
        raise ValueError(
            f"{path}: {len(files)} images of {width} × {height} take {needed >> 30} GiB in memory; "
            "give a smaller --image-size"
        )
    images_NHWC = torch.empty((len(files), *first.shape), dtype=torch.uint8)
    whole_N = torch.ones(len(files), dtype=torch.bool)

    def fill(index: int) -> str | None:
        pixels = decode(index)
        if isinstance(pixels, str):
            return pixels
        if pixels.shape != first.shape:
            raise ValueError(
                f"{files.path(index)}: {pixels.shape[1]} × {pixels.shape[0]} pixels where others have "
                f"{width} × {height}; give --image-size"
            )
        images_NHWC[index] = pixels
        return None

    with contextlib.ExitStack() as stack:
        threads = height * width >= _THREADS_FROM_PIXELS
        run = stack.enter_context(ThreadPoolExecutor(os.cpu_count())).map if threads else map
        what = f"decode {printable(path.name)}"
        bar = stack.enter_context(tqdm(total=len(files), desc=what, unit="img", disable=None))
        for index, problem in enumerate(run(fill, range(len(files)))):
            if problem is not None:
                unreadable.add(problem)
                whole_N[index] = False
            bar.update()
    images = ImageSet(images_NHWC, files.labels_N)
    return images if whole_N.all() else images.subset(whole_N)


def _fit_to(size: int) -> Callable[[Any], Any]:
    from torchvision.transforms import v2  # seconds, which most commands need not wait

    return v2.Compose([v2.Resize(size, antialias=True), v2.CenterCrop(size)])


def _resize(images: ImageSet, size: int) -> ImageSet:
    resized = _fit_to(size)(images.images_NHWC.permute(0, 3, 1, 2))
    return ImageSet(resized.permute(0, 2, 3, 1).contiguous(), images.labels_N)


def _resized(dataset: Dataset, size: int) -> Dataset:
    assert isinstance(dataset.train, ImageSet)  # the named sets are read into memory
    assert isinstance(dataset.test, ImageSet)
    return replace(dataset, train=_resize(dataset.train, size), test=_resize(dataset.test, size))
