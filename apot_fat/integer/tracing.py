"""The nodes of a network's graph: what reaches each on images, and of what kind it is."""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn


class Seen(NamedTuple):
    """A tensor of the float network on the calibration."""

    smallest: float
    largest: float
    shape: tuple[int, ...]


class _Ranges(fx.Interpreter):
    def __init__(self, traced: fx.GraphModule) -> None:
        super().__init__(traced)
        self.found: dict[fx.Node, Seen] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor) and result.is_floating_point() and result.numel():
            self.found[n] = Seen(float(result.min()), float(result.max()), tuple(result.shape))
        return result


def look_at(traced: fx.GraphModule, images: Tensor) -> dict[fx.Node, Seen]:
    """What each float tensor of a traced network is on images.

    Raises:
        ValueError: the network refuses them.
    """
    ranges = _Ranges(traced)
    try:
        ranges.run(images)
    except (RuntimeError, ValueError, IndexError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        given = f"calibration {tuple(images.shape)}"
        raise ValueError(f"{given}: the network refuses it ({reason}); give images of its size and channels") from error
    return ranges.found


def averages_all(node: fx.Node) -> bool:
    """Whether a mean is that of height and width."""
    dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    return isinstance(dims, list | tuple) and sorted(int(d) % 4 for d in dims) == [2, 3]


def layer_name(node: fx.Node) -> str:
    """What messages call a node."""
    return str(node.target) if node.op == "call_module" else node.name


def drops_nothing(node: fx.Node) -> bool:
    """Whether it is a dropout that does nothing in evaluation."""
    is_training = node.args[2] if len(node.args) > 2 else node.kwargs.get("training", True)
    return node.target is F.dropout and not is_training


def is_in_place(node: fx.Node, called: Any) -> bool:
    """Whether it overwrites what it reads."""
    is_method = node.op == "call_method" and str(called).endswith("_")
    return is_method or called is operator.iadd or bool(getattr(called, "inplace", node.kwargs.get("inplace", False)))


def is_relu(called: Any) -> bool:
    """Whether a module, function or method is a ReLU."""
    return isinstance(called, nn.ReLU) or called in (F.relu, torch.relu, "relu", "relu_")


def is_addition(node: fx.Node) -> bool:
    """Whether it adds."""
    return node.op in ("call_function", "call_method") and node.target in (
        operator.add,
        operator.iadd,
        torch.add,
        "add",
        "add_",
    )
