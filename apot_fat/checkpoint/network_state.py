"""What a packed file takes of a network: tensors with values, each once, by the network's own names."""

from __future__ import annotations

from torch import Tensor, nn

from apot_fat.plain import missing_values


def unwrapped(model: nn.Module) -> nn.Module:
    """The network itself: ``DataParallel`` and ``torch.compile`` put a name of theirs before its own."""
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif (compiled := model._modules.get("_orig_mod")) is not None:
            model = compiled
        else:
            return model


def checked_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict.

    Raises:
        ValueError: an entry is no parameter or buffer, or a tensor without values.
    """
    state = model.state_dict()
    for name, tensor in state.items():
        if name.rpartition(".")[2] == "_extra_state":
            raise ValueError(f"{type(model).__name__}: {name} is no parameter or buffer: a packed file cannot hold it")
        if (what := missing_values(tensor)) is not None:
            raise ValueError(f"{type(model).__name__}: {name} is a tensor {what}: put values there first")
    return state


def unique_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict without the further names of what is shared."""
    return {
        name: tensor for tensor, name in {t: n for n, t in reversed(model.state_dict(keep_vars=True).items())}.items()
    }
