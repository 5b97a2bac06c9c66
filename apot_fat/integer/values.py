"""Real numbers as a program holds them while it is made, and the operations that bring them into another form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from apot_fat.integer.inversion import find_thresholds
from apot_fat.integer.program import PIXELS, Add, Lookup, Operation, Pool, Rescale, Thresholds, count_windows, width

Array = np.ndarray
Shape = tuple[int, int, int]

MAX_SHIFT = 40
PRODUCT_BITS = 63
PIXEL_LEVELS = 256


@dataclass(frozen=True, eq=False)
class Value:
    """A tensor of the network: y = pooled(clip(gain · n + offset, low, high)), n the result of an operation.

    Args:
        source: the operation.
        shape: (C, H, W) of y.
        gain, offset: one a channel, (C,), or one for all, 0-d.
        low, high: what a ReLU or ReLU6 makes of it.
        pools: max poolings still to be done, which any quantizer may overtake: kernel, stride, padding.
        smallest, largest: of y, on the calibration.
    """

    source: int
    shape: Shape
    gain: Array
    offset: Array
    low: float = -np.inf
    high: float = np.inf
    pools: tuple[dict[str, Any], ...] = ()
    smallest: float = 0.0
    largest: float = 0.0

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for values that hold the same numbers, before their pooling."""
        return self.source, self.gain.tobytes(), self.offset.tobytes(), self.low, self.high

    @property
    def has_one_scale(self) -> bool:
        """Whether y is a multiple of n by one factor, but for clipping and pooling."""
        return self.gain.ndim == 0 and not self.offset.any()

    def affine(self, gain: Array, offset: Array) -> Value:
        """Gain · y + offset; of a value that is not clipped or pooled."""
        return replace(self, gain=self.gain * gain, offset=self.offset * gain + offset)


class Builder:
    """Operations in the making; what is asked for twice is made once.

    Args:
        input_shape: (C, H, W) of an image.
        grid_bits: beside the sign, of what is added, pooled or read by a layer of float inputs; and of factors.
        accumulator_bits: beside the sign, of sums.
    """

    def __init__(self, input_shape: Shape, grid_bits: int, accumulator_bits: int) -> None:
        self.operations: list[Operation] = []
        self.input_shape, self.grid_bits, self.accumulator_bits = input_shape, grid_bits, accumulator_bits
        self._made: dict[tuple[Any, ...], int] = {}
        self.steps: dict[str, float] = {}
        """By the name of a layer, the real size of the unit to which what it reads is rounded."""

    def append(self, operation: Operation) -> int:
        """The number of a new operation."""
        self.operations.append(operation)
        return len(self.operations) - 1

    def bounds(self, source: int) -> tuple[int, int]:
        """Bounds of an operation's result."""
        if source == PIXELS:
            return 0, PIXEL_LEVELS - 1
        return self.operations[source].low, self.operations[source].high

    def shape(self, source: int) -> Shape:
        """(C, H, W) of an operation's result."""
        return self.input_shape if source == PIXELS else self.operations[source].shape

    def quantize(self, name: str, value: Value, quantizer: Callable[[Array], Array], levels: Callable[..., Any]) -> int:
        """The numerators of a quantizer's levels: exact thresholds on n, then the pooling.

        Args:
            name: of the layer that quantizes.
            value: its input.
            quantizer: real inputs → numerators; rising.
            levels: (lowest numerator) → all numerators from it on.
        """

        def made() -> int:
            low, high = self.bounds(value.source)
            gain, offset = (np.atleast_1d(part)[:, None] for part in (value.gain, value.offset))

            def function(n: Array) -> Array:
                return quantizer(np.clip(gain * n + offset, value.low, value.high))

            found = find_thresholds(function, low, high, levels(int(function(np.array([[low, high]])).min())))
            thresholds_CT, falls_C, used = found
            inputs, bounds = (value.source,), (used[0], used[-1])
            shape = self.shape(value.source)
            return self.append(Thresholds(name, inputs, shape, *bounds, thresholds_CT, falls_C, used))

        # levels that go on below 0 end by what the calibration reached
        number = self._once(("quantize", name, value.key, value.smallest), made)
        return self._pooled(name, number, value)

    def look_up(self, name: str, value: Value, bits: int) -> Value:
        """A table of what each pixel stands for, on a grid of a power of two of so many bits, beside the sign."""
        levels = value.gain[:, None] * np.arange(PIXEL_LEVELS) + value.offset[:, None]
        step = grid_step(float(np.abs(levels).max()), bits)
        self._note_rounding(name, step)
        table = np.round(levels / step).astype(np.int64)
        bounds = int(table.min()), int(table.max())
        lookup = Lookup(name, (PIXELS,), value.shape, *bounds, table)
        number = self._once(("look_up", step, value.key), lambda: self.append(lookup))
        return self._plain(number, step, value)

    def on_grid(self, name: str, value: Value, step: float | None = None, bits: int | None = None) -> Value:
        """A value as integer multiples of a step, held to so many bits beside the sign.

        Args:
            name: of the layer that reads it.
            value: what is to be read.
            step: real size of the unit; by default, where the value has one scale that the bits hold, that scale, else
                a power of two that holds twice what the calibration reached.
            bits: of the result, beside its sign; by default those of the grid.
        """
        bits = self.grid_bits if bits is None else bits
        fits = value.has_one_scale and width(*self.bounds(value.source)) <= bits + 1
        if step is None:
            reached = max(abs(value.smallest), abs(value.largest))
            step = float(value.gain) if fits else grid_step(2 * reached, bits)
        if not (value.has_one_scale and value.gain == step):
            self._note_rounding(name, step)
        low, high = self._clipped(value, step, (1 << bits) - 1)
        is_there = fits and value.gain == step and (low, high) == self.bounds(value.source)
        if is_there and not value.pools:
            return replace(value, low=-np.inf, high=np.inf)  # its clip does nothing; what comes next may not have one
        number = value.source
        if not is_there:
            number = self._once(("on_grid", step, bits, value.key), lambda: self._rescale(name, value, step, low, high))
        return self._plain(self._pooled(name, number, value), step, value)

    def add(self, name: str, values: tuple[Value, Value], step: float, is_rectified: bool) -> Value:
        """The sum of two values on the grid of a step, and its ReLU."""
        first, second = (self.on_grid(name, value, step) for value in values)
        limit = (1 << self.grid_bits) - 1
        low = 0 if is_rectified else -limit
        shape = self.shape(first.source)
        number = self.append(Add(name, (first.source, second.source), shape, low, limit))
        return self._plain(number, step, first)

    def pool(self, name: str, source: int, kind: str, **window: Any) -> int:
        """A pooling of an operation's result."""
        low, high = self.bounds(source)
        if kind == "sum":
            count = int(np.prod(window["kernel"]))
            low, high = low * count, high * count
        channels, *size = self.shape(source)
        height, wide = count_windows(size, window["kernel"], window["stride"], window.get("padding", (0, 0)))
        return self.append(Pool(name, (source,), (channels, height, wide), low, high, kind, **window))

    def _note_rounding(self, name: str, step: float) -> None:
        self.steps[name] = max(step, self.steps.get(name, 0.0))

    def _clipped(self, value: Value, step: float, limit: int) -> tuple[int, int]:
        # bounds of the multiples of a step: the limit, the ReLU's, and what n can give
        low, high = (int(np.clip(np.round(bound / step), -limit, limit)) for bound in (value.low, value.high))
        if value.has_one_scale and value.gain == step:
            bounds = self.bounds(value.source)
            return max(low, bounds[0]), min(high, bounds[1])
        return low, high

    def _rescale(self, name: str, value: Value, step: float, low: int, high: int) -> int:
        ratio, offset = np.atleast_1d(value.gain) / step, np.atleast_1d(value.offset) / step
        ratio, offset = np.broadcast_arrays(ratio, offset)
        reach = np.abs(np.multiply.outer(ratio, self.bounds(value.source)) + offset[:, None]).max(1) + 0.5
        # the largest shift with which the factor and the product keep to their bits
        room = np.minimum(self.grid_bits - np.frexp(ratio)[1], PRODUCT_BITS - 2 - np.frexp(reach)[1])
        shift = np.clip(np.where(ratio == 0, 0, room), 0, MAX_SHIFT).astype(np.int64)  # int32 does not hold the half
        factor = np.round(np.ldexp(ratio, shift)).astype(np.int64)
        while (even := (shift > 0) & (factor % 2 == 0)).any():
            factor, shift = np.where(even, factor // 2, factor), np.where(even, shift - 1, shift)
        half = np.where(shift > 0, 1 << np.maximum(shift, 1) - 1, 0)
        addends = np.ldexp(offset, shift)
        ends = np.multiply.outer(factor.astype(np.float64), self.bounds(value.source)) + (addends + half)[:, None]
        product_bits = int(np.frexp(np.abs(ends).max())[1]) + 2
        if product_bits > PRODUCT_BITS:
            raise ValueError(
                f"layer {name}: batch norm or scales need products of {product_bits} bits; at most {PRODUCT_BITS} "
                "are supported: look for a channel whose running variance is near 0"
            )
        addend = np.round(addends).astype(np.int64) + half
        shape, inputs = self.shape(value.source), (value.source,)
        return self.append(Rescale(name, inputs, shape, low, high, factor, addend, shift, product_bits))

    def _plain(self, source: int, step: float, like: Value) -> Value:
        gain, offset = np.array(step), np.array(0.0)
        return Value(source, self.shape(source), gain, offset, smallest=like.smallest, largest=like.largest)

    def _pooled(self, name: str, source: int, value: Value) -> int:
        for window in value.pools:
            pool = partial(self.pool, name, source, "max", **window)
            source = self._once(("pool", source, str(window)), pool)
        return source

    def _once(self, key: tuple[Any, ...], make: Callable[[], int]) -> int:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]


def grid_step(largest: float, bits: int) -> float:
    """The finest power of two of which so many bits, beside the sign, hold the largest value."""
    if not 0 < largest < np.inf:
        return 1.0
    return float(2.0 ** np.ceil(np.log2(largest / ((1 << bits) - 1))))
