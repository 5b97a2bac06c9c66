"""Where a program's results lie in C: arrays of one type each, places used again after their last reader."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from apot_fat.integer.program import PIXELS, Add, Convolution, Flatten, IntegerProgram, Rescale, Thresholds

TYPES = {
    "uint8": (0, 255),
    "int8": (-128, 127),
    "int16": (-(1 << 15), (1 << 15) - 1),
    "int32": (-(1 << 31), (1 << 31) - 1),
}


class Memory:
    """Types and places of the results that C keeps.

    Args:
        program: the program.

    ``steps`` are the operations that are computed of their own, in order; ``sizes`` how many values the array of each
    type holds.
    """

    def __init__(self, program: IntegerProgram) -> None:
        self.program, self.operations = program, program.operations
        self.readers: dict[int, list[int]] = {}
        for number, operation in enumerate(self.operations):
            for read in operation.inputs:
                self.readers.setdefault(read, []).append(number)
        self.steps = [number for number in range(len(self.operations)) if self._is_step(number)]
        self.places, self.sizes = self._place()

    def shape(self, number: int) -> tuple[int, int, int]:
        """(C, H, W) of a result."""
        return self.program.input_shape if number == PIXELS else self.operations[number].shape

    def root(self, number: int) -> int:
        """What a flattened result is another name of."""
        while number >= 0 and isinstance(self.operations[number], Flatten):
            number = self.operations[number].inputs[0]
        return number

    def epilogue(self, number: int) -> list[int]:
        """What reads a convolution's sums, if all of it can follow channel by channel; else nothing."""
        readers = self.readers.get(number, [])
        operations = [self.operations[reader] for reader in readers]
        follows = isinstance(self.operations[number], Convolution) and all(
            isinstance(operation, Thresholds | Rescale) for operation in operations
        )
        return readers if follows else []

    def _is_step(self, number: int) -> bool:
        # Flatten does nothing, and epilogues are done by their convolution
        operation = self.operations[number]
        if isinstance(operation, Flatten):
            return False
        return not any(read >= 0 and self.epilogue(read) for read in operation.inputs)

    def _written(self, number: int) -> list[int]:
        return self.epilogue(number) or [number]

    def type(self, number: int) -> str:
        """C's type of a result, without its ``_t``."""
        number = self.root(number)
        if number == PIXELS:
            return "uint8"
        if number == self.root(len(self.operations) - 1):
            return "int32"  # the logits
        operation = self.operations[number]
        if isinstance(operation, Convolution):
            return sums_type(operation)
        return smallest_type(operation.low, operation.high)

    def _place(self) -> tuple[dict[int, int], dict[str, int]]:
        # first fit in the order of steps; an addition may take the place of what it is the last to read: where the two
        # overlap its result begins no later, and is written from its beginning on
        last_read: dict[int, int] = {}
        for step in self.steps:
            for read in self.operations[step].inputs:
                last_read[self.root(read)] = step
        places: dict[int, int] = {}
        live: dict[int, int] = {}
        sizes = dict.fromkeys(TYPES, 0)
        logits = self.root(len(self.operations) - 1)
        for step in self.steps:
            if isinstance(self.operations[step], Add):
                live = {number: end for number, end in live.items() if end > step}
            for number in self._written(step):
                if number == logits:
                    continue
                kind, size = self.type(number), int(np.prod(self.operations[number].shape))
                taken = sorted((places[other], self._end(other, places)) for other in live if self.type(other) == kind)
                start = 0
                for low, high in taken:
                    if start + size <= low:
                        break
                    start = max(start, high)
                places[number] = start
                live[number] = last_read.get(number, step)
                sizes[kind] = max(sizes[kind], start + size)
            live = {number: end for number, end in live.items() if end > step}
        return places, sizes

    def _end(self, number: int, places: dict[int, int]) -> int:
        return places[number] + int(np.prod(self.operations[number].shape))

    def pointer(self, number: int) -> str:
        """A result's first value as C spells it."""
        number = self.root(number)
        if number == PIXELS:
            return "pixels"
        if number == self.root(len(self.operations) - 1):
            return "logits"
        return f"{self.type(number)}s + {self.places[number]}"


def smallest_type(low: int, high: int, among: Iterable[str] = TYPES) -> str:
    """The first type that holds all of [low, high]."""
    return next(kind for kind in among if TYPES[kind][0] <= low and high <= TYPES[kind][1])


def sums_type(operation: Convolution) -> str:
    """The type of a convolution's sums, every partial sum included."""
    return "int16" if operation.largest_sum < 1 << 15 else "int32"
