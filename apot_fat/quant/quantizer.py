"""A quantizer: how one operand of a layer, its weight or its input, becomes levels.

One frozen value holds all but the threshold, which is the layer's parameter. Everybody asks it: layers (forward and
gradient), the thresholds' start, integers, measurements, files. A quantizer of another kind is a class here and a line
in ``weight_quantizer`` or ``act_quantizer``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from apot_fat.quant.fake_quant import eight_bit_weight, quantize_activation, quantize_weight
from apot_fat.quant.fitting import fit_all, fit_rows, initial_step_threshold
from apot_fat.quant.levels import LevelSet
from apot_fat.quant.spec import FLOAT_BITS, ActAlphaGradient, InputClip, QuantSpec
from apot_fat.quant.units import threshold_in_use

THRESHOLDS = ("weight_alpha", "act_alpha")
PARAMETERS = (*THRESHOLDS, "transform")
"""The names under which a layer holds its quantizers' parameters, here and in every file."""


@dataclass(frozen=True)
class Quantizer(ABC):
    """How values become levels.

    Equation: x_q = s · l, s the scale, l the nearest of the levels to x / s, clipped as the kind of quantizer says.

    Args:
        levels: those of [0, 1], or signed ones.
        channel_dim: the dimension along which thresholds of one a channel lie.
    """

    levels: LevelSet
    channel_dim: int

    is_signed: ClassVar[bool] = True
    """Whether there are levels of both signs."""

    def __call__(self, x: Tensor, alpha: Tensor | None, grad_scale: float = 1.0) -> Tensor:
        """x_q, shape and type of x.

        Args:
            x: what is quantized.
            alpha: the threshold, 0-d or (C,); None for a quantizer without.
            grad_scale: factor on its gradient.
        """
        if alpha is None or not alpha.dim():
            return self._quantize(x, alpha, grad_scale)
        return self._quantize(self.rows(x), alpha, grad_scale).movedim(0, self.channel_dim)

    @abstractmethod
    def _quantize(self, x: Tensor, alpha: Tensor | None, grad_scale: float) -> Tensor:
        """``__call__`` where thresholds of one a channel lie along the first dimension."""

    @property
    def goes_on_below(self) -> bool:
        """Whether values below the lowest level go on to multiples of the step."""
        return False

    @property
    def keeps_negatives(self) -> bool:
        """Whether a negative value may become another than 0."""
        return self.is_signed or self.goes_on_below

    @property
    def numerators(self) -> tuple[int, ...]:
        """The integers n of the values s n / d, rising, but for those that go on below."""
        return self.levels.signed_numerators if self.is_signed else self.levels.numerators

    def scale(self, x: Tensor, alpha: Tensor | None) -> Tensor | None:
        """What a level of 1 stands for: the threshold in use, 0-d or (C,); None of an x that stays float."""
        return None if alpha is None else threshold_in_use(alpha)

    def taken(self, x: Tensor) -> Tensor:
        """What of x is quantized: x, or its ReLU."""
        return x

    def fit(self, x: Tensor, *, per_channel: bool) -> Tensor:
        """The threshold of least squared error for x (``fit_threshold``), 0-d, or those of its channels, (C,)."""
        x = self.taken(x)
        if per_channel:
            return fit_rows(self.rows(x).flatten(1), self.levels, signed=self.is_signed)
        return fit_all(x, self.levels, signed=self.is_signed)

    def initial_step(self, x: Tensor, *, per_channel: bool) -> Tensor:
        """LSQ's initial step for x as a threshold (``initial_step_threshold``), 0-d, or those of its channels, (C,)."""
        magnitudes = self.taken(x).abs()
        mean = self.rows(magnitudes).flatten(1).mean(1) if per_channel else magnitudes.mean()
        return initial_step_threshold(mean, self.levels)

    def rows(self, x: Tensor) -> Tensor:
        """x with its channels along the first dimension."""
        return x.movedim(self.channel_dim, 0)


@dataclass(frozen=True)
class SignedQuantizer(Quantizer):
    """Of weights, and of inputs of both signs: ``quantize_weight``, whose ``clip_gradient`` it has."""

    clip_gradient: bool

    def _quantize(self, x: Tensor, alpha: Tensor | None, grad_scale: float) -> Tensor:
        assert alpha is not None
        return quantize_weight(x, alpha, self.levels, clip_gradient=self.clip_gradient, grad_scale=grad_scale)


@dataclass(frozen=True)
class UnsignedQuantizer(Quantizer):
    """Of inputs with levels on [0, 1]: ``quantize_activation``, whose ``clip`` and ``alpha_gradient`` it has."""

    clip: InputClip
    alpha_gradient: ActAlphaGradient

    is_signed = False

    def _quantize(self, x: Tensor, alpha: Tensor | None, grad_scale: float) -> Tensor:
        assert alpha is not None
        return quantize_activation(
            x, alpha, self.levels, clip=self.clip, alpha_gradient=self.alpha_gradient, grad_scale=grad_scale
        )

    @property
    def goes_on_below(self) -> bool:
        """Uniform levels do where only what is above them is clipped."""
        return self.levels.is_uniform and self.clip == "above"

    def taken(self, x: Tensor) -> Tensor:
        """x, or its ReLU."""
        return F.relu(x) if self.clip == "relu" else x


@dataclass(frozen=True)
class MaximumQuantizer(Quantizer):
    """Of weights in units of their maximum: ``eight_bit_weight``. It has no threshold."""

    def _quantize(self, x: Tensor, alpha: Tensor | None, grad_scale: float) -> Tensor:
        return eight_bit_weight(x)

    @property
    def goes_on_below(self) -> bool:
        """A weight far below the negative maximum does."""
        return True

    def scale(self, x: Tensor, alpha: Tensor | None) -> Tensor | None:
        """The maximum; a weight without a positive one stays float."""
        largest = x.max()
        return largest if largest > 0 else None


def parameter_shapes(spec: QuantSpec, outputs: int, inputs: int) -> dict[str, tuple[int, ...]]:
    """Which of ``PARAMETERS`` a layer with so many channels has, and their shapes."""
    shapes: dict[str, tuple[int, ...]] = {}
    if spec.has_weight_threshold:
        shapes["weight_alpha"] = (outputs,) if spec.weight_per_channel else ()
    if spec.act_bits != FLOAT_BITS:
        shapes["act_alpha"] = (inputs,) if spec.act_per_channel else ()
    if spec.transform and spec.weight_bits != FLOAT_BITS:
        shapes["transform"] = (outputs, outputs)
    return shapes


def weight_quantizer(spec: QuantSpec) -> Quantizer | None:
    """A layer's for its weight; None of a float weight."""
    if spec.weight_bits == FLOAT_BITS:
        return None
    if spec.weight_scale == "max":
        return MaximumQuantizer(spec.weight_set, 0)
    return SignedQuantizer(spec.weight_set, 0, spec.clips_weight_gradient)


def act_quantizer(spec: QuantSpec, *, relu: bool, channel_dim: int) -> Quantizer | None:
    """A layer's for its input; None of a float input.

    Args:
        spec: the layer's.
        relu: whether the layer takes the input's ReLU first: nothing is then below 0, signed or not.
        channel_dim: the input's channels, counted from the last dimension.
    """
    if spec.act_bits == FLOAT_BITS:
        return None
    if spec.act_signed and not relu:
        return SignedQuantizer(spec.act_set, channel_dim, clip_gradient=True)
    return UnsignedQuantizer(spec.act_set, channel_dim, "relu" if relu else spec.act_clip, spec.act_alpha_gradient)
