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
from apot_fat.quant.frequency import frequency_transform
from apot_fat.quant.levels import LevelSet
from apot_fat.quant.normalization import deviation, normalize_weight
from apot_fat.quant.quantizer import PARAMETERS, Quantizer, act_quantizer, parameter_shapes, weight_quantizer
from apot_fat.quant.spec import FLOAT_BITS, QuantSpec, preset
from apot_fat.quant.units import threshold_in_use


class _QuantLayer(seam.MemoryLayer):
    """What ``QuantConv2d`` and ``QuantLinear`` share: thresholds, transform and the two quantized operands."""

    weight: Tensor
    weight_alpha: nn.Parameter | None
    act_alpha: nn.Parameter | None
    transform: nn.Parameter | None
    weight_quantizer: Quantizer | None
    act_quantizer: Quantizer | None
    fixed_bits = False
    """Whether ``set_bits`` leaves this layer alone."""
    _input_channel_dim: int

    def add_quantizers(self, spec: QuantSpec, relu: bool) -> None:
        """Make a plain layer one of these."""
        for name in PARAMETERS:
            self.register_parameter(name, None)
        self._relu = relu
        self.spec = spec

    @property
    def relu(self) -> bool:
        """Whether the layer takes its input's ReLU first."""
        return self._relu

    @relu.setter
    def relu(self, relu: bool) -> None:
        self._relu = relu
        self._make_quantizers()

    def _make_quantizers(self) -> None:
        # once, not in forward: torch.compile traces no cached function
        self.weight_quantizer = weight_quantizer(self.spec)
        self.act_quantizer = act_quantizer(self.spec, relu=self.relu, channel_dim=self._input_channel_dim)

    @property
    def spec(self) -> QuantSpec:
        """What this layer does; assigning another keeps the thresholds that both have and creates the missing ones."""
        return self._spec

    @spec.setter
    def spec(self, spec: QuantSpec) -> None:
        outputs, inputs = self.weight.shape[0], self.weight.shape[1] * getattr(self, "groups", 1)
        shapes = parameter_shapes(spec, outputs, inputs)
        initial = {"weight_alpha": spec.weight_alpha or 1.0, "act_alpha": spec.act_alpha, "transform": 1 / outputs}
        made = [name for name in PARAMETERS if self._keep_parameter(name, shapes.get(name), initial[name])]
        before = self.__dict__.get("_spec")
        self._spec = spec
        self._make_quantizers()
        seam.speed.forget(self)
        if self.weight_alpha is not None:
            if "weight_alpha" in made and spec.weight_alpha is None:
                self.set_weight_alpha_from_step()
            if "weight_alpha" in made or before is None or before.weight_alpha_learned != spec.weight_alpha_learned:
                self.weight_alpha.requires_grad_(spec.weight_alpha_learned)

    def _keep_parameter(self, name: str, shape: tuple[int, ...] | None, value: float) -> bool:
        # whether it is a new one
        before = getattr(self, name)
        if shape is None:
            self.register_parameter(name, None)
        elif before is None:
            like = torch.promote_types(self.weight.dtype, torch.float32)
            with torch.inference_mode(False):  # or it could not be trained
                values = torch.full(shape, value, dtype=like, device=self.weight.device)
            self.register_parameter(name, nn.Parameter(values))
            return True
        elif before.shape != shape:
            with torch.inference_mode(False), torch.no_grad():
                values = before.expand(shape) if shape else before.mean()
                self.register_parameter(name, nn.Parameter(values.clone(), before.requires_grad))
        return False

    @torch.no_grad()
    def set_weight_alpha_from_step(self) -> None:
        """Set the weight's thresholds to LSQ's initial step times Q_P: 2 mean |ŵ| √Q_P, of the channel or the layer."""
        assert self.weight_alpha is not None
        assert self.weight_quantizer is not None
        steps = self.weight_quantizer.initial_step(self.transformed_weight(), per_channel=self.weight_alpha.dim() > 0)
        self.weight_alpha.copy_(steps)

    @torch.no_grad()
    def fit_weight_alpha(self) -> None:
        """Set the weight's thresholds, of the layer or of each channel, to those of least squared error.

        A layer without one, or whose threshold is not learned, is left as it is. About 1,000 values taken at random
        stand for a channel's.
        """
        quantizer, alpha = self.weight_quantizer, self.weight_alpha
        if quantizer is not None and alpha is not None and self.spec.weight_alpha_learned:
            alpha.copy_(quantizer.fit(self.transformed_weight(), per_channel=alpha.dim() > 0))

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
        return self.weight if self.weight_quantizer is None else seam.speed.weight(self, self._quantize_weight)

    def _quantize_weight(self) -> Tensor:
        quantizer, alpha = self.weight_quantizer, self.weight_alpha
        assert quantizer is not None
        scale = self.grad_scale(quantizer.levels, alpha, self.weight.numel())
        return quantizer(self.transformed_weight(), alpha, scale)

    @torch.no_grad()
    def weight_scale(self) -> Tensor | None:
        """What the weight's level of 1 stands for: the threshold in use, or the maximum; None of a float weight.

        A weight without a positive maximum, which has no such scale, is float too.
        """
        quantizer = self.weight_quantizer
        return None if quantizer is None else quantizer.scale(self.weight, self.weight_alpha)

    def quantized_input(self, x: Tensor, features: int | None = None) -> Tensor:
        """The input the layer computes with: α times a level; at 32 bits the input itself. Shape of ``x``.

        With ``relu`` the input's ReLU in place of the input.

        Args:
            x: the input.
            features: values of one input, which LSQ's ``grad_scale`` is made of, where x holds but a part of them.
        """
        quantizer, alpha = self.act_quantizer, self.act_alpha
        if quantizer is None:
            return F.relu(x) if self.relu else x
        return quantizer(x, alpha, self.grad_scale(quantizer.levels, alpha, features or self.count_features(x)))

    def count_features(self, x: Tensor) -> int:
        """Values of one input, of a batch x or of one."""
        unbatched = 3 if isinstance(self, nn.Conv2d) else 1
        return x.numel() if x.dim() <= unbatched else x[:1].numel()

    def grad_scale(self, levels: LevelSet, alpha: Tensor | None, values: int) -> float:
        """The factor on the gradient of thresholds that this many values share, see ``QuantSpec``."""
        scale = self.spec.grad_scale
        if scale == "lsq":
            shared = values // max(1 if alpha is None else alpha.numel(), 1)
            return levels.positive_levels**1.5 / max(shared, 1) ** 0.5
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

    Shapes: x (N, C_in, H, W) → (N, C_out, H', W'); ``weight_alpha``, ``act_alpha`` 0-d, (C_out,) and (C_in,) with
    ``weight_per_channel`` and ``act_per_channel``; ``transform`` (C_out, C_out) with FAT, else None. At 32 bits, and
    with ``EIGHT_BIT``, the three are None.

    Raises:
        ValueError: bits other than 2 to 8 and 32, or a grad_scale that is not positive.

    Gradient: published, by variant.

    Paper: APoT; FAT with ``spec.transform``.
    """

    _input_channel_dim = -3

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

    _input_channel_dim = -1

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


def _published_spec(bit: int, power: bool, additive: bool, grad_scale: float | None) -> QuantSpec:
    variant = "" if power and additive else "-pot" if power else "-uniform"
    return preset(f"apot-imagenet{variant}", bits=bit, grad_scale=grad_scale)
