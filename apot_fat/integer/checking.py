"""A program beside its network in PyTorch: whether their logits differ by more than roundings explain."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from apot_fat.integer import tracing
from apot_fat.integer.program import IntegerProgram

Array = np.ndarray

LOGITS = "logits"
COMPARED = 8
DISTURBED = 24
"""Images that the disturbed network is run on, the compared ones again and again."""
FLOAT_ROUNDING = 2.0**-22
"""Of a tensor's largest value: float32's last bits, which decide on which side of a threshold a value lies."""
SMALL_ERROR, MARGIN = 0.01, 4.0


class _Disturbed(fx.Interpreter):
    """The network, what each of its layers reads off by random amounts up to a step or float32's last bits."""

    def __init__(self, traced: fx.GraphModule, steps: dict[str, float], seed: int) -> None:
        super().__init__(traced)
        self.steps, self.generator = steps, torch.Generator().manual_seed(seed)

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> tuple[Any, Any]:
        args, kwargs = super().fetch_args_kwargs_from_env(n)
        step = self.steps.get(LOGITS if n.op == "output" else tracing.layer_name(n), 0.0)
        return tuple(self._disturbed(arg, step) for arg in args), kwargs

    def _disturbed(self, x: Any, step: float) -> Any:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        largest = max(step, FLOAT_ROUNDING * float(x.abs().max()))
        return x + largest * (2 * torch.rand(x.shape, generator=self.generator) - 1)


def check_program(
    program: IntegerProgram, traced: fx.GraphModule, steps: dict[str, float], images: Tensor, pixels: Array
) -> None:
    """That a program gives its network's logits, but for what roundings explain, on eight images at most.

    The smallest rounding turns a code that lies near a threshold, and with it the logits of its image: by how much is
    the network's own matter. So the network is also run disturbed, all that its layers read off by random amounts as
    large as the program's roundings. Of most images must hold |p − y| ≤ 0.01 |y| + 4 max |d − y|, in the Euclidean norm
    of an image's logits: y the network's, p the program's, d the disturbed network's. The programs of released and
    of random networks, 313 with grids of 8 to 24 bits, stayed below 0.4 of that bound on most images.

    Args:
        program: to be checked.
        traced: the float network.
        steps: by the name of a layer, the real size of the unit to which what it reads is rounded.
        images: as the network is given them.
        pixels: the same, as the program is given them.

    Raises:
        ValueError: they differ by more.
    """
    images, pixels = images[:COMPARED], pixels[:COMPARED]

    def of_network(network: fx.GraphModule | fx.Interpreter) -> Array:
        run = network.run if isinstance(network, fx.Interpreter) else network
        return run(images).double().flatten(1).numpy()

    wanted = of_network(traced)
    disturbed = [of_network(_Disturbed(traced, steps, seed)) for seed in range(DISTURBED // len(images))]
    explained = np.linalg.norm(np.subtract(disturbed, wanted), axis=2).max(0)
    errors = np.linalg.norm(program.run(pixels) * program.logit_scale - wanted, axis=1)
    sizes = np.linalg.norm(wanted, axis=1)
    is_far = errors > SMALL_ERROR * sizes + MARGIN * explained
    if 2 * is_far.sum() > len(images):
        relative, rounding = (float(np.median(part / np.maximum(sizes, 1e-300))) for part in (errors, explained))
        raise ValueError(
            f"the integer program is not the network: on {is_far.sum()} of {len(images)} calibration images its logits "
            f"are off by {relative:.2g} of their size, of which its roundings explain {rounding:.2g}; this is a fault "
            "of apot-fat, please report it with the network's code: until it is mended, write the network for another "
            "target (--to onnx), or find by its parts the layer that is at fault and leave it out"
        )
