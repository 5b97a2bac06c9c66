"""Filters negated in front of batch norms, so that normalising a layer's weight changes little of what it computes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor, fx, nn

from apot_fat.quant.convert.norms import BatchNorm
from apot_fat.quant.layers import AnyQuantized
from apot_fat.quant.spec import FLOAT_BITS
from apot_fat.quant.tracing import trace
from apot_fat.quant.units import along_rows

_Layer = nn.Conv1d | nn.Conv2d


@torch.no_grad()
def balance_filters(model: nn.Module) -> nn.Module:
    """Negate filters of a float network until the weights of each layer have a mean near 0, in place.

    A normalised weight (``weight_norm`` ``standardize`` or ``center``) loses its mean over the layer, and the output
    that times the sum of each patch, which no batch norm brings back. A filter whose output goes into a batch norm
    alone may as well have the other sign, and with the right half of them negated there is no mean to lose.

    Equation: signs s_o, one a filter, with Σ_o s_o m_o near 0, m_o the mean of filter o: each in turn, that of the
    largest |m_o| first, is the one that brings the sum nearer to 0. Then w_o ← s_o w_o, b_o ← s_o b_o, and in the norm
    running mean and γ ← s_o times theirs: what it gives stays the same, to the bit.

    Args:
        model: a network that is not quantized yet, or at 32 bits. Quantized layers, those whose output goes elsewhere
            too, and those called more than once stay as they are; so do linear layers: of their (N, L, C) a batch norm
            normalises L, and a trace knows no shapes.

    Returns:
        The model: the same function, in training and evaluation.

    Raises:
        ValueError: ``torch.fx`` cannot trace it.

    Paper: APoT, "Weight Normalization", is what makes it useful; neither paper does it.
    """
    for layer, norm in _layers_with_norms(model):
        signs = _balancing_signs(layer.weight.flatten(1).double().mean(1)).to(layer.weight)
        layer.weight.mul_(along_rows(signs, layer.weight.dim()))
        for values in (layer.bias, norm.running_mean, norm.weight):
            if values is not None:
                values.mul_(signs)
    return model


def _balancing_signs(means: Tensor) -> Tensor:
    values, total = means.tolist(), 0.0
    signs = [1.0] * len(values)
    for place in sorted(range(len(values)), key=lambda o: -abs(values[o])):
        if abs(total - values[place]) < abs(total + values[place]):
            signs[place] = -1.0
        total += signs[place] * values[place]
    return torch.tensor(signs)


def _layers_with_norms(model: nn.Module) -> Iterator[tuple[_Layer, BatchNorm]]:
    # each float layer whose output goes into one batch norm and nowhere else, both called once
    nodes = trace(model).graph.nodes
    uses = Counter(id(parameter) for node in nodes for parameter in _parameters(model, node))
    for node in nodes:
        layer, norm = _called(model, node), _called(model, next(iter(node.users))) if len(node.users) == 1 else None
        if not isinstance(layer, _Layer) or not isinstance(norm, BatchNorm):
            continue
        if isinstance(layer, AnyQuantized) and layer.spec.weight_bits != FLOAT_BITS:
            continue
        if norm.weight is None or norm.running_mean is None or norm.num_features != layer.out_channels:
            continue
        if uses[id(layer.weight)] == uses[id(norm.weight)] == 1:
            yield layer, norm


def _called(model: nn.Module, node: fx.Node) -> nn.Module | None:
    return model.get_submodule(str(node.target)) if node.op == "call_module" else None


def _parameters(model: nn.Module, node: fx.Node) -> list[nn.Parameter]:
    # those of the module that a node calls, or the one that it reads
    called = _called(model, node)
    if called is not None:
        return list(called.parameters())
    read = dict(model.named_parameters(remove_duplicate=False)).get(str(node.target)) if node.op == "get_attr" else None
    return [] if read is None else [read]
