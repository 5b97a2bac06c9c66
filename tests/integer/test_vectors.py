from __future__ import annotations

import numpy as np

from apot_fat import integer_program
from apot_fat.integer.program import Convolution, Thresholds
from apot_fat.integer.vectors import hexadecimal, narrowest, vectors
from tests.integer.networks import NORMALIZATION, Residual, normalized, random_pixels, with_statistics


def test_vectors_are_all_of_a_program() -> None:
    pixels = random_pixels(4, 8)
    model = with_statistics(Residual("apot-cifar", 3), normalized(pixels))
    program = integer_program(model, normalized(pixels), **NORMALIZATION)
    made = {name: (values, bits) for name, values, bits in vectors(program, pixels)}
    assert np.array_equal(made["pixels"][0], pixels)
    assert np.array_equal(made["logits"][0], program.run(pixels))
    for number, (operation, result) in enumerate(zip(program.operations, program.results(pixels), strict=True)):
        name = f"{number:02}_{operation.name}"
        assert np.array_equal(made[name][0], result)
        assert made[name][1] == operation.bits
        if isinstance(operation, Convolution):
            assert np.array_equal(made[f"{name}.weight"][0], operation.weight_OIHW)
        if isinstance(operation, Thresholds):
            assert np.array_equal(made[f"{name}.thresholds"][0], operation.thresholds_CT)
    for values, bits in made.values():
        text = [line for line in hexadecimal(values, bits).splitlines() if not line.startswith("//")]
        read = np.array([int(line, 16) for line in text], np.int64)
        read[read >> bits - 1 == 1] -= (1 << bits) if values.min() < 0 else 0
        assert np.array_equal(read.reshape(values.shape), values)
        assert np.array_equal(narrowest(values), values)
