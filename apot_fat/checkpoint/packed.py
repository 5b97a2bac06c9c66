"""Networks in low-bit files: one safetensors file with b bits a weight.

A file holds, for every quantized layer, the codes of its weight packed to the bit (``<layer>.weight``, uint8); all
float32 leftovers (thresholds, biases, norms) one after the other (``float32``); anything else under its own name. Its
metadata say which layer is quantized how, where each leftover lies, and how to build the network if it is one of
``list_models()``. A code is the index of a level among the signed ones, from the most negative up; a threshold, of the
layer or of each channel, is what it counts in.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from apot_fat.checkpoint.network_state import checked_state, unique_state, unwrapped
from apot_fat.checkpoint.packed_file import read_tensors, take_floats, write_tensors
from apot_fat.checkpoint.packed_layers import check_fit, pack_layer, parameter_name, set_layers, unpack_layer
from apot_fat.checkpoint.weights import check_values, checkpoint_thresholds
from apot_fat.models import create_model
from apot_fat.quant.layers import AnyQuantized
from apot_fat.quant.quantizer import THRESHOLDS
from apot_fat.quant.units import threshold_in_use

PACKED_SUFFIX = ".safetensors"


def save_packed(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> int:
    """Write a network to a packed file, atomically; the same network gives the same bytes.

    Args:
        model: any network with quantized layers; what else it holds stays float.
        path: the file, ``.safetensors`` by custom.
        mean, std: what its images are normalised with, (image / 255 − mean) / std, a number a channel: the commands
            that read the file then do so.

    An 8-bit weight counts in its maximum: one with values so far below the negative maximum that 16 bits do not hold
    their codes stays float32 in the file.

    Returns:
        The size of the file in bytes.

    Of a network in ``DataParallel`` or ``torch.compile`` the network itself is written.

    Raises:
        ValueError: no quantized layer, one that shares its weight with another module, powers of two over more than
            2^31, values that no network has (NaN), or none (meta); a module's extra state; a mean without a std, or
            numbers that cannot be these. Nothing is then written.
        MissingPackageError: safetensors.
    """
    normalization = None if mean is None and std is None else _normalization(mean, std)
    model = unwrapped(model)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, AnyQuantized)}
    if not layers:
        raise ValueError(f"{type(model).__name__} holds no quantized layer: there is nothing to pack")
    _check_own_weights(model, layers)
    for name, tensor in checked_state(model).items():
        check_values(name, tensor, type(model).__name__)
    tensors: dict[str, Tensor] = {}
    described: dict[str, dict[str, Any]] = {}
    for name, module in layers.items():
        codes, described[name] = pack_layer(module)
        if codes is not None:
            tensors[parameter_name(name, "weight")] = codes
    index = {"layers": described, "network": getattr(model, "created_as", None)}
    if normalization is not None:
        index["normalization"] = normalization
    return write_tensors(path, tensors, _left_over(model, layers, tensors), index)


def load_packed(path: str | os.PathLike[str], model: nn.Module | None = None) -> nn.Module:
    """Read a network from a packed file.

    Its outputs are those of the network that was saved, to the bit. Its weights are the quantized ones, no longer
    normalised or transformed; it can be trained on.

    Args:
        path: a file of ``save_packed``.
        model: the float network to fill, for one that is not in ``list_models()``: built as it was before
            ``quantize``, or quantized in any way; its layers become those of the file.

    Returns:
        The network, in evaluation mode.

    Raises:
        ValueError: no such file, no packed file or a damaged one, one of another network, or a network without values
            (meta) to fill; a given network is then unchanged.
        MissingPackageError: safetensors.
    """
    where = f"packed file {path}"
    tensors, index = read_tensors(Path(path))
    try:
        keys = {name: parameter_name(name, "weight") for name in index["layers"]}
        codes = {name: tensors.pop(key) for name, key in keys.items() if key in tensors}
        state = tensors | take_floats(tensors, index)
        plans = {
            name: unpack_layer(entry, codes.get(name), state.get(parameter_name(name, "weight_alpha")))
            for name, entry in index["layers"].items()
        }
        network = index["network"]
    except (KeyError, TypeError, AttributeError, RuntimeError, OverflowError, ValueError) as error:
        raise ValueError(f"{where}: its metadata do not fit its contents ({error})") from error
    weights = {keys[name]: plan.weight for name, plan in plans.items() if plan.weight is not None}
    for name, tensor in (state | weights).items():
        check_values(name, tensor, where)
    if model is None:
        if not isinstance(network, Mapping):
            raise ValueError(f"{where}: its network is none of list_models(): give one to fill as model (--model)")
        try:
            with torch.device("meta"):  # nothing is allocated before it is known to fit
                check_fit(where, create_model(**network), plans, state)
        except (TypeError, AttributeError, RuntimeError, OverflowError) as error:
            raise ValueError(f"{where}: its metadata are damaged") from error
        model = create_model(**network)
    else:
        checked_state(unwrapped(model))
        check_fit(where, unwrapped(model), plans, state)
    filled = unwrapped(model)
    set_layers(filled, plans)
    with torch.no_grad():
        own = filled.state_dict()
        for name, tensor in state.items():
            own[name].copy_(tensor)
    return model.eval()


def packed_thresholds(path: str | os.PathLike[str]) -> dict[str, tuple[float | None, float | None]]:
    """The clipping thresholds in a packed file, as ``checkpoint_thresholds`` gives them; its network is not needed.

    Raises:
        ValueError: no such file, or no packed file.
        MissingPackageError: safetensors.
    """
    tensors, index = read_tensors(Path(path))
    try:
        state = tensors | take_floats(tensors, index)
    except (TypeError, RuntimeError, ValueError) as error:
        raise ValueError(f"packed file {path}: its metadata do not fit its contents ({error})") from error
    names = [parameter_name(layer, kind) for layer in index["layers"] for kind in THRESHOLDS]
    found = {name: state[name] for name in names if name in state}
    return checkpoint_thresholds(found, f"packed file {path}") if found else {}


def packed_normalization(path: str | os.PathLike[str]) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """What the images of a packed file's network are normalised with, (mean, std); None where it does not say.

    Raises:
        ValueError: no such file, or no packed file.
        MissingPackageError: safetensors.
    """
    given = read_tensors(Path(path), whole=False)[1].get("normalization")
    if given is None:
        return None
    try:
        mean, std = _normalization(*given)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"packed file {path}: its metadata are damaged") from error
    return tuple(mean), tuple(std)


def _normalization(mean: Sequence[float] | None, std: Sequence[float] | None) -> tuple[list[float], list[float]]:
    if mean is None or std is None:
        raise ValueError(f"mean {mean}, std {std}: give both, a number a channel each")
    means, stds = list(map(float, mean)), list(map(float, std))
    if len(means) != len(stds) or not all(map(isfinite, means + stds)) or not all(value > 0 for value in stds):
        raise ValueError(f"mean {mean}, std {std}: expected a finite number a channel each, std above 0")
    return means, stds


def _check_own_weights(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    # an embedding tied to a linear layer would read the quantized weight, or the layer the embedding's
    users: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            users.setdefault(id(parameter), []).append(parameter_name(name, key))
    for name, module in layers.items():
        if len(shared := users[id(module.weight)]) > 1:
            own = parameter_name(name, "weight")
            raise ValueError(
                f"{type(model).__name__}: {' and '.join(shared)} share one weight, which cannot be packed: give "
                f"the layer a copy of its own, {own} = nn.Parameter({own}.detach().clone())"
            )


def _left_over(model: nn.Module, layers: Mapping[str, nn.Module], packed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    left = {}
    for name, tensor in unique_state(model).items():
        layer, _, kind = name.rpartition(".")
        if name in packed or (layer in layers and kind == "transform"):
            continue
        is_alpha = layer in layers and kind in ("weight_alpha", "act_alpha")
        left[name] = (threshold_in_use(tensor) if is_alpha else tensor).detach().cpu()
    return left
