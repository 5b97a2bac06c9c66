"""Quantized layers: they own the state (weight, thresholds, FAT matrix) and leave the mathematics to the functions.

>>> import torch
>>> layer = QuantConv2d(4, 6, 3, padding=1, spec=preset("fat-cifar", bits=3))
>>> layer(torch.rand(2, 4, 8, 8)).shape, layer.transform.shape
(torch.Size([2, 6, 8, 8]), torch.Size([6, 6]))
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Generic, NamedTuple, Self, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apot_fat.quant.byte_product import ByteWeight, byte_product, bytes_work, fits_bytes, pack_weight
from apot_fat.quant.fake_quant import ALPHA_FLOOR, eight_bit_weight, positive, quantize_activation, quantize_weight
from apot_fat.quant.frequency import frequency_transform
from apot_fat.quant.kernels import get_kernels
from apot_fat.quant.levels import LevelSet
from apot_fat.quant.product import REMEMBER_ELEMENTS, ActSettings, ConvSettings, quantized_product
from apot_fat.quant.spec import FLOAT_BITS, InputClip, QuantSpec, check_bits, preset

CONSTANT = 1e-6
"""A weight whose standard deviation is at most this share of its |mean| is constant but for rounding."""


def normalize_weight(w: Tensor, spec: QuantSpec) -> Tensor:
    """The weight in the unit its threshold is given in.

    Equation: ŵ = (w − mean(w)) / std(w) over the whole tensor, std unbiased (``standardize``); w − mean(w)
    (``center``); tanh(w) / max |tanh(w)| (``tanh``); w (``none``). A constant weight has std 0 but for rounding,
    std ≤ 1e-6 |mean|, and gives ŵ = 0; with ``tanh`` a weight of zeros does.

    Args:
        w: weight, any shape.
        spec: ``weight_norm`` and ``weight_norm_gradient``.

    Gradient: of the equation, with mean, std and maximum as constants unless ``weight_norm_gradient``.

    Paper: APoT, "Weight Normalization"; DoReFa-Net for ``tanh``, before its affine map to [0, 1] and back.
    """
    if spec.weight_norm == "none":
        return w
    if spec.weight_norm == "tanh":
        bounded = torch.tanh(w)
        largest = (bounded if spec.weight_norm_gradient else bounded.detach()).abs().max()
        return bounded / torch.where(largest == 0, 1, largest)
    source = w if spec.weight_norm_gradient else w.detach()
    mean = source.mean()
    centered = w - mean
    if spec.weight_norm == "center":
        return centered
    if w.numel() < 2:
        return centered
    std = source.std()
    return centered / torch.where(std <= CONSTANT * mean.detach().abs(), 1, std)


def _deviation(w: Tensor) -> Tensor:
    # 1 for a weight that has none
    std = w.detach().std(correction=0)
    return torch.where(std > 0, std, 1)


T = TypeVar("T")


class _Kept(NamedTuple, Generic[T]):
    # a value, the tensors it was made of, and their state then
    value: T
    sources: tuple[Tensor, ...]
    state: tuple[object, ...]


class _KeepsWeight(nn.Module):
    """A layer that computes its quantized weight once in evaluation and keeps it while what it is made of stays.

    Kept only in evaluation mode and where no gradient can flow; given up on ``train()``, ``eval()``, ``to()``, where a
    gradient can flow (an optimizer's step may follow) and on any change that a tensor's version counter shows
    (``load_state_dict``, in-place writes). A write through ``.data`` shows nowhere: call ``eval()`` after it. Neither
    saved nor copied. Under PyTorch's ``fully_shard`` nothing is kept.
    """

    _kept: _Kept[Tensor] | None = None
    _kept_bytes: _Kept[ByteWeight | None] | None = None
    _graph_weight: Tensor | None = None  # what compiled graphs read: a CUDA graph finds it at the address it had
    _graph_source: Tensor | None = None  # what was last copied there

    def quantized_weight(self) -> Tensor:
        """The weight the layer computes with."""
        raise NotImplementedError

    def prepare(self) -> None:
        """Compute what the layer keeps in evaluation, for compiled graphs too."""
        weight, held = self.quantized_weight(), self._graph_weight
        if self._kept is None:  # a float weight, or one whose changes do not show
            self._graph_weight = None
            return
        if weight is self._graph_source:
            return
        if held is None or (held.shape, held.dtype, held.device) != (weight.shape, weight.dtype, weight.device):
            with torch.inference_mode(False):
                held = self._graph_weight = torch.empty_like(weight)
            torch._dynamo.mark_static_address(held)
        held.copy_(weight)
        self._graph_source = weight

    def _keep_weight(self, sources: tuple[Tensor, ...], compute: Callable[[], Tensor]) -> Tensor:
        needs_gradient = torch.is_grad_enabled() and any(source.requires_grad for source in sources)
        if needs_gradient and not torch.compiler.is_compiling():
            self._give_up_kept()  # the step of a fused optimizer shows in no version counter
        if self.training or needs_gradient:
            return compute()
        if torch.compiler.is_compiling():
            return self._graph_weight if _kept_weights_are_current and self._graph_weight is not None else compute()
        return self._keep("_kept", sources, compute)

    def _keep(self, name: str, sources: tuple[Tensor, ...], compute: Callable[[], T]) -> T:
        # fully_shard gathers changed weights into the same tensors, and no version counter shows it
        if getattr(self, "_is_fsdp_managed_module", False) or not all(map(_shows_changes, sources)):
            return compute()
        state = tuple(part for s in sources for part in (id(s), s._version, s.data_ptr(), s.dtype))
        kept: _Kept[T] | None = getattr(self, name)
        if kept is None or kept.state != state:
            with torch.inference_mode(False), torch.no_grad():  # an inference tensor could not be used with gradients
                # the sources are held so that no new tensor can take their place in memory
                kept = _Kept(compute(), tuple(part for s in sources for part in (s, s.detach())), state)
            setattr(self, name, kept)
        return kept.value

    def _give_up_kept(self) -> None:
        self._kept = self._kept_bytes = self._graph_source = None

    def train(self, mode: bool = True) -> Self:
        """Set the mode; a kept weight is given up."""
        self._give_up_kept()
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        self._give_up_kept()
        return super()._apply(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None, "_kept_bytes": None, "_graph_weight": None, "_graph_source": None}


_kept_weights_are_current = False  # torch.compile guards it: a graph cannot check whether a kept weight is up to date


@contextmanager
def kept_weights(model: nn.Module) -> Iterator[None]:
    """Quantize in advance, for a compiled network in evaluation: graphs called inside take what is kept.

    Without it a compiled network quantizes its weights in every call.
    """
    global _kept_weights_are_current
    if model.training or torch.is_grad_enabled():
        yield
        return
    for module in model.modules():
        if isinstance(module, _KeepsWeight):
            module.prepare()
    _kept_weights_are_current = True
    try:
        yield
    finally:
        _kept_weights_are_current = False


def _is_plain(tensor: Tensor) -> bool:
    # subclasses stand for tensors that are elsewhere or nowhere
    return type(tensor) in (Tensor, nn.Parameter)


def _shows_changes(tensor: Tensor) -> bool:
    # inference tensors have no version counter
    return _is_plain(tensor) and not tensor.is_inference()


class _QuantLayer(_KeepsWeight):
    """What ``QuantConv2d`` and ``QuantLinear`` share: thresholds, transform and the two quantized operands."""

    weight: Tensor
    weight_alpha: nn.Parameter | None
    act_alpha: nn.Parameter | None
    transform: nn.Parameter | None
    relu: bool
    fixed_bits = False
    """Whether ``set_bits`` leaves this layer alone."""

    def _init_quantizers(self, spec: QuantSpec, relu: bool) -> None:
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
        made = self._keep_parameter("weight_alpha", quantizes_weight, per_channel, spec.weight_alpha or 1.0)
        self._keep_parameter("act_alpha", spec.act_bits != FLOAT_BITS, (), spec.act_alpha)
        self._keep_parameter("transform", quantizes_weight and spec.transform, (channels, channels), 1 / channels)
        before = self.__dict__.get("_spec")
        self._spec = spec
        # found here, not in forward: torch.compile traces no cached function
        self._weight_set = spec.weight_set if quantizes_weight else None
        self._act_set = spec.act_set if spec.act_bits != FLOAT_BITS else None
        self._give_up_kept()
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
    def _input_clip(self) -> InputClip:
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
        deviation = _deviation(w)
        return frequency_transform(w / deviation, self.transform)[0] * deviation

    def weight_to_transform(self) -> Tensor:
        """What FAT's transform takes: the normalised weight; one that is not normalised in units of its deviation.

        The mask depends on the scale of the spectrum. Such a weight gets its scale, a constant for the gradient, back.
        """
        w = normalize_weight(self.weight, self.spec)
        return w if self.spec.weight_norm != "none" else w / _deviation(w)

    def quantized_weight(self) -> Tensor:
        """The weight the layer computes with: α times a level; at 32 bits the weight itself. Shape of ``weight``."""
        if self.weight_alpha is None or self._weight_set is None:
            return self.weight
        alpha, levels = self.weight_alpha, self._weight_set
        sources = (self.weight, alpha) if self.transform is None else (self.weight, alpha, self.transform)
        return self._keep_weight(
            sources,
            lambda: quantize_weight(
                self.transformed_weight(),
                alpha,
                levels,
                clip_gradient=self.spec.clips_weight_gradient,
                grad_scale=self._grad_scale(levels, self.weight.numel() // max(alpha.numel(), 1)),
            ),
        )

    def quantized_input(self, x: Tensor) -> Tensor:
        """The input the layer computes with: α times a level; at 32 bits the input itself. Shape of ``x``.

        With ``relu`` the input's ReLU in place of the input.
        """
        return self._quantized_input(x, self._features(x))

    def _quantized_input(self, x: Tensor, features: int) -> Tensor:
        if self.act_alpha is None or self._act_set is None:
            return F.relu(x) if self.relu else x
        spec, scale = self.spec, self._grad_scale(self._act_set, features)
        if spec.act_signed:
            x = F.relu(x) if self.relu else x
            return quantize_weight(x, self.act_alpha, self._act_set, clip_gradient=True, grad_scale=scale)
        return quantize_activation(
            x,
            self.act_alpha,
            self._act_set,
            clip=self._input_clip,
            alpha_gradient=spec.act_alpha_gradient,
            grad_scale=scale,
        )

    def _features(self, x: Tensor) -> int:
        # values of one input
        unbatched = 3 if isinstance(self, nn.Conv2d) else 1
        return x.numel() if x.dim() <= unbatched else x[:1].numel()

    def _grad_scale(self, levels: LevelSet, values: int) -> float:
        scale = self.spec.grad_scale
        if scale == "lsq":
            return levels.positive_levels**1.5 / max(values, 1) ** 0.5
        return scale or 1.0

    def _quantized_product(
        self, x: Tensor, features: int, bias: Tensor | None, conv: ConvSettings | None
    ) -> Tensor | None:
        # None where the plain composition does as well: a float or signed input, an input so small that keeping its
        # quantized copy for backward costs less than making it again, or a compiler that decides itself
        if self.act_alpha is None or self._act_set is None or self.spec.act_signed:
            return None
        scale = self._grad_scale(self._act_set, features)
        act = ActSettings(self._act_set, self._input_clip, self.spec.act_alpha_gradient, scale)
        weight = self._byte_weight(conv) if x.dtype == torch.float32 and x.device.type == "cpu" else None
        if weight is not None:
            return byte_product(x, self.act_alpha, weight, bias, act, conv)
        if torch.compiler.is_compiling() or (torch.is_grad_enabled() and x.numel() < REMEMBER_ELEMENTS):
            return None
        return quantized_product(x, self.act_alpha, self.quantized_weight(), bias, act, conv)

    def _byte_weight(self, conv: ConvSettings | None) -> ByteWeight | None:
        # None where the layer multiplies floats
        if self.training or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
            return None
        if torch.compiler.is_compiling():
            kept = self._kept_bytes if _kept_weights_are_current else None
            return None if kept is None else kept.value
        weight_alpha, act_alpha, weights, act = self.weight_alpha, self.act_alpha, self._weight_set, self._act_set
        if weight_alpha is None or act_alpha is None or weights is None or act is None:
            return None
        sources = tuple(p for p in (self.weight, weight_alpha, act_alpha, self.transform) if p is not None)
        if get_kernels() == "eager" or not all(p.device.type == "cpu" and _is_plain(p) for p in sources):
            return None
        if self.weight.dtype != torch.float32 or not fits_bytes(weights, act, self._input_clip) or not bytes_work():
            return None

        def compute() -> ByteWeight | None:
            w_q = self.quantized_weight()
            return pack_weight(w_q, weight_alpha, weights, act_alpha, act, conv) if w_q.isfinite().all() else None

        return self._keep("_kept_bytes", sources, compute)

    def mask_range(self) -> tuple[float, float] | None:
        """Largest and smallest value of FAT's mask, range (0, 1); None without a transform."""
        if self.transform is None:
            return None
        with torch.no_grad():
            mask = frequency_transform(self.weight_to_transform(), self.transform)[1]
            return mask.max().item(), mask.min().item()

    def show_params(self) -> None:
        """Print the published line with the clipping thresholds, rounded to 3 digits; nothing at 32 bits."""
        if self.weight_alpha is not None or self.act_alpha is not None:
            print(threshold_line(_threshold(self.weight_alpha), _threshold(self.act_alpha)))

    def _describe(self) -> str:
        spec = self.spec
        relu = "relu, " if self.relu else ""
        if spec.weight_bits == spec.act_bits == FLOAT_BITS:
            return f"{relu}float"
        fat = ", fat" if spec.transform else ""
        return f"{relu}weight={spec.weight_levels}/{spec.weight_bits}, input={spec.act_levels}/{spec.act_bits}{fat}"


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
    ``weight_per_channel``; ``transform`` (C_out, C_out) with FAT, else None. At 32 bits the three are None.

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
        self._init_quantizers(spec, relu)

    def forward(self, input: Tensor) -> Tensor:
        """y = conv(x_q, w_q) + bias."""
        x = input  # the name that callers of Conv2d may give
        conv = self._conv_settings()
        if x.dim() != 4 or conv is None:
            return self._conv_forward(self.quantized_input(x), self.quantized_weight(), self.bias)
        features = self._features(x)  # the layer's, read or not
        if conv.stride != self.stride:
            x = x[:, :, :: self.stride[0], :: self.stride[1]]
        y = self._quantized_product(x, features, self.bias, conv)
        if y is not None:
            return y
        return F.conv2d(self._quantized_input(x, features), self.quantized_weight(), self.bias, *conv)

    def prepare(self) -> None:
        """Compute what the layer keeps in evaluation."""
        conv = self._conv_settings()
        if conv is None or self._byte_weight(conv) is None:
            super().prepare()

    def _conv_settings(self) -> ConvSettings | None:
        # None for a convolution that pads otherwise than with zeros on both sides
        if self.padding_mode != "zeros" or isinstance(self.padding, str):
            return None
        # a 1 x 1 convolution with a stride reads the values between never: they need no quantizing
        skips = self.kernel_size == (1, 1) and self.padding == (0, 0)
        return ConvSettings((1, 1) if skips else self.stride, self.padding, self.dilation, self.groups)

    def extra_repr(self) -> str:
        """The convolution's description and the quantizers'."""
        return f"{super().extra_repr()}, {self._describe()}"


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
        self._init_quantizers(spec, relu)

    def forward(self, input: Tensor) -> Tensor:
        """y = x_q w_qᵀ + bias."""
        y = self._quantized_product(input, self._features(input), self.bias, None)
        return y if y is not None else F.linear(self.quantized_input(input), self.quantized_weight(), self.bias)

    def prepare(self) -> None:
        """Compute what the layer keeps in evaluation."""
        if self._byte_weight(None) is None:
            super().prepare()

    def extra_repr(self) -> str:
        """The linear layer's description and the quantizers'."""
        return f"{super().extra_repr()}, {self._describe()}"


class EightBitConv2d(_KeepsWeight, nn.Conv2d):
    """The published first convolution: 8-bit weight, float input (``eight_bit_weight``); arguments of ``nn.Conv2d``."""

    def quantized_weight(self) -> Tensor:
        """The weight the layer computes with."""
        return self._keep_weight((self.weight,), lambda: eight_bit_weight(self.weight))

    def forward(self, input: Tensor) -> Tensor:
        """y = conv(x, w_q) + bias."""
        return self._conv_forward(input, self.quantized_weight(), self.bias)


class EightBitLinear(_KeepsWeight, nn.Linear):
    """The published last layer: 8-bit weight, float input (``eight_bit_weight``); arguments of ``nn.Linear``."""

    def quantized_weight(self) -> Tensor:
        """The weight the layer computes with."""
        return self._keep_weight((self.weight,), lambda: eight_bit_weight(self.weight))

    def forward(self, input: Tensor) -> Tensor:
        """y = x w_qᵀ + bias."""
        return F.linear(input, self.quantized_weight(), self.bias)


AnyQuantized = QuantConv2d | QuantLinear | EightBitConv2d | EightBitLinear


@dataclass(frozen=True)
class LayerClipping:
    """One row of ``clipping_table``: a layer's thresholds as used, its bits and, with FAT, its mask's range.

    Of thresholds of one a channel ``weight_alpha`` is the mean.
    """

    name: str
    weight_bits: int
    act_bits: int
    weight_alpha: float | None
    act_alpha: float | None
    mask_max: float | None = None
    mask_min: float | None = None


def quant_layers(model: nn.Module) -> Iterator[tuple[str, QuantConv2d | QuantLinear]]:
    """Name and module of every ``QuantConv2d`` and ``QuantLinear``, in the order of definition."""
    for name, module in model.named_modules():
        if isinstance(module, QuantConv2d | QuantLinear):
            yield name, module


def clipping_table(model: nn.Module) -> list[LayerClipping]:
    """The clipping thresholds of every quantized layer, in the order of definition.

    Returns:
        One ``LayerClipping`` a layer; thresholds in their own units, None where a side is float.
    """
    rows = []
    for name, layer in quant_layers(model):
        mask = layer.mask_range() or (None, None)
        alphas = _threshold(layer.weight_alpha), _threshold(layer.act_alpha)
        rows.append(LayerClipping(name, layer.spec.weight_bits, layer.spec.act_bits, *alphas, *mask))
    return rows


def threshold_line(weight_alpha: float | None, act_alpha: float | None) -> str:
    """The published line of a layer's thresholds, rounded to 3 digits; a float side is ``none``.

    >>> threshold_line(1.5694, 1.4378)
    'clipping threshold weight alpha: 1.569000, activation alpha: 1.438000'
    """
    weight, act = ("none" if alpha is None else f"{round(alpha, 3):2f}" for alpha in (weight_alpha, act_alpha))
    return f"clipping threshold weight alpha: {weight}, activation alpha: {act}"


def show_params(model: nn.Module) -> None:
    """Print the published threshold line of every quantized layer; of one threshold a channel the mean."""
    for _, layer in quant_layers(model):
        layer.show_params()


def set_bits(model: nn.Module, bits: int) -> nn.Module:
    """Set weight and activation bits of every quantized layer in place, keeping weights and thresholds.

    Layers whose bits were given to ``quantize`` by name keep them, and a side that is float where the layer's other is
    not (``weight_bits=32`` or ``act_bits=32`` of ``quantize``) stays float; of a layer at 32 bits both sides are set.

    Args:
        model: any network that holds ``QuantConv2d`` or ``QuantLinear``.
        bits: 2 to 8, or 32. Make the optimiser afterwards: from 32 bits the thresholds are new parameters.

    Returns:
        The model.

    Raises:
        ValueError: other bits, or a model without quantized layers.
    """
    check_bits(bits)
    layers = [layer for _, layer in quant_layers(model)]
    if not layers:
        raise ValueError(
            f"{type(model).__name__} holds no QuantConv2d or QuantLinear: build it from them, or quantize it"
        )
    for layer in layers:
        if layer.fixed_bits:
            continue
        layer.spec = _with_bits_of_quantized_sides(layer.spec, bits)
    return model


def _with_bits_of_quantized_sides(spec: QuantSpec, bits: int) -> QuantSpec:
    if spec.weight_bits == FLOAT_BITS != spec.act_bits:
        return replace(spec, act_bits=bits)
    if spec.act_bits == FLOAT_BITS != spec.weight_bits:
        return replace(spec, weight_bits=bits)
    return spec.with_bits(bits)


@torch.no_grad()
def keep_thresholds_positive(model: nn.Module) -> int:
    """Set every threshold at or below zero to ``ALPHA_FLOOR`` in place; return how many there were.

    The layers read such a threshold as the floor anyway; this brings the parameter back, so that training can raise it.
    """
    raised = 0
    for _, layer in quant_layers(model):
        for alpha in (layer.weight_alpha, layer.act_alpha):
            if alpha is not None and (too_low := int((alpha <= 0).sum())):
                alpha.masked_fill_(alpha <= 0, ALPHA_FLOOR)
                raised += too_low
    return raised


def _threshold(alpha: Tensor | None) -> float | None:
    return None if alpha is None else positive(alpha.detach()).mean().item()


def initial_step_threshold(mean_magnitude: Tensor, levels: LevelSet) -> Tensor:
    """LSQ's initial step as a threshold.

    Equation: α = Q_P s, s = 2 mean |v| / √Q_P, Q_P the number of levels above 0.

    Paper: LSQ, "Learned Step Size Quantization", section 2.1.
    """
    return 2 * levels.positive_levels**0.5 * mean_magnitude


def _published_spec(bit: int, power: bool, additive: bool, grad_scale: float | None) -> QuantSpec:
    variant = "" if power and additive else "-pot" if power else "-uniform"
    return preset(f"apot-imagenet{variant}", bits=bit, grad_scale=grad_scale)
