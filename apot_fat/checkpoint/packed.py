"""Networks in low-bit files: one safetensors file with b bits a weight.

A file holds, for every quantized layer, the codes of its weight packed to the bit (``<layer>.weight``, uint8); all
float32 leftovers (thresholds, biases, norms) one after the other (``float32``); anything else under its own name. Its
metadata say which layer is quantized how, where each leftover lies, and how to build the network if it is one of
``list_models()``. A code is the index of a level among the signed ones, from the most negative up; a threshold, of the
layer or of each channel, is what it counts in.
"""

from __future__ import annotations

import base64
import json
import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from math import isfinite, prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from apot_fat.checkpoint.bit_packing import MOST_BITS, pack_bits, unpack_bits
from apot_fat.checkpoint.files import atomic_write
from apot_fat.checkpoint.network_state import checked_state, unique_state, unwrapped
from apot_fat.checkpoint.weights import check_type, check_values, checkpoint_thresholds
from apot_fat.models import create_model
from apot_fat.optional import needed_for
from apot_fat.quant.convert import convert_layer, fold_weight, leave_fast_paths
from apot_fat.quant.integers import integer_weight
from apot_fat.quant.layers import AnyQuantized
from apot_fat.quant.quantizer import PARAMETERS, THRESHOLDS, parameter_shapes
from apot_fat.quant.spec import EIGHT_BIT, FLOAT_BITS, QuantSpec
from apot_fat.quant.units import along_rows, threshold_in_use

PACKED_SUFFIX = ".safetensors"
FORMAT = "apot-fat packed"
VERSION = 1
_PURPOSE = "a packed file"
_FLOATS = "float32"
_MAX_INDEX_BYTES = 1 << 26


class _Plan(NamedTuple):
    """A layer of a packed file; no weight means that it lies among the leftovers."""

    spec: QuantSpec
    relu: bool
    fixed_bits: bool
    shape: tuple[int, ...]
    weight: Tensor | None


def save_packed(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> int:
    """Write a network to a packed file, atomically.

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
    with needed_for(_PURPOSE):
        from safetensors.torch import save_file
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
        codes, described[name] = _pack_layer(module)
        if codes is not None:
            tensors[_key(name, "weight")] = codes
    floats: dict[str, list[int]] = {}
    blob = []
    for name, tensor in _left_over(model, layers, tensors).items():
        if tensor.dtype == torch.float32:
            floats[name] = list(tensor.shape)
            blob.append(tensor.flatten())
        else:
            tensors[name] = tensor.contiguous()
    tensors[_FLOATS] = torch.cat([torch.empty(0), *blob])
    index = {"layers": described, "floats": floats, "network": getattr(model, "created_as", None)}
    if normalization is not None:
        index["normalization"] = normalization
    packed = base64.b85encode(zlib.compress(json.dumps(index, separators=(",", ":")).encode(), 9)).decode()
    metadata = {"format": FORMAT, "version": str(VERSION), "index": packed}
    with atomic_write(path) as temporary:
        save_file({name: tensor.cpu() for name, tensor in tensors.items()}, temporary, metadata)
        return temporary.stat().st_size


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
    path = Path(path)
    tensors, index = _read(path)
    try:
        keys = {name: _key(name, "weight") for name in index["layers"]}
        codes = {name: tensors.pop(key) for name, key in keys.items() if key in tensors}
        state = tensors | _split(tensors.pop(_FLOATS), index["floats"])
        plans = {
            name: _unpack_layer(entry, codes.get(name), state.get(_key(name, "weight_alpha")))
            for name, entry in index["layers"].items()
        }
        network = index["network"]
    except (KeyError, TypeError, AttributeError, RuntimeError, OverflowError, ValueError) as error:
        raise ValueError(f"packed file {path}: its metadata do not fit its contents ({error})") from error
    weights = {keys[name]: plan.weight for name, plan in plans.items() if plan.weight is not None}
    for name, tensor in (state | weights).items():
        check_values(name, tensor, f"packed file {path}")
    if model is None:
        if not isinstance(network, Mapping):
            raise ValueError(
                f"packed file {path}: its network is none of list_models(): give one to fill as model (--model)"
            )
        try:
            with torch.device("meta"):  # nothing is allocated before it is known to fit
                _check_fit(path, create_model(**network), plans, state)
        except (TypeError, AttributeError, RuntimeError, OverflowError) as error:
            raise ValueError(f"packed file {path}: its metadata are damaged") from error
        model = create_model(**network)
    else:
        checked_state(unwrapped(model))
        _check_fit(path, unwrapped(model), plans, state)
    filled = unwrapped(model)
    _set_layers(filled, plans)
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
    tensors, index = _read(Path(path))
    try:
        state = tensors | _split(tensors.pop(_FLOATS), index["floats"])
    except (TypeError, RuntimeError, ValueError) as error:
        raise ValueError(f"packed file {path}: its metadata do not fit its contents ({error})") from error
    names = [_key(layer, kind) for layer in index["layers"] for kind in THRESHOLDS]
    found = {name: state[name] for name in names if name in state}
    return checkpoint_thresholds(found, f"packed file {path}") if found else {}


def packed_normalization(path: str | os.PathLike[str]) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """What the images of a packed file's network are normalised with, (mean, std); None where it does not say.

    Raises:
        ValueError: no such file, or no packed file.
        MissingPackageError: safetensors.
    """
    given = _read(Path(path), whole=False)[1].get("normalization")
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
            users.setdefault(id(parameter), []).append(_key(name, key))
    for name, module in layers.items():
        if len(shared := users[id(module.weight)]) > 1:
            own = _key(name, "weight")
            raise ValueError(
                f"{type(model).__name__}: {' and '.join(shared)} share one weight, which cannot be packed: give "
                f"the layer a copy of its own, {own} = nn.Parameter({own}.detach().clone())"
            )


def _pack_layer(module: AnyQuantized) -> tuple[Tensor | None, dict[str, Any]]:
    """Packed codes, or None for a float weight; and what to say of the layer: no spec is ``EIGHT_BIT``."""
    integers = integer_weight(module)
    dtype = str(module.weight.dtype).removeprefix("torch.")
    entry: dict[str, Any] = {"shape": list(module.weight.shape), "dtype": dtype}
    if module.spec.weight_scale == "max":
        lowest, highest = (0, 0) if integers is None else map(int, integers.numerators.aminmax())
        bits = max(1, (highest - lowest).bit_length())
        if module.relu:
            entry["relu"] = True
        if integers is None or bits > MOST_BITS:  # the scale is max(w), and some weight is far below -max(w)
            return None, entry
        entry |= {"offset": lowest, "bits": bits, "scale": float(integers.scale)}
        return pack_bits(integers.numerators - lowest, bits), entry
    spec = replace(module.spec, weight_norm="none", weight_norm_gradient=False, transform=False)
    fields = asdict(spec)
    del fields["weight_scale"]  # implied, and unknown to earlier versions
    if not spec.act_per_channel:
        del fields["act_per_channel"]
    entry |= {"spec": fields, "relu": module.relu, "fixed_bits": module.fixed_bits}
    if integers is None:
        return None, entry
    signed = torch.tensor(spec.weight_set.signed_numerators, device=integers.numerators.device)
    return pack_bits(torch.bucketize(integers.numerators.contiguous(), signed), spec.weight_bits), entry


def _unpack_layer(entry: dict[str, Any], codes: Tensor | None, alpha: Tensor | None) -> _Plan:
    shape = tuple(entry["shape"])
    count = prod(shape)
    spec = QuantSpec(**entry["spec"]) if "spec" in entry else EIGHT_BIT
    plan = _Plan(spec, entry.get("relu") is True, entry.get("fixed_bits") is True, shape, None)
    by_max = spec.weight_scale == "max"
    if "offset" not in entry if by_max else spec.weight_bits == FLOAT_BITS:
        return plan
    bits = int(entry["bits"]) if by_max else spec.weight_bits
    dtype = {"float32": torch.float32, "float64": torch.float64, "float16": torch.float16, "bfloat16": torch.bfloat16}[
        entry["dtype"]
    ]
    if codes is None or codes.dtype != torch.uint8 or codes.dim() != 1 or not 1 <= bits <= MOST_BITS:
        raise ValueError("a layer has no packed weight")
    if not all(isinstance(size, int) and size >= 0 for size in shape) or codes.numel() != -(-count * bits // 8):
        raise ValueError(f"{codes.numel()} bytes for a weight of shape {shape} and {bits} bits")
    values, exact = unpack_bits(codes, bits, count), torch.promote_types(dtype, torch.float32)
    if by_max:
        weight = (values + int(entry["offset"])).to(exact) / spec.weight_set.denominator * float(entry["scale"])
        return plan._replace(weight=weight.view(shape).to(dtype))
    if alpha is None or tuple(alpha.shape) != (shape[:1] if spec.weight_per_channel else ()) or alpha.is_complex():
        raise ValueError("a layer has no threshold")
    signed = spec.weight_set.signed_tensor(exact)
    if count and int(values.max()) >= len(signed):
        raise ValueError(f"code {int(values.max())} of {len(signed)} levels")
    levels = signed[values].view(shape)
    return plan._replace(weight=(levels * along_rows(alpha.to(signed.dtype), len(shape))).to(dtype))


def _check_fit(path: Path, model: nn.Module, plans: Mapping[str, _Plan], state: Mapping[str, Tensor]) -> None:
    modules = dict(model.named_modules())
    for name, plan in plans.items():
        module = modules.get(name)
        if not isinstance(module, nn.Conv2d | nn.Linear) or tuple(module.weight.shape) != plan.shape:
            found = "nothing" if module is None else type(module).__name__
            if isinstance(module, nn.Conv2d | nn.Linear):
                found += f" of shape {tuple(module.weight.shape)}"
            raise ValueError(
                f"packed file {path}: layer {name!r} has the shape {plan.shape}, the network has {found} there"
            )
    own = _thresholds(name for name, module in modules.items() if isinstance(module, AnyQuantized))
    thresholds = _thresholds(plans)
    unique = unique_state(model)
    expected = {name: tensor.shape for name, tensor in unique.items() if name not in own}
    for name, plan in plans.items():
        if plan.weight is not None:
            expected.pop(_key(name, "weight"), None)
    given = {name: tensor.shape for name, tensor in state.items() if name not in thresholds}
    for name in (*expected, *given):
        if expected.get(name) != given.get(name):
            raise ValueError(
                f"packed file {path}: {name!r} is {_shape(given, name)}, in the network {_shape(expected, name)}"
            )
        check_type(name, state[name], unique[name].dtype, f"packed file {path}")
    for name, plan in plans.items():
        shapes = parameter_shapes(plan.spec, plan.shape[0], plan.shape[1] * getattr(modules[name], "groups", 1))
        for kind in THRESHOLDS:
            key = _key(name, kind)
            if (kind in shapes) != (key in state):
                raise ValueError(f"packed file {path}: {key} is {'missing' if kind in shapes else 'left over'}")
            if kind in shapes:
                check_type(key, state[key], torch.float32, f"packed file {path}")
                if state[key].shape != shapes[kind]:
                    raise ValueError(f"packed file {path}: {key} is not of shape {shapes[kind]}")


def _thresholds(layers: Iterable[str]) -> set[str]:
    return {_key(name, kind) for name in layers for kind in PARAMETERS}


def _key(layer: str, parameter: str) -> str:
    # a model that is the layer itself names it ""
    return f"{layer}.{parameter}" if layer else parameter


def _set_layers(model: nn.Module, plans: Mapping[str, _Plan]) -> None:
    """Make every layer what the file says, whatever the model quantizes."""
    for name, module in list(model.named_modules()):
        if name in plans or isinstance(module, AnyQuantized):
            _set_layer(module, plans.get(name))
    leave_fast_paths(model)


def _set_layer(module: nn.Module, plan: _Plan | None) -> None:
    # without a plan the layer is a plain one
    if plan is not None:
        layer = convert_layer(module, plan.spec)
        layer.relu, layer.fixed_bits = plan.relu, plan.fixed_bits
        if plan.weight is not None:
            with torch.no_grad():
                layer.weight.copy_(plan.weight)
        return
    assert isinstance(module, AnyQuantized)
    if module.relu:  # no plain layer does that
        module.spec = replace(module.spec, weight_bits=FLOAT_BITS, act_bits=FLOAT_BITS, weight_scale="threshold")
        module.fixed_bits = True
        return
    weight = module.weight
    fold_weight(module, nn.Conv2d if isinstance(module, nn.Conv2d) else nn.Linear)
    module.weight = weight  # which others may share


def _shape(shapes: Mapping[str, torch.Size], name: str) -> str:
    return f"of shape {tuple(shapes[name])}" if name in shapes else "missing"


def _left_over(model: nn.Module, layers: Mapping[str, nn.Module], packed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    left = {}
    for name, tensor in unique_state(model).items():
        layer, _, kind = name.rpartition(".")
        if name in packed or (layer in layers and kind == "transform"):
            continue
        is_alpha = layer in layers and kind in ("weight_alpha", "act_alpha")
        left[name] = (threshold_in_use(tensor) if is_alpha else tensor).detach().cpu()
    return left


def _read(path: Path, *, whole: bool = True) -> tuple[dict[str, Tensor], dict[str, Any]]:
    # without whole the index alone
    if not path.is_file():
        raise ValueError(f"packed file {path}: no such file")
    with needed_for(_PURPOSE):
        from safetensors import SafetensorError, safe_open
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(f"packed file {path}: not written by save_packed")
            if metadata.get("version") != str(VERSION):
                raise ValueError(f"packed file {path}: version {metadata.get('version')}, this package reads {VERSION}")
            names = list(file.keys())
            tensors = {name: file.get_tensor(name) for name in names} if whole else {}
    except (SafetensorError, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"packed file {path}: not a safetensors file, or damaged ({error})") from error
    try:
        inflate = zlib.decompressobj()
        text = inflate.decompress(base64.b85decode(metadata["index"]), _MAX_INDEX_BYTES)
        index = json.loads(text)
        if inflate.unconsumed_tail or not isinstance(index, dict):
            raise ValueError
    except (KeyError, ValueError, zlib.error, RecursionError) as error:
        raise ValueError(f"packed file {path}: its metadata are damaged") from error
    if not isinstance(index.get("layers"), dict) or not isinstance(index.get("floats"), dict) or _FLOATS not in names:
        raise ValueError(f"packed file {path}: its metadata are damaged")
    return tensors, index


def _split(blob: Tensor, shapes: Mapping[str, list[int]]) -> dict[str, Tensor]:
    sizes = [prod(shape) for shape in shapes.values()]
    if blob.dtype != torch.float32 or blob.dim() != 1 or sum(sizes) != blob.numel() or any(size < 0 for size in sizes):
        raise ValueError(f"{blob.numel()} float values for {sum(sizes)} in its metadata")
    parts = blob.split(sizes)
    return {name: part.view(tuple(shape)) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
