"""Weights from any published naming, and ours, into a network."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from apot_fat.checkpoint.files import read_checkpoint
from apot_fat.plain import missing_values
from apot_fat.quant.all_layers import threshold_layers
from apot_fat.quant.quantizer import PARAMETERS, THRESHOLDS
from apot_fat.quant.units import threshold_in_use

STATE_KEYS = ("state_dict", "model")  # under which published checkpoints keep the weights
BEST_KEYS = ("best_prec", "best_acc1", "best_top1_acc")  # and the best accuracy, %

_RENAMES = (
    (re.compile(r"^module\."), ""),
    (re.compile(r"\.weight_quant\.wgt_alpha$"), ".weight_alpha"),
    (re.compile(r"\.weight_quant\.transform\.weight$"), ".transform"),
)
_UNUSED_TRANSFORM = re.compile(r"\.transform\.weight$")  # stored, never used, by FAT's first and last layers
_QUANTIZER = re.compile(rf"\.({'|'.join(PARAMETERS)})$")
_THRESHOLD = re.compile(rf"({'|'.join(THRESHOLDS)}|wgt_alpha)$")
_FLOATS = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16})
_REAL = _FLOATS | {torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
_INITIAL_VALUES = 2  # of a kind of threshold in one network: FAT's MobileNetV2 holds layers of two variants


def load_weights(
    model: nn.Module,
    source: str | os.PathLike[str] | Mapping[str, Any],
    *,
    other_bits: bool = False,
    other_classes: bool = False,
    label: str | None = None,
) -> nn.Module:
    """Load weights in any published naming, or ours, strictly.

    Accepted: a path, a checkpoint dict (``state_dict`` or ``model``), or a state dict; the network's own names, and
    others with or without ``module.``; thresholds as ``weight_quant.wgt_alpha`` or ``weight_alpha``; FAT's
    ``weight_quant.transform.weight``, its last layer named ``linear``, and the unused ``transform.weight`` of its first
    and last layers. A layer's threshold becomes that of each channel where the network has one a channel; not the other
    way round. A full-precision network leaves out the unused thresholds and transforms of published ones: they are all
    still at their initial values.

    Args:
        model: the network to fill in place.
        source: where the weights come from.
        other_bits: True to start from another bit-width: thresholds and transforms that the source lacks keep their
            initial values, those that the model lacks are dropped, and so is a bias only full precision has.
        other_classes: True to start from a network with another number of outputs: the model's last linear layer keeps
            its initial weight and bias where the source's have other shapes.
        label: what errors call the source.

    Returns:
        The model.

    Raises:
        ValueError: a file that is no checkpoint, names and shapes that do not fit, or values that no network has
            (``check_values``), naming them; the model is then unchanged.
    """
    label = label or ("state dict" if isinstance(source, Mapping) else f"checkpoint {Path(source)}")
    content = source if isinstance(source, Mapping) else read_checkpoint(source)
    state = _rename(state_dict_of(content, label), model)
    own = model.state_dict()
    for name, tensor in own.items():
        if name.endswith(THRESHOLDS) and tensor.dim() and name in state and not state[name].dim():
            state[name] = state[name].expand(tensor.shape)
    for name in _unused_quantizers(state, model):
        del state[name]
    missing = [name for name in own if name not in state]
    left_over = [name for name in state if name not in own]
    if other_bits:
        missing = [name for name in missing if not _QUANTIZER.search(name)]
        left_over = [name for name in left_over if not _QUANTIZER.search(name) and not _is_float_bias(name, own)]
    if other_classes:
        for name in _last_layer(model):
            if name in state and state[name].shape != own[name].shape:
                state[name] = own[name]
    misfits = [
        f"{name} {tuple(state[name].shape)} for {tuple(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    problems = [
        f"{what} {_some(names)}"
        for what, names in (("missing", missing), ("left over", left_over), ("of another shape", misfits))
        if names
    ]
    if problems:
        raise ValueError(
            f"{label} does not fit this {type(model).__name__}: {'; '.join(problems)}{_hint(model, state)}"
        )
    used = {name: tensor for name, tensor in own.items() if name in state}
    for name, tensor in used.items():
        check_type(name, state[name], tensor.dtype, label)
        check_values(name, state[name].to(tensor.dtype) if tensor.is_floating_point() else state[name], label)
    with torch.no_grad():
        for name, tensor in used.items():
            tensor.copy_(state[name])
        for name, layer in threshold_layers(model):
            if (
                layer.weight_alpha is not None
                and f"{name}.weight_alpha" not in state
                and layer.spec.weight_alpha is None
            ):
                layer.set_weight_alpha_from_step()  # its initial value is that of the weight
    return model


def state_dict_of(content: Mapping[str, Any], label: str = "checkpoint") -> dict[str, Tensor]:
    """The state dict inside a checkpoint's content.

    Raises:
        ValueError: there is none, or an entry is no tensor by its name that holds its values.
    """
    for key in STATE_KEYS:
        if isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not content or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items()):
        raise ValueError(f"{label} holds no state dict: expected tensors by name, as such or under {STATE_KEYS}")
    for name, tensor in content.items():
        if (what := missing_values(tensor)) is not None:
            raise ValueError(
                f"{label}: {name} is a tensor {what}; expected one that holds each of its values in memory"
            )
    return dict(content)


def check_type(name: str, values: Tensor, expected: torch.dtype, label: str) -> None:
    """Raise ``ValueError`` unless values are of the expected type or real numbers, which become it."""
    if values.dtype != expected and values.dtype not in _REAL:
        raise ValueError(f"{label}: {name} holds values of {values.dtype}, expected real numbers or {expected}")


def check_values(name: str, values: Tensor, label: str) -> None:
    """Refuse values that no network has: it would compute NaN, or be exported with it, and say nothing.

    One pass, no copy. A threshold at or below 0 is left as it is: training reaches it, and layers take ``ALPHA_FLOOR``
    in its place.

    Args:
        name: of a parameter or buffer.
        values: of any type; those of integers and of rare types are not looked at.
        label: what errors call the file.

    Raises:
        ValueError: NaN or infinite, or a batch norm's variance below 0.
    """
    if values.dtype not in _FLOATS or not values.numel():
        return
    low, high = torch.stack(values.aminmax()).tolist()
    is_variance = name.endswith("running_var")
    if math.isfinite(low) and math.isfinite(high) and (low >= 0 or not is_variance):
        return
    wrong = low if math.isfinite(high) else high
    kind = "variances" if is_variance else "thresholds" if _THRESHOLD.search(name) else "weights and means"
    allowed = "finite and at least 0" if is_variance else "finite"
    raise ValueError(f"{label}: {name} holds {wrong}, {kind} are {allowed}; damaged, or its training diverged")


def checkpoint_thresholds(
    content: Mapping[str, Any], label: str = "checkpoint"
) -> dict[str, tuple[float | None, float | None]]:
    """The clipping thresholds in a checkpoint's content, published or ours, without building its network.

    Returns:
        (weight's, activation's) by layer name, in the order of definition; None where a side is float, the mean where
        the weight has one a channel.

    Raises:
        ValueError: it holds no state dict, or a threshold that is NaN or infinite.
    """
    found: dict[str, dict[str, float]] = {}
    for published, tensor in state_dict_of(content, label).items():
        name = _our_name(published)
        for suffix in THRESHOLDS:
            if name.endswith(f".{suffix}"):
                check_type(published, tensor, torch.float32, label)
                check_values(published, tensor, label)
                alpha = threshold_in_use(tensor)
                mean = alpha.mean(dtype=torch.promote_types(tensor.dtype, torch.float32)).item()
                found.setdefault(name.removesuffix(f".{suffix}"), {})[suffix] = mean
    return {layer: (alphas.get("weight_alpha"), alphas.get("act_alpha")) for layer, alphas in found.items()}


def num_outputs(content: Mapping[str, Any], label: str = "checkpoint") -> int:
    """Outputs of the network in a checkpoint's content: the length of its last bias.

    Raises:
        ValueError: it holds no state dict, or no bias.
    """
    biases = [t for name, t in state_dict_of(content, label).items() if name.endswith(".bias") and t.dim() == 1]
    if not biases:
        raise ValueError(f"{label} holds no bias of a last layer: it is no network of this package")
    return biases[-1].shape[0]


def best_accuracy(content: Mapping[str, Any]) -> float | None:
    """The best top-1 accuracy (%) a checkpoint's content records, or None."""
    for key in BEST_KEYS:
        best = content.get(key)
        if isinstance(best, Tensor) and best.numel() == 1 and best.dtype in _REAL:
            best = best.item()
        if isinstance(best, int | float) and 0 <= best <= 100:
            return float(best)
    return None


def _last_layer(model: nn.Module) -> list[str]:
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return [f"{linear[-1]}.weight", f"{linear[-1]}.bias"] if linear else []


def _our_name(published: str) -> str:
    name = published
    for pattern, replacement in _RENAMES:
        name = pattern.sub(replacement, name)
    return name


def _rename(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    own = model.state_dict()
    renamed = {}
    for published, tensor in state.items():
        name = published if published in own else _our_name(published)
        if name not in own and "fc.weight" in own and name.startswith("linear."):
            name = f"fc.{name.removeprefix('linear.')}"
        if _UNUSED_TRANSFORM.search(name) and name not in own:
            continue
        renamed[name] = tensor
    return renamed


def _unused_quantizers(state: Mapping[str, Tensor], model: nn.Module) -> list[str]:
    # published layers have them at 32 bits too, at their initial values; trained ones differ from layer to layer, and
    # belong to weights that a full-precision network must not take for its own
    if any(_QUANTIZER.search(name) for name in model.state_dict()):
        return []
    layers = {name for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}
    found = [name for name in state if _QUANTIZER.search(name) and name.rpartition(".")[0] in layers]
    if any(state[name].dtype not in _REAL for name in found):
        return []
    for kind in THRESHOLDS:
        values = torch.cat([torch.empty(0), *(state[name].flatten().cpu() for name in found if name.endswith(kind))])
        if len(values.unique()) > _INITIAL_VALUES:
            return []
    learned = any(len(state[name].unique()) > 1 for name in found if name.endswith("transform"))
    return [] if learned else found


def _is_float_bias(name: str, own: Mapping[str, Tensor]) -> bool:
    return name.endswith(".bias") and f"{name.removesuffix('bias')}weight" in own


def _some(names: list[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _hint(model: nn.Module, state: Mapping[str, Tensor]) -> str:
    quantized_state = any(_QUANTIZER.search(name) for name in state)
    quantized_model = any(True for _ in threshold_layers(model))
    own_dims = {name: t.dim() for name, t in model.state_dict().items() if name.endswith(THRESHOLDS)}
    for name, dim in own_dims.items():
        if name in state and state[name].dim() > dim:
            side = "weight" if name.endswith("weight_alpha") else "act"
            return f" (its {side} thresholds are one a channel: build the network with {side}_per_channel)"
    if quantized_state != quantized_model:
        kinds = ("quantized", "full-precision")
        return (
            f" (the weights are {kinds[not quantized_state]}, the network {kinds[not quantized_model]}: check the bits)"
        )
    return ""
