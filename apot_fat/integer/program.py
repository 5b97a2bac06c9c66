"""A whole network as a list of integer operations, and what runs it: the reference that every other form must equal.

Operations are numbered in their order, and named by those numbers where others read their results; −1 is the image,
8-bit pixels. All results are images of channels: a vector is one of 1 × 1.

Shape suffixes: ``_NCHW`` a batch of images; ``_C`` one entry a channel; ``_OIHW`` a weight; ``_CT`` the thresholds of
each channel, of all channels alike if C is 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from apot_fat.quant.integers import shift_terms
from apot_fat.text import aligned

Array = np.ndarray
PIXELS = -1
BATCH = 16
"""Images computed together."""


@dataclass(frozen=True, eq=False)
class Operation:
    """What all operations have.

    Args:
        name: the layer it was made of.
        inputs: the operations whose results it reads.
        shape: (C, H, W) of its result for one image.
        low, high: bounds of its result: proven from those of its inputs, or what it is clipped to.
    """

    name: str
    inputs: tuple[int, ...]
    shape: tuple[int, int, int]
    low: int
    high: int

    @property
    def bits(self) -> int:
        """Width of the result: of a two's complement number if it may be negative."""
        return width(self.low, self.high)

    @property
    def constants(self) -> int:
        """Bits of memory for what the operation is made of."""
        return 0

    def compute(self, *inputs_NCHW: Array) -> Array:
        """The result, int64, of the inputs' results."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class Lookup(Operation):
    """y = table[channel, p] of each pixel p; ``table`` (C, 256)."""

    table: Array

    @property
    def constants(self) -> int:
        """Bits of memory: the table."""
        return self.table.size * self.bits

    def compute(self, *inputs_NCHW: Array) -> Array:
        """What the pixels stand for."""
        (x,) = inputs_NCHW
        return self.table[np.arange(x.shape[1])[:, None, None], x]


@dataclass(frozen=True, eq=False)
class Convolution(Operation):
    """y = Σ w x over a window: sums of products of small integers; a linear layer is one of 1 × 1.

    Of products, or of shifts and adds in their place (``shift_terms``), in whatever order.

    Args:
        weight_OIHW: numerators; I input channels of a group.
        stride, padding, dilation: rows, columns; zeros are padded.
        groups: of input and output channels.
        largest_sum: bound of every partial sum's magnitude.
    """

    weight_OIHW: Array
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    largest_sum: int

    @property
    def weight_bits(self) -> int:
        """Bits of a weight as the number of its level among those that occur."""
        return max((len(np.unique(self.weight_OIHW)) - 1).bit_length(), 1)

    @property
    def constants(self) -> int:
        """Bits of memory: the weight."""
        return self.weight_OIHW.size * self.weight_bits

    @property
    def positions(self) -> int:
        """Pixels of the result."""
        return self.shape[1] * self.shape[2]

    @property
    def products(self) -> int:
        """Products with a weight that is not 0, for one image, those with padded zeros included."""
        return int(np.count_nonzero(self.weight_OIHW)) * self.positions

    @cached_property
    def additions(self) -> int:
        """Additions and subtractions of shifted inputs in place of the products."""
        counts = shift_terms(torch.from_numpy(self.weight_OIHW)).counts
        return int(counts.sum()) * self.positions

    def compute(self, *inputs_NCHW: Array) -> Array:
        """The sums."""
        (x,) = inputs_NCHW
        (top, left), (down, right) = self.padding, self.stride
        outputs, _, height, width = self.weight_OIHW.shape
        rows, columns = self.dilation[0] * (height - 1) + 1, self.dilation[1] * (width - 1) + 1
        padded = np.pad(x, ((0, 0), (0, 0), (top, top), (left, left))).astype(np.float64)
        windows = np.lib.stride_tricks.sliding_window_view(padded, (rows, columns), (2, 3))
        windows = windows[:, :, ::down, ::right, :: self.dilation[0], :: self.dilation[1]]
        images, _, *size = windows.shape[:4]
        by_group = windows.reshape(images, self.groups, -1, *windows.shape[2:]).transpose(1, 0, 3, 4, 2, 5, 6)
        terms = by_group.reshape(self.groups, images * size[0] * size[1], -1)
        weight = self.weight_OIHW.reshape(self.groups, outputs // self.groups, -1).astype(np.float64)
        # exact: every partial sum is an integer below 2^53
        sums = np.matmul(terms, weight.transpose(0, 2, 1)).reshape(self.groups, images, *size, -1)
        return sums.transpose(1, 0, 4, 2, 3).reshape(images, outputs, *size).astype(np.int64)


@dataclass(frozen=True, eq=False)
class Thresholds(Operation):
    """y = the level numbered by how many of its channel's thresholds t have t ≤ x; t ≤ −x in a channel that falls.

    Args:
        thresholds_CT: rising in each row.
        falls_C: whether the channel's result falls with its input.
        levels: rising; T + 1 of them.
    """

    thresholds_CT: Array
    falls_C: Array
    levels: tuple[int, ...]

    @property
    def threshold_bits(self) -> int:
        """Width of a threshold."""
        return width(int(self.thresholds_CT.min(initial=0)), int(self.thresholds_CT.max(initial=0)))

    @property
    def constants(self) -> int:
        """Bits of memory: thresholds, directions and levels."""
        return self.thresholds_CT.size * self.threshold_bits + self.falls_C.size + len(self.levels) * self.bits

    @property
    def repeated_CT(self) -> Array:
        """The thresholds of which y − levels[0] is how many are passed: each as often as its level jumps."""
        return np.repeat(self.thresholds_CT, np.diff(self.levels), axis=1)

    def compute(self, *inputs_NCHW: Array) -> Array:
        """The levels."""
        (x,) = inputs_NCHW
        oriented = np.where(self.falls_C[:, None, None], -x, x)
        codes = np.zeros(oriented.shape, np.int64)
        for thresholds_C in self.thresholds_CT.T:
            codes += thresholds_C[:, None, None] <= oriented
        return np.array(self.levels)[codes]


@dataclass(frozen=True, eq=False)
class Rescale(Operation):
    """y = clip((factor x + addend) >> shift, low, high): onto another grid; the addend holds the half that rounds.

    Args:
        factor_C, addend_C, shift_C: one a channel, or one for all; the shift rounds down.
    """

    factor_C: Array
    addend_C: Array
    shift_C: Array
    product_bits: int
    """Width of factor x + addend."""

    @property
    def constants(self) -> int:
        """Bits of memory: factors, addends and shifts."""
        columns = (self.factor_C, self.addend_C, self.shift_C)
        return sum(part.size * width(int(part.min()), int(part.max())) for part in columns)

    def compute(self, *inputs_NCHW: Array) -> Array:
        """The multiples of the other step."""
        (x,) = inputs_NCHW
        factor, addend, shift = (part[:, None, None] for part in (self.factor_C, self.addend_C, self.shift_C))
        product = factor * x + addend
        if product.size:
            assert width(int(product.min()), int(product.max())) <= self.product_bits, self.name
        return np.clip(product >> shift, self.low, self.high)


@dataclass(frozen=True, eq=False)
class Add(Operation):
    """y = clip(x_1 + x_2, low, high), both on one grid; a low of 0 is a ReLU."""

    def compute(self, *inputs_NCHW: Array) -> Array:
        """The sum."""
        first, second = inputs_NCHW
        return np.clip(first + second, self.low, self.high)


@dataclass(frozen=True, eq=False)
class Pool(Operation):
    """y = the largest value of a window, or the sum over it; what is padded counts for neither."""

    kind: str
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int] = (0, 0)

    def compute(self, *inputs_NCHW: Array) -> Array:
        """The largest values, or the sums."""
        (x,) = inputs_NCHW
        (top, left), (down, right) = self.padding, self.stride
        nothing = 0 if self.kind == "sum" else self.low
        padded = np.pad(x, ((0, 0), (0, 0), (top, top), (left, left)), constant_values=nothing)
        windows = np.lib.stride_tricks.sliding_window_view(padded, self.kernel, (2, 3))[:, :, ::down, ::right]
        return windows.sum((4, 5)) if self.kind == "sum" else windows.max((4, 5))


@dataclass(frozen=True, eq=False)
class Flatten(Operation):
    """The same numbers as so many channels of 1 × 1: nothing is computed."""

    def compute(self, *inputs_NCHW: Array) -> Array:
        """The numbers."""
        (x,) = inputs_NCHW
        return x.reshape(len(x), -1, 1, 1)


@dataclass(frozen=True, eq=False)
class IntegerProgram:
    """A network from 8-bit pixels to logits in integers; made by ``integer_program``.

    Args:
        operations: in order; the last gives the logits.
        input_shape: (C, H, W) of an image.
        logit_scale: what a logit of 1 stands for: the network's logits are about ``logit_scale`` times the program's.
        reached: smallest and largest result of each operation on the images it was calibrated on.
    """

    operations: tuple[Operation, ...]
    input_shape: tuple[int, int, int]
    logit_scale: float
    reached: tuple[tuple[int, int], ...] = ()

    def run(self, pixels: Array) -> Array:
        """Logits of images.

        Args:
            pixels: uint8, (N, C, H, W).

        Returns:
            int64, (N, classes).

        Raises:
            ValueError: other types or shapes.
            AssertionError: a result outside of its operation's bounds.
        """
        if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.shape[1:] != self.input_shape:
            given = (getattr(pixels, "dtype", type(pixels).__name__), tuple(getattr(pixels, "shape", ())))
            raise ValueError(f"pixels {given[0]} {given[1]}: expected a NumPy array, uint8 (N, {self.input_shape})")
        batches = [pixels[start : start + BATCH] for start in range(0, len(pixels), BATCH)]
        logits = [self._last(batch) for batch in batches]
        return np.concatenate(logits) if logits else np.zeros((0, self.operations[-1].shape[0]), np.int64)

    def results(self, pixels: Array) -> Iterator[Array]:
        """The result of each operation, int64 (N, C, H, W), checked against its bounds; arguments of ``run``."""
        last_reader = {read: number for number, operation in enumerate(self.operations) for read in operation.inputs}
        kept = {PIXELS: pixels.astype(np.int64)}
        for number, operation in enumerate(self.operations):
            result = operation.compute(*(kept[read] for read in operation.inputs))
            assert result.shape[1:] == operation.shape, f"{operation.name}: {result.shape[1:]} is not {operation.shape}"
            if result.size:
                reached = int(result.min()), int(result.max())
                bounds = operation.low, operation.high
                assert bounds[0] <= reached[0] <= reached[1] <= bounds[1], (
                    f"{operation.name}: {reached} not in {bounds}"
                )
            kept[number] = result
            for read in operation.inputs:
                if last_reader[read] == number:
                    kept.pop(read, None)
            yield result

    def _last(self, pixels: Array) -> Array:
        for result in self.results(pixels):
            last = result
        return last.reshape(len(pixels), -1)

    def table(self) -> str:
        """What each operation needs, one line each, aligned.

        Widths of results (``bits``: proven; ``reached``: on the calibration), products or in their place additions for
        one image, and bytes of weights and tables.
        """
        head = ("layer", "operation", "result", "bits", "reached", "products", "additions", "thresholds", "bytes")
        rows = []
        for operation, reached in zip(self.operations, self.reached, strict=True):
            cells = (
                "×".join(map(str, operation.shape)),
                str(operation.bits),
                str(width(*reached)),
                f"{operation.products:,}" if isinstance(operation, Convolution) else "",
                f"{operation.additions:,}" if isinstance(operation, Convolution) else "",
                f"{operation.thresholds_CT.size:,}" if isinstance(operation, Thresholds) else "",
                f"{-(-operation.constants // 8):,}",
            )
            rows.append((operation.name, type(operation).__name__.lower(), *cells))
        return aligned(head, rows, left=("layer", "operation"))


def count_windows(
    size: Iterable[int], span: Iterable[int], stride: Iterable[int], padding: Iterable[int]
) -> tuple[int, ...]:
    """How many windows of a span there are along each side of an image that is padded on both ends."""
    sides = zip(size, span, stride, padding, strict=True)
    return tuple((n + 2 * padded - span) // stride + 1 for n, span, stride, padded in sides)


def width(low: int, high: int) -> int:
    """Bits of a number in [low, high]: of two's complement if low is negative; at least 1.

    >>> width(0, 255), width(-128, 127), width(-130, 127)
    (8, 8, 9)
    """
    if low >= 0:
        return max(high.bit_length(), 1)
    return max((-low - 1).bit_length(), max(high, 0).bit_length()) + 1
