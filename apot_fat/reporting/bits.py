"""How many bits the layers of a network have, read from the layers: the same everywhere, or each its own."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from apot_fat.quant.all_layers import threshold_layers
from apot_fat.quant.spec import FLOAT_BITS, QuantSpec, preset
from apot_fat.training.config import TrainConfig

_METHODS_OF_LEVELS = {"twos-complement": "lsq", "odd": "pact"}


@dataclass(frozen=True)
class NetworkBits:
    """Bits of the quantized layers of a network; its 8-bit ends and float layers are not among them.

    Args:
        specs: of each quantized layer, by name, in the order of definition.
        counts: weights of each.
    """

    specs: dict[str, QuantSpec]
    counts: tuple[int, ...]

    @property
    def weights(self) -> tuple[int, ...]:
        """Bits of a weight of each layer."""
        return tuple(spec.weight_bits for spec in self.specs.values())

    @property
    def inputs(self) -> tuple[int, ...]:
        """Bits of an input of each layer."""
        return tuple(spec.act_bits for spec in self.specs.values())

    @property
    def differ(self) -> bool:
        """Whether two layers have different bits, of weights or of inputs."""
        return len(set(zip(self.weights, self.inputs, strict=True))) > 1

    @property
    def mean(self) -> float:
        """Bits of a weight, the mean over all weights of the quantized layers; 32 where there are none."""
        if not any(self.counts):
            return float(FLOAT_BITS)
        return sum(n * bits for n, bits in zip(self.counts, self.weights, strict=True)) / sum(self.counts)

    @property
    def weights_text(self) -> str:
        """Bits of weights: ``3``, or ``2 to 5, 3.04 on average``."""
        text = _range(self.weights)
        return f"{text}, {self.mean:.2f} on average" if len(set(self.weights)) > 1 else text

    @property
    def inputs_text(self) -> str | None:
        """Bits of inputs, ``8`` or ``3 to 8``; None where those of each layer are its weights'."""
        return None if self.inputs == self.weights else _range(self.inputs)

    @property
    def label(self) -> str:
        """``3 bits``, ``2 to 5 bits`` or ``4 bits, inputs 8``."""
        inputs = "" if self.inputs_text is None else f", inputs {self.inputs_text}"
        return f"{_range(self.weights)} bits{inputs}"


def network_bits(model: nn.Module) -> NetworkBits:
    """Bits of the layers of a network that quantize their weight or their input."""
    layers = {
        name: layer
        for name, layer in threshold_layers(model)
        if (layer.spec.weight_bits, layer.spec.act_bits) != (FLOAT_BITS, FLOAT_BITS)
    }
    specs = {name: layer.spec for name, layer in layers.items()}
    return NetworkBits(specs, tuple(layer.weight.numel() for layer in layers.values()))


def network_method(config: TrainConfig, bits: NetworkBits) -> str:
    """How a network is quantized: ``fp32``, the preset it was made with, or what its layers say if it was converted.

    Args:
        config: what is known of the network; a converted one is recorded as the float network it was.
        bits: of its layers.
    """
    if not bits.specs:
        return "fp32"
    made = preset(config.preset_name)
    if config.bit != FLOAT_BITS and all(_levels(spec) == _levels(made) for spec in bits.specs.values()):
        return config.preset_name
    return " and ".join(dict.fromkeys(map(_converted, bits.specs.values())))


def _converted(spec: QuantSpec) -> str:
    levels = _METHODS_OF_LEVELS.get(spec.weight_levels, spec.weight_levels)
    return ("fat-log" if levels == "pot" else "fat") if spec.transform else levels


def _levels(spec: QuantSpec) -> tuple[str, str]:
    return spec.weight_levels, spec.act_levels


def _range(bits: tuple[int, ...]) -> str:
    low, high = (end(bits, default=FLOAT_BITS) for end in (min, max))
    return str(low) if low == high else f"{low} to {high}"
