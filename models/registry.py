"""Which networks there are, under which names, and how to build one."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import nn

from apot_fat.quant.layers import QuantConv2d, QuantLinear
from apot_fat.quant.quantizer import act_quantizer
from apot_fat.quant.spec import EIGHT_BIT, FLOAT_BITS, QuantSpec, nearest
from apot_fat.quant.spec import preset as quant_preset


@dataclass(frozen=True)
class LayerMaker:
    """The layers a network is composed of, by their role; the one place where networks meet quantization.

    Args:
        spec: what the inner layers do. At 32 bits they are plain ``nn`` layers, as in the published networks.
    """

    spec: QuantSpec

    @property
    def is_float(self) -> bool:
        """Whether the inner layers are full precision."""
        return self.spec.weight_bits == self.spec.act_bits == FLOAT_BITS

    def conv(
        self, in_channels: int, out_channels: int, kernel_size: int, *, rectified: bool = False, **options: Any
    ) -> nn.Conv2d:
        """An inner convolution: quantized, or plain at 32 bits. Without a bias unless asked for.

        ``rectified`` says that the input is a ReLU's output. Nothing is then below 0, and uniform levels, which for
        other inputs of FAT's networks go on there, fit into bytes.
        """
        options = {"bias": False, **options}
        if self.is_float:
            return nn.Conv2d(in_channels, out_channels, kernel_size, **options)
        spec = self.spec
        quantizer = act_quantizer(spec, relu=False, channel_dim=-3)
        if rectified and quantizer is not None and quantizer.goes_on_below:
            spec = replace(spec, act_clip="both")
        return QuantConv2d(in_channels, out_channels, kernel_size, spec=spec, **options)

    def relu_conv(
        self, in_channels: int, out_channels: int, kernel_size: int, **options: Any
    ) -> tuple[nn.Module, nn.Conv2d]:
        """A ReLU and the inner convolution that alone takes its output.

        A quantized convolution does the ReLU itself, in the pass of its quantizer; the module for it is an identity.
        """
        if self.is_float:
            return nn.ReLU(), self.conv(in_channels, out_channels, kernel_size, **options)
        return nn.Identity(), self.conv(in_channels, out_channels, kernel_size, relu=True, **options)

    def linear(self, in_features: int, out_features: int) -> nn.Linear:
        """An inner linear layer: quantized, or plain at 32 bits."""
        if self.is_float:
            return nn.Linear(in_features, out_features)
        return QuantLinear(in_features, out_features, spec=self.spec)

    def first_conv(
        self, in_channels: int, out_channels: int, kernel_size: int, *, eight_bit: bool = True, **options: Any
    ) -> nn.Conv2d:
        """The first convolution: 8-bit weights and float input, or plain."""
        make = partial(QuantConv2d, spec=EIGHT_BIT) if eight_bit else nn.Conv2d
        return make(in_channels, out_channels, kernel_size, **{"bias": False, **options})

    def last_linear(self, in_features: int, out_features: int, *, eight_bit: bool = True) -> nn.Linear:
        """The last linear layer: 8-bit weights and float input, or plain."""
        make = partial(QuantLinear, spec=EIGHT_BIT) if eight_bit else nn.Linear
        return make(in_features, out_features)

    def without_transform(self) -> LayerMaker:
        """The same, but where FAT's published networks leave a layer untransformed: ``uniform-mobilenet``."""
        if not self.spec.transform:
            return self
        kept = ("weight_bits", "act_bits", "weight_levels", "act_levels", "weight_per_channel", "act_per_channel")
        return LayerMaker(quant_preset("uniform-mobilenet", **{name: getattr(self.spec, name) for name in kept}))


@dataclass(frozen=True)
class Architecture:
    """A registered network.

    Args:
        name: canonical name, such as ``resnet20``.
        build: (layers, number of classes) → network.
        dataset: the data set its papers train it on, ``cifar10`` or ``imagenet``.
        spellings: published names; one with an underscore is FAT's and implies its preset.
    """

    name: str
    build: Callable[[LayerMaker, int], nn.Module]
    dataset: str
    spellings: tuple[str, ...] = ()


_REGISTRY: dict[str, Architecture] = {}


def register(
    name: str, dataset: str, *spellings: str
) -> Callable[[Callable[..., nn.Module]], Callable[..., nn.Module]]:
    """Register a builder ``(layers, num_classes) -> nn.Module`` under its canonical name and published spellings."""

    def add(build: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
        assert name not in _REGISTRY, name
        _REGISTRY[name] = Architecture(name, build, dataset, spellings)
        return build

    return add


def list_models() -> list[str]:
    """Canonical names of all networks, in the order of registration."""
    return list(_REGISTRY)


def find_architecture(name: str) -> Architecture:
    """The architecture of any accepted spelling: ``res20``, ``resnet_20``, ``ResNet20``, ….

    Raises:
        ValueError: an unknown name, with the nearest known one.
    """
    if not isinstance(name, str):
        raise ValueError(f"architecture {name!r}: expected its name")
    by_key = {_key(spelling): arch for arch in _REGISTRY.values() for spelling in (arch.name, *arch.spellings)}
    key = _key(name)
    if key not in by_key:
        hint = nearest(key, by_key)
        raise ValueError(f"unknown architecture {name!r}{hint}: choose one of {', '.join(_REGISTRY)}")
    return by_key[key]


def default_preset(name: str) -> str:
    """The published variant an architecture's spelling stands for: FAT writes ``resnet_20``, APoT ``res20``."""
    architecture = find_architecture(name)
    method = "fat" if "_" in name else "apot"
    return f"{method}-{'cifar' if architecture.dataset == 'cifar10' else 'imagenet'}"


def create_model(
    name: str, preset: str | None = None, bits: int = 4, num_classes: int | None = None, **overrides: Any
) -> nn.Module:
    """Build a network.

    Args:
        name: any accepted spelling, see ``list_models``.
        preset: a published variant; by default the one the spelling stands for (``default_preset``).
        bits: 2 to 8 for weights and activations, 32 for the published full-precision network.
        num_classes: outputs; by default the papers' (10 or 1000).
        overrides: fields of ``QuantSpec``, such as ``act_alpha=6.0``.

    Raises:
        ValueError: an unknown name, preset, field or bit-width.

    >>> from apot_fat.models import create_model
    >>> sum(p.numel() for p in create_model("resnet20", preset="apot-cifar", bits=3).parameters())
    272514
    """
    architecture = find_architecture(name)
    spec = quant_preset(preset or default_preset(name), bits=bits, **overrides)
    classes = num_classes or (10 if architecture.dataset == "cifar10" else 1000)
    if classes < 1:
        raise ValueError(f"num_classes {num_classes}: must be at least 1")
    model = architecture.build(LayerMaker(spec), classes)
    # how to build it again: what a packed file says of its network
    model.created_as = {  # type: ignore[assignment]
        "name": architecture.name,
        "preset": preset or default_preset(name),
        "bits": bits,
        "num_classes": classes,
        **overrides,
    }
    return model


def _key(name: str) -> str:
    key = re.sub(r"[^a-z0-9]", "", name.lower())
    return re.sub(r"^res(?=\d)", "resnet", key)
