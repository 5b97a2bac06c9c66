"""Integer reference inference: quantized layers in integer arithmetic, by multiplication or by shifts and adds.

Slow and plain on purpose: it proves what an integer kernel must compute. On the CPU alone.

Shape suffixes: ``_GOK`` groups, outputs a group, terms of a sum (input channels a group × kernel positions); ``_GKP``
the same terms at every output position (batch × height × width, or rows); ``_N`` images, ``_NCHW`` a batch of them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apot_fat.quant.all_layers import threshold_layers
from apot_fat.quant.integers import Integers, integer_input, integer_weight, shift_terms
from apot_fat.quant.layers import AnyQuantized, QuantConv2d, QuantLinear
from apot_fat.quant.units import along_rows, threshold_in_use
from apot_fat.quant.watching import watch_inputs

Arithmetic = Literal["multiply", "shift"]
ACCUMULATOR_BITS = 31  # int32 without its sign


class IntegerLayer(nn.Module):
    """A quantized layer whose sums of products are integer arithmetic, exact to the last bit.

    Equation: y = A · (α_a α_w / (d_a d_w)) + bias with the int32 accumulator A = Σ n_a n_w; n_a / d_a and n_w / d_w the
    levels of input and weight. ``multiply`` forms n_a n_w; ``shift`` writes n_w = Σ ± 2^k (``shift_terms``) and adds or
    subtracts n_a << k: no product of an input and a weight is formed. The quantization of the input, the one factor an
    output and the bias stay float.

    Args:
        layer: the layer, its weight and input quantized; its weight is read now, its input's threshold in every call.
        arithmetic: ``multiply`` or ``shift``. The accumulators are the same.

    Shapes: as the layer.

    Raises:
        ValueError: a float weight or input, an unknown arithmetic, or levels whose sum may leave int32 (in a call: an
            input far below zero where uniform levels go on there).

    Paper: APoT, "Additive Powers-of-Two Quantization" (multiplication as shifts and adds).
    """

    numerators_GOK: Tensor

    def __init__(self, layer: AnyQuantized, arithmetic: Arithmetic = "multiply") -> None:
        super().__init__()
        if arithmetic not in get_args(Arithmetic):
            raise ValueError(f"arithmetic {arithmetic!r}: choose one of {', '.join(get_args(Arithmetic))}")
        weight = integer_weight(layer)
        if weight is None or layer.act_alpha is None:
            spec = layer.spec
            raise ValueError(
                f"{spec.weight_bits}-bit weight and {spec.act_bits}-bit input: integer arithmetic needs both quantized"
            )
        self.layer, self.arithmetic = layer, arithmetic
        self.weight_unit = weight.unit(_output_dims(layer))
        groups = layer.groups if isinstance(layer, QuantConv2d) else 1
        numerators_GOK = weight.numerators.reshape(groups, weight.numerators.shape[0] // groups, -1)
        terms = shift_terms(numerators_GOK)
        # largest sum of |terms| of an output: no partial sum exceeds it times the largest |n_a|, whatever the order
        self.gain = int((terms.added + terms.subtracted).sum(-1).max())
        self._check_range(layer.spec.act_set.denominator)
        self.register_buffer("numerators_GOK", numerators_GOK.to(torch.int32))
        # of each power of two: where it is added, and where it is subtracted
        self.planes = [(_rows(terms.added >> k & 1), _rows(terms.subtracted >> k & 1)) for k in range(terms.powers)]

    def accumulate(self, x: Tensor) -> Tensor:
        """The accumulators A = Σ n_a n_w of an input, int32, shape of the layer's output."""
        return self._accumulate(self._codes(x))

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """y = A · (α_a α_w / (d_a d_w)) + bias, the product in float64 and rounded once to the type of x."""
        codes = self._codes(x)
        unit = codes.unit(0) * self.weight_unit
        y = (self._accumulate(codes).double() * unit).to(x.dtype)
        bias = self.layer.bias
        if bias is None:
            return y
        return y + (bias[:, None, None] if isinstance(self.layer, QuantConv2d) else bias)

    def _codes(self, x: Tensor) -> Integers:
        codes = integer_input(self.layer, x)
        assert codes is not None  # checked when made
        if codes.numerators.numel():
            self._check_range(int(codes.numerators.abs().max()))
        return codes

    def _check_range(self, largest_code: int) -> None:
        if self.gain * largest_code >> ACCUMULATOR_BITS:
            raise ValueError(
                f"accumulator up to {self.gain * largest_code}: int32 holds less than 2^{ACCUMULATOR_BITS}; "
                "use fewer bits or levels of a smaller denominator"
            )

    @torch.no_grad()
    def _accumulate(self, codes: Integers) -> Tensor:
        numerators, layer = codes.numerators.to(torch.int32), self.layer
        if isinstance(layer, QuantLinear):
            sums_GOP = self._sums(numerators.reshape(1, -1, numerators.shape[-1]).transpose(1, 2))
            return sums_GOP[0].T.reshape(*numerators.shape[:-1], -1)
        batch = numerators if numerators.dim() == 4 else numerators[None]
        windows = _windows(batch, layer)
        sums_GOP = self._sums(windows.reshape(layer.groups, self.numerators_GOK.shape[-1], -1))
        images = sums_GOP.reshape(layer.out_channels, len(batch), *windows.shape[-2:]).movedim(0, 1)
        return images if numerators.dim() == 4 else images[0]

    def _sums(self, codes_GKP: Tensor) -> Tensor:
        if self.arithmetic == "multiply":
            return torch.matmul(self.numerators_GOK, codes_GKP)
        groups, outputs, _ = self.numerators_GOK.shape
        sums_GOP = torch.zeros(groups, outputs, codes_GKP.shape[-1], dtype=torch.int32)
        for k, (added, subtracted) in enumerate(self.planes):
            shifted_GKP = codes_GKP << k
            for group, output, rows in added:
                sums_GOP[group, output] += shifted_GKP[group].index_select(0, rows).sum(0, dtype=torch.int32)
            for group, output, rows in subtracted:
                sums_GOP[group, output] -= shifted_GKP[group].index_select(0, rows).sum(0, dtype=torch.int32)
        return sums_GOP


def integer_reference(model: nn.Module, arithmetic: Arithmetic = "multiply") -> nn.Module:
    """A copy of a network for evaluation on the CPU whose quantized layers compute in integers.

    Every ``QuantConv2d`` and ``QuantLinear`` whose weight and input are quantized becomes an ``IntegerLayer``; all else
    (8-bit first and last layers, whose input is float, batch norm, shortcuts) stays float. The networks of both
    arithmetics give the same outputs to the last bit; from the float network they differ by its rounding, which can
    turn a code of a later layer that lies on the edge between two levels: ``compare_networks`` finds those.

    Args:
        model: any network of quantized layers, or one such layer; left as it is.
        arithmetic: ``multiply`` or ``shift``.

    Raises:
        ValueError: no layer with quantized weight and input, an unknown arithmetic, or levels whose sum may leave
            int32; naming the layer.
    """
    network = copy.deepcopy(model).cpu().eval()
    made: dict[int, IntegerLayer] = {}
    for name, layer in threshold_layers(network):
        if layer.weight_alpha is None or layer.act_alpha is None:
            continue
        try:
            made[id(layer)] = IntegerLayer(layer, arithmetic)
        except ValueError as error:
            raise ValueError(f"layer {name or type(layer).__name__}: {error}") from error
    if not made:
        raise ValueError(f"{type(model).__name__} has no layer with quantized weight and input: build it at low bits")
    if id(network) in made:
        return made[id(network)].eval()
    for parent in list(network.modules()):
        for name, child in list(parent._modules.items()):  # named_children leaves out a child's second name
            if id(child) in made:
                setattr(parent, name, made[id(child)])
    return network.eval()


@torch.no_grad()
def simulated_accumulator(layer: AnyQuantized, x: Tensor) -> Tensor:
    """The accumulator that the layer's fake-quantized operands stand for, int64, shape of the layer's output.

    Equation: A = round(conv(x_q, w_q) · d_a d_w / (α_a α_w)), in float64. The operands are float32 multiples of their
    unit, so that A is exact while Σ |n_a n_w| stays below about 2^22.

    Args:
        layer: weight and input quantized.
        x: its input.

    Raises:
        ValueError: a float weight or input.
    """
    if layer.weight_alpha is None or layer.act_alpha is None:
        raise ValueError(f"{layer}: has no accumulator; it needs quantized weight and input")
    x_q, w_q = layer.quantized_input(x).double(), layer.quantized_weight().double()
    product = layer._conv_forward(x_q, w_q, None) if isinstance(layer, QuantConv2d) else F.linear(x_q, w_q)
    weight_unit = threshold_in_use(layer.weight_alpha).double() / layer.spec.weight_set.denominator
    weight_unit = along_rows(weight_unit, _output_dims(layer))
    input_unit = threshold_in_use(layer.act_alpha).double() / layer.spec.act_set.denominator
    return (product / (weight_unit * input_unit)).round().to(torch.int64)


def _output_dims(layer: AnyQuantized) -> int:
    # from the channels of an output on
    return 3 if isinstance(layer, QuantConv2d) else 1


@dataclass(frozen=True)
class Divergence:
    """The first layer of which two networks quantize an image's input to different codes.

    Args:
        image: index of the image.
        layer: name of the layer; empty where all codes agree and the predictions alone do not.
        codes: how many of its input's codes differ.
        distance: how far, at most, those inputs lie from the midpoint of the two levels, in units of the levels'
            distance; what a rounding of the float network can cross is about 1e-6. Without a layer: the distance of
            the two logits.
        prediction, other_prediction: the class either network predicts.
    """

    image: int
    layer: str
    codes: int
    distance: float
    prediction: int
    other_prediction: int

    @property
    def changes_prediction(self) -> bool:
        """Whether the two networks predict different classes."""
        return self.prediction != self.other_prediction


@torch.no_grad()
def compare_networks(
    model: nn.Module, integer: nn.Module, images_NCHW: Tensor, batch_size: int = 32
) -> list[Divergence]:
    """Where a network and its integer form go different ways, image by image.

    Args:
        model: the float simulation, in evaluation mode, on the CPU.
        integer: what ``integer_reference`` made of it.
        images_NCHW: normalised images.
        batch_size: images at once.

    Returns:
        One ``Divergence`` an image of which any code or the prediction differs.
    """
    names = [name for name, module in integer.named_modules() if isinstance(module, IntegerLayer)]
    found = []
    for start in range(0, len(images_NCHW), batch_size):
        batch = images_NCHW[start : start + batch_size]
        logits, inputs = layer_inputs(model, names, batch)
        other_logits, other_inputs = layer_inputs(integer, names, batch)
        predictions, other_predictions = logits.argmax(1), other_logits.argmax(1)
        first: dict[int, tuple[str, int, float]] = {}
        for (name, x), (_, other) in zip(inputs, other_inputs, strict=True):
            layer = model.get_submodule(name)
            assert isinstance(layer, AnyQuantized)
            for image, codes, distance in _code_differences(layer, x, other):
                first.setdefault(image, (name, codes, distance))
        for image in (predictions != other_predictions).nonzero().flatten().tolist():
            margin = logits[image, predictions[image]] - logits[image, other_predictions[image]]
            first.setdefault(image, ("", 0, margin.item()))
        for image, where in sorted(first.items()):
            classes = int(predictions[image]), int(other_predictions[image])
            found.append(Divergence(start + image, *where, *classes))
    return found


def layer_inputs(model: nn.Module, names: list[str], x: Tensor) -> tuple[Tensor, list[tuple[str, Tensor]]]:
    """A network's output and what the named layers were given on the way, in the order of their calls."""
    found: list[tuple[str, Tensor]] = []
    named = {model.get_submodule(name): name for name in names}

    def record(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        found.append((named[layer], inputs[0].detach().clone()))  # copied: a later operation may work in place

    with watch_inputs(named, record):
        return model(x), found


def _code_differences(layer: AnyQuantized, x_N: Tensor, other_N: Tensor) -> Iterator[tuple[int, int, float]]:
    # image, how many codes differ, and their largest distance from the midpoint in units of the levels' distance
    codes, others = integer_input(layer, x_N), integer_input(layer, other_N)
    assert codes is not None
    assert others is not None
    differs = codes.numerators != others.numerators
    step = codes.scale.double() / codes.denominator
    for image in differs.flatten(1).any(1).nonzero().flatten().tolist():
        where = differs[image]
        a, b = codes.numerators[image][where].double(), others.numerators[image][where].double()
        values = torch.stack([x_N[image][where], other_N[image][where]]).double() / step
        distances = (values - (a + b) / 2).abs() / (a - b).abs()
        yield image, int(where.sum()), distances.max().item()


def _windows(codes_NCHW: Tensor, layer: QuantConv2d) -> Tensor:
    # (C, k_h, k_w, N, H', W'): what each kernel position sees, a view of the padded input
    padding = layer._reversed_padding_repeated_twice
    if layer.padding_mode == "zeros":
        padded = F.pad(codes_NCHW, padding)
    else:  # torch has these for floats alone; float64 holds the codes exactly
        padded = F.pad(codes_NCHW.double(), padding, mode=layer.padding_mode).to(codes_NCHW.dtype)
    padded = padded.contiguous()
    (n, c, h, w), (sn, sc, sh, sw) = padded.shape, padded.stride()
    (kh, kw), (dh, dw), (th, tw) = layer.kernel_size, layer.dilation, layer.stride
    size = (c, kh, kw, n, (h - dh * (kh - 1) - 1) // th + 1, (w - dw * (kw - 1) - 1) // tw + 1)
    return padded.as_strided(size, (sc, dh * sh, dw * sw, sn, th * sh, tw * sw))


def _rows(plane_GOK: Tensor) -> list[tuple[int, int, Tensor]]:
    # of each output with any 1 in its row of a plane: group, output, and where the ones are
    outputs = plane_GOK.any(-1).nonzero().tolist()
    return [(group, output, plane_GOK[group, output].nonzero().flatten()) for group, output in outputs]
