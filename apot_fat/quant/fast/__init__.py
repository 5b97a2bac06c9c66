"""Speed: the same results as ``apot_fat.quant`` alone gives, sooner and in less memory.

Compiled kernels (``kernels``), projection by tables, bits and branch-free search (``projection``), activations as a
byte an element (``codes``), quantized inputs that are made again in backward (``remade``), weights kept in evaluation
(``kept``), products of bytes (``byte_product``), and what a layer takes of these (``layer_output``).
"""

from typing import get_args

from apot_fat.quant import seam
from apot_fat.quant.fast import kept, kernels, layer_output, projection
from apot_fat.quant.spec import KernelChoice


class _Fast(seam.Plain):
    choices = get_args(KernelChoice)
    pointwise = staticmethod(kernels.pointwise)
    project = staticmethod(projection.project)
    total = staticmethod(kernels.total)
    weight = staticmethod(kept.kept_weight)
    output = staticmethod(layer_output.layer_output)
    forget = staticmethod(kept.forget)
    kept_weights = staticmethod(kept.kept_weights)
    uncompiled = staticmethod(kernels.uncompiled)
    compiler_works = staticmethod(kernels.compiler_works)
    inductor_options = staticmethod(kernels.inductor_options)


seam.speed = _Fast()
