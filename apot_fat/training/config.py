"""What a training run is told: one frozen value, from TOML and the command line."""

from __future__ import annotations

import types
import typing
from contextlib import suppress
from dataclasses import MISSING, Field, asdict, dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, Union

from apot_fat.data.normalization import normalization
from apot_fat.data.stream import CROPS, ON_DAMAGED
from apot_fat.models import default_preset, find_architecture
from apot_fat.quant.spec import PRESETS, check_bits, nearest
from apot_fat.training.device import AMP_TYPES, NUMERICS
from apot_fat.training.objective import check_mixup

LOADERS = ("auto", "memory", "stream")
AUGMENTS = ("auto", *CROPS)
LR_UNITS = ("epochs", "steps")
OPTIMIZERS = ("sgd", "adam")
SCHEDULES = ("step", "cosine", "onecycle")
FP32_RUN = "fp32"
"""What ``init`` and ``teacher`` call the 32-bit run beside."""
BEST = "model_best.pth.tar"
"""A run's best checkpoint."""
THRESHOLD_INITS = ("constant", "mse", "lsq")
COMPILE_MODES = ("auto", "off", "quantizers", "model")


def _option(
    default: Any,
    help: str,
    *flags: str,
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] | None = None,
    expected: str | None = None,
) -> Any:
    limits = {"low": low, "above": above, "high": high, "choices": choices, "expected": expected}
    return field(default=default, metadata={"help": help, "flags": flags, **limits})


@dataclass(frozen=True)
class TrainConfig:
    """One training run (one bit-width). Every field is a TOML key and a command line option of the same name.

    The defaults are APoT's for CIFAR-10. ``help`` of each field says its meaning and unit.

    Raises:
        ValueError: a value of the wrong type or out of range, naming the field and what is allowed.
    """

    arch: str = _option("resnet20", "network, in any published spelling", "-a")
    preset: str | None = _option(None, "quantization variant; by default the one the spelling of --arch stands for")
    bit: int = _option(
        4, "bits of weights and activations: 2 to 8, or 32", expected="choose an integer from 2 to 8, or 32"
    )
    weight_per_channel: bool = _option(False, "one weight threshold an output channel instead of one a layer")
    act_per_channel: bool = _option(False, "one activation threshold an input channel instead of one a layer")
    data: str = _option("digits", "digits, cifar10, cifar100, a folder of images, or an .npz file", "--data_dir")
    test_data: str | None = _option(None, "test images: a folder of class folders or an .npz file")
    data_root: str = _option("data", "where CIFAR is kept or downloaded to")
    image_size: int | None = _option(None, "bring images to this height and width, pixels", low=4, high=1024)
    val_split: float = _option(0.0, "fraction of training images held out to choose the epoch on", low=0, high=0.9)
    mean: tuple[float, ...] | None = _option(None, "channel means, units of 255; by default the published ones")
    std: tuple[float, ...] | None = _option(None, "channel standard deviations, units of 255", above=0)
    loader: str = _option("auto", "images in memory, or decoded as needed (auto: ImageNet networks)", choices=LOADERS)
    augment: str = _option(
        "auto", "crop of streamed images (auto: resize-crop, FAT's random-resized)", choices=AUGMENTS
    )
    workers: int | None = _option(
        None,
        "decoding processes of streamed images, a training process; by default its share of the cores",
        "-j",
        low=0,
        high=256,
    )
    on_damaged: str = _option("error", "what to do about an unreadable image of a folder", choices=ON_DAMAGED)
    crop_padding: int = _option(4, "random crop of images in memory after zero padding, pixels a side", low=0, high=64)
    flip: bool = _option(True, "mirror half of the training images")

    batch_size: int = _option(128, "images a step, over all processes and accumulation", "-b", low=1)
    accumulate: int = _option(1, "batches whose gradients are added up before a step", low=1)
    epochs: int = _option(300, "passes over the training images", low=1)
    lr: float = _option(0.1, "learning rate a step, for --batch-size images", "--learning_rate", above=0)
    optimizer: str = _option(
        "sgd",
        "adam: its learning rates are relative to the root mean square that each parameter starts with",
        choices=OPTIMIZERS,
    )
    momentum: float = _option(0.9, "of SGD; of Adam the first beta", low=0, high=0.9999)
    weight_decay: float = _option(1e-4, "of weights, per step and unit of lr", "--wd", low=0)
    schedule: str = _option("step", "learning rate over time", choices=SCHEDULES)
    lr_unit: str = _option("epochs", "what lr_steps and warmup count", choices=LR_UNITS)
    lr_steps: tuple[int, ...] = _option((150, 225), "when `step` multiplies lr, in lr_unit", "--lr_decay_step", low=0)
    lr_gamma: float = _option(0.1, "what `step` multiplies lr by", above=0, high=1)
    warmup: float = _option(0.0, "linear warm-up of lr, in lr_unit", low=0)
    threshold_groups: bool = _option(True, "learning rate and decay of their own for the clipping thresholds")
    act_alpha_lr: float = _option(0.1, "learning rate of activation thresholds", above=0)
    weight_alpha_lr: float = _option(0.02, "learning rate of weight thresholds and FAT's matrices", above=0)
    alpha_weight_decay: float = _option(1e-4, "weight decay of the threshold groups", low=0)
    threshold_init: str = _option(
        "constant",
        "clipping thresholds before the first step: the variant's, or the source's with --init; or of least squared "
        "error, or LSQ's (Esser 2020), on a training batch",
        choices=THRESHOLD_INITS,
    )
    label_smoothing: float = _option(0.0, "of the cross entropy (Szegedy 2016)", low=0, high=0.999)

    teacher: str | None = _option(
        None, "checkpoint to distil from; `torchvision`: its fp32 weights; `fp32`: the 32-bit run of the same --output"
    )
    distill_weight: float = _option(
        0.0, "w of the loss (1 - w) CE + w T^2 KL(teacher || network) (Hinton 2015, Apprentice 2018)", low=0, high=1
    )
    distill_temperature: float = _option(4.0, "T of the distillation", above=0, high=1000)
    distill_mixup: float = _option(
        0.0, "share of the images that are mixed with another before both networks see them", low=0, high=1
    )
    ema_decay: float = _option(
        0.0,
        "test and keep an exponential moving average of the weights: its decay a step, 0 for none (Polyak 1992)",
        low=0,
        high=0.99999,
    )
    bn_batches: int = _option(
        50, "training batches whose statistics the average's batch norm takes before it is tested", low=1
    )
    final_bn_batches: int = _option(
        0,
        "training batches whose statistics batch norm takes after the last epoch, before it is tested; 0 for none",
        low=0,
    )

    init: str | None = _option(
        None,
        "checkpoint to start from, of any bit-width; `torchvision`: its fp32 weights; `fp32`: the 32-bit run of the "
        "same --output; `none`",
        "--pretrained",
    )
    balance_filters: bool = _option(
        False, "negate filters of a float --init until the mean that weight normalisation takes from a layer is near 0"
    )
    reconstruct: int = _option(
        0, "training images on which the start is tuned, block by block, to give what --init gives; 0 for none", low=0
    )
    seed: int = _option(0, "of weights, order and augmentation", low=0, high=2**31)
    device: str = _option("auto", "auto (CUDA where there is one), cpu, cuda, cuda:N")
    gpu: str | None = _option(None, "CUDA device numbers, as published: 0 or 0,1", "-id")
    amp: str = _option("off", "training's mixed precision; auto: bf16 on GPUs that multiply it fast", choices=AMP_TYPES)
    compile: str = _option(
        "auto",
        "what is compiled; auto: the network if a run has 3,500 batches, else quantizers (on a CPU: of large tensors)",
        choices=COMPILE_MODES,
    )
    numerics: str = _option(
        "fast", "on CUDA: fast (TF32 in training, measured algorithms), or the same bits every time", choices=NUMERICS
    )
    channels_last: bool = _option(True, "memory format of images and weights")
    sync_bn: bool = _option(False, "batch norm over the images of all processes")
    dist_timeout: float = _option(1800.0, "seconds to wait for another process before giving up", above=0)
    output: str = _option("result", "folder that holds the run folders", "--job_dir")
    test_batch_size: int = _option(100, "images that each process evaluates at once", low=1)
    checkpoint_every: int = _option(0, "steps between checkpoints within an epoch, 0 for none but at its end", low=0)
    skip_nonfinite: int = _option(
        0, "steps in a row whose gradient may be infinite or NaN and that are left out before the run stops", low=0
    )
    print_freq: int = _option(100, "steps between log lines", "-p", low=1)
    histogram_every: int = _option(10, "epochs between weight histograms in TensorBoard, 0 for none", low=0)

    def __post_init__(self) -> None:
        for option in fields(self):
            object.__setattr__(self, option.name, _checked(option, getattr(self, option.name)))
        find_architecture(self.arch)
        check_bits(self.bit, "bit")
        if self.preset is None:
            object.__setattr__(self, "preset", default_preset(self.arch))
        elif self.preset not in PRESETS:
            hint = nearest(self.preset, PRESETS)
            raise ValueError(f"preset {self.preset!r}{hint}: choose one of {', '.join(PRESETS)}")
        if self.distill_weight and self.weights_path(self.teacher) is None:
            raise ValueError(f"distill_weight {self.distill_weight}: name the network to distil from with --teacher")
        check_mixup(self.distill_mixup, self.distill_weight)
        if self.reconstruct and self.weights_path(self.init) is None:
            raise ValueError(f"reconstruct {self.reconstruct}: name the network to come close to with --init")
        if self.balance_filters and self.weights_path(self.init) is None:
            raise ValueError("balance_filters: name the float network with --init")
        for name in ("mean", "std"):
            value = getattr(self, name)
            if value is not None and len(value) != 3:
                raise ValueError(f"{name} {list(value)}: expected three numbers, one a channel")

    @property
    def preset_name(self) -> str:
        """The variant, never None."""
        assert self.preset is not None
        return self.preset

    @property
    def run_name(self) -> str:
        """Name of the run folder: architecture as spelled, and bits."""
        return f"{self.arch}_{self.bit}bit"

    def weights_path(self, source: str | None) -> str | None:
        """Where the weights of ``init`` or ``teacher`` come from: a checkpoint's path, ``torchvision``, or nowhere."""
        if source == FP32_RUN:
            return str(Path(self.output) / f"{self.arch}_32bit" / BEST)
        return None if source == "none" else source

    @property
    def method(self) -> str:
        """Short name for tables: ``fp32`` at 32 bits, else the preset."""
        return "fp32" if self.bit == 32 else self.preset_name

    @property
    def streams(self) -> bool:
        """Whether images stay on disk and are decoded as they are needed."""
        return self.loader == "stream" or (
            self.loader == "auto" and find_architecture(self.arch).dataset == "imagenet" and self.data != "digits"
        )

    @property
    def crop(self) -> str:
        """The random crop of streamed training images."""
        if self.augment != "auto":
            return self.augment
        return "random-resized-crop" if self.preset_name.startswith("fat") else "resize-crop"

    def normalization(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Channel means and standard deviations in use, units of 255."""
        mean, std = normalization(self.data, find_architecture(self.arch).dataset, self.preset_name)
        return self.mean or mean, self.std or std

    def normalized_as(self, other: TrainConfig) -> TrainConfig:
        """This config with another's channel means and standard deviations, where it names none and would use others.

        A network goes on taking the images that it was trained on, wherever they lie.
        """
        theirs = zip(("mean", "std"), other.normalization(), strict=True)
        kept: dict[str, Any] = {name: value for name, value in theirs if getattr(self, name) is None}
        config = replace(self, **kept)
        return self if config.normalization() == self.normalization() else config

    def to_dict(self) -> dict[str, Any]:
        """Plain values by field name; what is None is left out."""
        plain = {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}
        return {name: value for name, value in plain.items() if value is not None}

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str = "config") -> TrainConfig:
        """The config of plain values.

        Raises:
            ValueError: an unknown key, with the nearest known one, or a bad value.
        """
        cls.check_names(values, where)
        return cls(**values)

    @classmethod
    def check_names(cls, values: dict[str, Any], where: str) -> None:
        """Raise the ``ValueError`` of ``from_dict`` for a key that is no field."""
        known = {option.name for option in fields(cls)}
        for key in values:
            if key not in known:
                raise ValueError(f"{where}: unknown key {key!r}{nearest(key, known)}")


def is_allowed(option: Field[Any], value: Any) -> bool:
    """Whether a config field may have a value."""
    try:
        _checked(option, value)
    except ValueError:
        return False
    return True


def field_type(option: Field[Any]) -> tuple[type, bool, bool]:
    """(element type, whether a tuple of them, whether None is allowed) of a config field."""
    hint = _type_hints()[option.name]
    optional = False
    if typing.get_origin(hint) in (Union, types.UnionType):
        optional = True
        hint = next(arg for arg in typing.get_args(hint) if arg is not type(None))
    if typing.get_origin(hint) is tuple:
        return typing.get_args(hint)[0], True, optional
    return hint, False, optional


@cache
def _type_hints() -> dict[str, Any]:
    return typing.get_type_hints(TrainConfig)  # milliseconds a call, and every field of every config asks


def _checked(option: Field[Any], value: Any) -> Any:
    assert option.default is not MISSING
    element, many, optional = field_type(option)
    if value is None and optional:
        return None
    name = option.name
    items = list(value) if many and isinstance(value, list | tuple) else [value]
    if many and not isinstance(value, list | tuple):
        raise ValueError(f"{name} {value!r}: expected a list of {_TYPE_NAMES[element]}s")
    items = [_checked_item(option, name, element, item) for item in items]
    return tuple(items) if many else items[0]


_TYPE_NAMES = {int: "integer", float: "number", str: "string", bool: "true-or-false value"}


def _checked_item(option: Field[Any], name: str, element: type, value: Any) -> Any:
    limits = option.metadata
    if element is float and isinstance(value, int) and not isinstance(value, bool):
        with suppress(OverflowError):  # refused below, as what it is
            value = float(value)
    wanted = _requirement(element, limits)
    if not isinstance(value, element) or (isinstance(value, bool) and element is not bool):
        raise ValueError(f"{name} {value!r}: {wanted}")
    if limits["choices"] is not None and value not in limits["choices"]:
        raise ValueError(f"{name} {value!r}: {wanted}")
    if isinstance(value, int | float):
        low, above, high = limits["low"], limits["above"], limits["high"]
        inside = (low is None or value >= low) and (above is None or value > above) and (high is None or value <= high)
        if not inside or value != value or value in (float("inf"), float("-inf")):
            raise ValueError(f"{name} {value!r}: {wanted}")
    return value


def _requirement(element: type, limits: Any) -> str:
    if limits["expected"] is not None:
        return str(limits["expected"])
    if limits["choices"] is not None:
        return f"choose one of {', '.join(limits['choices'])}"
    parts = [f"expected {'an' if element is int else 'a'} {_TYPE_NAMES[element]}"]
    if limits["low"] is not None:
        parts.append(f"at least {limits['low']}")
    if limits["above"] is not None:
        parts.append(f"above {limits['above']}")
    if limits["high"] is not None:
        parts.append(f"at most {limits['high']}")
    return " ".join([parts[0], " and ".join(parts[1:])]).strip()
