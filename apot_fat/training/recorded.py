"""What a checkpoint of a training run records besides weights: read in one place, and checked there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from apot_fat.training.config import TrainConfig, is_allowed

_NEEDED = {"arch", "preset", "bit", "weight_per_channel", "act_per_channel"}
_NEEDED |= {"data", "test_data", "image_size", "mean", "std", "amp"}


def recorded_config(content: Mapping[str, Any], where: str) -> TrainConfig | None:
    """The config of the run that wrote a checkpoint, of any version; None where it records none, as published ones.

    What this version does not know is left out, and what it does not allow any more, but for network and images, takes
    its default: a network can be read long after its recipe.

    Args:
        content: the checkpoint's.
        where: what errors call it.

    Raises:
        ValueError: what it records is no config, or names no network and images that this version knows.
    """
    recorded = content.get("config")
    if recorded is None:
        return None
    if not isinstance(recorded, dict) or not {"arch", "bit"} <= recorded.keys():
        raise ValueError(
            f"{where}: its config is not that of a run (no arch and bit by name): save its state_dict alone to read it"
        )
    known = [option for option in fields(TrainConfig) if option.name in recorded]
    try:
        values = {o.name: recorded[o.name] for o in known if o.name in _NEEDED or is_allowed(o, recorded[o.name])}
        return TrainConfig(**values)
    except ValueError as error:
        raise ValueError(f"{where}: its config does not fit: {error}") from error


def recorded_history(content: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """The rows of a run's checkpoint, one an epoch.

    Raises:
        ValueError: none there, or other values than a run's.
    """
    history = content.get("history")
    if not isinstance(history, list):
        raise ValueError(f"{where}: not written by a training run of apot-fat")
    for epoch, row in enumerate(history, 1):
        if (
            not isinstance(row, dict)
            or row.get("epoch") != epoch
            or not _is_row(row)
            or row.keys() != history[0].keys()
        ):
            raise ValueError(f"{where}: row {epoch} of its history is not that of an epoch; the file is damaged")
    return history


def _is_row(row: dict[str, Any]) -> bool:
    scores = [row.get(name) for name in ("epoch", "test_top1", "seconds")]
    scores += [value for name, value in row.items() if _is_text(name) and name.endswith(("_loss", "_top1"))]
    layers = row.get("layers")
    return isinstance(layers, dict) and all(map(_is_layer, layers.values())) and all(map(_is_number, scores))


def _is_layer(layer: Any) -> bool:
    if not isinstance(layer, dict) or not {"weight_alpha", "act_alpha"} <= layer.keys():
        return False
    return all(alpha is None or _is_number(alpha) for alpha in (layer["weight_alpha"], layer["act_alpha"]))


def _is_number(value: Any) -> bool:
    return type(value) is float or (type(value) is int and abs(value) < 1 << 63)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)
