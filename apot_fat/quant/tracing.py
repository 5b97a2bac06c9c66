"""The graph of a network's forward, by ``torch.fx``."""

from __future__ import annotations

from torch import fx, nn

from apot_fat.quant.layers import AnyQuantized


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, AnyQuantized) or super().is_leaf_module(m, module_qualified_name)


def trace(network: nn.Module) -> fx.GraphModule:
    """Its graph, quantized layers whole.

    Raises:
        ValueError: ``torch.fx`` cannot follow its forward.
    """
    tracer = _Tracer()
    try:
        return fx.GraphModule(network, tracer.trace(network))
    except Exception as error:  # whatever a user's forward raises when it is traced
        raise ValueError(
            f"{type(network).__name__}: torch.fx cannot trace it ({error}); its forward must not branch on its input"
        ) from error
