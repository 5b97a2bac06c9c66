"""Quantized layers: they own the state (weight, thresholds, FAT matrix) and leave the mathematics to the functions.

>>> import torch
>>> layer = QuantConv2d(4, 6, 3, padding=1, spec=preset("fat-cifar", bits=3))
>>> layer(torch.rand(2, 4, 8, 8)).shape, layer.transform.shape
(torch.Size([2, 6, 8, 8]), torch.Size([6, 6]))
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apot_fat.quant import seam
from apot_fat.quant.fake_quant import eight_bit_weight, quantize_activation, quantize_weight
from apot_fat.quant.frequency import frequency_transform
from apot_fat.quant.levels import LevelSet
from apot_fat.quant.normalization import deviation, normalize_weight
from apot_fat.quant.spec import FLOAT_BITS, InputClip, QuantSpec, preset
from apot_fat.quant.units import threshold_in_use


class _QuantLayer(seam.MemoryLayer):
    """What ``QuantConv2d`` and ``QuantLinear`` share: thresholds, transform and the two quantized operands."""

    weight: Tensor
    weight_alpha: nn.Parameter | None
    act_alpha: nn.Parameter | None
    transform: nn.Parameter | None
    relu: bool
    fixed_bits = False
    """Whether ``set_bits`` leaves this layer alone."""

    def add_quantizers(self, spec: QuantSpec, relu: bool) -> None:
        """Make a plain layer one of these."""
        self.relu = relu
        for name in ("weight_alpha", "act_alpha", "transform"):
            self.register_parameter(name, None)
        self.spec = spec

    @property
    def spec(self) -> QuantSpec:
        """What this layer does; assigning another keeps the thresholds that both have and creates the missing ones."""
        return self._spec

    @spec.setter
    def spec(self, spec: QuantSpec) -> None:
        channels = self.weight.shape[0]
        quantizes_weight = spec.weight_bits != FLOAT_BITS
        per_channel = (channels,) if spec.weight_per_channel else ()
        made = self._keep_parameter("weight_alpha", spec.has_weight_threshold, per_channel, spec.weight_alpha or 1.0)
        self._keep_parameter("act_alpha", spec.act_bits != FLOAT_BITS, (), spec.act_alpha)
        self._keep_parameter("transform", quantizes_weight and spec.transform, (channels, channels), 1 / channels)
        before = self.__dict__.get("_spec")
        self._spec = spec
        # found here, not in forward: torch.compile traces no cached function
        self.weight_set = spec.weight_set if quantizes_weight else None
        self.act_set = spec.act_set if spec.act_bits != FLOAT_BITS else None
        seam.speed.forget(self)
        if self.weight_alpha is not None:
            if made and spec.weight_alpha is None:
                self.set_weight_alpha_from_step()
            if made or before is None or before.weight_alpha_learned != spec.weight_alpha_learned:
                self.weight_alpha.requires_grad_(spec.weight_alpha_learned)

    def _keep_parameter(self, name: str, wanted: bool, shape: tuple[int, ...], value: float) -> bool:
        # whether it is a new one
        before = getattr(self, name)
        if not wanted:
            self.register_parameter(name, None)
        elif before is None:
            like = torch.promote_types(self.weight.dtype, torch.float32)
            self.register_parameter(name, nn.Parameter(torch.full(shape, value, dtype=like, device=self.weight.device)))
            return True
        elif before.shape != shape:
            with torch.no_grad():
                values = before.expand(shape) if shape else before.mean()
                self.register_parameter(name, nn.Parameter(values.clone(), before.requires_grad))
        return False

    @torch.no_grad()
    def set_weight_alpha_from_step(self) -> None:
        """Set the weight's thresholds to LSQ's initial step times Q_P: 2 mean |ŵ| √Q_P, of the channel or the layer."""
        assert self.weight_alpha is not None
        magnitudes = self.transformed_weight().abs()
        mean = magnitudes.flatten(1).mean(1) if self.weight_alpha.dim() else magnitudes.mean()
        self.weight_alpha.copy_(initial_step_threshold(mean, self.spec.weight_set))

    @property
    def input_clip(self) -> InputClip:
        """What lies outside of the levels and is clipped, and whether the layer does the ReLU before it."""
        return "relu" if self.relu else self.spec.act_clip

    @property
    def bit(self) -> int:
        """Bits of the weight (the published attribute)."""
        return self.spec.weight_bits

    def transformed_weight(self) -> Tensor:
        """The weight just before projection: normalised, and with FAT transformed. Shape of ``weight``."""
        w = normalize_weight(self.weight, self.spec)
        if self.transform is None:
            return w
        if self.spec.weight_norm != "none":
            return frequency_transform(w, self.transform)[0]
        unit = deviation(w)
        return frequency_transform(w / unit, self.transform)[0] * unit

    def weight_to_transform(self) -> Tensor:
        """What FAT's transform takes: the normalised weight; one that is not normalised in units of its deviation.

        The mask depends on the scale of the spectrum. Such a weight gets its scale, a constant for the gradient, back.
        """
        w = normalize_weight(self.weight, self.spec)
        return w if self.spec.weight_norm != "none" else w / deviation(w)

    def quantized_weight(self) -> Tensor:
        """The weight the layer computes with: scale times level; at 32 bits the weight itself. Shape of ``weight``."""
        return self.weight if self.weight_set is None else seam.speed.weight(self, self._quantize_weight)

    def _quantize_weight(self) -> Tensor:
        if self.weight_alpha is None:
            return eight_bit_weight(self.weight)
        assert self.weight_set is not None
        return quantize_weight(
            self.transformed_weight(),
            self.weight_alpha,
            self.weight_set,
            clip_gradient=self.spec.clips_weight_gradient,
            grad_scale=self.grad_scale(self.weight_set, self.weight.numel() // max(self.weight_alpha.numel(), 1)),
        )

    @torch.no_grad()
    def weight_scale(self) -> Tensor | None:
        """What the weight's level of 1 stands for: the threshold in use, or the maximum; None of a float weight.

        A weight without a positive maximum, which has no such scale, is float too.
        """
        if self.weight_alpha is not None:
            return threshold_in_use(self.weight_alpha)
        scale = None if self.weight_set is None else self.weight.max()
        return scale if scale is not None and scale > 0 else None

    def quantized_input(self, x: Tensor, features: int | None = None) -> Tensor:
        """The input the layer computes with: α times a level; at 32 bits the input itself. Shape of ``x``.

        With ``relu`` the input's ReLU in place of the input.

        Args:
            x: the input.
            features: values of one input, which LSQ's ``grad_scale`` is made of, where x holds but a part of them.
        """
        if self.act_alpha is None or self.act_set is None:
            return F.relu(x) if self.relu else x
        spec, scale = self.spec, self.grad_scale(self.act_set, features or self.count_features(x))
        if spec.act_signed:
            x = F.relu(x) if self.relu else x
            return quantize_weight(x, self.act_alpha, self.act_set, clip_gradient=True, grad_scale=scale)
        gradient = spec.act_alpha_gradient
        return quantize_activation(
            x, self.act_alpha, self.act_set, clip=self.input_clip, alpha_gradient=gradient, grad_scale=scale
        )

    def count_features(self, x: Tensor) -> int:
        """Values of one input, of a batch x or of one."""
        unbatched = 3 if isinstance(self, nn.Conv2d) else 1
        return x.numel() if x.dim() <= unbatched else x[:1].numel()

    def grad_scale(self, levels: LevelSet, values: int) -> float:
        """The factor on the gradient of a threshold that this many values share, see ``QuantSpec``."""
        scale = self.spec.grad_scale
        if scale == "lsq":
            return levels.positive_levels**1.5 / max(values, 1) ** 0.5
        return scale or 1.0

    def mask_range(self) -> tuple[float, float] | None:
        """Largest and smallest value of FAT's mask, range (0, 1); None without a transform."""
        if self.transform is None:
            return None
        with torch.no_grad():
            mask = frequency_transform(self.weight_to_transform(), self.transform)[1]
            return mask.max().item(), mask.min().item()

    def clipping_thresholds(self) -> tuple[float | None, float | None]:
        """The thresholds of weight and input as used, None of a float side; of one a channel the mean."""
        weight, act = (
            None if alpha is None else threshold_in_use(alpha.detach()).mean().item()
            for alpha in (self.weight_alpha, self.act_alpha)
        )
        return weight, act

    def show_params(self) -> None:
        """Print the published line with the clipping thresholds, rounded to 3 digits; nothing at 32 bits."""
        if self.weight_alpha is not None or self.act_alpha is not None:
            print(threshold_line(*self.clipping_thresholds()))

    def extra_repr(self) -> str:
        """The plain layer's description and the quantizers'."""
        spec, plain = self.spec, super().extra_repr() + (", relu" if self.relu else "")
        if spec.weight_bits == spec.act_bits == FLOAT_BITS:
            return f"{plain}, float"
        fat = ", fat" if self.transform is not None else ""
        return f"{plain}, weight={spec.weight_levels}/{spec.weight_bits}, input={spec.act_levels}/{spec.act_bits}{fat}"


class QuantConv2d(_QuantLayer, nn.Conv2d):
    """Convolution of a quantized input with a quantized weight.

    Equation: y = conv(x_q, w_q) + bias, see ``quantize_activation`` and ``quantize_weight``. In evaluation without
    gradients a CPU with 8-bit dot products forms the sums from the numerators of the levels, which is exact and faster.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias: as in ``nn.Conv2d``, but
            without a bias by default.
        bit: 2 to 8, or 32 for a plain convolution.
        power: powers-of-two levels, else uniform ones.
        additive: additive powers of two, else plain ones.
        grad_scale: factor on the threshold gradients.
        spec: the whole variant; replaces bit, power, additive and grad_scale, which together mean ``apot-imagenet``,
            ``apot-imagenet-pot`` or ``apot-imagenet-uniform``.
        relu: take the input's ReLU first, in the same pass as the quantizer; at any bits.

    Shapes: x (N, C_in, H, W) → (N, C_out, H', W'); ``weight_alpha``, ``act_alpha`` 0-d, the first (C_out,) with
    ``weight_per_channel``; ``transform`` (C_out, C_out) with FAT, else None. At 32 bits, and with ``EIGHT_BIT``, the
    three are None.

    Raises:
        ValueError: bits other than 2 to 8 and 32, or a grad_scale that is not positive.

    Gradient: published, by variant.

    Paper: APoT; FAT with ``spec.transform``.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | str | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = False,
        bit: int = 5,
        power: bool = True,
        additive: bool = True,
        grad_scale: float | None = None,
        *,
        spec: QuantSpec | None = None,
        relu: bool = False,
        **conv_options: Any,
    ) -> None:
        spec = spec or _published_spec(bit, power, additive, grad_scale)
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, **conv_options
        )
        self.add_quantizers(spec, relu)

    def forward(self, input: Tensor) -> Tensor:
        """y = conv(x_q, w_q) + bias."""
        y = seam.speed.output(self, input)
        if y is not None:
            return y
        return self._conv_forward(self.quantized_input(input), self.quantized_weight(), self.bias)


class QuantLinear(_QuantLayer, nn.Linear):
    """Linear layer of a quantized input with a quantized weight.

    Equation: y = x_q w_qᵀ + bias. Arguments after ``bias``, errors, gradient and papers: ``QuantConv2d``.

    Shapes: x (…, C_in) → (…, C_out).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        bit: int = 5,
        power: bool = True,
        additive: bool = True,
        grad_scale: float | None = None,
        *,
        spec: QuantSpec | None = None,
        relu: bool = False,
        **linear_options: Any,
    ) -> None:
        spec = spec or _published_spec(bit, power, additive, grad_scale)
        super().__init__(in_features, out_features, bias, **linear_options)
        self.add_quantizers(spec, relu)

    def forward(self, input: Tensor) -> Tensor:
        """y = x_q w_qᵀ + bias."""
        y = seam.speed.output(self, input)
        return y if y is not None else F.linear(self.quantized_input(input), self.quantized_weight(), self.bias)


AnyQuantized = QuantConv2d | QuantLinear


def threshold_line(weight_alpha: float | None, act_alpha: float | None) -> str:
    """The published line of a layer's thresholds, rounded to 3 digits; a float side is ``none``.

    >>> threshold_line(1.5694, 1.4378)
    'clipping threshold weight alpha: 1.569000, activation alpha: 1.438000'
    """
    weight, act = ("none" if alpha is None else f"{round(alpha, 3):2f}" for alpha in (weight_alpha, act_alpha))
    return f"clipping threshold weight alpha: {weight}, activation alpha: {act}"


def initial_step_threshold(mean_magnitude: Tensor, levels: LevelSet) -> Tensor:
    """LSQ's initial step as a threshold.

    Equation: α = Q_P s, s = 2 mean |v| / √Q_P, Q_P the number of levels above 0.

    Paper: LSQ, "Learned Step Size Quantization", section 2.1.
    """
    return 2 * levels.positive_levels**0.5 * mean_magnitude


def _published_spec(bit: int, power: bool, additive: bool, grad_scale: float | None) -> QuantSpec:
    variant = "" if power and additive else "-pot" if power else "-uniform"
    return preset(f"apot-imagenet{variant}", bits=bit, grad_scale=grad_scale)
